"""Insert one batch, or many by COPY or INSERT.

Times, JSON and arrays are sent as texts, and cast twice: a driver that knows the types of parameters (asyncpg) would
otherwise want values of other classes, or encode JSON twice.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import combinations, islice
from typing import Any, LiteralString

from psycopg import sql

from batchq.postgres.statements.running import Conn, Statement, array_text, fetch_value

INSERT_BATCH: LiteralString = """
INSERT INTO batchq.batches (kind, payload, items, queue, priority, run_at, unique_key,
                            max_attempts, max_failed_items, timeout_seconds{more_columns})
VALUES (%(kind)s, %(payload)s::text::jsonb, %(items)s::text::jsonb, %(queue)s, %(priority)s,
        coalesce(%(run_at)s::text::timestamptz, now() + %(delay_seconds)s::float8 * interval '1 second'),
        %(unique_key)s, %(max_attempts)s, %(max_failed_items)s, %(timeout_seconds)s{more_values})
ON CONFLICT DO NOTHING
RETURNING id
"""


# In a caller's session: functions are named with their schema, and each literal has its type. Otherwise a function or
# an operator of another schema of the search path could fit better.
INSERT_BLOCK: LiteralString = """
INSERT INTO batchq.batches ({columns})
SELECT {values}
FROM pg_catalog.jsonb_array_elements(%(rows)s::text::jsonb) WITH ORDINALITY AS r(value, number)
ORDER BY number
RETURNING id
"""
COPY_FACTS: LiteralString = """
SELECT pg_catalog.row_security_active('batchq.batches'::text),
       pg_catalog.to_jsonb(now() + %(seconds)s::float8 * interval '1 second') #>> '{}'::text[]
"""
_MOST_BLOCK = 8_000_000  # characters
# The column of an option that batches share, and its value.
_SHARED: dict[str, tuple[LiteralString, LiteralString]] = {
    "kind": ("kind", "%(kind)s::text"),
    "queue": ("queue", "%(queue)s::text"),
    "key": ("key", "%(key)s::text"),
    "priority": ("priority", "%(priority)s::smallint"),
    "run_at": ("run_at", "%(run_at)s::text::timestamptz"),
    "delay_seconds": ("run_at", "now() + %(delay_seconds)s::float8 * interval '1 second'"),
    "max_attempts": ("max_attempts", "%(max_attempts)s::smallint"),
    "max_failed_items": ("max_failed_items", "%(max_failed_items)s::integer"),
    "timeout_seconds": ("timeout_seconds", "%(timeout_seconds)s::integer"),
    "after": ("after", "%(after)s::text::bigint[]"),
    "on_failure": ("on_failure", "%(on_failure)s::text"),
    "spread": ("spread", "%(spread)s::smallint"),
    "trace_context": ("trace_context", "%(trace_context)s::text"),
}
# A batch's own columns, out of its JSON [payload, items, key].
_OWN: dict[str, tuple[LiteralString, LiteralString]] = {
    "payload": ("payload", "value -> 0"),
    "items": ("items", "nullif(value -> 1, 'null'::jsonb)"),
    "key": ("key", "value ->> 2"),
}

# By columns that came later. Only where they are used: programs without them also work with a schema that lacks them.
LATER_COLUMNS: tuple[LiteralString, ...] = ("trace_context", "key", "after", "on_failure", "spread")


def _insert_with(columns: tuple[LiteralString, ...]) -> LiteralString:
    """Return INSERT_BATCH with more columns."""
    empty: LiteralString = ""
    names = empty.join([f", {name}" for name in columns])
    values = empty.join([f", {_SHARED[name][1]}" for name in columns])
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
    return INSERT_BATCH_WITH[given], as_texts(parameters | more)


def as_texts(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a batch's columns with times and arrays as the texts that Postgres reads."""
    return {name: _as_text(value) for name, value in values.items()}


def _as_text(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return array_text(value) if isinstance(value, list) else value


def now_plus(conn: Conn, seconds: float) -> str:
    """Return the database's time plus *seconds* as ISO 8601, as in JSON, whatever DateStyle and TimeZone are."""
    statement: LiteralString = "SELECT to_jsonb(now() + %(seconds)s::float8 * interval '1 second') #>> '{}'"
    return fetch_value(conn, str, statement, {"seconds": seconds})


def copy_facts(delay_seconds: float) -> Statement:
    """Return the statement that returns whether row security applies, so that COPY does not work, and the database's
    time plus *delay_seconds* as ISO 8601."""
    return COPY_FACTS, {"seconds": delay_seconds}


def copy_statement(columns: Sequence[str]) -> sql.Composed:
    """Return the statement that inserts batches by COPY."""
    names = sql.SQL(", ").join(sql.Identifier(column) for column in columns)
    return sql.SQL("COPY batchq.batches ({}) FROM STDIN").format(names)


def copy_blocks(same: Iterable[Any], texts: Iterable[Sequence[str | None]]) -> Iterator[str]:
    """Yield batches in COPY's text format, a hundred at a time: *same*, the values that all share, then each row's own.

    This takes half the time of psycopg's write_row.
    """
    start = "".join(f"{_copy_field(value)}\t" for value in same)
    lines = (start + "\t".join(map(_copy_field, row)) + "\n" for row in texts)
    while block := list(islice(lines, 100)):
        yield "".join(block)


def insert_blocks(
    shared: Mapping[str, Any], own: Sequence[str], texts: Iterable[Sequence[str | None]]
) -> Iterator[Statement]:
    """Yield statements that insert up to a hundred batches each and return their ids, in the order of *texts*.

    *shared*: the options that all share; *own*: the columns of *texts*. All values of a statement are in one JSON text,
    because drivers differ in how they pass arrays. Each block has at most some MB, or one batch.
    """
    pairs = [*(_SHARED[name] for name in shared), *(_OWN[name] for name in own)]
    separator: LiteralString = ", "
    columns, values = separator.join([pair[0] for pair in pairs]), separator.join([pair[1] for pair in pairs])
    statement = INSERT_BLOCK.format(columns=columns, values=values)
    for rows in _blocks(texts):
        yield statement, {**shared, "rows": f"[{','.join(rows)}]"}


def _blocks(texts: Iterable[Sequence[str | None]]) -> Iterator[list[str]]:
    """Yield lists of up to a hundred rows, as JSON."""
    block, size = list[str](), 0
    for payload, items, *keys in texts:
        key = "".join(f",{json.dumps(key)}" for key in keys)
        row = f"[{payload},{'null' if items is None else items}{key}]"
        if block and (len(block) == 100 or size + len(row) > _MOST_BLOCK):
            yield block
            block, size = [], 0
        block.append(row)
        size += len(row)
    if block:
        yield block


_COPY_SPECIAL = re.compile(r"[\\\t\n\r]")
_COPY_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


def _copy_field(value: Any) -> str:
    """Return a value as a field of COPY's text format (PostgreSQL's manual, COPY, "Text Format")."""
    if value is None:
        return "\\N"
    text = value if isinstance(value, str) else str(value)
    return text.translate(_COPY_ESCAPES) if _COPY_SPECIAL.search(text) else text
