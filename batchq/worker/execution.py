"""Run one batch: call its handler, and determine the outcome."""

import asyncio
import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from batchq.app import Handler, ItemHandler
from batchq.batch import Batch, callers
from batchq.batch.claimed import ClaimedBatch
from batchq.common import sealed, traces
from batchq.common.forks import end_if_forked
from batchq.common.hidden import OF_THIS_PROGRAM, hide_values_of
from batchq.common.log import current_batch, get_logger
from batchq.common.sealed import MARK, MARK_WITHIN
from batchq.common.text import error_object, message_object, message_of, one_line
from batchq.errors import (
    Cancel,
    CannotOpen,
    DatabaseAway,
    Interrupted,
    InvalidInput,
    KeyMissing,
    LeaseLost,
    Snooze,
    StopRequested,
    Throttled,
    TimedOut,
    of_group,
)
from batchq.postgres.statements import inputs
from batchq.postgres.transactions import is_conflict
from batchq.retry import Backoff
from batchq.worker.items import run_items, run_items_async, validate
from batchq.worker.spread import PartFailed, parts_wanted, refuse_spread, spread

Result = TypeVar("Result")
_RETURNED = "what the handler returned"
_log = get_logger()


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a claim of a batch ended, for the finisher to write.

    status: completed, failed, cancelled, or pending (again, after delay_seconds; None keeps its run_at).
    is_release: the attempt is not counted. all_done: count every item that did not fail as done. result, error: JSON
    text. written: there is nothing left to write.
    """

    status: str
    result: str | None = None
    error: str | None = None
    delay_seconds: float | None = None
    is_release: bool = False
    all_done: bool = False
    written: bool = False


COMPLETED = Outcome("completed")
RELEASED = Outcome("pending", is_release=True)
WRITTEN = Outcome("written", written=True)


def run(claimed: ClaimedBatch, handler: Handler) -> Outcome:
    """Run a ``def`` handler in this thread. Raises nothing."""
    current_batch.set(claimed)
    result = None
    try:
        if (payload := claimed.row.payload) is None:
            claimed.load()
            payload = claimed.row.payload or ""
        if handler.sealed or payload.find(MARK, 0, MARK_WITHIN) >= 0:
            claimed.open_input(handler.sealed)
        if OF_THIS_PROGRAM.fields is not None:
            hide_values_of(claimed.row.payload or "")
        batch = Batch(claimed)
        if handler.payload_model is not None:
            batch.payload = validate(handler.payload_model, batch.payload, "payload")
        if isinstance(handler, ItemHandler):
            if (most := parts_wanted(claimed, handler)) > 1 and spread(claimed, most):
                return WRITTEN
            handler.run(batch) if handler.run else run_items(claimed, batch, handler)
        else:
            if claimed.row.spread is not None:
                refuse_spread(claimed.row.spread, handler)
            result = handler.function(batch)
        end_if_forked()
        if claimed.open_transaction is not None:
            _refuse_open_transaction(claimed)
        return returned(claimed, handler, result)
    except BaseException as error:
        end_if_forked()
        if (left := claimed.open_transaction) is not None and left.state == "in block":
            with contextlib.suppress(BaseException):
                left.__exit__(type(error), error, error.__traceback__)
        return safely(raised, claimed, handler, error)


async def run_async(claimed: ClaimedBatch, handler: Handler) -> Outcome:
    """Run an ``async def`` handler in this task. Raises nothing, not even CancelledError."""
    current_batch.set(claimed)
    result = None
    try:
        if (payload := claimed.row.payload) is None:
            await claimed.claim.runtime.connections.in_thread(claimed.load)
            payload = claimed.row.payload or ""
        if handler.sealed or payload.find(MARK, 0, MARK_WITHIN) >= 0:
            claimed.open_input(handler.sealed)
        if OF_THIS_PROGRAM.fields is not None:
            hide_values_of(claimed.row.payload or "")
        batch = Batch(claimed)
        if handler.payload_model is not None:
            batch.payload = validate(handler.payload_model, batch.payload, "payload")
        if isinstance(handler, ItemHandler):
            most = parts_wanted(claimed, handler)
            if most > 1 and await _in_thread(claimed, partial(spread, claimed, most)):
                return WRITTEN
            await (handler.run(batch) if handler.run else run_items_async(claimed, batch, handler))
        else:
            if claimed.row.spread is not None:
                refuse_spread(claimed.row.spread, handler)
            result = await handler.function(batch)
        end_if_forked()
        if claimed.open_transaction is not None:
            _refuse_open_transaction(claimed)
        return await _off_the_loop(claimed, lambda: returned(claimed, handler, result))
    except BaseException as error:
        end_if_forked()
        if (left := claimed.open_transaction) is not None and left.state == "in block":
            with contextlib.suppress(BaseException):
                await left.__aexit__(type(error), error, error.__traceback__)
        # No local name for the error: its traceback refers to this frame, and only the collector would free the two.
        return await _off_the_loop(claimed, partial(safely, raised, claimed, handler, error))


def run_traced(claimed: ClaimedBatch, handler: Handler) -> Outcome:
    """`run` in a span."""
    span = traces.begin(claimed.kind, claimed.whole_queue, claimed.id, claimed.attempt, claimed.row.trace_context)
    outcome = run(claimed, handler)
    traces.end(span, _error_for_trace(claimed, outcome))
    return outcome


async def run_async_traced(claimed: ClaimedBatch, handler: Handler) -> Outcome:
    """`run_async` in a span."""
    span = traces.begin(claimed.kind, claimed.whole_queue, claimed.id, claimed.attempt, claimed.row.trace_context)
    outcome = await run_async(claimed, handler)
    traces.end(span, _error_for_trace(claimed, outcome))
    return outcome


def _error_for_trace(claimed: ClaimedBatch, outcome: Outcome) -> str | None:
    """Return why an attempt failed or its work was lost, as an object of batchq.batches.errors; None if neither."""
    if isinstance(claimed.interrupt, LeaseLost | TimedOut):
        return error_object(claimed.interrupt)
    return None if outcome.status == "cancelled" else outcome.error


async def _in_thread(claimed: ClaimedBatch, function: Callable[[], Result]) -> Result:
    return await asyncio.shield(claimed.claim.runtime.connections.in_thread(function))


async def _off_the_loop(claimed: ClaimedBatch, decide: Callable[[], Outcome]) -> Outcome:
    """Return what *decide* returns, called in a thread where it queries the database: for failed items, a lost
    lease, a write in doubt."""
    if claimed.items_failed or claimed.interrupt is not None or claimed.in_doubt is not None:
        return await _in_thread(claimed, decide)
    return decide()


def _refuse_open_transaction(claimed: ClaimedBatch) -> None:
    """Raise InvalidInput if the handler has entered a transaction by hand and not left it."""
    if claimed.open_transaction is not None and claimed.open_transaction.state == "in block":
        raise InvalidInput(
            f"the handler of batch {claimed.id} returned with a transaction still open; open it in a `with` block"
        )


# ------------------------------------------------------------------------------------------------------- the outcome


def returned(claimed: ClaimedBatch, handler: Handler, result: Any) -> Outcome:
    """Return the outcome of a handler that returned *result*."""
    if claimed.in_doubt is not None:
        callers.settle(claimed)
    if claimed.left_to_finish == "nothing":
        return WRITTEN
    if claimed.left_to_finish == "completion" and not claimed.all_items_worked:
        return _left_early(claimed, handler)
    if claimed.items_failed:
        return _with_failed_items(claimed, handler, result)
    all_done = claimed.items_total is not None and claimed.left_to_finish != "completion"
    if result is None and not all_done:
        return COMPLETED
    return Outcome("completed", claimed.result_text(result, _RETURNED), all_done=all_done)


def _left_early(claimed: ClaimedBatch, handler: Handler) -> Outcome:
    """Return the outcome of a handler that returned before all items were processed: another attempt continues."""
    if claimed.stop_requested:
        return RELEASED
    tried = claimed.items_done + claimed.items_failed
    message = f"the handler returned after {tried} of {claimed.items_total} items; iterate to the end of chunks()"
    return _failed_attempt(claimed, handler, message, message_object(message))


def _with_failed_items(claimed: ClaimedBatch, handler: Handler, result: Any) -> Outcome:
    """Return the outcome of a batch with failed items: retried for those or, by its tolerance, completed or failed."""
    left = claimed.claim.runtime.connections.read(inputs.left_items, claimed.queue, claimed.id)
    if left.snoozed_seconds is not None:
        _log.info("batch waits for snoozed items", seconds=round(max(left.snoozed_seconds, 0), 1))
        return Outcome("pending", delay_seconds=max(left.snoozed_seconds, 0), is_release=True)
    first_error = sealed.shortened(left.first_error or "None")
    message = f"{claimed.items_failed} of {claimed.items_total} items failed; the first: {first_error}"
    if left.retryable and claimed.attempt < claimed.max_attempts:
        return _retried(claimed, handler, message, message_object(message))
    if claimed.items_failed <= claimed.row.max_failed_items:
        return Outcome("completed", claimed.result_text(result, _RETURNED))
    return _failed(message, message_object(message))


def safely(
    decide: Callable[[ClaimedBatch, Handler, BaseException], Outcome],
    claimed: ClaimedBatch,
    handler: Handler,
    error: BaseException,
) -> Outcome:
    """Return the outcome by *decide*; if that raises, too, a failed attempt. A slot must survive its handlers."""
    try:
        return decide(claimed, handler, error)
    except BaseException as second:
        _log.error("the outcome could not be determined", error=line_of(claimed, second))
        text = message_object(
            f"{line_of(claimed, error)} (and determining the outcome raised: {line_of(claimed, second)})"
        )
        if claimed.attempt < claimed.max_attempts:
            return Outcome("pending", error=text, delay_seconds=Backoff().delay_seconds(claimed.attempt))
        return Outcome("failed", error=text)


def raised(claimed: ClaimedBatch, handler: Handler, error: BaseException) -> Outcome:
    """Return the outcome of a handler that raised *error*."""
    error = of_group(_cause_of_cancellation(claimed, error))
    if claimed.in_doubt is not None:
        with contextlib.suppress(LeaseLost):
            callers.was_committed(claimed)
    if claimed.completed:
        _log.error("handler failed after its batch was completed", error=line_of(claimed, error))
        return WRITTEN
    conflicts = claimed.claim.runtime.conflicts
    if is_conflict(error) and (delay := conflicts.delay_seconds(claimed.id)) is not None:
        _log.warning("batch conflicted", error=line_of(claimed, error), retry_in_seconds=round(delay, 1))
        return Outcome("pending", delay_seconds=delay, is_release=True)
    match error:
        case StopRequested() | DatabaseAway():
            _log.info("batch released", reason=one_line(error))
            return RELEASED
        case LeaseLost():
            _log.warning("lease lost", error="LeaseLost", status=_status_now(claimed))
            return WRITTEN
        case TimedOut():
            return WRITTEN  # the keeper has ended the attempt
        case Throttled():
            claimed.claim.runtime.throttle(claimed.whole_queue, claimed.kind, claimed.row.key, error)
            return Outcome("pending", delay_seconds=error.seconds, is_release=True)
        case Snooze():
            _log.info("batch snoozed", seconds=error.seconds)
            return Outcome("pending", delay_seconds=error.seconds, is_release=True)
        case Cancel():
            return _cancelled(claimed, message_of(error))
        case InvalidInput():
            return _failed(line_of(claimed, error), object_of(claimed, error))
    return failed_attempt(claimed, handler, error)


def _cause_of_cancellation(claimed: ClaimedBatch, error: BaseException) -> BaseException:
    """Return why a coroutine was cancelled, or *error* itself."""
    if isinstance(error, asyncio.CancelledError) and claimed.interrupt is not None:
        return claimed.interrupt
    return error


def _status_now(claimed: ClaimedBatch) -> str:
    """Return the status of a batch whose claim is lost, for the log."""
    try:
        return claimed.claim.runtime.connections.read(inputs.status_of, claimed.queue, claimed.id) or "gone"
    except Exception as error:
        return f"unknown ({one_line(error)})"


def failed_attempt(claimed: ClaimedBatch, handler: Handler, error: BaseException) -> Outcome:
    """Return the outcome of a failed attempt: retried, or failed if it was the last one."""
    return _failed_attempt(claimed, handler, line_of(claimed, error), object_of(claimed, error))


def _failed_attempt(claimed: ClaimedBatch, handler: Handler, message: str, error: str) -> Outcome:
    if claimed.attempt < claimed.max_attempts:
        return _retried(claimed, handler, message, error)
    return _failed(message, error)


def _retried(claimed: ClaimedBatch, handler: Handler, message: str, error: str) -> Outcome:
    """Return the outcome "pending again, after the backoff"."""
    delay_seconds = handler.backoff.delay_seconds(claimed.attempt)
    _log.warning("attempt failed", error=message, retry_in_seconds=round(delay_seconds, 1))
    return Outcome("pending", error=error, delay_seconds=delay_seconds)


def _failed(message: str, error: str) -> Outcome:
    """Return the outcome "failed", which is final."""
    _log.error("batch failed", error=message)
    return Outcome("failed", error=error)


def _cancelled(claimed: ClaimedBatch, reason: str) -> Outcome:
    text = message_object(f"cancelled: {reason}")
    if claimed.keys is not None:
        reason = claimed.keys.plain_line("")
        text = _sealed_object(claimed, f"cancelled: {reason}", text)
    _log.info("batch cancelled", reason=reason)
    return Outcome("cancelled", error=text)


# ------------------------------------------------------------------------------------------ errors of a sealed batch

_WITHOUT_VALUES = (KeyMissing, CannotOpen, PartFailed, Interrupted)  # their messages are batchq's own


def line_of(claimed: ClaimedBatch, error: BaseException) -> str:
    """Return an error in one line for logs; of a sealed batch, only its type and the name of the key."""
    line = one_line(error)
    if claimed.keys is None or isinstance(error, _WITHOUT_VALUES):
        return line
    return claimed.keys.plain_line(line)


def object_of(claimed: ClaimedBatch, error: BaseException) -> str:
    """Return the JSON object of batchq.batches.errors for *error*; of a sealed batch, with message and traceback
    sealed."""
    if claimed.keys is None:
        return error_object(error)
    if isinstance(error, _WITHOUT_VALUES):
        return message_object(one_line(error))
    return _sealed_object(claimed, line_of(claimed, error), error_object(error))


def _sealed_object(claimed: ClaimedBatch, line: str, text: str) -> str:
    """Return an object of batchq.batches.errors with *line* for everybody, and the object *text* sealed."""
    assert claimed.keys is not None  # noqa: S101 (for the type checker)
    envelope = json.loads(claimed.keys.seal(text, claimed.kind, "error"))
    return json.dumps({"error": line, "sealed": envelope}, ensure_ascii=False)


def timed_out(claimed: ClaimedBatch, seconds: float) -> TimedOut:
    """Return the error of an attempt that ran for more than *seconds*."""
    return TimedOut(f"batch {claimed.id} ran for more than {seconds:g} s")
