"""Sealed batches: what is stored of them only programs with a key can read, and everything else goes on as before.

Each secret of these tests is the word CANARY: it must be in no table, no log line, no page and no output of a command.
"""

import asyncio
import base64
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import asyncpg
import psycopg
import pytest
import sqlalchemy
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from psycopg.types.json import Jsonb
from pydantic import BaseModel
from rich.console import Console

import batchq
from batchq.cli.top import batch_text
from batchq.cli.top.source import read_page
from batchq.common import hidden, log, sealed
from batchq.common.secrets import hide_password
from batchq.errors import CannotOpen, ConfigError, InvalidInput, KeyMissing
from batchq.testing import encryption_keys, run_handler
from batchq.worker import execution
from tests.support.alone import run_alone
from tests.support.batches import STYLES, drain, failed_items, look, put, register, register_items, values
from tests.support.commands import CommandLine
from tests.support.web import served, text_of

Conn = psycopg.Connection[Any]
CANARY = "canary-4711-Grüße"
SECRET = {"card": CANARY, "n": 1}
ONCE = {"max_attempts": 1}
AT_ONCE = batchq.Backoff(0, 0)
both_styles = pytest.mark.parametrize("style", STYLES)


@pytest.fixture
def keys() -> Iterator[str]:
    """Let this program have a key, named 2026-11."""
    with encryption_keys(sealed.new_key("2026-11")) as text:
        assert text
        yield text


def everywhere(conn: Conn) -> list[str]:
    """Return the tables of batchq that have the canary in some column."""
    tables = values(
        conn, "SELECT relname FROM pg_class WHERE relnamespace = 'batchq'::regnamespace AND relkind IN ('r', 'p', 'm')"
    )
    assert "batches_live" in tables
    found = []
    for name in tables:
        query = sql.SQL("SELECT count(*) FROM batchq.{} t WHERE t::text LIKE %s").format(sql.Identifier(name))
        row = conn.execute(query, ["%canary-4711%"]).fetchone()
        found += [name] if row and row[0] else []
    return found


def test_the_search_for_the_canary_finds_what_is_in_the_clear(conn: Conn) -> None:
    with encryption_keys(None):
        put(conn, "w", SECRET)
    assert everywhere(conn) == ["batches_live"] or everywhere(conn) == ["batches", "batches_live"]


def as_text(value: Any) -> str:
    """Return a value as JSON text, its fields in the order of their names."""
    return json.dumps(value, sort_keys=True)


def key_of(value: Any) -> str | None:
    """Return the name of the key of an envelope."""
    return sealed.key_of(value)


# ------------------------------------------------------------------------------------------------ what a batch stores


@both_styles
def test_all_values_of_a_batch_are_sealed_and_its_handler_sees_none_of_it(
    conn: Conn, dsn: str, keys: str, style: str, capfd: pytest.CaptureFixture[str]
) -> None:
    app, seen = batchq.App(), []

    async def save_async(batch: batchq.Batch) -> Any:
        seen.append((batch.payload, batch.cursor))
        if batch.cursor is None:
            await batch.checkpoint_async({"at": CANARY})
            raise ValueError(f"cannot charge {CANARY}")
        return {"receipt": CANARY}

    def save(batch: batchq.Batch) -> Any:
        seen.append((batch.payload, batch.cursor))
        if batch.cursor is None:
            batch.checkpoint({"at": CANARY})
            raise ValueError(f"cannot charge {CANARY}")
        return {"receipt": CANARY}

    app.handler("charge", backoff=AT_ONCE)(save if style == "def" else save_async)
    batch_id = put(conn, "charge", SECRET)
    drain(app, dsn)
    row = look(conn, batch_id)
    assert seen == [(SECRET, None), (SECRET, {"at": CANARY})]
    assert [key_of(part) for part in (row.payload, row.cursor, row.result)] == ["2026-11"] * 3
    [error] = row.errors
    assert error["error"] == "ValueError: sealed with key 2026-11"
    assert "traceback" not in error
    opened = sealed.open_error(error, "charge")
    assert opened["error"] == f"ValueError: cannot charge {CANARY}"
    assert "in save" in opened["traceback"]
    assert opened["attempt"] == 1
    assert everywhere(conn) == []
    output = "".join(capfd.readouterr())
    assert "ValueError: sealed with key 2026-11" in output
    assert CANARY not in output


@both_styles
def test_each_item_and_its_error_are_sealed_and_a_retry_opens_them_again(
    conn: Conn, dsn: str, keys: str, style: str, capfd: pytest.CaptureFixture[str]
) -> None:
    app, seen = batchq.App(), []

    def work(item: Any, batch: batchq.Batch) -> None:
        seen.append((batch.attempt, item))
        if item["n"] == 1 and batch.attempt < 3:
            raise ValueError(f"bad {item}")

    register_items(app, style, "charge_each", work, backoff=AT_ONCE, chunk_size=2)
    items = [{"n": n, "card": CANARY} for n in range(5)]
    batch_id = put(conn, "charge_each", items=items, max_attempts=2)
    drain(app, dsn)
    row = look(conn, batch_id)
    assert seen == [(1, item) for item in items] + [(2, items[1])]
    assert (row.status, row.items_total, [key_of(item) for item in row.items]) == ("failed", 5, ["2026-11"] * 5)
    assert row.errors[-1]["error"] == "1 of 5 items failed; the first: ValueError: sealed with key 2026-11"
    [failed] = failed_items(conn, batch_id)
    assert key_of(failed.item) == "2026-11"
    shown, _, data = failed.error.rpartition(": ")
    assert shown == "ValueError: sealed with key 2026-11"
    assert len(data) > 40
    current = sealed.current()
    assert current is not None
    assert current.open_line(failed.error, "charge_each") == f"ValueError: bad {items[1]}"
    assert everywhere(conn) == []
    assert CANARY not in "".join(capfd.readouterr())


def test_parts_of_a_spread_batch_open_the_items_of_the_whole(conn: Conn, dsn: str, keys: str) -> None:
    app, seen = batchq.App(), []
    app.item_handler("spread_out", spread=3)(lambda item: seen.append(item["n"]))
    batch_id = put(conn, "spread_out", items=[{"n": n, "card": CANARY} for n in range(9)])
    drain(app, dsn)
    assert (look(conn, batch_id).status, sorted(seen)) == ("completed", list(range(9)))


def test_chunks_and_their_transactions_are_sealed(conn: Conn, dsn: str, keys: str) -> None:
    app, seen = batchq.App(), []

    @app.handler("by_hand", backoff=AT_ONCE)
    def by_hand(batch: batchq.Batch) -> None:
        assert [item["card"] for item in batch.items] == [CANARY] * 4
        for chunk in batch.chunks(2):
            with chunk.transaction() as own:
                own.execute("SELECT 1")
                batch.checkpoint({"last": CANARY})
                seen.append([item["n"] for item in chunk.items])
                if batch.attempt == 1 and chunk.indexes[0] == 0:
                    chunk.fail(1, f"no {CANARY}")

    batch_id = put(conn, "by_hand", items=[{"n": n, "card": CANARY} for n in range(4)])
    drain(app, dsn)
    assert seen == [[0, 1], [2, 3], [1]]
    assert key_of(look(conn, batch_id).cursor) == "2026-11"
    assert everywhere(conn) == []


def test_a_text_that_a_handler_gives_for_a_failed_item_is_sealed_from_its_first_word_on(
    conn: Conn, dsn: str, keys: str
) -> None:
    app = batchq.App()

    @app.handler("by_hand")
    def by_hand(batch: batchq.Batch) -> None:
        for chunk in batch.chunks(2):
            chunk.fail(0, "Ann: declined")
            chunk.fail(1, ValueError("declined"))

    put(conn, "by_hand", items=[1, 2], max_attempts=1)
    drain(app, dsn)
    told, raised = values(conn, "SELECT error FROM batchq.failed_items ORDER BY item_index")
    assert told.startswith("sealed with key 2026-11: ")
    assert raised.startswith("ValueError: sealed with key 2026-11: ")
    known = sealed.Keys.read(keys)
    assert [known.open_line(line, "by_hand") for line in (told, raised)] == ["Ann: declined", "ValueError: declined"]
    assert "Ann" not in str(conn.execute("SELECT to_jsonb(b) FROM batchq.all_batches b").fetchall())


def test_the_result_of_a_transaction_of_the_handler_is_sealed_and_others_read_it(
    conn: Conn, dsn: str, keys: str
) -> None:
    app, found = batchq.App(), []

    @app.handler("complete")
    def complete(batch: batchq.Batch) -> None:
        with batch.transaction(result={"receipt": CANARY}) as own:
            own.execute("SELECT 1")

    @app.handler("complete_in")
    def complete_in(batch: batchq.Batch) -> None:
        with psycopg.connect(dsn) as own:
            batch.complete_in(own, {"receipt": CANARY})

    app.handler("gather")(lambda batch: found.extend(one.result for one in batch.needed))
    ids = [put(conn, "complete"), put(conn, "complete_in")]
    put(conn, "gather", after=ids)
    drain(app, dsn)
    assert found == [{"receipt": CANARY}] * 2
    assert [batchq.get(conn, one).result for one in ids] == [{"receipt": CANARY}] * 2  # type: ignore[union-attr]
    assert everywhere(conn) == []


def test_a_failure_hook_gets_payload_error_and_traceback_opened(conn: Conn, dsn: str, keys: str) -> None:
    app, failures = batchq.App(), []
    app.on_failure(failures.append)

    @app.handler("fail_sealed")
    def fail(batch: batchq.Batch) -> None:
        raise ValueError(CANARY)

    put(conn, "fail_sealed", SECRET, **ONCE)
    drain(app, dsn)
    [failure] = failures
    assert (failure.payload, failure.error) == (SECRET, f"ValueError: {CANARY}")
    assert "in fail" in failure.traceback


def test_an_error_of_a_failure_hook_is_logged_without_what_it_says(
    conn: Conn, dsn: str, keys: str, capfd: pytest.CaptureFixture[str]
) -> None:
    app = batchq.App()
    app.handler("fail_hooked")(lambda _: 1 / 0)

    @app.on_failure
    def report(failure: batchq.Failure) -> None:
        raise ValueError(f"cannot report {failure.payload}")

    put(conn, "fail_hooked", SECRET, **ONCE)
    drain(app, dsn)
    output = "".join(capfd.readouterr())
    assert "failure hook failed" in output
    assert "ValueError: sealed with key 2026-11" in output
    assert CANARY not in output


def test_errors_after_the_end_and_conflicts_are_logged_without_what_they_say(
    conn: Conn, dsn: str, keys: str, capfd: pytest.CaptureFixture[str]
) -> None:
    app = batchq.App()
    calls: list[int] = []

    @app.handler("ended")
    def ended(batch: batchq.Batch) -> None:
        with batch.transaction(result=1) as db:
            db.execute("SELECT 1")
        raise ValueError(CANARY)

    @app.handler("conflicts", backoff=AT_ONCE)
    def conflicts(batch: batchq.Batch) -> None:
        calls.append(batch.id)
        if len(calls) == 1:
            raise psycopg.errors.SerializationFailure(CANARY)

    put(conn, "ended", SECRET)
    put(conn, "conflicts", SECRET)
    log.configure("json", "info")
    drain(app, dsn)
    output = "".join(capfd.readouterr())
    assert "handler failed after its batch was completed" in output
    assert "batch conflicted" in output
    assert "canary-4711" not in output


def test_an_outcome_that_cannot_be_determined_says_no_more_than_the_types(
    keys: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def decide(*_: Any) -> Any:
        raise KeyError(CANARY)

    log.configure("json", "info")
    claimed: Any = SimpleNamespace(keys=sealed.current(), attempt=1, max_attempts=1)
    outcome = execution.safely(decide, claimed, claimed, ValueError(CANARY))
    assert "ValueError: sealed with key 2026-11" in (outcome.error or "")
    assert "canary-4711" not in (outcome.error or "") + "".join(capfd.readouterr())


def test_models_see_what_was_opened_and_their_messages_are_sealed(conn: Conn, dsn: str, keys: str) -> None:
    class Card(BaseModel):
        card: str
        n: int

    app, seen = batchq.App(), []
    app.handler("modelled", payload=Card)(lambda batch: seen.append(batch.payload))
    good, bad = put(conn, "modelled", SECRET), put(conn, "modelled", {"card": CANARY, "n": CANARY})
    drain(app, dsn)
    assert seen == [Card(card=CANARY, n=1)]
    assert look(conn, good).status == "completed"
    row = look(conn, bad)
    assert (row.status, row.errors[0]["error"]) == ("failed", "InvalidInput: sealed with key 2026-11")
    assert "the payload does not fit Card" in sealed.open_error(row.errors[0], "modelled")["error"]


def test_the_reason_of_a_cancel_is_sealed(conn: Conn, dsn: str, keys: str, capfd: pytest.CaptureFixture[str]) -> None:
    app = batchq.App()

    @app.handler("stop_it")
    def stop(batch: batchq.Batch) -> None:
        raise batchq.Cancel(f"nobody needs {CANARY}")

    batch_id = put(conn, "stop_it")
    drain(app, dsn)
    row = look(conn, batch_id)
    assert (row.status, row.errors[0]["error"]) == ("cancelled", "cancelled: sealed with key 2026-11")
    assert sealed.open_error(row.errors[0], "stop_it")["error"] == f"cancelled: nobody needs {CANARY}"
    assert CANARY not in "".join(capfd.readouterr())


# ------------------------------------------------------------------------------------------------------- every way in


def by_enqueue(conn: Conn, dsn: str) -> None:
    batchq.enqueue(conn, "w", SECRET, items=[SECRET])


def by_enqueue_many(conn: Conn, dsn: str) -> None:
    batchq.enqueue_many(conn, "w", [SECRET])


def by_enqueue_many_with_keys(conn: Conn, dsn: str) -> None:
    batchq.enqueue_many(conn, "w", [SECRET], key=lambda _: "k")


def by_enqueue_many_of_items(conn: Conn, dsn: str) -> None:
    batchq.enqueue_many(conn, "w", items=[SECRET, SECRET], payload=SECRET)


def by_enqueue_each(conn: Conn, dsn: str) -> None:
    batchq.enqueue_each(conn, "w", [SECRET])


def by_sqlalchemy(conn: Conn, dsn: str) -> None:
    engine = sqlalchemy.create_engine("postgresql+psycopg2://", connect_args=dict(conninfo_to_dict(dsn)))
    with engine.begin() as own:  # it has no COPY
        batchq.enqueue_many(own, "w", [SECRET])
    engine.dispose()


def by_asyncpg(conn: Conn, dsn: str) -> None:
    async def run() -> None:
        given = conninfo_to_dict(dsn)
        found = {key: given[key] for key in ("host", "user", "password") if given.get(key)}
        port = int(given.get("port") or 5432)
        own = await asyncpg.connect(**found, port=port, database=given["dbname"], statement_cache_size=0)
        await batchq.enqueue_async(own, "w", SECRET, items=[SECRET])
        await batchq.enqueue_many_async(own, "w", [SECRET])
        await batchq.enqueue_each_async(own, "w", [SECRET])
        await own.close()

    asyncio.run(run())


WAYS: list[Callable[[Conn, str], None]] = [
    by_enqueue,
    by_enqueue_many,
    by_enqueue_many_with_keys,
    by_enqueue_many_of_items,
    by_enqueue_each,
    by_sqlalchemy,
    by_asyncpg,
]


@pytest.mark.parametrize("enqueues", WAYS, ids=lambda way: way.__name__)
def test_every_function_seals_what_it_enqueues(
    conn: Conn, dsn: str, keys: str, enqueues: Callable[[Conn, str], None]
) -> None:
    enqueues(conn, dsn)
    conn.commit()
    payloads = values(conn, "SELECT payload FROM batchq.batches")
    assert payloads
    assert {key_of(payload) for payload in payloads} == {"2026-11"}
    assert everywhere(conn) == []
    app, seen = batchq.App(), []
    app.handler("w")(lambda batch: seen.append((batch.payload, batch.items)))
    drain(app, dsn)
    assert len(seen) == len(payloads)
    assert all(items in ([], [SECRET], [SECRET] * 2) and payload in (SECRET, {}) for payload, items in seen)


def test_the_command_seals_with_the_keys_of_its_environment(conn: Conn, dsn: str, keys: str, tmp_path: Path) -> None:
    command = CommandLine(dsn, tmp_path)
    ended = command("enqueue", "w", "--payload", json.dumps(SECRET), BATCHQ_ENCRYPTION_KEYS=keys)
    lines = command("enqueue", "w", "--lines", "-", stdin=f"{CANARY}\n{CANARY}\n", BATCHQ_ENCRYPTION_KEYS=keys)
    assert (ended.code, lines.code) == (0, 0), (ended.err, lines.err)
    assert everywhere(conn) == []
    assert [sealed.open_value(one, "w", "payload") for one in values(conn, "SELECT payload FROM batchq.batches")] == [
        SECRET,
        {},
    ]


def test_the_payload_of_a_declared_schedule_is_sealed_the_same_way_each_time(conn: Conn, dsn: str, keys: str) -> None:
    app, seen = batchq.App(), []
    app.handler("nightly")(lambda batch: seen.append(batch.payload))
    app.schedule("@every 1 s", payload={"card": CANARY, "tick": None})(app.handlers["nightly"].function)
    [declared] = app.declared_schedules()
    assert app.declared_schedules() == [declared]
    assert key_of(declared["payload"]) == "2026-11"
    assert CANARY not in json.dumps(declared)
    conn.execute("SELECT batchq.declare_schedules(%s)", [Jsonb([declared])])
    conn.execute("SELECT batchq.run_schedule('nightly')")
    conn.commit()
    drain(app, dsn)
    [payload] = seen
    assert payload["card"] == CANARY
    assert payload["tick"].endswith("Z")
    assert everywhere(conn) == []


def test_a_copy_of_a_sealed_batch_runs_as_the_batch_itself(conn: Conn, dsn: str, keys: str) -> None:
    app, seen = batchq.App(), []
    app.handler("copied")(lambda batch: seen.append((batch.payload, batch.items)))
    batch_id = put(conn, "copied", SECRET, items=[SECRET])
    conn.execute("SELECT batchq.enqueue_copy(%s)", [batch_id])
    conn.commit()
    drain(app, dsn)
    assert seen == [(SECRET, [SECRET])] * 2


# ------------------------------------------------------------------------------------- keys that rotate, fail, miss


def test_keys_rotate_with_what_is_enqueued(conn: Conn, dsn: str) -> None:
    old, new = sealed.new_key("old"), sealed.new_key("new")
    with encryption_keys(old):
        first = put(conn, "turn", SECRET)
    with encryption_keys(f"{new}, {old}"):
        second = put(conn, "turn", SECRET)
        app = batchq.App()
        app.handler("turn")(lambda batch: batch.payload)
        drain(app, dsn)
        rows = [look(conn, one) for one in (first, second)]
    assert [(key_of(row.payload), key_of(row.result)) for row in rows] == [("old", "new"), ("new", "new")]


@both_styles
def test_a_missing_key_fails_the_attempt_and_only_of_its_batch_until_a_worker_has_it(
    conn: Conn, dsn: str, style: str
) -> None:
    app, seen = batchq.App(), []
    register(app, style, "late", lambda batch: seen.append(batch.payload), backoff=AT_ONCE)
    with encryption_keys(sealed.new_key("away")) as text:
        batch_id = put(conn, "late", SECRET, max_attempts=2)
    for other in (None, sealed.new_key("other")):
        with encryption_keys(other):
            clear = put(conn, "late", {"n": 2})
            drain(app, dsn)
            assert look(conn, clear).status == "completed"
        row = look(conn, batch_id)
        assert row.status == "failed"
        assert [error["error"] for error in row.errors][-1] == (
            "KeyMissing: the payload is sealed with key 'away', which this program does not have; "
            "add it to BATCHQ_ENCRYPTION_KEYS"
        )
        conn.execute("SELECT batchq.retry(%s)", [batch_id])
        conn.commit()
    assert SECRET not in seen
    with encryption_keys(text):
        drain(app, dsn)
    assert seen[-1] == SECRET
    assert look(conn, batch_id).status == "completed"


def test_items_whose_key_is_missing_fail_the_attempt(conn: Conn, dsn: str, keys: str) -> None:
    app = batchq.App()
    app.item_handler("late_items")(lambda _: None)
    with encryption_keys(sealed.new_key("away")):
        put(conn, "late_items", items=[SECRET], **ONCE)
    conn.execute("UPDATE batchq.batches SET payload = '{}'")
    conn.commit()
    drain(app, dsn)
    [errors] = values(conn, "SELECT errors FROM batchq.batches")
    assert "the item is sealed with key 'away'" in errors[0]["error"]


BREAKS = {
    "another key of this name": "",
    "another kind": "UPDATE batchq.batches SET kind = 'pasted'",
    "another field": "UPDATE batchq.batches SET payload = items -> 0",
    "a changed letter": "UPDATE batchq.batches SET payload = jsonb_set(payload, '{batchq:sealed,data}',"
    " to_jsonb(translate(payload #>> '{batchq:sealed,data}', 'ABCDEFabcdef', 'BCDEFAbcdefa')))",
    "a part of it": "UPDATE batchq.batches SET payload = jsonb_set(payload, '{batchq:sealed,data}', '\"QUJD\"')",
    "no base64": "UPDATE batchq.batches SET payload = jsonb_set(payload, '{batchq:sealed,data}', '\"*\"')",
}


@pytest.mark.parametrize("change", BREAKS)
def test_what_does_not_fit_its_key_kind_and_field_fails_its_batch_at_once(conn: Conn, dsn: str, change: str) -> None:
    app, seen = batchq.App(), []
    for kind in ("fits", "pasted"):
        app.handler(kind)(lambda batch: seen.append(batch.payload))
    with encryption_keys(sealed.new_key("k")):
        batch_id = put(conn, "fits", SECRET, items=[SECRET])
        if BREAKS[change]:
            conn.execute(BREAKS[change].encode())
            conn.commit()
            drain(app, dsn)
    if not BREAKS[change]:
        with encryption_keys(sealed.new_key("k")):
            drain(app, dsn)
    row = look(conn, batch_id)
    assert (row.status, row.attempt, seen) == ("failed", 1, [])
    assert row.errors[0]["error"].startswith("CannotOpen: the payload cannot be opened with key 'k': ")


def test_a_changed_item_fails_its_batch_and_is_named(conn: Conn, dsn: str, keys: str) -> None:
    app = batchq.App()
    app.item_handler("one_bad")(lambda _: None)
    batch_id = put(conn, "one_bad", items=[SECRET, SECRET])
    conn.execute("UPDATE batchq.batches SET items = jsonb_set(items, '{1}', payload)")
    conn.commit()
    drain(app, dsn)
    row = look(conn, batch_id)
    assert row.status == "failed"
    assert row.errors[0]["error"].startswith("CannotOpen: item 1: the item cannot be opened")


# ------------------------------------------------------------------------------------------------------- in the clear


def test_batches_in_the_clear_run_beside_sealed_ones(conn: Conn, dsn: str, keys: str) -> None:
    app, seen = batchq.App(), []
    app.handler("mixed")(lambda batch: seen.append(batch.payload) or batch.payload)
    put(conn, "mixed", SECRET)
    conn.execute("INSERT INTO batchq.batches (kind, payload) VALUES ('mixed', '{\"n\": 2}')")
    conn.commit()
    drain(app, dsn)
    assert sorted(map(as_text, seen)) == sorted(map(as_text, [SECRET, {"n": 2}]))
    assert values(conn, "SELECT count(*) FROM batchq.batches WHERE result = '{\"n\": 2}'") == [1]


@pytest.mark.parametrize("has_keys", [True, False])
@both_styles
def test_a_kind_that_must_be_sealed_fails_what_is_in_the_clear_by_name(
    conn: Conn, dsn: str, style: str, has_keys: bool
) -> None:
    app, seen = batchq.App(), []
    register(app, style, "demanding", lambda batch: seen.append(batch.payload), sealed=True)
    register_items(app, style, "demanding_items", lambda item, _: seen.append(item), sealed=True)
    conn.execute(
        "INSERT INTO batchq.batches (kind, items) VALUES ('demanding', NULL), ('demanding_items', '[{\"n\": 1}]')"
    )
    conn.commit()
    with encryption_keys("" if has_keys else None):
        drain(app, dsn)
    rows = conn.execute("SELECT status, attempt, errors -> 0 ->> 'error' FROM batchq.batches ORDER BY id").fetchall()
    assert seen == []
    assert rows == [
        (
            "failed",
            1,
            f"CannotOpen: the payload is in the clear, and all of this batch of kind '{kind}' must be sealed; "
            "enqueue it with keys (BATCHQ_ENCRYPTION_KEYS)",
        )
        for kind in ("demanding", "demanding_items")
    ]


def test_items_may_be_sealed_beside_a_payload_in_the_clear(conn: Conn, dsn: str, keys: str) -> None:
    app, seen = batchq.App(), []

    @app.handler("half", backoff=AT_ONCE)
    def half(batch: batchq.Batch) -> str:
        seen.append((batch.items, batch.cursor))
        if batch.cursor is None:
            batch.checkpoint(CANARY)
            raise ValueError(CANARY)
        return CANARY

    batch_id = put(conn, "half", items=[SECRET])
    conn.execute("UPDATE batchq.batches SET payload = '{}'")
    conn.commit()
    drain(app, dsn)
    row = look(conn, batch_id)
    assert seen == [([SECRET], None), ([SECRET], CANARY)]
    assert [key_of(part) for part in (row.cursor, row.result)] == ["2026-11"] * 2
    assert everywhere(conn) == []


def test_items_that_only_look_sealed_are_handed_on(conn: Conn, dsn: str, keys: str) -> None:
    app, seen = batchq.App(), []
    app.item_handler("look_alike", chunk_size=1)(lambda item: seen.append(item))
    items: list[Any] = [{"batchq:sealed": 1}, {"n": 2}]
    conn.execute("INSERT INTO batchq.batches (kind, items) VALUES ('look_alike', %s)", [Jsonb(items)])
    conn.commit()
    drain(app, dsn)
    assert seen == items


@pytest.mark.parametrize("what", ["an item", "the cursor"])
def test_a_sealed_batch_takes_nothing_in_the_clear(conn: Conn, dsn: str, keys: str, what: str) -> None:
    app, seen = batchq.App(), []
    app.item_handler("swapped")(lambda item: seen.append(item))
    batch_id = put(conn, "swapped", items=[SECRET, SECRET])
    column = "items = jsonb_set(items, '{1}', '{\"n\": 2}')" if what == "an item" else "cursor = '1'"
    conn.execute(f"UPDATE batchq.batches SET {column}".encode())
    conn.commit()
    drain(app, dsn)
    row = look(conn, batch_id)
    assert (row.status, seen) == ("failed", [])
    assert f"{'item 1' if what == 'an item' else what} is in the clear" in row.errors[0]["error"]


@pytest.mark.parametrize("enqueues", WAYS[:5], ids=lambda way: way.__name__)
def test_without_keys_nothing_of_a_kind_that_must_be_sealed_is_enqueued(
    conn: Conn, dsn: str, enqueues: Callable[[Conn, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealed._OfThisProgram, "demanding", {"w"})
    with encryption_keys(None), pytest.raises(ConfigError, match="batches of kind 'w' must be sealed"):
        enqueues(conn, dsn)
    assert values(conn, "SELECT count(*) FROM batchq.batches") == [0]


def test_a_handler_that_demands_sealed_batches_runs_in_tests_without_keys() -> None:
    app = batchq.App()
    app.handler("tested", sealed=True)(lambda batch: batch.payload)
    with encryption_keys(None):
        assert run_handler(app, "tested", payload=SECRET).result == SECRET


# ------------------------------------------------------------------------------------------------- sizes, keys, texts


def test_an_envelope_costs_a_third_and_a_hundred_bytes(conn: Conn, keys: str) -> None:
    for size in (0, 100, 100_000, 3_000_000):
        batch_id = put(conn, "sized", "x" * size)
        [stored] = values(conn, "SELECT length(payload::text) FROM batchq.batches WHERE id = %s", batch_id)
        assert stored <= (size + 2) * 4 / 3 + 120
    with pytest.raises(psycopg.errors.CheckViolation, match="batches_payload_fits"):
        put(conn, "sized", "x" * 3_200_000)


def test_a_result_that_is_too_large_once_sealed_fails_its_batch(conn: Conn, dsn: str, keys: str) -> None:
    app = batchq.App()
    app.handler("large")(lambda batch: "x" * batch.payload)
    fits, too_large = put(conn, "large", 740_000), put(conn, "large", 760_000)
    drain(app, dsn)
    assert look(conn, fits).status == "completed"
    row = look(conn, too_large)
    assert row.status == "failed"
    assert "sealed, is 1,0" in sealed.open_error(row.errors[0], "large")["error"]


GOOD = base64.b64encode(bytes(range(32))).decode()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("nocolon", "key number 1 is not NAME:KEY with 32 bytes in base64"),
        (f"{GOOD}", "key number 1 has no valid name"),
        (f"a b:{GOOD}", "key number 1 has no valid name"),
        (f"a:{GOOD},b:c2hvcnQ=", "key number 2 is not NAME:KEY with 32 bytes in base64"),
        (f"a:{GOOD},a:{GOOD}", "two keys have the name 'a'"),
        (",", "has no key"),
    ],
)
def test_keys_that_are_none_are_refused_without_showing_one(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as raised:
        sealed.use_keys(text)
    assert problem in str(raised.value)
    assert GOOD not in str(raised.value)


def test_a_key_is_in_no_text_of_a_program(keys: str) -> None:
    value = keys.partition(":")[2]
    current = sealed.current()
    assert repr(current) == "Keys(2026-11)"
    assert hide_password(f"the key {value} and {value!r}") == "the key *** and '***'"
    assert value not in repr(batchq.Settings.load(dsn="host=x", encryption_keys=keys))
    with pytest.raises(TypeError):
        current.__reduce__()  # type: ignore[union-attr]


def test_new_key_prints_a_key_that_can_be_used(tmp_path: Path) -> None:
    command = CommandLine(None, tmp_path)
    made = command("new-key", "2027-01").out.strip()
    assert list(sealed.read_keys(made)) == ["2027-01"]
    assert made != command("new-key", "2027-01").out.strip()
    refused = command("new-key", "a:b")
    assert (refused.code, "letters, digits" in refused.err) == (2, True)


def test_no_program_without_keys_loads_the_library() -> None:
    code = "import batchq, batchq.worker.worker, sys\nbatchq.Settings\nassert 'cryptography' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_cipher_is_xaes_256_gcm_by_its_published_vectors() -> None:
    nonce = b"ABCDEFGHIJKLMNOPQRSTUVWX"
    for key, about, expected in (
        (b"\x01", b"", "ce546ef63c9cc60765923609b33a9a1974e96e52daf2fcf7075e2271"),
        (b"\x03", b"c2sp.org/XAES-256-GCM", "986ec1832593df5443a179437fd083bf3fdb41abd740a21f71eb769d"),
    ):
        cipher = sealed._Cipher(key * 32)
        data = cipher.seal(b"XAES-256-GCM", about, nonce)
        assert data == nonce + bytes.fromhex(expected)
        assert cipher.open(data, about) == b"XAES-256-GCM"


fields = st.sampled_from(["payload", "item", "cursor", "result", "error"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=9), part, max_size=3),
)
TWO_KEYS = f"a:{GOOD},b:{base64.b64encode(bytes(32)).decode()}"


@settings(max_examples=100, deadline=None, derandomize=True)
@given(json_values, st.text(min_size=1, max_size=20), fields, st.text(min_size=1, max_size=20), fields)
def test_a_value_opens_for_its_own_kind_and_field_only(
    value: Any, kind: str, field: sealed.Field, kind2: str, field2: sealed.Field
) -> None:
    keys = sealed.Keys.read(TWO_KEYS)
    kind, kind2 = (text.encode("utf-8", "replace").decode() for text in (kind, kind2))
    text = json.dumps(value)
    key, data = sealed.envelope_of(json.loads(keys.seal(text, kind, field))) or ("", "")
    assert keys.open(key, data, kind, field) == text
    if (kind, field) != (kind2, field2):
        with pytest.raises(CannotOpen):
            keys.open(key, data, kind2, field2)
    with pytest.raises(CannotOpen):
        keys.open("b", data, kind, field)
    with pytest.raises(KeyMissing, match="key 'c'"):
        keys.open("c", data, kind, field)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(max_size=3000))
def test_the_line_of_an_error_fits_and_opens(line: str) -> None:
    keys = sealed.Keys.read(TWO_KEYS)
    line = " ".join(line.encode("utf-8", "replace").decode().split())
    stored = keys.seal_line(line, "k")
    assert len(stored.encode()) <= 2000
    opened = keys.open_line(stored, "k")
    assert opened == line or line.startswith(opened.removesuffix(" ..."))
    assert sealed.shortened(stored) == keys.plain_line(line)


# ------------------------------------------------------------------------------------------------------ what is shown


def failed_sealed_batch(conn: Conn, dsn: str) -> int:
    """Return a sealed batch that has failed, with a failed item."""
    app = batchq.App()

    @app.item_handler("shown")
    def fail(item: Any) -> None:
        raise ValueError(f"bad {item}")

    batch_id = put(conn, "shown", SECRET, items=[SECRET], **ONCE)
    drain(app, dsn)
    return batch_id


def test_the_error_of_an_item_is_shown_without_its_sealed_part(keys: str) -> None:
    known = sealed.current()
    assert known
    line = known.seal_line(f"ValueError: {CANARY}", "k")
    assert hidden.shown_item({"item": 1, "error": line}) == {"item": 1, "error": "ValueError: sealed with key 2026-11"}


def test_the_web_ui_names_the_key_and_opens_nothing(conn: Conn, dsn: str, keys: str) -> None:
    batch_id = failed_sealed_batch(conn, dsn)
    with served(dsn) as site:
        text = text_of(site, f"/batches/{batch_id}")
        raw = site.client.get(f"/batches/{batch_id}/payload.json").json()
        copy = text_of(site, f"/batches/{batch_id}/copy")
        pages = (
            "/",
            "/failures",
            "/batches",
            "/batches?q=ValueError",
            f"/flow/{batch_id}",
            "/audit",
            "/keys",
            "/charts",
        )
        others = "".join(text_of(site, page) for page in pages)
    assert '"sealed with key 2026-11"' in text
    assert "ValueError: sealed with key 2026-11" in text
    assert key_of(raw) == "2026-11"
    assert "It is copied unchanged" in copy
    assert CANARY not in text + copy + others + json.dumps(raw)


def test_top_names_the_key_and_opens_nothing(conn: Conn, dsn: str, keys: str) -> None:
    page = read_page(conn, failed_sealed_batch(conn, dsn))
    assert page is not None
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(batch_text.page(page, 200))
    text = console.export_text()
    assert text.count("sealed with key 2026-11") >= 3, text
    assert CANARY not in text


def test_show_names_the_key_and_opens_only_when_asked_and_with_keys(
    conn: Conn, dsn: str, keys: str, tmp_path: Path
) -> None:
    batch_id, command = failed_sealed_batch(conn, dsn), CommandLine(dsn, tmp_path)
    shown = command("show", str(batch_id), BATCHQ_ENCRYPTION_KEYS=keys)
    as_json = command("show", str(batch_id), "--json", BATCHQ_ENCRYPTION_KEYS=keys)
    assert shown.out.count("sealed with key 2026-11") >= 3
    assert CANARY not in shown.out + as_json.out
    assert key_of(json.loads(as_json.out)["payload"]) == "2026-11"
    opened = command("show", str(batch_id), "--open", BATCHQ_ENCRYPTION_KEYS=keys)
    assert opened.out.count(CANARY) >= 3, opened.out
    found = json.loads(command("show", str(batch_id), "--open", "--json", BATCHQ_ENCRYPTION_KEYS=keys).out)
    assert (found["payload"], found["failed_items"][0]["item"]) == (SECRET, SECRET)
    assert found["failed_items"][0]["error"] == f"ValueError: bad {SECRET}"
    for given_keys in ("", sealed.new_key("x")):
        refused = command("show", str(batch_id), "--open", BATCHQ_ENCRYPTION_KEYS=given_keys)
        assert (refused.code, "sealed with key '2026-11', which this program does not have" in refused.err) == (2, True)
    [clear_id] = values(conn, """INSERT INTO batchq.batches (kind, payload) VALUES ('k', '"ann"') RETURNING id""")
    in_the_clear = command("show", str(clear_id), "--open", BATCHQ_ENCRYPTION_KEYS="")
    assert (in_the_clear.code, "ann" in in_the_clear.out) == (0, True)


def test_a_program_without_the_key_gets_envelopes(conn: Conn, dsn: str, keys: str) -> None:
    batch_id = put(conn, "got", SECRET)
    assert batchq.get(conn, batch_id).payload == SECRET  # type: ignore[union-attr]
    for other in (None, sealed.new_key("x"), sealed.new_key("2026-11")):
        with encryption_keys(other):
            assert key_of(batchq.get(conn, batch_id).payload) == "2026-11"  # type: ignore[union-attr]


def test_values_that_only_look_sealed_are_handed_on_as_they_are(conn: Conn, dsn: str, keys: str) -> None:
    app, seen = batchq.App(), []
    app.handler("looks")(lambda batch: seen.append(batch.payload))
    looks: list[Any] = [
        {"batchq:sealed": 1},
        {"batchq:sealed": {"key": "a"}},
        {"x": {"batchq:sealed": {"key": "a", "data": "b"}}},
        {"batchq:sealed": {"key": "a", "data": "b"}, "more": 1},
        '"batchq:sealed"',
    ]
    for value in looks:
        conn.execute("INSERT INTO batchq.batches (kind, payload) VALUES ('looks', %s)", [Jsonb(value)])
    conn.commit()
    drain(app, dsn, concurrency=1)
    assert sorted(map(as_text, seen)) == sorted(map(as_text, looks))


def test_a_tick_beside_what_is_not_an_object_is_left_out(conn: Conn, dsn: str, keys: str) -> None:
    app, seen = batchq.App(), []
    app.handler("ticked")(lambda batch: seen.append(batch.payload))
    put(conn, "ticked", [1])
    conn.execute('UPDATE batchq.batches SET payload = payload || \'{"tick": "now"}\'')
    conn.commit()
    drain(app, dsn)
    assert seen == [[1]]


def test_an_option_that_is_wrong_is_refused_as_without_keys(conn: Conn, keys: str) -> None:
    with pytest.raises(InvalidInput, match="the payload cannot be stored as JSON"):
        put(conn, "w", float("nan"))
    with pytest.raises(InvalidInput, match="an item cannot be stored as JSON"):
        put(conn, "w", items=[1, object()])


def test_what_stands_before_a_colon_and_is_no_type_is_sealed_too() -> None:
    keys = sealed.Keys.read(sealed.new_key("k"))
    assert keys.plain_line("ValueError: no 4111") == "ValueError: sealed with key k"
    for line in ("card 4111-1111 of Ann Lee: declined", "ann@example.com: no such user", ": 4111", "4111"):
        assert keys.plain_line(line) == "sealed with key k"
        assert keys.seal_line(line, "work").startswith("sealed with key k: ")


if __name__ == "__main__":
    run_alone(__file__)
