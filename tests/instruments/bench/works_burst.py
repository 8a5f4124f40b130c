"""A burst while a snapshot stays open, and the calm after it: whether the dead rows of the one weigh on the other."""

import time
from collections.abc import Iterator
from typing import Any

from tests.instruments.bench import records
from tests.instruments.bench.draining import rate_between
from tests.instruments.bench.records import Marks
from tests.instruments.bench.server import Database
from tests.instruments.bench.work import Bench, Figures, Run, work
from tests.instruments.bench.worker_process import Workers
from tests.instruments.bench.works_snapshot import nothing, problems_at_the_end, remains, watch
from tests.instruments.bench.works_steady import (
    BACKLOG_EVERY_SECONDS,
    TICK_SECONDS,
    Call,
    SteadyProducer,
    backlogs,
    seen,
)
from tests.support.databases import holding_snapshot

NAPTIME = "5s"
LEAST_SHARE = 0.95
GONE_CALLS = 2


@work
def burst(bench: Bench) -> Iterator[Run]:
    """A burst of 5,000 batches per second for 60 s, then 800 per second for 120 s, all while a snapshot is held.

    One worker uses one database: first without a snapshot (control), then with one that is taken before the burst.
    Autovacuum runs every 5 s. The figures of the burst: batches enqueued and started per second, overall and in the
    slowest 5 s; how many waited at its end; and how long it then took until fewer waited than two calls enqueue
    (*backlog gone*). The calm phase is measured from then on, or from the end of the burst if that never came:
    batches started per second, overall and in the slowest 5 s; the number of 5 s spans below 95 % of 800; the median
    backlog; and the time from when the enqueue returned (committed) to the start.
    """
    with bench.server.setting("autovacuum_naptime", NAPTIME):
        for _ in bench.times("burst"):
            for is_held in (False, True):
                yield one_burst(bench, is_held)


def one_burst(bench: Bench, is_held: bool) -> Run:
    """Run burst and calm; verify all that was produced."""
    with bench.database() as database, records.directory() as directory:
        database.settle()
        with Workers(database.dsn, 1, directory) as workers:
            with holding_snapshot(database.dsn) if is_held else nothing():
                workers.go()
                began_at = time.monotonic()
                first = producing(bench, database, workers, "burst.per_s", "burst.seconds", 0)
                calm_at = time.monotonic()
                second = producing(bench, database, workers, "burst.calm_per_s", "burst.calm_seconds", first.produced)
                ended_at = time.monotonic()
                left = remains(database)
            problems = problems_at_the_end(database, workers, second.produced)
        marks = workers.records.all()
    span, rate = bench.sizes.seconds("burst.span_seconds"), bench.sizes.number("burst.calm_per_s")
    told = in_the_burst(marks, first.produced, began_at, calm_at, span)
    told |= in_the_calm(marks, first.calls + second.calls, calm_at, ended_at, span, rate)
    points = [(number * span, per_s) for number, per_s in enumerate(rates_of_spans(marks, began_at, ended_at, span))]
    series: dict[str, list[Any]] = {"per_s": points, "burst_until": [round(calm_at - began_at, 1)]}
    return Run("burst", "held" if is_held else "control", told | left, problems, series)


def producing(
    bench: Bench, database: Database, workers: Workers, rate: str, seconds: str, first: int
) -> SteadyProducer:
    """Enqueue at a rate for a time, both by the names of their sizes; return who has done it."""
    with SteadyProducer(database.dsn, workers.records, bench.sizes.number(rate), first) as producer:
        watch(workers, bench.sizes.seconds(seconds))
        producer.stop()
    return producer


def in_the_burst(marks: Marks, produced: int, began_at: float, ended_at: float, span: float) -> Figures:
    """Return what was seen while the burst lasted."""
    return {
        "enqueued_per_s": round(produced / (ended_at - began_at)),
        "burst_per_s": round(rate_between(marks, began_at, ended_at)),
        "burst_least_per_s": min(rates_of_spans(marks, began_at, ended_at, span), default=None),
        "burst_backlog": produced - sum(at <= ended_at for _, at in marks),
    }


def in_the_calm(marks: Marks, calls: list[Call], calm_at: float, ended_at: float, span: float, per_s: int) -> Figures:
    """Return what was seen from when the burst's backlog was gone."""
    few = GONE_CALLS * TICK_SECONDS * per_s
    looks = enumerate(backlogs(marks, calls, calm_at, ended_at - span))
    gone = next((number * BACKLOG_EVERY_SECONDS for number, waiting in looks if waiting <= few), None)
    since = calm_at + (gone or 0.0)
    rates = rates_of_spans(marks, since, ended_at, span)
    return {
        "backlog_gone_s": round(ended_at - calm_at, 1) if gone is None else gone,
        "calm_least_per_s": min(rates, default=None),
        "spans": len(rates),
        "spans_below": sum(rate < LEAST_SHARE * per_s for rate in rates),
        **seen(marks, calls, since, ended_at),
    }


def rates_of_spans(marks: Marks, since: float, until: float, span: float) -> list[int]:
    """Return how many a second started in each whole span of a time."""
    begins = [since + number * span for number in range(int((until - since) / span))]
    return [round(rate_between(marks, begin, begin + span)) for begin in begins]
