"""Metrics of the queues, for /metrics of the web UI. Needs the extra "metrics"."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client.core import GaugeMetricFamily, Metric

from batchq.common.exposition import MOST_PAIRS, OTHER

STATES = ("ready", "scheduled", "processing")


def queue_metrics(queues: Iterable[Mapping[str, Any]], workers: int) -> Iterator[Metric]:
    """Yield the metrics of rows of batchq.queues, and of the number of live *workers*."""
    depth = GaugeMetricFamily(
        "batchq_queue_depth", "Live batches; large counts are estimates.", labels=("queue", "kind", "state")
    )
    gauges = {
        "stalled": _gauge("batchq_stalled", "Processing batches whose lease has expired."),
        "failed": _gauge("batchq_failed", "Failed batches that are retained; large counts are lower bounds."),
        "oldest_wait_seconds": _gauge("batchq_oldest_wait_seconds", "How long the oldest ready batch has waited."),
        "workers": _gauge("batchq_serving_workers", "Live workers that serve the queue and handle the kind."),
    }
    for row in bounded_rows(queues):
        labels = (row["queue"], row["kind"])
        for state in STATES:
            depth.add_metric((*labels, state), row[state])
        for name, family in gauges.items():
            family.add_metric(labels, row[name] or 0)
    yield from (depth, *gauges.values())
    yield GaugeMetricFamily("batchq_workers", "Live workers.", value=workers)


def _gauge(name: str, text: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, labels=("queue", "kind"))


def bounded_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the first 200 rows unchanged, and one for all others: sums; of waits and workers, the highest."""
    found = [dict(row) for row in rows]
    rest = found[MOST_PAIRS:]
    if not rest:
        return found
    other: dict[str, Any] = {"queue": OTHER[0], "kind": OTHER[1]}
    other |= {name: sum(row[name] for row in rest) for name in (*STATES, "stalled", "failed")}
    other |= {name: max(row[name] or 0 for row in rest) for name in ("oldest_wait_seconds", "workers")}
    return [*found[:MOST_PAIRS], other]
