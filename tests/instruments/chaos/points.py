"""In a worker of the chaos run: named points at which it dies, or is told to stop, when armed for it.

Wraps batchq from outside, so that nothing in the package is there for tests. The first that reaches an armed point
takes it: the claimer (main thread) and the finisher by their statements, handlers by their transactions.
"""

import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from psycopg.rows import tuple_row

from batchq.postgres.handler_connections import HandlerConnections
from batchq.postgres.link import Link
from batchq.postgres.statements import session
from batchq.postgres.transactions import transaction

SERVICES = {"MainThread": "claim", "batchq-finisher": "finish"}
MOMENTS = ("before", "within", "after")  # the COMMIT: nothing of it sent; sent, and its answer not read; answered
POINTS = tuple(f"{what}-{moment}" for what in ("claim", "commit", "finish") for moment in MOMENTS)

armed: dict[str, signal.Signals] = {}


def reach(point: str) -> None:
    """Send this process the signal that the point is armed with, if it is."""
    if number := armed.pop(point, None):
        os.write(2, b'{"event": "reached"}\n')
        os.kill(os.getpid(), number)


def reach_within(point: str, send: Callable[[], object]) -> None:
    """Reach a point between a COMMIT and its answer: die when *send* has sent it, or be told to stop in a moment."""
    if armed.get(point) == signal.SIGKILL:
        send()
        reach(point)
    elif point in armed:
        threading.Timer(0.0005, reach, [point]).start()


def install() -> None:
    """Wrap what the points are in. A version from before there was all of it does without."""
    if not hasattr(Link, "run_text"):
        return
    Link.run = run_with_points(Link.run)  # type: ignore[method-assign]
    Link.run_text = run_text_with_points(Link.run_text)  # type: ignore[method-assign]
    HandlerConnections.transaction = with_points(HandlerConnections.transaction)  # type: ignore[method-assign]
    HandlerConnections.transaction_async = with_points_async(HandlerConnections.transaction_async)  # type: ignore[method-assign]


def run_with_points(run: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """Wrap Link.run: before the COMMIT of a statement that found something, and after it."""

    def wrapped(self: Link, statement: Any, settings: Any = session.FORCE_INDEX_AND_HASH_JOIN) -> list[Any]:
        service = SERVICES.get(threading.current_thread().name)
        if f"{service}-before" in armed:
            return run_stopping_before(self, statement, settings, f"{service}-before")
        rows = run(self, statement, settings)
        if rows and service:
            reach(f"{service}-after")
        return rows

    return wrapped


def run_stopping_before(link: Link, statement: Any, settings: Any, point: str) -> list[Any]:
    """Do as Link.run does where a text is long: the COMMIT is a message of its own."""
    with link.kept() as conn, transaction(conn, link.timeout_seconds, settings=settings):
        rows = conn.cursor(row_factory=tuple_row).execute(*statement).fetchall()
        if rows:
            reach(point)
    return rows


def run_text_with_points(run_text: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """Wrap Link.run_text: between a transaction in one message and its answer."""

    def wrapped(self: Link, cursor: Any, text: str, *more: int) -> list[Any]:  # older versions pass no more
        service = SERVICES.get(threading.current_thread().name)
        reach_within(f"{service}-within", lambda: send(cursor.connection, text.encode()))
        return run_text(self, cursor, text, *more)

    return wrapped


def send(conn: Any, text: bytes) -> None:
    """Send a message, and wait for nothing."""
    conn.pgconn.send_query(text)
    conn.pgconn.flush()


def with_points(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the transactions of ``def`` handlers."""

    @contextmanager
    def wrapped(self: HandlerConnections, *options: Any) -> Iterator[Any]:
        with original(self, *options) as conn:
            yield conn
            reach("commit-before")
            reach_within("commit-within", lambda: send(conn, b"COMMIT"))
        reach("commit-after")

    return wrapped


def with_points_async(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the transactions of ``async def`` handlers."""

    @asynccontextmanager
    async def wrapped(self: HandlerConnections, *options: Any) -> AsyncIterator[Any]:
        async with original(self, *options) as conn:
            yield conn
            reach("commit-before")
            reach_within("commit-within", lambda: send(conn, b"COMMIT"))
        reach("commit-after")

    return wrapped
