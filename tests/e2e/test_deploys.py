"""Workers come and go as deploys, platforms and people have them do: it costs nothing, and ends within its time."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg
import pytest

import batchq
from batchq.cli.signals import SPARE_SECONDS
from batchq.postgres import embedded
from batchq.postgres.migrate import migrate
from tests.e2e import apps
from tests.integration.test_faults import Load
from tests.support.alone import run_alone
from tests.support.poolers import PgBouncer
from tests.support.processes import HANDLERS_DSN, ROOT, Process, Processes, listed_processes
from tests.support.steps import step
from tests.support.waiting import wait_until

APP = "tests.e2e.apps:app"
RESTARTS = int(os.environ.get("BATCHQ_TEST_RESTARTS", "6"))
MOST_GAP_SECONDS = 1.0
SHUTDOWN_SECONDS = 2
ODD_SECONDS = 2.0  # for a machine that is busy
MOST_SECONDS = SHUTDOWN_SECONDS + SPARE_SECONDS + ODD_SECONDS


@pytest.fixture
def admin(admin_dsn: str) -> Iterator[psycopg.Connection[Any]]:
    """Return a connection past every pooler, to a database that has the tables of the handlers."""
    with psycopg.connect(admin_dsn, autocommit=True) as conn:
        conn.execute(apps.TABLES)
        yield conn


@pytest.fixture
def processes(dsn: str, admin_dsn: str, admin: psycopg.Connection[Any]) -> Iterator[Processes]:
    """Return what starts worker processes."""
    with Processes(dsn, APP, handlers_dsn=admin_dsn) as processes:
        yield processes


def values(conn: psycopg.Connection[Any], query: str, *parameters: object) -> list[Any]:
    """Return the first column of *query*."""
    return [row[0] for row in conn.execute(query.encode(), parameters or None)]


# Rolling restarts


def test_rolling_restarts_under_load_charge_no_attempt_and_pause_nothing(
    admin: psycopg.Connection[Any], admin_dsn: str, processes: Processes
) -> None:
    step("given two workers under load")
    settings = {"concurrency": 4, "pool_size": 4, "shutdown_seconds": 10}
    running = [processes.worker(**settings) for _ in range(2)]
    with Load(admin_dsn) as load:
        load.wait_until_worked(20)

        step("when %s times a new one comes, and then the oldest leaves", RESTARTS)
        began_at = values(admin, "SELECT clock_timestamp()")[0]
        for _ in range(RESTARTS):
            running.append(processes.worker(**settings))
            assert running.pop(0).stop() == 0
            load.wait_until_worked(20)
        ended_at = values(admin, "SELECT clock_timestamp()")[0]

        step("then nothing is lost or doubled, no attempt is charged, and nothing was rescued")
        load.check()
    assert values(admin, "SELECT DISTINCT attempt FROM batchq.batches") == [1]
    assert values(admin, "SELECT count(*) FROM batchq.batches WHERE errors <> '[]'") == [0]

    step("and some batch has ended at least each %s s", MOST_GAP_SECONDS)
    assert longest_gap(admin, began_at, ended_at) < MOST_GAP_SECONDS
    assert [process.stop() for process in running] == [0, 0]


def longest_gap(conn: psycopg.Connection[Any], began_at: Any, ended_at: Any) -> float:
    """Return the longest time without the end of any batch, in seconds."""
    query = "SELECT DISTINCT finished_at FROM batchq.batches WHERE finished_at BETWEEN %s AND %s ORDER BY 1"
    ends = [began_at, *values(conn, query, began_at, ended_at), ended_at]
    gaps = sorted(((after - before).total_seconds() for before, after in pairwise(ends)), reverse=True)
    seconds = (ended_at - began_at).total_seconds()
    step(
        "in %.1f s %s commits of ends; the longest gaps: %s s", seconds, len(ends), [round(gap, 3) for gap in gaps[:3]]
    )
    return gaps[0]


def test_a_batch_goes_on_at_once_where_its_worker_left_it(admin: psycopg.Connection[Any], processes: Processes) -> None:
    step("given a batch that saves checkpoints, and a second worker that is idle")
    batch_id = batchq.enqueue(admin, "patient", {"seq": 1}, max_attempts=1)
    first = processes.worker()
    cursor = "SELECT coalesce(cursor::integer, 0) FROM batchq.batches WHERE id = %s"
    wait_until(lambda: values(admin, cursor, batch_id)[0] > 3, 20, "checkpoints")
    second = processes.worker()

    step("when the first gets SIGTERM")
    first.send(signal.SIGTERM)
    claimed = "SELECT claimed_by FROM batchq.batches WHERE id = %s AND status = 'processing'"
    sent_at = time.monotonic()
    wait_until(lambda: f"-{second.pid}-" in str(values(admin, claimed, batch_id)), 5, "the second to have it")
    step("the other one has it after %.3f s", time.monotonic() - sent_at)

    step("then it goes on from the checkpoint, in its first attempt")
    assert first.wait() == 0
    admin.execute("INSERT INTO gates (name) VALUES ('enough')")
    wait_until(lambda: values(admin, "SELECT status FROM batchq.batches") == ["completed"], 20, "completion")
    assert values(admin, "SELECT attempt FROM batchq.batches") == [1]
    assert second.stop() == 0


# SIGTERM to exit


def ended(process: Process, sent_at: float) -> float:
    """Wait for the end of a process; return how many seconds after *sent_at*."""
    code = process.wait(60)
    seconds = time.monotonic() - sent_at
    step("exit code %s after %.2f s", code, seconds)
    return seconds


def terminated(process: Process) -> float:
    """Send SIGTERM; return the seconds until the exit."""
    sent_at = time.monotonic()
    process.send(signal.SIGTERM)
    return ended(process, sent_at)


def begun(conn: psycopg.Connection[Any], count: int) -> None:
    """Wait until so many batches have begun."""
    query = "SELECT count(DISTINCT batch_id) FROM executions"
    wait_until(lambda: values(conn, query) == [count], 20, f"{count} batches to begin")


@pytest.mark.parametrize("kinds", [["stubborn"], ["busy_async"], ["stubborn", "gated_inside", "gated_async", "busy"]])
def test_handlers_that_ignore_the_stop_do_not_delay_it(
    admin: psycopg.Connection[Any], processes: Processes, kinds: list[str]
) -> None:
    step("given handlers that run on: %s", kinds)
    for seq, kind in enumerate(kinds):
        batchq.enqueue(admin, kind, {"seq": seq, "seconds": 60}, max_attempts=1)
    worker = processes.worker(shutdown_seconds=SHUTDOWN_SECONDS)
    begun(admin, len(kinds))

    step("when the worker gets SIGTERM, then it ends within its time, with every batch given back")
    assert SHUTDOWN_SECONDS <= terminated(worker) < MOST_SECONDS
    wait_until(lambda: values(admin, "SELECT DISTINCT attempt FROM batchq.batches") == [0], 5, "the give-back")
    assert values(admin, "SELECT DISTINCT status FROM batchq.batches") == ["pending"]
    assert values(admin, "SELECT count(*) FROM ledger") == [0]


@pytest.mark.parametrize("kind", ["quick", "stubborn", "gated_inside"])
def test_a_frozen_pooler_does_not_delay_the_end(
    admin: psycopg.Connection[Any], admin_dsn: str, pgbouncer: PgBouncer, database: str, kind: str
) -> None:
    with Processes(pgbouncer.dsn(database), APP, handlers_dsn=admin_dsn) as processes:
        step("given a worker through PgBouncer with a batch of kind %s, when PgBouncer stands still", kind)
        batchq.enqueue(admin, kind, {"seq": 1}, max_attempts=3)
        worker = processes.worker(shutdown_seconds=SHUTDOWN_SECONDS, lease_seconds=2)
        begun(admin, 1)
        pgbouncer.freeze()
        try:
            step("then SIGTERM ends it within its time all the same")
            assert terminated(worker) < MOST_SECONDS
        finally:
            pgbouncer.thaw()
        check_brought_back(admin, processes, kind)


def check_brought_back(admin: psycopg.Connection[Any], processes: Processes, kind: str) -> None:
    """Fail unless the lease brings the batch back to another worker."""
    step("and the next worker completes the batch")
    admin.execute("INSERT INTO gates SELECT %s || ' ' || attempt FROM generate_series(1, 3) AS attempt", [kind])
    worker = processes.worker(lease_seconds=2)
    wait_until(lambda: values(admin, "SELECT status FROM batchq.batches") == ["completed"], 30, "completion")
    assert len(values(admin, "SELECT seq FROM ledger")) == (kind == "gated_inside")
    assert worker.stop() == 0


@contextmanager
def server_of_its_own() -> Iterator[embedded.EmbeddedServer]:
    """Give a server that may be stopped and frozen."""
    with tempfile.TemporaryDirectory(prefix="batchq-test-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        with embedded.start(directory, {"fsync": "off"}) as server:
            yield server


@contextmanager
def stopped(server: embedded.EmbeddedServer) -> Iterator[None]:
    """Have the server be away."""
    server.stop()
    try:
        yield
    finally:
        server.open({})


@contextmanager
def frozen(server: embedded.EmbeddedServer) -> Iterator[None]:
    """Have every process of the server stand still."""
    pairs = [(int(pid), int(parent)) for pid, parent in listed_processes("pid", "ppid")]
    pids = [server.pid, *(pid for pid, parent in pairs if parent == server.pid)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("fault", [stopped, frozen])
def test_a_database_that_is_away_does_not_delay_the_end(fault: Callable[[Any], Any]) -> None:
    with server_of_its_own() as server:
        migrate(server.dsn())
        with psycopg.connect(server.dsn(), autocommit=True) as conn:
            conn.execute(apps.TABLES)
            batchq.enqueue(conn, "busy", {"seq": 1, "seconds": 1}, max_attempts=3)
            with Processes(server.dsn(), APP) as processes:
                step("given a worker with a batch, when the server is %s", fault.__name__)
                worker = processes.worker(shutdown_seconds=SHUTDOWN_SECONDS, lease_seconds=2)
                begun(conn, 1)
                with fault(server):
                    step("then SIGTERM ends it within its time")
                    assert terminated(worker) < MOST_SECONDS
                    assert worker.popen.returncode == 1

                step("and the lease brings the batch back")
                other = processes.worker(lease_seconds=2)
                with psycopg.connect(server.dsn(), autocommit=True) as again:
                    status = "SELECT status FROM batchq.batches"
                    wait_until(lambda: values(again, status) == ["completed"], 30, "completion")
                assert other.stop() == 0


def test_a_stop_in_the_middle_of_a_chunk_keeps_the_chunks_before(
    admin: psycopg.Connection[Any], processes: Processes
) -> None:
    step("given a batch whose third item waits")
    batch_id = batchq.enqueue(admin, "gated_items", items=[0, 1, 2], max_attempts=1)
    admin.execute("INSERT INTO gates VALUES ('item 0'), ('item 1')")
    worker = processes.worker(shutdown_seconds=SHUTDOWN_SECONDS)
    wait_until(lambda: values(admin, "SELECT items_done FROM batchq.batches") == [2], 20, "two chunks")

    step("when the worker gets SIGTERM, then it ends within its time, and what is done stays done")
    assert SHUTDOWN_SECONDS <= terminated(worker) < MOST_SECONDS
    row = admin.execute("SELECT status, attempt, items_done FROM batchq.batches WHERE id = %s", [batch_id]).fetchone()
    assert row == ("pending", 0, 2)


def test_a_stop_during_a_commit_that_takes_long_ends_within_its_time(
    admin: psycopg.Connection[Any], processes: Processes
) -> None:
    step("given a handler whose COMMIT takes 20 s, for a deferred trigger")
    admin.execute("""
        CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(20); RETURN NULL; END $$;
        CREATE CONSTRAINT TRIGGER slowly AFTER INSERT ON ledger DEFERRABLE INITIALLY DEFERRED
          FOR EACH ROW EXECUTE FUNCTION slowly();
    """)
    batchq.enqueue(admin, "note", {"seq": 1}, max_attempts=3)
    worker = processes.worker(shutdown_seconds=SHUTDOWN_SECONDS, lease_seconds=2)
    committing = "SELECT count(*) FROM pg_stat_activity WHERE query = 'COMMIT' AND state = 'active'"
    wait_until(lambda: values(admin, committing) == [1], 20, "the COMMIT")

    step("when the worker gets SIGTERM in the middle of it, then it ends within its time")
    assert terminated(worker) < MOST_SECONDS

    step("and whether that COMMIT has come to its end or not, the row is there once")
    admin.execute("ALTER TABLE ledger DISABLE TRIGGER slowly")
    other = processes.worker(lease_seconds=2)
    wait_until(lambda: values(admin, "SELECT status FROM batchq.batches") == ["completed"], 60, "completion")
    assert values(admin, "SELECT seq FROM ledger") == [1]
    assert other.stop() == 0


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_each_stopping_signal_stops_gracefully_and_a_second_one_at_once(
    admin: psycopg.Connection[Any], processes: Processes, number: signal.Signals
) -> None:
    batchq.enqueue(admin, "stubborn", {"seq": 1}, max_attempts=1)
    worker = processes.worker(shutdown_seconds=60)
    begun(admin, 1)
    step("given a worker with a batch that does not end, when it gets %s, then it waits for it", number.name)
    worker.send(number)
    wait_until(lambda: values(admin, "SELECT stopping FROM batchq.workers") == [True], 10, "the stop to show")
    assert worker.is_running

    step("when it gets it again, then it leaves at once, and the batch is given back unharmed")
    sent_at = time.monotonic()
    worker.send(number)
    assert ended(worker, sent_at) < SPARE_SECONDS + ODD_SECONDS
    assert worker.popen.returncode == 0
    assert admin.execute("SELECT status, attempt FROM batchq.batches").fetchone() == ("pending", 0)


@contextmanager
def started(directory: Path, dsn: str, *words: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Run `batchq worker` in another way: with *words* before or after; what it says goes to a file in *directory*.

    Apps are found there, too.
    """
    path = os.pathsep.join([str(directory), str(ROOT)])
    environment = os.environ | {"BATCHQ_DSN": dsn, HANDLERS_DSN: dsn, "PYTHONPATH": path, "BATCHQ_LOG_FORMAT": "json"}
    with (directory / "log").open("wb") as log:
        popen = subprocess.Popen(
            words, cwd=directory, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        yield popen
    finally:
        popen.kill()
        popen.wait()


BATCHQ = [sys.executable, "-m", "batchq"]


def test_nohup_keeps_a_worker_running(admin: psycopg.Connection[Any], dsn: str, tmp_path: Path) -> None:
    step("given a worker whose SIGHUP is ignored, when it gets one, then it works on")
    with started(tmp_path, dsn, "nohup", *BATCHQ, "worker", APP) as worker:
        wait_until(lambda: values(admin, "SELECT count(*) FROM batchq.workers") == [1], 30, "the worker")
        worker.send_signal(signal.SIGHUP)
        batchq.enqueue(admin, "note", {"seq": 1})
        wait_until(lambda: values(admin, "SELECT status FROM batchq.batches") == ["completed"], 20, "completion")
        worker.terminate()
        assert worker.wait(20) == 0


@pytest.mark.parametrize("command", [["worker"], ["workers", "2"]])
def test_what_is_stopped_while_it_imports_its_app_ends_well_and_at_once(
    dsn: str, tmp_path: Path, command: list[str]
) -> None:
    step("given an app whose import takes a minute, when SIGTERM comes meanwhile")
    (tmp_path / "slow_app.py").write_text("import pathlib, time\npathlib.Path('begun').touch()\ntime.sleep(60)\n")
    with started(tmp_path, dsn, *BATCHQ, *command, "slow_app:app") as worker:
        wait_until((tmp_path / "begun").exists, 30, "the import to begin")
        worker.terminate()
        assert worker.wait(5) == 0


# The first process of a container


TASKS = """
import subprocess

import batchq
from tests.e2e.apps import app


@app.handler("orphan")
def leave_an_orphan(batch: batchq.Batch) -> None:
    subprocess.run(["sh", "-c", "sleep 0.1 & exit 0"], check=True)
"""


def processes_below(pid: int) -> dict[int, str]:
    """Return the state of each child of a process, by its id."""
    rows = listed_processes("pid", "ppid", "stat")
    return {int(child): state for child, parent, state in rows if int(parent) == pid}


if sys.platform == "linux":  # elsewhere no process is the first one of a container

    @pytest.mark.parametrize("command", [["worker"], ["workers", "2"]])
    def test_as_process_1_it_is_stopped_by_sigterm_and_workers_bury_orphans(
        admin: psycopg.Connection[Any], admin_dsn: str, tmp_path: Path, command: list[str]
    ) -> None:
        (tmp_path / "tasks.py").write_text(TASKS)
        namespace = ["unshare", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
        namespace += ["--pid", "--fork", "--kill-child", "--mount-proc"]
        count = 2 if "workers" in command else 1
        with started(tmp_path, admin_dsn, *namespace, *BATCHQ, *command, "tasks:app") as outer:
            step("given `batchq %s` as process 1, and handlers that leave orphans", " ".join(command))
            rows = "SELECT count(*) FROM batchq.workers"
            wait_until(lambda: values(admin, rows) == [count], 30, "the workers")
            [first] = processes_below(outer.pid)
            batchq.enqueue_many(admin, "orphan", [{}] * 5)
            statuses = "SELECT DISTINCT status FROM batchq.batches"
            wait_until(lambda: values(admin, statuses) == ["completed"], 20, "completion")

            if "workers" in command:
                step("then `batchq workers` lets none of them stay a zombie, nor a worker that was killed")
                victim = min(processes_below(first))
                os.kill(victim, signal.SIGKILL)
                wait_until(lambda: victim not in processes_below(first), 10, "the killed worker to go")
                are_well = lambda: [state[0] for state in processes_below(first).values()] in (["S"] * 2, ["R", "S"])  # noqa: E731
                wait_until(are_well, 20, "two living workers, and nobody else")

            step("when it gets SIGTERM, then it ends well")
            os.kill(first, signal.SIGTERM)
            assert outer.wait(20) == 0, (tmp_path / "log").read_text()[-2000:]


if __name__ == "__main__":
    run_alone(__file__)
