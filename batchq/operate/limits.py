"""Limits: read the numbers that people give, and change a row of batchq.limits."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from batchq.common.numbers import read_whole
from batchq.errors import InvalidInput
from batchq.postgres.statements import limits
from batchq.postgres.statements.running import Conn

_NONE = ("none", "")
_INFINITE = ("infinity", "inf", "infinite")
_MOST_WHOLE = 2**31 - 1  # lifts a limit that the code declares, as infinity does for the others


class Number(NamedTuple):
    """A number of a limit: a column of batchq.limits. *least* and *most* bound it; a rate has no *most*."""

    name: str
    label: str
    help: str
    is_whole: bool = False
    is_optional: bool = True
    least: float = 0
    most: float = math.inf

    def read(self, text: str) -> float | None:
        """Return the number in a text; None for "none" or an empty one. Raises ValueError."""
        word = text.strip().lower()
        if self.is_optional and word in _NONE:
            return None
        if self.is_optional and word in _INFINITE:
            return _MOST_WHOLE if self.is_whole else math.inf
        try:
            number = read_whole(word) if self.is_whole and len(word) < 25 else float(word)
        except ValueError:
            number = math.nan
        if self.least <= number <= self.most and (not self.is_whole or isinstance(number, int)):
            return number
        raise ValueError(f"{self.name} must be {self._wanted()}, not {text!r}")

    def _wanted(self) -> str:
        if not self.is_optional:
            return f"a number from {self.least:g} to {self.most:g}"
        return f'{"a whole" if self.is_whole else "a"} number, 0 or more; or "none", or "infinity"'


NUMBERS = (
    Number("max_running", "Running", "batches that run at the same time", is_whole=True, most=_MOST_WHOLE),
    Number("per_second", "Batches per second", "batches that begin per second"),
    Number("items_per_second", "Items per second", "items per second for which an item handler is called"),
    Number(
        "burst_seconds", "Burst seconds",
        "seconds for which an unused rate can be made up for, from 0.001 to 3600 (default: 1)",
        is_optional=False, least=0.001, most=3600,
    ),
    Number(
        "max_running_per_key", "Running per key", "batches of one key that run at the same time; 1: strictly in order",
        is_whole=True, most=_MOST_WHOLE,
    ),
)  # fmt: skip
LIMITING = tuple(number.name for number in NUMBERS if number.is_optional)

Row = dict[str, Any]


class Change(NamedTuple):
    """The row of batchq.limits before and after a change; None: no row."""

    before: Row | None
    after: Row | None
    is_changed: bool


def change(
    conn: Conn, queue: str, kind: str | None, given: Mapping[str, Any], reason: str | None, actor: str | None
) -> Change:
    """Change the numbers that are *given*, None to remove one; the row keeps the others. If nothing is limited any
    more, the row is deleted. Raises InvalidInput if only a burst is given and there is no row."""
    before = limits.own_limit(conn, queue, kind, for_update=True)
    if before is None and given.keys() == {"burst_seconds"}:
        raise InvalidInput(f"burst_seconds limits nothing without a rate; give one of {', '.join(LIMITING)}, too")
    return _write(conn, queue, kind, before, {**(before or {}), **given}, reason, actor)


def replace(
    conn: Conn, queue: str, kind: str | None, numbers: Mapping[str, Any], reason: str | None, actor: str | None
) -> Change:
    """Replace all numbers of the row; without one that limits something, the row is deleted."""
    before = limits.own_limit(conn, queue, kind, for_update=True)
    return _write(conn, queue, kind, before, dict(numbers), reason, actor)


def _write(
    conn: Conn, queue: str, kind: str | None, before: Row | None, after: Row, reason: str | None, actor: str | None
) -> Change:
    is_limiting = any(after.get(name) is not None for name in LIMITING)
    is_changed = limits.set_limit(conn, queue, kind, after if is_limiting else {}, reason, actor)
    return Change(before, limits.own_limit(conn, queue, kind), is_changed)


# ----------------------------------------------------------------------------------------------------- how they look


def number_text(number: float | str | None) -> str:
    """Return a number of a limit as text: "none", "infinity", 50, 2.5. JSON has an infinite one as a text."""
    if number is None:
        return "none"
    value = float(number)
    return "infinity" if value >= _MOST_WHOLE else f"{value:.15g}"


def use_text(used: float | str, limit: float | str | None) -> str:
    """Return how much of a limit is in use, as "3 of 10"; empty without a limit."""
    return "" if limit is None else f"{number_text(round(float(used), 2))} of {number_text(limit)}"


def row_text(row: Mapping[str, Any]) -> str:
    """Return the numbers of a row, such as "max_running 10, burst_seconds 1"."""
    return ", ".join(
        f"{number.name} {number_text(row[number.name])}" for number in NUMBERS if row.get(number.name) is not None
    )


def change_text(before: Row | None, after: Row | None) -> str:
    """Return which numbers differ: "max_running 5 -> 10, per_second none -> 50"."""
    old, new = before or {}, after or {}
    return ", ".join(
        f"{number.name} {number_text(old.get(number.name))} -> {number_text(new.get(number.name))}"
        for number in NUMBERS
        if old.get(number.name) != new.get(number.name)
    )


def name_text(queue: str, kind: str | None) -> str:
    """Return what a limit or throttle is of: "kind send in queue mail", "queue mail"."""
    return f"kind {kind} in queue {queue}" if kind else f"queue {queue}"


def origin_text(row: Mapping[str, Any]) -> str:
    """Return where a limit in force comes from: "set", "declared in code", or both."""
    return " and ".join(text for name, text in (("is_set", "set"), ("is_declared", "declared in code")) if row[name])
