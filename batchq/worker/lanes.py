"""Where handlers run: a lane of threads for ``def``, an event loop for ``async def``.

A lane knows which batches are in its hand: claimed, and not ended. Whoever takes a batch out of the hand decides how it
ended: the handler that comes to its end, or the worker that gives it back or times it out. What the other says is too
late, and dropped.
"""

import asyncio
import contextlib
import itertools
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from contextvars import copy_context
from functools import partial
from pathlib import Path
from types import FrameType

from batchq.app import Handler
from batchq.batch import Batch
from batchq.common.log import get_logger
from batchq.errors import Interrupted
from batchq.postgres.fair_queue import FairQueue
from batchq.postgres.handler_connections import HandlerConnections
from batchq.worker.execution import (
    RELEASED,
    Outcome,
    failed_attempt,
    run,
    run_async,
    run_async_traced,
    run_traced,
    safely,
)

PREFETCH_SECONDS = 0.2
MOST_PREFETCHED = 4000
LARGE_CLAIM = 1000
MOST_POSTPONED = 1000
FAR_SECONDS, MOST_STRETCH = 0.01, 3.0
ROUND_TRIPS, MOST_AHEAD_SECONDS = 3, 0.8
BRIEF_SECONDS = 0.0001
MOST_SECONDS = 4 * BRIEF_SECONDS
STANDBY_SECONDS = 0.005
PACE_WINDOW_SECONDS = 0.05
BLOCKED_SECONDS = 2.0
FRAMES_TOLD = 3

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

    def __init__(
        self, handlers: Mapping[str, Handler], concurrency: int, ended: Ended, places: FairQueue | None = None
    ) -> None:
        self.handlers = handlers
        self.places = places or FairQueue(concurrency, 0.0)
        self.kinds = sorted(handlers)
        self.concurrency = concurrency
        self.ended = ended
        self.hand: set[Batch] = set()
        self.lost: dict[Batch, float] = {}  # given up while they ran, and running still; since when
        self.lock = threading.Lock()  # of the hand, and of what is lost
        self.claimed = 0  # counted by the claimer's thread alone
        self.written = 0  # counted by the finisher's thread alone
        self.postponed = 0  # of those not written, whose rows are locked or refused; by the finisher's thread alone
        self.run_count = 0  # batches that have run and ended, counted under the lock
        self.spurt = Spurt()
        self.stretch = 1.0  # of what is taken in hand at most
        self.ahead_seconds = PREFETCH_SECONDS  # how long a lane of threads has work for

    def heed_distance(self, round_trip_seconds: float) -> None:
        """Take more in hand where the database is far away: three times as much if a round trip takes 20 ms or longer.

        Claims and finishes follow one another, each with a round trip, and what is in hand has to last as long. Through
        a line of 20 ms a drain became 1.5 times as fast (`bin/bench network`: 0.56 to 0.86 of the rate without delay);
        next to the database more only takes memory. And for longer: from a batch's end to the begin of the one that is
        claimed instead there are up to three round trips (finish, look, claim), in which slots are not to be idle.
        """
        self.stretch = min(1 + round_trip_seconds / FAR_SECONDS, MOST_STRETCH)
        self.ahead_seconds = min(PREFETCH_SECONDS + ROUND_TRIPS * round_trip_seconds, MOST_AHEAD_SECONDS)

    @property
    def unwritten(self) -> int:
        """How many batches are claimed and their end not yet written."""
        return self.claimed - self.written

    @property
    def occupied(self) -> int:
        """How many of them take room: all but the postponed ones. Of those 1,000 at most are left out, so that a worker
        whose outcomes are all refused stops claiming."""
        return self.unwritten - min(self.postponed, MOST_POSTPONED)

    def wanted(self) -> int:
        """Return how many batches to have claimed at once."""
        return self.able(self.concurrency)

    def able(self, wanted: int) -> int:
        """Return *wanted*; where handlers wait for connections, only as many batches as get on soon."""
        if not self.places.waiting:
            return wanted
        return min(wanted, self.unwritten + max(0, self.places.room() - self.not_begun()))

    def is_held_up(self) -> bool:
        """Whether to begin nothing: as many handlers wait for connections as get on soon."""
        return bool(self.places.waiting) and self.places.room() <= 0

    def not_begun(self) -> int:
        """Return about how many batches in hand have not begun."""
        return 0

    def room(self) -> int:
        """Return how many batches to claim now."""
        return max(0, self.wanted() - self.occupied)

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

    def end(self, batch: Batch, outcome: Outcome, *, is_given_up: bool = False, unless_begun: bool = False) -> bool:
        """Take a batch out of the hand and report its outcome; False if somebody else has done so before.

        *is_given_up*: whoever runs it may never come to its end, so that its slot is lost. *unless_begun*: only if
        nobody runs it.
        """
        with self.lock:
            if batch not in self.hand or (unless_begun and batch.begun_at is not None):
                return False
            self.hand.remove(batch)
            self.run_count += batch.begun_at is not None
            if is_given_up and batch.begun_at is not None:
                self.lost[batch] = time.monotonic()
            if not self.hand:
                self.spurt.end()
        self.ended(self, batch, outcome)
        return True

    def end_from_outside(self, batch: Batch, outcome: Outcome, interrupt: Interrupted | None = None) -> bool:
        """Do as `end` does, for whoever does not run the batch; its handler, if it runs, is abandoned.

        *interrupt*: what to tell the handler, only now: one that saw it before would end the batch, and say nothing.
        """
        ended = self.end(batch, outcome, is_given_up=True)
        if ended and interrupt is not None:
            batch.interrupt = interrupt
        if ended and batch.begun_at is not None:
            self.abandon(batch)
        return ended

    def came_back(self, batch: Batch) -> None:
        """Note that a handler has ended whose batch was given up while it ran."""
        with self.lock:
            self.lost.pop(batch, None)

    def lost_slots(self, for_seconds: float) -> int:
        """Return how many slots have been lost for as long: their handlers were told to end, and have not."""
        since = time.monotonic() - for_seconds
        with self.lock:
            return sum(lost_at <= since for lost_at in self.lost.values())

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

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        concurrency: int,
        ended: Ended,
        places: FairQueue | None = None,
        *,
        traced: bool = False,
    ) -> None:
        super().__init__(handlers, concurrency, ended, places)
        self.run = run_traced if traced else run
        self.waiting: deque[Batch] = deque()
        self.wake = threading.Event()  # for the slot that stands by
        self.places.on_advance = self.go_on
        self.standby = threading.Lock()  # held by it
        self.awake = 0  # slots that are not idle, counted under the lock
        self.stuck: set[Batch] = set()  # that were seen to take long, and have not ended
        self.mean_seconds = MOST_SECONDS  # of a batch, lately
        self.stopped = False
        self.numbers = itertools.count(1)
        self.pace = 0.0  # batches a second
        self.paced_at = time.monotonic()
        self.paced_run_count = 0

    def wanted(self) -> int:
        """Return the prefetch, at least one batch a slot."""
        self.measure_pace()
        ahead = min(self.pace * self.ahead_seconds, MOST_PREFETCHED * self.stretch)
        return self.able(max(self.concurrency, int(ahead)))

    def not_begun(self) -> int:
        """Return how many batches wait for a slot."""
        return len(self.waiting)

    def room(self) -> int:
        """Return how many to claim: nothing until half of the prefetch, or 1,000, are free: claims are to be large."""
        wanted = self.wanted()
        room = max(0, wanted - self.occupied)
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

    def go_on(self) -> None:
        """Let an idle slot see whether a batch may begin now."""
        if self.waiting:
            self.wake.set()

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
            # A context of its own, as a task has: what its handler binds is not for the thread's next batch.
            outcome = copy_context().run(self.run, batch, self.handlers[batch.kind])
            if not self.end(batch, outcome):
                self.came_back(batch)
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
        is_wanted = self.at_work <= 1 or self.mean_seconds > BRIEF_SECONDS
        if is_wanted and (batch := self.pop_waiting()) is not None:
            return batch
        with self.lock:
            if self.at_work <= 1 and (batch := self.pop_waiting()) is not None:  # the other one has just become idle
                return batch
            self.awake -= 1
        return None

    def pop_waiting(self) -> Batch | None:
        """Take the batch that has waited longest out of those that wait. None if there is none, or if it would only
        wait for a connection, behind others."""
        if self.is_held_up():
            return None
        try:
            return self.waiting.popleft()
        except IndexError:
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
        if not self.waiting or self.is_held_up():
            self.wake.wait()
            return bool(self.waiting) and not self.is_held_up() and self.is_alone()
        if self.is_alone():
            return True
        run_count = self.run_count
        self.wake.wait(STANDBY_SECONDS)
        if self.run_count != run_count:
            return False
        self.note_stuck(time.monotonic() - STANDBY_SECONDS)
        return self.is_alone()

    def note_stuck(self, since: float) -> None:
        """Remember the batches that began before *since* and still run.

        Under the lane's lock: a batch leaves the hand under it, and leaves `stuck` after that. One that ended between a
        look at the hand and this would stay in `stuck` for good, and count as a slot that does not progress.
        """
        with self.lock:
            self.stuck.update(b for b in self.hand if b.begun_at is not None and b.begun_at < since)

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
            if batch.claim.arrived_at <= since:
                given_back += self.end(batch, RELEASED)  # False for one that was lost meanwhile: forgotten here
            else:
                kept.append(batch)
        self.begin(kept)
        if given_back:
            self.pace = 0.0  # or the next claims would take them again, as many as before
        return given_back

    def abandon(self, batch: Batch) -> None:
        """Start another slot in place of the one that *batch* still holds."""
        self.stuck.discard(batch)
        self.count_awake(-1)
        self.start_slot()
        log.warning(
            "thread lost to a handler that does not end",
            batch_id=batch.id,
            kind=batch.kind,
            lost=len(self.lost),
            at=self.place_of(batch),
        )

    def place_of(self, batch: Batch) -> str:
        """Return where the thread that runs *batch* is, "" if it has ended."""
        for frame in sys._current_frames().values():
            for outer, _ in traceback.walk_stack(frame):
                if outer.f_code is ThreadLane.slot.__code__ and outer.f_locals.get("batch") is batch:
                    return place(frame)
        return ""

    def stop(self) -> None:
        """Let idle slots end."""
        self.stopped = True
        self.wake.set()


def place(frame: FrameType | None) -> str:
    """Return where a thread is: file, line and function, of its innermost calls."""
    frames = itertools.islice(traceback.walk_stack(frame), FRAMES_TOLD)
    told = (f"{Path(outer.f_code.co_filename).name}:{line} in {outer.f_code.co_name}" for outer, line in frames)
    return " < ".join(told)


class LoopLane(Lane):
    """One event loop, in a thread of its own, for all ``async def`` handlers: a task a batch.

    A handler that blocks the loop holds up every other one. While the loop does not answer, nothing more is claimed,
    and what has not begun is given back.
    """

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        concurrency: int,
        ended: Ended,
        connections: HandlerConnections,
        *,
        traced: bool = False,
    ) -> None:
        super().__init__(handlers, concurrency, ended, connections.async_fair_queue)
        self.run = run_async_traced if traced else run_async
        self.connections = connections
        self.places.on_advance = self.begin_next
        self.held_up: deque[asyncio.Future[None]] = deque()  # of tasks whose batches have not begun
        self.tasks: dict[Batch, asyncio.Task[None]] = {}
        self.ready = threading.Event()
        self.thread = threading.Thread(target=self.run_loop, name="batchq-event-loop", daemon=True)
        self.asked_at: float | None = None  # since when the loop has not answered
        self.blocked_is_told = False

    def start(self) -> None:
        """Start the event loop, and wait until it runs."""
        self.thread.start()
        self.ready.wait()

    def run_loop(self) -> None:
        """Run the event loop until `stop`, whatever handlers do to it.

        A task of a handler's own that raises SystemExit would end it before, and so would loop.stop().
        """
        with asyncio.Runner() as runner:
            loop = runner.get_loop()
            main = loop.create_task(self.main())
            while not main.done():
                with contextlib.suppress(SystemExit, KeyboardInterrupt, RuntimeError):
                    loop.run_until_complete(main)

    async def main(self) -> None:
        """Keep the loop and its connections open until `stop`."""
        self.loop = asyncio.get_running_loop()
        self.stopped = asyncio.Event()
        while not self.stopped.is_set():
            try:
                await self.connections.open_async()
                self.ready.set()
                await self.stopped.wait()
            except asyncio.CancelledError:  # a handler has cancelled every task there is: the pool's as well
                log.warning("every task of the event loop was cancelled", tasks=len(self.tasks))
        await self.connections.close_async()

    def begin(self, batches: list[Batch]) -> None:
        """Begin a task for each batch."""
        self.loop.call_soon_threadsafe(self.begin_tasks, batches)

    def begin_tasks(self, batches: list[Batch]) -> None:
        """Begin a task for each batch; in the loop."""
        for batch in batches:
            self.tasks[batch] = task = self.loop.create_task(self.run_task(batch))
            task.add_done_callback(partial(self.task_ended, batch))

    async def run_task(self, batch: Batch) -> None:
        """Run one batch, when it is its turn to begin."""
        if self.held_up or self.is_held_up():
            await self.turn()
        if self.begins(batch):
            self.end(batch, await self.run(batch, self.handlers[batch.kind]))

    async def turn(self) -> None:
        """Wait until as few handlers wait for connections as get on soon; one task after the other."""
        future = self.loop.create_future()
        self.held_up.append(future)
        try:
            await future
        finally:
            self.loop.call_soon(self.begin_next)  # when this one has come to its first wait

    def begin_next(self) -> None:
        """Let the task begin that has waited longest, unless too many handlers wait for connections; in the loop."""
        while self.held_up and not self.is_held_up():
            future = self.held_up.popleft()
            if not future.done():
                future.set_result(None)
                return

    def not_begun(self) -> int:
        """Return about how many tasks wait for their turn to begin."""
        return len(self.held_up)

    def task_ended(self, batch: Batch, task: asyncio.Task[None]) -> None:
        """Forget a task; end its batch if it was cancelled by another one before it began, or as its end was told."""
        self.tasks.pop(batch, None)
        if self.lost:
            self.came_back(batch)
        error = asyncio.CancelledError("its task was cancelled") if task.cancelled() else task.exception()
        if error is not None:
            handler = self.handlers[batch.kind]
            has_begun = batch.begun_at is not None
            self.end(batch, safely(failed_attempt, batch, handler, error) if has_begun else RELEASED)

    # ------------------------------------------------------------------------------------------------ whether it runs

    def room(self) -> int:
        """Return how many batches to claim now: none while the loop does not answer."""
        return 0 if self.blocked_seconds() > BLOCKED_SECONDS else super().room()

    def blocked_seconds(self) -> float:
        """Return for how long the loop has not answered."""
        asked_at = self.asked_at
        return 0.0 if asked_at is None else time.monotonic() - asked_at

    def ask(self) -> None:
        """Have the loop answer, when it comes to it; tell of one that does not."""
        if not self.ready.is_set():  # it was never started
            return
        if self.asked_at is None:
            self.asked_at = time.monotonic()
            self.loop.call_soon_threadsafe(self.answer)
        elif (seconds := self.blocked_seconds()) > BLOCKED_SECONDS and not self.blocked_is_told:
            self.blocked_is_told = True
            where = place(sys._current_frames().get(self.thread.ident or 0))
            log.warning("event loop blocked by a handler", for_seconds=round(seconds, 1), at=where)

    def answer(self) -> None:
        """Say that the loop runs; in the loop."""
        if self.blocked_is_told:
            log.info("event loop runs again", after_seconds=round(self.blocked_seconds(), 1))
        self.asked_at = None
        self.blocked_is_told = False

    def lost_slots(self, for_seconds: float) -> int:
        """Return how many slots have been lost for as long: all, while a handler that was to end blocks the loop."""
        lost = super().lost_slots(for_seconds)
        return self.concurrency if lost and self.blocked_seconds() > for_seconds else lost

    def give_back_waiting(self, for_seconds: float) -> int:
        """Give back what has not begun: a blocked loop keeps it waiting, or its turn to use connections has not come.

        With 0 seconds all of it.
        """
        self.ask()
        if for_seconds and self.blocked_seconds() < BLOCKED_SECONDS and not self.held_up:
            return 0
        since = time.monotonic() - for_seconds
        waiting = [batch for batch in self.in_hand() if batch.begun_at is None and batch.claim.arrived_at <= since]
        given_back = [batch for batch in waiting if self.end(batch, RELEASED, unless_begun=True)]
        for batch in given_back:
            self.abandon(batch)
        return len(given_back)

    # ---------------------------------------------------------------------------------------------------- its end

    def abandon(self, batch: Batch) -> None:
        """Cancel the batch's task."""
        self.loop.call_soon_threadsafe(self.cancel, batch)

    def cancel(self, batch: Batch) -> None:
        """Cancel the batch's task; in the loop."""
        if task := self.tasks.get(batch):
            task.cancel()

    def stop(self) -> None:
        """Let the loop end, and wait for it a second; unless it was never started."""
        if not (self.thread.is_alive() and self.ready.wait(1)):
            return
        self.loop.call_soon_threadsafe(self.stopped.set)
        self.thread.join(1)
