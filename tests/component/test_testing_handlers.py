"""batchq.testing.run_handler: one attempt of a handler without a database."""

import asyncio
import json
from typing import Any

import psycopg
import pytest
from pydantic import BaseModel

import batchq
from batchq.errors import ConfigError, InvalidInput
from batchq.testing import Checkpoint, FailedItem, HandlerRun, NoDatabaseError, run_handler, run_handler_async
from tests.support.alone import run_alone
from tests.support.batches import STYLES, register, register_items, values

both_styles = pytest.mark.parametrize("style", STYLES)


class Order(BaseModel):
    """A payload."""

    number: int


@both_styles
def test_a_result_is_what_would_be_stored(style: str) -> None:
    app = batchq.App()
    register(app, style, "add", lambda batch: {"sum": sum(batch.payload["numbers"]), "key": batch.key})
    run = run_handler(app, "add", payload={"numbers": (1, 2)}, key="k")
    assert run == HandlerRun("completed", {"sum": 3, "key": "k"}, None, None, None, None, 0, 0, (), ())


@both_styles
def test_what_a_handler_raises_is_returned(style: str) -> None:
    app = batchq.App()
    errors = {
        "error": ValueError("no"),
        "invalid": InvalidInput("bad"),
        "cancel": batchq.Cancel("not wanted"),
        "snooze": batchq.Snooze(60),
        "throttle": batchq.Throttled(30),
    }

    def body(batch: batchq.Batch) -> None:
        raise errors[batch.payload]

    register(app, style, "work", body, backoff=batchq.Backoff(10, 10))
    runs = {payload: run_handler(app, "work", payload=payload) for payload in errors}
    assert {name: run.status for name, run in runs.items()} == {
        "error": "retried", "invalid": "failed", "cancel": "cancelled", "snooze": "snoozed", "throttle": "snoozed",
    }  # fmt: skip
    assert runs["error"].raised is errors["error"]
    assert runs["invalid"].raised is errors["invalid"]
    assert (runs["error"].error, runs["cancel"].error) == ("ValueError: no", "cancelled: not wanted")
    assert 5 <= (runs["error"].delay_seconds or 0) <= 15
    assert (runs["snooze"].delay_seconds, runs["throttle"].delay_seconds) == (60, 30)
    assert [runs[name].raised for name in ("cancel", "snooze", "throttle")] == [None] * 3
    assert run_handler(app, "work", payload="error", attempt=5).status == "failed"


def test_failures_that_are_batchqs_own_have_an_error_and_no_exception() -> None:
    app = batchq.App()
    app.handler("order", payload=Order)(lambda batch: batch.payload.number)
    app.handler("odd")(lambda _: object())
    assert run_handler(app, "order", payload=Order(number=7)).result == 7
    run = run_handler(app, "order", payload={"number": "x"})
    assert (run.status, run.raised) == ("failed", None)
    assert "the payload does not fit Order: number" in str(run.error)
    assert "what the handler returned cannot be stored as JSON" in str(run_handler(app, "odd").error)


def test_a_plain_function_runs_without_an_app() -> None:
    def double(batch: batchq.Batch) -> int:
        return int(batch.payload) * 2

    async def triple(batch: batchq.Batch) -> str:
        return f"{batch.kind} {batch.payload * 3}"

    assert run_handler(double, payload=4).result == 8
    assert run_handler(triple, "times", payload=4).result == "times 12"


@both_styles
def test_item_handlers_are_called_for_each_item(style: str) -> None:
    app = batchq.App()
    seen: list[Any] = []

    def body(item: Any, batch: batchq.Batch) -> None:
        seen.append((item, batch.payload))
        if item == "bad":
            raise InvalidInput("no such site")
        if item == "away":
            raise OSError("refused")
        if item == "later":
            raise batchq.Snooze(60)

    register_items(app, style, "check", body, concurrency=2, spread=4)
    run = run_handler(app, "check", items=["a", "bad", "b"], payload=1, max_failed_items=1)
    assert sorted(seen) == [("a", 1), ("b", 1), ("bad", 1)]
    assert (run.status, run.items_done, run.items_failed) == ("completed", 2, 1)
    assert run.failed_items == (FailedItem(1, "bad", "InvalidInput: no such site", False, None),)
    assert run.checkpoints == (Checkpoint(None, 2, 1),)

    run = run_handler(app, "check", items=["away", "a"])
    assert (run.status, type(run.raised), run.failed_items[0].is_retryable) == ("retried", OSError, True)
    assert run.error == "1 of 2 items failed; the first: OSError: refused"
    run = run_handler(app, "check", items=["later"])
    assert (run.status, run.delay_seconds, run.failed_items[0].snoozed_seconds) == ("snoozed", 60, 60)
    run = run_handler(app, "check", items=["a", "b"])
    assert (run.status, run.items_done, run.failed_items) == ("completed", 2, ())


@both_styles
def test_an_item_that_throttles_ends_its_batch_without_a_wait(style: str) -> None:
    app = batchq.App()
    calls: list[Any] = []

    def body(item: Any, batch: batchq.Batch) -> None:
        calls.append(item)
        raise batchq.Throttled(2)

    register_items(app, style, "call", body)
    run = run_handler(app, "call", items=[1, 2])
    assert (run.status, calls) == ("snoozed", [1])


def test_checkpoints_and_cursors_are_recorded() -> None:
    def copy(batch: batchq.Batch) -> None:
        for page in range(batch.cursor or 0, 3):
            batch.checkpoint(page + 1)

    run = run_handler(copy, cursor=1)
    assert run.checkpoints == (Checkpoint(2, 0, 0), Checkpoint(3, 0, 0))
    assert run.cursor == 3

    async def work(batch: batchq.Batch) -> None:
        async for chunk in batch.chunks(2):
            if 3 in chunk.items:
                chunk.fail(0, "three")
            async with chunk.transaction():
                await batch.checkpoint_async({"at": chunk.items})

    run = run_handler(work, items=[1, 2, 3, 4, 5])
    assert [(one.cursor["at"], one.items_done) for one in run.checkpoints] == [([1, 2], 2), ([3, 4], 3), ([5], 4)]
    assert (run.status, run.items_done, run.items_failed) == ("retried", 4, 1)


def test_what_others_need_is_given() -> None:
    def add(batch: batchq.Batch) -> int:
        with batch.transaction(complete=False):
            return sum(needed.result for needed in batch.needed)

    needed = [batchq.Needed(1, "part", "completed", 3), batchq.Needed(2, "part", "completed", 4)]
    assert run_handler(add, needed=needed).result == 7


# ------------------------------------------------------------------------------------------------------ transactions


def transactional_app() -> batchq.App:
    """Return an app whose handlers write rows."""
    app = batchq.App()

    @app.handler("def")
    def write(batch: batchq.Batch) -> None:
        with batch.transaction(result={"rows": 1}) as conn:
            conn.execute("INSERT INTO numbers VALUES (%s)", [batch.payload])

    @app.handler("async def")
    async def write_async(batch: batchq.Batch) -> None:
        async with batch.transaction(result={"rows": 1}) as conn:
            await conn.execute("INSERT INTO numbers VALUES (%s)", [batch.payload])

    @app.item_handler("def items", transactional=True)
    def write_item(item: int, conn: psycopg.Connection) -> None:
        with conn.cursor() as cursor:
            cursor.execute("INSERT INTO numbers VALUES (%s)", [item])
        if item == 3:
            raise ValueError("three")

    @app.item_handler("async def items", transactional=True)
    async def write_item_async(item: int, conn: psycopg.AsyncConnection) -> None:
        async with conn.cursor() as cursor:
            await cursor.execute("INSERT INTO numbers VALUES (%s)", [item])
        if item == 3:
            raise ValueError("three")

    return app


@both_styles
def test_a_transaction_without_a_connection_is_refused(style: str) -> None:
    with pytest.raises(NoDatabaseError, match=r"uses conn.execute of its transaction; give run_handler a conn= of"):
        run_handler(transactional_app(), style)
    with pytest.raises(NoDatabaseError, match=r"conn.cursor"):
        run_handler(transactional_app(), f"{style} items", items=[1])


@both_styles
def test_a_connection_of_the_test_takes_the_handlers_rows_only(conn: psycopg.Connection, style: str) -> None:
    conn.execute("CREATE TABLE numbers (n integer)")
    with conn.transaction(force_rollback=True):
        run = run_handler(transactional_app(), style, payload=1, conn=conn)
        assert (run.status, run.result) == ("completed", {"rows": 1})
        run = run_handler(transactional_app(), f"{style} items", items=[2, 3, 4], conn=conn)
        assert (run.status, run.items_done, run.items_failed) == ("retried", 2, 1)
        assert values(conn, "SELECT n FROM numbers ORDER BY n") == [1, 2, 4]
        assert values(conn, "SELECT id FROM batchq.all_batches") == []
    assert values(conn, "SELECT n FROM numbers") == []


def test_in_an_event_loop(dsn: str, conn: psycopg.Connection) -> None:
    conn.execute("CREATE TABLE numbers (n integer)")

    async def test() -> None:
        with pytest.raises(RuntimeError, match="use `await run_handler_async"):
            run_handler(print)
        async with await psycopg.AsyncConnection.connect(dsn) as own:
            for style in STYLES:
                run = await run_handler_async(transactional_app(), style, payload=1, conn=own)
                assert run.result == {"rows": 1}
            assert (await (await own.execute("SELECT count(*) FROM numbers")).fetchone()) == (2,)
            await own.rollback()
        run = await run_handler_async(transactional_app(), "def items", items=[])
        assert run.status == "completed"

    asyncio.run(test())


def test_options_that_do_not_fit_are_refused() -> None:
    app = transactional_app()
    with pytest.raises(ConfigError, match=r"no handler of the kind 'x'; there are: 'def', 'async def'"):
        run_handler(app, "x")
    with pytest.raises(ConfigError, match="no handler of the kind None"):
        run_handler(app)
    with pytest.raises(InvalidInput, match="attempt is a number from 1 to max_attempts, 5, not 6"):
        run_handler(app, "def", attempt=6)
    with pytest.raises(InvalidInput, match="the payload cannot be stored as JSON"):
        run_handler(app, "def", payload=object())


def test_what_ends_the_test_is_raised() -> None:
    def interrupted(batch: batchq.Batch) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_handler(interrupted)


def test_the_same_as_a_worker_stores() -> None:
    """Results go through JSON."""

    def handle(batch: batchq.Batch) -> Any:
        return {1: batch.payload, "order": Order(number=1)}

    assert run_handler(handle, payload=[1, (2,)]).result == json.loads('{"1": [1, [2]], "order": {"number": 1}}')


if __name__ == "__main__":
    run_alone(__file__)
