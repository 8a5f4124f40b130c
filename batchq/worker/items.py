"""Item handlers: chunk by chunk, call the function once an item, then commit what is worked.

A chunk ends by size, after about a second, or when the batch must end. The items begun are always the first ones of the
chunk, also when several run at once: so "how many" is all that a checkpoint has to remember.
"""

import asyncio
import contextvars
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psycopg
from pydantic import BaseModel, ValidationError

from batchq.app import ItemHandler
from batchq.batch import Batch, Chunk
from batchq.common.text import close_coroutine
from batchq.errors import Cancel, Interrupted, InvalidInput, Snooze, of_group
from batchq.postgres.connections import AnyConnection, is_lost
from batchq.postgres.transactions import CONFLICTS

CHUNK_SECONDS = 1.0
PASSED_ON = (Interrupted, KeyboardInterrupt, asyncio.CancelledError, GeneratorExit)


def validate(model: type[BaseModel], value: Any, what: str) -> BaseModel:
    """Return *value* as an instance of *model*. Raises InvalidInput with the model's message, in one line."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(part) for part in detail['loc']) or 'value'}: {detail['msg']}" for detail in error.errors()
        ]
        raise InvalidInput(f"the {what} does not fit {model.__name__}: {'; '.join(problems)}") from None


class ChunkRun:
    """One chunk being worked by one item handler."""

    def __init__(self, handler: ItemHandler, chunk: Chunk) -> None:
        self.handler = handler
        self.chunk = chunk
        self.batch = chunk.batch
        self.arguments: dict[str, Any] = {"batch": chunk.batch} if handler.wants_batch else {}
        # Shared by all that work on it; taking the next of a range's iterator is atomic.
        self.positions = iter(range(len(chunk)))
        self.ends_at = time.monotonic() + CHUNK_SECONDS
        self.ended_by: tuple[int, Snooze | Cancel] | None = None
        self.broken_by: BaseException | None = None

    def item(self, position: int) -> Any:
        """Return the item to call the handler with. Raises InvalidInput if it does not fit its model."""
        value = self.chunk.items[position]
        return value if self.handler.item_model is None else validate(self.handler.item_model, value, "item")

    def is_over(self) -> bool:
        """Tell whether to begin no further item."""
        has_ended = self.ended_by is not None or self.broken_by is not None
        return has_ended or time.monotonic() >= self.ends_at or self.batch.stop_requested

    def failed(self, position: int, error: BaseException, conn: AnyConnection | None) -> None:
        """Record what an item raised: its own failure, or what concerns the whole chunk.

        Raised at once, KeyboardInterrupt would end the event loop, and other items would run on unseen.
        """
        error = of_group(error)
        if isinstance(error, PASSED_ON):
            self.broken_by = self.broken_by or error
        elif conn is not None and is_lost(conn):
            self.broken_by = self.broken_by or self.lost_at(position, error)
        elif conn is not None and isinstance(error, CONFLICTS):
            self.broken_by = self.broken_by or error
        elif isinstance(error, Snooze | Cancel):
            if self.ended_by is None or position < self.ended_by[0]:
                self.ended_by = (position, error)
        else:
            self.chunk.fail(position, error)

    def lost_at(self, position: int, error: BaseException) -> BaseException:
        """Return what breaks the chunk when its connection is gone: never the item's own error, which would tell of one
        item and be taken for the whole batch (InvalidInput would end it for good)."""
        if isinstance(error, psycopg.Error):
            return error
        what = f"item {self.chunk.indexes[position]} raised {type(error).__name__}"
        lost = psycopg.OperationalError(f"the connection was lost within a chunk; {what}")
        lost.__cause__ = error
        return lost

    def close(self) -> None:
        """Keep in the chunk what is worked: all begun items, or those before one that ended the batch.

        Raises what broke the chunk: then nothing of it is to be committed.
        """
        if self.broken_by is not None:
            raise self.broken_by
        begun = next(self.positions, len(self.chunk))
        self.chunk.end_at(begun if self.ended_by is None else self.ended_by[0])

    def can_end_batch(self) -> bool:
        """Whether the finish of the batch may count this chunk, so that it needs no checkpoint."""
        return self.ended_by is None and self.chunk.can_end_batch()

    def raise_end(self) -> None:
        """Raise the Snooze or Cancel that an item raised, now that the items before it are committed."""
        if self.ended_by is not None:
            raise self.ended_by[1]

    # ------------------------------------------------------------------------------------------- in threads (def)

    def work(self, conn: psycopg.Connection[Any] | None = None) -> None:
        """Work items until the chunk is over."""
        call = self.caller(conn)
        for position in self.positions:
            try:
                if (result := call(position)) is not None:
                    refuse_coroutine(result)
            except BaseException as error:
                self.failed(position, error, conn)
            if self.is_over():
                return

    def caller(self, conn: psycopg.Connection[Any] | None) -> Callable[[int], Any]:
        """Return what calls the handler with the item at a position: for plain items, with nothing in between."""
        function, items, arguments = self.handler.function, self.chunk.items, self.arguments
        if conn is not None:
            return lambda position: self.call_in_savepoint(position, conn)
        if self.handler.item_model is not None or arguments:
            return lambda position: function(self.item(position), **arguments)
        return lambda position: function(items[position])

    def call_in_savepoint(self, position: int, conn: psycopg.Connection[Any]) -> Any:
        """Call the handler with an item, in a savepoint of the chunk's transaction; return what it returns."""
        with_conn = {"conn": conn} if self.handler.wants_conn else {}
        with self.cursor_of_success(), conn.transaction():
            return self.handler.function(self.item(position), **self.arguments, **with_conn)

    @contextmanager
    def cursor_of_success(self) -> Iterator[None]:
        """Forget a cursor that the block saves in the chunk's transaction if it fails, as its savepoint does rows."""
        opened = self.batch.open_transaction
        before = opened.progress if opened is not None else None
        try:
            yield
        except BaseException:
            if opened is not None and before is not None:
                opened.progress = before
            raise

    def work_concurrently(self) -> None:
        """Work items in as many threads as the handler's concurrency says."""
        with ThreadPoolExecutor(self.handler.concurrency, thread_name_prefix="batchq-items") as executor:
            futures = [
                executor.submit(contextvars.copy_context().run, self.work) for _ in range(self.handler.concurrency)
            ]
        for future in futures:
            future.result()

    # ------------------------------------------------------------------------------- in the event loop (async def)

    async def work_async(self, conn: psycopg.AsyncConnection[Any] | None = None) -> None:
        """Work items until the chunk is over."""
        if self.handler.wants_conn:
            self.arguments["conn"] = conn
        for position in self.positions:
            try:
                if conn is None:
                    await self.handler.function(self.item(position), **self.arguments)
                else:
                    with self.cursor_of_success():
                        async with conn.transaction():
                            await self.handler.function(self.item(position), **self.arguments)
            except BaseException as error:
                self.failed(position, error, conn)
            if self.is_over():
                return

    async def work_concurrently_async(self) -> None:
        """Work as many items at once as the handler's concurrency says."""
        await asyncio.gather(*(self.work_async() for _ in range(self.handler.concurrency)))


def refuse_coroutine(result: Any) -> None:
    """Raise TypeError if an item handler that is no ``async def`` has returned a coroutine: nothing of it has run."""
    if close_coroutine(result):
        raise TypeError("the item handler returned a coroutine, which nobody awaited; declare it with `async def`")


def run_items(batch: Batch, handler: ItemHandler) -> None:
    """Work the items that are left. Raises what ends the batch early, after the commit of what was worked."""
    for chunk in batch.chunks(handler.chunk_size):
        run = ChunkRun(handler, chunk)
        if handler.transactional:
            with chunk.transaction() as conn:
                run.work(conn)
                run.close()
        else:
            run.work() if handler.concurrency == 1 else run.work_concurrently()
            run.close()
            chunk.end_batch() if run.can_end_batch() else chunk.commit()
        run.raise_end()


async def run_items_async(batch: Batch, handler: ItemHandler) -> None:
    """Do as `run_items` does, in the event loop."""
    async for chunk in batch.chunks(handler.chunk_size):
        run = ChunkRun(handler, chunk)
        if handler.transactional:
            async with chunk.transaction() as conn:
                await run.work_async(conn)
                run.close()
        else:
            await run.work_concurrently_async()
            run.close()
            if run.can_end_batch():
                chunk.end_batch()
            else:
                await chunk.commit_async()
        run.raise_end()
