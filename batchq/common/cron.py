"""When a schedule is due: cron expressions by cronsim, ``@every``, time zones; and an expression in words."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from functools import lru_cache
from itertools import islice
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

ALIASES = {
    "@hourly": "0 * * * *", "@daily": "0 0 * * *", "@weekly": "0 0 * * 0", "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
}  # fmt: skip
MISSED = ("coalesce", "skip", "catch_up")
OVERLAPS = ("allow", "skip")
MOST_CATCH_UP = 1000
_FIELDS = ("second", "minute", "hour", "day-of-month", "month", "day-of-week")
_EVERY = re.compile(r"@every\s+(\d{1,9})\s*(s|m|h|d)(?:ec|econd|in|inute|our|ay)?s?", re.IGNORECASE)
_UNITS = {"s": ("second", 1), "m": ("minute", 60), "h": ("hour", 3600), "d": ("day", 86_400)}
_MOST_EVERY_SECONDS = 366 * 86_400
_DAILY = re.compile(r"At (\d\d:\d\d(?::\d\d)?) every day")


class CronError(ValueError):
    """An expression or a time zone cannot be used; the text says why, for people."""


def check(cron: str, time_zone: str) -> None:
    """Raise CronError for an expression or a time zone that cannot be used, and for dates that never come."""
    next(ticks(cron, time_zone, datetime(2026, 1, 1, tzinfo=UTC)))


def ticks(cron: str, time_zone: str, after: datetime) -> Iterator[datetime]:
    """Yield the times after *after* when a schedule is due, in UTC, without end. Raises CronError.

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
            raise CronError(f"{cron!r} never comes: there is no such date in the next 50 years") from None
        if at > last:  # times that clocks leave out may all come at the end of the gap
            last = at
            yield at


def next_ticks(cron: str, time_zone: str, after: datetime, count: int) -> list[datetime]:
    """Return the next *count* times when a schedule is due, in UTC. Raises CronError."""
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
    """Return a time zone by its name, such as Europe/Berlin. Raises CronError."""
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise CronError(f"there is no time zone {name!r}; names are such as Europe/Berlin, or UTC") from None


def _every_seconds(cron: str) -> int:
    """Return the period of an ``@every``; 0 for a cron expression. Raises CronError."""
    if not cron.strip().lower().startswith("@every"):
        return 0
    match = _EVERY.fullmatch(cron.strip())
    seconds = int(match[1]) * _UNITS[match[2].lower()][1] if match else 0
    if not 1 <= seconds <= _MOST_EVERY_SECONDS:
        raise CronError(f"@every takes a time from 1 s to 366 d, such as @every 30 s or @every 2 h, not {cron!r}")
    return seconds


def _simulation(cron: str, after: datetime) -> CronSim:
    text = ALIASES.get(cron.strip().lower(), cron)
    fields = text.split()
    try:
        return CronSim(text, after)
    except (CronSimError, AssertionError, OverflowError) as error:
        if len(fields) not in (5, 6):
            wanted = "5 fields (minute, hour, day, month, weekday), or 6 with seconds first"
            raise CronError(f"a cron expression has {wanted}, not {cron!r}") from None
        names = _FIELDS[-len(fields) :]
        name = str(error).removeprefix("Bad ")
        if name == "day-of-month" and _is_valid([*fields[:-2], "*", fields[-1]]):
            raise CronError(f"{cron!r} never comes: no month {fields[-2]} has such a day") from None
        part = fields[names.index(name)] if name in names else text
        raise CronError(f"{name} cannot be {part!r} in {cron!r}") from None


def _is_valid(fields: list[str]) -> bool:
    try:
        CronSim(" ".join(fields), datetime(2026, 1, 1, tzinfo=UTC))
    except (CronSimError, AssertionError, OverflowError):
        return False
    return True
