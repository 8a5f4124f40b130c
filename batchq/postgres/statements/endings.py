"""How batches finish, complete, or become pending again: many in one fenced statement."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import LiteralString, NamedTuple
from uuid import UUID

from batchq.postgres.statements.running import Statement, array_text

# The columns that a batch keeps when it moves from batches_live to batches_finished. The others change with its status
# (status, finished_at), may change with it (items_done, result, errors), belong to a claim (claim_token,
# lease_expires_at), or say nothing of a batch that ran (needs_left).
KEPT: LiteralString = """id, queue, kind, payload, items, priority, run_at, unique_key, max_attempts, max_failed_items,
  timeout_seconds, attempt, claimed_by, claimed_at, items_total, items_failed, cursor, created_at, trace_context, key,
  after, on_failure, is_needed, spread, part_of"""
# An id is negative if other batches wait for this one.
_ID: LiteralString = "CASE WHEN is_needed THEN -id ELSE id END"
# DELETE and INSERT, because updating the partition key raises 40001 in every session that waits for the row. No
# "AND status = 'processing'": with it the planner picks the lease index and walks its dead entries. The INSERT names
# batches_finished, so that the bell, a trigger on batchq.batches, does not fire.
FINISH: LiteralString = f"""
WITH gone AS (
  DELETE FROM batchq.batches_live b
  USING unnest(%(ids)s::bigint[], %(tokens)s::uuid[], %(statuses)s::text[], %(results)s::jsonb[], %(errors)s::jsonb[],
               %(all_done)s::boolean[]) AS u(id, token, new_status, new_result, new_error, all_done)
  WHERE b.queue = %(queue)s
    AND b.id = ANY (%(ids)s::bigint[])
    AND b.id = u.id
    AND b.claim_token = u.token
  RETURNING b.*, u.new_status, u.new_result, u.new_error, u.all_done
)
INSERT INTO batchq.batches_finished ({KEPT},
  status, items_done, result, errors, finished_at)
OVERRIDING SYSTEM VALUE
SELECT {KEPT},
  new_status, CASE WHEN all_done THEN coalesce(items_total, 0) - items_failed ELSE items_done END, new_result,
  CASE WHEN new_error IS NULL THEN errors ELSE batchq.append_error(errors, attempt, new_error) END,
  pg_catalog.clock_timestamp()
FROM gone
RETURNING {_ID}
"""  # noqa: S608 (constants)
# The same for batches that completed without a result: most, and a fifth cheaper.
COMPLETE: LiteralString = f"""
WITH given AS (
  SELECT pg_catalog.generate_series(first, first + length - 1) AS id, number
  FROM unnest(%(firsts)s::bigint[], %(lengths)s::integer[], %(numbers)s::integer[]) AS run(first, length, number)
), gone AS (
  DELETE FROM batchq.batches_live b
  USING given
  WHERE b.queue = %(queue)s
    AND b.id = ANY ((SELECT pg_catalog.array_agg(id) FROM given)::bigint[])
    AND b.id = given.id
    AND b.claim_token = (%(tokens)s::uuid[])[given.number]
  RETURNING b.*
)
INSERT INTO batchq.batches_finished ({KEPT},
  status, items_done, errors, finished_at)
OVERRIDING SYSTEM VALUE
SELECT {KEPT},
  'completed', items_done, errors, pg_catalog.clock_timestamp()
FROM gone
RETURNING {_ID}
"""  # noqa: S608 (constants)
# Deletes completed batches instead of keeping them. A batch may complete with up to max_failed_items failed items; a
# function deletes those, since this statement does not see what a checkpoint committed while it waited for it.
COMPLETE_AND_FORGET: LiteralString = f"""
WITH given AS (
  SELECT pg_catalog.generate_series(first, first + length - 1) AS id, number
  FROM unnest(%(firsts)s::bigint[], %(lengths)s::integer[], %(numbers)s::integer[]) AS run(first, length, number)
), gone AS (
  DELETE FROM batchq.batches_live b
  USING given
  WHERE b.queue = %(queue)s
    AND b.id = ANY ((SELECT pg_catalog.array_agg(id) FROM given)::bigint[])
    AND b.id = given.id
    AND b.claim_token = (%(tokens)s::uuid[])[given.number]
  RETURNING b.id, b.queue, b.items_failed, b.is_needed
)
SELECT {_ID}
FROM gone
WHERE items_failed = 0
   OR batchq.forget_failed_items(queue, id)
"""  # noqa: S608 (constants)
# The same for a distributed Postgres, where a statement calls no function that writes.
COMPLETE_AND_FORGET_DISTRIBUTED: LiteralString = """
SELECT id
FROM batchq.complete_and_forget(%(queue)s, %(firsts)s::bigint[], %(lengths)s::integer[], %(numbers)s::integer[],
  %(tokens)s::uuid[]) AS id
"""


class Finish(NamedTuple):
    """A batch to finish. *status*: completed, failed or cancelled; *result* and *error*: JSON text; *all_done*: count
    every item that did not fail as done."""

    id: int
    token: UUID
    status: str
    result: str | None = None
    error: str | None = None
    all_done: bool = False


def finish(queue: str, finishes: Sequence[Finish]) -> Statement:
    """Return the fenced statement that moves batches to their final status.

    It returns the ids whose claim was held, negative for those that others wait for.
    """
    ids, tokens, statuses, results, errors, all_done = zip(*finishes, strict=True)
    return FINISH, {
        "queue": queue,
        "ids": list(ids),
        "tokens": list(tokens),
        "statuses": list(statuses),
        "results": list(results),
        "errors": list(errors),
        "all_done": list(all_done),
    }


def complete(
    queue: str, ids: Sequence[int], tokens: Sequence[str], keep: bool = True, is_distributed: bool = False
) -> Statement:
    """Return the fenced statement that completes batches without a result or, unless *keep*, deletes them.

    It returns the ids whose claim was held, negative for those that others wait for. *tokens* are texts; few are
    different, so each is sent once. Consecutive ids are sent as one run, so that thousands fit into one message: pass
    *ids* in ascending order.
    """
    numbers = {token: number for number, token in enumerate(dict.fromkeys(tokens), 1)}
    starts = [index for index, is_start in enumerate(starts_of_runs(ids, tokens)) if is_start]
    forget = COMPLETE_AND_FORGET_DISTRIBUTED if is_distributed else COMPLETE_AND_FORGET
    return COMPLETE if keep else forget, {
        "queue": queue,
        "firsts": array_text(ids[index] for index in starts),
        "lengths": array_text(end - start for start, end in pairwise([*starts, len(ids)])),
        "numbers": array_text(numbers[tokens[index]] for index in starts),
        "tokens": array_text(numbers),
    }


def starts_of_runs(ids: Sequence[int], tokens: Sequence[str]) -> Iterator[bool]:
    """Yield for each batch whether it begins a run: its id does not follow the last one's, or its token differs."""
    expected, same = None, None
    for batch_id, token in zip(ids, tokens, strict=True):
        yield batch_id != expected or token != same
        expected, same = batch_id + 1, token


LOCKED: LiteralString = """
WITH free AS (
  SELECT id
  FROM batchq.batches_live
  WHERE queue = %(queue)s
    AND id = ANY (%(ids)s::bigint[])
  FOR UPDATE SKIP LOCKED
)
SELECT id
FROM batchq.batches_live
WHERE queue = %(queue)s
  AND id = ANY (%(ids)s::bigint[])
  AND id <> ALL (ARRAY(SELECT id FROM free))
"""


def locked(queue: str, ids: Sequence[int]) -> Statement:
    """Return the statement that returns the ids of the batches whose rows another session has locked, without waiting.

    For a finish whose wait for a lock timed out: rows that this statement does not return are free, or gone.
    """
    return LOCKED, {"queue": queue, "ids": list(ids)}


class Requeue(NamedTuple):
    """A batch to make pending again, after *delay_seconds* (None keeps its run_at). *is_release*: the attempt does not
    count."""

    id: int
    token: UUID
    delay_seconds: float | None
    is_release: bool
    error: str | None = None


REQUEUE: LiteralString = """
UPDATE batchq.batches_live b
SET status = 'pending',
    run_at = coalesce(u.run_at, b.run_at),
    attempt = greatest(b.attempt - u.is_release::integer, 0),
    claimed_by = NULL,
    claim_token = NULL,
    claimed_at = CASE WHEN b.key IS NOT NULL THEN b.claimed_at END,
    lease_expires_at = NULL,
    errors = batchq.append_error(b.errors, b.attempt, u.error)
FROM (SELECT id, token, now() + delay_seconds * interval '1 second' AS run_at, is_release, error
      FROM unnest(%(ids)s::bigint[], %(tokens)s::uuid[], %(delays)s::float8[], %(releases)s::boolean[],
                  %(errors)s::jsonb[]) AS given(id, token, delay_seconds, is_release, error)) AS u
WHERE b.queue = %(queue)s
  AND b.id = ANY (%(ids)s::bigint[])
  AND b.id = u.id
  AND b.claim_token = u.token
RETURNING b.id
"""


def requeue(queue: str, requeues: Sequence[Requeue]) -> Statement:
    """Return the fenced statement that makes batches pending again. It returns the ids whose claim was held."""
    ids, tokens, delays, releases, errors = zip(*requeues, strict=True)
    return REQUEUE, {
        "queue": queue,
        "ids": list(ids),
        "tokens": list(tokens),
        "delays": [None if delay is None else float(delay) for delay in delays],  # a list has one type
        "releases": list(releases),
        "errors": list(errors),
    }
