"""The working directory: a file there that has the name of an installed module is not run in its place."""

import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path

import psycopg
import pytest

from batchq.common.exposition import CONTENT_TYPE  # noqa: F401 (the extra is installed: else the test would prove nothing)
from tests.component.rows import insert
from tests.support.alone import run_alone
from tests.support.commands import CommandLine
from tests.support.servers import free_port
from tests.support.waiting import wait_until

PLANT = """
import os
with open({log!r}, "a") as file:
    file.write(os.path.abspath(__file__) + "\\n")
raise SystemExit("a planted module runs")
"""
INSTALLED = [
    "psycopg",
    "psycopg_pool",
    "psycopg_binary",
    "pydantic",
    "pydantic_core",
    "dotenv",
    "structlog",
    "rich",
    "textual",
    "prometheus_client",
    "starlette",
    "uvicorn",
    "jinja2",
    "markupsafe",
    "opentelemetry",
    "pygments",
    "h11",
    "httptools",
    "websockets",
    "uvloop",
    "anyio",
    "typing_extensions",
    "annotated_types",
    "pgserver",
]
PYTHONS_OWN = [
    "json",
    "argparse",
    "logging",
    "asyncio",
    "select",
    "socket",
    "ssl",
    "getpass",
    "signal",
    "secrets",
    "uuid",
    "queue",
    "http",
    "urllib",
    "email",
    "decimal",
    "zoneinfo",
    "traceback",
    "concurrent",
    "ctypes",
    "tomllib",
    "gc",
    "statistics",
]
WAYS = {"module": [sys.executable, "-m", "batchq"], "command": [str(Path(sys.executable).with_name("batchq"))]}


@pytest.fixture
def command(dsn: str, tmp_path: Path) -> CommandLine:
    """Return what runs commands on the test's database, in a directory with an app."""
    return CommandLine(dsn, tmp_path)


def plant(directory: Path, names: Iterable[str]) -> Path:
    """As somebody who may write into the directory, plant modules; return the file that tells which have run."""
    log = directory / "planted.log"
    for name in names:
        (directory / f"{name}.py").write_text(PLANT.format(log=str(log)))
    return log


def run(command: CommandLine, words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    return subprocess.run(
        words, cwd=command.directory, env=command.environment | environment, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("started_as", WAYS)
def test_a_neighbour_plants_modules_where_a_worker_with_metrics_and_traces_starts(
    command: CommandLine, conn: psycopg.Connection, started_as: str
) -> None:
    log = plant(command.directory, (*INSTALLED, *PYTHONS_OWN))
    batch_id = insert(conn, kind="good")
    settings = {"BATCHQ_METRICS_PORT": str(free_port()), "BATCHQ_TRACES": "yes"}
    ended = run(command, [*WAYS[started_as], "worker", "tasks:app", "--drain"], **settings)
    assert not log.exists(), log.read_text()
    assert ended.returncode == 0, ended.stderr
    assert conn.execute("SELECT status FROM batchq.batches WHERE id = %s", [batch_id]).fetchone() == ("completed",)


def test_a_neighbour_plants_batchq_itself_for_the_children_of_a_supervisor(
    command: CommandLine, conn: psycopg.Connection
) -> None:
    log = plant(command.directory, ("batchq", "runpy", "pkgutil", *INSTALLED, *PYTHONS_OWN))
    batch_id = insert(conn, kind="good")
    ended = run(command, [*WAYS["command"], "workers", "1", "tasks:app", "--drain"])
    assert not log.exists(), log.read_text()
    assert ended.returncode == 0, ended.stderr
    assert conn.execute("SELECT status FROM batchq.batches WHERE id = %s", [batch_id]).fetchone() == ("completed",)


@pytest.mark.parametrize("started_as", WAYS)
def test_a_neighbour_plants_modules_where_somebody_looks(command: CommandLine, started_as: str) -> None:
    log = plant(command.directory, (*INSTALLED, *PYTHONS_OWN))
    for arguments in (("check", "tasks:app"), ("status",), ("top",), ("doctor",), ("enqueue", "good"), ("migrate",)):
        ended = run(command, [*WAYS[started_as], *arguments])
        assert not log.exists(), log.read_text()
        assert ended.returncode in (0, 1), ended.stderr


@pytest.mark.parametrize("started_as", WAYS)
def test_a_neighbour_plants_modules_where_the_page_starts(command: CommandLine, started_as: str) -> None:
    log = plant(command.directory, (*INSTALLED, *PYTHONS_OWN))
    port = str(free_port())
    with subprocess.Popen(
        [*WAYS[started_as], "web", "--port", port],
        cwd=command.directory, env=command.environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        assert process.stderr
        try:
            assert process.stderr.readline().startswith("http://127.0.0.1:")
            wait_until(lambda: answers(int(port)), 30, "the page")
        finally:
            process.terminate()
    assert not log.exists(), log.read_text()


def answers(port: int) -> bool:
    """Return whether the page answers on a port."""
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz") as answer:
            return bool(answer.status == 200)
    except urllib.error.URLError:
        return False


def test_an_extra_that_is_not_installed_is_not_taken_from_the_directory_by_what_looks_for_it(
    command: CommandLine,
) -> None:
    """What no one has installed can only come from the directory. Without an app, batchq does not look there."""
    log = plant(command.directory, ["batchq_is_not_installed"])
    ended = run(command, [*WAYS["command"], "status"])
    assert ended.returncode == 0
    assert not log.exists()


@pytest.mark.parametrize("started_as", WAYS)
def test_an_app_and_its_own_modules_come_from_the_directory(
    command: CommandLine, conn: psycopg.Connection, started_as: str
) -> None:
    name = next(name for name in ("colorama", "click", "pluggy", "iniconfig") if is_installed(name))
    (command.directory / "own_helper.py").write_text("KIND = 'from the directory'\n")
    (command.directory / f"{name}.py").write_text(
        "import batchq, own_helper\napp = batchq.App()\n@app.handler(own_helper.KIND)\ndef work(batch): return 'done'\n"
    )
    package = command.directory / "own_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "tasks.py").write_text(f"from {name} import app\n")
    for app in (f"{name}:app", "own_package.tasks:app"):
        batch_id = insert(conn, kind="from the directory")
        if app.startswith("own_package"):
            (package / "tasks.py").write_text((command.directory / f"{name}.py").read_text())
        ended = run(command, [*WAYS[started_as], "worker", app, "--drain"])
        assert ended.returncode == 0, ended.stderr
        assert conn.execute("SELECT status FROM batchq.batches WHERE id = %s", [batch_id]).fetchone() == ("completed",)


@pytest.mark.parametrize("started_as", WAYS)
def test_what_a_handler_imports_late_does_not_come_from_the_directory(
    command: CommandLine, conn: psycopg.Connection, started_as: str
) -> None:
    log = plant(command.directory, ["wave", "pluggy"])
    (command.directory / "late.py").write_text(
        "import batchq\napp = batchq.App()\n@app.handler('late')\ndef work(batch):\n    import wave, pluggy\n"
    )
    batch_id = insert(conn, kind="late")
    ended = run(command, [*WAYS[started_as], "worker", "late:app", "--drain"])
    assert not log.exists(), log.read_text()
    assert conn.execute("SELECT status FROM batchq.batches WHERE id = %s", [batch_id]).fetchone() == ("completed",), (
        ended
    )


def test_a_module_that_is_not_the_one_beside_the_app_is_told(command: CommandLine, conn: psycopg.Connection) -> None:
    """As nobody: the fence tells whose module it keeps out."""
    (command.directory / "wave.py").write_text("KIND = 'mine'\n")
    (command.directory / "late.py").write_text(
        "import batchq, wave\napp = batchq.App()\n@app.handler('late')\ndef work(batch):\n    pass\n"
    )
    batch_id = insert(conn, kind="late")
    ended = run(command, [*WAYS["command"], "worker", "late:app", "--drain", "--log-format", "json"])
    assert '"event": "local module shadowed"' in ended.stderr
    assert '"module": "wave"' in ended.stderr
    assert conn.execute("SELECT status FROM batchq.batches WHERE id = %s", [batch_id]).fetchone() == ("completed",)
    (command.directory / "late.py").rename(command.directory / "queue.py")
    ended = run(command, [*WAYS["command"], "worker", "queue:app", "--drain"])
    assert "give a module of yours another name" in ended.stderr


def test_a_path_that_is_the_directory_itself_serves_the_children_of_a_supervisor_as_well(
    command: CommandLine, conn: psycopg.Connection
) -> None:
    """As nobody: PYTHONPATH=/app in /app, as in many images."""
    (command.directory / "wave.py").write_text("KIND = 'mine'\n")
    (command.directory / "late.py").write_text(
        "import batchq, wave\napp = batchq.App()\n@app.handler(wave.KIND)\ndef work(batch):\n    pass\n"
    )
    for words in (["worker", "late:app"], ["workers", "1", "late:app"]):
        batch_id = insert(conn, kind="mine")
        ended = run(command, [*WAYS["command"], *words, "--drain"], PYTHONPATH=str(command.directory))
        assert ended.returncode == 0, ended.stderr
        assert conn.execute("SELECT status FROM batchq.batches WHERE id = %s", [batch_id]).fetchone() == ("completed",)


def test_a_directory_that_is_gone_is_no_traceback(command: CommandLine, tmp_path: Path) -> None:
    """As a deploy that removes the directory of a release while its supervisor starts a worker anew."""
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"cd {gone} && rmdir {gone} && exec {sys.executable} -P -m batchq status"
    ended = run(command, ["bash", "-c", script])
    assert (ended.returncode, "Traceback" in ended.stderr) == (0, False), ended.stderr


def is_installed(name: str) -> bool:
    """Return whether a distribution is installed."""
    try:
        return bool(distribution(name))
    except Exception:
        return False


def test_a_program_that_imports_batchq_keeps_its_path(command: CommandLine) -> None:
    (command.directory / "program.py").write_text(
        "import sys\nbefore = list(sys.path)\nimport batchq\nprint(before == sys.path)"
    )
    for words in (["-m", "program"], ["program.py"], ["-c", "import program", "-m", "batchq"]):
        ended = run(command, [sys.executable, *words])
        assert ended.stdout == "True\n", ended.stderr


if __name__ == "__main__":
    run_alone(__file__)
