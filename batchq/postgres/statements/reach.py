"""Batches as a program sees and steers them, on its own connection: JSON as text, and a type for each parameter."""

from typing import LiteralString

from batchq.postgres.statements.running import Statement
from batchq.postgres.statements.views import NEWEST, newest_parameters

_OBJECT: LiteralString = "(to_jsonb(s) || jsonb_build_object('payload', b.payload, 'result', b.result))::text"

BATCH: LiteralString = f"""
SELECT {_OBJECT}
FROM batchq.all_batches b
JOIN (SELECT * FROM batchq.status WHERE id = %(id)s::bigint OFFSET 0) s ON s.id = b.id AND s.shard = b.queue
WHERE b.id = %(id)s::bigint
"""  # noqa: S608 (constants)

LIST: LiteralString = f"""{NEWEST}, latest AS (
  SELECT ARRAY(SELECT id FROM newest ORDER BY id DESC LIMIT %(limit)s::integer) AS ids
)
SELECT {_OBJECT}
FROM batchq.all_batches b
JOIN (SELECT * FROM batchq.status WHERE id = ANY ((SELECT ids FROM latest)::bigint[]) OFFSET 0) s
  ON s.id = b.id AND s.shard = b.queue
WHERE b.id = ANY ((SELECT ids FROM latest)::bigint[])
ORDER BY s.id DESC
"""  # noqa: S608 (constants)

STATUS: LiteralString = "SELECT status FROM batchq.status WHERE id = %(id)s::bigint"

CANCEL: LiteralString = """
SELECT batchq.cancel(batch_id => %(id)s::bigint, reason => %(reason)s::text, actor => %(actor)s::text)
"""

RETRY: LiteralString = """
SELECT batchq.retry(batch_id => %(id)s::bigint, whole => %(whole)s::boolean, reason => %(reason)s::text,
                    actor => %(actor)s::text)
"""


def batch(batch_id: int) -> Statement:
    """Return the statement that reads a batch: its row of batchq.status, payload and result, as the text of a JSON
    object."""
    return BATCH, {"id": batch_id}


def newest(queue: str | None, kind: str | None, status: str | None, limit: int) -> Statement:
    """Return the statement that reads batches, the newest first, each as `batch` does."""
    return LIST, newest_parameters(queue, kind, status, limit)


def status(batch_id: int) -> Statement:
    """Return the statement that reads a batch's status, as batchq.status shows it."""
    return STATUS, {"id": batch_id}


def cancel(batch_id: int, reason: str, actor: str | None) -> Statement:
    """Return the statement that cancels a batch."""
    return CANCEL, {"id": batch_id, "reason": reason, "actor": actor}


def retry(batch_id: int, whole: bool, reason: str | None, actor: str | None) -> Statement:
    """Return the statement that retries a batch."""
    return RETRY, {"id": batch_id, "whole": whole, "reason": reason, "actor": actor}
