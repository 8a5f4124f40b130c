"""A shop: an order and the batch that confirms it are committed in one transaction. Run: uvicorn api:api"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from secrets import compare_digest
from typing import Any

import psycopg
from fastapi import FastAPI, HTTPException, Request
from fastapi.security import HTTPBasic
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import batchq
from batchq.web import WebApp


class Base(DeclarativeBase):
    """The tables of the shop."""


class Order(Base):
    """An order, and whether a worker has confirmed it."""

    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(unique=True)
    is_confirmed: Mapped[bool] = mapped_column(default=False)


async def connect() -> psycopg.AsyncConnection[Any]:
    """Open a connection to the database of batchq's setting; it also works through a transaction-mode pooler."""
    return await psycopg.AsyncConnection.connect(os.environ["BATCHQ_DSN"], prepare_threshold=None)


engine = create_async_engine("postgresql+psycopg://", async_creator=connect)
sessions = async_sessionmaker(engine, expire_on_commit=False)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Create the tables; close the connections at the end."""
    async with engine.begin() as conn:
        await conn.run_sync(Base.metadata.create_all)
    yield
    await engine.dispose()


api = FastAPI(lifespan=lifespan)
people = HTTPBasic()


async def name_of(request: Request) -> str:
    """Return who may see the queue: here, everybody with the password of the shop."""
    given = await people(request)  # raises HTTPException 401
    if given is None or not compare_digest(given.password.encode(), os.environ["SHOP_PASSWORD"].encode()):
        raise HTTPException(401, headers={"WWW-Authenticate": "Basic"})
    return given.username


api.mount("/queue", WebApp(user_of=name_of))


@api.post("/orders", status_code=201)
async def create_order(email: str) -> dict[str, int | None]:
    """Store an order and enqueue its confirmation: both are committed, or neither is."""
    try:
        async with sessions.begin() as session:
            order = Order(email=email)
            session.add(order)
            await session.flush()  # gives the order its id
            batch_id = await batchq.enqueue_async(session, "confirm_order", {"order_id": order.id})
    except IntegrityError:
        raise HTTPException(409, f"{email} has ordered already") from None
    return {"order": order.id, "batch": batch_id}


@api.get("/orders/{number}")
async def read_order(number: int) -> dict[str, str | bool]:
    """Return an order."""
    async with sessions() as session:
        order = await session.get(Order, number)
    if order is None:
        raise HTTPException(404, f"there is no order {number}")
    return {"email": order.email, "is_confirmed": order.is_confirmed}
