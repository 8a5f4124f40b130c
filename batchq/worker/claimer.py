"""The claimer: one thread for the process finds ready batches and claims them, a queue and a priority at a time."""

import random
import time
import uuid
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import psycopg

from batchq.batch.claimed import Claim, ClaimedBatch
from batchq.common.log import get_logger
from batchq.errors import OutcomeUnknown
from batchq.postgres.link import Link
from batchq.postgres.statements import claims, probes, session, workers
from batchq.postgres.statements.claims import END, ClaimedRow, Position
from batchq.postgres.statements.running import Statement
from batchq.worker.context import Context
from batchq.worker.lanes import Lane
from batchq.worker.outage import Outage
from batchq.worker.positions import MOST_PRIORITIES, Pauses, Source, Track
from batchq.worker.refused import Halving, Skipped, is_about_rows
from batchq.worker.turns import MOST_IDLE_SECONDS

PAUSES_SECONDS = 1.0  # between two readings of the pauses
SETTINGS = session.FORCE_INDEX_AND_HASH_JOIN | session.ASYNCHRONOUS_COMMIT
_WRITABLE_SECONDS = 5.0  # between two checks whether the database takes writes
_FULL_SECONDS = 0.5  # to wait where no lane has room
_COST_FACTOR = 20  # an expensive probe is followed by a pause of that many times its cost
_MOST_A_CLAIM = 2000
_IN_ORDER = attrgetter("run_at", "id")

_log = get_logger()


class Claimer:
    """Claims batches for the lanes, round after round; each queue in turn comes first."""

    def __init__(self, context: Context, link: Link) -> None:
        self.context = context
        self.lifecycle = context.lifecycle
        self.link = link
        self.sources = [Source(queue, lane) for queue in context.settings.queues for lane in context.lanes]
        self.outage = Outage("claimer", link)
        self.skipped = Skipped()
        self.polled_at = time.monotonic()
        self.unknown: list[tuple[str, uuid.UUID]] = []  # queue and token of claims whose COMMIT was interrupted
        self.pauses: Pauses = frozenset()
        self.pauses_read_at = float("-inf")
        self._writable_at = time.monotonic()
        self._from_start = False  # recorded positions do not count

    def run(self, drain: bool) -> None:
        """Claim until the worker stops or, with *drain*, until nothing is ready and all that was claimed is written."""
        self._from_start = drain  # a late commit may lie before a recorded position: a drain claims that, too
        while not self.lifecycle.stopping.is_set():
            self.polled_at = time.monotonic()
            all_written = not any(lane.unwritten for lane in self.context.lanes)  # checked before the poll
            if self.lifecycle.draining.is_set():
                if all_written:
                    return
                self._release_waiting()
                self._wait(_FULL_SECONDS)
                continue
            try:
                found = self.round()
                self.outage.over()
            except Exception as error:
                self.lifecycle.stopping.wait(self.outage.failed(error))
                continue
            if drain and all_written and not found:
                if self._from_start:
                    return
                self._forget_positions()
                continue
            self._from_start = False
            if not found:
                has_room = any(lane.room() for lane in self.context.lanes)
                self._wait(self.idle_seconds() if has_room else _FULL_SECONDS)

    def _release_waiting(self) -> None:
        for lane in self.context.lanes:
            lane.release_waiting(0)

    def _wait(self, seconds: float) -> None:
        self.lifecycle.wake.wait(seconds)
        self.lifecycle.wake.clear()

    def idle_seconds(self) -> float:
        """Return how long to wait for this worker's turn to poll: longer where polls are expensive."""
        expensive_seconds = _COST_FACTOR * sum(source.probe_cost_seconds for source in self.sources)
        expensive_seconds *= random.uniform(0.5, 1.5)  # noqa: S311 (spreads load; not a secret)
        return min(max(self.context.turns.wait_seconds(), expensive_seconds), MOST_IDLE_SECONDS)

    def _forget_positions(self) -> None:
        for source in self.sources:
            source.forget()
        self._from_start = True

    def probe_seconds(self) -> float:
        """Return the time that the server needs to find the next ready batch, of the most expensive source."""
        return max(source.probe_cost_seconds for source in self.sources)

    def known_priorities(self) -> list[int]:
        """Return every priority that was seen in any queue, and the default, 0."""
        return sorted({0}.union(*(source.tracks.copy() for source in self.sources)))

    # ---------------------------------------------------------------------------------------------------- a round

    def round(self) -> int:
        """Claim for every queue and lane that has room; return how many batches were claimed."""
        self._leave_if_read_only()
        self.release_unknown()
        for lane in self.context.lanes:
            lane.prefetch.adapt_to(self.link.round_trip_seconds)
        if self.pauses:
            self.apply_pauses()
        self.sources.append(self.sources.pop(0))
        return sum(self.claim_from(source) for source in self.sources if source.kinds and source.lane.room())

    def _leave_if_read_only(self) -> None:
        """Every 5 s, close the connection if it is read-only.

        A worker that finds nothing writes nothing. It would poll forever where the server behind the same name has
        become a standby.
        """
        if time.monotonic() - self._writable_at < _WRITABLE_SECONDS:
            return
        with self.link.reading() as conn:
            is_read_only = session.is_read_only(conn)
        self._writable_at = time.monotonic()
        if is_read_only:
            self.link.close()

    def release_unknown(self) -> None:
        """Release what a claim may have claimed whose COMMIT was interrupted."""
        while self.unknown:
            queue, token = self.unknown[0]
            with self.link.transaction() as conn:
                claims.release_claim(conn, queue, token)
            self.unknown.pop(0)

    def apply_pauses(self) -> bool:
        """Leave out what is paused, as of a second ago at most; return whether that has changed.

        Read before a claim, or while something is paused: an idle worker reads nothing.
        """
        if time.monotonic() - self.pauses_read_at < PAUSES_SECONDS:
            return False
        with self.link.reading() as conn:
            pauses = frozenset(workers.pauses(conn))
        self.pauses_read_at = time.monotonic()
        if pauses == self.pauses:
            return False
        _log.info("pauses changed", paused=[f"{queue or '*'}/{kind or '*'}" for queue, kind in sorted(pauses, key=str)])
        self.pauses = pauses
        for source in self.sources:
            source.leave_out(pauses)
        return True

    def claim_from(self, source: Source) -> int:
        """Claim what is ready of one source, the most urgent priority first; return how many."""
        claimed = self._sweep(source)
        ready = self.probe(source)
        if ready and self.apply_pauses():
            ready = self.probe(source) if source.kinds else []
        for priority, start in ready:
            room = self._room(source.lane, claimed)
            if room <= 0 or self.lifecycle.stopping.is_set():
                break
            rows = self.claim(source, priority, room, start, END)
            source.tracks[priority].claimed(rows, start, is_full=len(rows) == room)
            source.busy_priority = priority if len(rows) == room else None
            claimed += len(rows)
            if len(rows) == room:  # there may be more of this priority: a slot that is free by now is for those
                break
        return claimed

    def _sweep(self, source: Source) -> int:
        """Claim ready batches before a position, in the part that is due, if any; return how many."""
        if (priority := source.due_part()) is None:
            return 0
        track = source.tracks[priority]
        number, after, until = track.next_part()
        began_at = time.monotonic()
        found = self.link.probe(probes.ready_between(source.queue, priority, source.kinds, after, until))
        track.was_swept(source.cost(time.monotonic() - began_at), source.busy_priority is not None, number)
        room = self._room(source.lane, 0)
        if not found or room <= 0 or self.apply_pauses():  # after a change of pauses, the next sweep claims
            return 0
        rows = self.claim(source, priority, room, after, until)
        if len(rows) == room:
            track.sweep_again()
        return len(rows)

    def _room(self, lane: Lane, claimed: int) -> int:
        room = lane.room() if claimed == 0 else lane.wanted() - lane.occupied
        return min(room, int(_MOST_A_CLAIM * lane.prefetch.limit_factor))

    # ----------------------------------------------------------------------------------------------------- probes

    def probe(self, source: Source) -> list[tuple[int, Position]]:
        """Return the priorities that have a ready batch, the most urgent first, and where to start in each."""
        if (position := source.continues_at()) is not None and source.busy_priority is not None:
            return [(source.busy_priority, position)]
        if len(source.tracks) > MOST_PRIORITIES:
            source.forget()
        if source.is_discovery_due():
            self._discover_priorities(source)
        if not (starts := source.starts()):  # no batch was ever seen here, so there is nothing to probe or to time
            return []
        began_at = time.monotonic()
        ready = self._ready_priorities(source, starts)
        if source.probed(starts, time.monotonic() - began_at):
            self._take_positions(source)
        return [(priority, starts[priority]) for priority in ready]

    def _ready_priorities(self, source: Source, starts: dict[int, Position]) -> list[int]:
        if len(starts) > 1:
            statement = probes.ready_priorities(source.queue, source.kinds, starts)
            return [priority for (priority,) in self.link.probe(statement)]
        [(priority, start)] = starts.items()  # the usual case of an idle worker
        with self.link.reading() as conn:
            return [priority] if probes.has_ready(conn, source.queue, priority, source.kinds, start) else []

    def _discover_priorities(self, source: Source) -> None:
        if not source.tracks:
            self._take_positions(source)
        began_at = time.monotonic()
        if self.link.probe(probes.unknown_priority(source.queue, source.tracks)):
            for (priority,) in self.link.probe(probes.priorities(source.queue)):
                source.tracks.setdefault(priority, Track())
        source.discovered(time.monotonic() - began_at)

    def _take_positions(self, source: Source) -> None:
        if not self._from_start:
            source.begin_at(probes.as_positions(self.link.probe(probes.known_positions(source.queue))))

    # ----------------------------------------------------------------------------------------------------- claims

    def claim(self, source: Source, priority: int, room: int, after: Position, until: Position) -> list[ClaimedRow]:
        """Claim up to *room* batches of one priority for the source's lane, each that the database allows."""
        try:
            return self._claim_together(source, priority, room, after, until)
        except psycopg.Error as error:
            if not is_about_rows(error):
                raise
        statement = probes.ready_positions(source.queue, priority, source.kinds, room, after, until, self.skipped.ids())
        rows: list[ClaimedRow] = []

        def claim_part(part: Sequence[Position]) -> None:
            before_first = part[0]._replace(id=part[0].id - 1)
            rows.extend(self._claim_together(source, priority, len(part), before_first, part[-1]))

        halving = Halving(claim_part)
        halving.halve([Position._make(row) for row in self.link.probe(statement)])
        refused = [position.id for position in halving.refused]
        self.skipped.add(refused)
        halving.report("claim", refused)
        return rows

    def _claim_together(
        self, source: Source, priority: int, room: int, after: Position, until: Position
    ) -> list[ClaimedRow]:
        """Claim batches in one statement.

        Its COMMIT does not wait for the disk. If the server crashes and forgets it, the batches are still pending, or
        finished (what was written later is lost before this is), and no write of a handler matches the token.
        """
        runtime = self.context.runtime
        claim = Claim(source.queue, uuid.uuid4(), runtime, began_at=time.monotonic())
        statement = claims.claim(
            source.queue, priority, source.kinds, room, self.context.worker_id, claim.token, runtime.lease_seconds,
            after, until, self.skipped.ids(),
        )  # fmt: skip
        try:
            rows = self._run_claim(statement)
        except OutcomeUnknown:
            self.unknown.append((source.queue, claim.token))
            raise
        claimed = sorted(map(ClaimedRow._make, rows), key=_IN_ORDER)
        claim.arrived_at = time.monotonic()
        source.lane.take([ClaimedBatch(row, claim) for row in claimed])
        return claimed

    def _run_claim(self, statement: Statement) -> list[Any]:
        """Claim without payloads if the server cannot send one as UTF-8: only the batch that fetches it then fails."""
        try:
            return self.link.run(statement, SETTINGS)
        except claims.UNREADABLE:
            return self.link.run(claims.without_inputs(statement), SETTINGS)
