"""The handlers of the chaos run, an app for each style; they run with old code, too.

Each naps a while, so that the slots bound the rate, and not the processors: then rates can be compared.

What they write in the batch's own transaction are rows of ``effects``, which must be there exactly once. What they do
outside it are marks in a file. Payloads and items say what is to fail, see `orders`; a payload's text comes back in
results and errors.
"""

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import batchq
from tests.instruments.chaos import flows, spans
from tests.instruments.chaos.marks import DIRECTORY, WHOLE_BATCH, Mark, MarksFile
from tests.instruments.chaos.orders import BAD_ITEM, LATE_ITEM

EFFECT = "INSERT INTO effects (batch_id, item, attempt, pid) VALUES (%s, %s, %s, %s)"
SOON = batchq.Backoff(0.05, 0.2)
STEPS = 3
SLOW_STEP_SECONDS = 0.4
HUNGRY_SECONDS = 3.0
NAP_SECONDS = 0.08
LONG_NAP_SECONDS = 0.3
ITEM_NAP_SECONDS = 0.03
SCRATCH_BYTES = 2_000_000

sync_app = batchq.App()
async_app = batchq.App()
items_app = batchq.App()
chunks_app = batchq.App()
limits_app = batchq.App()  # never with old code, which knows no limits
flows_app = batchq.App()  # nor this one: it knows no parts

marks = MarksFile(Path(os.environ[DIRECTORY]))


def mark(batch: batchq.Batch, item: int = WHOLE_BATCH) -> None:
    """Leave a mark; use as much memory as meets a limit of it."""
    bytearray(SCRATCH_BYTES)
    marks.add(Mark(batch.id, item, batch.attempt, batch._claimed.claim.token))


def effect(batch: batchq.Batch, item: int = WHOLE_BATCH) -> list[int]:
    """Return the row of ``effects``."""
    return [batch.id, item, batch.attempt, os.getpid()]


def text_of(batch: batchq.Batch) -> str:
    """Return the text that the payload brings along."""
    return str(batch.payload.get("text", ""))


def work_item(batch: batchq.Batch, item: int) -> None:
    """Work one item; raise for those that are to fail."""
    mark(batch, item % 100)
    if item >= BAD_ITEM:
        raise batchq.InvalidInput(f"item {item} is bad {text_of(batch)}")
    if item >= LATE_ITEM and batch.attempt == 1:
        raise ValueError(f"item {item} fails at first {text_of(batch)}")


# ------------------------------------------------------------------------------------------------------ def, async def


@sync_app.handler("tx", backoff=SOON)
def tx(batch: batchq.Batch) -> None:
    """Write one row together with the batch's completion; some fail in their first attempt."""
    mark(batch)
    time.sleep(NAP_SECONDS)
    if batch.payload.get("fails_at_first") and batch.attempt == 1:
        raise ValueError("fails at first")
    with batch.transaction() as conn:
        conn.execute(EFFECT, effect(batch))


@async_app.handler("tx_async", backoff=SOON)
async def tx_async(batch: batchq.Batch) -> None:
    """Do as tx does, in the event loop."""
    mark(batch)
    await asyncio.sleep(LONG_NAP_SECONDS)
    async with batch.transaction() as conn:
        await conn.execute(EFFECT, effect(batch))


@sync_app.handler("plain", backoff=SOON)
def plain(batch: batchq.Batch) -> dict[str, Any]:
    """Do nothing but leave a mark; those of a burst take no time."""
    mark(batch)
    if not batch.payload.get("is_cheap"):
        time.sleep(NAP_SECONDS)
    return {"pid": os.getpid(), "text": text_of(batch)}


@async_app.handler("plain_async", backoff=SOON)
async def plain_async(batch: batchq.Batch) -> None:
    """Do as plain does, in the event loop."""
    mark(batch)
    if not batch.payload.get("is_cheap"):
        await asyncio.sleep(LONG_NAP_SECONDS)


@sync_app.handler("failing", backoff=SOON)
def failing(batch: batchq.Batch) -> None:
    """Fail in each attempt."""
    mark(batch)
    raise ValueError(f"always fails {text_of(batch)}")


@sync_app.handler("hungry", backoff=SOON)
def hungry(batch: batchq.Batch) -> None:
    """Take memory and keep it, until this process is killed for it; after a while, fail."""
    mark(batch)
    held = bytearray(batch.payload["megabytes"] * 2**20)
    held[::4096] = b"x" * len(held[::4096])
    until = time.monotonic() + HUNGRY_SECONDS
    while time.monotonic() < until:
        batch.raise_if_interrupted()
        time.sleep(0.05)
    raise MemoryError("nobody has killed this process")


# ---------------------------------------------------------------------------------------------------------- chunks


@chunks_app.handler("steps", backoff=SOON)
def steps(batch: batchq.Batch) -> None:
    """Write a row with each step's checkpoint, the last with the completion; some take so long that a worker that
    was frozen meets the batch's next owner at it."""
    mark(batch)
    nap_seconds = SLOW_STEP_SECONDS if batch.payload["is_slow"] else NAP_SECONDS
    for step in range(batch.cursor or 0, STEPS - 1):
        time.sleep(nap_seconds)
        with batch.transaction(cursor=step + 1) as conn:
            conn.execute(EFFECT, effect(batch, step))
        batch.raise_if_interrupted()
    time.sleep(nap_seconds)
    with batch.transaction() as conn:
        conn.execute(EFFECT, effect(batch, STEPS - 1))


@chunks_app.handler("chunks", backoff=SOON)
def chunks(batch: batchq.Batch) -> None:
    """Write a row an item, chunk by chunk."""
    mark(batch)
    for chunk in batch.chunks(4):
        time.sleep(NAP_SECONDS)
        with chunk.transaction() as conn:
            for position, (index, item) in enumerate(zip(chunk.indexes, chunk.items, strict=True)):
                try:
                    work_item(batch, item)
                except ValueError as error:
                    chunk.fail(position, error)
                else:
                    conn.execute(EFFECT, effect(batch, index))


@chunks_app.handler("chunks_async", backoff=SOON)
async def chunks_async(batch: batchq.Batch) -> None:
    """Do as chunks does, in the event loop."""
    mark(batch)
    async for chunk in batch.chunks(4):
        await asyncio.sleep(LONG_NAP_SECONDS)
        async with chunk.transaction() as conn:
            for position, (index, item) in enumerate(zip(chunk.indexes, chunk.items, strict=True)):
                try:
                    work_item(batch, item)
                except ValueError as error:
                    chunk.fail(position, error)
                else:
                    await conn.execute(EFFECT, effect(batch, index))


# -------------------------------------------------------------------------------------------------- limits and keys


@limits_app.handler("limited", backoff=SOON)
def limited(batch: batchq.Batch) -> None:
    """Run beside a few others at most, and write when, see `spans`."""
    mark(batch)
    spans.begin(batch)
    time.sleep(NAP_SECONDS)
    with batch.transaction() as conn:
        conn.execute(EFFECT, effect(batch))
        conn.execute(*spans.end(batch))


@limits_app.handler("keyed", backoff=SOON)
async def keyed(batch: batchq.Batch) -> None:
    """Run in the order of its key, and write when; some fail in their first attempt."""
    mark(batch)
    await asyncio.to_thread(spans.begin, batch)
    await asyncio.sleep(ITEM_NAP_SECONDS)
    if batch.payload["fails_at_first"] and batch.attempt == 1:
        raise ValueError("fails at first")
    async with batch.transaction() as conn:
        await conn.execute(EFFECT, effect(batch))
        await conn.execute(*spans.end(batch))


# ------------------------------------------------------------------------------------- flows, parts and a schedule


@flows_app.handler("needed", backoff=SOON)
@flows_app.handler("tick", backoff=SOON)
def short(batch: batchq.Batch) -> None:
    """Write a row; a fan-in waits for this, or a schedule has made it."""
    mark(batch)
    time.sleep(ITEM_NAP_SECONDS)
    with batch.transaction() as conn:
        conn.execute(EFFECT, effect(batch))


@flows_app.handler("fan_in", backoff=SOON)
def fan_in(batch: batchq.Batch) -> None:
    """Write what has not ended of what this waits for."""
    mark(batch)
    with batch.transaction() as conn:
        conn.execute(*flows.began(batch))
        conn.execute(EFFECT, effect(batch))


@flows_app.item_handler("spread", chunk_size=2, backoff=SOON)
def one_item_of_many(item: int, batch: batchq.Batch) -> None:
    """Leave a mark for each item, in whichever part it is."""
    time.sleep(ITEM_NAP_SECONDS)
    work_item(batch, item)


# ----------------------------------------------------------------------------------------------------------- items


@items_app.item_handler("items", chunk_size=4, backoff=SOON)
def one_item(item: int, batch: batchq.Batch) -> None:
    """Leave a mark for each item."""
    time.sleep(ITEM_NAP_SECONDS)
    work_item(batch, item)


@items_app.item_handler("items_async", chunk_size=4, concurrency=3, backoff=SOON)
async def one_item_async(item: int, batch: batchq.Batch) -> None:
    """Do as one_item does, several at once."""
    await asyncio.sleep(LONG_NAP_SECONDS)
    work_item(batch, item)


@items_app.item_handler("items_tx", chunk_size=4, transactional=True, backoff=SOON)
def one_item_tx(item: int, batch: batchq.Batch, conn: Any) -> None:
    """Write a row for each item, before it may fail: then its savepoint takes the row back."""
    time.sleep(ITEM_NAP_SECONDS)
    conn.execute(EFFECT, effect(batch, item % 100))
    work_item(batch, item)


@items_app.item_handler("items_tx_async", chunk_size=4, transactional=True, backoff=SOON)
async def one_item_tx_async(item: int, batch: batchq.Batch, conn: Any) -> None:
    """Do as one_item_tx does, in the event loop."""
    await asyncio.sleep(ITEM_NAP_SECONDS)
    await conn.execute(EFFECT, effect(batch, item % 100))
    work_item(batch, item)
