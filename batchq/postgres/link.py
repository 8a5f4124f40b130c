"""Link: a thread's own connection, for batchq's own statements."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg.rows import tuple_row

from batchq.errors import OutcomeUnknown
from batchq.postgres.connections import Connection, connect_options, is_lost
from batchq.postgres.deadlines import deadline
from batchq.postgres.statements import session
from batchq.postgres.statements.running import Statement
from batchq.postgres.transactions import LONGEST_TEXT, is_read_only_error, reading, transaction


class Link:
    """One thread's own connection: opened when needed, closed when broken. Not for sharing.

    *conn*: the first one, where the caller has it already.
    """

    def __init__(self, dsn: str, timeout_seconds: float, conn: psycopg.Connection[Any] | None = None) -> None:
        self.timeout_seconds = timeout_seconds
        self.conn = conn
        self.answers = 0  # how often the database did what it was asked
        self._dsn = dsn
        self._quickest_seconds: float | None = None

    @property
    def round_trip_seconds(self) -> float:
        """The shortest time that a message and its answer took on this connection; 0 before the first."""
        return self._quickest_seconds or 0.0

    @contextmanager
    def transaction(self, settings: Mapping[str, str] = session.FIXED_FORMATS) -> Iterator[psycopg.Connection[Any]]:
        """Run the block in one transaction, with *settings*; see `transactions.transaction`."""
        with self.kept() as conn, transaction(conn, self.timeout_seconds, settings=settings):
            yield conn

    def probe(self, statement: Statement) -> list[Any]:
        """Return the rows of a statement that probes an index, whatever the statistics say."""
        return self.run(statement, session.FORCE_INDEX)

    def run(self, statement: Statement, settings: Mapping[str, str] = session.FORCE_INDEX_AND_HASH_JOIN) -> list[Any]:
        """Run one statement over many rows in a transaction of its own, with *settings*; return its rows.

        Takes one round trip if the text is short enough with the parameters, else four. Raises OutcomeUnknown if the
        connection was lost, also where that may have been before the COMMIT.
        """
        with self.kept() as conn:
            cursor = psycopg.ClientCursor(conn, row_factory=tuple_row)
            begin = f"{session.BEGIN}; {session.transaction_settings(self.timeout_seconds, settings=settings)}"
            text = cursor.mogrify(f"{begin}; {statement[0]}; COMMIT", statement[1])
            if len(text) <= LONGEST_TEXT:
                return self.run_text(cursor, text, begin.count(";") + 1)
            with transaction(conn, self.timeout_seconds, settings=settings):
                return conn.cursor(row_factory=tuple_row).execute(*statement).fetchall()

    def run_text(self, cursor: psycopg.ClientCursor[Any], text: str, before: int) -> list[Any]:
        """Run the text of a whole transaction, which travels as one message; return the rows of the statement that
        follows the first *before*."""
        conn = cursor.connection
        try:
            with deadline(conn, self.timeout_seconds + 1), self._timed():
                cursor.execute(text)  # pyright: ignore[reportArgumentType, reportCallIssue]
        except psycopg.Error as error:
            if is_lost(conn):
                raise OutcomeUnknown(f"connection lost during a transaction: {error}") from error
            conn.rollback()
            raise
        for _ in range(before):
            cursor.nextset()
        return cursor.fetchall()

    @contextmanager
    def reading(self) -> Iterator[psycopg.Connection[Any]]:
        """Run the block, one SELECT, in one message; see `transactions.reading`."""
        with self.kept() as conn, deadline(conn, self.timeout_seconds + 1), self._timed(), reading(conn):
            yield conn

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Time the block: one message and its answer."""
        began_at = time.monotonic()
        yield
        seconds = time.monotonic() - began_at
        self._quickest_seconds = min(seconds, self._quickest_seconds or seconds)

    @contextmanager
    def kept(self) -> Iterator[psycopg.Connection[Any]]:
        """Yield the connection; close it if it comes back lost or read-only."""
        if self.conn is None:
            self.conn = Connection.connect(self._dsn, **connect_options(self.timeout_seconds))
            self._quickest_seconds = None
        try:
            yield self.conn
            self.answers += 1
        except psycopg.Error as error:
            if is_read_only_error(error):
                self.close()
            raise
        finally:
            if self.conn is not None and is_lost(self.conn):
                self.close()

    def close(self) -> None:
        """Close the connection; the next use opens another."""
        if self.conn is not None:
            self.conn.close()
            self.conn = None
