"""Charts as numbers for inline SVG: the templates draw them without scripts or styles."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from batchq.web.formats import duration

_MINUTES = 60
_HEIGHT, _SLOT = 96, 10  # of the bars, in units of their SVG
_LINE_WIDTH, _LINE_HEIGHT = 120, 24
_PARTS, _LEAST_TREND_SECONDS = 24, 3600  # of a trend


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


class Range(NamedTuple):
    """A range of time that charts show, in minutes: how long it is, how far apart its points are, and its labels."""

    name: str
    title: str
    minutes: int
    step: int
    label_minutes: int
    label_format: str

    @property
    def each(self) -> str:
        """What one point stands for."""
        return {1: "each minute", 15: "each 15 minutes", 120: "each 2 hours"}[self.step]


RANGES = {
    each.name: each
    for each in (
        Range("1h", "1 hour", 60, 1, 10, "%H:%M"),
        Range("24h", "24 hours", 1440, 15, 240, "%H:%M"),
        Range("7d", "7 days", 10_080, 120, 1440, "%-d %b"),
    )
}
RATES, PERCENTILES = ("completed", "failed", "retried"), ("p50", "p95", "p99")
_DECADES = (1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0, 60.0, 600.0, 3600.0, 36_000.0, 86_400.0, 864_000.0)


class Point(NamedTuple):
    """What ended in one step of time. *at*: its begin, in seconds since 1970; *rates*: per minute, in the order of
    RATES; *run* and *wait*: seconds, in the order of PERCENTILES, None without an attempt."""

    at: int
    rates: list[float]
    run: list[float | None]
    wait: list[float | None]

    @property
    def time(self) -> datetime:
        """Its begin."""
        return datetime.fromtimestamp(self.at, UTC)


class Tick(NamedTuple):
    """A label of an axis. *place*: in percent, from the left or from the top; *anchor*: as SVG has it."""

    place: float
    text: str
    anchor: str = "start"


class Line(NamedTuple):
    """A line of a chart: its *path* in a square of 100 units, empty without numbers."""

    name: str
    path: str


class Area(NamedTuple):
    """What one point of a chart says when it is pointed at, with its place and width in percent."""

    x: float
    width: float
    text: str


class Chart(NamedTuple):
    """A chart with axes. *summary*: the same in a sentence, for those who do not see it."""

    name: str
    title: str
    note: str
    lines: list[Line]
    ticks: list[Tick]
    areas: list[Area]
    summary: str

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not any(line.path for line in self.lines)


class Span(NamedTuple):
    """The time that a chart shows, in seconds since 1970: from *since* to *until*."""

    since: int
    until: int

    def place(self, at: float) -> float:
        """Return where a time is, in percent from the left."""
        return round(100 * (at - self.since) / (self.until - self.since), 2)


def points(rows: Iterable[Mapping[str, Any]], span: Span, shown: Range) -> list[Point]:
    """Return a point for each step of the span, from the rows of the statement `chart`. The last step may be short."""
    by_time = {row["at"]: row for row in rows if row["at"] is not None}
    found = []
    for at in range(span.since, span.until, 60 * shown.step):
        row = by_time.get(at, {})
        minutes = min(60 * shown.step, span.until - at) / 60
        none: list[float | None] = [None] * 3
        rates = [row.get(name, 0) / minutes for name in RATES]
        found.append(Point(at, rates, row.get("run") or none, row.get("wait") or none))
    return found


def rate_chart(found: Sequence[Point], span: Span, shown: Range) -> Chart:
    """Return the chart of what ended per minute."""
    most = max((sum(point.rates) for point in found), default=0.0)
    top = axis_end(max(max(point.rates) for point in found)) if most else 1.0
    lines = [
        Line(name, _path(span, shown, found, [_linear(point.rates[number], top) for point in found]) if most else "")
        for number, name in enumerate(RATES)
    ]
    ticks = [Tick(_linear(top * part / 4, top), rate_text(top * part / 4)) for part in range(5)]
    highest = [max((point.rates[number] for point in found), default=0.0) for number in range(len(RATES))]
    said = ", ".join(f"{rate_text(rate)} {name}" for rate, name in zip(highest, RATES, strict=True))
    return Chart(
        "rate", "Rate", "batches per minute", lines, ticks, _areas(found, span, shown, _rates_text),
        f"Most per minute: {said}",
    )  # fmt: skip


def time_chart(name: str, title: str, found: Sequence[Point], span: Span, shown: Range) -> Chart:
    """Return the chart of the percentiles of run times or waits: *name* is run or wait. Its axis is logarithmic."""
    times = [getattr(point, name) for point in found]
    known = [seconds for each in times for seconds in each if seconds is not None]
    bottom, top = time_ends(known)
    heights = [[None if s is None else _logarithmic(s, bottom, top) for s in each] for each in times]
    lines = [
        Line(percentile, _path(span, shown, found, [each[n] for each in heights]))
        for n, percentile in enumerate(PERCENTILES)
    ]
    ticks = [Tick(_logarithmic(each, bottom, top), duration(each)) for each in _DECADES if bottom <= each <= top]
    highest = [max((each[n] for each in times if each[n] is not None), default=None) for n in range(len(PERCENTILES))]
    said = ", ".join(f"{p} {duration(seconds)}" for p, seconds in zip(PERCENTILES, highest, strict=True))
    texts = _areas(found, span, shown, lambda point: _times_text(getattr(point, name)))
    return Chart(name, title, "logarithmic scale", lines, ticks, texts, f"Highest: {said}")


def time_labels(span: Span, shown: Range) -> list[Tick]:
    """Return the labels of the time axis: round times in UTC. Those at the edges stay inside."""
    step = 60 * shown.label_minutes
    found = []
    for at in range(-(-span.since // step) * step, span.until + 1, step):
        place = span.place(at)
        anchor = "start" if place < 5 else "end" if place > 95 else "middle"
        found.append(Tick(place, datetime.fromtimestamp(at, UTC).strftime(shown.label_format), anchor))
    return found


def axis_end(most: float) -> float:
    """Return the first of 1, 2, 4, 8, 10, 20, 40 ... or of 0.1, 0.2 ... that is at least *most*: its quarters are short
    numbers."""
    power = 10.0 ** math.floor(math.log10(most)) if most > 0 else 1.0
    return next(round(step * power, 6) for step in (1, 2, 4, 8, 10) if step * power >= most * (1 - 1e-9))


def time_ends(seconds: Sequence[float]) -> tuple[float, float]:
    """Return the ends of an axis for these times: 1 ms to 1 s if there are none."""
    if not seconds:
        return 1e-3, 1.0
    below = [each for each in _DECADES if each <= min(seconds)]
    above = [each for each in _DECADES if each >= max(seconds)]
    bottom, top = below[-1] if below else min(*seconds, _DECADES[0]) / 2, above[0] if above else max(seconds)
    return (bottom, top) if bottom < top else (bottom, bottom * 10)


def _linear(value: float, top: float) -> float:
    return round(100 - 100 * value / top, 2)


def _logarithmic(seconds: float, bottom: float, top: float) -> float:
    share = math.log(max(seconds, bottom) / bottom) / math.log(top / bottom)
    return round(100 - 100 * share, 2)


def _path(span: Span, shown: Range, found: Sequence[Point], heights: Sequence[float | None]) -> str:
    """Return the path of a line through the middles of the steps; it is broken where a height is not known."""
    parts, is_open = [], False
    for point, height in zip(found, heights, strict=True):
        if height is not None:
            x = span.place(min(point.at + 30 * shown.step, span.until))
            parts.append(f"{'L' if is_open else 'M'}{x:g} {height:g}" + ("" if is_open else "h0"))
        is_open = height is not None
    return "".join(parts)


def _areas(found: Sequence[Point], span: Span, shown: Range, text: Callable[[Point], str]) -> list[Area]:
    width = span.place(span.since + 60 * shown.step)
    day = "%H:%M" if shown.minutes <= 60 else "%-d %b %H:%M"
    return [Area(span.place(point.at), width, f"{point.time.strftime(day)} UTC: {text(point)}") for point in found]


def _rates_text(point: Point) -> str:
    said = ", ".join(f"{rate_text(rate)} {name}" for rate, name in zip(point.rates, RATES, strict=True))
    return f"{said} per minute"


def _times_text(times: Sequence[float | None]) -> str:
    if times[0] is None:
        return "none"
    return ", ".join(f"{name} {duration(seconds)}" for name, seconds in zip(PERCENTILES, times, strict=True))


def rate_text(value: float) -> str:
    """Return a rate as people read it: without decimals from 10 on, and without those that are zero."""
    digits = 0 if value >= 10 else 1 if value >= 1 else 2
    text = f"{value:,.{digits}f}"
    if digits:
        text = text.rstrip("0").rstrip(".")
    return text


class Trend(NamedTuple):
    """Bars of a small drawing: left, top and height of each that is not empty. *most*: the count of the highest.
    *each_seconds*: what one stands for; *seconds*: what all stand for."""

    bars: list[tuple[int, float, float]]
    most: int
    each_seconds: float
    seconds: float


def trend(times: Sequence[float], since: float, until: float) -> Trend:
    """Return how many of the *times* are in each of 24 equal parts of a span of time, which is an hour at least."""
    since = min(since, until - _LEAST_TREND_SECONDS)
    each = (until - since) / _PARTS
    counts = [0] * _PARTS
    for at in times:
        counts[min(max(int((at - since) / each), 0), _PARTS - 1)] += 1
    most = max(counts)
    heights = [max(2.0, (_LINE_HEIGHT - 2) * count / most) if count else 0.0 for count in counts]
    drawn = [(5 * part, round(_LINE_HEIGHT - 1 - high, 1), round(high, 1)) for part, high in enumerate(heights) if high]
    return Trend(drawn, most, each, until - since)
