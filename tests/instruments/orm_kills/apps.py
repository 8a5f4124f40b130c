"""The handlers: each writes rows with SQLAlchemy, and its batch's state in the same transaction; each dawdles."""

import asyncio
import os
import random
import time
from functools import cache
from typing import Any

import asyncpg
import psycopg
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import NullPool

import batchq

DSN = "BATCHQ_TEST_HANDLERS_DSN"
KINDS = ("sync", "async", "sync chunks", "async chunks")
ITEMS = 6
AT_ONCE = batchq.Backoff(0, 0)
ROLLED_BACK = 0.05  # of the transactions
_PARAMETERS = {"host": "host", "port": "port", "user": "user", "password": "password", "dbname": "database"}

app = batchq.App()


class Base(DeclarativeBase):
    """The tables of the application."""


class Done(Base):
    """A row for each item, or for the batch. Nothing forbids a second one: the fence does."""

    __tablename__ = "done"
    id: Mapped[int] = mapped_column(primary_key=True)
    batch_id: Mapped[int]
    item: Mapped[int]


@cache
def engine() -> Any:
    """Return this process's engine."""
    dsn = os.environ[DSN]
    return create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(dsn, prepare_threshold=None))


def async_engine() -> Any:
    """Return an async engine."""
    parts = conninfo_to_dict(os.environ[DSN])
    options = {_PARAMETERS[name]: value for name, value in parts.items() if name in _PARAMETERS}
    return create_async_engine(
        "postgresql+asyncpg://",
        async_creator=lambda **_: asyncpg.connect(**options, statement_cache_size=0),
        poolclass=NullPool,
    )


def _pause_seconds() -> float:
    return random.random() * 0.02


def _rolls_back() -> bool:
    return random.random() < ROLLED_BACK


@app.handler("sync", backoff=AT_ONCE)
def sync(batch: batchq.Batch) -> None:
    """Write one row and complete the batch."""
    with Session(engine()) as session:
        session.add(Done(batch_id=batch.id, item=0))
        session.flush()
        time.sleep(_pause_seconds())
        batch.complete_in(session, {"attempt": batch.attempt})
        time.sleep(_pause_seconds())
        session.rollback() if _rolls_back() else session.commit()
    time.sleep(_pause_seconds())


@app.handler("async", backoff=AT_ONCE)
async def asynchronous(batch: batchq.Batch) -> None:
    """Write one row and complete the batch."""
    async with AsyncSession(async_engine()) as session:
        session.add(Done(batch_id=batch.id, item=0))
        await session.flush()
        await asyncio.sleep(_pause_seconds())
        await batch.complete_in_async(session, {"attempt": batch.attempt})
        await asyncio.sleep(_pause_seconds())
        await (session.rollback() if _rolls_back() else session.commit())
    await asyncio.sleep(_pause_seconds())


@app.handler("sync chunks", backoff=AT_ONCE)
def sync_chunks(batch: batchq.Batch) -> None:
    """Write a row for each item with the checkpoint of its chunk."""
    with Session(engine()) as session:
        for chunk in batch.chunks(2):
            session.add_all([Done(batch_id=batch.id, item=item) for item in chunk.items])
            time.sleep(_pause_seconds())
            chunk.commit_in(session)
            time.sleep(_pause_seconds())
            session.rollback() if _rolls_back() else session.commit()


@app.handler("async chunks", backoff=AT_ONCE)
async def async_chunks(batch: batchq.Batch) -> None:
    """Write a row for each item with the checkpoint of its chunk."""
    async with AsyncSession(async_engine()) as session:
        async for chunk in batch.chunks(2):
            session.add_all([Done(batch_id=batch.id, item=item) for item in chunk.items])
            await asyncio.sleep(_pause_seconds())
            await chunk.commit_in_async(session)
            await asyncio.sleep(_pause_seconds())
            await (session.rollback() if _rolls_back() else session.commit())
