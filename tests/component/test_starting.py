"""A worker that cannot start, or is interrupted while it starts or ends, leaves nothing behind: no thread, no row."""

import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

import psycopg
import pytest

import batchq
from batchq.errors import ConfigError
from batchq.postgres.handler_connections import HandlerConnections
from batchq.settings import Settings
from batchq.worker.lifecycle import Services
from batchq.worker.loop_lane import LoopLane
from batchq.worker.thread_lane import ThreadLane
from batchq.worker.worker import Worker
from tests.support.alone import run_alone
from tests.support.batches import put, values, wait_for_status
from tests.support.waiting import wait_until

app = batchq.App()
gate = threading.Event()


@app.handler("waiting")
def wait(batch: batchq.Batch) -> None:
    """Wait for the end of the test."""
    gate.wait(60)


@app.handler("async")
async def work_async(batch: batchq.Batch) -> None:
    """Be there, so that there is an event loop."""


def threads() -> set[threading.Thread]:
    """Return the threads that there are, but for the timer that each process begins once and keeps."""
    return {thread for thread in threading.enumerate() if thread.name != "batchq-deadlines"}


@pytest.fixture(autouse=True)
def _nothing_is_left(conn: psycopg.Connection) -> Iterator[None]:
    """Fail if a thread, or the row of a worker, is there at the end that was not before."""
    gate.clear()
    before = threads()
    yield
    gate.set()
    wait_until(lambda: not (threads() - before), 15, "no thread to be left")
    assert values(conn, "SELECT count(*) FROM batchq.workers") == [0]


@contextmanager
def taken_port() -> Iterator[int]:
    """Give a port on which somebody else listens."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken.getsockname()[1]


def test_a_metrics_port_that_is_taken(dsn: str) -> None:
    with taken_port() as port:
        settings = Settings.load(dsn=dsn, metrics_port=port, metrics_host="127.0.0.1")
        with pytest.raises(ConfigError, match=f"BATCHQ_METRICS_PORT {port}"):
            Worker(app, settings).run()


INTERRUPTED_IN: dict[str, tuple[Callable[..., Any], int]] = {
    "metrics": (Worker.serve_metrics, 1),
    "the pool": (HandlerConnections.open, 1),
    "the slots": (ThreadLane.start, 1),
    "the second slot": (ThreadLane._start_slot, 2),
    "the loop": (LoopLane.start, 1),
    "the keeper": (Services.start, 1),
    "the housekeeper": (Services.start, 2),
    "the finisher": (Services.start, 3),
    "the bell": (Services.start, 4),
}


@contextmanager
def interrupted_in(code: CodeType, time: int) -> Iterator[None]:
    """Have Ctrl-C come in this thread when it enters a function for the *time*th time."""
    calls = 0

    def watch(frame: FrameType, event: str, _: object) -> None:
        nonlocal calls
        if event == "call" and frame.f_code is code:
            calls += 1
            if calls == time:
                raise KeyboardInterrupt

    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("where", INTERRUPTED_IN)
def test_an_interrupt_at_the_start(admin_dsn: str, where: str) -> None:
    function, time = INTERRUPTED_IN[where]
    worker = Worker(app, Settings.load(dsn=admin_dsn, listen_dsn=admin_dsn, lease_seconds=1))
    with pytest.raises(KeyboardInterrupt), interrupted_in(function.__code__, time):
        worker.run()


def test_a_bell_that_cannot_be_heard_stops_no_start_and_no_end(dsn: str, conn: psycopg.Connection) -> None:
    with taken_port() as port:
        away = f"postgresql://nobody@127.0.0.1:{port}/none?connect_timeout=2"
        worker = Worker(app, Settings.load(dsn=dsn, listen_dsn=away), drain=True)
        put(conn, "async")
        assert worker.run()


def test_a_database_that_is_away_at_the_start(dsn: str) -> None:
    with taken_port() as port:
        pass
    worker = Worker(app, Settings.load(dsn=dsn, database_timeout_seconds=1))
    worker.context.connections = HandlerConnections(f"host=127.0.0.1 port={port} dbname=none", 2, 1, 5)
    worker.lanes[1].connections = worker.context.connections  # type: ignore[attr-defined]
    with pytest.raises(psycopg.OperationalError):
        worker.run()


def test_a_second_interrupt_while_a_worker_ends_gives_back_what_runs(dsn: str, conn: psycopg.Connection) -> None:
    batch_id = put(conn, "waiting")
    main = threading.main_thread().ident
    worker = Worker(app, Settings.load(dsn=dsn, shutdown_seconds=60))

    def interrupt_twice() -> None:
        wait_until(lambda: any(lane.in_flight for lane in worker.lanes), 20, "the batch to run")
        signal.pthread_kill(main or 0, signal.SIGINT)
        assert worker.lifecycle.stopping.wait(20)
        signal.pthread_kill(main or 0, signal.SIGINT)

    interrupter = threading.Thread(target=interrupt_twice)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        worker.run()
    interrupter.join()
    wait_for_status(conn, batch_id, "ready")


if __name__ == "__main__":
    run_alone(__file__)
