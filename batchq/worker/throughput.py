"""What a worker counts of its work, for batchq.throughput: in memory, and once a second in the database."""

import threading
from bisect import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import psycopg

from batchq.batch import Batch
from batchq.errors import OutcomeUnknown
from batchq.postgres.link import Link
from batchq.postgres.statements import workers
from batchq.postgres.statements.workers import Tally

ENDS = ("completed", "failed", "cancelled", "retried")
BOUNDS = [2.0 ** (number / 2 - 16) for number in range(67)]  # of run times, in seconds: from 15 us to 36 hours
MOST_TIMED = 64  # of the batches that end together


@dataclass(slots=True)
class Counts:
    """What was counted of one queue and kind since it was last written."""

    ends: dict[str, int] = field(default_factory=dict)
    items: int = 0
    run_seconds: float = 0.0
    run_times: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))

    def tally(self, queue: str, kind: str) -> Tally:
        """Return it as it is written."""
        last = max((place for place, count in enumerate(self.run_times, 1) if count), default=0)
        completed, failed, cancelled, retried = (self.ends.get(end, 0) for end in ENDS)
        times = self.run_times[:last]
        return Tally(queue, kind, completed, failed, cancelled, retried, self.items, self.run_seconds, times)

    def add(self, other: "Counts") -> None:
        """Add what another one has counted."""
        for end, count in other.ends.items():
            self.ends[end] = self.ends.get(end, 0) + count
        self.items += other.items
        self.run_seconds += other.run_seconds
        self.run_times = [a + b for a, b in zip(self.run_times, other.run_times, strict=True)]


class Throughput:
    """Counts what ends and how long it ran, and items as they are saved. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.counts: dict[tuple[str, str], Counts] = {}
        self.sums: dict[tuple[str, str], Counts] | None = None  # of all that was ever counted, if somebody wants them

    def ended(self, queue: str, kind: str, end: str, count: int, run_times: Sequence[float]) -> None:
        """Count batches that ended alike: *end* is completed, failed, cancelled or retried. *run_times*: of all of
        them, or of some that stand for all, in seconds."""
        with self.lock:
            for counts in self.books(queue, kind):
                counts.ends[end] = counts.ends.get(end, 0) + count
                each, rest = divmod(count, max(len(run_times), 1))
                for number, seconds in enumerate(run_times):
                    weight = each + (number < rest)
                    counts.run_times[bisect(BOUNDS, seconds)] += weight
                    counts.run_seconds += weight * seconds

    def books(self, queue: str, kind: str) -> list[Counts]:
        """Return where a queue's and kind's counts go."""
        kept = (self.counts,) if self.sums is None else (self.counts, self.sums)
        return [book.setdefault((queue, kind), Counts()) for book in kept]

    def progress(self, batch: Batch, position: int) -> None:
        """Count the items of a batch up to *position* that were not counted before.

        The batch itself remembers how many were: so it is forgotten however it ends, and who is late counts nothing.
        """
        with self.lock:
            if position > batch.items_counted:
                for counts in self.books(batch.queue, batch.kind):
                    counts.items += position - batch.items_counted
                batch.items_counted = position

    def write(self, link: Link, worker_id: str) -> None:
        """Write what was counted since the last time. Raises psycopg.Error; what may not be written is counted on."""
        with self.lock:
            counts, self.counts = self.counts, {}
        if not counts:
            return
        tallies = [each.tally(queue, kind) for (queue, kind), each in counts.items()]
        try:
            link.run(workers.count_throughput(worker_id, tallies), workers.THROUGHPUT_SETTINGS)
        except OutcomeUnknown:
            raise  # rather a second's counts missing than twice in the sum
        except psycopg.Error:
            self.put_back(counts)
            raise

    def put_back(self, counts: dict[tuple[str, str], Counts]) -> None:
        """Add what could not be written to what was counted since."""
        with self.lock:
            for key, each in counts.items():
                self.counts.setdefault(key, Counts()).add(each)


def run_times_of(batches: Iterable[tuple[Batch, float]]) -> list[float]:
    """Return how long batches have run, given with the monotonic time of their end; of those that have begun."""
    return [ended_at - batch.begun_at for batch, ended_at in batches if batch.begun_at is not None]
