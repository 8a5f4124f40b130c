"""Chunks: groups of items, each of which is committed with a checkpoint."""

from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from typing import Any

from batchq.batch import callers
from batchq.batch.claimed import ClaimedBatch, from_json, refuse_in_event_loop
from batchq.batch.transactions import FencedTransaction
from batchq.common.hidden import note_items
from batchq.common.text import MOST_ERROR_BYTES, error_text, one_line
from batchq.errors import InvalidInput, Snooze, Throttled
from batchq.postgres.statements import inputs
from batchq.postgres.statements.checkpoints import ItemFailure, Progress
from batchq.postgres.statements.running import Statement

PAGE_BYTES = 4_000_000
_MOST_SNOOZED_SECONDS = 100 * 365 * 86_400


class Chunk:
    """A group of items that share one checkpoint.

    items: their values; indexes: their positions in the whole list. Mark failed items with `fail`; then commit in
    `transaction`, together with rows of your own, or with `commit`.
    """

    __slots__ = ("_batch", "_committed", "_count", "_failures", "indexes", "is_retry", "items")

    def __init__(self, batch: ClaimedBatch, indexes: Sequence[int], items: list[Any], is_retry: bool) -> None:
        self.indexes = indexes
        self.items = items
        self.is_retry = is_retry
        self._batch = batch
        self._count = len(items)
        self._failures: dict[int, BaseException | str] = {}
        self._committed = False

    def __len__(self) -> int:
        return len(self.items)

    def fail(self, position: int, error: BaseException | str) -> None:
        """Record that the item at *position* in this chunk failed; later attempts retry only the failed items.

        With InvalidInput as the error it is not retried. With Snooze it has not failed: it runs again after that time,
        and the attempt is not counted. Takes effect when the chunk is committed.
        """
        if not 0 <= position < len(self.items):
            raise InvalidInput(f"the chunk has positions 0 to {len(self.items) - 1}, not {position!r}")
        self._failures[position] = error

    def end_at(self, count: int) -> None:
        """Keep only the first *count* items in this chunk; the next chunk begins with the others."""
        self._count = count

    def transaction(self) -> "ChunkTransaction":
        """Return the transaction for your own rows: rows and checkpoint commit together, or neither does.

        ``with chunk.transaction() as conn``, or ``async with``. Raises LeaseLost instead of committing if the claim is
        lost.
        """
        self._refuse_if_committed()
        return ChunkTransaction(self)

    def commit(self) -> None:
        """Write only the checkpoint: these items are processed. Raises LeaseLost."""
        with self.transaction():
            pass

    async def commit_async(self) -> None:
        """Async version of `commit`."""
        async with self.transaction():
            pass

    def commit_in(self, connection: Any) -> None:
        """Write the checkpoint in the transaction that *connection* has open, together with your rows; you commit it.

        Commit before the next chunk is requested. If it was rolled back, the attempt has failed; the next one continues
        from the last checkpoint that was committed. *connection* and errors: as in `Batch.complete_in`.
        """
        refuse_in_event_loop("chunk.commit_in()", "`await chunk.commit_in_async()`")
        self._committed = self._committed or callers.was_committed(self._batch)
        self._refuse_if_committed()
        callers.commit_in(self._batch, connection, self._progress())

    async def commit_in_async(self, connection: Any) -> None:
        """Async version of `commit_in`."""
        self._committed = self._committed or await callers.was_committed_async(self._batch)
        self._refuse_if_committed()
        await callers.commit_in_async(self._batch, connection, self._progress())

    def _refuse_if_committed(self) -> None:
        if self._committed:
            raise RuntimeError(f"this chunk of batch {self._batch.id} is committed already")

    def _progress(self) -> Progress:
        """Return how the commit of this chunk changes the progress of its batch."""
        failures = [self._failure(position) for position in sorted(self._failures) if position < self._count]
        before = self._batch.progress()
        if not self.is_retry:
            done = self._count - len(failures)
            return before._replace(done=done, failed=len(failures), failures=failures, first_index=self.indexes[0])
        recovered = [self.indexes[position] for position in range(self._count) if position not in self._failures]
        return before._replace(done=len(recovered), failed=-len(recovered), failures=failures, recovered=recovered)

    def _failure(self, position: int) -> ItemFailure:
        error = self._failures[position]
        if isinstance(error, Snooze | Throttled):
            delay_seconds = min(float(error.seconds), _MOST_SNOOZED_SECONDS)
            return ItemFailure(self.indexes[position], one_line(error), retryable=True, delay_seconds=delay_seconds)
        message = error_text(error, MOST_ERROR_BYTES) if isinstance(error, str) else one_line(error)
        if self._batch.keys is not None:
            message = self._batch.keys.seal_line(message, self._batch.kind, has_type=not isinstance(error, str))
        return ItemFailure(self.indexes[position], message, not isinstance(error, InvalidInput))


def commit_by_finish(chunk: Chunk) -> bool:
    """Leave the checkpoint of *chunk* to the finish of its batch, which saves a write; return whether that is possible:
    only for the last chunk, and only if no item of the batch failed."""
    batch = chunk._batch
    is_last = not chunk.is_retry and chunk.indexes[0] + chunk._count == batch.items_total
    if not is_last or chunk._failures or batch.items_failed:
        return False
    chunk._committed = True
    batch.leave_last_chunk_to_finish(chunk._count)
    return True


class ChunkTransaction(FencedTransaction):
    """The transaction of `Chunk.transaction`."""

    def __init__(self, chunk: Chunk) -> None:
        super().__init__(chunk._batch)
        self._chunk = chunk

    def write(self) -> Statement:
        """Move counters, failed items, lease, and the cursor of a checkpoint within the block."""
        cursor = self.progress.cursor
        self.progress = self._chunk._progress()._replace(keeps_cursor=self.progress.keeps_cursor, cursor=cursor)
        return self._batch.checkpoint_statement(self.progress)

    def _apply(self, written_at: float) -> None:
        self._chunk._committed = True
        self._batch.apply(self.progress, written_at)


class Chunks:
    """Iterates over the chunks that are left to process; see `Batch.chunks`."""

    def __init__(self, batch: ClaimedBatch, size: int) -> None:
        self._batch = batch
        self._size = size
        self._page: list[Any] = []  # items in memory
        self._page_first = 0
        self._page_length = size  # of the next page

    def __iter__(self) -> Iterator[Chunk]:
        refuse_in_event_loop("`for chunk in batch.chunks()`", "`async for`")
        self._batch.raise_if_interrupted()
        while (chunk := self._next_chunk()) is not None:
            note_items(chunk.items)
            yield chunk
            if self._batch.in_doubt is not None:
                callers.settle(self._batch)
            elif not chunk._committed:
                chunk.commit()
            if self._batch.left_to_finish == "last chunk":
                return
            self._batch.raise_if_interrupted()

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        in_thread = self._batch.claim.runtime.connections.in_thread
        self._batch.raise_if_interrupted()
        while (chunk := await in_thread(self._next_chunk)) is not None:
            note_items(chunk.items)
            yield chunk
            if self._batch.in_doubt is not None:
                await in_thread(partial(callers.settle, self._batch))
            elif not chunk._committed:
                await chunk.commit_async()
            if self._batch.left_to_finish == "last chunk":
                return
            self._batch.raise_if_interrupted()

    def _next_chunk(self) -> Chunk | None:
        """Return the next chunk after the last checkpoint, None if nothing is left. Blocks."""
        batch = self._batch
        first = batch.items_done + batch.items_failed
        if first < (batch.items_total or 0):
            items = self._items_from(first)
            return Chunk(batch, range(first, first + len(items)), items, is_retry=False)
        return self._next_retry() if batch.items_failed else None

    def _items_from(self, first: int) -> list[Any]:
        """Return the items of a chunk from number *first*, of the page in memory or of a new one."""
        offset = first - self._page_first
        if not self._page or not 0 <= offset < len(self._page):
            self._read_page(first)
            offset = 0
        return self._page[offset : offset + self._size]

    def _read_page(self, first: int) -> None:
        """Read a page from number *first*, and size the next one to about 4 MB.

        Each read unpacks the whole list in Postgres, so pages should be few; each page is held in memory, and poolers
        cope badly with large results, so they should be small.
        """
        count = min(self._page_length, (self._batch.items_total or 0) - first)
        text = self._batch.read_items(first, count)
        self._page, self._page_first = from_json(text, "items"), first
        if not self._page:
            raise InvalidInput(
                f"batch {self._batch.id} has fewer items than when it was claimed: somebody changed them"
            )
        self._page_length = max(self._size, PAGE_BYTES * count // max(len(text), 1))

    def _next_retry(self) -> Chunk | None:
        """Return a chunk of items that failed in an earlier attempt, or None if none are left."""
        batch = self._batch
        rows = batch.read(inputs.failed_page, batch.queue, batch.id, batch.claim.token, batch.attempt, self._size)
        if not rows:
            return None
        texts = [batch.opened_items(f"[{text}]", index)[1:-1] for index, text in rows]
        return Chunk(batch, [row[0] for row in rows], [from_json(text, "item") for text in texts], is_retry=True)
