"""Flows: count the ends of batches that others wait for; what has nothing left to wait for becomes pending."""

import threading
import time

from batchq.common.log import get_logger
from batchq.postgres.link import Link
from batchq.postgres.statements import flows, session

_MOST = 500  # events in one transaction
_FROM_START_SECONDS = 0.5  # between two reads from the start: for what was committed late
_AGAIN_SECONDS = 0.05  # until what others have locked is tried again
_COLLECTING_SECONDS = 0.5
_PAUSE_FACTOR = 20  # an expensive read from the start is followed by a pause of that many times its cost

_log = get_logger()


class Flows:
    """Follows flows, for all threads of a worker. Each passes its own connection.

    Events that were dealt with leave dead index entries while somebody holds a snapshot. So reading goes on after the
    last event seen, and from the start now and then.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._after = 0
        self._from_start_at = 0.0
        self._collect_at = 0.0

    def start(self) -> int:
        """Return the id after which to look for events."""
        return 0 if time.monotonic() >= self._from_start_at else self._after

    def looked(self, start: int, took_seconds: float) -> None:
        """Record that nothing was found after *start*."""
        if start == 0:
            self._from_start_at = time.monotonic() + max(_FROM_START_SECONDS, _PAUSE_FACTOR * took_seconds)

    def collect(self, link: Link, now: bool) -> bool:
        """Every half second, or *now*, write down what no trigger has: on a distributed Postgres none can. Return
        whether there was anything."""
        if not now and time.monotonic() < self._collect_at:
            return False
        began_at = time.monotonic()
        with link.transaction() as conn:
            has_collected = flows.collect(conn, _MOST) > 0
        pause_seconds = max(_COLLECTING_SECONDS, _PAUSE_FACTOR * (time.monotonic() - began_at))
        self._collect_at = time.monotonic() + (0.0 if has_collected else pause_seconds)
        return has_collected

    def read_from_start(self) -> None:
        """Let the next read begin at the first event."""
        self._from_start_at = 0.0

    def follow(self, link: Link) -> int:
        """Do what the events ask for; return how many batches became pending. Commits after every 500 events."""
        released: int = 0
        with self._lock:
            while True:
                start, began_at = self.start(), time.monotonic()
                [(seen, made_pending, last_id, left_over)] = link.run(
                    flows.follow(start, _MOST), session.FORCE_INDEX | session.ASYNCHRONOUS_COMMIT
                )
                self.looked(start, time.monotonic() - began_at if seen < _MOST else 0.0)
                self._after = max(self._after, last_id or 0)
                released += int(made_pending)
                if left_over:
                    self._from_start_at = min(self._from_start_at, time.monotonic() + _AGAIN_SECONDS)
                if seen < _MOST or left_over == seen:
                    return released
