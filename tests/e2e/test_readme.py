"""The README leads from nothing to watching work: each of its commands runs where only the wheel is installed."""

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pytest

from batchq.common.version import __version__
from tests.instruments import newcomer
from tests.support.alone import run_alone
from tests.support.markdown import ROOT, Block, blocks
from tests.support.servers import free_port
from tests.support.steps import step
from tests.support.waiting import wait_until
from tests.support.web import answers
from tests.support.wheels import DISTRIBUTION, build_wheel, environment, new_environment

SECONDS_A_COMMAND = 300
INSTALLS = re.compile(r"pip install ['\"]?pgbatchq[^\s'\"`]*['\"]?")
NOT_HERE = ("bin/", "export BATCHQ_DSN")  # .ci/run runs the first, from a clone; the DSN is the test's
BY_STATUS = "SELECT kind || ' ' || status, count(*) FROM batchq.batches GROUP BY 1"


@dataclass
class Reader:
    """Somebody who types what the README says, in a directory with nothing but an environment of Python."""

    dsn: str
    directory: Path
    programs: Path
    constraints: Path
    is_done: set[str] = field(default_factory=set)

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment: pip takes the wheel of this checkout, whatever the index has."""
        return environment(self.programs, self.dsn) | {"PIP_CONSTRAINT": str(self.constraints)}

    def type(self, command: str) -> str:
        """Run a command of the shell to its end; return what it printed. It must exit with 0."""
        step(command.splitlines()[0])
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=self.directory, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=SECONDS_A_COMMAND, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command} exited {done.returncode}:\n{done.stdout}{done.stderr}"
        self.is_done.add(command)
        return done.stdout

    @contextmanager
    def beside(self, command: str, code: int = 0) -> Iterator[None]:
        """Run a command while the block runs; it must exit with *code* when it is told to end."""
        step("%s, beside the others", command)
        with (self.directory / "log").open("a") as log, subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=self.directory, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        ) as process:  # fmt: skip
            self.is_done.add(command)
            try:
                yield
            finally:
                process.send_signal(signal.SIGTERM)
            assert process.wait(30) == code, (self.directory / "log").read_text()[-3000:]

    def sql(self, text: str) -> None:
        """Run SQL, in one transaction, which is rolled back where it makes roles: they are the whole server's."""
        with (
            psycopg.connect(self.dsn, autocommit=True, prepare_threshold=None) as conn,
            conn.transaction(force_rollback="CREATE ROLE" in text),
        ):
            conn.execute(text.encode())

    def counts(self, query: str) -> dict[str, int]:
        """Return what *query* counts, by its first column."""
        with psycopg.connect(self.dsn, autocommit=True, prepare_threshold=None) as conn:
            return dict(conn.execute(query.encode()).fetchall())


@pytest.fixture
def reader(empty_dsn: str, tmp_path: Path) -> Reader:
    """Return somebody who has a database, and a new environment in which nothing is installed."""
    wheel = build_wheel(tmp_path)
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(f"--find-links {wheel.parent.as_uri()}\n{DISTRIBUTION} == {__version__}\n")
    (tmp_path / "work").mkdir()
    return Reader(empty_dsn, tmp_path / "work", new_environment(tmp_path / "venv"), constraints)


def test_the_readme_leads_from_nothing_to_watching_work(reader: Reader) -> None:
    read = blocks("README.md")
    assert [block.language for block in read].count("python") == 2
    assert not (reader.programs / "batchq").exists()
    with ExitStack() as workers:
        for block in read:
            use(block, reader, workers)
        step("wait for the workers to finish what the last block has enqueued")

        def ended(what: str) -> Callable[[], int | None]:
            return lambda: reader.counts(BY_STATUS).get(what)

        wait_until(lambda: ended("import_contact completed")() == 5, 30, "the import")
        wait_until(lambda: ended("send_receipt completed")() == 2, 30, "the receipts")
        wait_until(lambda: ended("check_site failed")() == 1, 30, "the retried sites")
        extras(reader)
    contacts = reader.counts("SELECT email, count(*) FROM contacts GROUP BY 1")
    assert len(contacts) == 5000
    assert set(contacts.values()) == {1}
    assert [command for command in named() if not any(done.startswith(command) for done in reader.is_done)] == []


def use(block: Block, reader: Reader, workers: ExitStack) -> None:
    """Do with a block of the README what a reader does."""
    if block.language == "sql":
        reader.sql(block.text)
    elif block.language == "python" and "app = batchq.App()" in block.text:
        (reader.directory / "tasks.py").write_text(block.text)
    elif block.language == "python":
        reader.type(f"python - <<'EOF'\n{block.text}EOF\n")
    else:
        for line in block.lines:
            command = line.split("#")[0].strip()
            if command.startswith(("batchq worker ", "batchq workers ")):
                workers.enter_context(reader.beside(command))
            elif not command.startswith(NOT_HERE):
                reader.type(command)


def extras(reader: Reader) -> None:
    """Install the extras that the README names beside its blocks, and use what they are for."""
    for command in INSTALLS.findall((ROOT / "README.md").read_text(encoding="utf-8")):
        reader.type(command)
    port = free_port()
    with reader.beside(f"batchq web --port {port}", -signal.SIGTERM):  # as uvicorn ends
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/"), 30, "the web UI")
    reader.type("python -c 'import batchq.cli.top.app'")


def named() -> set[str]:
    """Return the commands that the README names anywhere, in blocks and in sentences, without their options."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    in_blocks = "\n".join(block.text for block in blocks("README.md") if block.language == "bash")
    commands = re.findall(r"^batchq [a-z]+", in_blocks, re.MULTILINE) + re.findall(r"`(batchq [a-z]+)", text)
    return {*commands, *INSTALLS.findall(text)} - {"batchq check"}  # the tutorial's test runs it


def test_the_commands_for_a_checkout_are_run_by_the_check_of_the_project() -> None:
    lines = [line.split("#")[0].strip() for block in blocks("README.md") for line in block.lines]
    commands = [line for line in lines if line.startswith("bin/")]
    assert len(commands) == 3
    for command in commands:
        program = command.split()[0]
        assert os.access(ROOT / program, os.X_OK)
        runner = "bin/newcomer" if newcomer.first_command(ROOT).startswith(f"{program} ") else command
        assert runner in (ROOT / ".ci/run").read_text()


if __name__ == "__main__":
    run_alone(__file__)
