"""The pages of docs/ do what they say: every code block runs, in order, and has the effect that is told."""

import base64
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import psycopg
import pytest
import sentry_sdk
from fastapi.testclient import TestClient
from psycopg.conninfo import conninfo_to_dict
from sentry_sdk.envelope import Envelope
from sentry_sdk.transport import Transport

import batchq
from batchq import enqueue
from batchq.app import load_app
from batchq.postgres import embedded
from batchq.testing import drain, running_worker
from tests.instruments import reference
from tests.support import settings_table
from tests.support.alone import run_alone
from tests.support.markdown import ROOT, Block, blocks
from tests.support.servers import free_port
from tests.support.steps import step
from tests.support.waiting import wait_until
from tests.support.web import answers

SECONDS_A_BLOCK = 180


def environment(dsn: str) -> dict[str, str]:
    """Return the environment of the blocks: our commands, and psql from the wheel if no other."""
    # The psql of the wheel first: Debian has a wrapper of that name which needs a client that may not be there.
    path = [str(Path(sys.executable).parent), str(embedded.wheel_programs()), os.environ["PATH"]]
    return os.environ | {"BATCHQ_DSN": dsn, "PATH": os.pathsep.join(path), "PYTHONWARNINGS": "ignore"}


def run(command: list[str], dsn: str, directory: Path, block: Block) -> str:
    """Run a command to its end, in *directory*; return what it printed. It must exit 0."""
    step("%s: %s", block.place, " ".join(command)[:100])
    done = subprocess.run(
        command,
        cwd=directory,
        env=environment(dsn),
        capture_output=True,
        text=True,
        timeout=SECONDS_A_BLOCK,
        check=False,
    )
    assert done.returncode == 0, f"{block.place} exited {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def run_sql(dsn: str, block: Block, *, keep: bool = True) -> None:
    """Run a block of SQL, in one transaction; with keep=False it is rolled back (roles are the whole server's)."""
    step("%s: %s", block.place, block.text[:60])
    with (
        psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as conn,
        conn.transaction(force_rollback=not keep),
    ):
        conn.execute(block.text.encode())


@contextmanager
def background(line: str, dsn: str, directory: Path, code: int = 0) -> Iterator[None]:
    """Run one command beside the others; it must stop well when it is told to: with that exit code."""
    with (directory / "log").open("a") as log:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {line}"], cwd=directory, env=environment(dsn), stderr=log, start_new_session=True
        )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == code


def counts(dsn: str, query: str) -> dict[str, int]:
    """Return what *query* counts, by its first column."""
    with psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as conn:
        return dict(conn.execute(query).fetchall())


BY_STATUS = "SELECT kind || ' ' || status, count(*) FROM batchq.batches GROUP BY 1"


def test_the_tutorial_leads_from_nothing_to_an_import_that_survives_a_kill(empty_dsn: str, tmp_path: Path) -> None:
    for block in blocks("docs/tutorial.md"):
        if block.language == "python":
            (tmp_path / "tasks.py").write_text(block.text)
        else:
            lines = [
                line for line in block.text.splitlines() if not line.startswith(("pip install", "export BATCHQ_DSN"))
            ]
            said = run(["bash", "-euo", "pipefail", "-c", "\n".join(lines)], empty_dsn, tmp_path, block)
            step(said)
            if "count(DISTINCT email)" in block.text:
                told = 8_000 if "retry" in block.text else 7_997
                assert said.splitlines()[-1] == f"{told}|{told}"
    assert counts(empty_dsn, BY_STATUS) == {"import_person completed": 4}
    assert counts(empty_dsn, "SELECT name, count(*) FROM people WHERE name = 'unknown' GROUP BY 1") == {"unknown": 3}


CRON_STUB = """
CREATE SCHEMA cron;
CREATE FUNCTION cron.schedule(name text, schedule text, command text) RETURNS bigint LANGUAGE plpgsql AS
$$ BEGIN EXECUTE command; EXECUTE command; RETURN 1; END $$;
"""  # pg_cron is no part of the test's server: what is scheduled runs twice, at once


def test_the_how_tos_work(dsn: str, admin_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    with psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as conn:
        conn.execute(CRON_STUB)
    for number, block in enumerate(blocks("docs/howto.md")):
        if block.language == "sql":
            run_sql(dsn, block)
        else:
            (tmp_path / f"howto_{number}.py").write_text(block.text)
            monkeypatch.setenv("BATCHQ_DSN", admin_dsn if imports_other_client(block) else dsn)
            use_how_to(import_module(f"howto_{number}"), dsn)
    by_kind = counts(dsn, "SELECT kind || ' ' || status, count(*) FROM batchq.batches GROUP BY 1")
    assert by_kind == {
        "send_receipt pending": 2,  # one by the statement, one by the request
        "greet_customer pending": 1,
        "refresh_prices pending": 1,
        "summarize completed": 1,
    }


def use_how_to(module: ModuleType, dsn: str) -> None:
    """Use what a block of Python defines: a web service, or an app."""
    if hasattr(module, "api"):
        with TestClient(module.api) as client:
            answer = client.post("/orders", params={"email": "bob@example.com"})
        assert answer.status_code == 200
        assert answer.json()["batch"] > 0
        return
    with psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as conn:
        enqueue(conn, "summarize", items=[{"id": number, "text": "a text"} for number in range(200)], max_attempts=3)
    drain(module.app, dsn)


def test_the_readme_shows_every_setting() -> None:
    assert settings_table.shown() == settings_table.table(), "run: python tests/support/settings_table.py"


# Clients that set their session's state by themselves, as their users' poolers may let them: not ours to answer for.
OTHER_CLIENTS = ("sqlalchemy", "asyncpg", "django")


LIBPQ = {"PGHOST": "host", "PGPORT": "port", "PGUSER": "user", "PGPASSWORD": "password", "PGDATABASE": "dbname"}
DJANGO_SETTINGS = """
import os
import django
from django.conf import settings

names = {"NAME": "PGDATABASE", "USER": "PGUSER", "PASSWORD": "PGPASSWORD", "HOST": "PGHOST", "PORT": "PGPORT"}
database = {name: os.environ.get(variable, "") for name, variable in names.items()}
database |= {"ENGINE": "django.db.backends.postgresql"}
settings.configure(DATABASES={"default": database, "queue": database})
django.setup()
"""


def imports_other_client(block: Block) -> bool:
    """Return whether a block imports a client that sets its session's state by itself."""
    return any(re.search(rf"^(import|from) {client}", block.text, re.MULTILINE) for client in OTHER_CLIENTS)


def test_each_way_to_enqueue_that_the_docs_show_works(
    dsn: str, admin_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for block in blocks("docs/enqueue.md"):
        if block.language == "sql":
            run_sql(dsn, block)
        elif block.language == "python":
            used = conninfo_to_dict(admin_dsn if imports_other_client(block) else dsn)
            for variable, key in LIBPQ.items():
                monkeypatch.setenv(variable, str(used[key])) if key in used else monkeypatch.delenv(variable, False)
            before = DJANGO_SETTINGS if "django" in block.text else ""
            run([sys.executable, "-c", before + block.text], dsn, tmp_path, block)
        else:
            run(["bash", "-euo", "pipefail", "-c", block.text], dsn, tmp_path, block)
    by_kind = counts(dsn, "SELECT kind, count(*) FROM batchq.batches GROUP BY 1")
    # send_receipt: psql 2, command line 1, psycopg 1 + 1000, SQLAlchemy 1 + 10, Django 2, asyncpg 1 + 10
    assert by_kind.pop("import_contact") == 1  # from the CSV file
    assert by_kind == {"send_reminder": 1, "refresh_prices": 1, "send_receipt": 1028, "check_site": 201}
    # (check_site: 20,000 items in batches of 100, and one batch from the shell; the table of domains is still empty)
    assert counts(dsn, "SELECT id::text, count(*) FROM orders GROUP BY 1") == dict.fromkeys(("42", "43", "44", "45"), 1)


def test_the_hooks_of_the_docs_do_what_is_told(
    dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "hooked.py").write_text("\n\n".join(block.text for block in blocks("docs/hooks.md")))
    monkeypatch.syspath_prepend(tmp_path)
    sent: list[dict[str, Any]] = []
    sentry_sdk.init(dsn="http://key@localhost/1", transport=recording(sent), default_integrations=False)
    with psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as conn:
        asked = enqueue(conn, "ask", {"question": "what"})
        failed = enqueue(conn, "divide", {"by": 0}, max_attempts=1)
        drain(load_app("hooked:app"), dsn, raises=False)
        infos = [batchq.get(conn, batch_id) for batch_id in (asked, failed) if batch_id]
    sentry_sdk.get_client().close()
    assert [info and (info.status, info.result) for info in infos] == [("completed", "WHAT"), ("failed", None)]
    assert "took 0.0" in caplog.text
    assert f"divide {failed} failed: ZeroDivisionError: division by zero" in caplog.text
    by_exception, by_message = sorted(sent, key=lambda event: "message" in event)
    assert by_exception["contexts"]["batch"] == {"id": failed, "kind": "divide", "attempt": 1}
    assert by_exception["exception"]["values"][0]["type"] == "ZeroDivisionError"
    assert by_message["message"] == "divide failed: ZeroDivisionError: division by zero"


def recording(sent: list[dict[str, Any]]) -> type[Transport]:
    """Return a transport of Sentry's that puts events into *sent*."""

    class Recording(Transport):
        def capture_envelope(self, envelope: Envelope) -> None:
            if (event := envelope.get_event()) is not None:
                sent.append(dict(event))

    return Recording


def test_what_the_page_about_python_shows_runs(handlers_dsn: str, tmp_path: Path) -> None:
    with running_worker(load_app("tasks:app"), handlers_dsn):
        said = [
            run([sys.executable, "-c", block.text], handlers_dsn, tmp_path, block) for block in blocks("docs/python.md")
        ]
    assert "completed 3\n" in said[0]
    assert said[1] == "7\n"


@pytest.fixture
def handlers_dsn(dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a database with the tables that docs/handlers.md writes to, and its blocks as the module tasks."""
    (tmp_path / "tasks.py").write_text(
        "\n\n".join(b.text for b in blocks("docs/handlers.md") if b.language == "python")
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tasks", raising=False)
    with psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as conn:
        conn.execute("CREATE TABLE contacts (email text, batch_id bigint)")
        conn.execute("CREATE TABLE pages (number integer)")
        conn.execute("CREATE TABLE charges (order_id integer)")
    return dsn


def test_the_handlers_of_the_docs_do_what_is_told(handlers_dsn: str) -> None:
    contacts = [{"email": f"{n}@example.com", "age": n} for n in (30, 40, 200)]
    with psycopg.connect(handlers_dsn, autocommit=True, prepare_threshold=None) as conn:
        enqueue(conn, "add", {"numbers": [1, 2, 3]})
        enqueue(conn, "wait_for_file", {"ready": True})
        enqueue(conn, "wait_for_file", {"cancelled": True})
        enqueue(conn, "wait_for_file")
        enqueue(conn, "greet", {"email": "a@example.com", "age": 1})
        enqueue(conn, "greet", {"email": "a@example.com"})
        enqueue(conn, "check_contact", items=contacts, max_attempts=1)
        enqueue(conn, "import_contact", items=contacts)
        enqueue(conn, "import_contacts", items=[*contacts, {}], max_failed_items=1, max_attempts=1)
        enqueue(conn, "import_contacts_async", items=contacts)
        enqueue(conn, "copy_pages", {"pages": 3})
        enqueue(conn, "charge", {"order_id": 42})
    drain(load_app("tasks:app"), handlers_dsn, raises=False)
    assert counts(handlers_dsn, BY_STATUS) == {
        "add completed": 1,
        "wait_for_file completed": 1,
        "wait_for_file cancelled": 1,
        "wait_for_file pending": 1,
        "greet completed": 1,
        "greet failed": 1,
        "check_contact failed": 1,
        "import_contact completed": 1,
        "import_contacts completed": 1,
        "import_contacts_async completed": 1,
        "copy_pages completed": 1,
        "charge completed": 1,
    }
    assert set(counts(handlers_dsn, "SELECT email, count(*) FROM contacts GROUP BY 1").values()) == {3}
    assert counts(handlers_dsn, "SELECT 'all', count(*) FROM pages") == {"all": 3}
    assert counts(handlers_dsn, "SELECT 'all', count(*) FROM charges") == {"all": 1}


def test_a_batch_lives_through_the_protocol_as_the_page_says(dsn: str) -> None:
    for block in blocks("docs/protocol.md"):
        if block.language == "sql":
            run_sql(dsn, block)
    assert counts(dsn, BY_STATUS) == {"resize pending": 1}
    items = "SELECT CASE item_index WHEN 1 THEN item #>> '{}' END, count(*) FROM batchq.failed_items GROUP BY 1"
    assert counts(dsn, items) == {"b.png": 1}


def test_handlers_with_an_orm_complete_their_batches(
    dsn: str, admin_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "orm_tasks.py").write_text("\n\n".join(block.text for block in blocks("docs/orm.md")))
    monkeypatch.syspath_prepend(tmp_path)
    names = {"host": "PGHOST", "port": "PGPORT", "user": "PGUSER", "password": "PGPASSWORD", "dbname": "PGDATABASE"}
    for name, value in psycopg.conninfo.conninfo_to_dict(admin_dsn).items():
        if name in names:
            monkeypatch.setenv(names[name], str(value))
    with psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as conn:
        conn.execute("CREATE TABLE invoices (id serial PRIMARY KEY, order_id integer NOT NULL)")
        enqueue(conn, "invoice", {"order_id": 1})
        enqueue(conn, "invoice_async", {"order_id": 2})
        enqueue(conn, "invoices", items=list(range(3, 303)))
    drain(load_app("orm_tasks:app"), dsn)
    assert set(counts(dsn, BY_STATUS)) == {"invoice completed", "invoice_async completed", "invoices completed"}
    assert counts(dsn, "SELECT count(DISTINCT order_id)::text, count(*) FROM invoices") == {"302": 302}
    import_module("orm_tasks").engine.dispose()


def test_the_sql_of_the_operations_page_runs(dsn: str, admin_dsn: str) -> None:
    for block in blocks("docs/operations.md"):
        assert block.language == "sql"
        run_sql(admin_dsn if "CREATE ROLE" in block.text else dsn, block, keep=False)


def test_what_the_steering_page_shows_runs(dsn: str, tmp_path: Path) -> None:
    with psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as conn:
        for number in range(10):
            enqueue(conn, "send_receipt" if number % 2 else "check_site", queue="slow" if number > 5 else "default")
        conn.execute("SELECT batchq.cancel(id) FROM batchq.batches WHERE id <= 2")
    for block in blocks("docs/steering.md"):
        if block.language == "sql":
            run_sql(dsn, block)
        else:
            assert block.language == "bash"
            run(["bash", "-euo", "pipefail", "-c", block.text], dsn, tmp_path, block)
    assert counts(dsn, "SELECT coalesce(queue, 'any'), count(*) FROM batchq.pauses GROUP BY 1") == {"slow": 1}
    verbs = counts(dsn, "SELECT verb, count(*) FROM batchq.audit GROUP BY 1")
    assert verbs.keys() >= {"cancel", "snooze", "set_priority", "move", "pause", "resume"}


ENQUEUES = """import os, batchq, psycopg
conn = psycopg.connect(os.environ["BATCHQ_DSN"], autocommit=True)
orders = [{"customer": "customer 13"}]
"""


def test_what_the_page_about_limits_shows_runs(dsn: str, tmp_path: Path) -> None:
    with psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as conn:
        conn.execute("SELECT batchq.throttle('mail', 'send_receipt', key, 60) FROM (VALUES (NULL), ('acme')) v(key)")
    limits = "SELECT queue || coalesce(' ' || kind, ''), max_running FROM batchq.limits"
    for block in blocks("docs/limits.md"):
        if block.language == "sql":
            run_sql(dsn, block)
        elif block.language == "bash":
            run(["bash", "-euo", "pipefail", "-c", block.text], dsn, tmp_path, block)
        elif "batchq.App()" in block.text:
            (tmp_path / "tasks.py").write_text(block.text)
            run(["batchq", "worker", "tasks:app", "--drain"], dsn, tmp_path, block)
        else:
            run([sys.executable, "-c", ENQUEUES + block.text], dsn, tmp_path, block)
        if "INSERT INTO batchq.limits" in block.text:
            assert counts(dsn, limits) == {"mail send_receipt": 10, "bulk check_site": None}
    assert counts(dsn, limits) == {"bulk check_site": None}
    assert counts(dsn, "SELECT kind, max_running FROM batchq.declared_limits") == {
        "send_receipt": 10,
        "check_site": None,
    }
    assert counts(dsn, "SELECT queue, 1 FROM batchq.throttles") == {}
    assert counts(dsn, "SELECT key, count(*) FROM batchq.batches GROUP BY 1") == {"customer 12": 2, "customer 13": 1}
    assert counts(dsn, "SELECT coalesce(key, ''), count(*) FROM batchq.batches GROUP BY 1") == {
        "customer 12": 2,
        "customer 13": 1,
    }


PARTS = "SELECT result #>> '{}', 1 FROM batchq.batches WHERE kind = 'send_mail'"


def test_what_the_page_about_flows_shows_runs(dsn: str, tmp_path: Path) -> None:
    for block in blocks("docs/flows.md"):
        if block.language == "sql":
            run_sql(dsn, block)
        elif block.language == "bash":
            said = run(["bash", "-uo", "pipefail", "-c", block.text], dsn, tmp_path, block)
            assert "Batch 3: cancelled" in said
            assert "nothing was changed: batch 3 was cancelled already" in said, "by the SQL above"
        elif "batchq.App()" in block.text:
            (tmp_path / "tasks.py").write_text(block.text)
            with psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as conn:
                enqueue(conn, "import_file")
            run(["batchq", "worker", "tasks:app", "--drain"], dsn, tmp_path, block)
            assert counts(dsn, PARTS) == {"ann@example.com: 4006 rows, 0 parts failed": 1}
        else:
            run([sys.executable, "-c", ENQUEUES + block.text], dsn, tmp_path, block)
    statuses = counts(dsn, "SELECT id::text, 1 FROM batchq.batches WHERE kind = 'report' AND status = 'waiting'")
    assert len(statuses) == 1, "the one of Python"


ADDRESSES = """import os, batchq, psycopg
conn = psycopg.connect(os.environ["BATCHQ_DSN"], autocommit=True)
addresses = [f"Long Road {number}, Town" for number in range(100)]
"""
PLACES = """
CREATE TABLE places (address text);
CREATE TABLE customers (id integer, address text);
INSERT INTO customers SELECT n, format('Short Road %s, Town', n) FROM generate_series(1, 50) n;
"""


def test_what_the_page_about_spread_shows_runs(dsn: str, tmp_path: Path) -> None:
    addresses = [f"Main Street {number}, Town" for number in range(1000)]
    (tmp_path / "addresses.txt").write_text("\n".join(["nowhere", *addresses, "elsewhere"]))
    tasks, enqueues, python, insert, shown, acts = blocks("docs/spread.md")
    (tmp_path / "tasks.py").write_text(tasks.text)
    with psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as conn:
        conn.execute(PLACES)
    by_status = "SELECT format('%s %s', id, status), items_done FROM batchq.status"
    parts = "SELECT batch_id::text, count(*) FROM batchq.parts GROUP BY 1"
    with background("batchq workers 2 tasks:app", dsn, tmp_path):
        run(["bash", "-euo", "pipefail", "-c", enqueues.text], dsn, tmp_path, enqueues)
        assert counts(dsn, by_status) == {"1 completed": 1000}
        assert counts(dsn, parts) == {"1": 16}
        assert counts(dsn, "SELECT item #>> '{}', item_index FROM batchq.failed_items_of(1)") == {
            "nowhere": 0,
            "elsewhere": 1001,
        }
        run([sys.executable, "-c", ADDRESSES + python.text], dsn, tmp_path, python)
        run_sql(dsn, insert)
        ended = "SELECT items_total::text, items_done FROM batchq.status WHERE status = 'completed'"
        wait_until(lambda: counts(dsn, ended) == {"1002": 1000, "100": 100, "50": 50}, 30, "all to be completed")
        assert set(counts(dsn, parts).values()) == {16}
    run_sql(dsn, shown)
    assert counts(dsn, "SELECT kind, 1 FROM batchq.batches WHERE id = 1 AND status = 'pending'") == {"geocode": 1}
    said = run(["bash", "-euo", "pipefail", "-c", acts.text], dsn, tmp_path, acts)
    assert "elsewhere" in said
    assert counts(dsn, "SELECT status, 1 FROM batchq.batches WHERE id = 1") == {"cancelled": 1}
    assert counts(dsn, "SELECT 'all', count(DISTINCT address) - 1150 + count(*) - 1150 FROM places") == {"all": 0}


def test_what_the_page_about_sealed_payloads_shows_runs(
    dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = [block for block in blocks("docs/sealed.md") if block.language == "bash"]
    tasks, opens = [block for block in blocks("docs/sealed.md") if block.language == "python"]
    (tmp_path / "tasks.py").write_text(tasks.text)
    keys = f'{shell[0].text}\nprintf %s "$BATCHQ_ENCRYPTION_KEYS"'
    text = run(["bash", "-euo", "pipefail", "-c", keys], dsn, tmp_path, shell[0]).splitlines()[-1]
    monkeypatch.setenv("BATCHQ_ENCRYPTION_KEYS", text)
    run(["batchq", "worker", "tasks:app", "--drain"], dsn, tmp_path, tasks)
    said = run(["bash", "-euo", "pipefail", "-c", shell[1].text], dsn, tmp_path, shell[1])
    assert "4111 1111 1111 1111" in said
    assert '"charged": "1111"' in said
    with psycopg.connect(dsn, prepare_threshold=None) as conn:
        [(payload, result)] = conn.execute("SELECT payload, result FROM batchq.batches").fetchall()
    names: dict[str, Any] = {}
    exec(opens.text, names)
    key = base64.b64decode(text.partition(":")[2])
    assert names["open_envelope"](payload, key, "charge_card", "payload") == {"card": "4111 1111 1111 1111"}
    assert names["open_envelope"](result, key, "charge_card", "result") == {"charged": "1111"}


def test_the_recipes_of_the_readme_are_where_it_says_and_short() -> None:
    recipes = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Recipes\n")[2].partition("\n## ")[0]
    links = re.findall(r"\]\((docs/\w+\.md)#([\w-]+)\)", recipes)
    assert len(links) == 3
    for page, anchor in links:
        sections = re.split(r"^## ", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
        by_anchor = {text.partition("\n")[0].lower().replace(" ", "-"): text for text in sections}
        first = next(block for block in blocks(page) if block.language == "python" and "App()" in block.text)
        assert first.text in by_anchor[anchor]
        assert len(first.lines) < 15, first.place


SCHEDULED = "SELECT state, 1 FROM batchq.schedule_status"


def test_what_the_page_about_schedules_shows_runs(dsn: str, tmp_path: Path) -> None:
    for block in blocks("docs/schedules.md"):
        if block.language == "python":
            (tmp_path / "tasks.py").write_text(block.text)
            with background("batchq worker tasks:app", dsn, tmp_path):
                wait_until(lambda: counts(dsn, SCHEDULED) == {"active": 1}, 20, "the worker to know when it is due")
        elif block.language == "sql":
            run_sql(dsn, block)
        else:
            said = run(["bash", "-euo", "pipefail", "-c", block.text], dsn, tmp_path, block)
            assert "every day at 02:00 Europe/Berlin" in said or "invoices" in said
    assert counts(dsn, "SELECT kind, count(*) FROM batchq.batches GROUP BY 1") == {
        "nightly_report": 1,
        "send_digest": 1,
    }
    assert counts(dsn, "SELECT name, 1 FROM batchq.schedules") == {"nightly_report": 1, "digest": 1}


def test_the_tests_that_the_page_about_testing_shows_pass(admin_dsn: str, tmp_path: Path) -> None:
    orders, *tests = blocks("docs/testing.md")
    (tmp_path / "orders.py").write_text(orders.text)
    (tmp_path / "test_orders.py").write_text("\n\n".join(block.text for block in tests))
    variables = ["PYTEST_DISABLE_PLUGIN_AUTOLOAD=1", f"BATCHQ_TEST_DSN={admin_dsn}", "PYTHONWARNINGS=default"]
    options = ["-q", "-p", "batchq.testing.plugin", "-p", "no:cacheprovider", "-W", "error"]
    said = run(["env", *variables, sys.executable, "-m", "pytest", *options], admin_dsn, tmp_path, orders)
    count = sum(block.text.count("def test_") for block in tests)
    assert count >= 8
    assert f"{count} passed" in said


def test_what_the_monitoring_page_shows_runs(dsn: str, tmp_path: Path) -> None:
    workers, waits, tasks, traced, enqueues, sql = blocks("docs/monitoring.md")
    (tmp_path / "tasks.py").write_text(tasks.text)
    port = free_port()
    for line in workers.lines[1:]:
        step(line)
        count = int(re.search(r"batchq workers (\d)", line)[1]) if "workers" in line else 1
        with background(line.split("#")[0].replace("9400", str(port)), dsn, tmp_path):
            for number in range(count):
                for path in ("healthz", "readyz", "metrics"):
                    url = f"http://127.0.0.1:{port + number}/{path}"
                    wait_until(lambda url=url: answers(url), 30, url)
    run_sql(dsn, waits)
    run_sql(dsn, sql)
    run([sys.executable, "-c", enqueues.text], dsn, tmp_path, enqueues)
    said = run(["bash", "-c", f"{traced.lines[1].split('#')[0]} --drain"], dsn, tmp_path, traced)
    runs = [json.loads(text) for text in re.findall(r"^\{$.*?^\}$", said, re.MULTILINE | re.DOTALL)]
    assert sorted((run["name"], run["attributes"]["order.id"], len(run["links"])) for run in runs) == [
        ("process send_receipt", 42, 1),
        ("process send_receipt", 43, 1),
    ]


MOUNTED = """
import asyncio
import httpx

async def look():
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        ann = await client.get("/queue/limits", headers={"x-user": "ann"})
        eve = await client.get("/queue/limits", headers={"x-user": "eve"})
        stranger = await client.get("/queue/limits", headers={"accept": "text/html"})
    assert (ann.status_code, eve.status_code) == (200, 200)
    assert ("limits/set" in ann.text, "limits/set" in eve.text) == (True, False)
    assert (stranger.status_code, stranger.headers["location"]) == (303, "/login?next=%2Fqueue%2Flimits")

asyncio.run(look())
web.close()
"""
IN_DJANGO = """
import asyncio
import httpx

async def look():
    async with httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://localhost") as client:
        stranger = await client.get("/queue/", headers={"accept": "text/html"})
    assert (stranger.status_code, stranger.headers["location"]) == (303, "/accounts/login/?next=%2Fqueue%2F")

asyncio.run(look())
"""


def test_what_the_page_about_the_page_shows_runs(dsn: str, admin_dsn: str, tmp_path: Path) -> None:
    serve, mounted, in_django, role = blocks("docs/web.md")
    for line in serve.lines[1:]:
        port = free_port()
        with background(f"{line.split('#')[0]} --port {port}", dsn, tmp_path, -signal.SIGTERM):  # as uvicorn ends
            wait_until(lambda port=port: answers(f"http://127.0.0.1:{port}/"), 30, line)
    run([sys.executable, "-c", mounted.text + MOUNTED], dsn, tmp_path, mounted)
    settings = ["DJANGO_SETTINGS_MODULE=tests.support.django_project.settings", f"PYTHONPATH={ROOT}"]
    run(["env", *settings, sys.executable, "-c", in_django.text + IN_DJANGO], dsn, tmp_path, in_django)
    with psycopg.connect(admin_dsn, prepare_threshold=None) as conn, conn.transaction(force_rollback=True):
        enqueue(conn, "send_receipt")
        conn.execute(role.text.encode())
        conn.execute("SET LOCAL ROLE batchq_reader")
        assert conn.execute("SELECT kind FROM batchq.status").fetchall() == [("send_receipt",)]
        with pytest.raises(psycopg.errors.InsufficientPrivilege), conn.transaction():
            conn.execute("SELECT batchq.cancel(id) FROM batchq.status")


def test_the_reference_is_what_the_code_says(conn: psycopg.Connection) -> None:
    written = reference.PAGE.read_text(encoding="utf-8").splitlines()
    assert written == reference.page(conn).splitlines(), "run: python -m tests.instruments.reference"


def test_the_reference_has_every_function_that_the_docs_call_and_every_name_of_the_package() -> None:
    documents = [ROOT / "README.md", *(page for page in ROOT.glob("docs/*.md") if page != reference.PAGE)]
    text = "\n".join(page.read_text(encoding="utf-8") for page in documents if page.name != "design.md")
    called = set(re.findall(r"\bbatchq\.(\w+)\(", text)) - set(batchq.__all__)
    assert len(called) > 8
    assert called - set(reference.FUNCTIONS) == set()
    headings = set(re.findall(r"^### (\w+)$", reference.PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert set(batchq.__all__) <= headings


def test_links_between_documents_lead_somewhere() -> None:
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("tests/**/*.md")]:
        for part in document.read_text(encoding="utf-8").split("](")[1:]:
            target = part.split(")")[0].split("#")[0]
            assert target.startswith("http") or (document.parent / target).exists(), f"{document.name}: {target}"


def test_every_test_that_the_plan_names_exists() -> None:
    plan = (ROOT / "tests/batch_processor_test_plan.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:foundation|component|integration|e2e)/(?:attacks/)?test_\w+\.py)(?:::(test_\w+))?`", plan)
    assert len(named) > 50
    for file, test in named:
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert f"def {test}(" in text or not test, f"{file}::{test}"


if __name__ == "__main__":
    run_alone(__file__)
