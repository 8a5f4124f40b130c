"""batch.complete_in and chunk.commit_in: rows of an ORM and the state of the batch commit together, or not at all.

Workers take the way to the database that is under test. ORMs go straight: they set their session's state themselves.
"""

import threading
from collections.abc import Callable
from typing import Any

import asyncpg
import django
import django.conf
import django.db
import psycopg
import pytest
from sqlalchemy import create_engine, pool, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import batchq
from batchq.testing import running_worker
from tests.support.alone import run_alone
from tests.support.batches import await_status, drain, look, put, values
from tests.support.steps import step

AT_ONCE = batchq.Backoff(0, 0)
ROWS = "SELECT item FROM done ORDER BY item"


class Base(DeclarativeBase):
    """The tables of the application."""


class Done(Base):
    """A row that a handler writes."""

    __tablename__ = "done"
    id: Mapped[int] = mapped_column(primary_key=True)
    batch_id: Mapped[int]
    item: Mapped[int]


@pytest.fixture(autouse=True)
def table(conn: psycopg.Connection) -> None:
    """Make the table. Nothing in it forbids a second row: the fence does."""
    conn.execute("CREATE TABLE done (id serial PRIMARY KEY, batch_id bigint NOT NULL, item integer NOT NULL)")


def engine_of(dsn: str, driver: str = "psycopg") -> Any:
    """Return an engine that keeps no connection."""
    return create_engine(f"postgresql+{driver}://", creator=_creator(dsn, driver), poolclass=pool.NullPool)


def _creator(dsn: str, driver: str) -> Callable[[], Any]:
    if driver == "psycopg2":
        import psycopg2

        return lambda: psycopg2.connect(dsn)
    return lambda: psycopg.connect(dsn, prepare_threshold=None)


def async_engine_of(dsn: str) -> Any:
    """Return an async engine on asyncpg that keeps no connection, and no prepared statements, for poolers."""
    options = asyncpg_options(dsn)
    return create_async_engine(
        "postgresql+asyncpg://",
        async_creator=lambda **_: asyncpg.connect(**options, statement_cache_size=0),
        poolclass=pool.NullPool,
    )


def asyncpg_options(dsn: str) -> dict[str, Any]:
    """Return what asyncpg connects with."""
    parts = psycopg.conninfo.conninfo_to_dict(dsn)
    names = {"host": "host", "port": "port", "user": "user", "password": "password", "dbname": "database"}
    return {names[name]: value for name, value in parts.items() if name in names}


# --------------------------------------------------------------------------------------------------------- SQLAlchemy


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_rows_of_a_session_and_the_completion_commit_together(
    dsn: str, admin_dsn: str, conn: psycopg.Connection, keep: bool, driver: str
) -> None:
    app, engine = batchq.App(), engine_of(admin_dsn, driver)

    @app.handler("orm")
    def work(batch: batchq.Batch) -> str:
        with Session(engine) as session, session.begin():
            session.add(Done(batch_id=batch.id, item=1))
            batch.complete_in(session, {"rows": 1})
        return "not the result"

    batch_id = put(conn, "orm")
    drain(app, dsn, keep_completed=keep)
    assert values(conn, ROWS) == [1]
    if keep:
        assert (look(conn, batch_id).status, look(conn, batch_id).result) == ("completed", {"rows": 1})
    else:
        assert values(conn, "SELECT id FROM batchq.all_batches") == []


@pytest.mark.parametrize("keep", [True, False])
def test_the_same_with_an_async_session(dsn: str, admin_dsn: str, conn: psycopg.Connection, keep: bool) -> None:
    app = batchq.App()

    @app.handler("orm")
    async def work(batch: batchq.Batch) -> None:
        async with AsyncSession(async_engine_of(admin_dsn)) as session, session.begin():
            session.add(Done(batch_id=batch.id, item=1))
            await batch.complete_in_async(session, ["äé", None])

    batch_id = put(conn, "orm")
    drain(app, dsn, keep_completed=keep)
    assert values(conn, ROWS) == [1]
    if keep:
        assert (look(conn, batch_id).status, look(conn, batch_id).result) == ("completed", ["äé", None])
    else:
        assert values(conn, "SELECT id FROM batchq.all_batches") == []


@pytest.mark.parametrize("rolls_back", [True, False])
def test_an_attempt_whose_transaction_does_not_commit_has_failed(
    dsn: str, admin_dsn: str, conn: psycopg.Connection, rolls_back: bool
) -> None:
    app, engine = batchq.App(), engine_of(admin_dsn)
    first = Session(engine)
    closer = threading.Timer(0.5, first.close)

    @app.handler("orm", backoff=AT_ONCE)
    def work(batch: batchq.Batch) -> None:
        session = first if batch.attempt == 1 else Session(engine)
        session.add(Done(batch_id=batch.id, item=batch.attempt))
        batch.complete_in(session)
        if batch.attempt == 2:
            session.commit()
            session.close()
        elif rolls_back:
            session.rollback()
        else:
            closer.start()

    batch_id = put(conn, "orm")
    drain(app, dsn)
    found = look(conn, batch_id)
    assert (found.status, values(conn, ROWS)) == ("completed", [2])
    assert "was rolled back or is still open" in found.errors[0]["error"]


def test_an_error_after_complete_in_rolls_back_both_and_one_after_the_commit_neither(
    dsn: str, admin_dsn: str, conn: psycopg.Connection
) -> None:
    app, engine = batchq.App(), engine_of(admin_dsn)

    @app.handler("orm", backoff=AT_ONCE)
    def work(batch: batchq.Batch) -> None:
        with Session(engine) as session, session.begin():
            session.add(Done(batch_id=batch.id, item=batch.attempt))
            batch.complete_in(session)
            if batch.attempt == 1:
                raise ValueError("inside")
        raise ValueError("after the commit")

    batch_id = put(conn, "orm")
    drain(app, dsn)
    found = look(conn, batch_id)
    assert (found.status, found.attempt, values(conn, ROWS)) == ("completed", 2, [2])
    assert [error["error"] for error in found.errors] == ["ValueError: inside"]


def test_a_handler_may_try_its_transaction_again(dsn: str, admin_dsn: str, conn: psycopg.Connection) -> None:
    app, engine, again = batchq.App(), engine_of(admin_dsn), []

    @app.handler("orm", backoff=AT_ONCE)
    def work(batch: batchq.Batch) -> None:
        for turn in range(3):
            with Session(engine) as session:
                session.add(Done(batch_id=batch.id, item=turn))
                try:
                    batch.complete_in(session)
                except RuntimeError as error:
                    again.append(str(error))
                    continue
                session.rollback() if turn == 0 else session.commit()

    batch_id = put(conn, "orm")
    drain(app, dsn)
    assert (look(conn, batch_id).status, values(conn, ROWS)) == ("completed", [1])
    assert "was completed in" in again[0]


def test_a_lost_claim_raises_and_nothing_commits(dsn: str, admin_dsn: str, conn: psycopg.Connection) -> None:
    app, engine, raised = batchq.App(), engine_of(admin_dsn), []

    @app.handler("orm")
    def work(batch: batchq.Batch) -> None:
        conn.execute("SELECT batchq.cancel(%s)", [batch.id])
        try:
            with Session(engine) as session, session.begin():
                session.add(Done(batch_id=batch.id, item=1))
                session.flush()
                batch.complete_in(session)
        except batchq.LeaseLost as error:
            raised.append(error)
            raise

    batch_id = put(conn, "orm")
    drain(app, dsn)
    assert (look(conn, batch_id).status, values(conn, ROWS), len(raised)) == ("cancelled", [], 1)


# -------------------------------------------------------------------------------------------------------- other kinds


def test_django_with_atomic_and_without(dsn: str, admin_dsn: str, conn: psycopg.Connection) -> None:
    parts = psycopg.conninfo.conninfo_to_dict(admin_dsn)
    if not django.conf.settings.configured:
        django.conf.settings.configure()
    django.setup()
    names = {"HOST": "host", "PORT": "port", "USER": "user", "PASSWORD": "password", "NAME": "dbname"}
    options = {name: parts.get(key, "") for name, key in names.items()}
    connections = django.db.utils.ConnectionHandler({"default": {"ENGINE": "django.db.backends.postgresql"} | options})
    app, refused = batchq.App(), []

    @app.handler("orm")
    def work(batch: batchq.Batch) -> None:
        own = connections["default"]
        try:
            batch.complete_in(own)
        except batchq.InvalidInput as error:
            refused.append(str(error))
        own.set_autocommit(False)
        with own.cursor() as cursor:
            cursor.execute("INSERT INTO done (batch_id, item) VALUES (%s, 1)", [batch.id])
        batch.complete_in(own)
        own.commit()
        own.close()

    batch_id = put(conn, "orm")
    drain(app, dsn)
    assert (look(conn, batch_id).status, values(conn, ROWS)) == ("completed", [1])
    assert "has no transaction open" in refused[0]


def test_asyncpg_and_psycopg(dsn: str, admin_dsn: str, conn: psycopg.Connection) -> None:
    app = batchq.App()

    @app.handler("asyncpg")
    async def with_asyncpg(batch: batchq.Batch) -> None:
        own = await asyncpg.connect(**asyncpg_options(admin_dsn), statement_cache_size=0)
        async with own.transaction():
            await own.execute("INSERT INTO done (batch_id, item) VALUES ($1, 1)", batch.id)
            await batch.complete_in_async(own, {"n": 1})
        await own.close()

    @app.handler("psycopg")
    def with_psycopg(batch: batchq.Batch) -> None:
        with psycopg.connect(dsn, prepare_threshold=None) as own:
            own.execute("INSERT INTO done (batch_id, item) VALUES (%s, 2)", [batch.id])
            batch.complete_in(own, {"n": 2})

    @app.handler("psycopg async")
    async def with_psycopg_async(batch: batchq.Batch) -> None:
        async with await psycopg.AsyncConnection.connect(dsn, prepare_threshold=None) as own:
            await own.execute("INSERT INTO done (batch_id, item) VALUES (%s, 3)", [batch.id])
            await batch.complete_in_async(own, {"n": 3})

    ids = [put(conn, kind) for kind in ("asyncpg", "psycopg", "psycopg async")]
    drain(app, dsn)
    assert [look(conn, one).result for one in ids] == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert values(conn, ROWS) == [1, 2, 3]


@pytest.mark.parametrize(
    ("error", "status"),
    [(batchq.Cancel("enough"), "cancelled"), (batchq.InvalidInput("no"), "failed"), (batchq.Snooze(3600), "pending")],
)
def test_what_a_handler_raises_because_of_a_conflict_counts_not_the_conflict(
    dsn: str, conn: psycopg.Connection, error: Exception, status: str
) -> None:
    app, calls = batchq.App(), []

    @app.handler("work")
    def work(batch: batchq.Batch) -> None:
        calls.append(batch.attempt)
        raise error from psycopg.errors.DeadlockDetected()

    batch_id = put(conn, "work")
    drain(app, dsn)
    assert (look(conn, batch_id).status, len(calls)) == (status, 1)
    late = values(conn, "SELECT run_at > now() + interval '30 minutes' FROM batchq.batches")
    assert late == [isinstance(error, batchq.Snooze)]


CONFLICT = "DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = 'serialization_failure'; END $$"


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "async", "asyncpg"])
def test_a_conflict_is_one_whatever_driver_raises_it(
    dsn: str, admin_dsn: str, conn: psycopg.Connection, driver: str
) -> None:
    app, calls = batchq.App(), []

    async def in_a_session() -> None:
        async with AsyncSession(async_engine_of(admin_dsn)) as session, session.begin():
            await session.execute(text(CONFLICT))

    async def with_asyncpg() -> None:
        own = await asyncpg.connect(**asyncpg_options(admin_dsn), statement_cache_size=0)
        try:
            await own.execute(CONFLICT)
        finally:
            await own.close()

    @app.handler("def")
    def work(batch: batchq.Batch) -> None:
        calls.append(batch.attempt)
        if len(calls) == 1:
            with Session(engine_of(admin_dsn, driver)) as session, session.begin():
                session.execute(text(CONFLICT))

    @app.handler("async def")
    async def work_async(batch: batchq.Batch) -> None:
        calls.append(batch.attempt)
        if len(calls) == 1:
            await (in_a_session() if driver == "async" else with_asyncpg())

    batch_id = put(conn, "async def" if driver.startswith("async") else "def")
    with running_worker(app, dsn):
        await_status(conn, batch_id, "completed")
    assert calls == [1, 1], "a conflict does not count the attempt"


# ------------------------------------------------------------------------------------------------------------- chunks


def test_chunks_commit_with_the_rows_of_a_session(dsn: str, admin_dsn: str, conn: psycopg.Connection) -> None:
    app, engine, tried = batchq.App(), engine_of(admin_dsn), []

    @app.handler("orm", backoff=AT_ONCE)
    def work(batch: batchq.Batch) -> None:
        for chunk in batch.chunks(2):
            tried.append((batch.attempt, list(chunk.items)))
            with Session(engine) as session:
                session.add_all([Done(batch_id=batch.id, item=item) for item in chunk.items])
                chunk.commit_in(session)
                session.rollback() if (batch.attempt, chunk.items[0]) == (1, 2) else session.commit()

    batch_id = put(conn, "orm", items=list(range(5)))
    drain(app, dsn)
    found = look(conn, batch_id)
    assert (found.status, found.items_done, values(conn, ROWS)) == ("completed", 5, [0, 1, 2, 3, 4])
    assert "was rolled back or is still open" in found.errors[0]["error"]
    step("the second attempt continues from the last checkpoint that was committed")
    assert tried == [(1, [0, 1]), (1, [2, 3]), (2, [2, 3]), (2, [4])]


@pytest.mark.parametrize("commits", [True, False])
def test_failed_items_of_a_chunk_run_again(dsn: str, admin_dsn: str, conn: psycopg.Connection, commits: bool) -> None:
    app, tried = batchq.App(), []

    @app.handler("orm", backoff=AT_ONCE)
    async def work(batch: batchq.Batch) -> None:
        async with AsyncSession(async_engine_of(admin_dsn)) as session:
            async for chunk in batch.chunks(2):
                tried.append((batch.attempt, list(chunk.items)))
                for position, item in enumerate(chunk.items):
                    if item == 1 and batch.attempt < 3:
                        chunk.fail(position, ValueError("not yet"))
                    else:
                        session.add(Done(batch_id=batch.id, item=item))
                await chunk.commit_in_async(session)
                if batch.attempt == 2 and not commits:
                    await session.rollback()
                else:
                    await session.commit()

    batch_id = put(conn, "orm", items=[0, 1, 2])
    drain(app, dsn)
    found = look(conn, batch_id)
    assert (found.status, found.items_done, values(conn, ROWS)) == ("completed", 3, [0, 1, 2])
    assert tried == [(1, [0, 1]), (1, [2]), (2, [1]), (3, [1])]
    errors = [error["error"] for error in found.errors]
    assert errors[0] == "1 of 3 items failed; the first: ValueError: not yet"
    assert ("was rolled back" in errors[1]) is not commits


def test_complete_in_refuses_what_would_lose_items_or_commit_apart(
    dsn: str, admin_dsn: str, conn: psycopg.Connection
) -> None:
    app, engine, refused = batchq.App(), engine_of(admin_dsn), []
    apart = engine.execution_options(isolation_level="AUTOCOMMIT")

    @app.handler("orm")
    def work(batch: batchq.Batch) -> None:
        with Session(engine) as session:
            for call in (
                lambda: batch.complete_in(session),
                lambda: batch.complete_in(apart.connect()),
                lambda: batch.complete_in(object()),
                lambda: batch.complete_in(session, float("nan")),
            ):
                try:
                    call()
                except batchq.InvalidInput as error:
                    refused.append(str(error))
                for chunk in batch.chunks():
                    chunk.commit()

    batch_id = put(conn, "orm", items=[1, 2])
    drain(app, dsn)
    assert look(conn, batch_id).status == "completed"
    assert "0 of 2 were processed" in refused[0]
    assert "no transaction open" in refused[1]
    assert "is not a connection that batchq takes" in refused[2]
    assert "cannot be stored as JSON" in refused[3]


def test_a_statement_of_raw_sql_in_the_same_transaction(dsn: str, admin_dsn: str, conn: psycopg.Connection) -> None:
    app, engine = batchq.App(), engine_of(admin_dsn)

    @app.handler("orm")
    def work(batch: batchq.Batch) -> None:
        with engine.begin() as own:
            own.execute(text("INSERT INTO done (batch_id, item) VALUES (:id, 7)"), {"id": batch.id})
            batch.complete_in(own)

    put(conn, "orm")
    drain(app, dsn)
    assert values(conn, ROWS) == [7]


if __name__ == "__main__":
    run_alone(__file__)
