"""How a worker runs the hooks of its app around batches, and its lifespan."""

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent import futures
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any

from batchq.app import App, Handler, ItemHandler
from batchq.batch import Batch
from batchq.common.forks import end_if_forked
from batchq.common.log import get_logger
from batchq.common.text import one_line
from batchq.errors import LifespanFailed
from batchq.hooks import Hooks, LifespanHook, name_of
from batchq.worker.context import Context
from batchq.worker.event_loop import EventLoop
from batchq.worker.failures import Failed, FailureHooks
from batchq.worker.items import run_items, run_items_async
from batchq.worker.lifecycle import Services

LEAST_SECONDS = 0.5  # for hooks when the worker ends

_log = get_logger()
_Call = Callable[[Batch], Any]


# ---------------------------------------------------------------------------------------------------- around a batch


def in_hooks(handlers: Mapping[str, Handler], hooks: Hooks) -> Mapping[str, Handler]:
    """Return the handlers, each within the hooks of its style; as they are where there is no such hook."""
    if not hooks.around and not hooks.around_async:
        return handlers
    return {kind: _in_hooks(handler, hooks) for kind, handler in handlers.items()}


def _in_hooks(handler: Handler, hooks: Hooks) -> Handler:
    around: list[Any] = [*(hooks.around_async if handler.is_async else hooks.around)]
    if not around:
        return handler
    call: _Call = handler.function
    if isinstance(handler, ItemHandler):
        call = _all_items_async(handler) if handler.is_async else _all_items(handler)
    for hook in reversed(around):  # the first one registered is the outermost
        call = _within_async(hook, call) if handler.is_async else _within(hook, call)
    return replace(handler, run=call) if isinstance(handler, ItemHandler) else replace(handler, function=call)


def _all_items(handler: ItemHandler) -> _Call:
    return lambda batch: run_items(batch._claimed, batch, handler)


def _all_items_async(handler: ItemHandler) -> _Call:
    return lambda batch: run_items_async(batch._claimed, batch, handler)


def _within(hook: Callable[[Batch], Iterator[None]], call: _Call) -> _Call:
    """Return *call* within a hook, which may replace the error that it raises, but not swallow it."""
    manager = contextmanager(hook)

    @wraps(call)
    def within(batch: Batch) -> Any:
        raised: BaseException | None = None
        try:
            with manager(batch):
                try:
                    return call(batch)
                except BaseException as error:
                    raised = error
                    raise
                finally:
                    end_if_forked()
            raise _swallowed(raised)
        finally:
            raised = None  # its traceback refers to this frame: only the collector would free the two

    return within


def _within_async(hook: Callable[[Batch], AsyncIterator[None]], call: _Call) -> _Call:
    """Async version of `_within`."""
    manager = asynccontextmanager(hook)

    @wraps(call)
    async def within(batch: Batch) -> Any:
        raised: BaseException | None = None
        try:
            async with manager(batch):
                try:
                    return await call(batch)
                except BaseException as error:
                    raised = error
                    raise
                finally:
                    end_if_forked()
            raise _swallowed(raised)
        finally:
            raised = None

    return within


def _swallowed(raised: BaseException | None) -> BaseException:
    """Return what the handler raised and its hook did not: a failed attempt must not look like a completed batch."""
    return raised or RuntimeError("a hook around the batch ended before the handler")


# ------------------------------------------------------------------------------------------------ while a worker runs


class WorkerLifespan:
    """The app's lifespan: opened before the first claim, closed after the last handler has ended.

    An ``async def`` one is entered and left by one task of the event loop, which waits in between.
    """

    def __init__(self, hook: LifespanHook, event_loop: EventLoop | None) -> None:
        self._hook = hook
        self._event_loop = event_loop if inspect.isasyncgenfunction(hook) else None
        self._manager: Any = None  # of a `def` lifespan that is open
        self._held: futures.Future[None] | None = None  # the task of an `async def` one

    def open(self) -> Any:
        """Return what it yielded. Raises LifespanFailed."""
        try:
            if self._event_loop is not None:
                return self._open_async(self._event_loop)
            manager = contextmanager(self._hook)()  # type: ignore[arg-type]
            state = manager.__enter__()
            self._manager = manager
            return state
        except Exception as error:
            _log.error("lifespan failed", at="start", error=one_line(error), exc_info=error)
            raise LifespanFailed(f"the lifespan {name_of(self._hook)}() failed: {one_line(error)}") from error

    def close(self, seconds: float) -> None:
        """Close it, if it is open. An error is logged. An ``async def`` lifespan has *seconds* for that."""
        try:
            if self._held is not None and self._event_loop is not None:
                self._event_loop.loop.call_soon_threadsafe(self._closing.set)
                self._held.result(seconds)
            elif self._manager is not None:
                self._manager.__exit__(None, None, None)
        except Exception as error:
            if isinstance(error, TimeoutError) and self._held is not None and not self._held.done():
                _log.error("lifespan not closed in time", seconds=round(seconds, 1))
            else:
                _log.error("lifespan failed", at="end", error=one_line(error), exc_info=error)
        self._held = self._manager = None

    def _open_async(self, event_loop: EventLoop) -> Any:
        event_loop.start()
        opened: futures.Future[Any] = futures.Future()
        self._closing = asyncio.Event()
        held = asyncio.run_coroutine_threadsafe(self._hold(opened), event_loop.loop)
        futures.wait([opened, held], return_when=futures.FIRST_COMPLETED)
        if not opened.done():
            held.result()
        self._held = held
        return opened.result()

    async def _hold(self, opened: "futures.Future[Any]") -> None:
        async with asynccontextmanager(self._hook)() as state:  # type: ignore[arg-type]
            opened.set_result(state)
            while not self._closing.is_set():
                try:
                    await self._closing.wait()
                except asyncio.CancelledError:  # a handler has cancelled every task there is
                    if self._closing.is_set():
                        raise


# --------------------------------------------------------------------------------------------------- both, of a worker


class WorkerHooks:
    """The hooks of a worker's app, and the event loop for them and for ``async def`` handlers (None: needed by none).

    on_failed: what to call with a batch that has failed; None without hooks for that.
    """

    def __init__(self, app: App, context: Context) -> None:
        hooks = app.hooks
        needs_loop = hooks.need_event_loop or any(handler.is_async for handler in app.handlers.values())
        self.event_loop = EventLoop(context.connections) if needs_loop else None
        self._context = context
        self._lifespan = WorkerLifespan(hooks.lifespan, self.event_loop) if hooks.lifespan else None
        self._failures: FailureHooks | None = None
        self.on_failed: Callable[[Failed], None] | None = None
        if hooks.on_failure:
            self._failures = FailureHooks(hooks.on_failure, context.new_link(), self.event_loop)
            self.on_failed = self._failures.put

    def start(self, services: Services) -> None:
        """Open the lifespan, then start the thread of the failure hooks. Raises LifespanFailed."""
        if self.event_loop is not None:
            self.event_loop.start()
        if self._lifespan is not None:
            self._context.app_state = self._lifespan.open()
        if self._failures is not None:
            services.start("failure hooks", self._failures.run)

    def close(self, services: Services, seconds: float) -> None:
        """Call what is left of the failure hooks, then close the lifespan; in about *seconds* if both keep to it."""
        until = time.monotonic() + seconds
        if self._failures is not None:
            self._failures.close()
            if not services.has_ended("failure hooks", until - time.monotonic()):
                self._failures.give_up()
        if self._lifespan is not None:
            self._lifespan.close(max(LEAST_SECONDS, until - time.monotonic()))
        if self.event_loop is not None:
            self.event_loop.stop()
