"""Reach: what a program can ask and do about batches by their ids, on a connection of its own."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

import psycopg

# Loaded first: the import of a module of this name would replace the function of this name in the package.
import batchq.retry  # noqa: F401
from batchq.common import sealed
from batchq.common.text import one_line
from batchq.errors import DatabaseAway, InvalidInput, OutcomeUnknown
from batchq.postgres import drivers
from batchq.postgres.connections import connect
from batchq.postgres.idle_connections import (
    end_read,
    end_read_async,
    refuse_open_transaction,
    refuse_open_transaction_async,
)
from batchq.postgres.link import Link
from batchq.postgres.statements import reach
from batchq.postgres.statements.running import Statement
from batchq.postgres.statements.views import FINAL_STATUSES, STATUSES

MOST_LISTED = 10_000
_DATABASE_SECONDS = 15.0  # timeout of each query on a connection of wait's own
_FIRST_PAUSE_SECONDS = 0.05
_MOST_PAUSE_SECONDS = 2.0
_PAUSE_FACTOR = 1.5


@dataclass(frozen=True, slots=True)
class BatchInfo:
    """A batch as it was at the time of the query.

    status: as batchq.status shows it: waiting, scheduled, ready, processing, stalled, retrying, completed, failed or
    cancelled. payload and result are JSON values, opened if they are sealed and this program has the key. error: one
    line, of the latest attempt that failed, even if a later one succeeded. items_total: None without items. Times have
    a time zone; None where there is none, and where Python has no such date. next_run_at: of a batch that is ready,
    scheduled or retrying.
    """

    id: int
    queue: str
    kind: str
    status: str
    payload: Any
    result: Any
    items_total: int | None
    items_done: int
    items_failed: int
    attempt: int
    max_attempts: int
    error: str | None
    priority: int
    key: str | None
    unique_key: str | None
    created_at: datetime | None
    next_run_at: datetime | None
    claimed_at: datetime | None
    finished_at: datetime | None

    @property
    def is_final(self) -> bool:
        """Whether it has ended: it is completed, failed or cancelled."""
        return self.status in FINAL_STATUSES


# -------------------------------------------------------------------------------------------------------------- reads


def get(conn: Any, batch_id: int) -> BatchInfo | None:
    """Return a batch, None if there is none with this id (also for a batch that was completed and not kept).

    *conn*: a connection of psycopg, SQLAlchemy or Django. The query runs in its transaction, which the caller ends.
    Raises the driver's errors, and InvalidInput for another connection or an id that is not one.
    """
    return _one(drivers.run(conn, reach.batch(_checked_id(batch_id))))


async def get_async(conn: Any, batch_id: int) -> BatchInfo | None:
    """Async version of `get`, for async connections of psycopg and SQLAlchemy, and asyncpg's."""
    return _one(await drivers.run_async(conn, reach.batch(_checked_id(batch_id))))


def list_batches(
    conn: Any, *, queue: str | None = None, kind: str | None = None, status: str | None = None, limit: int = 100
) -> list[BatchInfo]:
    """Return the batches that match, the newest first, at most *limit* (up to 10,000), each with payload and result.

    *status*: as in `BatchInfo`. *conn* and errors: as of `get`. Raises InvalidInput also for a status or a limit that
    is not one.
    """
    return _all(drivers.run(conn, _listing(queue, kind, status, limit)))


async def list_batches_async(
    conn: Any, *, queue: str | None = None, kind: str | None = None, status: str | None = None, limit: int = 100
) -> list[BatchInfo]:
    """Async version of `list_batches`."""
    return _all(await drivers.run_async(conn, _listing(queue, kind, status, limit)))


# -------------------------------------------------------------------------------------------------------------- verbs


def cancel(conn: Any, batch_id: int, *, reason: str = "by a program", actor: str | None = None) -> str | None:
    """Cancel a batch that has not ended, in the caller's transaction; return its status: cancelled, or the final one
    that it had already. None if there is no such batch.

    A running handler is stopped at its next checkpoint and writes nothing more. *reason* and *actor* (default: the
    database role) are noted in batchq.audit. *conn* and errors: as of `get`.
    """
    return _answer(drivers.run(conn, reach.cancel(_checked_id(batch_id), reason, actor)))


async def cancel_async(
    conn: Any, batch_id: int, *, reason: str = "by a program", actor: str | None = None
) -> str | None:
    """Async version of `cancel`."""
    return _answer(await drivers.run_async(conn, reach.cancel(_checked_id(batch_id), reason, actor)))


def retry(
    conn: Any, batch_id: int, *, whole: bool = False, reason: str | None = None, actor: str | None = None
) -> str | None:
    """Make a batch that has ended pending again, with all its attempts, in the caller's transaction; return its status
    (pending; the present one of a batch that runs or waits), None if there is no such batch.

    It continues from its checkpoint: only failed items and those not yet processed run. *whole*: it starts from
    nothing. A batch that waits for its next attempt becomes ready at once. Raises the driver's error, with the
    database's message, for a completed batch without failed items (unless *whole*) and for one whose unique_key another
    live batch has. *reason*, *actor*, *conn*: as of `cancel`.
    """
    return _answer(drivers.run(conn, reach.retry(_checked_id(batch_id), whole, reason, actor)))


async def retry_async(
    conn: Any, batch_id: int, *, whole: bool = False, reason: str | None = None, actor: str | None = None
) -> str | None:
    """Async version of `retry`."""
    return _answer(await drivers.run_async(conn, reach.retry(_checked_id(batch_id), whole, reason, actor)))


# --------------------------------------------------------------------------------------------------------------- wait


def wait(conn_or_dsn: Any, batch_id: int, timeout_seconds: float | None = None) -> BatchInfo:
    """Wait until a batch has ended; return it. It may be completed, failed or cancelled: see its status.

    Queries its status after 0.05 s, then ever less often, every 2 s at last. No transaction is open in between, so a
    pooler can use the connection for others. *conn_or_dsn*: a connection as of `get` without an open transaction, or
    a DSN: then wait opens a connection, and a new one after it is lost. *timeout_seconds*: None waits without limit.

    Raises ConfigError or psycopg.OperationalError if the first connection to the DSN cannot be made; TimeoutError,
    which says the status; LookupError for a batch that is not there (never committed, or
    completed and not kept); InvalidInput for a connection within a transaction, since that would stay open for as long.
    """
    watch = _Watch(_checked_id(batch_id), timeout_seconds)
    if isinstance(conn_or_dsn, str):
        with closing(_link_to(conn_or_dsn)) as link:
            return _wait(watch, lambda statement: _read_link(link, statement))
    refuse_open_transaction(conn_or_dsn, "batchq.wait")
    return _wait(watch, lambda statement: _read_and_end(conn_or_dsn, statement))


async def wait_async(conn_or_dsn: Any, batch_id: int, timeout_seconds: float | None = None) -> BatchInfo:
    """Async version of `wait`. With a DSN, the queries run in a thread."""
    watch = _Watch(_checked_id(batch_id), timeout_seconds)
    if isinstance(conn_or_dsn, str):
        with closing(await asyncio.to_thread(_link_to, conn_or_dsn)) as link:
            while (found := await asyncio.to_thread(watch.look, lambda text: _read_link(link, text))) is None:
                await asyncio.sleep(watch.pause())
            return found
    refuse_open_transaction_async(conn_or_dsn, "batchq.wait_async")
    while True:
        [status] = await _read_and_end_async(conn_or_dsn, reach.status(batch_id)) or [(None,)]
        if watch.has_ended(status[0]):
            info = _one(await _read_and_end_async(conn_or_dsn, reach.batch(batch_id)))
            if info is not None and info.is_final:
                return info
        await asyncio.sleep(watch.pause())


class _Watch:
    """One wait: what was seen of the batch, and how long to pause."""

    def __init__(self, batch_id: int, timeout_seconds: float | None) -> None:
        self.batch_id = batch_id
        self.status: str | None = None
        self._timeout_seconds = timeout_seconds
        self._until = float("inf") if timeout_seconds is None else time.monotonic() + timeout_seconds
        self._pauses = _pauses()

    def look(self, read: Callable[[Statement], drivers.Rows | None]) -> BatchInfo | None:
        """Return the batch if it has ended. *read* returns None while the database is unavailable."""
        rows = read(reach.status(self.batch_id))
        if rows is None or not self.has_ended(rows[0][0] if rows else None):
            return None
        info = _one(read(reach.batch(self.batch_id)) or [])
        return info if info is not None and info.is_final else None

    def has_ended(self, status: str | None) -> bool:
        """Note the status; return whether it is final. Raises LookupError if the batch is not there."""
        if status is None:
            seen = f"; it was {self.status} before" if self.status else ""
            raise LookupError(
                f"there is no batch {self.batch_id}{seen}; it was not committed, or it was completed and not kept "
                "(BATCHQ_KEEP_COMPLETED), or dropped by its age"
            )
        self.status = status
        return status in FINAL_STATUSES

    def pause(self) -> float:
        """Return how many seconds to pause. Raises TimeoutError."""
        left = self._until - time.monotonic()
        if left <= 0:
            shown = self.status or "unknown: the database is unavailable"
            raise TimeoutError(
                f"batch {self.batch_id} has not ended within {self._timeout_seconds:g} s; its status is {shown}"
            )
        return min(next(self._pauses), left)


def _pauses() -> Iterator[float]:
    seconds = _FIRST_PAUSE_SECONDS
    while True:
        yield seconds
        seconds = min(seconds * _PAUSE_FACTOR, _MOST_PAUSE_SECONDS)


def _wait(watch: _Watch, read: Callable[[Statement], drivers.Rows | None]) -> BatchInfo:
    while (found := watch.look(read)) is None:
        time.sleep(watch.pause())
    return found


def _link_to(dsn: str) -> Link:
    return Link(dsn, _DATABASE_SECONDS, connect(dsn))


def _read_link(link: Link, statement: Statement) -> drivers.Rows | None:
    """Return the rows; None if the connection was lost or cannot be made: the next query may succeed."""
    try:
        with link.transaction() as conn:
            return drivers.run(conn, statement)
    except (psycopg.OperationalError, OutcomeUnknown, DatabaseAway):
        return None


def _read_and_end(conn: Any, statement: Statement) -> drivers.Rows:
    try:
        return drivers.run(conn, statement)
    finally:
        end_read(conn)


async def _read_and_end_async(conn: Any, statement: Statement) -> drivers.Rows:
    try:
        return await drivers.run_async(conn, statement)
    finally:
        await end_read_async(conn)


# ------------------------------------------------------------------------------------------------- arguments, answers


def _checked_id(batch_id: int) -> int:
    if not isinstance(batch_id, int) or isinstance(batch_id, bool) or not 0 < batch_id < 2**63:
        raise InvalidInput(f"the id of a batch is a whole number from 1 up, as enqueue returns it, not {batch_id!r}")
    return batch_id


def _listing(queue: str | None, kind: str | None, status: str | None, limit: int) -> Statement:
    if status is not None and status not in STATUSES:
        raise InvalidInput(f"status is one of {', '.join(STATUSES)}, not {status!r}")
    if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit <= MOST_LISTED:
        raise InvalidInput(f"limit is a whole number from 1 to {MOST_LISTED:,}, not {limit!r}")
    return reach.newest(queue, kind, status, limit)


def _answer(rows: drivers.Rows) -> str | None:
    [(status,)] = rows
    return None if status is None else str(status)


def _one(rows: drivers.Rows) -> BatchInfo | None:
    return _info(rows[0][0]) if rows else None


def _all(rows: drivers.Rows) -> list[BatchInfo]:
    return [_info(text) for (text,) in rows]


def _info(text: str) -> BatchInfo:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of over 4,300 digits, or nesting too deep
        raise InvalidInput(f"the batch cannot be read in Python: {one_line(error)}") from None
    row["error"] = row.pop("last_error")
    if sealed.MARK in text:
        row["payload"] = sealed.opened_or_kept(row["payload"], row["kind"], "payload")
        row["result"] = sealed.opened_or_kept(row["result"], row["kind"], "result")
    for name in ("created_at", "next_run_at", "claimed_at", "finished_at"):
        row[name] = _time(row[name])
    return BatchInfo(**{name: row[name] for name in _FIELDS})


_FIELDS = [field.name for field in fields(BatchInfo)]


def _time(text: str | None) -> datetime | None:
    """Return a time; None for one that Python's datetime does not have, such as infinity."""
    try:
        return None if text is None else datetime.fromisoformat(text)
    except ValueError:
        return None
