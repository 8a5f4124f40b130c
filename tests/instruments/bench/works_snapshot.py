"""What a transaction that stays open elsewhere does to the queue: dead rows that no vacuum may remove."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Self

import psycopg

from batchq import enqueue_many
from tests.instruments.bench import filling, records
from tests.instruments.bench.draining import is_empty, rate_between
from tests.instruments.bench.records import Marks, Records, one_row
from tests.instruments.bench.server import Database
from tests.instruments.bench.work import Bench, Figures, Run, work
from tests.instruments.bench.worker_process import Workers
from tests.support.databases import holding_snapshot

SERIES_SECONDS = 5.0
TOP_UP_SECONDS = 0.02


@work
def snapshot(bench: Bench) -> Iterator[Run]:
    """W6: the rate of one process in a closed loop (a producer keeps 4,000 batches waiting) while a snapshot is held.

    For 15 s there is no snapshot. Then another session keeps a REPEATABLE READ transaction open for 60 s, or nothing
    happens (control). The figures are the rates of the last ten seconds without it, and of the first and the last ten
    seconds with it. The producer is a thread of the benchmark. With snapshot.at_once=1 both run concurrently, in two
    databases of the server. Other load on the machine then affects both alike, and a snapshot delays the vacuum of
    only its own database.
    """
    for _ in bench.times("snapshot"):
        if bench.sizes.number("snapshot.at_once"):
            with ThreadPoolExecutor() as threads:
                yield from threads.map(one_snapshot, (bench, bench), (False, True))
        else:
            for is_held in (False, True):
                yield one_snapshot(bench, is_held)


def one_snapshot(bench: Bench, is_held: bool) -> Run:
    """Run the loop, free and then held; verify all that was produced."""
    free, held = bench.sizes.seconds("snapshot.free_seconds"), bench.sizes.seconds("snapshot.held_seconds")
    with bench.database() as database, records.directory() as directory:
        database.settle()
        producer = Producer(database.dsn, Records(directory), bench.sizes.number("snapshot.backlog"))
        with Workers(database.dsn, 1, directory) as workers, producer:
            workers.go()
            workers.wait_for(lambda: workers.records.count() > 0)
            began_at = time.monotonic()
            watch(workers, free)
            held_at = time.monotonic()
            with holding_snapshot(database.dsn) if is_held else nothing():
                watch(workers, held)
                ended_at = time.monotonic()
                figures = remains(database)
            produced = producer.stop()
            problems = problems_at_the_end(database, workers, produced)
        marks = workers.records.all()
    figures = rates(marks, held_at, ended_at, bench.sizes.seconds("snapshot.window_seconds")) | figures
    return Run(
        "snapshot", "held" if is_held else "control", figures, problems, series(marks, began_at, held_at, ended_at)
    )


def watch(workers: Workers, seconds: float) -> None:
    """Let so many seconds pass, as long as the workers live."""
    until = time.monotonic() + seconds
    workers.wait_for(lambda: time.monotonic() >= until, 0.1)


def problems_at_the_end(database: Database, workers: Workers, produced: int) -> list[str]:
    """Have all that was produced finished, end the workers, and verify it."""
    workers.wait_for(lambda: workers.records.count() >= produced)
    workers.wait_for(lambda: is_empty(database))
    problems = workers.stop()
    problems += records.problems_of_starts(workers.records.all(), range(produced))
    return problems + records.problems_of_rows(database.conn, produced)


def nothing() -> AbstractContextManager[None]:
    """Hold nothing."""
    return nullcontext()


def rates(marks: Marks, held_at: float, ended_at: float, window: float) -> Figures:
    """Return the rates of the windows, and the last one's share of the free one."""
    free = rate_between(marks, held_at - window, held_at)
    last = rate_between(marks, ended_at - window, ended_at)
    return {
        "last_free_per_s": round(free),
        "first_held_per_s": round(rate_between(marks, held_at, held_at + window)),
        "last_held_per_s": round(last),
        "last_to_free": round(last / free, 3) if free else None,
    }


def series(marks: Marks, began_at: float, held_at: float, ended_at: float) -> dict[str, list]:
    """Return the rate of each five seconds, and when the free time ended."""
    points = []
    for number in range(int((ended_at - began_at) / SERIES_SECONDS)):
        at = began_at + number * SERIES_SECONDS
        points.append((number * SERIES_SECONDS, round(rate_between(marks, at, at + SERIES_SECONDS))))
    return {"per_s": points, "held_at": [round(held_at - began_at, 1)]}


def remains(database: Database) -> Figures:
    """Return the dead rows of the live partition, as the statistics tell, and its size with its indexes."""
    dead, size = one_row(
        database.conn,
        "SELECT n_dead_tup, pg_total_relation_size(relid) FROM pg_stat_user_tables WHERE relname = 'batches_live'",
    )
    return {"dead_rows": dead, "live_table_mb": round(size / 1e6, 1)}


class Producer:
    """A thread that keeps *backlog* batches waiting. It counts by the records, and asks the database nothing."""

    def __init__(self, dsn: str, seen: Records, backlog: int) -> None:
        self.dsn, self.records, self.backlog = dsn, seen, backlog
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.run, name="producer")
        self.produced = 0
        self.error: BaseException | None = None

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.thread.join()

    def stop(self) -> int:
        """End it; return how many it has produced."""
        self.stopping.set()
        self.thread.join()
        if self.error:
            raise self.error
        return self.produced

    def run(self) -> None:
        """Top up until stopped."""
        try:
            with psycopg.connect(self.dsn, autocommit=True, prepare_threshold=None) as conn:
                while not self.stopping.is_set():
                    self.top_up(conn)
                    self.stopping.wait(TOP_UP_SECONDS)
        except BaseException as error:
            self.error = error

    def top_up(self, conn: psycopg.Connection) -> None:
        """Enqueue what is missing, if that is worth a call."""
        missing = self.backlog - (self.produced - self.records.count())
        if missing >= self.backlog // 10:
            enqueue_many(conn, "noop", map(filling.payload, range(self.produced, self.produced + missing)))
            self.produced += missing
