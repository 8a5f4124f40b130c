"""Enqueue: every way to insert a batch, what is refused and by which name, and whose transaction it is in."""

import asyncio
import json
from collections.abc import Iterator
from datetime import date, datetime, timedelta, timezone
from threading import Thread
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row
from pydantic import BaseModel

import batchq
from batchq.enqueue import DEFAULTS, item_rows
from batchq.errors import InvalidInput
from tests.component.rows import KIND, Conn, batch, claim, finished, insert, value, values
from tests.support.alone import run_alone
from tests.support.steps import step
from tests.support.waiting import wait_until

COUNT = "SELECT count(*) FROM batchq.all_batches"
INSERT = "INSERT INTO batchq.batches (kind, {}) VALUES ('work', {})"
LATER = datetime(2090, 1, 1, 12, tzinfo=timezone(timedelta(hours=2)))


# ------------------------------------------------------------------------------------------- what the table refuses

REFUSED = [
    ("batches_queue_is_named", "queue", "''"),
    ("batches_queue_is_named", "queue", "repeat('é', 65)"),
    ("batches_payload_fits", "payload", "to_jsonb(repeat('x', 4194304))"),
    ("batches_items_is_array", "items", "'{}'"),
    ("batches_items_is_array", "items", "'null'"),
    ("batches_items_fit", "items", "(SELECT jsonb_agg(0) FROM generate_series(1, 1000001))"),
    ("batches_items_fit", "items", "jsonb_build_array(repeat('x', 67108864))"),
    ("batches_run_at_is_finite", "run_at", "'infinity'"),
    ("batches_run_at_is_finite", "run_at", "'-infinity'"),
    ("batches_unique_key_fits", "unique_key", "''"),
    ("batches_unique_key_fits", "unique_key", "repeat('x', 1001)"),
    ("batches_key_fits", "key", "''"),
    ("batches_key_fits", "key", "repeat('x', 501)"),
    ("batches_max_attempts_is_positive", "max_attempts", "0"),
    ("batches_max_failed_items_is_not_negative", "max_failed_items", "-1"),
    ("batches_timeout_is_positive", "timeout_seconds", "0"),
    ("batches_trace_context_fits", "trace_context", "''"),
    ("batches_attempts_are_left", "attempt", "5"),
    ("batches_attempts_are_left", "attempt", "-1"),
    ("batches_counters_fit_items", "items_done", "1"),
    ("batches_counters_fit_items", "items, items_done, items_failed", "'[1]', 1, 1"),
    ("batches_counters_fit_items", "items, items_failed", "'[1]', -1"),
    ("batches_times_are_finite", "created_at", "'-infinity'"),
    (
        "batches_times_are_finite",
        "status, claimed_by, claim_token, claimed_at, lease_expires_at",
        "'processing', 'me', gen_random_uuid(), now(), 'infinity'",
    ),
    ("batches_errors_is_array", "errors", "'{}'"),
    ("batches_claim_is_whole", "claim_token", "gen_random_uuid()"),
    ("batches_claim_is_whole", "status, claimed_by", "'processing', 'me'"),
    ("batches_finish_is_whole", "status", "'completed'"),
    ("batches_finish_is_whole", "finished_at", "now()"),
    ("batches_status_is_known", "status", "'done'"),
    ("batches_on_failure_is_known", "on_failure", "'explode'"),
    ("batches_waiting_is_counted", "status", "'waiting'"),
    ("batches_spread_fits", "items, spread", "'[1]', 0"),
    ("batches_spread_has_items", "spread", "4"),
]


@pytest.mark.parametrize(("name", "columns", "given"), REFUSED)
def test_a_bad_row_is_refused_by_the_name_of_the_law_it_breaks(conn: Conn, name: str, columns: str, given: str) -> None:
    with pytest.raises(psycopg.errors.CheckViolation) as caught:
        conn.execute(INSERT.format(columns, given).encode())
    step("%s", caught.value.diag.message_primary)
    assert caught.value.diag.constraint_name == name
    assert value(conn, COUNT) == 0


@pytest.mark.parametrize("kind", ["", "k" * 201, "é" * 101])
def test_a_kind_without_a_name_of_fitting_length_is_refused_by_name(conn: Conn, kind: str) -> None:
    with pytest.raises(psycopg.errors.CheckViolation, match="batches_kind_is_named"):
        insert(conn, kind=kind)


def test_every_check_of_the_table_has_a_row_that_it_refuses(conn: Conn) -> None:
    checks = values(
        conn,
        """SELECT DISTINCT conname FROM pg_constraint WHERE contype = 'c' AND connamespace = 'batchq'::regnamespace
             AND starts_with(conname, 'batches_')""",
    )
    by_trigger = {"batches_items_is_array"}
    assert set(checks) | by_trigger == {name for name, _, _ in REFUSED} | {"batches_kind_is_named"}


@pytest.mark.parametrize(
    ("columns", "given"),
    [
        ("queue", "repeat('q', 128)"),
        ("payload", "to_jsonb(repeat('x', 4194000))"),
        ("items", "'[]'"),
        ("items", "(SELECT jsonb_agg(0) FROM generate_series(1, 1000000))"),
        ("unique_key", "repeat('x', 1000)"),
        ("max_attempts", "1"),
        ("timeout_seconds", "1"),
        ("run_at", "'0044-03-15 BC'"),
    ],
)
def test_the_largest_and_the_least_that_the_laws_allow_are_taken(conn: Conn, columns: str, given: str) -> None:
    conn.execute(INSERT.format(columns, given).encode())
    assert [row.kind for row in claim(conn, queue="q" * 128 if columns == "queue" else "default")] == [KIND]


# ------------------------------------------------------------------------------------------ every way of inserting


def test_a_plain_insert_of_sql_text_returns_the_id_of_a_pending_batch(conn: Conn) -> None:
    batch_id = value(
        conn, "INSERT INTO batchq.batches (kind, payload) VALUES ('mail', '{\"to\": \"me\"}') RETURNING id"
    )
    row = batch(conn, batch_id)
    assert (row["kind"], row["status"], row["payload"]) == ("mail", "pending", {"to": "me"})


def test_rows_that_are_copied_in_are_batches(conn: Conn) -> None:
    statement = "COPY batchq.batches (kind, payload) FROM STDIN"
    with conn.transaction(), conn.cursor() as cursor, cursor.copy(statement) as copy:
        for number in range(100):
            copy.write_row((KIND, json.dumps({"number": number})))
    assert [json.loads(row.payload or "")["number"] for row in claim(conn)] == list(range(100))


def test_a_table_becomes_batches_of_a_thousand_items_by_insert_select(conn: Conn) -> None:
    conn.execute(
        """
        INSERT INTO batchq.batches (kind, items)
        SELECT 'work', jsonb_agg(n ORDER BY n)
        FROM generate_series(0, 2499) n
        GROUP BY n / 1000
        ORDER BY n / 1000
        """
    )
    assert values(conn, "SELECT items_total FROM batchq.all_batches ORDER BY id") == [1000, 1000, 500]


def test_on_conflict_do_nothing_inserts_one_live_batch_a_key(conn: Conn) -> None:
    statement = INSERT.format("unique_key", "'daily'") + " ON CONFLICT DO NOTHING RETURNING id"
    [first] = values(conn, statement)
    assert values(conn, statement) == []
    assert values(conn, "SELECT id FROM batchq.all_batches") == [first]


def test_a_second_live_batch_of_a_key_is_refused_by_name(conn: Conn) -> None:
    insert(conn, unique_key="daily")
    with pytest.raises(psycopg.errors.UniqueViolation, match="batches_live_unique_key"):
        insert(conn, unique_key="daily")


def test_a_unique_key_is_of_one_kind_in_one_queue(conn: Conn) -> None:
    ids = [
        batchq.enqueue(conn, kind, queue=queue, unique_key="daily") for kind in ("a", "b") for queue in ("one", "two")
    ]
    assert None not in ids


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
def test_a_finished_batch_frees_its_unique_key(conn: Conn, status: str) -> None:
    finished(conn, status, unique_key="daily")
    assert batchq.enqueue(conn, KIND, unique_key="daily") is not None


@pytest.mark.parametrize("commits", [True, False])
def test_of_two_transactions_with_one_key_the_second_waits_for_the_first(
    conn: Conn, dsn: str, admin_dsn: str, commits: bool
) -> None:
    found: list[int | None] = []
    with psycopg.connect(dsn, prepare_threshold=None) as first:
        assert batchq.enqueue(first, KIND, unique_key="daily") is not None
        second = Thread(target=lambda: found.append(batchq.enqueue(conn, KIND, unique_key="daily")))
        second.start()
        with psycopg.connect(admin_dsn, autocommit=True) as admin:
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
            wait_until(lambda: value(admin, waiting), 10, "the second to wait")
        step("the first %s", "commits" if commits else "rolls back")
        first.commit() if commits else first.rollback()
        second.join(10)
    assert (found == [None]) is commits
    assert value(conn, COUNT) == 1


def test_an_unknown_status_is_refused_whatever_the_way(conn: Conn) -> None:
    with pytest.raises(psycopg.errors.CheckViolation, match="batches_status_is_known"):
        insert(conn, status="finished")
    batch_id = insert(conn)
    with pytest.raises(psycopg.errors.CheckViolation, match="batches_status_is_known"):
        conn.execute("UPDATE batchq.batches SET status = 'odd' WHERE id = %s", [batch_id])


# ------------------------------------------------------------------------------------------------ enqueue: the rows


def test_the_defaults_of_python_are_those_of_the_table(conn: Conn) -> None:
    step("insert the least row by SQL, enqueue and enqueue_many")
    insert(conn)
    batchq.enqueue(conn, KIND)
    batchq.enqueue_many(conn, KIND, [None])
    by_sql, by_enqueue, by_copy = (comparable(batch(conn, batch_id)) for batch_id in ids(conn))
    assert by_sql == by_enqueue == by_copy


def ids(conn: Conn) -> list[int]:
    """Return the ids of all batches, in order."""
    return values(conn, "SELECT id FROM batchq.all_batches ORDER BY id")


def comparable(row: dict[str, Any]) -> dict[str, Any]:
    """Return the columns that do not depend on when the row was made."""
    row["runs_at_once"] = row.pop("run_at") == row.pop("created_at")
    del row["id"]
    return row


OPTIONS: dict[str, Any] = {
    "queue": "mail",
    "priority": -3,
    "run_at": LATER,
    "max_attempts": 2,
    "max_failed_items": 1,
    "timeout_seconds": 30,
}


def test_every_option_reaches_its_column(conn: Conn) -> None:
    batchq.enqueue(conn, KIND, {"a": 1}, items=[1, 2], unique_key="k", **OPTIONS)
    batchq.enqueue_many(conn, KIND, items=[1, 2], payload={"a": 1}, **OPTIONS)
    asyncio.run(enqueue_async(conn, KIND, {"a": 1}, items=[1, 2], unique_key="k2", **OPTIONS))
    for batch_id, unique_key in zip(ids(conn), ["k", None, "k2"], strict=True):
        row = batch(conn, batch_id)
        assert {name: row[name] for name in OPTIONS} == OPTIONS
        assert (row["payload"], row["items"], row["unique_key"]) == ({"a": 1}, [1, 2], unique_key)


def test_no_option_is_without_a_column(conn: Conn) -> None:
    columns = values(conn, "SELECT attname FROM pg_attribute WHERE attrelid = 'batchq.batches'::regclass")
    assert DEFAULTS.keys() - set(columns) == {"delay_seconds"}


async def enqueue_async(conn: Conn, kind: str, payload: Any = None, **options: Any) -> int | None:
    """Call `batchq.enqueue_async` on a connection of its own, beside *conn*."""
    dsn = f"{conn.info.dsn} password={conn.info.password}" if conn.info.password else conn.info.dsn
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True, prepare_threshold=None) as own:
        return await batchq.enqueue_async(own, kind, payload, **options)


def test_a_delay_counts_from_the_time_of_the_database(conn: Conn) -> None:
    batchq.enqueue(conn, KIND, delay_seconds=90)
    batchq.enqueue_many(conn, KIND, [None], delay_seconds=90.5)
    delays = "SELECT extract(epoch FROM run_at - created_at)::float8 FROM batchq.all_batches ORDER BY id"
    assert values(conn, delays) == [90.0, 90.5]


@pytest.mark.parametrize("payload", [{"a": [1, None, True, "é"]}, [], "text", 7, 1.5, False, None, "\\u0000", ""])
def test_any_json_value_is_a_payload(conn: Conn, payload: Any) -> None:
    batch_id = batchq.enqueue(conn, KIND, payload)
    assert batch_id is not None
    assert batch(conn, batch_id)["payload"] == ({} if payload is None else payload)


class Order(BaseModel):
    """A model of somebody's."""

    number: int
    day: date


def test_models_are_stored_as_their_json(conn: Conn) -> None:
    order = Order(number=4, day=date(2030, 5, 6))
    batch_id = batchq.enqueue(conn, KIND, order, items=[{"order": order}])
    assert batch_id is not None
    row = batch(conn, batch_id)
    assert row["payload"] == {"number": 4, "day": "2030-05-06"}
    assert row["items"] == [{"order": row["payload"]}]


def test_items_may_come_from_a_generator(conn: Conn) -> None:
    batch_id = batchq.enqueue(conn, KIND, items=(n * n for n in range(4)))
    assert batch_id is not None
    assert batch(conn, batch_id)["items"] == [0, 1, 4, 9]


def test_many_cuts_a_generator_of_items_into_batches(conn: Conn) -> None:
    assert batchq.enqueue_many(conn, KIND, items=iter(range(25)), items_per_batch=10, payload={"same": 1}) == 3
    rows = [batch(conn, batch_id) for batch_id in ids(conn)]
    assert [row["items"] for row in rows] == [list(range(10)), list(range(10, 20)), list(range(20, 25))]
    assert [row["payload"] for row in rows] == [{"same": 1}] * 3


def test_many_writes_a_batch_before_it_asks_for_the_next_thousand(conn: Conn) -> None:
    asked: list[int] = []

    def source() -> Iterator[int]:
        for number in range(30):
            asked.append(number)
            yield number

    texts = item_rows(source(), 10, None, "k")
    next(texts)
    assert len(asked) == 10


@pytest.mark.parametrize("given", [{"payloads": []}, {"items": []}])
def test_many_of_nothing_inserts_nothing(conn: Conn, given: dict[str, Any]) -> None:
    assert batchq.enqueue_many(conn, KIND, **given) == 0
    assert value(conn, COUNT) == 0


ODD = [
    *("\\", "\\\\", "\\N", "\\.", "\\t", "\\x41", "a\tb", "a\nb", "a\rb", "a\r\nb", "\n", "\t", "\\\n", "\x0b\x0c\x7f"),
    *("'", '"', "''", "%s", ",", "{}", "NULL", " ", "é\u2028\x85", "👩🏽\u200d🚀", "a" * 100),
]


def test_many_are_stored_as_they_are_whatever_text_they_hold(conn: Conn) -> None:
    for odd in ODD:
        batchq.enqueue_many(conn, odd, [odd, {odd: [odd]}, None, 1.5, True], queue=odd)
        batchq.enqueue_many(conn, odd, items=[odd, None, [odd]], payload=odd, queue=odd, items_per_batch=2)
        found = conn.execute(
            "SELECT kind, payload, items FROM batchq.all_batches WHERE queue = %s ORDER BY id", [odd]
        ).fetchall()
        assert found == [
            *((odd, payload, None) for payload in (odd, {odd: [odd]}, {}, 1.5, True)),
            (odd, odd, [odd, None]),
            (odd, odd, [[odd]]),
        ]


def test_many_over_a_few_hundred_are_all_stored_in_order(conn: Conn) -> None:
    for count in (99, 100, 101, 250):
        assert batchq.enqueue_many(conn, f"k{count}", ({"n": n} for n in range(count))) == count
        query = "SELECT (payload ->> 'n')::integer FROM batchq.all_batches WHERE kind = %s ORDER BY id"
        assert values(conn, query, [f"k{count}"]) == [*range(count)]


def test_the_row_factory_of_the_caller_does_not_matter(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True, prepare_threshold=None, row_factory=dict_row) as conn:
        batch_id = batchq.enqueue(conn, KIND)
        assert isinstance(batch_id, int)
        assert batchq.enqueue_many(conn, KIND, [1], delay_seconds=1) == 1

    async def in_loop() -> int | None:
        async with await psycopg.AsyncConnection.connect(
            dsn, autocommit=True, prepare_threshold=None, row_factory=dict_row
        ) as conn:
            return await batchq.enqueue_async(conn, KIND)

    assert asyncio.run(in_loop()) == batch_id + 2


def test_enqueue_prepares_no_statement_on_a_connection_that_would(admin_dsn: str) -> None:
    with psycopg.connect(admin_dsn, autocommit=True, prepare_threshold=0) as conn:
        for _ in range(3):
            batchq.enqueue(conn, KIND)
        prepared = conn.execute("SELECT count(*) FROM pg_prepared_statements", prepare=False).fetchone()
    assert prepared == (0,)


# ---------------------------------------------------------------------------------------- enqueue: whose transaction


@pytest.mark.parametrize("commits", [True, False])
def test_a_batch_exists_if_and_only_if_the_callers_rows_do(conn: Conn, dsn: str, commits: bool) -> None:
    conn.execute("CREATE TABLE public.orders (id integer)")
    with psycopg.connect(dsn, prepare_threshold=None) as caller:
        caller.execute("INSERT INTO public.orders VALUES (1)")
        batchq.enqueue(caller, KIND, {"order_id": 1})
        batchq.enqueue_many(caller, KIND, [{"order_id": 1}])
        assert value(conn, COUNT) == 0, "somebody else sees a batch before the commit"
        caller.commit() if commits else caller.rollback()
    assert value(conn, "SELECT count(*) FROM public.orders") == int(commits)
    assert value(conn, COUNT) == 2 * int(commits)


@pytest.mark.parametrize("commits", [True, False])
def test_an_async_batch_exists_if_and_only_if_the_callers_rows_do(conn: Conn, dsn: str, commits: bool) -> None:
    conn.execute("CREATE TABLE public.orders (id integer)")

    async def order() -> None:
        async with await psycopg.AsyncConnection.connect(dsn, prepare_threshold=None) as caller:
            await caller.execute("INSERT INTO public.orders VALUES (1)")
            await batchq.enqueue_async(caller, KIND, {"order_id": 1})
            await (caller.commit() if commits else caller.rollback())

    asyncio.run(order())
    assert value(conn, "SELECT count(*) FROM public.orders") == value(conn, COUNT) == int(commits)


def test_many_that_fails_midway_inserts_nothing_and_leaves_the_callers_transaction_alive(conn: Conn) -> None:
    def payloads() -> Iterator[Any]:
        yield {"number": 1}
        raise OSError("the source is gone")

    with conn.transaction():
        batchq.enqueue(conn, "before")
        with pytest.raises(OSError, match="the source is gone"):
            batchq.enqueue_many(conn, KIND, payloads())
        batchq.enqueue(conn, "after")
    assert values(conn, "SELECT kind FROM batchq.all_batches ORDER BY id") == ["before", "after"]


def test_many_that_the_table_refuses_inserts_nothing_outside_a_transaction_too(conn: Conn) -> None:
    with pytest.raises(psycopg.errors.CheckViolation, match="batches_max_attempts_is_positive"):
        batchq.enqueue_many(conn, KIND, [1, 2], max_attempts=0)
    assert value(conn, COUNT) == 0


# ----------------------------------------------------------------------------------------------- enqueue: bad input


def deep() -> list[Any]:
    """Return a list nested deeper than Python's stack."""
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    return nested


def circular() -> list[Any]:
    """Return a list that contains itself."""
    nested: list[Any] = []
    nested.append(nested)
    return nested


BAD_JSON = [
    (float("nan"), "payload cannot be stored as JSON"),
    ({"a": float("inf")}, "payload cannot be stored as JSON"),
    ({"a": "x\0y"}, "NUL character"),
    ({"\0": 1}, "NUL character"),
    ({"a": "\\\0"}, "NUL character"),
    ({"a": "\ud800"}, "payload cannot be stored as JSON"),
    ({1, 2}, "set is not JSON serializable"),
    (b"bytes", "bytes is not JSON serializable"),
    (object(), "object is not JSON serializable"),
    ({("a", "b"): 1}, "payload cannot be stored as JSON"),
    (datetime(2030, 1, 1), "datetime is not JSON serializable"),
    (10**5000, "payload cannot be stored as JSON"),
    (circular(), "payload cannot be stored as JSON"),
    (deep(), "payload cannot be stored as JSON"),
]


@pytest.mark.parametrize(("payload", "message"), BAD_JSON, ids=lambda given: str(type(given).__name__))
def test_what_is_no_json_is_refused_before_the_database(conn: Conn, payload: Any, message: str) -> None:
    with conn.transaction():
        with pytest.raises(InvalidInput, match=message):
            batchq.enqueue(conn, KIND, payload)
        with pytest.raises(InvalidInput, match="item cannot be stored as JSON"):
            batchq.enqueue(conn, KIND, items=[1, payload])
        with pytest.raises(InvalidInput, match=message):
            batchq.enqueue_many(conn, KIND, [1, payload])
        with pytest.raises(InvalidInput, match=message):
            asyncio.run(enqueue_async(conn, KIND, payload))
    assert value(conn, COUNT) == 0


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"kind": None}, "kind must be a text, not None"),
    ({"kind": 5}, "kind must be a text, not 5"),
    ({"kind": "a\0b"}, "kind has a NUL"),
    ({"kind": "\udfff"}, "lone surrogate"),
    ({"queue": None}, "queue must be a text"),
    ({"queue": b"mail"}, "queue must be a text"),
    ({"unique_key": 7}, "unique_key must be a text, not 7"),
    ({"unique_key": "\0"}, "unique_key has a NUL"),
    ({"run_at": datetime(2030, 1, 1)}, "run_at must be a datetime with a time zone"),
    ({"run_at": date(2030, 1, 1)}, "run_at must be a datetime with a time zone"),
    ({"run_at": "tomorrow"}, "run_at must be a datetime with a time zone, not 'tomorrow'"),
    ({"run_at": LATER, "delay_seconds": 5}, "either run_at or delay_seconds"),
    ({"delay_seconds": "5"}, "delay_seconds must be a number, not '5'"),
    ({"delay_seconds": None}, "delay_seconds must be a number, not None"),
    ({"delay_seconds": float("nan")}, "delay_seconds must be a number, not nan"),
    ({"delay_seconds": float("inf")}, "delay_seconds must be a number, not inf"),
    ({"priority": 1.5}, "priority must be a whole number, not 1.5"),
    ({"priority": "1"}, "priority must be a whole number, not '1'"),
    ({"priority": True}, "priority must be a whole number, not True"),
    ({"max_attempts": 2.0}, "max_attempts must be a whole number"),
    ({"max_failed_items": "none"}, "max_failed_items must be a whole number"),
    ({"timeout_seconds": 0.5}, "timeout_seconds must be a whole number, not 0.5"),
    ({"items": "abc"}, "items must be a list or a generator, not str"),
    ({"items": {"a": 1}}, "items must be a list or a generator, not dict"),
    ({"items": b"abc"}, "items must be a list or a generator, not bytes"),
    ({"items": 5}, "items must be a list or a generator, not int"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_an_option_that_cannot_be_stored_is_named_with_its_value(
    conn: Conn, options: dict[str, Any], message: str
) -> None:
    given = {"kind": KIND} | options
    with conn.transaction():
        with pytest.raises(InvalidInput, match=message):
            batchq.enqueue(conn, **given)
        with pytest.raises(InvalidInput, match=message):
            asyncio.run(enqueue_async(conn, **given))
    assert value(conn, COUNT) == 0


MANY_BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, InvalidInput, "either payloads or items"),
    ({"payloads": [1], "items": [1]}, InvalidInput, "either payloads or items"),
    ({"payloads": "text"}, InvalidInput, "payloads must be a list or a generator, not str"),
    ({"payloads": {"a": 1}}, InvalidInput, "payloads must be a list or a generator, not dict"),
    ({"payloads": 5}, InvalidInput, "payloads must be a list or a generator, not int"),
    ({"items": "text"}, InvalidInput, "items must be a list or a generator, not str"),
    ({"items": 5}, InvalidInput, "items must be a list or a generator, not int"),
    ({"items": [1], "items_per_batch": 0}, InvalidInput, "items_per_batch starts at 1, not 0"),
    ({"payloads": [1], "unique_key": "k"}, InvalidInput, "enqueue_many has no unique_key"),
    ({"payloads": [1], "priority": 1.5}, InvalidInput, "priority must be a whole number"),
    ({"payloads": [1], "prio": 1}, TypeError, "unknown option prio; there are "),
]


@pytest.mark.parametrize(("given", "error", "message"), MANY_BAD)
def test_many_names_what_it_cannot_take(
    conn: Conn, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        batchq.enqueue_many(conn, KIND, **given)
    assert value(conn, COUNT) == 0


def test_an_unknown_option_of_enqueue_async_is_named(conn: Conn) -> None:
    with pytest.raises(TypeError, match="unknown option prio; there are "):
        asyncio.run(enqueue_async(conn, KIND, prio=1))


def test_what_is_too_large_is_refused_by_the_tables_name(conn: Conn) -> None:
    with pytest.raises(psycopg.errors.CheckViolation, match="batches_payload_fits"):
        batchq.enqueue(conn, KIND, "x" * 4_194_304)
    with pytest.raises(psycopg.errors.CheckViolation, match="batches_kind_is_named"):
        batchq.enqueue(conn, "")
    with pytest.raises(psycopg.errors.NumericValueOutOfRange):
        batchq.enqueue(conn, KIND, priority=40_000)
    assert value(conn, COUNT) == 0


if __name__ == "__main__":
    run_alone(__file__)
