"""A claimed batch, as its handler sees it: input, progress, checkpoints, transactions."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import UUID

import psycopg
from psycopg.pq import TransactionStatus

from batchq.common.forks import end_if_forked
from batchq.common.text import MOST_ERROR_BYTES, error_text, in_letters_of, json_text, one_line
from batchq.errors import Interrupted, InvalidInput, LeaseLost, StopRequested
from batchq.postgres.connections import AnyConnection
from batchq.postgres.handler_connections import HandlerConnections
from batchq.postgres.statements import checkpoints, claims, endings, inputs
from batchq.postgres.statements.checkpoints import ItemFailure, Progress
from batchq.postgres.statements.claims import ClaimedRow
from batchq.postgres.statements.endings import Finish
from batchq.postgres.statements.running import Statement
from batchq.retry import Conflicts

PAGE_BYTES = 4_000_000
UNCHANGED: Any = object()
Result = TypeVar("Result")
decoder = json.JSONDecoder()  # its raw_decode, since what Postgres sends has no space around it: a third faster


@dataclass(frozen=True, slots=True)
class Runtime:
    """What a worker gives to its batches."""

    connections: HandlerConnections
    lease_seconds: float
    stopping: threading.Event
    keep_completed: bool = True
    conflicts: Conflicts = field(default_factory=Conflicts)


@dataclass(slots=True)
class Claim:
    """One claim: every batch of it has the same queue and token."""

    queue: str
    token: UUID
    runtime: Runtime
    began_at: float  # monotonic time before the claim's statement: its leases last at least from then
    arrived_at: float = field(init=False)  # monotonic time when its batches were here
    token_text: str = field(init=False)

    def __post_init__(self) -> None:
        self.arrived_at = self.began_at
        self.token_text = str(self.token)


class Batch:
    """One claimed batch.

    id, queue, kind, attempt (this one, from 1), max_attempts, items_total (None without items), items_done and
    items_failed (at the last checkpoint) are as in batchq.batches. Everything written through it is fenced: if the
    batch is no longer this worker's, nothing commits and LeaseLost is raised.
    """

    __slots__ = (
        "_cursor",
        "_items",
        "_payload",
        "attempt",
        "begun_at",
        "claim",
        "completed",
        "ends_with_finish",
        "entered",
        "id",
        "interrupt",
        "items_counted",
        "items_done",
        "items_failed",
        "items_total",
        "kind",
        "leased_at",
        "max_attempts",
        "max_failed_items",
        "open_transaction",
        "row",
        "timeout_seconds",
        "used_chunks",
    )

    def __init__(self, row: ClaimedRow, claim: Claim) -> None:
        self.row: ClaimedRow = row
        self.claim = claim
        self.id, self.kind, self.attempt, self.max_attempts = row[:4]
        (
            self.items_total,
            self.items_done,
            self.items_failed,
            self.max_failed_items,
            self.timeout_seconds,
        ) = row[6:11]
        self.items_counted = self.items_done + self.items_failed  # in batchq.throughput, by this attempt or earlier
        self._payload = self._cursor = self._items = UNCHANGED
        self.leased_at = claim.began_at
        self.begun_at: float | None = None
        self.interrupt: Interrupted | None = None
        self.open_transaction: FencedTransaction | None = None
        self.entered: FencedTransaction | None = None  # whose block has begun, and not ended
        self.completed = False
        self.used_chunks = False
        self.ends_with_finish = False  # its last chunk has no checkpoint of its own: the finish counts it

    # ------------------------------------------------------------------------------------------------- the input

    @property
    def queue(self) -> str:
        """The queue that it came from."""
        return self.claim.queue

    @property
    def payload(self) -> Any:
        """The payload: a JSON value, or an instance of the handler's payload model."""
        if self._payload is UNCHANGED:
            self._payload = parse(self.row.payload, "payload")
        return self._payload

    @payload.setter
    def payload(self, value: Any) -> None:
        self._payload = value

    @property
    def cursor(self) -> Any:
        """What the last checkpoint saved, None before the first."""
        if self._cursor is UNCHANGED:
            self._cursor = parse(self.row.cursor, "cursor")
        return self._cursor

    @property
    def items(self) -> list[Any]:
        """All items, whatever was done before; [] without items. One read; for long lists use `chunks`."""
        if self._items is UNCHANGED:
            refuse_in_event_loop("batch.items", "`async for chunk in batch.chunks(n)`")
            self._items = parse(read_items(self, 0, self.items_total or 0), "items")
        return self._items  # type: ignore[no-any-return]

    def load(self) -> None:
        """Fetch payload and cursor if the claim left them out, being large. Raises LeaseLost, and InvalidInput if they
        are not text in the database's encoding, or have letters that UTF-8 does not have."""
        if self.row.payload is None:
            try:
                found = self.read(inputs.large_input, self.queue, self.id, self.claim.token)
            except claims.UNREADABLE as error:
                raise InvalidInput(f"payload or cursor cannot be read as UTF-8: {error.diag.message_primary}") from None
            if found is None:
                raise self.lost()
            self.row = self.row._replace(payload=found[0], cursor=found[1])

    def read(self, query: Callable[..., Result], *args: Any) -> Result:
        """Return what *query* returns, asked on the batch's own connection while a transaction is open.

        A second connection might only come free when this one does.
        """
        if self.open_transaction is not None and (conn := self.open_transaction.conn) is not None:
            return query(conn, *args)
        return self.claim.runtime.connections.read(query, *args)

    # ---------------------------------------------------------------------------------------------- interruptions

    @property
    def stop_requested(self) -> bool:
        """Whether the worker is stopping or the batch is no longer its own: end soon, at a checkpoint if possible."""
        return self.interrupt is not None or self.claim.runtime.stopping.is_set()

    def raise_if_interrupted(self) -> None:
        """Raise LeaseLost, TimedOut or StopRequested if it is time to end. Every checkpoint does."""
        if self.interrupt is not None:
            raise self.interrupt
        if self.claim.runtime.stopping.is_set():
            raise StopRequested(f"the worker stops: batch {self.id} is given back")

    def raise_if_taken(self) -> None:
        """Raise what ended the batch from outside. A stop does not: what waits may get on until it is given back."""
        if self.interrupt is not None:
            raise self.interrupt

    @property
    def may_be_ending(self) -> bool:
        """Whether a transaction that may complete the batch has begun, or has ended."""
        opened = self.open_transaction
        return self.completed or (opened is not None and opened.has_begun and opened.can_complete)

    def lost(self) -> LeaseLost:
        """Return the error to raise when a fenced write matched nothing."""
        self.interrupt = LeaseLost(f"batch {self.id} is no longer this worker's; nothing was written")
        return self.interrupt

    # --------------------------------------------------------------------------------- checkpoints, transactions

    def checkpoint(self, cursor: Any = UNCHANGED) -> None:
        """Save *cursor* (JSON) and extend the lease; within a transaction of the batch, as part of its commit.

        Raises LeaseLost; StopRequested, after the save, if the worker is stopping; InvalidInput for what is no JSON.
        """
        if self.open_transaction is not None:
            self.open_transaction.set_cursor(cursor)
            return
        refuse_in_event_loop("batch.checkpoint()", "`await batch.checkpoint_async()`")
        with self.transaction(cursor=cursor, complete=False):
            pass
        self.raise_if_interrupted()

    async def checkpoint_async(self, cursor: Any = UNCHANGED) -> None:
        """Do as `checkpoint` does, in an ``async def`` handler."""
        if self.open_transaction is not None:
            self.open_transaction.set_cursor(cursor)
            return
        async with self.transaction(cursor=cursor, complete=False):
            pass
        self.raise_if_interrupted()

    def transaction(
        self, *, cursor: Any = UNCHANGED, complete: bool | None = None, result: Any = None
    ) -> "BatchTransaction":
        """Return the transaction in which a handler writes its own rows: ``with batch.transaction() as conn``.

        Its commit also completes the batch, with *result*: rows and completion both, or neither, so the rows are there
        exactly once; the handler should return then. With a *cursor*, given here or to `checkpoint` within the block,
        the commit saves it instead, and the handler goes on: rows and checkpoint both, or neither. *complete* decides
        it explicitly. Use ``async with`` in an ``async def`` handler.

        Raises LeaseLost at the commit, which then is none; OutcomeUnknown if the connection was lost while committing.
        """
        self.refuse_if_completed()
        if complete is None:
            complete = cursor is UNCHANGED
        if complete and self.items_total is not None and not self.all_items_worked:
            raise InvalidInput(
                f"batch {self.id} has items: write its rows in chunk.transaction(), or give "
                "batch.transaction(complete=...) to say whether it completes them all"
            )
        return BatchTransaction(self, cursor, complete, result)

    def chunks(self, size: int = 500) -> "Chunks":
        """Return the items that are left, in chunks of *size*: ``for chunk in batch.chunks(500)``.

        First those after the last checkpoint, in order; then, in a later attempt, those that failed in earlier ones.
        Each chunk is checkpointed by its own transaction or commit, or else when the next one is asked for; so leave
        the loop early only after chunk.commit(). Raises as `checkpoint` does. Use ``async for`` in ``async def``.
        """
        if size < 1:
            raise InvalidInput(f"chunks() takes a size from 1 up, not {size!r}")
        self.refuse_if_completed()
        self.used_chunks = True
        return Chunks(self, size)

    @property
    def all_items_worked(self) -> bool:
        """Whether every item has been tried at least once."""
        return self.items_done + self.items_failed == (self.items_total or 0)

    def standing(self) -> Progress:
        """Return the progress that changes nothing, from where the batch stands."""
        return Progress(done_before=self.items_done, failed_before=self.items_failed)

    def refuse_if_completed(self) -> None:
        """Raise RuntimeError if a transaction of the handler has completed the batch."""
        if self.completed:
            raise RuntimeError(
                f"batch {self.id} was completed by its batch.transaction(); to use several, give each a cursor"
            )

    def checkpoint_statement(self, progress: Progress) -> Statement:
        """Return the fenced write of *progress*."""
        return checkpoints.checkpoint(self.queue, self.id, self.claim.token, self.claim.runtime.lease_seconds, progress)

    def apply(self, progress: Progress, written_at: float) -> None:
        """Take over what a checkpoint has committed."""
        self.items_done += progress.done
        self.items_failed += progress.failed
        self.leased_at = written_at
        if not progress.keeps_cursor:
            self._cursor = parse(progress.cursor, "cursor")


def parse(text: str | None, what: str) -> Any:
    """Return the JSON value of *text*. Raises InvalidInput for what Postgres takes and Python does not."""
    if text is None:
        return None
    try:
        return decoder.raw_decode(text)[0]
    except (ValueError, RecursionError) as error:  # a number of over 4,300 digits, or nesting too deep
        raise InvalidInput(f"the {what} cannot be read in Python: {one_line(error)}") from None


def refuse_in_event_loop(what: str, instead: str) -> None:
    """Raise RuntimeError where a blocking call would stop every other handler of the event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise RuntimeError(f"{what} would block the event loop; in an `async def` handler use {instead}")


def running_here() -> int:
    """Return what tells this task or, outside an event loop, this thread from others."""
    try:
        return id(asyncio.current_task())
    except RuntimeError:
        return threading.get_ident()


def read_items(batch: Batch, first: int, count: int) -> str:
    """Return *count* items from number *first* as JSON text. Raises LeaseLost."""
    if count == 0:
        return "[]"
    text = batch.read(inputs.items_page, batch.queue, batch.id, batch.claim.token, first, count)
    if text is None:
        raise batch.lost()
    return text


# ------------------------------------------------------------------------------------------------------ transactions


class FencedTransaction:
    """A transaction that ends with a fenced write: ``with`` in ``def``, ``async with`` in ``async def`` handlers.

    Gives the psycopg connection to write with. Committing or rolling it back by hand is refused by psycopg.
    """

    can_complete = False

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.progress = batch.standing()
        self.has_begun = False
        self.conn: psycopg.Connection[Any] | None = None  # of a `def` handler, while its transaction is open
        self.opened_by = 0
        self.context: AbstractContextManager[psycopg.Connection[Any]] | None = None
        self.async_context: AbstractAsyncContextManager[psycopg.AsyncConnection[Any]] | None = None

    def write(self) -> Statement:
        """Return the fenced write that ends the transaction."""
        raise NotImplementedError

    def committed(self, written_at: float) -> None:
        """Take over what has been committed. *written_at*: monotonic time before the write."""
        raise NotImplementedError

    def set_cursor(self, cursor: Any) -> None:
        """Save *cursor* with the commit."""
        if cursor is not UNCHANGED:
            text = None if cursor is None else json_text(cursor, "the cursor")
            self.progress = self.progress._replace(keeps_cursor=False, cursor=text)

    def __enter__(self) -> psycopg.Connection[Any]:
        refuse_in_event_loop("`with ...transaction()`", "`async with ...transaction()`")
        self.context = self.run()
        conn = self.context.__enter__()
        self.batch.entered = self
        return conn

    def __exit__(self, *error: Any) -> bool | None:
        end_if_forked()
        self.batch.entered = None
        assert self.context is not None  # noqa: S101 (for the type checker)
        return self.context.__exit__(*error)

    async def __aenter__(self) -> psycopg.AsyncConnection[Any]:
        self.async_context = self.run_async()
        conn = await self.async_context.__aenter__()
        self.batch.entered = self
        return conn

    async def __aexit__(self, *error: Any) -> bool | None:
        end_if_forked()
        self.batch.entered = None
        assert self.async_context is not None  # noqa: S101 (for the type checker)
        return await self.async_context.__aexit__(*error)

    @contextmanager
    def run(self) -> Iterator[psycopg.Connection[Any]]:
        """Give a connection of the pool in a transaction, and end it with the fenced write."""
        with self.opened():
            with self.batch.claim.runtime.connections.transaction(self.batch.raise_if_taken) as conn:
                self.has_begun, self.conn = True, conn
                yield conn
                self.refuse_if_ended(conn)
                written_at = time.monotonic()
                if conn.execute(*storable(conn, self.write())).rowcount == 0:
                    raise self.batch.lost()
            self.committed(written_at)

    @asynccontextmanager
    async def run_async(self) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        """Do as `run` does, in the event loop."""
        with self.opened():
            async with self.batch.claim.runtime.connections.transaction_async(self.batch.raise_if_taken) as conn:
                self.has_begun = True
                yield conn
                self.refuse_if_ended(conn)
                written_at = time.monotonic()
                if (await conn.execute(*storable(conn, self.write()))).rowcount == 0:
                    raise self.batch.lost()
            self.committed(written_at)

    def refuse_if_ended(self, conn: AnyConnection) -> None:
        """Raise InvalidInput if the handler has ended the transaction by a statement: nothing is fenced then."""
        if conn.info.transaction_status == TransactionStatus.IDLE:
            raise InvalidInput(
                f"the handler of batch {self.batch.id} has ended its transaction by COMMIT or ROLLBACK; leave that to "
                "the end of the block, which writes the batch's state in the same transaction"
            )

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Note on the batch that a transaction is open: `Batch.checkpoint` joins it. One at a time.

        A second one would commit apart from the first, or wait for ever for a connection that the first one holds.
        """
        self.opened_by = running_here()
        if (other := self.batch.open_transaction) is not None:
            message = f"batch {self.batch.id} has a transaction open already; end it before the next"
            raise InvalidInput(message) if other.opened_by == self.opened_by else RuntimeError(message)
        self.batch.open_transaction = self
        try:
            yield
        finally:
            self.batch.open_transaction = self.conn = None


def storable(conn: AnyConnection, statement: Statement) -> Statement:
    """Return a checkpoint whose failed items' errors are of letters that the database has."""
    text, parameters = statement
    encoding = conn.info.parameter_status("server_encoding") or ""
    if encoding == "UTF8" or text is not checkpoints.CHECKPOINT:
        return statement
    return text, parameters | {"errors": [in_letters_of(error, encoding) for error in parameters["errors"]]}


class BatchTransaction(FencedTransaction):
    """The transaction of `Batch.transaction`."""

    can_complete = True

    def __init__(self, batch: Batch, cursor: Any, complete: bool, result: Any) -> None:
        super().__init__(batch)
        self.complete = complete
        self.result = None if result is None else json_text(result, "the result")
        if cursor is not UNCHANGED:
            self.set_cursor(cursor)
            self.complete = complete

    def set_cursor(self, cursor: Any) -> None:
        """Save *cursor* with the commit, and do not complete the batch."""
        self.complete = False
        super().set_cursor(cursor)

    def write(self) -> Statement:
        """Complete the batch, or save the checkpoint."""
        if not self.complete:
            return self.batch.checkpoint_statement(self.progress)
        claim = self.batch.claim
        if not claim.runtime.keep_completed:
            return endings.complete(claim.queue, [self.batch.id], [claim.token_text], keep=False)
        done = Finish(self.batch.id, self.batch.claim.token, "completed", self.result, all_done=True)
        return endings.finish(self.batch.queue, [done])

    def committed(self, written_at: float) -> None:
        """Remember that the batch is completed, or where it stands."""
        self.batch.completed = self.complete
        if not self.complete:
            self.batch.apply(self.progress, written_at)


# ------------------------------------------------------------------------------------------------------------ chunks


class Chunk:
    """Some items of a batch, and their checkpoint.

    items: their values; indexes: their places in the whole list. Mark those that failed with `fail`; then commit in
    `transaction`, together with rows of your own, or by `commit`.
    """

    __slots__ = ("batch", "committed", "count", "failures", "indexes", "is_retry", "items")

    def __init__(self, batch: Batch, indexes: Sequence[int], items: list[Any], is_retry: bool) -> None:
        self.batch = batch
        self.indexes = indexes
        self.items = items
        self.is_retry = is_retry
        self.count = len(items)
        self.failures: dict[int, BaseException | str] = {}
        self.committed = False

    def __len__(self) -> int:
        return len(self.items)

    def fail(self, position: int, error: BaseException | str) -> None:
        """Record that the item at *position* in this chunk failed; later attempts try it again, alone.

        With InvalidInput as the error it is not tried again. Takes effect with the chunk's commit.
        """
        if not 0 <= position < len(self.items):
            raise InvalidInput(f"the chunk has positions 0 to {len(self.items) - 1}, not {position!r}")
        self.failures[position] = error

    def end_at(self, count: int) -> None:
        """Keep only the first *count* items in this chunk; the others come again in the next."""
        self.count = count

    def transaction(self) -> "ChunkTransaction":
        """Return the transaction for your own rows: they and the checkpoint commit together, or neither.

        ``with chunk.transaction() as conn``, or ``async with``. Raises LeaseLost at the commit, which then is none.
        """
        if self.committed:
            raise RuntimeError(f"this chunk of batch {self.batch.id} is committed already")
        return ChunkTransaction(self)

    def commit(self) -> None:
        """Write the checkpoint alone: these items are worked. Raises LeaseLost."""
        with self.transaction():
            pass

    async def commit_async(self) -> None:
        """Do as `commit` does, in an ``async def`` handler."""
        async with self.transaction():
            pass

    def can_end_batch(self) -> bool:
        """Whether this is the last chunk, and nothing in the batch has failed: then the finish says all there is."""
        is_last = not self.is_retry and self.indexes[0] + self.count == self.batch.items_total
        return is_last and not self.failures and self.batch.items_failed == 0

    def end_batch(self) -> None:
        """Leave the checkpoint of the last chunk to the finish, which is fenced as well."""
        self.committed = True
        self.batch.items_done += self.count
        self.batch.ends_with_finish = True

    def progress(self) -> Progress:
        """Return what this chunk changes of its batch."""
        failures = [self.failure(position) for position in sorted(self.failures) if position < self.count]
        before = self.batch.standing()
        if not self.is_retry:
            done = self.count - len(failures)
            return before._replace(done=done, failed=len(failures), failures=failures, first_index=self.indexes[0])
        recovered = [self.indexes[position] for position in range(self.count) if position not in self.failures]
        return before._replace(done=len(recovered), failed=-len(recovered), failures=failures, recovered=recovered)

    def failure(self, position: int) -> ItemFailure:
        """Return the failure of the item at *position* as it is stored."""
        error = self.failures[position]
        message = error_text(error, MOST_ERROR_BYTES) if isinstance(error, str) else one_line(error)
        return ItemFailure(self.indexes[position], message, not isinstance(error, InvalidInput))


class ChunkTransaction(FencedTransaction):
    """The transaction of `Chunk.transaction`."""

    def __init__(self, chunk: Chunk) -> None:
        super().__init__(chunk.batch)
        self.chunk = chunk

    def write(self) -> Statement:
        """Move counters, failed items, lease, and the cursor of a checkpoint within the block."""
        keeps_cursor, cursor = self.progress.keeps_cursor, self.progress.cursor
        self.progress = self.chunk.progress()._replace(keeps_cursor=keeps_cursor, cursor=cursor)
        return self.batch.checkpoint_statement(self.progress)

    def committed(self, written_at: float) -> None:
        """Take over the counters."""
        self.chunk.committed = True
        self.batch.apply(self.progress, written_at)


class Chunks:
    """The chunks that are left of a batch; see `Batch.chunks`."""

    def __init__(self, batch: Batch, size: int) -> None:
        self.batch = batch
        self.size = size
        self.page: list[Any] = []
        self.page_first = 0
        self.page_length = size

    def __iter__(self) -> Iterator[Chunk]:
        refuse_in_event_loop("`for chunk in batch.chunks()`", "`async for`")
        self.batch.raise_if_interrupted()
        while (chunk := self.next_chunk()) is not None:
            yield chunk
            if not chunk.committed:
                chunk.commit()
            if self.batch.ends_with_finish:
                return
            self.batch.raise_if_interrupted()

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        in_thread = self.batch.claim.runtime.connections.in_thread
        self.batch.raise_if_interrupted()
        while (chunk := await in_thread(self.next_chunk)) is not None:
            yield chunk
            if not chunk.committed:
                await chunk.commit_async()
            if self.batch.ends_with_finish:
                return
            self.batch.raise_if_interrupted()

    def next_chunk(self) -> Chunk | None:
        """Return the next chunk by the counters of the last checkpoint, None if nothing is left. Blocks."""
        first = self.batch.items_done + self.batch.items_failed
        if first < (self.batch.items_total or 0):
            items = self.slice(first)
            return Chunk(self.batch, range(first, first + len(items)), items, is_retry=False)
        return self.next_retry() if self.batch.items_failed else None

    def slice(self, first: int) -> list[Any]:
        """Return the items from number *first*, of the page in memory or of the next one."""
        offset = first - self.page_first
        if not self.page or not 0 <= offset < len(self.page):
            self.read_page(first)
            offset = 0
        return self.page[offset : offset + self.size]

    def read_page(self, first: int) -> None:
        """Read a page from number *first*; the next one will be of about 4 MB, by the size of this one.

        Each read unpacks the whole list in Postgres, each page is held in memory, and poolers dislike large results.
        """
        count = min(self.page_length, (self.batch.items_total or 0) - first)
        text = read_items(self.batch, first, count)
        self.page, self.page_first = parse(text, "items"), first
        if not self.page:
            raise InvalidInput(f"batch {self.batch.id} has fewer items than when it was claimed: somebody changed them")
        self.page_length = max(self.size, PAGE_BYTES * count // max(len(text), 1))

    def next_retry(self) -> Chunk | None:
        """Return the next chunk of items that failed in an earlier attempt, None if none is left."""
        batch = self.batch
        rows = batch.read(inputs.failed_page, batch.queue, batch.id, batch.claim.token, batch.attempt, self.size)
        if not rows:
            return None
        return Chunk(batch, [row[0] for row in rows], [parse(row[1], "item") for row in rows], is_retry=True)
