"""What a worker counts for batchq.throughput: in memory, written to the database once per second."""

import threading
from bisect import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import psycopg

from batchq.batch.claimed import ClaimedBatch
from batchq.postgres.link import Link
from batchq.postgres.statements import workers
from batchq.postgres.statements.workers import Tally

ENDS = ("completed", "failed", "cancelled", "retried")
BOUNDS = [2.0 ** (number / 2 - 16) for number in range(67)]  # of run times, in seconds: from 15 us to 36 hours
MOST_TIMED = 64  # of the batches that end together


@dataclass(slots=True)
class Counts:
    """Counts of one queue and kind."""

    ends: dict[str, int] = field(default_factory=dict)
    items: int = 0
    run_seconds: float = 0.0
    run_times: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))

    def tally(self, queue: str, kind: str) -> Tally:
        """Return the counts as they are written."""
        used = max((number for number, count in enumerate(self.run_times, 1) if count), default=0)
        completed, failed, cancelled, retried = (self.ends.get(end, 0) for end in ENDS)
        times = self.run_times[:used]
        return Tally(queue, kind, completed, failed, cancelled, retried, self.items, self.run_seconds, times)

    def add(self, other: "Counts") -> None:
        """Add other counts."""
        for end, count in other.ends.items():
            self.ends[end] = self.ends.get(end, 0) + count
        self.items += other.items
        self.run_seconds += other.run_seconds
        self.run_times = [a + b for a, b in zip(self.run_times, other.run_times, strict=True)]


class Throughput:
    """Counts batches and their run times when they end, and items when they are saved. Thread-safe."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.sums: dict[tuple[str, str], Counts] | None = None  # since the start, if set to {} for metrics
        self.counts: dict[tuple[str, str], Counts] = {}  # since the last write

    def ended(self, queue: str, kind: str, end: str, count: int, run_times: Sequence[float]) -> None:
        """Count *count* batches that ended alike: *end* is completed, failed, cancelled or retried.

        *run_times*: seconds, of all these batches or of a sample of them.
        """
        with self.lock:
            for counts in self._counts_of(queue, kind):
                counts.ends[end] = counts.ends.get(end, 0) + count
                each, rest = divmod(count, max(len(run_times), 1))
                for number, seconds in enumerate(run_times):
                    weight = each + (number < rest)
                    counts.run_times[bisect(BOUNDS, seconds)] += weight
                    counts.run_seconds += weight * seconds

    def progress(self, batch: ClaimedBatch, position: int) -> None:
        """Count the items of a batch up to *position* that were not counted before.

        The batch records how many were counted, so that is forgotten with the batch, and a late report counts nothing.
        """
        with self.lock:
            if position > batch.items_counted:
                for counts in self._counts_of(batch.queue, batch.kind):
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


def run_times_of(batches: Iterable[tuple[ClaimedBatch, float]]) -> list[float]:
    """Return the run times of those *batches* that have begun, given with the monotonic time when each ended."""
    return [ended_at - batch.begun_at for batch, ended_at in batches if batch.begun_at is not None]
