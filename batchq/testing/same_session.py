"""The connections of handlers that run in a test's transaction: all are the test's own session."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

import psycopg

from batchq.errors import InvalidInput
from batchq.postgres import drivers
from batchq.postgres.connections import AsyncConnection, Connection
from batchq.postgres.statements.running import Statement

Result = TypeVar("Result")
Answer = Callable[[Statement], Any]
_SHOWN = "<the session of the test, as batchq.testing lends it to handlers>"


class _View(Connection):
    """A second object for the session of another connection. *answer*: returns the answer of a statement of batchq's
    that must not reach the database, None for any other statement."""

    answer: Answer | None = None

    def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
        """Run a statement, unless it is answered here."""
        if self.answer is not None and (found := self.answer((query, params))) is not None:
            return found
        return super().execute(query, params, **options)

    def __repr__(self) -> str:
        return _SHOWN


class _AsyncView(AsyncConnection):
    """Async version of `_View`."""

    answer: Answer | None = None

    async def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
        """Run a statement, unless it is answered here."""
        if self.answer is not None and (found := self.answer((query, params))) is not None:
            return found
        return await super().execute(query, params, **options)

    def __repr__(self) -> str:
        return _SHOWN


class SameSession:
    """Lends views of one session: for ``def`` and for ``async def`` handlers, whichever the test's connection is.

    A transaction is a savepoint if the test has a transaction open, else a transaction that commits.
    """

    def __init__(self, pgconn: Any, answer: Answer | None = None) -> None:
        self.conn = _View(pgconn)
        self.conn_async = _AsyncView(pgconn)
        self._lock = threading.RLock()  # of threads that read concurrently: savepoints end in the order they nest
        for view in (self.conn, self.conn_async):
            view.prepare_threshold = None  # the test's connection names its prepared statements alike
            view.answer = answer

    @contextmanager
    def transaction(self, check: Callable[[], None] = lambda: None) -> Iterator[psycopg.Connection[Any]]:  # noqa: ARG002
        """Run the block in a savepoint, or in a transaction."""
        with self._lock, self.conn.transaction():
            yield self.conn

    @asynccontextmanager
    async def transaction_async(
        self,
        check: Callable[[], None] = lambda: None,  # noqa: ARG002
    ) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        """Async version of `transaction`."""
        async with self.conn_async.transaction():
            yield self.conn_async

    def read(self, query: Callable[..., Result], *args: Any) -> Result:
        """Return what *query* returns."""
        with self._lock, self.conn.transaction():
            return query(self.conn, *args)

    async def in_thread(self, query: Callable[[], Result]) -> Result:
        """Return what *query* returns. In this thread: one session answers one query at a time."""
        async with self.conn_async.lock:
            return query()


@contextmanager
def same_session(
    conn: psycopg.Connection[Any] | psycopg.AsyncConnection[Any], answer: Answer | None = None
) -> Iterator[SameSession]:
    """Yield the views of a connection's session. *answer*: as in `_View`."""
    pgconn = conn.pgconn
    handlers = pgconn.notice_handler, pgconn.notify_handler
    session = SameSession(pgconn, answer)
    try:
        yield session
    finally:
        del session.conn.pgconn, session.conn_async.pgconn  # the session is not theirs to close
        pgconn.notice_handler, pgconn.notify_handler = handlers


def psycopg_of(conn: Any) -> psycopg.Connection[Any]:
    """Return the psycopg connection beneath a connection of ``def`` code. In the transaction of that connection: one is
    begun if it would begin one at its next statement. Raises InvalidInput for a connection by another driver."""
    found = conn
    match drivers.way_of(conn):
        case "django":
            conn.ensure_connection()
            found = conn.connection
        case "session":
            found = conn.connection().connection.driver_connection
        case "sqlalchemy":
            found = conn.connection.driver_connection
    if not isinstance(found, psycopg.Connection):
        raise InvalidInput(_no_psycopg(conn, found))
    if not found.autocommit:
        found.execute("")
    return found


async def psycopg_of_async(conn: Any) -> psycopg.AsyncConnection[Any]:
    """Async version of `psycopg_of`."""
    found = conn
    match drivers.async_way_of(conn):
        case "session":
            found = (await (await conn.connection()).get_raw_connection()).driver_connection
        case "sqlalchemy":
            found = (await conn.get_raw_connection()).driver_connection
    if not isinstance(found, psycopg.AsyncConnection):
        raise InvalidInput(_no_psycopg(conn, found))
    if not found.autocommit:
        await found.execute("")
    return found


def _no_psycopg(conn: Any, found: Any) -> str:
    shown = f"{type(conn).__module__}.{type(conn).__qualname__}"
    return (
        f"{shown} uses {type(found).__module__.partition('.')[0]}, and handlers get a connection of psycopg 3: give a "
        "connection by psycopg 3, or commit and give a DSN"
    )


def refuse_in_event_loop(name: str) -> None:
    """Raise RuntimeError if an event loop runs in this thread: handlers may need one of their own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise RuntimeError(f"{name} would block the event loop of this test; use `await {name}_async(...)`")
