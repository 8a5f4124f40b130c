"""How signals stop a worker: the first one gracefully, a further one immediately, and both in a limited time."""

import os
import queue
import signal
import threading
from collections.abc import Callable

from batchq.cli.leaving import leave_after

SPARE_SECONDS = 3.0
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopSignals:
    """Catches SIGTERM, SIGINT and SIGHUP from now on. A SIGHUP that is ignored, as under nohup, stays ignored.

    Before `follow`, a signal exits immediately with code 0: nothing is claimed yet. Even that needs a handler, because
    the first process of a container receives no signal for which it has none.

    A thread acts on the signals: a signal handler interrupts the main thread anywhere, and would wait forever for a
    lock that the main thread holds. Putting into a SimpleQueue is safe there.
    """

    def __init__(self) -> None:
        self._signals: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._first: Callable[[], None] | None = None
        self._lock = threading.Lock()
        threading.Thread(target=self._run, name="batchq-signals", daemon=True).start()
        for number in _STOPPING:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda number, _: self._signals.put(number))

    def follow(self, first: Callable[[], None], second: Callable[[], None], seconds: float | None = None) -> None:
        """From now on call *first* at the first signal and *second* at each further one.

        With *seconds*, the process exits at most *seconds* + SPARE_SECONDS after the first signal, and at most
        SPARE_SECONDS after a further one.
        """
        with self._lock:
            self._first, self._second, self._seconds = first, second, seconds

    def _run(self) -> None:
        self._signals.get()
        with self._lock:
            if self._first is None:
                os._exit(0)
        if self._seconds is not None:
            leave_after(self._seconds + SPARE_SECONDS)
        self._first()
        while self._signals.get():
            if self._seconds is not None:
                leave_after(SPARE_SECONDS)
            self._second()
