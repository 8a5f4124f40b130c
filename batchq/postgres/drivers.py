"""Statements on a caller's connection of any kind, in its transaction, by its own driver.

Nothing of SQLAlchemy, Django or asyncpg is imported: a connection is known by the names of its classes. On an async
connection of SQLAlchemy, the functions for its Connection run in the greenlet that SQLAlchemy provides for this.
"""

import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from typing import Any, Literal, LiteralString, TypeVar

import psycopg
from psycopg.rows import tuple_row

from batchq.errors import InvalidInput
from batchq.postgres.statements import inserts, session
from batchq.postgres.statements.running import Statement

Way = Literal["psycopg", "sqlalchemy", "session", "django", "asyncpg"]
Rows = list[tuple[Any, ...]]
Result = TypeVar("Result")

ACCEPTED = (
    "psycopg's Connection and AsyncConnection; SQLAlchemy's Connection, Session, AsyncConnection and AsyncSession; "
    "Django's connection; asyncpg's Connection"
)
ACCEPTED_DRIVERS = "psycopg, psycopg2, pg8000 and asyncpg"
_SYNC: Mapping[tuple[str, str], Way] = {
    ("sqlalchemy", "Connection"): "sqlalchemy",
    ("sqlalchemy", "Session"): "session",
    ("sqlalchemy", "scoped_session"): "session",
    ("django", "BaseDatabaseWrapper"): "django",
    ("django", "ConnectionProxy"): "django",
}
_ASYNC: Mapping[tuple[str, str], Way] = {
    ("sqlalchemy", "AsyncConnection"): "sqlalchemy",
    ("sqlalchemy", "AsyncSession"): "session",
    ("sqlalchemy", "async_scoped_session"): "session",
    ("asyncpg", "Connection"): "asyncpg",
    ("asyncpg", "PoolConnectionProxy"): "asyncpg",
}
_PLACE = re.compile(r"%(?:\((\w+)\)s|%)")
_QUOTED = re.compile(r"('[^']*')")


def way_of(conn: Any) -> Way:
    """Return how to use a connection of ``def`` code. Raises InvalidInput for what is not taken."""
    return "psycopg" if isinstance(conn, psycopg.Connection) else _way(conn, _SYNC, "", _ASYNC)


def async_way_of(conn: Any) -> Way:
    """Return how to use a connection of ``async def`` code. Raises InvalidInput for what is not taken."""
    return "psycopg" if isinstance(conn, psycopg.AsyncConnection) else _way(conn, _ASYNC, "async ", _SYNC)


def _way(conn: Any, ways: Mapping[tuple[str, str], Way], style: str, others: Mapping[tuple[str, str], Way]) -> Way:
    if way := _way_of_class(conn, ways):
        return way
    shown = f"{type(conn).__module__}.{type(conn).__qualname__}".removeprefix("builtins.")
    if isinstance(conn, psycopg.Connection | psycopg.AsyncConnection) or _way_of_class(conn, others):
        advice = "the function whose name does not end" if style else "the function whose name ends"
        raise InvalidInput(
            f"{shown} is for {'def' if style else 'async def'} code; call {advice} in _async, "
            f"or pass another connection: batchq takes {ACCEPTED}"
        )
    raise InvalidInput(f"{shown} is not a connection that batchq takes; pass an open connection: {ACCEPTED}")


def _way_of_class(conn: Any, ways: Mapping[tuple[str, str], Way]) -> Way | None:
    names = ((cls.__module__.partition(".")[0], cls.__name__) for cls in type(conn).__mro__)
    return next((ways[name] for name in names if name in ways), None)


# --------------------------------------------------------------------------------------------------------- statements


def run(conn: Any, statement: Statement) -> Rows:
    """Run a statement with places like ``%(name)s`` on any connection; return its rows. The caller commits.

    Raises the errors of the caller's driver (SQLAlchemy's and Django's: theirs, around those), and InvalidInput for a
    connection that is not taken.
    """
    match way_of(conn):
        case "psycopg":
            cursor = _psycopg_cursor(conn, psycopg.Cursor).execute(*statement, prepare=False)
            return cursor.fetchall() if cursor.description is not None else []
        case "django":
            _refuse_other_vendors(conn)
            with conn.cursor() as django_cursor:
                django_cursor.execute(*statement)
                return [tuple(row) for row in django_cursor.fetchall()] if django_cursor.description else []
        case way:
            connection = _sqlalchemy_connection(conn, way)
    result = connection.exec_driver_sql(*_in_style(statement, connection.dialect))
    return [tuple(row) for row in result] if result.returns_rows else []


async def run_async(conn: Any, statement: Statement) -> Rows:
    """Async version of `run`."""
    match async_way_of(conn):
        case "psycopg":
            cursor = await _psycopg_cursor(conn, psycopg.AsyncCursor).execute(*statement, prepare=False)
            return await cursor.fetchall() if cursor.description is not None else []
        case "asyncpg":
            text, values = numbered(statement)
            return [tuple(row) for row in await conn.fetch(text, *values)]
    return await run_sync(conn, run, statement)


def is_sqlalchemy(conn: Any) -> bool:
    """Return whether an async connection is SQLAlchemy's, so that `run_sync` works. Raises as `async_way_of` does."""
    return async_way_of(conn) in ("sqlalchemy", "session")


async def run_sync(conn: Any, function: Callable[..., Result], *arguments: Any) -> Result:
    """Call ``function(connection, *arguments)`` with SQLAlchemy's Connection below an async connection or session."""
    connection = await conn.connection() if async_way_of(conn) == "session" else conn
    result: Result = await connection.run_sync(function, *arguments)
    return result


def _psycopg_cursor(conn: Any, plain: Any) -> Any:
    """Return a cursor of the caller's class, which may record statements, unless it takes places like ``$1``."""
    cursor = conn.cursor(row_factory=tuple_row)
    is_raw = isinstance(cursor, psycopg.RawCursor | psycopg.AsyncRawCursor)
    return plain(conn, row_factory=tuple_row) if is_raw else cursor


def _sqlalchemy_connection(conn: Any, way: Way) -> Any:
    """Return SQLAlchemy's Connection; a session's begins its transaction. Raises InvalidInput for another database."""
    connection = conn.connection() if way == "session" else conn
    if connection.dialect.name != "postgresql":
        raise InvalidInput(
            f"batchq is in PostgreSQL, and this connection of SQLAlchemy is to {connection.dialect.name}; "
            f"pass one to PostgreSQL: {ACCEPTED}"
        )
    return connection


def numbered(statement: Statement) -> tuple[str, list[Any]]:
    """Return the statement with places like ``$1``, and their values in this order."""
    text, parameters = statement
    numbers: dict[str, int] = {}

    def place(match: re.Match[str]) -> str:
        if (name := match[1]) is None:
            return "%"
        return f"${numbers.setdefault(name, len(numbers) + 1)}"

    return _PLACE.sub(place, text), [parameters[name] for name in numbers]


def _in_style(statement: Statement, dialect: Any) -> tuple[str, Any]:
    """Return the statement and its parameters in the style of a SQLAlchemy dialect's driver."""
    text, parameters = statement
    match dialect.paramstyle:
        case "pyformat":
            return text, parameters
        case "numeric_dollar":
            text, values = numbered(statement)
            return text, tuple(values)
        case "format":
            names = [name for name in _PLACE.findall(text) if name]
            return _positional(text, bool(names)), tuple(parameters[name] for name in names)
    raise InvalidInput(
        f"batchq does not know the driver {dialect.driver} of this connection of SQLAlchemy; use {ACCEPTED_DRIVERS}"
    )


def _positional(text: str, has_places: bool) -> str:
    """Return a statement with places like ``%s``, as pg8000 reads it.

    It reads ``%%`` as a percent sign outside of quotes only, and only in a statement that has places.
    """
    parts = _QUOTED.split(text)
    for number, part in enumerate(parts):
        percent = "%%" if has_places and number % 2 == 0 else "%"
        parts[number] = _PLACE.sub("%s", part.replace("%%", "\0")).replace("\0", percent)
    return "".join(parts)


def _refuse_other_vendors(conn: Any) -> None:
    if conn.vendor != "postgresql":
        raise InvalidInput(
            f"batchq is in PostgreSQL, and this connection of Django is to {conn.vendor}; "
            f"pass one to PostgreSQL: {ACCEPTED}"
        )


# ------------------------------------------------------------------------------------------------------- transactions


@contextmanager
def transaction(conn: Any) -> Iterator[bool]:
    """Run the block in the caller's transaction; if it has none, begin one and commit it. Yields whether it had none.

    A connection that begins by itself, as psycopg's and SQLAlchemy's do without autocommit, has one: it is the caller
    who commits.
    """
    way = way_of(conn)
    if _has_transaction(conn, way):
        yield False
        return
    with (
        conn.transaction()
        if way == "psycopg"
        else _bracket(conn, session.PLAIN_BEGIN, session.COMMIT, [session.ROLLBACK])
    ):
        yield True


@asynccontextmanager
async def transaction_async(conn: Any) -> AsyncIterator[bool]:
    """Async version of `transaction`, for psycopg and asyncpg."""
    is_psycopg = async_way_of(conn) == "psycopg"
    if _psycopg_has_transaction(conn) if is_psycopg else conn.is_in_transaction():
        yield False
        return
    async with conn.transaction():
        yield True


def _has_transaction(conn: Any, way: Way) -> bool:
    if way == "psycopg":
        return _psycopg_has_transaction(conn)
    if way == "django":
        _refuse_other_vendors(conn)
        return conn.in_atomic_block or not conn.get_autocommit()
    return not getattr(_sqlalchemy_connection(conn, way).connection.dbapi_connection, "autocommit", False)


def _psycopg_has_transaction(conn: Any) -> bool:
    return not conn.autocommit or conn.info.transaction_status != psycopg.pq.TransactionStatus.IDLE


def savepoint(conn: Any) -> AbstractContextManager[None]:
    """Run the block in a savepoint of the caller's transaction: after an error, what came before the block is kept."""
    return _bracket(conn, session.SAVEPOINT, session.RELEASE, [session.ROLLBACK_TO, session.RELEASE])


@contextmanager
def _bracket(conn: Any, begin: LiteralString, end: LiteralString, undo: Sequence[LiteralString]) -> Iterator[None]:
    run(conn, (begin, {}))
    try:
        yield
    except BaseException:
        with suppress(Exception):  # the connection may be lost; the first error is the one to show
            for text in undo:
                run(conn, (text, {}))
        raise
    run(conn, (end, {}))


@asynccontextmanager
async def savepoint_async(conn: Any) -> AsyncIterator[None]:
    """Async version of `savepoint`, for psycopg and asyncpg."""
    await run_async(conn, (session.SAVEPOINT, {}))
    try:
        yield
    except BaseException:
        with suppress(Exception):
            for text in (session.ROLLBACK_TO, session.RELEASE):
                await run_async(conn, (text, {}))
        raise
    await run_async(conn, (session.RELEASE, {}))


# --------------------------------------------------------------------------------------------------------------- COPY


def copy(conn: Any, columns: Sequence[str], blocks: Iterable[str]) -> int | None:
    """Insert batches by COPY, from blocks of text; return how many, or None if the driver has no COPY.

    Call it within a transaction that has begun. Raises the driver's own errors.
    """
    way = way_of(conn)
    if way == "psycopg":
        return _copy(conn, columns, blocks)
    if way == "django":
        return _copy(conn.connection, columns, blocks) if isinstance(conn.connection, psycopg.Connection) else None
    dbapi = _sqlalchemy_connection(conn, way).connection.dbapi_connection
    if isinstance(dbapi, psycopg.Connection):
        return _copy(dbapi, columns, blocks)
    driver = getattr(dbapi, "driver_connection", None)
    if isinstance(driver, psycopg.AsyncConnection) or _way_of_class(driver, _ASYNC) == "asyncpg":
        count: int = dbapi.run_async(lambda driver: copy_async(driver, columns, blocks))
        return count
    return None


def _copy(conn: psycopg.Connection[Any], columns: Sequence[str], blocks: Iterable[str]) -> int:
    with conn.cursor() as cursor:
        with cursor.copy(inserts.copy_statement(columns)) as copy:
            for block in blocks:
                copy.write(block)
        return cursor.rowcount


async def copy_async(conn: Any, columns: Sequence[str], blocks: Iterable[str]) -> int:
    """Async version of `copy`, for psycopg and asyncpg."""
    if async_way_of(conn) == "asyncpg":
        status: str = await conn.copy_to_table(
            "batches", schema_name="batchq", columns=columns, source=_encoded(blocks), encoding="utf8"
        )
        return int(status.rpartition(" ")[2])  # COPY 12
    async with conn.cursor() as cursor:
        async with cursor.copy(inserts.copy_statement(columns)) as copy:
            for block in blocks:
                await copy.write(block)
        count: int = cursor.rowcount
        return count


async def _encoded(blocks: Iterable[str]) -> AsyncIterator[bytes]:
    for block in blocks:
        yield block.encode()
