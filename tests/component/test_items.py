"""Batches with items: chunks, checkpoints, errors of single items, retry of those alone."""

import asyncio
import random
import threading
import time
from typing import Any

import psycopg
import pytest
from pydantic import BaseModel

import batchq
from batchq.postgres.statements import checkpoints as checkpoint_statements
from batchq.testing import running_worker
from tests.support.alone import run_alone
from tests.support.batches import STYLES, await_status, drain, failed_items, look, put, register_items, values
from tests.support.steps import step
from tests.support.waiting import wait_until

both_styles = pytest.mark.parametrize("style", STYLES)
AT_ONCE = batchq.Backoff(0, 0)
LATER = batchq.Backoff(3600, 3600)
MAKE_READY = "UPDATE batchq.batches SET run_at = now() WHERE status = 'pending'"


def counters(conn: psycopg.Connection, batch_id: int) -> tuple[int, int]:
    """Return items_done and items_failed, which must always equal the rows of failed_items."""
    row = look(conn, batch_id)
    assert row.items_failed == len(failed_items(conn, batch_id))
    return row.items_done, row.items_failed


class Flaky:
    """The body of an item handler: records its calls, and fails for the items in *bad*."""

    def __init__(self, bad: set[Any]) -> None:
        self.bad = bad
        self.calls: list[Any] = []

    def __call__(self, item: Any, _batch: batchq.Batch) -> None:
        self.calls.append(item)
        if item in list(self.bad):  # a list: items need not be hashable
            raise ValueError(f"bad {item}")


# ------------------------------------------------------------------------------------------------ item handlers


@both_styles
def test_an_item_handler_is_called_once_an_item_in_order(dsn: str, conn: psycopg.Connection, style: str) -> None:
    app = batchq.App()
    seen: list[Any] = []
    register_items(app, style, "work", lambda item, batch: seen.append((batch.id, item)), chunk_size=2)
    items = [{"n": 1}, "two", 3, None, [5]]
    batch_id = put(conn, "work", items=items)

    drain(app, dsn)

    assert seen == [(batch_id, item) for item in items]
    row = look(conn, batch_id)
    assert (row.status, row.items_total, row.result) == ("completed", 5, None)
    assert counters(conn, batch_id) == (5, 0)


@both_styles
@pytest.mark.parametrize("items", [[], None], ids=repr)
def test_without_items_there_is_nothing_to_do(dsn: str, conn: psycopg.Connection, style: str, items: Any) -> None:
    app = batchq.App()
    body = Flaky(set())
    register_items(app, style, "work", body)
    batch_id = put(conn, "work", items=items)

    drain(app, dsn)

    assert (look(conn, batch_id).status, body.calls) == ("completed", [])
    assert look(conn, batch_id).items_total == (None if items is None else 0)


def test_concurrency_runs_items_at_once_in_threads(dsn: str, conn: psycopg.Connection) -> None:
    app = batchq.App()
    together = threading.Barrier(5)

    @app.item_handler("work", concurrency=5)
    def work(item: int) -> None:
        together.wait(10)

    batch_id = put(conn, "work", items=list(range(20)))
    drain(app, dsn)
    assert look(conn, batch_id).status == "completed"
    assert counters(conn, batch_id) == (20, 0)


def test_concurrency_runs_items_at_once_in_the_event_loop(dsn: str, conn: psycopg.Connection) -> None:
    app = batchq.App()
    together = asyncio.Barrier(50)

    @app.item_handler("work", concurrency=50)
    async def work(item: int) -> None:
        async with asyncio.timeout(10):
            await together.wait()

    batch_id = put(conn, "work", items=list(range(200)))
    drain(app, dsn)
    assert look(conn, batch_id).status == "completed"
    assert counters(conn, batch_id) == (200, 0)


def test_no_more_items_than_concurrency_run_at_once(dsn: str, conn: psycopg.Connection) -> None:
    app = batchq.App()
    running: set[int] = set()
    most: list[int] = []

    @app.item_handler("work", concurrency=3)
    async def work(item: int) -> None:
        running.add(item)
        most.append(len(running))
        await asyncio.sleep(0)
        running.remove(item)

    put(conn, "work", items=list(range(50)))
    drain(app, dsn)
    assert (max(most), len(most)) == (3, 50)


# ---------------------------------------------------------------------------------------------- errors of items


@both_styles
@pytest.mark.parametrize("concurrency", [1, 4])
def test_an_items_error_fails_that_item_only_and_only_those_run_again(
    dsn: str, conn: psycopg.Connection, style: str, concurrency: int
) -> None:
    app = batchq.App()
    body = Flaky({3, 7})
    register_items(app, style, "work", body, backoff=LATER, chunk_size=4, concurrency=concurrency)
    batch_id = put(conn, "work", items=list(range(10)))

    step("first attempt: two items fail")
    drain(app, dsn)
    assert sorted(body.calls) == list(range(10))
    assert counters(conn, batch_id) == (8, 2)
    assert [(f.item_index, f.item, f.error, f.attempt, f.retryable) for f in failed_items(conn, batch_id)] == [
        (3, 3, "ValueError: bad 3", 1, True),
        (7, 7, "ValueError: bad 7", 1, True),
    ]
    row = look(conn, batch_id)
    assert (row.shown, row.attempt) == ("retrying", 1)
    assert row.errors[0]["error"] == "2 of 10 items failed; the first: ValueError: bad 3"

    step("second attempt: those alone; one is cured")
    body.calls, body.bad = [], {7}
    conn.execute(MAKE_READY)
    drain(app, dsn)
    assert sorted(body.calls) == [3, 7]
    assert counters(conn, batch_id) == (9, 1)
    assert [(f.item, f.attempt) for f in failed_items(conn, batch_id)] == [(7, 2)]

    step("third attempt: the last is cured")
    body.calls, body.bad = [], set()
    conn.execute(MAKE_READY)
    drain(app, dsn)
    assert body.calls == [7]
    assert counters(conn, batch_id) == (10, 0)
    assert (look(conn, batch_id).status, look(conn, batch_id).attempt) == ("completed", 3)


@both_styles
@pytest.mark.parametrize(("tolerated", "status"), [(2, "failed"), (3, "completed")])
def test_after_the_last_attempt_the_tolerance_decides(
    dsn: str, conn: psycopg.Connection, style: str, tolerated: int, status: str
) -> None:
    app = batchq.App()
    body = Flaky({1, 4, 8})
    register_items(app, style, "work", body, backoff=AT_ONCE)
    batch_id = put(conn, "work", items=list(range(10)), max_failed_items=tolerated, max_attempts=2)

    drain(app, dsn)

    assert body.calls == [*range(10), 1, 4, 8]
    assert counters(conn, batch_id) == (7, 3)
    assert (look(conn, batch_id).status, look(conn, batch_id).attempt) == (status, 2)


class Address(BaseModel):
    """What an item should be."""

    street: str
    number: int


@both_styles
def test_items_that_do_not_fit_the_model_are_not_tried_again(dsn: str, conn: psycopg.Connection, style: str) -> None:
    app = batchq.App()
    body = Flaky(set())
    register_items(app, style, "work", body, item=Address, backoff=AT_ONCE)
    good = {"street": "Elm", "number": 1}
    batch_id = put(conn, "work", items=[good, {"street": "Elm", "number": "one"}, "Elm 3", good])

    drain(app, dsn)

    assert body.calls == [Address(street="Elm", number=1)] * 2
    first, second = failed_items(conn, batch_id)
    assert first.error.startswith("InvalidInput: the item does not fit Address: number: Input should be a valid int")
    assert second.error.startswith("InvalidInput: the item does not fit Address: value: Input should be")
    assert (first.retryable, second.retryable) == (False, False)
    assert counters(conn, batch_id) == (2, 2)
    assert (look(conn, batch_id).status, look(conn, batch_id).attempt) == ("failed", 1)


@both_styles
@pytest.mark.parametrize("error", [SystemExit(1), BaseExceptionGroup("two", [SystemExit(1)])], ids=lambda e: repr(e))
@pytest.mark.parametrize("concurrency", [1, 3])
def test_an_item_that_raises_no_exception_proper_fails_that_item_only(
    dsn: str, conn: psycopg.Connection, style: str, error: BaseException, concurrency: int
) -> None:
    app = batchq.App()

    def body(item: int, batch: batchq.Batch) -> None:
        if item == 2:
            raise error

    register_items(app, style, "work", body, backoff=LATER, concurrency=concurrency)
    batch_id = put(conn, "work", items=list(range(5)))
    drain(app, dsn)
    assert counters(conn, batch_id) == (4, 1)
    assert look(conn, batch_id).shown == "retrying"


@both_styles
@pytest.mark.parametrize("error", [KeyboardInterrupt, asyncio.CancelledError, GeneratorExit])
@pytest.mark.parametrize("concurrency", [1, 3])
def test_an_item_that_raises_what_ends_programs_fails_the_attempt_and_the_worker_goes_on(
    dsn: str, conn: psycopg.Connection, style: str, error: type[BaseException], concurrency: int
) -> None:
    app = batchq.App()

    def body(item: int, batch: batchq.Batch) -> None:
        if item == 2:
            raise error

    register_items(app, style, "work", body, backoff=LATER, concurrency=concurrency)
    batch_id = put(conn, "work", items=list(range(5)))
    with running_worker(app, dsn):
        await_status(conn, batch_id, "retrying")
        await_status(conn, put(conn, "work", items=[1]), "completed")
    assert counters(conn, batch_id) == (0, 0)


def test_when_the_attempt_fails_no_item_runs_on_in_the_event_loop(dsn: str, conn: psycopg.Connection) -> None:
    app = batchq.App()
    running: list[int] = []
    left_running: list[int] = []

    @app.item_handler("work", concurrency=3, backoff=AT_ONCE)
    async def work(item: int, batch: batchq.Batch) -> None:
        if batch.attempt > 1:
            left_running.extend(running)
            raise batchq.Cancel("enough seen")
        if item == 1:
            raise KeyboardInterrupt
        running.append(item)
        try:
            for _ in range(20):
                await asyncio.sleep(0.01)
        finally:
            running.remove(item)

    batch_id = put(conn, "work", items=list(range(9)))
    drain(app, dsn)
    assert look(conn, batch_id).status == "cancelled"
    assert left_running == []


# ------------------------------------------------------------------------------------------------------- chunks


@both_styles
def test_a_checkpoint_follows_every_chunk_size_items(dsn: str, conn: psycopg.Connection, style: str) -> None:
    app = batchq.App()
    committed: list[int] = []
    register_items(app, style, "work", lambda _, b: committed.append(look(conn, b.id).items_done), chunk_size=10)
    put(conn, "work", items=list(range(25)))

    drain(app, dsn)

    assert committed == [0] * 10 + [10] * 10 + [20] * 5


@pytest.fixture
def checkpoints(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return how many items each checkpoint from now on counts as done, and as failed."""
    seen: list[tuple[int, int]] = []
    make = checkpoint_statements.checkpoint

    def recording(
        queue: str, batch_id: int, token: Any, lease_seconds: float, progress: checkpoint_statements.Progress
    ) -> Any:
        seen.append((progress.done, progress.failed))
        return make(queue, batch_id, token, lease_seconds, progress)

    monkeypatch.setattr(checkpoint_statements, "checkpoint", recording)
    return seen


@both_styles
@pytest.mark.parametrize(
    ("items", "bad", "written"),
    [
        ([1], set(), []),
        ([*range(10)], set(), []),
        ([*range(25)], set(), [(10, 0), (10, 0)]),
        ([*range(20)], set(), [(10, 0)]),
        ([*range(15)], {3}, [(9, 1), (5, 0)]),
        ([*range(15)], {14}, [(10, 0), (4, 1)]),
        ([1], {1}, [(0, 1)]),
    ],
    ids=[
        "one item",
        "one chunk",
        "three chunks",
        "two full chunks",
        "a failure before",
        "a failure at the end",
        "no good",
    ],
)
def test_the_finish_counts_the_last_chunk_where_nothing_has_failed(
    dsn: str,
    conn: psycopg.Connection,
    checkpoints: list[tuple[int, int]],
    style: str,
    items: list[int],
    bad: set[int],
    written: list[tuple[int, int]],
) -> None:
    app = batchq.App()
    register_items(app, style, "work", Flaky(bad), chunk_size=10)
    batch_id = put(conn, "work", items=items, max_attempts=1, max_failed_items=1)
    drain(app, dsn)
    assert checkpoints == written
    assert look(conn, batch_id).status == "completed"
    assert counters(conn, batch_id) == (len(items) - len(bad), len(bad))


@both_styles
def test_a_last_chunk_without_a_checkpoint_is_worked_again_if_its_finish_does_not_come(
    dsn: str, conn: psycopg.Connection, style: str
) -> None:
    app, body, calls = batchq.App(), Flaky(set()), []
    rob = (
        "UPDATE batchq.batches_live SET status = 'pending', claimed_by = NULL, claim_token = NULL, claimed_at = NULL, "
    )

    def lose(item: int, batch: batchq.Batch) -> None:
        body(item, batch)
        calls.append((batch.attempt, item))
        if (batch.attempt, item) == (1, 14):
            with psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as thief:
                thief.execute(f"{rob} lease_expires_at = NULL".encode())

    register_items(app, style, "work", lose, chunk_size=10)
    batch_id = put(conn, "work", items=[*range(15)])
    drain(app, dsn)
    assert calls == [(1, n) for n in range(15)] + [(2, n) for n in range(10, 15)]
    assert look(conn, batch_id).status == "completed"
    assert counters(conn, batch_id) == (15, 0)


@both_styles
def test_a_batch_that_is_cancelled_in_its_last_chunk_keeps_the_counters_of_its_last_checkpoint(
    dsn: str, conn: psycopg.Connection, style: str
) -> None:
    app = batchq.App()

    def body(item: int, batch: batchq.Batch) -> None:
        if item == 14:
            with psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as person:
                person.execute("SELECT batchq.cancel(%s)", [batch.id])

    register_items(app, style, "work", body, chunk_size=10)
    batch_id = put(conn, "work", items=[*range(15)])
    drain(app, dsn)
    assert look(conn, batch_id).status == "cancelled"
    assert counters(conn, batch_id) == (10, 0)


@both_styles
def test_a_checkpoint_follows_after_a_second(dsn: str, conn: psycopg.Connection, style: str) -> None:
    app = batchq.App()
    committed: list[int] = []
    began = time.monotonic()

    def body(item: int, batch: batchq.Batch) -> None:
        committed.append(look(conn, batch.id).items_done)
        if item == 2:
            wait_until(lambda: time.monotonic() > began + 1.5, 5, "a second and a half")

    register_items(app, style, "work", body)
    put(conn, "work", items=list(range(6)))
    drain(app, dsn)
    assert committed == [0, 0, 0, 3, 3, 3]


@pytest.mark.parametrize("options", [{}, {"concurrency": 3}, {"transactional": True}], ids=str)
def test_an_item_whose_handler_returns_a_coroutine_has_failed(
    dsn: str, conn: psycopg.Connection, options: dict[str, Any]
) -> None:
    app = batchq.App()

    async def forgotten(item: int) -> None:
        raise AssertionError("nobody awaits it")

    app.item_handler("work", **options)(lambda item: forgotten(item))
    batch_id = put(conn, "work", items=[1, 2], max_attempts=1)
    drain(app, dsn)
    assert counters(conn, batch_id) == (0, 2)
    assert "declare it with `async def`" in failed_items(conn, batch_id)[0].error


@both_styles
@pytest.mark.parametrize("concurrency", [1, 3])
@pytest.mark.parametrize(
    ("end", "shown"),
    [
        (batchq.Cancel("enough"), "cancelled"),
        (ExceptionGroup("unhandled errors in a TaskGroup", [batchq.Cancel("enough")]), "cancelled"),
    ],
    ids=["cancel", "a group"],
)
def test_an_item_that_ends_the_batch_commits_the_items_before_it(
    dsn: str, conn: psycopg.Connection, style: str, concurrency: int, end: Exception, shown: str
) -> None:
    app = batchq.App()
    calls: list[int] = []
    ends = [True]

    def body(item: int, batch: batchq.Batch) -> None:
        calls.append(item)
        if item == 2:
            raise ValueError("bad")
        if item == 5 and ends:
            ends.clear()
            raise end

    register_items(app, style, "work", body, backoff=LATER, concurrency=concurrency)
    batch_id = put(conn, "work", items=list(range(10)))

    drain(app, dsn)
    row = look(conn, batch_id)
    assert row.shown == shown
    assert row.attempt == 1
    assert counters(conn, batch_id) == (4, 1)

    step("what is left is worked later, from that item on")
    calls.clear()
    conn.execute(MAKE_READY)
    values(conn, "SELECT batchq.retry(%s)", batch_id)
    drain(app, dsn)
    assert set(calls) - {2} == {5, 6, 7, 8, 9}


@both_styles
def test_a_stop_ends_the_chunk_after_the_running_item(dsn: str, conn: psycopg.Connection, style: str) -> None:
    app = batchq.App()
    calls: list[int] = []
    begun, go_on = threading.Event(), threading.Event()

    def body(item: int, batch: batchq.Batch) -> None:
        calls.append(item)
        if item == 3:
            begun.set()
            go_on.wait(30)

    register_items(app, style, "work", body)
    batch_id = put(conn, "work", items=list(range(10)), max_attempts=1)
    with running_worker(app, dsn) as worker:
        assert begun.wait(10)
        worker.stop()
        go_on.set()

    assert calls == [0, 1, 2, 3]
    assert counters(conn, batch_id) == (4, 0)
    assert (look(conn, batch_id).shown, look(conn, batch_id).attempt) == ("ready", 0)
    drain(app, dsn)
    assert calls == list(range(10))
    assert look(conn, batch_id).status == "completed"


@both_styles
def test_work_goes_on_after_the_last_committed_chunk_when_the_claim_was_lost(
    dsn: str, conn: psycopg.Connection, style: str
) -> None:
    app = batchq.App()
    calls: list[int] = []
    begun, go_on = threading.Event(), threading.Event()

    def body(item: int, batch: batchq.Batch) -> None:
        calls.append(item)
        if item == 5:
            begun.set()
            go_on.wait(30)

    register_items(app, style, "work", body, chunk_size=3)
    batch_id = put(conn, "work", items=list(range(9)))
    with running_worker(app, dsn) as worker:
        assert begun.wait(10)
        step("the batch is rescued, as after a pause of the whole worker; its late checkpoint is refused")
        conn.execute("UPDATE batchq.batches SET claim_token = gen_random_uuid(), claimed_by = 'another'")
        worker.stop()
        go_on.set()
    assert calls == [0, 1, 2, 3, 4, 5]
    assert counters(conn, batch_id) == (3, 0)
    assert (look(conn, batch_id).status, look(conn, batch_id).claimed_by) == ("processing", "another")

    step("the other one dies as well; a third goes on after the chunk that was committed")
    conn.execute("UPDATE batchq.batches SET lease_expires_at = now() - interval '1 second'")
    calls.clear()
    with running_worker(app, dsn, lease_seconds=1):
        await_status(conn, batch_id, "completed")
    assert calls == [3, 4, 5, 6, 7, 8]
    assert counters(conn, batch_id) == (9, 0)


def make_importing_app(work: list[tuple[int, list[int]]], fails_at: set[int]) -> batchq.App:
    """Return an app of handlers that work in chunks of 3; an attempt fails once for each number of *fails_at*."""
    app = batchq.App()

    def look_at(batch: batchq.Batch, items: list[int]) -> None:
        work.append((batch.attempt, items))
        for item in items:
            if item in fails_at:
                fails_at.remove(item)
                raise ValueError(f"at {item}")

    @app.handler("def", backoff=AT_ONCE)
    def work_chunks(batch: batchq.Batch) -> None:
        for chunk in batch.chunks(3):
            look_at(batch, chunk.items)

    @app.handler("async def", backoff=AT_ONCE)
    async def work_chunks_async(batch: batchq.Batch) -> None:
        async for chunk in batch.chunks(3):
            look_at(batch, chunk.items)

    return app


@both_styles
def test_a_handler_goes_on_after_its_last_committed_chunk(dsn: str, conn: psycopg.Connection, style: str) -> None:
    work: list[tuple[int, list[int]]] = []
    app = make_importing_app(work, {4, 7})
    batch_id = put(conn, style, items=list(range(8)))

    drain(app, dsn)

    assert work == [(1, [0, 1, 2]), (1, [3, 4, 5]), (2, [3, 4, 5]), (2, [6, 7]), (3, [6, 7])]
    assert counters(conn, batch_id) == (8, 0)
    assert (look(conn, batch_id).status, look(conn, batch_id).attempt) == ("completed", 3)


@pytest.fixture
def contacts(conn: psycopg.Connection) -> str:
    """Return the name of a table for handlers' rows: n, which may be there once only where the handler is right."""
    conn.execute("CREATE TABLE contacts (n integer)")
    return "contacts"


INSERT = "INSERT INTO contacts VALUES (%s)"
CONTACTS = "SELECT n FROM contacts ORDER BY n"


@both_styles
def test_rows_and_checkpoint_of_a_chunk_commit_together(
    dsn: str, conn: psycopg.Connection, contacts: str, style: str
) -> None:
    app = batchq.App()
    seen: list[tuple[list[int], int]] = []
    fails = [True]

    def look_inside(batch: batchq.Batch, items: list[int]) -> None:
        seen.append((values(conn, CONTACTS), look(conn, batch.id).items_done))
        if items == [4, 5] and fails:
            fails.clear()
            raise ValueError("after the rows, before the commit")

    @app.handler("def", backoff=AT_ONCE)
    def work(batch: batchq.Batch) -> None:
        for chunk in batch.chunks(2):
            with chunk.transaction() as own:
                for item in chunk.items:
                    own.execute(INSERT, [item])
                look_inside(batch, chunk.items)

    @app.handler("async def", backoff=AT_ONCE)
    async def work_async(batch: batchq.Batch) -> None:
        async for chunk in batch.chunks(2):
            async with chunk.transaction() as own:
                for item in chunk.items:
                    await own.execute(INSERT, [item])
                look_inside(batch, chunk.items)

    batch_id = put(conn, style, items=list(range(6)))
    drain(app, dsn)

    assert seen == [(list(range(n)), n) for n in (0, 2, 4, 4)]
    assert values(conn, CONTACTS) == list(range(6))
    assert counters(conn, batch_id) == (6, 0)


@both_styles
def test_a_chunk_whose_claim_is_lost_leaves_no_rows(
    dsn: str, conn: psycopg.Connection, contacts: str, style: str
) -> None:
    app = batchq.App()
    told: list[BaseException] = []

    @app.handler("def")
    def work(batch: batchq.Batch) -> None:
        try:
            for chunk in batch.chunks(2):
                with chunk.transaction() as own:
                    own.execute(INSERT, [chunk.items[0]])
                    if chunk.items[0] == 2:
                        conn.execute("SELECT batchq.cancel(%s)", [batch.id])
        except BaseException as error:
            told.append(error)
            raise

    @app.handler("async def")
    async def work_async(batch: batchq.Batch) -> None:
        try:
            async for chunk in batch.chunks(2):
                async with chunk.transaction() as own:
                    await own.execute(INSERT, [chunk.items[0]])
                    if chunk.items[0] == 2:
                        conn.execute("SELECT batchq.cancel(%s)", [batch.id])
        except BaseException as error:
            told.append(error)
            raise

    batch_id = put(conn, style, items=list(range(6)))
    drain(app, dsn)

    assert [type(error) for error in told] == [batchq.LeaseLost]
    assert values(conn, CONTACTS) == [0]
    assert counters(conn, batch_id) == (2, 0)
    assert look(conn, batch_id).status == "cancelled"


@both_styles
def test_an_item_marked_with_fail_is_worked_again_alone(dsn: str, conn: psycopg.Connection, style: str) -> None:
    app = batchq.App()
    work: list[tuple[bool, list[int], list[int]]] = []

    def mark(batch: batchq.Batch, chunk: batchq.Chunk) -> None:
        work.append((chunk.is_retry, list(chunk.indexes), chunk.items))
        for position, item in enumerate(chunk.items):
            if item % 10 == 1 and batch.attempt < 3:
                chunk.fail(position, ValueError(f"bad {item}"))
            if item % 10 == 2:
                chunk.fail(position, batchq.InvalidInput(f"never {item}"))
            if item % 10 == 3 and batch.attempt < 2:
                chunk.fail(position, f"said {item}")

    @app.handler("def", backoff=LATER)
    def chunks(batch: batchq.Batch) -> None:
        for chunk in batch.chunks(4):
            assert len(chunk) == len(chunk.items)
            mark(batch, chunk)

    @app.handler("async def", backoff=LATER)
    async def chunks_async(batch: batchq.Batch) -> None:
        async for chunk in batch.chunks(4):
            mark(batch, chunk)

    batch_id = put(conn, style, items=[10, 11, 12, 13, 20, 21], max_failed_items=1)
    drain(app, dsn)
    assert [(f.item_index, f.error, f.retryable) for f in failed_items(conn, batch_id)] == [
        (1, "ValueError: bad 11", True),
        (2, "InvalidInput: never 12", False),
        (3, "said 13", True),
        (5, "ValueError: bad 21", True),
    ]
    assert counters(conn, batch_id) == (2, 4)
    for shown in ("retrying", "completed"):
        conn.execute(MAKE_READY)
        drain(app, dsn)
        assert look(conn, batch_id).shown == shown
    assert work == [
        (False, [0, 1, 2, 3], [10, 11, 12, 13]),
        (False, [4, 5], [20, 21]),
        (True, [1, 3, 5], [11, 13, 21]),
        (True, [1, 5], [11, 21]),
    ]
    assert counters(conn, batch_id) == (5, 1)


@pytest.mark.parametrize("position", [-1, 2, 99])
def test_fail_refuses_a_position_outside_the_chunk(dsn: str, conn: psycopg.Connection, position: int) -> None:
    app = batchq.App()

    @app.handler("work")
    def work(batch: batchq.Batch) -> None:
        for chunk in batch.chunks(2):
            chunk.fail(position, "no such item")

    batch_id = put(conn, "work", items=[1, 2, 3])
    drain(app, dsn)
    assert look(conn, batch_id).errors[0]["error"] == (f"InvalidInput: the chunk has positions 0 to 1, not {position}")


@both_styles
@pytest.mark.parametrize("bad", [set(), {0}], ids=["none failed", "one failed"])
@pytest.mark.parametrize(("attempts", "status", "done"), [(3, "completed", 6), (2, "failed", 4)])
def test_leaving_the_loop_early_is_a_failed_attempt_that_keeps_what_was_committed(
    dsn: str, conn: psycopg.Connection, style: str, bad: set[int], attempts: int, status: str, done: int
) -> None:
    app = batchq.App()

    def works(batch: batchq.Batch, chunk: batchq.Chunk) -> None:
        if set(chunk.items) & bad and batch.attempt == 1:
            chunk.fail(0, "bad")

    @app.handler("def", backoff=AT_ONCE)
    def work(batch: batchq.Batch) -> str:
        for chunk in batch.chunks(2):
            works(batch, chunk)
            chunk.commit()
            break
        return "enough"

    @app.handler("async def", backoff=AT_ONCE)
    async def work_async(batch: batchq.Batch) -> str:
        async for chunk in batch.chunks(2):
            works(batch, chunk)
            await chunk.commit_async()
            break
        return "enough"

    batch_id = put(conn, style, items=list(range(6)), max_attempts=attempts, max_failed_items=1)
    drain(app, dsn)
    row = look(conn, batch_id)
    assert row.status == status
    assert row.errors[0]["error"] == "the handler returned after 2 of 6 items; iterate to the end of chunks()"
    assert counters(conn, batch_id) == (done - len(bad), len(bad))


@both_styles
def test_a_committed_chunk_cannot_be_committed_again(dsn: str, conn: psycopg.Connection, style: str) -> None:
    app = batchq.App()

    @app.handler("def")
    def work(batch: batchq.Batch) -> None:
        for chunk in batch.chunks(2):
            chunk.commit()
            chunk.commit()

    @app.handler("async def")
    async def work_async(batch: batchq.Batch) -> None:
        async for chunk in batch.chunks(2):
            await chunk.commit_async()
            await chunk.commit_async()

    batch_id = put(conn, style, items=list(range(4)), max_attempts=1)
    drain(app, dsn)
    assert look(conn, batch_id).errors[0]["error"] == (
        f"RuntimeError: this chunk of batch {batch_id} is committed already"
    )
    assert counters(conn, batch_id) == (2, 0)


# ------------------------------------------------------------------------------------------- transactional items


def make_transactional_app(bad: set[int], calls: list[int], **options: Any) -> batchq.App:
    """Return an app whose item handlers write a row, then fail for the items in *bad*."""
    app = batchq.App()

    @app.item_handler("def", transactional=True, **options)
    def write(item: int, conn: psycopg.Connection) -> None:
        calls.append(item)
        conn.execute(INSERT, [item])
        if item in bad:
            conn.execute("SELECT 1 / 0")

    @app.item_handler("async def", transactional=True, **options)
    async def write_async(item: int, batch: batchq.Batch, conn: psycopg.AsyncConnection) -> None:
        calls.append(item)
        await conn.execute(INSERT, [item])
        if item in bad:
            await conn.execute("SELECT 1 / 0")

    return app


@both_styles
def test_each_transactional_item_has_a_savepoint(dsn: str, conn: psycopg.Connection, contacts: str, style: str) -> None:
    bad, calls = {2, 5}, []
    app = make_transactional_app(bad, calls, backoff=LATER, chunk_size=4)
    batch_id = put(conn, style, items=list(range(8)))

    drain(app, dsn)
    assert values(conn, CONTACTS) == [0, 1, 3, 4, 6, 7]
    assert counters(conn, batch_id) == (6, 2)
    assert {f.error for f in failed_items(conn, batch_id)} == {"DivisionByZero: division by zero"}

    step("the failed ones are cured; no row is doubled")
    bad.clear()
    conn.execute(MAKE_READY)
    drain(app, dsn)
    assert values(conn, CONTACTS) == list(range(8))
    assert calls == [*range(8), 2, 5]
    assert counters(conn, batch_id) == (8, 0)
    assert look(conn, batch_id).status == "completed"


@both_styles
def test_rows_of_transactional_items_commit_with_the_checkpoint(
    dsn: str, conn: psycopg.Connection, contacts: str, style: str
) -> None:
    app = batchq.App()
    seen: list[tuple[int, int]] = []

    def look_and_cancel(item: int, batch: batchq.Batch) -> None:
        seen.append((len(values(conn, CONTACTS)), look(conn, batch.id).items_done))
        if item == 5:
            conn.execute("SELECT batchq.cancel(%s)", [batch.id])

    own = psycopg.Connection

    @app.item_handler("def", transactional=True, chunk_size=4)
    def write(item: int, batch: batchq.Batch, conn: own) -> None:
        conn.execute(INSERT, [item])
        look_and_cancel(item, batch)

    @app.item_handler("async def", transactional=True, chunk_size=4)
    async def write_async(item: int, conn: psycopg.AsyncConnection, batch: batchq.Batch) -> None:
        await conn.execute(INSERT, [item])
        look_and_cancel(item, batch)

    batch_id = put(conn, style, items=list(range(8)))
    drain(app, dsn)

    assert seen[:6] == [(0, 0)] * 4 + [(4, 4)] * 2
    step("the second chunk's claim was lost: none of its rows is there")
    assert values(conn, CONTACTS) == [0, 1, 2, 3]
    assert (look(conn, batch_id).status, counters(conn, batch_id)) == ("cancelled", (4, 0))


@both_styles
def test_a_transactional_item_that_snoozes_keeps_the_rows_of_all_others(
    dsn: str, conn: psycopg.Connection, contacts: str, style: str
) -> None:
    app = batchq.App()

    @app.item_handler("def", transactional=True)
    def write(item: int, conn: psycopg.Connection) -> None:
        conn.execute(INSERT, [item])
        if item == 2:
            raise batchq.Snooze(3600)

    @app.item_handler("async def", transactional=True)
    async def write_async(item: int, conn: psycopg.AsyncConnection) -> None:
        await conn.execute(INSERT, [item])
        if item == 2:
            raise batchq.Snooze(3600)

    batch_id = put(conn, style, items=list(range(4)))
    drain(app, dsn)
    assert values(conn, CONTACTS) == [0, 1, 3]
    assert (look(conn, batch_id).shown, counters(conn, batch_id)) == ("scheduled", (3, 1))


@both_styles
def test_a_connection_cut_within_a_chunk_costs_the_attempt_and_doubles_nothing(
    dsn: str, admin_dsn: str, conn: psycopg.Connection, contacts: str, style: str
) -> None:
    app = batchq.App()
    cut_once = [True]
    query = "SELECT pg_backend_pid()"

    def cut(item: int, pid: int) -> None:
        if item == 3 and cut_once:
            cut_once.clear()
            with psycopg.connect(admin_dsn) as admin:
                admin.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])

    @app.item_handler("def", transactional=True, chunk_size=2, backoff=AT_ONCE)
    def write(item: int, conn: psycopg.Connection) -> None:
        cut(item, conn.execute(query).fetchone()[0])
        conn.execute(INSERT, [item])

    @app.item_handler("async def", transactional=True, chunk_size=2, backoff=AT_ONCE)
    async def write_async(item: int, conn: psycopg.AsyncConnection) -> None:
        cut(item, (await (await conn.execute(query)).fetchone())[0])
        await conn.execute(INSERT, [item])

    batch_id = put(conn, style, items=list(range(6)))
    drain(app, dsn)
    row = look(conn, batch_id)
    assert (row.status, row.attempt) == ("completed", 2)
    assert counters(conn, batch_id) == (6, 0)
    assert values(conn, CONTACTS) == list(range(6))


@both_styles
def test_an_item_that_fails_while_its_connection_is_lost_does_not_end_the_batch(
    dsn: str, admin_dsn: str, conn: psycopg.Connection, contacts: str, style: str
) -> None:
    app = batchq.App()
    cut_once = [True]
    query = "SELECT pg_backend_pid()"

    def judge(item: int, pid: int) -> None:
        if item == 3 and cut_once:
            cut_once.clear()
            with psycopg.connect(admin_dsn) as admin:
                admin.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
        if item == 3:
            raise batchq.InvalidInput("item 3 is bad")

    @app.item_handler("def", transactional=True, chunk_size=2, backoff=AT_ONCE)
    def write(item: int, conn: psycopg.Connection) -> None:
        conn.execute(INSERT, [item])
        judge(item, conn.execute(query).fetchone()[0])

    @app.item_handler("async def", transactional=True, chunk_size=2, backoff=AT_ONCE)
    async def write_async(item: int, conn: psycopg.AsyncConnection) -> None:
        await conn.execute(INSERT, [item])
        judge(item, (await (await conn.execute(query)).fetchone())[0])

    batch_id = put(conn, style, items=list(range(6)), max_failed_items=1)
    drain(app, dsn)
    row = look(conn, batch_id)
    step("the first attempt has failed for the connection; the second one has met the bad item alone")
    assert (row.status, row.attempt) == ("completed", 2)
    assert "the connection was lost within a chunk; item 3 raised InvalidInput" in row.errors[0]["error"]
    assert counters(conn, batch_id) == (5, 1)
    assert values(conn, CONTACTS) == [0, 1, 2, 4, 5]


# ------------------------------------------------------------------------------------------------- batchq.retry


@both_styles
def test_retry_works_only_what_failed_or_was_not_worked(dsn: str, conn: psycopg.Connection, style: str) -> None:
    app = batchq.App()
    body = Flaky({1, 6})
    register_items(app, style, "work", body, item=None)
    batch_id = put(conn, "work", items=list(range(8)), max_attempts=1)
    drain(app, dsn)
    assert (look(conn, batch_id).status, counters(conn, batch_id)) == ("failed", (6, 2))

    body.calls, body.bad = [], {6}
    assert values(conn, "SELECT batchq.retry(%s)", batch_id) == ["pending"]
    drain(app, dsn)
    assert body.calls == [1, 6]
    assert (look(conn, batch_id).status, counters(conn, batch_id)) == ("failed", (7, 1))

    body.calls, body.bad = [], set()
    values(conn, "SELECT batchq.retry(%s)", batch_id)
    drain(app, dsn)
    assert body.calls == [6]
    assert (look(conn, batch_id).status, counters(conn, batch_id)) == ("completed", (8, 0))


def test_retry_brings_back_items_that_did_not_fit(dsn: str, conn: psycopg.Connection) -> None:
    old, new = batchq.App(), batchq.App()
    register_items(old, "def", "work", Flaky(set()), item=Address)
    body = Flaky(set())
    register_items(new, "def", "work", body)
    batch_id = put(conn, "work", items=[{"street": "Elm", "number": 1}, "Elm 2"])
    drain(old, dsn)
    assert look(conn, batch_id).status == "failed"

    values(conn, "SELECT batchq.retry(%s)", batch_id)
    drain(new, dsn)
    assert body.calls == ["Elm 2"]
    assert look(conn, batch_id).status == "completed"


def test_retry_of_the_whole_works_every_item_again(dsn: str, conn: psycopg.Connection) -> None:
    app = batchq.App()
    body = Flaky({2})
    register_items(app, "def", "work", body)
    batch_id = put(conn, "work", items=list(range(4)), max_attempts=1)
    drain(app, dsn)

    body.bad = set()
    values(conn, "SELECT batchq.retry(%s, whole => true)", batch_id)
    assert counters(conn, batch_id) == (0, 0)
    drain(app, dsn)
    assert body.calls == [0, 1, 2, 3] * 2
    assert (look(conn, batch_id).status, counters(conn, batch_id)) == ("completed", (4, 0))


# ------------------------------------------------------------------------------------------------ long lists


@both_styles
def test_a_hundred_thousand_items_come_once_each_and_in_order(dsn: str, conn: psycopg.Connection, style: str) -> None:
    app = batchq.App()
    seen: list[int] = []

    @app.handler("def")
    def work(batch: batchq.Batch) -> None:
        for chunk in batch.chunks(3333):
            seen.extend(chunk.items)

    @app.handler("async def")
    async def work_async(batch: batchq.Batch) -> None:
        async for chunk in batch.chunks(3333):
            seen.extend(chunk.items)

    batch_id = put(conn, style, items=range(100_000))
    drain(app, dsn)
    assert seen == list(range(100_000))
    assert counters(conn, batch_id) == (100_000, 0)


def test_pages_of_large_items_come_once_each_and_in_order(dsn: str, conn: psycopg.Connection) -> None:
    app = batchq.App()
    sizes: list[int] = []
    seen: list[str] = []

    @app.handler("work")
    def work(batch: batchq.Batch) -> None:
        chunks = batch.chunks(70)
        for chunk in chunks:
            sizes.append(len(chunks._page))
            seen.extend(chunk.items)

    incompressible = random.Random(1)  # an int of 8,000 bits is 2,000 hexadecimal digits
    items = [f"{incompressible.getrandbits(40_000):x}" for _ in range(1_500)]
    batch_id = put(conn, "work", items=items)
    drain(app, dsn)
    assert seen == items
    assert max(sizes) * 10_000 <= 4_000_000, "more than a page of 4 MB in memory"
    assert counters(conn, batch_id) == (1_500, 0)


@both_styles
def test_the_whole_list_can_be_had_at_once(dsn: str, conn: psycopg.Connection, style: str) -> None:
    app = batchq.App()

    @app.handler("def")
    def work(batch: batchq.Batch) -> int:
        return sum(batch.items)

    @app.handler("async def")
    async def work_async(batch: batchq.Batch) -> int:
        return sum(batch.items)

    batch_id = put(conn, style, items=list(range(1000)), max_attempts=1)
    none = put(conn, "def")
    drain(app, dsn)
    row = look(conn, batch_id)
    assert look(conn, none).result == 0
    if style == "def":
        assert (row.status, row.result, row.items_done) == ("completed", 499_500, 1000)
    else:
        assert "batch.items would block the event loop" in row.errors[0]["error"]
        assert "`async for chunk in batch.chunks(n)`" in row.errors[0]["error"]


@both_styles
def test_counters_equal_rows_whatever_fails(dsn: str, conn: psycopg.Connection, style: str) -> None:
    app = batchq.App()
    dice = random.Random(7)
    last: dict[int, bool] = {}

    def body(item: int, batch: batchq.Batch) -> None:
        last[item] = dice.random() > 0.4
        if not last[item]:
            raise ValueError("bad luck")

    register_items(app, style, "work", body, backoff=LATER, chunk_size=7, concurrency=3)
    batch_id = put(conn, "work", items=list(range(100)), max_attempts=4, max_failed_items=100)
    for _ in range(4):
        conn.execute(MAKE_READY)
        drain(app, dsn)
        done, failed = counters(conn, batch_id)
        assert (done, failed) == (sum(last.values()), 100 - sum(last.values()))
        assert [f.item for f in failed_items(conn, batch_id)] == sorted(item for item, good in last.items() if not good)
    assert look(conn, batch_id).status == "completed"


if __name__ == "__main__":
    run_alone(__file__)
