"""The claimer: one thread for the process finds ready batches and claims them, a queue and a priority at a time."""

import random
import threading
import time
import uuid
from collections.abc import Sequence

from batchq import queries
from batchq.batch import Batch, Claim, Runtime
from batchq.database import Link
from batchq.errors import OutcomeUnknown
from batchq.lanes import Lane
from batchq.outage import Outage

POLLS_A_SECOND = 50  # of all idle workers together
MOST_IDLE_SECONDS = 5.0
FULL_SECONDS = 0.5
DEAR_POLL_FACTOR = 20


class Claimer:
    """Claims batches for the lanes, round after round; each queue in turn comes first."""

    def __init__(
        self, link: Link, queues: Sequence[str], lanes: Sequence[Lane], worker_id: str, runtime: Runtime
    ) -> None:
        self.link = link
        self.queues = list(queues)
        self.lanes = lanes
        self.worker_id = worker_id
        self.runtime = runtime
        self.live_workers = 1
        self.fastest_poll_seconds = float("inf")
        self.poll_cost_seconds = 0.0
        self.nudged = threading.Event()
        self.outage = Outage("claimer")
        self.unknown: list[tuple[str, uuid.UUID]] = []

    def run(self, drain: bool) -> None:
        """Claim until the worker stops or, with *drain*, until nothing is ready and all that was claimed is written."""
        while not self.runtime.stopping.is_set():
            all_written = not any(lane.unwritten for lane in self.lanes)  # looked at before the poll, which comes after
            try:
                found = self.timed_round()
                self.outage.over()
            except Exception as error:
                self.runtime.stopping.wait(self.outage.failed(error))
                continue
            if not found:
                if drain and all_written:
                    return
                self.wait()

    def nudge(self) -> None:
        """Say that a lane may have room."""
        self.nudged.set()

    def wait(self) -> None:
        """Wait for room if the lanes are full; else until it is this worker's turn to poll."""
        is_full = not any(lane.room() for lane in self.lanes)
        self.nudged.wait(FULL_SECONDS if is_full else self.idle_seconds())
        self.nudged.clear()

    def idle_seconds(self) -> float:
        """Return this worker's share of the idle polling, with jitter; more where a poll is dear to the database."""
        share = max(self.live_workers / POLLS_A_SECOND, DEAR_POLL_FACTOR * self.poll_cost_seconds)
        return min(share, MOST_IDLE_SECONDS) * random.uniform(0.5, 1.5)  # noqa: S311 (spreads load; not a secret)

    def timed_round(self) -> int:
        """Do a round, and note how much longer than the fastest (a round trip to the network) it took.

        A poll is dear where many batches are ready of kinds that this worker does not know: it passes over each.
        """
        began_at = time.monotonic()
        found = self.round()
        took = time.monotonic() - began_at
        self.fastest_poll_seconds = min(self.fastest_poll_seconds, took)
        self.poll_cost_seconds = took - self.fastest_poll_seconds
        return found

    def round(self) -> int:
        """Claim for every queue and lane that has room; return how many batches were claimed."""
        self.give_back_unknown()
        self.queues.append(self.queues.pop(0))
        return sum(self.claim_from(queue, lane) for queue in self.queues for lane in self.lanes if lane.room())

    def claim_from(self, queue: str, lane: Lane) -> int:
        """Claim what is ready for one lane, the most urgent priority first; return how many."""
        with self.link.reading() as conn:
            priorities = queries.ready_priorities(conn, queue, lane.kinds)
        claimed = 0
        for priority in priorities:
            room = lane.room() if claimed == 0 else lane.wanted() - lane.unwritten
            if room <= 0 or self.runtime.stopping.is_set():
                break
            found = self.claim(queue, priority, lane, room)
            claimed += found
            if found == room:  # there may be more of this priority, and a slot that is free by now is for those
                break
        return claimed

    def claim(self, queue: str, priority: int, lane: Lane, room: int) -> int:
        """Claim up to *room* batches of one priority, and hand them to the lane; return how many."""
        claim = Claim(queue, uuid.uuid4(), self.runtime, began_at=time.monotonic())
        try:
            with self.link.transaction() as conn:
                rows = queries.claim(
                    conn, queue, priority, lane.kinds, room, self.worker_id, claim.token, self.runtime.lease_seconds
                )
        except OutcomeUnknown:
            self.unknown.append((queue, claim.token))
            raise
        lane.take([Batch(row, claim) for row in rows])
        return len(rows)

    def give_back_unknown(self) -> None:
        """Give back what a claim whose COMMIT was cut off may have claimed."""
        while self.unknown:
            queue, token = self.unknown[0]
            with self.link.transaction() as conn:
                queries.give_back_claim(conn, queue, token)
            self.unknown.pop(0)
