"""Where handlers run: a lane of threads for ``def``, an event loop for ``async def``.

A lane knows which batches are in its hand: claimed, and not ended. Whoever takes a batch out of the hand decides how it
ended: the handler that comes to its end, or the worker that gives it back or times it out. What the other says is too
late, and dropped.
"""

import asyncio
import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping

from batchq.app import Handler
from batchq.batch import Batch
from batchq.database import HandlerConnections
from batchq.execution import RELEASED, Outcome, run, run_async
from batchq.log import get_logger

PREFETCH_SECONDS = 0.2
MOST_PREFETCHED = 4000
LARGE_CLAIM = 1000
BRIEF_SECONDS = 0.0001
MOST_SECONDS = 4 * BRIEF_SECONDS
STANDBY_SECONDS = 0.005
PACE_WINDOW_SECONDS = 0.05

log = get_logger()
Ended = Callable[["Lane", Batch, Outcome], None]


class Spurt:
    """How many batches a second a lane has worked from an empty hand to an empty hand: what it can do."""

    def __init__(self) -> None:
        self.count = 0
        self.began_at = 0.0
        self.pace = 0.0

    def begin(self, count: int, goes_on: bool) -> None:
        """Note batches that are taken in hand; *goes_on*: besides others."""
        if not goes_on:
            self.count, self.began_at = 0, time.monotonic()
        self.count += count

    def end(self) -> None:
        """Note that the hand is empty."""
        self.pace = max(self.pace, self.count / max(time.monotonic() - self.began_at, 1e-6))

    def take_pace(self) -> float:
        """Return the best pace since the last call, 0 without any."""
        pace, self.pace = self.pace, 0.0
        return pace


class Lane:
    """The handlers of one style, and the batches in hand for them. *ended* is told of each batch that ends."""

    def __init__(self, handlers: Mapping[str, Handler], concurrency: int, ended: Ended) -> None:
        self.handlers = handlers
        self.kinds = sorted(handlers)
        self.concurrency = concurrency
        self.ended = ended
        self.hand: set[Batch] = set()
        self.lock = threading.Lock()  # of the hand
        self.claimed = 0  # counted by the claimer's thread alone
        self.written = 0  # counted by the finisher's thread alone
        self.run_count = 0  # batches that have run and ended, counted under the lock
        self.spurt = Spurt()

    @property
    def unwritten(self) -> int:
        """How many batches are claimed and their end not yet written."""
        return self.claimed - self.written

    def wanted(self) -> int:
        """Return how many batches to have claimed at once."""
        return self.concurrency

    def room(self) -> int:
        """Return how many batches to claim now."""
        return max(0, self.wanted() - self.unwritten)

    def take(self, batches: list[Batch]) -> None:
        """Take claimed batches in hand, and begin them."""
        self.claimed += len(batches)
        with self.lock:
            self.spurt.begin(len(batches), goes_on=bool(self.hand))
            self.hand.update(batches)
        self.begin(batches)

    def in_hand(self) -> list[Batch]:
        """Return the batches in hand."""
        with self.lock:
            return list(self.hand)

    def begins(self, batch: Batch) -> bool:
        """Note that a batch begins to run; False if it was taken out of the hand while it waited."""
        with self.lock:
            if batch not in self.hand:
                return False
            batch.begun_at = time.monotonic()
            return True

    def end(self, batch: Batch, outcome: Outcome) -> bool:
        """Take a batch out of the hand and report its outcome; False if somebody else has done so before."""
        with self.lock:
            if batch not in self.hand:
                return False
            self.hand.remove(batch)
            self.run_count += batch.begun_at is not None
            if not self.hand:
                self.spurt.end()
        self.ended(self, batch, outcome)
        return True

    def end_from_outside(self, batch: Batch, outcome: Outcome) -> bool:
        """Do as `end` does, for whoever does not run the batch; its handler, if it runs, is abandoned."""
        ended = self.end(batch, outcome)
        if ended and batch.begun_at is not None:
            self.abandon(batch)
        return ended

    def begin(self, batches: list[Batch]) -> None:
        """Hand batches to those who run them."""
        raise NotImplementedError

    def start(self) -> None:
        """Start what runs them."""
        raise NotImplementedError

    def give_back_waiting(self, for_seconds: float) -> int:  # noqa: ARG002 (here every batch begins at once)
        """Give back the batches that have waited for as long without having begun; return how many."""
        return 0

    def abandon(self, batch: Batch) -> None:
        """Stop waiting for a batch that was taken out of the hand while it ran."""
        raise NotImplementedError

    def stop(self) -> None:
        """Let those who run batches end."""
        raise NotImplementedError


class ThreadLane(Lane):
    """*concurrency* threads, called slots, for ``def`` handlers.

    Prefetches as many batches as end in about 0.2 s at the measured pace: thousands of a few microseconds, hundreds of
    1 ms, one a slot of 10 s.

    Each slot takes one batch at a time, so that none waits behind a slow one while a slot is idle. But where batches
    take microseconds, threads that take turns at the interpreter cost more than the batches (8 slots with a handler
    that writes 16 bytes to a file: 58 us of processor a batch). So a slot that begins a batch wakes another only if
    batches take long; and one of the idle slots stands by, in case that the one at work meets a slow batch.
    """

    def __init__(self, handlers: Mapping[str, Handler], concurrency: int, ended: Ended) -> None:
        super().__init__(handlers, concurrency, ended)
        self.waiting: deque[Batch] = deque()
        self.wake = threading.Event()  # for the slot that stands by
        self.standby = threading.Lock()  # held by it
        self.awake = 0  # slots that are not idle, counted under the lock
        self.stuck: set[Batch] = set()  # that were seen to take long, and have not ended
        self.mean_seconds = MOST_SECONDS  # of a batch, lately
        self.stopped = False
        self.numbers = itertools.count(1)
        self.abandoned = 0
        self.pace = 0.0  # batches a second
        self.paced_at = time.monotonic()
        self.paced_run_count = 0

    def wanted(self) -> int:
        """Return the prefetch, at least one batch a slot."""
        self.measure_pace()
        return max(self.concurrency, min(int(self.pace * PREFETCH_SECONDS), MOST_PREFETCHED))

    def room(self) -> int:
        """Return how many to claim: nothing until half of the prefetch, or 1,000, are free: claims are to be large."""
        wanted = self.wanted()
        room = max(0, wanted - self.unwritten)
        if wanted > 4 * self.concurrency and room < min(wanted // 2, LARGE_CLAIM):
            return 0
        return room

    def measure_pace(self) -> None:
        """Note how many batches a second have run lately; those given back do not count."""
        now = time.monotonic()
        seconds = now - self.paced_at
        if seconds >= PACE_WINDOW_SECONDS:
            run_count = self.run_count
            self.pace = max((self.pace + (run_count - self.paced_run_count) / seconds) / 2, self.spurt.take_pace())
            self.paced_at, self.paced_run_count = now, run_count

    def begin(self, batches: list[Batch]) -> None:
        """Queue batches for the slots."""
        self.waiting.extend(batches)
        self.wake.set()

    def start(self) -> None:
        """Start the slots."""
        for _ in range(self.concurrency):
            self.start_slot()

    def start_slot(self) -> None:
        """Start one slot. A daemon: a handler that never returns does not keep the process alive."""
        threading.Thread(target=self.slot, name=f"batchq-slot-{next(self.numbers)}", daemon=True).start()

    def slot(self) -> None:
        """Run batches, one after the other, until told to end."""
        self.count_awake(1)
        while (batch := self.next_batch()) is not None:
            if not self.begins(batch):
                continue
            outcome = run(batch, self.handlers[batch.kind])
            if not self.end(batch, outcome):
                return  # abandoned while it ran: another slot has taken this one's place
            self.note_duration(batch)

    def next_batch(self) -> Batch | None:
        """Return the batch that has waited longest; wait for one. None when told to end."""
        while not self.stopped:
            if (batch := self.take_waiting()) is None:
                self.stand_by()
                continue
            if self.waiting and self.mean_seconds > BRIEF_SECONDS:
                self.wake.set()
            return batch
        self.wake.set()  # the next one that stands by ends, too
        return None

    def take_waiting(self) -> Batch | None:
        """Return the batch that has waited longest. None if the slot is to be idle, and counts as idle from now on: if
        there is no batch, or if batches are brief and another slot gets on with them."""
        with contextlib.suppress(IndexError):
            if self.at_work <= 1 or self.mean_seconds > BRIEF_SECONDS:
                return self.waiting.popleft()
        with self.lock:
            with contextlib.suppress(IndexError):
                if self.at_work <= 1:  # the other one has just become idle
                    return self.waiting.popleft()
            self.awake -= 1
        return None

    @property
    def at_work(self) -> int:
        """How many slots get on with their batches, about."""
        return self.awake - len(self.stuck)

    def note_duration(self, batch: Batch) -> None:
        """Let the mean follow what batches take; cut off, since a brief one may wait long for the interpreter."""
        if batch.begun_at is not None:
            seconds = min(time.monotonic() - batch.begun_at, MOST_SECONDS)
            self.mean_seconds += (seconds - self.mean_seconds) / 16
            self.stuck.discard(batch)

    def stand_by(self) -> None:
        """Be idle until there is a batch that no other slot is about to take. One slot waits, the others behind it."""
        with self.standby:
            while not self.stopped and not self.is_needed():
                self.wake.clear()
        self.count_awake(1)

    def is_needed(self) -> bool:
        """Wait for a batch; tell whether to take it: unless a slot is at work that gets on quickly."""
        if not self.waiting:
            self.wake.wait()
            return bool(self.waiting) and self.is_alone()
        if self.is_alone():
            return True
        run_count = self.run_count
        self.wake.wait(STANDBY_SECONDS)
        if self.run_count != run_count:
            return False
        since = time.monotonic() - STANDBY_SECONDS
        self.stuck.update(batch for batch in self.in_hand() if batch.begun_at is not None and batch.begun_at < since)
        return self.is_alone()

    def is_alone(self) -> bool:
        """Whether no slot gets on with its batches, or each is with one that takes long."""
        return self.at_work <= 0 or self.mean_seconds > BRIEF_SECONDS

    def count_awake(self, change: int) -> None:
        """Count the slots that are not idle."""
        with self.lock:
            self.awake += change

    def give_back_waiting(self, for_seconds: float) -> int:
        """Give back what slower batches before it have kept waiting: another worker may be idle."""
        since = time.monotonic() - for_seconds
        kept: list[Batch] = []
        given_back = 0
        for _ in range(len(self.waiting)):
            try:
                batch = self.waiting.popleft()
            except IndexError:
                break
            if batch.claim.began_at <= since:
                given_back += self.end(batch, RELEASED)  # False for one that was lost meanwhile: forgotten here
            else:
                kept.append(batch)
        self.begin(kept)
        if given_back:
            self.pace = 0.0  # or the next claims would take them again, as many as before
        return given_back

    def abandon(self, batch: Batch) -> None:
        """Start another slot in place of the one that *batch* still holds."""
        self.abandoned += 1
        log.warning(
            "thread lost to a handler that does not end", batch_id=batch.id, kind=batch.kind, lost=self.abandoned
        )
        self.stuck.discard(batch)
        self.count_awake(-1)
        self.start_slot()

    def stop(self) -> None:
        """Let idle slots end."""
        self.stopped = True
        self.wake.set()


class LoopLane(Lane):
    """One event loop, in a thread of its own, for all ``async def`` handlers: a task a batch."""

    def __init__(
        self, handlers: Mapping[str, Handler], concurrency: int, ended: Ended, connections: HandlerConnections
    ) -> None:
        super().__init__(handlers, concurrency, ended)
        self.connections = connections
        self.tasks: dict[Batch, asyncio.Task[None]] = {}
        self.ready = threading.Event()
        self.thread = threading.Thread(target=self.run_loop, name="batchq-event-loop", daemon=True)

    def start(self) -> None:
        """Start the event loop, and wait until it runs."""
        self.thread.start()
        self.ready.wait()

    def run_loop(self) -> None:
        """Run the event loop until `stop`; a task of a handler's own that raises SystemExit would end it before."""
        with asyncio.Runner() as runner:
            loop = runner.get_loop()
            main = loop.create_task(self.main())
            while not main.done():
                with contextlib.suppress(SystemExit, KeyboardInterrupt):
                    loop.run_until_complete(main)

    async def main(self) -> None:
        """Keep the loop and its connections open until `stop`."""
        self.loop = asyncio.get_running_loop()
        self.stopped = asyncio.Event()
        await self.connections.open_async()
        self.ready.set()
        await self.stopped.wait()
        await self.connections.close_async()

    def begin(self, batches: list[Batch]) -> None:
        """Begin a task for each batch."""
        self.loop.call_soon_threadsafe(self.begin_tasks, batches)

    def begin_tasks(self, batches: list[Batch]) -> None:
        """Begin a task for each batch; in the loop."""
        for batch in batches:
            self.tasks[batch] = self.loop.create_task(self.run_task(batch))

    async def run_task(self, batch: Batch) -> None:
        """Run one batch."""
        try:
            if self.begins(batch):
                self.end(batch, await run_async(batch, self.handlers[batch.kind]))
        finally:
            self.tasks.pop(batch, None)

    def abandon(self, batch: Batch) -> None:
        """Cancel the batch's task."""
        self.loop.call_soon_threadsafe(self.cancel, batch)

    def cancel(self, batch: Batch) -> None:
        """Cancel the batch's task; in the loop."""
        if task := self.tasks.get(batch):
            task.cancel()

    def stop(self) -> None:
        """Let the loop end, and wait for it a second."""
        self.loop.call_soon_threadsafe(self.stopped.set)
        self.thread.join(1)
