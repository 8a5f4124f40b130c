"""What tests of programs that use batchq ask and change: batches to run, what is enqueued, the time, test databases."""

from collections.abc import Sequence
from typing import LiteralString

from psycopg import sql

from batchq.postgres.statements.running import Conn, Statement, fetch_one_or_none

# Without a key: those with one are found by batchq.ready_of_keys.
NEXT_READY_BATCH: LiteralString = """
SELECT queue, id
FROM batchq.batches_live
WHERE queue = ANY (%(queues)s)
  AND status = 'pending'
  AND key IS NULL
  AND run_at <= now()
  AND kind = ANY (%(kinds)s)
ORDER BY priority, run_at, id
LIMIT 1
FOR UPDATE SKIP LOCKED
"""


def next_ready(conn: Conn, queues: Sequence[str], kinds: list[str]) -> tuple[str, int] | None:
    """Return the stored queue and the id of the batch without a key that a worker would begin next, and lock it; None
    if none is ready."""
    row = fetch_one_or_none(conn, NEXT_READY_BATCH, {"queues": list(queues), "kinds": kinds})
    return (row[0], row[1]) if row else None


# In a transaction that stays open, now() stays behind the clock, and with it what counts as ready.
CATCH_UP: LiteralString = """
UPDATE batchq.batches_live
SET run_at = now()
WHERE queue = ANY (%(queues)s)
  AND status = 'pending'
  AND run_at > now()
  AND run_at <= clock_timestamp()
"""


def catch_up(conn: Conn, queues: Sequence[str]) -> None:
    """Let batches be ready that became ready after this transaction began."""
    conn.execute(CATCH_UP, {"queues": list(queues)})


# As text, which every driver returns alike.
ENQUEUED: LiteralString = """
SELECT jsonb_build_object('id', id, 'kind', kind, 'queue', batchq.whole_queue(queue), 'status', status,
    'payload', payload, 'items', items, 'key', key, 'unique_key', unique_key, 'priority', priority, 'run_at', run_at,
    'delay_seconds', date_part('epoch', run_at - created_at), 'attempt', attempt, 'max_attempts', max_attempts,
    'after', to_jsonb(after))::text
FROM batchq.batches_live
WHERE status IN ('pending', 'waiting')
  AND part_of IS NULL
ORDER BY id
"""


def enqueued() -> Statement:
    """Return the statement that returns the batches that have not begun or wait for another attempt, as JSON."""
    return ENQUEUED, {}


# A distributed Postgres updates its tables only by their queues.
QUEUES: LiteralString = """
SELECT queue FROM batchq.all_batches
UNION
SELECT queue FROM batchq.failed_items
"""
# One statement, so that it is one transaction on every connection. Rows of batches_finished move to the partition of
# their new day. Positions in the index are forgotten: batches now sort before them.
TRAVEL: LiteralString = """
WITH given AS MATERIALIZED (
  SELECT %(seconds)s::float8 * interval '1 second' AS span
), live AS (
  UPDATE batchq.batches_live
  SET run_at = run_at - span, created_at = created_at - span, claimed_at = claimed_at - span,
      lease_expires_at = lease_expires_at - span
  FROM given
  WHERE batches_live.queue = ANY (%(queues)s)
), finished AS (
  UPDATE batchq.batches_finished
  SET run_at = run_at - span, created_at = created_at - span, claimed_at = claimed_at - span,
      finished_at = finished_at - span
  FROM given
  WHERE batches_finished.queue = ANY (%(queues)s)
), items AS (
  UPDATE batchq.failed_items
  SET run_at = run_at - span, failed_at = failed_at - span
  FROM given
  WHERE failed_items.queue = ANY (%(queues)s)
), schedules AS (
  UPDATE batchq.schedules
  SET next_at = next_at - span, last_at = last_at - span, changed_at = changed_at - span
  FROM given
), throttles AS (
  UPDATE batchq.throttles
  SET until = until - span, throttled_at = throttled_at - span
  FROM given
), pauses AS (
  UPDATE batchq.pauses
  SET until = until - span, paused_at = paused_at - span
  FROM given
), shares AS (
  UPDATE batchq.limit_shares
  SET refreshed_at = refreshed_at - span
  FROM given
), needs AS (
  UPDATE batchq.needs
  SET at = at - span
  FROM given
  WHERE needs.queue = ANY (%(queues)s)
), parts AS (
  UPDATE batchq.parts
  SET at = at - span
  FROM given
), audit AS (
  UPDATE batchq.audit
  SET at = at - span
  FROM given
), positions AS (
  DELETE FROM batchq.positions
)
SELECT 1 FROM given
"""


def queues() -> Statement:
    """Return the statement that returns the queues that have batches, or failed items."""
    return QUEUES, {}


def travel(seconds: float, queues: Sequence[str]) -> Statement:
    """Return the statement that moves every stored time of batches in some queues, schedules, limits and flows back."""
    return TRAVEL, {"seconds": float(seconds), "queues": list(queues)}


def create_database(conn: Conn, name: str, template: str) -> None:
    """Create a database as a copy of *template*, by copying its files: faster than by the log if it is small."""
    statement = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy")
    conn.execute(statement.format(sql.Identifier(name), sql.Identifier(template)))


def drop_database(conn: Conn, name: str) -> None:
    """Drop a database, if it is there, and end its sessions."""
    conn.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))
