"""The database connections of the web UI: a small pool, and short transactions with a time limit."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row

from batchq.errors import DatabaseAway
from batchq.postgres.handler_connections import HandlerConnections
from batchq.postgres.statements import running, session

Conn = psycopg.Connection[Any]
Row = dict[str, Any]

POOL_SIZE = 4
READ_SECONDS = 5.0
MOST_ROWS = 500
PAGE_ROWS = 50
LOOK_ROWS = 5000  # how many batches one page of a filtered list searches
MOST_CHARACTERS = 20_000  # of a payload
SQL = running.load_statements(Path(__file__).with_name("queries.sql"))


class KnownAway(DatabaseAway):
    """One of several databases is away. The message may be shown to whoever looks at pages."""


class Reader:
    """The pool. Each method runs one transaction, and raises QueryCanceled if it takes too long, or DatabaseAway."""

    def __init__(self, dsn: str, seconds: float = READ_SECONDS) -> None:
        self._dsn = dsn
        self._seconds = seconds
        self._lock = threading.Lock()
        self._pool: HandlerConnections | None = None
        self._is_closed = False

    def open(self) -> None:
        """Connect. Raises PoolTimeout."""
        self.allow()
        self._connections().open()

    def allow(self) -> None:
        """Let the next transaction connect, also after `close`."""
        self._is_closed = False

    def close(self) -> None:
        """Close the connections. From now on a transaction raises DatabaseAway: a live part that is still read must not
        connect again."""
        with self._lock:
            self._is_closed = True
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    def _connections(self) -> HandlerConnections:
        """Return the pool. The first transaction opens it, and waits for a connection as every other one does."""
        with self._lock:
            if self._is_closed:
                raise DatabaseAway("the web UI has closed its connections")
            if self._pool is None:
                self._pool = HandlerConnections(
                    self._dsn, POOL_SIZE, self._seconds, self._seconds, queue_seconds=self._seconds, cleans=False,
                    settings=session.FIXED_FORMATS,
                )  # fmt: skip
                self._pool.pool.open()
            return self._pool

    def read(self, name: str, **parameters: Any) -> list[Row]:
        """Return the rows of a named statement, from a read-only transaction."""
        return self.ask(lambda conn: rows(conn, SQL[name], parameters))  # type: ignore[no-any-return]

    def read_by_index(self, name: str, **parameters: Any) -> list[Row]:
        """Do as *read*, and keep the planner from reading more rows than a LIMIT asks for."""

        def question(conn: Conn) -> list[Row]:
            conn.execute(SQL["by_index"])
            return rows(conn, SQL[name], parameters)

        return self.ask(question)  # type: ignore[no-any-return]

    def ask(self, question: Callable[[Conn], Any]) -> Any:
        """Return what *question* returns, from a read-only transaction."""
        with self._connections().transaction() as conn:
            conn.execute(SQL["only_read"])
            return question(conn)

    def act(self, action: Callable[[Conn], Any]) -> Any:
        """Return what *action* returns. Commits."""
        with self._connections().transaction() as conn:
            return action(conn)


def rows(conn: Conn, statement: bytes, parameters: Row) -> list[Row]:
    """Return the rows of a statement."""
    return conn.cursor(row_factory=dict_row).execute(statement, parameters or None).fetchall()
