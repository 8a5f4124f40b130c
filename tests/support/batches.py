"""Put batches into the queue, look at them, and register one body as a handler of either style."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psycopg
from psycopg.rows import dict_row

import batchq
from batchq.worker.worker import Worker
from tests.support.waiting import wait_until

DRAIN_SECONDS = 30.0
STYLES = ("def", "async def")


def register(app: batchq.App, style: str, kind: str, body: Callable[[batchq.Batch], Any], **options: Any) -> None:
    """Register *body*, which awaits nothing, as a ``def`` or an ``async def`` handler."""

    async def in_loop(batch: batchq.Batch) -> Any:
        return body(batch)

    app.handler(kind, **options)(body if style == "def" else in_loop)


def register_items(app: batchq.App, style: str, kind: str, body: Callable[..., Any], **options: Any) -> None:
    """Register *body*, which takes item and batch and awaits nothing, as an item handler of either style."""

    def in_thread(item: Any, batch: batchq.Batch) -> Any:
        return body(item, batch)

    async def in_loop(item: Any, batch: batchq.Batch) -> Any:
        return body(item, batch)

    app.item_handler(kind, **options)(in_thread if style == "def" else in_loop)


def put(conn: psycopg.Connection, kind: str, payload: Any = None, **options: Any) -> int:
    """Enqueue a batch and return its id."""
    batch_id = batchq.enqueue(conn, kind, payload, **options)
    assert batch_id is not None
    return batch_id


def look(conn: psycopg.Connection, batch_id: int) -> SimpleNamespace:
    """Return the batch's columns, and as *shown* its status in batchq.status, as *wait_seconds* run_at - now()."""
    query = """
        SELECT b.*, s.status AS shown, extract(epoch FROM b.run_at - now())::float8 AS wait_seconds
        FROM batchq.all_batches b JOIN batchq.status s USING (id)
        WHERE b.id = %s
    """
    row = conn.cursor(row_factory=dict_row).execute(query, [batch_id]).fetchone()
    assert row, f"there is no batch {batch_id}"
    return SimpleNamespace(**row)


def drain(app: batchq.App, dsn: str, **settings: Any) -> None:
    """Do as batchq.testing.drain does, but fail after 30 s: a worker that is stuck would hang the tests."""
    worker = Worker(app, batchq.Settings.load(dsn=dsn, **settings), drain=True)
    alarm = threading.Timer(DRAIN_SECONDS, worker.stop_now)
    alarm.start()
    try:
        worker.run()
        assert not worker.lifecycle.leaving.is_set(), f"not drained within {DRAIN_SECONDS:g} s"
    finally:
        alarm.cancel()


def wait_for_status(conn: psycopg.Connection, batch_id: int, shown: str, seconds: float = 10) -> None:
    """Wait until batchq.status shows *shown* for the batch."""
    query = "SELECT status FROM batchq.status WHERE id = %s"
    wait_until(lambda: values(conn, query, batch_id) == [shown], seconds, f"batch {batch_id} to be {shown}")


def await_status(conn: psycopg.Connection, batch_id: int, shown: str, seconds: float = 10) -> SimpleNamespace:
    """Wait until batchq.status shows *shown* for the batch, and return its row."""
    wait_for_status(conn, batch_id, shown, seconds)
    return look(conn, batch_id)


def failed_items(conn: psycopg.Connection, batch_id: int) -> list[SimpleNamespace]:
    """Return the batch's failed items in order."""
    query = "SELECT * FROM batchq.failed_items WHERE batch_id = %s ORDER BY item_index"
    return [SimpleNamespace(**row) for row in conn.cursor(row_factory=dict_row).execute(query, [batch_id]).fetchall()]


def values(conn: psycopg.Connection, query: str, *parameters: Any) -> list[Any]:
    """Return the first column of *query*."""
    return [row[0] for row in conn.execute(query.encode(), parameters or None).fetchall()]
