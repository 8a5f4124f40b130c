"""Leases: extend them, find expired ones, rescue their batches."""

from collections.abc import Iterable, Sequence
from typing import LiteralString, NamedTuple
from uuid import UUID

from batchq.postgres.statements.endings import KEPT
from batchq.postgres.statements.running import Conn, Statement, fetch_all


class Leases(NamedTuple):
    """The leases that were extended or lost, as (id, claim token). The rows of all others were locked, see `extend`."""

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
    """Return the statement that extends leases; pass its rows to `leases`.

    It skips locked rows until the next round: the lock is that of a finish or checkpoint of this process, and two
    statements that lock many rows in different orders would deadlock.
    """
    return EXTEND, {"queue": queue, "ids": list(ids), "tokens": list(tokens), "lease_seconds": lease_seconds}


def leases(rows: Iterable[tuple[int, UUID, bool]]) -> Leases:
    """Return which leases were extended, and which claims are lost, from the rows of `extend`."""
    found = list(rows)
    return Leases(
        extended={(batch_id, token) for batch_id, token, is_extended in found if is_extended},
        lost={(batch_id, token) for batch_id, token, is_extended in found if not is_extended},
    )


RESCUE: LiteralString = f"""
WITH expired AS (
  SELECT id, attempt < max_attempts AS again,
    CASE WHEN attempt < 2 THEN run_at
         ELSE now() + interval '1 second' * random() * 2 ^ least(attempt, 8) * %(spread_seconds)s END AS next_run_at,
    jsonb_build_object('error', format('worker died: %%s did not renew its lease', claimed_by)) AS error
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
      run_at = expired.next_run_at,
      claimed_by = NULL,
      claim_token = NULL,
      claimed_at = CASE WHEN b.key IS NOT NULL THEN b.claimed_at END,
      lease_expires_at = NULL,
      errors = batchq.append_error(b.errors, b.attempt, expired.error)
  FROM expired
  WHERE b.queue = %(queue)s
    AND b.id = ANY (ARRAY(SELECT id FROM expired WHERE again))
    AND b.id = expired.id
  RETURNING b.id, b.kind, b.attempt, b.status
), gone AS (
  DELETE FROM batchq.batches_live b
  WHERE b.queue = %(queue)s
    AND b.id = ANY (ARRAY(SELECT id FROM expired WHERE NOT again))
  RETURNING b.*
), dead AS (
  INSERT INTO batchq.batches_finished ({KEPT},
    status, items_done, errors, finished_at)
  OVERRIDING SYSTEM VALUE
  SELECT {KEPT},
    'failed', items_done, batchq.append_error(errors, attempt, jsonb_build_object('error',
      format('worker died: %%s did not renew its lease; no attempts left', claimed_by))), now()
  FROM gone
  RETURNING id, kind, attempt, status
)
SELECT id, kind, attempt, status FROM freed
UNION ALL
SELECT id, kind, attempt, status FROM dead
"""  # noqa: S608 (constants)


def rescue(
    conn: Conn,
    queue: str,
    limit: int,
    spread_seconds: float = 0,
    after: float = float("-inf"),
    skipped: Sequence[int] = (),
    only: Sequence[int] | None = None,
) -> list[tuple[int, str, int, str]]:
    """Rescue up to *limit* batches whose lease has expired; return id, kind, attempt and new status of each.

    Only leases that expired after *after*, in seconds since 1970, are read: while any session holds a snapshot, the
    index still has all leases that were ever given.

    The attempt stays counted, so that a batch that kills its worker fails once its attempts are used up. A batch
    rescued from its first attempt is ready immediately. After later attempts it waits for a random part of
    *spread_seconds* * 2^attempt, so that it does not meet the same poison batch every time.

    *skipped* ids are left out; *only*: rescue only these ids.
    """
    parameters = {
        "queue": queue,
        "limit": limit,
        "spread_seconds": spread_seconds,
        "after": after,
        "skipped": list(skipped),
        "only": None if only is None else list(only),
    }
    return fetch_all(conn, RESCUE, parameters)


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
    """Return the statement that returns the ids of the batches that a `rescue` with these arguments would take."""
    return EXPIRED, {"queue": queue, "limit": limit, "after": after, "skipped": list(skipped)}


LEASE_PROBE: LiteralString = """
SELECT date_part('epoch', now()), date_part('epoch', start.at),
  (SELECT true
   FROM batchq.batches_live
   WHERE queue = %(queue)s
     AND status = 'processing'
     AND lease_expires_at > start.at
     AND lease_expires_at < now()
   ORDER BY lease_expires_at  -- forces its index: otherwise a plan may expect an early match, and read them all
   LIMIT 1) IS NOT NULL
FROM (SELECT greatest(to_timestamp(%(after)s),
                      (SELECT at
                       FROM batchq.positions
                       WHERE index = 'lease'
                         AND queue = %(queue)s
                         AND %(after)s = '-infinity'::float8)) AS at) AS start
"""


def lease_probe(queue: str, after: float) -> Statement:
    """Return the statement that probes whether any lease has expired since *after*. It returns the time now, where the
    probe began, and the answer; times in seconds since 1970. Minus infinity stands for the row of batchq.positions."""
    return LEASE_PROBE, {"queue": queue, "after": after}
