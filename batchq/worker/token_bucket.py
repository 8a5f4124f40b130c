"""A token bucket: so many tokens per second, and at most a burst of them at once."""

import threading
import time
from collections.abc import Callable, Sequence

Clock = Callable[[], float]


class TokenBucket:
    """Fills with *rate* tokens per second, up to *capacity*; empty at first, and after *valid_until* (monotonic).

    Over any time t, at most capacity + rate * t tokens are taken, also while the rate changes.
    """

    def __init__(self, rate: float = 0.0, capacity: float = 0.0, clock: Clock = time.monotonic) -> None:
        self.rate = rate
        self.capacity = capacity
        self.valid_until = float("inf")
        self._clock = clock
        self._tokens = 0.0
        self._filled_at = clock()
        self._taken = 0
        self._was_empty = False
        self._lock = threading.Lock()

    def set_rate(self, rate: float, capacity: float) -> None:
        """Change the rate and the capacity; tokens over the new capacity are gone."""
        with self._lock:
            self._fill()
            self.rate, self.capacity = rate, capacity

    def available(self) -> float:
        """Return how many tokens there are."""
        with self._lock:
            self._fill()
            return self._tokens if self._clock() < self.valid_until else 0.0

    def take(self) -> bool:
        """Take a token; return whether there was one."""
        with self._lock:
            self._fill()
            if self._tokens < 1 or self._clock() >= self.valid_until:
                self._was_empty = True
                return False
            self._tokens -= 1
            self._taken += 1
            return True

    def give_back(self) -> None:
        """Return a token that was not used."""
        with self._lock:
            self._tokens = min(self._tokens + 1, self.capacity)
            self._taken -= 1

    def seconds_until_next(self) -> float:
        """Return how long it takes until there is a token, at this rate."""
        with self._lock:
            self._fill()
            missing = 1 - self._tokens
            if missing <= 0 and self._clock() < self.valid_until:
                return 0.0
            return missing / self.rate if self.rate > 0 and missing > 0 else float("inf")

    def usage(self) -> tuple[int, bool]:
        """Return how many tokens were taken since the last call, and whether somebody found none."""
        with self._lock:
            usage = self._taken, self._was_empty
            self._taken, self._was_empty = 0, False
            return usage

    def _fill(self) -> None:
        now = self._clock()
        self._tokens = min(self._tokens + (now - self._filled_at) * self.rate, self.capacity)
        self._filled_at = now


def take_from_all(buckets: Sequence[TokenBucket]) -> bool:
    """Take a token from each bucket, or from none; return whether that was possible."""
    for number, bucket in enumerate(buckets):
        if not bucket.take():
            for taken in buckets[:number]:
                taken.give_back()
            return False
    return True
