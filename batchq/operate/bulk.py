"""A verb for all batches that a filter matches, in steps: each a short transaction that waits for no row.

After each step comes a pause of three times what it took, so that a bulk of any size takes at most a quarter of one
connection's time. What an interrupted bulk has done stays done; started again, it continues with what is left.
"""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import psycopg

from batchq.errors import OutcomeUnknown
from batchq.operate.verbs import VERBS, Verb
from batchq.postgres.link import Link
from batchq.postgres.statements.running import Conn
from batchq.postgres.statements.session import set_lock_timeout
from batchq.postgres.statements.verbs import BulkStep, bulk_step, clock_json

PAUSE_FACTOR = 3
MOST_CHANGED = 1000
_MOST_COUNTED = 20_000
_MOST_PASSES = 3
_MOST_TRIES = 5
_LOCK_MILLISECONDS = 1000
_TRANSIENT = (
    OutcomeUnknown,
    psycopg.errors.LockNotAvailable,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.SerializationFailure,
)

Transact = Callable[[Callable[[Conn], BulkStep]], BulkStep]


@dataclass(frozen=True)
class LeftOut:
    """How many batches were counted but not changed, by reason.

    keyed: a live batch has their unique_key. changed: they no longer match.
    """

    keyed: int = 0
    locked: int = 0
    changed: int = 0

    def __str__(self) -> str:
        reasons = (
            (self.keyed, "with the unique_key of a live batch"),
            (self.locked, "locked"),
            (self.changed, "changed meanwhile"),
        )
        return ", ".join(f"{count:,} {reason}" for count, reason in reasons if count)


# Many attributes: the web UI sends all of it along in a form, as one JSON object.
@dataclass
class Bulk:
    """What is asked for, and how far it is.

    name: of the verb. filter and change: as batchq.bulk takes them. state: counting, counted, changing or done.
    total: how many were counted; no more are changed. None: they are changed without a count.

    Up to three passes are made, because what is locked is left out. place: where the next step begins; matched and
    keyed: of the current pass; changed: of all passes; changed_before: of those before the current one.
    """

    name: str
    filter: dict[str, Any]
    change: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None
    actor: str | None = None
    state: str = "counting"
    total: int | None = None
    passes: int = 0
    place: str | None = None
    matched: int = 0
    keyed: int = 0
    changed: int = 0
    changed_before: int = 0
    audit_id: int | None = None

    @property
    def verb(self) -> Verb:
        """The verb."""
        return VERBS[self.name]

    @property
    def left(self) -> int:
        """How many that were counted are not changed."""
        return max(0, (self.total or 0) - self.changed)

    def left_out(self) -> LeftOut:
        """Return why fewer were changed than counted, by the numbers of the last pass."""
        keyed = min(self.left, self.keyed)
        locked = min(self.left - keyed, max(0, self.matched - self._changed_in_pass - self.keyed))
        return LeftOut(keyed, locked, self.left - keyed - locked)

    def step(self, transact: Transact) -> None:
        """Count or change the next batches, in a transaction of *transact*.

        Raises psycopg.Error, BatchqError. Then it can be taken again; if it was committed, that does no harm.
        """
        if self.state == "counting":
            self._count(transact)
        elif self._most_now > 0:
            self._change(transact)
        else:
            self.state = "done"

    def _count(self, transact: Transact) -> None:
        step = transact(lambda conn: self._call(conn, _MOST_COUNTED, dry_run=True))
        self.total = (self.total or 0) + step.matched
        self.place = step.next_place
        if self.place is None:
            self.state = "counted"

    def _change(self, transact: Transact) -> None:
        step = transact(lambda conn: self._call(conn, self._most_now, dry_run=False))
        self.state = "changing"
        self.place = step.next_place
        self.audit_id = step.audit_id
        self.matched += step.matched
        self.keyed += step.keyed
        self.changed += step.changed
        if self.place is None or self._most_now <= 0:
            self._end_pass()

    @property
    def _changed_in_pass(self) -> int:
        return self.changed - self.changed_before

    @property
    def _most_now(self) -> int:
        if self.state == "done":
            return 0
        if self.total is None:
            return MOST_CHANGED
        return min(MOST_CHANGED, self.total - self.changed_before - self.matched)  # not what has come to match since

    def _end_pass(self) -> None:
        # Another pass helps only if this one changed some and left others out.
        self.passes += 1
        if self._changed_in_pass in (0, self.matched) or self.changed == self.total or self.passes == _MOST_PASSES:
            self.state = "done"
        else:
            self.place, self.matched, self.keyed, self.changed_before = None, 0, 0, self.changed

    def _call(self, conn: Conn, most: int, *, dry_run: bool) -> BulkStep:
        set_lock_timeout(conn, _LOCK_MILLISECONDS)
        if "before" not in self.filter:  # one time for all steps: what finishes or is inserted later is left alone
            self.filter = {**self.filter, "before": clock_json(conn)}
        change = {**self.verb.fixed, **self.change}
        asked = {"verb": self.verb.function, "filter": self.filter, "change": change, "dry_run": dry_run, "most": most}
        kept = {name: getattr(self, name) for name in ("place", "reason", "actor", "audit_id")}
        return bulk_step(conn, asked | kept)


class Runner:
    """Takes all steps of a bulk, on one link, until `stopping` is set.

    longest_seconds: what the longest step took that changed batches: no row was locked for longer.
    """

    def __init__(self, link: Link, bulk: Bulk, pause_factor: float = PAUSE_FACTOR) -> None:
        self.bulk = bulk
        self.stopping = threading.Event()
        self.longest_seconds = 0.0
        self._link = link
        self._pause_factor = pause_factor

    def count(self, on_count: Callable[[int], None] = lambda _: None) -> int:
        """Return how many batches match; change nothing. *on_count* gets the sum so far."""
        while self.bulk.state == "counting" and not self.stopping.is_set():
            self._step()
            on_count(self.bulk.total or 0)
        return self.bulk.total or 0

    def changes(self) -> Iterator[None]:
        """Change what matches; yield after each step that is committed. Raises psycopg.Error."""
        while self.bulk.state != "done" and not self.stopping.is_set():
            began_at = time.monotonic()
            self._step()
            seconds = time.monotonic() - began_at
            self.longest_seconds = max(self.longest_seconds, seconds)
            yield
            if self.bulk.state != "done":
                self.stopping.wait(self._pause_factor * seconds)

    def _step(self) -> None:
        for number in range(_MOST_TRIES):
            try:
                self.bulk.step(self._transact)
                return
            except _TRANSIENT:
                if number + 1 == _MOST_TRIES:
                    raise
                self.stopping.wait(2**number * 0.1)

    def _transact(self, action: Callable[[Conn], BulkStep]) -> BulkStep:
        with self._link.transaction() as conn:
            return action(conn)
