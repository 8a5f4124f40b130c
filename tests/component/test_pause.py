"""Pauses of queues and kinds, and workers that are drained: what people ask for, and what workers make of it."""

import threading
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

import batchq
from batchq.postgres.statements import shares
from batchq.settings import Settings
from batchq.testing import drain, running_worker
from batchq.worker.claimer import STEERING_SECONDS
from batchq.worker.worker import Worker
from tests.component.rows import Conn, insert, value, values
from tests.support.alone import run_alone
from tests.support.steps import step
from tests.support.waiting import wait_until

app = batchq.App()
gate, began = threading.Event(), threading.Event()


@app.handler("a")
def a(_: batchq.Batch) -> None:
    """End at once."""


@app.handler("b")
async def b(_: batchq.Batch) -> None:
    """End at once."""


@app.handler("slow")
def slow(_: batchq.Batch) -> None:
    """Wait for the gate."""
    began.set()
    gate.wait(60)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Begin with a closed gate; open it at the end, so that no thread waits for ever."""
    gate.clear()
    began.clear()
    yield
    gate.set()


def call(conn: Conn, function: str, **given: Any) -> Any:
    """Call a function of the schema with named arguments."""
    arguments = ", ".join(f"{name} => %s" for name in given)
    return value(conn, f"SELECT batchq.{function}({arguments})", list(given.values()))


def pauses(conn: Conn) -> list[tuple[Any, ...]]:
    """Return queue, kind and reason of each pause."""
    return conn.execute("SELECT queue, kind, reason FROM batchq.pauses ORDER BY queue, kind").fetchall()


def left(conn: Conn) -> set[tuple[str, str]]:
    """Return queue and kind of what is pending or processing."""
    return set(conn.execute("SELECT queue, kind FROM batchq.batches_live").fetchall())


# -------------------------------------------------------------------------------------------------------- in SQL


def test_a_pause_is_said_once_and_ended_once(conn: Conn) -> None:
    assert [call(conn, "pause", queue="mail", reason="too dear", actor="ann") for _ in range(2)] == [True, False]
    assert call(conn, "pause", queue="mail", kind="a")
    assert call(conn, "pause", kind="a")
    assert pauses(conn) == [("mail", "a", None), ("mail", None, "too dear"), (None, "a", None)]
    assert [call(conn, "resume", queue="mail") for _ in range(2)] == [True, False]
    assert pauses(conn) == [("mail", "a", None), (None, "a", None)]
    noted = conn.execute("SELECT verb, queue, kind, reason, actor FROM batchq.audit ORDER BY id").fetchall()
    assert noted == [
        ("pause", "mail", None, "too dear", "ann"),
        ("pause", "mail", "a", None, None),
        ("pause", None, "a", None, None),
        ("resume", "mail", None, None, None),
    ]


def test_a_pause_said_again_changes_its_end(conn: Conn) -> None:
    assert call(conn, "pause", queue="mail")
    assert call(conn, "pause", queue="mail", until="2100-01-01 00:00+00")
    assert not call(conn, "pause", queue="mail", until="2100-01-01 00:00+00")
    assert value(conn, "SELECT until = '2100-01-01 00:00+00' FROM batchq.pauses")
    assert value(conn, "SELECT details ->> 'until' FROM batchq.audit ORDER BY id DESC LIMIT 1").startswith("2100-01-01")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "takes a queue, a kind, or both"),
        ({"queue": "mail", "until": "2001-01-01"}, "until must be in the future, not 2001"),
    ],
    ids=["nothing", "past"],
)
def test_a_pause_that_makes_no_sense_is_refused(conn: Conn, given: dict[str, str], message: str) -> None:
    with pytest.raises(psycopg.errors.RaiseException, match=message):
        call(conn, "pause", **given)


def test_a_pause_that_has_ended_by_itself_is_not_there_to_be_ended(conn: Conn) -> None:
    call(conn, "pause", queue="mail", until="2100-01-01")
    assert call(conn, "resume", queue="mail"), "it has not ended yet"
    call(conn, "pause", queue="mail", until="2100-01-01")
    conn.execute("UPDATE batchq.pauses SET until = now() - interval '1 second'")
    assert not call(conn, "resume", queue="mail")
    assert values(conn, "SELECT verb FROM batchq.audit ORDER BY id") == ["pause", "resume", "pause"]
    assert pauses(conn) == []


def test_pauses_that_ended_long_ago_are_dropped(conn: Conn) -> None:
    call(conn, "pause", queue="old", until="2100-01-01")
    call(conn, "pause", queue="mail", until="2100-01-01")
    conn.execute("UPDATE batchq.pauses SET until = now() - interval '25 hours' WHERE queue = 'old'")
    conn.execute("SELECT batchq.prune_records()")
    assert pauses(conn) == [("mail", None, None)]


# ------------------------------------------------------------------------------------------------------ in workers

PAUSES: list[tuple[dict[str, str], set[tuple[str, str]]]] = [
    ({"queue": "default"}, {("default", "a"), ("default", "b")}),
    ({"kind": "a"}, {("default", "a"), ("mail", "a")}),
    ({"kind": "b", "queue": "mail"}, {("mail", "b")}),
]


@pytest.mark.parametrize(
    ("paused", "kept"), PAUSES, ids=lambda given: "-".join(given) if isinstance(given, dict) else ""
)
def test_what_is_paused_is_not_claimed_and_the_rest_is(
    conn: Conn, dsn: str, paused: dict[str, str], kept: set[tuple[str, str]]
) -> None:
    for queue in ("default", "mail"):
        for kind in ("a", "b"):
            insert(conn, queue=queue, kind=kind)
    call(conn, "pause", **paused)
    step("a drain counts what is paused as not ready")
    drain(app, dsn, queues=("default", "mail"))
    assert left(conn) == kept
    call(conn, "resume", **paused)
    drain(app, dsn, queues=("default", "mail"))
    assert left(conn) == set()


def test_a_running_worker_heeds_a_pause_and_its_end(conn: Conn, dsn: str) -> None:
    with running_worker(app, dsn) as worker:
        insert(conn, kind="a")
        wait_until(lambda: left(conn) == set(), 20, "the first to end")
        call(conn, "pause", kind="a")
        worker.context.permits.read_at -= STEERING_SECONDS  # what was read is a second old
        step("old ones too, which lie behind the position")
        old = insert(conn, kind="a")
        conn.execute("UPDATE batchq.batches SET run_at = now() - interval '1 hour' WHERE id = %s", [old])
        insert(conn, kind="a")
        insert(conn, kind="b")
        wait_until(lambda: left(conn) == {("default", "a")}, 20, "the other kind to be worked")
        assert value(conn, "SELECT count(*) FROM batchq.all_batches WHERE kind = 'a' AND status = 'pending'") == 2
        call(conn, "resume", kind="a")
        wait_until(lambda: left(conn) == set(), 20, "the rest to be worked")


def test_a_pause_of_nothing_is_refused(conn: Conn) -> None:
    with pytest.raises(psycopg.errors.CheckViolation, match="pauses_name_something"):
        conn.execute("INSERT INTO batchq.pauses (reason) VALUES ('everything?')")


def test_a_pause_ends_by_itself(conn: Conn, dsn: str) -> None:
    call(conn, "pause", queue="default", until=value(conn, "SELECT now() + interval '2 seconds'"))
    insert(conn, kind="a")
    with running_worker(app, dsn):
        wait_until(lambda: left(conn) == set(), 20, "the batch to be worked")
    late = "SELECT b.claimed_at >= p.until FROM batchq.all_batches b, batchq.pauses p"
    assert value(conn, late)


def test_what_is_claimed_when_the_pause_comes_runs_to_its_end(conn: Conn, dsn: str) -> None:
    batch_id = insert(conn, kind="slow")
    with running_worker(app, dsn) as worker:
        assert began.wait(20)
        call(conn, "pause", queue="default")
        worker.context.permits.read_at -= STEERING_SECONDS  # what was read is a second old
        insert(conn, kind="a")
        wait_until(lambda: bool(worker.context.permits.paused), 20, "the worker to know")
        gate.set()
        wait_until(lambda: left(conn) == {("default", "a")}, 20, "the batch to end")
    assert value(conn, "SELECT status FROM batchq.all_batches WHERE id = %s", [batch_id]) == "completed"


def test_an_idle_worker_reads_no_pauses_and_heeds_one_before_its_next_claim(
    conn: Conn, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[float] = []
    really = shares.steering
    monkeypatch.setattr(shares, "steering", lambda *given: read.append(1) or really(*given))
    worker = Worker(app, Settings.load(dsn=dsn))
    for _ in range(3):
        assert worker.claimer.round() == 0
    assert read == []
    call(conn, "pause", kind="a")
    insert(conn, kind="a")
    insert(conn, kind="slow")
    assert sum(worker.claimer.round() for _ in range(3)) == 1
    assert left(conn) == {("default", "a"), ("default", "slow")}
    assert values(conn, "SELECT kind FROM batchq.batches_live WHERE status = 'processing'") == ["slow"]
    for link in worker.context.links:
        link.close()


def test_pauses_are_read_once_a_second_however_much_is_claimed(
    conn: Conn, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(app, Settings.load(dsn=dsn))
    read: list[float] = []
    really = shares.steering
    monkeypatch.setattr(shares, "steering", lambda *given: read.append(1) or really(*given))
    for _ in range(50):
        worker.claimer.steer()
    assert len(read) == 1
    worker.context.permits.read_at -= STEERING_SECONDS
    worker.claimer.steer()
    assert len(read) == 2
    for link in worker.context.links:
        link.close()


# ----------------------------------------------------------------------------------------------------------- drain


def test_a_worker_that_is_drained_finishes_what_runs_and_ends(conn: Conn, dsn: str) -> None:
    running = insert(conn, kind="slow")
    worker = Worker(app, Settings.load(dsn=dsn, concurrency=1, shutdown_seconds=1))
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        assert began.wait(20)
        waiting = insert(conn, kind="slow")
        wait_until(lambda: values(conn, "SELECT count(*) FROM batchq.workers") == [1], 20, "the worker's row")
        assert [call(conn, "drain_worker", worker_id=worker.id) for _ in range(2)] == ["draining", "draining"]
        wait_until(worker.lifecycle.draining.is_set, 20, "the worker to know")
        step("it still runs, though its time to shut down would be over")
        wait_until(lambda: values(conn, "SELECT stopping FROM batchq.workers") == [True], 20, "its next heartbeat")
        assert thread.is_alive()
        gate.set()
        thread.join(20)
        assert not thread.is_alive()
    finally:
        gate.set()
        worker.stop()
        thread.join()
    statuses = "SELECT status FROM batchq.all_batches WHERE id = %s"
    assert [value(conn, statuses, [batch_id]) for batch_id in (running, waiting)] == ["completed", "pending"]
    assert values(conn, "SELECT count(*) FROM batchq.workers") == [0]
    assert values(conn, "SELECT verb || ' ' || (details ->> 'worker') FROM batchq.audit") == [
        f"drain_worker {worker.id}"
    ]


def test_a_worker_that_does_not_exist_cannot_be_drained(conn: Conn) -> None:
    assert call(conn, "drain_worker", worker_id="nobody") is None
    assert values(conn, "SELECT count(*) FROM batchq.audit") == [0]


if __name__ == "__main__":
    run_alone(__file__)
