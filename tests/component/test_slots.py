"""Slots: a queue with slots of its own waits for no other queue, and uses no more of them."""

import asyncio
import threading
import time

import psycopg
import pytest

import batchq
from batchq.errors import ConfigError
from batchq.settings import Settings
from batchq.testing import running_worker
from batchq.worker.loop_lane import LoopLane
from batchq.worker.thread_lane import ThreadLane
from batchq.worker.worker import Worker
from tests.support.alone import run_alone
from tests.support.batches import values
from tests.support.waiting import wait_until


def test_queues_and_their_slots_are_read_from_one_setting() -> None:
    settings = Settings.load(queues=" mail:5 , bulk,mail:5")
    assert settings.queues == ("mail", "bulk")
    assert settings.queue_slots == {"mail": 5}
    assert Settings.load(queues="a,b").queue_slots == {}
    assert Settings.load(queues="mail : 5").queue_slots == {"mail": 5}


@pytest.mark.parametrize(
    "queues",
    [
        "*",
        "mail*",
        "mail:x",
        "mail:0",
        "mail:",
        "mail:5:6",
        "mail:-1",
        "mail:1001",
        "mail:+5",
        "mail:٥",
        "mail:00005",
        ":5",
    ],
)
def test_a_name_that_looks_like_a_mistake_is_refused(queues: str) -> None:
    with pytest.raises(ConfigError, match=r"BATCHQ_QUEUES: .* looks like a mistake"):
        Settings.load(queues=queues)


@pytest.mark.parametrize(
    ("queues", "message"),
    [
        ("a" * 129, "the name of a queue has 1 to 128 bytes, not 129"),
        ("mail:5,mail:6", "'mail' is named twice"),
        ("mail,mail:5", "'mail' is named twice"),
        (",", "needs at least one queue"),
    ],
)
def test_a_list_of_queues_that_will_not_do_is_refused(queues: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings.load(queues=queues)


class Load:
    """Slow batches of bulk that fill every slot that they get, until *gate*; and quick ones of mail."""

    def __init__(self, style: str) -> None:
        self.gate = threading.Event()
        self.mails = 0
        self.most_mails = 0
        self._now = 0
        self._lock = threading.Lock()
        self.app = batchq.App()
        if style == "def":
            self.app.handler("slow")(lambda _: self.gate.wait(30))
            self.app.handler("mail")(lambda _: self._mail())
        else:
            self.app.handler("slow")(self._slow_async)
            self.app.handler("mail")(self._mail_async)

    def _mail(self) -> None:
        self._count(1)
        time.sleep(0.01)
        self._count(-1)

    async def _slow_async(self, _: batchq.Batch) -> None:
        while not self.gate.is_set():
            await asyncio.sleep(0.02)

    async def _mail_async(self, _: batchq.Batch) -> None:
        self._count(1)
        await asyncio.sleep(0.01)
        self._count(-1)

    def _count(self, change: int) -> None:
        with self._lock:
            self._now += change
            self.mails += change > 0
            self.most_mails = max(self.most_mails, self._now)


@pytest.mark.parametrize("style", ["def", "async def"])
def test_slow_batches_of_one_queue_do_not_hold_up_a_queue_with_slots_of_its_own(
    dsn: str, conn: psycopg.Connection, style: str
) -> None:
    load = Load(style)
    batchq.enqueue_many(conn, "slow", [{}] * 50, queue="bulk")
    settings = {"queues": "mail:2,bulk", "concurrency": 3, "async_concurrency": 3}
    slow = "SELECT count(*) FROM batchq.batches_live WHERE status = 'processing' AND kind = 'slow'"
    with running_worker(load.app, dsn, **settings):
        wait_until(lambda: values(conn, slow) == [3], 10, "the slow ones to fill the shared slots")
        batchq.enqueue_many(conn, "mail", [{}] * 60, queue="mail")
        wait_until(lambda: load.mails == 60, 10, "all mails")
        assert values(conn, slow) == [3]
        load.gate.set()
        wait_until(lambda: values(conn, "SELECT count(*) FROM batchq.batches_live") == [0], 20, "the others")
    assert load.most_mails == 2
    assert values(conn, "SELECT count(*) FROM batchq.all_batches WHERE attempt = 1") == [110]


@pytest.mark.parametrize("style", ["def", "async def"])
def test_handlers_that_wait_for_connections_hold_up_no_queue_with_slots_of_its_own(
    dsn: str, conn: psycopg.Connection, style: str
) -> None:
    gate = threading.Event()
    app = batchq.App()
    mails: list[int] = []

    def slow(batch: batchq.Batch) -> None:
        with batch.transaction():
            gate.wait(30)

    async def slow_async(batch: batchq.Batch) -> None:
        async with batch.transaction():
            while not gate.is_set():
                await asyncio.sleep(0.02)

    async def mail_async(batch: batchq.Batch) -> None:
        mails.append(batch.id)

    app.handler("slow")(slow if style == "def" else slow_async)
    app.handler("mail")((lambda batch: mails.append(batch.id)) if style == "def" else mail_async)
    batchq.enqueue_many(conn, "slow", [{}] * 40, queue="bulk")
    with running_worker(app, dsn, queues="mail:2,bulk", concurrency=12, async_concurrency=12, pool_size=2):
        busy = "SELECT count(*) >= 4 FROM batchq.batches_live WHERE status = 'processing'"
        wait_until(lambda: values(conn, busy) == [True], 10, "handlers that wait for a connection")
        batchq.enqueue_many(conn, "mail", [{}] * 30, queue="mail")
        wait_until(lambda: len(mails) == 30, 10, "all mails")
        gate.set()


def test_a_blocked_event_loop_delays_the_end_once_however_many_queues_have_slots(dsn: str) -> None:
    gate = threading.Event()
    app = batchq.App()

    @app.handler("blocks")
    async def blocks(batch: batchq.Batch) -> None:
        gate.wait(30)

    with (
        psycopg.connect(dsn, autocommit=True) as conn,
        running_worker(app, dsn, queues="a:1,b:2,c:2,d:2,e:2,f:2", shutdown_seconds=0) as worker,
    ):
        batchq.enqueue(conn, "blocks", queue="b")
        wait_until(lambda: any(lane.in_flight for lane in worker.lanes), 10, "the handler")
        began_at = time.monotonic()
        worker.stop()
        wait_until(lambda: _has_ended(worker), 20, "the end")
        took = time.monotonic() - began_at
        gate.set()
    assert took < 4.5


def _has_ended(worker: Worker) -> bool:
    return all(link.conn is None for link in worker.context.links)


@pytest.mark.parametrize(
    ("queues", "threads", "tasks"),
    [("bulk", [8], [100]), ("bulk,mail:2", [2, 8], [2, 100]), ("mail:2", [2], [2])],
)
def test_a_worker_has_slots_for_each_queue_with_a_number_and_shared_ones_only_for_others(
    dsn: str, queues: str, threads: list[int], tasks: list[int]
) -> None:
    app = batchq.App()
    app.handler("a")(lambda _: None)

    @app.handler("b")
    async def b(batch: batchq.Batch) -> None:
        pass

    worker = Worker(app, Settings.load(dsn=dsn, queues=queues))
    assert [lane.concurrency for lane in worker.lanes if isinstance(lane, ThreadLane)] == threads
    assert [lane.concurrency for lane in worker.lanes if isinstance(lane, LoopLane)] == tasks
    assert worker.keeper.row.concurrency == sum(threads) + sum(tasks)
    assert worker.keeper.row.kinds == ["a", "b"]
    assert {(source.queue, source.lane.serves(source.queue)) for source in worker.claimer.sources} == {
        (queue, True) for queue in worker.settings.queues
    }
    for link in worker.context.links:
        link.close()


if __name__ == "__main__":
    run_alone(__file__)
