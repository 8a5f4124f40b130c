"""Run one batch: call its handler, and say how it ended."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from batchq.app import Handler, ItemHandler
from batchq.batch import Batch
from batchq.common import traces
from batchq.common.forks import end_if_forked
from batchq.common.log import current_batch, get_logger
from batchq.common.text import MOST_RESULT_BYTES, error_object, json_text, message_object, message_of, one_line
from batchq.errors import Cancel, DatabaseAway, InvalidInput, LeaseLost, Snooze, StopRequested, TimedOut, of_group
from batchq.postgres.statements import inputs
from batchq.postgres.transactions import CONFLICTS
from batchq.retry import Backoff
from batchq.worker.items import run_items, run_items_async, validate

log = get_logger()


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a claim of a batch ended, for the finisher to write.

    status: completed, failed, cancelled, or pending (again, after delay_seconds; None keeps its run_at).
    give_back: the attempt is not counted. all_done: count every item that did not fail as done. result, error: JSON
    text. written: there is nothing left to write.
    """

    status: str
    result: str | None = None
    error: str | None = None
    delay_seconds: float | None = None
    give_back: bool = False
    all_done: bool = False
    written: bool = False


COMPLETED = Outcome("completed")
RELEASED = Outcome("pending", give_back=True)
WRITTEN = Outcome("written", written=True)


def run(batch: Batch, handler: Handler) -> Outcome:
    """Run a ``def`` handler to its end, in this thread. Raises nothing."""
    current_batch.set(batch)
    result = None
    try:
        prepare(batch, handler)
        if isinstance(handler, ItemHandler):
            run_items(batch, handler)
        else:
            result = handler.function(batch)
        end_if_forked()
        refuse_open_transaction(batch)
        return returned(batch, handler, result)
    except BaseException as error:
        end_if_forked()
        if batch.entered is not None:
            with contextlib.suppress(BaseException):
                batch.entered.__exit__(type(error), error, error.__traceback__)
        return safely(raised, batch, handler, error)


async def run_async(batch: Batch, handler: Handler) -> Outcome:
    """Run an ``async def`` handler to its end, in this task. Raises nothing, not even CancelledError."""
    current_batch.set(batch)
    result = None
    try:
        if batch.row.payload is None:
            await batch.claim.runtime.connections.in_thread(batch.load)
        prepare(batch, handler)
        if isinstance(handler, ItemHandler):
            await run_items_async(batch, handler)
        else:
            result = await handler.function(batch)
        end_if_forked()
        refuse_open_transaction(batch)
        return await off_the_loop(batch, lambda: returned(batch, handler, result))
    except BaseException as error:
        end_if_forked()
        if batch.entered is not None:
            with contextlib.suppress(BaseException):
                await batch.entered.__aexit__(type(error), error, error.__traceback__)
        # No local name for the error: its traceback has this frame, and only the collector would find the two.
        return await off_the_loop(batch, partial(safely, raised, batch, handler, error))


def run_traced(batch: Batch, handler: Handler) -> Outcome:
    """Do as `run` does, in a span."""
    span = traces.begin(batch.kind, batch.queue, batch.id, batch.attempt, batch.row.trace_context)
    outcome = run(batch, handler)
    traces.end(span, what_went_wrong(batch, outcome))
    return outcome


async def run_async_traced(batch: Batch, handler: Handler) -> Outcome:
    """Do as `run_async` does, in a span."""
    span = traces.begin(batch.kind, batch.queue, batch.id, batch.attempt, batch.row.trace_context)
    outcome = await run_async(batch, handler)
    traces.end(span, what_went_wrong(batch, outcome))
    return outcome


def what_went_wrong(batch: Batch, outcome: Outcome) -> str | None:
    """Return why an attempt has failed or was for nothing, as an object of batchq.batches.errors; None if neither."""
    if isinstance(batch.interrupt, LeaseLost | TimedOut):
        return error_object(batch.interrupt)
    return None if outcome.status == "cancelled" else outcome.error


async def off_the_loop(batch: Batch, decide: Callable[[], Outcome]) -> Outcome:
    """Decide on the outcome, in a thread where that asks the database (failed items, a lost lease)."""
    if batch.items_failed or batch.interrupt is not None:
        return await asyncio.shield(batch.claim.runtime.connections.in_thread(decide))
    return decide()


def refuse_open_transaction(batch: Batch) -> None:
    """Raise InvalidInput if the handler has begun the block of a transaction by hand, and has not ended it."""
    if batch.entered is not None:
        raise InvalidInput(f"the handler of batch {batch.id} has left its transaction open; use it by `with`")


def prepare(batch: Batch, handler: Handler) -> None:
    """Make the payload ready. Raises InvalidInput if it does not fit its model, LeaseLost."""
    batch.load()
    if handler.payload_model is not None:
        batch.payload = validate(handler.payload_model, batch.payload, "payload")


# -------------------------------------------------------------------------------------------------- how it ended


def returned(batch: Batch, handler: Handler, result: Any) -> Outcome:
    """Return the outcome of a handler that came to its end."""
    if batch.completed:
        return WRITTEN
    if batch.items_failed:
        return with_failed_items(batch, handler, result)
    if batch.used_chunks and not batch.all_items_worked:
        return left_early(batch, handler)
    all_done = batch.items_total is not None and (batch.ends_with_finish or not batch.used_chunks)
    if result is None and not all_done:
        return COMPLETED
    return Outcome("completed", None if result is None else result_text(result), all_done=all_done)


def result_text(result: Any) -> str:
    """Return the result as JSON text. Raises InvalidInput for what is no JSON, or too large."""
    text = json_text(result, "what the handler returned")
    size = len(text.encode())
    if size > MOST_RESULT_BYTES:
        raise InvalidInput(f"what the handler returned is {size:,} bytes of JSON; at most {MOST_RESULT_BYTES:,}")
    return text


def left_early(batch: Batch, handler: Handler) -> Outcome:
    """Return the outcome of a handler that returned before it had worked every item: another attempt goes on."""
    if batch.stop_requested:
        return RELEASED
    worked = batch.items_done + batch.items_failed
    message = f"the handler returned with {worked} of {batch.items_total} items worked; go on to the end of chunks()"
    if batch.attempt < batch.max_attempts:
        return retried(batch, handler, message, message_object(message))
    return failed(message, message_object(message))


def with_failed_items(batch: Batch, handler: Handler, result: Any) -> Outcome:
    """Return the outcome of a batch some of whose items failed: again for those, or the end, by its tolerance."""
    if batch.used_chunks and not batch.all_items_worked:
        return left_early(batch, handler)
    retryable, first_error = batch.claim.runtime.connections.read(inputs.retryable_items, batch.queue, batch.id)
    message = f"{batch.items_failed} of {batch.items_total} items failed; the first: {first_error}"
    if retryable and batch.attempt < batch.max_attempts:
        return retried(batch, handler, message, message_object(message))
    if batch.items_failed <= batch.max_failed_items:
        return Outcome("completed", None if result is None else result_text(result))
    return failed(message, message_object(message))


def safely(
    decide: Callable[[Batch, Handler, BaseException], Outcome], batch: Batch, handler: Handler, error: BaseException
) -> Outcome:
    """Return what *decide* says of *error*; if that fails too, a failed attempt. A slot must outlive its handlers."""
    try:
        return decide(batch, handler, error)
    except BaseException as second:
        log.error("the outcome could not be told", error=one_line(second))
        text = message_object(f"{one_line(error)} (and telling what follows from it: {one_line(second)})")
        if batch.attempt < batch.max_attempts:
            return Outcome("pending", error=text, delay_seconds=Backoff().delay_seconds(batch.attempt))
        return Outcome("failed", error=text)


def raised(batch: Batch, handler: Handler, error: BaseException) -> Outcome:
    """Return the outcome of a handler that raised *error*."""
    error = of_group(cause_of_cancellation(batch, error))
    if batch.completed:
        log.error("handler failed after its batch was completed", error=one_line(error))
        return WRITTEN
    if isinstance(error, CONFLICTS) and (delay := batch.claim.runtime.conflicts.delay_seconds(batch.id)) is not None:
        log.warning("batch conflicted", error=one_line(error), retry_in_seconds=round(delay, 1))
        return Outcome("pending", delay_seconds=delay, give_back=True)
    match error:
        case StopRequested() | DatabaseAway():
            log.info("batch given back", why=one_line(error))
            return RELEASED
        case LeaseLost():
            log.warning("lease lost", error="LeaseLost", status=status_now(batch))
            return WRITTEN
        case TimedOut():
            return WRITTEN  # the keeper has ended the attempt
        case Snooze():
            log.info("batch snoozed", seconds=error.seconds)
            return Outcome("pending", delay_seconds=error.seconds, give_back=True)
        case Cancel():
            reason = message_of(error)
            log.info("batch cancelled", reason=reason)
            return Outcome("cancelled", error=message_object(f"cancelled: {reason}"))
        case InvalidInput():
            return failed(one_line(error), error_object(error))
    return failed_attempt(batch, handler, error)


def cause_of_cancellation(batch: Batch, error: BaseException) -> BaseException:
    """Return why a coroutine was cancelled, or *error* itself."""
    if isinstance(error, asyncio.CancelledError) and batch.interrupt is not None:
        return batch.interrupt
    return error


def status_now(batch: Batch) -> str:
    """Return what became of a batch that is no longer ours, for the log."""
    try:
        return batch.claim.runtime.connections.read(inputs.status_of, batch.queue, batch.id) or "gone"
    except Exception as error:
        return f"unknown ({one_line(error)})"


def failed_attempt(batch: Batch, handler: Handler, error: BaseException) -> Outcome:
    """Return the outcome of an attempt that failed: another one, or the end."""
    if batch.attempt < batch.max_attempts:
        return retried(batch, handler, one_line(error), error_object(error))
    return failed(one_line(error), error_object(error))


def retried(batch: Batch, handler: Handler, message: str, error: str) -> Outcome:
    """Return the outcome "again, after the back-off"."""
    delay_seconds = handler.backoff.delay_seconds(batch.attempt)
    log.warning("attempt failed", error=message, retry_in_seconds=round(delay_seconds, 1))
    return Outcome("pending", error=error, delay_seconds=delay_seconds)


def failed(message: str, error: str) -> Outcome:
    """Return the outcome "failed for good"."""
    log.error("batch failed", error=message)
    return Outcome("failed", error=error)


def timed_out(batch: Batch, seconds: float) -> TimedOut:
    """Return the error of an attempt that ran for too long."""
    return TimedOut(f"batch {batch.id} ran for more than {seconds:g} s")
