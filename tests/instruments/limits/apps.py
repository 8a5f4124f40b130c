"""The handlers: each writes when it began, on its own connection, and when it ended, in the batch's transaction."""

import asyncio
import os
import threading
import time
from typing import Any

import psycopg

import batchq
from tests.support.processes import HANDLERS_DSN

SOON = batchq.Backoff(0.01, 0.05)
BEGUN = "INSERT INTO spans (batch_id, attempt, key, pid) VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING"
ENDED = "UPDATE spans SET ended_at = clock_timestamp() WHERE batch_id = %s AND attempt = %s"
CALLED = "INSERT INTO calls (item, pid) VALUES (%s, %s)"
NAP_SECONDS = 1.0

app = batchq.App()
_local = threading.local()


def own_connection() -> psycopg.Connection[Any]:
    """Return this thread's own connection, a new one if the last one broke."""
    if getattr(_local, "conn", None) is None or _local.conn.closed:
        _local.conn = psycopg.connect(os.environ[HANDLERS_DSN], autocommit=True, prepare_threshold=None)
    return _local.conn  # type: ignore[no-any-return]


def run(batch: batchq.Batch, seconds: float) -> None:
    """Write the beginning, nap, and write the end together with the completion."""
    own_connection().execute(BEGUN, [batch.id, batch.attempt, batch.key, os.getpid()])
    time.sleep(seconds)
    with batch.transaction() as conn:
        conn.execute(ENDED, [batch.id, batch.attempt])


@app.handler("running", backoff=SOON)
def running(batch: batchq.Batch) -> None:
    """Take a second."""
    run(batch, NAP_SECONDS)


@app.handler("ordered", backoff=SOON)
def ordered(batch: batchq.Batch) -> None:
    """Take no time; a tenth fails once."""
    if batch.id % 10 == 0 and batch.attempt == 1:
        own_connection().execute(BEGUN, [batch.id, batch.attempt, batch.key, os.getpid()])
        raise ValueError("fails once")
    run(batch, 0)


@app.handler("plain")
def plain(batch: batchq.Batch) -> None:
    """Do nothing."""


@app.item_handler("items", concurrency=20)
async def one_item(item: int) -> None:
    """Write the call."""
    await asyncio.to_thread(lambda: own_connection().execute(CALLED, [item, os.getpid()]))


@app.item_handler("throttled", backoff=SOON)
def throttled(item: int) -> None:
    """Write the call; the one with the number 100 is throttled for 3 s, once."""
    conn = own_connection()
    conn.execute(CALLED, [item, os.getpid()])
    if item == 100 and conn.execute("SELECT count(*) FROM calls WHERE item = 100").fetchone() == (1,):
        raise batchq.Throttled(3)
    time.sleep(0.02)
