"""Parts: the batches that one batch with a long list of items is spread to."""

from typing import Any, LiteralString, NamedTuple
from uuid import UUID

from batchq.postgres.statements.running import Conn, fetch_json, fetch_one, fetch_one_or_none, fetch_value


class Spread(NamedTuple):
    """How many parts were made. error: why a part that was made before has failed. is_left: the claim is over, else the
    batch is to be worked as it is."""

    parts: int
    error: str | None
    is_left: bool | None


def spread_batch(conn: Conn, queue: str, batch_id: int, token: UUID, most: int) -> Spread | None:
    """Make parts of a claimed batch; see batchq.spread_batch. None: the claim is lost."""
    row = fetch_one(
        conn,
        "SELECT parts, error, is_left FROM batchq.spread_batch(%(queue)s, %(id)s, %(token)s, %(most)s)",
        {"queue": queue, "id": batch_id, "token": token, "most": most},
    )
    return None if row[0] is None else Spread(*row)


PART_ROWS: LiteralString = """
WITH part AS (
  SELECT p.*, w.items_done + w.items_failed >= p.first_item + p.items AS is_counted
  FROM batchq.parts p
  JOIN batchq.all_batches w ON w.id = p.batch_id
  WHERE p.batch_id = %(id)s
    AND w.id = %(id)s
    AND (%(part)s::bigint IS NULL OR p.part_id = %(part)s)
)
SELECT to_jsonb(shown)
FROM (
  SELECT p.part_id AS id, p.batch_id AS part_of, p.first_item, p.first_item + p.items - 1 AS last_item,
    CASE WHEN b.id IS NOT NULL THEN batchq.shown_status(b.status, b.run_at, b.lease_expires_at, b.errors)
         WHEN p.is_counted OR p.items_done + p.items_failed = p.items THEN 'completed'
         ELSE coalesce(p.ended_as, 'ready') END AS status,
    p.items AS items_total,
    CASE WHEN p.is_counted THEN p.items - f.items_failed ELSE coalesce(b.items_done, p.items_done) END AS items_done,
    CASE WHEN p.is_counted THEN f.items_failed ELSE coalesce(b.items_failed, p.items_failed) END AS items_failed,
    b.attempt, b.max_attempts, b.claimed_by, coalesce(b.errors -> -1 ->> 'error', p.error) AS last_error
  FROM part p
  LEFT JOIN batchq.batches_live b ON b.queue = p.queue AND b.id = p.part_id
  CROSS JOIN LATERAL (
    SELECT count(*)::integer AS items_failed
    FROM batchq.failed_items i
    WHERE p.is_counted AND i.queue = p.queue AND i.batch_id = p.batch_id
      AND i.item_index >= p.first_item AND i.item_index < p.first_item + p.items
  ) f
  ORDER BY p.first_item
  OFFSET 0
) shown
ORDER BY shown.first_item
"""


def part_rows(conn: Conn, batch_id: int) -> list[dict[str, Any]]:
    """Return the parts of a batch as JSON objects, by their items; none if the batch is not spread. What a part has
    done is known after its end, too."""
    return fetch_json(conn, PART_ROWS, {"id": batch_id, "part": None})


def part_row(conn: Conn, part_id: int) -> dict[str, Any] | None:
    """Return a part by its own id; None if there is none, or if the role may not see parts. Its *part_of* is the batch
    that it is a part of."""
    if not fetch_value(conn, bool, "SELECT has_table_privilege('batchq.parts', 'SELECT')"):
        return None
    whole = fetch_one_or_none(conn, "SELECT batch_id FROM batchq.parts WHERE part_id = %(id)s", {"id": part_id})
    found = fetch_json(conn, PART_ROWS, {"id": whole[0], "part": part_id}) if whole else []
    return found[0] if found else None


def has_spread(conn: Conn, queue: str | None, kind: str | None) -> bool:
    """Return whether any batch is worked in parts: also in the moment after the last part and before it goes on."""
    return fetch_value(
        conn,
        bool,
        """
        SELECT EXISTS (SELECT 1
                       FROM batchq.spread_batches() AS s(id)
                       JOIN batchq.batches_live b ON b.id = s.id
                       WHERE (%(queue)s::text IS NULL OR batchq.whole_queue(b.queue) = %(queue)s)
                         AND (%(kind)s::text IS NULL OR b.kind = %(kind)s))
        """,
        {"queue": queue, "kind": kind},
    )
