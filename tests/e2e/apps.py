"""The handlers that the tests' worker processes run.

They leave their marks in two tables. A row of ``ledger`` is written in the batch's own transaction: it must be there
exactly once. A row of ``executions`` is written outside it, and tells of work that was begun, also in vain.
"""

import asyncio
import os
import signal
import threading
import time
from typing import Any

import psycopg

import batchq
from tests.support.processes import HANDLERS_DSN

TABLES = """
CREATE TABLE ledger (seq integer NOT NULL, batch_id bigint NOT NULL, pid integer NOT NULL, attempt integer NOT NULL);
CREATE TABLE executions (seq integer, batch_id bigint NOT NULL, pid integer NOT NULL, attempt integer NOT NULL,
                         at timestamptz NOT NULL DEFAULT clock_timestamp());
CREATE TABLE gates (name text PRIMARY KEY);
"""
SOON = batchq.Backoff(0.1, 0.2)
NOTE = "INSERT INTO ledger (seq, batch_id, pid, attempt) VALUES (%s, %s, %s, %s)"

app = batchq.App()
newer_app = batchq.App()
local = threading.local()


def connection() -> psycopg.Connection[Any]:
    """Return this thread's own connection: what it writes commits by itself."""
    if not hasattr(local, "conn") or local.conn.closed:
        local.conn = psycopg.connect(os.environ[HANDLERS_DSN], autocommit=True, prepare_threshold=None)
    return local.conn  # type: ignore[no-any-return]


def record(batch: batchq.Batch, *seqs: int | None) -> None:
    """Record that work on these numbers begins."""
    connection().execute(
        "INSERT INTO executions (seq, batch_id, pid, attempt) SELECT unnest(%s::integer[]), %s, %s, %s",
        [list(seqs), batch.id, os.getpid(), batch.attempt],
    )


def mark(batch: batchq.Batch, seq: int) -> list[int]:
    """Return the row of the ledger for one number."""
    return [seq, batch.id, os.getpid(), batch.attempt]


def is_open(name: str) -> bool:
    """Tell whether somebody has opened a gate, by a row of ``gates``."""
    return connection().execute("SELECT FROM gates WHERE name = %s", [name]).rowcount > 0


def wait_at_gate(batch: batchq.Batch) -> None:
    """Wait until the gate of this kind and attempt is open."""
    while not is_open(f"{batch.kind} {batch.attempt}"):
        time.sleep(0.02)


@app.handler("note", backoff=SOON)
def note(batch: batchq.Batch) -> None:
    """Write one row of the ledger; it and the batch's completion commit together."""
    with batch.transaction() as conn:
        conn.execute(NOTE, mark(batch, batch.payload["seq"]))


@app.handler("note_async", backoff=SOON)
async def note_async(batch: batchq.Batch) -> None:
    """Do as note does, in the event loop."""
    async with batch.transaction() as conn:
        await conn.execute(NOTE, mark(batch, batch.payload["seq"]))


@app.handler("quick", backoff=SOON)
def quick(batch: batchq.Batch) -> None:
    """Do nothing but record that it ran."""
    record(batch, batch.payload.get("seq"))


@app.handler("nap")
def nap(batch: batchq.Batch) -> None:
    """Work for a second, outside every transaction."""
    time.sleep(1)


@app.item_handler("plain_items", concurrency=3, chunk_size=10, backoff=SOON)
def plain_item(item: int) -> None:
    """Fail for a negative item, until the gate "mended" is open."""
    if item < 0 and not is_open("mended"):
        raise ValueError(f"item {item} is bad")


@app.item_handler("async_items", concurrency=3, chunk_size=10, backoff=SOON)
async def async_item(item: int) -> None:
    """Do as plain_item does, in the event loop."""
    if item < 0 and not await asyncio.to_thread(is_open, "mended"):
        raise ValueError(f"item {item} is bad")


@app.item_handler("async_transactional_items", transactional=True, chunk_size=10, backoff=SOON)
async def async_transactional_item(item: int, batch: batchq.Batch, conn: psycopg.AsyncConnection[Any]) -> None:
    """Write one row of the ledger, in the chunk's transaction."""
    await conn.execute(NOTE, mark(batch, item))


@app.handler("async_chunks")
async def async_chunks(batch: batchq.Batch) -> None:
    """Write a row of the ledger for each item, chunk by chunk, by executemany: a pipeline within the transaction."""
    async for chunk in batch.chunks(10):
        async with chunk.transaction() as conn:
            await conn.cursor().executemany(NOTE, [mark(batch, item) for item in chunk.items])


@app.handler("gated")
def gated(batch: batchq.Batch) -> None:
    """Wait at the gate of this attempt, then write one row of the ledger."""
    record(batch, batch.payload["seq"])
    wait_at_gate(batch)
    with batch.transaction() as conn:
        conn.execute(NOTE, mark(batch, batch.payload["seq"]))


@app.handler("gated_inside")
def gated_inside(batch: batchq.Batch) -> None:
    """Write one row of the ledger, then wait at the gate with the transaction open."""
    with batch.transaction() as conn:
        conn.execute(NOTE, mark(batch, batch.payload["seq"]))
        record(batch, batch.payload["seq"])
        wait_at_gate(batch)


@app.handler("gated_async")
async def gated_async(batch: batchq.Batch) -> None:
    """Do as gated_inside does, in the event loop."""
    async with batch.transaction() as conn:
        await conn.execute(NOTE, mark(batch, batch.payload["seq"]))
        await asyncio.to_thread(record, batch, batch.payload["seq"])
        await asyncio.to_thread(wait_at_gate, batch)


@app.handler("stubborn")
def stubborn(batch: batchq.Batch) -> None:
    """Wait at the gate, deaf to every request to stop."""
    record(batch, batch.payload["seq"])
    wait_at_gate(batch)


@app.handler("late_failure", backoff=SOON)
def late_failure(batch: batchq.Batch) -> None:
    """Wait at the gate, then fail; succeed in a later attempt."""
    record(batch, batch.payload["seq"])
    wait_at_gate(batch)
    if batch.attempt == 1:
        raise RuntimeError("too late")


@app.handler("busy")
def busy(batch: batchq.Batch) -> None:
    """Sleep for so many seconds, and do nothing else meanwhile."""
    record(batch, batch.payload["seq"])
    time.sleep(batch.payload["seconds"])


@app.handler("busy_async")
async def busy_async(batch: batchq.Batch) -> None:
    """Block the event loop for so many seconds, as no handler should."""
    busy(batch)


@app.handler("patient")
def patient(batch: batchq.Batch) -> None:
    """Save a checkpoint again and again, until the gate "enough" is open."""
    record(batch, batch.payload["seq"])
    while not is_open("enough"):
        time.sleep(0.02)
        batch.checkpoint((batch.cursor or 0) + 1)


@app.handler("patient_async")
async def patient_async(batch: batchq.Batch) -> None:
    """Do as patient does, in the event loop."""
    await asyncio.to_thread(record, batch, batch.payload["seq"])
    while not await asyncio.to_thread(is_open, "enough"):
        await asyncio.sleep(0.02)
        await batch.checkpoint_async((batch.cursor or 0) + 1)


@app.handler("chunks")
def chunks(batch: batchq.Batch) -> None:
    """Write a row of the ledger for each item, chunk by chunk; negative ones fail until the gate "mended" is open."""
    for chunk in batch.chunks(1000):
        record(batch, *chunk.items)
        bad = [] if is_open("mended") else [place for place, item in enumerate(chunk.items) if item < 0]
        for place in bad:
            chunk.fail(place, f"item {chunk.items[place]} is bad")
        with chunk.transaction() as conn:
            conn.execute(
                "INSERT INTO ledger (seq, batch_id, pid, attempt) SELECT unnest(%s::integer[]), %s, %s, %s",
                [[item for place, item in enumerate(chunk.items) if place not in bad], *mark(batch, 0)[1:]],
            )


@app.item_handler("items", transactional=True, chunk_size=50, backoff=SOON)
def work_item(item: int, batch: batchq.Batch, conn: psycopg.Connection[Any]) -> None:
    """Write one row of the ledger, in the chunk's transaction."""
    conn.execute(NOTE, mark(batch, item))


@app.item_handler("gated_items", chunk_size=1)
def gated_item(item: int) -> None:
    """Wait at the gate of the item."""
    while not is_open(f"item {item}"):
        time.sleep(0.02)


@app.handler("poison")
def poison(batch: batchq.Batch) -> None:
    """End the process that works it, by *how*: an exit that nothing catches, or kill -9."""
    record(batch, None)
    if batch.payload["how"] == "exit":
        os._exit(3)
    os.kill(os.getpid(), signal.SIGKILL)


@app.handler("flaky", backoff=batchq.Backoff(0.2, 0.4))
def flaky(batch: batchq.Batch) -> None:
    """Fail in the first *failures* attempts."""
    record(batch, None)
    if batch.attempt <= batch.payload["failures"]:
        raise RuntimeError(f"attempt {batch.attempt} fails")


@newer_app.handler("only_newer")
def only_newer(batch: batchq.Batch) -> None:
    """Be a kind that the older program does not know."""
    record(batch, None)
