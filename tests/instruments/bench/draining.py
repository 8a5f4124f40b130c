"""Drain a queue that is filled, by real processes, and tell what it took."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.instruments.bench import records
from tests.instruments.bench.records import Marks, one_row
from tests.instruments.bench.server import Database, Meter
from tests.instruments.bench.work import Figures
from tests.instruments.bench.worker_process import Stalled, Workers

EMPTY_POLL_SECONDS = 0.005


@dataclass
class Drained:
    """What came of a drain."""

    count: int
    marks: Marks
    by_process: dict[int, Marks]
    ends: dict[int, Marks]
    completed_at: float
    meter: Meter
    worker_cpu_seconds: float
    peak_rss_mb: float
    warnings: int
    problems: list[str]

    def rate(self) -> float:
        """Return how many a second ran, from the first start to the last."""
        return rate_between(self.marks, self.marks[0][1], self.marks[-1][1])

    def figures(self) -> Figures:
        """Return what is told of every drain."""
        seconds = self.completed_at - self.marks[0][1]
        return {
            "executed_per_s": round(self.rate()),
            "completed_per_s": round(self.count / seconds),
            **self.meter.per_batch(self.count),
            "worker_cpu_s_per_10k": round(self.worker_cpu_seconds / self.count * 10_000, 3),
            "other_cpu_percent": self.other_cpu_percent(seconds),
            "peak_rss_mb": round(self.peak_rss_mb, 1),
            "warnings": self.warnings,
        }

    def other_cpu_percent(self, seconds: float) -> float | None:
        """Return what neither the server nor the workers spent, the benchmark and the kernel included, of a core."""
        if self.meter.cpu_seconds is None:
            return None
        other = self.meter.machine_cpu_seconds - self.meter.cpu_seconds - self.worker_cpu_seconds
        return round(max(0.0, 100 * other / seconds))


def rate_between(marks: Marks, first: float, last: float) -> float:
    """Return how many a second started in a span of time."""
    count = sum(first <= at <= last for _, at in marks)
    return count / (last - first) if last > first else 0.0


def drain_all(
    database: Database,
    count: int,
    processes: int = 1,
    *,
    settings: dict[str, object] | None = None,
    dsn: str | None = None,
    is_kept: bool = True,
    watch: Callable[[Workers], None] | None = None,
) -> Drained:
    """Drain *count* batches to the last; verify that each ran once.

    *dsn*: another way to the database. *is_kept*: completed batches stay in it. *watch* is called while it goes on.
    """
    after_id = records.newest_finished(database.conn)
    with records.directory() as directory, Workers(dsn or database.dsn, processes, directory, settings) as workers:
        meter, cpu_before = Meter(database).start(), workers.cpu_seconds()
        workers.go()

        def is_done() -> bool:
            if watch:
                watch(workers)
            return workers.records.count() >= count

        workers.wait_for(is_done)
        workers.wait_for(lambda: is_empty(database), EMPTY_POLL_SECONDS)
        completed_at = time.monotonic()
        drained = finished(database, workers, count, completed_at, meter.stop(), cpu_before)
        drained.problems += records.problems_of_starts(drained.marks, range(count))
        drained.problems += records.problems_of_live(database.conn)
        drained.problems += records.problems_of_rows(database.conn, count if is_kept else 0, after_id)
    return drained


def finished(
    database: Database, workers: Workers, count: int, completed_at: float, meter: Meter, cpu_before: float
) -> Drained:
    """Stop the workers and gather what there is to say."""
    cpu_seconds, peak_rss_mb = workers.cpu_seconds() - cpu_before, workers.peak_rss_mb()
    problems = workers.stop()
    marks = workers.records.all()
    if not marks:
        raise Stalled(f"no batch has run: {workers.said()[-1500:]}")
    return Drained(
        count or len(marks),
        marks,
        workers.records.by_process(),
        workers.records.by_process("ends"),
        completed_at,
        meter,
        cpu_seconds,
        peak_rss_mb,
        workers.warnings,
        problems,
    )


def is_empty(database: Database) -> bool:
    """Tell whether nothing is pending or processing."""
    return not one_row(database.conn, "SELECT EXISTS (SELECT FROM batchq.batches_live)")[0]


def drain_part(database: Database, total: int, count: int, seconds: float) -> Drained:
    """Drain *count* of a backlog of *total*, for so many seconds at most; verify what ran."""
    with records.directory() as directory, Workers(database.dsn, 1, directory) as workers:
        meter, cpu_before = Meter(database).start(), workers.cpu_seconds()
        workers.go()
        workers.wait_for(lambda: workers.records.count() > 0, 0.001)
        until = time.monotonic() + seconds
        workers.wait_for(lambda: time.monotonic() >= until or workers.records.count() >= count)
        drained = finished(database, workers, 0, time.monotonic(), meter.stop(), cpu_before)
        drained.problems += records.problems_of_part(database.conn, drained.marks, total)
    return drained
