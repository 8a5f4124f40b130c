"""Every statement of batchq, a function each, run inside the caller's transaction.

Each names its batches' queue by equality: so the claim's index gives the order without a sort, and the table could be
distributed by queue. A write for a claimed batch matches its id and its claim token (the fence): where it matches
nothing, the batch is no longer the caller's. DDL is in migrations/ only.

Times are the database's; durations are passed in seconds. JSON goes in and comes out as text.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import islice, pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, LiteralString, NamedTuple
from uuid import UUID

import psycopg
from psycopg import sql
from psycopg.rows import tuple_row

Conn = psycopg.Connection[Any]
Statement = tuple[LiteralString, dict[str, Any]]

OWN_LOCK_SECONDS = 5.0  # how long a statement of our own waits for a lock

# -------------------------------------------------------------------------------------------------- connections


# How values are written and read, whatever the role or the database sets: a float keeps all of its digits (a position
# cut to 15 would pass over batches), a time or an interval looks as people expect, a backslash in a statement is one.
# And no name means what others have made in a schema of the search path: public.unnest(integer[]) would come before
# pg_catalog.unnest(anyarray).
SEARCH_PATH = "pg_catalog, pg_temp"
OUR_NAMES: LiteralString = f"SET LOCAL search_path TO {SEARCH_PATH}"
PLAIN = {
    "search_path": SEARCH_PATH,
    "DateStyle": "ISO",
    "IntervalStyle": "postgres",
    "extra_float_digits": "1",
    "standard_conforming_strings": "on",
}

# For statements over many ids, which all look them up by `id = ANY (array)`: by the index whatever the statistics say,
# and what is left to join, that list with itself, by hash. Left alone, the planner reads the whole table from some
# hundred ids on (claim of 1,000 of 50,000: 19 ms, by the index 9 ms); with nested loops only, a list that meets
# statistics of an empty table becomes quadratic (1,000 ids: 5 s).
BY_INDEX = PLAIN | {
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_nestloop": "off",
    "enable_mergejoin": "off",
    "jit": "off",  # what is off but unavoidable counts as dear before PostgreSQL 18, and dear plans are compiled: 1 s
}
# For probes of an index, one entry each: never by a plan that reads every entry before it returns the first.
PROBING = PLAIN | {"enable_seqscan": "off", "enable_bitmapscan": "off", "jit": "off"}
WITHOUT_WAITING_FOR_THE_DISK = {"synchronous_commit": "off"}
READ_ONLY = PLAIN | {"transaction_read_only": "on", "jit": "off"}


def limits(
    seconds: float, lock_seconds: float = OWN_LOCK_SECONDS, settings: Mapping[str, str] = MappingProxyType({})
) -> LiteralString:
    """Return the statement that bounds a transaction, and each wait for a lock, on the server, until its end; and that
    makes other *settings* for as long."""
    milliseconds = int(seconds * 1000)
    bounds = {
        "statement_timeout": str(milliseconds),
        "lock_timeout": str(int(min(seconds, lock_seconds) * 1000)),
        "idle_in_transaction_session_timeout": str(milliseconds),
        "client_connection_check_interval": "2000",
        "array_nulls": "on",  # NULL in a list means null; the end of a handler's transaction writes such lists
    }
    calls = (f"pg_catalog.set_config('{name}', '{value}', true)" for name, value in (bounds | dict(settings)).items())
    return f"SELECT {', '.join(calls)}"  # pyright: ignore[reportReturnType]


BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED"  # a role may have another default, and 40001 with it
BACKEND_PID: LiteralString = "SELECT pg_backend_pid()"
# DISCARD ALL without DISCARD PLANS, after which each foreign key's check and each function would be planned again.
CLEAN_SESSION = """
CLOSE ALL; RESET SESSION AUTHORIZATION; RESET ROLE; RESET ALL; DEALLOCATE ALL; UNLISTEN *;
SELECT pg_advisory_unlock_all(); DISCARD TEMP; DISCARD SEQUENCES
"""


def server_version(conn: Conn) -> tuple[int, str]:
    """Return the server's version as a number (150004) and as text. A pooler may report another than the server."""
    row: tuple[int, str] = one(conn, "SELECT current_setting('server_version_num')::integer, version()", {})
    return row


def role_and_encoding(conn: Conn) -> tuple[str, str]:
    """Return the role, and the encoding in which the server sends and takes texts."""
    row = one(conn, "SELECT current_user, current_setting('client_encoding')", {})
    role, encoding = (text.decode(errors="replace") if isinstance(text, bytes) else text for text in row)
    return role, encoding  # where psycopg takes it for SQL_ASCII, every text comes as bytes


def read_only_state(conn: Conn) -> tuple[str, str, bool, bool, str]:
    """Return role, database, whether the server is a standby, whether transactions may write by default, and what has
    set that default (pg_settings.source)."""
    row: tuple[str, str, bool, bool, str] = one(
        conn,
        """
        SELECT current_user, current_database(), pg_is_in_recovery(), setting = 'off', source
        FROM pg_catalog.pg_settings
        WHERE name = 'default_transaction_read_only'
        """,
        {},
    )
    return row


def only_reads(conn: Conn) -> bool:
    """Return whether the connection cannot write now: that of a standby, or by default_transaction_read_only."""
    statement: LiteralString = "SELECT pg_is_in_recovery() OR current_setting('transaction_read_only') = 'on'"
    return bool(one(conn, statement, {})[0])


def take_in(conn: Conn, names: Sequence[str]) -> None:
    """Send *names* to the server. Raises psycopg.DataError for one that the database's encoding cannot hold."""
    conn.execute("SELECT %(names)s::text[]", {"names": list(names)})


def listen(conn: Conn) -> None:
    """Listen to the bell, for as long as the connection lives: only on one that goes straight to the server."""
    conn.execute("LISTEN batchq")


# ------------------------------------------------------------------------------------------------------- schema


def lift_transaction_timeout(conn: Conn) -> None:
    """Turn off the limit that PostgreSQL 17 and later may have for whole transactions, until this one's end."""
    conn.execute("SELECT set_config(name, '0', true) FROM pg_settings WHERE name = 'transaction_timeout'")


def take_migration_lock(conn: Conn) -> None:
    """Wait until no other migration runs; held until the transaction's end.

    Any role can hold an advisory lock for as long as it likes, so that one serves only until there is a table.
    """
    if not has_ledger(conn):
        conn.execute("SELECT pg_advisory_xact_lock(hashtextextended('batchq.migrations', 0))")
    if has_ledger(conn):
        conn.execute("LOCK TABLE batchq.migrations IN SHARE ROW EXCLUSIVE MODE")


def has_ledger(conn: Conn) -> bool:
    """Tell whether any migration was ever applied. to_regclass may not know what others have just made."""
    return bool(
        one(conn, "SELECT count(*) FROM pg_tables WHERE (schemaname, tablename) = ('batchq', 'migrations')", {})[0]
    )


def applied_migrations(conn: Conn) -> dict[int, tuple[str, bool]]:
    """Return name and breaking of each applied migration, by version."""
    rows = every(conn, "SELECT version, name, breaking FROM batchq.migrations ORDER BY version", {})
    return {version: (name, breaking) for version, name, breaking in rows}


def record_migration(conn: Conn, version: int, name: str, breaking: bool) -> None:
    """Record a migration as applied."""
    conn.execute(
        "INSERT INTO batchq.migrations (version, name, breaking) VALUES (%(version)s, %(name)s, %(breaking)s)",
        {"version": version, "name": name, "breaking": breaking},
    )


# ------------------------------------------------------------------------------------------------------ enqueue

INSERT_BATCH: LiteralString = """
INSERT INTO batchq.batches (kind, payload, items, queue, priority, run_at, unique_key,
                            max_attempts, max_failed_items, timeout_seconds{more_columns})
VALUES (%(kind)s, %(payload)s::jsonb, %(items)s::jsonb, %(queue)s, %(priority)s,
        coalesce(%(run_at)s::timestamptz, now() + %(delay_seconds)s::float8 * interval '1 second'), %(unique_key)s,
        %(max_attempts)s, %(max_failed_items)s, %(timeout_seconds)s{more_values})
ON CONFLICT DO NOTHING
RETURNING id
"""
INSERT_UNTRACED_BATCH = INSERT_BATCH.format(more_columns="", more_values="")
# For who traces: a program that does not goes on beside a schema without the column.
INSERT_TRACED_BATCH = INSERT_BATCH.format(more_columns=", trace_context", more_values=", %(trace_context)s")


def insert_batch(parameters: dict[str, Any], trace_context: str | None) -> Statement:
    """Return the statement that inserts a batch, and returns its id unless its unique_key is taken."""
    if trace_context is None:
        return INSERT_UNTRACED_BATCH, parameters
    return INSERT_TRACED_BATCH, parameters | {"trace_context": trace_context}


def now_plus(conn: Conn, seconds: float) -> str:
    """Return the database's time in *seconds*, as text in ISO 8601 whatever DateStyle and TimeZone are: as in JSON."""
    statement: LiteralString = "SELECT to_jsonb(now() + %(seconds)s::float8 * interval '1 second') #>> '{}'"
    text: str = one(conn, statement, {"seconds": seconds})[0]
    return text


def copy_batches(conn: Conn, columns: Sequence[str], same: Sequence[Any], texts: Iterable[Sequence[str | None]]) -> int:
    """Insert batches by COPY; return how many. *columns*: those of *same*, the values that all have, then those of each
    of *texts*. Only inside a transaction: a COPY that fails outside one can leave a pooler's backend to an idle client.

    Writes COPY's text format itself, a hundred rows at a time: half the time of psycopg's write_row.
    """
    names = sql.SQL(", ").join(sql.Identifier(column) for column in columns)
    statement = sql.SQL("COPY batchq.batches ({}) FROM STDIN").format(names)
    start = "".join(f"{copy_field(value)}\t" for value in same)
    lines = (start + "\t".join(map(copy_field, row)) + "\n" for row in texts)
    count = 0
    with conn.cursor() as cursor, cursor.copy(statement) as copy:
        while piece := list(islice(lines, 100)):
            copy.write("".join(piece))
            count += len(piece)
    return count


def has_row_security(conn: Conn) -> bool:
    """Return whether row security holds for the caller, so that COPY does not work."""
    return bool(one(conn, "SELECT row_security_active('batchq.batches')", {})[0])


def insert_batches(
    conn: Conn, columns: Sequence[str], same: Sequence[Any], texts: Iterable[Sequence[str | None]]
) -> int:
    """Do as `copy_batches` does by INSERT, a hundred rows at a time: COPY does not work with row security."""
    names = sql.SQL(", ").join(sql.Identifier(column) for column in columns)
    values = sql.SQL(", ").join([*(sql.Literal(value) for value in same), sql.SQL("u.payload, u.items")])
    statement = sql.SQL(
        "INSERT INTO batchq.batches ({}) SELECT {} FROM unnest(%s::jsonb[], %s::jsonb[]) AS u(payload, items)"
    ).format(names, values)
    rows, count = iter(texts), 0
    while piece := list(islice(rows, 100)):
        conn.execute(statement, [[payload for payload, _ in piece], [items for _, items in piece]])
        count += len(piece)
    return count


COPY_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


def copy_field(value: Any) -> str:
    """Return a value as a field of COPY's text format (PostgreSQL's manual, COPY, "Text Format")."""
    if value is None:
        return "\\N"
    text = value if isinstance(value, str) else str(value)
    return text.translate(COPY_ESCAPES) if COPY_SPECIAL.search(text) else text


COPY_SPECIAL = re.compile(r"[\\\t\n\r]")


# -------------------------------------------------------------------------------------------------------- claim


class Position(NamedTuple):
    """A place in the order of claims within a queue and priority: run_at in seconds since 1970, then the id."""

    run_at: float
    id: int


START = Position(float("-inf"), 0)
END = Position(float("inf"), 0)


class ClaimedRow(NamedTuple):
    """What a claim returns of a batch. Large payloads and cursors are left out (None) and fetched at the start.

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

    @property
    def position(self) -> Position:
        """Its place in the order of claims."""
        return Position(self.run_at, self.id)


# LATERAL, ORDER BY and LIMIT, where EXISTS would do for the result: so each probe goes by the index of the claim.
READY: LiteralString = """
SELECT known.priority
FROM unnest(%(priorities)s::smallint[], %(run_ats)s::float8[], %(ids)s::bigint[]) AS known(priority, run_at, id)
CROSS JOIN LATERAL (
  SELECT true
  FROM batchq.batches_live b
  WHERE b.queue = %(queue)s
    AND b.status = 'pending'
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


BEYOND_PRIORITIES = 40_000  # the column is a smallint


PRIORITIES: LiteralString = """
WITH RECURSIVE level AS (
  (SELECT priority
   FROM batchq.batches_live
   WHERE queue = %(queue)s
     AND status = 'pending'
   ORDER BY priority
   LIMIT 1)
  UNION ALL
  SELECT (SELECT b.priority
          FROM batchq.batches_live b
          WHERE b.queue = %(queue)s
            AND b.status = 'pending'
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
    """Return the positions, by priority, before which nothing was pending, from the rows of `known_positions`."""
    return {priority: Position(run_at, batch_id) for priority, run_at, batch_id in rows}


def move_positions(conn: Conn, queues: Sequence[str], priorities: Sequence[int], lease_seconds: float) -> None:
    """Record from where reading the indexes of these queues and priorities begins; see batchq.positions."""
    one(
        conn,
        "SELECT batchq.move_positions(%(queues)s, %(priorities)s::smallint[], %(lease_seconds)s)",
        {"queues": list(queues), "priorities": list(priorities), "lease_seconds": lease_seconds},
    )


def has_ready(conn: Conn, queue: str, priority: int, kinds: Sequence[str], after: Position) -> bool:
    """Tell whether a batch of *kinds* is ready behind a position. The cheap read of an idle worker."""
    found: bool = one(
        conn,
        "SELECT batchq.has_ready(%(queue)s, %(priority)s::smallint, %(kinds)s, %(run_at)s, %(id)s)",
        {"queue": queue, "priority": priority, "kinds": list(kinds), "run_at": after.run_at, "id": after.id},
    )[0]
    return found


READY_BETWEEN: LiteralString = """
SELECT true
FROM batchq.batches_live
WHERE queue = %(queue)s
  AND status = 'pending'
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


def bounds(after: Position, until: Position) -> dict[str, Any]:
    """Return the parameters for a part of the order of claims."""
    return {"after_run_at": after.run_at, "after_id": after.id, "until_run_at": until.run_at, "until_id": until.id}


# The scan starts behind the position of the last claim: what lies before it is claimed, and its entries in the index
# stay, dead, for as long as anybody holds a snapshot. What is compressed in the row counts as large: 1,000 bytes may
# stand for 90,000, and a claim has up to 2,000 rows.
CLAIM: LiteralString = """
WITH ready AS (
  SELECT id
  FROM batchq.batches_live
  WHERE queue = %(queue)s
    AND status = 'pending'
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
RETURNING b.id, b.kind, b.attempt, b.max_attempts,
  CASE WHEN pg_column_size(b.payload) + coalesce(pg_column_size(b.cursor), 0) <= %(most_bytes)s
        AND num_nonnulls(pg_column_compression(b.payload), pg_column_compression(b.cursor)) = 0
       THEN b.payload::text END,
  CASE WHEN pg_column_size(b.payload) + coalesce(pg_column_size(b.cursor), 0) <= %(most_bytes)s
        AND num_nonnulls(pg_column_compression(b.payload), pg_column_compression(b.cursor)) = 0
       THEN b.cursor::text END,
  b.items_total, b.items_done, b.items_failed, b.max_failed_items, b.timeout_seconds, date_part('epoch', b.run_at),
  CASE WHEN %(most_bytes)s > 0 THEN b.trace_context END
"""
MOST_CLAIMED_BYTES = 1000  # of payload and cursor
# How the server refuses to send a text: bytes that are none in its encoding, or a letter that UTF-8 does not have.
UNREADABLE = (psycopg.errors.CharacterNotInRepertoire, psycopg.errors.UntranslatableCharacter)

# The same without batches that the database refused to change.
CLAIM_SKIPPING: LiteralString = CLAIM.replace(
    "AND run_at <= now()", "AND run_at <= now()\n    AND id <> ALL (%(skipped)s)"
)


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
) -> Statement:
    """Return the statement that takes up to *limit* ready batches of one queue and priority, the oldest first, behind
    one position and up to another; it counts the attempt, and returns the columns of `ClaimedRow`.

    Batches that another claim has locked are passed over, never waited for; *skipped* are left out.
    """
    statement, more = (CLAIM_SKIPPING, {"skipped": list(skipped)}) if skipped else (CLAIM, {})
    return statement, more | {
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


def without_inputs(claim: Statement) -> Statement:
    """Return a `claim` that leaves out every payload and cursor: nothing that a producer has written is sent."""
    return claim[0], claim[1] | {"most_bytes": 0}


def give_back_claim(conn: Conn, queue: str, token: UUID) -> int:
    """Give back whatever was claimed under *token*: after a claim whose COMMIT was cut off. Returns how many."""
    return conn.execute(
        """
        UPDATE batchq.batches_live
        SET status = 'pending',
            attempt = greatest(attempt - 1, 0),
            claimed_by = NULL,
            claim_token = NULL,
            claimed_at = NULL,
            lease_expires_at = NULL
        WHERE queue = %(queue)s
          AND status = 'processing'
          AND claim_token = %(token)s
        """,
        {"queue": queue, "token": token},
    ).rowcount


READY_POSITIONS: LiteralString = """
SELECT date_part('epoch', run_at), id
FROM batchq.batches_live
WHERE queue = %(queue)s
  AND status = 'pending'
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


# --------------------------------------------------------------------------------------------------- the input


def large_input(conn: Conn, queue: str, batch_id: int, token: UUID) -> tuple[str, str | None] | None:
    """Return payload and cursor of a claimed batch, as JSON text; None if it is no longer ours."""
    row = maybe_one(
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
    """Return *count* items from number *first* on, as the text of a JSON array; None if the batch is no longer ours."""
    row = maybe_one(
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
    """Return index and JSON text of up to *count* items that failed in an attempt before *attempt*; none if the batch
    is no longer ours: cancelled and retried, its attempts count from 0, and what we have just tried would come again.
    """
    return every(
        conn,
        """
        SELECT item_index, item::text
        FROM batchq.failed_items
        WHERE queue = %(queue)s
          AND batch_id = %(id)s
          AND retryable
          AND attempt < %(attempt)s
          AND EXISTS (SELECT
                      FROM batchq.batches_live b
                      WHERE b.queue = %(queue)s
                        AND b.id = %(id)s
                        AND b.claim_token = %(token)s)
        ORDER BY item_index
        LIMIT %(count)s
        """,
        {"queue": queue, "id": batch_id, "token": token, "attempt": attempt, "count": count},
    )


def retryable_items(conn: Conn, queue: str, batch_id: int) -> tuple[int, str | None]:
    """Return how many failed items another attempt may cure, and the first failed item's error."""
    row: tuple[int, str | None] = one(
        conn,
        """
        SELECT count(*) FILTER (WHERE retryable), (array_agg(error ORDER BY item_index))[1]
        FROM batchq.failed_items
        WHERE queue = %(queue)s
          AND batch_id = %(id)s
        """,
        {"queue": queue, "id": batch_id},
    )
    return row


# --------------------------------------------------------------------------------------------------- checkpoint

CHECKPOINT: LiteralString = """
WITH mine AS (
  UPDATE batchq.batches_live
  SET items_done = items_done + %(done)s,
      items_failed = items_failed + %(failed)s,
      cursor = CASE WHEN %(keeps_cursor)s THEN cursor ELSE %(cursor)s::jsonb END,
      lease_expires_at = greatest(lease_expires_at,
        pg_catalog.clock_timestamp() + %(lease_seconds)s::float8 * interval '1 second')
  WHERE queue = %(queue)s
    AND id = %(id)s
    AND claim_token = %(token)s
    AND items_done = %(done_before)s
    AND items_failed = %(failed_before)s
  RETURNING queue, id, attempt, CASE WHEN %(first_index)s::integer IS NOT NULL THEN items END AS items
), recovered AS (
  DELETE FROM batchq.failed_items f
  USING mine
  WHERE f.queue = mine.queue
    AND f.batch_id = mine.id
    AND f.item_index = ANY (%(recovered)s::integer[])
), failure AS (
  SELECT item_index, error, retryable
  FROM unnest(%(indexes)s::integer[], %(errors)s::text[], %(retryables)s::boolean[])
    AS u(item_index, error, retryable)
), first_failures AS (
  INSERT INTO batchq.failed_items (queue, batch_id, item_index, item, error, retryable, attempt)
  SELECT mine.queue, mine.id, failure.item_index, slice.item, failure.error, failure.retryable, mine.attempt
  FROM mine
  CROSS JOIN LATERAL pg_catalog.jsonb_array_elements(pg_catalog.jsonb_path_query_array(mine.items, '$[$first to $last]',
    pg_catalog.jsonb_build_object('first', %(first_index)s::integer, 'last', %(last_index)s::integer)))
    WITH ORDINALITY AS slice(item, number)
  JOIN failure ON failure.item_index = %(first_index)s::integer + slice.number - 1
), further_failures AS (
  UPDATE batchq.failed_items f
  SET error = failure.error,
      retryable = failure.retryable,
      attempt = mine.attempt,
      failed_at = pg_catalog.now()
  FROM mine, failure
  WHERE %(first_index)s::integer IS NULL
    AND f.queue = mine.queue
    AND f.batch_id = mine.id
    AND f.item_index = failure.item_index
)
SELECT id
FROM mine
"""


# The same where no item failed and none that had failed is cured: most checkpoints, and they are planned in a tenth.
PLAIN_CHECKPOINT: LiteralString = """
UPDATE batchq.batches_live
SET items_done = items_done + %(done)s,
    items_failed = items_failed + %(failed)s,
    cursor = CASE WHEN %(keeps_cursor)s THEN cursor ELSE %(cursor)s::jsonb END,
    lease_expires_at = greatest(lease_expires_at,
      pg_catalog.clock_timestamp() + %(lease_seconds)s::float8 * interval '1 second')
WHERE queue = %(queue)s
  AND id = %(id)s
  AND claim_token = %(token)s
  AND items_done = %(done_before)s
  AND items_failed = %(failed_before)s
RETURNING id
"""


class ItemFailure(NamedTuple):
    """A failed item as it is stored, but for the item itself, which the table has: one line of error."""

    item_index: int
    error: str
    retryable: bool


class Progress(NamedTuple):
    """What a checkpoint changes: counters by how much, failures to record, failures that are cured.

    first_index: where the chunk begins, if its items were worked for the first time; None when they had failed before.
    done_before, failed_before: the counters that it starts from.
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
    """Return the fenced statement that moves counters, cursor, failed items and lease; no row: no longer ours.

    Fenced by the counters as well: a checkpoint whose COMMIT was cut off, written again, would count its items twice.
    The lease counts from clock_timestamp(), since now() is when the transaction began, which may be long ago. A
    statement, not a call: it ends transactions of `def` and of `async def` handlers alike.
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
    return CHECKPOINT, parameters | failure_parameters(progress)


def failure_parameters(progress: Progress) -> dict[str, Any]:
    """Return the parameters for the items that failed, and for those that are cured."""
    return {
        "recovered": list(progress.recovered),
        "first_index": progress.first_index if progress.failures else None,
        "last_index": max((failure.item_index for failure in progress.failures), default=None),
        "indexes": [failure.item_index for failure in progress.failures],
        "errors": [failure.error for failure in progress.failures],
        "retryables": [failure.retryable for failure in progress.failures],
    }


# ------------------------------------------------------------------------------------------------------- finish

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


def array_text(values: Iterable[object]) -> str:
    """Return an array of numbers or uuids as Postgres reads it."""
    return f"{{{','.join(map(str, values))}}}"


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


# ------------------------------------------------------------------------------------------------------- leases


class Leases(NamedTuple):
    """What became of leases, as (id, claim token); one that is neither is that of a locked row, see `extend`."""

    extended: set[tuple[int, UUID]]
    lost: set[tuple[int, UUID]]


EXTEND: LiteralString = """
WITH given AS (
  SELECT u.id, u.token
  FROM unnest(%(ids)s::bigint[], %(tokens)s::uuid[]) AS u(id, token)
), mine AS (
  SELECT b.id
  FROM batchq.batches_live b
  JOIN given ON b.id = given.id AND b.claim_token = given.token
  WHERE b.queue = %(queue)s
    AND b.id = ANY (%(ids)s::bigint[])
  FOR UPDATE OF b SKIP LOCKED
), extended AS (
  UPDATE batchq.batches_live b
  SET lease_expires_at = now() + %(lease_seconds)s::float8 * interval '1 second'
  WHERE b.queue = %(queue)s
    AND b.id = ANY (ARRAY(SELECT id FROM mine))
  RETURNING b.id, b.claim_token
)
SELECT given.id, given.token, extended.id IS NOT NULL AS is_extended
FROM given
LEFT JOIN extended ON extended.id = given.id AND extended.claim_token = given.token
LEFT JOIN LATERAL (
  SELECT true AS is_ours
  FROM batchq.batches_live b
  WHERE b.queue = %(queue)s
    AND b.id = given.id
    AND b.claim_token = given.token
  LIMIT 1  -- keeps the planner from reading the whole table to hash it
) held ON true
WHERE extended.id IS NOT NULL
   OR held.is_ours IS NULL
"""


def extend(queue: str, ids: Sequence[int], tokens: Sequence[UUID], lease_seconds: float) -> Statement:
    """Return the statement that extends leases; `leases` tells from its rows what became of them.

    A row that is locked is passed over, and waits for the next round: its lock is the finish or the checkpoint of our
    own process, and two statements that lock many rows in different orders would deadlock.
    """
    return EXTEND, {"queue": queue, "ids": list(ids), "tokens": list(tokens), "lease_seconds": lease_seconds}


def leases(rows: Iterable[tuple[int, UUID, bool]]) -> Leases:
    """Return which leases were extended, and which batches are no longer ours, from the rows of `extend`."""
    found = list(rows)
    return Leases(
        extended={(batch_id, token) for batch_id, token, is_extended in found if is_extended},
        lost={(batch_id, token) for batch_id, token, is_extended in found if not is_extended},
    )


RESCUE: LiteralString = """
WITH expired AS (
  SELECT id, attempt < max_attempts AS again
  FROM batchq.batches_live
  WHERE queue = %(queue)s
    AND status = 'processing'
    AND lease_expires_at > to_timestamp(%(after)s)
    AND lease_expires_at < now()
    AND id <> ALL (%(skipped)s::bigint[])
    AND (%(only)s::bigint[] IS NULL OR id = ANY (%(only)s::bigint[]))
  ORDER BY lease_expires_at
  LIMIT %(limit)s
  FOR UPDATE SKIP LOCKED
), freed AS (
  UPDATE batchq.batches_live b
  SET status = 'pending',
      run_at = CASE WHEN b.attempt < 2 THEN b.run_at
                    ELSE now() + interval '1 second' * random() * 2 ^ least(b.attempt, 8) * %(spread_seconds)s END,
      claimed_by = NULL,
      claim_token = NULL,
      claimed_at = NULL,
      lease_expires_at = NULL,
      errors = batchq.append_error(b.errors, b.attempt, jsonb_build_object('error',
        format('worker died: %%s gave no sign of life until its lease ran out', b.claimed_by)))
  WHERE b.queue = %(queue)s
    AND b.id = ANY (ARRAY(SELECT id FROM expired WHERE again))
  RETURNING b.id, b.kind, b.attempt, b.status
), gone AS (
  DELETE FROM batchq.batches_live b
  WHERE b.queue = %(queue)s
    AND b.id = ANY (ARRAY(SELECT id FROM expired WHERE NOT again))
  RETURNING b.*
), dead AS (
  INSERT INTO batchq.batches_finished (id, queue, kind, status, payload, items, priority, run_at, unique_key,
    max_attempts, max_failed_items, timeout_seconds, attempt, claimed_by, claimed_at, items_total, items_done,
    items_failed, cursor, errors, created_at, finished_at, trace_context)
  OVERRIDING SYSTEM VALUE
  SELECT id, queue, kind, 'failed', payload, items, priority, run_at, unique_key, max_attempts,
    max_failed_items, timeout_seconds, attempt, claimed_by, claimed_at, items_total, items_done, items_failed, cursor,
    batchq.append_error(errors, attempt, jsonb_build_object('error',
      format('worker died: %%s gave no sign of life until its lease ran out; no attempts left', claimed_by))),
    created_at, now(), trace_context
  FROM gone
  RETURNING id, kind, attempt, status
)
SELECT id, kind, attempt, status FROM freed
UNION ALL
SELECT id, kind, attempt, status FROM dead
"""


def rescue(
    conn: Conn,
    queue: str,
    limit: int,
    spread_seconds: float = 0,
    after: float = float("-inf"),
    skipped: Sequence[int] = (),
    only: Sequence[int] | None = None,
) -> list[tuple[int, str, int, str]]:
    """Take back up to *limit* batches whose lease ran out; return id, kind, attempt and new status of each.

    Of leases that ran out behind *after*, in seconds since 1970: while a snapshot is held, all that were ever given are
    in the index still.

    The attempt stays counted: a batch that kills its worker ends as failed when its attempts are used up. One that is
    rescued for the first time is ready at once; one whose worker died again waits for a random part of *spread_seconds*
    * 2^attempt: so those that were in hand beside a batch that kills its worker are not beside it every time.

    *skipped* are left out; *only*: of these alone.
    """
    parameters = {
        "queue": queue,
        "limit": limit,
        "spread_seconds": spread_seconds,
        "after": after,
        "skipped": list(skipped),
        "only": None if only is None else list(only),
    }
    return every(conn, RESCUE, parameters)


EXPIRED: LiteralString = """
SELECT id
FROM batchq.batches_live
WHERE queue = %(queue)s
  AND status = 'processing'
  AND lease_expires_at > to_timestamp(%(after)s)
  AND lease_expires_at < now()
  AND id <> ALL (%(skipped)s::bigint[])
ORDER BY lease_expires_at
LIMIT %(limit)s
"""


def expired(queue: str, limit: int, after: float, skipped: Sequence[int]) -> Statement:
    """Return the statement that returns the ids of the batches that a `rescue` with these arguments would take back."""
    return EXPIRED, {"queue": queue, "limit": limit, "after": after, "skipped": list(skipped)}


def now(conn: Conn) -> float:
    """Return when the transaction began, in seconds since 1970."""
    return float(one(conn, "SELECT extract(epoch FROM now())", {})[0])


LEASE_PROBE: LiteralString = """
SELECT date_part('epoch', now()), date_part('epoch', start.at),
  (SELECT true
   FROM batchq.batches_live
   WHERE queue = %(queue)s
     AND status = 'processing'
     AND lease_expires_at > start.at
     AND lease_expires_at < now()
   ORDER BY lease_expires_at  -- by its index: without, a plan may count on meeting one soon, and read them all
   LIMIT 1) IS NOT NULL
FROM (SELECT greatest(to_timestamp(%(after)s),
                      (SELECT at
                       FROM batchq.positions
                       WHERE index = 'lease'
                         AND queue = %(queue)s
                         AND %(after)s = '-infinity'::float8)) AS at) AS start
"""


def lease_probe(queue: str, after: float) -> Statement:
    """Return the statement that returns whether any lease has expired since *after*: the time now, where the probe
    began, and the answer; times in seconds since 1970. From minus infinity it begins at the row of batchq.positions."""
    return LEASE_PROBE, {"queue": queue, "after": after}


def status_of(conn: Conn, queue: str, batch_id: int) -> str | None:
    """Return the batch's status now, None if there is no such batch."""
    row = maybe_one(
        conn,
        "SELECT status FROM batchq.batches WHERE queue = %(queue)s AND id = %(id)s",
        {"queue": queue, "id": batch_id},
    )
    return row[0] if row else None


# ------------------------------------------------------------------------------------------ workers, maintenance


class WorkerRow(NamedTuple):
    """A worker as it shows itself in batchq.workers."""

    id: str
    hostname: str
    pid: int
    version: str
    queues: list[str]
    kinds: list[str]
    concurrency: int


HEARTBEAT: LiteralString = """
WITH beat AS (
  INSERT INTO batchq.workers (id, hostname, pid, version, queues, kinds, concurrency, in_hand, stopping, lost_slots)
  VALUES (%(id)s, %(hostname)s, %(pid)s, %(version)s, %(queues)s, %(kinds)s, %(concurrency)s, %(in_hand)s, %(stopping)s,
    %(lost_slots)s)
  ON CONFLICT (id) DO UPDATE
  SET in_hand = excluded.in_hand,
      stopping = excluded.stopping,
      lost_slots = excluded.lost_slots,
      heartbeat_at = now()
  RETURNING drain_asked_at IS NOT NULL AS is_asked_to_drain
)
SELECT (SELECT is_asked_to_drain FROM beat),
  count(*) + (NOT %(stopping)s)::integer,
  count(*) FILTER (WHERE id < %(id)s),
  date_part('epoch', clock_timestamp()),
  pg_stat_get_dead_tuples('batchq.batches_live'::regclass)
FROM batchq.workers
WHERE id <> %(id)s
  AND heartbeat_at > now() - %(silent_seconds)s * interval '1 second'
  AND queues && %(queues)s::text[]
  AND NOT stopping
"""
# For what the keeper writes besides; a lock is waited for 100 ms at most: leases are kept by the same thread.
HEARTBEAT_SETTINGS = THROUGHPUT_SETTINGS = PLAIN | WITHOUT_WAITING_FOR_THE_DISK | {"lock_timeout": "100"}


class Turn(NamedTuple):
    """Whose turn it is to poll: a worker's *number*, from 0, among how many *workers*; *now* in seconds since 1970."""

    workers: int
    number: int
    now: float


class Beat(NamedTuple):
    """The answer to a heartbeat. *dead_rows*: how many the live table has, as the server's statistics count them."""

    is_asked_to_drain: bool
    turn: Turn
    dead_rows: int


def heartbeat(
    worker: WorkerRow, in_hand: int, stopping: bool, lost_slots: int = 0, silent_seconds: float = 15
) -> Statement:
    """Return the statement that shows a sign of life. Its row, for `beat`, tells whether the worker is asked to drain,
    and its turn among those that serve one of its queues and showed life within *silent_seconds*."""
    its = {"in_hand": in_hand, "stopping": stopping, "lost_slots": lost_slots, "silent_seconds": silent_seconds}
    return HEARTBEAT, worker._asdict() | its


def beat(row: Sequence[Any]) -> Beat:
    """Return what the row of a `heartbeat` tells."""
    return Beat(bool(row[0]), Turn(*row[1:4]), row[4])


def forget_silent_workers(conn: Conn) -> None:
    """Remove the workers that were silent for an hour, but for those that another one is removing."""
    wait_briefly_for_locks(conn)  # leases are kept by the same thread
    conn.execute(
        """
        DELETE FROM batchq.workers
        WHERE id IN (SELECT id
                     FROM batchq.workers
                     WHERE heartbeat_at < now() - interval '1 hour'
                     FOR UPDATE SKIP LOCKED)
        """
    )


def forget_worker(conn: Conn, worker_id: str) -> None:
    """Remove a worker that has ended."""
    conn.execute("DELETE FROM batchq.workers WHERE id = %(id)s", {"id": worker_id})


class Tally(NamedTuple):
    """What a worker has counted of one queue and kind: ends of batches, *items* worked, the sum of run times in
    seconds, and *run_times*, how many lasted how long (see batchq.throughput_minutes.run_times)."""

    queue: str
    kind: str
    completed: int
    failed: int
    cancelled: int
    retried: int
    items: int
    run_seconds: float
    run_times: Sequence[int]


COUNT_THROUGHPUT: LiteralString = """
INSERT INTO batchq.throughput_minutes AS t (minute, queue, kind, worker, completed, failed, cancelled, retried, items,
  run_seconds, run_times)
SELECT date_trunc('minute', now()), queue, kind, %(worker)s, completed, failed, cancelled, retried, items, run_seconds,
  run_times::integer[]
FROM unnest(%(queues)s::text[], %(kinds)s::text[], %(completed)s::bigint[], %(failed)s::bigint[],
            %(cancelled)s::bigint[], %(retried)s::bigint[], %(items)s::bigint[], %(run_seconds)s::float8[],
            %(run_times)s::text[])
  AS u(queue, kind, completed, failed, cancelled, retried, items, run_seconds, run_times)
ON CONFLICT (minute, queue, kind, worker) DO UPDATE
SET completed = t.completed + excluded.completed,
    failed = t.failed + excluded.failed,
    cancelled = t.cancelled + excluded.cancelled,
    retried = t.retried + excluded.retried,
    items = t.items + excluded.items,
    run_seconds = t.run_seconds + excluded.run_seconds,
    run_times = batchq.add_counts(t.run_times, excluded.run_times)
RETURNING t.queue
"""


def count_throughput(worker_id: str, tallies: Sequence[Tally]) -> Statement:
    """Return the statement that adds what a worker has counted to its rows of this minute."""
    queues, kinds, completed, failed, cancelled, retried, items, run_seconds, run_times = zip(*tallies, strict=True)
    return COUNT_THROUGHPUT, {
        "worker": worker_id,
        "queues": list(queues),
        "kinds": list(kinds),
        "completed": list(completed),
        "failed": list(failed),
        "cancelled": list(cancelled),
        "retried": list(retried),
        "items": list(items),
        "run_seconds": list(run_seconds),
        "run_times": [array_text(counts) for counts in run_times],
    }


def pauses(conn: Conn) -> list[tuple[str | None, str | None]]:
    """Return queue and kind of each pause; None stands for any."""
    return every(conn, "SELECT queue, kind FROM batchq.pauses WHERE until IS NULL OR until > now()", {})


def prune_records(conn: Conn) -> int:
    """Drop old rows of batchq.audit and pauses that have ended; return how many rows of batchq.audit."""
    pruned: int = one(conn, "SELECT batchq.prune_records()", {})[0]
    return pruned


def merge_throughput(conn: Conn) -> int:
    """Make one row of the rows of all workers, for each minute that is over; return how many were made."""
    wait_briefly_for_locks(conn)  # leases are kept by the same thread
    merged: int = one(conn, "SELECT batchq.merge_throughput()", {})[0]
    return merged


def take_maintenance(conn: Conn) -> bool:
    """Take the lock of maintenance, until the end of the transaction, if it is free: else another worker is at it."""
    taken: bool = one(conn, "SELECT batchq.try_lock('partitions')", {})[0]
    return taken


def create_finished_partitions(conn: Conn, days: int) -> int:
    """Create the missing partitions of today and the next days (UTC); return how many.

    Raises LockNotAvailable rather than wait for a lock for more than 100 ms: whoever comes after would wait behind us.
    """
    wait_briefly_for_locks(conn)
    created: int = one(
        conn,
        "SELECT batchq.create_finished_partitions((now() AT TIME ZONE 'UTC')::date, %(days)s)",
        {"days": days},
    )[0]
    return created


def prune(conn: Conn, older_than_days: float) -> int:
    """Drop the finished partitions older than that; return how many. Raises LockNotAvailable after 100 ms."""
    wait_briefly_for_locks(conn)
    dropped: int = one(conn, "SELECT batchq.prune(%(days)s::float8 * interval '1 day')", {"days": older_than_days})[0]
    return dropped


def wait_briefly_for_locks(conn: Conn, milliseconds: int = 100) -> None:
    """Bound each wait for a lock, until the end of the transaction."""
    one(conn, "SELECT set_config('lock_timeout', %(wait)s, true)", {"wait": f"{milliseconds}ms"})


# ------------------------------------------------------------------------------------------------- for people


def cancel(conn: Conn, batch_id: int, reason: str | None, actor: str | None = None) -> str | None:
    """Call batchq.cancel; return the batch's status, None if there is no such batch."""
    parameters = {"id": batch_id, "reason": reason, "actor": actor}
    status: str | None = one(conn, "SELECT batchq.cancel(%(id)s, %(reason)s, %(actor)s)", parameters)[0]
    return status


def retry(conn: Conn, batch_id: int, whole: bool, reason: str | None = None, actor: str | None = None) -> str | None:
    """Call batchq.retry; return the batch's status, None if there is no such batch."""
    parameters = {"id": batch_id, "whole": whole, "reason": reason, "actor": actor}
    status: str | None = one(conn, "SELECT batchq.retry(%(id)s, %(whole)s, %(reason)s, %(actor)s)", parameters)[0]
    return status


def retry_items(conn: Conn, batch_id: int, reason: str | None = None, actor: str | None = None) -> str | None:
    """Call batchq.retry_items; return the batch's status, None if there is no such batch."""
    parameters = {"id": batch_id, "reason": reason, "actor": actor}
    status: str | None = one(conn, "SELECT batchq.retry_items(%(id)s, %(reason)s, %(actor)s)", parameters)[0]
    return status


def snooze(
    conn: Conn,
    batch_id: int,
    delay_seconds: float | None,
    until: str | None,
    reason: str | None = None,
    actor: str | None = None,
) -> str | None:
    """Call batchq.snooze; return the batch's status, None if there is no such batch."""
    status: str | None = one(
        conn,
        "SELECT batchq.snooze(%(id)s, %(delay)s * interval '1 second', %(until)s::timestamptz, %(reason)s, %(actor)s)",
        {"id": batch_id, "delay": delay_seconds, "until": until, "reason": reason, "actor": actor},
    )[0]
    return status


def set_priority(
    conn: Conn, batch_id: int, priority: int, reason: str | None = None, actor: str | None = None
) -> str | None:
    """Call batchq.set_priority; return the batch's status, None if there is no such batch."""
    status: str | None = one(
        conn,
        "SELECT batchq.set_priority(%(id)s, %(priority)s, %(reason)s, %(actor)s)",
        {"id": batch_id, "priority": priority, "reason": reason, "actor": actor},
    )[0]
    return status


def move(conn: Conn, batch_id: int, to_queue: str, reason: str | None = None, actor: str | None = None) -> str | None:
    """Call batchq.move; return the batch's status, None if there is no such batch."""
    status: str | None = one(
        conn,
        "SELECT batchq.move(%(id)s, %(to_queue)s, %(reason)s, %(actor)s)",
        {"id": batch_id, "to_queue": to_queue, "reason": reason, "actor": actor},
    )[0]
    return status


def pause(
    conn: Conn,
    queue: str | None,
    kind: str | None,
    delay_seconds: float | None = None,
    until: str | None = None,
    reason: str | None = None,
    actor: str | None = None,
) -> bool:
    """Call batchq.pause, to end in *delay_seconds*, *until* a time, or by batchq.resume; tell whether it is new."""
    is_new: bool = one(
        conn,
        """
        SELECT batchq.pause(%(queue)s, %(kind)s,
          coalesce(%(until)s::timestamptz, now() + %(delay)s * interval '1 second'), %(reason)s, %(actor)s)
        """,
        {"queue": queue, "kind": kind, "delay": delay_seconds, "until": until, "reason": reason, "actor": actor},
    )[0]
    return is_new


def resume(
    conn: Conn, queue: str | None, kind: str | None, reason: str | None = None, actor: str | None = None
) -> bool:
    """Call batchq.resume; tell whether there was such a pause."""
    was_paused: bool = one(
        conn,
        "SELECT batchq.resume(%(queue)s, %(kind)s, %(reason)s, %(actor)s)",
        {"queue": queue, "kind": kind, "reason": reason, "actor": actor},
    )[0]
    return was_paused


def drain_worker(conn: Conn, worker_id: str, reason: str | None = None, actor: str | None = None) -> str | None:
    """Call batchq.drain_worker; return draining, None if there is no such worker."""
    parameters = {"id": worker_id, "reason": reason, "actor": actor}
    status: str | None = one(conn, "SELECT batchq.drain_worker(%(id)s, %(reason)s, %(actor)s)", parameters)[0]
    return status


class Chunk(NamedTuple):
    """What came of one chunk of a verb in bulk.

    next_place: from where to go on, None at the end. keyed: how many were left out beside a live batch of their
    unique_key.
    """

    matched: int
    changed: int
    next_place: str | None
    audit_id: int | None
    keyed: int


def clock_json(conn: Conn) -> str:
    """Return the database's time as JSON writes it, whatever the session's DateStyle is."""
    text: str = one(conn, "SELECT to_jsonb(now()) #>> '{}'", {})[0]
    return text


def bulk(
    conn: Conn,
    verb: str,
    filter: Mapping[str, Any],  # noqa: A002 (as in batchq.bulk)
    change: Mapping[str, Any],
    place: str | None,
    dry_run: bool,
    most: int,
    reason: str | None,
    actor: str | None,
    audit_id: int | None,
) -> Chunk:
    """Call batchq.bulk: do a verb for the next *most* batches that match."""
    row = one(
        conn,
        """
        SELECT matched, changed, next_place::text, audit, keyed
        FROM batchq.bulk(%(verb)s, %(filter)s::jsonb, %(change)s::jsonb, %(place)s::jsonb, %(dry_run)s, %(most)s,
                         %(reason)s, %(actor)s, %(audit_id)s)
        """,
        {
            "verb": verb,
            "filter": json.dumps(dict(filter)),
            "change": json.dumps(dict(change)),
            "place": place,
            "dry_run": dry_run,
            "most": most,
            "reason": reason,
            "actor": actor,
            "audit_id": audit_id,
        },
    )
    return Chunk(*row)


def pause_rows(conn: Conn) -> list[dict[str, Any]]:
    """Return the pauses that have not ended, as JSON objects."""
    return objects(
        conn,
        """
        SELECT to_jsonb(p)
        FROM batchq.pauses p
        WHERE p.until IS NULL
           OR p.until > now()
        ORDER BY p.queue, p.kind
        """,
        {},
    )


def audit_rows(conn: Conn, limit: int, batch_id: int | None = None) -> list[dict[str, Any]]:
    """Return the latest rows of batchq.audit, of one batch or of all, as JSON objects."""
    return objects(
        conn,
        """
        SELECT to_jsonb(a)
        FROM batchq.audit a
        WHERE (%(batch_id)s::bigint IS NULL OR a.batch_id = %(batch_id)s)
        ORDER BY a.id DESC
        LIMIT %(limit)s
        """,
        {"batch_id": batch_id, "limit": limit},
    )


def failure_rows(conn: Conn) -> list[dict[str, Any]]:
    """Return the rows of batchq.failures as JSON objects, the latest first."""
    return objects(conn, "SELECT to_jsonb(f) FROM batchq.failures f ORDER BY f.latest_at DESC, f.kind, f.error", {})


# Of the finer statuses of batchq.status: those of batchq.batches, by which partitions that cannot match are left out.
STORED_STATUS = {"ready": "pending", "scheduled": "pending", "retrying": "pending", "stalled": "processing"}
FINAL_STATUSES = ("completed", "failed", "cancelled")
HIGHEST_ID = 2**63 - 1
MOST_PROCESSING = 100_000  # of one queue, in which changes are looked for


def status_rows(
    conn: Conn, queue: str | None, kind: str | None, status: str | None, limit: int
) -> list[dict[str, Any]]:
    """Return rows of batchq.status, the newest first, as JSON objects (a date may be beyond Python's)."""
    return objects(
        conn,
        """
        WITH newest AS (
          SELECT id
          FROM batchq.newest_live(%(queue)s, %(kind)s, %(status)s, %(highest_id)s, %(limit)s) AS live(id)
          UNION ALL
          (SELECT id
           FROM batchq.status
           WHERE stored_status = ANY (%(finals)s)
             AND (%(queue)s::text IS NULL OR queue = %(queue)s)
             AND (%(kind)s::text IS NULL OR kind = %(kind)s)
           ORDER BY id DESC
           LIMIT %(limit)s)
        )
        SELECT to_jsonb(s)
        FROM batchq.status s
        WHERE s.id = ANY (ARRAY(SELECT id FROM newest ORDER BY id DESC LIMIT %(limit)s))
        ORDER BY s.id DESC
        """,
        {
            "queue": queue,
            "kind": kind,
            "status": status,
            "finals": [final for final in FINAL_STATUSES if status in (None, final)],
            "highest_id": HIGHEST_ID,
            "limit": limit,
        },
    )


def status_row(conn: Conn, batch_id: int) -> dict[str, Any] | None:
    """Return a batch's row of batchq.status as a JSON object."""
    found = objects(conn, "SELECT to_jsonb(s) FROM batchq.status s WHERE s.id = %(id)s", {"id": batch_id})
    return found[0] if found else None


def running_rows(conn: Conn, queue: str | None, kind: str | None, limit: int) -> list[dict[str, Any]]:
    """Return rows of batchq.status of batches that are being worked, or stalled, as JSON objects."""
    return objects(
        conn,
        """
        WITH running AS (
          SELECT b.id
          FROM batchq.busy_queues() q
          CROSS JOIN LATERAL (
            SELECT id
            FROM batchq.batches_live
            WHERE queue = q.queue
              AND status = 'processing'
              AND lease_expires_at >= q.at
              AND (%(kind)s::text IS NULL OR kind = %(kind)s)
            ORDER BY lease_expires_at
            LIMIT %(limit)s
          ) b
          WHERE q.at IS NOT NULL
            AND (%(queue)s::text IS NULL OR q.queue = %(queue)s)
          LIMIT %(limit)s
        )
        SELECT to_jsonb(s)
        FROM batchq.status s
        WHERE s.id = ANY (ARRAY(SELECT id FROM running))
        """,
        {"queue": queue, "kind": kind, "limit": limit},
    )


def failed_rows(conn: Conn, queue: str | None, kind: str | None, limit: int) -> list[dict[str, Any]]:
    """Return rows of batchq.status of the batches that failed last, of the last day, as JSON objects."""
    return objects(
        conn,
        """
        WITH failed AS (
          SELECT id
          FROM batchq.batches_finished
          WHERE status = 'failed'
            AND finished_at > now() - interval '1 day'
            AND (%(queue)s::text IS NULL OR queue = %(queue)s)
            AND (%(kind)s::text IS NULL OR kind = %(kind)s)
          ORDER BY finished_at DESC
          LIMIT %(limit)s
        )
        SELECT to_jsonb(s)
        FROM batchq.status s
        WHERE s.id = ANY (ARRAY(SELECT id FROM failed))
        ORDER BY s.finished_at DESC
        """,
        {"queue": queue, "kind": kind, "limit": limit},
    )


def queue_rows(conn: Conn, queue: str | None = None, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the rows of batchq.queues as JSON objects."""
    return objects(
        conn,
        """
        SELECT to_jsonb(q)
        FROM batchq.queues q
        WHERE (%(queue)s::text IS NULL OR q.queue = %(queue)s)
          AND (%(kind)s::text IS NULL OR q.kind = %(kind)s)
        ORDER BY q.queue, q.kind
        """,
        {"queue": queue, "kind": kind},
    )


def batch_object(conn: Conn, batch_id: int, inputs_as_text: bool = False) -> dict[str, Any] | None:
    """Return one batch as a JSON object: its row of batchq.status, and payload, cursor, result and errors.

    *inputs_as_text*: payload and cursor as the text of their JSON, for values that Python refuses to read.
    """
    found = objects(
        conn,
        """
        SELECT to_jsonb(s) || jsonb_build_object(
          'payload', CASE WHEN %(as_text)s THEN to_jsonb(b.payload::text) ELSE b.payload END,
          'cursor', CASE WHEN %(as_text)s THEN to_jsonb(b.cursor::text) ELSE b.cursor END,
          'result', b.result, 'errors', b.errors,
          'max_failed_items', b.max_failed_items, 'timeout_seconds', b.timeout_seconds)
        FROM batchq.batches b
        JOIN batchq.status s ON s.id = b.id AND s.queue = b.queue
        WHERE b.id = %(id)s
          AND s.id = %(id)s
        """,
        {"id": batch_id, "as_text": inputs_as_text},
    )
    return found[0] if found else None


def failed_item_objects(conn: Conn, batch_id: int, limit: int) -> list[dict[str, Any]]:
    """Return a batch's failed items in order, as JSON objects."""
    return objects(
        conn,
        """
        SELECT to_jsonb(f) - 'queue' - 'batch_id'
        FROM batchq.failed_items f
        WHERE f.batch_id = %(id)s
        ORDER BY f.item_index
        LIMIT %(limit)s
        """,
        {"id": batch_id, "limit": limit},
    )


def newest_id(conn: Conn) -> int:
    """Return the highest id of a batch, 0 without any."""
    newest: int = one(
        conn,
        """
        SELECT greatest((SELECT max(id) FROM batchq.batches_finished),
                        (SELECT max(id) FROM batchq.newest_live(NULL, NULL, NULL, %(highest_id)s, 1) AS live(id)), 0)
        """,
        {"highest_id": HIGHEST_ID},
    )[0]
    return newest


def ids_given_twice(conn: Conn, finished_days: float) -> list[tuple[str, int, int]]:
    """Return relation, last id given and largest id in use, where new rows would get ids that are in use.

    Looks at what finished in the last *finished_days* days: each older day would be another lock.
    """
    statement: LiteralString = """
        SELECT relation, last_given, newest
        FROM batchq.ids_given_twice(now() - %(days)s::float8 * interval '1 day')
    """
    return every(conn, statement, {"days": finished_days})


CHANGED: LiteralString = """
WITH changed AS (
  SELECT id, queue, kind, 1 AS rank FROM batchq.batches_finished WHERE finished_at >= %(since)s::timestamptz
    AND status = 'failed'
  UNION ALL
  SELECT b.id, b.queue, b.kind, CASE WHEN b.lease_expires_at < now() THEN 2 ELSE 3 END
  FROM batchq.busy_queues() q
  CROSS JOIN LATERAL (
    SELECT id, queue, kind, lease_expires_at
    FROM batchq.batches_live
    WHERE queue = q.queue
      AND status = 'processing'
      AND lease_expires_at >= q.at
    ORDER BY lease_expires_at
    LIMIT %(most_processing)s
  ) b
  WHERE q.at IS NOT NULL
  UNION ALL
  SELECT id, queue, kind, 4 FROM batchq.batches_finished WHERE finished_at >= %(since)s::timestamptz
  UNION ALL
  SELECT id, queue, kind, 5 FROM batchq.batches_live WHERE id = ANY (%(ids)s)
  UNION ALL
  SELECT id, queue, kind, 6 FROM batchq.batches_live WHERE id = ANY (ARRAY(
    SELECT new.id
    FROM batchq.newest_live(%(queue)s, %(kind)s, NULL, %(highest_id)s, %(limit)s) AS new(id)
    WHERE new.id > %(after_id)s))
), first_changed AS (
  SELECT id
  FROM changed
  WHERE (%(queue)s::text IS NULL OR queue = %(queue)s)
    AND (%(kind)s::text IS NULL OR kind = %(kind)s)
  GROUP BY id
  ORDER BY min(rank), id
  LIMIT %(limit)s
)
SELECT to_jsonb(s)
FROM batchq.status s
WHERE s.id = ANY (ARRAY(SELECT id FROM first_changed))
ORDER BY s.id
"""


def changed_rows(
    conn: Conn, since: str, after_id: int, ids: Sequence[int], queue: str | None, kind: str | None, limit: int
) -> list[dict[str, Any]]:
    """Return up to *limit* rows of batchq.status: those that failed after *since* or are stalled; those processing,
    finished after *since*, named by *ids* or new (their id is above *after_id*). Where there are more, the first ones
    of that order are taken."""
    return objects(
        conn,
        CHANGED,
        {
            "since": since,
            "after_id": after_id,
            "ids": list(ids),
            "queue": queue,
            "kind": kind,
            "highest_id": HIGHEST_ID,
            "most_processing": MOST_PROCESSING,
            "limit": limit,
        },
    )


def worker_objects(conn: Conn) -> list[dict[str, Any]]:
    """Return the live workers as JSON objects."""
    return objects(
        conn,
        "SELECT to_jsonb(w) FROM batchq.workers w WHERE heartbeat_at > now() - interval '1 minute' ORDER BY id",
        {},
    )


# ------------------------------------------------------------------------------------- what is looked at for trouble


@cache
def named(file: str) -> dict[str, str]:
    """Return the queries of a file beside this one, by the name that stands before each as "-- name: ..."."""
    text = (Path(__file__).parents[1] / "operate" / file).read_text(encoding="utf-8")
    _, *parts = re.split(r"^-- name: (\w+)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def invariants() -> dict[str, str]:
    """Return what is always true, by name: each a query of the rows for which it is not, see `offenders`."""
    return named("invariants.sql")


def offenders(conn: Conn, invariant: str, most: int) -> list[tuple[str, str]]:
    """Return id and what is wrong of up to *most* rows for which an invariant does not hold."""
    statement = f"SELECT id::text, what FROM (\n{invariant}\n) AS offender(id, what) LIMIT {most:d}"  # noqa: S608 (ours)
    return conn.cursor(row_factory=tuple_row).execute(statement.encode()).fetchall()


def ailments() -> dict[str, str]:
    """Return what batchq doctor looks at, by name: each a query of findings, see `ailing`."""
    return named("doctor.sql")


def ailing(conn: Conn, name: str, parameters: dict[str, float]) -> list[tuple[str, str, str]]:
    """Return severity, evidence and remedy of each finding of one query of doctor.sql."""
    statement = ailments()[name]
    return conn.cursor(row_factory=tuple_row).execute(statement.encode(), parameters).fetchall()


def may_work(conn: Conn) -> bool:
    """Tell whether the role has what the duty of a worker needs most: to claim and to finish."""
    found: bool = one(
        conn,
        """
        SELECT has_any_column_privilege('batchq.batches_live', 'UPDATE')
          AND has_table_privilege('batchq.batches_live', 'DELETE')
          AND has_table_privilege('batchq.batches_finished', 'INSERT')
          AND has_table_privilege('batchq.workers', 'INSERT')
        """,
        {},
    )[0]
    return found


def duty_statements(conn: Conn, duty: str, role: str) -> list[str]:
    """Return the GRANT statements that give a role what its duty needs, and nothing more."""
    rows = every(conn, "SELECT batchq.duty_statements(%(duty)s::text, %(role)s::text)", {"duty": duty, "role": role})
    return [statement for (statement,) in rows]


def grant_duty(conn: Conn, duty: str, role: str) -> None:
    """Give a role what its duty needs. For the owner of the schema."""
    one(conn, "SELECT batchq.grant_duty(%(duty)s::text, %(role)s::text)", {"duty": duty, "role": role})


def clock(conn: Conn) -> float:
    """Return the database's time now, in seconds since 1970."""
    return float(one(conn, "SELECT extract(epoch FROM clock_timestamp())", {})[0])


def backend_pid(conn: Conn) -> int:
    """Return the process id of the backend, which a pooler may choose anew for each transaction."""
    pid: int = one(conn, BACKEND_PID, {})[0]
    return pid


# ------------------------------------------------------------------------------------------------------ helpers


def statements_of(file: Path) -> dict[str, bytes]:
    """Return the statements of a .sql file by name: each follows a line ``-- name: NAME``."""
    parts = re.split(r"^-- name: (\w+)\n", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name: text.strip().encode() + b"\n" for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def every(conn: Conn, statement: LiteralString, parameters: dict[str, Any]) -> list[Any]:
    """Return all rows, as tuples, whatever row factory the connection has."""
    return conn.cursor(row_factory=tuple_row).execute(statement, parameters or None).fetchall()


def one(conn: Conn, statement: LiteralString, parameters: dict[str, Any]) -> Any:
    """Return the one row."""
    return every(conn, statement, parameters)[0]


def maybe_one(conn: Conn, statement: LiteralString, parameters: dict[str, Any]) -> tuple[Any, ...] | None:
    """Return the one row, or None."""
    rows = every(conn, statement, parameters)
    return rows[0] if rows else None


def objects(conn: Conn, statement: LiteralString, parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the JSON object of each row."""
    return [value for (value,) in every(conn, statement, parameters)]
