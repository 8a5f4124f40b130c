"""A claimed batch as the worker knows it, from the claim until its outcome is written."""

import asyncio
import json
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeVar
from uuid import UUID

import psycopg

from batchq.common.text import one_line
from batchq.errors import Interrupted, InvalidInput, LeaseLost, StopRequested, Throttled
from batchq.postgres.handler_connections import HandlerConnections
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
LeftToFinish = Literal["all", "completion", "last chunk", "nothing"]


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


def _throttle_nobody(queue: str, kind: str, key: str | None, error: Throttled) -> None:
    """Do nothing: for a runtime without other workers."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """What a worker shares with all its batches.

    gate: returns the gate of a queue and kind. throttle: lets what a Throttled names wait, in all workers.
    """

    connections: HandlerConnections
    lease_seconds: float
    stopping: threading.Event
    keep_completed: bool = True
    conflicts: Conflicts = field(default_factory=Conflicts)
    gate: Callable[[str, str], _Gate] = _open_gate
    throttle: Callable[[str, str, str | None, Throttled], None] = _throttle_nobody


@dataclass(slots=True)
class Claim:
    """One claim statement. All batches it returned have the same queue, token and permits."""

    queue: str
    token: UUID
    runtime: Runtime
    began_at: float  # monotonic time before the statement: a lower bound for the start of the leases
    permits: tuple[Any, ...] = ()  # of batchq.worker.permits: what the batches need where there are limits
    reserved: int = 0  # how many permits the claim holds before its batches are known
    arrived_at: float = field(init=False)  # monotonic time when the rows had arrived
    token_text: str = field(init=False)

    def __post_init__(self) -> None:
        self.arrived_at = self.began_at
        self.token_text = str(self.token)


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
        "interrupt",
        "items_counted",
        "items_done",
        "items_failed",
        "items_total",
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
            self.items_total, self.items_done, self.items_failed, _, _, _, _, _,
        ) = row  # fmt: skip
        self.items_counted = self.items_done + self.items_failed  # in batchq.throughput, by any attempt
        self.leased_at = claim.began_at
        self.begun_at: float | None = None  # monotonic time when its handler began
        self.left_to_finish: LeftToFinish = "all"
        self.interrupt: Interrupted | None = None
        self.open_transaction: _OpenTransaction | None = None
        self._cursor = UNCHANGED

    @property
    def queue(self) -> str:
        """Its queue."""
        return self.claim.queue

    # --------------------------------------------------------------------------------------------------- its input

    @property
    def cursor(self) -> Any:
        """The cursor of the last checkpoint, None before the first."""
        if self._cursor is UNCHANGED:
            self._cursor = from_json(self.row.cursor, "cursor")
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

    def read_items(self, first: int, count: int) -> str:
        """Return *count* items from number *first* as JSON text. Raises LeaseLost."""
        if count == 0:
            return "[]"
        text = self.read(inputs.items_page, self.queue, self.id, self.claim.token, first, count)
        if text is None:
            raise self.lose()
        return text

    def read_needed(self) -> list[Needed]:
        """Return the batches that it waited for."""
        rows = self.read(flows.needed, self.id)
        return [Needed(number, kind, status, from_json(result, "result")) for number, kind, status, result in rows]

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
        """Whether a transaction that may complete the batch has begun, or has committed."""
        opened = self.open_transaction
        return self.completed or (opened is not None and opened.can_complete and opened.state != "waiting")

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

    def refuse_if_completed(self) -> None:
        """Raise RuntimeError if a transaction of the handler has completed the batch."""
        if self.completed:
            raise RuntimeError(
                f"batch {self.id} was completed by its batch.transaction(); to use several, give each a cursor"
            )

    # ----------------------------------------------------------------------------------------------- its checkpoints

    def progress(self) -> Progress:
        """Return the progress that changes nothing, starting at the last checkpoint."""
        return Progress(done_before=self.items_done, failed_before=self.items_failed)

    def checkpoint_statement(self, progress: Progress) -> Statement:
        """Return the fenced write of *progress*."""
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
