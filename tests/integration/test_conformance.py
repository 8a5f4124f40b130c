"""What a worker must do, whatever it is written in: scenarios of docs/protocol.md, run against a worker command.

They run on the worker of batchq, on the one in TypeScript (docs/examples/typescript-worker), and on both at once on one
queue. BATCHQ_CONFORMANCE_WORKER adds a command of yours. The command serves the kinds of docs/protocol.md on the queue
"default"; its database is in PGHOST, PGPORT, PGUSER, PGPASSWORD and PGDATABASE, and, as one string, in BATCHQ_DSN; its
leases take BATCHQ_LEASE_SECONDS.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.support.alone import run_alone
from tests.support.batches import await_status, look, put, values
from tests.support.processes import ROOT
from tests.support.programs import path_of
from tests.support.steps import step
from tests.support.waiting import allowed, wait_until

LEASE_SECONDS = 2
OWN_COMMAND = "BATCHQ_CONFORMANCE_WORKER"
LANGUAGES = ["python", "typescript", *(["given"] if os.environ.get(OWN_COMMAND) else [])]
EXAMPLE = ROOT / "docs" / "examples" / "typescript-worker"
ROWS = "SELECT item FROM conformance WHERE batch_id = %s ORDER BY item, attempt"
PARTS = {"host": "PGHOST", "port": "PGPORT", "user": "PGUSER", "password": "PGPASSWORD", "dbname": "PGDATABASE"}

Start = Callable[..., "Program"]


class Program:
    """A worker process."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("wb") as output:
            self.popen = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.popen.send_signal(number)

    def freeze(self) -> None:
        """Stop it with SIGSTOP, and wait until it stands still."""
        self.send(signal.SIGSTOP)
        os.waitid(os.P_PID, self.popen.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def kill(self) -> None:
        """End it as kill -9 does."""
        self.popen.kill()
        self.popen.wait()

    def stop(self) -> int:
        """Stop it with SIGTERM; return its exit code."""
        self.send(signal.SIGTERM)
        return self.popen.wait(allowed(20))

    def end(self) -> None:
        """End it, whatever state it is in; print its log, for a test that has failed."""
        if self.popen.poll() is None:
            self.kill()
        print(self.log.read_text(errors="replace")[-3000:])


@pytest.fixture(scope="session")
def typescript(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the command of the worker in TypeScript, compiled. What it needs comes from npm."""
    node, npm = path_of("node"), path_of("npm")
    directory = tmp_path_factory.mktemp("typescript") / "worker"
    shutil.copytree(EXAMPLE, directory, ignore=shutil.ignore_patterns("node_modules", "dist"))
    for command in ([npm, "install", "--no-audit", "--no-fund", "--silent"], [npm, "run", "--silent", "build"]):
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, f"{' '.join(command)} exited {done.returncode}:\n{done.stdout}{done.stderr}"
    return [node, str(directory / "dist" / "main.js")]


@pytest.fixture
def start(dsn: str, conn: psycopg.Connection, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Start]:
    """Return what starts a worker of a language; they all end with the test."""
    conn.execute("CREATE TABLE conformance (batch_id bigint, item integer, attempt integer)")
    parts = psycopg.conninfo.conninfo_to_dict(dsn)
    environment = os.environ | {PARTS[name]: str(value) for name, value in parts.items() if name in PARTS}
    environment |= {"BATCHQ_DSN": dsn, "BATCHQ_LEASE_SECONDS": str(LEASE_SECONDS)}
    started: list[Program] = []

    def start_one(language: str) -> Program:
        match language:
            case "python":
                command = [sys.executable, "-m", "batchq", "worker", "tests.integration.conformance_app:app"]
            case "typescript":
                command = request.getfixturevalue("typescript")
            case _:
                command = shlex.split(os.environ[OWN_COMMAND])
        program = Program(command, environment, tmp_path / f"{language}-{len(started)}.log")
        started.append(program)
        return program

    yield start_one
    for program in started:
        program.end()


all_languages = pytest.mark.parametrize("language", LANGUAGES)


def rescue(conn: psycopg.Connection) -> None:
    """Do as any other worker of the queue does for one that died."""
    conn.execute("SELECT batchq.rescue('default')")


def expire(conn: psycopg.Connection, batch_id: int) -> None:
    """Wait until the lease has expired, and rescue the batch."""

    def is_rescued() -> bool:
        rescue(conn)
        return bool(look(conn, batch_id).status != "processing")

    wait_until(is_rescued, LEASE_SECONDS * 3, "the rescue")


# ----------------------------------------------------------------------------------------------------------- scenarios


@all_languages
def test_it_claims_and_completes_with_a_result(conn: psycopg.Connection, start: Start, language: str) -> None:
    payloads: list[Any] = [{"n": 1}, [1, None, "äé\u2028"], "text", 12.5, {"deep": {"er": [{}]}}]
    ids = [put(conn, "echo", payload) for payload in payloads]
    start(language)
    for batch_id, payload in zip(ids, payloads, strict=True):
        found = await_status(conn, batch_id, "completed", 30)
        assert (found.result, found.attempt, found.errors) == (payload, 1, [])


@all_languages
def test_it_fails_retries_and_completes(conn: psycopg.Connection, start: Start, language: str) -> None:
    again = put(conn, "fails", {"times": 1, "error": "boom"})
    last = put(conn, "fails", {"times": 9, "error": "boom ü"}, max_attempts=1)
    start(language)
    step("the last attempt fails the batch")
    found = await_status(conn, last, "failed", 30)
    assert [(error["attempt"], "boom ü" in error["error"]) for error in found.errors] == [(1, True)]
    step("another one is retried after its backoff")
    wait_until(lambda: look(conn, again).errors, 30, "the first attempt to fail")
    assert look(conn, again).status in ("pending", "processing", "completed")
    conn.execute("UPDATE batchq.batches_live SET run_at = now() WHERE status = 'pending'")
    assert await_status(conn, again, "completed", 30).attempt == 2


@all_languages
def test_it_fails_for_good(conn: psycopg.Connection, start: Start, language: str) -> None:
    batch_id = put(conn, "refuses", {"error": "never"})
    start(language)
    found = await_status(conn, batch_id, "failed", 30)
    assert found.attempt == 1
    assert "never" in found.errors[0]["error"]


@all_languages
def test_it_saves_checkpoints_and_runs_failed_items_again(
    conn: psycopg.Connection, start: Start, language: str
) -> None:
    batch_id = put(conn, "items", {}, items=[{}, {"fails": "once"}, {}, {}, {"fails": "once"}])
    start(language)
    wait_until(lambda: look(conn, batch_id).errors, 30, "the first attempt to fail")
    assert "2 of 5 items failed" in look(conn, batch_id).errors[0]["error"]
    conn.execute("UPDATE batchq.batches_live SET run_at = now() WHERE status = 'pending'")
    found = await_status(conn, batch_id, "completed", 30)
    assert (found.attempt, found.items_done, found.items_failed) == (2, 5, 0)
    assert found.cursor is not None
    assert values(conn, ROWS, batch_id) == [0, 1, 2, 3, 4]
    assert values(conn, "SELECT item_index FROM batchq.failed_items") == []


@all_languages
def test_failed_items_are_recorded_and_tolerated_as_the_batch_says(
    conn: psycopg.Connection, start: Start, language: str
) -> None:
    items = [{}, {"fails": "final"}, {"fails": "always"}]
    tolerant = put(conn, "items", {}, items=items, max_failed_items=2, max_attempts=1)
    strict = put(conn, "items", {}, items=items, max_failed_items=1, max_attempts=1)
    start(language)
    assert await_status(conn, tolerant, "completed", 30).items_failed == 2
    assert await_status(conn, strict, "failed", 30).items_failed == 2
    failed = conn.execute("SELECT item_index, retryable, item, attempt FROM batchq.failed_items WHERE batch_id = %s "
                          "ORDER BY 1", [strict]).fetchall()  # fmt: skip
    assert failed == [(1, False, {"fails": "final"}, 1), (2, True, {"fails": "always"}, 1)]
    assert values(conn, ROWS, strict) == [0]


@all_languages
def test_a_batch_that_is_cancelled_writes_nothing_more(conn: psycopg.Connection, start: Start, language: str) -> None:
    batch_id = put(conn, "slow", {"seconds": 3})
    worker = start(language)
    await_status(conn, batch_id, "processing", 30)
    conn.execute("SELECT batchq.cancel(%s)", [batch_id])
    time.sleep(3.5)
    assert (look(conn, batch_id).status, values(conn, ROWS, batch_id)) == ("cancelled", [])
    step("and the worker works on")
    assert await_status(conn, put(conn, "echo", 1), "completed", 10).result == 1
    assert worker.popen.poll() is None


@all_languages
def test_it_renews_the_lease_of_what_takes_longer(conn: psycopg.Connection, start: Start, language: str) -> None:
    batch_id = put(conn, "slow", {"seconds": 3 * LEASE_SECONDS})
    start(language)
    await_status(conn, batch_id, "processing", 30)
    until = time.monotonic() + 2.5 * LEASE_SECONDS
    while time.monotonic() < until:
        rescue(conn)
        time.sleep(0.1)
    found = await_status(conn, batch_id, "completed", 30)
    assert (found.attempt, found.result, values(conn, ROWS, batch_id)) == (1, {"slow": True}, [0])


@all_languages
def test_a_worker_that_was_frozen_beyond_its_lease_writes_nothing(
    conn: psycopg.Connection, start: Start, language: str
) -> None:
    batch_id = put(conn, "slow", {"seconds": 1})
    worker = start(language)
    await_status(conn, batch_id, "processing", 30)
    worker.freeze()
    expire(conn, batch_id)
    conn.execute("UPDATE batchq.batches_live SET run_at = now() + interval '4 s' WHERE status = 'pending'")
    worker.send(signal.SIGCONT)
    time.sleep(2)
    step("what it had begun is lost; the next attempt, two seconds later, writes")
    assert (look(conn, batch_id).status, values(conn, ROWS, batch_id)) == ("pending", [])
    found = await_status(conn, batch_id, "completed", 30)
    assert found.attempt == 2
    assert conn.execute("SELECT item, attempt FROM conformance").fetchall() == [(0, 2)]


@all_languages
def test_after_kill_9_another_continues_from_the_last_checkpoint(
    conn: psycopg.Connection, start: Start, language: str
) -> None:
    batch_id = put(conn, "items", {"pause_seconds": 0.3}, items=[{}] * 10)
    first = start(language)
    wait_until(lambda: look(conn, batch_id).items_done >= 4, 30, "some checkpoints")
    first.kill()
    done = look(conn, batch_id).items_done
    assert values(conn, ROWS, batch_id) == list(range(done))
    start(language)
    step("the new worker rescues the batch itself")
    found = await_status(conn, batch_id, "completed", 30)
    assert (found.attempt, found.items_done) == (2, 10)
    assert "worker died" in found.errors[0]["error"]
    assert values(conn, ROWS, batch_id) == list(range(10))


@all_languages
def test_it_stops_gracefully_and_releases_what_it_runs(conn: psycopg.Connection, start: Start, language: str) -> None:
    batch_id = put(conn, "slow", {"seconds": 60})
    worker = start(language)
    await_status(conn, batch_id, "processing", 30)
    assert worker.stop() == 0
    found = look(conn, batch_id)
    assert (found.status, found.attempt, found.errors, found.claimed_by) == ("pending", 0, [], None)


@all_languages
def test_a_kind_that_it_does_not_know_stays_untouched(conn: psycopg.Connection, start: Start, language: str) -> None:
    unknown, other = put(conn, "unknown"), put(conn, "echo", queue="elsewhere")
    paused = put(conn, "slow", {"seconds": 0})
    later = put(conn, "echo", 2, delay_seconds=3600)
    conn.execute("SELECT batchq.pause(kind => 'slow')")
    start(language)
    await_status(conn, put(conn, "echo", 1), "completed", 30)
    for batch_id in (unknown, other, paused, later):
        assert (look(conn, batch_id).status, look(conn, batch_id).attempt) == ("pending", 0)


def test_workers_in_both_languages_share_a_queue(conn: psycopg.Connection, start: Start) -> None:
    echoes = [put(conn, "echo", number) for number in range(200)]
    lists = [put(conn, "items", {"pause_seconds": 0.05}, items=[{}] * 8) for _ in range(20)]
    slow = [put(conn, "slow", {"seconds": 0.2}) for _ in range(30)]
    fleet = [start(language) for language in ("python", "typescript") * 2]
    wait_until(lambda: values(conn, "SELECT count(*) FROM conformance") > [20], 30, "some rows")
    step("one of each is killed")
    fleet[0].kill()
    fleet[1].kill()
    wait_until(lambda: values(conn, "SELECT count(*) FROM batchq.batches_live") == [0], 60, "all to finish")
    assert values(conn, "SELECT DISTINCT status FROM batchq.all_batches") == ["completed"]
    found = dict(conn.execute("SELECT id, result FROM batchq.all_batches WHERE kind = 'echo'").fetchall())
    assert [found[one] for one in echoes] == list(range(200))
    rows = conn.execute("SELECT batch_id, item FROM conformance ORDER BY 1, 2").fetchall()
    assert rows == sorted([(one, item) for one in lists for item in range(8)] + [(one, 0) for one in slow])
    workers = values(conn, "SELECT DISTINCT claimed_by FROM batchq.all_batches")
    own = values(conn, "SELECT id FROM batchq.workers")
    assert set(workers) & set(own), "no batch for a worker of batchq"
    assert set(workers) - set(own), "no batch for a worker in TypeScript"


if __name__ == "__main__":
    run_alone(__file__)
