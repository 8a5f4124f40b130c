"""The lane of ``async def`` handlers: an event loop."""

import asyncio
import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from functools import partial

from batchq.app import Handler
from batchq.batch.claimed import ClaimedBatch
from batchq.common.log import get_logger
from batchq.postgres.handler_connections import HandlerConnections
from batchq.worker.execution import RELEASED, failed_attempt, run_async, run_async_traced, safely
from batchq.worker.lanes import Ended, Lane, call_site

BLOCKED_SECONDS = 2.0

_log = get_logger()


class LoopLane(Lane):
    """One event loop, in a thread of its own, with a task for each batch.

    A handler that blocks the loop holds up all others. While the loop does not answer, nothing more is claimed, and
    batches that have not begun are released.
    """

    # More than a dozen attributes: the lane's, and those of a thread, of its loop and of the watch over it.
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
        self._run = run_async_traced if traced else run_async
        self._connections = connections
        self.fair_queue.on_advance = self._begin_next
        self._held_up: deque[asyncio.Future[None]] = deque()  # of tasks whose batches have not begun
        self._tasks: dict[ClaimedBatch, asyncio.Task[None]] = {}
        self._ready = threading.Event()
        self.thread = threading.Thread(target=self._run_loop, name="batchq-event-loop", daemon=True)
        self._pinged_at: float | None = None  # since when the loop has not answered
        self._blocked_is_logged = False

    # -------------------------------------------------------------------------------------------------- the loop

    def start(self) -> None:
        """Start the event loop, and wait until it runs."""
        self.thread.start()
        self._ready.wait()

    def stop(self) -> None:
        """Stop the loop, and wait up to a second for it; do nothing if it was never started."""
        if not (self.thread.is_alive() and self._ready.wait(1)):
            return
        self.loop.call_soon_threadsafe(self._stopped.set)
        self.thread.join(1)

    def _run_loop(self) -> None:
        """Run the event loop until `stop`, whatever handlers do to it.

        A handler's own task that raises SystemExit would end it earlier, and so would loop.stop().
        """
        with asyncio.Runner() as runner:
            loop = runner.get_loop()
            main = loop.create_task(self._main())
            while not main.done():
                with contextlib.suppress(SystemExit, KeyboardInterrupt, RuntimeError):
                    loop.run_until_complete(main)

    async def _main(self) -> None:
        """Keep the loop and its connections open until `stop`."""
        self.loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        while not self._stopped.is_set():
            try:
                await self._connections.open_async()
                self._ready.set()
                await self._stopped.wait()
            except asyncio.CancelledError:  # a handler has cancelled every task there is, even those of the pool
                _log.warning("every task of the event loop was cancelled", tasks=len(self._tasks))
        await self._connections.close_async()

    # ------------------------------------------------------------------------------------------------- the tasks

    def begin(self, batches: list[ClaimedBatch]) -> None:
        """Begin a task for each batch."""
        self.loop.call_soon_threadsafe(self._begin_tasks, batches)

    def abandon(self, batch: ClaimedBatch) -> None:
        """Cancel the batch's task."""
        self.loop.call_soon_threadsafe(self._cancel, batch)

    def waiting_count(self) -> int:
        """Return about how many tasks wait for their turn."""
        return len(self._held_up)

    def _begin_tasks(self, batches: list[ClaimedBatch]) -> None:
        for batch in batches:
            self._tasks[batch] = task = self.loop.create_task(self._run_task(batch))
            task.add_done_callback(partial(self._task_ended, batch))

    async def _run_task(self, batch: ClaimedBatch) -> None:
        """Run one batch when its turn comes."""
        if self._held_up or self.is_held_up():
            await self._turn()
        if self.mark_running(batch):
            self.end(batch, await self._run(batch, self.handlers[batch.kind]))

    async def _turn(self) -> None:
        """Wait until few enough handlers wait for connections. Tasks get their turn one after the other."""
        future = self.loop.create_future()
        self._held_up.append(future)
        try:
            await future
        finally:
            self.loop.call_soon(self._begin_next)  # when this task has come to its first wait

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
        return 0 if self._blocked_seconds() > BLOCKED_SECONDS else super().room()

    def lost_slots(self, for_seconds: float) -> int:
        """Return how many slots have been lost for *for_seconds*: all, while a handler that should end blocks the
        loop."""
        lost = super().lost_slots(for_seconds)
        return self.concurrency if lost and self._blocked_seconds() > for_seconds else lost

    def release_waiting(self, for_seconds: float) -> int:
        """Release batches that have not begun because the loop is blocked or too many handlers wait for connections.

        With 0 seconds, release all that have not begun.
        """
        self._ping()
        if for_seconds and self._blocked_seconds() < BLOCKED_SECONDS and not self._held_up:
            return 0
        since = time.monotonic() - for_seconds
        waiting = [b for b in self.list_in_flight() if b.begun_at is None and b.claim.arrived_at <= since]
        released = [batch for batch in waiting if self.end(batch, RELEASED, unless_begun=True)]
        for batch in released:
            self.abandon(batch)
        return len(released)

    def _blocked_seconds(self) -> float:
        """Return for how long the loop has not answered."""
        pinged_at = self._pinged_at
        return 0.0 if pinged_at is None else time.monotonic() - pinged_at

    def _ping(self) -> None:
        """Have the loop answer as soon as it can; log once if it has not for 2 s."""
        if not self._ready.is_set():  # it was never started
            return
        if self._pinged_at is None:
            self._pinged_at = time.monotonic()
            self.loop.call_soon_threadsafe(self._answer)
        elif (seconds := self._blocked_seconds()) > BLOCKED_SECONDS and not self._blocked_is_logged:
            self._blocked_is_logged = True
            where = call_site(sys._current_frames().get(self.thread.ident or 0))
            _log.warning("event loop blocked by a handler", for_seconds=round(seconds, 1), at=where)

    def _answer(self) -> None:
        if self._blocked_is_logged:
            _log.info("event loop runs again", after_seconds=round(self._blocked_seconds(), 1))
        self._pinged_at = None
        self._blocked_is_logged = False
