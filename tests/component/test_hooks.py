"""Hooks: around each batch, while a worker runs, and after a failure; an error in one loses no batch."""

import asyncio
import contextlib
import contextvars
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sentry_sdk
from sentry_sdk.transport import Transport

import batchq
from batchq.errors import ConfigError, InvalidInput, LifespanFailed, OutcomeUnknown
from batchq.postgres.statements.endings import Finish
from batchq.testing import running_worker
from batchq.worker import failures
from batchq.worker.failures import Failed, FailureHooks
from batchq.worker.worker import Worker
from tests.component import rows
from tests.support.alone import run_alone
from tests.support.batches import STYLES, await_status, drain, look, put, register, register_items, values
from tests.support.commands import CommandLine
from tests.support.roles import role_for
from tests.support.waiting import wait_until

Conn = psycopg.Connection[Any]
AT_ONCE = batchq.Backoff(0, 0)
both_styles = pytest.mark.parametrize("style", STYLES)


def add_around(app: batchq.App, style: str, body: Callable[[batchq.Batch], Iterator[None]]) -> None:
    """Register *body*, a generator function, as a hook around handlers of either style."""

    async def in_loop(batch: batchq.Batch) -> AsyncIterator[None]:
        steps = body(batch)
        next(steps)
        try:
            yield
        except BaseException as error:
            try:
                steps.throw(error)
            except StopIteration:
                return
        else:
            with pytest.raises(StopIteration):
                next(steps)

    app.around(body if style == "def" else in_loop)


# ---------------------------------------------------------------------------------------------------- around a batch


@both_styles
def test_hooks_run_around_the_handler_the_first_one_outermost(dsn: str, conn: Conn, style: str) -> None:
    app, seen = batchq.App(), []

    def hook(name: str) -> Callable[[batchq.Batch], Iterator[None]]:
        def around(batch: batchq.Batch) -> Iterator[None]:
            seen.append((name, "before", batch.payload))
            yield
            seen.append((name, "after", batch.kind))

        return around

    register(app, style, "work", lambda batch: seen.append(("handler", batch.id)) or "result")
    add_around(app, style, hook("outer"))
    add_around(app, style, hook("inner"))
    batch_id = put(conn, "work", 5)
    drain(app, dsn)
    assert look(conn, batch_id).result == "result"
    assert seen == [
        ("outer", "before", 5),
        ("inner", "before", 5),
        ("handler", batch_id),
        ("inner", "after", "work"),
        ("outer", "after", "work"),
    ]


@both_styles
def test_a_hook_runs_once_around_all_items_of_a_batch(dsn: str, conn: Conn, style: str) -> None:
    app, seen = batchq.App(), []

    def around(batch: batchq.Batch) -> Iterator[None]:
        seen.append("before")
        yield
        seen.append("after")

    register_items(app, style, "work", lambda item, _: seen.append(item))
    add_around(app, style, around)
    batch_id = put(conn, "work", items=[1, 2, 3])
    drain(app, dsn)
    row = look(conn, batch_id)
    assert (row.status, row.items_done) == ("completed", 3)
    assert seen == ["before", 1, 2, 3, "after"]


@both_styles
def test_a_hook_runs_once_around_each_part_of_a_batch_that_is_spread(dsn: str, conn: Conn, style: str) -> None:
    app, ids, items = batchq.App(), [], []

    def around(batch: batchq.Batch) -> Iterator[None]:
        ids.append(batch.id)
        yield

    register_items(app, style, "work", lambda item, _: items.append(item))
    add_around(app, style, around)
    batch_id = put(conn, "work", items=list(range(40)), spread=4)
    drain(app, dsn)
    assert look(conn, batch_id).status == "completed"
    assert sorted(items) == list(range(40))
    assert set(ids) == {batch_id}
    assert len(ids) in (4, 5)  # the parts, and the end of the whole if a worker runs it


@both_styles
def test_a_hook_sees_the_error_and_what_it_raises_instead_counts(dsn: str, conn: Conn, style: str) -> None:
    app, seen = batchq.App(), []

    def fail(batch: batchq.Batch) -> None:
        raise ConnectionError(batch.payload)

    def around(batch: batchq.Batch) -> Iterator[None]:
        try:
            yield
        except ConnectionError as error:
            seen.append(str(error))
            if str(error) == "later":
                raise batchq.Snooze(60) from error
            raise

    register(app, style, "work", fail, backoff=AT_ONCE)
    add_around(app, style, around)
    failing, later = put(conn, "work", "no", max_attempts=2), put(conn, "work", "later")
    drain(app, dsn)
    assert sorted(seen) == ["later", "no", "no"]
    assert (look(conn, failing).status, look(conn, failing).errors[-1]["error"]) == ("failed", "ConnectionError: no")
    assert (look(conn, later).shown, look(conn, later).attempt) == ("scheduled", 0)


@both_styles
def test_a_hook_cannot_swallow_an_error(dsn: str, conn: Conn, style: str) -> None:
    app = batchq.App()

    def fail(batch: batchq.Batch) -> None:
        raise ValueError("no")

    def around(batch: batchq.Batch) -> Iterator[None]:
        with contextlib.suppress(ValueError):
            yield

    register(app, style, "work", fail)
    add_around(app, style, around)
    batch_id = put(conn, "work", max_attempts=1)
    drain(app, dsn)
    assert (look(conn, batch_id).status, look(conn, batch_id).errors[0]["error"]) == ("failed", "ValueError: no")


@both_styles
@pytest.mark.parametrize("point", ["before", "after"])
def test_an_error_of_a_hook_fails_the_attempt(dsn: str, conn: Conn, style: str, point: str) -> None:
    app, ran = batchq.App(), []

    def around(batch: batchq.Batch) -> Iterator[None]:
        if point == "before" and batch.attempt == 1:
            raise OSError("before")
        yield
        if point == "after" and batch.attempt == 1:
            raise OSError("after")

    register(app, style, "work", lambda batch: ran.append(batch.attempt), backoff=AT_ONCE)
    add_around(app, style, around)
    batch_id = put(conn, "work")
    drain(app, dsn)
    row = look(conn, batch_id)
    assert (row.status, row.attempt, [e["error"] for e in row.errors]) == ("completed", 2, [f"OSError: {point}"])
    assert ran == ([2] if point == "before" else [1, 2])


def test_a_hook_is_for_handlers_of_its_style_and_shares_their_context(dsn: str, conn: Conn) -> None:
    app, seen = batchq.App(), []
    name: contextvars.ContextVar[str] = contextvars.ContextVar("name", default="none")

    @app.around
    def around(batch: batchq.Batch) -> Iterator[None]:
        name.set("def")
        yield

    @app.around
    async def around_async(batch: batchq.Batch) -> AsyncIterator[None]:
        name.set("async def")
        yield

    register(app, "def", "one", lambda _: seen.append(("one", name.get())))
    register(app, "async def", "two", lambda _: seen.append(("two", name.get())))
    put(conn, "one"), put(conn, "two")
    drain(app, dsn)
    assert sorted(seen) == [("one", "def"), ("two", "async def")]


def test_without_hooks_the_lanes_have_the_handlers_themselves(dsn: str) -> None:
    app = batchq.App()
    register(app, "def", "one", print)
    register(app, "async def", "two", print)
    worker = Worker(app, batchq.Settings.load(dsn=dsn))
    assert [lane.handlers[kind] for lane in worker.lanes for kind in lane.handlers] == list(app.handlers.values())
    assert worker.finisher.on_failed is None
    assert worker.keeper.rescuer.on_failed is None


@pytest.mark.parametrize(
    ("hook", "function", "problem"),
    [
        ("around", lambda _: None, "must have one yield"),
        ("around", 5, "is for a function, not 5"),
        ("lifespan", lambda: None, "must have one yield"),
        ("lifespan", (lambda _: (yield)), "is called with no argument"),
        ("around", (lambda: (yield)), "is called with one argument"),
        ("on_failure", (lambda _: (yield)), "has a yield"),
        ("on_failure", (lambda: None), "is called with one argument"),
    ],
)
def test_what_is_no_hook_is_refused(hook: str, function: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        getattr(batchq.App(), hook)(function)


def test_there_is_one_lifespan() -> None:
    app = batchq.App()

    def lifespan() -> Iterator[None]:
        yield

    app.lifespan(lifespan)
    with pytest.raises(ConfigError, match="has a lifespan already"):
        app.lifespan(lifespan)


# ------------------------------------------------------------------------------------------------ while a worker runs


def test_a_lifespan_is_open_from_before_the_first_claim_until_after_the_last_handler(dsn: str, conn: Conn) -> None:
    app, seen = batchq.App(), []

    @app.lifespan
    def lifespan() -> Iterator[dict[str, int]]:
        seen.append(("open", look(conn, batch_id).status))
        yield {"answer": 42}
        seen.append(("close", look(conn, batch_id).status))

    register(app, "def", "work", lambda batch: batch.app_state["answer"])
    batch_id = put(conn, "work")
    drain(app, dsn)
    assert look(conn, batch_id).result == 42
    assert seen == [("open", "pending"), ("close", "completed")]
    drain(app, dsn)
    assert len(seen) == 4


@both_styles
def test_an_async_lifespan_runs_in_the_event_loop_of_the_handlers(dsn: str, conn: Conn, style: str) -> None:
    app, tasks = batchq.App(), []

    @app.lifespan
    async def lifespan() -> AsyncIterator[asyncio.AbstractEventLoop]:
        tasks.append(asyncio.current_task())
        yield asyncio.get_running_loop()
        tasks.append(asyncio.current_task())

    def work(batch: batchq.Batch) -> bool:
        return bool(batch.app_state is asyncio.get_running_loop() if style == "async def" else batch.app_state)

    register(app, style, "work", work)
    batch_id = put(conn, "work")
    drain(app, dsn)
    assert look(conn, batch_id).result is True
    assert len(tasks) == 2
    assert tasks[0] is tasks[1]


def test_an_async_lifespan_survives_a_handler_that_cancels_every_task(dsn: str, conn: Conn) -> None:
    app, seen = batchq.App(), []

    @app.lifespan
    async def lifespan() -> AsyncIterator[str]:
        yield "state"
        seen.append("closed")

    @app.handler("cancel", backoff=AT_ONCE)
    async def cancel(batch: batchq.Batch) -> str:
        if batch.attempt == 1:
            for task in asyncio.all_tasks():
                task.cancel()
            await asyncio.sleep(10)
        assert not seen
        return str(batch.app_state)

    batch_id = put(conn, "cancel")
    drain(app, dsn)
    assert look(conn, batch_id).result == "state"
    assert seen == ["closed"]


def test_without_a_lifespan_there_is_no_state(dsn: str, conn: Conn) -> None:
    app = batchq.App()
    register(app, "def", "work", lambda batch: batch.app_state is None)
    batch_id = put(conn, "work")
    drain(app, dsn)
    assert look(conn, batch_id).result is True


@both_styles
def test_an_error_before_the_yield_ends_the_worker_and_no_batch_is_claimed(dsn: str, conn: Conn, style: str) -> None:
    app = batchq.App()

    def fail() -> Iterator[None]:
        raise OSError("no such host")
        yield

    async def fail_async() -> AsyncIterator[None]:
        raise OSError("no such host")
        yield

    app.lifespan(fail if style == "def" else fail_async)
    register(app, style, "work", lambda _: None)
    batch_id = put(conn, "work")
    with pytest.raises(LifespanFailed, match=r"the lifespan .*fail.*\(\) failed: OSError: no such host"):
        drain(app, dsn)
    assert (look(conn, batch_id).status, look(conn, batch_id).attempt) == ("pending", 0)
    assert values(conn, "SELECT count(*) FROM batchq.workers") == [0]
    assert not [thread for thread in threading.enumerate() if thread.name in ("batchq-keeper", "batchq-event-loop")]


@both_styles
@pytest.mark.parametrize("error", [OSError, TimeoutError])
def test_an_error_after_the_yield_is_logged(
    dsn: str,
    conn: Conn,
    style: str,
    error: type[Exception],
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    app = batchq.App()

    def fail() -> Iterator[None]:
        yield
        raise error("cannot close")

    async def fail_async() -> AsyncIterator[None]:
        yield
        raise error("cannot close")

    app.lifespan(fail if style == "def" else fail_async)
    register(app, style, "work", lambda _: "done")
    batch_id = put(conn, "work")
    drain(app, dsn)
    assert look(conn, batch_id).result == "done"
    out = capsys.readouterr()
    logged = caplog.text + out.out + out.err
    assert "lifespan failed" in logged
    assert f"{error.__name__}: cannot close" in logged


def test_a_worker_whose_async_lifespan_does_not_close_ends_all_the_same(dsn: str, conn: Conn) -> None:
    app = batchq.App()

    @app.lifespan
    async def lifespan() -> AsyncIterator[None]:
        yield
        await asyncio.sleep(60)

    register(app, "async def", "work", lambda _: "done")
    batch_id = put(conn, "work")
    before = time.monotonic()
    drain(app, dsn, shutdown_seconds=1)
    assert look(conn, batch_id).result == "done"
    assert time.monotonic() - before < 10


LIFESPAN = """
import batchq

app = batchq.App()

@app.handler("good")
def good(batch):
    return "fine"

@app.lifespan
def clients():
    raise OSError("no such host")
    yield
"""


def test_the_command_says_in_one_line_what_failed_and_exits_1(dsn: str, tmp_path: Path) -> None:
    command = CommandLine(dsn, tmp_path)
    (tmp_path / "tasks.py").write_text(LIFESPAN)
    ended = command("worker", "tasks:app", "--drain")
    assert ended.code == 1
    assert ended.err.splitlines()[-1] == "batchq: the lifespan clients() failed: OSError: no such host"


# ------------------------------------------------------------------------------------------------- after a failure


class Told:
    """An app whose kind "work" fails as its payload says, and the failures that its hook was told."""

    def __init__(self, style: str = "def") -> None:
        self.app = batchq.App()
        self.failures: list[batchq.Failure] = []
        register(self.app, style, "work", self.work, backoff=AT_ONCE)
        self.app.on_failure(self.failures.append if style == "def" else self.note)

    def work(self, batch: batchq.Batch) -> None:
        """Fail, unless the payload is "good"."""
        if batch.payload == "invalid":
            raise InvalidInput("as told")
        if batch.payload == "cancel":
            raise batchq.Cancel("as told")
        if batch.payload != "good":
            raise ValueError(batch.payload)

    async def note(self, failure: batchq.Failure) -> None:
        """Do as the hook of ``def`` does, later."""
        await asyncio.sleep(0)
        self.failures.append(failure)


@both_styles
def test_a_failure_is_told_once_after_it_was_committed(dsn: str, conn: Conn, style: str) -> None:
    told, statuses = Told(style), []
    told.app.on_failure(lambda failure: statuses.append(look(conn, failure.id).status))
    put(conn, "work", "good"), put(conn, "work", "cancel")
    bad = put(conn, "work", "bad", max_attempts=3)
    invalid = put(conn, "work", "invalid")
    drain(told.app, dsn)
    assert statuses == ["failed", "failed"]
    assert sorted((f.id, f.queue, f.kind, f.payload, f.attempt, f.error) for f in told.failures) == [
        (bad, "default", "work", "bad", 3, "ValueError: bad"),
        (invalid, "default", "work", "invalid", 1, "InvalidInput: as told"),
    ]
    assert all("in work" in (f.traceback or "") for f in told.failures)


def test_a_role_of_workers_alone_may_read_what_the_hook_gets(admin_dsn: str, conn: Conn) -> None:
    told = Told()
    batch_id = put(conn, "work", "bad", max_attempts=1)
    with role_for(admin_dsn, "worker") as dsn:
        drain(told.app, dsn)
    assert [(failure.id, failure.payload) for failure in told.failures] == [(batch_id, "bad")]


def test_failed_items_and_a_timeout_are_told(dsn: str, conn: Conn) -> None:
    told = Told()
    register_items(told.app, "def", "items", lambda item, _: 1 / item)
    register(told.app, "def", "slow", lambda _: time.sleep(2), timeout_seconds=0.3)
    items = put(conn, "items", items=[1, 0], max_attempts=1)
    slow = put(conn, "slow", max_attempts=1)
    drain(told.app, dsn, lease_seconds=3)
    found = {failure.id: failure.error for failure in told.failures}
    assert found[items].startswith("1 of 2 items failed; the first: ZeroDivisionError")
    assert found[slow] == f"TimedOut: batch {slow} ran for more than 0.3 s"
    assert len(told.failures) == 2


def test_a_batch_that_is_spread_is_told_as_a_whole(dsn: str, conn: Conn) -> None:
    told = Told()

    def broken(item: int, batch: batchq.Batch) -> None:
        raise InvalidInput("no") if item == 17 else ValueError("no")

    register_items(told.app, "def", "items", broken)
    batch_id = put(conn, "items", "the payload", items=list(range(20)), spread=4, max_attempts=1)
    drain(told.app, dsn)
    assert look(conn, batch_id).status == "failed"
    assert [(failure.id, failure.payload) for failure in told.failures] == [(batch_id, "the payload")]


def test_a_batch_whose_worker_died_is_told_by_the_worker_that_rescues_it(dsn: str, conn: Conn) -> None:
    told = Told()
    dead = rows.processing(conn, kind="of nobody here", payload={"a": 1}, max_attempts=1).id
    again = rows.processing(conn, kind="of nobody here", max_attempts=2).id
    for batch_id in (dead, again):
        rows.expire_lease(conn, batch_id)
    with running_worker(told.app, dsn, lease_seconds=3):
        await_status(conn, dead, "failed")
        await_status(conn, again, "ready")
        wait_until(lambda: told.failures, 10, "the hook")
    [failure] = told.failures
    assert (failure.id, failure.kind, failure.payload, failure.traceback) == (dead, "of nobody here", {"a": 1}, None)
    assert failure.error.startswith("worker died: worker-1 did not renew its lease; no attempts left")


def test_an_error_of_a_failure_hook_is_only_logged_and_the_others_are_called(dsn: str, conn: Conn) -> None:
    app, seen = batchq.App(), []

    @app.on_failure
    def fail(failure: batchq.Failure) -> None:
        raise SystemExit("no")

    @app.on_failure
    async def fail_async(failure: batchq.Failure) -> None:
        raise ValueError("no")

    app.on_failure(lambda failure: seen.append(failure.id))
    register(app, "def", "work", lambda _: 1 / 0)
    ids = [put(conn, "work", max_attempts=1) for _ in range(3)]
    drain(app, dsn)
    assert sorted(seen) == ids


def test_a_slow_hook_holds_up_no_batch(dsn: str, conn: Conn) -> None:
    app, go_on, seen = batchq.App(), threading.Event(), []

    @app.on_failure
    def slow(failure: batchq.Failure) -> None:
        go_on.wait(20)
        seen.append(failure.id)

    register(app, "def", "work", lambda batch: 1 // batch.payload)
    with running_worker(app, dsn):
        ids = [put(conn, "work", 0, max_attempts=1) for _ in range(3)]
        await_status(conn, ids[-1], "failed")
        await_status(conn, put(conn, "work", 1), "completed")
        assert not seen
        go_on.set()
    assert sorted(seen) == ids


def test_a_hook_that_does_not_end_does_not_keep_the_worker(dsn: str, conn: Conn) -> None:
    app, go_on = batchq.App(), threading.Event()
    app.on_failure(lambda _: go_on.wait(60))
    register(app, "def", "work", lambda _: 1 / 0)
    put(conn, "work", max_attempts=1)
    before = time.monotonic()
    drain(app, dsn, shutdown_seconds=1)
    assert time.monotonic() - before < 10
    go_on.set()


def test_a_doubtful_failure_is_told_only_if_the_row_says_failed(dsn: str, conn: Conn) -> None:
    told = Told()
    worker = Worker(told.app, batchq.Settings.load(dsn=dsn))
    hooks = worker._hooks._failures
    assert hooks is not None
    taken = rows.processing(conn, kind="work", payload={"n": 1})
    failed = rows.processing(conn, kind="work", payload={"n": 2})
    rows.finish(conn, Finish(failed.id, failed.token, "failed", None, '{"error": "as told"}'))
    for one in (taken, failed):
        hooks.put(Failed("default", one.id, 1, is_sure=False))
    hooks.put(Failed("default", 999_999, 1))  # it is gone
    hooks.close()
    hooks.run()
    hooks._link.close()
    assert [(failure.id, failure.error) for failure in told.failures] == [(failed.id, "as told")]


def test_failures_are_told_after_the_connection_was_lost(dsn: str, conn: Conn) -> None:
    told = Told()
    worker = Worker(told.app, batchq.Settings.load(dsn=dsn))
    hooks = worker._hooks._failures
    assert hooks is not None
    ids = [rows.finished(conn, "failed", error='{"error": "as told"}', kind="work") for _ in range(2)]
    hooks.close()
    for batch_id in ids:
        hooks.put(Failed("default", batch_id, 1))
        hooks.run()
        assert hooks._link.conn is not None
        conn.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
    hooks._link.close()
    assert [failure.id for failure in told.failures] == ids


def test_a_failure_whose_commit_was_interrupted_is_told_once(dsn: str, conn: Conn) -> None:
    told = Told()
    worker = Worker(told.app, batchq.Settings.load(dsn=dsn), drain=True)
    run, interrupted = worker.finisher.link.run, []

    def run_and_lose_the_first_answer(*arguments: Any) -> Any:
        found = run(*arguments)
        if not interrupted:
            interrupted.append(True)
            raise OutcomeUnknown("the answer to COMMIT was lost")
        return found

    worker.finisher.link.run = run_and_lose_the_first_answer  # type: ignore[method-assign]
    batch_id = put(conn, "work", "bad", max_attempts=1)
    worker.run()
    assert interrupted
    assert [failure.id for failure in told.failures] == [batch_id]


def test_beyond_a_limit_failures_are_only_logged(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "MOST_WAITING", 2)
    worker = Worker(Told().app, batchq.Settings.load(dsn=dsn))
    hooks = worker._hooks._failures
    assert isinstance(hooks, FailureHooks)
    for number in range(5):
        hooks.put(Failed("default", number, 1))
    assert len(hooks._waiting) == 2


# ------------------------------------------------------------------------------------------------------------ Sentry


class Recording(Transport):
    """Sentry's transport that keeps what it should send."""

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.events: list[dict[str, Any]] = []

    def capture_envelope(self, envelope: Any) -> None:
        """Keep the event."""
        if (event := envelope.get_event()) is not None:
            self.events.append(event)


@pytest.fixture
def sentry() -> Iterator[Recording]:
    """Return what records, and end Sentry afterwards."""
    recording = Recording()
    sentry_sdk.init(dsn="http://key@localhost/1", transport=recording, default_integrations=False)
    yield recording
    sentry_sdk.get_client().close()
    sentry_sdk.init()


@both_styles
def test_sentry_gets_the_errors_of_handlers_with_the_batch(dsn: str, conn: Conn, style: str, sentry: Recording) -> None:
    app = batchq.App()

    def report(batch: batchq.Batch) -> Iterator[None]:
        with sentry_sdk.new_scope() as scope:
            scope.set_context("batch", {"id": batch.id, "kind": batch.kind, "attempt": batch.attempt})
            try:
                yield
            except Exception as error:
                if not isinstance(error, batchq.BatchqError):
                    sentry_sdk.capture_exception(error)
                raise

    def work(batch: batchq.Batch) -> None:
        raise ValueError("no") if batch.payload else batchq.Snooze(60)

    register(app, style, "work", work)
    add_around(app, style, report)
    put(conn, "work", False)
    batch_id = put(conn, "work", True, max_attempts=1)
    drain(app, dsn)
    [event] = sentry.events
    assert event["exception"]["values"][-1]["type"] == "ValueError"
    assert event["contexts"]["batch"] == {"id": batch_id, "kind": "work", "attempt": 1}


def test_sentry_gets_final_failures(dsn: str, conn: Conn, sentry: Recording) -> None:
    told = Told()

    @told.app.on_failure
    def report(failure: batchq.Failure) -> None:
        sentry_sdk.capture_message(f"{failure.kind} failed: {failure.error}", level="error")

    put(conn, "work", "bad", max_attempts=2)
    drain(told.app, dsn)
    assert [event["message"] for event in sentry.events] == ["work failed: ValueError: bad"]


if __name__ == "__main__":
    run_alone(__file__)
