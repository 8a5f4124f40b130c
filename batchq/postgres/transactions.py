"""Transactions with timeouts on the server and here, and single SELECTs in one message."""

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from types import MappingProxyType
from typing import Any, Self

import psycopg
from psycopg.abc import Params

from batchq.errors import BatchqError, Interrupted, OutcomeUnknown
from batchq.postgres.connections import AnyConnection, is_lost
from batchq.postgres.deadlines import deadline
from batchq.postgres.statements import session

# Errors that end a transaction and do not recur once it is run again.
CONFLICTS = (
    psycopg.errors.SerializationFailure,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.ReadOnlySqlTransaction,
)
_CONFLICT_STATES = tuple(error.sqlstate for error in CONFLICTS)
LONGEST_TEXT = 15_000  # characters of one message: Amazon's RDS Proxy pins a client to one backend once it sends 16 KB


def is_conflict(error: BaseException) -> bool:
    """Return whether a transaction may succeed if it is run again, of whatever driver its error is.

    SQLAlchemy keeps the driver's error in `orig`, Django as the cause; psycopg2's errors have a `pgcode`. An error of
    batchq's own is none, whatever its cause: a handler that raises it says what is to become of the batch.
    """
    if isinstance(error, BatchqError | Interrupted):
        return False
    errors = (error, getattr(error, "orig", None), error.__cause__)
    states = [getattr(one, name, None) for one in errors for name in ("sqlstate", "pgcode")]
    return any(state in _CONFLICT_STATES for state in states)


def is_read_only_error(error: BaseException | None) -> bool:
    """Return whether a write was refused because the server, the role or the session is read-only.

    Such a connection answers, but never writes again: its server has become a standby, or the role's
    default_transaction_read_only was on when it was opened. Close it; a new one sees what has changed since.
    """
    return isinstance(error, psycopg.errors.ReadOnlySqlTransaction)


@contextmanager
def transaction(
    conn: psycopg.Connection[Any],
    seconds: float,
    lock_seconds: float = session.OWN_LOCK_SECONDS,
    settings: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[psycopg.Connection[Any]]:
    """Run the block in one transaction of up to *seconds*; wait up to *lock_seconds* for each lock.

    Commits at the end. Raises OutcomeUnknown if the connection was lost while COMMIT was in flight.
    """
    committing = False
    try:
        with deadline(conn, seconds + 1), conn.transaction():
            conn.execute(session.transaction_settings(seconds, lock_seconds, settings))
            yield conn
            committing = True
    except psycopg.Error as error:
        if committing:
            _raise_if_outcome_unknown(conn, error)
        raise


@asynccontextmanager
async def transaction_async(
    conn: psycopg.AsyncConnection[Any], seconds: float
) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """Async version of `transaction`; a wait for a lock may take all of *seconds*."""
    committing = False
    try:
        with deadline(conn, seconds + 1):
            async with conn.transaction():
                await conn.execute(session.transaction_settings(seconds, seconds))
                yield conn
                committing = True
    except psycopg.Error as error:
        if committing:
            _raise_if_outcome_unknown(conn, error)
        raise


def _raise_if_outcome_unknown(conn: AnyConnection, error: psycopg.Error) -> None:
    if is_lost(conn):
        raise OutcomeUnknown(f"connection lost during COMMIT: {error}") from error


class ReadingCursor(psycopg.Cursor[Any]):
    """Runs one SELECT in a READ COMMITTED transaction: one message, which costs as much as the SELECT alone.

    Otherwise the role's default would apply. A serializable read beside serializable producers can fail with 40001, or
    make theirs fail.
    """

    def execute(self, query: Any, params: Params | None = None, **_: Any) -> Self:
        """Run the SELECT; in three messages if its text is too long with the parameters."""
        conn = self.connection
        select = psycopg.ClientCursor(conn).mogrify(query, params)
        text = f"{session.BEGIN}; {session.SET_SEARCH_PATH}; {select}; COMMIT"
        if len(text) > LONGEST_TEXT:
            with conn.transaction():
                super().execute(session.SET_SEARCH_PATH)
                return super().execute(query, params)
        try:
            super().execute(text)  # pyright: ignore[reportArgumentType, reportCallIssue]
        except psycopg.Error:
            if not is_lost(conn):
                conn.rollback()
            raise
        self.nextset()
        self.nextset()
        return self


@contextmanager
def reading(conn: psycopg.Connection[Any]) -> Iterator[psycopg.Connection[Any]]:
    """Have each statement of the block, a SELECT, run by a `ReadingCursor`."""
    factory = conn.cursor_factory
    conn.cursor_factory = ReadingCursor
    try:
        yield conn
    finally:
        conn.cursor_factory = factory
