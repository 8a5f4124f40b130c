"""Permits: how much of each limit this worker may use.

The share of a limit is leased, like a batch (batchq.take_shares), and refreshed every half second while it is used. So
a claim and an item ask nobody: they take from the share.
"""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from batchq.app import DeclaredLimits, Handler
from batchq.batch.claimed import ClaimedBatch
from batchq.errors import Throttled
from batchq.postgres.link import Link
from batchq.postgres.statements import shares
from batchq.postgres.statements.shares import Limit, Report, Share, Steering
from batchq.worker.gates import Gates
from batchq.worker.throttles import Throttles
from batchq.worker.token_bucket import TokenBucket, take_from_all

# A share of running batches expires on the server after the lease and 2 s more. A claim gives a batch a whole lease, so
# it needs a refresh that is more recent than those 2 s, less the time of a statement. So does a lease renewal, which
# the keeper makes right after the refresh.
FRESH_SECONDS = 1.0
RATES_VALID_SECONDS = 5.0
WANTED_SECONDS = 2.0  # after its last use, a share returns to the others
AS_MUCH_AS_POSSIBLE = 1e9
MOST_WANTED = 1_000_000


class Permit:
    """This worker's share of the limits of one queue, or of one kind in it.

    A batch counts as running from its claim until its outcome is written, and takes its token when its handler begins.
    """

    # Many attributes: three limits, each with what is held, what was wanted, and since when.
    def __init__(self, limit: Limit) -> None:
        self.limit = limit
        self.held = 0  # batches claimed, or about to be, whose outcome is not written
        self.may_run = 0  # the share of max_running
        self.starts = TokenBucket()
        self.items = TokenBucket()
        self.refreshed_at = float("-inf")
        self._unbegun = 0  # of those held
        self._adopted: set[ClaimedBatch] = set()  # held without a permit: claimed before there was a limit
        self._wanted = 0  # how many a claim last wanted, and when
        self._wanted_at = float("-inf")
        self._lacked: dict[str, float] = {}  # the limits that held something back, and when
        self._used_at = float("-inf")  # when a token was last taken
        self._reported_at = time.monotonic()
        self._promised = 0  # how many run at most, as last reported
        self._lock = threading.Lock()

    @property
    def limits_claims(self) -> bool:
        """Whether claims need it: a limit of items alone does not limit them."""
        return self.limit.max_running is not None or self.limit.per_second is not None

    @property
    def is_closed(self) -> bool:
        """Whether a limit of 0 lets nothing begin."""
        return 0 in (self.limit.max_running, self.limit.per_second, self.limit.items_per_second)

    # ------------------------------------------------------------------------------------------ claimer and lanes

    def has_room(self) -> bool:
        """Return whether a claim would get a permit now."""
        with self._lock:
            return self._room_to_run() > 0 and self._room_to_begin() > 0

    def reserve(self, wanted: int) -> int:
        """Return for how many of *wanted* batches there is a permit; they count as running from now on."""
        now = time.monotonic()
        with self._lock:
            self._wanted, self._wanted_at = wanted, now
            rooms = {"max_running": self._room_to_run(), "per_second": self._room_to_begin()}
            self._lacked.update({limit: now for limit, room in rooms.items() if room < wanted})
            granted = min(wanted, *rooms.values())
            self.held += granted
            self._unbegun += granted
        return granted

    def _room_to_run(self) -> int:
        if self.limit.max_running is None:
            return MOST_WANTED
        is_fresh = time.monotonic() - self.refreshed_at < FRESH_SECONDS
        return max(0, self.may_run - self._all_held()) if is_fresh else 0

    def _room_to_begin(self) -> int:
        if self.limit.per_second is None:
            return MOST_WANTED
        return max(0, int(self.starts.available()) - self._unbegun)

    def unreserve(self, count: int) -> None:
        """Give back permits that no batch uses."""
        with self._lock:
            self.held -= count
            self._unbegun -= count

    def has_begun(self) -> None:
        """Note that a batch has begun, whose token `begin` took."""
        with self._lock:
            self._unbegun -= 1

    def has_ended(self, batch: ClaimedBatch) -> None:
        """Note that the outcome of a batch is written, or that it was released."""
        with self._lock:
            self.held -= 1
            self._unbegun -= batch.begun_at is None

    def adopt(self, batches: Iterable[ClaimedBatch]) -> None:
        """Count batches as running that were claimed before the limit was known."""
        with self._lock:
            self._adopted.update(batches)

    def keep_adopted(self, live: set[ClaimedBatch]) -> None:
        """Count adopted batches no longer that are not among the *live* ones."""
        with self._lock:
            self._adopted &= live

    @property
    def has_adopted(self) -> bool:
        """Whether it counts adopted batches."""
        return bool(self._adopted)

    def _all_held(self) -> int:
        return self.held + len(self._adopted)

    # ---------------------------------------------------------------------------------------------------- its share

    @property
    def is_wanted(self) -> bool:
        """Whether it is in use, or was lately."""
        is_recent = time.monotonic() - max(self._wanted_at, self._used_at) < WANTED_SECONDS
        return bool(self._all_held() or self.may_run or self.starts.rate or self.items.rate) or is_recent

    def wants_items(self) -> None:
        """Note that items of the limited kind are about to begin."""
        self._used_at = time.monotonic()

    def report(self) -> Report:
        """Return what this worker holds itself to, and what it could use."""
        now = time.monotonic()
        with self._lock:
            in_use = self._all_held()
            is_hungry = now - self._wanted_at < WANTED_SECONDS
            wanted_running = min(in_use + (self._wanted if is_hungry else 0), MOST_WANTED)
            wanted_starts = self._wish("per_second", self.starts, now)
            wanted_items = self._wish("items_per_second", self.items, now)
            self._reported_at = now
            self._promised = max(self.may_run, in_use)
            lacked = sorted(limit for limit, at in self._lacked.items() if now - at < WANTED_SECONDS)
            return Report(
                self.limit.queue, self.limit.kind or "", self._promised, wanted_running, self.starts.rate,
                wanted_starts, self.items.rate, wanted_items, in_use, ",".join(lacked) or None,
            )  # fmt: skip

    def _wish(self, limit: str, bucket: TokenBucket, now: float) -> float:
        """Return how many tokens per second the worker could use: all it can get, if it lacked one lately."""
        taken, was_empty = bucket.usage()
        if was_empty:
            self._lacked[limit] = now
        if now - self._lacked.get(limit, float("-inf")) < WANTED_SECONDS:
            return AS_MUCH_AS_POSSIBLE
        if taken:
            self._used_at = now
        rate = taken / max(now - self._reported_at, 0.1)
        return max(1.5 * rate, bucket.rate / 2) if now - self._used_at < WANTED_SECONDS else 0.0

    def apply(self, share: Share, asked_at: float) -> bool:
        """Take over a share that was asked for at *asked_at* (monotonic). Return whether to report at once: the share
        has shrunk, and others wait for the rest."""
        burst_seconds = self.limit.burst_seconds
        with self._lock:
            before = (self._promised, self.starts.rate, self.items.rate)
            self.may_run = share.running
            self.refreshed_at = asked_at
            for bucket, rate in ((self.starts, share.starts), (self.items, share.items)):
                bucket.set_rate(rate, max(rate * burst_seconds, 1.0) if rate else 0.0)
                bucket.valid_until = asked_at + RATES_VALID_SECONDS
            after = (max(self.may_run, self._all_held()), self.starts.rate, self.items.rate)
            return any(now < then for now, then in zip(after, before, strict=True))


def reserve(permits: Sequence[Permit], wanted: int) -> int:
    """Return for how many of *wanted* batches all *permits* have room; they count as running from now on."""
    for number, permit in enumerate(permits):
        granted = permit.reserve(wanted)
        for earlier in permits[:number]:
            earlier.unreserve(wanted - granted)
        wanted = granted
    return wanted


def unreserve(permits: Sequence[Permit], count: int) -> None:
    """Give back permits that no batch uses."""
    for permit in permits:
        permit.unreserve(count)


def begin(permits: Sequence[Permit]) -> bool:
    """Take a token for a batch that begins; return whether there was one in each limit of batches per second."""
    if not take_from_all([permit.starts for permit in permits if permit.limit.per_second is not None]):
        return False
    for permit in permits:
        permit.has_begun()
    return True


def has_ended(permits: Sequence[Permit], batch: ClaimedBatch) -> None:
    """Note that the outcome of a batch is written."""
    for permit in permits:
        permit.has_ended(batch)


class Permits:
    """The permits of a worker, by queue and kind, and what steers it.

    The claimer and the keeper read and refresh them, one at a time.
    """

    def __init__(
        self,
        worker_id: str,
        queues: Sequence[str],
        lease_seconds: float,
        gates: Gates,
        in_flight: Callable[[], set[ClaimedBatch]],
    ) -> None:
        self.steering = Steering(frozenset(), {}, ())
        self.read_at = float("-inf")  # monotonic
        self.version = 0  # of the steering: how often it has changed
        self.permits: dict[tuple[str, str | None], Permit] = {}
        self._worker_id = worker_id
        self._queues = list(queues)
        self._lease_seconds = lease_seconds
        self._gates = gates
        self.throttles = Throttles(worker_id)
        self._in_flight = in_flight  # returns the batches that are claimed and have no outcome
        self._refreshed_at = float("-inf")
        self._turn = threading.Lock()  # of the threads that read and refresh
        self._state = threading.Lock()  # of what was read; never held while a statement runs

    def for_claims(self, queue: str, kind: str | None) -> Permit | None:
        """Return the permit of the queue, or of the kind in it, if it limits claims."""
        permit = self.permits.get((queue, kind))
        return permit if permit is not None and permit.limits_claims else None

    def per_key(self, queue: str, kind: str | None) -> int | None:
        """Return how many batches of a key may run."""
        permit = self.permits.get((queue, kind))
        return permit.limit.max_running_per_key if permit is not None else None

    # ------------------------------------------------------------------------------------------------- what is valid

    @property
    def is_steered(self) -> bool:
        """Whether anything steers the worker."""
        return bool(self.steering.pauses or self.steering.limits or self.throttles.in_force)

    @property
    def paused(self) -> frozenset[tuple[str | None, str | None]]:
        """The queues and kinds of which nothing is claimed: paused, throttled, or with a limit of 0. None: any."""
        closed = {name for name, permit in self.permits.items() if permit.is_closed}
        return frozenset({*self.steering.pauses, *self.throttles.in_force, *closed})

    def is_outdated(self, most_seconds: float) -> bool:
        """Return whether what steers the worker was read longer ago than that, or a throttle has ended since."""
        now = time.monotonic()
        has_ended = any(until <= now for until in self.throttles.in_force.values())
        return has_ended or now - self.read_at >= most_seconds

    def read(self, link: Link) -> None:
        """Read what steers the worker, in one message."""
        with self._turn:
            asked_at = time.monotonic()
            with link.reading() as conn:
                steering = shares.steering(conn, self._queues)
            self.read_at = asked_at
            with self._state:
                self._follow(steering, asked_at)

    def _follow(self, steering: Steering, asked_at: float) -> None:
        before = self.steering.pauses, self.steering.limits, self.throttles.in_force.keys()
        self.throttles.follow(steering.throttles, asked_at)
        self._gates.set_throttles(self.throttles.in_force)
        if steering.limits != self.steering.limits:
            self._change_limits(steering.limits)
        self.steering = steering
        self.version += (steering.pauses, steering.limits, self.throttles.in_force.keys()) != before

    def _change_limits(self, limits: Sequence[Limit]) -> None:
        permits: dict[tuple[str, str | None], Permit] = {}
        for limit in limits:
            known = self.permits.get((limit.queue, limit.kind))
            permit = permits[limit.queue, limit.kind] = known or Permit(limit)
            is_new = permit.limits_claims and (known is None or not known.limits_claims)
            permit.limit = limit
            if is_new:
                permit.adopt(batch for batch in self._in_flight() if _is_unpermitted(batch, permit))
        self.permits = permits
        self._gates.set_limits(permits)
        self._refreshed_at = float("-inf")

    def throttle(self, queue: str, kind: str, key: str | None, error: Throttled) -> None:
        """Let what *error* names wait: in this process at once, elsewhere as soon as it is written."""
        with self._state:
            self.throttles.add(queue, kind, key, error)
            self._gates.set_throttles(self.throttles.in_force)
            self.version += 1

    # --------------------------------------------------------------------------------------------------- shares

    def refresh(self, link: Link, older_than_seconds: float) -> None:
        """Refresh the shares, if the last time is longer ago than that; at once again where one has shrunk."""
        if time.monotonic() - self._refreshed_at < older_than_seconds or not self._turn.acquire(blocking=False):
            return
        try:
            wanted = [permit for permit in self.permits.values() if permit.is_wanted]
            if any(permit.has_adopted for permit in wanted):
                live = self._in_flight()
                for permit in wanted:
                    permit.keep_adopted(live)
            while wanted:
                asked_at = time.monotonic()
                reports = [permit.report() for permit in wanted]
                rows = link.run(shares.take_shares(self._worker_id, self._lease_seconds, reports))
                self._refreshed_at = asked_at
                by_name = {(permit.limit.queue, permit.limit.kind or ""): permit for permit in wanted}
                granted = [Share._make(row) for row in rows]
                wanted = [by_name[s.queue, s.kind] for s in granted if by_name[s.queue, s.kind].apply(s, asked_at)]
        finally:
            self._turn.release()

    def give_up(self, link: Link) -> None:
        """Return all shares: the worker has written every outcome and ends."""
        if self.permits:
            with link.transaction() as conn:
                shares.return_shares(conn, self._worker_id)


def declare_limits(link: Link, queues: Sequence[str], handlers: Mapping[str, Handler]) -> None:
    """Write what the handlers declare, in place of what an earlier version declared, if there is anything to write."""
    limits = {kind: _columns(handler.limits) for kind, handler in handlers.items()}
    with link.reading() as conn:
        is_needed = any(limits.values()) or shares.has_limits(conn, queues, list(limits))
    if is_needed:
        with link.transaction() as conn:
            shares.declare_limits(conn, queues, limits)


def _columns(limits: DeclaredLimits) -> dict[str, Any]:
    """Return limits as JSON, which has no infinity: that becomes a text, which Postgres reads as float8."""
    columns = dataclasses.asdict(limits) if limits.are_any else {}
    return {name: str(value) if value == float("inf") else value for name, value in columns.items()}


def _is_unpermitted(batch: ClaimedBatch, permit: Permit) -> bool:
    """Return whether a batch counts for a limit and was claimed without its permit."""
    is_limited = batch.whole_queue == permit.limit.queue and permit.limit.kind in (None, batch.kind)
    return is_limited and permit not in batch.claim.permits
