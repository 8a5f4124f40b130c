"""Metrics of the queues, for /metrics of the web UI. Needs the extra "metrics"."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from batchq.common.exposition import MOST_PAIRS, OTHER
from batchq.web.reads import Reader

STATES = ("ready", "scheduled", "waiting", "processing")
_SUMS = (*STATES, "stalled", "failed", "held_back", "waiting_for_failed")
_MOST_SCRAPED = 5000
_IN_USE = {
    "max_running": "running",
    "per_second": "starts_per_second_shared",
    "items_per_second": "items_per_second_shared",
}


def metrics_of(reader: Reader) -> list[Metric]:
    """Read a database, and return its metrics. Raises what `Reader.read` raises."""
    stuck = {(row["queue"], row["kind"]): row["batches"] for row in reader.read("waiting_for_failed")}
    queues = [
        row | {"waiting_for_failed": stuck.get((row["queue"], row["kind"]), 0)}
        for row in reader.read("queues", limit=_MOST_SCRAPED)
    ]
    workers = reader.read("workers", limit=_MOST_SCRAPED)
    limits = reader.read("limits", limit=_MOST_SCRAPED)
    schedules = reader.read("schedules", limit=_MOST_SCRAPED)
    return list(queue_metrics(queues, sum(row["state"] != "gone" for row in workers), limits, schedules))


def metrics_of_several(found: Mapping[str, list[Metric] | Exception]) -> Iterator[Metric]:
    """Yield the metrics of several databases, each with the label `database`, and which of them are up.

    found: for each, its metrics, or why there are none.
    """
    up = GaugeMetricFamily("batchq_database_up", "1 if the database answered, 0 if it is away.", labels=("database",))
    families: dict[str, Metric] = {}
    for name, metrics in found.items():
        up.add_metric((name,), 0 if isinstance(metrics, Exception) else 1)
        for metric in [] if isinstance(metrics, Exception) else metrics:
            family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
            family.samples += [one._replace(labels={"database": name, **one.labels}) for one in metric.samples]
    yield from (up, *families.values())


def queue_metrics(
    queues: Iterable[Mapping[str, Any]],
    workers: int,
    limits: Iterable[Mapping[str, Any]],
    schedules: Iterable[Mapping[str, Any]] = (),
) -> Iterator[Metric]:
    """Yield the metrics of rows of batchq.queues, of the number of live *workers*, of rows of limits_in_use, and of
    rows of schedule_status."""
    depth = GaugeMetricFamily(
        "batchq_queue_depth", "Live batches; large counts are estimates.", labels=("queue", "kind", "state")
    )
    gauges = {
        "stalled": _gauge("batchq_stalled", "Processing batches whose lease has expired."),
        "failed": _gauge("batchq_failed", "Failed batches that are retained; large counts are lower bounds."),
        "waiting_for_failed": _gauge(
            "batchq_waiting_for_failed",
            "Waiting batches that need one that failed, was cancelled or is not stored; of the first 1,000.",
        ),
        "oldest_wait_seconds": _gauge("batchq_oldest_wait_seconds", "How long the oldest ready batch has waited."),
        "workers": _gauge("batchq_serving_workers", "Live workers that serve the queue and handle the kind."),
    }
    held_back = GaugeMetricFamily(
        "batchq_held_back", "Ready batches that a limit or a throttle holds back.", labels=("queue", "kind", "by")
    )
    for row in bounded_rows(queues):
        labels = (row["queue"], row["kind"])
        for state in STATES:
            depth.add_metric((*labels, state), row[state])
        for name, family in gauges.items():
            family.add_metric(labels, row[name] or 0)
        for limit in _names(row):
            held_back.add_metric((*labels, limit), row["held_back"])
    yield from (depth, *gauges.values(), held_back, *_limit_metrics(limits), *_schedule_metrics(schedules))
    yield GaugeMetricFamily("batchq_workers", "Live workers.", value=workers)


def _limit_metrics(limits: Iterable[Mapping[str, Any]]) -> Iterator[Metric]:
    # Limits beyond the first 200 are left out: unlike batches, they cannot be added up.
    labels = ("queue", "kind", "limit")
    number = GaugeMetricFamily("batchq_limit", "Limits in force; kind is empty for a whole queue.", labels=labels)
    in_use = GaugeMetricFamily(
        "batchq_limit_in_use", "What workers use of the limits, or hold of a rate.", labels=labels
    )
    for row in list(limits)[:MOST_PAIRS]:
        for limit, used in _IN_USE.items():
            if row[limit] is not None:
                number.add_metric((row["queue"], row["kind"] or "", limit), row[limit])
                in_use.add_metric((row["queue"], row["kind"] or "", limit), row[used])
    yield from (number, in_use)


def _schedule_metrics(schedules: Iterable[Mapping[str, Any]]) -> Iterator[Metric]:
    # Schedules beyond the first 200 are left out.
    labels = ("schedule",)
    late = GaugeMetricFamily("batchq_schedule_late_seconds", "Time from the latest tick to its batch.", labels=labels)
    overdue = GaugeMetricFamily("batchq_schedule_overdue_seconds", "How long the next tick is overdue.", labels=labels)
    failing = GaugeMetricFamily(
        "batchq_schedule_failing",
        "1 if it has an error, or if its latest batch failed or was cancelled.",
        labels=labels,
    )
    ticks = CounterMetricFamily(
        "batchq_schedule_ticks", "Ticks, by what became of them.", labels=("schedule", "outcome")
    )
    for row in list(schedules)[:MOST_PAIRS]:
        name = row["name"]
        late.add_metric((name,), row["last_late_seconds"] or 0)
        is_due = row["state"] in ("active", "overdue")
        overdue.add_metric((name,), max(0, row["overdue_seconds"] or 0) if is_due else 0)
        failing.add_metric((name,), float(bool(row["error"]) or row["last_status"] in ("failed", "cancelled")))
        for outcome, column in (("batch", "batches_made"), ("missed", "ticks_missed"), ("overlap", "ticks_overlapped")):
            ticks.add_metric((name, outcome), row[column])
    yield from (late, overdue, failing, ticks)


def _names(row: Mapping[str, Any]) -> list[str]:
    return row["held_back_by"].split(", ") if row["held_back_by"] else []


def _gauge(name: str, text: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, labels=("queue", "kind"))


def bounded_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the first 200 rows unchanged, and one for all others: sums; of waits and workers, the highest."""
    found = [dict(row) for row in rows]
    rest = found[MOST_PAIRS:]
    if not rest:
        return found
    other: dict[str, Any] = {"queue": OTHER[0], "kind": OTHER[1]}
    other |= {name: sum(row[name] for row in rest) for name in _SUMS}
    other |= {name: max(row[name] or 0 for row in rest) for name in ("oldest_wait_seconds", "workers")}
    other["held_back_by"] = ", ".join(sorted({name for row in rest for name in _names(row)}))
    return [*found[:MOST_PAIRS], other]
