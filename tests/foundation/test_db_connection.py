"""Connections: what the contract of the poolers demands of each, and how they survive what happens to them."""

import asyncio
import json
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import psycopg
import pytest
import structlog
from psycopg_pool import PoolTimeout

import batchq
from batchq.common import log
from batchq.common.secrets import hide_password
from batchq.errors import ConfigError, OutcomeUnknown
from batchq.postgres import logins, server_checks
from batchq.postgres.connections import CONNECT_OPTIONS, AsyncConnection, Connection, connect, is_lost
from batchq.postgres.deadlines import deadline
from batchq.postgres.dsn import dsn_problems
from batchq.postgres.handler_connections import POOL_OPTIONS, HandlerConnections
from batchq.postgres.link import Link
from batchq.postgres.logins import backoffs, is_login_failure
from batchq.postgres.server_checks import check_server
from batchq.postgres.statements import claims, endings, leases, probes, session
from batchq.postgres.statements.endings import Finish, Requeue
from batchq.postgres.transactions import is_read_only_error, transaction, transaction_async
from batchq.settings import Settings
from tests.support import supasim
from tests.support.alone import run_alone
from tests.support.poolers import PgBouncer
from tests.support.servers import free_port
from tests.support.steps import step
from tests.support.supasim import SupaSim
from tests.support.waiting import allowed, wait_until

Conn = psycopg.Connection[Any]
PASSWORD = "s3cr3t-w0rd"


def value(conn: Conn, query: str) -> Any:
    """Return the one value of *query*."""
    row = conn.execute(query.encode()).fetchone()
    assert row
    return row[0]


@pytest.fixture
def link(dsn: str) -> Iterator[Link]:
    """Return a link whose statements are bounded to 10 s."""
    link = Link(dsn, 10)
    yield link
    link.close()


@pytest.fixture
def handler_connections(dsn: str) -> Iterator[HandlerConnections]:
    """Return an open pool of 3 connections at most."""
    connections = HandlerConnections(dsn, 3, borrow_seconds=5, transaction_seconds=10)
    connections.open()
    yield connections
    connections.close()


@pytest.fixture
def admin(admin_dsn: str) -> Iterator[Conn]:
    """Return a superuser's connection past every pooler."""
    with psycopg.connect(admin_dsn, autocommit=True) as conn:
        yield conn


@pytest.fixture(autouse=True)
def open_gate() -> Iterator[None]:
    """Forget refused log-ins of this test."""
    yield
    backoffs.__init__()  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------------ the settings


def test_the_database_answers_and_is_new_enough(dsn: str) -> None:
    with connect(dsn) as conn:
        check_server(conn)
        number, text = session.server_version(conn)
    step("it is %s", text)
    assert number >= 150_000


def test_a_server_that_is_too_old_is_named(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_checks, "OLDEST_SERVER", 990_000)
    with connect(dsn) as conn, pytest.raises(ConfigError, match=r"needs PostgreSQL .* or later; the server is Postgre"):
        check_server(conn)


def test_every_connection_is_one_that_a_transaction_mode_pooler_can_share(
    dsn: str, handler_connections: HandlerConnections
) -> None:
    with connect(dsn) as alone, handler_connections.borrowed() as pooled, Link(dsn, 5).reading() as linked:
        for conn in (alone, pooled, linked):
            assert conn.autocommit
            assert conn.prepare_threshold is None
            assert "options" not in conn.info.get_parameters()
            assert conn.info.get_parameters()["application_name"] == "batchq"
        linked.close()


@pytest.mark.parametrize("by", ["the DSN", "the environment"])
def test_what_the_dsn_or_the_environment_says_of_connections_counts(
    dsn: str, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    if by == "the DSN":
        dsn = psycopg.conninfo.make_conninfo(dsn, connect_timeout=3, keepalives_idle=7, application_name="mine")
    else:
        monkeypatch.setenv("PGCONNECT_TIMEOUT", "3")
        monkeypatch.setenv("PGAPPNAME", "mine")
    connections = HandlerConnections(dsn, 1, borrow_seconds=5, transaction_seconds=10)
    connections.open()
    with connect(dsn) as alone, connections.borrowed() as pooled, Link(dsn, 30).reading() as linked:
        for conn in (alone, pooled, linked):
            own = conn.info.get_parameters()
            assert {name: own.get(name) for name in ("application_name", "connect_timeout")} == {
                "application_name": "mine",
                "connect_timeout": "3",
            }
            assert own["keepalives_idle"] == ("7" if by == "the DSN" else "30")
        linked.close()
    connections.close()


def test_the_second_host_is_tried_when_the_dsns_own_time_is_over(admin_dsn: str, database: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        parts = psycopg.conninfo.conninfo_to_dict(admin_dsn)
        hosts = {"host": f"127.0.0.1,{parts['host']}", "port": f"{silent.getsockname()[1]},{parts.get('port', 5432)}"}
        began_at = time.monotonic()
        connect(psycopg.conninfo.make_conninfo(admin_dsn, **hosts, connect_timeout=2)).close()
        assert 2 <= time.monotonic() - began_at < 6


def test_a_service_of_libpq_is_a_dsn_and_what_no_pooler_takes_is_found_in_it(
    admin_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "services"
    lines = [f"{name}={value}" for name, value in psycopg.conninfo.conninfo_to_dict(admin_dsn).items()]
    file.write_text("\n".join(["[mine]", *lines, "[odd]", *lines, "options=-c jit=off"]) + "\n")
    monkeypatch.setenv("PGSERVICEFILE", str(file))
    dsn = Settings.load(dsn="service=mine").require_dsn()
    with connect(dsn) as conn:
        check_server(conn)
    with connect("service=odd") as conn, pytest.raises(ConfigError, match="options= does not survive a pooler"):
        check_server(conn)


def test_the_pools_check_no_connection_and_keep_few() -> None:
    assert POOL_OPTIONS["check"] is None
    assert POOL_OPTIONS["min_size"] <= 1
    assert POOL_OPTIONS["max_lifetime"] <= 15 * 60
    assert CONNECT_OPTIONS["gssencmode"] == "disable"
    assert not CONNECT_OPTIONS.keys() & {"options", "replication"}


def test_no_statement_is_prepared_however_often_it_runs(admin_dsn: str) -> None:
    link = Link(admin_dsn, 10)
    for _ in range(8):
        with link.transaction() as conn:
            batchq.enqueue(conn, "work")
            leases.rescue(conn, "default", 1)
        link.run(claims.claim("default", 0, ["work"], 1, "w", uuid4(), 60))
        with link.reading() as conn:
            probes.has_ready(conn, "default", 0, ["work"], claims.START)
    with link.reading() as conn:
        assert value(conn, "SELECT count(*) FROM pg_prepared_statements") == 0
    link.close()


# -------------------------------------------------------------------------------------------------------- the limits

ALL_LIMITS = """
SELECT ARRAY[current_setting('statement_timeout'), current_setting('lock_timeout'),
             current_setting('idle_in_transaction_session_timeout'),
             current_setting('client_connection_check_interval')]
"""
NO_LIMITS = ["0", "0", "0", "0"]


def test_limits_hold_within_the_transaction_and_are_gone_after_it(dsn: str) -> None:
    with connect(dsn) as conn:
        for seconds, seen in ((12, ["12s", "5s", "12s", "2s"]), (2.5, ["2500ms", "2500ms", "2500ms", "2s"])):
            with transaction(conn, seconds):
                assert value(conn, ALL_LIMITS) == seen
            assert [value(conn, ALL_LIMITS) for _ in range(3)] == [NO_LIMITS] * 3


def test_limits_hold_in_each_kind_of_transaction(link: Link, handler_connections: HandlerConnections) -> None:
    step("batchq's own wait for locks 5 s at most, a handler's as long as it may run")
    with link.transaction() as conn:
        assert value(conn, ALL_LIMITS) == ["10s", "5s", "10s", "2s"]
    with handler_connections.transaction() as conn:
        assert value(conn, ALL_LIMITS) == ["10s", "10s", "10s", "2s"]
    limits = asyncio.run(with_async_pool(handler_connections, limits_async(handler_connections)))
    assert limits == ["10s", "10s", "10s", "2s"]


async def limits_async(connections: HandlerConnections) -> Any:
    """Return the limits in an async transaction of a handler."""
    async with connections.transaction_async() as conn:
        row = await (await conn.execute(ALL_LIMITS.encode())).fetchone()
    return row and row[0]


async def with_async_pool(connections: HandlerConnections, work: Awaitable[Any]) -> Any:
    """Await *work* while the pool of the event loop is open."""
    await connections.open_async()
    try:
        return await work
    finally:
        await connections.close_async()


def test_a_statement_that_takes_too_long_is_cancelled_by_the_server(dsn: str) -> None:
    with connect(dsn) as conn:
        with pytest.raises(psycopg.errors.QueryCanceled), transaction(conn, 0.2):
            conn.execute("SELECT pg_sleep(30)")
        assert value(conn, "SELECT 1") == 1, "the connection is usable"


def test_a_transaction_that_raises_is_rolled_back(link: Link) -> None:
    def fail() -> None:
        with link.transaction() as conn:
            batchq.enqueue(conn, "work")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with link.reading() as conn:
        assert value(conn, "SELECT count(*) FROM batchq.all_batches") == 0


# ------------------------------------------------------------------------------------------------- cut when overdue


def test_a_wait_that_the_server_does_not_end_is_cut_in_time(dsn: str) -> None:
    with connect(dsn) as conn:
        began_at = time.monotonic()
        with pytest.raises(psycopg.OperationalError), deadline(conn, 0.3):
            conn.execute("SELECT pg_sleep(30)")
        assert 0.3 <= time.monotonic() - began_at < allowed(1.5)
        assert is_lost(conn)


def test_an_async_wait_is_cut_in_time(dsn: str) -> None:
    async def wait() -> float:
        async with await AsyncConnection.connect(dsn, **CONNECT_OPTIONS) as conn:
            began_at = time.monotonic()
            with pytest.raises(psycopg.OperationalError), deadline(conn, 0.3):
                await conn.execute("SELECT pg_sleep(30)")
            return time.monotonic() - began_at

    assert 0.3 <= asyncio.run(wait()) < allowed(1.5)


def test_of_many_waits_each_is_cut_at_its_own_time(dsn: str) -> None:
    def wait(seconds: float) -> float:
        with connect(dsn) as conn:
            began_at = time.monotonic()
            with pytest.raises(psycopg.OperationalError), deadline(conn, seconds):
                conn.execute("SELECT pg_sleep(30)")
            return time.monotonic() - began_at - seconds

    with ThreadPoolExecutor() as threads:
        late = list(threads.map(wait, [0.8, 0.3]))
    assert all(0 <= seconds < allowed(1) for seconds in late), late


def test_what_ends_in_time_is_not_cut_later_nor_who_gets_its_file_descriptor(dsn: str) -> None:
    with connect(dsn) as first, connect(dsn) as second:
        with deadline(first, 0.2):
            assert value(first, "SELECT 1") == 1
        with connect(dsn) as third:
            with pytest.raises(psycopg.OperationalError), deadline(second, 0.4):
                second.execute("SELECT pg_sleep(30)")
            assert value(first, "SELECT 2") == value(third, "SELECT 2") == 2


def test_a_frozen_pooler_holds_nobody_longer_than_the_bound(pgbouncer: PgBouncer, database: str) -> None:
    link = Link(pgbouncer.dsn(database), 1)
    with link.transaction() as conn:
        conn.execute("SELECT 1")
    pgbouncer.freeze()
    try:
        began_at = time.monotonic()
        with pytest.raises(psycopg.OperationalError), link.transaction():
            pass
        assert time.monotonic() - began_at < allowed(3)
    finally:
        pgbouncer.thaw()
    step("thawed, the link connects again")
    with link.transaction() as conn:
        assert value(conn, "SELECT 1") == 1
    link.close()


# --------------------------------------------------------------------------------------------------- lost in COMMIT

DIES_IN_COMMIT = """
CREATE TABLE public.fatal (id integer);
CREATE FUNCTION public.die() RETURNS trigger LANGUAGE plpgsql AS
  $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); PERFORM pg_sleep(5); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER dies AFTER INSERT ON public.fatal DEFERRABLE INITIALLY DEFERRED
  FOR EACH ROW EXECUTE FUNCTION public.die();
"""
INSERT_FATAL = "INSERT INTO public.fatal VALUES (1)"


def test_a_connection_lost_in_commit_has_an_unknown_outcome(link: Link, admin: Conn) -> None:
    admin.execute(DIES_IN_COMMIT)
    with pytest.raises(OutcomeUnknown, match="connection lost during COMMIT"), link.transaction() as conn:
        conn.execute(INSERT_FATAL)
    with link.transaction() as conn:
        assert value(conn, "SELECT count(*) FROM public.fatal") == 0


def test_an_async_connection_lost_in_commit_has_an_unknown_outcome(dsn: str, admin: Conn) -> None:
    admin.execute(DIES_IN_COMMIT)

    async def commit() -> None:
        async with await AsyncConnection.connect(dsn, **CONNECT_OPTIONS) as conn, transaction_async(conn, 5):
            await conn.execute(INSERT_FATAL)

    with pytest.raises(OutcomeUnknown, match="connection lost during COMMIT"):
        asyncio.run(commit())


def test_a_commit_whose_answer_is_cut_off_has_an_unknown_outcome(pgbouncer: PgBouncer, database: str) -> None:
    link = Link(pgbouncer.dsn(database), 1)

    def commit_while_frozen() -> None:
        with link.transaction() as conn:
            batchq.enqueue(conn, "work")
            pgbouncer.freeze()

    try:
        with pytest.raises(OutcomeUnknown):
            commit_while_frozen()
    finally:
        pgbouncer.thaw()
    link.close()


def test_a_connection_lost_before_commit_has_a_known_outcome(link: Link, admin: Conn) -> None:
    with pytest.raises(psycopg.Error) as caught:
        lose(link, admin)
    assert not isinstance(caught.value, OutcomeUnknown)
    with link.transaction() as conn:
        assert value(conn, "SELECT count(*) FROM batchq.all_batches") == 0


def test_a_commit_that_the_database_refuses_is_no_unknown_outcome(link: Link, admin: Conn) -> None:
    admin.execute("CREATE TABLE public.twice (id integer UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    with pytest.raises(psycopg.errors.UniqueViolation), link.transaction() as conn:
        conn.execute("INSERT INTO public.twice VALUES (1), (1)")


def lose(link: Link, admin: Conn) -> None:
    """Enqueue, and lose the backend before the commit."""
    with link.transaction() as conn:
        batchq.enqueue(conn, "work")
        terminate(admin, conn)
        conn.execute("SELECT 1")


def terminate(admin: Conn, conn: Conn) -> None:
    """Terminate the backend that *conn* has now, and wait until it is gone."""
    pid = value(conn, "SELECT pg_backend_pid()")
    assert value(admin, f"SELECT pg_terminate_backend({pid})")
    wait_until(lambda: not value(admin, f"SELECT count(*) FROM pg_stat_activity WHERE pid = {pid}"), 5, "its end")


# ------------------------------------------------------------------------------- a whole transaction in one message


def made(text: str, **parameters: Any) -> Any:
    """Return a statement."""
    return text, parameters


@pytest.fixture(params=["in one message", "too long for one"])
def running(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, link: Link) -> Link:
    """Return a link that runs every statement in one message, if that is short enough, or none."""
    if request.param == "too long for one":
        for module in ("link", "transactions"):
            monkeypatch.setattr(f"batchq.postgres.{module}.LONGEST_TEXT", 0)
    return link


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bytes, bytes]]:
    """Return what reaches the simulator of Supavisor from now on."""
    seen: list[tuple[bytes, bytes]] = []
    relay = supasim.Client._relay

    async def recording(client: supasim.Client, kind: bytes, body: bytes) -> None:
        seen.append((kind, body))
        await relay(client, kind, body)

    monkeypatch.setattr(supasim.Client, "_relay", recording)
    return seen


def test_a_statement_goes_as_one_message_with_its_transaction(
    sim: SupaSim, messages: list[tuple[bytes, bytes]]
) -> None:
    link = Link(sim.dsn(), 10)
    with link.reading() as conn:
        conn.execute("SELECT 1")
    messages.clear()
    assert link.run(made("SELECT %(word)s || '!'", word="it's")) == [("it's!",)]
    [(kind, body)] = messages
    assert kind == b"Q"
    assert body.startswith(b"BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL statement_timeout = ")
    assert body.endswith(b"'it''s' || '!'; COMMIT\0")
    link.close()
    assert sim.settled() == []


def test_no_text_is_longer_than_every_pooler_takes(sim: SupaSim, messages: list[tuple[bytes, bytes]]) -> None:
    link = Link(sim.dsn(), 10)
    for count in (1, 100, 200, 300, 400, 500, 1000, 2000):
        ids, tokens = list(range(count)), [uuid4() for _ in range(count)]
        given = [(number, token) for number, token in zip(ids, tokens, strict=True)]
        assert link.run(endings.complete("default", ids, [str(tokens[0])] * count)) == []
        assert link.run(endings.complete("default", ids, list(map(str, tokens)))) == []
        assert (
            link.run(endings.finish("default", [Finish(*one, "failed", "1", '{"error": ""}') for one in given])) == []
        )
        assert link.run(endings.requeue("default", [Requeue(*one, 1.0, False) for one in given])) == []
        assert len(link.run(leases.extend("default", ids, tokens, 60))) == count
        with link.reading() as conn:
            assert not probes.has_ready(conn, "default", 0, [str(token) for token in tokens], claims.START).is_ready
    link.close()
    assert sim.settled() == []
    longest = max(len(body) for kind, body in messages if kind in b"QP")
    step("the longest text: %s bytes", longest)
    assert 10_000 < longest < 16_384


SETTINGS_SEEN = [
    "statement_timeout",
    "lock_timeout",
    "idle_in_transaction_session_timeout",
    "client_connection_check_interval",
    *session.FORCE_INDEX_AND_HASH_JOIN,
    "synchronous_commit",
]


def test_limits_and_settings_of_a_statement_hold_within_it_and_are_gone_after_it(running: Link) -> None:
    seen = "SELECT " + ", ".join(f"current_setting('{name}')" for name in SETTINGS_SEEN)
    defaults = (
        "0",
        "0",
        "0",
        "0",
        "pg_catalog, pg_temp",  # which each read sets for itself
        "ISO, MDY",
        "postgres",
        "1",
        *("on" for _ in range(len(session.FORCE_INDEX_AND_HASH_JOIN) - 4)),
        "on",
    )
    within = (
        "10s",
        "5s",
        "10s",
        "2s",
        "pg_catalog, pg_temp",
        "ISO, MDY",
        *list(session.FORCE_INDEX_AND_HASH_JOIN.values())[2:],
    )
    off = session.FORCE_INDEX_AND_HASH_JOIN | session.ASYNCHRONOUS_COMMIT
    for _ in range(3):
        assert running.run(made(seen), off) == [(*within, "off")]
        durably = running.run(made(seen))
        assert durably == [(*within, "on")], "unless told otherwise"
        with running.reading() as conn:
            assert conn.execute(seen.encode()).fetchone() == defaults
        assert running.conn is not None
        with running.conn.transaction():
            assert running.conn.execute("SHOW search_path").fetchone() == ('"$user", public',)


def test_a_statement_that_fails_leaves_nothing_and_the_connection_usable(running: Link) -> None:
    running.run(made("SELECT 1"))
    kept = running.conn
    insert = (
        "WITH new AS (INSERT INTO batchq.batches (kind) VALUES ('work') RETURNING id) SELECT 1 / (id - id) FROM new"
    )
    failures = [
        (insert, psycopg.errors.DivisionByZero),
        ("SELEC 1", psycopg.errors.SyntaxError),
        ("SELECT %(word)s::text", psycopg.DataError),
    ]
    for text, error in failures * 2:
        with pytest.raises(error):
            running.run(made(text, word="a\0b"))
        assert running.run(made("SELECT count(*) FROM batchq.all_batches")) == [(0,)]
    assert running.conn is kept is not None
    assert running.conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE


def test_a_statement_whose_commit_is_refused_leaves_nothing_and_the_connection_usable(
    running: Link, admin: Conn
) -> None:
    admin.execute("CREATE TABLE public.twice (id integer UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    with pytest.raises(psycopg.errors.UniqueViolation):
        running.run(made("INSERT INTO public.twice VALUES (1), (1) RETURNING id"))
    assert running.run(made("SELECT count(*) FROM public.twice")) == [(0,)]


def test_a_statement_of_one_message_that_takes_too_long_is_cancelled_by_the_server(dsn: str) -> None:
    link = Link(dsn, 0.2)
    with pytest.raises(psycopg.errors.QueryCanceled):
        link.run(made("SELECT pg_sleep(30)"))
    assert link.run(made("SELECT 1")) == [(1,)]
    link.close()


def test_a_statement_whose_connection_is_lost_in_commit_has_an_unknown_outcome(running: Link, admin: Conn) -> None:
    admin.execute(DIES_IN_COMMIT)
    with pytest.raises(OutcomeUnknown):
        running.run(made(f"{INSERT_FATAL} RETURNING id"))
    assert running.conn is None
    assert running.run(made("SELECT count(*) FROM public.fatal")) == [(0,)]


def test_of_one_message_it_cannot_be_told_where_the_connection_was_lost(link: Link) -> None:
    with pytest.raises(OutcomeUnknown):
        link.run(made("SELECT pg_terminate_backend(pg_backend_pid()), pg_sleep(5)"))
    assert link.conn is None
    assert link.run(made("SELECT 1")) == [(1,)]


def test_a_frozen_pooler_holds_a_statement_of_one_message_no_longer_than_the_bound(
    pgbouncer: PgBouncer, database: str
) -> None:
    link = Link(pgbouncer.dsn(database), 1)
    assert link.run(made("SELECT 1")) == [(1,)]
    pgbouncer.freeze()
    try:
        began_at = time.monotonic()
        with pytest.raises(OutcomeUnknown):
            link.run(made("SELECT 1"))
        assert time.monotonic() - began_at < allowed(3)
    finally:
        pgbouncer.thaw()
    assert link.run(made("SELECT 1")) == [(1,)]
    link.close()


WORDS = [
    *("it's", "''", 'say "x"', "back\\slash", "\\", "\\'", "\\\\'; DROP SCHEMA batchq CASCADE; --", "E'\\x41'", "\\N"),
    *("%", "%s", "%(word)s", "100%%", "$1", "$$", "$a$x$a$", "; COMMIT; SELECT 1", "-- x", "/* x */", "{1,2}", "NULL"),
    *("\n\r\t\x1b", "\x7f\x80\u2028", "👩🏽\u200d🚀", "é" * 3000, "x" * 20_000, "", " ", "\\u0000"),
]


@pytest.mark.parametrize("standard", ["on", "off"])
def test_every_text_arrives_as_it_is(admin_dsn: str, database: str, admin: Conn, standard: str) -> None:
    admin.execute(f"ALTER DATABASE {database} SET standard_conforming_strings = {standard}".encode())
    link = Link(admin_dsn, 10)
    with link.reading() as conn:
        assert value(conn, "SHOW standard_conforming_strings") == standard
    text = "SELECT %(word)s::text, (%(words)s::text[])[1], %(document)s::jsonb ->> 'word', '100%%'"
    for word in WORDS:
        parameters = {"word": word, "words": [word, None], "document": json.dumps({"word": word})}
        assert link.run(made(text, **parameters)) == [(word, word, word, "100%")]
    link.close()


def test_payloads_results_and_errors_are_stored_as_they_are(running: Link) -> None:
    for number, word in enumerate(WORDS):
        worker, token = word[:50] or "w", uuid4()
        with running.transaction() as conn:
            batch_id = batchq.enqueue(conn, f"kind {number}", {"word": word})
        [row] = running.run(claims.claim("default", 0, [f"kind {number}"], 1, worker, token, 60))
        assert json.loads(row[4] or "null") in ({"word": word}, None)
        end = Finish(row[0], token, "failed", json.dumps({"word": word}), json.dumps({"error": word}))
        assert running.run(endings.finish("default", [end])) == [(batch_id,)]
        stored = "SELECT result ->> 'word', errors -> 0 ->> 'error', claimed_by FROM batchq.all_batches WHERE id = %s"
        with running.reading() as conn:
            assert conn.execute(stored, [batch_id]).fetchone() == (word, word, worker)


# ------------------------------------------------------------------------------------------------- a new connection


def test_a_link_opens_a_new_connection_after_its_own_was_lost(link: Link, admin: Conn) -> None:
    with pytest.raises(psycopg.Error):
        lose(link, admin)
    assert link.conn is None
    with link.transaction() as conn:
        assert value(conn, "SELECT 1") == 1
    step("and keeps it")
    kept = link.conn
    with link.reading() as conn:
        assert conn is kept


def test_a_link_keeps_its_connection_through_an_error_of_sql(link: Link) -> None:
    with link.transaction():
        pass
    kept = link.conn
    with pytest.raises(psycopg.errors.DivisionByZero), link.transaction() as conn:
        conn.execute("SELECT 1 / 0")
    assert link.conn is kept is not None


def test_a_link_drops_a_connection_that_only_reads(admin_dsn: str, database: str, admin: Conn) -> None:
    link = Link(admin_dsn, 10)
    admin.execute(f"ALTER DATABASE {database} SET default_transaction_read_only = on".encode())
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction) as caught, link.transaction() as conn:
        batchq.enqueue(conn, "work")
    assert is_read_only_error(caught.value)
    assert link.conn is None
    step("so the next use sees that it may write again")
    admin.execute("SET default_transaction_read_only = off")
    admin.execute(f"ALTER DATABASE {database} RESET default_transaction_read_only".encode())
    with link.transaction() as conn:
        assert batchq.enqueue(conn, "work") == 1
    link.close()


def test_the_handlers_pool_is_open_only_when_it_has_a_connection(dsn: str) -> None:
    nowhere = HandlerConnections(f"host=127.0.0.1 port={free_port()} dbname=x", 3, 0.5, 10)
    with pytest.raises(PoolTimeout):
        nowhere.open()
    nowhere.close()
    connections = HandlerConnections(dsn, 3, 5, 10)
    connections.open()
    assert connections.pool.get_stats()["pool_available"] == 1
    connections.close()


def fill(connections: HandlerConnections, size: int) -> None:
    """Have *size* connections open and idle."""
    conns = [connections.pool.getconn() for _ in range(size)]
    for conn in conns:
        connections.pool.putconn(conn)


def terminate_all(admin: Conn) -> None:
    """Terminate the backends of all connections of batchq."""
    pids = "FROM pg_stat_activity WHERE application_name = 'batchq' AND datname = current_database()"
    admin.execute(f"SELECT pg_terminate_backend(pid) {pids}".encode())
    wait_until(lambda: not value(admin, f"SELECT count(*) {pids}"), 5, "the end of all backends")


def test_connections_of_the_pool_that_died_while_idle_fail_no_handler(admin_dsn: str, admin: Conn) -> None:
    connections = HandlerConnections(admin_dsn, 3, borrow_seconds=5, transaction_seconds=10)
    connections.open()
    fill(connections, 3)
    terminate_all(admin)
    for _ in range(6):
        with connections.transaction() as conn:
            assert value(conn, "SELECT 1") == 1
    fill(connections, 3)
    terminate_all(admin)
    for _ in range(6):
        assert connections.read(session.server_version)[0] >= 150_000
    connections.close()


def test_a_connection_lost_within_a_transaction_is_an_error_and_drains_the_pool(admin_dsn: str, admin: Conn) -> None:
    connections = HandlerConnections(admin_dsn, 3, borrow_seconds=5, transaction_seconds=10)
    connections.open()
    fill(connections, 3)
    with pytest.raises(psycopg.OperationalError), connections.transaction() as conn:  # noqa: PT012
        terminate_all(admin)
        conn.execute("SELECT 1")
    with connections.borrowed() as conn:
        assert value(conn, "SELECT 1") == 1
    connections.close()


def test_connections_of_the_async_pool_that_died_while_idle_fail_no_handler(admin_dsn: str, admin: Conn) -> None:
    connections = HandlerConnections(admin_dsn, 3, borrow_seconds=5, transaction_seconds=10)

    async def lose_and_go_on() -> None:
        pool = connections.async_pool
        assert pool is not None
        for conn in [await pool.getconn() for _ in range(3)]:
            await pool.putconn(conn)
        await asyncio.to_thread(terminate_all, admin)
        for _ in range(6):
            async with connections.transaction_async() as conn:
                await conn.execute("SELECT 1")

    asyncio.run(with_async_pool(connections, lose_and_go_on()))


async def enter(context: AbstractAsyncContextManager[Any]) -> None:
    """Enter and leave a context."""
    async with context:
        pass


def test_outside_an_event_loop_an_async_transaction_says_so(handler_connections: HandlerConnections) -> None:
    with pytest.raises(RuntimeError, match="no event loop runs here"):
        asyncio.run(enter(handler_connections.transaction_async()))


# ------------------------------------------------------------------------------------------------- refused log-ins


class Clock:
    """A clock that stands until it is set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """Return the time."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return the clock that the login backoff goes by."""
    clock = Clock()
    monkeypatch.setattr(logins, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


@pytest.fixture
def strict(admin_dsn: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[SupaSim]:
    """Return a pooler that wants a password."""
    monkeypatch.setattr("tests.support.supasim.REFUSAL_SECONDS", 0.01)
    with SupaSim(admin_dsn, password=PASSWORD) as sim:
        yield sim


Try = Callable[[str], Any]


def connect_async(dsn: str) -> None:
    """Open an async connection."""

    async def run() -> None:
        await (await AsyncConnection.connect(dsn, **CONNECT_OPTIONS)).close()

    asyncio.run(run())


@pytest.mark.parametrize("log_in", [lambda dsn: Connection.connect(dsn, **CONNECT_OPTIONS), connect_async])
def test_a_wrong_password_is_tried_three_times_a_minute_at_most(strict: SupaSim, clock: Clock, log_in: Try) -> None:
    tried_at, began_at = [], clock.now
    while clock.now < began_at + 300:
        with pytest.raises(psycopg.OperationalError) as caught:
            log_in(strict.dsn(password="wrong"))
        if "password authentication failed" in str(caught.value):
            tried_at.append(clock.now - began_at)
        else:
            assert "login was rejected; the next attempt is in" in str(caught.value)
        clock.now += 0.5
    assert tried_at == [0, 15, 45, 105, 225]


def test_all_connections_of_a_process_share_the_gate(strict: SupaSim, clock: Clock) -> None:
    links = [Link(strict.dsn(password="wrong"), 5) for _ in range(4)]
    texts = []
    for link in links:
        with pytest.raises(psycopg.OperationalError) as caught, link.transaction():
            pass
        texts.append("password authentication failed" in str(caught.value))
    assert texts == [True, False, False, False]


def test_a_log_in_that_succeeds_opens_the_gate(strict: SupaSim, clock: Clock) -> None:
    with pytest.raises(psycopg.OperationalError):
        Connection.connect(strict.dsn(password="wrong"), **CONNECT_OPTIONS)
    clock.now += 15
    Connection.connect(strict.dsn(), **CONNECT_OPTIONS).close()
    step("the next refusal is the first again")
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        Connection.connect(strict.dsn(password="wrong"), **CONNECT_OPTIONS)
    clock.now += 15
    Connection.connect(strict.dsn(), **CONNECT_OPTIONS).close()


def test_a_database_that_is_away_does_not_shut_the_gate(clock: Clock) -> None:
    nowhere = f"host=127.0.0.1 port={free_port()} dbname=x password={PASSWORD}"
    for _ in range(3):
        with pytest.raises(psycopg.OperationalError, match=r"refused|failed"):
            Connection.connect(nowhere, **CONNECT_OPTIONS)
    backoffs.of(nowhere).check()


def test_a_forked_child_logs_in_though_a_thread_of_its_parent_was_logging_in() -> None:
    name = f"a database that only {uuid4()} knows"
    assert backoffs.of(name).take_turn()
    if (child := os.fork()) == 0:
        os._exit(0 if backoffs.of(name).take_turn() else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    "text",
    [
        'password authentication failed for user "u"',
        "(ENOTFOUND) tenant/user u.t not found",
        "Tenant or user not found",
        "(ECIRCUITBREAKER) too many authentication failures, new connections are temporarily blocked",
        "(ESSLREQUIRED) SSL connection is required for user: u",
        "no such database: nope",
        'no pg_hba.conf entry for host "10.0.0.1"',
        'role "nobody" does not exist',
    ],
)
def test_who_we_are_being_refused_is_known_by_its_text(text: str) -> None:
    assert is_login_failure(psycopg.OperationalError(f"connection failed: FATAL:  {text}"))


@pytest.mark.parametrize(
    "text",
    [
        "(EMAXCONN) max client connections reached, limit: 200",
        "(ECHECKOUTTIMEOUT) unable to check out connection from the pool after 15000ms",
        "Connection refused",
        "the database system is starting up",
        "query_wait_timeout",
    ],
)
def test_trouble_that_passes_is_not_taken_for_a_refusal(text: str) -> None:
    assert not is_login_failure(psycopg.OperationalError(text))


def test_a_refusal_is_a_mistake_of_the_users_and_an_outage_is_not(strict: SupaSim) -> None:
    with pytest.raises(ConfigError, match=r"cannot connect: .*password authentication failed"):
        connect(strict.dsn(password="wrong"))
    backoffs.__init__()  # type: ignore[misc]
    with pytest.raises(psycopg.OperationalError, match="cannot connect: "):
        connect(f"host=127.0.0.1 port={free_port()} dbname=x")


# --------------------------------------------------------------------------------------------------------- the DSN

SUPABASE = "postgresql://batchq.abcdef:pw@aws-0-eu-central-1.pooler.supabase.com:6543/postgres?sslmode=require"


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://user:pw@host:6543/postgres",
        "host=/run/postgresql dbname=app",
        "service=mine",
        "host=h client_encoding=LATIN1",
        "postgresql://user:pw@ep-x.neon.tech/db?sslmode=require&channel_binding=require",
        "postgresql://user:pw@host/db?application_name=mine&target_session_attrs=read-write",
        SUPABASE,
        "",
    ],
)
def test_a_dsn_that_works_through_poolers_has_no_problems(dsn: str) -> None:
    assert dsn_problems(dsn) == []


@pytest.mark.parametrize(
    ("dsn", "problem"),
    [
        ("postgresql://u:s3cr3t-w0rd@h/db?options=-c%20search_path%3Dx", "options= does not survive a pooler"),
        ("host=h options='-c statement_timeout=1s' password=s3cr3t-w0rd", "options= does not survive a pooler"),
        ("postgresql://u:s3cr3t-w0rd@h/db?replication=database", "replication= does not survive a pooler"),
        ("postgresql://u:s3cr3t-w0rd@h/db?channel_binding=require", "channel_binding=require"),
        ("postgresql://u:s3cr3t-w0rd@h/db?sslnegotiation=direct", "sslnegotiation=direct"),
        (f"postgresql://u:s3cr3t-w0rd@h/{'d' * 900}", "together over 900 bytes"),
        (f"postgresql://u:s3cr3t-w0rd@h/db?application_name={'a' * 900}", "together over 900 bytes"),
        (
            "postgresql://batchq:s3cr3t-w0rd@x.pooler.supabase.com:6543/p?sslmode=require",
            "ROLE.PROJECT_REF, not 'batchq'",
        ),
        ("postgresql://b.c:s3cr3t-w0rd@x.pooler.supabase.com:5432/p?sslmode=require", "use 6543"),
        ("postgresql://b.c:s3cr3t-w0rd@x.pooler.supabase.com/p?sslmode=require", "use 6543"),
        ("postgresql://b.c:s3cr3t-w0rd@x.pooler.supabase.com:6543/p", "add sslmode=require"),
        ("postgresql://u:s3cr3t-w0rd@h:port/db?nonsense=1", "not a Postgres DSN"),
        ("user:s3cr3t-w0rd@host", "not a Postgres DSN"),
        ("host=h password='s3cr3t-w0rd", "not a Postgres DSN"),
        ("host=h password=a s3cr3t-w0rd", "not a Postgres DSN"),
        ("postgresql://u:s3cr3t-w0rd%zz@h/db", "not a Postgres DSN"),
        ("postgresql://u:s3cr3t-w0rd@[::1", "not a Postgres DSN"),
        ("postgresql://u:a@s3cr3t-w0rd@h/db", "write @ : / ? # % in a password as %40"),
        ("postgresql://u:s3cr3t-w0rd/x@h/db", "write @ : / ? # % in a password as %40"),
        ("postgresql://u:s3cr3t-w0rd@h/db?sslmod=require", 'invalid URI query parameter: "sslmod"'),
        ("host=h sslmod=require password=s3cr3t-w0rd", 'invalid connection option "sslmod"'),
    ],
)
def test_a_dsn_that_a_pooler_would_break_is_refused_with_its_remedy_and_without_its_password(
    dsn: str, problem: str
) -> None:
    problems = dsn_problems(dsn)
    step("%s", problems)
    assert [problem in text for text in problems] == [True]
    with pytest.raises(ConfigError, match=r"^BATCHQ_DSN: ") as caught:
        Settings.load(dsn=dsn).require_dsn()
    assert PASSWORD not in f"{problems}{caught.value}{caught.value!r}"


@pytest.mark.parametrize("name", ["PGOPTIONS", "PGTZ", "PGDATESTYLE", "PGGEQO"])
def test_a_variable_that_would_reach_the_start_of_each_connection_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "x")
    [problem] = dsn_problems("host=h")
    assert problem == f"the environment's {name} would be sent at the start of each connection; unset it"


def test_the_dsn_of_migrations_is_checked_by_its_own_name() -> None:
    settings = Settings.load(dsn=SUPABASE, migration_dsn="host=h options=x")
    assert settings.require_dsn() == SUPABASE
    with pytest.raises(ConfigError, match=r"^BATCHQ_MIGRATION_DSN: options="):
        settings.require_dsn(for_migration=True)


def test_without_a_dsn_the_error_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchq.common.env_file.ENV_FILE", Path("there is none"))
    with pytest.raises(ConfigError, match="BATCHQ_DSN is not set; set it to your database, such as postgresql://"):
        Settings.load().require_dsn()


# ------------------------------------------------------------------------------------------------------- passwords


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("postgresql://u:pw@h/db", "postgresql://u:***@h/db"),
        ("at postgresql://u:p%40w@h:1/db and postgres://v:x@i", "at postgresql://u:***@h:1/db and postgres://v:***@i"),
        ("host=h password=pw user=u", "host=h password=*** user=u"),
        ("host=h password = 'p w\\'x' user=u", "host=h password = *** user=u"),
        (
            "postgresql://h/db?user=u&password=pw&sslmode=require",
            "postgresql://h/db?user=u&password=***&sslmode=require",
        ),
        ("postgresql://u:p@w@h/db", "postgresql://u:***@h/db"),
        ('password authentication failed for user "u"', 'password authentication failed for user "u"'),
        ("postgresql://u@h:5432/db", "postgresql://u@h:5432/db"),
    ],
)
def test_passwords_are_hidden_and_nothing_else(text: str, hidden: str) -> None:
    assert hide_password(text) == hidden


def test_settings_never_show_a_password() -> None:
    dsn = f"postgresql://u:{PASSWORD}@h/db"
    settings = Settings.load(dsn=dsn, migration_dsn=dsn)
    assert PASSWORD not in f"{settings}{settings!r}{settings.model_dump()}{settings.model_dump_json()}"
    with pytest.raises(ConfigError) as caught:
        Settings.load(dsn=[dsn], concurrency=0)
    assert "BATCHQ_CONCURRENCY" in str(caught.value)
    assert PASSWORD not in f"{caught.value}{caught.value.__cause__}"


def test_errors_of_connecting_never_show_a_password(strict: SupaSim) -> None:
    away = f"postgresql://u:{PASSWORD}@127.0.0.1:{free_port()}/db"
    for dsn in (away, f"{away}?sslmode=wrong", strict.dsn(password=f"{PASSWORD}-wrong")):
        with pytest.raises((ConfigError, psycopg.Error)) as caught:
            connect(dsn)
        assert PASSWORD not in f"{caught.value}{caught.value!r}"
        backoffs.__init__()  # type: ignore[misc]


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_logs_never_show_a_password(log_format: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        log.configure(log_format, "info")
        dsn = f"postgresql://u:{PASSWORD}@h/db"
        log.get_logger().warning(f"at {dsn}", dsn=dsn, error=f"host=h password={PASSWORD} user=u")
        logging.getLogger("elsewhere").warning("cannot connect to %s", dsn)
        try:
            raise psycopg.OperationalError(f"no answer from {dsn}")
        except psycopg.Error:
            structlog.get_logger("a handler's").exception("failed")
    finally:
        root.handlers[:], root.level = before
    written = capsys.readouterr().err
    assert written.count("u:***@h") >= 4
    assert PASSWORD not in written


if __name__ == "__main__":
    run_alone(__file__)
