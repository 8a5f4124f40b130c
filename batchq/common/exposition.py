"""Prometheus' text format. Needs the extra "metrics"."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MOST_PAIRS = 200  # of queue and kind with labels of their own; the others are "other"
OTHER = ("other", "other")


def exposition(collect: Callable[[], Iterable[Metric]]) -> bytes:
    """Return metrics in Prometheus' text format."""

    class _Once(Collector):
        def collect(self) -> Iterable[Metric]:
            return collect()

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Once())
    return generate_latest(registry)
