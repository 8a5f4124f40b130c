"""The states of a worker, from running to gone: drain, stop, leave; and its service threads."""

import threading
import time
from collections.abc import Callable
from enum import Enum, auto

from batchq.common.log import get_logger
from batchq.common.text import one_line

_log = get_logger()


class StopReason(Enum):
    """Why a worker stops."""

    REQUESTED = auto()  # by a signal, or by whoever runs it
    SLOTS_LOST = auto()  # half of a lane's slots: it stops in order to be replaced
    SERVICE_FAILED = auto()  # half a worker does harm


class Lifecycle:
    """Which state a worker is in. Each method may be called from any thread, and again.

    *draining*: it claims nothing more, releases what has not begun, and ends when every outcome is written. *stopping*:
    the same, but handlers have only `shutdown_seconds`. *leaving*: what still runs is released as well, at once.
    """

    def __init__(self) -> None:
        self.draining = threading.Event()
        self.stopping = threading.Event()
        self.leaving = threading.Event()
        self.wake = threading.Event()  # for the claimer: the state has changed, or a lane has room
        self.reasons: set[StopReason] = set()
        self.stopping_since = float("inf")  # monotonic

    def drain(self) -> None:
        """Begin to drain."""
        self.draining.set()
        self.wake.set()

    def stop(self, reason: StopReason | None = None) -> None:
        """Begin to stop; without a reason because nothing is left to do."""
        if reason is not None:
            self.reasons.add(reason)
        self.stopping_since = min(self.stopping_since, time.monotonic())
        self.stopping.set()
        self.wake.set()

    @property
    def wants_replacement(self) -> bool:
        """Whether lost slots are why the worker ends, and nobody has asked it to stop or drain."""
        is_asked = StopReason.REQUESTED in self.reasons or self.draining.is_set()
        return StopReason.SLOTS_LOST in self.reasons and not is_asked


class Services:
    """Threads by name. One that fails, which none must, stops the worker: half a worker does harm."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle
        self._threads: dict[str, threading.Thread] = {}

    def start(self, name: str, run: Callable[[], None]) -> None:
        """Start a service."""

        def guarded() -> None:
            try:
                run()
            except BaseException as error:
                _log.error("service failed", service=name, error=one_line(error))
                self._lifecycle.stop(StopReason.SERVICE_FAILED)

        self._threads[name] = thread = threading.Thread(target=guarded, name=f"batchq-{name}", daemon=True)
        thread.start()

    def have_started(self) -> bool:
        """Return whether any service was started."""
        return bool(self._threads)

    def has_ended(self, name: str, seconds: float) -> bool:
        """Wait for a service to end; return whether it has, or was never started."""
        thread = self._threads.get(name)
        if thread is not None and thread.is_alive():
            thread.join(max(0.0, seconds))
        return thread is None or not thread.is_alive()
