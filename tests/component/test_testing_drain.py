"""batchq.testing.drain: by a worker, and in the transaction of the test, on each kind of connection."""

import asyncio
from collections.abc import Callable
from typing import Any

import django
import psycopg
import pytest
import sqlalchemy
import sqlalchemy.ext.asyncio
import sqlalchemy.orm
from django.conf import settings as django_settings
from psycopg.rows import dict_row

import batchq
from batchq.errors import ConfigError, InvalidInput
from batchq.testing import BatchFailed, Drained, drain, drain_async, travel
from tests.support.alone import run_alone
from tests.support.batches import STYLES, failed_items, look, put, register, register_items, values

both_styles = pytest.mark.parametrize("style", STYLES)
ways = pytest.mark.parametrize("by", ["worker", "session"])
STATUSES = "SELECT status FROM batchq.all_batches ORDER BY id"
NUMBERS = "SELECT n FROM numbers ORDER BY n"


@pytest.fixture
def own(dsn: str, conn: psycopg.Connection) -> Any:
    """Return a connection of a test that rolls back at its end, and has a table to write to."""
    conn.execute("CREATE TABLE numbers (n integer)")
    with psycopg.connect(dsn, prepare_threshold=None) as own:
        yield own
        own.rollback()


def writing_app() -> batchq.App:
    """Return an app whose handlers write numbers in the batch's own transaction."""
    app = batchq.App()

    @app.handler("def")
    def write(batch: batchq.Batch) -> None:
        with batch.transaction(result={"wrote": batch.payload}) as conn:
            conn.execute("INSERT INTO numbers VALUES (%s)", [batch.payload])

    @app.handler("async def")
    async def write_async(batch: batchq.Batch) -> None:
        async with batch.transaction(result={"wrote": batch.payload}) as conn:
            await conn.execute("INSERT INTO numbers VALUES (%s)", [batch.payload])

    @app.item_handler("def items", transactional=True, chunk_size=2)
    def write_item(item: int, conn: psycopg.Connection) -> None:
        conn.execute("INSERT INTO numbers VALUES (%s)", [item])
        if item == 3:
            raise ValueError("three")

    @app.item_handler("async def items", transactional=True, chunk_size=2)
    async def write_item_async(item: int, conn: psycopg.AsyncConnection) -> None:
        await conn.execute("INSERT INTO numbers VALUES (%s)", [item])
        if item == 3:
            raise ValueError("three")

    return app


# ------------------------------------------------------------------------------------------- what both ways have


@ways
@both_styles
def test_what_happened_is_counted_and_the_first_error_raised(
    dsn: str, conn: psycopg.Connection, style: str, by: str
) -> None:
    app = batchq.App()
    raised = ValueError("no such order")

    def body(batch: batchq.Batch) -> None:
        match batch.payload:
            case "fail":
                raise raised
            case "cancel":
                raise batchq.Cancel("not wanted")
            case "snooze":
                raise batchq.Snooze(60)
            case "throttle":
                raise batchq.Throttled(60, scope="key")

    register(app, style, "work", body)
    for payload in ("ok", "ok", "cancel", "snooze", "throttle"):
        put(conn, "work", payload)
    put(conn, "work", "fail", max_attempts=1)
    put(conn, "work", "fail", max_attempts=2)

    drained = drain(app, dsn if by == "worker" else conn, raises=False)

    assert drained == Drained(completed=2, failed=1, cancelled=1, retried=1, snoozed=2, errors=(raised, raised))
    put(conn, "work", "fail", max_attempts=1)
    with pytest.raises(ValueError, match="no such order") as caught:
        drain(app, dsn if by == "worker" else conn)
    assert caught.value is raised
    assert "body" in [entry.name for entry in caught.traceback]
    assert caught.value.__notes__[-1].endswith("(work), attempt 1 of 1: failed")


@ways
def test_a_failure_that_no_handler_raised_is_raised_too(dsn: str, conn: psycopg.Connection, by: str) -> None:
    app = batchq.App()
    app.handler("work")(lambda _: object())
    batch_id = put(conn, "work")
    with pytest.raises(BatchFailed, match=rf"batch {batch_id} \(work\): .*what the handler returned"):
        drain(app, dsn if by == "worker" else conn)
    assert look(conn, batch_id).status == "failed"


@ways
def test_failed_items_that_the_batch_tolerates_are_no_error(dsn: str, conn: psycopg.Connection, by: str) -> None:
    app = batchq.App()
    register_items(app, "def", "items", lambda item, _: 1 // item)
    put(conn, "items", items=[1, 0], max_failed_items=1, max_attempts=1)
    assert drain(app, dsn if by == "worker" else conn) == Drained(completed=1)
    put(conn, "items", items=[1, 0], max_attempts=1)
    with pytest.raises(ZeroDivisionError):
        drain(app, dsn if by == "worker" else conn)


def test_an_app_without_handlers_and_other_databases_are_refused(dsn: str, conn: psycopg.Connection) -> None:
    with pytest.raises(ConfigError, match="no handlers"):
        drain(batchq.App(), conn)
    with pytest.raises(InvalidInput, match="connection"):
        drain(writing_app(), 7)
    with pytest.raises(ConfigError, match="BATCHQ_QUEUE"):
        drain(writing_app(), conn, queues=[])


# ------------------------------------------------------------------------------------------ in the test's transaction


@both_styles
def test_what_an_open_transaction_has_enqueued_runs_in_it(
    own: psycopg.Connection, conn: psycopg.Connection, style: str
) -> None:
    one = put(own, style, 1)
    many = put(own, f"{style} items", items=[2, 3, 4, 5, 6], max_failed_items=1, max_attempts=1)
    assert drain(writing_app(), own) == Drained(completed=2)
    assert look(own, one).result == {"wrote": 1}
    assert (look(own, many).items_done, look(own, many).items_failed) == (4, 1)
    assert [row.error for row in failed_items(own, many)] == ["ValueError: three"]
    assert values(own, NUMBERS) == [1, 2, 4, 5, 6], "without the item that failed: its savepoint is rolled back"
    assert own.info.transaction_status == psycopg.pq.TransactionStatus.INTRANS
    assert values(conn, STATUSES) == [], "nobody else sees any of it"
    own.rollback()
    assert values(own, STATUSES) + values(own, NUMBERS) == []


@both_styles
def test_a_handler_that_fails_leaves_the_transaction_usable(own: psycopg.Connection, style: str) -> None:
    app = batchq.App()

    @app.handler("def")
    def fail(batch: batchq.Batch) -> None:
        with batch.transaction() as conn:
            conn.execute("INSERT INTO numbers VALUES (1)")
            conn.execute("SELECT 1 / 0")

    @app.handler("async def")
    async def fail_async(batch: batchq.Batch) -> None:
        async with batch.transaction() as conn:
            await conn.execute("INSERT INTO numbers VALUES (1)")
            await conn.execute("SELECT 1 / 0")

    batch_id = put(own, style, max_attempts=1)
    own.execute("INSERT INTO numbers VALUES (0)")
    with pytest.raises(psycopg.errors.DivisionByZero):
        drain(app, own)
    assert look(own, batch_id).status == "failed"
    assert values(own, NUMBERS) == [0]


@both_styles
def test_checkpoints_chunks_and_needed_results_work(own: psycopg.Connection, style: str) -> None:
    app = batchq.App()
    seen: list[Any] = []

    @app.handler("def")
    def work(batch: batchq.Batch) -> int:
        for chunk in batch.chunks(2):
            with chunk.transaction() as conn:
                conn.execute("INSERT INTO numbers SELECT unnest(%s::int[])", [chunk.items])
                batch.checkpoint({"at": chunk.items[-1]})
        seen.append(batch.cursor)
        return len(batch.items)

    @app.handler("async def")
    async def work_async(batch: batchq.Batch) -> int:
        async for chunk in batch.chunks(2):
            async with chunk.transaction() as conn:
                await conn.execute("INSERT INTO numbers SELECT unnest(%s::int[])", [chunk.items])
                await batch.checkpoint_async({"at": chunk.items[-1]})
        seen.append(batch.cursor)
        return batch.items_total or 0

    @app.handler("after")
    async def after(batch: batchq.Batch) -> None:
        seen.append([(needed.status, needed.result) for needed in await batch.needed_async()])

    first = put(own, style, items=[1, 2, 3])
    second = put(own, "after", after=[first])
    put(own, "after", after=[second, first])
    assert drain(app, own) == Drained(completed=3)
    assert seen == [{"at": 3}, [("completed", 3)], [("completed", 3), ("completed", None)]]
    assert values(own, NUMBERS) == [1, 2, 3]


@both_styles
def test_long_payloads_and_concurrent_items_share_the_session(own: psycopg.Connection, style: str) -> None:
    app = batchq.App()
    seen: list[Any] = []

    @app.item_handler("def", concurrency=4)
    def work(item: int, batch: batchq.Batch) -> None:
        seen.append((item, len(batch.payload), [needed.result for needed in batch.needed]))

    @app.item_handler("async def", concurrency=4)
    async def work_async(item: int, batch: batchq.Batch) -> None:
        seen.append((item, len(batch.payload), [needed.result for needed in await batch.needed_async()]))

    app.handler("first")(lambda _: "done")
    first = put(own, "first")
    put(own, style, "x" * 100_000, items=list(range(20)), after=[first])
    assert drain(app, own) == Drained(completed=2)
    assert sorted(seen) == [(number, 100_000, ["done"]) for number in range(20)]


def test_batches_that_are_enqueued_meanwhile_and_parts_run_too(own: psycopg.Connection) -> None:
    app = batchq.App()

    @app.handler("split")
    def split(batch: batchq.Batch) -> None:
        with batch.transaction() as conn:
            ids = batchq.enqueue_each(conn, "number", [1, 2])
            batchq.enqueue(conn, "number", 3, after=ids)

    @app.handler("number")
    def number(batch: batchq.Batch) -> None:
        with batch.transaction() as conn:
            conn.execute("INSERT INTO numbers VALUES (%s)", [batch.payload])

    @app.item_handler("spread", spread=3, transactional=True)
    def spread(item: int, conn: psycopg.Connection) -> None:
        conn.execute("INSERT INTO numbers VALUES (%s)", [item])

    put(own, "split")
    put(own, "spread", items=[10, 11, 12, 13])
    assert drain(app, own) == Drained(completed=5), "parts are not counted"
    assert values(own, NUMBERS) == [1, 2, 3, 10, 11, 12, 13]


def test_batches_run_in_the_order_of_a_worker(own: psycopg.Connection) -> None:
    app = batchq.App()
    order: list[Any] = []

    @app.handler("work", max_running_per_key=1)
    def work(batch: batchq.Batch) -> None:
        order.append(batch.payload)
        if batch.payload == "a1" and batch.attempt == 1:
            raise batchq.Snooze(60)

    put(own, "work", "low", priority=5)
    put(own, "work", "high", priority=1)
    for payload in ("b1", "a1", "a2"):
        put(own, "work", payload, key=payload[0])
    put(own, "work", "mail", queue="mail")
    assert drain(app, own, queues=["mail", "default"]) == Drained(completed=4, snoozed=1)
    assert order == ["mail", "high", "low", "a1", "b1"], "a2 waits for a1, which has begun"
    travel(own, 60)
    order.clear()
    app.handlers.clear()
    app.handler("work", max_running_per_key=1)(lambda batch: order.append(batch.payload))
    assert drain(app, own) == Drained(completed=2)
    assert order == ["a1", "a2"]


def test_a_split_queue_runs_whole(conn: psycopg.Connection, own: psycopg.Connection) -> None:
    conn.execute("SELECT batchq.split_queue('default', 3)")
    app = writing_app()
    for number in range(6):
        batchq.enqueue(own, "def", number, key=f"key {number}")
    batchq.enqueue_many(own, "def", range(6, 100))
    assert values(own, "SELECT count(DISTINCT queue) FROM batchq.batches_live") == [3]
    assert drain(app, own).completed == 100
    assert values(own, NUMBERS) == list(range(100))


def test_handlers_of_a_split_queue_see_the_whole(conn: psycopg.Connection, own: psycopg.Connection) -> None:
    conn.execute("SELECT batchq.split_queue('default', 3)")
    app = batchq.App()
    app.handler("work")(lambda batch: batch.queue)
    app.handler("slow")(lambda _: (_ for _ in ()).throw(batchq.Throttled(60)))
    ids = [put(own, "work", key=f"key {number}") for number in range(6)]
    put(own, "slow", key="key 1")
    drain(app, own)
    assert {look(own, batch_id).result for batch_id in ids} == {"default"}
    assert values(own, "SELECT queue FROM batchq.throttles") == ["default"]


def test_what_is_most_urgent_in_any_shard_of_a_split_queue_comes_first(
    conn: psycopg.Connection, own: psycopg.Connection
) -> None:
    conn.execute("SELECT batchq.split_queue('default', 3)")
    order: list[int] = []
    app = batchq.App()
    app.handler("work")(lambda batch: order.append(batch.payload))
    for number in range(8):
        put(own, "work", number, unique_key=f"u{number}", priority=-number)
    drain(app, own)
    assert order == [7, 6, 5, 4, 3, 2, 1, 0]


def test_limits_of_a_split_queue_hold_and_leases_on_all_shards_expire(
    conn: psycopg.Connection, own: psycopg.Connection
) -> None:
    conn.execute("SELECT batchq.split_queue('default', 3)")
    own.execute("SELECT batchq.set_limit('default', max_running_per_key => 1)")
    app = batchq.App()
    app.handler("work")(lambda batch: batch.attempt)
    for number in range(12):
        put(own, "work", number, key=f"key {number % 6}")
    assert values(own, "SELECT count(DISTINCT queue) FROM batchq.batches_live") == [3]
    own.execute(
        "UPDATE batchq.batches_live SET status = 'processing', attempt = 1, claimed_by = 'dead', claimed_at = now(), "
        "claim_token = gen_random_uuid(), lease_expires_at = now() + interval '1 minute' WHERE payload::text::int < 6"
    )
    assert drain(app, own) == Drained()
    travel(own, 61)
    assert drain(app, own) == Drained(completed=12)


def test_paused_and_throttled_kinds_wait(own: psycopg.Connection) -> None:
    app = batchq.App()
    calls: list[Any] = []

    @app.item_handler("call")
    def call(item: Any) -> None:
        calls.append(item)
        if item == "slow down":
            raise batchq.Throttled(5)

    app.handler("other")(lambda _: None)
    first = put(own, "call", items=["one", "slow down", "two"])
    put(own, "call", items=["three"])
    put(own, "other")
    own.execute("SELECT batchq.pause(kind => 'other')")
    assert drain(app, own) == Drained(snoozed=1)
    assert calls == ["one", "slow down"]
    assert look(own, first).shown == "scheduled"
    travel(own, 4)
    assert drain(app, own) == Drained()
    travel(own, 60)
    own.execute("SELECT batchq.resume(kind => 'other')")
    assert drain(app, own) == Drained(completed=2, snoozed=1)
    assert sorted(calls) == ["one", "slow down", "slow down", "three", "two"]


def test_retries_run_once_they_are_due(own: psycopg.Connection) -> None:
    app = batchq.App()

    @app.handler("flaky", backoff=batchq.Backoff(first_seconds=60))
    def flaky(batch: batchq.Batch) -> int:
        if batch.attempt < 3:
            raise OSError("connection refused")
        return batch.attempt

    batch_id = put(own, "flaky")
    for _ in range(2):
        drained = drain(app, own, raises=False)
        assert (drained.retried, len(drained.errors)) == (1, 1)
        assert drain(app, own) == Drained(), "not due"
        travel(own, 200)
    assert drain(app, own) == Drained(completed=1)
    assert look(own, batch_id).result == 3


def test_a_batch_of_a_worker_that_died_is_rescued(own: psycopg.Connection) -> None:
    app = batchq.App()
    app.handler("work")(lambda batch: batch.attempt)
    batch_id = put(own, "work")
    own.execute(
        "UPDATE batchq.batches SET status = 'processing', attempt = 1, claimed_by = 'dead', claimed_at = now(), "
        "claim_token = gen_random_uuid(), lease_expires_at = now() + interval '1 minute'"
    )
    assert drain(app, own) == Drained()
    travel(own, 61)
    assert drain(app, own) == Drained(completed=1)
    assert look(own, batch_id).result == 2


def test_in_autocommit_each_step_commits(dsn: str, own: psycopg.Connection, conn: psycopg.Connection) -> None:
    put(conn, "def", 1)
    assert drain(writing_app(), conn, keep_completed="no") == Drained(completed=1)
    assert values(own, NUMBERS) == [1]
    assert values(own, STATUSES) == []
    assert conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE


def test_the_tests_connection_stays_as_it_is(own: psycopg.Connection) -> None:
    """Row factory, prepared statements, handlers of notices, savepoints."""
    notices: list[str] = []
    own.add_notice_handler(lambda diagnostic: notices.append(str(diagnostic.message_primary)))
    own.row_factory = dict_row  # type: ignore[assignment]
    own.prepare_threshold = 0
    put(own, "def", 1)
    with own.transaction():
        drain(writing_app(), own)
    own.execute("DO $$ BEGIN RAISE NOTICE 'heard'; END $$")
    assert notices == ["heard"]
    assert own.execute("SELECT n FROM numbers").fetchone() == {"n": 1}
    assert not own.closed


def test_an_outcome_that_cannot_be_stored_fails_its_batch(own: psycopg.Connection) -> None:
    app = batchq.App()
    own.execute("ALTER TABLE batchq.batches ADD CHECK (result <> '7')")
    app.handler("refused")(lambda _: 7)
    batch_id = put(own, "refused")
    with pytest.raises(BatchFailed, match="the outcome could not be stored: CheckViolation"):
        drain(app, own)
    assert look(own, batch_id).status == "failed"


def test_what_ends_the_test_is_raised_at_once(own: psycopg.Connection) -> None:
    app = batchq.App()

    @app.handler("work")
    def interrupted(batch: batchq.Batch) -> None:
        raise KeyboardInterrupt

    put(own, "work")
    put(own, "work")
    with pytest.raises(KeyboardInterrupt):
        drain(app, own, raises=False)
    assert values(own, "SELECT attempt FROM batchq.all_batches ORDER BY id") == [1, 0]


# --------------------------------------------------------------------------------------- other kinds of connections


def test_sqlalchemys_connections_and_sessions_on_psycopg(dsn: str, own: psycopg.Connection) -> None:
    engine = sqlalchemy.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(dsn))
    insert = sqlalchemy.text("INSERT INTO batchq.batches (kind, payload) VALUES ('def', '1')")
    with engine.connect() as connection:
        connection.execute(insert)
        assert drain(writing_app(), connection) == Drained(completed=1)
        assert connection.execute(sqlalchemy.text(NUMBERS)).scalars().all() == [1]
        connection.rollback()
    with sqlalchemy.orm.Session(engine) as session:
        assert drain(writing_app(), session) == Drained()
        session.execute(insert)
        assert drain(writing_app(), session) == Drained(completed=1)
        session.rollback()
    engine.dispose()
    assert values(own, NUMBERS) == []
    other = sqlalchemy.create_engine("postgresql+psycopg2://", creator=lambda: __import__("psycopg2").connect(dsn))
    with other.connect() as connection, pytest.raises(InvalidInput, match="uses psycopg2, and handlers get"):
        drain(writing_app(), connection)
    other.dispose()


@pytest.mark.filterwarnings("ignore:Accessing the database during app initialization")
def test_djangos_connection(dsn: str, own: psycopg.Connection) -> None:
    if not django_settings.configured:
        django_settings.configure()
    from django.db.backends.postgresql.base import DatabaseWrapper
    from django.db.utils import ConnectionHandler

    given = psycopg.conninfo.conninfo_to_dict(dsn)
    handler = ConnectionHandler(
        {
            "default": {
                "ENGINE": "django.db.backends.postgresql",
                "NAME": given["dbname"],
                "USER": given["user"],
                "PASSWORD": given.get("password", ""),
                "HOST": given["host"],
                "PORT": str(given["port"]),
            }
        }
    )
    connection = handler["default"]
    assert isinstance(connection, DatabaseWrapper), django.VERSION
    connection.set_autocommit(False)
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO batchq.batches (kind, payload) VALUES ('def', '1')")
        assert drain(writing_app(), connection) == Drained(completed=1)
        cursor.execute(NUMBERS)
        assert cursor.fetchall() == [(1,)]
    connection.rollback()
    connection.close()
    assert values(own, NUMBERS) == []


def in_loop(test: Callable[[], Any]) -> None:
    asyncio.run(test())


def test_async_connections_and_both_styles_of_handlers(dsn: str, own: psycopg.Connection) -> None:
    async def test() -> None:
        async with await psycopg.AsyncConnection.connect(dsn) as conn:
            for style in STYLES:
                await batchq.enqueue_async(conn, style, 1)
                await batchq.enqueue_async(conn, f"{style} items", items=[2, 3], max_failed_items=1, max_attempts=1)
            assert await drain_async(writing_app(), conn) == Drained(completed=4)
            rows = await (await conn.execute(NUMBERS)).fetchall()
            assert rows == [(1,), (1,), (2,), (2,)]
            await conn.rollback()
        with pytest.raises(RuntimeError, match="use `await drain_async"):
            drain(writing_app(), own)
        assert await drain_async(writing_app(), dsn) == Drained()
        with pytest.raises(InvalidInput, match=r"psycopg.Connection is for"):
            await drain_async(writing_app(), own)

    in_loop(test)
    assert values(own, NUMBERS) == []


def test_sqlalchemys_async_connections_on_psycopg(dsn: str, own: psycopg.Connection) -> None:
    async def test() -> None:
        engine = sqlalchemy.ext.asyncio.create_async_engine(
            "postgresql+psycopg://", async_creator=lambda: psycopg.AsyncConnection.connect(dsn)
        )
        async with engine.connect() as conn:
            await conn.execute(sqlalchemy.text("INSERT INTO batchq.batches (kind, payload) VALUES ('async def', '1')"))
            assert await drain_async(writing_app(), conn) == Drained(completed=1)
            await conn.rollback()
        async with sqlalchemy.ext.asyncio.AsyncSession(engine) as session:
            await session.execute(sqlalchemy.text("INSERT INTO batchq.batches (kind, payload) VALUES ('def', '1')"))
            assert await drain_async(writing_app(), session) == Drained(completed=1)
            await session.rollback()
        await engine.dispose()

    in_loop(test)
    assert values(own, NUMBERS) == []


def test_a_worker_of_a_drain_runs_the_hooks_of_the_app(dsn: str, conn: psycopg.Connection) -> None:
    app = batchq.App()

    @app.lifespan
    def opened() -> Any:
        yield "a client"

    @app.handler("asks")
    def ask(batch: batchq.Batch) -> Any:
        return batch.app_state

    batch_id = put(conn, "asks")
    assert drain(app, dsn).completed == 1
    assert look(conn, batch_id).result == "a client"


if __name__ == "__main__":
    run_alone(__file__)
