"""For tests of programs that use batchq: run handlers and batches in the test, and look at what is enqueued.

See docs/testing.md. Names are imported when first used, so that the pytest plugin costs little where no test uses it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchq.testing.drains import drain, drain_async, running_worker
    from batchq.testing.handler_runs import Checkpoint, FailedItem, HandlerRun, run_handler, run_handler_async
    from batchq.testing.no_database import NoDatabaseError
    from batchq.testing.pending import (
        Enqueued,
        assert_enqueued,
        assert_enqueued_async,
        enqueued,
        enqueued_async,
        refute_enqueued,
        refute_enqueued_async,
    )
    from batchq.testing.recording import BatchFailed, Drained
    from batchq.testing.sealing import encryption_keys
    from batchq.testing.time_travel import travel, travel_async

__all__ = [
    "BatchFailed",
    "Checkpoint",
    "Drained",
    "Enqueued",
    "FailedItem",
    "HandlerRun",
    "NoDatabaseError",
    "assert_enqueued",
    "assert_enqueued_async",
    "drain",
    "drain_async",
    "encryption_keys",
    "enqueued",
    "enqueued_async",
    "refute_enqueued",
    "refute_enqueued_async",
    "run_handler",
    "run_handler_async",
    "running_worker",
    "travel",
    "travel_async",
]

_MODULES = {
    "drains": ("drain", "drain_async", "running_worker"),
    "handler_runs": ("Checkpoint", "FailedItem", "HandlerRun", "run_handler", "run_handler_async"),
    "no_database": ("NoDatabaseError",),
    "pending": (
        "Enqueued",
        "assert_enqueued",
        "assert_enqueued_async",
        "enqueued",
        "enqueued_async",
        "refute_enqueued",
        "refute_enqueued_async",
    ),
    "recording": ("BatchFailed", "Drained"),
    "sealing": ("encryption_keys",),
    "time_travel": ("travel", "travel_async"),
}


if not TYPE_CHECKING:  # else type checkers would believe that every name exists

    def __getattr__(name: str) -> Any:
        for module, names in _MODULES.items():
            if name in names:
                found = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
                return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return __all__
