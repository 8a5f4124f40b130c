"""A pool in use is no outage: handlers wait for a connection in turn, and no more of them begin than get on."""

import asyncio
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable

import psycopg
import pytest

import batchq
from batchq.errors import DatabaseAway, OutcomeUnknown
from batchq.postgres import handler_connections
from batchq.postgres.fair_queue import FairQueue
from batchq.postgres.handler_connections import HandlerConnections
from batchq.testing import running_worker
from tests.support.alone import run_alone
from tests.support.batches import STYLES, drain, look, put, values
from tests.support.servers import free_port
from tests.support.steps import step
from tests.support.waiting import wait_until

both_styles = pytest.mark.parametrize("style", STYLES)
IMPATIENT = {"pool_size": 2, "database_timeout_seconds": 1}
ACTIVE = "SELECT count(*) FROM batchq.all_batches WHERE status = 'processing'"


class Gate:
    """Handlers of both styles that hold a connection until the gate opens; how often each batch began."""

    def __init__(self, hold_seconds: float = 0) -> None:
        self.app = batchq.App()
        self.opened = threading.Event()
        self.begun: Counter[int] = Counter()
        self.inside: list[int] = []
        self.told: dict[int, BaseException] = {}
        self.hold_seconds = hold_seconds
        self.app.handler("def")(self.work)
        self.app.handler("async def")(self.work_async)

    def work(self, batch: batchq.Batch) -> None:
        """Hold a connection, in a thread."""
        self.begun[batch.id] += 1
        try:
            with batch.transaction() as conn:
                self.inside.append(batch.id)
                conn.execute("SELECT pg_sleep(%s)", [self.hold_seconds])
                self.opened.wait(30)
        except BaseException as error:
            self.told[batch.id] = error
            raise

    async def work_async(self, batch: batchq.Batch) -> None:
        """Hold a connection, in the event loop."""
        self.begun[batch.id] += 1
        try:
            async with batch.transaction() as conn:
                self.inside.append(batch.id)
                await conn.execute("SELECT pg_sleep(%s)", [self.hold_seconds])
                while not self.opened.is_set():
                    await asyncio.sleep(0.01)
        except BaseException as error:
            self.told[batch.id] = error
            raise


@both_styles
def test_each_batch_begins_once_however_long_the_pool_is_in_use(dsn: str, conn: psycopg.Connection, style: str) -> None:
    step("each waits for 3 s, thrice as long as the database may be away")
    gate = Gate(hold_seconds=1.5)
    gate.opened.set()
    ids = [put(conn, style, max_attempts=1) for _ in range(6)]
    drain(gate.app, dsn, **IMPATIENT)
    assert gate.begun == dict.fromkeys(ids, 1)
    assert gate.told == {}
    assert [look(conn, batch_id).status for batch_id in ids] == ["completed"] * 6


@both_styles
def test_no_more_batches_begin_than_get_on_soon_and_the_others_stay_pending(
    admin_dsn: str, conn: psycopg.Connection, style: str
) -> None:
    step("past every pooler: a pooler with two backends would have none left for the worker")
    gate = Gate()
    ids = [put(conn, style) for _ in range(40)]
    with running_worker(gate.app, admin_dsn, **IMPATIENT, concurrency=20) as worker:
        wait_until(lambda: len(gate.begun) >= 4, 10, "two inside, and two that wait")
        step("what has not begun within a second is given back, and not claimed again")
        lane = worker.lanes[STYLES.index(style)]
        wait_until(lambda: lane.unwritten == 4, 10, "the others to be given back")
        claimed = lane.claimed
        wait_until(lambda: not worker.keeper.closing.wait(1), 10, "rounds of claimer and keeper")
        assert lane.claimed == claimed
        assert (len(gate.begun), values(conn, ACTIVE)) == (4, [4])
        gate.opened.set()
        wait_until(lambda: values(conn, "SELECT count(*) FROM batchq.batches_live") == [0], 20, "all to complete")
    assert gate.begun == dict.fromkeys(ids, 1)


@both_styles
def test_a_batch_that_waits_for_a_connection_keeps_its_lease(dsn: str, conn: psycopg.Connection, style: str) -> None:
    gate = Gate(hold_seconds=2.5)
    gate.opened.set()
    ids = [put(conn, style, max_attempts=1) for _ in range(2)]
    drain(gate.app, dsn, pool_size=1, database_timeout_seconds=1, lease_seconds=1)
    assert gate.begun == dict.fromkeys(ids, 1)
    assert [look(conn, batch_id).status for batch_id in ids] == ["completed"] * 2


@both_styles
def test_a_batch_that_is_cancelled_while_it_waits_for_a_connection_is_told(
    dsn: str, conn: psycopg.Connection, style: str
) -> None:
    gate = Gate()
    for _ in range(2):
        put(conn, style)
    with running_worker(gate.app, dsn, pool_size=1, lease_seconds=1):
        wait_until(lambda: len(gate.begun) == 2 and gate.inside, 10, "one inside, and one that waits")
        [waiting] = gate.begun.keys() - set(gate.inside)
        conn.execute("SELECT batchq.cancel(%s)", [waiting])
        wait_until(lambda: waiting in gate.told, 10, "the handler to be told")
        gate.opened.set()
    assert isinstance(gate.told[waiting], batchq.LeaseLost | asyncio.CancelledError)
    assert look(conn, waiting).status == "cancelled"
    assert gate.inside == [next(iter(gate.begun.keys() - {waiting}))]


@both_styles
def test_at_a_stop_who_waits_for_a_connection_gets_on_or_is_given_back(
    dsn: str, conn: psycopg.Connection, style: str
) -> None:
    gate = Gate()
    ids = [put(conn, style, max_attempts=1) for _ in range(3)]
    with running_worker(gate.app, dsn, pool_size=1, shutdown_seconds=1) as worker:
        wait_until(lambda: len(gate.begun) == 2 and gate.inside, 10, "one inside, and one that waits")
        worker.stop()
    for batch_id in ids:
        row = look(conn, batch_id)
        assert (row.status, row.attempt, row.errors) == ("pending", 0, [])
    gate.opened.set()
    step("with time left it gets on")
    again = Gate(hold_seconds=0.3)
    again.opened.set()
    with running_worker(again.app, dsn, pool_size=1) as worker:
        wait_until(lambda: len(again.begun) >= 2, 10, "one inside, and one that waits")
        worker.stop()
    completed = [batch_id for batch_id in ids if look(conn, batch_id).status == "completed"]
    assert set(completed) == set(again.begun)


def test_items_may_be_read_in_a_transaction_though_the_pool_has_one_connection(
    dsn: str, conn: psycopg.Connection
) -> None:
    app = batchq.App()
    seen: list[object] = []

    @app.handler("work")
    def work(batch: batchq.Batch) -> None:
        with batch.transaction(cursor=1):
            seen.append(batch.items)

    batch_id = put(conn, "work", items=[1, 2])
    drain(app, dsn, pool_size=1)
    assert seen == [[1, 2]]
    assert look(conn, batch_id).status == "completed"


# ---------------------------------------------------------------------------------------------- the connections


@pytest.fixture
def alone(dsn: str) -> HandlerConnections:
    """Return a pool of one connection, not open yet."""
    return HandlerConnections(dsn, 1, borrow_seconds=0.5, transaction_seconds=20)


def test_borrowers_are_served_in_the_order_in_which_they_came(alone: HandlerConnections) -> None:
    alone.open()
    served: list[int] = []

    def borrow(number: int) -> None:
        with alone.transaction():
            served.append(number)

    with alone.transaction():
        threads = [threading.Thread(target=borrow, args=[number]) for number in range(5)]
        for number, thread in enumerate(threads):
            thread.start()
            wait_until(lambda number=number: len(alone.fair_queue.waiting) == number + 1, 5, "it to be in line")
    for thread in threads:
        thread.join(10)
    assert served == [0, 1, 2, 3, 4]
    alone.close()


def test_a_wait_ends_where_no_connection_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler_connections, "BORROW_SECONDS", 0.1)
    nowhere = HandlerConnections(f"host=127.0.0.1 port={free_port()} dbname=x", 1, 0.5, 10)
    nowhere.pool.open()
    away: list[DatabaseAway] = []

    def borrow() -> None:
        with pytest.raises(DatabaseAway, match=r"no connection for 0\.5 s") as raised, nowhere.transaction():
            pass
        away.append(raised.value)

    threads = [threading.Thread(target=borrow, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(away) == 4, 5, "all to give up")
    assert (nowhere.fair_queue.free, len(nowhere.fair_queue.waiting)) == (1, 0)
    nowhere.close()


def test_a_wait_ends_where_a_connection_is_in_use_for_longer_than_it_may_be(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handler_connections, "BORROW_SECONDS", 0.1)
    stuck = HandlerConnections(dsn, 1, borrow_seconds=0.2, transaction_seconds=1)
    stuck.open()
    with pytest.raises(OutcomeUnknown), stuck.transaction(), pytest.raises(DatabaseAway), stuck.transaction():
        pass
    stuck.close()


def test_a_wait_in_line_may_have_a_limit(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler_connections, "BORROW_SECONDS", 0.1)
    page = HandlerConnections(dsn, 1, 5, 10, queue_seconds=0.3)
    page.open()
    with page.transaction(), pytest.raises(DatabaseAway, match=r"no connection for 0\.3 s"), page.transaction():
        pass
    page.close()


# --------------------------------------------------------------------------------------------------- the places


def in_line(places: FairQueue, served: list[int], number: int) -> Callable[[], object]:
    """Ask for a place; *number* is noted once it is there."""

    def go() -> None:
        served.append(number)

    if places.take(go):
        go()
    return go


def test_places_go_to_who_came_first_and_pass_by_who_has_left() -> None:
    places, served = FairQueue(2, 10), list[int]()
    asked = [in_line(places, served, number) for number in range(5)]
    assert served == [0, 1]
    places.leave(asked[2])
    places.release(0.0)
    assert served == [0, 1, 3]
    step("who was given a place just as it left passes it on")
    places.leave(asked[3])
    assert served == [0, 1, 3, 4]
    for _ in range(2):
        places.release()
    assert places.free == 2


def test_as_many_may_wait_as_there_are_places_and_more_where_they_are_held_briefly() -> None:
    places, served = FairQueue(2, 10), list[int]()
    assert places.room() == sys.maxsize
    asked = [in_line(places, served, number) for number in range(3)]
    assert places.room() == 1
    asked.append(in_line(places, served, 3))
    assert places.room() == 0
    for number in range(4, 60):
        in_line(places, served, number)
        places.release(time.monotonic() - 0.001)
    assert places.room() > 100
    step("a place that nobody gives back for long is not held briefly")
    places.last_released_at -= 60
    assert places.room() == 0


def test_a_place_is_in_use_for_as_long_as_its_connection_may_be() -> None:
    places = FairQueue(1, 10)
    with places.using("a"):
        assert places.is_busy()
        places.in_use_since["a"] -= 11
        assert not places.is_busy()
    assert not places.is_busy()


if __name__ == "__main__":
    run_alone(__file__)
