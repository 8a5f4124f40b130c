"""The list of arguments: another user of the machine reads it (``ps``), and finds no DSN there."""

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from batchq.common.program import secrets_in
from tests.support.alone import run_alone
from tests.support.commands import CommandLine
from tests.support.waiting import wait_until

SECRET = "Pq7-correct-horse"
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the list of arguments is overwritten on Linux")
WAYS = {
    "module": [sys.executable, "-m", "batchq"],
    "module, unbuffered": [sys.executable, "-um", "batchq"],
    "command": [str(Path(sys.executable).with_name("batchq"))],
}


@pytest.fixture
def secret_dsn(dsn: str) -> str:
    """Return a DSN with a password, which the server may or may not ask for."""
    return make_conninfo(dsn, password=psycopg.conninfo.conninfo_to_dict(dsn).get("password") or SECRET)


def arguments_of(pid: int) -> str:
    """Return the list of arguments of a process, as every user can read it."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


def below(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextmanager
def started(words: Sequence[str], directory: Path, **environment: str) -> Any:
    """Run a program while the block runs; then end it as an operator does."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("BATCHQ_", "PG"))}
    log = (directory / "err").open("w+")
    with log, subprocess.Popen(
        words, cwd=directory, env=kept | environment, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(40)
            finally:
                process.kill()


@ON_LINUX
@pytest.mark.parametrize("started_as", WAYS)
@pytest.mark.parametrize("form", ["--dsn {}", "--ds={}"])
def test_another_user_reads_the_password_of_a_command(
    command: CommandLine, secret_dsn: str, started_as: str, form: str
) -> None:
    flags = [word.format(secret_dsn) for word in form.split(" ")]
    with started([*WAYS[started_as], "monitor", *flags], command.directory) as process:
        wait_until(lambda: "***" in arguments_of(process.pid), 20, "the DSN to go")
        assert secret_dsn not in arguments_of(process.pid)
        assert "password" not in arguments_of(process.pid)
        assert arguments_of(process.pid).split()[-len(flags) - 1] == "monitor", "the rest is as it was"
        assert process.poll() is None, Path(command.directory, "err").read_text()


@ON_LINUX
def test_another_user_reads_the_password_of_a_supervisor_and_its_workers(
    command: CommandLine, conn: psycopg.Connection, dsn: str, secret_dsn: str
) -> None:
    flags = ["--dsn", secret_dsn, f"--listen-dsn={secret_dsn}", "--queues", "a,b"]
    words = [*WAYS["command"], "workers", "2", "tasks:app", *flags]
    with started(words, command.directory) as process:
        wait_until(lambda: conn.execute("SELECT count(*) = 2 FROM batchq.workers").fetchone() == (True,), 60, "workers")
        found = [arguments_of(pid) for pid in (process.pid, *below(process.pid))]
        assert len(found) == 3
        for text in found:
            assert "password" not in text
            assert "dbname" not in text
            assert "tasks:app" in text
            assert "a,b" in text, "what is no secret is there to be seen"
        row = conn.execute("SELECT count(*) FROM batchq.workers WHERE queues = '{a,b}'").fetchone()
        assert row == (2,), "the children got what they were not told in arguments"


def test_a_command_that_refuses_its_arguments_prints_the_password(command: CommandLine, secret_dsn: str) -> None:
    address = f"postgresql://u:{SECRET}@127.0.0.1:1/db"
    for arguments in (("status", address), ("status", "--dns", address), ("show", address), ("--dsn", address)):
        ended = command(*arguments)
        assert ended.code == 2
        assert SECRET not in ended.err, arguments
    for dsn in (address, f"{address}?sslmode=nonsense", f"host=127.0.0.1 port=1 password='{SECRET} x", SECRET):
        ended = command("status", "--dsn", dsn)
        assert ended.code in (1, 2)
        assert SECRET not in ended.err + ended.out, dsn


@ON_LINUX
def test_a_program_that_imports_batchq_keeps_its_arguments(command: CommandLine) -> None:
    program = "import batchq, pathlib; print(pathlib.Path('/proc/self/cmdline').read_text())"
    ended = subprocess.run(
        [sys.executable, "-c", program, "--dsn", "mine"], capture_output=True, text=True, check=True,
        cwd=command.directory,
    )  # fmt: skip
    assert "\0--dsn\0mine\0" in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "secrets"),
    [
        (["batchq", "status", "--dsn", "x y"], ["x y"]),
        (["batchq", "status", "--dsn=x=y", "--json"], ["x=y"]),
        (["batchq", "worker", "--listen", "x", "--migration-d=y", "a:b"], ["x", "y"]),
        (["batchq", "cancel", "--reason", "--dsn", "x"], ["x"]),
        (["batchq", "status", "--dsn", "--dsn"], ["--dsn"]),
        (["batchq", "status", "--", "-d", "--limit", "5", "--dsnx", "z"], []),
        (["batchq", "status", "--dsn"], []),
        (["batchq", "status", "--dsn", ""], [""]),
    ],
)
def test_each_way_to_write_a_flag_hides_its_value_and_nothing_else(arguments: list[str], secrets: list[str]) -> None:
    data = b"".join(word.encode() + b"\0" for word in arguments)
    found = [data[place : place + length].decode() for place, length in secrets_in(data)]
    assert [secret for secret in found if secret] == [secret for secret in secrets if secret]


@pytest.fixture
def command(dsn: str, tmp_path: Path) -> CommandLine:
    """Return what runs commands on the test's database."""
    return CommandLine(dsn, tmp_path)


if __name__ == "__main__":
    run_alone(__file__)
