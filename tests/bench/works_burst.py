"""A burst of batches and then a calm, while a snapshot is held: what dead rows and a misled planner do to the queue."""

import bisect
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from tests.bench import records
from tests.bench.draining import rate_between
from tests.bench.records import Marks
from tests.bench.server import Server
from tests.bench.work import Bench, Figures, Run, work
from tests.bench.worker_process import Workers
from tests.bench.works_snapshot import (
    Call,
    SteadyProducer,
    holding,
    nothing,
    problems_at_the_end,
    remains,
    seen,
    watch,
)

NAPTIME = "5s"
ENOUGH = 0.95
CLEARED_SECONDS = 0.5


@work
def burst(bench: Bench) -> Iterator[Run]:
    """5,000 batches a second for 60 s, then 800 a second for 120 s; a snapshot is held throughout, or not (control).

    One worker process. Autovacuum looks every 5 s, so that it analyzes while the table is nearly empty and its indexes
    are full of dead entries. Told are, of each 5 s: the lowest rate of the burst, and of the calm once what the burst
    left is worked (no more waits than comes in half a second), which takes "cleared s". "short spans" are those in
    which less than 95 % of what came was worked. Pick-up is the time from when the enqueue has returned (committed) to
    the start.
    """
    for _ in bench.times("burst"):
        for is_held in (False, True):
            with naptime(bench.server):
                yield one_burst(bench, is_held)


@contextmanager
def naptime(server: Server) -> Iterator[None]:
    """Have autovacuum look often."""
    with psycopg.connect(server.admin_dsn, autocommit=True) as admin:
        admin.execute(f"ALTER SYSTEM SET autovacuum_naptime = '{NAPTIME}'".encode())
        admin.execute("SELECT pg_reload_conf()")
        try:
            yield
        finally:
            admin.execute("ALTER SYSTEM RESET autovacuum_naptime")
            admin.execute("SELECT pg_reload_conf()")


def one_burst(bench: Bench, is_held: bool) -> Run:
    """Run the burst and the calm; verify all that was produced."""
    seconds, calm_rate = bench.sizes.seconds, bench.sizes.seconds("burst.calm_per_s")
    with bench.database() as database, records.directory() as directory:
        database.settle()
        with Workers(database.dsn, 1, directory) as workers:
            workers.go()
            with holding(database) if is_held else nothing():
                began_at = time.monotonic()
                with SteadyProducer(database.dsn, workers.records, seconds("burst.per_s"), 0) as first:
                    watch(workers, seconds("burst.seconds"))
                    produced = first.stop()
                calm_at = time.monotonic()
                with SteadyProducer(database.dsn, workers.records, calm_rate, produced) as second:
                    watch(workers, seconds("burst.calm_seconds"))
                    ended_at = time.monotonic()
                    figures = remains(database)
                    produced = second.stop()
            problems = problems_at_the_end(database, workers, produced)
        marks = workers.records.all()
    span = seconds("burst.span_seconds")
    worked = spans(marks, began_at, calm_at, span)
    figures = {
        "burst_asked_per_s": round(seconds("burst.per_s")),
        "burst_per_s": round(rate_between(marks, began_at, calm_at)),
        "burst_lowest_per_s": min(worked, default=None),
        **calm_figures(marks, first.calls + second.calls, (calm_at, ended_at), calm_rate, span),
        **figures,
    }
    series = {"per_s": [(number * span, rate) for number, rate in enumerate(spans(marks, began_at, ended_at, span))]}
    return Run("burst", "held" if is_held else "control", figures, problems, series)


def spans(marks: Marks, since: float, until: float, span: float) -> list[int]:
    """Return the rate of each whole span."""
    count = int((until - since) / span)
    return [round(rate_between(marks, since + n * span, since + (n + 1) * span)) for n in range(count)]


def calm_figures(marks: Marks, calls: list[Call], calm: tuple[float, float], rate: float, span: float) -> Figures:
    """Return what was seen of the calm, from when what the burst left was worked."""
    calm_at, ended_at = calm
    cleared_at = when_cleared(marks, calls, calm, CLEARED_SECONDS * rate)
    figures: Figures = {"calm_asked_per_s": round(rate), "cleared_s": None}
    worked = spans(marks, cleared_at, ended_at, span) if cleared_at is not None else []
    if cleared_at is None or not worked:
        return figures | {"short_spans": int((ended_at - calm_at) / span)}
    figures["cleared_s"] = round(cleared_at - calm_at, 1)
    figures["calm_lowest_per_s"] = min(worked)
    figures["short_spans"] = sum(each < ENOUGH * rate for each in worked)
    calm_seen = seen(marks, calls, cleared_at, ended_at)
    return figures | {name: calm_seen[name] for name in ("backlog", "p50_ms", "p99_ms")}


def when_cleared(marks: Marks, calls: list[Call], calm: tuple[float, float], few: float) -> float | None:
    """Return from when on no more than *few* are enqueued and not started; None if it does not come to that."""
    starts = [at for _, at in marks]
    for call in calls:
        if calm[0] <= call.at <= calm[1] and call.end - bisect.bisect_right(starts, call.at) <= few:
            return call.at
    return None
