"""When schedules run in the next 24 hours: as marks on a line, and as one list of all."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from heapq import nsmallest
from typing import Any, NamedTuple

from batchq.common.cron import ScheduleError, ticks
from batchq.operate.schedules import upcoming
from batchq.web.reads import Row

SLOT = timedelta(minutes=10)
SLOTS = 144  # of a day
_HOURS = 6  # between the hours that are written below a line


class Line(NamedTuple):
    """A line of 24 hours. marks: position and width in slots of ten minutes, of 144. hours: position and text. runs: in
    words."""

    marks: list[tuple[int, int]]
    hours: list[tuple[int, str]]
    text: str


class Run(NamedTuple):
    """A run that a schedule will make."""

    schedule: Row
    at: datetime
    in_seconds: float


def line_of(row: Row) -> Line:
    """Return the line of a row of the statement "schedules"; without marks if the schedule makes no batches."""
    begin = _slot_of(row["now"].astimezone(UTC))
    first = upcoming(row, 1)
    slots = _slots(row["cron"], row["time_zone"], first[0], begin) if first else ()
    return Line(_joined(slots), _hours(begin), _text(len(slots)))


def next_runs(rows: Sequence[Row], most: int, each: int = 1) -> list[Run]:
    """Return the next runs of these schedules together, the earliest first. each: most of one schedule."""
    found = (Run(row, at, (at - row["now"]).total_seconds()) for row in rows for at in upcoming(row, each))
    return nsmallest(most, found, key=lambda run: (run.at, run.schedule["name"]))


def _slot_of(at: datetime) -> datetime:
    return at.replace(minute=at.minute // 10 * 10, second=0, microsecond=0)


@lru_cache(maxsize=1000)
def _slots(cron: str, time_zone: str, first: datetime, begin: datetime) -> tuple[int, ...]:
    """Return in which slots after *begin* there is a tick; *first*: the next one."""
    found: list[int] = []
    end = begin + SLOTS * SLOT
    try:
        for at in _one_per_slot(cron, time_zone, first):
            if at >= end:
                break
            found.append(max(0, (at - begin) // SLOT))
    except ScheduleError:  # this machine does not know the time zone
        pass
    return tuple(dict.fromkeys(found))


def _one_per_slot(cron: str, time_zone: str, first: datetime) -> Iterator[datetime]:
    """Yield the first tick of each slot that has any. A cron expression is not asked for each second of a day."""
    at = first
    is_period = cron.lstrip().lower().startswith("@every")
    later = ticks(cron, time_zone, first)
    while True:
        yield at
        slot = _slot_of(at)
        if not is_period:
            later = ticks(cron, time_zone, slot + SLOT - timedelta(microseconds=1))
        at = next(one for one in later if one >= slot + SLOT)


def _joined(slots: Sequence[int]) -> list[tuple[int, int]]:
    """Return neighbours as one mark."""
    marks: list[tuple[int, int]] = []
    for slot in slots:
        if marks and sum(marks[-1]) == slot:
            marks[-1] = (marks[-1][0], marks[-1][1] + 1)
        else:
            marks.append((slot, 1))
    return marks


def _hours(begin: datetime) -> list[tuple[int, str]]:
    """Return where to write which hours below a line."""
    first = begin.replace(minute=0)
    hours: list[tuple[int, Any]] = [
        ((at - begin) // SLOT, at) for n in range(1, 25) if (at := first + timedelta(hours=n))
    ]
    return [(position, f"{at:%H}:00") for position, at in hours if at.hour % _HOURS == 0 and 0 <= position < SLOTS]


def _text(count: int) -> str:
    if not count:
        return "no run in the next 24 hours"
    return f"runs in {count} of the {SLOTS} periods of ten minutes of the next 24 hours"
