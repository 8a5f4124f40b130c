"""Throttles: what waits, in every worker, because a handler was told to slow down."""

import threading
import time
from collections.abc import Mapping
from typing import NamedTuple

from batchq.common.log import get_logger
from batchq.errors import Throttled
from batchq.postgres.link import Link
from batchq.postgres.statements import shares

Name = tuple[str, str | None]  # queue and kind; None: the whole queue

_log = get_logger()


class _Own(NamedTuple):
    """A throttle of this process. *until*: monotonic. *key*: of which key alone; None: of all batches."""

    queue: str
    kind: str | None
    key: str | None
    until: float


class Throttles:
    """The throttles in force, until when (monotonic) each is valid; those of this process from the moment it asks.

    A read from the database takes time, so what it returns may be older than what this process has written meanwhile.
    """

    def __init__(self, worker_id: str) -> None:
        self.in_force: Mapping[Name, float] = {}
        self._worker_id = worker_id
        self._unwritten: list[_Own] = []
        self._written: list[tuple[_Own, float]] = []  # and when
        self._lock = threading.Lock()

    def add(self, queue: str, kind: str, key: str | None, error: Throttled) -> None:
        """Let what *error* names wait in this process; `write` tells the others."""
        if error.scope == "key" and key is None:
            return  # only the batch itself waits
        of_kind = None if error.scope == "queue" else kind
        own = _Own(queue, of_kind, key if error.scope == "key" else None, time.monotonic() + error.seconds)
        with self._lock:
            self._unwritten.append(own)
            if own.key is None:
                self.in_force = _later({(queue, of_kind): own.until}, self.in_force)
        _log.info("throttled", queue=queue, kind=of_kind, key=own.key, seconds=error.seconds)

    def write(self, link: Link) -> None:
        """Write what other workers do not know yet. Writing it twice does no harm: the longer one stays."""
        for own in list(self._unwritten):
            if (seconds := own.until - time.monotonic()) > 0:
                with link.transaction() as conn:
                    shares.throttle(conn, own.queue, own.kind, own.key, seconds, self._worker_id)
            with self._lock:
                if own in self._unwritten:
                    self._unwritten.remove(own)
                    self._written.append((own, time.monotonic()))

    def follow(self, read: Mapping[Name, float], asked_at: float) -> None:
        """Take over what was read: for how many seconds from now each is valid. *asked_at*: before the read."""
        now = time.monotonic()
        with self._lock:
            self._written = [(own, at) for own, at in self._written if at >= asked_at]
            unread = [*self._unwritten, *(own for own, _ in self._written)]
            own_until = {(own.queue, own.kind): own.until for own in sorted(unread, key=_end) if own.key is None}
            self.in_force = _later(own_until, {name: now + seconds for name, seconds in read.items()})


def _end(own: _Own) -> float:
    return own.until


def _later(some: Mapping[Name, float], others: Mapping[Name, float]) -> dict[Name, float]:
    """Return both, and of what is in both the later end."""
    return {**others, **{name: max(until, others.get(name, until)) for name, until in some.items()}}
