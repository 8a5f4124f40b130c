"""Shards: which queues are split, and one look into all shards of a queue."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, LiteralString

from batchq.postgres.statements.claims import Position
from batchq.postgres.statements.flows import HAS_EVENTS
from batchq.postgres.statements.probes import BEYOND_PRIORITIES
from batchq.postgres.statements.running import Conn, Statement, fetch_all, fetch_json, fetch_one

# As READY in probes.py, for levels of several queues.
READY_IN_SHARDS: LiteralString = """
SELECT known.queue, known.priority
FROM unnest(%(queues)s::text[], %(priorities)s::smallint[], %(run_ats)s::float8[], %(ids)s::bigint[])
  AS known(queue, priority, run_at, id)
CROSS JOIN LATERAL (
  SELECT true
  FROM batchq.batches_live b
  WHERE b.queue = known.queue
    AND b.status = 'pending'
    AND b.key IS NULL
    AND b.priority = known.priority
    AND (b.run_at, b.id) > (to_timestamp(known.run_at), known.id)
    AND b.run_at <= now()
    AND b.kind = ANY (%(kinds)s)
  ORDER BY b.run_at, b.id
  LIMIT 1
) AS ready
"""
DISCOVERY: LiteralString = f"""
SELECT
  ARRAY(
    SELECT gap.queue
    FROM unnest(%(queues)s::text[], %(froms)s::integer[], %(tos)s::integer[]) AS gap(queue, above, below)
    CROSS JOIN LATERAL (
      SELECT true
      FROM batchq.batches_live b
      WHERE b.queue = gap.queue
        AND b.status = 'pending'
        AND b.key IS NULL
        AND b.priority > gap.above
        AND b.priority < gap.below
      ORDER BY b.priority
      LIMIT 1
    ) AS first_of_gap),
  ARRAY(SELECT looked.queue FROM unnest(%(looked)s::text[]) AS looked(queue) WHERE batchq.has_keyed(looked.queue)),
  {HAS_EVENTS}
"""  # noqa: S608 (constants)
KNOWN_POSITIONS: LiteralString = """
SELECT queue, priority, date_part('epoch', at), id
FROM batchq.positions
WHERE index = 'ready'
  AND queue = ANY (%(queues)s)
"""


def shards_of(conn: Conn, queues: Sequence[str]) -> dict[str, list[str]]:
    """Return the stored names of the shards of each of these queues that is split."""
    return fetch_one(conn, "SELECT batchq.shards_of_queues(%(queues)s)", {"queues": list(queues)})[0] or {}


def wholes_of(conn: Conn, queues: Sequence[str]) -> dict[str, str]:
    """Return those of these queues that are shards, and the queue that each belongs to."""
    if not any("#" in queue for queue in queues):
        return {}
    statement = "SELECT q, batchq.whole_queue(q) FROM unnest(%(queues)s::text[]) q WHERE batchq.whole_queue(q) <> q"
    return dict(fetch_all(conn, statement, {"queues": list(queues)}))


def ready_levels(levels: Mapping[tuple[str, int], Position], kinds: Sequence[str]) -> Statement:
    """Return the statement that returns those *levels* (stored queue, priority) that have a ready batch of *kinds*
    after their position: one probe of the index for each."""
    return READY_IN_SHARDS, {
        "queues": [queue for queue, _ in levels],
        "priorities": [priority for _, priority in levels],
        "run_ats": [position.run_at for position in levels.values()],
        "ids": [position.id for position in levels.values()],
        "kinds": list(kinds),
    }


def discovery(known: Mapping[str, Iterable[int]], looked: Sequence[str], after_event: int) -> Statement:
    """Return the statement that returns which of the queues in *known* have a pending batch of a priority that is not
    known there, which of *looked* have batches with a key, and whether flows have an event after one."""
    gaps = [
        (queue, above, below)
        for queue, priorities in known.items()
        for above, below in _gaps(sorted(priorities))
    ]  # fmt: skip
    queues, froms, tos = (list(column) for column in zip(*gaps, strict=True))
    return DISCOVERY, {
        "queues": queues, "froms": froms, "tos": tos, "looked": list(looked), "after_event": after_event,
    }  # fmt: skip


def _gaps(priorities: Sequence[int]) -> Iterable[tuple[int, int]]:
    return zip([-BEYOND_PRIORITIES, *priorities], [*priorities, BEYOND_PRIORITIES], strict=True)


def known_positions(queues: Sequence[str]) -> Statement:
    """Return the statement that returns what workers recorded of these stored queues: queue, priority, run_at, id."""
    return KNOWN_POSITIONS, {"queues": list(queues)}


def split_queue(conn: Conn, queue: str, shards: int, reason: str | None, actor: str | None) -> int:
    """Split a queue into so many shards, or add some to those it has; return how many it has then.

    Raises LockNotAvailable, after 1 s, while other transactions that have written batches are open; RaiseException if
    the queue cannot be split.
    """
    arguments = {"queue": queue, "shards": shards, "reason": reason, "actor": actor}
    statement = "SELECT batchq.split_queue(%(queue)s::text, %(shards)s::integer, %(reason)s::text, %(actor)s::text)"
    return int(fetch_one(conn, statement, arguments)[0])


def shard_rows(conn: Conn, queue: str | None) -> list[dict[str, Any]]:
    """Return the rows of batchq.shards, of one queue or of all, as JSON objects."""
    return fetch_json(
        conn,
        """
        SELECT to_jsonb(s)
        FROM batchq.shards s
        WHERE %(queue)s::text IS NULL OR s.queue = %(queue)s
        ORDER BY s.queue, s.number
        """,
        {"queue": queue},
    )
