"""The claim, and the release of a claim whose outcome is unknown."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, LiteralString, NamedTuple
from uuid import UUID

import psycopg

from batchq.postgres.statements.running import Conn, Statement


class Position(NamedTuple):
    """A position in claim order within a queue and priority: run_at in seconds since 1970, then the id."""

    run_at: float
    id: int


START = Position(float("-inf"), 0)
END = Position(float("inf"), 0)


class ClaimedRow(NamedTuple):
    """What a claim returns of a batch, in this order. Large payloads and cursors are None, and fetched at the start.

    run_at: in seconds since 1970, for the position of the next claim.
    """

    id: int
    kind: str
    attempt: int
    max_attempts: int
    payload: str | None
    cursor: str | None
    items_total: int | None
    items_done: int
    items_failed: int
    max_failed_items: int
    timeout_seconds: int | None
    run_at: float
    trace_context: str | None = None
    key: str | None = None
    spread: int | None = None
    part_of: int | None = None

    @property
    def position(self) -> Position:
        """The batch's position in claim order."""
        return Position(self.run_at, self.id)


def bounds(after: Position, until: Position) -> dict[str, Any]:
    """Return the parameters for a range of positions."""
    return {"after_run_at": after.run_at, "after_id": after.id, "until_run_at": until.run_at, "until_id": until.id}


# A compressed value counts as large: 1,000 stored bytes can expand to 90,000, and one claim can return 2,000 rows.
_IS_SMALL: LiteralString = """pg_column_size(b.payload) + coalesce(pg_column_size(b.cursor), 0) <= %(most_bytes)s
        AND num_nonnulls(pg_column_compression(b.payload), pg_column_compression(b.cursor)) = 0"""
_COMPUTED: dict[str, LiteralString] = {
    "payload": f"CASE WHEN {_IS_SMALL} THEN b.payload::text END",
    "cursor": f"CASE WHEN {_IS_SMALL} THEN b.cursor::text END",
    "run_at": "date_part('epoch', b.run_at)",
    "trace_context": "CASE WHEN %(most_bytes)s > 0 THEN b.trace_context END",
}
_CLAIMED = ",\n  ".join(_COMPUTED.get(column, f"b.{column}") for column in ClaimedRow._fields)
# The scan starts after the position of the last claim. Earlier index entries are already claimed; they stay, dead, for
# as long as any session holds a snapshot.
CLAIM: LiteralString = f"""
WITH ready AS (
  SELECT id
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
  LIMIT %(limit)s
  FOR UPDATE SKIP LOCKED
)
UPDATE batchq.batches_live b
SET status = 'processing',
    attempt = b.attempt + 1,
    claimed_by = %(worker)s,
    claim_token = %(token)s,
    claimed_at = now(),
    lease_expires_at = now() + %(lease_seconds)s::float8 * interval '1 second'
WHERE b.queue = %(queue)s
  AND b.id = ANY (ARRAY(SELECT id FROM ready))
RETURNING {_CLAIMED}
"""  # noqa: S608 (constants)  # pyright: ignore[reportAssignmentType]
MOST_CLAIMED_BYTES = 1000  # of payload and cursor
# The errors with which the server refuses to send a text: invalid bytes, or a letter that UTF-8 lacks.
UNREADABLE = (psycopg.errors.CharacterNotInRepertoire, psycopg.errors.UntranslatableCharacter)
# The same without batches that the database has refused to change.
CLAIM_SKIPPING: LiteralString = CLAIM.replace(
    "AND run_at <= now()", "AND run_at <= now()\n    AND id <> ALL (%(skipped)s)"
)


def _distributed(claim: LiteralString) -> LiteralString:
    """Return a claim for a distributed Postgres, which takes only plain columns in RETURNING.

    A plain one would take 6 % longer with small payloads, and 12 % with 800 bytes (500 of 50,000 batches, PostgreSQL
    18.4, November 2026).
    """
    plain: LiteralString = ", ".join(f"b.{name}" for name in ClaimedRow._fields)  # pyright: ignore[reportAssignmentType]
    return claim.replace("\nUPDATE", ", b AS (\nUPDATE").replace(
        f"RETURNING {_CLAIMED}", f"RETURNING {plain}\n)\nSELECT {_CLAIMED}\nFROM b"
    )  # pyright: ignore[reportReturnType]


CLAIM_DISTRIBUTED: LiteralString = _distributed(CLAIM)
CLAIM_SKIPPING_DISTRIBUTED: LiteralString = _distributed(CLAIM_SKIPPING)

# The same for batches that batchq.ready_of_keys has found in the same transaction: by their ids, not by a position. One
# may have been snoozed since it was found.
_BY_POSITION = CLAIM_DISTRIBUTED[
    CLAIM_DISTRIBUTED.index("    AND key IS NULL") : CLAIM_DISTRIBUTED.index("  FOR UPDATE")
]
CLAIM_KEYED: LiteralString = CLAIM_DISTRIBUTED.replace(
    _BY_POSITION, "    AND id = ANY (%(ids)s::bigint[])\n    AND run_at <= now()\n"
)
READY_OF_KEYS: LiteralString = """
SELECT key, ids, last_priority, last_run_at, last_id, seconds
FROM batchq.ready_of_keys(%(queue)s, %(kinds)s, %(per_kind)s::integer[], %(per_queue)s, %(after_key)s, %(until_key)s,
  %(most_keys)s, %(most)s, %(per_turn)s, %(positions)s::jsonb)
"""


def claim(
    queue: str,
    priority: int,
    kinds: Sequence[str],
    limit: int,
    worker: str,
    token: UUID,
    lease_seconds: float,
    after: Position = START,
    until: Position = END,
    skipped: Sequence[int] = (),
    is_distributed: bool = False,
) -> Statement:
    """Return the statement that claims up to *limit* ready batches of one queue and priority, the oldest first, after
    one position and up to another. It counts the attempt, and returns the fields of `ClaimedRow`.

    It skips batches that another claim has locked, without waiting, and those in *skipped*.
    """
    if is_distributed:
        statement = CLAIM_SKIPPING_DISTRIBUTED if skipped else CLAIM_DISTRIBUTED
    else:
        statement = CLAIM_SKIPPING if skipped else CLAIM
    return statement, ({"skipped": list(skipped)} if skipped else {}) | {
        "queue": queue,
        "priority": priority,
        "kinds": list(kinds),
        "limit": limit,
        "worker": worker,
        "token": token,
        "lease_seconds": lease_seconds,
        "most_bytes": MOST_CLAIMED_BYTES,
        **bounds(after, until),
    }


def claim_keyed(queue: str, ids: Sequence[int], worker: str, token: UUID, lease_seconds: float) -> Statement:
    """Return the statement that claims batches with a key, which `ready_of_keys` has found in the same transaction. It
    counts the attempt, and returns the fields of `ClaimedRow`."""
    return CLAIM_KEYED, {
        "queue": queue,
        "ids": list(ids),
        "worker": worker,
        "token": token,
        "lease_seconds": lease_seconds,
        "most_bytes": MOST_CLAIMED_BYTES,
    }


def ready_of_keys(
    queue: str,
    kinds: Sequence[str],
    per_kind: Sequence[int | None],
    per_queue: int | None,
    after_key: str,
    until_key: str | None,
    most_keys: int,
    most: int,
    per_turn: int,
    positions: Mapping[str, tuple[int, float, int]],
) -> Statement:
    """Return the statement that goes through the keys of a queue and returns what may be claimed of each; see
    batchq.ready_of_keys. The claim follows in the same transaction, which holds the locks of the keys."""
    return READY_OF_KEYS, {
        "queue": queue,
        "kinds": list(kinds),
        "per_kind": list(per_kind),
        "per_queue": per_queue,
        "after_key": after_key,
        "until_key": until_key,
        "most_keys": most_keys,
        "most": most,
        "per_turn": per_turn,
        "positions": json.dumps(positions),
    }


def without_inputs(claim: Statement) -> Statement:
    """Return a `claim` without payloads, cursors and trace contexts: texts that the server may refuse to send."""
    return claim[0], claim[1] | {"most_bytes": 0}


def release_claim(conn: Conn, queue: str, token: UUID) -> int:
    """Release all that was claimed under *token*, after a claim whose COMMIT was interrupted; return how many."""
    return conn.execute(
        """
        UPDATE batchq.batches_live
        SET status = 'pending',
            attempt = greatest(attempt - 1, 0),
            claimed_by = NULL,
            claim_token = NULL,
            claimed_at = CASE WHEN key IS NOT NULL THEN claimed_at END,
            lease_expires_at = NULL
        WHERE queue = %(queue)s
          AND status = 'processing'
          AND claim_token = %(token)s
        """,
        {"queue": queue, "token": token},
    ).rowcount
