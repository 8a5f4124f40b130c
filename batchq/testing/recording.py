"""What a run of batches has led to: how many ended how, and the errors that handlers raised."""

import functools
import json
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from batchq.app import App, Handler
from batchq.batch.claimed import ClaimedBatch
from batchq.common.log import current_batch
from batchq.errors import BatchqError, Cancel, Interrupted, Snooze, Throttled, of_group
from batchq.worker.execution import RELEASED, Outcome

_NO_FAILURES = (Cancel, Snooze, Throttled, Interrupted)


class BatchFailed(BatchqError):
    """A batch failed, and not because its handler raised: for example, its payload did not fit the handler's model."""


@dataclass(frozen=True)
class Drained:
    """How often runs of batches ended in which way; a batch that was retried and then completed counts in both.

    retried: the attempt failed, and another one is left. snoozed: pending again without a counted attempt (Snooze,
    Throttled, a conflict such as a deadlock). errors: what made attempts fail, in order: the exceptions that handlers
    raised, else a `BatchFailed`.
    """

    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    retried: int = 0
    snoozed: int = 0
    errors: tuple[BaseException, ...] = ()


class Recorder:
    """Records errors of handlers and outcomes of batches, in all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._raised: dict[Any, list[BaseException]] = defaultdict(list)
        self._counts: Counter[str] = Counter()
        self._errors: list[BaseException] = []

    def recorded(self, app: App) -> App:
        """Return an app whose handlers do the same, and have what they raise recorded."""
        return replace(app, handlers={kind: self.recorded_handler(one) for kind, one in app.handlers.items()})

    def recorded_handler(self, handler: Handler) -> Handler:
        """Return a handler that does the same, and has what it raises recorded."""
        function = handler.function
        recorded = self._recorded_async(function) if handler.is_async else self._recorded(function)
        return replace(handler, function=recorded)

    def _recorded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            try:
                return function(*args, **options)
            except BaseException as error:
                self._record(error)
                raise

        return call

    def _recorded_async(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        async def call(*args: Any, **options: Any) -> Any:
            try:
                return await function(*args, **options)
            except BaseException as error:
                self._record(error)
                raise

        return call

    def _record(self, error: BaseException) -> None:
        if not isinstance(of_group(error), _NO_FAILURES):
            with self._lock:
                self._raised[current_batch.get()].append(error)

    def end(self, batch: ClaimedBatch, outcome: Outcome) -> BaseException | None:
        """Count how a run of *batch* ended, unless it has not begun; return what made it fail, None if it did not."""
        with self._lock:
            raised = self._raised.pop(batch, [])
            if outcome is RELEASED and not raised:
                return None
            ended = ended_as(batch, outcome)
            if batch.part_of is None and ended is not None:
                self._counts[ended] += 1
            if ended not in ("failed", "retried") and not (raised and batch.completed):
                return None
            error = raised[0] if raised else BatchFailed(f"batch {batch.id} ({batch.kind}): {error_of(outcome)}")
            error.add_note(f"batch {batch.id} ({batch.kind}), attempt {batch.attempt} of {batch.max_attempts}: {ended}")
            self._errors.append(error)
            return error

    def drained(self) -> Drained:
        """Return what has been recorded."""
        return Drained(**self._counts, errors=tuple(self._errors))


def ended_as(batch: ClaimedBatch, outcome: Outcome) -> str | None:
    """Return the field of `Drained` that counts the outcome; None: none does (its parts or another worker go on)."""
    if outcome.written:
        return "completed" if batch.completed else None
    if outcome.status == "pending":
        return "snoozed" if outcome.is_release else "retried"
    return outcome.status


def error_of(outcome: Outcome) -> str | None:
    """Return the error of an outcome, in one line; None without any."""
    return None if outcome.error is None else str(json.loads(outcome.error)["error"])
