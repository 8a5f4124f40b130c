"""The gate of item handlers in tests: it never makes a test wait."""

from collections import deque

from batchq.worker.items import MOST_WAITED_SECONDS


class ClosingGate:
    """Open until an item raises Throttled. Then its batch ends and waits: a worker would wait within it for some
    seconds, a test does not."""

    def __init__(self) -> None:
        self.is_open = True
        self.waiting: deque[None] = deque()
        self.closed_seconds = 0.0

    def close(self, seconds: float) -> None:
        """Begin no more items."""
        self.is_open = False
        self.closed_seconds = max(seconds, MOST_WAITED_SECONDS + 0.001)  # a shorter time would be waited for

    def take(self) -> float:
        """Return how long to wait for the next item."""
        return self.closed_seconds

    def give_back(self) -> None:
        """Do nothing: items are not counted."""
