"""Gates: when the next item of a kind may begin, by the limits of items per second and by throttles."""

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from batchq.worker.throttles import Name
from batchq.worker.token_bucket import TokenBucket, take_from_all

_ASK_AGAIN_SECONDS = 0.25


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

    def set_throttle(self, until: float) -> None:
        """Let nothing begin until then (monotonic)."""
        self._closed_until = until
        self._decide()

    def set_permits(self, permits: Sequence[_Permit]) -> None:
        """Let items begin as these permits allow."""
        self._permits = permits
        self._decide()

    def _decide(self) -> None:
        with self._lock:  # so that what was decided last was decided with what is valid last
            self.is_open = not self._permits and self._closed_until <= time.monotonic()


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

    def _set_all(self) -> None:
        for (queue, kind), gate in self._gates.items():
            self._set(queue, kind, gate)

    def _set(self, queue: str, kind: str, gate: Gate) -> None:
        names: tuple[Name, Name] = ((queue, kind), (queue, None))
        gate.set_permits([self._permits[name] for name in names if name in self._permits])
        gate.set_throttle(max(self._throttles.get(name, float("-inf")) for name in names))
