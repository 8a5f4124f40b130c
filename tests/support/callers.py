"""Callers: programs that enqueue on a connection of theirs, of every kind that batchq takes, all used the same way."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any

import asyncpg
import django
import django.db
import psycopg
import sqlalchemy
from django.conf import settings
from django.db import transaction
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import class_row, dict_row
from sqlalchemy import orm
from sqlalchemy.ext import asyncio as sqlalchemy_asyncio

import batchq


class OneColumn:
    """A row of one value, whose column has any name."""

    def __init__(self, **columns: Any) -> None:
        vars(self).update(columns)


@dataclass
class Caller:
    """A connection with an open transaction. The functions of batchq are called on it, async ones in an event loop."""

    conn: Any
    call: Callable[[Any], Any]
    commit: Callable[[], Any]
    rollback: Callable[[], Any]
    execute: Callable[[str], Any]
    is_async: bool = False

    def enqueue(self, *arguments: Any, **options: Any) -> int | None:
        """Call `enqueue` or `enqueue_async`."""
        return self.call((batchq.enqueue_async if self.is_async else batchq.enqueue)(self.conn, *arguments, **options))

    def many(self, *arguments: Any, **options: Any) -> int:
        """Call `enqueue_many` or `enqueue_many_async`."""
        function = batchq.enqueue_many_async if self.is_async else batchq.enqueue_many
        return self.call(function(self.conn, *arguments, **options))

    def each(self, *arguments: Any, **options: Any) -> list[int]:
        """Call `enqueue_each` or `enqueue_each_async`."""
        function = batchq.enqueue_each_async if self.is_async else batchq.enqueue_each
        return self.call(function(self.conn, *arguments, **options))


def same(result: Any) -> Any:
    """Return what a function that is not async has returned."""
    return result


def engine_arguments(driver: str, dsn: str) -> dict[str, Any]:
    """Return the arguments of create_engine for a DSN."""
    given = conninfo_to_dict(dsn)
    host, port = given["host"], int(given.get("port", 5432))
    by_driver = {"user": given["user"], "password": given.get("password"), "database": given["dbname"], "port": port}
    if driver == "pg8000":
        given = by_driver | ({"unix_sock": f"{host}/.s.PGSQL.{port}"} if host.startswith("/") else {"host": host})
    elif driver == "asyncpg":
        given = by_driver | {"host": host}
    return {"url": f"postgresql+{driver}://", "connect_args": given, "poolclass": sqlalchemy.NullPool}


# -------------------------------------------------------------------------------------------------------------- def


@contextmanager
def psycopg_caller(dsn: str, **options: Any) -> Iterator[Caller]:
    """Yield one with a connection of psycopg."""
    with psycopg.connect(dsn, **options) as conn:
        yield Caller(conn, same, conn.commit, conn.rollback, conn.execute)
        conn.rollback()


@contextmanager
def sqlalchemy_caller(dsn: str, driver: str, kind: str = "connection") -> Iterator[Caller]:
    """Yield one with a connection, a session or a scoped_session of SQLAlchemy."""
    engine = sqlalchemy.create_engine(**engine_arguments(driver, dsn))
    conn: Any = {
        "connection": engine.connect,
        "session": lambda: orm.Session(engine),
        "scoped_session": lambda: orm.scoped_session(orm.sessionmaker(engine)),
    }[kind]()
    try:
        yield Caller(conn, same, conn.commit, conn.rollback, lambda text: conn.execute(sqlalchemy.text(text)))
    finally:
        conn.close()
        engine.dispose()


@contextmanager
def django_databases(dsn: str, *aliases: str) -> Iterator[None]:
    """Have Django's connections lead to a database."""
    if not settings.configured:
        settings.configure(LOGGING_CONFIG=None)
        django.setup()
    given = conninfo_to_dict(dsn)
    names = {"NAME": "dbname", "USER": "user", "PASSWORD": "password", "HOST": "host", "PORT": "port"}
    database = {"ENGINE": "django.db.backends.postgresql"} | {
        name: given[key] for name, key in names.items() if key in given
    }
    connections = django.db.connections
    before = connections.settings
    connections.settings = connections.configure_settings({alias: dict(database) for alias in aliases})
    try:
        yield
    finally:
        for conn in connections.all(initialized_only=True):
            conn.close()
            del connections[conn.alias]
        connections.settings = before


@contextmanager
def django_caller(dsn: str, alias: str = "default") -> Iterator[Caller]:
    """Yield one with a connection of Django, in an atomic block."""
    with django_databases(dsn, "default", "x"), ExitStack() as block:
        conn = django.db.connection if alias == "default" else django.db.connections[alias]
        block.enter_context(transaction.atomic(using=alias))

        def rollback() -> None:
            transaction.set_rollback(True, using=alias)
            block.close()

        yield Caller(conn, same, block.close, rollback, lambda text: conn.cursor().execute(text))


# -------------------------------------------------------------------------------------------------------- async def


@contextmanager
def psycopg_async_caller(dsn: str, **options: Any) -> Iterator[Caller]:
    """Yield one with an async connection of psycopg."""
    with asyncio.Runner() as loop:
        conn = loop.run(psycopg.AsyncConnection.connect(dsn, **options))
        yield Caller(
            conn,
            in_context(loop),
            lambda: loop.run(conn.commit()),
            lambda: loop.run(conn.rollback()),
            lambda text: loop.run(conn.execute(text)),
            is_async=True,
        )
        loop.run(conn.close())


@contextmanager
def sqlalchemy_async_caller(dsn: str, driver: str, kind: str = "connection") -> Iterator[Caller]:
    """Yield one with an async connection or session of SQLAlchemy."""
    with asyncio.Runner() as loop:
        engine = sqlalchemy_asyncio.create_async_engine(**engine_arguments(driver, dsn))
        session = sqlalchemy_asyncio.AsyncSession
        conn: Any = {
            "connection": lambda: loop.run(started(engine.connect())),
            "session": lambda: session(engine),
            "scoped_session": lambda: sqlalchemy_asyncio.async_scoped_session(
                sqlalchemy_asyncio.async_sessionmaker(engine), scopefunc=lambda: 1
            ),
        }[kind]()
        yield Caller(
            conn,
            in_context(loop),
            lambda: loop.run(conn.commit()),
            lambda: loop.run(conn.rollback()),
            lambda text: loop.run(conn.execute(sqlalchemy.text(text))),
            is_async=True,
        )
        loop.run(conn.close())
        loop.run(engine.dispose())


def in_context(loop: asyncio.Runner) -> Callable[[Any], Any]:
    """Return what runs a coroutine in the loop, in the context of the test, with its trace."""
    return lambda coroutine: loop.run(coroutine, context=copy_context())


async def started(awaitable: Any) -> Any:
    """Return what an awaitable gives, which is no coroutine."""
    return await awaitable


@contextmanager
def asyncpg_caller(dsn: str, kind: str = "connection") -> Iterator[Caller]:
    """Yield one with a connection of asyncpg, or of its pool."""
    arguments = engine_arguments("asyncpg", dsn)["connect_args"]
    with asyncio.Runner() as loop:
        pool = None
        if kind == "pool":
            pool = loop.run(started(asyncpg.create_pool(**arguments, min_size=1, max_size=1)))
            conn = loop.run(started(pool.acquire()))
        else:
            conn = loop.run(asyncpg.connect(**arguments))
        loop.run(conn.execute("BEGIN") if kind == "begun" else begin(conn))
        yield Caller(
            conn,
            in_context(loop),
            lambda: loop.run(conn.execute("COMMIT")),
            lambda: loop.run(conn.execute("ROLLBACK")),
            lambda text: loop.run(conn.execute(text)),
            is_async=True,
        )
        conn.terminate()
        if pool:
            pool.terminate()


async def begin(conn: Any) -> None:
    """Begin a transaction as asyncpg's users do."""
    await conn.transaction().start()


CALLERS: dict[str, Callable[[str], Any]] = {
    "psycopg": psycopg_caller,
    "psycopg raw": lambda dsn: psycopg_caller(dsn, cursor_factory=psycopg.RawCursor),
    "psycopg client": lambda dsn: psycopg_caller(dsn, cursor_factory=psycopg.ClientCursor),
    "psycopg dict": lambda dsn: psycopg_caller(dsn, row_factory=dict_row),
    "psycopg class": lambda dsn: psycopg_caller(dsn, row_factory=class_row(OneColumn)),
    "sqlalchemy psycopg": lambda dsn: sqlalchemy_caller(dsn, "psycopg"),
    "sqlalchemy psycopg2": lambda dsn: sqlalchemy_caller(dsn, "psycopg2"),
    "sqlalchemy pg8000": lambda dsn: sqlalchemy_caller(dsn, "pg8000"),
    "sqlalchemy Session": lambda dsn: sqlalchemy_caller(dsn, "psycopg", "session"),
    "sqlalchemy Session psycopg2": lambda dsn: sqlalchemy_caller(dsn, "psycopg2", "session"),
    "sqlalchemy scoped_session": lambda dsn: sqlalchemy_caller(dsn, "psycopg", "scoped_session"),
    "django": django_caller,
    "django x": lambda dsn: django_caller(dsn, "x"),
    "psycopg async": psycopg_async_caller,
    "psycopg async raw": lambda dsn: psycopg_async_caller(dsn, cursor_factory=psycopg.AsyncRawCursor),
    "psycopg async client": lambda dsn: psycopg_async_caller(dsn, cursor_factory=psycopg.AsyncClientCursor),
    "psycopg async dict": lambda dsn: psycopg_async_caller(dsn, row_factory=dict_row),
    "sqlalchemy async psycopg": lambda dsn: sqlalchemy_async_caller(dsn, "psycopg"),
    "sqlalchemy asyncpg": lambda dsn: sqlalchemy_async_caller(dsn, "asyncpg"),
    "sqlalchemy AsyncSession psycopg": lambda dsn: sqlalchemy_async_caller(dsn, "psycopg", "session"),
    "sqlalchemy AsyncSession asyncpg": lambda dsn: sqlalchemy_async_caller(dsn, "asyncpg", "session"),
    "sqlalchemy async_scoped_session": lambda dsn: sqlalchemy_async_caller(dsn, "asyncpg", "scoped_session"),
    "asyncpg": asyncpg_caller,
    "asyncpg begun by hand": lambda dsn: asyncpg_caller(dsn, "begun"),
    "asyncpg pool": lambda dsn: asyncpg_caller(dsn, "pool"),
}
WITHOUT_COPY = {"sqlalchemy psycopg2", "sqlalchemy pg8000", "sqlalchemy Session psycopg2"}
