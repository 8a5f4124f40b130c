"""Handlers that type checkers accept, and the types that they see. Read by tests/component/test_types.py, never run."""

from typing import Any, assert_type

import psycopg
from pydantic import BaseModel

import batchq


class Mail(BaseModel):
    to: str


class Urgent(Mail):
    by: int


app = batchq.App()


# ------------------------------------------------------------------------------------------------- batch handlers


@app.handler("plain")
def plain(batch: batchq.Batch) -> int:
    assert_type(batch.payload, Any)
    return 1


@app.handler("any")
async def unknown(batch: batchq.Batch[Any]) -> None:
    assert_type(batch.payload, Any)


@app.handler("mail", payload=Mail, timeout_seconds=60, backoff=batchq.Backoff())
def send(batch: batchq.Batch[Mail]) -> str:
    assert_type(batch.payload, Mail)
    return batch.payload.to


@app.handler("mail_async", payload=Mail)
async def send_async(batch: batchq.Batch[Mail]) -> str:
    assert_type(batch.payload, Mail)
    return batch.payload.to


@app.handler("urgent", payload=Urgent)
def send_urgent(batch: batchq.Batch[Mail]) -> None:
    """It takes any mail, so an urgent one too."""


@app.handler("untyped_payload", payload=Mail)
def send_somehow(batch: batchq.Batch) -> None:
    assert_type(batch.payload, Any)


@app.schedule("0 2 * * *")
@app.handler("nightly")
def nightly(batch: batchq.Batch, dry_run: bool = False) -> int:
    return 0


class Sender:
    def send(self, batch: batchq.Batch[Mail]) -> bool:
        return True


app.handler("by_method", payload=Mail)(Sender().send)
app.handler("by_lambda", payload=Mail)(lambda batch: batch.payload.to)


async def in_tests(batch: batchq.Batch[Mail], other: batchq.Batch) -> None:
    """A handler stays a function, which tests can call."""
    assert_type(plain(batch), int)
    assert_type(send(batch), str)
    assert_type(send(other), str)
    assert_type(await send_async(batch), str)
    assert_type(nightly(other), int)


# -------------------------------------------------------------------------------------------------- item handlers


@app.item_handler("item")
def item(item: dict[str, Any]) -> None: ...


@app.item_handler("geocode", item=Mail, concurrency=20)
async def geocode(mail: Mail, batch: batchq.Batch) -> str:
    assert_type(mail, Mail)
    return mail.to


@app.item_handler("geocode_urgent", item=Urgent, payload=Mail)
def geocode_urgent(mail: Mail, batch: batchq.Batch[Mail]) -> None:
    assert_type(batch.payload, Mail)


@app.item_handler("store", item=Mail, transactional=True)
def store(mail: Mail, conn: psycopg.Connection, batch: batchq.Batch) -> None: ...


async def items_in_tests(batch: batchq.Batch, conn: psycopg.Connection) -> None:
    """Only the item is passed by position; batch and conn keep their names."""
    assert_type(await geocode(Mail(to="a"), batch=batch), str)
    store(Mail(to="a"), conn=conn, batch=batch)


# ----------------------------------------------------------------------------------------------- what a batch gives


@app.handler("everything")
def everything(batch: batchq.Batch) -> int:
    assert_type(batch.id, int)
    assert_type(batch.key, str | None)
    assert_type(batch.items_total, int | None)
    assert_type(batch.items, list[Any])
    assert_type(batch.needed, list[batchq.Needed])
    for needed in batch.needed:
        assert_type(needed.status, str | None)
    for chunk in batch.chunks(500):
        assert_type(chunk, batchq.Chunk)
        with chunk.transaction() as conn:
            assert_type(conn, psycopg.Connection[Any])
        chunk.fail(0, "why")
    with batch.transaction() as conn:
        assert_type(conn, psycopg.Connection[Any])
        return 1  # nothing after the block: it swallows no error


@app.handler("everything_async")
async def everything_async(batch: batchq.Batch[Any]) -> int:
    assert_type(await batch.needed_async(), list[batchq.Needed])
    async for chunk in batch.chunks():
        assert_type(chunk, batchq.Chunk)
        async with chunk.transaction() as conn:
            assert_type(conn, psycopg.AsyncConnection[Any])
        await chunk.commit_async()
    async with batch.transaction() as conn:
        assert_type(conn, psycopg.AsyncConnection[Any])
        return 1
