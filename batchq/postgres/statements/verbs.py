"""Verbs, on one batch and in bulk, and their record."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from batchq.postgres.statements.running import Conn, fetch_all, fetch_json, fetch_one


def cancel(conn: Conn, batch_id: int, reason: str | None, actor: str | None = None) -> str | None:
    """Call batchq.cancel; return the batch's status, None if there is no such batch."""
    parameters = {"id": batch_id, "reason": reason, "actor": actor}
    status: str | None = fetch_one(conn, "SELECT batchq.cancel(%(id)s, %(reason)s, %(actor)s)", parameters)[0]
    return status


def retry(conn: Conn, batch_id: int, whole: bool, reason: str | None = None, actor: str | None = None) -> str | None:
    """Call batchq.retry; return the batch's status, None if there is no such batch."""
    parameters = {"id": batch_id, "whole": whole, "reason": reason, "actor": actor}
    status: str | None = fetch_one(conn, "SELECT batchq.retry(%(id)s, %(whole)s, %(reason)s, %(actor)s)", parameters)[0]
    return status


def retry_items(conn: Conn, batch_id: int, reason: str | None = None, actor: str | None = None) -> str | None:
    """Call batchq.retry_items; return the batch's status, None if there is no such batch."""
    parameters = {"id": batch_id, "reason": reason, "actor": actor}
    status: str | None = fetch_one(conn, "SELECT batchq.retry_items(%(id)s, %(reason)s, %(actor)s)", parameters)[0]
    return status


def snooze(
    conn: Conn,
    batch_id: int,
    delay_seconds: float | None,
    until: str | None,
    reason: str | None = None,
    actor: str | None = None,
) -> str | None:
    """Call batchq.snooze; return the batch's status, None if there is no such batch."""
    status: str | None = fetch_one(
        conn,
        "SELECT batchq.snooze(%(id)s, %(delay)s * interval '1 second', %(until)s::timestamptz, %(reason)s, %(actor)s)",
        {"id": batch_id, "delay": delay_seconds, "until": until, "reason": reason, "actor": actor},
    )[0]
    return status


def set_priority(
    conn: Conn, batch_id: int, priority: int, reason: str | None = None, actor: str | None = None
) -> str | None:
    """Call batchq.set_priority; return the batch's status, None if there is no such batch."""
    status: str | None = fetch_one(
        conn,
        "SELECT batchq.set_priority(%(id)s, %(priority)s, %(reason)s, %(actor)s)",
        {"id": batch_id, "priority": priority, "reason": reason, "actor": actor},
    )[0]
    return status


def move(conn: Conn, batch_id: int, to_queue: str, reason: str | None = None, actor: str | None = None) -> str | None:
    """Call batchq.move; return the batch's status, None if there is no such batch."""
    status: str | None = fetch_one(
        conn,
        "SELECT batchq.move(%(id)s, %(to_queue)s, %(reason)s, %(actor)s)",
        {"id": batch_id, "to_queue": to_queue, "reason": reason, "actor": actor},
    )[0]
    return status


def pause(
    conn: Conn,
    queue: str | None,
    kind: str | None,
    delay_seconds: float | None = None,
    until: str | None = None,
    reason: str | None = None,
    actor: str | None = None,
) -> bool:
    """Call batchq.pause, to end in *delay_seconds*, *until* a time, or by batchq.resume; tell whether it is new."""
    is_new: bool = fetch_one(
        conn,
        """
        SELECT batchq.pause(%(queue)s, %(kind)s,
          coalesce(%(until)s::timestamptz, now() + %(delay)s * interval '1 second'), %(reason)s, %(actor)s)
        """,
        {"queue": queue, "kind": kind, "delay": delay_seconds, "until": until, "reason": reason, "actor": actor},
    )[0]
    return is_new


def resume(
    conn: Conn, queue: str | None, kind: str | None, reason: str | None = None, actor: str | None = None
) -> bool:
    """Call batchq.resume; tell whether there was such a pause."""
    was_paused: bool = fetch_one(
        conn,
        "SELECT batchq.resume(%(queue)s, %(kind)s, %(reason)s, %(actor)s)",
        {"queue": queue, "kind": kind, "reason": reason, "actor": actor},
    )[0]
    return was_paused


def drain_worker(conn: Conn, worker_id: str, reason: str | None = None, actor: str | None = None) -> str | None:
    """Call batchq.drain_worker; return draining, None if there is no such worker."""
    parameters = {"id": worker_id, "reason": reason, "actor": actor}
    status: str | None = fetch_one(conn, "SELECT batchq.drain_worker(%(id)s, %(reason)s, %(actor)s)", parameters)[0]
    return status


class Chunk(NamedTuple):
    """What came of one chunk of a verb in bulk.

    next_place: from where to go on, None at the end. keyed: how many were left out beside a live batch of their
    unique_key.
    """

    matched: int
    changed: int
    next_place: str | None
    audit_id: int | None
    keyed: int


def clock_json(conn: Conn) -> str:
    """Return the database's time as JSON writes it, whatever the session's DateStyle is."""
    text: str = fetch_one(conn, "SELECT to_jsonb(now()) #>> '{}'", {})[0]
    return text


def bulk(
    conn: Conn,
    verb: str,
    filter: Mapping[str, Any],  # noqa: A002 (as in batchq.bulk)
    change: Mapping[str, Any],
    place: str | None,
    dry_run: bool,
    most: int,
    reason: str | None,
    actor: str | None,
    audit_id: int | None,
) -> Chunk:
    """Call batchq.bulk: do a verb for the next *most* batches that match."""
    row = fetch_one(
        conn,
        """
        SELECT matched, changed, next_place::text, audit, keyed
        FROM batchq.bulk(%(verb)s, %(filter)s::jsonb, %(change)s::jsonb, %(place)s::jsonb, %(dry_run)s, %(most)s,
                         %(reason)s, %(actor)s, %(audit_id)s)
        """,
        {
            "verb": verb,
            "filter": json.dumps(dict(filter)),
            "change": json.dumps(dict(change)),
            "place": place,
            "dry_run": dry_run,
            "most": most,
            "reason": reason,
            "actor": actor,
            "audit_id": audit_id,
        },
    )
    return Chunk(*row)


def pause_rows(conn: Conn) -> list[dict[str, Any]]:
    """Return the pauses that have not ended, as JSON objects."""
    return fetch_json(
        conn,
        """
        SELECT to_jsonb(p)
        FROM batchq.pauses p
        WHERE p.until IS NULL
           OR p.until > now()
        ORDER BY p.queue, p.kind
        """,
        {},
    )


def audit_rows(conn: Conn, limit: int, batch_id: int | None = None) -> list[dict[str, Any]]:
    """Return the latest rows of batchq.audit, of one batch or of all, as JSON objects."""
    return fetch_json(
        conn,
        """
        SELECT to_jsonb(a)
        FROM batchq.audit a
        WHERE (%(batch_id)s::bigint IS NULL OR a.batch_id = %(batch_id)s)
        ORDER BY a.id DESC
        LIMIT %(limit)s
        """,
        {"batch_id": batch_id, "limit": limit},
    )


def duty_statements(conn: Conn, duty: str, role: str) -> list[str]:
    """Return the GRANT statements that give a role what its duty needs, and nothing more."""
    rows = fetch_all(
        conn, "SELECT batchq.duty_statements(%(duty)s::text, %(role)s::text)", {"duty": duty, "role": role}
    )
    return [statement for (statement,) in rows]


def grant_duty(conn: Conn, duty: str, role: str) -> None:
    """Give a role what its duty needs. For the owner of the schema."""
    fetch_one(conn, "SELECT batchq.grant_duty(%(duty)s::text, %(role)s::text)", {"duty": duty, "role": role})
