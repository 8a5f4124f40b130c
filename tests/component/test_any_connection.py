"""Enqueue on any connection: in its transaction, by its own driver, the same whatever the connection is."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import asyncpg
import django.db
import psycopg
import psycopg2
import psycopg_pool
import pytest
import sqlalchemy
from django.db import transaction
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import orm
from sqlalchemy.ext import asyncio as sqlalchemy_asyncio

import batchq
from batchq.errors import InvalidInput
from batchq.postgres import drivers
from batchq.postgres.drivers import ACCEPTED
from tests.component.rows import Conn, batch, value, values
from tests.support.alone import run_alone
from tests.support.callers import (
    CALLERS,
    WITHOUT_COPY,
    Caller,
    django_databases,
    engine_arguments,
    psycopg_async_caller,
    psycopg_caller,
    sqlalchemy_async_caller,
)  # fmt: skip
from tests.support.roles import role_for
from tests.support.steps import step

COUNT = "SELECT count(*) FROM batchq.all_batches"
LATER = datetime(2090, 1, 1, 12, 0, 0, 123456, tzinfo=timezone(timedelta(hours=2)))
# Text that a driver would misread if it were put into a statement, or encoded twice.
ODD = {"%(kind)s %s %% :name $1 \\ ' \" \t\n": ["é👩🏽‍🚀", None, True, 1.5, 2**70, {}, "\\N", "\\u0000"]}
SHARED: dict[str, Any] = {
    "queue": "mail %s :x",
    "key": "customer ' 1",
    "priority": -3,
    "run_at": LATER,
    "max_attempts": 2,
    "max_failed_items": 2**31 - 1,
    "timeout_seconds": 30,
    "on_failure": "run",
}


@pytest.fixture(params=CALLERS)
def caller(request: pytest.FixtureRequest, admin_dsn: str) -> Iterator[Caller]:
    """Return a caller of each kind. Not through a pooler: other drivers set their session's state by themselves."""
    with CALLERS[request.param](admin_dsn) as caller:
        yield caller


def ids(conn: Conn) -> list[int]:
    """Return the ids of all batches, in order."""
    return values(conn, "SELECT id FROM batchq.all_batches ORDER BY id")


# ------------------------------------------------------------------------------------------------------ what is stored


def test_every_option_reaches_its_column(conn: Conn, caller: Caller) -> None:
    needed = caller.enqueue("needed")
    assert needed == ids_seen_by(caller)[0]
    options = SHARED | {"after": [needed]}
    one = caller.enqueue("work", ODD, items=[ODD, 2], unique_key="k", spread=3, **options)
    assert caller.many("work", items=[ODD, 2], payload=ODD, spread=3, **options) == 1
    assert caller.many("work", [ODD], **options | {"key": lambda _: "of a payload"}) == 1
    each = caller.each("work", [ODD, None], **options)
    caller.commit()
    found = [batch(conn, batch_id) for batch_id in ids(conn)[1:]]
    assert [row["id"] for row in found][:1] == [one]
    assert [row["id"] for row in found][3:] == each
    for row in found:
        expected = options | {"kind": "work", "payload": ODD, "status": "waiting"}
        expected |= {"payload": {}} if row["id"] == each[1] else {}
        expected |= {"key": "of a payload"} if row == found[2] else {}
        assert {name: row[name] for name in expected} == expected
    assert [row["items"] for row in found] == [[ODD, 2], [ODD, 2], None, None, None]
    assert [row["spread"] for row in found] == [3, 3, None, None, None]
    assert [row["unique_key"] for row in found] == ["k", None, None, None, None]


def ids_seen_by(caller: Caller) -> list[Any]:
    """Return the ids that the caller sees in its transaction."""
    statement = ("SELECT id FROM batchq.all_batches ORDER BY id", {})
    rows = caller.call(drivers.run_async(caller.conn, statement) if caller.is_async else same(caller, statement))
    return [batch_id for (batch_id,) in rows]


def same(caller: Caller, statement: Any) -> Any:
    """Run a statement as `drivers.run` does."""
    return drivers.run(caller.conn, statement)


def test_defaults_and_delays_are_those_of_the_table(conn: Conn, caller: Caller) -> None:
    caller.enqueue("a")
    caller.many("a", [None])
    caller.each("a", [None])
    caller.enqueue("b", delay_seconds=90)
    caller.many("b", [None], delay_seconds=90)
    caller.each("b", [None], delay_seconds=90)
    caller.commit()
    rows = [batch(conn, batch_id) for batch_id in ids(conn)]
    delays = [(row.pop("run_at") - row.pop("created_at")).total_seconds() for row in rows]
    assert delays == [0, 0, 0, 90, 90, 90]
    assert len({str(sorted((row | {"id": 0, "kind": ""}).items())) for row in rows}) == 1


@pytest.mark.parametrize("name", ["psycopg", "sqlalchemy pg8000", "django", "sqlalchemy asyncpg", "asyncpg"])
def test_many_over_a_few_hundred_are_all_stored_in_order(conn: Conn, admin_dsn: str, name: str) -> None:
    with CALLERS[name](admin_dsn) as caller:
        assert caller.many("many", ({"n": n} for n in range(250))) == 250
        each = caller.each("each", ({"n": n} for n in range(250)))
        assert caller.many("none", []) == 0
        assert caller.each("none", []) == []
        caller.commit()
    numbers = "SELECT (payload ->> 'n')::integer FROM batchq.all_batches WHERE kind = '{}' ORDER BY id"
    assert values(conn, numbers.format("many")) == values(conn, numbers.format("each")) == [*range(250)]
    assert values(conn, "SELECT id FROM batchq.all_batches WHERE kind = 'each' ORDER BY id") == each


@pytest.mark.parametrize("name", ["sqlalchemy psycopg2", "asyncpg"])
def test_batches_that_are_large_together_are_inserted_in_several_statements(
    conn: Conn, admin_dsn: str, name: str
) -> None:
    large = "x" * 3_900_000
    with CALLERS[name](admin_dsn) as caller:
        assert len(caller.each("large", [large] * 5)) == 5
        assert caller.many("large", items=[large] * 5, items_per_batch=4) == 2
        caller.commit()
    assert value(conn, f"{COUNT} WHERE length(payload #>> '{{}}') = 3900000") == 5


@pytest.mark.parametrize("name", CALLERS)
def test_many_are_copied_where_the_driver_can(conn: Conn, admin_dsn: str, name: str) -> None:
    conn.execute(
        "CREATE TABLE public.seen (query text);"
        "CREATE FUNCTION public.see() RETURNS trigger LANGUAGE plpgsql AS"
        " $$BEGIN INSERT INTO public.seen VALUES (split_part(ltrim(current_query()), ' ', 1)); RETURN NULL; END$$;"
        "CREATE TRIGGER see AFTER INSERT ON batchq.batches FOR EACH STATEMENT EXECUTE FUNCTION public.see()"
    )
    with CALLERS[name](admin_dsn) as caller:
        caller.many("work", range(3))
        caller.commit()
    expected = "INSERT" if name in WITHOUT_COPY else "COPY"
    assert {query.strip().split("\n")[0] for query in values(conn, "SELECT query FROM public.seen")} == {expected}


@pytest.mark.parametrize("name", ["sqlalchemy psycopg", "django", "psycopg async", "asyncpg", "sqlalchemy asyncpg"])
def test_many_are_inserted_where_row_security_forbids_copy(conn: Conn, admin_dsn: str, name: str) -> None:
    conn.execute(
        "ALTER TABLE batchq.batches ENABLE ROW LEVEL SECURITY;"
        "CREATE POLICY own ON batchq.batches USING (queue = 'own') WITH CHECK (queue = 'own')"
    )
    with role_for(admin_dsn, "producer") as dsn:
        admin_role = conninfo_to_dict(dsn)["user"]
        conn.execute(f'GRANT SELECT ON batchq.batches TO "{admin_role}"'.encode())
        with CALLERS[name](dsn) as caller:
            assert caller.many("work", range(150), queue="own") == 150
            with pytest.raises(Exception, match="row-level security policy"):
                caller.many("work", [1])
            caller.commit()
    assert value(conn, COUNT) == 150


def test_json_is_encoded_once_where_the_connection_has_codecs_for_it(conn: Conn, admin_dsn: str) -> None:
    async def enqueue() -> None:
        caller = await asyncpg.connect(**engine_arguments("asyncpg", admin_dsn)["connect_args"])
        for name in ("json", "jsonb"):
            await caller.set_type_codec(name, encoder=json.dumps, decoder=json.loads, schema="pg_catalog")
        await batchq.enqueue_async(caller, "work", ODD, items=[ODD])
        await batchq.enqueue_each_async(caller, "work", [ODD])
        await batchq.enqueue_many_async(caller, "work", [ODD])
        await caller.close()

    asyncio.run(enqueue())
    assert [batch(conn, batch_id)["payload"] for batch_id in ids(conn)] == [ODD] * 3


@pytest.mark.parametrize("parameters", [{}, {"n": 7, "text": "%s"}])
def test_a_statement_has_the_same_places_for_every_driver(caller: Caller, parameters: dict[str, Any]) -> None:
    text = "SELECT '100 %%', 7 %% 4"
    text += ", %(n)s::integer, %(text)s::text, %(n)s::integer" if parameters else ""
    expected = ("100 %", 3, 7, "%s", 7) if parameters else ("100 %", 3)
    if caller.is_async:
        assert caller.call(drivers.run_async(caller.conn, (text, parameters))) == [expected]
        assert caller.call(drivers.run_async(caller.conn, ("SET LOCAL lock_timeout = 0", {}))) == []
    else:
        assert drivers.run(caller.conn, (text, parameters)) == [expected]
        assert drivers.run(caller.conn, ("SET LOCAL lock_timeout = 0", {})) == []


# ------------------------------------------------------------------------------------------------- whose transaction


@pytest.mark.parametrize("first", ["enqueue", "many", "each"])
@pytest.mark.parametrize("commits", [True, False])
def test_batches_exist_if_and_only_if_the_caller_commits(conn: Conn, caller: Caller, first: str, commits: bool) -> None:
    """Also if the first statement of the transaction is batchq's: the connection begins by itself."""
    getattr(caller, first)("first", [1])
    caller.enqueue("next")
    caller.many("next", range(2))
    caller.each("next", range(2))
    assert value(conn, COUNT) == 0, "somebody else sees a batch before the commit"
    caller.commit() if commits else caller.rollback()
    assert value(conn, COUNT) == (6 if commits else 0)


def test_a_live_unique_key_gives_none_and_leaves_the_transaction_alive(conn: Conn, caller: Caller) -> None:
    batchq.enqueue(conn, "work", unique_key="committed")
    own = caller.enqueue("work", unique_key="own")
    assert own is not None
    assert caller.enqueue("work", unique_key="own") is None
    assert caller.enqueue("work", unique_key="committed") is None
    assert caller.enqueue("work", unique_key="other") is not None
    caller.commit()
    assert value(conn, COUNT) == 3


def test_batches_wait_for_those_of_the_same_transaction(conn: Conn, caller: Caller) -> None:
    parts = caller.each("part", range(3))
    caller.enqueue("end", after=parts)
    caller.many("end", [None], after=parts)
    caller.commit()
    assert values(conn, "SELECT DISTINCT needs_left FROM batchq.all_batches WHERE kind = 'end'") == [3]
    assert value(conn, f"{COUNT} WHERE is_needed") == 3


def test_ids_may_be_bigger_than_an_integer(conn: Conn, caller: Caller) -> None:
    conn.execute("ALTER TABLE batchq.batches ALTER COLUMN id RESTART WITH 5000000000")
    needed = caller.enqueue("needed")
    assert needed == 5_000_000_000
    assert caller.each("work", [1], after=[needed]) == [needed + 1]
    assert caller.many("work", [1], after=[needed]) == 1
    with pytest.raises(Exception, match="batches_after_exist"):
        caller.enqueue("work", after=[2**62])
    caller.rollback()


def test_many_that_fails_inserts_nothing_and_keeps_what_the_caller_did(conn: Conn, caller: Caller) -> None:
    def payloads() -> Iterator[int]:
        yield from range(150)
        raise OSError("the source is gone")

    caller.enqueue("before")
    with pytest.raises(OSError, match="the source is gone"):
        caller.many("work", payloads())
    with pytest.raises(Exception, match="batches_max_attempts_is_positive"):
        caller.many("work", [1], max_attempts=0)
    caller.enqueue("after")
    caller.commit()
    assert values(conn, "SELECT kind FROM batchq.all_batches ORDER BY id") == ["before", "after"]


def test_what_the_table_refuses_ends_the_transaction_as_any_statement_of_the_caller_would(
    conn: Conn, caller: Caller
) -> None:
    caller.enqueue("before")
    with pytest.raises(Exception, match="batches_max_attempts_is_positive"):
        caller.enqueue("work", max_attempts=0)
    with pytest.raises(Exception, match="current transaction is aborted"):
        caller.execute("SELECT 1")
    caller.rollback()
    assert value(conn, COUNT) == 0


def test_what_is_no_batch_is_refused_before_the_database(conn: Conn, caller: Caller) -> None:
    for call, options, message in (
        (caller.enqueue, {"payload": {1, 2}}, "set is not JSON serializable"),
        (caller.enqueue, {"run_at": datetime(2030, 1, 1)}, "run_at must be a datetime with a time zone"),
        (caller.enqueue, {"queue": "a\0b"}, "queue has a NUL"),
        (caller.many, {"payloads": [1], "priority": True}, "priority must be a whole number, not True"),
        (caller.many, {"payloads": [1, "\ud800"]}, "cannot be stored as JSON"),
        (caller.many, {}, "either payloads or items"),
        (caller.many, {"payloads": [1], "unique_key": "k"}, "enqueue_many has no unique_key"),
        (caller.each, {"payloads": "text"}, "payloads must be a list or a generator"),
        (caller.each, {"payloads": [1], "unique_key": "k"}, "enqueue_each has no unique_key"),
    ):
        with pytest.raises(InvalidInput, match=message):
            call("work", **options)
    for call, options, unknown in (
        (caller.enqueue, {"qeue": "mail"}, "qeue"),
        (caller.many, {"payloads": [1], "qeue": "mail"}, "qeue"),
        (caller.each, {"payloads": [1], "items": [1]}, "items"),
    ):
        with pytest.raises(TypeError, match=unknown):
            call("work", **options)
    caller.enqueue("alive")
    caller.commit()
    assert value(conn, COUNT) == 1


def test_the_trace_of_the_caller_travels_with_the_batch(
    conn: Conn, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracer = TracerProvider().get_tracer("test")
    monkeypatch.setattr(trace, "get_tracer", lambda *_: tracer)
    with tracer.start_as_current_span("request") as span:
        caller.enqueue("work")
        caller.many("work", [1])
        caller.each("work", [1])
    caller.commit()
    found = values(conn, "SELECT split_part(trace_context, '-', 2) FROM batchq.all_batches")
    assert found == [f"{span.get_span_context().trace_id:032x}"] * 3


# ------------------------------------------------------------------------------------------------------- autocommit


def all_three(conn: Any) -> None:
    """Enqueue once, then many and each that fail, then many and each, on a connection that commits by itself."""
    batchq.enqueue(conn, "work")
    for insert in (batchq.enqueue_many, batchq.enqueue_each):
        with pytest.raises(OSError, match="gone"):
            insert(conn, "work", failing())
        insert(conn, "work", range(2), delay_seconds=1)


async def all_three_async(conn: Any) -> None:
    """Async version of `all_three`."""
    await batchq.enqueue_async(conn, "work")
    for insert in (batchq.enqueue_many_async, batchq.enqueue_each_async):
        with pytest.raises(OSError, match="gone"):
            await insert(conn, "work", failing())
        await insert(conn, "work", range(2), delay_seconds=1)


def failing() -> Iterator[int]:
    """Yield more than one block, and fail."""
    yield from range(250)
    raise OSError("gone")


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "pg8000"])
def test_with_sqlalchemys_autocommit_each_call_commits_all_or_nothing(conn: Conn, admin_dsn: str, driver: str) -> None:
    engine = sqlalchemy.create_engine(**engine_arguments(driver, admin_dsn), isolation_level="AUTOCOMMIT")
    with engine.connect() as caller:
        all_three(caller)
        caller.rollback()
    assert value(conn, COUNT) == 5


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_with_async_sqlalchemys_autocommit_each_call_commits_all_or_nothing(
    conn: Conn, admin_dsn: str, driver: str
) -> None:
    async def enqueue() -> None:
        engine = sqlalchemy_asyncio.create_async_engine(
            **engine_arguments(driver, admin_dsn), isolation_level="AUTOCOMMIT"
        )
        async with engine.connect() as caller:
            await all_three_async(caller)
            await caller.rollback()
        async with sqlalchemy_asyncio.AsyncSession(engine) as session:
            await session.run_sync(lambda session: batchq.enqueue_many(session, "in run_sync", [1]))

    asyncio.run(enqueue())
    assert value(conn, COUNT) == 6


def test_with_autocommit_of_psycopg_asyncpg_and_django_each_call_commits_all_or_nothing(
    conn: Conn, admin_dsn: str
) -> None:
    with psycopg_caller(admin_dsn, autocommit=True) as caller:
        all_three(caller.conn)
    with psycopg_async_caller(admin_dsn, autocommit=True) as caller:
        caller.call(all_three_async(caller.conn))
    assert value(conn, COUNT) == 10

    async def enqueue() -> None:
        caller = await asyncpg.connect(**engine_arguments("asyncpg", admin_dsn)["connect_args"])
        await all_three_async(caller)
        await caller.close()

    asyncio.run(enqueue())
    assert value(conn, COUNT) == 15
    with django_databases(admin_dsn, "default"):
        all_three(django.db.connection)
        assert value(conn, COUNT) == 20
        step("without Django's own transactions, its connection's")
        django.db.connection.set_autocommit(False)
        batchq.enqueue_many(django.db.connection, "work", [1])
        batchq.enqueue_each(django.db.connection, "work", [1])
        assert value(conn, COUNT) == 20
        django.db.connection.rollback()
        assert value(conn, COUNT) == 20


# ------------------------------------------------------------------------------------------------ savepoints, on_commit


def test_a_savepoint_of_the_caller_takes_its_batches_back(conn: Conn, admin_dsn: str) -> None:
    with django_databases(admin_dsn, "default"):
        ran: list[int] = []
        with transaction.atomic():
            needed = batchq.enqueue(django.db.connection, "kept")
            with transaction.atomic():
                batchq.enqueue_many(django.db.connection, "taken back", range(2))
                batchq.enqueue_each(django.db.connection, "taken back", range(2))
                transaction.set_rollback(True)
            with transaction.atomic():
                batchq.enqueue(django.db.connection, "waits", after=[needed])
            transaction.on_commit(lambda: ran.append(batchq.enqueue(django.db.connection, "on commit")))
        assert ran == ids(conn)[-1:]
    engine = sqlalchemy.create_engine(**engine_arguments("psycopg", admin_dsn))
    with orm.Session(engine) as session:
        batchq.enqueue(session, "kept")
        nested = session.begin_nested()
        batchq.enqueue_many(session, "taken back", range(2))
        nested.rollback()
        session.commit()
    assert values(conn, "SELECT kind FROM batchq.all_batches ORDER BY id") == ["kept", "waits", "on commit", "kept"]
    assert values(conn, "SELECT status FROM batchq.all_batches WHERE kind = 'waits'") == ["waiting"]


def test_a_session_is_committed_by_its_begin_block(conn: Conn, admin_dsn: str) -> None:
    engine = sqlalchemy.create_engine(**engine_arguments("pg8000", admin_dsn))
    with orm.Session(engine) as session, session.begin():
        batchq.enqueue_many(session, "work", range(3))
    with engine.begin() as connection:
        batchq.enqueue(connection, "work")
    with engine.begin() as connection:
        batchq.enqueue(connection, "work")
        connection.get_transaction().rollback()
    assert value(conn, COUNT) == 4


DJANGO_WITH_PSYCOPG2 = """
import sys
sys.modules["psycopg"] = None  # Django takes psycopg2 if it cannot import psycopg
import django
import django.db
from django.conf import settings
from django.db import transaction
given = {names!r}
settings.configure(DATABASES={{"default": {{"ENGINE": "django.db.backends.postgresql", **given}}}})
django.setup()
django.db.connection.ensure_connection()
assert type(django.db.connection.connection).__module__.startswith("psycopg2")
del sys.modules["psycopg"]
import batchq
with transaction.atomic():
    first = batchq.enqueue(django.db.connection, "work", {{"100 %": "%s"}}, priority=3, items=[1], delay_seconds=5)
    assert batchq.enqueue_many(django.db.connection, "work", range(3), after=[first]) == 3
    assert len(batchq.enqueue_each(django.db.connection, "work", range(3))) == 3
"""


def test_django_may_use_psycopg2(conn: Conn, admin_dsn: str) -> None:
    keys = {"NAME": "dbname", "USER": "user", "PASSWORD": "password", "HOST": "host", "PORT": "port"}
    given = conninfo_to_dict(admin_dsn)
    names = {name: given[key] for name, key in keys.items() if key in given}
    root = str(Path(batchq.__file__).parents[1])
    subprocess.run(
        [sys.executable, "-c", DJANGO_WITH_PSYCOPG2.format(names=names)],
        env=os.environ | {"PYTHONPATH": root},
        check=True,
        timeout=60,
    )
    assert value(conn, COUNT) == 7


# ------------------------------------------------------------------------------------------------------ what is refused


def refused(conn: Any, message: str) -> None:
    """Check that every function refuses a connection, and says what is taken."""
    for function in (batchq.enqueue, batchq.enqueue_many, batchq.enqueue_each):
        with pytest.raises(InvalidInput, match=message) as caught:
            function(conn, "work", [1])
        assert ACCEPTED in str(caught.value)


def refused_async(conn: Any, message: str) -> None:
    """Async version of `refused`."""
    for function in (batchq.enqueue_async, batchq.enqueue_many_async, batchq.enqueue_each_async):
        with pytest.raises(InvalidInput, match=message) as caught:
            asyncio.run(function(conn, "work", [1]))
        assert ACCEPTED in str(caught.value)


@pytest.mark.parametrize("check", [refused, refused_async])
def test_what_is_no_connection_is_refused_with_what_is_taken(admin_dsn: str, check: Callable[[Any, str], None]) -> None:
    check(None, "NoneType is not a connection that batchq takes")
    check("postgresql://me:secret@localhost/x", "^str is not a connection")
    arguments = engine_arguments("psycopg", admin_dsn)
    engine = sqlalchemy.create_engine(**arguments)
    check(engine, r"Engine is not a connection")
    check(sqlalchemy_asyncio.create_async_engine(**arguments), r"AsyncEngine is not a connection")
    check(orm.sessionmaker(engine), "sessionmaker is not a connection")
    check(psycopg_pool.ConnectionPool(admin_dsn, open=False), "ConnectionPool is not a connection")
    with closing(psycopg2.connect(admin_dsn)) as raw:
        check(raw, "psycopg2.extensions.connection is not a connection")
    with psycopg.connect(admin_dsn) as conn:
        check(conn.cursor(), "Cursor is not a connection")


def test_a_pool_of_asyncpg_is_refused(admin_dsn: str) -> None:
    async def enqueue() -> None:
        arguments = engine_arguments("asyncpg", admin_dsn)["connect_args"]
        async with asyncpg.create_pool(**arguments, min_size=1) as pool:
            with pytest.raises(InvalidInput, match=r"asyncpg.pool.Pool is not a connection"):
                await batchq.enqueue_async(pool, "work")  # type: ignore[arg-type]
            async with pool.acquire() as conn:
                assert await batchq.enqueue_async(conn, "work")

    asyncio.run(enqueue())


def test_a_connection_of_the_other_color_is_refused(conn: Conn, admin_dsn: str) -> None:
    refused_async(conn, "is for def code; call the function whose name does not end in _async")
    with django_databases(admin_dsn, "default"):
        refused_async(django.db.connection, "is for def code")
    engine = sqlalchemy.create_engine(**engine_arguments("psycopg", admin_dsn))
    with engine.connect() as connection, orm.Session(engine) as session:
        refused_async(connection, "Connection is for def code")
        refused_async(session, "Session is for def code")
    with psycopg_async_caller(admin_dsn) as caller:
        refused(caller.conn, "is for async def code; call the function whose name ends in _async")
    for kind in ("connection", "session", "scoped_session"):
        with sqlalchemy_async_caller(admin_dsn, "asyncpg", kind) as caller:
            refused(caller.conn, "is for async def code")


def test_another_database_is_refused(tmp_path: Path) -> None:
    engine = sqlalchemy.create_engine("sqlite://")
    with engine.connect() as connection, orm.Session(engine) as session:
        refused(connection, "batchq is in PostgreSQL, and this connection of SQLAlchemy is to sqlite")
        refused(session, "SQLAlchemy is to sqlite")
    engine.dispose()
    with django_databases("dbname=x host=x", "default"):
        django.db.connections.settings["default"] |= {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": str(tmp_path / "database"),
        }
        refused(django.db.connection, "this connection of Django is to sqlite")


if __name__ == "__main__":
    run_alone(__file__)
