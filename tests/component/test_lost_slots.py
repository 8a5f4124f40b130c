"""Handlers that never return: their batches come back on time, their slots are counted, and the process is replaced."""

import asyncio
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import structlog

import batchq
from batchq.settings import Settings
from batchq.testing import running_worker
from batchq.worker import event_loop, liveness, loop_lane
from batchq.worker.lifecycle import StopReason
from batchq.worker.liveness import LIVENESS_FD, LivenessPings
from tests.support.alone import run_alone
from tests.support.batches import await_status, look, put, values, wait_for_status
from tests.support.processes import Processes
from tests.support.steps import step
from tests.support.waiting import wait_until

SOON = batchq.Backoff(0.05, 0.1)
Event = dict[str, Any]
gate = threading.Event()
app = batchq.App()


@app.handler("stuck", timeout_seconds=0.2, backoff=SOON)
def stuck(batch: batchq.Batch) -> None:
    """Wait in a call that nobody can interrupt."""
    gate.wait(60)


@app.handler("spinning", timeout_seconds=0.2, backoff=SOON)
def spinning(batch: batchq.Batch) -> None:
    """Run in a loop."""
    while not gate.is_set():
        pass


@app.handler("deaf", timeout_seconds=0.2, backoff=SOON)
async def deaf(batch: batchq.Batch) -> None:
    """Go on whatever cancels it."""
    while not gate.is_set():
        try:
            await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            continue


@app.handler("blocking", timeout_seconds=0.2, backoff=SOON)
async def blocking(batch: batchq.Batch) -> None:
    """Block the event loop."""
    gate.wait(60)


@app.handler("good")
def good(batch: batchq.Batch) -> int:
    """Be done at once; say in which process."""
    return os.getpid()


@app.handler("good_async")
async def good_async(batch: batchq.Batch) -> int:
    """Be done at once; say in which process."""
    return os.getpid()


@pytest.fixture(autouse=True)
def _open_gate_at_the_end() -> Iterator[None]:
    """Begin with a closed gate; open it at the end, so that no thread is left."""
    gate.clear()
    yield
    gate.set()
    wait_until(lambda: not {t for t in threading.enumerate() if t.name.startswith("batchq-slot")}, 10, "no slot to be")


@pytest.fixture
def events() -> Iterator[list[Event]]:
    """Return the log lines of this process, as they come."""
    with structlog.testing.capture_logs() as events:
        yield events


def named(events: list[Event], name: str) -> list[Event]:
    """Return the log lines of one event."""
    return [event for event in events if event["event"] == name]


# ------------------------------------------------------------------------------------------ given back, told, counted


@pytest.mark.parametrize("kind", ["stuck", "spinning", "deaf", "blocking"])
def test_a_handler_that_never_returns_gives_its_batch_back_on_time(
    dsn: str, conn: psycopg.Connection, kind: str
) -> None:
    lost = put(conn, kind, max_attempts=1)
    with running_worker(app, dsn, concurrency=4, async_concurrency=4, lease_seconds=2, shutdown_seconds=60):
        row = await_status(conn, lost, "failed")
        assert row.errors[0]["error"] == f"TimedOut: batch {lost} ran for more than 0.2 s"
        step("the same worker works on")
        await_status(conn, put(conn, "good"), "completed")
        gate.set()


def test_a_lost_thread_is_told_with_where_it_is_and_shown_until_it_is_back(
    dsn: str, conn: psycopg.Connection, events: list[Event]
) -> None:
    batch_id = put(conn, "stuck", max_attempts=1)
    with running_worker(app, dsn, concurrency=4, lease_seconds=1, shutdown_seconds=1) as worker:
        await_status(conn, batch_id, "failed")
        lost = "SELECT lost_slots FROM batchq.workers"
        wait_until(lambda: values(conn, lost) == [1], 10, "the lost slot to be shown")
        [told] = named(events, "thread lost to a handler that does not end")
        assert (told["batch_id"], told["kind"], told["lost"]) == (batch_id, "stuck", 1)
        assert "in stuck" in told["at"]
        [counted] = named(events, "slots lost")
        assert (counted["lost_slots"], counted["slots"]) == (1, 4)
        step("one that ends after all is lost no longer")
        gate.set()
        wait_until(lambda: values(conn, lost) == [0], 10, "the slot to be back")
    assert StopReason.SLOTS_LOST not in worker.lifecycle.reasons
    assert named(events, "worker stopped")[0]["lost_slots"] == 0


def test_a_coroutine_that_ends_when_it_is_cancelled_is_no_loss(
    dsn: str, conn: psycopg.Connection, events: list[Event]
) -> None:
    app = batchq.App()

    @app.handler("slow", timeout_seconds=0.1)
    async def slow(batch: batchq.Batch) -> None:
        await asyncio.sleep(60)

    ids = [put(conn, "slow", max_attempts=1) for _ in range(4)]
    with running_worker(app, dsn, async_concurrency=2, lease_seconds=1, shutdown_seconds=1) as worker:
        for batch_id in ids:
            await_status(conn, batch_id, "failed")
        wait_until(lambda: not worker.lanes[0].given_up, 5, "nothing to be lost")
    assert StopReason.SLOTS_LOST not in worker.lifecycle.reasons


# ----------------------------------------------------------------------------------------------- before it runs dry


@pytest.mark.parametrize(("kind", "count"), [("stuck", 2), ("spinning", 2), ("deaf", 2), ("blocking", 1)])
def test_a_worker_that_has_lost_half_of_its_slots_stops_to_be_replaced_and_gives_back_what_it_has(
    dsn: str, conn: psycopg.Connection, events: list[Event], kind: str, count: int
) -> None:
    lost = [put(conn, kind, max_attempts=1) for _ in range(count)]
    worker = batchq.Worker(
        app, Settings.load(dsn=dsn, concurrency=4, async_concurrency=4, lease_seconds=5, shutdown_seconds=1)
    )
    runs = threading.Thread(target=worker.run)
    runs.start()
    runs.join(30)
    assert not runs.is_alive()
    assert worker.wants_replacement
    assert [look(conn, batch_id).shown for batch_id in lost] == ["failed"] * count
    assert values(conn, "SELECT count(*) FROM batchq.all_batches WHERE status = 'processing'") == [0]
    assert values(conn, "SELECT count(*) FROM batchq.workers") == [0]
    assert len(named(events, "worker stopping")) == 1
    assert named(events, "worker stopped")[0]["lost_slots"] >= 2


def test_a_worker_that_is_told_to_stop_is_not_replaced(dsn: str, conn: psycopg.Connection) -> None:
    put(conn, "stuck", max_attempts=1)
    with running_worker(app, dsn, concurrency=1, lease_seconds=1, shutdown_seconds=0) as worker:
        wait_until(lambda: StopReason.SLOTS_LOST in worker.lifecycle.reasons, 15, "the slot to be lost")
        worker.stop()
    assert not worker.wants_replacement


def test_what_waits_behind_a_blocked_event_loop_goes_back_and_nothing_more_is_claimed(
    dsn: str, conn: psycopg.Connection, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_loop, "BLOCKED_SECONDS", 0.3)
    block = put(conn, "blocking", timeout_seconds=60)
    with running_worker(app, dsn, async_concurrency=10, lease_seconds=1, shutdown_seconds=30) as worker:
        [lane] = [lane for lane in worker.lanes if isinstance(lane, loop_lane.LoopLane)]
        wait_for_status(conn, block, "processing")
        waiting = [put(conn, "good_async") for _ in range(5)]
        wait_until(lambda: named(events, "event loop blocked by a handler"), 10, "the blockage to be told")
        assert "in blocking" in named(events, "event loop blocked by a handler")[0]["at"]
        wait_until(lambda: lane.unwritten == 1, 10, "the others to be given back")
        assert [(look(conn, one).shown, look(conn, one).attempt) for one in waiting] == [("ready", 0)] * 5
        assert lane.room() == 0
        step("the handler that blocks keeps its batch, and when it ends all go on")
        gate.set()
        for batch_id in [block, *waiting]:
            assert await_status(conn, batch_id, "completed").attempt == 1
    assert named(events, "event loop runs again")


# --------------------------------------------------------------------------------------------------- real processes

APP = "tests.component.lost_slots_app:app"


@pytest.fixture
def processes(dsn: str) -> Iterator[Processes]:
    """Return what runs `batchq` in processes of its own, which end with the test."""
    with Processes(dsn, APP) as processes:
        yield processes


def test_a_lone_worker_that_has_lost_its_slots_starts_again_as_the_same_process(
    conn: psycopg.Connection, processes: Processes
) -> None:
    lost = [put(conn, "stuck", max_attempts=1) for _ in range(2)]
    worker = processes.worker(concurrency=2, lease_seconds=2, shutdown_seconds=1)
    for batch_id in lost:
        await_status(conn, batch_id, "failed", 20)
    wait_until(lambda: len(worker.lines("worker started")) == 2, 30, "the worker to start again")
    assert await_status(conn, put(conn, "good"), "completed", 20).result == worker.pid
    step("and stops as any other: nothing is left of the threads")
    assert worker.stop() == 0
    assert values(conn, "SELECT count(*) FROM batchq.workers") == [0]


def test_the_supervisor_replaces_who_has_lost_its_slots_and_kills_who_stands_still(
    conn: psycopg.Connection, processes: Processes
) -> None:
    supervisor = processes.run("workers", "1", APP, concurrency=1, lease_seconds=2, shutdown_seconds=1)
    first = await_status(conn, put(conn, "good"), "completed", 40).result
    step("a worker without half of its slots is replaced at once, and that is called no crash")
    put(conn, "stuck", max_attempts=1)
    supervisor.wait_for("worker process replaced", 40)
    second = await_status(conn, put(conn, "good"), "completed", 40).result
    assert first != second
    assert supervisor.lines("worker process exited") == []
    step("one whose interpreter is held sends no liveness ping: it is killed, and its batch is rescued")
    held = put(conn, "gil", max_attempts=2)
    assert supervisor.wait_for("worker process unresponsive, killed", 40)["pid"] == second
    row = await_status(conn, held, "completed", 40)
    assert row.attempt == 2
    assert row.errors[0]["error"].startswith("worker died")
    assert supervisor.lines("worker process exited")[0]["exit_code"] == -9
    assert supervisor.stop() == 0


def test_a_stop_does_not_wait_for_a_worker_whose_interpreter_is_held(
    conn: psycopg.Connection, processes: Processes
) -> None:
    supervisor = processes.run("workers", "1", APP, concurrency=2, lease_seconds=3600)
    held = put(conn, "gil")
    wait_for_status(conn, held, "processing", 30)
    assert supervisor.stop(30) == 1
    assert look(conn, held).shown == "processing", "until its lease runs out"


def test_the_watchdog_of_systemd_hears_a_sign_each_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "PING_SECONDS", 0.05)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(10)
        LivenessPings({"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_PID": str(os.getpid() + 1)}).start()
        LivenessPings({"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_PID": str(os.getpid())}).start()
        assert [systemd.recv(100) for _ in range(3)] == [b"WATCHDOG=1"] * 3


def test_a_sign_that_nobody_reads_holds_nobody_up() -> None:
    reading, writing = os.pipe()
    given = LivenessPings({LIVENESS_FD: str(writing)})
    assert given.is_supervised
    for _ in range(100_000):
        given.ping()
    os.close(reading)
    given.ping()
    os.close(writing)


def test_a_sign_that_systemd_does_not_read_holds_nobody_up(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        given = LivenessPings({"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_PID": str(os.getpid())})

        def give_many() -> None:
            for _ in range(10_000):
                given.ping()

        giving = threading.Thread(target=give_many, daemon=True)
        giving.start()
        giving.join(20)
        assert not giving.is_alive()


if __name__ == "__main__":
    run_alone(__file__)
