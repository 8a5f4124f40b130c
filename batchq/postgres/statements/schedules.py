"""Schedules: what is due, what a worker has planned for it, and how people see and change schedules."""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, LiteralString, NamedTuple

from batchq.postgres.statements.running import Conn, Statement, fetch_all, fetch_json, fetch_one_or_none
from batchq.postgres.statements.verbs import call_verb

MOST_DUE = 200  # schedules of one query

# Rows without a time come first. A declared schedule is due only while a live worker declares it.
DUE: LiteralString = """
SELECT s.name, s.revision, s.cron, s.time_zone, s.missed, s.catch_up_most, date_part('epoch', s.next_at),
  date_part('epoch', s.changed_at), date_part('epoch', clock_timestamp())
FROM batchq.schedules s
WHERE NOT s.paused
  AND (s.next_at < now() + %(ahead_seconds)s * interval '1 second' OR (s.next_at IS NULL AND s.error IS NULL))
  AND (NOT s.is_declared
       OR s.name IN (SELECT u.name
                     FROM batchq.workers w
                     CROSS JOIN unnest(w.schedules) AS u(name)
                     WHERE w.heartbeat_at > now() - interval '1 minute'))
ORDER BY s.next_at NULLS FIRST, s.name
LIMIT %(most)s
"""


class DueSchedule(NamedTuple):
    """A schedule that is due soon. Times in seconds since 1970, by the database's clock; *next_at* None: not known."""

    name: str
    revision: int
    cron: str
    time_zone: str
    missed: str
    catch_up_most: int
    next_at: float | None
    changed_at: float
    now: float


def due_schedules(conn: Conn, ahead_seconds: float, most: int = MOST_DUE) -> list[DueSchedule]:
    """Return the schedules that are due now or within *ahead_seconds*, and those whose next time is not known."""
    rows = fetch_all(conn, DUE, {"ahead_seconds": ahead_seconds, "most": most})
    return [DueSchedule._make(row) for row in rows]


class Plan(NamedTuple):
    """What is to happen with a schedule that is due: a batch for each of *ticks*, and *missed* ticks without one."""

    name: str
    revision: int
    due_at: datetime | None
    ticks: Sequence[datetime]
    missed: int
    next_at: datetime | None
    error: str | None


class Fired(NamedTuple):
    """What was done with a schedule: batches made, how late, and why the database refused one."""

    name: str
    batches: int
    late_seconds: float | None
    refused: str | None


FIRE: LiteralString = """
SELECT name, batches, late_seconds, refused
FROM batchq.fire_schedules(%(plans)s::jsonb)
"""


def fire_schedules(plans: Iterable[Plan]) -> Statement:
    """Return the statement that carries out plans, and returns the fields of `Fired` for each that was still due."""
    return FIRE, {"plans": json.dumps([plan._asdict() for plan in plans], default=datetime.isoformat)}


def declare_schedules(conn: Conn, declared: Sequence[Mapping[str, Any]]) -> None:
    """Write the schedules that code declares: columns of batchq.schedules each."""
    fetch_all(conn, "SELECT batchq.declare_schedules(%(declared)s::jsonb)", {"declared": json.dumps(list(declared))})


SCHEDULES: LiteralString = """
SELECT to_jsonb(s)
FROM (SELECT * FROM batchq.schedule_status OFFSET 0) s
WHERE (%(name)s::text IS NULL OR s.name = %(name)s)
  AND (%(queue)s::text IS NULL OR s.queue = %(queue)s)
  AND (%(kind)s::text IS NULL OR s.kind = %(kind)s)
ORDER BY s.name
"""


def schedule_rows(
    conn: Conn, name: str | None = None, queue: str | None = None, kind: str | None = None
) -> list[dict[str, Any]]:
    """Return the rows of batchq.schedule_status as JSON objects."""
    return fetch_json(conn, SCHEDULES, {"name": name, "queue": queue, "kind": kind})


def own_schedule(conn: Conn, name: str) -> dict[str, Any] | None:
    """Return the definition of a schedule, by column; None if there is none. The payload is JSON text."""
    columns = "name", "cron", "time_zone", "queue", "kind", "payload", "missed", "catch_up_most", "overlap"
    row = fetch_one_or_none(
        conn,
        """
        SELECT s.name, s.cron, s.time_zone, s.queue, s.kind, s.payload::text, s.missed, s.catch_up_most, s.overlap
        FROM batchq.schedules s
        WHERE s.name = %(name)s
        """,
        {"name": name},
    )
    return dict(zip(columns, row, strict=True)) if row else None


def set_schedule(conn: Conn, definition: Mapping[str, Any], reason: str | None, actor: str | None) -> bool:
    """Add a schedule, or replace the definition of the one with its name. Return whether anything changed."""
    return bool(call_verb(conn, "set_schedule", {**definition, "reason": reason, "actor": actor}))


def call_schedule_verb(conn: Conn, verb: str, name: str, reason: str | None, actor: str | None) -> Any:
    """Pause, resume, run or remove a schedule; return the answer of the SQL function, None if there is none."""
    return call_verb(conn, f"{verb}_schedule", {"name": name, "reason": reason, "actor": actor})
