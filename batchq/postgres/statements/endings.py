"""How batches end: finished, completed, or back to pending, many in one fenced statement."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import LiteralString, NamedTuple
from uuid import UUID

from batchq.postgres.statements.running import Statement, array_text

# DELETE and INSERT, not an UPDATE of the partition key: that raises 40001 in whoever waits for the row. By the id
# index: with "AND status = 'processing'" the planner takes the lease index and walks its dead entries. Into the
# finished partitions by their name, so that the bell, a trigger of batchq.batches, does not ring.
FINISH: LiteralString = """
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
INSERT INTO batchq.batches_finished (id, queue, kind, status, payload, items, priority, run_at, unique_key,
  max_attempts, max_failed_items, timeout_seconds, attempt, claimed_by, claimed_at, items_total, items_done,
  items_failed, cursor, result, errors, created_at, finished_at, trace_context)
OVERRIDING SYSTEM VALUE
SELECT id, queue, kind, new_status, payload, items, priority, run_at, unique_key, max_attempts,
  max_failed_items, timeout_seconds, attempt, claimed_by, claimed_at, items_total,
  CASE WHEN all_done THEN coalesce(items_total, 0) - items_failed ELSE items_done END, items_failed, cursor,
  new_result, CASE WHEN new_error IS NULL THEN errors ELSE batchq.append_error(errors, attempt, new_error) END,
  created_at, pg_catalog.clock_timestamp(), trace_context
FROM gone
RETURNING id
"""
# The same for batches that just completed, without anything to tell: most, and a fifth cheaper.
COMPLETE: LiteralString = """
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
INSERT INTO batchq.batches_finished (id, queue, kind, status, payload, items, priority, run_at, unique_key,
  max_attempts, max_failed_items, timeout_seconds, attempt, claimed_by, claimed_at, items_total, items_done,
  items_failed, cursor, errors, created_at, finished_at, trace_context)
OVERRIDING SYSTEM VALUE
SELECT id, queue, kind, 'completed', payload, items, priority, run_at, unique_key, max_attempts,
  max_failed_items, timeout_seconds, attempt, claimed_by, claimed_at, items_total, items_done, items_failed, cursor,
  errors, created_at, pg_catalog.clock_timestamp(), trace_context
FROM gone
RETURNING id
"""
# For who keeps no completed batches. A batch may complete with failed items, within its tolerance: a function deletes
# those, since this statement does not see what a checkpoint committed while it waited for it.
COMPLETE_AND_FORGET: LiteralString = """
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
  RETURNING b.id, b.queue, b.items_failed
)
SELECT id
FROM gone
WHERE items_failed = 0
   OR batchq.forget_failed_items(queue, id)
"""


class Finish(NamedTuple):
    """A batch that ends. *status*: completed, failed or cancelled; *result* and *error*: JSON text; *all_done*: count
    every item that did not fail as done."""

    id: int
    token: UUID
    status: str
    result: str | None = None
    error: str | None = None
    all_done: bool = False


def finish(queue: str, finishes: Sequence[Finish]) -> Statement:
    """Return the fenced statement that moves batches to their final status; it returns the ids that were still ours."""
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


def complete(queue: str, ids: Sequence[int], tokens: Sequence[str], keep: bool = True) -> Statement:
    """Return the fenced statement that completes batches without a result or, unless *keep*, that deletes them.

    It returns the ids that were still ours. Tokens as text; few are different, so each is sent once. Ids that follow
    each other go as one run, so that thousands fit one message: give them in their order.
    """
    numbers = {token: number for number, token in enumerate(dict.fromkeys(tokens), 1)}
    starts = [place for place, is_start in enumerate(starts_of_runs(ids, tokens)) if is_start]
    return COMPLETE if keep else COMPLETE_AND_FORGET, {
        "queue": queue,
        "firsts": array_text(ids[place] for place in starts),
        "lengths": array_text(end - start for start, end in pairwise([*starts, len(ids)])),
        "numbers": array_text(numbers[tokens[place]] for place in starts),
        "tokens": array_text(numbers),
    }


def starts_of_runs(ids: Sequence[int], tokens: Sequence[str]) -> Iterator[bool]:
    """Tell of each batch whether it begins a run: it does not have the id that follows the last one's, or its token."""
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
    """Return the statement that returns the ids of the batches whose rows another session has locked. It waits for none
    of them. For a finish that has waited in vain: what it does not name is free, or gone."""
    return LOCKED, {"queue": queue, "ids": list(ids)}


class Requeue(NamedTuple):
    """A batch that becomes pending again, after *delay_seconds* (None keeps its run_at); *give_back* the attempt."""

    id: int
    token: UUID
    delay_seconds: float | None
    give_back: bool
    error: str | None = None


REQUEUE: LiteralString = """
UPDATE batchq.batches_live b
SET status = 'pending',
    run_at = coalesce(now() + u.delay_seconds * interval '1 second', b.run_at),
    attempt = greatest(b.attempt - u.give_back::integer, 0),
    claimed_by = NULL,
    claim_token = NULL,
    claimed_at = NULL,
    lease_expires_at = NULL,
    errors = CASE WHEN u.error IS NULL THEN b.errors ELSE batchq.append_error(b.errors, b.attempt, u.error) END
FROM unnest(%(ids)s::bigint[], %(tokens)s::uuid[], %(delays)s::float8[], %(give_backs)s::boolean[],
            %(errors)s::jsonb[]) AS u(id, token, delay_seconds, give_back, error)
WHERE b.queue = %(queue)s
  AND b.id = ANY (%(ids)s::bigint[])
  AND b.id = u.id
  AND b.claim_token = u.token
RETURNING b.id
"""


def requeue(queue: str, requeues: Sequence[Requeue]) -> Statement:
    """Return the fenced statement that makes claimed batches pending again; it returns the ids that were still ours."""
    ids, tokens, delays, give_backs, errors = zip(*requeues, strict=True)
    return REQUEUE, {
        "queue": queue,
        "ids": list(ids),
        "tokens": list(tokens),
        "delays": [None if delay is None else float(delay) for delay in delays],  # a list has one type
        "give_backs": list(give_backs),
        "errors": list(errors),
    }
