"""Calls that are wrong: a type checker must find an error in each line with `# bad`."""

import psycopg
import psycopg_pool
import sqlalchemy
from sqlalchemy import orm
from sqlalchemy.ext import asyncio as sqlalchemy_asyncio

import batchq


def in_def(
    conn: psycopg.Connection,
    async_conn: psycopg.AsyncConnection,
    engine: sqlalchemy.Engine,
    maker: orm.sessionmaker[orm.Session],
    async_connection: sqlalchemy_asyncio.AsyncConnection,
    async_session: sqlalchemy_asyncio.AsyncSession,
    pool: psycopg_pool.ConnectionPool,
) -> None:
    batchq.enqueue(conn, "a", qeue="mail")  # bad
    batchq.enqueue(conn, "a", priority="high")  # bad
    batchq.enqueue_many(conn, "a", [1], qeue="mail")  # bad
    batchq.enqueue_many(conn, "a", [1], priority="high")  # bad
    batchq.enqueue_many(conn, "a", [1], unique_key="k")  # bad
    batchq.enqueue_each(conn, "a", [1], qeue="mail")  # bad
    batchq.enqueue_each(conn, "a", [1], priority="high")  # bad
    batchq.enqueue_each(conn, "a", [1], items=[1])  # bad
    batchq.enqueue(conn, "a", on_failure="explode")  # bad
    batchq.enqueue(None, "a")  # bad
    batchq.enqueue("postgresql://", "a")  # bad
    batchq.enqueue(engine, "a")  # bad
    batchq.enqueue(maker, "a")  # bad
    batchq.enqueue(pool, "a")  # bad
    batchq.enqueue(conn.cursor(), "a")  # bad
    batchq.enqueue(async_conn, "a")  # bad
    batchq.enqueue(async_connection, "a")  # bad
    batchq.enqueue(async_session, "a")  # bad
    batchq.enqueue_many(async_session, "a", [1])  # bad
    batchq.enqueue_each(async_session, "a", [1])  # bad


async def in_async_def(
    conn: psycopg.AsyncConnection,
    def_conn: psycopg.Connection,
    connection: sqlalchemy.Connection,
    session: orm.Session,
    engine: sqlalchemy_asyncio.AsyncEngine,
) -> None:
    await batchq.enqueue_async(conn, "a", qeue="mail")  # bad
    await batchq.enqueue_async(conn, "a", priority="high")  # bad
    await batchq.enqueue_many_async(conn, "a", [1], qeue="mail")  # bad
    await batchq.enqueue_many_async(conn, "a", [1], priority="high")  # bad
    await batchq.enqueue_each_async(conn, "a", [1], qeue="mail")  # bad
    await batchq.enqueue_each_async(conn, "a", [1], priority="high")  # bad
    await batchq.enqueue_async(conn, "a", on_failure="explode")  # bad
    await batchq.enqueue_async(None, "a")  # bad
    await batchq.enqueue_async(engine, "a")  # bad
    await batchq.enqueue_async(def_conn, "a")  # bad
    await batchq.enqueue_async(connection, "a")  # bad
    await batchq.enqueue_many_async(session, "a", [1])  # bad
    await batchq.enqueue_each_async(session, "a", [1])  # bad
