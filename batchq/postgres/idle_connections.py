"""A caller's connection between two reads: it must have no transaction open, before and after each."""

from typing import Any

from psycopg.pq import TransactionStatus

from batchq.errors import InvalidInput
from batchq.postgres import drivers


def refuse_open_transaction(conn: Any, what: str) -> None:
    """Raise InvalidInput if a connection of ``def`` code has a transaction open; *what* would wait in it."""
    way = drivers.way_of(conn)
    if way == "django":
        _refuse(conn.in_atomic_block or not conn.get_autocommit(), what)
    else:
        _refuse(_is_open(conn, way), what)


def refuse_open_transaction_async(conn: Any, what: str) -> None:
    """`refuse_open_transaction` for a connection of ``async def`` code."""
    way = drivers.async_way_of(conn)
    _refuse(conn.is_in_transaction() if way == "asyncpg" else _is_open(conn, way), what)


def _is_open(conn: Any, way: drivers.Way) -> bool:
    if way == "psycopg":
        return bool(conn.info.transaction_status != TransactionStatus.IDLE)
    return bool(conn.in_transaction())


def _refuse(is_open: bool, what: str) -> None:
    if is_open:
        raise InvalidInput(
            f"{what} would keep this connection's transaction open; commit before the call, or pass a DSN instead"
        )


def end_read(conn: Any) -> None:
    """End the transaction that a read has opened, if the connection opens them by itself.

    A session is committed, because a rollback would expire the objects that it has loaded.
    """
    match drivers.way_of(conn):
        case "psycopg" | "sqlalchemy":
            conn.rollback()
        case "session":
            conn.commit()


async def end_read_async(conn: Any) -> None:
    """Async version of `end_read`."""
    match drivers.async_way_of(conn):
        case "psycopg" | "sqlalchemy":
            await conn.rollback()
        case "session":
            await conn.commit()
