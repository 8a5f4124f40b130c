"""Databases in other encodings than UTF8, and texts that they cannot hold: only its own batch is disturbed."""

import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

import batchq
from batchq.cli import main
from batchq.errors import ConfigError
from batchq.postgres.connections import connect
from batchq.postgres.link import Link
from batchq.postgres.migrate import migrate
from batchq.postgres.server_checks import check_server
from batchq.postgres.statements import session, views
from tests.support.batches import drain, look
from tests.support.databases import Databases
from tests.support.poolers import PgBouncer
from tests.support.servers import Server
from tests.support.steps import step
from tests.support.supasim import SupaSim

ENCODINGS = ["UTF8", "LATIN1", "EUC_JP", "SQL_ASCII"]
TEXTS = {"UTF8": "\u20ac \U0001f600", "LATIN1": "\u00e9", "EUC_JP": "\u65e5\u672c", "SQL_ASCII": "\u20ac \U0001f600"}
FOREIGN = {"LATIN1": "\u20ac", "EUC_JP": "\U0001f600"}  # what those two do not have

Conn = psycopg.Connection[Any]


@pytest.fixture
def odd_dsn(server: Server, databases: Databases, encoding: str) -> Iterator[str]:
    """Return the DSN of a migrated database in *encoding*."""
    with databases.in_encoding(encoding) as name:
        migrate(server.dsn(name))
        yield server.dsn(name)


@pytest.fixture
def app() -> batchq.App:
    """Return an app whose handlers return, raise, or fail an item with, what the payload says."""
    app = batchq.App()

    @app.handler("result")
    def result(batch: batchq.Batch) -> Any:
        return batch.payload

    @app.handler("error")
    def error(batch: batchq.Batch) -> None:
        raise ValueError(json.loads(batch.payload))

    @app.item_handler("items")
    def item(item: Any) -> None:
        if item != "good":
            raise ValueError(json.loads(item))

    return app


def statuses(conn: Conn) -> list[str]:
    """Return the status of each batch, in the order of their ids."""
    return [status for (status,) in conn.execute("SELECT status FROM batchq.all_batches ORDER BY id")]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_database_in_any_encoding_works_texts_that_it_can_hold(odd_dsn: str, encoding: str, app: batchq.App) -> None:
    text = TEXTS[encoding]
    with connect(odd_dsn) as conn:
        step("payloads, results and errors, of %s", text)
        done = batchq.enqueue(conn, "result", {"text": text})
        failed = batchq.enqueue(conn, "error", json.dumps(text), max_attempts=1)
        items = batchq.enqueue(conn, "items", items=["good", json.dumps(text)], max_attempts=1)
        batchq.enqueue_many(conn, "result", [text] * 20)
        drain(app, odd_dsn)
        assert statuses(conn) == ["completed", "failed", "failed", *["completed"] * 20]
        assert look(conn, done or 0).result == {"text": text}
        assert look(conn, failed or 0).errors[0]["error"] == f"ValueError: {text}"
        assert views.failed_item_objects(conn, items or 0, 5)[0]["error"] == f"ValueError: {text}"


@pytest.mark.parametrize("encoding", list(FOREIGN))
def test_a_text_that_the_database_cannot_hold_concerns_its_own_batch_only(
    odd_dsn: str, encoding: str, app: batchq.App
) -> None:
    foreign = json.dumps(FOREIGN[encoding])
    escaped = FOREIGN[encoding].encode("ascii", "backslashreplace").decode()

    @app.handler("foreign result")
    def foreign_result(batch: batchq.Batch) -> Any:
        return json.loads(batch.payload)

    with connect(odd_dsn) as conn:
        step("given results and errors of handlers and items that it cannot hold, among others")
        batchq.enqueue_many(conn, "result", ["x"] * 20)
        result = batchq.enqueue(conn, "foreign result", foreign)
        error = batchq.enqueue(conn, "error", foreign, max_attempts=1)
        items = batchq.enqueue(conn, "items", items=["good", foreign], max_attempts=1)
        batchq.enqueue_many(conn, "result", ["x"] * 20)
        drain(app, odd_dsn)
        assert statuses(conn) == [*["completed"] * 20, *["failed"] * 3, *["completed"] * 20]
        step("then a result fails its batch, and errors are stored with escapes")
        assert "the outcome could not be stored: UntranslatableCharacter" in look(conn, result or 0).errors[0]["error"]
        assert look(conn, error or 0).errors[0]["error"] == f"ValueError: {escaped}"
        assert views.failed_item_objects(conn, items or 0, 5)[0]["error"] == f"ValueError: {escaped}"


@pytest.mark.parametrize("encoding", list(FOREIGN))
def test_enqueue_of_a_text_that_the_database_cannot_hold_is_refused_in_a_line(
    odd_dsn: str, encoding: str, capsys: pytest.CaptureFixture[str]
) -> None:
    payload = json.dumps(FOREIGN[encoding], ensure_ascii=False)
    assert main(["enqueue", "result", "--payload", payload, "--dsn", odd_dsn]) == 2
    assert f'has no equivalent in encoding "{encoding}"' in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["SQL_ASCII"])
def test_a_payload_that_is_not_utf8_fails_its_own_batch_only(
    odd_dsn: str, app: batchq.App, capsys: pytest.CaptureFixture[str]
) -> None:
    step("given a payload in LATIN1 in the middle of others, written by a client that asks for no UTF-8")
    with connect(odd_dsn) as conn, psycopg.connect(odd_dsn, autocommit=True, client_encoding="SQL_ASCII") as foreign:
        batchq.enqueue_many(conn, "result", ["x"] * 20)
        foreign.execute(b"INSERT INTO batchq.batches (kind, payload) VALUES ('result', '\"\xe9\"')")
        batchq.enqueue_many(conn, "result", ["x"] * 20)
        drain(app, odd_dsn)
        assert statuses(conn) == [*["completed"] * 20, "failed", *["completed"] * 20]
        [error] = look_at_errors(conn, 21)
        assert error.startswith("InvalidInput: payload or cursor cannot be read as UTF-8: invalid byte sequence")
    step("and a person is told so, without a traceback")
    assert main(["show", "21", "--dsn", odd_dsn]) == 2
    assert "invalid byte sequence" in capsys.readouterr().err
    for command in ("status", "check", "doctor"):
        assert main([command, "--dsn", odd_dsn]) in (0, 1)


def look_at_errors(conn: Conn, batch_id: int) -> list[str]:
    """Return the errors of a batch, past its payload."""
    [(errors,)] = conn.execute("SELECT errors FROM batchq.all_batches WHERE id = %s", [batch_id]).fetchall()
    return [error["error"] for error in errors]


@pytest.mark.parametrize("encoding", ["LATIN1"])
def test_a_kind_that_the_database_cannot_hold_is_refused_at_the_start(odd_dsn: str, app: batchq.App) -> None:
    app.handler("\u20ac")(lambda _: None)
    with pytest.raises(ConfigError, match=r'the name of a queue or a kind: .* no equivalent in encoding "LATIN1"'):
        drain(app, odd_dsn)


# ------------------------------------------------------------------------------------- what the connection is told


def test_texts_travel_as_utf8_whatever_role_dsn_and_environment_say(
    admin_dsn: str, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    with psycopg.connect(admin_dsn, autocommit=True) as admin:
        admin.execute(f"ALTER DATABASE {database} SET client_encoding = 'LATIN1'".encode())
    for dsn in (admin_dsn, f"{admin_dsn} client_encoding=EUC_JP"):
        with connect(dsn) as conn:
            check_server(conn)
            assert session.role_and_encoding(conn)[1] == "UTF8"
        link = Link(dsn, 5)
        with link.reading() as conn:
            assert session.role_and_encoding(conn)[1] == "UTF8"
        link.close()


def test_texts_travel_as_utf8_through_pgbouncer(server: Server, databases: Databases) -> None:
    with databases.in_encoding("LATIN1") as name, PgBouncer(server) as bouncer:
        bouncer.warm_up(name)
        with connect(bouncer.dsn(name)) as conn:
            check_server(conn)
            for _ in range(4):
                assert session.role_and_encoding(conn)[1] == "UTF8"
        bouncer.forget(name)


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_pooler_that_drops_the_encoding_is_named_with_the_remedy(
    odd_dsn: str, encoding: str, capsys: pytest.CaptureFixture[str], app: batchq.App
) -> None:
    with SupaSim(odd_dsn) as sim:
        assert main(["check", "--dsn", sim.dsn()]) == 2
        found = capsys.readouterr().err
        assert f"client_encoding is {encoding}, not UTF8" in found
        assert "run: alter role postgres set client_encoding to 'UTF8'" in found
        assert main(["doctor", "--dsn", sim.dsn()]) == 2
        assert f"client_encoding is {encoding}, not UTF8" in capsys.readouterr().out.replace("\n", " ")
        with pytest.raises(ConfigError, match=f"client_encoding is {encoding}, not UTF8"):
            drain(app, sim.dsn())
    step("which helps")
    name = psycopg.conninfo.conninfo_to_dict(odd_dsn)["dbname"]
    with psycopg.connect(odd_dsn, autocommit=True) as admin:
        admin.execute(f"ALTER DATABASE {name} SET client_encoding = 'UTF8'".encode())
    with SupaSim(odd_dsn) as sim, connect(sim.dsn()) as conn:
        check_server(conn)
