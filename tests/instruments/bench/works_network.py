"""Distance and poolers: a drain through a line that delays, and through PgBouncer."""

import statistics
import time
from collections.abc import Iterator

import psycopg

from tests.instruments.bench import filling
from tests.instruments.bench.draining import drain_all
from tests.instruments.bench.proxy import DelayingProxy
from tests.instruments.bench.work import Bench, Figures, Run, work
from tests.support.poolers import PgBouncer
from tests.support.servers import Server

PINGS = 50
POOL: dict[str, object] = {
    "default_pool_size": 20,
    "min_pool_size": 0,
    "server_round_robin": 0,
    "max_client_conn": 500,
    "query_wait_timeout": 60,
}


@work
def network(bench: Bench) -> Iterator[Run]:
    """One process drains over a connection that delays each byte by half a round trip both ways, at full bandwidth.

    Round trips of 0 (also through the proxy), 1, 5 and 20 ms; the measured time of a SELECT 1 is reported.
    """
    count = bench.sizes.number("network.batches")
    for _ in bench.times("network"):
        for round_trip_ms in bench.sizes.numbers("network.round_trips_ms"):
            with bench.database() as database, DelayingProxy(database.dsn, round_trip_ms / 2000) as proxy:
                filling.fill(database, count)
                measured = ping_ms(proxy.dsn)
                drained = drain_all(database, count, dsn=proxy.dsn)
            figures: Figures = {"measured_round_trip_ms": measured, **drained.figures()}
            yield Run("network", f"{round_trip_ms} ms", figures, drained.problems)


def ping_ms(dsn: str) -> float:
    """Return what a SELECT 1 takes, the median."""
    with psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as conn:
        times = []
        for _ in range(PINGS):
            began_at = time.monotonic()
            conn.execute("SELECT 1")
            times.append(time.monotonic() - began_at)
    return round(1000 * statistics.median(times), 2)


@work
def pooler(bench: Bench) -> Iterator[Run]:
    """One process drains directly, and through PgBouncer in transaction mode on the same machine."""
    count = bench.sizes.number("pooler.batches")
    for _ in bench.times("pooler"):
        for is_pooled in (False, True):
            with bench.database() as database:
                filling.fill(database, count)
                if is_pooled:
                    with PgBouncer(Server(bench.server.admin_dsn, "dsn"), **POOL) as bouncer:
                        drained = drain_all(database, count, dsn=bouncer.dsn(database.name))
                else:
                    drained = drain_all(database, count)
            yield Run("pooler", "PgBouncer" if is_pooled else "direct", drained.figures(), drained.problems)
