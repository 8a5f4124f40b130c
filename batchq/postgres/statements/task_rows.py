"""For frameworks, on connections of theirs: a batch as the result of a task, its failed items, and verbs."""

import json
from typing import Any, LiteralString

from batchq.postgres.statements.running import Conn, Statement, fetch_one_or_none

_RESULT: LiteralString = """
SELECT jsonb_build_object(
  'id', b.id, 'kind', b.kind, 'queue', batchq.whole_queue(b.queue), 'status', b.status,
  'payload', b.payload, 'priority', b.priority,
  'attempt', b.attempt, 'claimed_by', b.claimed_by, 'run_at', b.run_at, 'created_at', b.created_at,
  'claimed_at', b.claimed_at, 'finished_at', b.finished_at, 'result', b.result, 'errors', b.errors)::text
FROM batchq.all_batches b
WHERE b.id = %(id)s
"""
_VERBS: dict[str, LiteralString] = {
    "cancel": "SELECT batchq.cancel(%(id)s, reason => %(reason)s, actor => %(actor)s)",
    "retry": "SELECT batchq.retry(%(id)s, reason => %(reason)s, actor => %(actor)s)",
    "retry_items": "SELECT batchq.retry_items(%(id)s, reason => %(reason)s, actor => %(actor)s)",
}


def task_row(batch_id: int) -> Statement:
    """Return the statement for one batch, as the text of a JSON object; no row if there is none."""
    return _RESULT, {"id": batch_id}


def read_task_row(conn: Conn, batch_id: int) -> dict[str, Any] | None:
    """Return one batch as a JSON object, None if there is none."""
    row = fetch_one_or_none(conn, *task_row(batch_id))
    return None if row is None else json.loads(row[0])


def verb_on(name: str, batch_id: int, reason: str, actor: str) -> Statement:
    """Return the statement that does cancel, retry or retry_items; its one value is the status after it."""
    return _VERBS[name], {"id": batch_id, "reason": reason, "actor": actor}


def failed_items(batch_id: int, most: int) -> Statement:
    """Return the statement for the first failed items of a batch: index, JSON text, error, attempt."""
    statement: LiteralString = """
    SELECT f.item_index, f.item::text, f.error, f.attempt
    FROM batchq.failed_items_of(%(id)s, most => %(most)s) f
    ORDER BY f.item_index
    """
    return statement, {"id": batch_id, "most": most}


def inputs(batch_id: int) -> Statement:
    """Return the statement for what a batch takes and gives, as JSON texts: payload and result, cut at 100,000
    characters each, and errors."""
    statement: LiteralString = """
    SELECT left(jsonb_pretty(b.payload), 100000), left(jsonb_pretty(b.result), 100000), b.errors::text
    FROM batchq.all_batches b
    WHERE b.id = %(id)s
    """
    return statement, {"id": batch_id}
