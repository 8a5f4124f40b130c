"""What a role, a server or an earlier batch has done to a session harms no batch."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import psycopg
import pytest
from psycopg import sql

import batchq
from batchq.postgres.handler_connections import HandlerConnections
from batchq.postgres.link import Link
from batchq.postgres.statements import claims, probes
from batchq.postgres.transactions import LONGEST_TEXT
from batchq.retry import Conflicts
from batchq.testing import running_worker
from batchq.worker.lifecycle import StopReason
from tests.support.alone import run_alone
from tests.support.batches import STYLES, await_status, drain, look, put, values
from tests.support.steps import step
from tests.support.waiting import wait_until

both_styles = pytest.mark.parametrize("style", STYLES)
Body = Callable[[batchq.Batch, Callable[[str], Any]], None]


def running(conn: Any, statement: str) -> Any:
    """Run a statement; return its first value, None without rows."""
    cursor = conn.execute(statement.encode())
    return cursor.fetchone()[0] if cursor.description else None


def app_of(statements: Callable[[batchq.Batch], list[str]], seen: list[Any], **options: Any) -> batchq.App:
    """Return an app whose handlers run statements in their transaction; *seen* gets the first value of the last."""
    app = batchq.App()

    @app.handler("def", **options)
    def work(batch: batchq.Batch) -> None:
        with batch.transaction() as conn:
            found = [running(conn, statement) for statement in statements(batch)]
        seen.append(found[-1])

    @app.handler("async def", **options)
    async def work_async(batch: batchq.Batch) -> None:
        async with batch.transaction() as conn:
            for statement in statements(batch):
                cursor = await conn.execute(statement.encode())
                found = await cursor.fetchone() if cursor.description else None
        seen.append(found and found[0])

    return app


# ------------------------------------------------------------------------------------- what an earlier batch leaves

LEFT = {
    "setting": ("SET search_path = acme", "SELECT current_setting('search_path')", '"$user", public'),
    "time zone": ("SET TimeZone = 'Asia/Shanghai'", "SELECT current_setting('TimeZone') = 'Asia/Shanghai'", False),
    "default level": ("SET default_transaction_isolation = serializable", "SHOW default_transaction_isolation",
                      "read committed"),
    "role": ("SELECT set_config('role', current_user, false)", "SHOW role", "none"),
    "temporary table": ("CREATE TEMP TABLE batches_left (n int)", "SELECT to_regclass('batches_left')", None),
    "lock": ("SELECT pg_advisory_lock(7)", "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'", 0),
    "channel": ("LISTEN left_over", "SELECT count(*) FROM pg_listening_channels()", 0),
    "statement": ("PREPARE left_over AS SELECT 1", "SELECT count(*) FROM pg_prepared_statements", 0),
    "cursor": ("DECLARE left_over CURSOR WITH HOLD FOR SELECT 1", "SELECT count(*) FROM pg_cursors", 0),
}  # fmt: skip


@both_styles
@pytest.mark.parametrize("what", LEFT)
def test_the_next_batch_on_a_connection_finds_the_session_as_it_was(admin_dsn: str, style: str, what: str) -> None:
    leave, ask, clean = LEFT[what]
    pids: list[int] = []
    seen: list[Any] = []
    app = app_of(lambda batch: [leave, "SELECT pg_backend_pid()"] if batch.payload else [ask], seen)
    with psycopg.connect(admin_dsn, autocommit=True) as conn:
        put(conn, style, "leave")
        put(conn, style)
        put(conn, style, "leave")
        drain(app, admin_dsn, pool_size=1, concurrency=1, async_concurrency=1)
        pids += [seen[0], seen[2]]
        assert seen[1] == clean
        assert pids[0] == pids[1], "not the same connection"
        assert values(conn, "SELECT count(*) FROM batchq.all_batches WHERE status = 'completed'") == [3]


# -------------------------------------------------------------------------------------------- defaults of the role


@pytest.fixture
def set_default(admin_dsn: str, database: str) -> Callable[[str, str], None]:
    """Return what sets a default of the test's database."""

    def set_default(name: str, value: str) -> None:
        with psycopg.connect(admin_dsn, autocommit=True) as conn:
            change = "ALTER DATABASE {} SET {} = {}" if value else "ALTER DATABASE {} RESET {}"
            conn.execute("SET default_transaction_read_only = off")
            parts = [sql.Identifier(database), sql.Identifier(name), sql.Literal(value)]
            conn.execute(sql.SQL(change).format(*parts[: 3 if value else 2]))

    return set_default


@both_styles
@pytest.mark.parametrize("level", ["serializable", "repeatable read"])
def test_a_transaction_is_read_committed_whatever_the_roles_default_and_no_batch_is_charged(
    admin_dsn: str, set_default: Callable[[str, str], None], style: str, level: str
) -> None:
    set_default("default_transaction_isolation", level)
    set_default("default_transaction_deferrable", "on")
    seen: list[Any] = []
    app = app_of(lambda _: ["SELECT pg_sleep(1)", "SELECT current_setting('transaction_isolation')"], seen)
    with psycopg.connect(admin_dsn, autocommit=True) as conn:
        ids = [put(conn, style, max_attempts=1) for _ in range(20)]
        step("leases are extended while the transactions are open")
        drain(app, admin_dsn, lease_seconds=1)
        assert seen == ["read committed"] * 20
        for batch_id in ids:
            assert (look(conn, batch_id).status, look(conn, batch_id).errors) == ("completed", [])


def ready(conn: Any) -> bool:
    """Look as an idle worker does."""
    return probes.has_ready(conn, "default", 0, ["def"], claims.START).is_ready


def read_by_link(dsn: str, look: Callable[[Any], Any]) -> Any:
    """Return what *look* finds on a service thread's connection."""
    with closing(Link(dsn, 10)) as link, link.reading() as conn:
        return look(conn)


def read_by_pool(dsn: str, look: Callable[[Any], Any]) -> Any:
    """Return what *look* finds on a connection of the handlers' pool."""
    with closing(HandlerConnections(dsn, 1, 10, 10)) as connections:
        connections.open()
        return connections.read(look)


each_way = pytest.mark.parametrize("read", [read_by_link, read_by_pool])
Read = Callable[[str, Callable[[Any], Any]], Any]


@contextmanager
def producer(dsn: str, set_default: Callable[[str, str], None]) -> Iterator[psycopg.Connection[Any]]:
    """Have a producer enqueue, and leave open, what depends on a row that another one has changed meanwhile.

    Both are serializable, as all are by default. One conflict more, with a read that is, and one of the two is refused.
    """
    set_default("default_transaction_isolation", "serializable")
    with psycopg.connect(dsn) as producing, psycopg.connect(dsn, autocommit=True) as other:
        other.execute("CREATE TABLE public.prices (price integer)")
        other.execute("INSERT INTO public.prices VALUES (1)")
        producing.execute("SELECT price FROM public.prices")
        put(producing, "def")
        other.execute("UPDATE public.prices SET price = 2")
        yield producing


@each_way
def test_a_read_has_no_serializable_producer_refused(
    admin_dsn: str, set_default: Callable[[str, str], None], read: Read
) -> None:
    with producer(admin_dsn, set_default) as producing:
        assert not read(admin_dsn, ready)
        producing.commit()
    assert read(admin_dsn, ready)


@each_way
def test_a_read_is_not_refused_beside_serializable_producers(
    admin_dsn: str, set_default: Callable[[str, str], None], read: Read
) -> None:
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%has_ready%'"
    with producer(admin_dsn, set_default) as producing, ThreadPoolExecutor(1) as thread:
        producing.execute("LOCK TABLE batchq.batches_live IN ACCESS EXCLUSIVE MODE")
        look = thread.submit(read, admin_dsn, ready)
        wait_until(lambda: producing.execute("SELECT pg_stat_clear_snapshot()") and values(producing, waiting) == [1],
                   10, "the read to wait")  # fmt: skip
        producing.commit()
        assert look.result() in (True, False)


@each_way
def test_a_read_is_read_committed_however_long_its_parameters(
    admin_dsn: str, set_default: Callable[[str, str], None], read: Read
) -> None:
    set_default("default_transaction_isolation", "serializable")
    statement = "SELECT current_setting('transaction_isolation'), length(%(text)s::text)"
    for length in (10, LONGEST_TEXT):
        found = read(admin_dsn, lambda conn: conn.execute(statement, {"text": "'" * length}).fetchone())  # noqa: B023
        assert found == ("read committed", length)


# ------------------------------------------------------------------------------------------- what passes by itself


def raising(sqlstate: str) -> str:
    """Return the statement that fails with a SQLSTATE."""
    return f"DO $$ BEGIN RAISE EXCEPTION 'conflict' USING ERRCODE = '{sqlstate}'; END $$"


@both_styles
@pytest.mark.parametrize("sqlstate", ["40001", "40P01", "25006"])
def test_a_conflict_of_a_transaction_is_not_charged(
    dsn: str, conn: psycopg.Connection, style: str, sqlstate: str
) -> None:
    starts: list[int] = []
    seen: list[Any] = []

    def statements(batch: batchq.Batch) -> list[str]:
        starts.append(batch.attempt)
        return [raising(sqlstate)] if len(starts) < 4 else ["SELECT 1"]

    batch_id = put(conn, style, max_attempts=1)
    with running_worker(app_of(statements, seen), dsn):
        await_status(conn, batch_id, "completed", 20)
    assert (starts, look(conn, batch_id).errors, seen) == ([1, 1, 1, 1], [], [1])


@both_styles
def test_a_conflict_of_an_item_rolls_its_chunk_back_and_charges_neither_item_nor_batch(
    dsn: str, conn: psycopg.Connection, style: str
) -> None:
    app = batchq.App()
    conn.execute("CREATE TABLE done (item integer)")
    tried: list[int] = []

    def statement(item: int) -> bytes:
        tried.append(item)
        return raising("40P01").encode() if tried == [1, 2] else f"INSERT INTO done VALUES ({item})".encode()

    @app.item_handler("def", transactional=True)
    def work(item: int, conn: psycopg.Connection) -> None:
        conn.execute(statement(item))

    @app.item_handler("async def", transactional=True)
    async def work_async(item: int, conn: psycopg.AsyncConnection) -> None:
        await conn.execute(statement(item))

    batch_id = put(conn, style, items=[1, 2, 3], max_attempts=1)
    with running_worker(app, dsn):
        row = await_status(conn, batch_id, "completed", 20)
    assert (row.attempt, row.items_failed, row.errors) == (1, 0, [])
    assert (tried, values(conn, "SELECT item FROM done")) == ([1, 2, 1, 2, 3], [1, 2, 3])


def test_a_conflict_that_does_not_pass_waits_longer_and_longer_and_is_charged_in_the_end() -> None:
    conflicts = Conflicts()
    waits = [conflicts.delay_seconds(7) for _ in range(Conflicts.MOST)]
    for number, wait in enumerate(waits):
        assert wait is not None
        assert 0.05 * 2**number <= wait <= min(0.15 * 2**number, 90)
    assert conflicts.delay_seconds(7) is None
    assert conflicts.delay_seconds(7) is not None
    for batch_id in range(2 * Conflicts.MOST_BATCHES):
        conflicts.delay_seconds(batch_id)
    assert len(conflicts.counts) == Conflicts.MOST_BATCHES


@both_styles
def test_a_connection_that_can_only_read_is_dropped_so_that_a_change_takes_effect(
    admin_dsn: str, set_default: Callable[[str, str], None], style: str
) -> None:
    seen: list[Any] = []
    begun = threading.Event()
    app = app_of(lambda _: [begun.set() or "SELECT pg_backend_pid()"], seen)
    app.handler("plain")(lambda _: None)
    with psycopg.connect(admin_dsn, autocommit=True) as conn, running_worker(app, admin_dsn, pool_size=1) as worker:
        for kind in (style, "plain"):
            await_status(conn, put(conn, kind), "completed")
        step("the handlers' connections become those of a role that can only read; the worker's own stay")
        set_default("default_transaction_read_only", "on")
        for pid in seen:
            conn.execute("SELECT pg_terminate_backend(%s)", [pid])
        second = put(conn, style, max_attempts=1)
        begun.clear()
        wait_until(begun.is_set, 10, "the handler to begin")
        set_default("default_transaction_read_only", "")
        row = await_status(conn, second, "completed", 20)
        assert (row.attempt, row.errors) == (1, [])
        assert StopReason.SERVICE_FAILED not in worker.lifecycle.reasons


if __name__ == "__main__":
    run_alone(__file__)
