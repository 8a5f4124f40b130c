"""The claim, and what gives it back."""

from collections.abc import Sequence
from typing import Any, LiteralString, NamedTuple
from uuid import UUID

import psycopg

from batchq.postgres.statements.running import Conn, Statement


class Position(NamedTuple):
    """A place in the order of claims within a queue and priority: run_at in seconds since 1970, then the id."""

    run_at: float
    id: int


START = Position(float("-inf"), 0)
END = Position(float("inf"), 0)


class ClaimedRow(NamedTuple):
    """What a claim returns of a batch. Large payloads and cursors are left out (None) and fetched at the start.

    run_at: in seconds since 1970, for the position of the next claim.
    """

    id: int
    kind: str
    attempt: int
    max_attempts: int
    payload: str | None
    cursor: str | None
    items_total: int | None
    items_done: int
    items_failed: int
    max_failed_items: int
    timeout_seconds: int | None
    run_at: float
    trace_context: str | None = None

    @property
    def position(self) -> Position:
        """Its place in the order of claims."""
        return Position(self.run_at, self.id)


def bounds(after: Position, until: Position) -> dict[str, Any]:
    """Return the parameters for a part of the order of claims."""
    return {"after_run_at": after.run_at, "after_id": after.id, "until_run_at": until.run_at, "until_id": until.id}


# The scan starts behind the position of the last claim: what lies before it is claimed, and its entries in the index
# stay, dead, for as long as anybody holds a snapshot. What is compressed in the row counts as large: 1,000 bytes may
# stand for 90,000, and a claim has up to 2,000 rows.
CLAIM: LiteralString = """
WITH ready AS (
  SELECT id
  FROM batchq.batches_live
  WHERE queue = %(queue)s
    AND status = 'pending'
    AND priority = %(priority)s
    AND (run_at, id) > (to_timestamp(%(after_run_at)s), %(after_id)s::bigint)
    AND (run_at, id) <= (to_timestamp(%(until_run_at)s), %(until_id)s::bigint)
    AND run_at <= now()
    AND kind = ANY (%(kinds)s)
  ORDER BY run_at, id
  LIMIT %(limit)s
  FOR UPDATE SKIP LOCKED
)
UPDATE batchq.batches_live b
SET status = 'processing',
    attempt = b.attempt + 1,
    claimed_by = %(worker)s,
    claim_token = %(token)s,
    claimed_at = now(),
    lease_expires_at = now() + %(lease_seconds)s::float8 * interval '1 second'
WHERE b.queue = %(queue)s
  AND b.id = ANY (ARRAY(SELECT id FROM ready))
RETURNING b.id, b.kind, b.attempt, b.max_attempts,
  CASE WHEN pg_column_size(b.payload) + coalesce(pg_column_size(b.cursor), 0) <= %(most_bytes)s
        AND num_nonnulls(pg_column_compression(b.payload), pg_column_compression(b.cursor)) = 0
       THEN b.payload::text END,
  CASE WHEN pg_column_size(b.payload) + coalesce(pg_column_size(b.cursor), 0) <= %(most_bytes)s
        AND num_nonnulls(pg_column_compression(b.payload), pg_column_compression(b.cursor)) = 0
       THEN b.cursor::text END,
  b.items_total, b.items_done, b.items_failed, b.max_failed_items, b.timeout_seconds, date_part('epoch', b.run_at),
  CASE WHEN %(most_bytes)s > 0 THEN b.trace_context END
"""
MOST_CLAIMED_BYTES = 1000  # of payload and cursor
# How the server refuses to send a text: bytes that are none in its encoding, or a letter that UTF-8 does not have.
UNREADABLE = (psycopg.errors.CharacterNotInRepertoire, psycopg.errors.UntranslatableCharacter)
# The same without batches that the database refused to change.
CLAIM_SKIPPING: LiteralString = CLAIM.replace(
    "AND run_at <= now()", "AND run_at <= now()\n    AND id <> ALL (%(skipped)s)"
)


def claim(
    queue: str,
    priority: int,
    kinds: Sequence[str],
    limit: int,
    worker: str,
    token: UUID,
    lease_seconds: float,
    after: Position = START,
    until: Position = END,
    skipped: Sequence[int] = (),
) -> Statement:
    """Return the statement that takes up to *limit* ready batches of one queue and priority, the oldest first, behind
    one position and up to another; it counts the attempt, and returns the columns of `ClaimedRow`.

    Batches that another claim has locked are passed over, never waited for; *skipped* are left out.
    """
    statement, more = (CLAIM_SKIPPING, {"skipped": list(skipped)}) if skipped else (CLAIM, {})
    return statement, more | {
        "queue": queue,
        "priority": priority,
        "kinds": list(kinds),
        "limit": limit,
        "worker": worker,
        "token": token,
        "lease_seconds": lease_seconds,
        "most_bytes": MOST_CLAIMED_BYTES,
        **bounds(after, until),
    }


def without_inputs(claim: Statement) -> Statement:
    """Return a `claim` that leaves out every payload and cursor: nothing that a producer has written is sent."""
    return claim[0], claim[1] | {"most_bytes": 0}


def give_back_claim(conn: Conn, queue: str, token: UUID) -> int:
    """Give back whatever was claimed under *token*: after a claim whose COMMIT was cut off. Returns how many."""
    return conn.execute(
        """
        UPDATE batchq.batches_live
        SET status = 'pending',
            attempt = greatest(attempt - 1, 0),
            claimed_by = NULL,
            claim_token = NULL,
            claimed_at = NULL,
            lease_expires_at = NULL
        WHERE queue = %(queue)s
          AND status = 'processing'
          AND claim_token = %(token)s
        """,
        {"queue": queue, "token": token},
    ).rowcount
