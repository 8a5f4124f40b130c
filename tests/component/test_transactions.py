"""A handler's own rows and the end of its batch, or its checkpoint: both, or neither, whatever breaks and when."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

import batchq
from batchq.batch import Chunk
from batchq.testing import running_worker
from tests.support.alone import run_alone
from tests.support.batches import STYLES, await_status, drain, look, put, values
from tests.support.steps import step
from tests.support.supasim import SupaSim
from tests.support.waiting import wait_until

both_styles = pytest.mark.parametrize("style", STYLES)
AT_ONCE = batchq.Backoff(0, 0)
INSERT = "INSERT INTO done VALUES (%s, %s)"
DONE = "SELECT attempt FROM done ORDER BY attempt"
Hook = Callable[[batchq.Batch, str], None]


@pytest.fixture(autouse=True)
def done(conn: psycopg.Connection) -> None:
    """Make the table that handlers write to. Nothing in it forbids a second row: the fence does."""
    conn.execute("CREATE TABLE done (batch_id bigint, attempt integer)")


def make_app(hook: Hook) -> batchq.App:
    """Return an app whose handlers write one row in the transaction that completes; *hook* is called around it."""
    app = batchq.App()

    @app.handler("def", backoff=AT_ONCE)
    def work(batch: batchq.Batch) -> None:
        hook(batch, "before")
        with batch.transaction(result={"rows": 1}) as conn:
            conn.execute(INSERT, [batch.id, batch.attempt])
            hook(batch, "inside")
        hook(batch, "after")

    @app.handler("async def", backoff=AT_ONCE)
    async def work_async(batch: batchq.Batch) -> None:
        hook(batch, "before")
        async with batch.transaction(result={"rows": 1}) as conn:
            await conn.execute(INSERT, [batch.id, batch.attempt])
            hook(batch, "inside")
        hook(batch, "after")

    return app


# ------------------------------------------------------------------------------------------------- exactly once


@both_styles
@pytest.mark.parametrize("point", ["before", "inside", "after", "never"])
@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, asyncio.CancelledError])
def test_rows_and_completion_are_there_once_wherever_the_handler_fails(
    dsn: str, conn: psycopg.Connection, style: str, point: str, error: type[BaseException]
) -> None:
    def hook(batch: batchq.Batch, here: str) -> None:
        if here == point and batch.attempt == 1:
            raise error(f"killed {point}")

    batch_id = put(conn, style)
    drain(make_app(hook), dsn)

    row = look(conn, batch_id)
    attempts = 1 if point in ("after", "never") else 2
    assert (row.status, row.attempt, row.result) == ("completed", attempts, {"rows": 1})
    assert len(row.errors) == attempts - 1
    assert values(conn, DONE) == [attempts]


@both_styles
def test_rollback_of_psycopg_fails_the_attempt_with_a_clear_error(
    dsn: str, conn: psycopg.Connection, style: str
) -> None:
    def hook(batch: batchq.Batch, where: str) -> None:
        if where == "inside" and batch.attempt == 1:
            raise psycopg.Rollback

    batch_id = put(conn, style)
    drain(make_app(hook), dsn)
    row = look(conn, batch_id)
    assert (row.status, row.attempt, values(conn, DONE)) == ("completed", 2, [2])
    assert row.errors[0]["error"].startswith("RuntimeError: psycopg.Rollback has undone the batch's transaction")


def test_a_result_that_is_too_large_is_refused_before_anything_is_written(dsn: str, conn: psycopg.Connection) -> None:
    app = batchq.App()

    @app.handler("large")
    def work(batch: batchq.Batch) -> None:
        with batch.transaction(result="x" * 1_000_000) as own:
            own.execute(INSERT, [batch.id, batch.attempt])

    batch_id = put(conn, "large")
    drain(app, dsn)
    row = look(conn, batch_id)
    assert (row.status, values(conn, DONE)) == ("failed", [])
    assert "the result is 1,000,002 bytes of JSON; at most 1,000,000" in row.errors[0]["error"]


@both_styles
def test_nothing_is_seen_before_the_commit_and_all_of_it_after(dsn: str, conn: psycopg.Connection, style: str) -> None:
    seen: list[tuple[str, list[int], str]] = []

    def hook(batch: batchq.Batch, here: str) -> None:
        seen.append((here, values(conn, DONE), look(conn, batch.id).status))

    put(conn, style)
    drain(make_app(hook), dsn)
    assert seen == [("before", [], "processing"), ("inside", [], "processing"), ("after", [1], "completed")]


CANCEL = "SELECT batchq.cancel(id) FROM batchq.all_batches"
STEAL = "UPDATE batchq.batches SET claim_token = gen_random_uuid(), claimed_by = 'another'"
RESCUE = """UPDATE batchq.batches
            SET status = 'pending', claim_token = NULL, claimed_by = NULL, claimed_at = NULL, lease_expires_at = NULL,
                run_at = now() + interval '1 hour'"""


@both_styles
@pytest.mark.parametrize(
    ("statement", "status"),
    [(CANCEL, "cancelled"), (STEAL, "processing"), (RESCUE, "pending")],
    ids=["cancelled", "claimed by another", "rescued"],
)
def test_a_transaction_whose_claim_is_lost_leaves_nothing(
    dsn: str, conn: psycopg.Connection, style: str, statement: str, status: str
) -> None:
    told: list[BaseException] = []

    def lose(batch: batchq.Batch, here: str) -> None:
        if here == "inside":
            conn.execute(statement)

    app = make_app(lose)
    catch(app, told)
    batch_id = put(conn, style)
    drain(app, dsn)

    assert [type(error) for error in told] == [batchq.LeaseLost]
    assert str(told[0]) == f"batch {batch_id} is no longer claimed by this worker; nothing was written"
    assert values(conn, DONE) == []
    row = look(conn, batch_id)
    assert (row.status, row.result) == (status, None)


def catch(app: batchq.App, told: list[BaseException]) -> None:
    """Have every handler of *app* note what it raises."""
    plain, asynchronous = app.handlers["def"].function, app.handlers["async def"].function
    app.handlers.clear()

    @app.handler("def")
    def work(batch: batchq.Batch) -> None:
        try:
            plain(batch)
        except BaseException as error:
            told.append(error)
            raise

    @app.handler("async def")
    async def work_async(batch: batchq.Batch) -> None:
        try:
            await asynchronous(batch)
        except BaseException as error:
            told.append(error)
            raise


@both_styles
def test_a_stop_does_not_break_a_transaction_that_is_open(dsn: str, conn: psycopg.Connection, style: str) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def hook(batch: batchq.Batch, here: str) -> None:
        if here == "inside":
            begun.set()
            go_on.wait(30)

    batch_id = put(conn, style)
    with running_worker(make_app(hook), dsn) as worker:
        assert begun.wait(10)
        worker.stop()
        go_on.set()
    assert look(conn, batch_id).status == "completed"
    assert values(conn, DONE) == [1]


# ------------------------------------------------------------------------------------------------- checkpoints


@both_styles
def test_rows_and_cursor_commit_together(dsn: str, conn: psycopg.Connection, style: str) -> None:
    app = batchq.App()
    trips = {(2, "inside"), (4, "inside"), (4, "after")}

    def trip(n: int, here: str) -> None:
        if (n, here) in trips:
            trips.remove((n, here))
            raise ValueError(f"at {n}, {here}")

    @app.handler("def", backoff=AT_ONCE)
    def work(batch: batchq.Batch) -> str:
        for n in range(batch.cursor or 0, 6):
            with batch.transaction(cursor=n + 1) as own:
                own.execute(INSERT, [batch.id, n])
                trip(n, "inside")
            assert batch.cursor == n + 1
            trip(n, "after")
        return "counted"

    @app.handler("async def", backoff=AT_ONCE)
    async def work_async(batch: batchq.Batch) -> str:
        for n in range(batch.cursor or 0, 6):
            async with batch.transaction(cursor=n + 1) as own:
                await own.execute(INSERT, [batch.id, n])
                trip(n, "inside")
            assert batch.cursor == n + 1
            trip(n, "after")
        return "counted"

    batch_id = put(conn, style)
    drain(app, dsn)
    row = look(conn, batch_id)
    assert (row.status, row.result, row.attempt, row.cursor) == ("completed", "counted", 4, 6)
    assert values(conn, DONE) == list(range(6))


@both_styles
@pytest.mark.parametrize("fails", [False, True])
def test_a_checkpoint_within_a_transaction_joins_it(
    dsn: str, conn: psycopg.Connection, style: str, fails: bool
) -> None:
    app = batchq.App()
    seen: list[object] = []

    def middle(batch: batchq.Batch) -> None:
        seen.append(look(conn, batch.id).cursor)
        if fails and batch.attempt == 1:
            raise ValueError("after the checkpoint, before the commit")

    @app.handler("def", backoff=AT_ONCE)
    def work(batch: batchq.Batch) -> str:
        with batch.transaction() as own:
            own.execute(INSERT, [batch.id, batch.attempt])
            batch.checkpoint({"page": 1})
            middle(batch)
        seen.append(look(conn, batch.id).cursor)
        return "went on"

    @app.handler("async def", backoff=AT_ONCE)
    async def work_async(batch: batchq.Batch) -> str:
        async with batch.transaction() as own:
            await own.execute(INSERT, [batch.id, batch.attempt])
            await batch.checkpoint_async({"page": 1})
            middle(batch)
        seen.append(look(conn, batch.id).cursor)
        return "went on"

    batch_id = put(conn, style)
    drain(app, dsn)
    row = look(conn, batch_id)
    assert (row.status, row.result, row.cursor) == ("completed", "went on", {"page": 1})
    assert seen == ([None] * (2 if fails else 1)) + [{"page": 1}]
    assert values(conn, DONE) == [2 if fails else 1]


@both_styles
def test_a_checkpoint_alone_is_seen_at_once_and_extends_the_lease(
    dsn: str, conn: psycopg.Connection, style: str
) -> None:
    app = batchq.App()
    seen: list[tuple[object, bool]] = []

    def age(batch: batchq.Batch) -> None:
        conn.execute("UPDATE batchq.batches SET lease_expires_at = now() + interval '1 second'")

    def note(batch: batchq.Batch) -> None:
        extended = values(conn, "SELECT lease_expires_at > now() + interval '50 seconds' FROM batchq.all_batches")[0]
        seen.append((look(conn, batch.id).cursor, extended))

    @app.handler("def")
    def work(batch: batchq.Batch) -> None:
        for cursor in ([1], None):
            age(batch)
            batch.checkpoint(cursor)
            note(batch)
        batch.checkpoint("kept")
        batch.checkpoint()
        note(batch)

    @app.handler("async def")
    async def work_async(batch: batchq.Batch) -> None:
        for cursor in ([1], None):
            age(batch)
            await batch.checkpoint_async(cursor)
            note(batch)
        await batch.checkpoint_async("kept")
        await batch.checkpoint_async()
        note(batch)

    batch_id = put(conn, style)
    drain(app, dsn, lease_seconds=60)
    assert look(conn, batch_id).status == "completed"
    assert seen == [([1], True), (None, True), ("kept", True)]


@both_styles
def test_a_cursor_that_is_no_json_fails_the_batch(dsn: str, conn: psycopg.Connection, style: str) -> None:
    app = batchq.App()

    @app.handler("def")
    def work(batch: batchq.Batch) -> None:
        batch.checkpoint({1, 2})

    @app.handler("async def")
    async def work_async(batch: batchq.Batch) -> None:
        await batch.checkpoint_async({1, 2})

    batch_id = put(conn, style)
    drain(app, dsn)
    row = look(conn, batch_id)
    assert (row.status, row.attempt) == ("failed", 1)
    assert row.errors[0]["error"].startswith("InvalidInput: the cursor cannot be stored as JSON")


# ------------------------------------------------------------------------------------------------- complete=...


@both_styles
@pytest.mark.parametrize(
    ("options", "completes", "cursor"),
    [
        ({"complete": True, "cursor": "last"}, True, None),
        ({"complete": False}, False, None),
        ({"complete": False, "cursor": "c"}, False, "c"),
    ],
    ids=["complete with a cursor", "not complete", "not complete with a cursor"],
)
def test_complete_decides_explicitly(
    dsn: str, conn: psycopg.Connection, style: str, options: dict, completes: bool, cursor: object
) -> None:
    app = batchq.App()
    after: list[str] = []

    @app.handler("def")
    def work(batch: batchq.Batch) -> str:
        with batch.transaction(**options) as own:
            own.execute(INSERT, [batch.id, 1])
        after.append(look(conn, batch.id).status)
        return "from the handler"

    @app.handler("async def")
    async def work_async(batch: batchq.Batch) -> str:
        async with batch.transaction(**options) as own:
            await own.execute(INSERT, [batch.id, 1])
        after.append(look(conn, batch.id).status)
        return "from the handler"

    batch_id = put(conn, style)
    drain(app, dsn)
    row = look(conn, batch_id)
    assert after == ["completed" if completes else "processing"]
    assert (row.status, row.cursor) == ("completed", cursor)
    assert row.result == (None if completes else "from the handler")


@both_styles
def test_with_items_the_transaction_must_say_whether_it_completes_them(
    dsn: str, conn: psycopg.Connection, style: str
) -> None:
    app = batchq.App()

    @app.handler("def")
    def work(batch: batchq.Batch) -> None:
        with batch.transaction(**batch.payload) as own:
            own.execute(INSERT, [batch.id, 1])

    @app.handler("async def")
    async def work_async(batch: batchq.Batch) -> None:
        async with batch.transaction(**batch.payload) as own:
            await own.execute(INSERT, [batch.id, 1])

    unsaid = put(conn, style, {}, items=[1, 2])
    drain(app, dsn)
    assert look(conn, unsaid).status == "failed"
    assert f"batch {unsaid} has items: write its rows in chunk.transaction()" in look(conn, unsaid).errors[0]["error"]
    assert values(conn, DONE) == []


@both_styles
def test_after_the_last_chunk_a_transaction_may_complete_the_batch(
    dsn: str, conn: psycopg.Connection, style: str
) -> None:
    app = batchq.App()

    @app.handler("def")
    def work(batch: batchq.Batch) -> None:
        for _ in batch.chunks(2):
            pass
        with batch.transaction(result="all") as own:
            own.execute(INSERT, [batch.id, 1])

    @app.handler("async def")
    async def work_async(batch: batchq.Batch) -> None:
        async for _ in batch.chunks(2):
            pass
        async with batch.transaction(result="all") as own:
            await own.execute(INSERT, [batch.id, 1])

    batch_id = put(conn, style, items=[1, 2, 3])
    drain(app, dsn)
    row = look(conn, batch_id)
    assert (row.status, row.result, row.items_done) == ("completed", "all", 3)
    assert values(conn, DONE) == [1]


# ------------------------------------------------------------------------------------------------- misuse


def raised_by(dsn: str, conn: psycopg.Connection, app: batchq.App, kind: str, **options: object) -> str:
    """Return the error of the one attempt of a batch of *kind*."""
    batch_id = put(conn, kind, max_attempts=1, **options)
    drain(app, dsn)
    row = look(conn, batch_id)
    assert row.status == "failed"
    return str(row.errors[0]["error"]).replace(str(batch_id), "N")


@both_styles
@pytest.mark.parametrize("what", ["transaction", "chunks", "checkpoint"])
def test_after_completion_nothing_more_is_written_and_the_error_says_why(
    dsn: str, conn: psycopg.Connection, style: str, what: str
) -> None:
    app = batchq.App()
    told: list[str] = []

    @app.handler("def")
    def work(batch: batchq.Batch) -> None:
        with batch.transaction() as own:
            own.execute(INSERT, [batch.id, 1])
        try:
            if what == "transaction":
                with batch.transaction() as own:
                    own.execute(INSERT, [batch.id, 2])
            elif what == "chunks":
                next(iter(batch.chunks(1)))
            else:
                batch.checkpoint("x")
        except RuntimeError as error:
            told.append(str(error))

    @app.handler("async def")
    async def work_async(batch: batchq.Batch) -> None:
        async with batch.transaction() as own:
            await own.execute(INSERT, [batch.id, 1])
        try:
            if what == "transaction":
                async with batch.transaction() as own:
                    await own.execute(INSERT, [batch.id, 2])
            elif what == "chunks":
                await anext(aiter(batch.chunks(1)))
            else:
                await batch.checkpoint_async("x")
        except RuntimeError as error:
            told.append(str(error))

    batch_id = put(conn, style)
    drain(app, dsn)
    assert told == [
        f"batch {batch_id} was completed in a transaction of its handler; to use several, give each a cursor"
    ]
    assert values(conn, DONE) == [1]
    assert look(conn, batch_id).status == "completed"


@both_styles
def test_transactions_do_not_nest(dsn: str, conn: psycopg.Connection, style: str) -> None:
    app = batchq.App()

    @app.handler("def")
    def work(batch: batchq.Batch) -> None:
        with batch.transaction(cursor=1) as own:
            own.execute(INSERT, [batch.id, 1])
            with batch.transaction(cursor=2):
                pass

    @app.handler("async def")
    async def work_async(batch: batchq.Batch) -> None:
        async with batch.transaction(cursor=1) as own:
            await own.execute(INSERT, [batch.id, 1])
            async with batch.transaction(cursor=2):
                pass

    said = raised_by(dsn, conn, app, style)
    assert said == "InvalidInput: batch N has a transaction open already; end it before the next"
    assert values(conn, DONE) == []


@both_styles
def test_a_chunks_transaction_does_not_nest_either(dsn: str, conn: psycopg.Connection, style: str) -> None:
    app = batchq.App()

    @app.handler("def")
    def work(batch: batchq.Batch) -> None:
        for chunk in batch.chunks(1):
            with batch.transaction(cursor=1), chunk.transaction():
                pass

    @app.handler("async def")
    async def work_async(batch: batchq.Batch) -> None:
        async for chunk in batch.chunks(1):
            async with batch.transaction(cursor=1), chunk.transaction():
                pass

    said = raised_by(dsn, conn, app, style, items=[1])
    assert said == "InvalidInput: batch N has a transaction open already; end it before the next"


NESTED = ["batch in chunk", "chunk in chunk", "batch in batch", "chunk in batch"]


def two_transactions(batch: batchq.Batch, chunk: Chunk, what: str) -> list[Any]:
    """Return the outer transaction, and the inner one."""
    inner, outer = what.split(" in ")
    return [chunk.transaction() if which == "chunk" else batch.transaction(cursor=1) for which in (outer, inner)]


@both_styles
@pytest.mark.parametrize("what", NESTED)
def test_a_transaction_within_another_fails_its_batch_once_though_the_pool_has_one_connection(
    dsn: str, conn: psycopg.Connection, style: str, what: str
) -> None:
    app = batchq.App()
    begun: list[int] = []

    @app.handler("def")
    def work(batch: batchq.Batch) -> None:
        begun.append(batch.id)
        for chunk in batch.chunks(1):
            outer, inner = two_transactions(batch, chunk, what)
            with outer as own:
                own.execute(INSERT, [batch.id, 1])
                with inner:
                    pass

    @app.handler("async def")
    async def work_async(batch: batchq.Batch) -> None:
        begun.append(batch.id)
        async for chunk in batch.chunks(1):
            outer, inner = two_transactions(batch, chunk, what)
            async with outer as own:
                await own.execute(INSERT, [batch.id, 1])
                async with inner:
                    pass

    batch_id = put(conn, style, items=[1, 2])
    drain(app, dsn, pool_size=1)
    row = look(conn, batch_id)
    assert (row.status, row.attempt, row.cursor, row.items_done) == ("failed", 1, None, 0)
    assert row.errors[0]["error"].startswith(f"InvalidInput: batch {batch_id} has a transaction open already")
    assert begun == [batch_id]
    assert values(conn, DONE) == []


@both_styles
@pytest.mark.parametrize("fails", [False, True])
def test_a_checkpoint_within_a_chunks_transaction_joins_it(
    dsn: str, conn: psycopg.Connection, style: str, fails: bool
) -> None:
    app = batchq.App()
    seen: list[object] = []

    def middle(batch: batchq.Batch) -> None:
        seen.append(look(conn, batch.id).cursor)
        if fails and batch.attempt == 1:
            raise ValueError("after the checkpoint, before the commit")

    @app.handler("def", backoff=AT_ONCE)
    def work(batch: batchq.Batch) -> None:
        for chunk in batch.chunks(2):
            with chunk.transaction() as own:
                own.execute(INSERT, [batch.id, chunk.items[0]])
                batch.checkpoint({"item": chunk.items[0]})
                middle(batch)
            seen.append(batch.cursor)

    @app.handler("async def", backoff=AT_ONCE)
    async def work_async(batch: batchq.Batch) -> None:
        async for chunk in batch.chunks(2):
            async with chunk.transaction() as own:
                await own.execute(INSERT, [batch.id, chunk.items[0]])
                await batch.checkpoint_async({"item": chunk.items[0]})
                middle(batch)
            seen.append(batch.cursor)

    batch_id = put(conn, style, items=[1, 2, 3, 4])
    drain(app, dsn, pool_size=1)
    row = look(conn, batch_id)
    assert (row.status, row.cursor, row.items_done) == ("completed", {"item": 3}, 4)
    assert seen == ([None] * (2 if fails else 1)) + [{"item": 1}, {"item": 1}, {"item": 3}]
    assert values(conn, DONE) == [1, 3]


@both_styles
def test_a_checkpoint_of_an_item_in_the_chunks_transaction_is_there_if_the_items_rows_are(
    dsn: str, conn: psycopg.Connection, style: str
) -> None:
    app = batchq.App()

    @app.item_handler("def", transactional=True, chunk_size=10)
    def work(item: int, batch: batchq.Batch, conn: psycopg.Connection) -> None:
        conn.execute(INSERT, [batch.id, item])
        batch.checkpoint(item)
        if item > 2:
            raise ValueError("its rows are rolled back")

    @app.item_handler("async def", transactional=True, chunk_size=10)
    async def work_async(item: int, batch: batchq.Batch, conn: psycopg.AsyncConnection) -> None:
        await conn.execute(INSERT, [batch.id, item])
        await batch.checkpoint_async(item)
        if item > 2:
            raise ValueError("its rows are rolled back")

    batch_id = put(conn, style, items=[1, 2, 3], max_attempts=1)
    drain(app, dsn, pool_size=1)
    row = look(conn, batch_id)
    assert (row.cursor, row.items_done, row.items_failed) == (2, 2, 1)
    assert values(conn, DONE) == [1, 2]


@both_styles
def test_commit_by_hand_is_refused(dsn: str, conn: psycopg.Connection, style: str) -> None:
    app = batchq.App()

    @app.handler("def")
    def work(batch: batchq.Batch) -> None:
        with batch.transaction() as own:
            own.execute(INSERT, [batch.id, 1])
            own.commit()

    @app.handler("async def")
    async def work_async(batch: batchq.Batch) -> None:
        async with batch.transaction() as own:
            await own.execute(INSERT, [batch.id, 1])
            await own.commit()

    assert "Explicit commit() forbidden" in raised_by(dsn, conn, app, style)
    assert values(conn, DONE) == []


def block_with_transaction(batch: batchq.Batch) -> None:
    with batch.transaction():
        pass


def block_with_chunks(batch: batchq.Batch) -> None:
    for _ in batch.chunks(1):
        pass


BLOCKING: dict[str, tuple[Callable[[batchq.Batch], object], str]] = {
    "transaction": (block_with_transaction, "`async with ...transaction()`"),
    "chunks": (block_with_chunks, "`async for`"),
    "checkpoint": (lambda batch: batch.checkpoint(1), "`await batch.checkpoint_async()`"),
    "items": (lambda batch: batch.items, "`async for chunk in batch.chunks(n)`"),
}


@pytest.mark.parametrize("what", BLOCKING)
def test_what_would_block_the_event_loop_is_refused_and_the_error_names_its_async_form(
    dsn: str, conn: psycopg.Connection, what: str
) -> None:
    block, instead = BLOCKING[what]
    app = batchq.App()

    @app.handler("work")
    async def work(batch: batchq.Batch) -> None:
        block(batch)

    items = [1] if what in ("chunks", "items") else None
    said = raised_by(dsn, conn, app, "work", items=items)
    assert said.startswith("RuntimeError: ")
    assert said.endswith(f"would block the event loop; in an `async def` handler use {instead}")


def test_async_with_in_a_thread_is_refused(dsn: str, conn: psycopg.Connection) -> None:
    app = batchq.App()

    @app.handler("work")
    def work(batch: batchq.Batch) -> None:
        async def inner() -> None:
            async with batch.transaction():
                pass

        asyncio.run(inner())

    assert "`async with` is for `async def` handlers" in raised_by(dsn, conn, app, "work")


# ------------------------------------------------------------------------------------------- lost connections


@both_styles
@pytest.mark.parametrize("point", ["first statement", "last statement"])
def test_a_connection_cut_in_the_block_costs_an_attempt_and_doubles_nothing(
    dsn: str, admin_dsn: str, conn: psycopg.Connection, style: str, point: str
) -> None:
    app = batchq.App()

    def cut(batch: batchq.Batch, pid: int, here: str) -> None:
        if batch.attempt == 1 and here == point:
            with psycopg.connect(admin_dsn) as admin:
                assert admin.execute("SELECT pg_terminate_backend(%s, 5000)", [pid]).fetchone() == (True,)

    @app.handler("def", backoff=AT_ONCE)
    def work(batch: batchq.Batch) -> None:
        with batch.transaction() as own:
            cut(batch, own.execute("SELECT pg_backend_pid()").fetchone()[0], "first statement")
            pid = own.execute(INSERT + " RETURNING pg_backend_pid()", [batch.id, batch.attempt]).fetchone()[0]
            cut(batch, pid, "last statement")

    @app.handler("async def", backoff=AT_ONCE)
    async def work_async(batch: batchq.Batch) -> None:
        async with batch.transaction() as own:
            cut(batch, (await (await own.execute("SELECT pg_backend_pid()")).fetchone())[0], "first statement")
            insert = await own.execute(INSERT + " RETURNING pg_backend_pid()", [batch.id, batch.attempt])
            cut(batch, (await insert.fetchone())[0], "last statement")

    batch_id = put(conn, style)
    drain(app, dsn)
    row = look(conn, batch_id)
    assert (row.status, row.attempt, len(row.errors)) == ("completed", 2, 1)
    assert values(conn, DONE) == [2]


@pytest.fixture
def slow_commit(admin_dsn: str, done: None) -> str:
    """Have every COMMIT of rows of attempt 1 wait for an advisory lock."""
    with psycopg.connect(admin_dsn) as admin:
        admin.execute(
            """
            CREATE FUNCTION wait_at_commit() RETURNS trigger LANGUAGE plpgsql AS
              'BEGIN PERFORM pg_advisory_xact_lock(7); RETURN NULL; END';
            CREATE CONSTRAINT TRIGGER wait_at_commit AFTER INSERT ON done DEFERRABLE INITIALLY DEFERRED
              FOR EACH ROW WHEN (NEW.attempt = 1) EXECUTE FUNCTION wait_at_commit();
            """
        )
    return "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"


@both_styles
@pytest.mark.parametrize("happens", [True, False], ids=["it committed", "it did not"])
def test_a_commit_whose_answer_is_lost_is_neither_doubled_nor_lost(
    sim: SupaSim, admin_dsn: str, slow_commit: str, style: str, happens: bool
) -> None:
    with psycopg.connect(admin_dsn, autocommit=True) as admin:
        told: list[BaseException] = []
        app = make_app(lambda *_: None)
        catch(app, told)
        batch_id = put(admin, style)
        admin.execute("SELECT pg_advisory_lock(7)")
        with running_worker(app, sim.dsn(), lease_seconds=60):
            step("COMMIT is on its way; every client's connection is cut")
            [committing] = wait_until(lambda: values(admin, slow_commit), 10, "the COMMIT")
            sim.drop_clients(error=False)
            wait_until(lambda: told, 10, "the handler to be told")
            assert isinstance(told[0], batchq.OutcomeUnknown)
            if happens:
                admin.execute("SELECT pg_advisory_unlock(7)")
            else:
                admin.execute("SELECT pg_terminate_backend(%s, 5000)", [committing])
                admin.execute("SELECT pg_advisory_unlock(7)")
                await_status(admin, batch_id, "retrying")
                admin.execute("UPDATE batchq.batches SET run_at = now()")
            row = await_status(admin, batch_id, "completed")
        assert (row.attempt, row.result) == (1 if happens else 2, {"rows": 1})
        assert values(admin, DONE) == [1 if happens else 2]


@both_styles
def test_a_backend_that_dies_at_commit_costs_an_attempt_and_doubles_nothing(
    dsn: str, admin_dsn: str, conn: psycopg.Connection, style: str
) -> None:
    with psycopg.connect(admin_dsn) as admin:
        admin.execute(
            """
            CREATE FUNCTION die_at_commit() RETURNS trigger LANGUAGE plpgsql AS
              'BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END';
            CREATE CONSTRAINT TRIGGER die_at_commit AFTER INSERT ON done DEFERRABLE INITIALLY DEFERRED
              FOR EACH ROW WHEN (NEW.attempt = 1) EXECUTE FUNCTION die_at_commit();
            """
        )
    batch_id = put(conn, style)
    drain(make_app(lambda *_: None), dsn)
    row = look(conn, batch_id)
    assert (row.status, row.attempt) == ("completed", 2)
    assert row.errors[0]["error"].startswith("OutcomeUnknown: connection lost during COMMIT")
    assert values(conn, DONE) == [2]


if __name__ == "__main__":
    run_alone(__file__)
