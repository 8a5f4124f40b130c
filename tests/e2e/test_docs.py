"""The README and docs/ do what they say: every code block runs, in order, and has the effect that is told."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

import psycopg
import pytest
from fastapi.testclient import TestClient

import batchq
from batchq import enqueue
from batchq.app import load_app
from batchq.postgres import embedded
from batchq.testing import drain
from tests.instruments import newcomer, reference
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


def test_the_readme_leads_from_nothing_to_watching_work(empty_dsn: str, tmp_path: Path) -> None:
    read = blocks("README.md")
    assert [block.language for block in read].count("python") == 2
    with ExitStack() as workers:
        for block in read:
            run_readme_block(block, empty_dsn, tmp_path, workers)
        step("wait for the workers to finish what the last block has enqueued")
        wait_until(lambda: counts(empty_dsn, BY_STATUS).get("import_contact completed") == 5, 30, "the import")
        wait_until(lambda: counts(empty_dsn, BY_STATUS).get("send_receipt completed") == 2, 30, "the receipts")
        wait_until(lambda: counts(empty_dsn, BY_STATUS).get("check_site failed") == 1, 30, "the retried sites")
    contacts = counts(empty_dsn, "SELECT email, count(*) FROM contacts GROUP BY 1")
    assert len(contacts) == 5000
    assert set(contacts.values()) == {1}


def run_readme_block(block: Block, dsn: str, directory: Path, workers: ExitStack) -> None:
    """Run one block of the README as a reader would."""
    if block.language == "sql":
        run_sql(dsn, block, keep="CREATE ROLE" not in block.text)
    elif block.language == "python" and "app = batchq.App()" in block.text:
        (directory / "tasks.py").write_text(block.text)
    elif block.language == "python":
        run([sys.executable, "-c", block.text], dsn, directory, block)
    else:
        for line in block.lines:
            run_readme_line(line, dsn, directory, workers, block)


def run_readme_line(line: str, dsn: str, directory: Path, workers: ExitStack, block: Block) -> None:
    """Run one line for the shell."""
    command = line.split("#")[0].strip()
    if command.startswith("bin/"):  # .ci/run runs them: they cannot run within themselves
        program = command.split()[0]
        assert os.access(ROOT / program, os.X_OK)
        runner = "bin/newcomer" if newcomer.first_command(ROOT).startswith(f"{program} ") else command
        assert runner in (ROOT / ".ci/run").read_text()
    elif command.startswith(("batchq worker ", "batchq workers ")):
        workers.enter_context(background(command, dsn, directory))
    elif not command.startswith(("pip install", "export BATCHQ_DSN")):  # test_wheel.py installs; the DSN is ours
        run(["bash", "-euo", "pipefail", "-c", command], dsn, directory, block)


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


def test_the_how_tos_work(dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("BATCHQ_DSN", dsn)
    with psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as conn:
        conn.execute(CRON_STUB)
    for number, block in enumerate(blocks("docs/howto.md")):
        if block.language == "sql":
            run_sql(dsn, block)
        else:
            (tmp_path / f"howto_{number}.py").write_text(block.text)
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


def test_each_way_to_enqueue_that_the_docs_show_works(dsn: str, admin_dsn: str, tmp_path: Path) -> None:
    for block in blocks("docs/enqueue.md"):
        if block.language == "sql":
            run_sql(dsn, block)
        elif block.language == "python":
            straight = any(
                f"import {client}" in block.text or f"from {client}" in block.text for client in OTHER_CLIENTS
            )
            run([sys.executable, "-c", block.text], admin_dsn if straight else dsn, tmp_path, block)
        else:
            run(["bash", "-euo", "pipefail", "-c", block.text], dsn, tmp_path, block)
    by_kind = counts(dsn, "SELECT kind, count(*) FROM batchq.batches GROUP BY 1")
    # send_receipt: psql 2, command line 1, psycopg 1 + 1000, SQLAlchemy, asyncpg and Django one each
    assert by_kind == {"send_reminder": 1, "refresh_prices": 1, "send_receipt": 1007, "check_site": 201}
    # (check_site: 20,000 items in batches of 100, and one batch from the shell; the table of domains is still empty)


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
    drain(load_app("tasks:app"), handlers_dsn)
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
            said = run(["bash", "-euo", "pipefail", "-c", block.text], dsn, tmp_path, block)
            assert "batch 3: " in said
        elif "batchq.App()" in block.text:
            assert max(map(len, block.text.split("@app.handler"))) < 15 * 80
            (tmp_path / "tasks.py").write_text(block.text)
            with psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as conn:
                enqueue(conn, "import_file")
            run(["batchq", "worker", "tasks:app", "--drain"], dsn, tmp_path, block)
            assert counts(dsn, PARTS) == {"ann@example.com: 4006 rows, 0 parts failed": 1}
        else:
            run([sys.executable, "-c", ENQUEUES + block.text], dsn, tmp_path, block)
    statuses = counts(dsn, "SELECT id::text, 1 FROM batchq.batches WHERE kind = 'report' AND status = 'waiting'")
    assert len(statuses) == 1, "the one of Python"


SCHEDULED = "SELECT state, 1 FROM batchq.schedule_status"


def test_what_the_page_about_schedules_shows_runs(dsn: str, tmp_path: Path) -> None:
    for block in blocks("docs/schedules.md"):
        if block.language == "python":
            assert len(block.lines) < 15
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


def test_what_the_monitoring_page_shows_runs(dsn: str, tmp_path: Path) -> None:
    workers, tasks, traced, enqueues, sql = blocks("docs/monitoring.md")
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
    run_sql(dsn, sql)
    run([sys.executable, "-c", enqueues.text], dsn, tmp_path, enqueues)
    said = run(["bash", "-c", f"{traced.lines[1].split('#')[0]} --drain"], dsn, tmp_path, traced)
    runs = [json.loads(text) for text in re.findall(r"^\{$.*?^\}$", said, re.MULTILINE | re.DOTALL)]
    assert sorted((run["name"], run["attributes"]["order.id"], len(run["links"])) for run in runs) == [
        ("process send_receipt", 42, 1),
        ("process send_receipt", 43, 1),
    ]


def test_what_the_page_about_the_page_shows_runs(dsn: str, admin_dsn: str, tmp_path: Path) -> None:
    serve, role = blocks("docs/web.md")
    for line in serve.lines[1:]:
        port = free_port()
        with background(f"{line.split('#')[0]} --port {port}", dsn, tmp_path, -signal.SIGTERM):  # as uvicorn ends
            wait_until(lambda port=port: answers(f"http://127.0.0.1:{port}/"), 30, line)
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
    for document in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("tests/**/*.md")]:
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
