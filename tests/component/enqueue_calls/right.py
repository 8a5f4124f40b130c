"""Calls that are right, on connections of every kind."""

from datetime import UTC, datetime

import asyncpg
import django.db
import psycopg
import psycopg_pool
import sqlalchemy
from psycopg.rows import DictRow
from sqlalchemy import orm
from sqlalchemy.ext import asyncio as sqlalchemy_asyncio

import batchq

LATER = datetime.now(UTC)


def in_def(
    conn: psycopg.Connection,
    dicts: psycopg.Connection[DictRow],
    connection: sqlalchemy.Connection,
    session: orm.Session,
    scoped: orm.scoped_session[orm.Session],
    pool: psycopg_pool.ConnectionPool,
) -> None:
    batch_id: int | None = batchq.enqueue(conn, "a", {"b": 1}, items=[1], queue="mail", run_at=LATER, on_failure="run")
    batchq.enqueue(dicts, "a", unique_key="k", after=[1], spread=4)
    count: int = batchq.enqueue_many(connection, "a", [1], key=lambda payload: str(payload), priority=3)
    batchq.enqueue_many(session, "a", items=range(3), items_per_batch=2, key="k", delay_seconds=0.5)
    ids: list[int] = batchq.enqueue_each(scoped, "a", [1], queue="mail", key="k", timeout_seconds=None)
    batchq.enqueue(django.db.connection, "a")
    batchq.enqueue_many(django.db.connections["x"], "a", [1])
    with pool.connection() as pooled:
        batchq.enqueue(pooled, "a")
    print(batch_id, count, ids)


async def in_async_def(
    conn: psycopg.AsyncConnection,
    dicts: psycopg.AsyncConnection[DictRow],
    connection: sqlalchemy_asyncio.AsyncConnection,
    session: sqlalchemy_asyncio.AsyncSession,
    scoped: sqlalchemy_asyncio.async_scoped_session[sqlalchemy_asyncio.AsyncSession],
    pool: "asyncpg.Pool",
) -> None:
    batch_id: int | None = await batchq.enqueue_async(conn, "a", {"b": 1}, items=[1], queue="mail", run_at=LATER)
    await batchq.enqueue_async(dicts, "a", unique_key="k", after=[1], spread=4, on_failure="cancel")
    count: int = await batchq.enqueue_many_async(connection, "a", [1], key=lambda payload: str(payload), priority=3)
    await batchq.enqueue_many_async(session, "a", items=range(3), items_per_batch=2, delay_seconds=0.5)
    ids: list[int] = await batchq.enqueue_each_async(scoped, "a", [1], queue="mail", key="k", timeout_seconds=None)
    own = await asyncpg.connect("postgresql://")
    await batchq.enqueue_async(own, "a")
    async with pool.acquire() as pooled:
        await batchq.enqueue_async(pooled, "a")
    await session.run_sync(lambda session: batchq.enqueue(session, "a"))
    print(batch_id, count, ids)
