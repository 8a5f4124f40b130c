"""What a program asks and does about batches by their ids, on connections of every kind, and how it waits for one."""

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import django
import psycopg
import pytest
import sqlalchemy
from django.conf import settings as django_settings
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import dict_row
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

import batchq
from batchq.errors import InvalidInput
from batchq.postgres.statements.endings import Finish
from batchq.postgres.statements.views import STATUSES
from batchq.testing import running_worker
from tests.component import rows
from tests.support.alone import run_alone
from tests.support.batches import STYLES, drain, put, register, values
from tests.support.roles import role_for
from tests.support.servers import free_port
from tests.support.waiting import wait_until

Conn = psycopg.Connection[Any]
both_styles = pytest.mark.parametrize("style", STYLES)


# --------------------------------------------------------------------------------------- connections of every kind


def arguments(dsn: str) -> dict[str, Any]:
    """Return what pg8000 and asyncpg take to connect."""
    given = conninfo_to_dict(dsn)
    found = {key: given[key] for key in ("host", "user", "password") if given.get(key)}
    return found | {"port": int(given.get("port", 5432)), "database": given["dbname"]}


@contextmanager
def psycopg_connection(dsn: str, **options: Any) -> Iterator[Any]:
    """Open one whose rows are dictionaries."""
    with psycopg.connect(dsn, row_factory=dict_row, **options) as conn:
        yield conn


@contextmanager
def engine(dsn: str, driver: str) -> Iterator[sqlalchemy.Engine]:
    """Return a SQLAlchemy engine with a driver."""
    if driver == "pg8000":
        options = arguments(dsn)
        host = str(options.pop("host"))
        options |= {"unix_sock": f"{host}/.s.PGSQL.{options.pop('port')}"} if host.startswith("/") else {"host": host}
        made = sqlalchemy.create_engine("postgresql+pg8000://", connect_args=options)
    else:
        made = sqlalchemy.create_engine(f"postgresql+{driver}://", connect_args=dict(conninfo_to_dict(dsn)))
    try:
        yield made
    finally:
        made.dispose()


@contextmanager
def sqlalchemy_connection(dsn: str, driver: str) -> Iterator[Any]:
    """Open SQLAlchemy's Connection."""
    with engine(dsn, driver) as made, made.connect() as conn:
        yield conn


@contextmanager
def sqlalchemy_session(dsn: str) -> Iterator[Any]:
    """Open SQLAlchemy's Session."""
    with engine(dsn, "psycopg") as made, Session(made) as session:
        yield session


@contextmanager
def django_connection(dsn: str) -> Iterator[Any]:
    """Open Django's connection."""
    from django.db.backends.postgresql.base import DatabaseWrapper
    from django.db.utils import ConnectionHandler

    if not django_settings.configured:
        django_settings.configure()
        django.setup()
    given = conninfo_to_dict(dsn)
    wanted = {"NAME": "dbname", "USER": "user", "PASSWORD": "password", "HOST": "host", "PORT": "port"}
    options = {key: str(given.get(name) or "") for key, name in wanted.items()}
    handler = ConnectionHandler({"default": {"ENGINE": "django.db.backends.postgresql", **options}})
    conn = handler["default"]
    assert isinstance(conn, DatabaseWrapper)
    try:
        yield conn
    finally:
        conn.close()


SYNC: dict[str, Callable[[str], Any]] = {
    "psycopg": psycopg_connection,
    "psycopg autocommit": lambda dsn: psycopg_connection(dsn, autocommit=True),
    "SQLAlchemy psycopg": lambda dsn: sqlalchemy_connection(dsn, "psycopg"),
    "SQLAlchemy psycopg2": lambda dsn: sqlalchemy_connection(dsn, "psycopg2"),
    "SQLAlchemy pg8000": lambda dsn: sqlalchemy_connection(dsn, "pg8000"),
    "SQLAlchemy session": sqlalchemy_session,
    "Django": django_connection,
}


@asynccontextmanager
async def psycopg_async(dsn: str) -> AsyncIterator[Any]:
    """Open psycopg's AsyncConnection."""
    async with await psycopg.AsyncConnection.connect(dsn) as conn:
        yield conn


@asynccontextmanager
async def asyncpg_connection(dsn: str) -> AsyncIterator[Any]:
    """Open asyncpg's Connection."""
    conn = await asyncpg.connect(**arguments(dsn), statement_cache_size=0)
    yield conn
    await conn.close()


@asynccontextmanager
async def sqlalchemy_async(dsn: str, driver: str) -> AsyncIterator[Any]:
    """Open SQLAlchemy's AsyncConnection."""
    options = arguments(dsn) if driver == "asyncpg" else dict(conninfo_to_dict(dsn))
    made = create_async_engine(f"postgresql+{driver}://", connect_args=options)
    async with made.connect() as conn:
        yield conn
    await made.dispose()


@asynccontextmanager
async def sqlalchemy_async_session(dsn: str) -> AsyncIterator[Any]:
    """Open SQLAlchemy's AsyncSession."""
    made = create_async_engine("postgresql+psycopg://", connect_args=dict(conninfo_to_dict(dsn)))
    async with AsyncSession(made) as session:
        yield session
    await made.dispose()


ASYNC: dict[str, Callable[[str], Any]] = {
    "psycopg": psycopg_async,
    "asyncpg": asyncpg_connection,
    "SQLAlchemy psycopg": lambda dsn: sqlalchemy_async(dsn, "psycopg"),
    "SQLAlchemy asyncpg": lambda dsn: sqlalchemy_async(dsn, "asyncpg"),
    "SQLAlchemy session": sqlalchemy_async_session,
}
every_connection = pytest.mark.parametrize("driver", SYNC)
every_async_connection = pytest.mark.parametrize("driver", ASYNC)


async def commit(conn: Any) -> None:
    """Commit, where the connection has begun a transaction by itself."""
    if not isinstance(conn, asyncpg.Connection):
        await conn.commit()


@every_connection
def test_everything_works_on_every_connection(admin_dsn: str, conn: Conn, driver: str) -> None:
    done = rows.finished(conn, "failed", error='{"error": "ValueError: no"}', payload={"ü": [1, None]}, kind="100%")
    other = put(conn, "work", queue="mail")
    with SYNC[driver](admin_dsn) as theirs:
        info = batchq.get(theirs, done)
        assert info is not None
        assert (info.id, info.kind, info.status, info.payload) == (done, "100%", "failed", {"ü": [1, None]})
        assert batchq.get(theirs, 999) is None
        assert [found.id for found in batchq.list_batches(theirs)] == [other, done]
        assert [found.id for found in batchq.list_batches(theirs, status="failed", kind="100%")] == [done]
        assert [found.id for found in batchq.list_batches(theirs, queue="mail", status="ready")] == [other]
        assert [found.id for found in batchq.list_batches(theirs, limit=1)] == [other]
        assert batchq.cancel(theirs, other, reason="as told", actor="somebody") == "cancelled"
        assert batchq.cancel(theirs, done) == "failed"
        assert batchq.cancel(theirs, 999) is None
        assert batchq.retry(theirs, done) == "pending"
        assert batchq.retry(theirs, 999) is None
        theirs.commit()
        info = batchq.wait(theirs, other, timeout_seconds=5)
        assert (info.status, info.is_final, info.error) == ("cancelled", True, "cancelled: as told")
    assert values(conn, "SELECT status FROM batchq.all_batches WHERE id = %s", done) == ["pending"]
    audit = conn.execute("SELECT verb, reason, actor FROM batchq.audit ORDER BY id").fetchall()
    assert audit[0] == ("cancel", "as told", "somebody")
    assert audit[1][:2] == ("retry", None)


@every_async_connection
def test_everything_works_on_every_async_connection(admin_dsn: str, conn: Conn, driver: str) -> None:
    done = rows.finished(conn, "failed", error='{"error": "ValueError: no"}', payload={"a": 1})
    other = put(conn, "work", queue="mail")

    async def use() -> None:
        async with ASYNC[driver](admin_dsn) as theirs:
            info = await batchq.get_async(theirs, done)
            assert info is not None
            assert (info.id, info.status, info.payload) == (done, "failed", {"a": 1})
            assert await batchq.get_async(theirs, 999) is None
            assert [found.id for found in await batchq.list_batches_async(theirs)] == [other, done]
            assert [found.id for found in await batchq.list_batches_async(theirs, status="failed")] == [done]
            assert await batchq.cancel_async(theirs, other) == "cancelled"
            assert await batchq.retry_async(theirs, done, whole=True, reason="as told") == "pending"
            await commit(theirs)
            info = await batchq.wait_async(theirs, other, timeout_seconds=5)
            assert info.status == "cancelled"
            with pytest.raises(TimeoutError, match="its status is ready"):
                await batchq.wait_async(theirs, done, timeout_seconds=0)

    asyncio.run(use())
    assert values(conn, "SELECT reason FROM batchq.audit ORDER BY id") == ["by a program", "as told"]


# ------------------------------------------------------------------------------------------ what a batch looks like


def test_a_batch_has_the_values_of_its_row(conn: Conn) -> None:
    before = datetime.now(UTC) - timedelta(minutes=1)
    batch_id = put(conn, "work", {"a": 1}, items=[1, 2], queue="mail", priority=3, unique_key="u", max_attempts=7)
    info = batchq.get(conn, batch_id)
    assert info is not None
    assert info.created_at is not None
    assert before < info.created_at < before + timedelta(minutes=5)
    assert info.next_run_at is not None
    assert (info.items_total, info.items_done, info.items_failed) == (2, 0, 0)
    assert (info.queue, info.priority, info.unique_key, info.key) == ("mail", 3, "u", None)
    assert (info.attempt, info.max_attempts, info.error, info.result) == (0, 7, None, None)
    assert (info.claimed_at, info.finished_at, info.is_final) == (None, None, False)
    with pytest.raises(AttributeError):
        info.status = "ready"  # type: ignore[misc]
    taken = rows.processing(conn)
    rows.finish(conn, Finish(taken.id, taken.token, "completed", json.dumps({"rows": 3})))
    done = batchq.get(conn, taken.id)
    assert done is not None
    assert (done.result, done.is_final, done.next_run_at) == ({"rows": 3}, True, None)
    assert done.finished_at is not None


def test_a_time_that_python_does_not_have_is_none(conn: Conn, admin_dsn: str) -> None:
    batch_id = rows.insert(conn, run_at="20000-01-01")
    info = batchq.get(conn, batch_id)
    assert info is not None
    assert (info.status, info.next_run_at) == ("scheduled", None)
    with psycopg.connect(admin_dsn, options="-c TimeZone=Asia/Kolkata") as theirs:
        again = batchq.get(theirs, batch_id)
    assert again is not None
    assert again.created_at == info.created_at


def test_a_list_has_as_many_as_the_limit_the_newest_first_of_each_status(conn: Conn) -> None:
    ready = [put(conn, "work") for _ in range(5)]
    done = [rows.finished(conn, kind="done") for _ in range(3)]
    running = rows.processing(conn, kind="runs").id
    later = put(conn, "work", delay_seconds=60)
    waiting = put(conn, "work", after=[running])
    assert [info.id for info in batchq.list_batches(conn, limit=4)] == [waiting, later, running, done[-1]]
    by_status = {status: [info.id for info in batchq.list_batches(conn, status=status)] for status in STATUSES}
    assert by_status == {
        "waiting": [waiting],
        "scheduled": [later],
        "ready": ready[::-1],
        "processing": [running],
        "stalled": [],
        "retrying": [],
        "completed": done[::-1],
        "failed": [],
        "cancelled": [],
    }


def test_the_parts_of_a_batch_are_seen_as_the_whole(dsn: str, conn: Conn) -> None:
    app = batchq.App()
    app.item_handler("items")(lambda _: None)
    batch_id = put(conn, "items", items=list(range(20)), spread=4)
    drain(app, dsn)
    assert [(info.id, info.items_done) for info in batchq.list_batches(conn)] == [(batch_id, 20)]
    part = values(conn, "SELECT id FROM batchq.all_batches WHERE part_of IS NOT NULL LIMIT 1")
    assert [batchq.get(conn, one) for one in part] in ([], [None])


@pytest.mark.parametrize("batch_id", [0, -1, 2**63, "7", None, True, 1.0])
def test_what_is_no_id_is_refused(conn: Conn, batch_id: Any) -> None:
    for ask in (batchq.get, batchq.wait, batchq.cancel, batchq.retry):
        with pytest.raises(InvalidInput, match="the id of a batch is a whole number from 1 up"):
            ask(conn, batch_id)


def test_what_is_no_status_and_no_limit_is_refused(conn: Conn) -> None:
    with pytest.raises(InvalidInput, match=r"status is one of waiting, .*, not 'pending'"):
        batchq.list_batches(conn, status="pending")
    for limit in (0, 10_001, "7", True):
        with pytest.raises(InvalidInput, match="limit is a whole number from 1 to 10,000"):
            batchq.list_batches(conn, limit=limit)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="is not a connection that batchq"):
        batchq.get(5, 1)
    with pytest.raises(InvalidInput, match="_async"):
        asyncio.run(batchq.get_async(conn, 1))


def test_a_refusal_of_the_database_has_its_message(conn: Conn) -> None:
    done = rows.finished(conn)
    with pytest.raises(psycopg.errors.RaiseException, match="nothing in it is left to retry"):
        batchq.retry(conn, done)
    assert batchq.retry(conn, done, whole=True) == "pending"


def test_a_batch_that_python_cannot_read_is_refused(conn: Conn) -> None:
    conn.execute("INSERT INTO batchq.batches (kind, payload) VALUES ('work', (repeat('9', 5000))::jsonb)")
    batch_id = values(conn, "SELECT max(id) FROM batchq.all_batches")[0]
    with pytest.raises(InvalidInput, match="the batch cannot be read in Python: ValueError: Exceeds the limit"):
        batchq.get(conn, batch_id)


def test_viewers_may_read_and_wait_and_operators_may_steer(admin_dsn: str, conn: Conn) -> None:
    done, live = rows.finished(conn), put(conn, "work")
    with role_for(admin_dsn, "viewer") as dsn, psycopg.connect(dsn, autocommit=True) as viewer:
        assert [info.id for info in batchq.list_batches(viewer)] == [live, done]
        assert batchq.get(viewer, live) is not None
        assert batchq.wait(dsn, done).is_final
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            batchq.cancel(viewer, live)
    with role_for(admin_dsn, "operator") as dsn, psycopg.connect(dsn, autocommit=True) as operator:
        assert batchq.cancel(operator, live) == "cancelled"
        assert batchq.retry(operator, live) == "pending"


USES = "import batchq; batchq.App(); import batchq.retry; from batchq.retry import Backoff; batchq.retry.__call__"


def test_the_function_retry_is_not_replaced_by_the_module_of_that_name() -> None:
    subprocess.run([sys.executable, "-c", USES], check=True)


def test_verbs_are_in_the_callers_transaction(dsn: str, conn: Conn) -> None:
    batch_id = put(conn, "work")
    with psycopg.connect(dsn, prepare_threshold=None) as theirs:
        assert batchq.cancel(theirs, batch_id) == "cancelled"
        theirs.rollback()
    assert values(conn, "SELECT status FROM batchq.all_batches") == ["pending"]


# --------------------------------------------------------------------------------------------------------------- wait


def wait(style: str, conn_or_dsn: Any, batch_id: int, timeout_seconds: float | None = None) -> batchq.BatchInfo:
    """Wait with a DSN in either style."""
    if style == "def":
        return batchq.wait(conn_or_dsn, batch_id, timeout_seconds=timeout_seconds)
    return asyncio.run(batchq.wait_async(conn_or_dsn, batch_id, timeout_seconds=timeout_seconds))


@both_styles
def test_wait_returns_when_the_batch_has_ended(dsn: str, conn: Conn, style: str) -> None:
    app = batchq.App()
    register(app, "def", "work", lambda batch: time.sleep(0.3) or batch.payload * 2)
    with running_worker(app, dsn):
        info = wait(style, dsn, put(conn, "work", 21), timeout_seconds=20)
    assert (info.status, info.result) == ("completed", 42)


@both_styles
def test_wait_says_the_status_when_its_time_is_over(dsn: str, conn: Conn, style: str) -> None:
    batch_id = put(conn, "work")
    before = time.monotonic()
    with pytest.raises(TimeoutError, match=f"batch {batch_id} has not ended within 0.3 s; its status is ready"):
        wait(style, dsn, batch_id, timeout_seconds=0.3)
    assert 0.3 <= time.monotonic() - before < 3


@both_styles
def test_wait_for_a_batch_that_is_not_there(dsn: str, conn: Conn, style: str) -> None:
    with pytest.raises(LookupError, match="there is no batch 999; it was not committed, or"):
        wait(style, dsn, 999)
    batch_id = put(conn, "work")
    thread = threading.Timer(0.3, lambda: conn.execute("DELETE FROM batchq.batches WHERE id = %s", [batch_id]))
    thread.start()
    with pytest.raises(LookupError, match=f"there is no batch {batch_id}; it was ready before"):
        wait(style, dsn, batch_id)
    thread.join()


@both_styles
def test_wait_outlasts_a_lost_connection(dsn: str, admin_dsn: str, conn: Conn, style: str) -> None:
    batch_id = put(conn, "work")
    ended: list[batchq.BatchInfo] = []
    thread = threading.Thread(target=lambda: ended.append(wait(style, dsn, batch_id, 20)))
    thread.start()
    kill = """SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
              WHERE pid <> pg_backend_pid() AND datname = current_database()"""
    wait_until(lambda: values(conn, kill)[0] > 0, 10, "a connection to end")
    with psycopg.connect(admin_dsn, autocommit=True) as direct:  # a pooler may still have connections that have ended
        batchq.cancel(direct, batch_id)
    thread.join(20)
    assert [info.status for info in ended] == ["cancelled"]


@both_styles
def test_wait_with_a_dsn_that_will_not_do_says_so(style: str) -> None:
    with pytest.raises(psycopg.OperationalError, match="cannot connect"):
        wait(style, f"host=127.0.0.1 port={free_port()} dbname=none user=nobody", 1)


@every_connection
def test_no_transaction_is_open_while_wait_waits(
    admin_dsn: str, conn: Conn, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = put(conn, "work")
    states: list[str] = []
    sleep = time.sleep
    query = """SELECT state FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = current_database()
               AND backend_type = 'client backend'"""

    def look_and_sleep(seconds: float) -> None:
        states.extend(values(conn, query))
        sleep(seconds)

    with SYNC[driver](admin_dsn) as theirs:
        monkeypatch.setattr(time, "sleep", look_and_sleep)
        with pytest.raises(TimeoutError):
            batchq.wait(theirs, batch_id, timeout_seconds=0.3)
        monkeypatch.undo()
    assert len(states) >= 3
    assert set(states) == {"idle"}


@every_connection
def test_wait_refuses_a_connection_within_a_transaction(admin_dsn: str, conn: Conn, driver: str) -> None:
    batch_id = rows.finished(conn)
    if driver == "psycopg autocommit":
        with psycopg.connect(admin_dsn, autocommit=True) as theirs, theirs.transaction():
            refused(batchq.wait, theirs, batch_id)
        return
    with SYNC[driver](admin_dsn) as theirs:
        if driver == "Django":
            theirs.set_autocommit(False)
        batchq.get(theirs, batch_id)
        refused(batchq.wait, theirs, batch_id)
        theirs.rollback()
        if driver == "Django":
            theirs.set_autocommit(True)
        assert batchq.wait(theirs, batch_id).status == "completed"


def refused(ask: Callable[[Any, int], Any], conn: Any, batch_id: int) -> None:
    """Check that a wait is refused."""
    with pytest.raises(InvalidInput, match="would keep this connection's transaction open; commit before the call, or"):
        ask(conn, batch_id)


@every_async_connection
def test_an_async_wait_refuses_one_as_well(admin_dsn: str, conn: Conn, driver: str) -> None:
    batch_id = rows.finished(conn)

    async def use() -> None:
        async with ASYNC[driver](admin_dsn) as theirs:
            begun: Awaitable[Any] | None = None
            if isinstance(theirs, asyncpg.Connection):
                begun = theirs.execute("BEGIN")
                await begun
            await batchq.get_async(theirs, batch_id)
            with pytest.raises(InvalidInput, match="would keep this connection's transaction open"):
                await batchq.wait_async(theirs, batch_id)
            await (theirs.execute("ROLLBACK") if begun is not None else theirs.rollback())
            assert (await batchq.wait_async(theirs, batch_id)).status == "completed"

    asyncio.run(use())


def test_a_session_keeps_what_it_has_loaded(admin_dsn: str, conn: Conn) -> None:
    batch_id = rows.finished(conn)
    with engine(admin_dsn, "psycopg") as made, Session(made, expire_on_commit=False) as session:
        base = sqlalchemy.orm.declarative_base()

        class Thing(base):  # type: ignore[misc, valid-type]
            __tablename__ = "things"
            id = sqlalchemy.Column(sqlalchemy.Integer, primary_key=True)

        base.metadata.create_all(made)
        thing = Thing(id=1)
        session.add(thing)
        session.commit()
        batchq.wait(session, batch_id)
        assert sqlalchemy.inspect(thing).expired is False


if __name__ == "__main__":
    run_alone(__file__)
