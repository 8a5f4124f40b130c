"""Rows for people: status, queues, failures, single batches, changes.

A row of a view becomes JSON through a subquery with OFFSET 0: otherwise a distributed Postgres names the keys f1, f2.
"""

from collections.abc import Sequence
from typing import Any, LiteralString

from batchq.postgres.statements.running import Conn, fetch_json


def failure_rows(conn: Conn) -> list[dict[str, Any]]:
    """Return the rows of batchq.failures as JSON objects, the latest first."""
    return fetch_json(
        conn,
        "SELECT to_jsonb(f) FROM (SELECT * FROM batchq.failures OFFSET 0) f ORDER BY f.latest_at DESC, f.kind, f.error",
    )


# The status of batchq.batches for each finer one of batchq.status; it excludes partitions that cannot match.
STORED_STATUS = {"ready": "pending", "scheduled": "pending", "retrying": "pending", "stalled": "processing"}
FINAL_STATUSES = ("completed", "failed", "cancelled")
HIGHEST_ID = 2**63 - 1
MOST_PROCESSING = 100_000  # batches of one queue that are searched for changes


def status_rows(
    conn: Conn, queue: str | None, kind: str | None, status: str | None, limit: int
) -> list[dict[str, Any]]:
    """Return rows of batchq.status, the newest first, as JSON objects (a date may be beyond Python's)."""
    return fetch_json(
        conn,
        """
        WITH newest AS (
          SELECT id
          FROM batchq.newest_live(%(queue)s, %(kind)s, %(status)s, %(highest_id)s, %(limit)s) AS live(id)
          UNION ALL
          (SELECT id
           FROM batchq.status
           WHERE stored_status = ANY (%(finals)s)
             AND (%(queue)s::text IS NULL OR queue = %(queue)s)
             AND (%(kind)s::text IS NULL OR kind = %(kind)s)
           ORDER BY id DESC
           LIMIT %(limit)s)
        )
        SELECT to_jsonb(s)
        FROM (SELECT *
              FROM batchq.status
              WHERE id = ANY (ARRAY(SELECT id FROM newest ORDER BY id DESC LIMIT %(limit)s))
              OFFSET 0) s
        ORDER BY s.id DESC
        """,
        {
            "queue": queue,
            "kind": kind,
            "status": status,
            "finals": [final for final in FINAL_STATUSES if status in (None, final)],
            "highest_id": HIGHEST_ID,
            "limit": limit,
        },
    )


MOST_OF_A_KEY = 100  # batches that batchq.count_keys counts: of those that wait, and of those that run


def key_rows(conn: Conn, queue: str | None, limit: int) -> list[dict[str, Any]]:
    """Return rows of batchq.keys, of the first 1,000 keys (of the queue, if given) the longest waiting, as JSON
    objects."""
    return fetch_json(
        conn,
        """
        SELECT to_jsonb(k)
        FROM (
          SELECT queue, key, waiting, scheduled, running,
            CASE WHEN oldest_at <= now() THEN now() - oldest_at END AS oldest_wait, is_estimate
          FROM batchq.count_keys(in_queue => %(queue)s::text)
        ) k
        ORDER BY k.oldest_wait DESC NULLS LAST, k.queue, k.key
        LIMIT %(limit)s
        """,
        {"queue": queue, "limit": limit},
    )


def status_row(conn: Conn, batch_id: int) -> dict[str, Any] | None:
    """Return a batch's row of batchq.status as a JSON object."""
    found = fetch_json(
        conn, "SELECT to_jsonb(s) FROM (SELECT * FROM batchq.status WHERE id = %(id)s OFFSET 0) s", {"id": batch_id}
    )
    return found[0] if found else None


def running_rows(conn: Conn, queue: str | None, kind: str | None, limit: int) -> list[dict[str, Any]]:
    """Return rows of batchq.status of processing and stalled batches, as JSON objects."""
    return fetch_json(
        conn,
        """
        WITH running AS (
          SELECT b.id
          FROM batchq.busy_queues() q
          CROSS JOIN LATERAL (
            SELECT id
            FROM batchq.batches_live
            WHERE queue = q.queue
              AND status = 'processing'
              AND lease_expires_at >= q.at
              AND (%(kind)s::text IS NULL OR kind = %(kind)s)
            ORDER BY lease_expires_at
            LIMIT %(limit)s
          ) b
          WHERE q.at IS NOT NULL
            AND (%(queue)s::text IS NULL OR q.queue = %(queue)s)
          LIMIT %(limit)s
        )
        SELECT to_jsonb(s)
        FROM (SELECT * FROM batchq.status WHERE id = ANY (ARRAY(SELECT id FROM running)) OFFSET 0) s
        """,
        {"queue": queue, "kind": kind, "limit": limit},
    )


def failed_rows(conn: Conn, queue: str | None, kind: str | None, limit: int) -> list[dict[str, Any]]:
    """Return rows of batchq.status of batches that failed within the last day, the latest first, as JSON objects."""
    return fetch_json(
        conn,
        """
        WITH failed AS (
          SELECT id
          FROM batchq.batches_finished
          WHERE status = 'failed'
            AND finished_at > now() - interval '1 day'
            AND (%(queue)s::text IS NULL OR queue = %(queue)s)
            AND (%(kind)s::text IS NULL OR kind = %(kind)s)
          ORDER BY finished_at DESC
          LIMIT %(limit)s
        )
        SELECT to_jsonb(s)
        FROM (SELECT * FROM batchq.status WHERE id = ANY (ARRAY(SELECT id FROM failed)) OFFSET 0) s
        ORDER BY s.finished_at DESC
        """,
        {"queue": queue, "kind": kind, "limit": limit},
    )


def queue_rows(conn: Conn, queue: str | None = None, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the rows of batchq.queues as JSON objects."""
    return fetch_json(
        conn,
        """
        SELECT to_jsonb(q)
        FROM (SELECT * FROM batchq.queues OFFSET 0) q
        WHERE (%(queue)s::text IS NULL OR q.queue = %(queue)s)
          AND (%(kind)s::text IS NULL OR q.kind = %(kind)s)
        ORDER BY q.queue, q.kind
        """,
        {"queue": queue, "kind": kind},
    )


def batch_object(conn: Conn, batch_id: int, inputs_as_text: bool = False) -> dict[str, Any] | None:
    """Return one batch as a JSON object: its row of batchq.status, and payload, cursor, result and errors.

    *inputs_as_text*: return payload and cursor as JSON text, for values that Python refuses to read.
    """
    found = fetch_json(
        conn,
        """
        SELECT to_jsonb(s) || jsonb_build_object(
          'payload', CASE WHEN %(as_text)s THEN to_jsonb(b.payload::text) ELSE b.payload END,
          'cursor', CASE WHEN %(as_text)s THEN to_jsonb(b.cursor::text) ELSE b.cursor END,
          'result', b.result, 'errors', b.errors,
          'max_failed_items', b.max_failed_items, 'timeout_seconds', b.timeout_seconds)
        FROM batchq.batches b
        JOIN (SELECT * FROM batchq.status WHERE id = %(id)s OFFSET 0) s ON s.id = b.id AND s.queue = b.queue
        WHERE b.id = %(id)s
        """,
        {"id": batch_id, "as_text": inputs_as_text},
    )
    return found[0] if found else None


def failed_item_objects(conn: Conn, batch_id: int, limit: int) -> list[dict[str, Any]]:
    """Return a batch's failed items in order, as JSON objects."""
    return fetch_json(
        conn,
        """
        SELECT to_jsonb(f) - 'queue' - 'batch_id'
        FROM batchq.failed_items f
        WHERE f.batch_id = %(id)s
        ORDER BY f.item_index
        LIMIT %(limit)s
        """,
        {"id": batch_id, "limit": limit},
    )


CHANGED: LiteralString = """
WITH changed AS (
  SELECT id, queue, kind, 1 AS rank FROM batchq.batches_finished WHERE finished_at >= %(since)s::timestamptz
    AND status = 'failed'
  UNION ALL
  SELECT b.id, b.queue, b.kind, CASE WHEN b.lease_expires_at < now() THEN 2 ELSE 3 END
  FROM batchq.busy_queues() q
  CROSS JOIN LATERAL (
    SELECT id, queue, kind, lease_expires_at
    FROM batchq.batches_live
    WHERE queue = q.queue
      AND status = 'processing'
      AND lease_expires_at >= q.at
    ORDER BY lease_expires_at
    LIMIT %(most_processing)s
  ) b
  WHERE q.at IS NOT NULL
  UNION ALL
  SELECT id, queue, kind, 4 FROM batchq.batches_finished WHERE finished_at >= %(since)s::timestamptz
  UNION ALL
  SELECT id, queue, kind, 5 FROM batchq.batches_live WHERE id = ANY (%(ids)s)
  UNION ALL
  SELECT id, queue, kind, 6 FROM batchq.batches_live WHERE id = ANY (ARRAY(
    SELECT new.id
    FROM batchq.newest_live(%(queue)s, %(kind)s, NULL, %(highest_id)s, %(limit)s) AS new(id)
    WHERE new.id > %(after_id)s))
), first_changed AS (
  SELECT id
  FROM changed
  WHERE (%(queue)s::text IS NULL OR queue = %(queue)s)
    AND (%(kind)s::text IS NULL OR kind = %(kind)s)
  GROUP BY id
  ORDER BY min(rank), id
  LIMIT %(limit)s
)
SELECT to_jsonb(s)
FROM (SELECT * FROM batchq.status WHERE id = ANY (ARRAY(SELECT id FROM first_changed)) OFFSET 0) s
ORDER BY s.id
"""


def changed_rows(
    conn: Conn, since: str, after_id: int, ids: Sequence[int], queue: str | None, kind: str | None, limit: int
) -> list[dict[str, Any]]:
    """Return up to *limit* rows of batchq.status: first those that failed after *since*, then stalled, processing,
    finished after *since*, named by *ids*, and new ones (with an id above *after_id*)."""
    return fetch_json(
        conn,
        CHANGED,
        {
            "since": since,
            "after_id": after_id,
            "ids": list(ids),
            "queue": queue,
            "kind": kind,
            "highest_id": HIGHEST_ID,
            "most_processing": MOST_PROCESSING,
            "limit": limit,
        },
    )


def worker_objects(conn: Conn) -> list[dict[str, Any]]:
    """Return the live workers as JSON objects."""
    return fetch_json(
        conn,
        "SELECT to_jsonb(w) FROM batchq.workers w WHERE heartbeat_at > now() - interval '1 minute' ORDER BY id",
    )
