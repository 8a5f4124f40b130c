"""What a handler reads of its batch: large payloads and cursors, pages of items, failed items to run again."""

from typing import LiteralString, NamedTuple
from uuid import UUID

from batchq.postgres.statements.running import Conn, Statement, fetch_all, fetch_one, fetch_one_or_none


def large_input(conn: Conn, queue: str, batch_id: int, token: UUID) -> tuple[str, str | None] | None:
    """Return payload and cursor of a claimed batch, as JSON text; None if the claim is lost."""
    row = fetch_one_or_none(
        conn,
        """
        SELECT payload::text, cursor::text
        FROM batchq.batches_live
        WHERE queue = %(queue)s
          AND id = %(id)s
          AND claim_token = %(token)s
        """,
        {"queue": queue, "id": batch_id, "token": token},
    )
    return (row[0], row[1]) if row else None


def items_page(conn: Conn, queue: str, batch_id: int, token: UUID, first: int, count: int) -> str | None:
    """Return *count* items from index *first* on, as the text of a JSON array; None if the claim is lost."""
    row = fetch_one_or_none(
        conn,
        """
        SELECT jsonb_path_query_array(items, '$[$first to $last]',
                                      jsonb_build_object('first', %(first)s::integer, 'last', %(last)s::integer))::text
        FROM batchq.batches_live
        WHERE queue = %(queue)s
          AND id = %(id)s
          AND claim_token = %(token)s
        """,
        {"queue": queue, "id": batch_id, "token": token, "first": first, "last": first + count - 1},
    )
    return row[0] if row else None


def failed_page(conn: Conn, queue: str, batch_id: int, token: UUID, attempt: int, count: int) -> list[tuple[int, str]]:
    """Return index and JSON text of up to *count* items that failed in an attempt before *attempt*, or whose snooze had
    ended when the batch was claimed: an item that snoozes again and again does not keep its batch running.

    Returns none if the claim is lost: the attempts of a batch that was cancelled and retried count from 0, so that the
    items just tried would be returned again.
    """
    return fetch_all(
        conn,
        """
        SELECT item_index, item::text
        FROM batchq.failed_items f
        WHERE queue = %(queue)s
          AND batch_id = %(id)s
          AND retryable
          AND attempt < %(attempt)s
          AND EXISTS (SELECT 1
                      FROM batchq.batches_live b
                      WHERE b.queue = %(queue)s
                        AND b.id = %(id)s
                        AND b.claim_token = %(token)s
                        AND (f.run_at IS NULL OR f.run_at <= b.claimed_at))
        ORDER BY item_index
        LIMIT %(count)s
        """,
        {"queue": queue, "id": batch_id, "token": token, "attempt": attempt, "count": count},
    )


class LeftItems(NamedTuple):
    """The items of a batch that have run and have not succeeded.

    retryable: how many may succeed in another attempt. snoozed_seconds: time until the first snoozed item runs again;
    None if no item is snoozed.
    """

    retryable: int
    first_error: str | None
    snoozed_seconds: float | None


def left_items(conn: Conn, queue: str, batch_id: int) -> LeftItems:
    """Return what is left of the items of a batch that have run."""
    row = fetch_one(
        conn,
        """
        SELECT count(*) FILTER (WHERE retryable AND run_at IS NULL),
          (array_agg(error ORDER BY run_at IS NOT NULL, item_index))[1],
          date_part('epoch', min(run_at) - now())
        FROM batchq.failed_items
        WHERE queue = %(queue)s
          AND batch_id = %(id)s
        """,
        {"queue": queue, "id": batch_id},
    )
    return LeftItems._make(row)


def status_of(conn: Conn, queue: str, batch_id: int) -> str | None:
    """Return the batch's status, None if there is no such batch."""
    row = fetch_one_or_none(
        conn,
        "SELECT status FROM batchq.all_batches WHERE queue = %(queue)s AND id = %(id)s",
        {"queue": queue, "id": batch_id},
    )
    return row[0] if row else None


FAILURE: LiteralString = """
SELECT batchq.whole_queue(b.queue), b.kind, b.status, b.payload::text,
  coalesce(e.error ->> 'error', 'unknown'), e.error ->> 'traceback', e.error -> 'sealed'
FROM batchq.all_batches b
LEFT JOIN LATERAL (
  SELECT error
  FROM jsonb_array_elements(b.errors) WITH ORDINALITY AS u(error, number)
  ORDER BY (error ->> 'attempt')::integer = %(attempt)s DESC, number DESC
  LIMIT 1
) e ON true
WHERE b.queue = %(queue)s
  AND b.id = %(id)s
  AND b.part_of IS NULL
"""


def failure(queue: str, batch_id: int, attempt: int) -> Statement:
    """Return the statement that reads what hooks get of a failed batch: queue, kind, status, payload, and error and
    traceback of that attempt, and what is sealed of them. It returns no row for a part or a batch that is gone."""
    return FAILURE, {"queue": queue, "id": batch_id, "attempt": attempt}
