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

from batchq.errors import OutcomeUnknown
from batchq.postgres.link import Link
from batchq.postgres.statements import session, verbs
from batchq.postgres.statements.verbs import Chunk

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


@dataclass(frozen=True)
class LeftOut:
    """How many batches were counted and not changed, by the reason. changed: they no longer match."""

    keyed: int = 0
    locked: int = 0
    changed: int = 0

    def __str__(self) -> str:
        """Return the reasons that there are."""
        reasons = (
            (self.keyed, "beside a live one of their unique_key"),
            (self.locked, "locked"),
            (self.changed, "changed meanwhile"),
        )
        return ", ".join(f"{count:,} {reason}" for count, reason in reasons if count)


def left_out(total: int, changed: int, matched_last: int, changed_last: int, keyed_last: int) -> LeftOut:
    """Return why fewer were changed than counted, by what the last pass matched, changed, and left for its key."""
    left = max(0, total - changed)
    keyed = min(left, keyed_last)
    locked = min(left - keyed, max(0, matched_last - changed_last - keyed_last))
    return LeftOut(keyed, locked, left - keyed - locked)


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

    total: how many were counted; no more are changed. matched and keyed: of the current pass; changed: of all passes.
    longest_seconds: what the longest chunk took: no row was locked for longer.
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
    total: int | None = None
    matched: int = 0
    keyed: int = 0
    changed: int = 0
    changed_before: int = 0
    longest_seconds: float = 0.0

    def count(self, told: Callable[[int], None] = lambda _: None) -> int:
        """Return how many batches match; change nothing. *told* is called with the sum so far."""
        self.begin()
        total = 0
        for chunk in self.walk(MOST_COUNTED, dry_run=True):
            total += chunk.matched
            told(total)
        self.total = total
        return total

    def begin(self) -> None:
        """Take the time before which its batches finished or were inserted: one for the count and all passes."""
        if "before" not in self.filter:
            with self.link.transaction() as conn:
                self.filter = {**self.filter, "before": verbs.clock_json(conn)}

    def chunks(self) -> Iterator[Chunk]:
        """Do it; yield each chunk when it is committed. Up to three times, while batches are left out that were locked.

        Raises psycopg.Error; what was yielded is done.
        """
        self.begin()
        for _ in range(MOST_PASSES):
            self.matched, self.keyed, self.changed_before = 0, 0, self.changed
            for chunk in self.walk(MOST_A_CHUNK, dry_run=False):
                self.matched += chunk.matched
                self.keyed += chunk.keyed
                self.changed += chunk.changed
                self.audit_id = chunk.audit_id
                yield chunk
            if self.changed - self.changed_before in (0, self.matched):
                return

    def left_out(self) -> LeftOut:
        """Return why fewer were changed than counted."""
        changed = self.changed - self.changed_before
        return left_out(self.total or 0, self.changed, self.matched, changed, self.keyed)

    def allowed(self, most: int) -> int:
        """Return how many batches the next chunk may change: *most*, and no more than were counted in all."""
        return most if self.total is None else min(most, self.total - self.changed_before - self.matched)

    def walk(self, most: int, *, dry_run: bool) -> Iterator[Chunk]:
        """Go through all that matches, once, until told to stop."""
        place: str | None = None
        while not self.stopping.is_set() and (dry_run or self.allowed(most) > 0):
            began_at = time.monotonic()
            chunk = self.patiently(place, most if dry_run else self.allowed(most), dry_run)
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
                    session.set_lock_timeout(conn, int(LOCK_SECONDS * 1000))
                    return verbs.bulk(
                        conn, self.verb, self.filter, self.change, place, dry_run, most, self.reason, self.actor,
                        self.audit_id,
                    )  # fmt: skip
            except PASSING:
                if number + 1 == MOST_TRIES:
                    raise
                self.stopping.wait(2**number * 0.1)
        raise AssertionError("unreachable")
