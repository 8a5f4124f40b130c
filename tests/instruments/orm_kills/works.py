"""What is tried, and its verdict: batches beside kills; then every row must be there exactly once."""

import multiprocessing
import os
import random
import sys
import time
from multiprocessing.process import BaseProcess
from typing import Any

import psycopg

import batchq
from tests.instruments.orm_kills.apps import DSN, ITEMS, KINDS
from tests.support.processes import ROOT
from tests.support.trials import Place, Seen, value
from tests.support.waiting import wait_until

APP = "tests.instruments.orm_kills.apps:app"
TABLES = """
DROP TABLE IF EXISTS done;
CREATE TABLE done (id bigserial PRIMARY KEY, batch_id bigint NOT NULL, item integer NOT NULL);
TRUNCATE batchq.batches, batchq.batches_finished;
TRUNCATE batchq.failed_items;
"""
LIVE = "SELECT count(*) FROM batchq.batches_live"
AT_ONCE = "UPDATE batchq.batches_live SET run_at = now() WHERE status = 'pending' AND run_at > now()"
# Of each item, a row was written this many times.
COUNTS = """
SELECT b.id, b.status, e.item, (SELECT count(*) FROM done d WHERE d.batch_id = b.id AND d.item = e.item)
FROM batchq.all_batches b
CROSS JOIN LATERAL generate_series(0, coalesce(b.items_total, 1) - 1) e(item)
"""
WAITING = 60
MOST_LIFE_SECONDS = 0.6
LEASE_SECONDS = 1


def kills(place: Place, count: int, *, workers: int = 3, seed: int = 1) -> Seen:
    """Batches of all kinds, while *count* worker processes are killed at random points; then two end the work."""
    seen, rng = Seen(), random.Random(seed)
    # A process that has imported everything makes the workers: a worker of its own takes over a second to begin.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([APP.partition(":")[0], "batchq.worker.worker", "batchq.cli"])
    dsns = (place.workers_dsn or place.dsn, place.dsn)
    fleet: list[tuple[BaseProcess, float]] = []
    killed = enqueued = 0
    with place.connect() as conn:
        conn.execute(TABLES.encode())
        while killed < count:
            enqueued += _fill(conn, rng)
            while len(fleet) < workers:
                fleet.append((_started(context, dsns), 0.0))
            fleet = [(process, at or _kill_at(conn, process, rng)) for process, at in fleet]
            for process, at in list(fleet):
                if at and time.monotonic() >= at:
                    process.kill()
                    process.join()
                    fleet.remove((process, at))
                    killed += 1
            conn.execute(AT_ONCE)
            time.sleep(0.005)
        fleet += [(_started(context, dsns), 0.0) for _ in range(2)]
        wait_until(lambda: conn.execute(AT_ONCE) and value(conn, LIVE) == 0, 120, "all batches to finish")
        for process, _ in fleet:
            process.terminate()
            process.join()
        _judge(conn, seen, killed, enqueued)
    return seen


def _judge(conn: psycopg.Connection[Any], seen: Seen, killed: int, enqueued: int) -> None:
    rows = conn.execute(COUNTS.encode()).fetchall()
    again = value(conn, "SELECT count(*) FROM batchq.all_batches WHERE errors::text LIKE '%%worker died%%'")
    rolled_back = value(conn, "SELECT count(*) FROM batchq.all_batches WHERE errors::text LIKE '%%was rolled back%%'")
    batches = value(conn, "SELECT count(*) FROM batchq.all_batches")
    lost = [row for row in rows if row[3] == 0]
    doubled = [row for row in rows if row[3] > 1]
    unfinished = [row for row in rows if row[1] != "completed"]
    written = value(conn, "SELECT count(*) FROM done")
    seen.figures = {
        "kills": killed,
        "batches": batches,
        "rows": written,
        "lost": len(lost),
        "doubled": len(doubled),
        "batches whose worker died": again,
        "batches with a rollback": rolled_back,
    }
    seen.must(batches == enqueued, f"{enqueued} batches were enqueued, {batches} are there")
    seen.must(not lost, f"rows are lost: {lost[:5]}")
    seen.must(not doubled and written <= len(rows), f"rows are doubled: {doubled[:5]}")
    seen.must(not unfinished, f"batches did not complete: {unfinished[:5]}")
    seen.must(again > 0, "no kill met a batch")


def _fill(conn: psycopg.Connection[Any], rng: random.Random) -> int:
    """Keep enough batches waiting; return how many were enqueued."""
    missing = WAITING - int(value(conn, LIVE))
    if missing <= WAITING // 2:
        return 0
    with conn.transaction():
        for _ in range(missing):
            kind = rng.choice(KINDS)
            items = list(range(ITEMS)) if kind.endswith("chunks") else None
            batchq.enqueue(conn, kind, items=items, max_attempts=1000)
    return missing


def _kill_at(conn: psycopg.Connection[Any], process: BaseProcess, rng: random.Random) -> float:
    """Return when to kill a worker: some time after it has begun to work; 0 if it has not."""
    has_begun = "SELECT EXISTS (SELECT 1 FROM batchq.batches_live WHERE claimed_by LIKE %s)"
    if not process.is_alive():
        raise RuntimeError(f"a worker process ended with {process.exitcode}")
    return time.monotonic() + rng.random() * MOST_LIFE_SECONDS if value(conn, has_begun, [f"%-{process.pid}-%"]) else 0


def _started(context: Any, dsns: tuple[str, str]) -> BaseProcess:
    process: BaseProcess = context.Process(target=_work, args=dsns, daemon=True)
    process.start()
    return process


def _work(dsn: str, handlers_dsn: str) -> None:
    """Be a worker process, as ``batchq worker`` is one."""
    from batchq.cli import main

    os.chdir(ROOT)
    os.environ |= {DSN: handlers_dsn, "BATCHQ_DSN": dsn, "BATCHQ_LEASE_SECONDS": str(LEASE_SECONDS)}
    os.environ |= {"BATCHQ_LOG_LEVEL": "error", "BATCHQ_CONCURRENCY": "4"}
    sys.exit(main(["worker", APP]))
