"""The goals that this benchmark can judge by itself. Those relative to other queues come from another harness."""

from collections.abc import Callable
from dataclasses import dataclass

from tests.instruments.bench.work import Medians

Measure = Callable[[Medians], float | None]


@dataclass(frozen=True)
class Goal:
    """A goal: *measure* gives the figure, None if its works were not run; *is_at_least* else at most *bound*."""

    work: str
    text: str
    measure: Measure
    bound: float
    is_at_least: bool = False

    def is_met(self, medians: Medians) -> bool | None:
        """Tell whether the goal is met, None if that was not measured."""
        value = self.measure(medians)
        if value is None:
            return None
        return value >= self.bound if self.is_at_least else value <= self.bound


# -------------------------------------------------------------------------------------------------- measures


def values(medians: Medians, work: str, figure: str, having: str = "") -> list[float]:
    """Return a figure of every variant of a work whose name has *having* in it."""
    found = (figures.get(figure) for (name, variant), figures in medians.items() if name == work and having in variant)
    return [value for value in found if value is not None]


def most(work: str, figure: str, having: str = "") -> Measure:
    """Return the largest of a work's variants."""
    return lambda medians: max(values(medians, work, figure, having), default=None)


def least(work: str, figure: str, having: str = "") -> Measure:
    """Return the smallest of a work's variants."""
    return lambda medians: min(values(medians, work, figure, having), default=None)


def exact(work: str, figure: str, variant: str) -> Measure:
    """Return a figure of one variant."""
    return lambda medians: medians.get((work, variant), {}).get(figure)


def ratio(upper: Measure, lower: Measure) -> Measure:
    """Return one measure through another."""

    def divide(medians: Medians) -> float | None:
        above, below = upper(medians), lower(medians)
        return above / below if above is not None and below else None

    return divide


def most_of_drains(work: str, figure: str, is_kept: bool, having: str = "") -> Measure:
    """Return the largest of the variants that keep completed batches, or of those that do not."""

    def largest(medians: Medians) -> float | None:
        its = {key: figures for key, figures in medians.items() if kept(key[1]) == is_kept}
        return max(values(its, work, figure, having), default=None)

    return largest


def kept(variant: str) -> bool:
    """Tell whether a variant keeps completed batches."""
    return "not kept" not in variant


def backlog_ratio(size: int, base: int) -> Measure:
    """Return the rate from a backlog through that from another."""
    rate = "executed_per_s"
    return ratio(exact("backlog", rate, f"{size:,} waiting"), exact("backlog", rate, f"{base:,} waiting"))


def held_ratio(figure: str) -> Measure:
    """Return a figure at a steady load with a snapshot held through that without."""
    return ratio(exact("steady", figure, "held"), exact("steady", figure, "control"))


def history_ratio(medians: Medians) -> float | None:
    """Return the slowest rate beside a history through that without one."""
    rate = "executed_per_s"
    beside = [
        figures.get(rate)
        for (work, name), figures in medians.items()
        if work == "history" and not name.startswith(("0 ", "broken"))
    ]
    none = medians.get(("history", "0 finished"), {}).get(rate)
    return min(value for value in beside if value is not None) / none if beside and none else None


CPU, WAL = "server_cpu_s_per_10k", "wal_bytes_per_batch"
DRAINED, HELD = "executed_per_s", "last_held_per_s"

GOALS = (
    Goal(
        "drain",
        "two processes drain at 80 % of the ceiling with two clients, or more",
        ratio(exact("drain", DRAINED, "2 processes"), most_of_drains("ceiling", "per_s", True, "2 clients")),
        0.80,
        True,
    ),
    Goal("drain", "server CPU, s per 10,000", most_of_drains("drain", CPU, True), 0.40),
    Goal("drain", "WAL, bytes per batch", most_of_drains("drain", WAL, True), 1100),
    Goal("drain", "server CPU, s per 10,000, completed not kept", most_of_drains("drain", CPU, False), 0.30),
    Goal("drain", "WAL, bytes per batch, completed not kept", most_of_drains("drain", WAL, False), 750),
    Goal("pickup", "p50, ms, with any number of workers", most("pickup", "p50_ms"), 12),
    Goal("pickup", "p99, ms, with any number of workers", most("pickup", "p99_ms"), 30),
    Goal("pickup", "Postgres while workers idle, % of a core", most("pickup", "idle_server_cpu_percent"), 3),
    Goal("backlog", "1,000,000 waiting, to 100,000", backlog_ratio(1_000_000, 100_000), 0.95, True),
    Goal("backlog", "10,000,000 waiting, to 100,000", backlog_ratio(10_000_000, 100_000), 0.95, True),
    Goal("history", "beside millions of finished batches, to none", history_ratio, 0.95, True),
    Goal(
        "snapshot",
        "last 10 s held, to the control's last 10 s",
        ratio(exact("snapshot", HELD, "held"), exact("snapshot", HELD, "control")),
        0.95,
        True,
    ),
    Goal("snapshot", "last 10 s held, to its own free rate", exact("snapshot", "last_to_free", "held"), 0.90, True),
    *(
        Goal(
            "steady",
            f"a snapshot held for 10 min at 80 % load: {text}, to the control's",
            held_ratio(figure),
            bound,
            least,
        )
        for text, figure, bound, least in (
            ("rate", "started_per_s", 0.95, True),
            ("backlog", "backlog", 1.05, False),
            ("pick-up, p50", "p50_ms", 1.05, False),
        )
    ),
    Goal(
        "burst",
        "spans of 5 s below 95 % of 800 per second, after a burst, with a snapshot held",
        exact("burst", "spans_below", "held"),
        0,
    ),
    Goal("burst", "p99, ms, after a burst, a snapshot held", exact("burst", "p99_ms", "held"), 100),
    Goal(
        "network",
        "a round trip of 20 ms, to none",
        ratio(exact("network", DRAINED, "20 ms"), exact("network", DRAINED, "0 ms")),
        0.80,
        True,
    ),
    Goal(
        "items", "items a second, one process, 1,000 a batch", exact("items", "items_per_s", "1,000 a batch"), 3e5, True
    ),
    Goal("memory", "resident memory, MiB, at most", most("memory", "max_rss_mb"), 60),
    Goal("memory", "growth over half of the run, MiB (flat)", most("memory", "growth_mb"), 1),
)
