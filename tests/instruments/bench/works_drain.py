"""Throughput: enqueue, drain, backlog, history, and memory over a long drain."""

import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from batchq import Settings
from tests.instruments.bench import filling
from tests.instruments.bench.draining import drain_all, drain_part
from tests.instruments.bench.server import Database
from tests.instruments.bench.work import Bench, Figures, Run, work
from tests.instruments.bench.worker_process import Workers

NOT_KEPT: dict[str, object] = {"keep_completed": "no"}


@work
def drain(bench: Bench) -> Iterator[Run]:
    """W2, W3: one and two worker processes drain no-op batches of about 100 bytes that were enqueued before.

    The rates cover the time from the first start of a handler to the last, and to the moment when no batch is pending
    or processing in the database. The processes have imported everything and start together. If the setting exists,
    they also run with BATCHQ_KEEP_COMPLETED=no: completed batches are deleted.
    """
    count = bench.sizes.number("drain.batches")
    for _ in bench.times("drain"):
        for processes in (1, 2):
            yield one_drain(bench, count, processes)
        if "keep_completed" in Settings.model_fields:
            for processes in (1, 2):
                yield one_drain(bench, count, processes, is_kept=False)


def one_drain(bench: Bench, count: int, processes: int, is_kept: bool = True) -> Run:
    """Fill a fresh database and drain it."""
    with bench.database() as database:
        filling.fill(database, count)
        drained = drain_all(database, count, processes, settings=None if is_kept else NOT_KEPT, is_kept=is_kept)
        split = [len(marks) for marks in drained.by_process.values()]
        figures = drained.figures() | ({"smaller_share": round(min(split) / count, 3)} if processes > 1 else {})
    variant = f"{processes} process{'es' if processes > 1 else ''}{'' if is_kept else ', completed not kept'}"
    return Run("drain", variant, figures, drained.problems)


@work
def backlog(bench: Bench) -> Iterator[Run]:
    """W5: one process drains 100,000 batches, for at most ten seconds, from backlogs of different sizes.

    The smallest backlog is drained within a second, so its start weighs more. It is repeated and reported, but the
    goal compares with the backlog of 100,000, from which as many batches are drained as from the larger ones.
    """
    sizes, seconds = bench.sizes.numbers("backlog.sizes"), bench.sizes.seconds("backlog.seconds")
    most = bench.sizes.number("backlog.batches")
    for size in sizes:
        repeats = (5 if size <= 20_000 else 2 if size <= 200_000 else 1) if not bench.is_short else 1
        for _ in range(bench.runs or repeats):
            with bench.database() as database:
                filling.fill(database, size)
                drained = drain_part(database, size, min(size, most), seconds)
            figures: Figures = {"executed_per_s": round(drained.rate()), "executed": drained.count}
            figures |= {"server_cpu_s_per_10k": drained.figures()["server_cpu_s_per_10k"]}
            yield Run("backlog", f"{size:,} waiting", figures, drained.problems)


FILL_HISTORY = """
INSERT INTO batchq.batches (kind, status, attempt, created_at, run_at, claimed_at, finished_at)
SELECT 'history', 'completed', 1, at, at, at, at
FROM (SELECT %(start)s::timestamptz + n / %(total)s::float8 * (%(end)s::timestamptz - %(start)s) AS at
      FROM generate_series(%(first)s::bigint, %(last)s::bigint) AS n) AS past
"""
HISTORY_DAYS = 30
HISTORY_ROW_BYTES = 250
SPARE_BYTES = 15 * 10**9  # for WAL, and for others


@work
def history(bench: Bench) -> Iterator[Run]:
    """One process drains beside the finished batches of the last 30 days: none, or millions, in daily partitions.

    Repeated runs use the same database, so that the history is filled only once. Each run adds the batches that it
    drained. If the disk has no room for the history that was asked for, it is as large as possible.
    """
    count = bench.sizes.number("history.batches")
    for wanted in bench.sizes.numbers("history.rows"):
        rows = min(wanted, rows_that_fit(bench))
        with bench.database() as database:
            fill_history(database, rows)
            for _ in bench.times("history"):
                filling.fill(database, count)
                drained = drain_all(database, count)
                yield Run("history", f"{rows:,} finished", drained.figures(), drained.problems)


def rows_that_fit(bench: Bench) -> int:
    """Return how many finished rows the disk has room for, as far as we know."""
    directory = bench.server.data_directory()
    if directory is None:
        return 10**9
    return int(max(0, shutil.disk_usage(directory).free - SPARE_BYTES) // HISTORY_ROW_BYTES)


def fill_history(database: Database, rows: int) -> None:
    """Insert finished batches, evenly over the last 30 days but today, and let the database come to rest."""
    end = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    start = end - timedelta(days=HISTORY_DAYS)
    database.conn.execute("SELECT batchq.create_finished_partitions(%s, %s)", [start.date(), HISTORY_DAYS])
    for first in range(0, rows, filling.CHUNK):
        last = min(first + filling.CHUNK, rows) - 1
        span = {"start": start, "end": end, "total": rows, "first": first, "last": last}
        database.conn.execute(FILL_HISTORY, span)
    database.conn.execute("VACUUM (ANALYZE, FREEZE) batchq.batches")


@work
def memory(bench: Bench) -> Iterator[Run]:
    """W7: the resident memory of one worker process, sampled each second while it drains a million batches.

    *growth*: the mean of the last quarter minus that of the second quarter.
    """
    count = bench.sizes.number("memory.batches")
    seen: list[tuple[float, float]] = []

    def watch(workers: Workers) -> None:
        """Look, if a second has passed."""
        if not seen or time.monotonic() - seen[-1][0] >= 1:
            seen.append((time.monotonic(), workers.rss_mb()))

    with bench.database() as database:
        filling.fill(database, count)
        drained = drain_all(database, count, watch=watch)
    points = [(round(at - seen[0][0], 1), round(rss, 2)) for at, rss in seen]
    figures = {"max_rss_mb": drained.figures()["peak_rss_mb"], **growth(points)}
    figures["executed_per_s"] = round(drained.rate())
    yield Run("memory", f"{count:,} batches", figures, drained.problems, {"rss_mb": points})


def growth(points: list[tuple[float, float]]) -> Figures:
    """Return how memory grew over the run: from its second quarter to its last, and by the minute."""
    quarter = len(points) // 4
    if not quarter:
        return {"growth_mb": None, "slope_mb_per_minute": None}
    early, late = points[quarter : 2 * quarter], points[-quarter:]
    rise = mean([rss for _, rss in late]) - mean([rss for _, rss in early])
    minutes = (mean([at for at, _ in late]) - mean([at for at, _ in early])) / 60
    return {"growth_mb": round(rise, 2), "slope_mb_per_minute": round(rise / minutes, 2) if minutes else None}


def mean(values: list[float]) -> float:
    """Return the mean."""
    return sum(values) / len(values)
