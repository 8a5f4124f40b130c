"""batchq: a job queue that lives in Postgres.

Rows of ``batchq.batches`` are the queue; an `App` maps each kind of batch to the function that handles it.
"""

# First, before anything else is imported: see there.
from batchq.common import program as _program  # noqa: F401

# isort: split
from importlib import import_module
from typing import TYPE_CHECKING, Any

from batchq.common.sealed import use_keys
from batchq.enqueue import (
    enqueue,
    enqueue_async,
    enqueue_each,
    enqueue_each_async,
    enqueue_many,
    enqueue_many_async,
)
from batchq.errors import (
    BatchqError,
    Cancel,
    ConfigError,
    InvalidInput,
    LeaseLost,
    LifespanFailed,
    OutcomeUnknown,
    Snooze,
    StopRequested,
    Throttled,
    TimedOut,
)
from batchq.reach import (
    BatchInfo,
    cancel,
    cancel_async,
    get,
    get_async,
    list_batches,
    list_batches_async,
    retry,
    retry_async,
    wait,
    wait_async,
)

if TYPE_CHECKING:
    from batchq.app import App
    from batchq.batch import Batch, Chunk, Needed
    from batchq.hooks import Failure
    from batchq.retry import Backoff
    from batchq.settings import Settings
    from batchq.worker.worker import Worker

__all__ = [
    "App",
    "Backoff",
    "Batch",
    "BatchInfo",
    "BatchqError",
    "Cancel",
    "Chunk",
    "ConfigError",
    "Failure",
    "InvalidInput",
    "LeaseLost",
    "LifespanFailed",
    "Needed",
    "OutcomeUnknown",
    "Settings",
    "Snooze",
    "StopRequested",
    "Throttled",
    "TimedOut",
    "Worker",
    "cancel",
    "cancel_async",
    "enqueue",
    "enqueue_async",
    "enqueue_each",
    "enqueue_each_async",
    "enqueue_many",
    "enqueue_many_async",
    "get",
    "get_async",
    "list_batches",
    "list_batches_async",
    "retry",
    "retry_async",
    "use_keys",
    "wait",
    "wait_async",
]

# Imported at the first use: a program that only enqueues starts sooner and needs less memory.
_MODULES = {
    "App": "batchq.app",
    "Backoff": "batchq.retry",
    "Batch": "batchq.batch",
    "Chunk": "batchq.batch",
    "Failure": "batchq.hooks",
    "Needed": "batchq.batch",
    "Settings": "batchq.settings",
    "Worker": "batchq.worker.worker",
}

if not TYPE_CHECKING:  # else type checkers would believe that every name exists

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module 'batchq' has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_MODULES[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
