"""A role whose settings change how values look and are read: the heart of batchq does not mind."""

from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg import sql

import batchq
from batchq.cli import main
from batchq.operate.monitor import Monitor
from batchq.postgres.link import Link
from batchq.postgres.migrate import migrate
from batchq.postgres.statements import claims, leases, maintenance, session
from batchq.postgres.statements.claims import END, START
from batchq.web.reads import Reader
from batchq.worker.claimer import SETTINGS
from batchq.worker.positions import Source
from tests.component.test_stuck_rows import REFUSING
from tests.component.test_worker_parts import Parts
from tests.support.alone import run_alone
from tests.support.batches import drain, failed_items, look, put
from tests.support.servers import Server
from tests.support.steps import step

Conn = psycopg.Connection[Any]
ODD = {
    "DateStyle": "SQL, DMY",
    "TimeZone": "Asia/Shanghai",  # CST, which as text is taken for Chicago's
    "IntervalStyle": "iso_8601",
    "extra_float_digits": "-15",
    "bytea_output": "escape",
    "standard_conforming_strings": "off",
    "escape_string_warning": "on",
    "backslash_quote": "off",
    "array_nulls": "off",
    "client_min_messages": "debug1",
    "client_encoding": "LATIN1",
    "xmloption": "document",
    "xmlbinary": "hex",
    "lc_messages": "C",
    "lc_monetary": "C",
    "lc_numeric": "C",
    "lc_time": "C",
    "default_text_search_config": "pg_catalog.simple",
    "quote_all_identifiers": "on",
    "transform_null_equals": "on",
    "search_path": "",
}
TOKEN = UUID("12345678-1234-5678-1234-567812345678")
AT = datetime(2031, 2, 3, 4, 5, 6, tzinfo=UTC)


@pytest.fixture
def odd_dsn(server: Server, empty_database: str) -> str:
    """Return the DSN of a database in which each session begins with the odd settings; migrated under them."""
    dsn = server.dsn(empty_database)
    with psycopg.connect(dsn, autocommit=True) as admin:
        for name, value in ODD.items():
            statement = sql.SQL("ALTER DATABASE {} SET {} = {}")
            admin.execute(statement.format(sql.Identifier(empty_database), sql.Identifier(name), sql.Literal(value)))
    migrate(dsn)
    return dsn


@pytest.fixture
def plain(odd_dsn: str) -> Iterator[Conn]:
    """Return a connection that sees everything as it is."""
    with psycopg.connect(odd_dsn, autocommit=True, client_encoding="UTF8") as conn:
        for name, value in (session.FIXED_FORMATS | {"TimeZone": "UTC"}).items():
            conn.execute("SELECT set_config(%s, %s, false)", [name, value])
        yield conn


@pytest.fixture
def odd(odd_dsn: str) -> Iterator[Conn]:
    """Return a producer's connection, under the odd settings."""
    with psycopg.connect(odd_dsn, autocommit=True, prepare_threshold=None, client_encoding="UTF8") as conn:
        yield conn


@pytest.fixture
def app() -> batchq.App:
    """Return an app with a handler of each style."""
    app = batchq.App()

    @app.handler("echo")
    def echo(batch: batchq.Batch) -> Any:
        return batch.payload

    @app.handler("echo async")
    async def echo_async(batch: batchq.Batch) -> Any:
        return batch.payload

    @app.handler("transaction")
    def transaction(batch: batchq.Batch) -> None:
        with batch.transaction():
            pass

    @app.handler("fails")
    def fails(batch: batchq.Batch) -> None:
        raise ValueError(batch.payload)

    @app.item_handler("items")
    def item(item: Any) -> None:
        if item == "bad":
            raise ValueError("it's \\bad\\ \u20ac")

    return app


def test_what_is_enqueued_is_due_when_it_says(odd: Conn, plain: Conn) -> None:
    in_a_minute = put(odd, "echo", delay_seconds=60)
    assert batchq.enqueue_many(odd, "echo", [1, 2], delay_seconds=60) == 2
    fixed = put(odd, "echo", run_at=AT)
    assert batchq.enqueue_many(odd, "echo", [1], run_at=AT) == 1
    for batch_id in range(in_a_minute, in_a_minute + 3):
        assert 50 < look(plain, batch_id).wait_seconds <= 60
    assert [look(plain, batch_id).run_at for batch_id in (fixed, fixed + 1)] == [AT, AT]


def test_every_text_comes_through_a_worker_as_it_was(odd_dsn: str, odd: Conn, plain: Conn, app: batchq.App) -> None:
    text = 'it\'s \\ "quoted" \\n NULL \u20ac {a,b}'
    done = [put(odd, kind, {"text": text}) for kind in ("echo", "echo async")]
    in_transaction = put(odd, "transaction", "NULL")
    failed = put(odd, "fails", text, max_attempts=1)
    items = put(odd, "items", items=["good", "bad", *["good"] * 50], max_attempts=1)
    drain(app, odd_dsn)
    assert [look(plain, batch_id).result for batch_id in done] == [{"text": text}] * 2
    assert look(plain, in_transaction).status == "completed"
    assert look(plain, failed).errors[0]["error"] == f"ValueError: {text}"
    assert [item.error for item in failed_items(plain, items)] == ["ValueError: it's \\bad\\ \u20ac"]
    retried = put(odd, "fails", text)
    drain(app, odd_dsn)
    assert 1 < look(plain, retried).wait_seconds < 60


def test_a_statement_of_ours_means_what_it_says(odd_dsn: str) -> None:
    with closing(Link(odd_dsn, 10)) as link, link.transaction() as conn:
        assert conn.execute(r"SELECT '\d', '{NULL}'::text[]").fetchall() == [(r"\d", [None])]


def test_positions_keep_every_digit(odd_dsn: str, odd: Conn, plain: Conn) -> None:
    put(odd, "echo")
    link = Link(odd_dsn, 10)
    [row] = map(claims.ClaimedRow._make, link.run(claims.claim("default", 0, ["echo"], 1, "w", TOKEN, 60), SETTINGS))
    assert row.run_at == look(plain, row.id).run_at.timestamp()
    [(now, _, _)] = link.probe(leases.lease_probe("default", float("-inf")))
    link.close()
    assert abs(now - session.clock(plain)) < 60


def test_verbs_and_looks_say_the_same(odd_dsn: str, odd: Conn, plain: Conn, capsys: pytest.CaptureFixture[str]) -> None:
    def command(*arguments: str) -> str:
        code = main([*arguments, "--dsn", odd_dsn])
        said = capsys.readouterr()
        assert code == 0, (arguments, said)
        return said.out

    batch_id, other = put(odd, "echo"), put(odd, "echo")
    step("snooze, for and until, by id and in bulk")
    command("snooze", str(batch_id), "--for", "60s")
    assert 50 < look(plain, batch_id).wait_seconds <= 60
    command("snooze", str(batch_id), "--until", "2031-02-03 04:05:06Z")
    assert look(plain, batch_id).run_at == AT
    command("snooze", "--kind", "echo", "--until", "2031-02-03 04:05:07Z")
    assert {look(plain, id_).run_at for id_ in (batch_id, other)} == {AT + timedelta(seconds=1)}
    step("the day before the month, and in the role's time zone: as the role has it, by every verb")
    for which in ([str(batch_id)], ["--kind", "echo"]):
        command("snooze", *which, "--until", "03/02/2031 12:05:06")
        assert look(plain, batch_id).run_at == AT
    command("pause", "--queue", "dated", "--until", "03/02/2031 12:05:06")
    assert plain.execute("SELECT until FROM batchq.pauses WHERE queue = 'dated'").fetchall() == [(AT,)]
    step("the others")
    for verb in (["priority", "--to", "3"], ["move", "--to", "mail"], ["cancel"], ["retry"], ["cancel"]):
        command(verb[0], str(batch_id), *verb[1:])
    command("pause", "--queue", "mail", "--for", "60s")
    command("pause")
    command("resume", "--queue", "mail")
    step("an age is hours, minutes and seconds, as everywhere")
    put(odd, "echo")
    plain.execute("UPDATE batchq.batches SET created_at = now() - interval '3 hours'")
    assert "03:00:0" in command("status")
    looks = ["audit"], ["logs", str(batch_id)], ["show", str(batch_id)], ["prune"], ["check", "--invariants"]
    for arguments in looks:
        command(*arguments)
    assert main(["doctor", "--dsn", odd_dsn]) in (0, 1)


def test_the_monitor_misses_no_failure(odd_dsn: str, odd: Conn, app: batchq.App) -> None:
    monitor = Monitor(Link(odd_dsn, 10))
    monitor.changes()
    for _ in range(2):
        failed = put(odd, "fails", max_attempts=1)
        drain(app, odd_dsn)
        assert {row["id"]: row["status"] for row in monitor.changes()}[failed] == "failed"
    monitor.link.close()


def test_days_begin_in_utc_and_old_ones_are_dropped(odd_dsn: str, plain: Conn) -> None:
    days = "SELECT batchq.create_finished_partitions((now() AT TIME ZONE 'UTC')::date - 40, 3)"
    link = Link(odd_dsn, 10)
    with link.transaction() as conn:
        assert conn.execute(days.encode()).fetchall() == [(3,)]
        assert maintenance.prune(conn, 30) == 3
    link.close()
    bounds = plain.execute(
        "SELECT pg_get_expr(relpartbound, oid) FROM pg_class WHERE relname = "
        "'finished_' || to_char(now() AT TIME ZONE 'UTC', 'YYYYMMDD')"
    ).fetchall()
    today = datetime.now(UTC).date()
    assert bounds == [(f"FOR VALUES FROM ('{today} 00:00:00+00') TO ('{today + timedelta(days=1)} 00:00:00+00')",)]


DATE_STYLES = ["SQL, DMY", "SQL, YMD", "German, YMD", "Postgres, YMD"]


@pytest.mark.parametrize("style", DATE_STYLES)
def test_who_calls_the_functions_makes_and_drops_the_same_days(odd: Conn, plain: Conn, style: str) -> None:
    odd.execute("SELECT set_config('DateStyle', %s, false)", [style])
    made = "SELECT batchq.create_finished_partitions((now() AT TIME ZONE 'UTC')::date - 40, 2)"
    assert odd.execute(made.encode()).fetchall() == [(2,)]
    day = datetime.now(UTC).date() - timedelta(days=40)
    bounds = "SELECT pg_get_expr(relpartbound, oid) FROM pg_class WHERE relname = %s"
    [(bound,)] = plain.execute(bounds, [f"finished_{day:%Y%m%d}"]).fetchall()
    assert bound == f"FOR VALUES FROM ('{day} 00:00:00+00') TO ('{day + timedelta(days=1)} 00:00:00+00')"
    assert odd.execute("SELECT batchq.prune('30 days')").fetchall() == [(2,)]


def test_the_shell_drops_old_days(odd_dsn: str, odd: Conn, capsys: pytest.CaptureFixture[str]) -> None:
    odd.execute("SELECT batchq.create_finished_partitions((now() AT TIME ZONE 'UTC')::date - 40, 3)")
    assert main(["prune", "--older-than-days", "30", "--dsn", odd_dsn]) == 0
    assert "dropped 3 daily partitions" in capsys.readouterr().out


def test_a_verb_in_bulk_takes_what_is_as_old_as_was_asked(odd: Conn, plain: Conn) -> None:
    young, old = put(odd, "echo"), put(odd, "echo")
    for batch_id, seconds in ((young, 7100), (old, 7300)):
        age = "UPDATE batchq.batches SET created_at = now() - %s * interval '1 second' WHERE id = %s"
        plain.execute(age, [seconds, batch_id])
    found = odd.execute("SELECT changed FROM batchq.bulk('cancel', '{\"older_than_seconds\": 7200}')").fetchall()
    assert found == [(1,)]
    assert [look(plain, batch_id).status for batch_id in (young, old)] == ["pending", "cancelled"]


def test_a_queue_is_split(odd: Conn, plain: Conn) -> None:
    odd.execute("SELECT batchq.split_queue('mail', 3)")
    batchq.enqueue_many(odd, "work", range(100), queue="mail")
    assert odd.execute("SELECT DISTINCT queue FROM batchq.status").fetchall() == [("mail",)]
    assert plain.execute("SELECT count(DISTINCT shard) FROM batchq.status").fetchone() == (3,)


def test_ready_rows_beside_one_that_is_refused_are_claimed(odd_dsn: str, odd: Conn, plain: Conn) -> None:
    for _ in range(8):
        batchq.enqueue_many(odd, "work", [{}, {"refuses": "change"}, {}])
    plain.execute("UPDATE batchq.batches SET run_at = run_at - id * interval '1.000001 second'")
    plain.execute(REFUSING.encode())
    with closing(Parts(odd_dsn)) as parts:
        assert len(parts.claimer.claim(Source("default", parts.lane), 0, 24, START, END)) == 16


def test_the_page_reads_and_acts_under_plain_settings(odd_dsn: str) -> None:
    def seen(conn: Conn) -> dict[str, str]:
        shown = {name: conn.execute(f"SHOW {name}".encode()).fetchall()[0][0] for name in session.FIXED_FORMATS}
        return {name: value.replace('"', "") for name, value in shown.items()}  # quote_all_identifiers

    with closing(Reader(odd_dsn)) as reader:
        reader.open()
        for way in (reader.ask, reader.act):
            assert way(seen) == session.FIXED_FORMATS | {"DateStyle": "ISO, DMY"}


if __name__ == "__main__":
    run_alone(__file__)
