"""Rows for people: status, queues, failures, single batches, changes.

A row of a view becomes JSON through a subquery with OFFSET 0: otherwise a distributed Postgres names the keys f1, f2.
"""

from collections.abc import Sequence
from typing import Any, LiteralString

from batchq.postgres.statements.running import Conn, fetch_json

# The status of batchq.batches for each finer one of batchq.status; it excludes partitions that cannot match.
STORED_STATUS = {"ready": "pending", "scheduled": "pending", "retrying": "pending", "stalled": "processing"}
FINAL_STATUSES = ("completed", "failed", "cancelled")
STATUSES = ("waiting", "ready", "scheduled", "retrying", "processing", "stalled", *FINAL_STATUSES)  # of batchq.status
HIGHEST_ID = 2**63 - 1
MOST_PROCESSING = 100_000  # batches of one queue that are searched for changes


# The ids of the newest batches that match. The casts are for drivers that send parameters without a type.
NEWEST: LiteralString = """
WITH newest AS (
  SELECT id
  FROM batchq.newest_live(%(queue)s::text, %(kind)s::text, %(status)s::text, %(highest_id)s::bigint,
                          %(limit)s::integer) AS live(id)
  UNION ALL
  (SELECT id
   FROM batchq.status
   WHERE stored_status = ANY (%(finals)s::text[])
     AND (%(queue)s::text IS NULL OR queue = %(queue)s::text)
     AND (%(kind)s::text IS NULL OR kind = %(kind)s::text)
   ORDER BY id DESC
   LIMIT %(limit)s::integer)
)
"""


STATUS_ROWS: LiteralString = f"""{NEWEST}
SELECT to_jsonb(s)
FROM (SELECT *
      FROM batchq.status
      WHERE id = ANY (ARRAY(SELECT id FROM newest ORDER BY id DESC LIMIT %(limit)s::integer))
      OFFSET 0) s
ORDER BY s.id DESC
"""  # noqa: S608 (constants)


def newest_parameters(queue: str | None, kind: str | None, status: str | None, limit: int) -> dict[str, Any]:
    """Return the parameters of NEWEST. *status*: as batchq.status shows it."""
    return {
        "queue": queue,
        "kind": kind,
        "status": status,
        "finals": [final for final in FINAL_STATUSES if status in (None, final)],
        "highest_id": HIGHEST_ID,
        "limit": limit,
    }


def status_rows(
    conn: Conn, queue: str | None, kind: str | None, status: str | None, limit: int
) -> list[dict[str, Any]]:
    """Return rows of batchq.status, the newest first, as JSON objects (a date may be beyond Python's)."""
    return fetch_json(conn, STATUS_ROWS, newest_parameters(queue, kind, status, limit))


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
              AND part_of IS NULL
              AND lease_expires_at >= q.at
              AND (%(kind)s::text IS NULL OR kind = %(kind)s)
            ORDER BY lease_expires_at
            LIMIT %(limit)s
          ) b
          WHERE q.at IS NOT NULL
            AND (%(queue)s::text IS NULL OR batchq.whole_queue(q.queue) = %(queue)s)
          UNION ALL
          SELECT b.id
          FROM batchq.spread_batches() AS s(id)
          JOIN batchq.batches_live b ON b.id = s.id
          WHERE (%(queue)s::text IS NULL OR batchq.whole_queue(b.queue) = %(queue)s)
            AND (%(kind)s::text IS NULL OR b.kind = %(kind)s)
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
            AND (%(queue)s::text IS NULL OR batchq.whole_queue(queue) = %(queue)s)
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
        FROM batchq.all_batches b
        JOIN (SELECT * FROM batchq.status WHERE id = %(id)s OFFSET 0) s ON s.id = b.id AND s.shard = b.queue
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
        FROM batchq.failed_items_of(%(id)s, most => %(limit)s) f
        ORDER BY f.item_index
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
      AND part_of IS NULL
      AND lease_expires_at >= q.at
    ORDER BY lease_expires_at
    LIMIT %(most_processing)s
  ) b
  WHERE q.at IS NOT NULL
  UNION ALL
  SELECT b.id, b.queue, b.kind, 3
  FROM batchq.spread_batches() AS s(id)
  JOIN batchq.batches_live b ON b.id = s.id
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
  WHERE (%(queue)s::text IS NULL OR batchq.whole_queue(queue) = %(queue)s)
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


# A worker writes its heartbeat every 5 s. "late" is after twice that: slow, suspended or dead, but not known to work.
# Two heartbeats are 10 s, also if a short lease makes the worker write more often. After a minute it counts as gone.
WORKERS: LiteralString = """
SELECT to_jsonb(w) || jsonb_build_object(
  'state', CASE
             WHEN heartbeat_at < now() - interval '1 minute' THEN 'gone'
             WHEN heartbeat_at < now() - interval '10 seconds' THEN 'late'
             WHEN stopping THEN 'stopping'
             WHEN drain_asked_at IS NOT NULL THEN 'draining'
             ELSE 'working'
           END,
  'heartbeat_seconds', extract(epoch FROM now() - heartbeat_at)::float8)
FROM (SELECT * FROM batchq.workers OFFSET 0) w
WHERE heartbeat_at > now() - interval '1 hour'
ORDER BY heartbeat_at < now() - interval '1 minute', id
LIMIT 500
"""


def worker_objects(conn: Conn) -> list[dict[str, Any]]:
    """Return the workers seen within the last hour as JSON objects, those that are gone last.

    state: working, draining, stopping; late without a heartbeat for 10 s, gone without one for a minute.
    heartbeat_seconds: the age of the last heartbeat.
    """
    return fetch_json(conn, WORKERS)


# The counts of at most 20,000 minutes of queues and kinds, as on the page's overview: a bounded read by minute.
MINUTES: LiteralString = """
SELECT jsonb_build_object('queue', m.queue, 'kind', m.kind, 'minutes_ago', m.minutes_ago, 'ended', m.ended)
FROM (
  SELECT t.queue, t.kind, (extract(epoch FROM date_trunc('minute', now()) - t.minute) / 60)::integer AS minutes_ago,
         sum(t.completed + t.failed)::bigint AS ended
  FROM batchq.throughput_minutes t
  WHERE t.minute > date_trunc('minute', now()) - interval '60 minutes'
    AND (%(queue)s::text IS NULL OR t.queue = %(queue)s)
    AND (%(kind)s::text IS NULL OR t.kind = %(kind)s)
  GROUP BY t.minute, t.queue, t.kind
  LIMIT 20000
) m
"""


def minute_rows(conn: Conn, queue: str | None = None, kind: str | None = None) -> list[dict[str, Any]]:
    """Return how many batches completed or failed in each of the last 60 minutes, by queue and kind, as JSON objects.

    minutes_ago: 0 is the current minute. ended: the number.
    """
    return fetch_json(conn, MINUTES, {"queue": queue, "kind": kind})


# Texts are cut in the database, because they may be megabytes; as JSON, a large one is not worth the time to lay out.
TEXTS: LiteralString = """
SELECT jsonb_build_object('name', field.name, 'text', left(field.text, %(most)s), 'characters', length(field.text))
FROM batchq.all_batches b
CROSS JOIN LATERAL (
  VALUES ('payload', CASE WHEN pg_column_size(b.payload) < 20000 THEN jsonb_pretty(b.payload) ELSE b.payload::text END),
         ('cursor', CASE WHEN pg_column_size(b.cursor) < 20000 THEN jsonb_pretty(b.cursor) ELSE b.cursor::text END),
         ('result', CASE WHEN pg_column_size(b.result) < 20000 THEN jsonb_pretty(b.result) ELSE b.result::text END)
) field(name, text)
WHERE b.id = %(id)s
  AND field.text IS NOT NULL
"""
ATTEMPTS: LiteralString = """
SELECT jsonb_build_object('attempt', left(e.value ->> 'attempt', 20), 'at', left(e.value ->> 'at', 19),
                          'error', left(coalesce(e.value ->> 'error', e.value::text), 2500),
                          'traceback', left(e.value ->> 'traceback', 20000))
FROM batchq.all_batches b
CROSS JOIN LATERAL jsonb_array_elements(b.errors) WITH ORDINALITY e(value, number)
WHERE b.id = %(id)s
ORDER BY e.number DESC
LIMIT 20
"""


def batch_texts(conn: Conn, batch_id: int, most: int) -> list[dict[str, Any]]:
    """Return payload, cursor and result of a batch, as far as it has them, as JSON objects.

    text: up to *most* characters of JSON, laid out if it is short. characters: how many there are.
    """
    return fetch_json(conn, TEXTS, {"id": batch_id, "most": most})


def failed_attempts(conn: Conn, batch_id: int) -> list[dict[str, Any]]:
    """Return the latest 20 failed attempts of a batch, the latest first, as JSON objects; long texts are cut."""
    return fetch_json(conn, ATTEMPTS, {"id": batch_id})


def failure_groups(conn: Conn, kind: str | None, limit: int) -> list[dict[str, Any]]:
    """Return rows of batchq.failures, the latest first, as JSON objects."""
    return fetch_json(
        conn,
        """
        SELECT to_jsonb(f)
        FROM (SELECT * FROM batchq.failures OFFSET 0) f
        WHERE %(kind)s::text IS NULL OR f.kind = %(kind)s
        ORDER BY f.latest_at DESC
        LIMIT %(limit)s
        """,
        {"kind": kind, "limit": limit},
    )
