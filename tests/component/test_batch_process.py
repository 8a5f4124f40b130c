"""What becomes of a batch: how each end of its handler, `def` or `async def`, is written to its row."""

import asyncio
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import psycopg
import pytest
import structlog
from pydantic import BaseModel

import batchq
from batchq import testing
from batchq.batch.claimed import ClaimedBatch
from batchq.testing import running_worker
from batchq.worker.lanes import Lane
from batchq.worker.positions import Source
from batchq.worker.worker import Worker
from tests.support.alone import run_alone
from tests.support.batches import STYLES, await_status, drain, look, put, register, values
from tests.support.steps import step
from tests.support.waiting import wait_until

both_styles = pytest.mark.parametrize("style", STYLES)
AT_ONCE = batchq.Backoff(0, 0)


def raising(error: Callable[[], BaseException]) -> Callable[[batchq.Batch], None]:
    """Return the body of a handler that raises."""

    def body(batch: batchq.Batch) -> None:
        raise error()

    return body


# ------------------------------------------------------------------------------------------------- a good end


@both_styles
@pytest.mark.parametrize("result", [{"answer": [42, "ü"]}, 0, False, "", [], None], ids=repr)
def test_what_the_handler_returns_is_the_result(dsn: str, conn: psycopg.Connection, style: str, result: object) -> None:
    app = batchq.App()
    register(app, style, "work", lambda _: result)
    batch_id = put(conn, "work")

    drain(app, dsn)

    row = look(conn, batch_id)
    assert (row.status, row.result, row.attempt, row.errors) == ("completed", result, 1, [])
    assert row.finished_at is not None


@both_styles
def test_the_handler_sees_the_batch_as_it_was_enqueued(dsn: str, conn: psycopg.Connection, style: str) -> None:
    app = batchq.App()
    seen: list[Any] = []
    register(
        app,
        style,
        "work",
        lambda b: seen.append((b.id, b.queue, b.kind, b.attempt, b.max_attempts, b.payload, b.cursor, b.items_total)),
    )
    payload = {"to": "ann@example.org", "large": "x" * 100_000}
    batch_id = put(conn, "work", payload, queue="mail", max_attempts=3)

    drain(app, dsn, queues=("mail",))

    assert seen == [(batch_id, "mail", "work", 1, 3, payload, None, None)]


@both_styles
def test_a_payload_model_gives_the_handler_an_instance(dsn: str, conn: psycopg.Connection, style: str) -> None:
    class Order(BaseModel):
        number: int
        note: str = "none"

    app = batchq.App()
    seen: list[Any] = []
    register(app, style, "work", lambda batch: seen.append(batch.payload), payload=Order)
    put(conn, "work", {"number": 7})

    drain(app, dsn)

    assert seen == [Order(number=7)]


# ------------------------------------------------------------------------------------- failed attempts, no retry


@both_styles
def test_an_error_means_another_attempt_after_the_backoff(dsn: str, conn: psycopg.Connection, style: str) -> None:
    app = batchq.App()
    register(app, style, "work", raising(lambda: ValueError("no\n good")), backoff=batchq.Backoff(60, 60))
    batch_id = put(conn, "work")

    drain(app, dsn)

    row = look(conn, batch_id)
    assert (row.status, row.shown, row.attempt, row.claim_token) == ("pending", "retrying", 1, None)
    assert 25 < row.wait_seconds <= 90
    [error] = row.errors
    assert error["attempt"] == 1
    assert error["error"] == "ValueError: no good"
    assert "Traceback" in error["traceback"]
    assert "in body" in error["traceback"]
    assert error["at"]


@both_styles
def test_attempts_used_up_mean_failed(dsn: str, conn: psycopg.Connection, style: str) -> None:
    app = batchq.App()
    attempts: list[int] = []

    def body(batch: batchq.Batch) -> None:
        attempts.append(batch.attempt)
        raise ValueError(f"attempt {batch.attempt}")

    register(app, style, "work", body, backoff=AT_ONCE)
    batch_id = put(conn, "work", max_attempts=3)

    drain(app, dsn)

    row = look(conn, batch_id)
    assert attempts == [1, 2, 3]
    assert (row.status, row.attempt) == ("failed", 3)
    assert [(error["attempt"], error["error"]) for error in row.errors] == [
        (n, f"ValueError: attempt {n}") for n in (1, 2, 3)
    ]


def test_an_attempt_that_succeeds_after_others_failed_completes_and_keeps_their_errors(
    dsn: str, conn: psycopg.Connection
) -> None:
    app = batchq.App()

    @app.handler("work", backoff=AT_ONCE)
    def work(batch: batchq.Batch) -> str:
        if batch.attempt < 3:
            raise ConnectionError("down")
        return "up"

    batch_id = put(conn, "work")
    drain(app, dsn)

    row = look(conn, batch_id)
    assert (row.status, row.result, row.attempt, len(row.errors)) == ("completed", "up", 3, 2)


def test_only_the_newest_ten_errors_are_kept(dsn: str, conn: psycopg.Connection) -> None:
    app = batchq.App()
    register(app, "def", "work", raising(lambda: ValueError("again")), backoff=AT_ONCE)
    batch_id = put(conn, "work", max_attempts=12)

    drain(app, dsn)

    assert [error["attempt"] for error in look(conn, batch_id).errors] == list(range(3, 13))


@both_styles
def test_snooze_gives_the_attempt_back(dsn: str, conn: psycopg.Connection, style: str) -> None:
    app = batchq.App()
    register(app, style, "work", raising(lambda: batchq.Snooze(100)))
    batch_id = put(conn, "work", max_attempts=1)

    drain(app, dsn)

    row = look(conn, batch_id)
    assert (row.status, row.shown, row.attempt, row.errors) == ("pending", "scheduled", 0, [])
    assert 90 < row.wait_seconds <= 100


@both_styles
def test_cancel_ends_the_batch_with_its_reason(dsn: str, conn: psycopg.Connection, style: str) -> None:
    app = batchq.App()
    register(app, style, "work", raising(lambda: batchq.Cancel("the customer left")))
    batch_id = put(conn, "work")

    drain(app, dsn)

    row = look(conn, batch_id)
    assert (row.status, row.errors[0]["error"]) == ("cancelled", "cancelled: the customer left")


# -------------------------------------------------------------------------------------------- groups of exceptions

GROUPS: dict[str, tuple[Callable[[], BaseException], str]] = {
    "Snooze": (lambda: group(batchq.Snooze(100)), "scheduled 0"),
    "Snooze twice": (lambda: group(batchq.Snooze(100), batchq.Snooze(1)), "scheduled 0"),
    "Cancel": (lambda: group(batchq.Cancel("no")), "cancelled 1"),
    "Cancel and Snooze": (lambda: group(batchq.Snooze(1), batchq.Cancel("no")), "cancelled 1"),
    "Cancel within": (lambda: group(batchq.Snooze(1), group(group(batchq.Cancel("no")))), "cancelled 1"),
    "InvalidInput and Cancel": (lambda: group(batchq.Cancel("no"), batchq.InvalidInput("bad")), "failed 1"),
    "Snooze and an error": (lambda: group(batchq.Snooze(100), ValueError("bad")), "retrying 1"),
    "Cancel within, and an error": (lambda: group(group(batchq.Cancel("no")), group(ValueError())), "retrying 1"),
}


def group(*errors: BaseException) -> BaseException:
    """Return errors as asyncio.TaskGroup raises them."""
    return BaseExceptionGroup("unhandled errors in a TaskGroup", errors)


@both_styles
@pytest.mark.parametrize("name", GROUPS)
def test_a_group_of_nothing_but_control_exceptions_is_the_one_that_decides(
    dsn: str, conn: psycopg.Connection, style: str, name: str
) -> None:
    make, shown = GROUPS[name]
    app = batchq.App()
    register(app, style, "work", raising(make), backoff=batchq.Backoff(3600, 3600))
    batch_id = put(conn, "work")

    drain(app, dsn)

    row = look(conn, batch_id)
    assert f"{row.shown} {row.attempt}" == shown
    if row.shown == "scheduled":
        assert row.wait_seconds > 90, "the longest of them"


def test_a_snooze_in_a_task_group_gives_the_attempt_back(dsn: str, conn: psycopg.Connection) -> None:
    app = batchq.App()

    @app.handler("work")
    async def work(batch: batchq.Batch) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(asyncio.sleep(3600))
            tasks.create_task(snooze())

    async def snooze() -> None:
        raise batchq.Snooze(100)

    batch_id = put(conn, "work", max_attempts=1)
    drain(app, dsn)
    row = look(conn, batch_id)
    assert (row.shown, row.attempt, row.errors) == ("scheduled", 0, [])


def test_a_stop_that_reaches_a_task_of_a_group_costs_no_attempt(dsn: str, conn: psycopg.Connection) -> None:
    app = batchq.App()
    begun = threading.Event()

    @app.handler("work")
    async def work(batch: batchq.Batch) -> None:
        async def go_on() -> None:
            while True:
                begun.set()
                await batch.checkpoint_async(1)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(go_on())
            tasks.create_task(asyncio.sleep(3600))

    batch_id = put(conn, "work", max_attempts=1)
    with running_worker(app, dsn):
        assert begun.wait(20)
    row = look(conn, batch_id)
    assert (row.shown, row.attempt, row.errors) == ("ready", 0, [])


# ------------------------------------------------------------------------------------------------ one batch's context

tenant: ContextVar[str] = ContextVar("tenant", default="nobody")


@both_styles
@pytest.mark.parametrize("how", ["returns", "raises"])
def test_what_a_handler_binds_is_gone_for_the_next_batch(
    dsn: str, conn: psycopg.Connection, style: str, how: str
) -> None:
    app = batchq.App()
    found: list[tuple[str, dict[str, Any]]] = []

    def body(batch: batchq.Batch) -> None:
        found.append((tenant.get(), structlog.contextvars.get_contextvars()))
        tenant.set("acme")
        structlog.contextvars.bind_contextvars(tenant="acme")
        if how == "raises":
            raise ValueError("bad")

    register(app, style, "work", body)
    for _ in range(3):
        put(conn, "work", max_attempts=1)
    drain(app, dsn, concurrency=1)
    assert found == [("nobody", {})] * 3


class Order(BaseModel):
    """What a payload should be."""

    number: int


NO_JSON: dict[str, Callable[[], object]] = {
    "an object": object,
    "a set": lambda: {1},
    "NaN": lambda: float("nan"),
    "NUL": lambda: "a\0b",
    "a lone surrogate": lambda: "\ud800",
    "itself": lambda: (loop := [], loop.append(loop))[0],
    "too large": lambda: "x" * 1_000_001,
}


@both_styles
@pytest.mark.parametrize("result", NO_JSON)
def test_a_result_that_is_no_json_fails_the_batch_without_a_retry(
    dsn: str, conn: psycopg.Connection, style: str, result: str
) -> None:
    app = batchq.App()
    register(app, style, "work", lambda _: NO_JSON[result]())
    batch_id = put(conn, "work", max_attempts=5)

    drain(app, dsn)

    row = look(conn, batch_id)
    assert (row.status, row.attempt) == ("failed", 1)
    assert row.errors[0]["error"].startswith("InvalidInput: what the handler returned ")


@both_styles
@pytest.mark.parametrize(
    ("options", "payload", "said"),
    [
        ({}, {}, "InvalidInput: no such customer"),
        ({"payload": Order}, {"number": "seven"}, "InvalidInput: the payload does not fit Order: number: Input should"),
        ({"payload": Order}, {}, "InvalidInput: the payload does not fit Order: number: Field required"),
        ({"payload": Order}, [1], "InvalidInput: the payload does not fit Order: value: Input should be"),
    ],
    ids=["raised", "wrong type", "missing", "no object"],
)
def test_invalid_input_fails_the_batch_without_a_retry(
    dsn: str, conn: psycopg.Connection, style: str, options: dict[str, Any], payload: object, said: str
) -> None:
    app = batchq.App()
    register(app, style, "work", raising(lambda: batchq.InvalidInput("no such customer")), **options)
    batch_id = put(conn, "work", payload, max_attempts=5)

    drain(app, dsn)

    row = look(conn, batch_id)
    assert (row.status, row.attempt) == ("failed", 1)
    assert row.errors[0]["error"].startswith(said)


# ----------------------------------------------------------------------------------------------- nasty exceptions


class UnspeakableError(Exception):
    """Raises when it is to be told."""

    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


class StrangeError(BaseException):
    """Derived from BaseException alone."""


class LiarError(Exception):
    """Its str() is no text."""

    def __str__(self) -> str:
        return 7  # type: ignore[return-value]


def tangled() -> BaseException:
    """Return an exception that is its own cause, by way of another."""
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    return first


NASTY: dict[str, tuple[Callable[[], BaseException], str]] = {
    "SystemExit": (lambda: SystemExit(3), "SystemExit: 3"),
    "KeyboardInterrupt": (KeyboardInterrupt, "KeyboardInterrupt"),
    "GeneratorExit": (GeneratorExit, "GeneratorExit"),
    "CancelledError": (asyncio.CancelledError, "CancelledError"),
    "a BaseException": (lambda: StrangeError("odd"), "StrangeError: odd"),
    "str() raises": (UnspeakableError, "UnspeakableError: (its str() raised RuntimeError)"),
    "str() is no text": (LiarError, "LiarError: (its str() raised TypeError)"),
    "10 MB": (lambda: ValueError("x" * 10_000_000), "ValueError: xxx"),
    "NUL, surrogates": (lambda: ValueError("a\0b\ud800c"), "ValueError: a\N{REPLACEMENT CHARACTER}b?c"),
    "a group": (lambda: ExceptionGroup("two", [ValueError(1), ValueError(2)]), "ExceptionGroup: two (2 sub-exc"),
    "tangled": (tangled, "ValueError: first"),
    "psycopg's": (lambda: psycopg.OperationalError("server closed"), "OperationalError: server closed"),
}


@both_styles
@pytest.mark.parametrize("name", NASTY)
def test_whatever_a_handler_raises_is_a_failed_attempt_and_the_worker_goes_on(
    dsn: str, conn: psycopg.Connection, style: str, name: str
) -> None:
    error, said = NASTY[name]
    app = batchq.App()
    register(app, style, "nasty", raising(error))
    register(app, style, "good", lambda _: "fine")
    nasty = put(conn, "nasty")
    good = [put(conn, "good") for _ in range(3)]

    drain(app, dsn, concurrency=1, async_concurrency=1)

    row = look(conn, nasty)
    assert (row.shown, row.attempt) == ("retrying", 1)
    assert row.errors[0]["error"].startswith(said)
    assert len(row.errors[0]["error"].encode()) <= 2_000
    assert len(str(row.errors)) < 20_000
    assert [look(conn, batch_id).status for batch_id in good] == ["completed"] * 3


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_a_coroutines_own_task_that_ends_programs_does_not_end_the_event_loop(
    dsn: str, conn: psycopg.Connection, error: type[BaseException]
) -> None:
    app = batchq.App()

    async def exit_program() -> None:
        raise error

    @app.handler("nasty")
    async def nasty(batch: batchq.Batch) -> None:
        await asyncio.create_task(exit_program())

    @app.handler("good")
    async def good(batch: batchq.Batch) -> None:
        await asyncio.sleep(0)

    batch_id = put(conn, "nasty")
    with running_worker(app, dsn):
        row = await_status(conn, batch_id, "retrying")
        assert row.errors[0]["error"] == error.__name__
        await_status(conn, put(conn, "good"), "completed")


# ------------------------------------------------------------------------------------------------------ time limits


def test_a_thread_over_its_time_has_failed_and_its_slot_is_replaced(dsn: str, conn: psycopg.Connection) -> None:
    app = batchq.App()
    release = threading.Event()
    told: list[BaseException] = []

    @app.handler("slow")
    def slow(batch: batchq.Batch) -> None:
        release.wait(30)
        try:
            batch.checkpoint("too late")
        except BaseException as error:
            told.append(error)
            raise

    @app.handler("quick")
    def quick(batch: batchq.Batch) -> None:
        pass

    slow_id = put(conn, "slow", timeout_seconds=1)
    with running_worker(app, dsn, concurrency=1, lease_seconds=1):
        step("the attempt fails after a second, while its thread is stuck")
        row = await_status(conn, slow_id, "retrying")
        assert row.attempt == 1
        assert row.errors[0]["error"] == f"TimedOut: batch {slow_id} ran for more than 1 s"
        step("the one slot is free again")
        await_status(conn, put(conn, "quick"), "completed")
        release.set()
        wait_until(lambda: told, 5, "the handler to be told")
    assert isinstance(told[0], batchq.TimedOut | batchq.LeaseLost)
    row = look(conn, slow_id)
    assert (row.shown, row.cursor, row.attempt) == ("retrying", None, 1)


def test_a_coroutine_over_its_time_has_failed_and_is_cancelled(dsn: str, conn: psycopg.Connection) -> None:
    app = batchq.App()
    cancelled = threading.Event()

    @app.handler("slow", timeout_seconds=0.2)
    async def slow(batch: batchq.Batch) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    @app.handler("quick")
    async def quick(batch: batchq.Batch) -> None:
        await asyncio.sleep(0)

    slow_id = put(conn, "slow", max_attempts=1)
    with running_worker(app, dsn, async_concurrency=1, lease_seconds=1):
        row = await_status(conn, slow_id, "failed")
        assert row.errors[0]["error"] == f"TimedOut: batch {slow_id} ran for more than 0.2 s"
        assert cancelled.wait(5)
        await_status(conn, put(conn, "quick"), "completed")


@both_styles
def test_a_batch_with_its_own_time_limit_does_not_follow_the_handlers(
    dsn: str, conn: psycopg.Connection, style: str
) -> None:
    app = batchq.App()
    release = threading.Event()
    register(app, style, "slow", lambda _: release.wait(30), timeout_seconds=0.05)
    mine = put(conn, "slow", timeout_seconds=60)
    with running_worker(app, dsn, lease_seconds=1):
        held = await_status(conn, mine, "processing")
        wait_until(
            lambda: look(conn, mine).lease_expires_at > held.lease_expires_at, 10, "the keeper to look several times"
        )
        release.set()
        assert await_status(conn, mine, "completed").errors == []


# ----------------------------------------------------------------------------------------------- blocked, and alive


@both_styles
def test_a_handler_that_blocks_keeps_its_lease(dsn: str, conn: psycopg.Connection, style: str) -> None:
    app = batchq.App()
    release = threading.Event()
    runs: list[int] = []

    def block(batch: batchq.Batch) -> None:
        runs.append(batch.id)
        release.wait(30)

    register(app, style, "work", block)
    batch_id = put(conn, "work")
    with running_worker(app, dsn, concurrency=1, async_concurrency=1, lease_seconds=1):
        first = await_status(conn, batch_id, "processing")
        step("wait until twice the lease has passed, on the database's clock")
        wait_until(
            lambda: values(
                conn, "SELECT now() > %s::timestamptz + interval '1 second'", first.lease_expires_at.isoformat()
            )[0],
            10,
            "twice the lease",
        )
        now = look(conn, batch_id)
        assert (now.shown, now.claim_token, now.attempt) == ("processing", first.claim_token, 1)
        release.set()
        await_status(conn, batch_id, "completed")
    assert runs == [batch_id]


def test_threads_and_the_event_loop_work_at_once(dsn: str, conn: psycopg.Connection) -> None:
    app = batchq.App()
    from_thread, from_loop = threading.Event(), threading.Event()

    @app.handler("thread")
    def in_thread(batch: batchq.Batch) -> bool:
        from_thread.set()
        return from_loop.wait(10)

    @app.handler("loop")
    async def in_loop(batch: batchq.Batch) -> bool:
        from_loop.set()
        return await asyncio.to_thread(from_thread.wait, 10)

    ids = [put(conn, kind) for kind in ("thread", "loop")]
    drain(app, dsn)
    assert [look(conn, batch_id).result for batch_id in ids] == [True, True]


def test_hundreds_of_coroutines_run_at_once(dsn: str, conn: psycopg.Connection) -> None:
    app = batchq.App()
    here: list[int] = []
    everybody = threading.Event()

    @app.handler("work")
    async def work(batch: batchq.Batch) -> None:
        here.append(batch.id)
        if len(here) == 200:
            everybody.set()
        while not everybody.is_set():
            await asyncio.sleep(0.01)

    batchq.enqueue_many(conn, "work", ({"n": n} for n in range(200)))
    drain(app, dsn, async_concurrency=200)
    assert values(conn, "SELECT count(*) FROM batchq.all_batches WHERE status = 'completed'") == [200]


# ------------------------------------------------------------------------------------------------- order, drain


@both_styles
def test_lower_priorities_first_then_the_earlier(dsn: str, conn: psycopg.Connection, style: str) -> None:
    app = batchq.App()
    order: list[str] = []
    register(app, style, "work", lambda batch: order.append(batch.payload))
    for name, priority in [("c", 5), ("a", -3), ("d", 5), ("b", 0), ("e", 32767)]:
        put(conn, "work", name, priority=priority)
    conn.execute("UPDATE batchq.batches SET run_at = now() - interval '1 hour' WHERE payload = '\"d\"'")

    drain(app, dsn, concurrency=1, async_concurrency=1)

    assert order == ["a", "b", "d", "c", "e"]


class SlowlyFreedLane(Lane):
    """A lane with room for one, and for more as soon as that one is claimed."""

    def room(self) -> int:
        """Return the room that the claim begins with."""
        return 1

    def wanted(self) -> int:
        """Return the room that there is then."""
        return 100

    def begin(self, batches: list[ClaimedBatch]) -> None:
        """Run nothing."""


def test_a_slot_that_becomes_free_during_a_claim_is_not_for_a_lower_priority(
    dsn: str, conn: psycopg.Connection
) -> None:
    app = batchq.App()
    register(app, "def", "work", print)
    for name, priority in [("first", 5), ("second", 5), ("lower", 9)]:
        put(conn, "work", name, priority=priority)
    worker = Worker(app, batchq.Settings.load(dsn=dsn))
    lane = SlowlyFreedLane(app.handlers, 1, lambda *_: None)
    worker.claimer.claim_from(Source("default", lane))
    assert [batchq.Batch(claimed).payload for claimed in lane.list_in_flight()] == ["first"]
    worker.claimer.link.close()


@both_styles
def test_drain_works_what_its_batches_enqueue_and_leaves_what_is_not_ready(
    dsn: str, conn: psycopg.Connection, style: str
) -> None:
    app = batchq.App()

    def body(batch: batchq.Batch) -> None:
        if batch.payload < 5:
            with psycopg.connect(dsn, autocommit=True) as own:
                put(own, "work", batch.payload + 1)

    register(app, style, "work", body)
    put(conn, "work", 1)
    later = put(conn, "work", 99, delay_seconds=3600)
    unknown = put(conn, "nobody")

    testing.drain(app, dsn)

    done = values(conn, "SELECT payload FROM batchq.all_batches WHERE status = 'completed' ORDER BY id")
    assert done == [1, 2, 3, 4, 5]
    assert look(conn, later).shown == "scheduled"
    assert (look(conn, unknown).shown, look(conn, unknown).attempt) == ("ready", 0)
    assert values(conn, "SELECT workers FROM batchq.queues WHERE kind = 'nobody'") == [0]


# -------------------------------------------------------------------------------------------------- stop, cancel


class Blocked:
    """An app whose one slot is blocked by batch number 500, with others behind it in hand: many, since the quick ones
    before have raised the prefetch."""

    def __init__(self, conn: psycopg.Connection) -> None:
        self.conn = conn
        self.app = batchq.App()
        self.app.handler("work")(self.work)
        self.stuck, self.release = threading.Event(), threading.Event()
        self.runs: list[int] = []
        batchq.enqueue_many(conn, "work", range(2000))

    def work(self, batch: batchq.Batch) -> None:
        """Handle one batch."""
        self.runs.append(batch.payload)
        if batch.payload == 500:
            self.stuck.set()
            self.release.wait(30)

    def in_hand(self) -> int:
        """Return how many batches are claimed."""
        return int(values(self.conn, "SELECT count(*) FROM batchq.all_batches WHERE status = 'processing'")[0])

    def wait_for_many_in_hand(self) -> None:
        """Wait until the slot is blocked and others are in hand behind it."""
        assert self.stuck.wait(20)
        wait_until(lambda: self.in_hand() > 10, 5, "batches in hand")


def test_a_stop_gives_back_what_has_not_begun_without_charging_an_attempt(
    dsn: str, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchq.worker.keeper.WAITING_SECONDS", 3600)  # so that only the stop gives back
    blocked = Blocked(conn)
    with running_worker(blocked.app, dsn, concurrency=1) as worker:
        blocked.wait_for_many_in_hand()
        worker.stop()
        wait_until(lambda: blocked.in_hand() == 1, 5, "all but the running one to be given back, while it runs")
        blocked.release.set()

    assert blocked.runs == list(range(501))
    counts = "SELECT status, attempt, count(*) FROM batchq.all_batches GROUP BY 1, 2 ORDER BY 1"
    assert conn.execute(counts).fetchall() == [("completed", 1, 501), ("pending", 0, 1499)]
    drain(blocked.app, dsn)
    assert sorted(blocked.runs) == list(range(2000))


def test_what_a_slow_batch_keeps_waiting_goes_back_after_a_second(dsn: str, conn: psycopg.Connection) -> None:
    blocked = Blocked(conn)
    with running_worker(blocked.app, dsn, concurrency=1, shutdown_seconds=1) as worker:
        [lane] = worker.lanes
        blocked.wait_for_many_in_hand()
        wait_until(lambda: blocked.in_hand() == 1, 10, "all but the running one to be given back, while it runs")
        assert values(conn, "SELECT DISTINCT attempt FROM batchq.all_batches WHERE status = 'pending'") == [0]
        step("they are not taken again: another worker has them all")
        claimed = lane.claimed
        assert lane.wanted() == 1
        drain(blocked.app, dsn)
        assert lane.claimed == claimed
        assert sorted(blocked.runs) == list(range(2000))
        blocked.release.set()


def make_counting_app(begun: threading.Event, go_on: threading.Event, counted: list[int]) -> batchq.App:
    """Return an app that counts to 10 with a checkpoint each; at 3 it waits. It catches every Exception."""
    app = batchq.App()

    @app.handler("def")
    def count(batch: batchq.Batch) -> str:
        for n in range(batch.cursor or 0, 10):
            try:
                counted.append(n)
                if n == 3:
                    begun.set()
                    go_on.wait(30)
                batch.checkpoint(n + 1)
            except Exception:
                counted.append(-1)
        return "counted"

    @app.handler("async def")
    async def count_async(batch: batchq.Batch) -> str:
        for n in range(batch.cursor or 0, 10):
            try:
                counted.append(n)
                if n == 3:
                    begun.set()
                    await asyncio.to_thread(go_on.wait, 30)
                await batch.checkpoint_async(n + 1)
            except Exception:
                counted.append(-1)
        return "counted"

    return app


@both_styles
def test_a_stop_gives_back_a_running_batch_at_its_checkpoint_and_another_worker_goes_on(
    dsn: str, conn: psycopg.Connection, style: str
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    counted: list[int] = []
    app = make_counting_app(begun, go_on, counted)
    batch_id = put(conn, style, max_attempts=1)

    with running_worker(app, dsn) as worker:
        assert begun.wait(10)
        worker.stop()
        go_on.set()

    row = look(conn, batch_id)
    assert (row.shown, row.attempt, row.cursor, row.errors) == ("ready", 0, 4, [])
    assert counted == [0, 1, 2, 3], "`except Exception` swallowed StopRequested"
    step("another worker goes on")
    drain(app, dsn)
    assert counted == list(range(10))
    assert (look(conn, batch_id).status, look(conn, batch_id).result) == ("completed", "counted")


@both_styles
def test_cancel_in_sql_stops_a_running_batch_at_its_next_checkpoint(
    dsn: str, conn: psycopg.Connection, style: str
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    counted: list[int] = []
    app = make_counting_app(begun, go_on, counted)
    batch_id = put(conn, style)

    with running_worker(app, dsn):
        assert begun.wait(10)
        assert values(conn, "SELECT batchq.cancel(%s, 'not needed')", batch_id) == ["cancelled"]
        go_on.set()
        step("the worker goes on with others")
        await_status(conn, put(conn, style), "completed")

    row = look(conn, batch_id)
    assert (row.status, row.cursor, row.result) == ("cancelled", 3, None)
    assert row.errors[-1]["error"] == "cancelled: not needed"
    assert counted == [0, 1, 2, 3, *range(10)]


@both_styles
def test_a_cancelled_batch_stays_cancelled_whatever_its_handler_returns(
    dsn: str, conn: psycopg.Connection, style: str
) -> None:
    app = batchq.App()
    begun, go_on = threading.Event(), threading.Event()

    def body(batch: batchq.Batch) -> str:
        begun.set()
        go_on.wait(30)
        return "done"

    register(app, style, "work", body)
    batch_id = put(conn, "work")
    with running_worker(app, dsn):
        assert begun.wait(10)
        conn.execute("SELECT batchq.cancel(%s)", [batch_id])
        go_on.set()
    row = look(conn, batch_id)
    assert (row.status, row.result) == ("cancelled", None)


@both_styles
def test_a_handler_that_does_not_end_within_shutdown_seconds_is_given_back(
    dsn: str, conn: psycopg.Connection, style: str
) -> None:
    app = batchq.App()
    begun, release = threading.Event(), threading.Event()

    def body(batch: batchq.Batch) -> None:
        begun.set()
        release.wait(30)

    register(app, style, "work", body)
    batch_id = put(conn, "work", max_attempts=1)
    with running_worker(app, dsn, shutdown_seconds=0):
        assert begun.wait(10)
    row = look(conn, batch_id)
    release.set()
    assert (row.shown, row.attempt, row.claim_token) == ("ready", 0, None)


def test_stop_requested_can_be_asked_for(dsn: str, conn: psycopg.Connection) -> None:
    app = batchq.App()
    begun = threading.Event()

    @app.handler("work")
    def work(batch: batchq.Batch) -> str:
        before = batch.stop_requested
        begun.set()
        wait_until(lambda: batch.stop_requested, 10, "the stop")
        return "stopped" if not before else "too early"

    batch_id = put(conn, "work")
    with running_worker(app, dsn):
        assert begun.wait(10)
    assert look(conn, batch_id).result == "stopped"


if __name__ == "__main__":
    run_alone(__file__)
