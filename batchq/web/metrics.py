"""Metrics of the queues, for the page's /metrics. Needs the extra "metrics"."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client.core import GaugeMetricFamily, Metric

from batchq.common.exposition import MOST_PAIRS, OTHER

STATES = ("ready", "scheduled", "processing")


def queue_metrics(queues: Iterable[Mapping[str, Any]], workers: int) -> Iterator[Metric]:
    """Yield what stands in batchq.queues (one row each) and how many *workers* live. Beyond 200 rows: sums as other."""
    depth = GaugeMetricFamily(
        "batchq_queue_depth", "Live batches; beyond a bound an estimate.", labels=("queue", "kind", "state")
    )
    gauges = {
        "stalled": gauge("batchq_stalled", "Batches whose worker gave no sign of life for a whole lease."),
        "failed": gauge("batchq_failed", "Failed batches that are kept; at least so many."),
        "oldest_wait_seconds": gauge("batchq_oldest_wait_seconds", "How long the oldest ready batch has waited."),
        "workers": gauge("batchq_serving_workers", "Live workers that serve the queue and know the kind."),
    }
    for row in bounded_rows(queues):
        labels = (row["queue"], row["kind"])
        for state in STATES:
            depth.add_metric((*labels, state), row[state])
        for name, family in gauges.items():
            family.add_metric(labels, row[name] or 0)
    yield from (depth, *gauges.values())
    yield GaugeMetricFamily("batchq_workers", "Live workers.", value=workers)


def gauge(name: str, text: str) -> GaugeMetricFamily:
    """Return a gauge for each queue and kind."""
    return GaugeMetricFamily(name, text, labels=("queue", "kind"))


def bounded_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the first 200 rows as they are, and one for all others: sums, and the longest wait."""
    shown = [dict(row) for row in rows]
    rest = shown[MOST_PAIRS:]
    if not rest:
        return shown
    other: dict[str, Any] = {"queue": OTHER[0], "kind": OTHER[1]}
    other |= {name: sum(row[name] for row in rest) for name in (*STATES, "stalled", "failed")}
    other |= {name: max(row[name] or 0 for row in rest) for name in ("oldest_wait_seconds", "workers")}
    return [*shown[:MOST_PAIRS], other]
