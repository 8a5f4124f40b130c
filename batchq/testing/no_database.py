"""A batch that is in no database: reads are answered from memory, and batchq's own writes are recorded."""

import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import psycopg
from psycopg.pq import TransactionStatus

from batchq.batch.claimed import Claim, ClaimedBatch, Needed, Runtime
from batchq.common.text import json_text
from batchq.errors import BatchqError, Throttled
from batchq.postgres.statements import checkpoints, endings, flows, inputs
from batchq.postgres.statements.checkpoints import ItemFailure, Progress
from batchq.postgres.statements.claims import ClaimedRow
from batchq.postgres.statements.inputs import LeftItems
from batchq.postgres.statements.running import Statement
from batchq.testing.gate import ClosingGate
from batchq.testing.same_session import SameSession

Result = TypeVar("Result")
LEASE_SECONDS = 60.0
_ONE_ROW = SimpleNamespace(rowcount=1)
_INFO = SimpleNamespace(transaction_status=TransactionStatus.INTRANS, parameter_status=lambda _: "UTF8")


class NoDatabaseError(BatchqError):
    """A handler used the connection of a transaction, and run_handler has none."""


class Unstored:
    """Lends no connections, or those of a test's session, to one batch that is in memory only.

    checkpoints: the progress that each would have stored. failures: of items, by index. result: that a
    batch.transaction() would have stored, as JSON. misused: how the handler has used a connection that is not there.
    """

    def __init__(self, items: Sequence[Any], needed: Sequence[Needed]) -> None:
        self.session: SameSession | None = None
        self.checkpoints: list[Progress] = []
        self.failures: dict[int, ItemFailure] = {}
        self.result: str | None = None
        self.misused: NoDatabaseError | None = None
        self._items = items
        self._needed = needed
        self._gate = ClosingGate()

    def claim(self, row: ClaimedRow, queue: str) -> ClaimedBatch:
        """Return the batch as a worker has it after a claim."""
        gate: Callable[[str, str], ClosingGate] = lambda queue, kind: self._gate  # noqa: ARG005, E731
        runtime = Runtime(self, LEASE_SECONDS, threading.Event(), gate=gate, throttle=self._throttle)
        return _UnstoredBatch(row, Claim(queue, uuid.uuid4(), runtime, time.monotonic()))

    def _throttle(self, queue: str, kind: str, key: str | None, error: Throttled) -> None:  # noqa: ARG002
        if error.scope != "key":
            self._gate.close(error.seconds)

    # ------------------------------------------------------------------------------------------------- what is read

    def read(self, query: Callable[..., Result], *args: Any) -> Result:
        """Return what *query* would return for this batch."""
        found: Any
        match query:
            case inputs.items_page:
                first, count = args[-2:]
                found = json_text(self._items[first : first + count], "items")
            case inputs.failed_page:
                found = []
            case inputs.left_items:
                found = self._left_items()
            case flows.needed:
                found = [(one.id, one.kind, one.status, json_text(one.result, "a result")) for one in self._needed]
            case _:
                found = "processing"
        return cast(Result, found)

    def _left_items(self) -> LeftItems:
        by_index = [self.failures[index] for index in sorted(self.failures)]
        failed = [one for one in by_index if one.delay_seconds is None]
        snoozed = [one.delay_seconds for one in by_index if one.delay_seconds is not None]
        first = (failed or by_index)[0].error if by_index else None
        return LeftItems(sum(one.retryable for one in failed), first, min(snoozed, default=None))

    async def in_thread(self, query: Callable[[], Result]) -> Result:
        """Return what *query* returns."""
        return query()

    # ---------------------------------------------------------------------------------------------- what is written

    def answer(self, statement: Statement) -> Any:
        """Record a write of batchq's own and return its answer; return None for any other statement."""
        text, parameters = statement
        if text in (checkpoints.PLAIN_CHECKPOINT, checkpoints.CHECKPOINT):
            self._note_checkpoint(parameters)
            return _ONE_ROW
        if text == endings.FINISH:
            self.result = parameters["results"][0]
            return _ONE_ROW
        return None

    def _note_checkpoint(self, given: Mapping[str, Any]) -> None:
        before = self.checkpoints[-1].cursor if self.checkpoints else None
        cursor = before if given["keeps_cursor"] else given["cursor"]
        done, failed = given["done_before"] + given["done"], given["failed_before"] + given["failed"]
        self.checkpoints.append(Progress(done=done, failed=failed, keeps_cursor=given["keeps_cursor"], cursor=cursor))
        names = ("indexes", "errors", "retryables", "delays")
        for failure in zip(*(given.get(name, ()) for name in names), strict=True):
            self.failures[failure[0]] = ItemFailure(*failure)

    @contextmanager
    def transaction(self, check: Callable[[], None] = lambda: None) -> Iterator[psycopg.Connection[Any]]:  # noqa: ARG002
        """Yield the test's connection in a savepoint or, without one, what refuses to be used."""
        if self.session is None:
            yield cast(Any, NoConnection(self))
            return
        with self.session.transaction() as conn:
            yield conn

    @asynccontextmanager
    async def transaction_async(
        self,
        check: Callable[[], None] = lambda: None,  # noqa: ARG002
    ) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        """Async version of `transaction`."""
        if self.session is None:
            yield cast(Any, _AsyncNoConnection(self))
            return
        async with self.session.transaction_async() as conn:
            yield conn


class _UnstoredBatch(ClaimedBatch):
    __slots__ = ()

    def read(self, query: Callable[..., Result], *args: Any) -> Result:
        """Return what *query* would return, also within a transaction."""
        return self.claim.runtime.connections.read(query, *args)


class NoConnection:
    """In the place of a connection: takes batchq's own writes, and refuses everything else."""

    closed = broken = False
    info = _INFO

    def __init__(self, unstored: Unstored) -> None:
        self._unstored = unstored

    def execute(self, query: Any, params: Any = None, **_: Any) -> Any:
        """Record a write of batchq's own. Raises NoDatabaseError for any other."""
        if (found := self._unstored.answer((query, params))) is None:
            raise self._refusal("execute")
        return found

    def transaction(self, *_: Any, **__: Any) -> AbstractContextManager[None]:
        """Return a savepoint, of nothing."""
        return nullcontext()

    def __getattr__(self, name: str) -> Any:
        raise self._refusal(name)

    def _refusal(self, name: str) -> NoDatabaseError:
        self._unstored.misused = error = NoDatabaseError(
            f"run_handler has no database, and the handler uses conn.{name} of its transaction; give run_handler a "
            "conn= of your test, or enqueue the batch and call batchq.testing.drain(app, conn)"
        )
        return error


class _AsyncNoConnection(NoConnection):
    async def execute(self, query: Any, params: Any = None, **_: Any) -> Any:
        """Record a write of batchq's own. Raises NoDatabaseError for any other."""
        return super().execute(query, params)


def json_or_none(text: str | None) -> Any:
    """Return the value of a JSON text."""
    return None if text is None else json.loads(text)
