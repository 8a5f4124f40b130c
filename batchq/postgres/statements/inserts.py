"""Insert one batch, or many by COPY."""

import re
from collections.abc import Iterable, Sequence
from itertools import combinations, islice
from typing import Any, LiteralString

from psycopg import sql
from psycopg.rows import tuple_row

from batchq.postgres.statements.running import Conn, Statement, fetch_value

INSERT_BATCH: LiteralString = """
INSERT INTO batchq.batches (kind, payload, items, queue, priority, run_at, unique_key,
                            max_attempts, max_failed_items, timeout_seconds{more_columns})
VALUES (%(kind)s, %(payload)s::jsonb, %(items)s::jsonb, %(queue)s, %(priority)s,
        coalesce(%(run_at)s::timestamptz, now() + %(delay_seconds)s::float8 * interval '1 second'), %(unique_key)s,
        %(max_attempts)s, %(max_failed_items)s, %(timeout_seconds)s{more_values})
ON CONFLICT DO NOTHING
RETURNING id
"""


# By columns that came later. Only where they are used: programs without them also work with a schema that lacks them.
LATER_COLUMNS: tuple[LiteralString, ...] = ("trace_context", "key", "after", "on_failure")


def _insert_with(columns: tuple[LiteralString, ...]) -> LiteralString:
    """Return INSERT_BATCH with more columns."""
    empty: LiteralString = ""
    names = empty.join([f", {name}" for name in columns])
    values = empty.join([f", %({name})s" for name in columns])
    return INSERT_BATCH.format(more_columns=names, more_values=values)


INSERT_BATCH_WITH: dict[tuple[str, ...], LiteralString] = {
    columns: _insert_with(columns)
    for count in range(len(LATER_COLUMNS) + 1)
    for columns in combinations(LATER_COLUMNS, count)
}


def insert_batch(parameters: dict[str, Any], trace_context: str | None) -> Statement:
    """Return the statement that inserts a batch, and returns its id unless a live batch has its unique_key."""
    more = {name: parameters.get(name) for name in LATER_COLUMNS} | {"trace_context": trace_context}
    given = tuple(name for name, value in more.items() if value is not None)
    return INSERT_BATCH_WITH[given], parameters | more


def now_plus(conn: Conn, seconds: float) -> str:
    """Return the database's time plus *seconds* as ISO 8601, as in JSON, whatever DateStyle and TimeZone are."""
    statement: LiteralString = "SELECT to_jsonb(now() + %(seconds)s::float8 * interval '1 second') #>> '{}'"
    return fetch_value(conn, str, statement, {"seconds": seconds})


def copy_batches(conn: Conn, columns: Sequence[str], same: Sequence[Any], texts: Iterable[Sequence[str | None]]) -> int:
    """Insert batches by COPY; return how many. *columns*: those of *same*, the values that all batches share, then
    those of each row of *texts*.

    Call it inside a transaction: a COPY that fails outside one can leave a pooler's backend to an idle client. It
    writes COPY's text format itself, a hundred rows at a time, which takes half the time of psycopg's write_row.
    """
    names = sql.SQL(", ").join(sql.Identifier(column) for column in columns)
    statement = sql.SQL("COPY batchq.batches ({}) FROM STDIN").format(names)
    start = "".join(f"{_copy_field(value)}\t" for value in same)
    lines = (start + "\t".join(map(_copy_field, row)) + "\n" for row in texts)
    count = 0
    with conn.cursor() as cursor, cursor.copy(statement) as copy:
        while block := list(islice(lines, 100)):
            copy.write("".join(block))
            count += len(block)
    return count


def has_row_security(conn: Conn) -> bool:
    """Return whether row security applies to the caller, so that COPY does not work."""
    return fetch_value(conn, bool, "SELECT row_security_active('batchq.batches')")


def insert_batches(
    conn: Conn, columns: Sequence[str], same: Sequence[Any], texts: Iterable[Sequence[str | None]]
) -> int:
    """Like `copy_batches`, but by INSERT, a hundred rows at a time: COPY does not work with row security."""
    return len(insert_returning(conn, columns, same, texts))


def insert_returning(
    conn: Conn, columns: Sequence[str], same: Sequence[Any], texts: Iterable[Sequence[str | None]]
) -> list[int]:
    """Like `insert_batches`, but return the ids, in the order of the rows."""
    names = sql.SQL(", ").join(sql.Identifier(column) for column in columns)
    own = [sql.Identifier(column) for column in columns[len(same) :]]
    statement = sql.SQL(
        "INSERT INTO batchq.batches ({}) SELECT {} FROM unnest({}) WITH ORDINALITY AS u({}, number) ORDER BY number "
        "RETURNING id"
    ).format(
        names,
        sql.SQL(", ").join([*(sql.Literal(value) for value in same), *own]),
        sql.SQL(", ").join([sql.SQL("%s::jsonb[]"), sql.SQL("%s::jsonb[]"), sql.SQL("%s::text[]")][: len(own)]),
        sql.SQL(", ").join(own),
    )
    rows, ids = iter(texts), list[int]()
    cursor = conn.cursor(row_factory=tuple_row)
    while block := list(islice(rows, 100)):
        cursor.execute(statement, [list(column) for column in zip(*block, strict=True)])
        ids += [batch_id for (batch_id,) in cursor.fetchall()]
    return ids


_COPY_SPECIAL = re.compile(r"[\\\t\n\r]")
_COPY_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


def _copy_field(value: Any) -> str:
    """Return a value as a field of COPY's text format (PostgreSQL's manual, COPY, "Text Format")."""
    if value is None:
        return "\\N"
    text = value if isinstance(value, str) else str(value)
    return text.translate(_COPY_ESCAPES) if _COPY_SPECIAL.search(text) else text
