"""Charts as numbers for inline SVG: the templates draw them without scripts or styles."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

_MINUTES = 60
_HEIGHT, _SLOT = 96, 10  # of the bars, in units of their SVG
_LINE_WIDTH, _LINE_HEIGHT = 120, 24


class Bar(NamedTuple):
    """One minute: the geometry of its two parts, and its tooltip."""

    x: int
    completed_y: float
    completed_height: float
    failed_y: float
    failed_height: float
    label: str


class Bars(NamedTuple):
    """Batches per minute over the last hour; *top*: the count at the upper edge."""

    bars: list[Bar]
    top: int
    completed: int
    failed: int
    items: int
    mean_seconds: float | None


def bars(rows: Iterable[Mapping[str, Any]]) -> Bars:
    """Return the bars of the last hour, from rows per minute, queue and kind."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0] * _MINUTES)
    for row in rows:
        slot = _MINUTES - 1 - row["minutes_ago"]
        if 0 <= slot < _MINUTES:
            for name in ("completed", "failed", "items", "runs", "run_seconds"):
                sums[name][slot] += row[name]
    completed, failed = sums["completed"], sums["failed"]
    top = _axis_end(max(a + b for a, b in zip(completed, failed, strict=True)))
    runs = sum(sums["runs"])
    return Bars(
        [_bar(slot, int(completed[slot]), int(failed[slot]), top) for slot in range(_MINUTES)],
        top,
        int(sum(completed)),
        int(sum(failed)),
        int(sum(sums["items"])),
        sum(sums["run_seconds"]) / runs if runs else None,
    )


def _bar(slot: int, completed: int, failed: int, top: int) -> Bar:
    """Return the bar of one minute; a part that is not zero is at least a pixel high."""
    high, low = (max(1.0, _HEIGHT * part / top) if part else 0.0 for part in (completed, failed))
    ago = _MINUTES - 1 - slot
    when = "this minute" if ago == 0 else f"{ago} min ago"
    label = f"{when}: {completed:,} completed, {failed:,} failed"
    y = _HEIGHT - high
    return Bar(slot * _SLOT + 1, round(y, 1), round(high, 1), round(max(0.0, y - low), 1), round(low, 1), label)


def _axis_end(most: float) -> int:
    """Return the first of 1, 2, 5, 10, 20, 50 ... that is at least *most*."""
    power = 1
    while True:
        for step in (1, 2, 5):
            if step * power >= most:
                return step * power
        power *= 10


def sparks(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], str]:
    """Return the points of a line per queue and kind: what completed or failed in each minute of the last hour."""
    minutes: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0] * _MINUTES)
    for row in rows:
        if 0 <= row["minutes_ago"] < _MINUTES:
            minutes[row["queue"], row["kind"]][_MINUTES - 1 - row["minutes_ago"]] += row["completed"] + row["failed"]
    return {key: _points(counts) for key, counts in minutes.items()}


def _points(counts: list[int]) -> str:
    top = max(*counts, 1)
    step = _LINE_WIDTH / (len(counts) - 1)
    return " ".join(
        f"{slot * step:.0f},{_LINE_HEIGHT - 1 - count * (_LINE_HEIGHT - 3) / top:.1f}"
        for slot, count in enumerate(counts)
    )
