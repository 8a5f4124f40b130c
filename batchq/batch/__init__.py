"""The batch as its handler sees it: input, progress, checkpoints and transactions."""

from typing import Any, Generic

from typing_extensions import TypeVar

from batchq.batch import callers
from batchq.batch.chunks import Chunk, Chunks
from batchq.batch.claimed import UNCHANGED, ClaimedBatch, Needed, from_json, refuse_in_event_loop
from batchq.batch.transactions import BatchTransaction
from batchq.errors import InvalidInput

__all__ = ["Batch", "Chunk", "Needed"]

Payload = TypeVar("Payload", default=Any, covariant=True)


class Batch(Generic[Payload]):
    """One claimed batch. ``Batch[Mail]``, for a type checker: its payload is an instance of the model Mail.

    id, queue, kind, attempt (this one, from 1), max_attempts, items_total (None without items), items_done and
    items_failed (at the last checkpoint) are as in batchq.batches. If a batch is spread, its handler sees one part of
    it, under the id of the whole. Everything written through it is fenced: if this worker's claim is lost, nothing
    commits and LeaseLost is raised.
    """

    __slots__ = ("_claimed", "_items", "_needed", "_payload", "attempt", "id", "items_total", "kind", "max_attempts")

    def __init__(self, claimed: ClaimedBatch) -> None:
        self._claimed = claimed
        self.id = claimed.row.part_of or claimed.id
        self.kind = claimed.kind
        self.attempt = claimed.attempt
        self.max_attempts = claimed.max_attempts
        self.items_total = claimed.items_total
        self._payload = self._items = self._needed = UNCHANGED

    # ------------------------------------------------------------------------------------------------- the input

    @property
    def queue(self) -> str:
        """The queue that it was claimed from."""
        return self._claimed.claim.whole_queue

    @property
    def key(self) -> str | None:
        """Its key, if it has one: batches run key by key, in turn."""
        return self._claimed.row.key

    @property
    def app_state(self) -> Any:
        """What the app's lifespan has yielded, such as a client or a pool; None without one."""
        return self._claimed.claim.runtime.app_state()

    @property
    def payload(self) -> Payload:
        """The payload: a JSON value, or an instance of the handler's payload model."""
        if self._payload is UNCHANGED:
            self._payload = from_json(self._claimed.row.payload, "payload")
        return self._payload  # type: ignore[no-any-return]

    @payload.setter
    def payload(self, value: Any) -> None:
        self._payload = value

    @property
    def cursor(self) -> Any:
        """The cursor that the last checkpoint saved, None before the first."""
        return self._claimed.cursor

    @property
    def items(self) -> list[Any]:
        """All items, also those already processed; [] without items. One read; for long lists use `chunks`."""
        if self._items is UNCHANGED:
            refuse_in_event_loop("batch.items", "`async for chunk in batch.chunks(n)`")
            self._items = from_json(self._claimed.read_items(0, self.items_total or 0), "items")
        return self._items  # type: ignore[no-any-return]

    @property
    def needed(self) -> list[Needed]:
        """The batches that this one waited for, by id: id, kind, status and result of each. Read at the first use."""
        if self._needed is UNCHANGED:
            refuse_in_event_loop("batch.needed", "`await batch.needed_async()`")
            self._needed = self._claimed.read_needed()
        return self._needed  # type: ignore[no-any-return]

    async def needed_async(self) -> list[Needed]:
        """Async version of `needed`."""
        if self._needed is UNCHANGED:
            self._needed = await self._claimed.claim.runtime.connections.in_thread(self._claimed.read_needed)
        return self._needed  # type: ignore[no-any-return]

    # ---------------------------------------------------------------------------------------------- its progress

    @property
    def items_done(self) -> int:
        """How many items are done, at the last checkpoint."""
        return self._claimed.items_done

    @property
    def items_failed(self) -> int:
        """How many items have failed, at the last checkpoint."""
        return self._claimed.items_failed

    @property
    def all_items_worked(self) -> bool:
        """Whether every item has been tried at least once."""
        return self._claimed.all_items_worked

    @property
    def stop_requested(self) -> bool:
        """Whether to end soon, at a checkpoint if possible: the worker is stopping, or the claim has ended."""
        return self._claimed.stop_requested

    def raise_if_interrupted(self) -> None:
        """Raise LeaseLost, TimedOut or StopRequested if the handler should end. Every checkpoint does."""
        self._claimed.raise_if_interrupted()

    # --------------------------------------------------------------------------------- checkpoints, transactions

    def checkpoint(self, cursor: Any = UNCHANGED) -> None:
        """Save *cursor* (JSON) and extend the lease; within a transaction of the batch, as part of its commit.

        Raises LeaseLost; StopRequested, after the save, if the worker is stopping; InvalidInput for what is not JSON.
        """
        if self._claimed.open_transaction is not None:
            self._claimed.open_transaction.set_cursor(cursor)
            return
        refuse_in_event_loop("batch.checkpoint()", "`await batch.checkpoint_async()`")
        with self.transaction(cursor=cursor, complete=False):
            pass
        self._claimed.raise_if_interrupted()

    async def checkpoint_async(self, cursor: Any = UNCHANGED) -> None:
        """Async version of `checkpoint`."""
        if self._claimed.open_transaction is not None:
            self._claimed.open_transaction.set_cursor(cursor)
            return
        async with self.transaction(cursor=cursor, complete=False):
            pass
        self._claimed.raise_if_interrupted()

    def transaction(
        self, *, cursor: Any = UNCHANGED, complete: bool | None = None, result: Any = None
    ) -> BatchTransaction:
        """Return the transaction in which a handler writes its own rows: ``with batch.transaction() as conn``.

        Its commit also completes the batch, with *result*: rows and completion commit together or not at all, so the
        rows are there exactly once; the handler should return after it. With a *cursor*, given here or to `checkpoint`
        within the block, rows and cursor commit together or not at all; the batch is not completed, and the handler
        continues. *complete* overrides that choice. Use ``async with`` in an ``async def`` handler.

        Raises LeaseLost instead of committing if the claim is lost; OutcomeUnknown if the connection is lost during
        COMMIT.
        """
        self._claimed.refuse_if_completed()
        if complete is None:
            complete = cursor is UNCHANGED
        if complete and self.items_total is not None and not self.all_items_worked:
            raise InvalidInput(
                f"batch {self.id} has items: write its rows in chunk.transaction(), or give "
                "batch.transaction(complete=...) to say whether it completes them all"
            )
        return BatchTransaction(self._claimed, cursor, complete, result)

    def complete_in(self, connection: Any, result: Any = None) -> None:
        """Complete the batch, with *result* (JSON), in the transaction that *connection* has open; you commit it.

        Your rows in it and the completion commit together or not at all. *connection*: SQLAlchemy's Session or
        Connection, Django's connection, or psycopg's; its role needs the duty "worker". The handler should commit, then
        return; if it was rolled back, the attempt has failed and runs again.

        Raises LeaseLost if the claim is lost; InvalidInput without an open transaction, and while items are left.
        """
        callers.complete_in(self._claimed, connection, result)

    async def complete_in_async(self, connection: Any, result: Any = None) -> None:
        """Async version of `complete_in`: for SQLAlchemy's AsyncSession and AsyncConnection, asyncpg and psycopg."""
        await callers.complete_in_async(self._claimed, connection, result)

    def chunks(self, size: int = 500) -> Chunks:
        """Return the remaining items, in chunks of *size*: ``for chunk in batch.chunks(500)``.

        First those after the last checkpoint, in order; then, in a later attempt, those that failed in earlier ones.
        Each chunk is checkpointed by its own transaction or commit, or else when the next one is requested; so leave
        the loop early only after chunk.commit(). Raises as `checkpoint` does. Use ``async for`` in ``async def``.
        """
        if size < 1:
            raise InvalidInput(f"chunks() takes a size from 1 up, not {size!r}")
        self._claimed.refuse_if_completed()
        self._claimed.begin_chunks()
        return Chunks(self._claimed, size)
