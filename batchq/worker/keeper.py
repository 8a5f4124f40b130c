"""The keeper: one thread for the process keeps leases, watches time limits, rescues, shows life and tidies up.

It has its own thread and its own connection, so handlers that block stop none of it.
"""

import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import psycopg

from batchq.batch.claimed import ClaimedBatch
from batchq.common.log import current_batch, get_logger
from batchq.common.text import one_line
from batchq.postgres.link import Link
from batchq.postgres.statements import leases as lease_statements
from batchq.postgres.statements import maintenance, session, workers
from batchq.postgres.statements.workers import WorkerRow
from batchq.worker.claimer import Claimer, Turns
from batchq.worker.execution import WRITTEN, failed_attempt, safely, timed_out
from batchq.worker.lanes import Lane
from batchq.worker.outage import Halving, Outage, Skipped, is_about_rows
from batchq.worker.survey import SURVEY_SECONDS, Survey
from batchq.worker.throughput import Throughput

RESCUES_A_ROUND = 1000
HEARTBEAT_SECONDS = 5.0
MAINTENANCE_SECONDS = 3600.0
PRUNING_SECONDS = 1.0
THROUGHPUT_SECONDS = 1.0
MERGING_SECONDS = 60.0
PAUSE_FACTOR = 20
LONG_AGO_SECONDS = 600.0
WAITING_SECONDS = 1.0
PARTITIONS_AHEAD_DAYS = 8

log = get_logger()


class Keeper:
    """Does each duty when it is due.

    *told_seconds*: how long a handler may take to end once it is told to; then its slot counts as lost. *worn_out* is
    called when half of a lane's slots are lost. *unwritten* returns what has ended and waits to be written.
    """

    def __init__(
        self,
        link: Link,
        queues: Sequence[str],
        lanes: Sequence[Lane],
        row: WorkerRow,
        lease_seconds: float,
        keep_finished_days: int,
        claimer: Claimer,
        throughput: Throughput,
        told_seconds: float = 25,
        worn_out: Callable[[], None] = lambda: None,
        unwritten: Callable[[], list[ClaimedBatch]] = list,
    ) -> None:
        self.link = link
        self.queues = queues
        self.lanes = lanes
        self.row = row
        self.lease_seconds = lease_seconds
        self.keep_finished_days = keep_finished_days
        self.claimer = claimer
        self.throughput = throughput
        self.told_seconds = told_seconds
        self.worn_out = worn_out
        self.unwritten = unwritten
        self.has_more_to_prune = False
        self.lost = dict.fromkeys(lanes, 0)
        self.survey = Survey(link, queues, lease_seconds)
        self.expiries = {queue: Expiries() for queue in queues}
        self.closing = threading.Event()
        self.beat_at = time.monotonic()  # when a heartbeat was written
        self.tick_seconds = min(lease_seconds / 10, 0.5)
        self.duties = self.all_duties()

    def all_duties(self) -> list["Duty"]:
        """Return what is to be done, and how often."""
        every: list[tuple[str, Callable[[], bool | None], float]] = [
            ("time limits", self.end_overdue, self.tick_seconds),
            ("waiting batches", self.give_back_waiting, self.tick_seconds),
            ("lost slots", self.look_for_lost_slots, self.tick_seconds),
            ("leases", self.extend, self.tick_seconds),
            ("rescue", self.rescue, self.lease_seconds / 10),
            ("heartbeat", self.heartbeat, min(HEARTBEAT_SECONDS, self.lease_seconds)),
            ("throughput", self.write_throughput, THROUGHPUT_SECONDS),
            ("survey", lambda: self.survey.run_if_due(self.claimer.known_priorities()), SURVEY_SECONDS),
            ("merging", self.merge_throughput, MERGING_SECONDS),
            ("maintenance", self.maintain, MAINTENANCE_SECONDS),
            ("pruning", self.prune_more, PRUNING_SECONDS),
        ]
        return [Duty(name, do, every_seconds, self.link) for name, do, every_seconds in every]

    def run(self) -> None:
        """Do the duties until closed; one that fails does not keep the others from being done.

        But while no connection can be had, those that come after it need not try.
        """
        while not self.closing.wait(self.tick_seconds):
            for duty in self.duties:
                pause_seconds = duty.do_if_due()
                if pause_seconds and self.link.conn is None:
                    self.closing.wait(pause_seconds)
                    break

    def close(self) -> None:
        """Let `run` end."""
        self.closing.set()

    # ------------------------------------------------------------------------------------------------ the duties

    def extend(self) -> None:
        """Extend the leases that are older than a third of their time, of what has ended and waits to be written, too:
        if somebody rescued that, it would be worked again."""
        before = time.monotonic() - self.lease_seconds / 3
        old: dict[str, list[tuple[Lane | None, ClaimedBatch]]] = defaultdict(list)
        for batch in self.unwritten():
            if batch.leased_at < before:
                old[batch.queue].append((None, batch))
        for lane in self.lanes:
            for batch in lane.list_in_flight():
                if batch.leased_at < before:
                    old[batch.queue].append((lane, batch))
        for queue, held in old.items():
            self.extend_queue(queue, held)

    def extend_queue(self, queue: str, held: Sequence[tuple[Lane | None, ClaimedBatch]]) -> None:
        """Extend leases of one queue. A row that the database refuses to change does not keep the others from being
        extended; it comes again when another third of the time is gone."""
        halving = Halving(partial(self.extend_together, queue))
        halving.attempt(held)
        refused = [batch for _, batch in halving.refused]
        for batch in refused:
            batch.leased_at = time.monotonic()
        halving.report("lease extension", [batch.id for batch in refused])

    def extend_together(self, queue: str, held: Sequence[tuple[Lane | None, ClaimedBatch]]) -> None:
        """Extend leases of one queue in one statement; stop what is no longer ours, if it is in a lane's hand."""
        now = time.monotonic()
        batches = [batch for _, batch in held]
        statement = lease_statements.extend(
            queue, [b.id for b in batches], [b.claim.token for b in batches], self.lease_seconds
        )
        leases = lease_statements.leases(self.link.run(statement))
        for lane, batch in held:
            key = (batch.id, batch.claim.token)
            if key in leases.extended:
                batch.leased_at = max(batch.leased_at, now)
            elif key in leases.lost and lane is not None:
                self.lose(lane, batch)

    def lose(self, lane: Lane, batch: ClaimedBatch) -> None:
        """Stop a batch that somebody else has rescued, cancelled or finished, if it is not just ending here."""
        if batch.may_be_ending:
            return
        batch.lose()
        if lane.end_from_outside(batch, WRITTEN):
            log.warning("lease lost", error="LeaseLost", batch_id=batch.id, kind=batch.kind, attempt=batch.attempt)

    def give_back_waiting(self) -> None:
        """Give back what has waited in this process for long: another worker may be idle."""
        for lane in self.lanes:
            lane.release_waiting(WAITING_SECONDS)

    def end_overdue(self) -> None:
        """End the attempts that run for longer than their limit."""
        now = time.monotonic()
        for lane in self.lanes:
            for batch in lane.list_in_flight():
                limit = batch.row.timeout_seconds or lane.handlers[batch.kind].timeout_seconds
                if limit is not None and batch.begun_at is not None and now - batch.begun_at > limit:
                    self.end_attempt(lane, batch, limit)

    def end_attempt(self, lane: Lane, batch: ClaimedBatch, limit: float) -> None:
        """End an attempt as failed; its handler is told at its next checkpoint, or cancelled."""
        error = timed_out(batch, limit)
        current_batch.set(batch)
        lane.end_from_outside(batch, safely(failed_attempt, batch, lane.handlers[batch.kind], error), error)
        current_batch.set(None)

    def look_for_lost_slots(self) -> None:
        """Tell of slots whose handlers were told to end and do not; have the process replaced before it runs dry."""
        for lane in self.lanes:
            lost = lane.lost_slots(self.told_seconds)
            if lost > self.lost[lane]:
                log.warning("slots lost to handlers that do not end", lost=lost, slots=lane.concurrency)
            self.lost[lane] = lost
            if 2 * lost >= lane.concurrency:
                self.worn_out()

    def rescue(self) -> bool:
        """Take back batches whose lease ran out, of any worker, for a tick at most: then leases are extended first.
        Return whether there may be more."""
        until = time.monotonic() + self.tick_seconds
        is_more = False
        for queue, expiries in self.expiries.items():
            while (is_full := self.rescue_some(queue, expiries)) and time.monotonic() < until:
                pass
            is_more = is_more or is_full
        return is_more

    def rescue_some(self, queue: str, expiries: "Expiries") -> bool:
        """Take back up to 1,000 batches of one queue; return whether there may be more."""
        rescued: list[tuple[int, str, int, str]] = []
        is_full = False
        with expiries.passing() as after:
            [(now, start, is_any)] = self.link.probe(lease_statements.lease_probe(queue, after))
            try:
                rescued = self.take_back(queue, start, expiries.skipped) if is_any else []
                is_full = len(rescued) == RESCUES_A_ROUND
            finally:
                if not is_full:
                    expiries.skip_to(now - LONG_AGO_SECONDS)
        if not is_full:
            expiries.passed_until = now
        for batch_id, kind, attempt, status in rescued:
            log.warning("batch rescued", batch_id=batch_id, kind=kind, attempt=attempt, status=status)
        return is_full

    def take_back(self, queue: str, after: float, skipped: Skipped) -> list[tuple[int, str, int, str]]:
        """Take back up to 1,000 batches of one queue whose lease ran out after *after*; return them, as `rescue`
        does. A row that the database refuses to change does not keep the others from being taken back."""
        spread_seconds = self.lease_seconds / 2
        try:
            with self.link.transaction(session.FORCE_INDEX_AND_HASH_JOIN) as conn:
                return lease_statements.rescue(conn, queue, RESCUES_A_ROUND, spread_seconds, after, skipped.ids())
        except psycopg.Error as error:
            if not is_about_rows(error):
                raise
        rescued: list[tuple[int, str, int, str]] = []

        def take_back_part(ids: Sequence[int]) -> None:
            with self.link.transaction(session.FORCE_INDEX_AND_HASH_JOIN) as conn:
                rescued.extend(lease_statements.rescue(conn, queue, len(ids), spread_seconds, after, only=ids))

        rows = self.link.probe(lease_statements.expired(queue, RESCUES_A_ROUND, after, skipped.ids()))
        ids = [batch_id for (batch_id,) in rows]
        halving = Halving(take_back_part)
        halving.halve(ids)
        skipped.add(halving.refused)
        halving.report("rescue", halving.refused)
        return rescued

    def heartbeat(self) -> None:
        """Show a sign of life, and tell the claimer when it is its turn to poll, or that it is asked to drain."""
        in_hand = sum(lane.unwritten for lane in self.lanes)
        stopping = self.claimer.runtime.stopping.is_set() or self.claimer.draining.is_set()
        lost_slots = sum(self.lost.values())
        statement = workers.heartbeat(self.row, in_hand, stopping, lost_slots, 3 * HEARTBEAT_SECONDS)
        began_at = time.monotonic()
        [row] = self.link.run(statement, workers.HEARTBEAT_SETTINGS)
        beat = workers.beat(row)
        self.beat_at = time.monotonic()
        self.claimer.turns = Turns(beat.turn, (began_at + time.monotonic()) / 2)
        self.survey.dead_rows = beat.dead_rows
        if beat.is_asked_to_drain:
            self.claimer.drain()

    def write_throughput(self) -> None:
        """Write what was counted, the progress of what runs included."""
        for lane in self.lanes:
            for batch in lane.list_in_flight():
                if batch.items_total is not None and batch.begun_at is not None:
                    self.throughput.progress(batch, batch.items_done + batch.items_failed)
        self.throughput.write(self.link, self.row.id)

    def merge_throughput(self) -> None:
        """Merge what all workers have counted in the minutes that are over; forget those that are long silent."""
        with self.link.transaction() as conn:
            maintenance.merge_throughput(conn)
        with self.link.transaction() as conn:
            workers.forget_silent_workers(conn)

    def maintain(self) -> None:
        """Create the partitions of the next days, drop those that are too old, unless another worker is at it.

        What is refused waits for the next time: when a lock is not free at once, when the schema belongs to another
        role, when a view needs a partition.
        """
        try:
            with self.link.transaction() as conn:
                if not maintenance.take_maintenance(conn):
                    return
                maintenance.create_finished_partitions(conn, PARTITIONS_AHEAD_DAYS)
            self.prune()
            with self.link.transaction() as conn:
                maintenance.prune_records(conn)
        except psycopg.Error as error:
            if self.link.conn is None:  # lost: done again when the database is back
                raise
            log.warning("maintenance put off", error=one_line(error))

    def prune(self) -> None:
        """Drop the oldest partitions that are too old, a few: more at once would take too many locks."""
        self.has_more_to_prune = False
        with self.link.transaction() as conn:
            dropped = maintenance.prune(conn, self.keep_finished_days) if maintenance.take_maintenance(conn) else 0
        if dropped:
            log.info("pruned", partitions=dropped, older_than_days=self.keep_finished_days)
        self.has_more_to_prune = dropped > 0

    def prune_more(self) -> None:
        """Drop some more, where the last time left some: one step at a time, so that leases are extended in between."""
        if self.has_more_to_prune:
            self.prune()


class Expiries:
    """Until when leases that ran out were looked for; from there the next look goes on.

    From the beginning too, for one that was locked then, but only so often that it takes a twentieth of the time: while
    a snapshot is held, every lease that was ever given is in the way.
    """

    def __init__(self) -> None:
        self.skipped = Skipped()
        self.passed_until = float("-inf")
        self.whole_at = 0.0

    def skip_to(self, time_passed: float) -> None:
        """Let looks that are not from the beginning start there at the earliest: one from the beginning may not end."""
        self.passed_until = max(self.passed_until, time_passed)

    @contextmanager
    def passing(self) -> Iterator[float]:
        """Give the time to look from, for the block, which looks."""
        began_at = time.monotonic()
        is_whole = began_at >= self.whole_at
        try:
            yield float("-inf") if is_whole else self.passed_until
        finally:
            if is_whole:
                self.whole_at = began_at + PAUSE_FACTOR * (time.monotonic() - began_at)


class Duty:
    """Something to do every so often, with jitter; soon again if it failed, at the next tick if it returns True."""

    def __init__(self, name: str, do: Callable[[], bool | None], every_seconds: float, link: Link) -> None:
        self.do = do
        self.every_seconds = every_seconds
        self.due_at = time.monotonic()
        self.outage = Outage("keeper", link, duty=name)

    def do_if_due(self) -> float:
        """Do it if it is due. Returns 0, or how long to wait if it failed; raises nothing."""
        if time.monotonic() < self.due_at:
            return 0
        try:
            is_more = self.do()
            self.outage.over()
            pause_seconds = 0.0
            jitter = random.uniform(0.75, 1.0)  # noqa: S311 (spreads load; not a secret)
            wait_seconds = 0.0 if is_more else self.every_seconds * jitter
        except Exception as error:
            wait_seconds = pause_seconds = self.outage.failed(error)
        self.due_at = time.monotonic() + wait_seconds
        return pause_seconds
