"""The load: a thread that enqueues a fixed number of batches a second, each kind evenly by its weight; it also cancels
some, and plays a worker that claims and dies."""

import base64
import heapq
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import psycopg

from batchq import enqueue
from batchq.postgres.statements import claims, session
from batchq.postgres.statements.verbs import call_verb

TICK_SECONDS = 0.25
ITEMS = 20
LARGE_BYTES = 1_000_000
A_FAILED_ITEM = 0.1
DEAD_LEASE_SECONDS = 1.0


@dataclass(frozen=True)
class Kind:
    """One kind of batch. *weight*: its share. *ends*: the statuses it may end in. *ledger*: its rows there.

    *is_timed*: its start tells how long a ready batch waits.
    """

    weight: float
    ends: tuple[str, ...] = ("completed",)
    ledger: int = 0
    is_timed: bool = False
    has_items: bool = False
    delay_seconds: float = 0
    cancelled_after_seconds: float | None = None
    max_attempts: int = 3


KINDS = {
    "quick": Kind(450, is_timed=True),
    "quick_async": Kind(200, is_timed=True),
    "note": Kind(80, is_timed=True, ledger=1),
    "note_async": Kind(40, is_timed=True, ledger=1),
    "items": Kind(60, has_items=True),
    "items_async": Kind(40, has_items=True),
    "items_transactional": Kind(40, has_items=True, ledger=ITEMS),
    "chunks": Kind(20, has_items=True, ledger=ITEMS),
    "chunks_async": Kind(10, has_items=True, ledger=ITEMS),
    "flaky": Kind(20),
    "hopeless": Kind(4, ends=("failed",)),
    "snoozed": Kind(15),
    "slow": Kind(2),
    "slow_async": Kind(4),
    "cancelled": Kind(1, ends=("cancelled", "completed"), cancelled_after_seconds=1),
    "cancelled_async": Kind(2, ends=("cancelled", "completed"), cancelled_after_seconds=1),
    "cancelled_waiting": Kind(6, ends=("cancelled",), delay_seconds=3600, cancelled_after_seconds=1),
    "overdue": Kind(0.5, ends=("failed",), max_attempts=2),
    "abandoned": Kind(6),
    "large": Kind(3),
}


class Mix:
    """Yields the names of kinds, each as evenly as its weight allows: drawn at random, the few large ones would come in
    bursts, and what one third of a run leaves dead could not be compared with what another does.

    The smooth weighted round-robin of nginx (ngx_http_upstream_round_robin.c): each step all gain their weight, the one
    that has most is taken, and pays the sum.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights, self.total = weights, sum(weights.values())
        self.credit = dict.fromkeys(weights, 0.0)

    def next(self) -> str:
        """Return the next name."""
        for name, weight in self.weights.items():
            self.credit[name] += weight
        chosen = max(self.credit, key=self.credit.__getitem__)
        self.credit[chosen] -= self.total
        return chosen


class Load:
    """Enqueues *rate* batches a second until stopped. *started*: for whoever times the starts, see `take_waits`."""

    def __init__(self, dsn: str, rate: float, seed: int) -> None:
        self.dsn, self.rate = dsn, rate
        self.dice = random.Random(seed)
        self.mix = Mix({name: kind.weight for name, kind in KINDS.items()})
        self.large = base64.b64encode(self.dice.randbytes(LARGE_BYTES * 3 // 4)).decode()
        self.by_kind: Counter[str] = Counter()
        self.ready_at: dict[int, float] = {}
        self.to_cancel: list[tuple[float, int]] = []
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.run, name="load")
        self.error: BaseException | None = None

    @property
    def produced(self) -> int:
        """How many batches were enqueued and committed."""
        return self.by_kind.total()

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.thread.join()

    def stop(self) -> None:
        """End it, with what is to be cancelled cancelled. Raises what has ended it before."""
        self.stopping.set()
        self.thread.join()
        self.check()

    def check(self) -> None:
        """Raise what has ended it, if anything has."""
        if self.error:
            raise self.error

    def run(self) -> None:
        """Enqueue by the clock: what a pause has delayed is made up for."""
        try:
            with psycopg.connect(self.dsn, autocommit=True, prepare_threshold=None) as conn:
                began_at = time.monotonic()
                while not self.stopping.wait(TICK_SECONDS):
                    self.tick(conn, int((time.monotonic() - began_at) * self.rate) - self.produced)
                    self.cancel_due(conn, time.monotonic())
                self.cancel_due(conn, float("inf"))
        except BaseException as error:
            self.error = error

    def tick(self, conn: psycopg.Connection[Any], count: int) -> None:
        """Enqueue so many batches in one transaction."""
        kinds = [self.mix.next() for _ in range(count)]
        first = self.produced
        with conn.transaction():
            ids = [self.enqueue(conn, kind, seq) for seq, kind in enumerate(kinds, first)]
        committed_at = time.monotonic()
        self.by_kind.update(kinds)
        for seq, (kind, batch_id) in enumerate(zip(kinds, ids, strict=True), first):
            if KINDS[kind].is_timed:
                self.ready_at[seq] = committed_at
            if (seconds := KINDS[kind].cancelled_after_seconds) is not None:
                heapq.heappush(self.to_cancel, (committed_at + seconds, batch_id))

    def enqueue(self, conn: psycopg.Connection[Any], name: str, seq: int) -> int:
        """Enqueue one batch; return its id."""
        kind = KINDS[name]
        payload: dict[str, Any] = {"seq": seq}
        if name == "large":
            payload["data"] = self.large
        items = self.items(name) if kind.has_items else None
        batch_id = enqueue(
            conn, name, payload, items=items, delay_seconds=kind.delay_seconds, max_attempts=kind.max_attempts
        )
        assert batch_id is not None
        if name == "abandoned":
            claim_and_die(conn, batch_id)
        return batch_id

    def items(self, name: str) -> list[int]:
        """Return the items of a batch; of some, one fails at first."""
        items = list(range(ITEMS))
        if not KINDS[name].ledger and self.dice.random() < A_FAILED_ITEM:
            items[self.dice.randrange(ITEMS)] = -1
        return items

    def cancel_due(self, conn: psycopg.Connection[Any], until: float) -> None:
        """Cancel the batches whose time to be cancelled has come."""
        while self.to_cancel and self.to_cancel[0][0] <= until:
            call_verb(conn, "cancel", {"batch_id": heapq.heappop(self.to_cancel)[1], "reason": "the soak cancels some"})

    def take_waits(self, starts: list[tuple[int, float]]) -> list[float]:
        """Return how many seconds the batches that started have waited, in order; each counts once."""
        ready = ((self.ready_at.pop(seq, None), at) for seq, at in starts)
        return sorted(max(0.0, at - ready_at) for ready_at, at in ready if ready_at is not None)


def claim_and_die(conn: psycopg.Connection[Any], batch_id: int) -> None:
    """Claim a batch of this transaction, none that was rescued, as a worker does that dies with its COMMIT."""
    after = claims.Position(session.now(conn) - DEAD_LEASE_SECONDS / 2, 0)
    statement = claims.claim("default", 0, ["abandoned"], 1, "a dead worker", uuid.uuid4(), DEAD_LEASE_SECONDS, after)
    [row] = conn.execute(*statement).fetchall()
    assert row[0] == batch_id


# ---------------------------------------------------------------------------------------------------- what must hold


def problems(conn: psycopg.Connection[Any], by_kind: Counter[str]) -> list[str]:
    """Return how the database differs from: each batch in an end that its kind may have, each ledger row once."""
    checks: list[Callable[[psycopg.Connection[Any], Counter[str]], list[str]]] = [wrong_ends, wrong_ledger]
    return [problem for check in checks for problem in check(conn, by_kind)]


def wrong_ends(conn: psycopg.Connection[Any], by_kind: Counter[str]) -> list[str]:
    """Return what is lost, or has ended as it must not."""
    rows = conn.execute("SELECT kind, status, count(*) FROM batchq.all_batches GROUP BY kind, status").fetchall()
    found: Counter[str] = Counter()
    wrong = []
    for kind, status, count in rows:
        found[kind] += count
        if status not in KINDS[kind].ends:
            wrong.append(f"{count} batches of {kind} are {status}")
    lost = {kind: by_kind[kind] - found[kind] for kind in KINDS if by_kind[kind] != found[kind]}
    return wrong + [f"{count} batches of {kind} are missing" for kind, count in lost.items()]


LEDGER = """
SELECT b.kind, count(l.number), count(DISTINCT l.number)
FROM batchq.all_batches b LEFT JOIN ledger l ON l.batch_id = b.id
WHERE b.kind = ANY (%s)
GROUP BY b.kind, b.id
"""


def wrong_ledger(conn: psycopg.Connection[Any], by_kind: Counter[str]) -> list[str]:
    """Return which batches have not written each of their rows exactly once."""
    writing = [name for name, kind in KINDS.items() if kind.ledger]
    wrong: Counter[str] = Counter()
    for kind, count, distinct in conn.execute(LEDGER, [writing]):
        wrong[kind] += not count == distinct == KINDS[kind].ledger
    return [f"{count} batches of {kind} wrote rows twice or never" for kind, count in wrong.items() if count]
