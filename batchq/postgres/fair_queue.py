"""A fair queue before a connection pool: as many borrowers as it has connections, the others in order of arrival.

A pool in use is not an outage. psycopg_pool limits each wait, and a borrower that asks again is last in its queue.
With this queue before it, only a borrower with a place waits for the pool, namely for a connection to be made.
"""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SOON_SECONDS = 0.2

Callback = Callable[[], object]


class FairQueue:
    """*size* places. A borrower holds one for up to *max_hold_seconds*: then its connection is closed."""

    def __init__(self, size: int, max_hold_seconds: float) -> None:
        self.free = size
        self.waiting: deque[Callback] = deque()
        self.in_use_since: dict[object, float] = {}  # by connection
        self.last_released_at = float("-inf")
        self.on_advance: Callback = lambda: None
        self._size = size
        self._max_hold_seconds = max_hold_seconds
        self._lock = threading.Lock()
        self._hold_seconds = SOON_SECONDS  # how long a place is held: a moving average

    def take(self, on_turn: Callback) -> bool:
        """Return whether a place was free; otherwise wait in line: *on_turn* is called once the caller has one."""
        with self._lock:
            if self.free:
                self.free -= 1
                return True
            self.waiting.append(on_turn)
            return False

    def release(self, taken_at: float | None = None) -> None:
        """Pass a place to the first in line. *taken_at*: when it was taken; None if it was not used."""
        now = time.monotonic()
        with self._lock:
            if taken_at is not None:
                self._hold_seconds += (now - taken_at - self._hold_seconds) / 8
                self.last_released_at = now
            if not self.waiting:
                self.free += 1
                return
            on_turn = self.waiting.popleft()
        on_turn()
        self.on_advance()

    def leave(self, on_turn: Callback) -> None:
        """Stop waiting. A place that arrived in the meantime passes to the next in line."""
        with self._lock:
            if is_waiting := on_turn in self.waiting:
                self.waiting.remove(on_turn)
        if is_waiting:
            self.on_advance()
        else:
            self.release()

    @contextmanager
    def using(self, conn: object) -> Iterator[None]:
        """Record that a connection is in use during the block."""
        self.in_use_since[conn] = time.monotonic()
        try:
            yield
        finally:
            del self.in_use_since[conn]

    def is_busy(self) -> bool:
        """Return whether a connection is in use, and has not been for longer than it may be."""
        since = time.monotonic() - self._max_hold_seconds
        return any(at >= since for at in list(self.in_use_since.values()))

    def room(self) -> int:
        """Return how many more borrowers get a place soon: no limit while nobody waits.

        As many may wait as there are places; more where places are held so briefly that more are free within 0.2 s.
        """
        if not self.waiting:
            return sys.maxsize
        hold_seconds = max(self._hold_seconds, time.monotonic() - self.last_released_at)
        return max(0, int(self._size * max(1.0, SOON_SECONDS / hold_seconds)) - len(self.waiting))


class BorrowTimeout:
    """How long a borrower waits: while connections are in use, then for *seconds*; *max_seconds* in total."""

    def __init__(self, queue: FairQueue, seconds: float, max_seconds: float) -> None:
        self._queue = queue
        self._seconds = seconds
        now = time.monotonic()
        self._until = now + seconds
        self._last = now + max_seconds

    def is_over(self) -> bool:
        """Return whether to give up."""
        now = time.monotonic()
        if self._queue.is_busy():
            self._until = now + self._seconds
        return now > min(self._until, self._last)
