"""What a worker counts for batchq.throughput: in memory, written to the database once per second."""

import threading
from bisect import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import psycopg

from batchq.batch.claimed import ClaimedBatch
from batchq.postgres.link import Link
from batchq.postgres.statements import workers
from batchq.postgres.statements.workers import Tally

ENDS = ("completed", "failed", "cancelled", "retried")
BOUNDS = [2.0 ** (number / 2 - 16) for number in range(67)]  # of run times and waits, in seconds: 15 us to 36 hours
MOST_TIMED = 64  # of the batches that end together


@dataclass(slots=True)
class Counts:
    """Counts of one queue and kind."""

    ends: dict[str, int] = field(default_factory=dict)
    items: int = 0
    run_seconds: float = 0.0
    run_times: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    wait_times: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))

    def tally(self, queue: str, kind: str) -> Tally:
        """Return the counts as they are written."""
        completed, failed, cancelled, retried = (self.ends.get(end, 0) for end in ENDS)
        times = _used(self.run_times), _used(self.wait_times)
        return Tally(queue, kind, completed, failed, cancelled, retried, self.items, self.run_seconds, *times)

    def add(self, other: "Counts") -> None:
        """Add other counts."""
        for end, count in other.ends.items():
            self.ends[end] = self.ends.get(end, 0) + count
        self.items += other.items
        self.run_seconds += other.run_seconds
        self.run_times = [a + b for a, b in zip(self.run_times, other.run_times, strict=True)]
        self.wait_times = [a + b for a, b in zip(self.wait_times, other.wait_times, strict=True)]


def _used(counts: list[int]) -> list[int]:
    """Return the counts without the zeros at the end."""
    used = len(counts)
    while used and not counts[used - 1]:
        used -= 1
    return counts[:used]


class Throughput:
    """Counts batches, their run times and their waits when they end, and items when they are saved. Thread-safe.

    clock_ahead: returns what to add to a monotonic time for the database's clock; None while it is not known.
    """

    def __init__(self) -> None:
        self.clock_ahead: Callable[[], float | None] = lambda: None
        self.lock = threading.Lock()
        self.sums: dict[tuple[str, str], Counts] | None = None  # since the start, if set to {} for metrics
        self.counts: dict[tuple[str, str], Counts] = {}  # since the last write

    def ended(
        self, queue: str, kind: str, end: str, count: int, run_times: Sequence[float], waits: Sequence[float] = ()
    ) -> None:
        """Count *count* batches that ended alike: *end* is completed, failed, cancelled or retried.

        *run_times* and *waits*: seconds, of all these batches or of a sample of them.
        """
        with self.lock:
            for counts in self._counts_of(queue, kind):
                counts.ends[end] = counts.ends.get(end, 0) + count
                for seconds, weight in _weighted(run_times, count):
                    counts.run_times[bisect(BOUNDS, seconds)] += weight
                    counts.run_seconds += weight * seconds
                for seconds, weight in _weighted(waits, count):
                    counts.wait_times[bisect(BOUNDS, seconds)] += weight

    def progress(self, batch: ClaimedBatch, position: int) -> None:
        """Count the items of a batch up to *position* that were not counted before.

        The batch records how many were counted, so that is forgotten with the batch, and a late report counts nothing.
        """
        with self.lock:
            if position > batch.items_counted:
                for counts in self._counts_of(batch.whole_queue, batch.kind):
                    counts.items += position - batch.items_counted
                batch.items_counted = position

    def write(self, link: Link, worker_id: str) -> None:
        """Write the counts since the last write. Raises psycopg.Error, and keeps the counts for the next time.

        Raises OutcomeUnknown without keeping them: missing a second's counts is better than counting them twice.
        """
        with self.lock:
            counts, self.counts = self.counts, {}
        if not counts:
            return
        tallies = [each.tally(queue, kind) for (queue, kind), each in counts.items()]
        try:
            link.run(workers.count_throughput(worker_id, tallies), workers.THROUGHPUT_SETTINGS)
        except psycopg.Error:
            with self.lock:
                for key, each in counts.items():
                    self.counts.setdefault(key, Counts()).add(each)
            raise

    def _counts_of(self, queue: str, kind: str) -> list[Counts]:
        """Return the counts to add to."""
        kept = (self.counts,) if self.sums is None else (self.counts, self.sums)
        return [by_pair.setdefault((queue, kind), Counts()) for by_pair in kept]


def _weighted(sample: Sequence[float], count: int) -> Iterable[tuple[float, int]]:
    """Return each of a sample, with the number of batches that it stands for: *count* in all."""
    each, rest = divmod(count, max(len(sample), 1))
    return [(seconds, each + (number < rest)) for number, seconds in enumerate(sample)]


def waits_of(batches: Iterable[ClaimedBatch], clock_ahead: float | None) -> list[float]:
    """Return how long those of the *batches* that have begun were ready before their handler began, in seconds.

    The clock of the database is known to within the time that it takes to answer; without it, return none.
    """
    if clock_ahead is None:
        return []
    begun = [(batch.begun_at, batch.row.run_at) for batch in batches if batch.begun_at is not None]
    return [max(0.0, begun_at + clock_ahead - run_at) for begun_at, run_at in begun]


def run_times_of(batches: Iterable[tuple[ClaimedBatch, float]]) -> list[float]:
    """Return the run times of those *batches* that have begun, given with the monotonic time when each ended."""
    return [ended_at - batch.begun_at for batch, ended_at in batches if batch.begun_at is not None]
