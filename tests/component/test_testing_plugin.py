"""The pytest plugin: databases made from a template, dropped afterwards; nothing happens where no test asks."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from batchq import testing
from tests.support.alone import run_alone
from tests.support.servers import Server

ROOT = Path(__file__).parents[2]
DATABASES = "SELECT datname FROM pg_database WHERE datname ~ '^batchq_test_[0-9a-f]{16}$'"
TESTS = """
import batchq, psycopg, pytest
from batchq.testing import assert_enqueued, drain

seen = set()

@pytest.mark.parametrize("number", range(4))
def test_one(number, batchq_dsn, batchq_conn):
    assert batchq_dsn not in seen
    seen.add(batchq_dsn)
    assert batchq_conn.execute("SELECT count(*) FROM batchq.all_batches").fetchone() == (0,)
    batchq.enqueue(batchq_conn, "work", number)
    assert_enqueued(batchq_conn, "work", count=1)
    with psycopg.connect(batchq_dsn) as other:
        assert other.execute("SELECT count(*) FROM batchq.all_batches").fetchone() == (0,)
    batchq_conn.commit()
    app = batchq.App()
    app.handler("work")(lambda _: None)
    assert drain(app, batchq_dsn).completed == 1
    batchq.enqueue(batchq_conn, "work", number)
"""
WHERE = """
def test_where(batchq_dsn):
    from pathlib import Path
    Path("where").write_text(psycopg.conninfo.conninfo_to_dict(batchq_dsn)["host"])
"""


def run_pytest(directory: Path, text: str, dsn: str | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a test file in a pytest of its own, with the plugin."""
    (directory / "test_it.py").write_text(text)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("BATCHQ_", "PYTEST_"))}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)}
    if dsn is not None:
        environment["BATCHQ_TEST_DSN"] = dsn
    options = ["-q", "-p", "batchq.testing.plugin", "-p", "no:cacheprovider", "-W", "error", "--strict-config"]
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def leftovers(server: Server) -> list[str]:
    """Return the databases that the plugin has made and that are there."""
    with psycopg.connect(server.admin_dsn) as conn:
        return [name for (name,) in conn.execute(DATABASES).fetchall()]


def test_each_test_has_a_database_and_none_is_left(server: Server, tmp_path: Path) -> None:
    done = run_pytest(tmp_path, TESTS, server.admin_dsn, "--durations=0", "-vv")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout
    assert leftovers(server) == []


def test_sessions_at_the_same_time_share_a_server(server: Server, tmp_path: Path) -> None:
    def run(number: int) -> subprocess.CompletedProcess[str]:
        (directory := tmp_path / str(number)).mkdir()
        return run_pytest(directory, TESTS, server.admin_dsn)

    with ThreadPoolExecutor(2) as executor:
        runs = list(executor.map(run, range(2)))
    assert [done.returncode for done in runs] == [0, 0], runs[0].stdout + runs[1].stdout
    assert leftovers(server) == []


def test_without_a_dsn_a_private_server_runs_and_ends(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, TESTS + WHERE, None)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not Path((tmp_path / "where").read_text()).exists()


def test_a_failed_test_leaves_nothing_either(server: Server, tmp_path: Path) -> None:
    text = "def test_it(batchq_conn):\n    batchq_conn.execute('SELECT 1 / 0')\n"
    done = run_pytest(tmp_path, text, server.admin_dsn)
    assert done.returncode == 1
    assert "DivisionByZero" in done.stdout
    assert leftovers(server) == []


def test_where_no_test_asks_nothing_is_imported_or_started(tmp_path: Path) -> None:
    text = """
import sys

def test_it():
    own = {name for name in sys.modules if name.startswith("batchq.testing")}
    assert own == {"batchq.testing", "batchq.testing.plugin"}
"""
    done = run_pytest(tmp_path, text, "postgresql://nobody@127.0.0.1:1/nowhere")
    assert done.returncode == 0, done.stdout


def test_fixtures_explain_themselves(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, "", None, "--fixtures")
    for name in ("batchq_databases", "batchq_dsn", "batchq_conn"):
        assert name in done.stdout
    assert "no docstring" not in done.stdout


def test_all_names_of_the_package_are_there_and_explain_themselves() -> None:
    assert sorted(testing.__all__) == testing.__all__ == dir(testing)
    assert [name for name in testing.__all__ if not getattr(testing, name).__doc__] == []
    with pytest.raises(AttributeError, match="has no attribute 'drained'"):
        testing.drained  # noqa: B018


if __name__ == "__main__":
    run_alone(__file__)
