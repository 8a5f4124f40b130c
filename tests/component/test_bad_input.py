"""Bad input, kind by kind: refused at the INSERT by name, or the end of its own batch with a clear error.

It never stops the worker: after each, a good batch is worked by the same one. And no mistake of a user's brings a
traceback: the command line says in one line what is wrong.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pydantic import BaseModel

import batchq
from batchq.testing import running_worker
from tests.support.alone import run_alone
from tests.support.batches import await_status, failed_items, look, put, values, wait_for_status
from tests.support.commands import CommandLine
from tests.support.poolers import PgBouncer
from tests.support.servers import free_port
from tests.support.steps import step
from tests.support.supasim import SupaSim


class Order(BaseModel):
    """What the payload of an order is."""

    number: int


def make_app() -> batchq.App:
    """Return the app that meets bad input: handlers that read their input, and return it."""
    app = batchq.App()

    @app.handler("echo")
    def echo(batch: batchq.Batch) -> Any:
        return batch.payload

    @app.handler("echo_async")
    async def echo_async(batch: batchq.Batch) -> Any:
        return batch.payload

    @app.handler("sum")
    def total(batch: batchq.Batch) -> Any:
        return len(batch.items)

    @app.handler("cursor")
    def cursor(batch: batchq.Batch) -> Any:
        return batch.cursor

    @app.item_handler("items")
    def item(item: Any) -> None:
        pass

    @app.item_handler("items_async")
    async def item_async(item: Any) -> None:
        pass

    @app.handler("order", payload=Order)
    def order(batch: batchq.Batch) -> int:
        return int(batch.payload.number)

    @app.item_handler("orders", item=Order)
    def orders(item: Order) -> None:
        pass

    return app


def insert(conn: psycopg.Connection, **columns: str) -> int:
    """Insert a batch by plain SQL, each column given as an SQL expression; return its id."""
    names, expressions = ", ".join(columns), ", ".join(columns.values())
    [batch_id] = values(conn, f"INSERT INTO batchq.batches ({names}) VALUES ({expressions}) RETURNING id")
    return int(batch_id)


# ------------------------------------------------------------------------------------- refused by name, in SQL

ECHO = {"kind": "'echo'"}
REFUSED: dict[str, tuple[dict[str, str], str]] = {
    "items no array": (ECHO | {"items": "'{}'"}, "batches_items_is_array"),
    "items a text": (ECHO | {"items": "'\"abc\"'"}, "batches_items_is_array"),
    "items null in JSON": (ECHO | {"items": "'null'"}, "batches_items_is_array"),
    "too many items": (ECHO | {"items": "to_jsonb(array_fill(1, ARRAY[1000001]))"}, "batches_items_fit"),
    "a payload of 5 MB": (
        ECHO | {"payload": "(SELECT jsonb_agg(md5(n::text)) FROM generate_series(1, 150000) n)"},
        "batches_payload_fits",
    ),
    "no kind": ({"payload": "'{}'"}, 'null value in column "kind"'),
    "an empty kind": ({"kind": "''"}, "batches_kind_is_named"),
    "a kind too long": ({"kind": "repeat('k', 201)"}, "batches_kind_is_named"),
    "an empty queue": (ECHO | {"queue": "''"}, "batches_queue_is_named"),
    "a payload that is NULL": (ECHO | {"payload": "NULL"}, 'null value in column "payload"'),
    "a payload that is no JSON": (ECHO | {"payload": "'{bad'"}, "invalid input syntax for type json"),
    "NUL in the payload": (ECHO | {"payload": r"""'"\u0000"'"""}, "unsupported Unicode escape sequence"),
    "a lone surrogate": (ECHO | {"payload": r"""'"\ud800"'"""}, "invalid input syntax for type json"),
    "no attempts": (ECHO | {"max_attempts": "0"}, "batches_max_attempts_is_positive"),
    "attempts below zero": (ECHO | {"max_attempts": "-5"}, "batches_max_attempts_is_positive"),
    "an attempt below zero": (ECHO | {"attempt": "-1"}, "batches_attempts_are_left"),
    "attempts used up": (ECHO | {"attempt": "5"}, "batches_attempts_are_left"),
    "a tolerance below zero": (ECHO | {"max_failed_items": "-1"}, "batches_max_failed_items_is_not_negative"),
    "no time": (ECHO | {"timeout_seconds": "0"}, "batches_timeout_is_positive"),
    "a priority too large": (ECHO | {"priority": "32768"}, "smallint out of range"),
    "run_at infinity": (ECHO | {"run_at": "'infinity'"}, "batches_run_at_is_finite"),
    "run_at before time": (ECHO | {"run_at": "'-infinity'"}, "batches_run_at_is_finite"),
    "run_at no time": (ECHO | {"run_at": "'tomorrowish'"}, "invalid input syntax for type timestamp"),
    "an unknown status": (ECHO | {"status": "'running'"}, "batches_status_is_known"),
    "processing without a claim": (ECHO | {"status": "'processing'"}, "batches_claim_is_whole"),
    "completed without an end": (ECHO | {"status": "'completed'"}, 'violates check constraint "'),
    "counters without items": (ECHO | {"items_done": "1"}, "batches_counters_fit_items"),
    "counters below zero": (ECHO | {"items": "'[1]'", "items_failed": "-1"}, "batches_counters_fit_items"),
    "an empty unique key": (ECHO | {"unique_key": "''"}, "batches_unique_key_fits"),
    "a unique key too long": (ECHO | {"unique_key": "repeat('k', 1001)"}, "batches_unique_key_fits"),
    "errors no array": (ECHO | {"errors": "'{}'"}, "batches_errors_is_array"),
    "an id of one's own": (ECHO | {"id": "7"}, "cannot insert a non-DEFAULT value into column"),
}


@pytest.mark.parametrize("bad", REFUSED)
def test_it_is_refused_at_the_insert_by_name(conn: psycopg.Connection, bad: str) -> None:
    columns, said = REFUSED[bad]
    with pytest.raises(psycopg.Error) as caught:
        insert(conn, **columns)
    assert said in str(caught.value)
    assert values(conn, "SELECT count(*) FROM batchq.all_batches") == [0]


# ---------------------------------------------------------------------------------- the end of its own batch only

DEEP = "(repeat('[', 10000) || repeat(']', 10000))::jsonb"
LONG_NUMBER = "repeat('9', 5000)::jsonb"
FAILS: dict[str, tuple[dict[str, str], str]] = {
    "payload no object": (
        {"kind": "'order'", "payload": "'7'"},
        "InvalidInput: the payload does not fit Order: value: ",
    ),
    "payload null in JSON": ({"kind": "'order'", "payload": "'null'"}, "InvalidInput: the payload does not fit Order"),
    "a wrong type": (
        {"kind": "'order'", "payload": """'{"number": "seven"}'"""},
        "InvalidInput: the payload does not fit Order: number: Input should be a valid integer",
    ),
    "a missing field": ({"kind": "'order'"}, "InvalidInput: the payload does not fit Order: number: Field required"),
    "a deep payload": ({"kind": "'echo'", "payload": DEEP}, "InvalidInput: the payload cannot be read in Python: "),
    "a deep payload, async": (
        {"kind": "'echo_async'", "payload": DEEP},
        "InvalidInput: the payload cannot be read in Python: ",
    ),
    "a long number": (
        {"kind": "'echo'", "payload": LONG_NUMBER},
        "InvalidInput: the payload cannot be read in Python: ValueError: Exceeds the limit (4300 digits)",
    ),
    "a long number, async": (
        {"kind": "'echo_async'", "payload": LONG_NUMBER},
        "InvalidInput: the payload cannot be read in Python: ValueError: Exceeds the limit (4300 digits)",
    ),
    "a long number for a model": (
        {"kind": "'order'", "payload": f"jsonb_build_object('number', {LONG_NUMBER})"},
        "InvalidInput: the payload cannot be read in Python: ",
    ),
    "a deep cursor": ({"kind": "'cursor'", "cursor": DEEP}, "InvalidInput: the cursor cannot be read in Python: "),
    "a deep item": (
        {"kind": "'items'", "items": f"jsonb_build_array(1, {DEEP})"},
        "InvalidInput: the items cannot be read in Python: ",
    ),
    "a deep item, async": (
        {"kind": "'items_async'", "items": f"jsonb_build_array(1, {DEEP})"},
        "InvalidInput: the items cannot be read in Python: ",
    ),
    "a long number among the items": (
        {"kind": "'sum'", "items": f"jsonb_build_array(1, {LONG_NUMBER})"},
        "InvalidInput: the items cannot be read in Python: ",
    ),
}


@pytest.mark.parametrize("bad", FAILS)
def test_it_fails_its_own_batch_with_its_reason(dsn: str, conn: psycopg.Connection, tmp_path: Path, bad: str) -> None:
    columns, said = FAILS[bad]
    with running_worker(make_app(), dsn, concurrency=1):
        batch_id = insert(conn, **columns)
        wait_for_status(conn, batch_id, "failed")
        [error] = values(conn, "SELECT errors -> 0 ->> 'error' FROM batchq.all_batches WHERE attempt = 1")
        assert error.startswith(said)
        step("the same worker goes on")
        assert await_status(conn, put(conn, "echo", "fine"), "completed").result == "fine"
    step("the command line shows it")
    command = CommandLine(dsn, tmp_path)
    for arguments in (["show", str(batch_id)], ["show", "--json", str(batch_id)], ["status"]):
        ended = command(*arguments)
        assert (ended.code, ended.err) == (0, "")
        assert said[:60] in ended.out


WORKS: dict[str, tuple[dict[str, str], Any]] = {
    "duplicate keys": ({"payload": """'{"a": 1, "a": 2}'"""}, {"a": 2}),
    "a payload of 3 MB": (
        {"payload": "(SELECT jsonb_agg(md5(n::text)) FROM generate_series(1, 20000) n)"},
        lambda result: len(result) == 20_000,
    ),
    "a deep payload": (
        {"payload": "(repeat('[', 500) || repeat(']', 500))::jsonb"},
        lambda result: result[0][0][0][0] != [],
    ),
    "a large number": ({"payload": "'1e400'"}, 10**400),
    "a small number": ({"payload": "'1e-400'"}, 0.0),
    "an empty text": ({"payload": "'\"\"'"}, ""),
    "a payload that looks like SQL": (
        {"payload": "'\"''); DROP SCHEMA batchq CASCADE; --\"'"},
        "'); DROP SCHEMA batchq CASCADE; --",
    ),
    "unicode": ({"payload": "'\"\\u202e\\u200d\U0001f469\U0001f3fd\u0301 \\ufffe\"'"}, "\u202e\u200d👩🏽\u0301 \ufffe"),
    "a percent sign": ({"payload": "'\"%s %(x)s %%\"'"}, "%s %(x)s %%"),
    "far in the past": ({"run_at": "'4713-01-01 00:00:00 BC'"}, {}),
    "the most attempts": ({"max_attempts": "32767"}, {}),
    "the longest time": ({"timeout_seconds": "2147483647"}, {}),
    "the lowest priority": ({"priority": "32767"}, {}),
}


@pytest.mark.parametrize("odd", WORKS)
def test_what_is_odd_but_right_is_worked(dsn: str, conn: psycopg.Connection, odd: str) -> None:
    columns, expected = WORKS[odd]
    with running_worker(make_app(), dsn, concurrency=1):
        batch_id = insert(conn, kind="'echo'", **columns)
        wait_for_status(conn, batch_id, "completed")
        [result] = values(conn, "SELECT result FROM batchq.all_batches WHERE id = %s", batch_id)
        assert expected(result) if callable(expected) else result == expected
        await_status(conn, put(conn, "echo"), "completed")


NAMES = [
    "'; DROP SCHEMA batchq CASCADE; --",
    "a\"b'c\\d",
    "[red]kind[/]",
    "%s",
    "{}",
    "new\nline\ttab\x1b[31m",
    "\u202eright to left",
    "👩🏽‍🚀" * 8,
    " ",
    "../../etc/passwd",
]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_any_text_may_be_a_name(dsn: str, conn: psycopg.Connection, tmp_path: Path, name: str) -> None:
    app = make_app()
    app.handler(name)(lambda batch: [batch.kind, batch.queue])
    batch_id = put(conn, name, queue=name, unique_key=name)
    waiting = put(conn, name, queue=name, delay_seconds=3600)
    with running_worker(app, dsn, queues=[name]):
        assert await_status(conn, batch_id, "completed").result == [name, name]
    step("it can be looked at")
    batchq_command = CommandLine(dsn, tmp_path)
    for command in (["status"], ["show", str(batch_id)], ["show", str(waiting)]):
        ended = batchq_command(*command)
        assert (ended.code, ended.err) == (0, "")
        assert "\x1b" not in ended.out
    rows = batchq_command("status", "--json", "--kind", name).json["batches"]
    assert [row["kind"] for row in rows] == [name, name]
    assert values(conn, "SELECT count(*) FROM batchq.all_batches") == [2]


def test_a_kind_that_no_worker_knows_stays_pending_and_shows_up(dsn: str, conn: psycopg.Connection) -> None:
    unknown = put(conn, "nobody")
    with running_worker(make_app(), dsn):
        await_status(conn, put(conn, "echo"), "completed")
        row = look(conn, unknown)
    assert (row.shown, row.attempt) == ("ready", 0)
    assert values(conn, "SELECT workers FROM batchq.queues WHERE kind = 'nobody'") == [0]


def test_bad_items_fail_alone(dsn: str, conn: psycopg.Connection) -> None:
    bad = [{"number": "x"}, None, [], {"number": 2**70}, {"Number": 1}, "\u202e", {"number": 1, "more": {}}]
    with running_worker(make_app(), dsn):
        row = await_status(conn, put(conn, "orders", items=[{"number": 1}, *bad]), "failed")
        await_status(conn, put(conn, "echo"), "completed")
    assert (row.items_done, row.items_failed, row.attempt) == (3, 5, 1)
    assert [item.item for item in failed_items(conn, row.id)] == [bad[0], bad[1], bad[2], bad[4], bad[5]]


def test_a_long_number_in_an_item_can_be_recorded_as_failed(dsn: str, conn: psycopg.Connection) -> None:
    app = make_app()

    @app.item_handler("picky")
    def picky(item: Any) -> None:
        raise ValueError(f"not {str(item)[:3]}")

    batch_id = insert(
        conn, kind="'picky'", items="jsonb_build_array(1e4000, 1e-300, 1.50, '\"\\ufffe\"'::jsonb)", max_attempts="1"
    )
    with running_worker(app, dsn):
        await_status(conn, batch_id, "failed")
    assert len(failed_items(conn, batch_id)) == 4
    same = (
        "SELECT f.item = b.items -> item_index FROM batchq.failed_items f JOIN batchq.all_batches b ON b.id = batch_id"
    )
    assert set(values(conn, same)) == {True}


# ------------------------------------------------------------------------------------------------ enqueue refuses

PYTHON: dict[str, tuple[dict[str, Any], str]] = {
    "a kind that is no text": ({"kind": 7}, "kind must be a text, not 7"),
    "NUL in the kind": ({"kind": "a\0b"}, "kind has a NUL character or a lone surrogate"),
    "a surrogate in the queue": ({"kind": "echo", "queue": "\ud800"}, "queue has a NUL character or a lone surrogate"),
    "NaN": ({"kind": "echo", "payload": {"x": float("nan")}}, "the payload cannot be stored as JSON"),
    "NUL": ({"kind": "echo", "payload": {"x": "\0"}}, "the payload cannot be stored as JSON: it has a NUL character"),
    "a set": ({"kind": "echo", "payload": {1}}, "Object of type set is not JSON serializable"),
    "an endless list": ({"kind": "echo", "payload": (loop := [], loop.append(loop))[0]}, "Circular reference"),
    "items a text": ({"kind": "items", "items": "abc"}, "items must be a list"),
    "items a mapping": ({"kind": "items", "items": {"a": 1}}, "items must be a list"),
    "items a number": ({"kind": "items", "items": 7}, "items must be a list"),
    "an attempt and a half": ({"kind": "echo", "max_attempts": 1.5}, "max_attempts must be a whole number, not 1.5"),
    "a priority in words": ({"kind": "echo", "priority": "high"}, "priority must be a whole number, not 'high'"),
    "a delay in words": ({"kind": "echo", "delay_seconds": "soon"}, "delay_seconds must be a number, not 'soon'"),
    "a delay without end": ({"kind": "echo", "delay_seconds": float("inf")}, "delay_seconds must be a number, not inf"),
    "run_at a text": ({"kind": "echo", "run_at": "2030-01-01"}, "run_at must be a datetime with a time zone"),
}


@pytest.mark.parametrize("bad", PYTHON)
def test_enqueue_refuses_it_and_the_transaction_goes_on(conn: psycopg.Connection, bad: str) -> None:
    arguments, said = PYTHON[bad]
    with conn.transaction():
        with pytest.raises(batchq.InvalidInput) as caught:
            batchq.enqueue(conn, arguments["kind"], **{k: v for k, v in arguments.items() if k != "kind"})
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
        put(conn, "echo")
    assert values(conn, "SELECT count(*) FROM batchq.all_batches") == [1]


def nested(levels: int) -> Any:
    """Return a list in a list, and so on."""
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def test_enqueue_refuses_10000_levels(conn: psycopg.Connection) -> None:
    with pytest.raises(batchq.InvalidInput, match="the payload cannot be stored as JSON"):
        batchq.enqueue(conn, "echo", nested(10_000))


# ------------------------------------------------------------------------------------------------ far dates


def test_dates_beyond_pythons_can_be_looked_at(dsn: str, conn: psycopg.Connection, tmp_path: Path) -> None:
    far = insert(conn, kind="'echo'", run_at="'200000-01-01 00:00:00+00'")
    with running_worker(make_app(), dsn):
        await_status(conn, put(conn, "echo"), "completed")
        step("every command that looks works")
        command = CommandLine(dsn, tmp_path)
        for arguments in (["status"], ["show", str(far)], ["check"]):
            ended = command(*arguments)
            assert (ended.code, ended.err) == (0, "")
        assert command("show", str(far), "--json").json["next_run_at"].startswith("200000-01-01")
        assert command("status", "--json").json["batches"][1]["id"] == far
        with command.start("monitor", "--until-done", "--every-seconds", "0.05", "--json") as monitor:
            conn.execute("SELECT batchq.cancel(%s)", [far])
            monitor.communicate(timeout=20)
        assert monitor.returncode == 0
    assert values(conn, "SELECT status FROM batchq.all_batches WHERE id = %s", far) == ["cancelled"]


# ------------------------------------------------------------------------------------------------ settings, DSN, app

SETTINGS = {
    "a lease too short": ("BATCHQ_LEASE_SECONDS", "0.5", "greater than or equal to 1"),
    "a lease in words": ("BATCHQ_LEASE_SECONDS", "long", "valid number"),
    "a lease without end": ("BATCHQ_LEASE_SECONDS", "inf", "BATCHQ_LEASE_SECONDS"),
    "no slots": ("BATCHQ_CONCURRENCY", "0", "greater than or equal to 1"),
    "too many slots": ("BATCHQ_CONCURRENCY", "100000", "less than or equal to 1000"),
    "half a connection": ("BATCHQ_POOL_SIZE", "0.5", "BATCHQ_POOL_SIZE"),
    "a log format": ("BATCHQ_LOG_FORMAT", "xml", "BATCHQ_LOG_FORMAT: Input should be 'console' or 'json' (not 'xml')"),
    "a log level": ("BATCHQ_LOG_LEVEL", "loud", "BATCHQ_LOG_LEVEL"),
    "no queue": ("BATCHQ_QUEUES", " , ", "needs at least one queue"),
    "queues without a comma": (
        "BATCHQ_QUEUES",
        "mail bulk",
        "use a comma between queues: mail,bulk; a queue",
    ),
    "days below zero": ("BATCHQ_KEEP_FINISHED_DAYS", "-1", "BATCHQ_KEEP_FINISHED_DAYS"),
    "no DSN": ("BATCHQ_DSN", "", "BATCHQ_DSN is not set"),
    "no DSN at all": ("BATCHQ_DSN", "what?", "BATCHQ_DSN: not a Postgres DSN"),
    "a DSN of another database": ("BATCHQ_DSN", "mysql://me:secret-word@host/db", "BATCHQ_DSN: not a Postgres DSN"),
    "a port in words": ("BATCHQ_DSN", "postgresql://me:secret-word@127.0.0.1:abc/db", "BATCHQ_DSN: its host or port"),
    "a DSN with an option unknown": ("BATCHQ_DSN", "host=h passwort=secret-word", "BATCHQ_DSN: not a Postgres DSN"),
    "options that poolers drop": ("BATCHQ_DSN", "host=h options='-c x=y'", "options= does not survive a pooler"),
    "a host unknown": ("BATCHQ_DSN", "postgresql://me:secret-word@no.such.host.invalid/db", "cannot connect: "),
}


@pytest.mark.parametrize("bad", SETTINGS)
def test_a_wrong_setting_is_one_line_of_error(dsn: str, tmp_path: Path, bad: str) -> None:
    name, value, said = SETTINGS[bad]
    complaint = CommandLine(dsn, tmp_path)("worker", "tasks:app", "--drain", **{name: value}).complaint
    assert said in complaint
    assert "secret-word" not in complaint


def test_a_host_that_is_down_is_one_line_of_error(tmp_path: Path) -> None:
    command = CommandLine(f"postgresql://me:secret-word@127.0.0.1:{free_port()}/db", tmp_path)
    for arguments in (["status"], ["worker", "tasks:app"], ["migrate"], ["enqueue", "echo"]):
        complaint = command(*arguments).complaint
        assert complaint.startswith("cannot connect: connection failed")
        assert "secret-word" not in complaint


def test_a_database_that_is_not_there_is_one_line_of_error(dsn: str, admin_dsn: str, tmp_path: Path) -> None:
    away = psycopg.conninfo.make_conninfo(admin_dsn, dbname="no_such_database")
    for arguments in (["status"], ["worker", "tasks:app"]):
        ended = CommandLine(away, tmp_path)(*arguments)
        assert 'database "no_such_database" does not exist' in ended.complaint
        assert ended.code == 2


def test_a_wrong_password_is_one_line_of_error(admin_dsn: str, tmp_path: Path) -> None:
    with SupaSim(admin_dsn, password="right") as sim:
        ended = CommandLine(sim.dsn(password="secret-word"), tmp_path)("worker", "tasks:app")
    assert "password authentication failed" in ended.complaint
    assert "secret-word" not in ended.complaint
    assert ended.code == 2


def test_a_tenant_that_the_pooler_does_not_know_is_one_line_of_error(sim: SupaSim, tmp_path: Path) -> None:
    ended = CommandLine(sim.dsn(user="postgres.nobody"), tmp_path)("status")
    assert "tenant/user postgres.nobody not found" in ended.complaint
    assert ended.code == 2


def test_a_start_up_parameter_that_the_pooler_refuses_is_one_line_of_error(
    pgbouncer: PgBouncer, database: str, tmp_path: Path
) -> None:
    complaint = CommandLine(pgbouncer.dsn(database), tmp_path)("status", PGOPTIONS="-c work_mem=1MB").complaint
    assert "the environment's PGOPTIONS would be sent at the start of each connection; unset it" in complaint


def test_a_missing_schema_is_one_line_of_error(empty_dsn: str, tmp_path: Path) -> None:
    command = CommandLine(empty_dsn, tmp_path)
    for arguments in (["status"], ["worker", "tasks:app"], ["cancel", "1"], ["enqueue", "echo"], ["check"]):
        ended = command(*arguments)
        assert ended.complaint == "the database has no batchq schema; run: batchq migrate"
        assert ended.code == 2


def test_a_newer_schema_that_breaks_this_code_is_one_line_of_error(
    dsn: str, conn: psycopg.Connection, tmp_path: Path
) -> None:
    conn.execute("INSERT INTO batchq.migrations (version, name, breaking) VALUES (9998, 'harmless', false)")
    command = CommandLine(dsn, tmp_path)
    assert command("worker", "tasks:app", "--drain").code == 0
    conn.execute("INSERT INTO batchq.migrations (version, name, breaking) VALUES (9999, 'renamed', true)")
    for arguments in (["worker", "tasks:app"], ["status"]):
        assert command(*arguments).complaint == (
            "the schema is newer than this code, in a way that breaks it (renamed); upgrade batchq"
        )


def test_an_older_schema_is_one_line_of_error(dsn: str, conn: psycopg.Connection, tmp_path: Path) -> None:
    [name] = values(conn, "DELETE FROM batchq.migrations WHERE version = 5 RETURNING name")
    complaint = CommandLine(dsn, tmp_path)("worker", "tasks:app").complaint
    assert complaint == f"the schema is older than this code: {name!r} is missing; run: batchq migrate"


APPS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no module": ("nowhere:app", lambda _: None, "cannot import 'nowhere': ModuleNotFoundError"),
    "no app": ("tasks:nothing", lambda _: None, "'tasks' has no 'nothing'"),
    "a syntax error": (
        "broken:app",
        lambda here: (here / "broken.py").write_text("def broken(:"),
        "cannot import 'broken': SyntaxError",
    ),
    "an import that fails": (
        "failing:app",
        lambda here: (here / "failing.py").write_text("import nowhere"),
        "cannot import 'failing': ModuleNotFoundError",
    ),
    "a module that exits": (
        "exiting:app",
        lambda here: (here / "exiting.py").write_text("raise SystemExit(0)"),
        "cannot import 'exiting': SystemExit",
    ),
    "no handlers": (
        "empty:app",
        lambda here: (here / "empty.py").write_text("import batchq\napp = batchq.App()"),
        "'empty:app' has no handlers",
    ),
    "a kind twice": (
        "twice:app",
        lambda here: (here / "twice.py").write_text(
            "import batchq\napp = batchq.App()\nfor _ in 'ab':\n    @app.handler('k')\n    def work(batch): pass\n"
        ),
        "cannot import 'twice': ConfigError: kind 'k' has a handler already: work",
    ),
    "no text that Python reads": (
        "binary:app",
        lambda here: (here / "binary.py").write_bytes(b"\xff\xfe\x00"),
        "cannot import 'binary': ",
    ),
}


@pytest.mark.parametrize("bad", APPS)
def test_an_app_that_cannot_be_had_is_one_line_of_error(dsn: str, tmp_path: Path, bad: str) -> None:
    name, write, said = APPS[bad]
    write(tmp_path)
    ended = CommandLine(dsn, tmp_path)("worker", name)
    assert ended.complaint.startswith(said)
    assert ended.code == 2


if __name__ == "__main__":
    run_alone(__file__)
