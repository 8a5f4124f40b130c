"""How signals stop a worker: the first one gracefully, a further one at once; and nothing keeps it for ever."""

import os
import queue
import signal
import threading
from collections.abc import Callable

from batchq.cli.leaving import leave_after

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SPARE_SECONDS = 3.0


class StopSignals:
    """Catches SIGTERM, SIGINT and SIGHUP from now on; but a SIGHUP that is ignored, as by nohup, stays so.

    Before `follow` a signal ends the process at once, with code 0: nothing is in hand yet. A handler of our own is
    needed for that too: the first process of a container gets no signal that it has no handler for.

    What follows a signal runs in a thread of its own: a signal handler runs in the middle of whatever the main thread
    does, and would wait for ever for a lock that it holds. Putting into a SimpleQueue is safe there.
    """

    def __init__(self) -> None:
        self.signals: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.first: Callable[[], None] | None = None
        self.lock = threading.Lock()
        threading.Thread(target=self.run, name="batchq-signals", daemon=True).start()
        for number in STOPPING:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda number, _: self.signals.put(number))

    def follow(self, first: Callable[[], None], second: Callable[[], None], seconds: float | None = None) -> None:
        """From now on call *first* at the first signal, *second* at each further one.

        With *seconds* the process ends at most so long after the first signal, and SPARE_SECONDS; after a further one
        within those.
        """
        with self.lock:
            self.first, self.second, self.seconds = first, second, seconds

    def run(self) -> None:
        """Follow the signals."""
        self.signals.get()
        with self.lock:
            if self.first is None:
                os._exit(0)
        if self.seconds is not None:
            leave_after(self.seconds + SPARE_SECONDS)
        self.first()
        while self.signals.get():
            if self.seconds is not None:
                leave_after(SPARE_SECONDS)
            self.second()
