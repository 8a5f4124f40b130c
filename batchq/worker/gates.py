"""Gates: when the next item of a kind may begin, by the limits of items per second and by throttles."""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from batchq.worker.token_bucket import TokenBucket, take_from_all

_ASK_AGAIN_SECONDS = 0.25
_WRITTEN_SECONDS = 2.0
Name = tuple[str, str | None]  # queue and kind; None: the whole queue


class _Permit(Protocol):
    """What a gate needs of a permit; see `batchq.worker.permits`."""

    @property
    def limit(self) -> Any: ...

    @property
    def items(self) -> TokenBucket: ...

    def wants_items(self) -> None: ...


class Gate:
    """The gate of one queue and kind, for all batches of this process. *is_open*: there is nothing to ask."""

    def __init__(self) -> None:
        self.is_open = True
        self._lock = threading.Lock()
        self.waiting: deque[None] = deque()  # one for each that waits; a deque, since its changes are atomic
        self._permits: Sequence[_Permit] = ()
        self._closed_until = float("-inf")  # monotonic
        self._closed_at = float("-inf")  # when this process last closed it

    @property
    def closed_seconds(self) -> float:
        """For how long it stays closed because of a throttle."""
        return max(0.0, self._closed_until - time.monotonic())

    def take(self) -> float:
        """Take what the next item needs. Return 0, or after how many seconds to ask again: later if many ask."""
        if (seconds := self.closed_seconds) > 0:
            return min(seconds, _ASK_AGAIN_SECONDS)
        permits = self._permits
        if not permits:
            self._decide()
            return 0.0
        for permit in permits:
            permit.wants_items()
        buckets = [permit.items for permit in permits]
        if take_from_all(buckets):
            return 0.0
        seconds = max(bucket.seconds_until_next() for bucket in buckets) * max(1, len(self.waiting) / 2)
        return min(max(seconds, 0.001), _ASK_AGAIN_SECONDS)

    def give_back(self) -> None:
        """Give back what the item does not need that was to begin."""
        for permit in self._permits:
            permit.items.give_back()

    def close_for(self, seconds: float) -> None:
        """Let nothing begin for so long, in this process. A longer time that is valid already stays."""
        now = time.monotonic()
        self._closed_until, self._closed_at = max(self._closed_until, now + seconds), now
        self._decide()

    def set_throttle(self, until: float) -> None:
        """Let nothing begin until then (monotonic), as read from the database.

        What was read may be older than what this process has just written.
        """
        is_recent = time.monotonic() - self._closed_at < _WRITTEN_SECONDS
        self._closed_until = max(until, self._closed_until) if is_recent else until
        self._decide()

    def set_permits(self, permits: Sequence[_Permit]) -> None:
        """Let items begin as these permits allow."""
        self._permits = permits
        self._decide()

    def _decide(self) -> None:
        with self._lock:  # so that what was decided last was decided with what is valid last
            self.is_open = not self._permits and self._closed_until <= time.monotonic()


@contextlib.contextmanager
def waiting_at(gate: Any) -> Iterator[None]:
    """Count among those that wait at a gate, if it is one of these."""
    waiting: deque[None] = getattr(gate, "waiting", deque())
    waiting.append(None)
    try:
        yield
    finally:
        waiting.pop()


class Gates:
    """The gates of a worker, by queue and kind."""

    def __init__(self) -> None:
        self._gates: dict[tuple[str, str], Gate] = {}
        self._permits: Mapping[Name, _Permit] = {}
        self._throttles: Mapping[Name, float] = {}
        self._lock = threading.Lock()

    def of(self, queue: str, kind: str) -> Gate:
        """Return the gate of a kind in a queue."""
        if (gate := self._gates.get((queue, kind))) is None:
            with self._lock:
                gate = self._gates.setdefault((queue, kind), Gate())
                self._set(queue, kind, gate)
        return gate

    def set_limits(self, permits: Mapping[Name, _Permit]) -> None:
        """Take over the limits of items per second of these permits."""
        with self._lock:
            self._permits = {name: p for name, p in permits.items() if p.limit.items_per_second is not None}
            self._set_all()

    def set_throttles(self, throttles: Mapping[Name, float]) -> None:
        """Take over the throttles in force: until when (monotonic) each is valid."""
        if throttles or self._throttles:
            with self._lock:
                self._throttles = throttles
                self._set_all()

    def close_for(self, queue: str, kind: str | None, seconds: float) -> None:
        """Close the gate of a kind in a queue, or all of the queue, in this process."""
        if kind is not None:
            self.of(queue, kind)
        with self._lock:
            for (gate_queue, gate_kind), gate in self._gates.items():
                if gate_queue == queue and kind in (None, gate_kind):
                    gate.close_for(seconds)

    def _set_all(self) -> None:
        for (queue, kind), gate in self._gates.items():
            self._set(queue, kind, gate)

    def _set(self, queue: str, kind: str, gate: Gate) -> None:
        names: tuple[Name, Name] = ((queue, kind), (queue, None))
        gate.set_permits([self._permits[name] for name in names if name in self._permits])
        gate.set_throttle(max(self._throttles.get(name, float("-inf")) for name in names))
