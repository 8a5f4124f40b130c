"""How many batches a lane claims ahead of what its slots run: as many as finish in about 0.2 s at the measured rate."""

import time

_AHEAD_SECONDS, _MOST_AHEAD_SECONDS = 0.2, 0.8
_ROUND_TRIPS_AHEAD = 3
MOST_PREFETCHED = 4000
_LARGE_CLAIM = 1000
_LATENCY_SECONDS, MOST_LIMIT_FACTOR = 0.01, 3.0
_WINDOW_SECONDS = 0.05


class Prefetch:
    """Measures the rate of a lane with *slots* slots, and derives the prefetch from it.

    Of batches that take microseconds, a lane prefetches thousands; of 1 ms, hundreds; of 10 s, one per slot.
    `begin_burst` and `end_burst` are called under the lane's lock, the rest by the claimer's and the keeper's threads.
    """

    def __init__(self, slots: int) -> None:
        self.limit_factor = 1.0  # of the most batches to prefetch, and to claim in one statement
        self._slots = slots
        self._ahead_seconds = _AHEAD_SECONDS
        self._rate = 0.0  # batches per second
        self._measured_at = time.monotonic()
        self._measured_count = 0
        # A burst lasts from when the lane has a batch in flight until it has none.
        self._burst_count = 0
        self._burst_began_at = 0.0
        self._burst_rate = 0.0  # the best since the last measurement

    def adapt_to(self, round_trip_seconds: float) -> None:
        """Raise the limits when the database is far: threefold from a 20 ms round trip on.

        Claims and finishes each cost a round trip, and the batches in flight must last that long. At 20 ms this made a
        drain 1.5 times as fast (`bin/bench network`: 0.86 of the rate without delay, up from 0.56); nearby it would
        only use memory. Also prefetch for longer: replacing a finished batch takes up to three round trips (finish,
        probe, claim).
        """
        self.limit_factor = min(1 + round_trip_seconds / _LATENCY_SECONDS, MOST_LIMIT_FACTOR)
        self._ahead_seconds = min(_AHEAD_SECONDS + _ROUND_TRIPS_AHEAD * round_trip_seconds, _MOST_AHEAD_SECONDS)

    def wanted(self, run_count: int) -> int:
        """Return how many batches to have claimed, at least one per slot. *run_count*: batches run so far."""
        self._measure(run_count)
        return max(self._slots, int(min(self._rate * self._ahead_seconds, MOST_PREFETCHED * self.limit_factor)))

    def room(self, wanted: int, occupied: int) -> int:
        """Return how many batches to claim, so that *wanted* are claimed and not just *occupied*.

        None until half of a large prefetch, or 1,000 batches, are missing, since few large claims cost less than many
        small ones.
        """
        room = max(0, wanted - occupied)
        if wanted > 4 * self._slots and room < min(wanted // 2, _LARGE_CLAIM):
            return 0
        return room

    def forget_rate(self) -> None:
        """Start again with one batch per slot."""
        self._rate = 0.0

    def begin_burst(self, count: int, *, continues: bool) -> None:
        """Count *count* claimed batches. *continues*: others are in flight, so the burst continues."""
        if not continues:
            self._burst_count, self._burst_began_at = 0, time.monotonic()
        self._burst_count += count

    def end_burst(self) -> None:
        """Note that no batch is in flight.

        The rate of a burst shows what the lane can do; measured over time, rare claims would hide that.
        """
        seconds = max(time.monotonic() - self._burst_began_at, 1e-6)
        self._burst_rate = max(self._burst_rate, self._burst_count / seconds)

    def _measure(self, run_count: int) -> None:
        """Update the rate, at most every 0.05 s. Batches that were released without having run do not count."""
        now = time.monotonic()
        seconds = now - self._measured_at
        if seconds < _WINDOW_SECONDS:
            return
        mean = (self._rate + (run_count - self._measured_count) / seconds) / 2
        self._rate, self._burst_rate = max(mean, self._burst_rate), 0.0
        self._measured_at, self._measured_count = now, run_count
