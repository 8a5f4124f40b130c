"""Deadlines for round trips, enforced by shutting down the socket.

While a pooler is frozen its kernel still acknowledges, so neither keep-alives nor asyncio timeouts end a wait.
"""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psycopg

from batchq.common.portable import after_fork_in_child


class _Timer:
    """One thread for all connections of the process: it shuts down each socket whose deadline has passed."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._due: dict[int, float] = {}
        self._wakes_at = float("inf")
        self._thread: threading.Thread | None = None

    def add(self, fd: int, seconds: float) -> None:
        at = time.monotonic() + seconds
        with self._condition:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="batchq-deadlines", daemon=True)
                self._thread.start()
            self._due[fd] = at
            if at < self._wakes_at:
                self._condition.notify()

    def close(self, fd: int) -> None:
        with self._condition:
            self._due.pop(fd, None)
            os.close(fd)

    def _run(self) -> None:
        with self._condition:
            while True:
                self._wakes_at = min(self._due.values(), default=float("inf"))
                left = self._wakes_at - time.monotonic()
                if left > 0:
                    self._condition.wait(None if left == float("inf") else left)
                self._shut_down_overdue()

    def _shut_down_overdue(self) -> None:
        now = time.monotonic()
        for fd in [fd for fd, at in self._due.items() if at <= now]:
            del self._due[fd]
            with suppress(OSError), socket.socket(fileno=os.dup(fd)) as peer:
                peer.shutdown(socket.SHUT_RDWR)


_timer = _Timer()
after_fork_in_child(_timer.__init__)  # type: ignore[misc]


@contextmanager
def deadline(conn: psycopg.Connection[Any] | psycopg.AsyncConnection[Any], seconds: float) -> Iterator[None]:
    """Break *conn* if the block takes longer than *seconds*; works for asyncio as well."""
    fd = os.dup(conn.pgconn.socket)  # a descriptor of its own: closed by nobody else, so never reused meanwhile
    _timer.add(fd, seconds)
    try:
        yield
    finally:
        _timer.close(fd)
