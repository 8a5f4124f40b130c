"""Probes of the claim index: which priorities have ready batches, and from which position."""

from collections.abc import Iterable, Mapping, Sequence
from typing import LiteralString, NamedTuple

from batchq.postgres.statements.claims import Position, bounds
from batchq.postgres.statements.flows import HAS_EVENTS
from batchq.postgres.statements.running import Conn, Statement, fetch_one

# EXISTS would give the same result. LATERAL with ORDER BY and LIMIT makes each probe use the claim index.
READY: LiteralString = """
SELECT known.priority
FROM unnest(%(priorities)s::smallint[], %(run_ats)s::float8[], %(ids)s::bigint[]) AS known(priority, run_at, id)
CROSS JOIN LATERAL (
  SELECT true
  FROM batchq.batches_live b
  WHERE b.queue = %(queue)s
    AND b.status = 'pending'
    AND b.key IS NULL
    AND b.priority = known.priority
    AND (b.run_at, b.id) > (to_timestamp(known.run_at), known.id)
    AND b.run_at <= now()
    AND b.kind = ANY (%(kinds)s)
  ORDER BY b.run_at, b.id
  LIMIT 1
) AS ready
ORDER BY known.priority
"""


def ready_priorities(queue: str, kinds: Sequence[str], after: Mapping[int, Position]) -> Statement:
    """Return the statement that returns the priorities that have a ready batch of *kinds* after their position in
    *after*, the most urgent first: one probe of the index for each."""
    return READY, {
        "queue": queue,
        "kinds": list(kinds),
        "priorities": list(after),
        "run_ats": [position.run_at for position in after.values()],
        "ids": [position.id for position in after.values()],
    }


UNKNOWN_PRIORITY: LiteralString = """
SELECT true
FROM unnest(%(froms)s::integer[], %(tos)s::integer[]) AS gap(above, below)
CROSS JOIN LATERAL (
  SELECT true
  FROM batchq.batches_live b
  WHERE b.queue = %(queue)s
    AND b.status = 'pending'
    AND b.key IS NULL
    AND b.priority > gap.above
    AND b.priority < gap.below
  ORDER BY b.priority
  LIMIT 1
) AS first_of_gap
LIMIT 1
"""


def unknown_priority(queue: str, known: Iterable[int]) -> Statement:
    """Return the statement that returns a row if any pending batch, ready or not, has a priority that is not *known*.

    It probes the index at most once per gap, including the gaps below and above all known priorities.
    """
    priorities = sorted(known)
    return UNKNOWN_PRIORITY, {
        "queue": queue,
        "froms": [-BEYOND_PRIORITIES, *priorities],
        "tos": [*priorities, BEYOND_PRIORITIES],
    }


def discovery(queue: str, known: Iterable[int], with_keys: bool, after_event: int) -> Statement:
    """Return the statement that returns whether any pending batch has a priority that is not *known*; *with_keys*,
    whether batches with a key are pending; and whether flows have an event after one."""
    unknown, parameters = unknown_priority(queue, known)
    return f"SELECT ({unknown}) IS TRUE, %(with_keys)s AND batchq.has_keyed(%(queue)s), {HAS_EVENTS}", parameters | {
        "with_keys": with_keys,
        "after_event": after_event,
    }


BEYOND_PRIORITIES = 40_000  # the column is a smallint
PRIORITIES: LiteralString = """
WITH RECURSIVE level AS (
  (SELECT priority
   FROM batchq.batches_live
   WHERE queue = %(queue)s
     AND status = 'pending'
     AND key IS NULL
   ORDER BY priority
   LIMIT 1)
  UNION ALL
  SELECT (SELECT b.priority
          FROM batchq.batches_live b
          WHERE b.queue = %(queue)s
            AND b.status = 'pending'
            AND b.key IS NULL
            AND b.priority > level.priority
          ORDER BY b.priority
          LIMIT 1)
  FROM level
  WHERE level.priority IS NOT NULL
)
SELECT priority
FROM level
WHERE priority IS NOT NULL
"""


def priorities(queue: str) -> Statement:
    """Return the statement that returns every priority that has a pending batch, by steps through the index (a loose
    index scan)."""
    return PRIORITIES, {"queue": queue}


KNOWN_POSITIONS: LiteralString = """
SELECT priority, date_part('epoch', at), id
FROM batchq.positions
WHERE index = 'ready'
  AND queue = %(queue)s
"""


def known_positions(queue: str) -> Statement:
    """Return the statement that returns what workers recorded of a queue, for `as_positions`."""
    return KNOWN_POSITIONS, {"queue": queue}


def as_positions(rows: Iterable[tuple[int, float, int]]) -> dict[int, Position]:
    """Return the positions by priority, before which nothing was pending, from the rows of `known_positions`."""
    return {priority: Position(run_at, batch_id) for priority, run_at, batch_id in rows}


def move_positions(conn: Conn, queues: Sequence[str], priorities: Sequence[int], lease_seconds: float) -> None:
    """Record where reads of the indexes of these queues and priorities begin; see batchq.positions."""
    fetch_one(
        conn,
        "SELECT batchq.move_positions(%(queues)s, %(priorities)s::smallint[], %(lease_seconds)s)",
        {"queues": list(queues), "priorities": list(priorities), "lease_seconds": lease_seconds},
    )


class Look(NamedTuple):
    """What an idle worker finds: whether a batch is ready, whether batches with a key are pending (false if it was not
    asked), and whether flows have an event that it has not seen."""

    is_ready: bool
    has_keys: bool
    has_events: bool


def has_ready(
    conn: Conn,
    queue: str,
    priority: int,
    kinds: Sequence[str],
    after: Position,
    with_keys: bool = False,
    after_event: int = 0,
) -> Look:
    """Look for a batch of *kinds* after a position and, *with_keys*, for batches with a key. The cheap read of an idle
    worker."""
    row = fetch_one(
        conn,
        f"""
        SELECT batchq.has_ready(%(queue)s, %(priority)s::smallint, %(kinds)s, %(run_at)s, %(id)s),
          %(with_keys)s AND batchq.has_keyed(%(queue)s), {HAS_EVENTS}
        """,
        {
            "queue": queue,
            "priority": priority,
            "kinds": list(kinds),
            "run_at": after.run_at,
            "id": after.id,
            "with_keys": with_keys,
            "after_event": after_event,
        },
    )
    return Look._make(row)


READY_BETWEEN: LiteralString = """
SELECT true
FROM batchq.batches_live
WHERE queue = %(queue)s
  AND status = 'pending'
  AND key IS NULL
  AND priority = %(priority)s
  AND (run_at, id) > (to_timestamp(%(after_run_at)s), %(after_id)s::bigint)
  AND (run_at, id) <= (to_timestamp(%(until_run_at)s), %(until_id)s::bigint)
  AND run_at <= now()
  AND kind = ANY (%(kinds)s)
ORDER BY run_at, id
LIMIT 1
"""


def ready_between(queue: str, priority: int, kinds: Sequence[str], after: Position, until: Position) -> Statement:
    """Return the statement that returns a row if a batch of *kinds* is ready after one position and up to another."""
    return READY_BETWEEN, {"queue": queue, "priority": priority, "kinds": list(kinds)} | bounds(after, until)


READY_POSITIONS: LiteralString = """
SELECT date_part('epoch', run_at), id
FROM batchq.batches_live
WHERE queue = %(queue)s
  AND status = 'pending'
  AND key IS NULL
  AND priority = %(priority)s
  AND (run_at, id) > (to_timestamp(%(after_run_at)s), %(after_id)s::bigint)
  AND (run_at, id) <= (to_timestamp(%(until_run_at)s), %(until_id)s::bigint)
  AND run_at <= now()
  AND id <> ALL (%(skipped)s::bigint[])
  AND kind = ANY (%(kinds)s)
ORDER BY run_at, id
LIMIT %(limit)s
"""


def ready_positions(
    queue: str,
    priority: int,
    kinds: Sequence[str],
    limit: int,
    after: Position,
    until: Position,
    skipped: Sequence[int],
) -> Statement:
    """Return the statement that returns the positions of the batches that a `claim` with these arguments would take,
    in their order."""
    return READY_POSITIONS, {
        "queue": queue,
        "priority": priority,
        "kinds": list(kinds),
        "limit": limit,
        "skipped": list(skipped),
        **bounds(after, until),
    }
