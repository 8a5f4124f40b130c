"""When a failed or conflicting batch runs again."""

import random
import threading
from dataclasses import dataclass

from batchq.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential backoff with jitter.

    The wait before attempt n+1 is ``first_seconds * 2**(n-1)``, at most ``most_seconds``, times a random factor from
    0.5 to 1.5, so that batches that failed together do not run again together.
    """

    first_seconds: float = 5.0
    most_seconds: float = 3600.0

    def __post_init__(self) -> None:
        if not 0 <= self.first_seconds <= self.most_seconds < float("inf"):
            raise InvalidInput(f"Backoff needs 0 <= first_seconds <= most_seconds, not {self}")

    def delay_seconds(self, attempt: int) -> float:
        """Return the wait after failed attempt number *attempt* (from 1)."""
        exponent = min(max(attempt, 1) - 1, 60)
        return min(self.most_seconds, self.first_seconds * 2.0**exponent) * _jitter()


def _jitter() -> float:
    return random.uniform(0.5, 1.5)  # noqa: S311 (spreads load; not a secret)


class Conflicts:
    """How often each batch has had a conflict (for example a deadlock) in this process. Thread-safe.

    Conflicts are usually transient, so they do not count as failed attempts. The wait grows, and after ten times in a
    row the next conflict does count.
    """

    MOST = 10
    MOST_BATCHES = 1000

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.counts: dict[int, int] = {}
        self._backoff = Backoff(first_seconds=0.1, most_seconds=60)

    def delay_seconds(self, batch_id: int) -> float | None:
        """Count a conflict of a batch; return how long the batch should wait, None if its attempt has failed."""
        with self._lock:
            count = self.counts.pop(batch_id, 0) + 1
            if count > self.MOST:
                return None
            if len(self.counts) >= self.MOST_BATCHES:
                del self.counts[next(iter(self.counts))]
            self.counts[batch_id] = count
        return self._backoff.delay_seconds(count)
