"""A claimed batch as the worker knows it, from the claim until its outcome is written."""

import asyncio
import json
import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeVar
from uuid import UUID

import psycopg

from batchq.common import sealed
from batchq.common.text import MOST_RESULT_BYTES, one_line, result_text
from batchq.errors import Interrupted, InvalidInput, LeaseLost, StopRequested, Throttled
from batchq.postgres.statements import checkpoints, claims, flows, inputs
from batchq.postgres.statements.checkpoints import Progress
from batchq.postgres.statements.claims import ClaimedRow
from batchq.postgres.statements.running import Statement
from batchq.retry import Conflicts

UNCHANGED: Any = object()
Result = TypeVar("Result")

# raw_decode skips the search for surrounding space, which Postgres does not send: a third faster.
_decoder = json.JSONDecoder()

# What is left for the finish of a batch to do.
# "all": complete it and count all its items, because the handler asked for no chunks.
# "completion": complete it; checkpoints have counted the items.
# "last chunk": complete it and count the last chunk, which has no checkpoint of its own.
# "nothing": a transaction of the handler has completed the batch.
# "parts": the batch waits for its parts, which work its items.
LeftToFinish = Literal["all", "completion", "last chunk", "nothing", "parts"]


class _Gate(Protocol):
    """What says when the next item of a kind may begin; see `batchq.worker.gates`."""

    is_open: bool
    waiting: deque[None]

    @property
    def closed_seconds(self) -> float: ...

    def take(self) -> float: ...

    def give_back(self) -> None: ...


class _OpenGate:
    """Always open: for a runtime without limits."""

    is_open = True
    closed_seconds = 0.0

    def __init__(self) -> None:
        self.waiting: deque[None] = deque()

    def take(self) -> float:
        return 0.0

    def give_back(self) -> None:
        pass


def _open_gate(queue: str, kind: str) -> _Gate:  # noqa: ARG001
    return _OpenGate()


def _no_state() -> None:
    """Return the state of an app without a lifespan."""


def _throttle_nobody(queue: str, kind: str, key: str | None, error: Throttled) -> None:
    """Do nothing: for a runtime without other workers."""


class _LendsConnections(Protocol):
    """Where a batch's connections come from: a worker's `HandlerConnections`, or in a test the test's connection."""

    def transaction(self, check: Callable[[], None] = ..., /) -> AbstractContextManager[psycopg.Connection[Any]]: ...

    def transaction_async(
        self, check: Callable[[], None] = ..., /
    ) -> AbstractAsyncContextManager[psycopg.AsyncConnection[Any]]: ...

    def read(self, query: Callable[..., Result], /, *args: Any) -> Result: ...

    async def in_thread(self, query: Callable[[], Result], /) -> Result: ...


@dataclass(slots=True)
class Layout:
    """Which tables a worker's database has: known once the worker has checked it. See `batchq distribute`."""

    is_distributed: bool = False


@dataclass(frozen=True, slots=True)
class Runtime:
    """What a worker shares with all its batches.

    gate: returns the gate of a queue and kind. throttle: lets what a Throttled names wait, in all workers. app_state:
    returns what the app's lifespan has yielded.
    """

    connections: _LendsConnections
    lease_seconds: float
    stopping: threading.Event
    keep_completed: bool = True
    conflicts: Conflicts = field(default_factory=Conflicts)
    gate: Callable[[str, str], _Gate] = _open_gate
    throttle: Callable[[str, str, str | None, Throttled], None] = _throttle_nobody
    app_state: Callable[[], Any] = _no_state
    layout: Layout = field(default_factory=Layout)


@dataclass(slots=True)
class Claim:
    """One claim statement. All batches it returned have the same queue, token and permits.

    queue: the one of their rows. whole_queue: the one that people know; it differs where the queue is split.
    """

    queue: str
    token: UUID
    runtime: Runtime
    began_at: float  # monotonic time before the statement: a lower bound for the start of the leases
    permits: tuple[Any, ...] = ()  # of batchq.worker.permits: what the batches need where there are limits
    reserved: int = 0  # how many permits the claim holds before its batches are known
    whole_queue: str = ""  # the same as queue if it is not given
    arrived_at: float = field(init=False)  # monotonic time when the rows had arrived
    token_text: str = field(init=False)

    def __post_init__(self) -> None:
        self.arrived_at = self.began_at
        self.token_text = str(self.token)
        self.whole_queue = self.whole_queue or self.queue


class _OpenTransaction(Protocol):
    """The transaction that a handler has open, as its batch knows it; see `batchq.batch.transactions`."""

    can_complete: bool
    state: Literal["waiting", "in block", "ending"]
    conn: psycopg.Connection[Any] | None
    opened_by: int
    progress: Progress

    def set_cursor(self, cursor: Any) -> None: ...

    def __exit__(self, *error: Any) -> bool | None: ...

    async def __aexit__(self, *error: Any) -> bool | None: ...


class Needed(NamedTuple):
    """A batch that another one waited for.

    status: completed, failed or cancelled; if the other one did not wait for its end, the one that it has now. kind and
    result are None if the batch is not stored any more.
    """

    id: int
    kind: str | None
    status: str | None
    result: Any


class InDoubt(NamedTuple):
    """A write in a transaction of the caller's own, of which only the database knows whether it was committed.

    progress: what it changes, None if it completes the batch. written_at: monotonic time before the write.
    """

    progress: Progress | None
    written_at: float


class ClaimedBatch:
    """One claimed batch. Handlers see it through a `batchq.Batch`. Every write for it is fenced by the claim token.

    Who changes it: the lane sets *begun_at* under its lock, the keeper *leased_at*, whoever ends the batch from outside
    *interrupt*; all else is changed by the handler's own thread or task.
    """

    # Many attributes, because thousands of batches are in flight: one object with slots per batch costs least.
    __slots__ = (
        "_cursor",
        "attempt",
        "begun_at",
        "claim",
        "id",
        "in_doubt",
        "interrupt",
        "items_counted",
        "items_done",
        "items_failed",
        "items_total",
        "keys",
        "kind",
        "leased_at",
        "left_to_finish",
        "max_attempts",
        "open_transaction",
        "row",
    )

    def __init__(self, row: ClaimedRow, claim: Claim) -> None:
        self.row: ClaimedRow = row
        self.claim = claim
        # One unpacking of the row is faster than slices of it. Items done and failed are those at the last checkpoint.
        (
            self.id, self.kind, self.attempt, self.max_attempts, _, _,
            self.items_total, self.items_done, self.items_failed, _, _, _, _, _, _, _,
        ) = row  # fmt: skip
        self.items_counted = self.items_done + self.items_failed  # in batchq.throughput, by any attempt
        self.leased_at = claim.began_at
        self.begun_at: float | None = None  # monotonic time when its handler began
        self.left_to_finish: LeftToFinish = "all"
        self.interrupt: Interrupted | None = None
        self.open_transaction: _OpenTransaction | None = None
        self.in_doubt: InDoubt | None = None
        self.keys: sealed.Keys | None = None  # of a sealed batch that was opened: what is stored of it is sealed, too
        self._cursor = UNCHANGED

    @property
    def queue(self) -> str:
        """The queue of its row: a shard, where the queue is split."""
        return self.claim.queue

    @property
    def whole_queue(self) -> str:
        """Its queue as people know it."""
        return self.claim.whole_queue

    @property
    def part_of(self) -> int | None:
        """The batch that it is a part of, if any."""
        return self.row.part_of

    # --------------------------------------------------------------------------------------------------- its input

    @property
    def cursor(self) -> Any:
        """The cursor of the last checkpoint, None before the first."""
        if self._cursor is UNCHANGED:
            # open_input opens it together with a sealed payload. If only the items are sealed, it is opened here.
            self._cursor = sealed.open_value(from_json(self.row.cursor, "cursor"), self.kind, "cursor")
        return self._cursor

    def load(self) -> None:
        """Fetch payload and cursor, which the claim left out for their size. Raises LeaseLost, and InvalidInput if they
        are not text in the database's encoding, or have letters that UTF-8 does not have."""
        try:
            found = self.read(inputs.large_input, self.queue, self.id, self.claim.token)
        except claims.UNREADABLE as error:
            raise InvalidInput(f"payload or cursor cannot be read as UTF-8: {error.diag.message_primary}") from None
        if found is None:
            raise self.lose()
        self.row = self.row._replace(payload=found[0], cursor=found[1])

    def open_input(self, must_be_sealed: bool) -> None:
        """Open payload and cursor, if the payload is sealed; cursor and items must be sealed then, too.

        Raises KeyMissing; CannotOpen for what cannot be opened, and for what is in the clear and must be sealed.
        """
        payload = sealed.opened_text(self.row.payload or "", self.kind, "payload")
        if payload is None:
            if must_be_sealed:
                raise sealed.in_the_clear("the payload", self.kind)
            return
        cursor = self.row.cursor
        if cursor is not None and (cursor := sealed.opened_text(cursor, self.kind, "cursor")) is None:
            raise sealed.in_the_clear("the cursor", self.kind)
        self.row = self.row._replace(payload=payload, cursor=cursor)
        self.keys = sealed.current()

    def opened_items(self, text: str, first: int) -> str:
        """Return the JSON text of a list of items, each opened if it is sealed. *first*: the number of the first one.

        If they are sealed, all that is stored of the batch from now on is sealed, too. Raises as `open_input` does.
        """
        if self.keys is None and sealed.MARK not in text:
            return text
        opened = sealed.opened_items(text, self.kind, self.keys is not None, first)
        if opened is None:
            return text
        self.keys = sealed.current()
        return opened

    def read_items(self, first: int, count: int) -> str:
        """Return *count* items from number *first* as JSON text. Raises LeaseLost."""
        if count == 0:
            return "[]"
        text = self.read(inputs.items_page, self.queue, self.id, self.claim.token, first, count)
        if text is None:
            raise self.lose()
        return self.opened_items(text, first)

    def read_needed(self) -> list[Needed]:
        """Return the batches that it waited for."""
        rows = self.read(flows.needed, self.part_of or self.id)
        return [
            Needed(number, kind, status, sealed.open_value(from_json(result, "result"), kind or "", "result"))
            for number, kind, status, result in rows
        ]

    def read(self, query: Callable[..., Result], *args: Any) -> Result:
        """Return what *query* returns, on the connection of the open transaction if there is one.

        Otherwise a handler could wait for a second connection that becomes free only when it gives back its first.
        """
        if self.open_transaction is not None and (conn := self.open_transaction.conn) is not None:
            return query(conn, *args)
        return self.claim.runtime.connections.read(query, *args)

    # ------------------------------------------------------------------------------------- interrupted from outside

    @property
    def stop_requested(self) -> bool:
        """Whether the worker is stopping or the batch was interrupted."""
        return self.interrupt is not None or self.claim.runtime.stopping.is_set()

    def raise_if_interrupted(self) -> None:
        """Raise LeaseLost, TimedOut or StopRequested if the handler should end."""
        self.raise_if_taken()
        if self.claim.runtime.stopping.is_set():
            raise StopRequested(f"the worker is stopping: batch {self.id} is released")

    def raise_if_taken(self) -> None:
        """Raise what ended the batch from outside. A stop of the worker is not raised: handlers may still end."""
        if self.interrupt is not None:
            raise self.interrupt

    def lose(self) -> LeaseLost:
        """Interrupt the batch, whose claim is lost: a fenced write matched nothing. Return the error to raise."""
        self.interrupt = LeaseLost(f"batch {self.id} is no longer claimed by this worker; nothing was written")
        return self.interrupt

    # ------------------------------------------------------------------------------------------ what it has finished

    @property
    def all_items_worked(self) -> bool:
        """Whether every item has been tried at least once."""
        return self.items_done + self.items_failed == (self.items_total or 0)

    @property
    def completed(self) -> bool:
        """Whether a transaction of the handler has completed it."""
        return self.left_to_finish == "nothing"

    @property
    def may_be_ending(self) -> bool:
        """Whether a transaction that may complete the batch, or leave it to its parts, has begun or has committed."""
        opened = self.open_transaction
        if self.left_to_finish in ("nothing", "parts") or (
            self.in_doubt is not None and self.in_doubt.progress is None
        ):
            return True
        return opened is not None and opened.can_complete and opened.state != "waiting"

    def begin_chunks(self) -> None:
        """Leave items to checkpoints from now on."""
        if self.left_to_finish == "all":
            self.left_to_finish = "completion"

    def leave_last_chunk_to_finish(self, count: int) -> None:
        """Count the *count* items of the last chunk without a checkpoint: the finish, which is fenced too, does it."""
        self.items_done += count
        self.left_to_finish = "last chunk"

    def complete(self) -> None:
        """Note that a transaction of the handler has completed the batch."""
        self.left_to_finish = "nothing"

    def leave_to_parts(self) -> None:
        """Note that a transaction makes parts of the batch."""
        self.left_to_finish = "parts"

    def take_back_from_parts(self) -> None:
        """Note that this transaction has failed."""
        if self.left_to_finish == "parts":
            self.left_to_finish = "all"

    def refuse_if_completed(self) -> None:
        """Raise RuntimeError if a transaction of the handler has completed the batch."""
        if self.completed:
            raise RuntimeError(
                f"batch {self.id} was completed in a transaction of its handler; to use several, give each a cursor"
            )

    # ----------------------------------------------------------------------------------------------- its checkpoints

    def progress(self) -> Progress:
        """Return the progress that changes nothing, starting at the last checkpoint."""
        return Progress(done_before=self.items_done, failed_before=self.items_failed)

    def result_text(self, result: Any, what: str) -> str | None:
        """Return a result as JSON text to store, sealed if the batch is. Raises InvalidInput, as `text.result_text`."""
        text = result_text(result, what)
        if text is None or self.keys is None:
            return text
        if len(text := self.keys.seal(text, self.kind, "result")) > MOST_RESULT_BYTES:
            raise InvalidInput(f"{what}, sealed, is {len(text):,} bytes of JSON; at most {MOST_RESULT_BYTES:,}")
        return text

    def checkpoint_statement(self, progress: Progress) -> Statement:
        """Return the fenced write of *progress*."""
        if self.keys is not None and progress.cursor is not None:
            progress = progress._replace(cursor=self.keys.seal(progress.cursor, self.kind, "cursor"))
        return checkpoints.checkpoint(self.queue, self.id, self.claim.token, self.claim.runtime.lease_seconds, progress)

    def apply(self, progress: Progress, written_at: float) -> None:
        """Apply a committed checkpoint. *written_at*: monotonic time before the write."""
        self.items_done += progress.done
        self.items_failed += progress.failed
        self.leased_at = written_at
        if not progress.keeps_cursor:
            self._cursor = from_json(progress.cursor, "cursor")


def from_json(text: str | None, what: str) -> Any:
    """Return the value of JSON *text*. Raises InvalidInput for what Postgres accepts and Python does not."""
    if text is None:
        return None
    try:
        return _decoder.raw_decode(text)[0]
    except (ValueError, RecursionError) as error:  # a number of over 4,300 digits, or nesting too deep
        raise InvalidInput(f"the {what} cannot be read in Python: {one_line(error)}") from None


def refuse_in_event_loop(what: str, instead: str) -> None:
    """Raise RuntimeError where a blocking call would block every other handler of the event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise RuntimeError(f"{what} would block the event loop; in an `async def` handler use {instead}")
