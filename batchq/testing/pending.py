"""What is enqueued: rows to look at, and assertions about them."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from batchq.common.text import cut, json_text
from batchq.errors import InvalidInput
from batchq.postgres import drivers
from batchq.postgres.statements import testing

_ANY: Any = object()
_MOST_LISTED = 20
_MOST_CHARACTERS = 200
_EXACT = ("kind", "queue", "key", "unique_key", "priority", "status")


@dataclass(frozen=True)
class Enqueued:
    """A batch that has not begun, or waits for another attempt; columns of batchq.batches.

    status: pending or waiting. items: None without any. delay_seconds: from created_at to run_at.
    """

    id: int
    kind: str
    queue: str
    status: str
    payload: Any
    items: list[Any] | None
    key: str | None
    unique_key: str | None
    priority: int
    run_at: datetime
    delay_seconds: float
    attempt: int
    max_attempts: int
    after: list[int] | None


def enqueued(conn: Any, kind: str | None = None, queue: str | None = None) -> list[Enqueued]:
    """Return the batches that are enqueued and do not run, by id, as *conn*, a connection of any kind, sees them in its
    transaction."""
    return _of(_rows(drivers.run(conn, testing.enqueued())), kind, queue)


async def enqueued_async(conn: Any, kind: str | None = None, queue: str | None = None) -> list[Enqueued]:
    """Async version of `enqueued`."""
    return _of(_rows(await drivers.run_async(conn, testing.enqueued())), kind, queue)


def assert_enqueued(
    conn: Any,
    kind: str,
    *,
    payload: Any = _ANY,
    items: Any = _ANY,
    queue: str = _ANY,
    key: str | None = _ANY,
    unique_key: str | None = _ANY,
    priority: int = _ANY,
    status: str = _ANY,
    run_at: datetime | None = None,
    delay_seconds: float | None = None,
    within_seconds: float = 1.0,
    count: int | None = None,
) -> list[Enqueued]:
    """Return the batches of *kind* that `enqueued` returns and that fit. Raises AssertionError if there is none or,
    with *count*, another number of them; it lists what is enqueued instead.

    *payload* fits if it is a subset: an object has at least these keys, a list as many elements, and their values fit.
    *items*: the whole list. *run_at* and *delay_seconds* fit within *within_seconds*; the delay counts from the
    enqueue. The other options are equal to the columns.
    """
    __tracebackhide__ = True  # of pytest: the test fails where it calls this
    wanted = _wanted(locals())
    return _checked(_rows(drivers.run(conn, testing.enqueued())), wanted, count, within_seconds)


async def assert_enqueued_async(conn: Any, kind: str, *, count: int | None = None, **options: Any) -> list[Enqueued]:
    """Async version of `assert_enqueued`, with the same options."""
    __tracebackhide__ = True
    within_seconds = options.pop("within_seconds", 1.0)
    rows = _rows(await drivers.run_async(conn, testing.enqueued()))
    return _checked(rows, _wanted({"kind": kind, **_known(options)}), count, within_seconds)


def refute_enqueued(conn: Any, kind: str | None = None, **options: Any) -> None:
    """Raise AssertionError if a batch is enqueued that fits; it lists them. *options*: those of `assert_enqueued`,
    except count."""
    __tracebackhide__ = True
    within_seconds = options.pop("within_seconds", 1.0)
    rows = _rows(drivers.run(conn, testing.enqueued()))
    _refute(rows, _wanted({"kind": _ANY if kind is None else kind, **_known(options)}), within_seconds)


async def refute_enqueued_async(conn: Any, kind: str | None = None, **options: Any) -> None:
    """Async version of `refute_enqueued`."""
    __tracebackhide__ = True
    within_seconds = options.pop("within_seconds", 1.0)
    rows = _rows(await drivers.run_async(conn, testing.enqueued()))
    _refute(rows, _wanted({"kind": _ANY if kind is None else kind, **_known(options)}), within_seconds)


# -------------------------------------------------------------------------------------------------------- what fits


def _rows(found: Iterable[tuple[Any, ...]]) -> list[Enqueued]:
    rows = (json.loads(text) for (text,) in found)
    return [Enqueued(**row | {"run_at": datetime.fromisoformat(row["run_at"])}) for row in rows]


def _of(rows: Iterable[Enqueued], kind: str | None, queue: str | None) -> list[Enqueued]:
    return [row for row in rows if kind in (None, row.kind) and queue in (None, row.queue)]


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """Return *options*. Raises TypeError for one that `assert_enqueued` does not have."""
    known = {*_EXACT, "payload", "items", "run_at", "delay_seconds"} - {"kind"}
    if unknown := options.keys() - known:
        raise TypeError(f"unknown option {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    return options


def _wanted(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is asked for, by column. Raises InvalidInput for a run_at without a time zone and for no JSON."""
    wanted = {name: given[name] for name in _EXACT if given.get(name, _ANY) is not _ANY}
    for name in ("payload", "items"):
        if (value := given.get(name, _ANY)) is not _ANY:
            wanted[name] = json.loads(json_text(value, name))
    for name in ("run_at", "delay_seconds"):
        if (value := given.get(name)) is not None:
            wanted[name] = value
    if "run_at" in wanted and (not isinstance(wanted["run_at"], datetime) or wanted["run_at"].tzinfo is None):
        raise InvalidInput(f"run_at must be a datetime with a time zone, not {wanted['run_at']!r}")
    return wanted


def _fits(row: Enqueued, wanted: Mapping[str, Any], within_seconds: float) -> bool:
    for name, value in wanted.items():
        own = getattr(row, name)
        match name:
            case "payload":
                fits = is_subset(value, own)
            case "run_at":
                fits = abs((own - value).total_seconds()) <= within_seconds
            case "delay_seconds":
                fits = abs(own - value) <= within_seconds
            case _:
                fits = own == value
        if not fits:
            return False
    return True


def is_subset(some: Any, value: Any) -> bool:
    """Return whether a JSON value has everything that *some* has."""
    if isinstance(some, dict):
        return isinstance(value, dict) and all(key in value and is_subset(some[key], value[key]) for key in some)
    if isinstance(some, list):
        return isinstance(value, list) and len(some) == len(value) and all(map(is_subset, some, value))
    return bool(some == value) and isinstance(some, bool) == isinstance(value, bool)


def _checked(
    rows: list[Enqueued], wanted: Mapping[str, Any], count: int | None, within_seconds: float
) -> list[Enqueued]:
    __tracebackhide__ = True
    found = [row for row in rows if _fits(row, wanted, within_seconds)]
    if count is None and not found:
        raise AssertionError(f"no batch is enqueued with {_shown(wanted)}; {_listed(rows, wanted)}")
    if count is not None and len(found) != count:
        noun = "batch is" if len(found) == 1 else "batches are"
        raise AssertionError(
            f"{len(found)} {noun} enqueued with {_shown(wanted)}, not {count}; {_listed(rows, wanted)}"
        )
    return found


def _refute(rows: list[Enqueued], wanted: Mapping[str, Any], within_seconds: float) -> None:
    __tracebackhide__ = True
    if found := [row for row in rows if _fits(row, wanted, within_seconds)]:
        what = f"with {_shown(wanted)}" if wanted else "at all"
        raise AssertionError(f"no batch should be enqueued {what}; {_listed(found, wanted)}")


# ------------------------------------------------------------------------------------------------------ what is shown


def _shown(wanted: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_text(value)}" for name, value in wanted.items())


def _listed(rows: list[Enqueued], wanted: Mapping[str, Any]) -> str:
    """Return the rows, a line each, those of the wanted kind first."""
    if not rows:
        return "nothing is enqueued (is it committed, or in the transaction of this connection?)"
    ordered = sorted(rows, key=lambda row: row.kind != wanted.get("kind"))
    lines = [_line(row) for row in ordered[:_MOST_LISTED]]
    if len(rows) > _MOST_LISTED:
        lines.append(f"and {len(rows) - _MOST_LISTED:,} more")
    return "enqueued are:\n  " + "\n  ".join(lines)


def _line(row: Enqueued) -> str:
    """Return a batch in one line: what differs from the defaults."""
    defaults = {"queue": "default", "status": "pending", "priority": 0, "attempt": 0, "max_attempts": 5}
    shown = [f"{row.id} {row.kind}: payload {_text(row.payload)}"]
    for field in fields(row):
        value = getattr(row, field.name)
        is_default = value is None or value == defaults.get(field.name, _ANY)
        if (
            field.name in ("id", "kind", "payload", "run_at")
            or is_default
            or (field.name == "delay_seconds" and not value)
        ):
            continue
        shown.append(f"{field.name} {_text(value)}")
    return ", ".join([*shown, f"run_at {row.run_at.isoformat()}"] if row.delay_seconds else shown)


def _text(value: Any) -> str:
    return cut(value.isoformat() if isinstance(value, datetime) else repr(value), _MOST_CHARACTERS)
