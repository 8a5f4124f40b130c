"""Permits: how much of each limit this worker may use.

The share of a limit is leased, like a batch (batchq.take_shares), and refreshed every half second while it is used. So a
claim and an item ask nobody: they take from the share.
"""

import threading
import time
from collections.abc import Iterable, Sequence

from batchq.batch.claimed import ClaimedBatch
from batchq.postgres.link import Link
from batchq.postgres.statements.shares import Limit, Report, Share
from batchq.worker.token_bucket import TokenBucket

# A share of running batches expires on the server after the lease and 2 s more. A claim and a lease renewal give a batch
# a whole lease, so both need a refresh that is more recent than those 2 s, less the time that a statement may take.
FRESH_SECONDS = 1.0
RATES_VALID_SECONDS = 5.0
WANTED_SECONDS = 2.0  # after its last use, a share returns to the others
AS_MUCH_AS_POSSIBLE = 1e9


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
        self._lock = threading.Lock()

    @property
    def limits_claims(self) -> bool:
        """Whether claims need it: a limit of items alone does not limit them."""
        return self.limit.max_running is not None or self.limit.per_second is not None

    @property
    def is_closed(self) -> bool:
        """Whether a limit of 0 lets nothing begin."""
        return 0 in (self.limit.max_running, self.limit.per_second)

    # ------------------------------------------------------------------------------------------ claimer and lanes

    def reserve(self, wanted: int) -> int:
        """Return for how many of *wanted* batches there is a permit; they count as running from now on."""
        now = time.monotonic()
        with self._lock:
            self._wanted, self._wanted_at = wanted, now
            granted = wanted
            if self.limit.max_running is not None:
                is_fresh = now - self.refreshed_at < FRESH_SECONDS
                granted = min(granted, self._note("max_running", wanted, self.may_run - self._all_held() if is_fresh else 0))
            if self.limit.per_second is not None:
                granted = min(granted, self._note("per_second", wanted, int(self.starts.available()) - self._unbegun))
            self.held += granted
            self._unbegun += granted
        return granted

    def _note(self, limit: str, wanted: int, room: int) -> int:
        if room < wanted:
            self._lacked[limit] = time.monotonic()
        return max(0, room)

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
        if self._adopted:
            with self._lock:
                self._adopted &= live

    def _all_held(self) -> int:
        return self.held + len(self._adopted)

    # ---------------------------------------------------------------------------------------------------- its share

    @property
    def is_wanted(self) -> bool:
        """Whether something runs with it, or has wanted to lately."""
        is_recent = time.monotonic() - self._wanted_at < WANTED_SECONDS
        return bool(self.held or self._adopted or self.may_run or self.starts.rate or self.items.rate) or is_recent

    def report(self) -> Report:
        """Return what this worker holds itself to, and what it could use."""
        now = time.monotonic()
        with self._lock:
            in_use = self._all_held()
            is_hungry = now - self._wanted_at < WANTED_SECONDS
            wanted_running = min(in_use + (self._wanted if is_hungry else 0), 2_000_000_000)
            lacked = sorted(limit for limit, at in self._lacked.items() if now - at < WANTED_SECONDS)
            starts, wanted_starts = self._wish(self.starts, is_hungry)
            items, wanted_items = self._wish(self.items, False)
            if wanted_items == AS_MUCH_AS_POSSIBLE:
                lacked.append("items_per_second")
            return Report(
                self.limit.queue, self.limit.kind or "", self.may_run, wanted_running, starts, wanted_starts,
                items, wanted_items, in_use, ",".join(lacked) or None,
            )  # fmt: skip
