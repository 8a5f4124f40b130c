"""The claimer: one thread for the process finds ready batches and claims them, a queue and a priority at a time."""

import random
import time
import uuid
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import psycopg

from batchq.batch.claimed import Claim, ClaimedBatch
from batchq.common.log import get_logger
from batchq.errors import OutcomeUnknown
from batchq.postgres.link import Link
from batchq.postgres.statements import claims, probes, session
from batchq.postgres.statements.claims import END, ClaimedRow, Position
from batchq.postgres.statements.running import Statement
from batchq.worker.context import Context
from batchq.worker.keyed_claims import KeyedClaims
from batchq.worker.lanes import Lane
from batchq.worker.outage import Outage
from batchq.worker.permits import reserve, unreserve
from batchq.worker.positions import MOST_PRIORITIES, Pauses, Source, Track
from batchq.worker.refused import Halving, Skipped, is_about_rows
from batchq.worker.shards import Ready, ShardLooks
from batchq.worker.turns import MOST_IDLE_SECONDS

STEERING_SECONDS = 1.0  # between two readings of pauses, throttles and limits
SETTINGS = session.FORCE_INDEX_AND_HASH_JOIN | session.ASYNCHRONOUS_COMMIT
_WRITABLE_SECONDS = 5.0  # between two checks whether the database takes writes
_FULL_SECONDS = 0.5  # to wait where no lane has room
_COST_FACTOR = 20  # an expensive probe is followed by a pause of that many times its cost
_MOST_A_CLAIM = 2000
_ASK_AGAIN_SECONDS = 0.1  # between two searches for what waits for a permit
_MOST_RANGES = 3  # of keys, that one round goes through
_IN_ORDER = attrgetter("run_at", "id")

_log = get_logger()


class Claimer:
    """Claims batches for the lanes, round after round; each queue in turn comes first."""

    # More than a dozen attributes: a thread's whole state.
    def __init__(self, context: Context, link: Link) -> None:
        self.context = context
        self.lifecycle = context.lifecycle
        self.permits = context.permits
        self.link = link
        self.sources = [
            Source(queue, lane) for queue in context.settings.queues for lane in context.lanes if lane.serves(queue)
        ]
        self.outage = Outage("claimer", link)
        self.skipped = Skipped()
        self.polled_at = time.monotonic()
        self.unknown: list[Claim] = []  # whose COMMIT was interrupted
        self._keyed = KeyedClaims(context, link, self.skipped)
        self._shard_looks = ShardLooks(context, link, self._follow_flows)
        self._shards = context.shards  # as they were last applied
        self._steered: tuple[int, Pauses] = (0, frozenset())  # the version of the steering, and what is paused
        self._writable_at = time.monotonic()
        self._from_start = False  # recorded positions do not count
        self._looks_again = False  # a drain: something is ready that this round did not claim

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
            if drain and all_written and not found and not self._looks_again:
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
        self.context.flows.read_from_start()
        for source in self.sources:
            for shard in source.shards:
                shard.forget()
        self._from_start = True

    def probe_seconds(self) -> float:
        """Return the time that the server needs to find the next ready batch, of the most expensive source."""
        return max(source.probe_cost_seconds for source in self.sources)

    def known_priorities(self) -> list[int]:
        """Return every priority that was seen in any queue, and the default, 0."""
        return sorted({0}.union(*(shard.tracks.copy() for source in self.sources for shard in source.shards)))

    # ---------------------------------------------------------------------------------------------------- a round

    def round(self) -> int:
        """Claim for every queue and lane that has room; return how many batches were claimed."""
        self._leave_if_read_only()
        self.release_unknown()
        for lane in self.context.lanes:
            lane.prefetch.adapt_to(self.link.round_trip_seconds)
        self.permits.throttles.write(self.link)
        if self.permits.is_steered:
            self.steer()
        is_distributed = self.context.layout.is_distributed
        self._looks_again = is_distributed and self.context.flows.collect(self.link, self._from_start)
        if self.context.shards is not self._shards:
            self._shards = self.context.shards
            self._split_sources()
        self.sources.append(self.sources.pop(0))
        return sum(self.claim_from(source) for source in list(self.sources) if source.kinds and source.lane.room())

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
            claim = self.unknown[0]
            with self.link.transaction() as conn:
                claims.release_claim(conn, claim.queue, claim.token)
            self.unknown.pop(0)
            unreserve(claim.permits, claim.reserved)

    def steer(self) -> bool:
        """Apply pauses, throttles and limits, at most a second old; return whether they have changed.

        Read before a claim, or while there are any: an idle worker reads nothing.
        """
        if self.permits.is_outdated(STEERING_SECONDS):
            self.permits.read(self.link)
        version, paused = self._steered
        if self.permits.version == version:
            return False
        self._steered = (self.permits.version, self.permits.paused)
        if self._steered[1] != paused:
            names = [f"{queue or '*'}/{kind or '*'}" for queue, kind in sorted(self._steered[1], key=str)]
            _log.info("pauses changed", paused=names)
        self.context.heed_throttles()
        self._arrange_sources()
        return True

    def _arrange_sources(self) -> None:
        """Give each kind whose claims are limited a source of its own, and the other kinds of a lane one together."""
        paused = self._steered[1]
        sources = []
        for queue, lane in dict.fromkeys((source.queue, source.lane) for source in self.sources):
            limited = [kind for kind in lane.kinds if self.permits.for_claims(queue, kind)]
            for kind in (None, *limited):
                source = self._source(queue, lane, kind)
                source.serve([kind] if kind else [name for name in lane.kinds if name not in limited], paused)
                found = (self.permits.for_claims(queue, kind), self.permits.for_claims(queue, None))
                source.permits = tuple(dict.fromkeys(permit for permit in found if permit is not None))
                sources.append(source)
        self.sources = sources
        self._split_sources()

    def _split_sources(self) -> None:
        """Serve all shards of the queues that are split."""
        for source in self.sources:
            source.split(self._shards.get(source.queue, ()))

    def _source(self, queue: str, lane: Lane, kind: str | None) -> Source:
        known = (s for s in self.sources if (s.queue, s.lane, s.limited_kind) == (queue, lane, kind))
        return next(known, None) or Source(queue, lane, kind)

    def claim_from(self, source: Source) -> int:
        """Claim what is ready of one source; return how many. Batches with and without a key come first in turn."""
        if source.permits and not self._may_claim(source):
            return 0
        if not source.has_keys:
            claimed = self._claim_keyless(source, 0)
            return claimed + (self._claim_keyed(source, claimed) if source.has_keys else 0)
        source.is_keyed_first = not source.is_keyed_first
        if source.is_keyed_first:
            claimed = self._claim_keyed(source, 0)
            return claimed + self._claim_keyless(source, claimed)
        claimed = self._claim_keyless(source, 0)
        return claimed + self._claim_keyed(source, claimed)

    def _may_claim(self, source: Source) -> bool:
        """Return whether there are permits. If something is ready and there are none, ask for a share of the limits."""
        if all(permit.has_room() for permit in source.permits):
            return True
        now = time.monotonic()
        if now - source.asked_at >= _ASK_AGAIN_SECONDS:
            source.asked_at = now
            source.is_held_back = source.has_keys or bool(self._look(source)) or source.has_keys
            if source.is_held_back and not self.steer():
                unreserve(source.permits, reserve(source.permits, self._room(source, 0)))  # notes what is wanted
                self.permits.refresh(self.link, _ASK_AGAIN_SECONDS / 2)
        self._looks_again = self._looks_again or source.is_held_back
        return all(permit.has_room() for permit in source.permits)

    # ------------------------------------------------------------------------------------- batches with a key, without

    def _claim_keyed(self, source: Source, claimed: int) -> int:
        """Claim ready batches with a key; return how many."""
        count = 0
        if self.steer():  # the sources may be others now
            self._looks_again = True
            return 0
        for _ in range(_MOST_RANGES + max(0, sum(shard.ring.has_keys for shard in source.shards) - 1)):
            room = self._room(source, claimed + count)
            if room <= 0 or self.lifecycle.stopping.is_set():
                break
            rows = self._claim_range(source.shard_of_ring(), room)
            if rows is None and len(source.shards) == 1:
                break
            count += len(rows or ())
        return count

    def _claim_range(self, shard: Source, room: int) -> list[ClaimedRow] | None:
        """Claim from the keys that come next; None if none of the shard is due."""
        rows = self._claim(shard, room, lambda claim, room: self._keyed.claim(shard, claim, room))
        if rows is None or shard.ring.is_at_start:
            shard.whole.leave_ring()
        return rows

    def _claim_keyless(self, source: Source, claimed: int) -> int:
        """Claim ready batches without a key, the most urgent priority first; return how many."""
        before = claimed
        claimed += sum(self._sweep(shard) for shard in source.shards)
        ready = self._look(source)
        if ready and self.steer():
            ready = self._look(source) if source.kinds else []
        for shard, priority, start in ready:
            room = self._room(source, claimed)
            if room <= 0 or self.lifecycle.stopping.is_set():
                break
            rows = self.claim(shard, priority, room, start, END)
            is_full = len(rows) == room
            shard.tracks[priority].claimed(rows, start, is_full=is_full)
            source.was_claimed(shard, priority, is_full)
            claimed += len(rows)
            if is_full:  # there may be more of this priority: a slot that is free by now is for those
                break
        return claimed - before

    def _sweep(self, source: Source) -> int:
        """Claim ready batches before a position, in the part that is due, if any; return how many."""
        if (priority := source.due_part()) is None:
            return 0
        track = source.tracks[priority]
        number, after, until = track.next_part()
        began_at = time.monotonic()
        found = self.link.probe(probes.ready_between(source.queue, priority, source.kinds, after, until))
        track.was_swept(source.cost(time.monotonic() - began_at), source.busy_priority is not None, number)
        room = self._room(source, 0)
        if not found or room <= 0 or self.steer():  # after a change of pauses or limits, the next sweep claims
            return 0
        rows = self.claim(source, priority, room, after, until)
        if len(rows) == room:
            track.sweep_again()
        return len(rows)

    def _room(self, source: Source, claimed: int) -> int:
        lane, permits = source.lane, source.whole.permits
        room = lane.room() if claimed == 0 else lane.wanted() - lane.occupied
        if any(permit.limit.max_running is not None for permit in permits):
            room = min(room, max(1, lane.free_slots()))  # a batch that waits here keeps others from running elsewhere
        return min(room, int(_MOST_A_CLAIM * lane.prefetch.limit_factor))

    # ----------------------------------------------------------------------------------------------------- probes

    def _look(self, source: Source) -> Ready:
        """Return what is ready in the shards of a source, the most urgent first."""
        if len(source.shards) > 1:
            return self._shard_looks.ready(source, self._from_start)
        return [(source, priority, start) for priority, start in self.probe(source)]

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
        began_at, looks, after = time.monotonic(), source.ring.is_look_due(), self.context.flows.start()
        with self.link.reading() as conn:
            look = probes.has_ready(conn, source.queue, priority, source.kinds, start, looks, after)
        took_seconds = time.monotonic() - began_at
        if looks:
            source.ring.looked(look.has_keys, source.cost(took_seconds))
        self._follow_flows(look.has_events, after, source.cost(took_seconds))
        return [priority] if look.is_ready else []

    def _follow_flows(self, has_events: bool, after: int, took_seconds: float) -> None:
        """Let go on what waited for others, if anything has ended since."""
        if not has_events:
            self.context.flows.looked(after, took_seconds)
            return
        self._looks_again = True  # also if others are following them at this moment
        if self.context.flows.follow(self.link):
            self.lifecycle.wake.set()  # for another round

    def _discover_priorities(self, source: Source) -> None:
        if not source.tracks:
            self._take_positions(source)
        began_at = time.monotonic()
        looks = source.ring.is_look_due() and len(source.tracks) != 1  # with one, each probe looks
        after = self.context.flows.start()
        [(is_unknown, has_keys, has_events)] = self.link.probe(
            probes.discovery(source.queue, source.tracks, looks, after)
        )
        took_seconds = source.cost(time.monotonic() - began_at)
        if looks:
            source.ring.looked(has_keys, took_seconds)
        self._follow_flows(has_events, after, took_seconds)
        if is_unknown:
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

        def run(claim: Claim, room: int) -> list[ClaimedRow]:
            statement = claims.claim(
                source.queue, priority, source.kinds, room, self.context.worker_id, claim.token,
                claim.runtime.lease_seconds, after, until, self.skipped.ids(), claim.runtime.layout.is_distributed,
            )  # fmt: skip
            return sorted(map(ClaimedRow._make, self._run_claim(statement)), key=_IN_ORDER)

        return self._claim(source, room, run) or []

    def _claim(
        self, source: Source, room: int, run: Callable[[Claim, int], list[ClaimedRow] | None]
    ) -> list[ClaimedRow] | None:
        """Claim by *run* what there are permits for, up to *room*, and give it to the lane."""
        permits = source.whole.permits
        claim = Claim(
            source.queue, uuid.uuid4(), self.context.runtime, time.monotonic(), permits, whole_queue=source.whole.queue
        )
        if permits:
            claim.reserved = room = reserve(permits, room)
            self._looks_again = self._looks_again or not room
        rows: list[ClaimedRow] | None = None
        if room > 0:
            try:
                rows = run(claim, room)
            except OutcomeUnknown:
                self.unknown.append(claim)
                raise
            except BaseException:
                unreserve(claim.permits, claim.reserved)
                raise
        claim.arrived_at = time.monotonic()
        if claim.permits:
            unreserve(claim.permits, claim.reserved - len(rows or ()))
        if rows:
            source.lane.take([ClaimedBatch(row, claim) for row in rows])
        return rows

    def _run_claim(self, statement: Statement) -> list[Any]:
        """Claim without payloads if the server cannot send one as UTF-8: only the batch that fetches it then fails."""
        try:
            return self.link.run(statement, SETTINGS)
        except claims.UNREADABLE:
            return self.link.run(claims.without_inputs(statement), SETTINGS)
