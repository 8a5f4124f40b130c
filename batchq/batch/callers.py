"""Fenced writes in a transaction of the caller's own, on a connection of any kind; the caller commits.

Only the database knows whether the caller has committed. Until batchq asks it, the write is in doubt. batchq asks
before the next write, when the handler requests its next chunk, and when the handler has returned or raised.
"""

import time
from functools import partial
from typing import Any

from batchq.batch.claimed import ClaimedBatch, InDoubt, refuse_in_event_loop
from batchq.common.text import json_text
from batchq.errors import InvalidInput
from batchq.postgres import drivers
from batchq.postgres.statements import protocol
from batchq.postgres.statements.checkpoints import ItemFailure, Progress
from batchq.postgres.statements.running import Statement, array_text


def complete_in(batch: ClaimedBatch, conn: Any, result: Any) -> None:
    """Complete the batch in the caller's transaction; see `Batch.complete_in`."""
    refuse_in_event_loop("batch.complete_in()", "`await batch.complete_in_async()`")
    text = batch.result_text(result, "the result")
    was_committed(batch)
    _refuse_end(batch)
    _write(batch, conn, None, text)


async def complete_in_async(batch: ClaimedBatch, conn: Any, result: Any) -> None:
    """Async version of `complete_in`."""
    text = batch.result_text(result, "the result")
    await was_committed_async(batch)
    _refuse_end(batch)
    await _write_async(batch, conn, None, text)


def commit_in(batch: ClaimedBatch, conn: Any, progress: Progress) -> None:
    """Save a checkpoint in the caller's transaction; see `Chunk.commit_in`."""
    _write(batch, conn, progress, None)


async def commit_in_async(batch: ClaimedBatch, conn: Any, progress: Progress) -> None:
    """Async version of `commit_in`."""
    await _write_async(batch, conn, progress, None)


# ------------------------------------------------------------------------------------------------------------- in doubt


def settle(batch: ClaimedBatch) -> None:
    """Ask the database whether the write in doubt was committed, and note it. Blocks.

    Raises RuntimeError if it was not, and LeaseLost if a checkpoint cannot be there because the claim is lost.
    """
    if not was_committed(batch):
        raise RuntimeError(
            f"the transaction in which a handler wrote for batch {batch.id} (complete_in or commit_in) was rolled back "
            "or is still open; commit it before the next chunk, and before the handler returns"
        )


def was_committed(batch: ClaimedBatch) -> bool:
    """Return whether a write in doubt was committed, and note it; False without one. One that was rolled back is
    forgotten: the caller may write again. Blocks. Raises LeaseLost."""
    if (doubt := batch.in_doubt) is None:
        return False
    index = None if doubt.progress is None else _index_that_stays(doubt.progress)
    found = batch.read(protocol.counted, batch.queue, batch.id, batch.claim.token, index)
    batch.in_doubt = None
    if doubt.progress is None:
        if found is None:
            batch.complete()
        return found is None
    if found is None:
        raise batch.lose()
    done, failed, has_run = found
    expected = (batch.items_done + doubt.progress.done, batch.items_failed + doubt.progress.failed)
    if (done, failed) != expected or (index is not None and not has_run):
        return False
    batch.apply(doubt.progress, doubt.written_at)
    return True


def _index_that_stays(progress: Progress) -> int | None:
    """Return the index of an item that shows whether a checkpoint is there that changes no counter."""
    return progress.failures[0].item_index if progress.done == progress.failed == 0 and progress.failures else None


async def was_committed_async(batch: ClaimedBatch) -> bool:
    """Async version of `was_committed`."""
    if batch.in_doubt is None:
        return False
    return await batch.claim.runtime.connections.in_thread(partial(was_committed, batch))


# ------------------------------------------------------------------------------------------------------------ the write


def _write(batch: ClaimedBatch, conn: Any, progress: Progress | None, result: str | None) -> None:
    _refuse_inner(batch)
    written_at = time.monotonic()
    [(began,)] = drivers.run(conn, protocol.began())
    [(held,)] = drivers.run(conn, _statement(batch, began, progress, result))
    _note(batch, held, InDoubt(progress, written_at))


async def _write_async(batch: ClaimedBatch, conn: Any, progress: Progress | None, result: str | None) -> None:
    _refuse_inner(batch)
    written_at = time.monotonic()
    [(began,)] = await drivers.run_async(conn, protocol.began())
    [(held,)] = await drivers.run_async(conn, _statement(batch, began, progress, result))
    _note(batch, held, InDoubt(progress, written_at))


def _note(batch: ClaimedBatch, held: bool | None, doubt: InDoubt) -> None:
    if held is None:
        raise InvalidInput(
            f"the connection has no transaction open, so rows and the state of batch {batch.id} would not commit "
            "together; open one first: `with session.begin()`, `with transaction.atomic()`, or `conn.transaction()`"
        )
    if not held:
        raise batch.lose()
    batch.in_doubt = doubt


def _statement(batch: ClaimedBatch, began: str, progress: Progress | None, result: str | None) -> Statement:
    runtime = batch.claim.runtime
    if progress is None:
        return protocol.complete(began, batch.id, batch.claim.token, result, runtime.keep_completed)
    done = progress.done if progress.first_index is not None else 0
    failures = json_text([_failure(failure) for failure in progress.failures], "the errors of the items")
    recovered = array_text(progress.recovered)
    return protocol.checkpoint(began, batch.id, batch.claim.token, done, failures, recovered, runtime.lease_seconds)


def _failure(failure: ItemFailure) -> dict[str, Any]:
    return {
        "index": failure.item_index,
        "error": failure.error,
        "retryable": failure.retryable,
        "delay_seconds": failure.delay_seconds,
    }


def _refuse_inner(batch: ClaimedBatch) -> None:
    batch.raise_if_taken()
    if batch.open_transaction is not None:
        raise InvalidInput(f"batch {batch.id} has a transaction open already; end it before you write in another one")


def _refuse_end(batch: ClaimedBatch) -> None:
    batch.refuse_if_completed()
    if batch.items_total is not None and not batch.all_items_worked:
        tried = batch.items_done + batch.items_failed
        raise InvalidInput(
            f"batch {batch.id} has items, and {tried} of {batch.items_total} were processed; write the rows of each "
            "chunk with chunk.commit_in(), and commit the last chunk before batch.complete_in()"
        )
