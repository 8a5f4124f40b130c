"""Steering while work goes on: a retry of very many failed batches, in bulk."""

import threading
import time
from collections.abc import Iterator
from typing import Self

import psycopg

from batchq.operate.bulk import PAUSE_FACTOR, Bulk, Runner
from batchq.postgres.link import Link
from tests.instruments.bench import filling, records
from tests.instruments.bench.records import Records
from tests.instruments.bench.server import Database
from tests.instruments.bench.work import Bench, Figures, Run, work
from tests.instruments.bench.worker_process import Workers
from tests.instruments.bench.works_snapshot import Producer, watch

TIMEOUT_SECONDS = 60.0
FAILED = """
INSERT INTO batchq.batches_finished (kind, status, payload, attempt, claimed_at, finished_at, errors)
SELECT 'broken', 'failed', jsonb_build_object('seq', n, 'pad', repeat('x', 50)), 1, now(),
  now() - n * interval '1 millisecond', '[{"attempt": 1, "error": "ValueError: no"}]'
FROM generate_series(%s::bigint, %s::bigint) n
"""


@work
def bulk(bench: Bench) -> Iterator[Run]:
    """One worker runs a steady stream of batches; then many failed batches of another kind are retried in bulk.

    The figures are the worker's rate before and during the bulk, how long the longest chunk held its locks, and how
    many batches were retried per second. No worker has a handler for the retried kind, so that the worker runs the
    same batches before and during the bulk.
    """
    for _ in bench.times("bulk"):
        for is_fast in (False, True):
            yield one_run(bench, is_fast)


def one_run(bench: Bench, is_fast: bool) -> Run:
    """Measure one retry."""
    count, free_seconds = bench.sizes.number("bulk.batches"), bench.sizes.seconds("bulk.free_seconds")
    with bench.database() as database, records.directory() as directory:
        for first in range(1, count + 1, filling.CHUNK):
            database.conn.execute(FAILED, [first, min(first + filling.CHUNK - 1, count)])
        database.settle()
        producer = Producer(database.dsn, Records(directory), bench.sizes.number("bulk.backlog"))
        with Workers(database.dsn, 1, directory) as workers, producer:
            workers.go()
            workers.wait_for(lambda: workers.records.count() > 0)
            watch(workers, free_seconds)
            free = rate(workers, free_seconds / 2)
            with Retrying(database, is_fast) as retrying:
                workers.wait_for(retrying.is_done, 0.1)
            figures = retrying.figures(workers, free)
            produced = producer.stop()
            workers.wait_for(lambda: workers.records.count() >= produced)
            problems = workers.stop()
        problems += records.problems_of_starts(Records(directory).all(), range(produced))
        problems += retrying.problems(database.conn, count)
    return Run("bulk", "without pauses" if is_fast else "with pauses", figures, problems)


def rate(workers: Workers, seconds: float) -> float:
    """Return how many batches a second have started in the last seconds."""
    since = time.monotonic() - seconds
    return sum(at >= since for _, at in workers.records.all()) / seconds


class Retrying:
    """A thread that retries all that failed."""

    def __init__(self, database: Database, is_fast: bool) -> None:
        self.link = Link(database.dsn, TIMEOUT_SECONDS)
        self.bulk = Bulk("retry", {"kind": "broken"}, {}, "bench", "bench", state="changing")
        self.runner = Runner(self.link, self.bulk, 0 if is_fast else PAUSE_FACTOR)
        self.thread = threading.Thread(target=self.run, name="retrying")
        self.error: BaseException | None = None
        self.seconds = 0.0

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.runner.stopping.set()
        self.thread.join()
        self.link.close()
        if self.error:
            raise self.error

    def run(self) -> None:
        """Retry to the end."""
        began_at = time.monotonic()
        try:
            for _ in self.runner.changes():
                pass
        except BaseException as error:
            self.error = error
        self.seconds = time.monotonic() - began_at

    def is_done(self) -> bool:
        """Tell whether it has ended."""
        return not self.thread.is_alive()

    def figures(self, workers: Workers, free: float) -> Figures:
        """Return what it has done, and what became of the workers' rate meanwhile."""
        during = rate(workers, self.seconds)
        return {
            "free_per_s": round(free),
            "during_per_s": round(during),
            "during_to_free": round(during / free, 3) if free else None,
            "retried_per_s": round(self.bulk.changed / self.seconds),
            "longest_chunk_ms": round(1000 * self.runner.longest_seconds, 1),
        }

    def problems(self, conn: psycopg.Connection, count: int) -> list[str]:
        """Return what is not as it must be: every batch is pending, once."""
        found = conn.execute(
            "SELECT count(*), count(DISTINCT id) FROM batchq.all_batches WHERE kind = 'broken' AND status = 'pending'"
        ).fetchone()
        return [] if found == (count, count) else [f"{found} of {count} batches are pending after the retry"]
