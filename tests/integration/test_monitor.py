"""What people see while real workers work: batchq.status, batchq.queues, batchq.workers, Monitor, `batchq monitor`."""

import json
import os
import socket
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

import batchq
from batchq.cli import main
from batchq.operate.monitor import Monitor
from batchq.postgres.link import Link
from batchq.postgres.statements import views
from tests.e2e import apps
from tests.support.alone import run_alone
from tests.support.processes import Process, Processes
from tests.support.steps import step
from tests.support.waiting import wait_until

APP = "tests.e2e.apps:app"


@pytest.fixture
def batches(conn: psycopg.Connection[Any]) -> psycopg.Connection[Any]:
    """Return a connection to the test's database, which has the tables of the handlers."""
    conn.execute(apps.TABLES)
    return conn


@pytest.fixture
def processes(dsn: str, admin_dsn: str, batches: psycopg.Connection[Any]) -> Iterator[Processes]:
    """Return what starts worker processes."""
    with Processes(dsn, APP, handlers_dsn=admin_dsn) as processes:
        yield processes


@pytest.fixture
def monitor(dsn: str) -> Iterator[Monitor]:
    """Return a monitor that has looked once."""
    monitor = Monitor(Link(dsn, 10))
    monitor.changes()
    yield monitor
    monitor.link.close()


def seen(conn: psycopg.Connection[Any], batch_id: int | None) -> dict[str, Any]:
    """Return the row of batchq.status for a batch."""
    (row,) = conn.execute("SELECT to_jsonb(s) FROM batchq.status s WHERE id = %s", [batch_id]).fetchone() or ({},)
    return dict(row)


def wait_for_status(conn: psycopg.Connection[Any], batch_id: int | None, status: str) -> dict[str, Any]:
    """Wait until batchq.status shows the batch so; return its row."""
    row: dict[str, Any] = {}

    def is_so() -> bool:
        row.update(seen(conn, batch_id))
        return bool(row["status"] == status)

    wait_until(is_so, 10, f"batch {batch_id} to be {status}")
    return row


def open_gate(conn: psycopg.Connection[Any], name: str) -> None:
    """Let the handlers at a gate go on."""
    conn.execute("INSERT INTO gates (name) VALUES (%s)", [name])


def queue_row(conn: psycopg.Connection[Any], kind: str) -> dict[str, Any]:
    """Return the row of batchq.queues for a kind, {} without one."""
    rows = views.queue_rows(conn, kind=kind)
    return rows[0] if rows else {}


# The views


def test_a_batch_is_seen_from_ready_to_completed_with_its_progress(
    batches: psycopg.Connection[Any], processes: Processes
) -> None:
    step("given a batch of 6 items that nobody works yet")
    batch_id = batchq.enqueue(batches, "gated_items", items=list(range(6)))
    row = seen(batches, batch_id)
    assert (row["status"], row["progress_percent"], row["items_total"], row["attempt"]) == ("ready", 0, 6, 0)

    step("when a worker works it, then it is seen processing, by whom and since when, and its progress moves")
    worker = processes.worker()
    row = wait_for_status(batches, batch_id, "processing")
    assert f"-{worker.pid}-" in row["claimed_by"]
    assert row["running_time"] is not None
    shown = []
    for item in range(6):
        open_gate(batches, f"item {item}")
        wait_for_items(batches, batch_id, item + 1)
        shown.append(seen(batches, batch_id)["progress_percent"])
    assert shown == [16, 33, 50, 66, 83, 100]

    step("and it ends as completed, with the time it took")
    row = wait_for_status(batches, batch_id, "completed")
    assert (row["progress_percent"], row["items_done"], row["items_failed"]) == (100, 6, 0)
    assert row["finished_at"] > row["claimed_at"] >= row["created_at"]


def wait_for_items(conn: psycopg.Connection[Any], batch_id: int | None, count: int) -> None:
    """Wait until *count* items are seen as done."""
    wait_until(lambda: seen(conn, batch_id)["items_done"] == count, 10, f"{count} items to be done")


def test_a_failing_batch_is_seen_retrying_and_failed(batches: psycopg.Connection[Any], processes: Processes) -> None:
    step("given a batch that fails twice, and may fail once")
    batch_id = batchq.enqueue(batches, "flaky", {"failures": 2}, max_attempts=2)
    processes.worker()

    step("then it is seen waiting for its next attempt, with the error, and then failed")
    row = wait_for_status(batches, batch_id, "retrying")
    assert (row["attempt"], row["last_error"]) == (1, "RuntimeError: attempt 1 fails")
    assert row["next_run_at"] is not None
    row = wait_for_status(batches, batch_id, "failed")
    assert (row["attempt"], row["last_error"]) == (2, "RuntimeError: attempt 2 fails")
    assert queue_row(batches, "flaky")["failed"] == 1


def test_a_batch_of_a_paused_worker_is_seen_stalled_until_another_takes_it_back(
    batches: psycopg.Connection[Any], processes: Processes
) -> None:
    step("given a batch whose worker is paused")
    batch_id = batchq.enqueue(batches, "stubborn", {"seq": 1})
    paused = processes.worker(lease_seconds=1)
    wait_until(lambda: batches.execute("SELECT FROM executions").rowcount, 10, "the batch to begin")
    paused.freeze()

    step("when its lease has run out, then it is seen stalled")
    row = wait_for_status(batches, batch_id, "stalled")
    assert f"-{paused.pid}-" in row["claimed_by"]
    assert queue_row(batches, "stubborn")["stalled"] == 1

    step("when another worker lives, then it is seen processing there, and completed")
    other = processes.worker(lease_seconds=1)
    row = wait_for_status(batches, batch_id, "processing")
    assert f"-{other.pid}-" in row["claimed_by"]
    assert row["last_error"].startswith("worker died")
    open_gate(batches, "stubborn 2")
    wait_for_status(batches, batch_id, "completed")


def test_queues_show_what_waits_what_runs_and_who_works(batches: psycopg.Connection[Any], processes: Processes) -> None:
    step("given 5 batches of one kind, 2 of them scheduled, and one of a kind that nobody knows")
    batchq.enqueue_many(batches, "stubborn", [{"seq": seq} for seq in range(3)])
    batchq.enqueue_many(batches, "stubborn", [{"seq": 9}] * 2, delay_seconds=3600)
    batchq.enqueue(batches, "unknown")
    row = queue_row(batches, "stubborn")
    assert [row[name] for name in ("ready", "scheduled", "processing", "workers")] == [3, 2, 0, 0]
    assert row["oldest_wait"] is not None

    step("when a worker with 2 threads runs, then 2 of them run, and the unknown kind has no worker")
    worker = processes.worker(concurrency=2)
    numbers = ("ready", "scheduled", "processing", "stalled", "failed", "workers")
    expected = [1, 2, 2, 0, 0, 1]
    wait_until(lambda: [queue_row(batches, "stubborn")[n] for n in numbers] == expected, 10, "2 of 3 to run")
    assert queue_row(batches, "unknown")["workers"] == 0

    step("when they end, then the rate of the last minute shows")
    open_gate(batches, "stubborn 1")
    expected = [0, 2, 0, 0, 0, 1]
    wait_until(lambda: [queue_row(batches, "stubborn")[n] for n in numbers] == expected, 10, "all 3 to end")
    rate = "the rate of the last minute"
    wait_until(lambda: 0 < queue_row(batches, "stubborn")["finished_per_second"] <= 0.05, 10, rate)
    assert worker.stop() == 0


def test_workers_are_shown_while_they_live(batches: psycopg.Connection[Any], processes: Processes) -> None:
    step("given two workers, one with a batch in hand")
    first, second = (processes.worker(lease_seconds=1, queues=queue, concurrency=3) for queue in ("mail", "default"))
    batchq.enqueue(batches, "stubborn", {"seq": 1})
    wait_until(
        lambda: {row["pid"]: row["in_hand"] for row in workers(batches)} == {first.pid: 0, second.pid: 1}, 10, "both"
    )
    row = next(row for row in workers(batches) if row["pid"] == first.pid)
    assert row["queues"] == ["mail"]
    assert row["concurrency"] == 3 + 100
    assert "stubborn" in row["kinds"]
    assert row["id"] == first.lines("worker started")[0]["worker"]

    step("when one stops, then its row goes; if one is killed, it is late, then gone, and its row goes when it is old")
    assert first.stop() == 0
    second.kill()
    assert [row["pid"] for row in workers(batches)] == [second.pid]
    for seconds, state in ((11, "late"), (61, "gone")):
        batches.execute("UPDATE batchq.workers SET heartbeat_at = now() - %s * interval '1 second'", [seconds])
        assert [row["state"] for row in workers(batches)] == [state]
    batches.execute("UPDATE batchq.workers SET heartbeat_at = now() - interval '61 minutes'")
    third = processes.worker(lease_seconds=1)
    pids = "SELECT pid FROM batchq.workers"
    wait_until(lambda: batches.execute(pids).fetchall() == [(third.pid,)], 10, "the dead worker's row to go")


def workers(conn: psycopg.Connection[Any]) -> list[dict[str, Any]]:
    """Return the workers seen in the last hour."""
    return views.worker_objects(conn)


# Monitor


def test_a_monitor_tells_each_change_of_state_once(
    batches: psycopg.Connection[Any], processes: Processes, monitor: Monitor
) -> None:
    step("given a monitor, and nothing to see")
    assert monitor.changes() == []

    step("when a batch is enqueued, claimed, fails once and is completed, then each is told, once and in order")
    batch_id = batchq.enqueue(batches, "flaky", {"failures": 1})
    told = [(row["id"], row["status"]) for row in monitor.changes()]
    assert told == [(batch_id, "ready")]
    assert monitor.changes() == []
    worker = processes.worker()
    states: list[str] = []

    def look() -> bool:
        states.extend(row["status"] for row in monitor.changes())
        return "completed" in states

    wait_until(look, 10, "the batch to be completed")
    order = iter(["processing", "retrying", "ready", "processing", "completed"])
    assert all(state in order for state in states), f"in order, though some may be missed: {states}"
    assert {"retrying", "completed"} <= set(states)
    assert monitor.changes() == []
    assert monitor.is_done()
    assert worker.stop() == 0


def test_a_monitor_survives_a_cut_connection(batches: psycopg.Connection[Any], monitor: Monitor) -> None:
    step("given a monitor whose connection is cut")
    assert monitor.link.conn
    with socket.socket(fileno=os.dup(monitor.link.conn.fileno())) as peer:
        peer.shutdown(socket.SHUT_RDWR)

    step("when it looks again, then it fails once, and has missed nothing")
    batch_id = batchq.enqueue(batches, "quick")
    with pytest.raises(psycopg.OperationalError):
        monitor.changes()
    assert [(row["id"], row["status"]) for row in monitor.changes()] == [(batch_id, "ready")]


def test_the_command_monitor_ends_as_it_was_told(batches: psycopg.Connection[Any], processes: Processes) -> None:
    step("given monitors that run until all is done, and until something is failed or stalled")
    done = batchq.enqueue(batches, "stubborn", {"seq": 1}, queue="good")
    failed = batchq.enqueue(batches, "flaky", {"failures": 9}, max_attempts=1, queue="bad", delay_seconds=2)
    stalled = batchq.enqueue(batches, "stubborn", {"seq": 2}, queue="ugly")
    watch = ["monitor", "--every-seconds", "0.1", "--json"]
    until_done = processes.run(*watch, "--until-done", "--exit-on", "failed,stalled", "--queue", "good")
    on_failed = processes.run(*watch, "--exit-on", "failed,stalled", "--queue", "bad")
    on_stalled = processes.run(*watch, "--exit-on", "failed,stalled", "--queue", "ugly")

    step("when one batch is completed, one fails, and one is left behind by a paused worker")
    processes.worker(queues="good,bad")
    paused = processes.worker(queues="ugly", lease_seconds=1)
    wait_until(lambda: batches.execute("SELECT FROM executions WHERE seq = 2").rowcount, 10, "the third to begin")
    paused.freeze()
    open_gate(batches, "stubborn 1")

    step("then they exit with 0, 1 and 1, each having printed the last state it saw")
    assert [process.wait(15) for process in (until_done, on_failed, on_stalled)] == [0, 1, 1]
    assert last_line(on_failed, failed) == "failed"
    assert last_line(on_stalled, stalled) == "stalled"
    assert last_line(until_done, done) == "completed"


def test_the_command_monitor_misses_no_failure_at_the_very_end(
    batches: psycopg.Connection[Any], dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step("given a batch that fails between the monitor's look at what has changed and its look at what is left")
    batch_id = batchq.enqueue(batches, "quick")
    is_done = Monitor.is_done
    monitors = set()

    def is_done_later(monitor: Monitor) -> bool:
        monitors.add(monitor)
        batches.execute("SELECT batchq.cancel(%s)", [batch_id])
        return is_done(monitor)

    monkeypatch.setattr(Monitor, "is_done", is_done_later)
    monkeypatch.setenv("BATCHQ_DSN", dsn)

    step("when it runs until all is done, then it exits with 1 all the same")
    assert main(["monitor", "--until-done", "--exit-on", "cancelled", "--every-seconds", "0.1"]) == 1
    for monitor in monitors:
        monitor.link.close()


def last_line(process: Process, batch_id: int | None) -> str:
    """Return the status in the last line that `batchq monitor --json` printed, all of one batch."""
    rows = [json.loads(line) for line in process.output().splitlines()]
    assert {row["id"] for row in rows} == {batch_id}
    return str(rows[-1]["status"])


def test_a_monitor_does_not_keep_a_backend(batches: psycopg.Connection[Any], monitor: Monitor, admin_dsn: str) -> None:
    step("given a monitor that looks now and then, then its connection is in no transaction meanwhile")
    for _ in range(3):
        monitor.changes()
        with psycopg.connect(admin_dsn, autocommit=True) as admin:
            query = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND state ~ 'in transaction'"
            assert admin.execute(query).rowcount == 0


if __name__ == "__main__":
    run_alone(__file__)
