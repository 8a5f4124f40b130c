"""Random lives of batches with keys, beside those without: claims by key, and limits per key that change meanwhile."""

import time
import uuid
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule

from batchq.batch.claimed import Claim
from batchq.postgres.statements.claims import ClaimedRow
from batchq.worker.gates import Gates
from batchq.worker.key_ring import KeyRing, Visited
from batchq.worker.keyed_claims import KeyedClaims
from batchq.worker.permits import Permits
from batchq.worker.refused import Skipped
from tests.instruments.model.lives import Lives, mostly, queues
from tests.instruments.model.reality import KEYS, KINDS, LEASE_SECONDS, QUEUES, Worker
from tests.instruments.model.state import Row

ALL_ROOM = 100
scopes = st.sampled_from([None, None, *KINDS])  # the kind of a limit


class TimelessRing(KeyRing):
    """The keys in turn, where no visit is expensive: on a slow machine each might be, and its key would be left out."""

    def visited(self, visits: Sequence[Visited]) -> None:
        super().visited([visit._replace(seconds=0.0) for visit in visits])


class KeyedClaimer:
    """What of a worker claims batches with a key: its claims, and a ring of keys for each queue and set of kinds."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.permits = Permits(worker.name, QUEUES, LEASE_SECONDS, Gates(), set)
        context: Any = SimpleNamespace(permits=self.permits, worker_id=worker.name)
        self.claims = KeyedClaims(context, worker.link, Skipped())
        self.rings: dict[tuple[str, tuple[str, ...]], KeyRing] = {}

    def claim(self, claim: Claim, kinds: tuple[str, ...], room: int) -> list[ClaimedRow]:
        """Claim what comes next, with the limits as they are now."""
        self.permits.read(self.worker.link)
        ring = self.ring(claim.queue, kinds)
        whole = SimpleNamespace(queue=claim.whole_queue, known_keys=ring.known_keys)
        source: Any = SimpleNamespace(queue=claim.queue, kinds=kinds, ring=ring, whole=whole)
        rows = self.claims.claim(source, claim, room)
        assert rows is not None
        return rows

    def ring(self, queue: str, kinds: tuple[str, ...]) -> KeyRing:
        """Return where the claims of these kinds are in the round of keys."""
        return self.rings.setdefault((queue, kinds), TimelessRing())


class KeyedLives(Lives):
    """What may happen to batches with and without a key.

    ran: how many batches ran after the last step, by queue, kind (None: all kinds) and key.
    """

    def __init__(self) -> None:
        super().__init__()
        self.claimers = [KeyedClaimer(worker) for worker in self.real.workers]
        self.ran: dict[tuple[str, str | None, str], int] = {}

    def begin_more(self) -> None:
        """A key has a batch in its only attempt, and two that wait."""
        for number in range(3):
            self.enqueue_keyed(KINDS[number % 2], QUEUES[0], KEYS[0], 1)
        self.set_limit(QUEUES[0], None, 1)
        self.claim_keyed(0, QUEUES[0], ALL_ROOM, KINDS, True)

    def enqueue_keyed(self, kind: str, queue: str, key: str, max_attempts: int) -> None:
        """Enqueue a batch with a key."""
        options = {"unique_key": None, "max_attempts": max_attempts, "max_failed_items": 0, "key": key}
        self.enqueue(kind, queue, None, True, priority=0, **options)

    # ----------------------------------------------------------------------------------------------------------- limits

    @invariant()
    def keeps_limits(self) -> None:
        """No step lets more of a key run than its limit; if more ran before, because it was lowered, no more begin."""
        for queue in QUEUES:
            for kind in (None, *KINDS):
                for key in KEYS:
                    before = self.ran.get((queue, kind, key), 0)
                    now = self.ran[queue, kind, key] = self.model.running(queue, kind, key)
                    most = self.model.per_key.get((queue, kind))
                    assert most is None or now <= max(most, before), f"{now} of {queue} {kind} {key}, not {most}"

    @rule(queue=queues, kind=scopes, most=st.sampled_from([None, 0, 1, 1, 2]))
    def set_limit(self, queue: str, kind: str | None, most: int | None) -> None:
        """A person sets or removes a limit per key."""
        before = self.model.per_key.pop((queue, kind), None)
        if most is not None:
            self.model.per_key[queue, kind] = most
        call = "SELECT batchq.set_limit(%s, %s, max_running_per_key => %s)"
        assert self.real.values(call, [queue, kind, most]) == [most != before]
        is_low = most is not None and any(self.model.running(queue, kind, key) > most for key in KEYS)
        self.happened("set a limit per key below what runs" if is_low else "set a limit per key")

    # ----------------------------------------------------------------------------------------------------------- claims

    @rule(
        number=st.integers(0, 2),
        queue=queues,
        room=st.sampled_from([1, 2, ALL_ROOM]),
        kinds=st.sampled_from([KINDS, KINDS, KINDS[:1]]),
        keep=mostly,
    )
    def claim_keyed(self, number: int, queue: str, room: int, kinds: tuple[str, ...], keep: bool) -> None:
        """A worker claims batches with a key, key by key from where it was."""
        claimer, worker = self.claimers[number], self.real.workers[number]
        after = claimer.ring(queue, kinds).after
        claim = Claim(queue, uuid.uuid4(), worker.runtimes[keep], time.monotonic())
        order = self.order_in_keys(queue)
        rows = claimer.claim(claim, kinds, room)
        assert len(rows) <= room
        claimed = [self.model.rows[row.id] for row in rows]
        assert [row.key for row in claimed] == sorted(row.key or "" for row in claimed), "not key by key"
        for row, batch in zip(rows, claimed, strict=True):
            self.note_order(batch, order)
            assert self.next_of(batch, kinds, order) is batch, f"not the next of its key: {batch}"
            self.take(worker, row, claim, keep)
        for key in KEYS:
            if len(rows) < room and key > after and not any(row.key == key for row in claimed):
                left = [row for row in self.model.of_key(queue, key) if self.may_begin(row, kinds, order)]
                assert left == [], "these were passed over"
        self.happened("claimed by key" if rows else "claimed nothing by key")

    @rule(number=st.integers(0, 2), queue=queues, key=st.sampled_from(KEYS), kind=scopes, most=st.integers(1, 2))
    def crowd(self, number: int, queue: str, key: str, kind: str | None, most: int) -> None:
        """A key gets three batches and a limit; one of those that run first is put back, and comes again."""
        for _ in range(3):
            self.enqueue_keyed(kind or KINDS[0], queue, key, 4)
        self.set_limit(queue, kind, most)
        self.claim_keyed(number, queue, ALL_ROOM, KINDS, True)
        mine = [held for held in self.ending() if held.batch.key == key and self.model.held(held.id, held.token)]
        if mine:
            self.end_of(mine[-1], "snoozes", False, False)
            self.claim_keyed((number + 1) % 3, queue, ALL_ROOM, KINDS, True)

    def order_in_keys(self, queue: str) -> list[int]:
        """Return the ids of a queue's live batches in the order within their keys: only the database knows run_at."""
        query = "SELECT id FROM batchq.batches_live WHERE queue = %s ORDER BY priority, run_at, id"
        return self.real.values(query, [queue])

    def may_begin(self, row: Row, kinds: tuple[str, ...], order: Sequence[int]) -> bool:
        """Tell whether a worker of these kinds may claim a batch."""
        return row.kind in kinds and self.model.may_run(row, order)

    def next_of(self, row: Row, kinds: tuple[str, ...], order: Sequence[int]) -> Row | None:
        """Return which batch with the key and kind of *row* a worker takes next."""
        rows = self.model.of_key(row.queue, row.key or "", row.kind)
        ready = [other for other in rows if self.may_begin(other, kinds, order)]
        return min(ready, key=lambda other: order.index(other.id), default=None)

    def note_order(self, row: Row, order: Sequence[int]) -> None:
        """Count where a limit made a difference: what it let begin, and what was overtaken because of it."""
        for kind in (None, row.kind):
            most = self.model.per_key.get((row.queue, kind))
            waiting = [r for r in self.model.of_key(row.queue, row.key or "", kind) if r is not row]
            scope = "a queue" if kind is None else "a kind"
            if most == 1 and waiting:
                self.happened(f"claimed the next of a key, in strict order in {scope}")
            if most == 1 and row.has_begun and any(order.index(r.id) < order.index(row.id) for r in waiting):
                self.happened(f"claimed again what had begun, before a more urgent one of its key in {scope}")
            if most == 2 and self.model.running(row.queue, kind, row.key or "") == 1:
                self.happened(f"claimed the second that may run of a key in {scope}")

    def claim_as_another(self, number: int, row: Row) -> None:
        if row.key is None:
            super().claim_as_another(number, row)
        else:
            self.claim_keyed(number, row.queue, ALL_ROOM, KINDS, True)
