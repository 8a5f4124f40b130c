"""Checkpoints: progress, cursor and failed items, fenced by the claim token."""

from collections.abc import Sequence
from typing import Any, LiteralString, NamedTuple
from uuid import UUID

from batchq.postgres.statements.running import Statement

CHECKPOINT: LiteralString = """
WITH mine AS (
  UPDATE batchq.batches_live
  SET items_done = items_done + %(done)s,
      items_failed = items_failed + %(failed)s,
      cursor = CASE WHEN %(keeps_cursor)s THEN cursor ELSE %(cursor)s::jsonb END,
      lease_expires_at = greatest(lease_expires_at,
        pg_catalog.statement_timestamp() + %(lease_seconds)s::float8 * interval '1 second')
  WHERE queue = %(queue)s
    AND id = %(id)s
    AND claim_token = %(token)s
    AND items_done = %(done_before)s
    AND items_failed = %(failed_before)s
  RETURNING queue, id, attempt, CASE WHEN %(first_index)s::integer IS NOT NULL THEN items END AS items
), recovered AS (
  DELETE FROM batchq.failed_items f
  USING mine
  WHERE f.queue = %(queue)s
    AND f.batch_id = mine.id
    AND f.item_index = ANY (%(recovered)s::integer[])
), failure AS (
  SELECT item_index, error, retryable, pg_catalog.now() + delay_seconds * interval '1 second' AS run_at
  FROM unnest(%(indexes)s::integer[], %(errors)s::text[], %(retryables)s::boolean[], %(delays)s::float8[])
    AS u(item_index, error, retryable, delay_seconds)
), first_failures AS (
  INSERT INTO batchq.failed_items (queue, batch_id, item_index, item, error, retryable, attempt, run_at)
  SELECT mine.queue, mine.id, failure.item_index, slice.item, failure.error, failure.retryable,
    CASE WHEN failure.run_at IS NULL THEN mine.attempt ELSE 0 END, failure.run_at
  FROM mine
  CROSS JOIN LATERAL pg_catalog.jsonb_array_elements(pg_catalog.jsonb_path_query_array(mine.items, '$[$first to $last]',
    pg_catalog.jsonb_build_object('first', %(first_index)s::integer, 'last', %(last_index)s::integer)))
    WITH ORDINALITY AS slice(item, number)
  JOIN failure ON failure.item_index = %(first_index)s::integer + slice.number - 1
), further_failures AS (
  UPDATE batchq.failed_items f
  SET error = failure.error,
      retryable = failure.retryable,
      attempt = CASE WHEN failure.run_at IS NULL THEN mine.attempt ELSE 0 END,
      run_at = failure.run_at,
      failed_at = pg_catalog.now()
  FROM mine, failure
  WHERE %(first_index)s::integer IS NULL
    AND f.queue = %(queue)s
    AND f.batch_id = mine.id
    AND f.item_index = failure.item_index
)
SELECT id
FROM mine
"""
# The same without failed or recovered items: most checkpoints; planning takes a tenth of the time.
PLAIN_CHECKPOINT: LiteralString = """
UPDATE batchq.batches_live
SET items_done = items_done + %(done)s,
    items_failed = items_failed + %(failed)s,
    cursor = CASE WHEN %(keeps_cursor)s THEN cursor ELSE %(cursor)s::jsonb END,
    lease_expires_at = greatest(lease_expires_at,
      pg_catalog.statement_timestamp() + %(lease_seconds)s::float8 * interval '1 second')
WHERE queue = %(queue)s
  AND id = %(id)s
  AND claim_token = %(token)s
  AND items_done = %(done_before)s
  AND items_failed = %(failed_before)s
RETURNING id
"""


class ItemFailure(NamedTuple):
    """A failed item, without the item itself, which the table has. *error*: one line.

    delay_seconds: of an item that was snoozed, which is no failure: how long until it runs again.
    """

    item_index: int
    error: str
    retryable: bool
    delay_seconds: float | None = None


class Progress(NamedTuple):
    """What a checkpoint changes: counters (as differences), failures to record, indexes of recovered items.

    first_index: the first index of the chunk, if its items were processed for the first time; None if they had failed
    before. done_before, failed_before: the counters that it starts from.
    """

    done: int = 0
    failed: int = 0
    failures: Sequence[ItemFailure] = ()
    recovered: Sequence[int] = ()
    first_index: int | None = None
    keeps_cursor: bool = True
    cursor: str | None = None
    done_before: int = 0
    failed_before: int = 0


def checkpoint(queue: str, batch_id: int, token: UUID, lease_seconds: float, progress: Progress) -> Statement:
    """Return the fenced statement that moves counters, cursor, failed items and lease. No row: the claim is lost.

    It is fenced by the counters as well: a checkpoint written again because its COMMIT was interrupted would otherwise
    count its items twice. The lease counts from statement_timestamp(), since now() is when the transaction began, which
    may be long ago. It is a statement, not a call, because it ends transactions of both `def` and `async def` handlers.
    """
    parameters = {
        "queue": queue,
        "id": batch_id,
        "token": token,
        "lease_seconds": lease_seconds,
        "done_before": progress.done_before,
        "failed_before": progress.failed_before,
        "done": progress.done,
        "failed": progress.failed,
        "keeps_cursor": progress.keeps_cursor,
        "cursor": progress.cursor,
    }
    if not progress.failures and not progress.recovered:
        return PLAIN_CHECKPOINT, parameters
    return CHECKPOINT, parameters | _failure_parameters(progress)


def _failure_parameters(progress: Progress) -> dict[str, Any]:
    return {
        "recovered": list(progress.recovered),
        "first_index": progress.first_index if progress.failures else None,
        "last_index": max((failure.item_index for failure in progress.failures), default=None),
        "indexes": [failure.item_index for failure in progress.failures],
        "errors": [failure.error for failure in progress.failures],
        "retryables": [failure.retryable for failure in progress.failures],
        "delays": [failure.delay_seconds for failure in progress.failures],
    }
