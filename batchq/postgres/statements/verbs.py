"""Verbs, on one batch and in bulk; pauses, the audit, and the grants of a duty."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from psycopg.rows import tuple_row
from psycopg.sql import SQL, Identifier, Placeholder

from batchq.postgres.statements.running import Conn, fetch_all, fetch_json, fetch_one, fetch_value


def call_verb(conn: Conn, function: str, arguments: Mapping[str, Any]) -> Any:
    """Call the SQL function of a verb; return its answer.

    *delay_seconds* is until so long from now. None is left out, so that the function's default applies.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    passed = [
        SQL("until => now() + {} * interval '1 second'").format(Placeholder(name))
        if name == "delay_seconds"
        else SQL("{} => {}").format(Identifier(name), Placeholder(name))
        for name in given
    ]
    statement = SQL("SELECT batchq.{}({})").format(Identifier(function), SQL(", ").join(passed))
    [(answer,)] = conn.cursor(row_factory=tuple_row).execute(statement, given).fetchall()
    return answer


def enqueue_copy(
    conn: Conn,
    batch_id: int,
    queue: str,
    priority: int,
    delay_seconds: float,
    payload: str | None,
    reason: str | None,
    actor: str | None,
) -> int | None:
    """Enqueue a batch like another one; return its id, None if there is no such batch.

    *payload*: JSON text, None: that of the other batch. Raises RaiseException for a part of a batch and for too many
    items, and IntegrityError for what the table refuses.
    """
    [made] = fetch_one(
        conn,
        """
        SELECT batchq.enqueue_copy(%(id)s::bigint, %(payload)s::text::jsonb, %(queue)s::text, %(priority)s::integer,
                                   %(delay_seconds)s::float8 * interval '1 second', %(reason)s::text, %(actor)s::text)
        """,
        {"id": batch_id, "payload": payload, "queue": queue, "priority": priority, "delay_seconds": delay_seconds,
         "reason": reason, "actor": actor},
    )  # fmt: skip
    return None if made is None else int(made)


class BulkStep(NamedTuple):
    """What one step of a bulk did. next_place: where the next one begins, None at the end.

    keyed: how many were left unchanged because a live batch has their unique_key.
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


def bulk_step(conn: Conn, arguments: Mapping[str, Any]) -> BulkStep:
    """Call batchq.bulk: do a verb to the next batches that match. *arguments*: all of that function's."""
    row = fetch_one(
        conn,
        """
        SELECT matched, changed, next_place::text, audit, keyed
        FROM batchq.bulk(%(verb)s, %(filter)s::jsonb, %(change)s::jsonb, %(place)s::jsonb, %(dry_run)s, %(most)s,
                         %(reason)s, %(actor)s, %(audit_id)s)
        """,
        {**arguments, "filter": json.dumps(arguments["filter"]), "change": json.dumps(arguments["change"])},
    )
    return BulkStep(*row)


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


def is_audited(conn: Conn, batch_id: int) -> bool:
    """Return whether this transaction has recorded an action on a batch: a verb does if it changed anything."""
    return fetch_value(
        conn,
        bool,
        "SELECT EXISTS (SELECT 1 FROM batchq.audit WHERE batch_id = %(id)s AND at = now())",
        {"id": batch_id},
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


def changed_now(conn: Conn, batch_id: int) -> int:
    """Return how many batches the verb of this transaction has changed: batchq.audit has a row of *batch_id*."""
    count: int = fetch_one(
        conn,
        "SELECT coalesce(sum(a.batches), 0)::bigint FROM batchq.audit a WHERE a.batch_id = %(id)s AND a.at = now()",
        {"id": batch_id},
    )[0]
    return count
