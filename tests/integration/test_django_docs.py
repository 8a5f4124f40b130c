"""docs/django.md does what it says: its blocks run, in order, as files of a project."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import psycopg
from psycopg.conninfo import conninfo_to_dict

from tests.support.alone import run_alone
from tests.support.markdown import ROOT, blocks
from tests.support.servers import Server
from tests.support.steps import step
from tests.support.waiting import allowed

VARIABLES = {"dbname": "PGDATABASE", "host": "PGHOST", "port": "PGPORT", "user": "PGUSER", "password": "PGPASSWORD"}
BEFORE_SETTINGS = """
from shop.settings import *
INSTALLED_APPS.remove("batchq.contrib.django")
BATCHQ_APP = "shop.jobs:app"
"""
SETUP = "import django\ndjango.setup()\n"


def run(dsn: str, directory: Path, *words: str) -> str:
    """Run a program in the project; return what it printed. It must exit 0."""
    step(" ".join(words)[:100])
    given = conninfo_to_dict(dsn)
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    own = {"PATH": path, "PYTHONPATH": f"{directory}{os.pathsep}{ROOT}", "DJANGO_SETTINGS_MODULE": "shop.documented"}
    variables = {VARIABLES[name]: str(value) for name, value in given.items() if name in VARIABLES}
    environment = os.environ | own | variables | {"BATCHQ_DSN": dsn}
    done = subprocess.run(
        words, cwd=directory, env=environment, capture_output=True, text=True, timeout=allowed(90), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_the_page_about_django_shows_runs(empty_database: str, server: Server, tmp_path: Path) -> None:
    dsn, project = server.dsn(empty_database), tmp_path / "project"
    shutil.copytree(ROOT / "docs" / "examples" / "django", project)
    install, settings, tasks, worker, workers, jobs, atomic, on_commit, tests = blocks("docs/django.md")
    assert "pip install" in install.text
    (project / "shop" / "documented.py").write_text(BEFORE_SETTINGS + settings.text)
    (project / "shop" / "tasks.py").write_text(tasks.text + "\nsend_receipt = send_reminder\n")
    (project / "shop" / "jobs.py").write_text(jobs.text)
    (project / "shop" / "tests.py").write_text(tests.text)
    assert "0001_batches" in run(dsn, project, sys.executable, "manage.py", "migrate", "--run-syncdb")
    assert run(dsn, project, sys.executable, "-c", SETUP + atomic.text + on_commit.text) == "READY\n"
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("INSERT INTO batchq.batches (kind) VALUES ('count_users')")
        rows = "SELECT kind, result, priority FROM batchq.all_batches WHERE status = 'completed' ORDER BY id"
        assert "up to date" in run(dsn, project, "bash", "-euo", "pipefail", "-c", worker.text)
        assert conn.execute(rows).fetchall() == [
            ("shop.tasks.send_reminder", "attempt 1 for ann@example.com", -10),
            ("shop.tasks.refresh_prices", {"shop": "books"}, 0),
            ("count_users", 2, 0),
        ]
        conn.execute("INSERT INTO batchq.batches (kind) VALUES ('count_users')")
        run(dsn, project, "bash", "-euo", "pipefail", "-c", workers.text)
        assert len(conn.execute(rows).fetchall()) == 4
    assert "Ran 2 tests" in run(dsn, project, "bash", "-c", "env -u BATCHQ_DSN python manage.py test 2>&1")


if __name__ == "__main__":
    run_alone(__file__)
