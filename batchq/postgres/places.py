"""Who may ask a pool for a connection: as many borrowers as it has connections, the others in order of arrival.

A pool in use is not an outage. psycopg_pool bounds each wait, and a borrower that asks again is last in its queue. With
places before it, whoever waits for the pool waits for a connection to be made; all others wait in line for a place.
"""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SOON_SECONDS = 0.2

Go = Callable[[], object]


class Places:
    """*size* places. A borrower holds one for *most_seconds* at most: then its connection is cut."""

    def __init__(self, size: int, most_seconds: float) -> None:
        self.size = size
        self.most_seconds = most_seconds
        self.lock = threading.Lock()
        self.free = size
        self.line: deque[Go] = deque()
        self.borrowed: dict[object, float] = {}  # connections that are in use, and since when
        self.held_seconds = SOON_SECONDS  # how long a place is held, lately
        self.moved_at = float("-inf")  # when a place was last given back
        self.on_move: Go = lambda: None

    def take(self, go: Go) -> bool:
        """Return whether there was a place; if not, *go* is called when the caller has one. Places go in order."""
        with self.lock:
            if self.free:
                self.free -= 1
                return True
            self.line.append(go)
            return False

    def give_back(self, taken_at: float | None = None) -> None:
        """Give a place to the first in line. *taken_at*: when it was taken; None if it was not used."""
        now = time.monotonic()
        with self.lock:
            if taken_at is not None:
                self.held_seconds += (now - taken_at - self.held_seconds) / 8
                self.moved_at = now
            if not self.line:
                self.free += 1
                return
            go = self.line.popleft()
        go()
        self.on_move()

    def leave(self, go: Go) -> None:
        """Leave the line. A place that came meanwhile goes to the next."""
        with self.lock:
            if is_in_line := go in self.line:
                self.line.remove(go)
        if is_in_line:
            self.on_move()
        else:
            self.give_back()

    @contextmanager
    def using(self, conn: object) -> Iterator[None]:
        """Note that a connection is in use for the block."""
        self.borrowed[conn] = time.monotonic()
        try:
            yield
        finally:
            del self.borrowed[conn]

    def is_busy(self) -> bool:
        """Return whether a connection is in use, and not for longer than it may be."""
        since = time.monotonic() - self.most_seconds
        return any(at >= since for at in list(self.borrowed.values()))

    def room(self) -> int:
        """Return how many more borrowers get on soon: no limit while nobody waits for a place.

        As many may wait as there are places; more where places are held so briefly that more get on within 0.2 s.
        """
        if not self.line:
            return sys.maxsize
        held_seconds = max(self.held_seconds, time.monotonic() - self.moved_at)
        return max(0, int(self.size * max(1.0, SOON_SECONDS / held_seconds)) - len(self.line))


class Patience:
    """How long a borrower waits: while connections are in use, then for *seconds*; in all for *most_seconds*."""

    def __init__(self, places: Places, seconds: float, most_seconds: float) -> None:
        self.places = places
        self.seconds = seconds
        now = time.monotonic()
        self.until = now + seconds
        self.last = now + most_seconds

    def is_over(self) -> bool:
        """Return whether to give up."""
        now = time.monotonic()
        if self.places.is_busy():
            self.until = now + self.seconds
        return now > min(self.until, self.last)
