"""The states of a worker, from running to gone: drain, stop, leave; and why it was asked to."""

import threading
import time
from enum import Enum, auto


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
