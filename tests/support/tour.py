"""All that batchq does in a database, as producer, worker, viewer and operator, each by a connection of its own.

For tests of what could stand in the way: a role without a grant, functions that somebody else has made.
"""

from pathlib import Path
from typing import Any

import psycopg

import batchq
from batchq.postgres.connections import CONNECT_OPTIONS
from batchq.testing import running_worker
from tests.support.commands import CommandLine
from tests.support.waiting import wait_until
from tests.support.web import served

app = batchq.App()
SOON = batchq.Backoff(0.01, 0.02)
AFTER_WORK = {("bad", "ValueError: bad batch"), ("good", None)}  # a good one is scheduled for later
LOOKS = (
    "status", "status --json", "status --queue default --kind good --status ready", "show 1", "logs 1", "watch 1",
    "audit", "pause", "check", "check --invariants", "doctor", "monitor --queue nobody --until-done",
)  # fmt: skip
PAGES = (
    "/", "/batches", "/batches?status=failed", "/batches?status=ready", "/batches?queue=default&kind=good",
    "/batches?error=bad", "/batches?search=payload.n+%3D+2", "/batches/1", "/batches/1/payload.json", "/flow/1",
    "/failures", "/charts", "/charts?range=7d", "/flows", "/spread", "/limits", "/keys", "/keys?key=a", "/schedules",
    "/kinds?queue=default&kind=good", "/workers", "/audit", "/readyz", "/metrics",
)  # fmt: skip
VERBS = (
    "snooze {} --for 1h", "priority {} --to 3", "move {} --to later", "pause --queue later", "resume --queue later",
    "cancel {}", "retry {}", "snooze --queue later --for 2h", "priority --queue later --to 4",
    "move --queue later --to last", "cancel --queue last", "retry --queue last --status cancelled",
)  # fmt: skip


@app.handler("good")
def good(batch: batchq.Batch) -> Any:
    return batch.payload


@app.handler("alone", backoff=SOON)
def alone(batch: batchq.Batch) -> None:
    with batch.transaction() as conn:
        conn.execute("SELECT 1")


@app.handler("alone_async", backoff=SOON)
async def alone_async(batch: batchq.Batch) -> None:
    async with batch.transaction() as conn:
        await conn.execute("SELECT 1")


@app.handler("bad", backoff=SOON)
def bad(batch: batchq.Batch) -> None:
    raise ValueError("bad batch")


@app.item_handler("items", chunk_size=3, backoff=SOON)
def item_outside(item: int) -> None:
    if item < 0:
        raise ValueError("bad item")


@app.item_handler("items_inside", chunk_size=3, transactional=True, backoff=SOON)
def item_inside(item: int, batch: batchq.Batch, conn: psycopg.Connection[Any]) -> None:
    conn.execute("SELECT 1")


@app.handler("chunks", backoff=SOON)
async def chunks(batch: batchq.Batch) -> None:
    async for chunk in batch.chunks(3):
        async with chunk.transaction() as conn:
            await conn.execute("SELECT 1")
            if 5 in chunk.items and batch.attempt == 1:
                chunk.fail(1, "bad item")


def produce(dsn: str) -> None:
    """Enqueue batches of every kind, in every way."""
    with psycopg.connect(dsn, **CONNECT_OPTIONS) as conn:
        for kind in ("good", "alone", "alone_async", "bad"):
            batchq.enqueue(conn, kind, {"n": 1}, max_attempts=2)
        with conn.transaction():
            batchq.enqueue_many(conn, "good", [{"n": number} for number in range(20)])
        batchq.enqueue(conn, "good", {"large": "x" * 100_000})
        for kind in ("items", "items_inside", "chunks"):
            bad_item = -8 if kind == "items" else 8
            batchq.enqueue(conn, kind, items=[1, 2, 3, 4, 5, 6, 7, bad_item], max_failed_items=5, max_attempts=3)
        assert batchq.enqueue(conn, "good", unique_key="once") is not None
        assert batchq.enqueue(conn, "good", unique_key="once") is None
        batchq.enqueue(conn, "good", {"n": 2}, delay_seconds=3600, priority=7)


def work(dsn: str, admin_dsn: str, **settings: Any) -> set[tuple[str, str]]:
    """Work all that is ready, by one worker; return what has failed, as kind and error.

    A batch of a worker that has died is among it, and the keeper does its rare duties.
    """
    with psycopg.connect(admin_dsn, autocommit=True) as admin:
        abandoned = admin.execute("INSERT INTO batchq.batches (kind) VALUES ('good') RETURNING id").fetchone()
        admin.execute(
            "UPDATE batchq.batches SET status = 'processing', attempt = 1, claimed_by = 'dead', claimed_at = now(),"
            " claim_token = gen_random_uuid(), lease_expires_at = now() - interval '1 s' WHERE id = %s",
            abandoned,
        )
        live = "SELECT FROM batchq.batches_live WHERE run_at < now() + interval '1 minute'"
        with running_worker(app, dsn, lease_seconds=2, log_format="json", **settings):
            wait_until(lambda: not admin.execute(live).rowcount, 30, "all batches to be worked")
        return set(admin.execute("SELECT DISTINCT kind, last_error FROM batchq.status WHERE status <> 'completed'"))


def look(dsn: str, directory: Path) -> dict[str, str]:
    """Look at everything, by the shell and the page; return what failed, by command and path."""
    batchq_command = CommandLine(dsn, directory)
    found = {}
    for command in LOOKS:
        ended = batchq_command(*command.split())
        complaints = [line for line in ended.err.splitlines() if "batchq: " in line and " is known (" not in line]
        if ended.code == 2 or complaints or "Traceback" in ended.err:
            found[command] = ended.out + ended.err
    with served(dsn) as site:
        for path in PAGES:
            answer = site.client.get(path)
            if answer.status_code != 200:
                found[path] = answer.text
    return found


def operate(dsn: str, admin_dsn: str, directory: Path) -> dict[str, str]:
    """Do every verb; return what failed, by command."""
    batchq_command = CommandLine(dsn, directory)
    found = {}
    with psycopg.connect(admin_dsn, autocommit=True) as admin:
        row = admin.execute(
            "INSERT INTO batchq.batches (kind, run_at) VALUES ('good', now() + interval '1 hour') RETURNING id"
        )
        (batch_id,) = row.fetchone() or (None,)
    for verb in VERBS:
        ended = batchq_command(*verb.format(batch_id).split())
        if ended.code:
            found[verb] = ended.out + ended.err
    return found
