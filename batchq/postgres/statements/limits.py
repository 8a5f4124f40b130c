"""Limits as people see and set them: what is in force and in use, throttles, and one row of batchq.limits."""

from collections.abc import Mapping
from typing import Any, LiteralString

from batchq.postgres.statements.running import Conn, fetch_json, fetch_one_or_none, fetch_value
from batchq.postgres.statements.verbs import call_verb


def limit_rows(conn: Conn, queue: str | None = None, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the rows of batchq.limits_in_use as JSON objects; an infinite number is the text "Infinity"."""
    return fetch_json(
        conn,
        """
        SELECT to_jsonb(l)
        FROM (SELECT * FROM batchq.limits_in_use OFFSET 0) l
        WHERE (%(queue)s::text IS NULL OR l.queue = %(queue)s)
          AND (%(kind)s::text IS NULL OR l.kind = %(kind)s)
        ORDER BY l.queue, l.kind NULLS FIRST
        """,
        {"queue": queue, "kind": kind},
    )


def throttle_rows(conn: Conn, queue: str | None = None, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the throttles that have not ended, as JSON objects with *seconds_left*; kind and key None: any."""
    return fetch_json(
        conn,
        """
        SELECT jsonb_build_object(
          'queue', t.queue, 'kind', nullif(t.kind, ''), 'key', nullif(t.key, ''), 'until', t.until,
          'seconds_left', date_part('epoch', t.until - now()), 'throttled_at', t.throttled_at, 'worker', t.worker)
        FROM batchq.throttles t
        WHERE t.until > now()
          AND (%(queue)s::text IS NULL OR t.queue = %(queue)s)
          AND (%(kind)s::text IS NULL OR t.kind = %(kind)s)
        ORDER BY t.queue, t.kind, t.key
        """,
        {"queue": queue, "kind": kind},
    )


OWN_LIMIT: LiteralString = """
SELECT l.max_running, l.per_second, l.items_per_second, l.burst_seconds, l.max_running_per_key
FROM batchq.limits l
WHERE l.queue = %(queue)s
  AND l.kind IS NOT DISTINCT FROM %(kind)s::text
"""


def own_limit(conn: Conn, queue: str, kind: str | None, for_update: bool = False) -> dict[str, Any] | None:
    """Return the numbers in the row of batchq.limits, by column; None if there is no row. *for_update*: lock it."""
    columns = "max_running", "per_second", "items_per_second", "burst_seconds", "max_running_per_key"
    statement = f"{OWN_LIMIT}FOR UPDATE" if for_update else OWN_LIMIT
    row = fetch_one_or_none(conn, statement, {"queue": queue, "kind": kind})
    return dict(zip(columns, row, strict=True)) if row else None


def set_limit(
    conn: Conn, queue: str, kind: str | None, numbers: Mapping[str, Any], reason: str | None, actor: str | None
) -> bool:
    """Replace the numbers of a row; without any, delete the row. Return whether anything changed."""
    arguments = {"queue": queue, "kind": kind, **numbers, "reason": reason, "actor": actor}
    return bool(call_verb(conn, "set_limit", arguments))


def is_known(conn: Conn, queue: str, kind: str | None) -> bool:
    """Return whether batches or live workers of the queue (with a *kind*: of that kind in it) are known."""
    return fetch_value(
        conn,
        bool,
        """
        SELECT EXISTS (SELECT 1 FROM batchq.workers w
                       WHERE w.heartbeat_at > now() - interval '1 minute'
                         AND %(queue)s = ANY (w.queues)
                         AND (%(kind)s::text IS NULL OR %(kind)s = ANY (w.kinds)))
            OR EXISTS (SELECT 1 FROM batchq.queues q
                       WHERE q.queue = %(queue)s
                         AND (%(kind)s::text IS NULL OR q.kind = %(kind)s))
        """,
        {"queue": queue, "kind": kind},
    )
