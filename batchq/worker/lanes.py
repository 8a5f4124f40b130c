"""A lane: the handlers of one style, and their batches in flight. The base of `ThreadLane` and `LoopLane`.

A batch is in flight from its claim until it has an outcome. Whoever takes it out of flight decides the outcome: the
handler that returns, or the worker that releases the batch or times it out. An outcome that comes later is dropped.
"""

import itertools
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from types import FrameType

from batchq.app import Handler
from batchq.batch.claimed import ClaimedBatch
from batchq.errors import Interrupted
from batchq.postgres.fair_queue import FairQueue
from batchq.worker import permits
from batchq.worker.execution import RELEASED, Outcome
from batchq.worker.prefetch import Prefetch

MOST_POSTPONED = 1000
_FRAMES_SHOWN = 3

Ended = Callable[["Lane", ClaimedBatch, Outcome], None]


class Lane:
    """What the lanes share. *ended* is called with each batch that is no longer in flight. *queues*: those that it
    serves (None: all).

    Each counter has one writer: *claimed* the claimer's thread, *written* and *postponed* the finisher's, *run_count*
    whoever holds the lock.
    """

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        concurrency: int,
        ended: Ended,
        fair_queue: FairQueue | None = None,
        *,
        queues: Sequence[str] | None = None,
    ) -> None:
        self.handlers = handlers
        self.kinds = sorted(handlers)
        self.concurrency = concurrency
        self.queues = queues
        self.ended = ended
        self.fair_queue = fair_queue or FairQueue(concurrency, 0.0)
        self.prefetch = Prefetch(concurrency)
        self.lock = threading.Lock()  # of what is in flight and what is given up
        self.in_flight: set[ClaimedBatch] = set()
        self.given_up: dict[ClaimedBatch, float] = {}  # out of flight, but still running; since when
        self.throttled: Set[tuple[str, str | None]] = frozenset()  # queues and kinds of which no batch begins
        self.claimed = 0
        self.written = 0
        self.postponed = 0  # not written, because their rows are locked or refused
        self.run_count = 0  # batches that have run, or were given up while they ran

    # ------------------------------------------------------------------------------------------- how many to claim

    @property
    def unwritten(self) -> int:
        """How many batches are claimed and their outcome not yet written."""
        return self.claimed - self.written

    @property
    def occupied(self) -> int:
        """How many unwritten batches take room. Up to 1,000 postponed ones do not; the limit is there so that a worker
        whose outcomes are all refused stops claiming."""
        return self.unwritten - min(self.postponed, MOST_POSTPONED)

    def serves(self, queue: str) -> bool:
        """Return whether it runs batches of a queue."""
        return self.queues is None or queue in self.queues

    def wanted(self) -> int:
        """Return how many batches to have claimed."""
        return self.limited_by_connections(self.concurrency)

    def room(self) -> int:
        """Return how many batches to claim now."""
        return max(0, self.wanted() - self.occupied)

    def free_slots(self) -> int:
        """Return how many slots run no batch."""
        return max(0, self.concurrency - len(self.in_flight))

    def limited_by_connections(self, wanted: int) -> int:
        """Return *wanted*; while handlers wait for connections, only as many as will get one soon."""
        if not self.fair_queue.waiting:
            return wanted
        return min(wanted, self.unwritten + max(0, self.fair_queue.room() - self.waiting_count()))

    def is_held_up(self) -> bool:
        """Return whether to begin no batch: as many handlers wait for connections as will get one soon."""
        return bool(self.fair_queue.waiting) and self.fair_queue.room() <= 0

    def waiting_count(self) -> int:
        """Return about how many batches in flight wait to begin."""
        return 0

    # --------------------------------------------------------------------------- a batch's way: begun, ended, given up

    def take(self, batches: list[ClaimedBatch]) -> None:
        """Put claimed batches in flight."""
        self.claimed += len(batches)
        with self.lock:
            self.prefetch.begin_burst(len(batches), continues=bool(self.in_flight))
            self.in_flight.update(batches)
        self.begin(batches)

    def _is_throttled(self, batch: ClaimedBatch) -> bool:
        return (batch.whole_queue, batch.kind) in self.throttled or (batch.whole_queue, None) in self.throttled

    def list_in_flight(self) -> list[ClaimedBatch]:
        """Return the batches in flight."""
        with self.lock:
            return list(self.in_flight)

    def mark_running(self, batch: ClaimedBatch) -> bool:
        """Mark a batch as running; return False if it was taken out of flight while it waited, or if it is released
        because its lease has expired, it is throttled, or too many per second would begin."""
        with self.lock:
            if batch not in self.in_flight:
                return False
            now = time.monotonic()
            if (
                now - batch.leased_at < batch.claim.runtime.lease_seconds  # else another worker may run it already
                and not (self.throttled and self._is_throttled(batch))
                and (not batch.claim.permits or permits.begin(batch.claim.permits))
            ):
                batch.begun_at = now
                return True
        self.end(batch, RELEASED)
        return False

    def end(
        self, batch: ClaimedBatch, outcome: Outcome, *, is_given_up: bool = False, unless_begun: bool = False
    ) -> bool:
        """Take a batch out of flight and report its outcome; return False if another thread has done so before, or if
        *unless_begun* and it is running.

        *is_given_up*: its handler may never return; until it does, its slot is lost.
        """
        with self.lock:
            if batch not in self.in_flight or (unless_begun and batch.begun_at is not None):
                return False
            self.in_flight.remove(batch)
            self.run_count += batch.begun_at is not None
            if is_given_up and batch.begun_at is not None:
                self.given_up[batch] = time.monotonic()
            if not self.in_flight:
                self.prefetch.end_burst()
        self.ended(self, batch, outcome)
        return True

    def end_from_outside(self, batch: ClaimedBatch, outcome: Outcome, interrupt: Interrupted | None = None) -> bool:
        """`end`, for a thread that does not run the batch. If its handler runs, it is abandoned.

        *interrupt*: what the handler receives, but only once its batch has an outcome. A handler that received TimedOut
        before would end the batch with nothing to write, because the keeper is to write the failure.
        """
        ended = self.end(batch, outcome, is_given_up=True)
        if ended and interrupt is not None:
            batch.interrupt = interrupt
        if ended and batch.begun_at is not None:
            self.abandon(batch)
        return ended

    def came_back(self, batch: ClaimedBatch) -> None:
        """Note that the handler of a batch that was given up has returned."""
        with self.lock:
            self.given_up.pop(batch, None)

    def lost_slots(self, for_seconds: float) -> int:
        """Return how many slots have been lost for *for_seconds* to handlers that should end and do not."""
        since = time.monotonic() - for_seconds
        with self.lock:
            return sum(given_up_at <= since for given_up_at in self.given_up.values())

    # --------------------------------------------------------------------------------------- different in each lane

    def start(self) -> None:
        """Start the slots."""
        raise NotImplementedError

    def begin(self, batches: list[ClaimedBatch]) -> None:
        """Pass batches to the slots."""
        raise NotImplementedError

    def release_waiting(self, for_seconds: float) -> int:  # noqa: ARG002
        """Release the batches that have waited for *for_seconds* without having begun; return how many."""
        return 0

    def abandon(self, batch: ClaimedBatch) -> None:
        """Replace the slot of a batch that was taken out of flight while it ran."""
        raise NotImplementedError

    def stop(self) -> None:
        """Let the slots end."""
        raise NotImplementedError


def call_site(frame: FrameType | None) -> str:
    """Return where a thread is: file, line and function of its innermost calls."""
    frames = itertools.islice(traceback.walk_stack(frame), _FRAMES_SHOWN)
    calls = (f"{Path(outer.f_code.co_filename).name}:{line} in {outer.f_code.co_name}" for outer, line in frames)
    return " < ".join(calls)
