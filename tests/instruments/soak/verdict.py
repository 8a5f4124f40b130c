"""The verdict: what was seen, against its bounds. The first part of the run, the warm-up, does not count."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tests.instruments.soak.load import KINDS, LARGE_BYTES
from tests.instruments.soak.sampling import MIB, Sample

MOST_RSS_SLOPE = 1.0
MOST_DRIFT_PERCENT = 2.0
MOST_GROWTH, SPARE_MB, SPARE_TUPLES, SPARE_MS = 1.15, 1.0, 500, 20.0
MOST_FILES, MOST_CONNECTIONS = 1.0, 1.0
HOUR_SECONDS = 3600.0
# Autovacuum looks at a database once a minute. A look that comes too early, or when it is busy elsewhere, leaves what a
# minute's large payloads leave dead in TOAST (chunks of some 2,000 bytes) until the next one.
ROUND_SECONDS, CHUNK_BYTES = 60.0, 1996
LARGE_SHARE = KINDS["large"].weight / sum(kind.weight for kind in KINDS.values())


@dataclass(frozen=True)
class Finding:
    """One thing that was judged: *value* must be at most *bound*."""

    name: str
    value: float
    bound: float
    unit: str

    @property
    def is_good(self) -> bool:
        """Whether it holds."""
        return self.value <= self.bound

    def as_json(self) -> dict[str, Any]:
        """Return it for a JSON line."""
        return asdict(self) | {"ok": self.is_good}

    def __str__(self) -> str:
        mark = "ok     " if self.is_good else "TOO MUCH"
        return f"{mark:8} {self.name}: {self.value:,.2f} {self.unit} (at most {self.bound:,.2f})"


def judge(samples: Sequence[Sample], warm_up_seconds: float, most_rss_slope: float = MOST_RSS_SLOPE) -> list[Finding]:
    """Judge what came after the warm-up. Raises ValueError if that is too little."""
    seen = [sample for sample in samples if sample.at >= warm_up_seconds]
    if len(seen) < 6:
        raise ValueError(f"only {len(seen)} samples after the warm-up of {warm_up_seconds:g} s: soak for longer")
    findings = []
    for number in range(len(seen[0].workers)):
        findings += judge_worker(seen, number, most_rss_slope)
    return findings + judge_database(seen) + judge_work(seen)


def judge_worker(seen: Sequence[Sample], number: int, most_rss_slope: float) -> list[Finding]:
    """Judge one worker's memory, threads and open files."""
    name = f"worker {number + 1}"
    slope = slope_per_hour([(sample.at, sample.workers[number]["rss_mb"]) for sample in seen])
    threads = change_of_median(seen, lambda sample: sample.workers[number]["threads"])
    files = change_of_median(seen, lambda sample: sample.workers[number]["files"])
    return [
        Finding(f"{name}: slope of its resident memory", slope, most_rss_slope, "MiB/h"),
        Finding(f"{name}: more threads in the last third than in the first", threads, 0, "threads"),
        Finding(f"{name}: more open files in the last third than in the first", files, MOST_FILES, "files"),
    ]


def judge_database(seen: Sequence[Sample]) -> list[Finding]:
    """Judge connections, dead tuples and sizes: the most of the last third against the most of the first."""
    connections = change_of_median(seen, lambda sample: sample.connections)
    late = rate(seen) * LARGE_SHARE * ROUND_SECONDS * LARGE_BYTES  # bytes of one round of autovacuum
    findings = [
        Finding("more connections in the last third", connections, MOST_CONNECTIONS * len(seen[0].workers), ""),
        bounded(seen, "dead tuples of the live table", lambda sample: sample.dead_tuples, SPARE_TUPLES, ""),
        bounded(seen, "dead tuples of its TOAST", lambda sample: sample.dead_toast_tuples,
                SPARE_TUPLES + late / CHUNK_BYTES, ""),
    ]  # fmt: skip
    for name in seen[0].sizes_mb:
        spare_mb = SPARE_MB + (late / MIB if name == "toast" else 0)
        findings.append(
            bounded(seen, f"size of {name}", lambda sample, name=name: sample.sizes_mb[name], spare_mb, "MiB")
        )
    return findings


def judge_work(seen: Sequence[Sample]) -> list[Finding]:
    """Judge rate, backlog and waits."""
    first, last = rate(first_third(seen)), rate(last_third(seen))
    drift = 100 * abs(last - first) / first if first else float("inf")
    waits = [median_of(part, lambda sample: sample.pickup_p50_ms) for part in (first_third(seen), last_third(seen))]
    return [
        Finding("drift of the rate from the first third to the last", drift, MOST_DRIFT_PERCENT, "%"),
        Finding("median wait of a ready batch in the last third", waits[1], MOST_GROWTH * waits[0] + SPARE_MS, "ms"),
        bounded(seen, "batches pending or processing", lambda sample: sample.live, SPARE_TUPLES, ""),
    ]


Look = Callable[[Sample], float | None]


def bounded(seen: Sequence[Sample], name: str, look: Look, spare: float, unit: str) -> Finding:
    """Judge that the most in the last third is hardly more than the most in the first."""
    most = [max(look(sample) or 0.0 for sample in part) for part in (first_third(seen), last_third(seen))]
    return Finding(f"most {name} in the last third", most[1], MOST_GROWTH * most[0] + spare, unit)


def change_of_median(seen: Sequence[Sample], look: Look) -> float:
    """Return by how much the median of the last third is above that of the first."""
    return median_of(last_third(seen), look) - median_of(first_third(seen), look)


def median_of(part: Sequence[Sample], look: Look) -> float:
    """Return the median of what is there."""
    return statistics.median([value for sample in part if (value := look(sample)) is not None] or [0.0])


def rate(part: Sequence[Sample]) -> float:
    """Return how many batches a second were finished."""
    return (part[-1].finished - part[0].finished) / (part[-1].at - part[0].at)


def slope_per_hour(points: Sequence[tuple[float, float]]) -> float:
    """Return the slope of the line of least squares through points of (seconds, value), an hour."""
    return statistics.linear_regression(*zip(*points, strict=True)).slope * HOUR_SECONDS


def first_third(seen: Sequence[Sample]) -> Sequence[Sample]:
    """Return the first third."""
    return seen[: max(2, len(seen) // 3)]


def last_third(seen: Sequence[Sample]) -> Sequence[Sample]:
    """Return the last third."""
    return seen[-max(2, len(seen) // 3) :]
