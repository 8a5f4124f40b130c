"""The lane of ``async def`` handlers: tasks of the event loop."""

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial

from batchq.app import Handler
from batchq.batch.claimed import ClaimedBatch
from batchq.postgres.fair_queue import FairQueue
from batchq.worker import event_loop
from batchq.worker.event_loop import EventLoop
from batchq.worker.execution import RELEASED, failed_attempt, run_async, run_async_traced, safely
from batchq.worker.lanes import Ended, Lane


class LoopLane(Lane):
    """A task of the event loop for each batch.

    A handler that blocks the loop holds up all others. While the loop does not answer, nothing more is claimed, and
    batches that have not begun are released.
    """

    # More than a dozen attributes: the lane's, and those of its tasks.
    def __init__(
        self,
        handlers: Mapping[str, Handler],
        concurrency: int,
        ended: Ended,
        fair_queue: FairQueue | None,
        event_loop: EventLoop,
        *,
        queues: Sequence[str] | None = None,
        traced: bool = False,
    ) -> None:
        super().__init__(handlers, concurrency, ended, fair_queue, queues=queues)
        self._run = run_async_traced if traced else run_async
        self.fair_queue.on_advance = self._begin_next
        self._held_up: deque[asyncio.Future[None]] = deque()  # of tasks whose batches have not begun
        self._tasks: dict[ClaimedBatch, asyncio.Task[None]] = {}
        self._event_loop = event_loop

    def start(self) -> None:
        """Start the event loop, and wait until it runs."""
        self._event_loop.start()

    def stop(self) -> None:
        """Stop the loop, and wait up to a second for it; do nothing if it was never started."""
        self._event_loop.stop()

    # ------------------------------------------------------------------------------------------------- the tasks

    def begin(self, batches: list[ClaimedBatch]) -> None:
        """Begin a task for each batch."""
        self._event_loop.loop.call_soon_threadsafe(self._begin_tasks, batches)

    def abandon(self, batch: ClaimedBatch) -> None:
        """Cancel the batch's task."""
        self._event_loop.loop.call_soon_threadsafe(self._cancel, batch)

    def waiting_count(self) -> int:
        """Return about how many tasks wait for their turn."""
        return len(self._held_up)

    def _begin_tasks(self, batches: list[ClaimedBatch]) -> None:
        for batch in batches:
            self._tasks[batch] = task = self._event_loop.loop.create_task(self._run_task(batch))
            task.add_done_callback(partial(self._task_ended, batch))

    async def _run_task(self, batch: ClaimedBatch) -> None:
        """Run one batch when its turn comes."""
        if self._held_up or self.is_held_up():
            await self._turn()
        if self.mark_running(batch):
            self.end(batch, await self._run(batch, self.handlers[batch.kind]))

    async def _turn(self) -> None:
        """Wait until few enough handlers wait for connections. Tasks get their turn one after the other."""
        future = self._event_loop.loop.create_future()
        self._held_up.append(future)
        try:
            await future
        finally:
            self._event_loop.loop.call_soon(self._begin_next)  # when this task has come to its first wait

    def _begin_next(self) -> None:
        """Let the task begin that has waited longest, unless too many handlers wait for connections. In the loop."""
        while self._held_up and not self.is_held_up():
            future = self._held_up.popleft()
            if not future.done():
                future.set_result(None)
                return

    def _cancel(self, batch: ClaimedBatch) -> None:
        if task := self._tasks.get(batch):
            task.cancel()

    def _task_ended(self, batch: ClaimedBatch, task: asyncio.Task[None]) -> None:
        """Forget a task. End its batch if another task cancelled it before it began or while it was ending."""
        self._tasks.pop(batch, None)
        if self.given_up:
            self.came_back(batch)
        error = asyncio.CancelledError("its task was cancelled") if task.cancelled() else task.exception()
        if error is not None:
            handler = self.handlers[batch.kind]
            has_begun = batch.begun_at is not None
            self.end(batch, safely(failed_attempt, batch, handler, error) if has_begun else RELEASED)

    # ------------------------------------------------------------------------------------- whether the loop is blocked

    def room(self) -> int:
        """Return how many batches to claim now: none while the loop does not answer."""
        return 0 if self._event_loop.blocked_seconds() > event_loop.BLOCKED_SECONDS else super().room()

    def lost_slots(self, for_seconds: float) -> int:
        """Return how many slots have been lost for *for_seconds*: all, while a handler that should end blocks the
        loop."""
        lost = super().lost_slots(for_seconds)
        return self.concurrency if lost and self._event_loop.blocked_seconds() > for_seconds else lost

    def release_waiting(self, for_seconds: float) -> int:
        """Release batches that have not begun because the loop is blocked or too many handlers wait for connections.

        With 0 seconds, release all that have not begun.
        """
        self._event_loop.ping()
        if for_seconds and self._event_loop.blocked_seconds() < event_loop.BLOCKED_SECONDS and not self._held_up:
            return 0
        since = time.monotonic() - for_seconds
        waiting = [b for b in self.list_in_flight() if b.begun_at is None and b.claim.arrived_at <= since]
        released = [batch for batch in waiting if self.end(batch, RELEASED, unless_begun=True)]
        for batch in released:
            self.abandon(batch)
        return len(released)
