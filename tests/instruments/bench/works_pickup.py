"""How soon a batch is picked up, and what it costs that workers wait."""

import random
import time
from collections.abc import Iterator

from batchq import enqueue as enqueue_one
from tests.instruments.bench import records
from tests.instruments.bench.records import one_row
from tests.instruments.bench.server import Database, Meter
from tests.instruments.bench.work import Bench, Figures, Run, work
from tests.instruments.bench.worker_process import Workers
from tests.support.waiting import wait_until

START_SECONDS = 120.0


@work
def pickup(bench: Bench) -> Iterator[Run]:
    """W4: the time from when an enqueue has returned (committed) to the start of its handler, with idle workers.

    200 batches, one every 50 ms, with 1, 10 and 100 worker processes; before that, what Postgres spends while they
    are idle. The 50 ms vary by 10, so that inserts and polls are not synchronized. Also with the bell (a NOTIFY on
    insert; BATCHQ_LISTEN_DSN).
    """
    for _ in bench.times("pickup"):
        for count in bench.sizes.numbers("pickup.workers"):
            for bell in (False, True):
                yield one_pickup(bench, count, bell)


def one_pickup(bench: Bench, count: int, bell: bool) -> Run:
    """Let *count* workers idle, then put batches before them."""
    inserts, pause_seconds = bench.sizes.number("pickup.inserts"), bench.sizes.number("pickup.pause_ms") / 1000
    with bench.database() as database, records.directory() as directory:
        database.conn.execute("SELECT batchq.bell(%s)", [bell])
        settings: dict[str, object] = {"listen_dsn": database.dsn} if bell else {}
        with Workers(database.dsn, count, directory, settings) as workers:
            begin_idling(bench, database, workers)
            figures = idle_figures(database, bench.sizes.seconds("pickup.idle_seconds"))
            committed = insert_slowly(database, inserts, pause_seconds)
            workers.wait_for(lambda: workers.records.count() >= inserts)
            workers.wait_for(lambda: not one_row(database.conn, "SELECT count(*) FROM batchq.batches_live")[0])
            problems = workers.stop()
        marks = workers.records.all()
        problems += records.problems_of_starts(marks, range(inserts))
        problems += records.problems_of_rows(database.conn, inserts)
    waits = sorted(1000 * (at - committed[number]) for number, at in marks if number in range(inserts))
    name = f"{count} worker{'s' if count > 1 else ''}{', bell' if bell else ''}"
    return Run("pickup", name, latencies(waits) | figures, problems, {"ms": [round(wait, 2) for wait in waits]})


def begin_idling(bench: Bench, database: Database, workers: Workers) -> None:
    """Let the workers go, and wait until they know of each other and have come to rest."""
    workers.go()

    def have_started() -> bool:
        workers.check_alive()
        return bool(one_row(database.conn, "SELECT count(*) FROM batchq.workers")[0] == workers.count)

    wait_until(have_started, START_SECONDS, "the workers to have started")
    time.sleep(bench.sizes.seconds("pickup.settle_seconds"))  # two heartbeats: each worker has counted the others


def insert_slowly(database: Database, count: int, pause_seconds: float) -> list[float]:
    """Enqueue one batch after the other; return when each was committed."""
    committed = []
    began_at = time.monotonic()
    for number in range(count):
        enqueue_one(database.conn, "noop", {"seq": number})
        committed.append(time.monotonic())
        late = random.uniform(-0.2, 0.2)
        time.sleep(max(0.0, began_at + (number + 1 + late) * pause_seconds - time.monotonic()))
    return committed


def idle_figures(database: Database, seconds: float) -> Figures:
    """Return what the server spends while the workers idle: its share of a core, and WAL by the minute."""
    meter, began_at = Meter(database).start(), time.monotonic()
    time.sleep(seconds)
    meter.stop()
    took = time.monotonic() - began_at
    cpu = None if meter.cpu_seconds is None else round(100 * meter.cpu_seconds / took, 2)
    return {
        "idle_server_cpu_percent": cpu,
        "idle_wal_kb_per_minute": round(meter.wal_bytes / took * 60 / 1000, 1),
        "connections": one_row(
            database.conn, "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        )[0]
        - 1,
    }


def latencies(waits: list[float]) -> Figures:
    """Return the percentiles of sorted waits, in milliseconds."""
    places = {"p50_ms": 0.50, "p95_ms": 0.95, "p99_ms": 0.99}
    found: Figures = {name: round(percentile(waits, place), 2) for name, place in places.items()}
    return found | {"max_ms": round(waits[-1], 2) if waits else None}


def percentile(values: list[float], place: float) -> float:
    """Return the value below which *place* of the sorted values are, by the nearest rank."""
    return values[min(len(values) - 1, max(0, round(place * len(values) + 0.5) - 1))] if values else 0.0


@work
def idle(bench: Bench) -> Iterator[Run]:
    """100 worker processes are idle for ten minutes: what Postgres spends, WAL per minute, connections.

    Verified: no worker has died or logged a warning.
    """
    count = bench.sizes.number("idle.workers")
    with bench.database() as database, records.directory() as directory:
        with Workers(database.dsn, count, directory) as workers:
            begin_idling(bench, database, workers)
            figures = idle_figures(database, 60 * bench.sizes.seconds("idle.minutes"))
            figures |= {"largest_rss_mb": round(workers.rss_mb(), 1)}
            problems = workers.stop()
        if workers.warnings:
            problems.append(workers.said()[-1500:])
    yield Run("idle", f"{count} workers", figures, problems)
