"""Transactions in which a handler writes its own rows: they commit together with a fenced write for the batch."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from typing import Any, Literal

import psycopg
from psycopg.pq import TransactionStatus

from batchq.batch.claimed import UNCHANGED, ClaimedBatch, refuse_in_event_loop
from batchq.common.forks import end_if_forked
from batchq.common.text import in_letters_of, json_text
from batchq.errors import InvalidInput
from batchq.postgres.connections import AnyConnection
from batchq.postgres.statements import checkpoints, endings
from batchq.postgres.statements.endings import Finish
from batchq.postgres.statements.running import Statement


class FencedTransaction:
    """A transaction that ends with a fenced write: ``with`` in ``def``, ``async with`` in ``async def`` handlers.

    Gives the psycopg connection to write with. psycopg refuses to commit it or roll it back by hand.
    """

    can_complete = False

    def __init__(self, batch: ClaimedBatch) -> None:
        self.progress = batch.progress()
        # Waits for a connection, then the handler's block runs, then it commits or rolls back.
        self.state: Literal["waiting", "in block", "ending"] = "waiting"
        self.conn: psycopg.Connection[Any] | None = None  # of a `def` handler, while its transaction is open
        self.opened_by = 0
        self._batch = batch
        self._context: AbstractContextManager[psycopg.Connection[Any]] | None = None
        self._async_context: AbstractAsyncContextManager[psycopg.AsyncConnection[Any]] | None = None

    def write(self) -> Statement:
        """Return the fenced write that ends the transaction."""
        raise NotImplementedError

    def _apply(self, written_at: float) -> None:
        """Apply what was committed. *written_at*: monotonic time before the write."""
        raise NotImplementedError

    def set_cursor(self, cursor: Any) -> None:
        """Save *cursor* with the commit. Raises InvalidInput for what is not JSON."""
        if cursor is not UNCHANGED:
            text = None if cursor is None else json_text(cursor, "the cursor")
            self.progress = self.progress._replace(keeps_cursor=False, cursor=text)

    def __enter__(self) -> psycopg.Connection[Any]:
        refuse_in_event_loop("`with ...transaction()`", "`async with ...transaction()`")
        self._context = self._run()
        return self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        end_if_forked()
        self.state = "ending"
        assert self._context is not None  # noqa: S101 (for the type checker)
        self._context.__exit__(*error)

    async def __aenter__(self) -> psycopg.AsyncConnection[Any]:
        self._async_context = self._run_async()
        return await self._async_context.__aenter__()

    async def __aexit__(self, *error: Any) -> None:
        end_if_forked()
        self.state = "ending"
        assert self._async_context is not None  # noqa: S101 (for the type checker)
        await self._async_context.__aexit__(*error)

    @contextmanager
    def _run(self) -> Iterator[psycopg.Connection[Any]]:
        batch = self._batch
        written_at = None
        with self._opened():
            with batch.claim.runtime.connections.transaction(batch.raise_if_taken) as conn:
                self.state, self.conn = "in block", conn
                yield conn
                self._refuse_if_ended(conn)
                written_at = time.monotonic()
                if conn.execute(*_storable(conn, self.write())).rowcount == 0:
                    raise batch.lose()
            self._apply(_committed(written_at))

    @asynccontextmanager
    async def _run_async(self) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        batch = self._batch
        written_at = None
        with self._opened():
            async with batch.claim.runtime.connections.transaction_async(batch.raise_if_taken) as conn:
                self.state = "in block"
                yield conn
                self._refuse_if_ended(conn)
                written_at = time.monotonic()
                if (await conn.execute(*_storable(conn, self.write()))).rowcount == 0:
                    raise batch.lose()
            self._apply(_committed(written_at))

    def _refuse_if_ended(self, conn: AnyConnection) -> None:
        """Raise InvalidInput if a statement of the handler has ended the transaction: its rows were not fenced."""
        if conn.info.transaction_status == TransactionStatus.IDLE:
            raise InvalidInput(
                f"the handler of batch {self._batch.id} has ended its transaction by COMMIT or ROLLBACK; leave that to "
                "the end of the block, which writes the batch's state in the same transaction"
            )

    @contextmanager
    def _opened(self) -> Iterator[None]:
        """Make this the open transaction of the batch, which `Batch.checkpoint` joins; only one at a time.

        A second one would commit apart from the first, or wait forever for a connection that the first one holds.
        """
        self.opened_by = _current_task_or_thread()
        batch = self._batch
        if (other := batch.open_transaction) is not None:
            message = f"batch {batch.id} has a transaction open already; end it before the next"
            raise InvalidInput(message) if other.opened_by == self.opened_by else RuntimeError(message)
        if batch.in_doubt is not None:
            raise RuntimeError(
                f"a transaction of the handler's own (complete_in or commit_in) has written for batch {batch.id}; "
                "request the next chunk, or return, before batchq writes again"
            )
        batch.open_transaction = self
        try:
            yield
        finally:
            batch.open_transaction = self.conn = None


def _committed(written_at: float | None) -> float:
    """Return *written_at*. Raises RuntimeError if psycopg.Rollback has ended the block: nothing was written."""
    if written_at is None:
        raise RuntimeError("psycopg.Rollback has undone the batch's transaction; raise an error of your own instead")
    return written_at


class BatchTransaction(FencedTransaction):
    """The transaction of `Batch.transaction`."""

    can_complete = True

    def __init__(self, batch: ClaimedBatch, cursor: Any, complete: bool, result: Any) -> None:
        super().__init__(batch)
        self._result = batch.result_text(result, "the result")
        if cursor is not UNCHANGED:
            self.set_cursor(cursor)
        self._completes = complete

    def set_cursor(self, cursor: Any) -> None:
        """Save *cursor* with the commit instead of completing the batch."""
        self._completes = False
        super().set_cursor(cursor)

    def write(self) -> Statement:
        """Complete the batch, or save the checkpoint."""
        if not self._completes:
            return self._batch.checkpoint_statement(self.progress)
        claim = self._batch.claim
        if not claim.runtime.keep_completed:
            return endings.complete(
                claim.queue, [self._batch.id], [claim.token_text], False, claim.runtime.layout.is_distributed
            )
        return endings.finish(
            claim.queue, [Finish(self._batch.id, claim.token, "completed", self._result, all_done=True)]
        )

    def _apply(self, written_at: float) -> None:
        if self._completes:
            self._batch.complete()
        else:
            self._batch.apply(self.progress, written_at)


def _current_task_or_thread() -> int:
    try:
        return id(asyncio.current_task())
    except RuntimeError:
        return threading.get_ident()


def _storable(conn: AnyConnection, statement: Statement) -> Statement:
    """Return *statement*; in a checkpoint, without letters in errors that the database's encoding does not have."""
    text, parameters = statement
    encoding = conn.info.parameter_status("server_encoding") or ""
    if encoding == "UTF8" or text is not checkpoints.CHECKPOINT:
        return statement
    return text, parameters | {"errors": [in_letters_of(error, encoding) for error in parameters["errors"]]}
