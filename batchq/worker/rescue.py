"""Rescues: batches whose lease has expired become pending again, or fail, whichever worker held them."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import psycopg

from batchq.common.log import get_logger
from batchq.postgres.link import Link
from batchq.postgres.statements import leases, session
from batchq.worker.failures import Failed
from batchq.worker.refused import Halving, Skipped, is_about_rows

RESCUES_A_ROUND = 1000
PAUSE_FACTOR = 20
LONG_AGO_SECONDS = 600.0

_log = get_logger()
Rescued = list[tuple[int, str, int, str]]  # id, kind, attempt, status


class Rescuer:
    """Rescues the batches of these queues, for *most_seconds* at a time. *on_failed* is called with each that fails."""

    def __init__(
        self,
        link: Link,
        queues: Sequence[str],
        lease_seconds: float,
        most_seconds: float,
        on_failed: Callable[[Failed], None] | None = None,
    ) -> None:
        self.link = link
        self.on_failed = on_failed
        self.most_seconds = most_seconds
        self.expiries = {queue: Expiries() for queue in queues}
        self._spread_seconds = lease_seconds / 2

    def serve(self, queues: Sequence[str]) -> None:
        """Rescue the batches of these queues, too."""
        for queue in queues:
            if queue not in self.expiries:
                self.expiries[queue] = Expiries()

    def rescue(self) -> bool:
        """Rescue what there is; return whether there may be more."""
        until = time.monotonic() + self.most_seconds
        is_more = False
        for queue, expiries in self.expiries.items():
            while (is_full := self._rescue_round(queue, expiries)) and time.monotonic() < until:
                pass
            is_more = is_more or is_full
        return is_more

    def _rescue_round(self, queue: str, expiries: "Expiries") -> bool:
        rescued: Rescued = []
        is_full = False
        with expiries.passing() as after:
            [(now, start, is_any)] = self.link.probe(leases.lease_probe(queue, after))
            try:
                rescued = self.rescue_expired(queue, start, expiries.skipped) if is_any else []
                is_full = len(rescued) == RESCUES_A_ROUND
            finally:
                if not is_full:
                    expiries.skip_to(now - LONG_AGO_SECONDS)
        if not is_full:
            expiries.passed_until = now
        for batch_id, kind, attempt, status in rescued:
            _log.warning("batch rescued", batch_id=batch_id, kind=kind, attempt=attempt, status=status)
            if self.on_failed is not None and status == "failed":
                self.on_failed(Failed(queue, batch_id, attempt))
        return is_full

    def rescue_expired(self, queue: str, after: float, skipped: Skipped) -> Rescued:
        """Rescue up to 1,000 batches of one queue whose lease expired after *after*, each that the database allows."""
        try:
            return self._rescue(queue, RESCUES_A_ROUND, after, skipped=skipped.ids())
        except psycopg.Error as error:
            if not is_about_rows(error):
                raise
        rescued: Rescued = []
        rows = self.link.probe(leases.expired(queue, RESCUES_A_ROUND, after, skipped.ids()))
        halving: Halving[int] = Halving(lambda ids: rescued.extend(self._rescue(queue, len(ids), after, only=ids)))
        halving.halve([batch_id for (batch_id,) in rows])
        skipped.add(halving.refused)
        halving.report("rescue", halving.refused)
        return rescued

    def _rescue(
        self, queue: str, most: int, after: float, skipped: Sequence[int] = (), only: Sequence[int] | None = None
    ) -> Rescued:
        with self.link.transaction(session.FORCE_INDEX_AND_HASH_JOIN) as conn:
            return leases.rescue(conn, queue, most, self._spread_seconds, after, skipped, only)


class Expiries:
    """Up to which time expired leases were searched for; the next search starts there.

    A lease that was locked then is found by a search from the beginning. Those take at most a twentieth of the time:
    while a snapshot is held, every lease that was ever given is in the way.
    """

    def __init__(self) -> None:
        self.skipped = Skipped()
        self.passed_until = float("-inf")
        self.whole_at = 0.0

    def skip_to(self, passed_time: float) -> None:
        """Start the next searches there at the earliest: a search from the beginning may never end."""
        self.passed_until = max(self.passed_until, passed_time)

    @contextmanager
    def passing(self) -> Iterator[float]:
        """Yield the time to search from, to a block that searches."""
        began_at = time.monotonic()
        is_whole = began_at >= self.whole_at
        try:
            yield float("-inf") if is_whole else self.passed_until
        finally:
            if is_whole:
                self.whole_at = began_at + PAUSE_FACTOR * (time.monotonic() - began_at)
