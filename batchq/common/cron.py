"""When a schedule is due: cron expressions by cronsim, ``@every``, time zones; and an expression in words."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from functools import lru_cache
from itertools import islice
from typing import Any
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

ALIASES = {
    "@hourly": "0 * * * *", "@daily": "0 0 * * *", "@weekly": "0 0 * * 0", "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
}  # fmt: skip
MISSED = ("coalesce", "skip", "catch_up")
OVERLAPS = ("allow", "skip")
MOST_CATCH_UP = 1000
_MOST_BYTES = {"name": 200, "kind": 200, "queue": 128}
_FIELDS = ("second", "minute", "hour", "day-of-month", "month", "day-of-week")
_EVERY = re.compile(r"@every\s+(\d{1,9})\s*(s|m|h|d)(?:ec|econd|in|inute|our|ay)?s?", re.IGNORECASE)
_UNITS = {"s": ("second", 1), "m": ("minute", 60), "h": ("hour", 3600), "d": ("day", 86_400)}
_MOST_EVERY_SECONDS = 366 * 86_400
_DAILY = re.compile(r"At (\d\d:\d\d(?::\d\d)?) every day")


class ScheduleError(ValueError):
    """A part of a schedule cannot be used; the text says why, for people."""


def check_definition(*, cron: Any, time_zone: Any, missed: Any, catch_up_most: Any, overlap: Any, **names: Any) -> None:
    """Raise ScheduleError for what the table or a worker would refuse. *names*: any of name, kind and queue."""
    for what, value in names.items():
        if not isinstance(value, str):
            raise ScheduleError(f"the {what} of a schedule must be a text, not {value!r}")
        if not value:
            raise ScheduleError(f"a schedule needs a {what}")
        if (length := len(value.encode())) > _MOST_BYTES[what]:
            raise ScheduleError(f"the {what} of a schedule must have at most {_MOST_BYTES[what]} bytes, not {length}")
    if not isinstance(cron, str) or not isinstance(time_zone, str):
        raise ScheduleError(
            f"a schedule takes a cron expression and the name of a time zone, not {cron!r} and {time_zone!r}"
        )
    check(cron, time_zone)
    for what, value, known in (("missed", missed, MISSED), ("overlap", overlap, OVERLAPS)):
        if value not in known:
            raise ScheduleError(f"{what} must be {' or '.join(known)}, not {value!r}")
    if type(catch_up_most) is not int or not 1 <= catch_up_most <= MOST_CATCH_UP:
        raise ScheduleError(f"catch_up_most must be a whole number from 1 to {MOST_CATCH_UP}, not {catch_up_most!r}")


def check(cron: str, time_zone: str) -> None:
    """Raise ScheduleError for an expression or a time zone that cannot be used, and for dates that never come."""
    next(ticks(cron, time_zone, datetime(2026, 1, 1, tzinfo=UTC)))


def ticks(cron: str, time_zone: str, after: datetime) -> Iterator[datetime]:
    """Yield the times after *after* when a schedule is due, in UTC, without end. Raises ScheduleError.

    cronsim follows Debian's cron: where clocks go forward, what would be left out is due right after the gap; where
    they go back, a fixed time is due once. ``@every`` counts from *after*.
    """
    if period := _every_seconds(cron):
        at = after.replace(microsecond=0) + timedelta(seconds=period + (after.microsecond > 0))
        while True:
            yield at
            at += timedelta(seconds=period)
    zone = zone_of(time_zone)
    simulation = _simulation(cron, after.astimezone(zone))
    last = after
    while True:
        try:
            at = next(simulation).astimezone(UTC)
        except StopIteration:
            raise ScheduleError(f"{cron!r} never comes: no date in the next 50 years fits it") from None
        if at > last:  # times that clocks leave out may all come at the end of the gap
            last = at
            yield at


def next_ticks(cron: str, time_zone: str, after: datetime, count: int) -> list[datetime]:
    """Return the next *count* times when a schedule is due, in UTC. Raises ScheduleError."""
    return list(islice(ticks(cron, time_zone, after), count))


def words(cron: str, time_zone: str) -> str:
    """Return what an expression means, such as "every day at 02:00 Europe/Berlin"; itself if it cannot be read."""
    if match := _EVERY.fullmatch(cron.strip()):
        number, unit = int(match[1]), _UNITS[match[2].lower()][0]
        return f"every {unit}" if number == 1 else f"every {number} {unit}s"
    try:
        text = _simulation(cron, datetime(2026, 1, 1, tzinfo=UTC)).explain()
    except Exception:  # cronsim reads what it cannot explain
        return cron
    if match := _DAILY.fullmatch(text):
        return f"every day at {match[1]} {time_zone}"
    has_times = ":" in text or " past " in text or " on " in text
    return text[:1].lower() + text[1:] + (f", {time_zone}" if has_times else "")


@lru_cache(maxsize=1000)
def zone_of(name: str) -> tzinfo:
    """Return a time zone by its name, such as Europe/Berlin. Raises ScheduleError."""
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise ScheduleError(f"there is no time zone {name!r}; use a name such as Europe/Berlin, or UTC") from None


def _every_seconds(cron: str) -> int:
    """Return the period of an ``@every``; 0 for a cron expression. Raises ScheduleError."""
    if not cron.strip().lower().startswith("@every"):
        return 0
    match = _EVERY.fullmatch(cron.strip())
    seconds = int(match[1]) * _UNITS[match[2].lower()][1] if match else 0
    if not 1 <= seconds <= _MOST_EVERY_SECONDS:
        raise ScheduleError(f"@every takes a time from 1 s to 366 d, such as @every 30 s or @every 2 h, not {cron!r}")
    return seconds


def _simulation(cron: str, after: datetime) -> CronSim:
    text = ALIASES.get(cron.strip().lower(), cron)
    fields = text.split()
    try:
        return CronSim(text, after)
    except (CronSimError, AssertionError, OverflowError) as error:
        if len(fields) not in (5, 6):
            wanted = "5 fields (minute, hour, day, month, weekday), or 6 with seconds first"
            raise ScheduleError(f"a cron expression has {wanted}, not {cron!r}") from None
        names = _FIELDS[-len(fields) :]
        name = str(error).removeprefix("Bad ")
        if name == "day-of-month" and _is_valid([*fields[:-2], "*", fields[-1]]):
            raise ScheduleError(f"{cron!r} never comes: no month {fields[-2]} has such a day") from None
        part = fields[names.index(name)] if name in names else text
        raise ScheduleError(f"{name} cannot be {part!r} in {cron!r}") from None


def _is_valid(fields: list[str]) -> bool:
    try:
        CronSim(" ".join(fields), datetime(2026, 1, 1, tzinfo=UTC))
    except (CronSimError, AssertionError, OverflowError):
        return False
    return True
