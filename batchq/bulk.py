"""Do a verb for all batches that a filter matches: in chunks, each a short transaction that waits for no row.

After each chunk comes a pause of three times what it took: so a bulk of any size takes a fourth of one connection's
time from the workers. A bulk that is broken off leaves what is done; begun again, it goes on with what is left.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import psycopg

from batchq import queries
from batchq.database import Link
from batchq.errors import OutcomeUnknown
from batchq.queries import Chunk

MOST_A_CHUNK = 1000
MOST_COUNTED = 20_000
MOST_PASSES = 3
MOST_TRIES = 5
PAUSE_FACTOR = 3
DONE = {
    "cancel": "cancelled",
    "retry": "made pending again",
    "retry_items": "made pending again",
    "snooze": "snoozed",
    "set_priority": "given their new priority",
    "move": "moved",
}
LEFT_OUT = "changed meanwhile, locked, or beside a live one of their unique_key"
LOCK_SECONDS = 1.0
PASSING = (
    OutcomeUnknown,
    psycopg.errors.LockNotAvailable,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.SerializationFailure,
)


@dataclass
class Bulk:
    """A verb, what it is done to, and how far it is. *verb*, *filter* and *change* are as batchq.bulk takes them.

    matched, changed: of the pass that goes on and of all. longest_seconds: what the longest chunk took: no row was
    locked for longer.
    """

    link: Link
    verb: str
    filter: Mapping[str, Any]
    change: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None
    actor: str | None = None
    pause_factor: float = PAUSE_FACTOR
    stopping: threading.Event = field(default_factory=threading.Event)
    audit_id: int | None = None
    matched: int = 0
    changed: int = 0
    longest_seconds: float = 0.0

    def count(self, told: Callable[[int], None] = lambda _: None) -> int:
        """Return how many batches match; change nothing. *told* is called with the sum so far."""
        total = 0
        for chunk in self.walk(MOST_COUNTED, dry_run=True):
            total += chunk.matched
            told(total)
        return total

    def chunks(self) -> Iterator[Chunk]:
        """Do it; yield each chunk when it is committed. Up to three times, while batches are left out that were locked.

        Raises psycopg.Error; what was yielded is done.
        """
        for _ in range(MOST_PASSES):
            self.matched, changed_before = 0, self.changed
            for chunk in self.walk(MOST_A_CHUNK, dry_run=False):
                self.matched += chunk.matched
                self.changed += chunk.changed
                self.audit_id = chunk.audit_id
                yield chunk
            if self.left_out(changed_before) == 0 or self.changed == changed_before:
                return

    def left_out(self, changed_before: int) -> int:
        """Return how many of this pass matched and were not changed: locked, or beside a live batch of their key."""
        return self.matched - (self.changed - changed_before)

    def walk(self, most: int, *, dry_run: bool) -> Iterator[Chunk]:
        """Go through all that matches, once, until told to stop."""
        place: str | None = None
        while not self.stopping.is_set():
            began_at = time.monotonic()
            chunk = self.patiently(place, most, dry_run)
            took_seconds = time.monotonic() - began_at
            if not dry_run:
                self.longest_seconds = max(self.longest_seconds, took_seconds)
            yield chunk
            place = chunk.next_place
            if place is None:
                return
            self.stopping.wait(self.pause_factor * took_seconds if not dry_run else 0)

    def patiently(self, place: str | None, most: int, dry_run: bool) -> Chunk:
        """Do one chunk; again if something passing was in its way: done twice, it does no harm."""
        for number in range(MOST_TRIES):
            try:
                with self.link.transaction() as conn:
                    queries.wait_briefly_for_locks(conn, int(LOCK_SECONDS * 1000))
                    return queries.bulk(
                        conn, self.verb, self.filter, self.change, place, dry_run, most, self.reason, self.actor,
                        self.audit_id,
                    )  # fmt: skip
            except PASSING:
                if number + 1 == MOST_TRIES:
                    raise
                self.stopping.wait(2**number * 0.1)
        raise AssertionError("unreachable")
