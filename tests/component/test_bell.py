"""The bell: rung by each INSERT if somebody asks for it, heard by workers, and needed by nobody."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

import batchq
from batchq.postgres.statements import leases
from batchq.postgres.statements.checkpoints import Progress
from batchq.postgres.statements.endings import Finish, Requeue
from batchq.testing import running_worker
from batchq.worker import bell, turns
from batchq.worker.bell import Bell
from tests.component.rows import (
    Conn,
    checkpoint,
    claim,
    complete,
    expire_lease,
    finish,
    finished,
    insert,
    processing,
    requeue,
    value,
)
from tests.support.alone import run_alone
from tests.support.batches import STYLES, register, wait_for_status
from tests.support.servers import free_port
from tests.support.steps import step
from tests.support.waiting import wait_until


@pytest.mark.parametrize("wrong", ["what?", "mysql://me:secret-word@host/db", "host=h passwort=secret-word"])
def test_a_listen_dsn_that_is_none_is_refused_at_once_and_not_shown(wrong: str) -> None:
    app = batchq.App()
    app.handler("work")(len)
    settings = batchq.Settings.load(dsn="postgresql://localhost/db", listen_dsn=wrong)
    with pytest.raises(batchq.ConfigError, match="BATCHQ_LISTEN_DSN: not a Postgres DSN") as refused:
        batchq.Worker(app, settings)
    assert "secret-word" not in str(refused.value)


@pytest.fixture
def ear(admin_dsn: str) -> Iterator[Callable[[], int]]:
    """Return what counts how often the bell has rung since it was last asked."""
    with psycopg.connect(admin_dsn, autocommit=True) as conn:
        conn.execute("LISTEN batchq")

        def count() -> int:
            conn.execute("SELECT 1")
            return len(list(conn.notifies(timeout=0.05)))

        yield count


@pytest.fixture
def wanted(conn: Conn) -> None:
    """Ask for the bell."""
    conn.execute("SELECT batchq.bell(true)")


def test_the_bell_is_silent_unless_somebody_asks_for_it(conn: Conn, ear: Callable[[], int]) -> None:
    insert(conn)
    assert ear() == 0
    for _ in range(2):
        conn.execute("SELECT batchq.bell(true)")
        insert(conn)
        assert ear() == 1
    for _ in range(2):
        conn.execute("SELECT batchq.bell(false)")
        insert(conn)
        assert ear() == 0


@pytest.mark.usefixtures("wanted")
def test_each_way_of_inserting_rings_once_at_its_commit(conn: Conn, ear: Callable[[], int]) -> None:
    conn.execute("INSERT INTO batchq.batches (kind) SELECT 'work' FROM generate_series(1, 100)")
    assert ear() == 1
    batchq.enqueue(conn, "work")
    assert ear() == 1
    batchq.enqueue_many(conn, "work", [{"n": n} for n in range(100)])
    assert ear() == 1
    with conn.transaction():
        insert(conn)
        insert(conn)
        assert ear() == 0
    assert ear() == 1, "of the same transaction, once"
    with conn.transaction(force_rollback=True):
        insert(conn)
    assert ear() == 0


@pytest.mark.usefixtures("wanted")
def test_what_workers_write_does_not_ring_but_a_retry_does(conn: Conn, ear: Callable[[], int]) -> None:
    taken = [processing(conn, items=[1, 2], max_attempts=2) for _ in range(5)]
    insert(conn)
    ear()
    checkpoint(conn, taken[0], Progress(1))
    finish(conn, Finish(*taken[0], "completed"), Finish(*taken[1], "failed"))
    complete(conn, taken[2])
    complete(conn, taken[3], keep=False)
    requeue(conn, Requeue(*taken[4], 0, True))
    claim(conn)
    conn.execute("UPDATE batchq.batches_live SET attempt = 2 WHERE id = %s", [taken[4].id])
    expire_lease(conn, taken[4].id)
    leases.rescue(conn, "default", 10)
    assert ear() == 0
    assert value(conn, "SELECT batchq.retry(%s)", [taken[1].id]) == "pending"
    assert ear() == 1


def test_an_item_counts_the_same_with_the_bell(conn: Conn, wanted: None) -> None:
    insert(conn, items=[1, 2])
    finished(conn, "failed", kind="other")
    assert value(conn, "SELECT items_total FROM batchq.all_batches WHERE items IS NOT NULL") == 2


@pytest.fixture
def rarely_polling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have idle workers poll each 5 s."""
    monkeypatch.setattr(turns, "POLLS_A_SECOND", 0.1)


@pytest.mark.usefixtures("wanted", "rarely_polling")
@pytest.mark.parametrize("style", STYLES)
def test_a_worker_that_hears_the_bell_begins_at_once(conn: Conn, dsn: str, admin_dsn: str, style: str) -> None:
    app, began = batchq.App(), threading.Event()
    register(app, style, "work", lambda _: began.set())
    with running_worker(app, dsn, listen_dsn=admin_dsn):
        for _ in range(5):
            step("the worker is idle for some polls that it would make otherwise")
            assert not began.wait(0.2)
            insert(conn)
            assert began.wait(0.5)
            began.clear()


@pytest.mark.usefixtures("wanted", "rarely_polling")
def test_a_bell_whose_connection_is_lost_is_heard_again(conn: Conn, dsn: str, admin_dsn: str) -> None:
    app, began = batchq.App(), threading.Event()
    register(app, "def", "work", lambda _: began.set())
    pids = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE query = 'LISTEN batchq'"
    pids += " AND datname = current_database()"
    with running_worker(app, dsn, listen_dsn=admin_dsn), psycopg.connect(admin_dsn, autocommit=True) as admin:
        wait_until(lambda: value(admin, pids) == 1, 5, "the bell to listen, and to be cut")
        insert(conn)
        assert began.wait(4), "what came meanwhile made no sound, and is looked for"
        wait_until(lambda: listeners(admin) == 1, 5, "the bell to listen again")
        began.clear()
        insert(conn)
        assert began.wait(0.5)


def listeners(admin: Conn) -> int:
    """Return how many listen."""
    return value(
        admin,
        "SELECT count(*) FROM pg_stat_activity WHERE query = 'LISTEN batchq' AND datname = current_database()",
    )


def test_a_bell_that_cannot_be_had_keeps_no_batch_waiting(conn: Conn, dsn: str, admin_dsn: str) -> None:
    app = batchq.App()
    register(app, "def", "work", print)
    nowhere = make_conninfo(admin_dsn, host="127.0.0.1", port=free_port())
    with running_worker(app, dsn, listen_dsn=nowhere):
        for _ in range(3):
            wait_for_status(conn, insert(conn), "completed", 2)


def test_a_bell_whose_log_in_is_refused_is_not_hammered(admin_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refused, closed = make_conninfo(admin_dsn, dbname="there_is_none"), threading.Event()
    waits: list[float] = []
    listener = Bell(refused, lambda: None)

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        closed.set()
        return Bell.close(listener) or True

    monkeypatch.setattr(listener.closing, "wait", wait)
    listener.run()
    assert closed.is_set()
    assert waits[0] >= bell.REFUSED_SECONDS


@pytest.mark.usefixtures("wanted")
def test_a_bell_that_is_closed_ends_soon_and_leaves_no_connection(conn: Conn, admin_dsn: str) -> None:
    heard: list[Any] = []
    listener = Bell(admin_dsn, lambda: heard.append(1))
    thread = threading.Thread(target=listener.run)
    thread.start()
    wait_until(lambda: heard, 5, "the first nudge, for what came before")
    insert(conn)
    wait_until(lambda: len(heard) == 2, 2, "the bell to be heard")
    listener.close()
    thread.join(bell.LISTEN_SECONDS + 1)
    assert not thread.is_alive()
    with psycopg.connect(admin_dsn, autocommit=True) as admin:
        wait_until(lambda: listeners(admin) == 0, 2, "its connection to be closed")


if __name__ == "__main__":
    run_alone(__file__)
