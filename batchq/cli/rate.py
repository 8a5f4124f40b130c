"""How fast a batch's items are processed, and how long the rest takes at that rate."""

from collections import deque
from typing import NamedTuple

_WINDOW_SECONDS = 60.0


class _Sample(NamedTuple):
    """How many items were processed at a time, in seconds."""

    at: float
    processed: int


class Rate:
    """The rate of one batch over the last minute."""

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque()

    def add(self, processed: int, at: float) -> None:
        """Record that *processed* items were processed at the time *at*. Fewer than before (a retry) starts afresh."""
        if self._samples and processed < self._samples[-1].processed:
            self._samples.clear()
        self._samples.append(_Sample(at, processed))
        while len(self._samples) > 2 and at - self._samples[0].at > _WINDOW_SECONDS:
            self._samples.popleft()

    def per_second(self) -> float | None:
        """Return items per second; None while unknown."""
        if len(self._samples) < 2:
            return None
        first, last = self._samples[0], self._samples[-1]
        return (last.processed - first.processed) / (last.at - first.at) if last.at > first.at else None

    def seconds_left(self, total: int) -> float | None:
        """Return how long the rest takes; None while unknown, or while nothing is processed."""
        rate = self.per_second()
        return (total - self._samples[-1].processed) / rate if rate else None


def clock(seconds: float | None) -> str:
    """Return a duration as 1:02:03, as 2:03 if less than an hour, or as an empty string if unknown."""
    if seconds is None:
        return ""
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
