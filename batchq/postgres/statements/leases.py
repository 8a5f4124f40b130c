"""Leases: extended, expired, rescued."""

from collections.abc import Iterable, Sequence
from typing import LiteralString, NamedTuple
from uuid import UUID

from batchq.postgres.statements.running import Conn, Statement, every


class Leases(NamedTuple):
    """What became of leases, as (id, claim token); one that is neither is that of a locked row, see `extend`."""

    extended: set[tuple[int, UUID]]
    lost: set[tuple[int, UUID]]


EXTEND: LiteralString = """
WITH given AS (
  SELECT u.id, u.token
  FROM unnest(%(ids)s::bigint[], %(tokens)s::uuid[]) AS u(id, token)
), mine AS (
  SELECT b.id
  FROM batchq.batches_live b
  JOIN given ON b.id = given.id AND b.claim_token = given.token
  WHERE b.queue = %(queue)s
    AND b.id = ANY (%(ids)s::bigint[])
  FOR UPDATE OF b SKIP LOCKED
), extended AS (
  UPDATE batchq.batches_live b
  SET lease_expires_at = now() + %(lease_seconds)s::float8 * interval '1 second'
  WHERE b.queue = %(queue)s
    AND b.id = ANY (ARRAY(SELECT id FROM mine))
  RETURNING b.id, b.claim_token
)
SELECT given.id, given.token, extended.id IS NOT NULL AS is_extended
FROM given
LEFT JOIN extended ON extended.id = given.id AND extended.claim_token = given.token
LEFT JOIN LATERAL (
  SELECT true AS is_ours
  FROM batchq.batches_live b
  WHERE b.queue = %(queue)s
    AND b.id = given.id
    AND b.claim_token = given.token
  LIMIT 1  -- keeps the planner from reading the whole table to hash it
) held ON true
WHERE extended.id IS NOT NULL
   OR held.is_ours IS NULL
"""


def extend(queue: str, ids: Sequence[int], tokens: Sequence[UUID], lease_seconds: float) -> Statement:
    """Return the statement that extends leases; `leases` tells from its rows what became of them.

    A row that is locked is passed over, and waits for the next round: its lock is the finish or the checkpoint of our
    own process, and two statements that lock many rows in different orders would deadlock.
    """
    return EXTEND, {"queue": queue, "ids": list(ids), "tokens": list(tokens), "lease_seconds": lease_seconds}


def leases(rows: Iterable[tuple[int, UUID, bool]]) -> Leases:
    """Return which leases were extended, and which batches are no longer ours, from the rows of `extend`."""
    found = list(rows)
    return Leases(
        extended={(batch_id, token) for batch_id, token, is_extended in found if is_extended},
        lost={(batch_id, token) for batch_id, token, is_extended in found if not is_extended},
    )


RESCUE: LiteralString = """
WITH expired AS (
  SELECT id, attempt < max_attempts AS again
  FROM batchq.batches_live
  WHERE queue = %(queue)s
    AND status = 'processing'
    AND lease_expires_at > to_timestamp(%(after)s)
    AND lease_expires_at < now()
    AND id <> ALL (%(skipped)s::bigint[])
    AND (%(only)s::bigint[] IS NULL OR id = ANY (%(only)s::bigint[]))
  ORDER BY lease_expires_at
  LIMIT %(limit)s
  FOR UPDATE SKIP LOCKED
), freed AS (
  UPDATE batchq.batches_live b
  SET status = 'pending',
      run_at = CASE WHEN b.attempt < 2 THEN b.run_at
                    ELSE now() + interval '1 second' * random() * 2 ^ least(b.attempt, 8) * %(spread_seconds)s END,
      claimed_by = NULL,
      claim_token = NULL,
      claimed_at = NULL,
      lease_expires_at = NULL,
      errors = batchq.append_error(b.errors, b.attempt, jsonb_build_object('error',
        format('worker died: %%s gave no sign of life until its lease ran out', b.claimed_by)))
  WHERE b.queue = %(queue)s
    AND b.id = ANY (ARRAY(SELECT id FROM expired WHERE again))
  RETURNING b.id, b.kind, b.attempt, b.status
), gone AS (
  DELETE FROM batchq.batches_live b
  WHERE b.queue = %(queue)s
    AND b.id = ANY (ARRAY(SELECT id FROM expired WHERE NOT again))
  RETURNING b.*
), dead AS (
  INSERT INTO batchq.batches_finished (id, queue, kind, status, payload, items, priority, run_at, unique_key,
    max_attempts, max_failed_items, timeout_seconds, attempt, claimed_by, claimed_at, items_total, items_done,
    items_failed, cursor, errors, created_at, finished_at, trace_context)
  OVERRIDING SYSTEM VALUE
  SELECT id, queue, kind, 'failed', payload, items, priority, run_at, unique_key, max_attempts,
    max_failed_items, timeout_seconds, attempt, claimed_by, claimed_at, items_total, items_done, items_failed, cursor,
    batchq.append_error(errors, attempt, jsonb_build_object('error',
      format('worker died: %%s gave no sign of life until its lease ran out; no attempts left', claimed_by))),
    created_at, now(), trace_context
  FROM gone
  RETURNING id, kind, attempt, status
)
SELECT id, kind, attempt, status FROM freed
UNION ALL
SELECT id, kind, attempt, status FROM dead
"""


def rescue(
    conn: Conn,
    queue: str,
    limit: int,
    spread_seconds: float = 0,
    after: float = float("-inf"),
    skipped: Sequence[int] = (),
    only: Sequence[int] | None = None,
) -> list[tuple[int, str, int, str]]:
    """Take back up to *limit* batches whose lease ran out; return id, kind, attempt and new status of each.

    Of leases that ran out behind *after*, in seconds since 1970: while a snapshot is held, all that were ever given are
    in the index still.

    The attempt stays counted: a batch that kills its worker ends as failed when its attempts are used up. One that is
    rescued for the first time is ready at once; one whose worker died again waits for a random part of *spread_seconds*
    * 2^attempt: so those that were in hand beside a batch that kills its worker are not beside it every time.

    *skipped* are left out; *only*: of these alone.
    """
    parameters = {
        "queue": queue,
        "limit": limit,
        "spread_seconds": spread_seconds,
        "after": after,
        "skipped": list(skipped),
        "only": None if only is None else list(only),
    }
    return every(conn, RESCUE, parameters)


EXPIRED: LiteralString = """
SELECT id
FROM batchq.batches_live
WHERE queue = %(queue)s
  AND status = 'processing'
  AND lease_expires_at > to_timestamp(%(after)s)
  AND lease_expires_at < now()
  AND id <> ALL (%(skipped)s::bigint[])
ORDER BY lease_expires_at
LIMIT %(limit)s
"""


def expired(queue: str, limit: int, after: float, skipped: Sequence[int]) -> Statement:
    """Return the statement that returns the ids of the batches that a `rescue` with these arguments would take back."""
    return EXPIRED, {"queue": queue, "limit": limit, "after": after, "skipped": list(skipped)}


LEASE_PROBE: LiteralString = """
SELECT date_part('epoch', now()), date_part('epoch', start.at),
  (SELECT true
   FROM batchq.batches_live
   WHERE queue = %(queue)s
     AND status = 'processing'
     AND lease_expires_at > start.at
     AND lease_expires_at < now()
   ORDER BY lease_expires_at  -- by its index: without, a plan may count on meeting one soon, and read them all
   LIMIT 1) IS NOT NULL
FROM (SELECT greatest(to_timestamp(%(after)s),
                      (SELECT at
                       FROM batchq.positions
                       WHERE index = 'lease'
                         AND queue = %(queue)s
                         AND %(after)s = '-infinity'::float8)) AS at) AS start
"""


def lease_probe(queue: str, after: float) -> Statement:
    """Return the statement that returns whether any lease has expired since *after*: the time now, where the probe
    began, and the answer; times in seconds since 1970. From minus infinity it begins at the row of batchq.positions."""
    return LEASE_PROBE, {"queue": queue, "after": after}
