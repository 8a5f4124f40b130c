"""The claimer: one thread for the process finds ready batches and claims them, a queue and a priority at a time."""

import random
import threading
import time
import uuid
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import psycopg

from batchq.batch.claimed import Claim, ClaimedBatch, Runtime
from batchq.common.log import get_logger
from batchq.errors import OutcomeUnknown
from batchq.postgres.link import Link
from batchq.postgres.statements import claims, probes, session, workers
from batchq.postgres.statements.claims import END, ClaimedRow, Position
from batchq.postgres.statements.running import Statement
from batchq.postgres.statements.workers import Turn
from batchq.worker.lanes import Lane
from batchq.worker.outage import Halving, Outage, Skipped, is_about_rows
from batchq.worker.positions import MOST_PRIORITIES, Pauses, Source, Track

POLLS_A_SECOND = 54  # of all idle workers together
MOST_IDLE_SECONDS = 5.0
PAUSES_SECONDS = 1.0
WRITABLE_SECONDS = 5.0
FULL_SECONDS = 0.5
DEAR_POLL_FACTOR = 20
MOST_A_CLAIM = 2000
IN_ORDER = attrgetter("run_at", "id")
SETTINGS = session.FORCE_INDEX_AND_HASH_JOIN | session.ASYNCHRONOUS_COMMIT

log = get_logger()


class Turns:
    """When it is this worker's turn to poll: the idle workers of a queue poll in turn, by the database's clock.

    So a batch is found within 1/54 s, whatever the number of workers. If each polled at times of its own, there would
    be as many polls, but at times none for five times as long. *known_at*: the monotonic time when it was *turn.now*.
    """

    def __init__(self, turn: Turn, known_at: float) -> None:
        self.period_seconds = min(max(turn.workers, 1) / POLLS_A_SECOND, MOST_IDLE_SECONDS)
        share = turn.number / max(turn.workers, 1)
        self.turn_at = known_at - turn.now % self.period_seconds + share * self.period_seconds

    def wait_seconds(self) -> float:
        """Return how long it is until the next turn; the one that has just been, or comes at once, does not count."""
        left = (self.turn_at - time.monotonic()) % self.period_seconds
        return left if left > self.period_seconds / 10 else left + self.period_seconds


class Claimer:
    """Claims batches for the lanes, round after round; each queue in turn comes first."""

    def __init__(
        self, link: Link, queues: Sequence[str], lanes: Sequence[Lane], worker_id: str, runtime: Runtime
    ) -> None:
        self.link = link
        self.lanes = lanes
        self.sources = [Source(queue, lane) for queue in queues for lane in lanes]
        self.worker_id = worker_id
        self.runtime = runtime
        self.turns = Turns(Turn(1, 0, 0.0), 0.0)
        self.nudged = threading.Event()
        self.outage = Outage("claimer", link)
        self.skipped = Skipped()
        self.polled_at = time.monotonic()
        self.unknown: list[tuple[str, uuid.UUID]] = []
        self.pauses: Pauses = frozenset()
        self.pauses_read_at = float("-inf")
        self.writable_at = time.monotonic()
        self.draining = threading.Event()
        self.from_start = False

    def run(self, drain: bool) -> None:
        """Claim until the worker stops or, with *drain*, until nothing is ready and all that was claimed is written."""
        self.from_start = drain  # what was committed late lies before the recorded positions: a drain reads that, too
        while not self.runtime.stopping.is_set():
            self.polled_at = time.monotonic()
            all_written = not any(lane.unwritten for lane in self.lanes)  # looked at before the poll, which comes after
            if self.draining.is_set():
                if all_written:
                    return
                self.wait(FULL_SECONDS)
                continue
            try:
                found = self.round()
                self.outage.over()
            except Exception as error:
                self.runtime.stopping.wait(self.outage.failed(error))
                continue
            if found or not (drain and all_written):
                self.from_start = False
            elif self.from_start:
                return
            else:
                self.forget_positions()
                self.from_start = True
                continue
            if not found:
                self.wait(self.idle_seconds() if any(lane.room() for lane in self.lanes) else FULL_SECONDS)

    def drain(self) -> None:
        """Claim no more: give back what has not begun, and let `run` end when all that runs has ended."""
        if not self.draining.is_set():
            log.info("asked to drain: the worker ends when what it runs has ended", worker=self.worker_id)
        self.draining.set()
        for lane in self.lanes:
            lane.release_waiting(0)
        self.nudge()

    def nudge(self) -> None:
        """Say that a lane may have room."""
        self.nudged.set()

    def wait(self, seconds: float) -> None:
        """Wait for so long, or until there may be room."""
        self.nudged.wait(seconds)
        self.nudged.clear()

    def idle_seconds(self) -> float:
        """Return how long to wait for this worker's turn to poll; longer where a poll is dear to the database."""
        dear_seconds = DEAR_POLL_FACTOR * sum(source.look_cost_seconds for source in self.sources)
        dear_seconds *= random.uniform(0.5, 1.5)  # noqa: S311 (spreads load; not a secret)
        return min(max(self.turns.wait_seconds(), dear_seconds), MOST_IDLE_SECONDS)

    def forget_positions(self) -> None:
        """Start from the beginning everywhere."""
        for source in self.sources:
            source.forget()

    # ---------------------------------------------------------------------------------------------------- a round

    def round(self) -> int:
        """Claim for every queue and lane that has room; return how many batches were claimed."""
        self.leave_if_read_only()
        self.give_back_unknown()
        for lane in self.lanes:
            lane.prefetch.adapt_to(self.link.round_trip_seconds)
        if self.pauses:
            self.heed_pauses()
        self.sources.append(self.sources.pop(0))
        return sum(self.claim_from(source) for source in self.sources if source.kinds and source.lane.room())

    def leave_if_read_only(self) -> None:
        """Every 5 s, close the connection if it only reads: who finds nothing to claim writes nothing, and would look
        for ever at a server that has become a standby behind the same name."""
        if time.monotonic() - self.writable_at < WRITABLE_SECONDS:
            return
        with self.link.reading() as conn:
            only_reads = session.is_read_only(conn)
        self.writable_at = time.monotonic()
        if only_reads:
            self.link.close()

    def heed_pauses(self) -> bool:
        """Leave out what is paused, as known for a second at most; tell whether that has changed.

        One small read a second, before a claim or while something is paused: who is idle reads nothing.
        """
        if time.monotonic() - self.pauses_read_at < PAUSES_SECONDS:
            return False
        with self.link.reading() as conn:
            pauses = frozenset(workers.pauses(conn))
        self.pauses_read_at = time.monotonic()
        if pauses == self.pauses:
            return False
        log.info("pauses", paused=[f"{queue or '*'}/{kind or '*'}" for queue, kind in sorted(pauses, key=str)])
        self.pauses = pauses
        for source in self.sources:
            source.leave_out(pauses)
        return True

    def claim_from(self, source: Source) -> int:
        """Claim what is ready of one source, the most urgent priority first; return how many."""
        claimed = self.sweep(source)
        ready = self.look(source)
        if ready and self.heed_pauses():
            ready = self.look(source) if source.kinds else []
        for priority, start in ready:
            room = self.room(source.lane, claimed)
            if room <= 0 or self.runtime.stopping.is_set():
                break
            rows = self.claim(source, priority, room, start, END)
            source.tracks[priority].claimed(rows, start, is_full=len(rows) == room)
            source.busy_priority = priority if len(rows) == room else None
            claimed += len(rows)
            if len(rows) == room:  # there may be more of this priority, and a slot that is free by now is for those
                break
        return claimed

    def room(self, lane: Lane, claimed: int) -> int:
        """Return how many batches to claim in one statement, when *claimed* were in this round."""
        room = lane.room() if claimed == 0 else lane.wanted() - lane.occupied
        return min(room, int(MOST_A_CLAIM * lane.prefetch.limit_factor))

    def look(self, source: Source) -> list[tuple[int, Position]]:
        """Return the priorities that have something ready, the most urgent first, and where to start in each."""
        if (position := source.goes_on()) is not None and source.busy_priority is not None:
            return [(source.busy_priority, position)]
        if len(source.tracks) > MOST_PRIORITIES:
            source.forget()
        if source.learns_now():
            self.learn(source)
        if not (starts := source.starts()):  # no batch was ever seen here: no question, so no time to measure by
            return []
        began_at = time.monotonic()
        ready = self.ready_priorities(source, starts)
        if source.looked(starts, time.monotonic() - began_at):
            self.take_positions(source)
        return [(priority, starts[priority]) for priority in ready]

    def ready_priorities(self, source: Source, starts: dict[int, Position]) -> list[int]:
        """Return the priorities that have a ready batch after their start, the most urgent first."""
        if len(starts) > 1:
            return [
                priority for (priority,) in self.link.probe(probes.ready_priorities(source.queue, source.kinds, starts))
            ]
        [(priority, start)] = starts.items()  # the usual case of an idle worker
        with self.link.reading() as conn:
            return [priority] if probes.has_ready(conn, source.queue, priority, source.kinds, start) else []

    def learn(self, source: Source) -> None:
        """Begin a track for each priority that was never seen before."""
        if not source.tracks:
            self.take_positions(source)
        began_at = time.monotonic()
        if self.link.probe(probes.unknown_priority(source.queue, source.tracks)):
            for (priority,) in self.link.probe(probes.priorities(source.queue)):
                source.tracks.setdefault(priority, Track())
        source.learned(time.monotonic() - began_at)

    def take_positions(self, source: Source) -> None:
        """Begin where workers have recorded that dead entries end."""
        if self.from_start:
            return
        source.begin_at(probes.as_positions(self.link.probe(probes.known_positions(source.queue))))

    def probe_seconds(self) -> float:
        """Return the time that the server needs to find the next ready batch, of the most expensive source."""
        return max(source.look_cost_seconds for source in self.sources)

    def known_priorities(self) -> list[int]:
        """Return every priority that was seen in any queue, and that of a batch that names none."""
        return sorted({0}.union(*(source.tracks.copy() for source in self.sources)))

    def sweep(self, source: Source) -> int:
        """Claim what landed behind a position, in the part whose turn it is, if one is due; return how many."""
        if (priority := source.due_part()) is None:
            return 0
        track = source.tracks[priority]
        number, after, until = track.next_part()
        began_at = time.monotonic()
        found = self.link.probe(probes.ready_between(source.queue, priority, source.kinds, after, until))
        track.was_swept(source.cost(time.monotonic() - began_at), source.busy_priority is not None, number)
        room = self.room(source.lane, 0)
        if not found or room <= 0 or self.heed_pauses():  # what has changed is swept with the next part
            return 0
        rows = self.claim(source, priority, room, after, until)
        if len(rows) == room:
            track.sweep_again()
        return len(rows)

    def claim(self, source: Source, priority: int, room: int, after: Position, until: Position) -> list[ClaimedRow]:
        """Claim up to *room* batches of one priority, and hand them to the lane; return their rows.

        A row that the database refuses to change does not keep the others from being claimed.
        """
        try:
            return self.claim_together(source, priority, room, after, until)
        except psycopg.Error as error:
            if not is_about_rows(error):
                raise
        return self.claim_apart(source, priority, room, after, until)

    def claim_apart(
        self, source: Source, priority: int, room: int, after: Position, until: Position
    ) -> list[ClaimedRow]:
        """Claim what can be claimed of batches that were refused together; leave out the others for a while."""
        skipped = self.skipped.ids()
        statement = probes.ready_positions(source.queue, priority, source.kinds, room, after, until, skipped)
        ready = [Position._make(row) for row in self.link.probe(statement)]
        rows: list[ClaimedRow] = []

        def claim_part(part: Sequence[Position]) -> None:
            before_first = part[0]._replace(id=part[0].id - 1)
            rows.extend(self.claim_together(source, priority, len(part), before_first, part[-1]))

        halving = Halving(claim_part)
        halving.halve(ready)
        refused = [position.id for position in halving.refused]
        self.skipped.add(refused)
        halving.report("claim", refused)
        return rows

    def claim_together(
        self, source: Source, priority: int, room: int, after: Position, until: Position
    ) -> list[ClaimedRow]:
        """Claim batches in one statement, and hand them to the lane; return their rows.

        Its COMMIT does not wait for the disk: should the server crash and forget it, the batches are pending still, or
        finished (what was written later is lost before this is), and no write of a handler matches the token.
        """
        claim = Claim(source.queue, uuid.uuid4(), self.runtime, began_at=time.monotonic())
        lease_seconds = self.runtime.lease_seconds
        statement = claims.claim(
            source.queue, priority, source.kinds, room, self.worker_id, claim.token, lease_seconds, after, until,
            self.skipped.ids(),
        )  # fmt: skip
        try:
            rows = self.run_claim(statement)
        except OutcomeUnknown:
            self.unknown.append((source.queue, claim.token))
            raise
        claimed = sorted(map(ClaimedRow._make, rows), key=IN_ORDER)
        claim.arrived_at = time.monotonic()
        source.lane.take([ClaimedBatch(row, claim) for row in claimed])
        return claimed

    def run_claim(self, statement: Statement) -> list[Any]:
        """Run the statement of a claim. If the server cannot send a payload as UTF-8, claim without payloads: each is
        then fetched by itself, and only that batch fails."""
        try:
            return self.link.run(statement, SETTINGS)
        except claims.UNREADABLE:
            return self.link.run(claims.without_inputs(statement), SETTINGS)

    def give_back_unknown(self) -> None:
        """Give back what a claim whose COMMIT was cut off may have claimed."""
        while self.unknown:
            queue, token = self.unknown[0]
            with self.link.transaction() as conn:
                claims.release_claim(conn, queue, token)
            self.unknown.pop(0)
