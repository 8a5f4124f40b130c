"""A snapshot that stays open for long at a load that can be carried; and a producer that keeps to such a load."""

import bisect
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import psycopg

from batchq import enqueue_many
from tests.instruments.bench import filling, records
from tests.instruments.bench.draining import rate_between
from tests.instruments.bench.records import Marks, Records
from tests.instruments.bench.work import Bench, Figures, Run, work
from tests.instruments.bench.worker_process import Workers
from tests.instruments.bench.works_snapshot import Producer, nothing, problems_at_the_end, remains, watch
from tests.support.databases import holding_snapshot

TICK_SECONDS = 0.05
BACKLOG_EVERY_SECONDS = 0.5


@work
def steady(bench: Bench) -> Iterator[Run]:
    """A snapshot is held for 10 min at 80 % of the sustainable load: rate, backlog and pickup time.

    Two databases of one server are used concurrently, each with one worker. A snapshot is held in one of them. First
    both are kept full for 20 s, to measure what they sustain beside each other. Then each gets 80 % of the mean of
    that, with one enqueue call every 50 ms. The figures are those of the last 60 s with the snapshot: batches started
    per second; batches enqueued and not started, at the median; and the time from when the enqueue returned
    (committed) to the start.
    """
    for _ in bench.times("steady"):
        meeting = Meeting()
        with ThreadPoolExecutor() as threads:
            yield from threads.map(one_steady, (bench, bench), (meeting, meeting), (False, True))


class Meeting:
    """Where the two meet, to go on together at one rate."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2)
        self.carried: list[float] = []

    def mean(self, carried: float) -> float:
        """Wait for the other; return the mean of what both carry. Raises BrokenBarrierError if the other has failed."""
        self.carried.append(carried)
        self.barrier.wait()
        return statistics.mean(self.carried)


def one_steady(bench: Bench, meeting: Meeting, is_held: bool) -> Run:
    """Run one of the two; verify all that was produced."""
    try:
        return steadily(bench, meeting, is_held)
    except BaseException:
        meeting.barrier.abort()
        raise


def steadily(bench: Bench, meeting: Meeting, is_held: bool) -> Run:
    """Find the rate, work at it free and then held, and verify."""
    seconds, window = bench.sizes.seconds, bench.sizes.seconds("steady.window_seconds")
    with bench.database() as database, records.directory() as directory:
        database.settle()
        with Workers(database.dsn, 1, directory) as workers:
            workers.go()
            with Producer(database.dsn, workers.records, bench.sizes.number("snapshot.backlog")) as full:
                watch(workers, seconds("steady.full_seconds"))
                first = full.stop()
            carried = rate_between(workers.records.all(), time.monotonic() - window, time.monotonic())
            rate = seconds("steady.share") * meeting.mean(carried)
            with SteadyProducer(database.dsn, workers.records, rate, first) as producer:
                watch(workers, seconds("steady.free_seconds"))
                held_at = time.monotonic()
                with holding_snapshot(database.dsn) if is_held else nothing():
                    watch(workers, seconds("steady.held_seconds"))
                    ended_at = time.monotonic()
                    figures = remains(database)
                produced = producer.stop()
            problems = problems_at_the_end(database, workers, produced)
        marks = workers.records.all()
    first_figures = seen(marks, producer.calls, held_at, held_at + window)
    last = seen(marks, producer.calls, ended_at - window, ended_at)
    figures = {"asked_per_s": round(rate), **last, "first_p50_ms": first_figures["p50_ms"], **figures}
    return Run("steady", "held" if is_held else "control", figures, problems)


class Call(NamedTuple):
    """A call that has enqueued the batches from number *first* to before *end*, and when it had returned."""

    first: int
    end: int
    at: float


class SteadyProducer(Producer):
    """A thread that enqueues so many a second, by the clock, numbered from *first*."""

    def __init__(self, dsn: str, seen: Records, rate: float, first: int) -> None:
        super().__init__(dsn, seen, 0)
        self.rate, self.first, self.produced = rate, first, first
        self.calls: list[Call] = []

    def run(self) -> None:
        """Enqueue what is due until stopped."""
        try:
            with psycopg.connect(self.dsn, autocommit=True, prepare_threshold=None) as conn:
                began_at = time.monotonic()
                while not self.stopping.wait(TICK_SECONDS):
                    end = self.first + int((time.monotonic() - began_at) * self.rate)
                    enqueue_many(conn, "noop", map(filling.payload, range(self.produced, end)))
                    self.calls.append(Call(self.produced, end, time.monotonic()))
                    self.produced = end
        except BaseException as error:
            self.error = error


def seen(marks: Marks, calls: list[Call], since: float, until: float) -> Figures:
    """Return what was seen in a span of time: rate, backlog, and the waits of what was enqueued in it."""
    its = [call for call in calls if since <= call.at <= until]
    started = {number: at for number, at in marks if its[0].first <= number < its[-1].end}
    waits = sorted(1000 * max(0.0, started[number] - call.at) for call in its for number in range(call.first, call.end))
    return {
        "started_per_s": round(rate_between(marks, since, until)),
        "backlog": round(statistics.median(backlogs(marks, calls, since, until))),
        "p50_ms": round(waits[len(waits) // 2], 2),
        "p99_ms": round(waits[int(len(waits) * 0.99)], 2),
    }


def backlogs(marks: Marks, calls: list[Call], since: float, until: float) -> list[int]:
    """Return how many batches were enqueued and not started, each half second."""
    starts, returns = [at for _, at in marks], [call.at for call in calls]
    times = [since + number * BACKLOG_EVERY_SECONDS for number in range(int((until - since) / BACKLOG_EVERY_SECONDS))]
    enqueued = [calls[max(0, bisect.bisect_right(returns, at) - 1)].end for at in times]
    return [max(0, end - bisect.bisect_right(starts, at)) for end, at in zip(enqueued, times, strict=True)]
