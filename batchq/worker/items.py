"""Item handlers: call the function for each item of a chunk, then commit the processed items; chunk by chunk.

A chunk ends by size, after about a second, or when the batch must end. The items begun are always the first ones of the
chunk, even when several run concurrently, so a checkpoint only has to record how many.
"""

import asyncio
import contextvars
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import psycopg
from pydantic import BaseModel, ValidationError

from batchq.app import ItemHandler
from batchq.batch import Batch, Chunk
from batchq.batch.chunks import commit_by_finish
from batchq.batch.claimed import ClaimedBatch
from batchq.common.text import close_coroutine
from batchq.errors import Cancel, Interrupted, InvalidInput, Snooze, Throttled, of_group
from batchq.postgres.connections import AnyConnection, is_lost
from batchq.postgres.transactions import CONFLICTS

_CHUNK_SECONDS = 1.0
# A longer throttle ends the batch, which is pending again afterwards; a shorter one is waited for.
MOST_WAITED_SECONDS = 10.0
_CHECK_SECONDS = 0.25  # while it waits: whether to stop
_PASSED_ON = (Interrupted, KeyboardInterrupt, asyncio.CancelledError, GeneratorExit)


def validate(model: type[BaseModel], value: Any, what: str) -> BaseModel:
    """Return *value* as an instance of *model*. Raises InvalidInput with the model's message, in one line."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(part) for part in detail['loc']) or 'value'}: {detail['msg']}" for detail in error.errors()
        ]
        raise InvalidInput(f"the {what} does not fit {model.__name__}: {'; '.join(problems)}") from None


class _Turn(NamedTuple):
    """To wait at the gate; the other threads or tasks of the chunk wait for it."""

    of_threads: threading.Lock
    of_tasks: asyncio.Lock


class ChunkRun:
    """One chunk being processed by one item handler. *batch*: what the handler sees."""

    def __init__(self, handler: ItemHandler, chunk: Chunk, claimed: ClaimedBatch, batch: Batch) -> None:
        self._handler = handler
        self._chunk = chunk
        self._claimed = claimed
        self._arguments: dict[str, Any] = {"batch": batch} if handler.wants_batch else {}
        # Shared by all threads and tasks of the chunk; taking the next of a range's iterator is atomic.
        self._positions = iter(range(len(chunk)))
        self._ends_at = time.monotonic() + _CHUNK_SECONDS
        self._ended_by: tuple[int, Snooze | Cancel] | None = None  # from which position on, and why
        self._gate = claimed.claim.runtime.gate(claimed.whole_queue, claimed.kind)
        self._again: deque[int] = deque()  # the positions of items that were throttled
        self._has_begun = False  # an item
        self._has_token = False  # for the next item, from the gate
        self._turn = _Turn(threading.Lock(), asyncio.Lock())
        self._broken_by: BaseException | None = None  # nothing of the chunk may be committed

    def close(self) -> None:
        """Limit the chunk to the items begun or, if one ended the batch, to those before it.

        Raises what broke the chunk: then nothing of it may be committed.
        """
        if self._broken_by is not None:
            raise self._broken_by
        if self._has_token:
            self._gate.give_back()
        for position in self._again:
            self._chunk.fail(position, Snooze(self._gate.closed_seconds))
        begun = next(self._positions, len(self._chunk))
        self._chunk.end_at(begun if self._ended_by is None else min(begun, self._ended_by[0]))

    def commit_by_finish(self) -> bool:
        """Leave the checkpoint to the finish of the batch; return whether that is possible."""
        return self._ended_by is None and commit_by_finish(self._chunk)

    def raise_end(self) -> None:
        """Raise what ends the batch, now that the items before it are committed."""
        if self._ended_by is not None:
            raise self._ended_by[1]

    def _item(self, position: int) -> Any:
        """Return the item to call the handler with. Raises InvalidInput if it does not fit its model."""
        value = self._chunk.items[position]
        return value if self._handler.item_model is None else validate(self._handler.item_model, value, "item")

    def _is_over(self) -> bool:
        """Return whether to begin no more items."""
        return self._must_end() or time.monotonic() >= self._ends_at

    def _must_end(self) -> bool:
        return self._ended_by is not None or self._broken_by is not None or self._claimed.stop_requested

    # ---------------------------------------------------------------------------------------------------- at the gate

    def _seconds_to_wait(self) -> float | None:
        """Return 0 if the next item may begin, else how long to wait before asking again; None: none in this chunk.

        A chunk does not end before its first item, since there would be nothing to commit.
        """
        # While an item waits for the end of a throttle, the chunk waits with it.
        ends_at = self._ends_at + (MOST_WAITED_SECONDS if self._again else 0)
        if self._must_end() or (self._has_begun and time.monotonic() >= ends_at):
            return None
        if self._has_token:
            return 0.0
        if (seconds := self._gate.closed_seconds) > MOST_WAITED_SECONDS:
            self._ended_by = (len(self._chunk), Snooze(seconds))
            return None
        seconds = self._gate.take()
        self._has_token = not seconds
        return min(seconds, _CHECK_SECONDS)

    def wait_at_gate(self) -> None:
        """Wait until the next item may begin, or none of this chunk any more."""
        self._gate.waiting.append(None)
        try:
            while seconds := self._seconds_to_wait():
                time.sleep(seconds)
        finally:
            self._gate.waiting.pop()

    async def wait_at_gate_async(self) -> None:
        """Async version of `wait_at_gate`."""
        self._gate.waiting.append(None)
        try:
            while seconds := self._seconds_to_wait():
                await asyncio.sleep(seconds)
        finally:
            self._gate.waiting.pop()

    def _take_next(self) -> int | None:
        """Return the position of the next item, which may begin; None if there is none, or none may."""
        if not self._has_token:
            return None
        position = self._again.popleft() if self._again else next(self._positions, None)
        if position is not None:
            self._has_token, self._has_begun = False, True
        return position

    def _pass_gate(self) -> int | None:
        """Wait until the next item may begin, and return its position; None if none begins in this chunk any more. One
        thread of the chunk waits at the gate, the others wait for their turn."""
        with self._turn.of_threads:
            self.wait_at_gate()
            return self._take_next()

    async def _pass_gate_async(self) -> int | None:
        """Async version of `_pass_gate`."""
        async with self._turn.of_tasks:
            await self.wait_at_gate_async()
            return self._take_next()

    def _record(self, position: int, error: BaseException, conn: AnyConnection | None) -> None:
        """Record what an item raised: its own failure, or an error that concerns the whole chunk.

        That one is raised later, by `close`. Raised here, KeyboardInterrupt would end the event loop, and other items
        would keep running unnoticed.
        """
        error = of_group(error)
        if isinstance(error, _PASSED_ON):
            self._broken_by = self._broken_by or error
        elif conn is not None and is_lost(conn):
            self._broken_by = self._broken_by or self._lost_at(position, error)
        elif conn is not None and isinstance(error, CONFLICTS):
            self._broken_by = self._broken_by or error
        elif isinstance(error, Throttled):
            self._throttle(position, error)
        elif not isinstance(error, Cancel):
            self._chunk.fail(position, error)  # of a Snooze: it runs later
        elif self._ended_by is None or position < self._ended_by[0]:
            self._ended_by = (position, error)

    def _throttle(self, position: int, error: Throttled) -> None:
        """Let all wait. Run the item again afterwards: in this chunk if that is soon, else in the next run."""
        claimed = self._claimed
        claimed.claim.runtime.throttle(claimed.whole_queue, claimed.kind, claimed.row.key, error)
        if error.scope != "key" and error.seconds <= MOST_WAITED_SECONDS:
            self._again.append(position)
            return
        self._chunk.fail(position, error)
        if error.scope == "key":  # which has no gate: the batch itself waits
            self._ended_by = self._ended_by or (len(self._chunk), Snooze(error.seconds))

    def _lost_at(self, position: int, error: BaseException) -> BaseException:
        """Return what breaks the chunk when its connection is lost: never the item's own error, which would be taken
        for the whole batch's (InvalidInput would fail it without a retry)."""
        if isinstance(error, psycopg.Error):
            return error
        what = f"item {self._chunk.indexes[position]} raised {type(error).__name__}"
        lost = psycopg.OperationalError(f"the connection was lost within a chunk; {what}")
        lost.__cause__ = error
        return lost

    @contextmanager
    def _cursor_of_success(self) -> Iterator[None]:
        """If the block fails, forget the cursor that it saved in the chunk's transaction: its savepoint undoes rows."""
        opened = self._claimed.open_transaction
        before = opened.progress if opened is not None else None
        try:
            yield
        except BaseException:
            if opened is not None and before is not None:
                opened.progress = before
            raise

    # ------------------------------------------------------------------------------------------- in threads (def)

    def process(self, conn: psycopg.Connection[Any] | None = None) -> None:
        """Process items until the chunk is over."""
        call = self._caller(conn)
        if self._gate.is_open:
            for position in self._positions:
                try:
                    if (result := call(position)) is not None:
                        _refuse_coroutine(result)
                except BaseException as error:
                    self._record(position, error, conn)
                if self._is_over():
                    return
                if not self._gate.is_open:
                    self._has_begun = True
                    break
            else:
                if not self._again:
                    return
        while (begun := self._pass_gate()) is not None:
            try:
                if (result := call(begun)) is not None:
                    _refuse_coroutine(result)
            except BaseException as error:
                self._record(begun, error, conn)

    def process_concurrently(self) -> None:
        """Process items in as many threads as the handler's concurrency."""
        concurrency = self._handler.concurrency
        with ThreadPoolExecutor(concurrency, thread_name_prefix="batchq-items") as executor:
            futures = [executor.submit(contextvars.copy_context().run, self.process) for _ in range(concurrency)]
        for future in futures:
            future.result()

    def _caller(self, conn: psycopg.Connection[Any] | None) -> Callable[[int], Any]:
        """Return a function that calls the handler with the item at a position; for plain items, as directly as it
        gets."""
        function, items, arguments = self._handler.function, self._chunk.items, self._arguments
        if conn is not None:
            return lambda position: self._call_in_savepoint(position, conn)
        if self._handler.item_model is not None or arguments:
            return lambda position: function(self._item(position), **arguments)
        return lambda position: function(items[position])

    def _call_in_savepoint(self, position: int, conn: psycopg.Connection[Any]) -> Any:
        with_conn = {"conn": conn} if self._handler.wants_conn else {}
        with self._cursor_of_success(), conn.transaction():
            return self._handler.function(self._item(position), **self._arguments, **with_conn)

    # ------------------------------------------------------------------------------- in the event loop (async def)

    async def process_async(self, conn: psycopg.AsyncConnection[Any] | None = None) -> None:
        """Async version of `process`."""
        if self._handler.wants_conn:
            self._arguments["conn"] = conn
        if self._gate.is_open:
            for position in self._positions:
                await self._run_async(position, conn)
                if self._is_over():
                    return
                if not self._gate.is_open:
                    self._has_begun = True
                    break
            else:
                if not self._again:
                    return
        while (begun := await self._pass_gate_async()) is not None:
            await self._run_async(begun, conn)

    async def _run_async(self, position: int, conn: psycopg.AsyncConnection[Any] | None) -> None:
        try:
            if conn is None:
                await self._handler.function(self._item(position), **self._arguments)
            else:
                with self._cursor_of_success():
                    async with conn.transaction():
                        await self._handler.function(self._item(position), **self._arguments)
        except BaseException as error:
            self._record(position, error, conn)

    async def process_concurrently_async(self) -> None:
        """Process as many items concurrently as the handler's concurrency."""
        await asyncio.gather(*(self.process_async() for _ in range(self._handler.concurrency)))


def _refuse_coroutine(result: Any) -> None:
    """Raise TypeError if a ``def`` item handler has returned a coroutine, of which nothing has run."""
    if close_coroutine(result):
        raise TypeError("the item handler returned a coroutine, which nobody awaited; declare it with `async def`")


def run_items(claimed: ClaimedBatch, batch: Batch, handler: ItemHandler) -> None:
    """Process the remaining items. Raises what ends the batch early, after committing the processed items."""
    for chunk in batch.chunks(handler.chunk_size):
        run = ChunkRun(handler, chunk, claimed, batch)
        if handler.transactional:
            run.wait_at_gate()  # a transaction would be idle meanwhile
            with chunk.transaction() as conn:
                run.process(conn)
                run.close()
        else:
            run.process() if handler.concurrency == 1 else run.process_concurrently()
            run.close()
            if not run.commit_by_finish():
                chunk.commit()
        run.raise_end()


async def run_items_async(claimed: ClaimedBatch, batch: Batch, handler: ItemHandler) -> None:
    """Async version of `run_items`."""
    async for chunk in batch.chunks(handler.chunk_size):
        run = ChunkRun(handler, chunk, claimed, batch)
        if handler.transactional:
            await run.wait_at_gate_async()
            async with chunk.transaction() as conn:
                await run.process_async(conn)
                run.close()
        else:
            await run.process_concurrently_async()
            run.close()
            if not run.commit_by_finish():
                await chunk.commit_async()
        run.raise_end()
