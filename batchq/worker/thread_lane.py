"""The lane of ``def`` handlers: threads."""

import itertools
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from contextvars import copy_context

from batchq.app import Handler
from batchq.batch.claimed import ClaimedBatch
from batchq.common.log import get_logger
from batchq.postgres.fair_queue import FairQueue
from batchq.worker.execution import RELEASED, run, run_traced
from batchq.worker.lanes import Ended, Lane, call_site

SHORT_SECONDS = 0.0001
_MOST_SECONDS = 4 * SHORT_SECONDS
_STANDBY_SECONDS = 0.005

_log = get_logger()


class ThreadLane(Lane):
    """*concurrency* threads, called slots.

    Each slot takes one batch at a time, so no batch waits for a slow one while a slot is idle. But where batches take
    microseconds, threads that compete for the interpreter cost more than the batches (8 slots with a handler that
    writes 16 bytes to a file: 58 us of processor per batch). So a slot that begins a batch wakes another slot only if
    batches take long, and one idle slot stands by in case the working slot meets a slow batch.
    """

    # More than a dozen attributes: the threads of a lane hand over to each other through them.
    def __init__(
        self,
        handlers: Mapping[str, Handler],
        concurrency: int,
        ended: Ended,
        fair_queue: FairQueue | None = None,
        *,
        queues: Sequence[str] | None = None,
        traced: bool = False,
    ) -> None:
        super().__init__(handlers, concurrency, ended, fair_queue, queues=queues)
        self._run = run_traced if traced else run
        self.waiting: deque[ClaimedBatch] = deque()
        self._wake = threading.Event()  # wakes the slot that stands by
        self.fair_queue.on_advance = self._wake_slot
        self._standby_lock = threading.Lock()  # held by the slot that stands by
        self.awake = 0  # slots that are not idle, counted under the lock
        self.slow: set[ClaimedBatch] = set()  # running batches that were seen to take long
        self.mean_seconds = _MOST_SECONDS  # of recent batches
        self._stopped = False
        self._numbers = itertools.count(1)

    # ------------------------------------------------------------------------------------------- how many to claim

    def wanted(self) -> int:
        """Return the prefetch."""
        return self.limited_by_connections(self.prefetch.wanted(self.run_count))

    def room(self) -> int:
        """Return how many batches to claim now."""
        return self.prefetch.room(self.wanted(), self.occupied)

    def waiting_count(self) -> int:
        """Return how many batches wait for a slot."""
        return len(self.waiting)

    def free_slots(self) -> int:
        """Return how many slots run no batch."""
        return max(0, self.concurrency - len(self.in_flight) + len(self.waiting))

    # -------------------------------------------------------------------------------------------------- the slots

    def start(self) -> None:
        """Start the slots."""
        for _ in range(self.concurrency):
            self._start_slot()

    def begin(self, batches: list[ClaimedBatch]) -> None:
        """Queue batches for the slots."""
        if batches and batches[0].claim.permits:  # they hold back others of their kind
            self.waiting.extendleft(reversed(batches))
        else:
            self.waiting.extend(batches)
        self._wake.set()

    def stop(self) -> None:
        """Let idle slots end."""
        self._stopped = True
        self._wake.set()

    def abandon(self, batch: ClaimedBatch) -> None:
        """Start a slot to replace the one that *batch* still holds."""
        self.slow.discard(batch)
        self._count_awake(-1)
        self._start_slot()
        _log.warning(
            "thread lost to a handler that does not end",
            batch_id=batch.id,
            kind=batch.kind,
            lost=len(self.given_up),
            at=_call_site_of(batch),
        )

    def release_waiting(self, for_seconds: float) -> int:
        """Release the batches that slower ones have kept waiting: another worker may be idle."""
        since = time.monotonic() - for_seconds
        kept: list[ClaimedBatch] = []
        released = 0
        for _ in range(len(self.waiting)):
            try:
                batch = self.waiting.popleft()
            except IndexError:
                break
            if batch.claim.arrived_at <= since:
                released += self.end(batch, RELEASED)  # False if its claim was lost meanwhile
            else:
                kept.append(batch)
        self.begin(kept)
        if released:
            self.prefetch.forget_rate()  # otherwise the next claims would take as many again
        return released

    def _start_slot(self) -> None:
        # A daemon: a handler that never returns does not keep the process alive.
        threading.Thread(target=self._slot, name=f"batchq-slot-{next(self._numbers)}", daemon=True).start()

    def _slot(self) -> None:
        """Run batches, one after the other, until the lane stops."""
        self._count_awake(1)
        while (batch := self._next_batch()) is not None:
            if not self.mark_running(batch):
                continue
            # A context of its own, as a task has: what its handler binds is not for the thread's next batch.
            outcome = copy_context().run(self._run, batch, self.handlers[batch.kind])
            if not self.end(batch, outcome):
                self.came_back(batch)
                return  # abandoned while it ran: another slot has replaced this one
            self._note_duration(batch)

    def _next_batch(self) -> ClaimedBatch | None:
        """Wait for a batch and return the one that has waited longest; None when the lane stops."""
        while not self._stopped:
            if (batch := self._take_waiting()) is None:
                self._stand_by()
                continue
            if self.waiting and self.mean_seconds > SHORT_SECONDS:
                self._wake.set()
            return batch
        self._wake.set()  # the next slot that stands by ends, too
        return None

    def _take_waiting(self) -> ClaimedBatch | None:
        """Return the batch that has waited longest. None if the slot should be idle, as which it counts from now on:
        there is no batch, or batches are short and another slot runs them."""
        is_wanted = self._progressing <= 1 or self.mean_seconds > SHORT_SECONDS
        if is_wanted and (batch := self.pop_waiting()) is not None:
            return batch
        with self.lock:
            if self._progressing <= 1 and (batch := self.pop_waiting()) is not None:  # the other slot just became idle
                return batch
            self.awake -= 1
        return None

    def pop_waiting(self) -> ClaimedBatch | None:
        """Remove and return the batch that has waited longest. None if there is none, or if it would only wait for a
        connection after others."""
        if self.is_held_up():
            return None
        try:
            return self.waiting.popleft()
        except IndexError:
            return None

    @property
    def _progressing(self) -> int:
        """About how many slots are not idle and not in a slow batch."""
        return self.awake - len(self.slow)

    def _note_duration(self, batch: ClaimedBatch) -> None:
        """Update the mean. Long durations are capped, since even a short batch may wait long for the interpreter."""
        if batch.begun_at is not None:
            seconds = min(time.monotonic() - batch.begun_at, _MOST_SECONDS)
            self.mean_seconds += (seconds - self.mean_seconds) / 16
            self.slow.discard(batch)

    def _count_awake(self, change: int) -> None:
        with self.lock:
            self.awake += change

    # ----------------------------------------------------------------------------------------- the slot that stands by

    def _wake_slot(self) -> None:
        """Let an idle slot check whether a batch may begin now."""
        if self.waiting:
            self._wake.set()

    def _stand_by(self) -> None:
        """Be idle until there is a batch that no other slot is about to take. One slot waits for that, the others for
        its place."""
        with self._standby_lock:
            while not self._stopped and not self.is_needed():
                self._wake.clear()
        self._count_awake(1)

    def is_needed(self) -> bool:
        """Wait for a batch; return whether to take it, which a slot that makes progress would do soon."""
        if not self.waiting or self.is_held_up():
            self._wake.wait()
            return bool(self.waiting) and not self.is_held_up() and self._is_alone()
        if self._is_alone():
            return True
        run_count = self.run_count
        self._wake.wait(_STANDBY_SECONDS)
        if self.run_count != run_count:
            return False
        self._note_slow(time.monotonic() - _STANDBY_SECONDS)
        return self._is_alone()

    def _note_slow(self, since: float) -> None:
        """Mark the batches that began before *since* and still run as slow.

        Under the lock, under which a batch also leaves flight before it leaves `slow`. Otherwise a batch that ends
        between the check and the mark would stay in `slow` forever, and count as a slot that makes no progress.
        """
        with self.lock:
            self.slow.update(b for b in self.in_flight if b.begun_at is not None and b.begun_at < since)

    def _is_alone(self) -> bool:
        """Return whether no slot makes progress, or batches take long."""
        return self._progressing <= 0 or self.mean_seconds > SHORT_SECONDS


def _call_site_of(batch: ClaimedBatch) -> str:
    """Return where the thread that runs *batch* is, "" if it has ended."""
    for frame in sys._current_frames().values():
        for outer, _ in traceback.walk_stack(frame):
            if outer.f_code is ThreadLane._slot.__code__ and outer.f_locals.get("batch") is batch:
                return call_site(frame)
    return ""
