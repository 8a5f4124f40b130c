"""batchq: a job queue that lives in Postgres.

Rows of ``batchq.batches`` are the queue; an `App` maps each kind of batch to the function that handles it.
"""

# First, before anything else is imported: see there.
from batchq.common import program as _program  # noqa: F401

# isort: split
from batchq.app import App
from batchq.batch import Batch, Chunk, Needed
from batchq.enqueue import enqueue, enqueue_async, enqueue_each, enqueue_many
from batchq.errors import (
    BatchqError,
    Cancel,
    ConfigError,
    InvalidInput,
    LeaseLost,
    OutcomeUnknown,
    Snooze,
    StopRequested,
    Throttled,
    TimedOut,
)
from batchq.retry import Backoff
from batchq.settings import Settings
from batchq.worker.worker import Worker

__all__ = [
    "App",
    "Backoff",
    "Batch",
    "BatchqError",
    "Cancel",
    "Chunk",
    "ConfigError",
    "InvalidInput",
    "LeaseLost",
    "Needed",
    "OutcomeUnknown",
    "Settings",
    "Snooze",
    "StopRequested",
    "Throttled",
    "TimedOut",
    "Worker",
    "enqueue",
    "enqueue_async",
    "enqueue_each",
    "enqueue_many",
]
