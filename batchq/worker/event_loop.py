"""The event loop of a worker: one thread for all ``async def`` handlers, and a watch over whether they block it."""

import asyncio
import contextlib
import sys
import threading
import time

from batchq.common.log import get_logger
from batchq.postgres.handler_connections import HandlerConnections
from batchq.worker.lanes import call_site

BLOCKED_SECONDS = 2.0

_log = get_logger()


class EventLoop:
    """The loop and its thread. Lanes share it, because what handlers open in a loop belongs to that loop."""

    def __init__(self, connections: HandlerConnections) -> None:
        self._connections = connections
        self._ready = threading.Event()
        self._start_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="batchq-event-loop", daemon=True)
        self._pinged_at: float | None = None  # since when the loop has not answered
        self._blocked_is_logged = False
        self._is_asked_to_stop = False

    def start(self) -> None:
        """Start the loop, unless it runs, and wait until it runs."""
        with self._start_lock:
            if self._thread.ident is None:
                self._thread.start()
        self._ready.wait()

    def stop(self) -> None:
        """Stop the loop and wait up to a second for it, the first time; do nothing if it was never started."""
        if self._is_asked_to_stop or not (self._thread.is_alive() and self._ready.wait(1)):
            return
        self._is_asked_to_stop = True
        self.loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(1)

    def _run(self) -> None:
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
                _log.warning("every task of the event loop was cancelled", tasks=len(asyncio.all_tasks()))
        await self._connections.close_async()

    # ------------------------------------------------------------------------------------------ whether it is blocked

    def blocked_seconds(self) -> float:
        """Return for how long the loop has not answered."""
        pinged_at = self._pinged_at
        return 0.0 if pinged_at is None else time.monotonic() - pinged_at

    def ping(self) -> None:
        """Have the loop answer as soon as it can; log once if it has not for 2 s."""
        if not self._ready.is_set():  # it was never started
            return
        if self._pinged_at is None:
            self._pinged_at = time.monotonic()
            self.loop.call_soon_threadsafe(self._answer)
        elif (seconds := self.blocked_seconds()) > BLOCKED_SECONDS and not self._blocked_is_logged:
            self._blocked_is_logged = True
            where = call_site(sys._current_frames().get(self._thread.ident or 0))
            _log.warning("event loop blocked by a handler", for_seconds=round(seconds, 1), at=where)

    def _answer(self) -> None:
        if self._blocked_is_logged:
            _log.info("event loop runs again", after_seconds=round(self.blocked_seconds(), 1))
        self._pinged_at = None
        self._blocked_is_logged = False
