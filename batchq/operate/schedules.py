"""Schedules: read the definition that people give, change a row of batchq.schedules, and put it in words."""

import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple

from batchq.common import hidden
from batchq.common.cron import MISSED, MOST_CATCH_UP, OVERLAPS, ScheduleError, check_definition, next_ticks, words
from batchq.errors import InvalidInput
from batchq.postgres.statements import schedules
from batchq.postgres.statements.running import Conn

_NUMBER = re.compile("[0-9]{1,9}")
Row = dict[str, Any]


class Field(NamedTuple):
    """A part of a definition: a column of batchq.schedules. *option*: as the command line calls it."""

    name: str
    label: str
    help: str
    option: str
    default: str = ""
    choices: tuple[str, ...] = ()


FIELDS = (
    Field("kind", "Kind", "kind of the batches", "--kind"),
    Field("queue", "Queue", "queue of the batches", "--queue", "default"),
    Field("time_zone", "Time zone", "time zone of the expression, such as Europe/Berlin", "--time-zone", "UTC"),
    Field(
        "payload", "Payload", 'payload of the batches, as JSON; a key "tick" with null gets the time of the tick',
        "--payload", "{}",
    ),
    Field(
        "missed", "Missed ticks", "what happens to ticks at which no worker ran: one batch for all, none, or catch up",
        "--missed", "coalesce", MISSED,
    ),
    Field(
        "catch_up_most", "Most to catch up", f"most batches that catch_up makes, 1 to {MOST_CATCH_UP}",
        "--catch-up-most", "100",
    ),
    Field(
        "overlap", "Overlap", "whether a tick makes a batch while an earlier one is pending or processing",
        "--overlap", "allow", OVERLAPS,
    ),
)  # fmt: skip


class Action(NamedTuple):
    """Something to do with one schedule. *unchanged*: printed if nothing had to change."""

    name: str
    title: str
    explanation: str
    done: str
    unchanged: str
    is_grave: bool = False


ACTIONS = {
    action.name: action
    for action in (
        Action(
            "pause",
            "Pause schedule",
            "Its ticks pass without a batch. Batches that exist already still run.",
            "paused",
            "already paused",
        ),
        Action(
            "resume",
            "Resume schedule",
            "Its next tick makes a batch again. Ticks that have passed are not made up for. A schedule with an error "
            "is tried again.",
            "resumed",
            "neither paused nor stopped by an error",
        ),
        Action("run", "Run now", "Makes a batch now, besides those of its ticks.", "run", ""),
        Action(
            "remove",
            "Remove schedule",
            "Deletes the schedule. Its batches stay. One that code declares is written again by the next worker that "
            "starts: pause that instead.",
            "removed",
            "",
            is_grave=True,
        ),
    )
}


def definition(name: str, cron: str, given: Mapping[str, str | None]) -> Row:
    """Return a definition from texts, by column; what is not given has its default. Raises InvalidInput."""
    texts = {field.name: given.get(field.name) or field.default for field in FIELDS}
    most = texts.pop("catch_up_most")
    found = {"name": name, "cron": cron, **texts, "catch_up_most": int(most) if _NUMBER.fullmatch(most) else most}
    try:
        check_definition(**{column: value for column, value in found.items() if column != "payload"})
        json.loads(texts["payload"])
    except ScheduleError as error:
        raise InvalidInput(str(error)) from None
    except ValueError as error:
        raise InvalidInput(f"the payload is not valid JSON: {error}") from None
    return found


class Change(NamedTuple):
    """The definition of a schedule before and after a change; None: there was none."""

    before: Row | None
    after: Row
    is_changed: bool


def shown_rows(conn: Conn, name: str | None = None, queue: str | None = None, kind: str | None = None) -> list[Row]:
    """Return the rows of batchq.schedule_status, with *** for hidden fields of payloads."""
    rows = schedules.schedule_rows(conn, name, queue, kind)
    return [row | {"payload": hidden.without_hidden(row["payload"])} for row in rows]


def change(conn: Conn, wanted: Row, reason: str | None, actor: str | None) -> Change:
    """Add a schedule, or replace the definition of the one with its name."""
    before = schedules.own_schedule(conn, wanted["name"])
    is_changed = schedules.set_schedule(conn, wanted, reason, actor)
    after = schedules.own_schedule(conn, wanted["name"])
    return Change(before, after or wanted, is_changed)


def do(conn: Conn, action: Action, name: str, reason: str | None, actor: str | None) -> Any:
    """Do an action; return whether anything changed, or the id of the batch; None if there is no such schedule."""
    return schedules.call_schedule_verb(conn, action.name, name, reason, actor)


# ----------------------------------------------------------------------------------------------------- how they look


def words_of(row: Mapping[str, Any]) -> str:
    """Return when a schedule is due, in words: "every day at 02:00 Europe/Berlin"."""
    return words(row["cron"], row["time_zone"])


def upcoming(row: Mapping[str, Any], count: int = 3) -> list[datetime]:
    """Return the next ticks of a row of batchq.schedule_status, in UTC: its next_at, and those that follow."""
    if row["next_at"] is None or row["state"] not in ("active", "overdue"):
        return []
    first = datetime.fromisoformat(str(row["next_at"]))
    try:
        return [first, *next_ticks(row["cron"], row["time_zone"], first, count - 1)]
    except ScheduleError:  # this machine does not know the time zone
        return [first]


def origin_of(row: Mapping[str, Any]) -> str:
    """Return where the definition comes from: "set", "declared in code", or "set; code declares it, too"."""
    if row["is_declared"]:
        return "declared in code"
    return "set; code declares it, too" if row["declaring_workers"] else "set"


def rules_of(row: Mapping[str, Any]) -> str:
    """Return the rules for missed ticks and overlaps, as "coalesce, allow"."""
    most = f" {row['catch_up_most']}" if row["missed"] == "catch_up" else ""
    return f"{row['missed']}{most}, {row['overlap']}"
