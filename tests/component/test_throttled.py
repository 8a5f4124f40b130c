"""Throttled and Snooze: what a handler or item asks for is uncharged, holds for all it names, and loses nothing."""

import threading
import time
from typing import Any

import psycopg
import pytest

import batchq
from batchq.errors import InvalidInput
from batchq.postgres.link import Link
from batchq.testing import running_worker
from batchq.worker.gates import Gates
from batchq.worker.permits import Permits
from batchq.worker.throttles import Throttles
from tests.support.alone import run_alone
from tests.support.batches import STYLES, await_status, drain, failed_items, look, put, register, register_items, values
from tests.support.steps import step
from tests.support.waiting import wait_until

both_styles = pytest.mark.parametrize("style", STYLES)
LATER = batchq.Backoff(3600, 3600)


class Once:
    """Raises *error* the first time that it is called with *item*; records all calls, and when they were."""

    def __init__(self, error: BaseException, item: Any = None) -> None:
        self.error = error
        self.item = item
        self.calls: list[tuple[Any, float]] = []
        self._left = [True]

    def __call__(self, item: Any = None, _batch: Any = None) -> None:
        self.calls.append((item, time.monotonic()))
        if item == self.item and self._left:
            self._left.clear()
            raise self.error

    def called(self) -> list[Any]:
        """Return what it was called with."""
        return [item for item, _ in self.calls]


@both_styles
def test_a_throttled_batch_is_not_charged_and_its_kind_waits(dsn: str, conn: psycopg.Connection, style: str) -> None:
    app = batchq.App()
    once = Once(batchq.Throttled(1.5))
    register(app, style, "limited", lambda _: once())
    register(app, style, "other", lambda _: None)
    first, second = put(conn, "limited"), put(conn, "limited", delay_seconds=0.2)
    with running_worker(app, dsn, concurrency=1):
        wait_until(lambda: len(once.calls) >= 1, 10, "the first call")
        other = put(conn, "other")
        await_status(conn, other, "completed")
        step("another kind goes on meanwhile")
        assert len(once.calls) == 1
        for batch_id in (first, second):
            assert await_status(conn, batch_id, "completed").attempt == 1
    times = [at for _, at in once.calls]
    assert len(times) == 3
    assert times[1] - times[0] >= 1.4


def test_another_worker_waits_too(dsn: str, conn: psycopg.Connection) -> None:
    here, there = batchq.App(), batchq.App()
    once, calls = Once(batchq.Throttled(2)), Once(ValueError(), "never")
    register(here, "def", "limited", lambda _: once())
    register(there, "def", "limited", lambda _: calls())
    with running_worker(here, dsn):
        put(conn, "limited")
        wait_until(lambda: len(once.calls) == 1, 10, "the call that is throttled")
        wait_until(lambda: bool(values(conn, "SELECT 1 FROM batchq.throttles WHERE until > now()")), 5, "its row")
        with running_worker(there, dsn):
            for _ in range(20):
                put(conn, "limited")
            wait_until(lambda: len(once.calls) + len(calls.calls) >= 21, 20, "all to run")
    later = [at for _, at in once.calls[1:] + calls.calls]
    assert min(later) - once.calls[0][1] >= 1.9


@pytest.mark.parametrize(("scope", "waits"), [("queue", {"limited", "other"}), ("kind", {"limited"})])
def test_the_scope_says_what_waits(dsn: str, conn: psycopg.Connection, scope: str, waits: set[str]) -> None:
    app = batchq.App()
    register(app, "def", "limited", lambda _: (_ for _ in ()).throw(batchq.Throttled(3600, scope=scope)))
    register(app, "def", "other", lambda _: None)
    put(conn, "limited")
    drain(app, dsn)
    put(conn, "limited")
    put(conn, "other")
    drain(app, dsn)
    assert set(values(conn, "SELECT kind FROM batchq.batches_live")) == waits
    step("the row can be deleted, and then they run")
    conn.execute("DELETE FROM batchq.throttles")
    conn.execute("DELETE FROM batchq.batches_live WHERE kind = 'limited'")
    drain(app, dsn)
    left = values(conn, "SELECT count(*) FROM batchq.batches_live WHERE kind = 'other'")
    assert left == [0]


def test_with_the_scope_of_a_key_only_that_key_waits(dsn: str, conn: psycopg.Connection) -> None:
    app = batchq.App()
    once = Once(batchq.Throttled(3600, scope="key"))
    register(app, "def", "limited", lambda _: once())
    first = put(conn, "limited", key="a")
    drain(app, dsn)
    for key in ("a", "b", None):
        put(conn, "limited", key=key)
    drain(app, dsn)
    assert values(conn, "SELECT key FROM batchq.batches_live ORDER BY id") == ["a", "a"]
    assert look(conn, first).attempt == 0
    conn.execute("UPDATE batchq.throttles SET until = now()")
    conn.execute("UPDATE batchq.batches SET run_at = now() WHERE status = 'pending'")
    drain(app, dsn)
    assert values(conn, "SELECT key FROM batchq.batches_live") == []


@both_styles
@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_throttled_item_runs_again_in_its_batch_and_the_others_go_on(
    dsn: str, conn: psycopg.Connection, style: str, concurrency: int
) -> None:
    app = batchq.App()
    once = Once(batchq.Throttled(1), 3)
    register_items(app, style, "work", once, concurrency=concurrency)
    batch_id = put(conn, "work", items=list(range(8)))
    drain(app, dsn)
    row = look(conn, batch_id)
    assert (row.status, row.attempt, row.items_done, row.items_failed) == ("completed", 1, 8, 0)
    assert sorted(once.called()) == [0, 1, 2, 3, 3, 4, 5, 6, 7]
    first, second = (at for item, at in once.calls if item == 3)
    assert second - first >= 0.9


@both_styles
def test_an_item_that_is_throttled_for_long_gives_its_slot_back(dsn: str, conn: psycopg.Connection, style: str) -> None:
    app = batchq.App()
    once = Once(batchq.Throttled(3600), 3)
    register_items(app, style, "work", once)
    batch_id = put(conn, "work", items=list(range(8)))
    drain(app, dsn)
    row = look(conn, batch_id)
    assert (row.shown, row.attempt, once.called()) == ("scheduled", 0, [0, 1, 2, 3])
    assert 3590 < values(conn, "SELECT date_part('epoch', run_at - now()) FROM batchq.all_batches")[0] <= 3600
    conn.execute("DELETE FROM batchq.throttles")
    conn.execute("UPDATE batchq.failed_items SET run_at = now()")
    conn.execute("UPDATE batchq.batches SET run_at = now()")
    drain(app, dsn)
    assert (look(conn, batch_id).status, once.called()) == ("completed", [0, 1, 2, 3, 4, 5, 6, 7, 3])


@both_styles
@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_snoozed_item_runs_later_and_the_others_go_on(
    dsn: str, conn: psycopg.Connection, style: str, concurrency: int
) -> None:
    app = batchq.App()
    once = Once(batchq.Snooze(3600), 2)
    register_items(app, style, "work", once, concurrency=concurrency)
    batch_id = put(conn, "work", items=list(range(5)), max_attempts=1)
    drain(app, dsn)
    row = look(conn, batch_id)
    assert (row.shown, row.attempt, sorted(once.called())) == ("scheduled", 0, [0, 1, 2, 3, 4])
    assert [item.error for item in failed_items(conn, batch_id)] == ["Snooze: snoozed for 3600 s"]
    step("not before its time")
    conn.execute("UPDATE batchq.batches SET run_at = now()")
    drain(app, dsn)
    assert len(once.calls) == 5
    assert look(conn, batch_id).shown == "scheduled"
    conn.execute("UPDATE batchq.failed_items SET run_at = now()")
    conn.execute("UPDATE batchq.batches SET run_at = now()")
    drain(app, dsn)
    row = look(conn, batch_id)
    assert (row.status, row.attempt, row.items_done, row.items_failed) == ("completed", 1, 5, 0)
    assert once.called()[5:] == [2]


@both_styles
def test_a_snoozed_item_is_no_failure_beside_those_that_failed(dsn: str, conn: psycopg.Connection, style: str) -> None:
    app = batchq.App()
    once = Once(batchq.Snooze(3600), 2)

    def body(item: int, batch: batchq.Batch) -> None:
        once(item)
        if item == 1:
            raise ValueError("bad")

    register_items(app, style, "work", body, backoff=LATER)
    batch_id = put(conn, "work", items=list(range(4)), max_attempts=1, max_failed_items=1)
    drain(app, dsn)
    assert (look(conn, batch_id).shown, look(conn, batch_id).attempt) == ("scheduled", 0)
    conn.execute("UPDATE batchq.failed_items SET run_at = now() WHERE run_at IS NOT NULL")
    conn.execute("UPDATE batchq.batches SET run_at = now()")
    drain(app, dsn)
    row = look(conn, batch_id)
    assert (row.status, row.items_done, row.items_failed) == ("completed", 3, 1)
    assert once.called() == [0, 1, 2, 3, 2]


def test_an_items_limit_of_zero_begins_nothing_and_a_stop_is_heard_at_once(dsn: str, conn: psycopg.Connection) -> None:
    app = batchq.App()
    calls: list[int] = []
    many = threading.Event()

    @app.item_handler("work")
    def work(item: int) -> None:
        calls.append(item)
        if len(calls) == 3:
            conn.execute("INSERT INTO batchq.limits (kind, items_per_second) VALUES ('work', 0)")
            many.set()
        time.sleep(0.01)

    batch_id = put(conn, "work", items=list(range(10_000)))
    with running_worker(app, dsn) as worker:
        assert many.wait(10)
        wait_until(lambda: not worker.context.runtime.gate("default", "work").is_open, 5, "the limit to be known")
        begun_at, before = time.monotonic(), len(calls)
        worker.stop()
    assert time.monotonic() - begun_at < 5
    assert len(calls) <= before + 1
    row = look(conn, batch_id)
    assert (row.status, row.attempt, row.items_done) == ("pending", 0, len(calls))


@both_styles
def test_what_is_done_is_committed_in_time_though_the_gate_closes(
    dsn: str, conn: psycopg.Connection, style: str
) -> None:
    app = batchq.App()
    calls: list[int] = []

    def body(item: int, batch: batchq.Batch) -> None:
        calls.append(item)
        if len(calls) == 3:
            gate = batch._claimed.claim.runtime.gate("default", "work")
            gate.set_throttle(time.monotonic() + 8)  # type: ignore[attr-defined]

    register_items(app, style, "work", body)
    batch_id = put(conn, "work", items=list(range(10)))
    with running_worker(app, dsn):
        wait_until(lambda: look(conn, batch_id).items_done == 3, 5, "the checkpoint")
        assert len(calls) == 3


@both_styles
def test_a_transactional_handler_waits_before_its_transaction(dsn: str, conn: psycopg.Connection, style: str) -> None:
    app = batchq.App()
    calls: list[int] = []
    register_items(app, style, "work", lambda item, _: calls.append(item), transactional=True)
    conn.execute("INSERT INTO batchq.limits (kind, items_per_second, burst_seconds) VALUES ('work', 4, 0.1)")
    put(conn, "work", items=list(range(6)))
    drain(app, dsn)
    assert calls == list(range(6))


@both_styles
def test_of_two_transactional_batches_none_waits_within_its_transaction(
    dsn: str, conn: psycopg.Connection, style: str
) -> None:
    app = batchq.App()
    idle: list[float] = []
    longest = (
        "SELECT coalesce(max(extract(epoch FROM now() - state_change)), 0)::float8 FROM pg_stat_activity "
        "WHERE state = 'idle in transaction' AND datname = current_database()"
    )
    register_items(app, style, "work", lambda _, __: None, transactional=True)
    conn.execute("INSERT INTO batchq.limits (kind, items_per_second, burst_seconds) VALUES ('work', 1, 0.1)")
    for _ in range(3):
        put(conn, "work", items=[1, 2])
    with running_worker(app, dsn):
        until = time.monotonic() + 5
        while time.monotonic() < until:
            idle.append(values(conn, longest)[0])
            time.sleep(0.05)
    assert max(idle) < 1.5, "a chunk ends about a second after it began"


@both_styles
def test_an_item_that_snoozes_for_no_time_gives_its_slot_back(dsn: str, conn: psycopg.Connection, style: str) -> None:
    app = batchq.App()
    once: list[int] = []

    def body(item: int, batch: batchq.Batch) -> None:
        once.append(item)
        raise batchq.Snooze(0)

    register_items(app, style, "work", body)
    register(app, style, "other", lambda _: None)
    put(conn, "work", items=[1])
    other = put(conn, "other")
    with running_worker(app, dsn, concurrency=1, async_concurrency=1):
        await_status(conn, other, "completed")
        wait_until(lambda: len(once) > 3, 10, "it to run again and again")
    row = conn.execute("SELECT attempt, items_failed FROM batchq.batches_live").fetchone()
    assert row in ((0, 1), (1, 1))


@both_styles
def test_an_item_with_the_scope_of_a_key_lets_its_batch_wait(dsn: str, conn: psycopg.Connection, style: str) -> None:
    app = batchq.App()
    once = Once(batchq.Throttled(3600, scope="key"), 2)
    register_items(app, style, "work", once)
    batch_id = put(conn, "work", items=list(range(6)), key="k")
    other = put(conn, "work", items=[7], key="other")
    drain(app, dsn)
    assert sorted(once.called()) == [0, 1, 2, 7]
    assert (look(conn, batch_id).shown, look(conn, batch_id).attempt) == ("scheduled", 0)
    assert look(conn, other).status == "completed"


def test_without_a_key_the_scope_of_a_key_is_the_batch_alone(dsn: str, conn: psycopg.Connection) -> None:
    app = batchq.App()
    once = Once(batchq.Throttled(3600, scope="key"))
    register(app, "def", "limited", lambda _: once())
    put(conn, "limited")
    put(conn, "limited", delay_seconds=0.01)
    drain(app, dsn)
    drain(app, dsn)
    assert values(conn, "SELECT count(*) FROM batchq.throttles") == [0]
    assert values(conn, "SELECT count(*) FROM batchq.all_batches WHERE status = 'completed'") == [1]


def test_a_handler_that_is_throttled_waits_for_no_statement(dsn: str, conn: psycopg.Connection) -> None:
    """A handler of the event loop would block all others meanwhile."""
    permits = Permits("w", ["default"], 30, Gates(), set)
    with permits._turn:  # as while a read or a refresh is under way
        permits.throttle("default", "work", None, batchq.Throttled(60))
    assert permits.paused == {("default", "work")}


def test_a_read_that_was_under_way_does_not_end_a_throttle(dsn: str, conn: psycopg.Connection) -> None:
    throttles, link = Throttles("w"), Link(dsn, 10)
    asked_at = time.monotonic()
    throttles.add("default", "work", None, batchq.Throttled(60))
    throttles.follow({}, asked_at)
    assert throttles.in_force.keys() == {("default", "work")}
    throttles.write(link)
    throttles.follow({}, asked_at)
    assert throttles.in_force.keys() == {("default", "work")}, "the read began before the write"
    conn.execute("DELETE FROM batchq.throttles")
    throttles.follow({}, time.monotonic())
    assert throttles.in_force == {}
    link.close()


@pytest.mark.parametrize("seconds", [True, -1, float("nan"), float("inf"), 1e12, "soon", None])
def test_throttled_takes_a_number_of_seconds(seconds: Any) -> None:
    with pytest.raises(InvalidInput, match="Throttled takes 0 to 2,592,000 seconds, not"):
        batchq.Throttled(seconds)


@pytest.mark.parametrize("scope", ["", "batch", None, 1])
def test_throttled_takes_a_scope_that_exists(scope: Any) -> None:
    with pytest.raises(InvalidInput, match='the scope of Throttled is "kind", "queue" or "key", not'):
        batchq.Throttled(1, scope)


if __name__ == "__main__":
    run_alone(__file__)
