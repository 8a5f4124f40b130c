"""The programs of docs/examples do what their pages say."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import psycopg
import pytest
from fastapi.testclient import TestClient

from batchq.postgres import embedded
from batchq.testing import drain
from tests.support.alone import run_alone
from tests.support.markdown import ROOT, blocks
from tests.support.steps import step
from tests.support.waiting import wait_until

EXAMPLES = ROOT / "docs" / "examples"
MOST_LINES = 120
MOST_LINES_OF_A_WORKER = 300


def environment(dsn: str) -> dict[str, str]:
    """Return the environment of a program of an example: our commands, psql of the wheel, the test's database."""
    path = [str(Path(sys.executable).parent), str(embedded.wheel_programs()), os.environ["PATH"]]
    return os.environ | {"BATCHQ_DSN": dsn, "PATH": os.pathsep.join(path), "BATCHQ_LEASE_SECONDS": "2"}


def run(script: str, dsn: str, directory: Path) -> str:
    """Run commands of the shell to their end; return what they printed. They must end well."""
    step(script)
    ended = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=directory, env=environment(dsn), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@contextmanager
def worker(dsn: str, directory: Path, number: signal.Signals) -> Iterator[None]:
    """Run a worker of the example while the block runs; end it with a signal."""
    with (directory / "worker.log").open("a") as log:
        process = subprocess.Popen(
            ["batchq", "worker", "tasks:app"], cwd=directory, env=environment(dsn), stdout=log, stderr=log
        )
        try:
            yield
        finally:
            process.send_signal(number)
            ended = process.wait(30)
        assert ended == (0 if number == signal.SIGTERM else -number), (directory / "worker.log").read_text()


def one(conn: psycopg.Connection, query: str) -> object:
    """Return the one value of a query."""
    row = conn.execute(query.encode()).fetchone()
    return row[0] if row else None


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir()))
def test_an_example_is_short_and_its_page_names_its_files(example: str) -> None:
    directory = EXAMPLES / example
    files = [file for file in directory.rglob("*.*") if file.suffix in (".py", ".sql", ".ts")]
    files = [file for file in files if "node_modules" not in file.parts]
    most = MOST_LINES_OF_A_WORKER if example == "typescript-worker" else MOST_LINES
    assert 0 < sum(len(file.read_text().splitlines()) for file in files) < most
    page, names = (directory / "README.md").read_text(), [str(file.relative_to(directory)) for file in files]
    assert [name for name in names if f"[{name}]({name})" not in page] == []


@pytest.fixture
def csv_import(tmp_path: Path) -> Path:
    """Return a copy of the example that imports a CSV file."""
    return Path(shutil.copytree(EXAMPLES / "csv_import", tmp_path / "csv_import"))


def test_the_page_of_the_csv_import_runs(dsn: str, conn: psycopg.Connection, csv_import: Path) -> None:
    [block] = blocks("docs/examples/csv_import/README.md")
    installed = [line for line in block.lines if not line.startswith(("pip install", "export BATCHQ_DSN"))]
    said = run("\n".join(installed), dsn, csv_import).splitlines()
    assert said[-2].startswith("line 3: InvalidInput: the item does not fit Contact: email: String should match")
    assert said[-1] == "line 6: InvalidInput: the item does not fit Contact: name: Input should be a valid string"
    assert conn.execute("SELECT email, name FROM contacts ORDER BY 1").fetchall() == [
        ("ann@example.com", "Ann"),
        ("cyd@example.com", "Cyd, of\nTown"),
    ]
    assert run("python3 contacts.py import contacts.csv", dsn, csv_import) == "imported already\n"
    assert one(conn, "SELECT count(*) FROM batchq.batches WHERE kind = 'import_contact'") == 1


def test_each_line_is_imported_once_though_a_worker_is_killed(
    dsn: str, conn: psycopg.Connection, csv_import: Path
) -> None:
    lines = [f"user{number}@example.com,User {number}" for number in range(20_000)]
    lines[7_000] = "bad address,User 7000"
    (csv_import / "contacts.csv").write_text("\n".join(["email,name", *lines]))
    run('psql -q "$BATCHQ_DSN" -f schema.sql; python3 contacts.py import contacts.csv', dsn, csv_import)
    with worker(dsn, csv_import, signal.SIGKILL):
        wait_until(lambda: one(conn, "SELECT count(*) FROM contacts"), 30, "the first rows")
    assert one(conn, "SELECT status FROM batchq.batches WHERE spread IS NOT NULL") != "completed"
    with worker(dsn, csv_import, signal.SIGTERM):
        ended = "SELECT status = 'completed' FROM batchq.status ORDER BY id LIMIT 1"
        wait_until(lambda: one(conn, ended), 60, "the end of the import")
    assert one(conn, "SELECT count(*) FROM contacts") == 19_999  # email is the primary key: each is there once
    failed = run("python3 contacts.py failed contacts.csv", dsn, csv_import)
    assert failed.startswith("line 7002: InvalidInput: the item does not fit Contact: email: ")
    assert failed.count("\n") == 1


@pytest.fixture
def shop(dsn: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """Return a client of the example with FastAPI, on the test's database."""
    monkeypatch.setenv("BATCHQ_DSN", dsn)
    monkeypatch.syspath_prepend(EXAMPLES / "fastapi")
    for name in ("api", "tasks"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with TestClient(import_module("api").api) as client:
        yield client


def test_an_order_and_its_confirmation_are_committed_together(
    shop: TestClient, dsn: str, conn: psycopg.Connection
) -> None:
    assert shop.post("/orders", params={"email": "ann@example.com"}).json() == {"order": 1, "batch": 1}
    assert shop.get("/orders/1").json() == {"email": "ann@example.com", "is_confirmed": False}
    drain(import_module("tasks").app, dsn)
    assert shop.get("/orders/1").json() == {"email": "ann@example.com", "is_confirmed": True}
    assert one(conn, "SELECT status FROM batchq.batches") == "completed"
    assert shop.get("/orders/2").status_code == 404


def test_the_shop_shows_its_queue_to_its_people(shop: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_PASSWORD", "correct horse battery")
    shop.post("/orders", params={"email": "ann@example.com"})
    assert shop.get("/queue/batches").status_code == 401
    assert shop.get("/queue/batches", auth=("ann", "wrong")).status_code == 401
    page = shop.get("/queue/batches", auth=("ann", "correct horse battery")).text
    assert ("confirm_order" in page, "<bdi>ann</bdi>" in page) == (True, True)


FAILS_AT_COMMIT = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE unique_violation USING MESSAGE = 'refused at commit'; END $$;
CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON orders DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW EXECUTE FUNCTION refuse();
"""


def test_without_the_order_there_is_no_confirmation(shop: TestClient, conn: psycopg.Connection) -> None:
    shop.post("/orders", params={"email": "ann@example.com"})
    assert shop.post("/orders", params={"email": "ann@example.com"}).status_code == 409
    conn.execute(FAILS_AT_COMMIT)
    assert shop.post("/orders", params={"email": "bob@example.com"}).status_code == 409
    assert one(conn, "SELECT count(*) FROM orders") == one(conn, "SELECT count(*) FROM batchq.batches") == 1


if __name__ == "__main__":
    run_alone(__file__)
