"""The functions of the protocol (migrations/0018_protocol.sql), called on a connection that may be of any driver.

Every parameter is a plain number, text or boolean, which all drivers send alike. A call does nothing, and returns null,
unless it is in the transaction that *began* is of: without one, it would commit before the caller's own rows.
"""

from typing import LiteralString
from uuid import UUID

from batchq.postgres.statements.running import Conn, Statement, fetch_one_or_none

BEGAN: LiteralString = "SELECT pg_catalog.now()::text"
COMPLETE_IN: LiteralString = """
SELECT CASE WHEN pg_catalog.now()::text = %(began)s::text
  THEN batchq.complete(%(id)s::bigint, %(token)s::text::uuid, %(result)s::text::jsonb, true, %(keep)s::boolean) END
"""
COMMIT_IN: LiteralString = """
SELECT CASE WHEN pg_catalog.now()::text = %(began)s::text
  THEN batchq.checkpoint(%(id)s::bigint, %(token)s::text::uuid, %(done)s::integer, %(failures)s::text::jsonb, NULL,
                         %(lease_seconds)s::float8, %(recovered)s::text::integer[]) END
"""


def began() -> Statement:
    """Return the statement that returns when the transaction began, as text; without one, each statement's own time."""
    return BEGAN, {}


def complete(began: str, batch_id: int, token: UUID, result: str | None, keep: bool) -> Statement:
    """Return the statement that completes a batch, whatever its items; *result*: JSON text. It returns whether the
    claim was held, null outside of the transaction."""
    return COMPLETE_IN, {"began": began, "id": batch_id, "token": str(token), "result": result, "keep": keep}


def checkpoint(
    began: str, batch_id: int, token: UUID, done: int, failures: str, recovered: str, lease_seconds: float
) -> Statement:
    """Return the statement that saves a checkpoint. *failures*: JSON text as batchq.checkpoint takes it; *recovered*:
    an array as text. It returns whether the claim was held, null outside of the transaction."""
    return COMMIT_IN, {
        "began": began,
        "id": batch_id,
        "token": str(token),
        "done": done,
        "failures": failures,
        "recovered": recovered,
        "lease_seconds": float(lease_seconds),
    }


def counted(conn: Conn, queue: str, batch_id: int, token: UUID, index: int | None) -> tuple[int, int, bool] | None:
    """Return how many items of a claimed batch are done and have failed, and whether the item at *index*, which had
    failed before, has run in this attempt; None if the claim is lost or the batch has finished."""
    return fetch_one_or_none(
        conn,
        """
        SELECT b.items_done, b.items_failed, coalesce(f.attempt = b.attempt OR f.run_at > b.claimed_at, false)
        FROM batchq.batches_live b
        LEFT JOIN batchq.failed_items f ON f.queue = b.queue AND f.batch_id = b.id AND f.item_index = %(index)s::integer
        WHERE b.queue = %(queue)s
          AND b.id = %(id)s
          AND b.claim_token = %(token)s
        """,
        {"queue": queue, "id": batch_id, "token": token, "index": index},
    )
