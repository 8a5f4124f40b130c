"""Run batches in a test: by a worker on the test's database, or one after the other in the test's own transaction."""

import asyncio
import contextvars
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from batchq.app import App
from batchq.settings import Settings
from batchq.testing.recording import Drained, Recorder
from batchq.testing.same_session import psycopg_of, psycopg_of_async, refuse_in_event_loop, same_session
from batchq.testing.session_runs import SessionRuns
from batchq.worker.execution import run, run_async
from batchq.worker.lanes import Ended
from batchq.worker.worker import Worker


def drain(app: App, database: Any, raises: bool = True, **settings: Any) -> Drained:
    """Run all ready batches of the app's kinds, also those that handlers enqueue, until none is ready; retries and
    snoozed batches that are not due yet are left. Return how many ended how.

    *database*: a DSN; a worker of this process runs what is committed, several batches concurrently. Or a connection
    (psycopg 3; SQLAlchemy or Django on psycopg 3): batches run one after the other in this thread, on that session and
    in its open transaction, so that the test may roll back all of it; timeouts of handlers and limits are not enforced,
    except those per key, and the app's hooks do not run. In autocommit, each step commits. *settings*: as in
    `Settings`, such as queues=["mail"].

    With *raises*, raises the first exception that a handler raised and that made an attempt fail, after all batches
    have run; `BatchFailed` for a failure that no handler raised. Raises ConfigError, and InvalidInput for another
    kind of connection.
    """
    recorder = Recorder()
    if isinstance(database, str):
        _drain_by_worker(recorder, app, database, settings)
    else:
        _drain_in_session(recorder, app, database, settings)
    return _checked(recorder, raises)


async def drain_async(app: App, database: Any, raises: bool = True, **settings: Any) -> Drained:
    """Async version of `drain`: for a DSN, psycopg's AsyncConnection, or SQLAlchemy's AsyncConnection or AsyncSession
    on psycopg. ``def`` handlers run in a thread; the event loop is blocked while batchq's own statements run."""
    if isinstance(database, str):
        return await asyncio.to_thread(drain, app, database, raises, **settings)
    recorder = Recorder()
    with same_session(await psycopg_of_async(database)) as session:
        runs = SessionRuns(recorder.recorded(app), session, Settings.load(**settings))
        while (claimed := runs.claim()) is not None:
            handler = runs.handlers[claimed.kind]
            ran = run_async(claimed, handler) if handler.is_async else asyncio.to_thread(run, claimed, handler)
            _raise_interrupt(recorder.end(claimed, runs.finish(claimed, await asyncio.create_task(ran))))
    return _checked(recorder, raises)


def _drain_in_session(recorder: Recorder, app: App, database: Any, settings: dict[str, Any]) -> None:
    refuse_in_event_loop("drain")
    with same_session(psycopg_of(database)) as session, asyncio.Runner() as loop:
        runs = SessionRuns(recorder.recorded(app), session, Settings.load(**settings))
        while (claimed := runs.claim()) is not None:
            handler = runs.handlers[claimed.kind]
            if handler.is_async:
                outcome = loop.run(run_async(claimed, handler))
            else:
                outcome = contextvars.copy_context().run(run, claimed, handler)
            _raise_interrupt(recorder.end(claimed, runs.finish(claimed, outcome)))


def _drain_by_worker(recorder: Recorder, app: App, dsn: str, settings: dict[str, Any]) -> None:
    worker = Worker(recorder.recorded(app), Settings.load(dsn=dsn, **settings), drain=True)
    for lane in worker.lanes:
        lane.ended = _recording(recorder, lane.ended)
    worker.run()


def _recording(recorder: Recorder, ended: Ended) -> Ended:
    def end(lane: Any, batch: Any, outcome: Any) -> None:
        recorder.end(batch, outcome)
        ended(lane, batch, outcome)

    return end


def _raise_interrupt(error: BaseException | None) -> None:
    """Raise what ends the test, not only its batch."""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        raise error


def _checked(recorder: Recorder, raises: bool) -> Drained:
    drained = recorder.drained()
    if raises and drained.errors:
        raise drained.errors[0]
    return drained


@contextmanager
def running_worker(app: App, dsn: str, **settings: Any) -> Iterator[Worker]:
    """Run a worker in a thread while the block runs, then stop it gracefully. *settings*: as in `Settings`.

    Raises what the worker raised, for example ConfigError.
    """
    worker = Worker(app, Settings.load(dsn=dsn, **settings))
    raised: list[BaseException] = []

    def work() -> None:
        try:
            worker.run()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work, name="batchq-worker")
    thread.start()
    try:
        yield worker
    finally:
        worker.stop()
        thread.join()
    if raised:
        raise raised[0]
