"""Tasks as handlers: each attempt of a batch calls the task's function, between Django's signals."""

import inspect
from collections.abc import Callable
from traceback import format_exception
from typing import Any

from asgiref.sync import sync_to_async
from django.utils import timezone

from batchq.app import App
from batchq.batch import Batch
from batchq.contrib.django.backend import BatchqBackend
from batchq.contrib.django.connections import fresh_connections
from batchq.contrib.django.interface import TaskContext, TaskError, TaskResultStatus, normalize_json, signals
from batchq.contrib.django.results import change, result_of
from batchq.errors import Cancel, DatabaseAway, Interrupted, InvalidInput, LeaseLost, Snooze, Throttled, of_group
from batchq.postgres.statements.task_rows import read_task_row
from batchq.postgres.transactions import is_conflict

_LATER = (Interrupted, Snooze, Throttled, DatabaseAway)


def add_task(app: App, task: Any, backend: str) -> None:
    """Register the handler of a task, whose results name *backend*. Raises ConfigError if its kind has one."""
    app.handler(task.module_path)(fresh_connections(_handler_of(task, backend)))


def _handler_of(task: Any, backend: str) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(task.func):

        async def run_async_task(batch: Batch) -> Any:
            read = batch._claimed.claim.runtime.connections.in_thread
            result = await read(lambda: _result_of(batch, task, backend))
            return await _run_async(batch, task, result)

        return run_async_task
    return lambda batch: _run(batch, task, _result_of(batch, task, backend))


def _run(batch: Batch, task: Any, result: Any) -> Any:
    _send(signals.task_started, result)
    try:
        value = _json_of(task.func(*_arguments(task, result), **result.kwargs))
    except BaseException as error:
        if _is_final(batch, error):
            _note_failure(result, error)
            _send(signals.task_finished, result)
        raise
    _note_success(result, value)
    _send(signals.task_finished, result)
    return value


async def _run_async(batch: Batch, task: Any, result: Any) -> Any:
    send = sync_to_async(_send)  # also within `except`: receivers find the exception in sys.exc_info()
    await send(signals.task_started, result)
    try:
        value = _json_of(await task.func(*_arguments(task, result), **result.kwargs))
    except BaseException as error:
        if _is_final(batch, error):
            _note_failure(result, error)
            await send(signals.task_finished, result)
        raise
    _note_success(result, value)
    await send(signals.task_finished, result)
    return value


def _send(signal: Any, result: Any) -> None:
    """Send a signal. An error of a receiver is logged by Django: the attempt does not fail for it."""
    signal.send_robust(sender=BatchqBackend, task_result=result)


def _result_of(batch: Batch, task: Any, backend: str) -> Any:
    """Return the result as this attempt begins. Raises LeaseLost if the batch is gone."""
    row = batch._claimed.claim.runtime.connections.read(read_task_row, batch.id)
    if row is None:
        raise LeaseLost(f"batch {batch.id} is gone")
    return result_of(row, task, backend)


def _arguments(task: Any, result: Any) -> list[Any]:
    return [TaskContext(task_result=result), *result.args] if task.takes_context else result.args


def _json_of(value: Any) -> Any:
    """Return what a task returned as JSON types. Raises InvalidInput, for which a batch fails without a retry."""
    try:
        return normalize_json(value)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"what the task returned cannot be stored as JSON: {error}") from error


def _is_final(batch: Batch, error: BaseException) -> bool:
    """Return whether the batch ends with this error."""
    cause = of_group(error)
    if isinstance(cause, InvalidInput | Cancel):
        return True
    is_ours = batch._claimed.interrupt is None  # else the batch has ended already, or another attempt comes
    comes_again = isinstance(cause, _LATER) or is_conflict(cause)
    return batch.attempt >= batch.max_attempts and is_ours and not comes_again


def _note_failure(result: Any, error: BaseException) -> None:
    path = f"{type(error).__module__}.{type(error).__qualname__}"
    result.errors.append(TaskError(exception_class_path=path, traceback="".join(format_exception(error))))
    change(result, status=TaskResultStatus.FAILED, finished_at=timezone.now())


def _note_success(result: Any, value: Any) -> None:
    change(result, status=TaskResultStatus.SUCCESSFUL, finished_at=timezone.now(), _return_value=value)
