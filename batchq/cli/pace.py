"""How fast a batch's items are worked, and how long the rest will take at that pace."""

from collections import deque
from typing import NamedTuple

WINDOW_SECONDS = 60.0


class Look(NamedTuple):
    """How many items were worked at a time, in seconds."""

    at: float
    worked: int


class Pace:
    """The pace of one batch over the last minute. Feed it what was seen."""

    def __init__(self) -> None:
        self.looks: deque[Look] = deque()

    def see(self, worked: int, at: float) -> None:
        """Take in that *worked* items were worked at the time *at*. Fewer than before (a retry) begins anew."""
        if self.looks and worked < self.looks[-1].worked:
            self.looks.clear()
        self.looks.append(Look(at, worked))
        while len(self.looks) > 2 and at - self.looks[0].at > WINDOW_SECONDS:
            self.looks.popleft()

    def per_second(self) -> float | None:
        """Return items a second; None while it cannot be told."""
        if len(self.looks) < 2:
            return None
        first, last = self.looks[0], self.looks[-1]
        return (last.worked - first.worked) / (last.at - first.at) if last.at > first.at else None

    def seconds_left(self, total: int) -> float | None:
        """Return how long the rest takes; None while it cannot be told, or while nothing moves."""
        pace = self.per_second()
        return (total - self.looks[-1].worked) / pace if pace else None


def clock(seconds: float | None) -> str:
    """Return a length of time as 1:02:03, 2:03 for less than an hour, or nothing if it is not known."""
    if seconds is None:
        return ""
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
