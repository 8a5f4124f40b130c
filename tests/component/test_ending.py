"""A process ends in time and with its true exit code, whatever handlers leave behind and whoever reads its output."""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psycopg
import pytest

from batchq.common.outlet import MOST_BYTES, Outlet
from tests.support.alone import run_alone
from tests.support.batches import await_status, put, values
from tests.support.processes import ROOT, Processes
from tests.support.steps import step
from tests.support.waiting import wait_until

APP = "tests.component.leftovers_app:app"
SOON_SECONDS = 20  # to end in; what is left behind goes on for 30 at least, and the process is given 28


@pytest.fixture
def processes(dsn: str) -> Iterator[Processes]:
    """Return what runs `batchq` in processes of its own, which end with the test."""
    with Processes(dsn, APP) as processes:
        yield processes


def fill(writable: int) -> None:
    """Fill a pipe."""
    os.set_blocking(writable, False)
    with suppress(BlockingIOError):
        while os.write(writable, b"x" * 4096):
            pass
    with suppress(BlockingIOError):
        while os.write(writable, b"x"):
            pass
    os.set_blocking(writable, True)


@contextmanager
def full_pipe() -> Iterator[tuple[int, int]]:
    """Give both ends of a pipe that takes nothing more; nobody reads it but the test."""
    readable, writable = os.pipe()
    fill(writable)
    try:
        yield readable, writable
    finally:
        os.close(readable)
        os.close(writable)


@contextmanager
def running(dsn: str, *arguments: str, stdout: int, stderr: int, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run `batchq` with standard streams as given."""
    environment = os.environ | {"BATCHQ_DSN": dsn} | {f"BATCHQ_{name.upper()}": text for name, text in settings.items()}
    command = [sys.executable, "-m", "batchq", *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=stdout, stderr=stderr, stdin=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# --------------------------------------------------------------------------------------------------- what is left


@pytest.mark.parametrize("kind", ["nothing", "pool", "thread", "to_thread", "child"])
@pytest.mark.parametrize("how", ["SIGTERM", "--drain"])
def test_what_a_handler_leaves_behind_keeps_no_worker(
    conn: psycopg.Connection, processes: Processes, tmp_path: Path, kind: str, how: str
) -> None:
    batch_id = put(conn, kind)
    mark = tmp_path / "mark"
    worker = processes.worker(*(["--drain"] if how == "--drain" else []), test_mark=mark)
    await_status(conn, batch_id, "completed", 20)
    if how == "SIGTERM":
        worker.send(signal.SIGTERM)
    assert worker.wait(SOON_SECONDS) == 0
    assert values(conn, "SELECT count(*) FROM batchq.workers") == [0]
    if kind != "child":  # multiprocessing's own function at the exit waits for it
        assert mark.read_text() == "called"


def test_a_supervisor_whose_app_leaves_threads_behind_ends_with_its_workers(
    conn: psycopg.Connection, processes: Processes
) -> None:
    batch_id = put(conn, "pool")
    supervisor = processes.run("workers", "1", "--drain", APP)
    assert supervisor.wait(20 + SOON_SECONDS) == 0
    await_status(conn, batch_id, "completed")


# ------------------------------------------------------------------------------------------------ nobody who reads


@pytest.mark.parametrize("command", [("worker",), ("workers", "1")], ids=" ".join)
def test_a_full_standard_error_keeps_no_worker_from_its_work_nor_from_its_end(
    dsn: str, conn: psycopg.Connection, command: tuple[str, ...]
) -> None:
    failed = [put(conn, "failing", max_attempts=5) for _ in range(20)]
    with (
        full_pipe() as (_, writable),
        running(dsn, *command, APP, stdout=subprocess.DEVNULL, stderr=writable, lease_seconds="5") as process,
    ):
        for batch_id in failed:
            await_status(conn, batch_id, "failed", 40)
        await_status(conn, put(conn, "nothing"), "completed", 20)
        process.send_signal(signal.SIGTERM)
        assert process.wait(SOON_SECONDS) == 0
    assert values(conn, "SELECT count(*) FROM batchq.workers") == [0]


def test_a_full_standard_output_keeps_no_worker_from_its_end(dsn: str, conn: psycopg.Connection) -> None:
    batch_id = put(conn, "printing")
    with (
        full_pipe() as (_, writable),
        running(dsn, "worker", APP, stdout=writable, stderr=subprocess.DEVNULL, shutdown_seconds="1") as process,
    ):
        await_status(conn, put(conn, "nothing"), "completed", 30)
        process.send_signal(signal.SIGTERM)
        assert process.wait(SOON_SECONDS) == 0
    await_status(conn, batch_id, "ready")


def test_a_worker_that_cannot_start_says_so_to_nobody_and_ends(dsn: str) -> None:
    with (
        full_pipe() as (_, writable),
        running(dsn, "worker", "no_such_module:app", stdout=subprocess.DEVNULL, stderr=writable) as process,
    ):
        assert process.wait(2 * SOON_SECONDS) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_nobody_reads_ends_at_a_signal(
    dsn: str, conn: psycopg.Connection, number: signal.Signals
) -> None:
    for _ in range(100):
        put(conn, "nothing")
    with full_pipe() as (readable, writable):
        os.read(readable, 4096)
        command = ("status", "--json", "--limit", "100")
        with running(dsn, *command, stdout=writable, stderr=subprocess.DEVNULL) as process:
            wait_until(lambda: is_full(writable), 40, "the command to print more than there is room for")
            process.send_signal(number)
            assert process.wait(SOON_SECONDS) in (130, -number)


def is_full(writable: int) -> bool:
    """Tell whether a pipe takes nothing more."""
    return not select.select([], [writable], [], 0)[1]


def test_a_worker_whose_standard_streams_are_closed_works(dsn: str, conn: psycopg.Connection) -> None:
    batch_id = put(conn, "failing", max_attempts=1)
    words = f"exec {sys.executable} -m batchq worker --drain {APP} >&- 2>&-"
    ended = subprocess.run(["sh", "-c", words], cwd=ROOT, env=os.environ | {"BATCHQ_DSN": dsn}, timeout=60, check=False)
    assert ended.returncode == 0
    await_status(conn, batch_id, "failed")


def test_a_worker_whose_reader_has_gone_works(dsn: str, conn: psycopg.Connection) -> None:
    batch_id = put(conn, "failing", max_attempts=1)
    with ExitStack() as stack:
        readable, writable = os.pipe()
        os.close(readable)
        process = stack.enter_context(running(dsn, "worker", "--drain", APP, stdout=writable, stderr=writable))
        os.close(writable)
        assert process.wait(60) == 0
    await_status(conn, batch_id, "failed")


# -------------------------------------------------------------------------------------------------------- an outlet


def read_lines(readable: int, count: int) -> list[bytes]:
    """Read as many lines, those that filled the pipe before them left out."""
    data = b""
    while data.count(b"\n") < count:
        data += os.read(readable, 65_536)
    return data.lstrip(b"x").splitlines()


def test_lines_wait_for_a_slow_reader_in_their_order() -> None:
    with full_pipe() as (readable, writable):
        outlet = Outlet(writable, lambda _: None)
        lines = [f"{number} {'y' * (number % 7000)}".encode() for number in range(1000)]
        for line in lines[:500]:
            outlet.put(line + b"\n")
        assert read_lines(readable, 500) == lines[:500]
        for line in lines[500:505]:
            outlet.put(line + b"\n")
        outlet.flush()
        assert read_lines(readable, 5) == lines[500:505]


def test_lines_that_nobody_reads_are_dropped_counted_and_hold_nobody_up() -> None:
    told: list[int] = []
    with full_pipe() as (readable, writable):
        outlet = Outlet(writable, told.append)
        kept, dropped = MOST_BYTES // 100_000, 1000
        began_at = time.monotonic()
        for _ in range(kept + dropped):
            outlet.put(b"y" * 99_999 + b"\n")
        outlet.flush()
        assert time.monotonic() - began_at < 5, "one wait of a second, not one for each line"
        assert len(read_lines(readable, kept)) == kept
        wait_until(lambda: told, 5, "the count")
        step("and the next line is written again")
        outlet.put(b"next\n")
        assert read_lines(readable, 1) == [b"next"]
    assert told == [dropped]


def test_whoever_shares_the_file_finds_it_as_it_was() -> None:
    with full_pipe() as (readable, writable):
        outlet = Outlet(writable, lambda _: None)
        outlet.put(b"line\n")
        assert os.get_blocking(writable)
        assert read_lines(readable, 1) == [b"line"]  # else its thread would write into whatever has the number next


def test_a_line_is_written_before_put_returns_if_there_is_room() -> None:
    readable, writable = os.pipe()
    try:
        Outlet(writable, lambda _: None).put(b"line\n")
        os.set_blocking(readable, False)
        assert os.read(readable, 100) == b"line\n"
    finally:
        os.close(readable)
        os.close(writable)


def test_a_forked_child_writes_its_own_lines_only() -> None:
    with full_pipe() as (readable, writable):
        outlet = Outlet(writable, lambda _: None)
        outlet.put(b"of the parent\n")
        if (child := os.fork()) == 0:
            outlet.put(b"of the child\n")
            outlet.flush()
            os._exit(0)
        found = read_lines(readable, 2)
        os.waitpid(child, 0)
    assert sorted(found) == [b"of the child", b"of the parent"]


if __name__ == "__main__":
    run_alone(__file__)
