"""A worker's metrics for Prometheus, by its conventions. Needs the extra "metrics".

A worker counts for `batchq.throughput` anyway, once per group of batches. The metrics keep the sums of that; everything
else is read when somebody scrapes.
"""

import time
from collections.abc import Iterator, Mapping, Sequence

import psycopg
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from batchq.common.exposition import MOST_PAIRS, OTHER, exposition
from batchq.errors import ConfigError
from batchq.postgres.link import Link
from batchq.postgres.server_checks import read_only_problem
from batchq.settings import Settings
from batchq.worker.claimer import Claimer
from batchq.worker.keeper import HEARTBEAT_SECONDS, Keeper
from batchq.worker.lanes import Lane
from batchq.worker.metrics_server import MetricsServer
from batchq.worker.throughput import BOUNDS, ENDS, Counts, Throughput

_READY_SECONDS = 3.0
UNWRITTEN_SECONDS = 3 * HEARTBEAT_SECONDS
_EVERY_FOURTH = slice(0, None, 4)  # of the limits that are counted: from 15 us, in steps of 4
_Pair = tuple[str, str]


def worker_metrics(
    sums: Mapping[_Pair, Counts], slots: Mapping[str, tuple[int, int]], probe_seconds: float = 0.0
) -> Iterator[Metric]:
    """Yield a worker's metrics.

    *sums*: what it has counted since its start, by queue and kind. *slots*: how many it has and how many are busy, by
    style of handler. *probe_seconds*: the server's time for one probe for ready batches.
    """
    finished = CounterMetricFamily(
        "batchq_batches_finished", "Attempts that have ended, by outcome.", labels=("queue", "kind", "status")
    )
    items = CounterMetricFamily("batchq_items", "Items processed, including failed ones.", labels=("queue", "kind"))
    seconds = HistogramMetricFamily("batchq_batch_run_seconds", "Run time of attempts.", labels=("queue", "kind"))
    for (queue, kind), counts in first_pairs(sums).items():
        for end in ENDS:
            finished.add_metric((queue, kind, end), counts.ends.get(end, 0))
        items.add_metric((queue, kind), counts.items)
        seconds.add_metric((queue, kind), buckets(counts.run_times), counts.run_seconds)
    yield from (finished, items, seconds)
    for name, index, text in (
        ("batchq_worker_slots", 0, "Batches that this worker can run concurrently."),
        ("batchq_worker_slots_busy", 1, "Batches that this worker runs now."),
    ):
        gauge = GaugeMetricFamily(name, text, labels=("style",))
        for style, numbers in slots.items():
            gauge.add_metric((style,), numbers[index])
        yield gauge
    yield GaugeMetricFamily(
        "batchq_probe_seconds",
        "Time that the server needs to find the next ready batch; above 0.02, dead rows are in the way.",
        value=probe_seconds,
    )


def first_pairs(sums: Mapping[_Pair, Counts]) -> dict[_Pair, Counts]:
    """Return the sums of the first 200 pairs, and the total of all others under OTHER."""
    shown: dict[_Pair, Counts] = {}
    for pair, counts in sums.items():
        if len(shown) < MOST_PAIRS:
            shown[pair] = counts
        else:
            shown.setdefault(OTHER, Counts()).add(counts)
    return shown


def buckets(run_times: list[int]) -> list[tuple[str, float]]:
    """Return the buckets of a histogram: each upper limit, and how many run times do not exceed it."""
    below: list[int] = []
    for count in run_times:
        below.append(count + (below[-1] if below else 0))
    chosen = [(repr(bound), float(count)) for bound, count in zip(BOUNDS, below[:-1], strict=True)][_EVERY_FOURTH]
    return [*chosen, ("+Inf", float(below[-1]))]


def serve_worker(
    settings: Settings, throughput: Throughput, lanes: Mapping[str, Sequence[Lane]], claimer: Claimer, keeper: Keeper
) -> MetricsServer:
    """Serve a worker's metrics, whether it polls, and whether its database accepts writes. Raises ConfigError."""
    throughput.sums = {}
    silent_seconds = 30 + 2 * settings.database_timeout_seconds

    def metrics() -> bytes:
        slots = {
            style: (sum(lane.concurrency for lane in alike), sum(map(_busy_slots, alike)))
            for style, alike in lanes.items()
        }
        with throughput.lock:
            return exposition(lambda: worker_metrics(throughput.sums or {}, slots, claimer.probe_seconds()))

    def polls() -> str:
        seconds = time.monotonic() - claimer.polled_at
        return f"no poll has finished for {seconds:.0f} s" if seconds > silent_seconds else ""

    def writes() -> str:
        seconds = time.monotonic() - keeper.beat_at
        if seconds > UNWRITTEN_SECONDS:
            return f"no heartbeat was written for {seconds:.0f} s"
        return _database_problem(settings)

    try:
        checks = {"/healthz": polls, "/readyz": writes}
        server = MetricsServer(settings.metrics_host, settings.metrics_port, metrics, checks, settings.metrics_hosts)
    except OSError as error:
        raise ConfigError(f"BATCHQ_METRICS_PORT {settings.metrics_port}: {error.strerror}") from None
    server.start()
    return server


def _busy_slots(lane: Lane) -> int:
    return sum(batch.begun_at is not None for batch in lane.list_in_flight())


def _database_problem(settings: Settings) -> str:
    """Return why the database does not answer or accept writes, "" if it does; on a connection of its own."""
    link = Link(settings.require_dsn(), _READY_SECONDS)
    try:
        with link.reading() as conn:
            problem = read_only_problem(conn)
    except psycopg.Error:
        return "the database does not answer"
    finally:
        link.close()
    return problem[0] if problem else ""
