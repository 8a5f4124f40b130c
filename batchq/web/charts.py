"""Charts as numbers for inline SVG: the templates draw them, with no script and no style of their own."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

MINUTES = 60
WIDTH, HEIGHT, SLOT = 600, 96, 10  # of the bars, in the units of their SVG
LINE_WIDTH, LINE_HEIGHT = 120, 24
STEPS = (1, 2, 5)


class Bar(NamedTuple):
    """One minute: where it stands, how high its parts are, and what they say."""

    x: int
    completed_y: float
    completed_height: float
    failed_y: float
    failed_height: float
    label: str


class Bars(NamedTuple):
    """Batches a minute, over the last hour; *top*: what the upper edge means."""

    bars: list[Bar]
    top: int
    completed: int
    failed: int
    items: int
    mean_seconds: float | None


def bars(rows: Iterable[Mapping[str, Any]]) -> Bars:
    """Return the bars of the last hour from rows of a minute, queue and kind each."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0] * MINUTES)
    for row in rows:
        place = MINUTES - 1 - row["minutes_ago"]
        if 0 <= place < MINUTES:
            for name in ("completed", "failed", "items", "runs", "run_seconds"):
                sums[name][place] += row[name]
    completed, failed = sums["completed"], sums["failed"]
    top = nice(max(a + b for a, b in zip(completed, failed, strict=True)))
    runs = sum(sums["runs"])
    return Bars(
        [bar(place, int(completed[place]), int(failed[place]), top) for place in range(MINUTES)],
        top,
        int(sum(completed)),
        int(sum(failed)),
        int(sum(sums["items"])),
        sum(sums["run_seconds"]) / runs if runs else None,
    )


def bar(place: int, completed: int, failed: int, top: int) -> Bar:
    """Return the bar of one minute; a part that is there is at least a pixel high."""
    high, low = (max(1.0, HEIGHT * part / top) if part else 0.0 for part in (completed, failed))
    ago = MINUTES - 1 - place
    when = "this minute" if ago == 0 else f"{ago} min ago"
    label = f"{when}: {completed:,} completed, {failed:,} failed"
    y = HEIGHT - high
    return Bar(place * SLOT + 1, round(y, 1), round(high, 1), round(max(0.0, y - low), 1), round(low, 1), label)


def nice(most: float) -> int:
    """Return the round number from *most* up that an axis ends with: 1, 2, 5, 10, 20, 50 ..."""
    power = 1
    while True:
        for step in STEPS:
            if step * power >= most:
                return step * power
        power *= 10


def sparks(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], str]:
    """Return the points of a line for each queue and kind: what ended in each minute of the last hour."""
    minutes: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0] * MINUTES)
    for row in rows:
        if 0 <= row["minutes_ago"] < MINUTES:
            minutes[row["queue"], row["kind"]][MINUTES - 1 - row["minutes_ago"]] += row["completed"] + row["failed"]
    return {key: points(counts) for key, counts in minutes.items()}


def points(counts: list[int]) -> str:
    """Return the points of a line, as SVG takes them."""
    top = max(*counts, 1)
    step = LINE_WIDTH / (len(counts) - 1)
    return " ".join(
        f"{place * step:.0f},{LINE_HEIGHT - 1 - count * (LINE_HEIGHT - 3) / top:.1f}"
        for place, count in enumerate(counts)
    )
