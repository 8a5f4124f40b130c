"""Flows: follow what waits for what has ended, and read who waits for whom."""

from typing import Any, LiteralString

from batchq.postgres.statements.running import Conn, Statement, fetch_all, fetch_json, fetch_value

FOLLOW: LiteralString = "SELECT seen, released, last_id, left_over FROM batchq.follow_flows(%(after)s, %(most)s)"
# One row at most, and an index that is read from a known id on: what was done before is not walked over.
HAS_EVENTS: LiteralString = (
    "(SELECT true FROM batchq.flow_events WHERE id > %(after_event)s ORDER BY id LIMIT 1) IS NOT NULL"
)


def follow(after: int, most: int) -> Statement:
    """Return the statement that does what the next events ask for. It returns how many events it saw, how many batches
    it made pending, the id of the last event (null without any), and how many events it left because of locks."""
    return FOLLOW, {"after": after, "most": most}


def collect(conn: Conn, most: int) -> int:
    """Write down up to *most* ends of batches, and up to *most* beginnings of waits, that no trigger has; return how
    many. See batchq.collect_flows."""
    return fetch_value(conn, int, "SELECT batchq.collect_flows(%(most)s)", {"most": most})


def has_events(conn: Conn) -> bool:
    """Return whether workers still have something to do for flows."""
    return fetch_value(conn, bool, f"SELECT {HAS_EVENTS}", {"after_event": 0})


def needed(conn: Conn, batch_id: int) -> list[tuple[int, str | None, str | None, str | None]]:
    """Return id, kind, status and result (JSON text) of each batch that a batch waited for, by id."""
    return fetch_all(
        conn,
        """
        WITH n AS MATERIALIZED (
          SELECT needed_id, ended_as
          FROM batchq.needs
          WHERE batch_id = %(id)s
        ), b AS MATERIALIZED (
          SELECT id, kind, status, result
          FROM batchq.all_batches
          WHERE id = ANY (ARRAY(SELECT needed_id FROM n))
        )
        SELECT n.needed_id, b.kind, coalesce(n.ended_as, b.status), b.result::text
        FROM n
        LEFT JOIN b ON b.id = n.needed_id
        ORDER BY n.needed_id
        """,
        {"id": batch_id},
    )


def needs_rows(conn: Conn, batch_id: int, limit: int) -> list[dict[str, Any]]:
    """Return what a batch waits for, as JSON objects: first what has failed, then what has not ended."""
    return fetch_json(
        conn,
        """
        SELECT jsonb_build_object('id', n.needed_id, 'queue', s.queue, 'kind', s.kind,
                                  'status', coalesce(s.status, n.ended_as), 'on_failure', n.on_failure)
        FROM (SELECT *
              FROM batchq.needs
              WHERE batch_id = %(id)s
              ORDER BY ended_as IS NOT DISTINCT FROM 'completed', ended_as IS NULL, needed_id
              LIMIT %(limit)s) n
        LEFT JOIN batchq.status s ON s.id = n.needed_id
        ORDER BY n.ended_as IS NOT DISTINCT FROM 'completed', n.ended_as IS NULL, n.needed_id
        """,
        {"id": batch_id, "limit": limit},
    )


def dependent_rows(conn: Conn, batch_id: int, limit: int) -> list[dict[str, Any]]:
    """Return which batches wait, or have waited, for a batch, as JSON objects, by id."""
    return fetch_json(
        conn,
        """
        SELECT jsonb_build_object('id', n.batch_id, 'queue', s.queue, 'kind', s.kind, 'status', s.status,
                                  'needs_left', s.needs_left, 'on_failure', n.on_failure)
        FROM (SELECT *
              FROM batchq.needs
              WHERE needed_id = %(id)s
              ORDER BY needed_id, batch_id
              LIMIT %(limit)s) n
        LEFT JOIN batchq.status s ON s.id = n.batch_id
        ORDER BY n.batch_id
        """,
        {"id": batch_id, "limit": limit},
    )


def flow_edges(conn: Conn, batch_id: int, limit: int) -> list[tuple[int, int, str, str | None]]:
    """Return who waits for whom around a batch: the needed id, the waiting id, on_failure, and how the needed one
    ended. Up to *limit* batches."""
    return fetch_all(
        conn,
        "SELECT needed_id, batch_id, on_failure, ended_as FROM batchq.flow(%(id)s, %(limit)s)",
        {"id": batch_id, "limit": limit},
    )


def flow_batches(conn: Conn, ids: list[int]) -> list[dict[str, Any]]:
    """Return id, queue, kind, status and what is left to wait for of batches, as JSON objects, by id."""
    return fetch_json(
        conn,
        """
        SELECT jsonb_build_object('id', id, 'queue', queue, 'kind', kind, 'status', status, 'needs_left', needs_left)
        FROM batchq.status
        WHERE id = ANY (%(ids)s::bigint[])
        ORDER BY id
        """,
        {"ids": ids},
    )
