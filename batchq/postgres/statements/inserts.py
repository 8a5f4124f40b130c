"""Enqueue: one batch, or many by COPY."""

import re
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, LiteralString

from psycopg import sql

from batchq.postgres.statements.running import Conn, Statement, one

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
