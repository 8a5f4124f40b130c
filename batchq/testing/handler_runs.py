"""Run one handler without a database: the worker's own code around it, and records instead of statements."""

import asyncio
import contextvars
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from batchq.app import App, Handler
from batchq.batch.claimed import ClaimedBatch, Needed
from batchq.common.text import json_text
from batchq.errors import ConfigError, InvalidInput
from batchq.postgres.statements.claims import ClaimedRow
from batchq.testing.no_database import Unstored, json_or_none
from batchq.testing.recording import BatchFailed, Recorder, ended_as, error_of
from batchq.testing.same_session import psycopg_of, psycopg_of_async, refuse_in_event_loop, same_session
from batchq.worker.execution import Outcome, run, run_async

Status = Literal["completed", "failed", "cancelled", "retried", "snoozed"]


class Checkpoint(NamedTuple):
    """A checkpoint that the handler wrote: its cursor, and how many items were done and failed by then."""

    cursor: Any
    items_done: int
    items_failed: int


@dataclass(frozen=True)
class FailedItem:
    """An item that failed or snoozed: its position in the list, its value, and the error in one line.

    snoozed_seconds: None if it failed.
    """

    index: int
    item: Any
    error: str
    is_retryable: bool
    snoozed_seconds: float | None


@dataclass(frozen=True)
class HandlerRun:
    """How one attempt of a handler ended.

    status: completed, failed, cancelled, retried (the attempt failed, and another one is left) or snoozed (the attempt
    does not count). result: JSON, as it would be stored. error: in one line; also why a batch was cancelled. raised:
    the exception of the handler that made the attempt fail; None where *error* is batchq's own. delay_seconds: until
    the batch runs again. cursor: of the last checkpoint.
    """

    status: Status
    result: Any
    error: str | None
    raised: BaseException | None
    delay_seconds: float | None
    cursor: Any
    items_done: int
    items_failed: int
    failed_items: tuple[FailedItem, ...]
    checkpoints: tuple[Checkpoint, ...]


def run_handler(
    handler: App | Callable[..., Any],
    kind: str | None = None,
    *,
    payload: Any = None,
    items: Iterable[Any] | None = None,
    attempt: int = 1,
    max_attempts: int = 5,
    cursor: Any = None,
    key: str | None = None,
    queue: str = "default",
    max_failed_items: int = 0,
    needed: Iterable[Needed] = (),
    conn: Any = None,
) -> HandlerRun:
    """Run one attempt of a handler in this thread, without a database, and return how it ended. What the handler raises
    is returned, not raised, except for KeyboardInterrupt and SystemExit.

    *handler*: the app, with the *kind*; or a function that takes the batch. Item handlers, models and backoffs are
    known to the app only. *payload*, *items* and *cursor* become JSON and are read from it, as in a worker; *needed* is
    what batch.needed returns; the other options are columns of batchq.batches.

    *conn*: a connection of the test, as for `drain`. Blocks of batch.transaction() and chunk.transaction() run on it,
    in a savepoint; what batchq itself writes is only recorded. Without it, a block that uses its connection is refused
    with NoDatabaseError. Raises InvalidInput for options that do not fit, ConfigError for a kind without a handler.
    """
    refuse_in_event_loop("run_handler")
    options = {name: value for name, value in locals().items() if name not in ("handler", "kind", "conn")}
    attempted = _Attempt(_handler_of(handler, kind), **options)
    lent = nullcontext() if conn is None else same_session(psycopg_of(conn), attempted.unstored.answer)
    with lent as attempted.unstored.session:
        if attempted.handler.is_async:
            outcome = asyncio.run(run_async(attempted.claimed, attempted.handler))
        else:
            outcome = contextvars.copy_context().run(run, attempted.claimed, attempted.handler)
    return attempted.ended(outcome)


async def run_handler_async(
    handler: App | Callable[..., Any], kind: str | None = None, *, conn: Any = None, **options: Any
) -> HandlerRun:
    """Async version of `run_handler`, with the same options, in the event loop of the test. *conn*: an async one, as
    for `drain_async`. A ``def`` handler runs in a thread."""
    attempted = _Attempt(_handler_of(handler, kind), **options)
    lent = nullcontext() if conn is None else same_session(await psycopg_of_async(conn), attempted.unstored.answer)
    with lent as attempted.unstored.session:
        if attempted.handler.is_async:
            ran = run_async(attempted.claimed, attempted.handler)
        else:
            ran = asyncio.to_thread(run, attempted.claimed, attempted.handler)
        outcome = await asyncio.create_task(ran)
    return attempted.ended(outcome)


def _handler_of(handler: App | Callable[..., Any], kind: str | None) -> Handler:
    """Return the handler of an app's kind, or one that calls a function with the batch. Raises ConfigError."""
    if not isinstance(handler, App):
        app = App()
        app.handler(kind or str(getattr(handler, "__name__", "handler")))(handler)
        return next(iter(app.handlers.values()))
    if kind is None or kind not in handler.handlers:
        known = ", ".join(map(repr, handler.handlers)) or "none"
        raise ConfigError(f"the app has no handler of the kind {kind!r}; there are: {known}")
    return handler.handlers[kind]


class _Attempt:
    """One attempt: the batch, its handler, and what is recorded of both."""

    def __init__(
        self,
        handler: Handler,
        *,
        payload: Any = None,
        items: Iterable[Any] | None = None,
        attempt: int = 1,
        max_attempts: int = 5,
        cursor: Any = None,
        key: str | None = None,
        queue: str = "default",
        max_failed_items: int = 0,
        needed: Iterable[Needed] = (),
    ) -> None:
        if not 1 <= attempt <= max_attempts:
            raise InvalidInput(f"attempt is a number from 1 to max_attempts, {max_attempts}, not {attempt!r}")
        self.recorder = Recorder()
        self.handler = replace(self.recorder.recorded_handler(handler), sealed=False)  # nothing is stored here
        self.items = None if items is None else json_or_none(json_text(list(items), "an item"))
        self.unstored = Unstored(self.items or [], list(needed))
        total = None if self.items is None else len(self.items)
        row = ClaimedRow(
            1, handler.kind, attempt, max_attempts, json_text({} if payload is None else payload, "the payload"),
            None if cursor is None else json_text(cursor, "the cursor"), total, 0, 0, max_failed_items, None, 0.0,
            key=key, spread=1,
        )  # fmt: skip
        self.claimed: ClaimedBatch = self.unstored.claim(row, queue)

    def ended(self, outcome: Outcome) -> HandlerRun:
        """Return how the attempt ended. Raises what ends the test, and NoDatabaseError."""
        error, claimed, unstored = self.recorder.end(self.claimed, outcome), self.claimed, self.unstored
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise error
        if unstored.misused is not None:
            raise unstored.misused
        ended: Any = (
            ended_as(claimed, outcome) or "retried"
        )  # by another worker: the handler says that it lost the lease
        all_done = outcome.all_done or claimed.completed
        left = (claimed.items_total or 0) - claimed.items_failed
        return HandlerRun(
            status=ended,
            result=json_or_none(outcome.result or unstored.result),
            error=error_of(outcome),
            raised=None if isinstance(error, BatchFailed) else error,
            delay_seconds=outcome.delay_seconds,
            cursor=claimed.cursor,
            items_done=left if all_done else claimed.items_done,
            items_failed=claimed.items_failed,
            failed_items=tuple(
                FailedItem(index, (self.items or [])[index], one.error, one.retryable, one.delay_seconds)
                for index, one in sorted(unstored.failures.items())
            ),
            checkpoints=tuple(
                Checkpoint(json_or_none(one.cursor), one.done, one.failed) for one in unstored.checkpoints
            ),
        )
