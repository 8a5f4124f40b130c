"""The item handlers: one sleeps, one writes what it worked with the checkpoint; items that are told to fail, fail."""

import time
from typing import Any

import psycopg

import batchq

app = batchq.App()


@app.item_handler("sleep", chunk_size=200)
def sleep(item: int) -> None:
    """Take a millisecond."""
    time.sleep(0.001)


@app.item_handler("count", transactional=True, chunk_size=500)
def count(item: Any, batch: batchq.Batch, conn: psycopg.Connection[Any]) -> None:
    """Write that the item was worked, once if it succeeds; fail if the payload says so."""
    if batch.payload.get("fails_every") and item % batch.payload["fails_every"] == 0:
        row = conn.execute("SELECT failing FROM spread_switch").fetchone()
        if row is not None and row[0]:
            raise ValueError(f"item {item}")
    conn.execute("INSERT INTO worked (item) VALUES (%s)", [item])
