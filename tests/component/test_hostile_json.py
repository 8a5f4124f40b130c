"""JSON that Python and Postgres read differently, and any text as a name, by every way in: kept as it is, or refused.

A worker meets all of it: what was taken is worked or fails its own batch, and the worker goes on.
"""

import json
import math
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import batchq
from batchq.testing import running_worker
from tests.support.alone import run_alone
from tests.support.batches import await_status, drain, look, put, values, wait_for_status
from tests.support.commands import CommandLine
from tests.support.steps import step

often = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def make_app() -> batchq.App:
    """Return the app: handlers that hand back their input, and an item handler that fails with it."""
    app = batchq.App()
    app.handler("echo")(lambda batch: batch.payload)
    app.handler("echo_items")(lambda batch: batch.items)

    @app.item_handler("fail")
    def fail(item: Any) -> None:
        raise ValueError(f"bad {item!r}"[:5000])

    return app


# ----------------------------------------------------------------------------------------- any JSON there is in Python

texts = st.text(max_size=30)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), texts, st.integers(min_value=10**300, max_value=10**310)
)
anything = st.recursive(scalars, lambda part: st.lists(part, max_size=4) | st.dictionaries(texts, part, max_size=4))


def is_storable(value: Any) -> bool:
    """Tell whether a value is JSON that Postgres can store: no NaN, no infinity, no NUL, no lone surrogate."""
    match value:
        case str():
            return "\0" not in value and not any("\ud800" <= char <= "\udfff" for char in value)
        case float():
            return math.isfinite(value)
        case list():
            return all(map(is_storable, value))
        case dict():
            return all(is_storable(name) and is_storable(part) for name, part in value.items())
    return True


def same(one: Any, other: Any) -> bool:
    """Tell whether two values are the same JSON: 1e23 comes back as 1 and 23 zeros, which is no float of Python's."""
    match one, other:
        case list(), list():
            return len(one) == len(other) and all(map(same, one, other))
        case dict(), dict():
            return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
        case float(), int() | float():
            return one == float(other)
        case int(), float():
            return float(one) == other
    return bool(one == other)


@often
@given(value=st.lists(anything, max_size=5))
def test_what_python_enqueues_is_kept_as_it_is_or_refused_before_the_database(
    conn: psycopg.Connection, value: list[Any]
) -> None:
    conn.execute("DELETE FROM batchq.batches")
    if not is_storable(value):
        for given_as in ({"payload": value}, {"items": value}):
            with pytest.raises(batchq.InvalidInput, match="cannot be stored as JSON"):
                batchq.enqueue(conn, "echo", **given_as)
        with pytest.raises(batchq.InvalidInput, match="cannot be stored as JSON"):
            batchq.enqueue_many(conn, "echo", [value])
        assert values(conn, "SELECT count(*) FROM batchq.all_batches") == [0]
        return
    batchq.enqueue(conn, "echo", value)
    batchq.enqueue_many(conn, "echo", [value])
    batchq.enqueue(conn, "echo", items=value)
    assert same(values(conn, "SELECT coalesce(items, payload) FROM batchq.all_batches"), [value] * 3)
    assert values(conn, "SELECT items_total FROM batchq.all_batches WHERE items IS NOT NULL") == [len(value)]


def test_what_was_enqueued_comes_back_as_result_items_and_error(dsn: str, conn: psycopg.Connection) -> None:
    found: list[Any] = []

    @settings(often, max_examples=80)
    @given(value=anything)
    def collect(value: Any) -> None:
        if is_storable(value):
            found.append(value)

    collect()
    assert len(found) > 20
    ids = [put(conn, "echo", value) for value in found]
    listed = put(conn, "echo_items", items=found)
    failing = put(conn, "fail", items=found, max_attempts=1)
    drain(make_app(), dsn)
    for value, batch_id in zip(found, ids, strict=True):
        assert same(look(conn, batch_id).result, {} if value is None else value)
    assert same(look(conn, listed).result, found)
    assert look(conn, failing).items_failed == len(found)
    pairs = "batchq.failed_items f JOIN batchq.all_batches b ON b.id = f.batch_id"
    assert values(conn, f"SELECT bool_and(f.item = b.items -> item_index) FROM {pairs}") == [True]


# ----------------------------------------------------------------------------------------- texts that are JSON to some

DEEP = "[" * 10_000 + "]" * 10_000
# The text; whether Postgres takes it; what a Python handler hands back, or the beginning of its error.
CORPUS: dict[str, tuple[str, bool, Any]] = {
    "NUL": (r'"\u0000"', False, None),
    "NUL in a key": (r'{"a\u0000": 1}', False, None),
    "a NUL that is text": (r'"\\u0000"', True, r"\u0000"),
    "a high surrogate": (r'"\ud800"', False, None),
    "a low surrogate": (r'"\udc00"', False, None),
    "surrogates the wrong way": (r'"\udc00\ud800"', False, None),
    "a pair": (r'"\ud83d\ude00"', True, "\U0001f600"),
    "1e999": ("1e999", True, 10**999),
    "-1e999": ("-1e999", True, -(10**999)),
    "1e5000": ("1e5000", True, "InvalidInput: the payload cannot be read in Python: ValueError: Exceeds the limit"),
    "1e200000": ("1e200000", False, None),
    "1e-5000": ("1e-5000", True, 0.0),
    "many digits": ("0.1000000000000000055511151231257827", True, 0.1),
    "-0": ("-0", True, 0),
    "-0.0": ("-0.0", True, 0.0),
    "1.0": ("1.0", True, 1.0),
    "NaN": ("NaN", False, None),
    "Infinity": ("Infinity", False, None),
    "-Infinity": ("-Infinity", False, None),
    "01": ("01", False, None),
    "+1": ("+1", False, None),
    ".5": (".5", False, None),
    "duplicate keys": ('{"a": 1, "b": 2, "a": 3}', True, {"a": 3, "b": 2}),
    "the same key, written twice": (r'{"a": 1, "\u0061": 2}', True, {"a": 2}),
    "10,000 levels": (DEEP, True, "InvalidInput: the payload cannot be read in Python: RecursionError"),
    "unclosed": ('{"a": 1', False, None),
    "two values": ("1 2", False, None),
    "a comment": ("1 /* one */", False, None),
    "single quotes": ("{'a': 1}", False, None),
    "nothing": ("", False, None),
    "spaces around": (" \t\r\n [ 1 ] \n", True, [1]),
    "a space that is none": ("\u00a01", False, None),
    "a byte order mark": ("\ufeff1", False, None),
    "a tab within": ('"a\tb"', False, None),
    "an escape unknown": (r'"\x41"', False, None),
    "4 MB and more": (f'"{"x" * 4_200_000}"', False, None),
}


def test_of_texts_that_are_json_to_some_sql_takes_what_postgres_takes_and_the_worker_goes_on(
    dsn: str, conn: psycopg.Connection
) -> None:
    taken: dict[str, int] = {}
    for name, (text, is_taken, _) in CORPUS.items():
        insert = "INSERT INTO batchq.batches (kind, payload) VALUES ('echo', %s::jsonb) RETURNING id"
        if is_taken:
            [taken[name]] = values(conn, insert, text)
            continue
        with pytest.raises((psycopg.DataError, psycopg.IntegrityError)) as refused:
            values(conn, insert, text)
        step("%s: %s", name, str(refused.value).splitlines()[0])
    with running_worker(make_app(), dsn, concurrency=1):
        for name, batch_id in taken.items():
            expected = CORPUS[name][2]
            is_bad = isinstance(expected, str) and expected.startswith("InvalidInput")
            wait_for_status(conn, batch_id, "failed" if is_bad else "completed", 20)
            told = "CASE status WHEN 'failed' THEN errors -> 0 -> 'error' ELSE result END"
            [found] = values(conn, f"SELECT {told} FROM batchq.all_batches WHERE id = %s", batch_id)
            assert found.startswith(expected) if is_bad else found == expected, name
        await_status(conn, put(conn, "echo", "fine"), "completed")


def test_items_of_64_mb_are_refused_by_name_and_a_smaller_list_of_oddities_is_worked(
    dsn: str, conn: psycopg.Connection
) -> None:
    with pytest.raises(psycopg.errors.CheckViolation, match="batches_items_fit"):
        conn.execute("INSERT INTO batchq.batches (kind, items) SELECT 'fail', jsonb_build_array(repeat('x', 67108864))")
    odd = [text for text, is_taken, told in CORPUS.values() if is_taken and not str(told).startswith("InvalidInput")]
    [batch_id] = values(
        conn,
        "INSERT INTO batchq.batches (kind, items, max_attempts) VALUES ('fail', %s::jsonb, 1) RETURNING id",
        f"[{','.join(odd)}]",
    )
    with running_worker(make_app(), dsn):
        assert await_status(conn, batch_id, "failed", 20).items_failed == len(odd)
        await_status(conn, put(conn, "echo", "fine"), "completed")


COMMAND_LINE = [
    "NUL", "a high surrogate", "1e999", "NaN", "-Infinity", "duplicate keys", "10,000 levels", "unclosed", "nothing",
    "a byte order mark",
]  # fmt: skip


@pytest.mark.parametrize("name", COMMAND_LINE)
def test_the_command_line_takes_it_or_says_in_one_line_why_not(
    dsn: str, conn: psycopg.Connection, tmp_path: Path, name: str
) -> None:
    text = CORPUS[name][0]
    batchq_command = CommandLine(dsn, tmp_path)
    for arguments in ([f"--payload={text}"], ["--items", "-"]):
        ended = batchq_command("enqueue", "echo", *arguments, stdin=f"1\n{text}\n2\n")
        if ended.code:
            assert "Traceback" not in ended.err
            assert ended.err.count("\n") == 1
            assert len(ended.err) < 2_000
    for stored in values(conn, "SELECT coalesce(items, payload)::text FROM batchq.all_batches"):
        step("taken: %s", stored[:80])
        assert "Infinity" not in stored
        assert "NaN" not in stored


# --------------------------------------------------------------------------------------------------- any text as a name

ODD_NAMES = [
    "", " ", "\t\n\r", "\x01\x1b[31m", "'; DROP SCHEMA batchq; --", '"$$\\', "%s%(x)s", "{}", "\u202eabc",
    "\ufeff", "👩🏽‍🚀", "\u0301", "\uffff", "\U0010ffff", "k" * 10_000, "é" * 64, "é" * 65, "\\N", "\\.", "NULL",
]  # fmt: skip
names = st.sampled_from(ODD_NAMES) | st.text(max_size=140)


@often
@given(kind=names, queue=names, key=names)
def test_any_text_as_a_name_is_kept_as_it_is_or_refused_by_name(
    conn: psycopg.Connection, kind: str, queue: str, key: str
) -> None:
    conn.execute("DELETE FROM batchq.batches")
    ways = [
        lambda: batchq.enqueue(conn, kind, queue=queue, unique_key=key),
        lambda: batchq.enqueue_many(conn, kind, [1], queue=queue),
    ]
    for way, given_names in zip(ways, ((kind, queue, key), (kind, queue)), strict=True):
        if not all(map(is_storable, given_names)):
            with pytest.raises(batchq.InvalidInput, match="has a NUL character or a lone surrogate"):
                way()
        elif any(not 0 < len(name.encode()) <= most for name, most in zip(given_names, (200, 128, 1000), strict=False)):
            with pytest.raises(psycopg.errors.CheckViolation, match=r"_is_named|batches_unique_key_fits"):
                way()
        else:
            way()
    stored = conn.execute("SELECT kind, queue, unique_key FROM batchq.all_batches ORDER BY id").fetchall()
    assert {row[:2] for row in stored} <= {(kind, queue)}
    assert [row[2] for row in stored if row[2] is not None] in ([], [key])


def test_a_worker_serves_any_name_that_was_taken(dsn: str, conn: psycopg.Connection) -> None:
    app = make_app()
    fitting = [name for name in ODD_NAMES if 0 < len(name.encode()) <= 128]
    for name in fitting:
        app.handler(name)(lambda batch: [batch.kind, batch.queue])
    with running_worker(app, dsn, queues=fitting):
        for name in fitting:
            batch_id = put(conn, name, queue=name)
            assert await_status(conn, batch_id, "completed", 20).result == [name, name]
    assert json.loads(json.dumps(fitting)) == fitting


if __name__ == "__main__":
    run_alone(__file__)
