"""The app of the soak's workers: each style of handler, and each way in which a batch can end.

BATCHQ_SOAK_LEAK_BYTES plants a leak, to prove that the verdict finds it: so much is kept of each `quick` batch.
"""

import asyncio
import os
import time
from typing import Any

import psycopg

import batchq
from tests.instruments.bench.apps import starts
from tests.instruments.bench.records import RECORD

LEAK_BYTES = int(os.environ.get("BATCHQ_SOAK_LEAK_BYTES", "0"))
SLOW_SECONDS = 4.0
DEAF_SECONDS = 12.0
SNOOZE_SECONDS = 0.5
SOON = batchq.Backoff(0.2, 0.5)
NOTE = "INSERT INTO ledger (batch_id, number) VALUES (%s, %s)"

app = batchq.App()
kept: list[bytearray] = []


def record(batch: batchq.Batch) -> None:
    """Record that the batch runs, and when."""
    os.write(starts, RECORD.pack(batch.payload["seq"], time.monotonic_ns()))


@app.handler("quick")
def quick(batch: batchq.Batch) -> dict[str, int]:
    """Return a result."""
    record(batch)
    if LEAK_BYTES:
        kept.append(bytearray(LEAK_BYTES))
    return {"seq": batch.payload["seq"]}


@app.handler("quick_async")
async def quick_async(batch: batchq.Batch) -> dict[str, int]:
    """Do so in the event loop."""
    record(batch)
    await asyncio.sleep(0.01)
    return {"seq": batch.payload["seq"]}


@app.handler("note")
def note(batch: batchq.Batch) -> None:
    """Write a row of the ledger; it and the completion commit together."""
    record(batch)
    with batch.transaction() as conn:
        conn.execute(NOTE, [batch.id, 0])


@app.handler("note_async")
async def note_async(batch: batchq.Batch) -> None:
    """Do so in the event loop."""
    record(batch)
    async with batch.transaction() as conn:
        await conn.execute(NOTE, [batch.id, 0])


@app.item_handler("items", concurrency=4, backoff=SOON)
def one_item(item: int, batch: batchq.Batch) -> None:
    """Fail for each negative item, in its first attempt."""
    fail_negative(item, batch)


@app.item_handler("items_async", concurrency=10, backoff=SOON)
async def one_item_async(item: int, batch: batchq.Batch) -> None:
    """Do so in the event loop."""
    await asyncio.sleep(0.001)
    fail_negative(item, batch)


def fail_negative(item: int, batch: batchq.Batch) -> None:
    """Raise ValueError for a negative item, in the first attempt."""
    if item < 0 and batch.attempt == 1:
        raise ValueError(f"item {item} fails at first")


@app.item_handler("items_transactional", transactional=True, chunk_size=10)
def one_item_transactional(item: int, batch: batchq.Batch, conn: psycopg.Connection[Any]) -> None:
    """Write a row of the ledger, in the chunk's transaction."""
    conn.execute(NOTE, [batch.id, item])


@app.handler("chunks")
def chunks(batch: batchq.Batch) -> None:
    """Write a row of the ledger for each item, chunk by chunk."""
    record(batch)
    for chunk in batch.chunks(10):
        with chunk.transaction() as conn:
            conn.cursor().executemany(NOTE, [(batch.id, item) for item in chunk.items])


@app.handler("chunks_async")
async def chunks_async(batch: batchq.Batch) -> None:
    """Do so in the event loop."""
    record(batch)
    async for chunk in batch.chunks(10):
        async with chunk.transaction() as conn:
            await conn.cursor().executemany(NOTE, [(batch.id, item) for item in chunk.items])


@app.handler("flaky", backoff=SOON)
def flaky(batch: batchq.Batch) -> None:
    """Fail at the first attempt."""
    record(batch)
    if batch.attempt == 1:
        raise RuntimeError("the first attempt fails")


@app.handler("hopeless", backoff=SOON)
async def hopeless(batch: batchq.Batch) -> None:
    """Fail at each attempt."""
    record(batch)
    raise RuntimeError(f"attempt {batch.attempt} fails")


@app.handler("snoozed")
def snoozed(batch: batchq.Batch) -> None:
    """Put it off once, with a checkpoint that tells so."""
    record(batch)
    if batch.cursor is None:
        batch.checkpoint("put off")
        raise batchq.Snooze(SNOOZE_SECONDS)


@app.handler("slow")
def slow(batch: batchq.Batch) -> None:
    """Take a while: its lease is extended meanwhile."""
    record(batch)
    time.sleep(SLOW_SECONDS)


@app.handler("slow_async")
async def slow_async(batch: batchq.Batch) -> None:
    """Do so in the event loop."""
    record(batch)
    await asyncio.sleep(SLOW_SECONDS)


@app.handler("cancelled")
def cancelled(batch: batchq.Batch) -> None:
    """Be cancelled while it runs: it is told, and ends."""
    record(batch)
    until = time.monotonic() + DEAF_SECONDS
    while not batch.stop_requested and time.monotonic() < until:
        time.sleep(0.05)


@app.handler("cancelled_async")
async def cancelled_async(batch: batchq.Batch) -> None:
    """Do so in the event loop."""
    record(batch)
    await asyncio.sleep(DEAF_SECONDS)


@app.handler("overdue", timeout_seconds=1, backoff=SOON)
def overdue(batch: batchq.Batch) -> None:
    """Run into its time limit, at each attempt: its thread is replaced."""
    record(batch)
    time.sleep(3)


@app.handler("abandoned")
def abandoned(batch: batchq.Batch) -> None:
    """Be claimed by a worker that dies at once (the load plays it), and run in its second attempt."""


@app.handler("cancelled_waiting")
def cancelled_waiting(batch: batchq.Batch) -> None:
    """Never run: cancelled while it waits for its time."""


@app.handler("large")
def large(batch: batchq.Batch) -> dict[str, int]:
    """Read a payload of 1 MB."""
    record(batch)
    return {"length": len(batch.payload["data"])}
