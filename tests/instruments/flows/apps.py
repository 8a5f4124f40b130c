"""The handlers: each writes when it began, on its own connection, and fails if its payload says so."""

import os
import threading
from typing import Any

import psycopg

import batchq
from tests.support.processes import HANDLERS_DSN

BEGUN = "INSERT INTO begins (batch_id, attempt, pid) VALUES (%s, %s, %s)"

app = batchq.App()
_local = threading.local()


def _own_connection() -> psycopg.Connection[Any]:
    if getattr(_local, "conn", None) is None or _local.conn.closed:
        _local.conn = psycopg.connect(os.environ[HANDLERS_DSN], autocommit=True, prepare_threshold=None)
    return _local.conn  # type: ignore[no-any-return]


@app.handler("plain")
def plain(batch: batchq.Batch) -> None:
    """Do nothing."""


@app.handler("step", backoff=batchq.Backoff(0.01, 0.05))
def step(batch: batchq.Batch) -> None:
    """Write the beginning; fail for good, or in the first attempt, if told to."""
    _own_connection().execute(BEGUN, [batch.id, batch.attempt, os.getpid()])
    if batch.payload.get("fails"):
        raise batchq.InvalidInput("as told")
    if batch.payload.get("fails_once") and batch.attempt == 1:
        raise ValueError("once")
