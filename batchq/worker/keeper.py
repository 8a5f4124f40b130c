"""The keeper: one thread for the process keeps this worker's claims, watches timeouts, rescues, sends the heartbeat.

Neither handlers nor housekeeping (housekeeper.py) can delay a lease renewal: they run in other threads, on other
connections.
"""

import os
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

from batchq.batch.claimed import ClaimedBatch
from batchq.common.log import current_batch, get_logger
from batchq.common.version import __version__
from batchq.postgres.statements import leases as lease_statements
from batchq.postgres.statements import workers
from batchq.postgres.statements.workers import WorkerRow
from batchq.worker.context import Context
from batchq.worker.duties import Do, DutyLoop, tick_of
from batchq.worker.execution import WRITTEN, failed_attempt, safely, timed_out
from batchq.worker.failures import Failed
from batchq.worker.lanes import Lane
from batchq.worker.lifecycle import StopReason
from batchq.worker.refused import Halving
from batchq.worker.rescue import Rescuer

HEARTBEAT_SECONDS = 5.0
WAITING_SECONDS = 1.0
_LIMITS_SECONDS = 1.0  # between two reads while no limit is set
_LEAST_LOST_SECONDS = 1.0

_log = get_logger()
_Held = Sequence[tuple[Lane | None, ClaimedBatch]]  # without a lane: its handler has finished


class Keeper(DutyLoop):
    """Runs the duties on which leases and timeouts depend. *unwritten*: batches that wait for their outcome's write.
    *on_failed*: called with each batch that fails because its lease has expired.

    When a renewal is due, two thirds of the lease are left, and a statement may take a sixth (or 1 s, if that is more).
    """

    def __init__(
        self,
        context: Context,
        unwritten: Callable[[], list[ClaimedBatch]],
        on_failed: Callable[[Failed], None] | None = None,
    ) -> None:
        settings = context.settings
        tick_seconds = tick_of(settings.lease_seconds)
        link = context.new_link(max(1.0, min(settings.database_timeout_seconds, settings.lease_seconds / 6)))
        self.context = context
        self.row = _worker_row(context)
        self.lost_slots = dict.fromkeys(context.lanes, 0)
        self.beat_at = time.monotonic()  # when the last heartbeat was written
        self.rescuer = Rescuer(link, settings.queues, settings.lease_seconds, tick_seconds, on_failed)
        self._unwritten = unwritten
        self._lease_seconds = settings.lease_seconds
        duties: list[tuple[str, float, Do]] = [
            ("timeouts", tick_seconds, self._end_overdue),
            ("waiting batches", tick_seconds, self._release_waiting),
            ("lost slots", tick_seconds, self._count_lost_slots),
            ("limits", 0.0, self.follow_limits),
            ("leases", tick_seconds, self.renew_leases),
            ("rescue", settings.lease_seconds / 10, self.rescuer.rescue),
            ("heartbeat", min(HEARTBEAT_SECONDS, settings.lease_seconds), self.send_heartbeat),
        ]
        super().__init__("keeper", link, tick_seconds, duties)

    # ------------------------------------------------------------------------------------------------------ limits

    def follow_limits(self) -> None:
        """While batches run, read limits and throttles; refresh the shares of limits that are in use. At each tick."""
        permits = self.context.permits
        permits.throttles.write(self.link)
        age_seconds = time.monotonic() - permits.read_at
        is_busy = any(lane.in_flight for lane in self.context.lanes)
        if is_busy and age_seconds >= (self.tick_seconds if permits.permits else _LIMITS_SECONDS):
            permits.read(self.link)
            self.context.heed_throttles()
        if permits.permits:
            permits.refresh(self.link, self.tick_seconds / 2)

    # ---------------------------------------------------------------------------------------------- lease renewal

    def renew_leases(self) -> None:
        """Renew the leases that have a third of their time behind them.

        Also of batches whose outcome waits to be written: if another worker rescued one, it would run again.
        """
        before = time.monotonic() - self._lease_seconds / 3
        old: dict[str, list[tuple[Lane | None, ClaimedBatch]]] = defaultdict(list)
        for batch in self._unwritten():
            if batch.leased_at < before:
                old[batch.queue].append((None, batch))
        for lane in self.context.lanes:
            for batch in lane.list_in_flight():
                if batch.leased_at < before:
                    old[batch.queue].append((lane, batch))
        for queue, held in old.items():
            self._renew_queue(queue, held)

    def _renew_queue(self, queue: str, held: _Held) -> None:
        """Renew leases of one queue. One that the database refuses is tried again after another third of its time."""
        halving = Halving(partial(self._renew_together, queue))
        halving.attempt(held)
        refused = [batch for _, batch in halving.refused]
        for batch in refused:
            batch.leased_at = time.monotonic()
        halving.report("lease extension", [batch.id for batch in refused])

    def _renew_together(self, queue: str, held: _Held) -> None:
        now = time.monotonic()
        ids, tokens = [batch.id for _, batch in held], [batch.claim.token for _, batch in held]
        statement = lease_statements.extend(queue, ids, tokens, self._lease_seconds)
        leases = lease_statements.leases(self.link.run(statement))
        for lane, batch in held:
            key = (batch.id, batch.claim.token)
            if key in leases.extended:
                batch.leased_at = max(batch.leased_at, now)
            elif key in leases.lost and lane is not None and not batch.may_be_ending:
                _interrupt(lane, batch)

    # --------------------------------------------------------------------------------------------------- handlers

    def _end_overdue(self) -> None:
        now = time.monotonic()
        for lane in self.context.lanes:
            for batch in lane.list_in_flight():
                timeout = batch.row.timeout_seconds or lane.handlers[batch.kind].timeout_seconds
                if timeout is not None and batch.begun_at is not None and now - batch.begun_at > timeout:
                    _time_out(lane, batch, timeout)

    def _release_waiting(self) -> None:
        """Release batches that have waited in this process for a second: another worker may be idle."""
        for lane in self.context.lanes:
            lane.release_waiting(WAITING_SECONDS)

    def _count_lost_slots(self) -> None:
        """Log newly lost slots; stop the worker, so that it is replaced, once half of a lane's slots are lost."""
        for lane in self.context.lanes:
            lost_slots = lane.lost_slots(max(self.context.settings.shutdown_seconds, _LEAST_LOST_SECONDS))
            if lost_slots > self.lost_slots[lane]:
                _log.warning("slots lost", lost_slots=lost_slots, slots=lane.concurrency)
            self.lost_slots[lane] = lost_slots
            if 2 * lost_slots >= lane.concurrency and not self.context.lifecycle.stopping.is_set():
                _log.error("worker stopping", reason="lost slots", worker=self.row.id)
                self.context.lifecycle.stop(StopReason.SLOTS_LOST)

    # -------------------------------------------------------------------------------------------------- heartbeat

    def send_heartbeat(self) -> None:
        """Write this worker's row; take from the answer its turn to poll, and whether it is asked to drain."""
        lifecycle = self.context.lifecycle
        claimed = sum(lane.unwritten for lane in self.context.lanes)
        ends = lifecycle.stopping.is_set() or lifecycle.draining.is_set()
        lost_slots = sum(self.lost_slots.values())
        statement = workers.heartbeat(self.row, claimed, ends, lost_slots, 3 * HEARTBEAT_SECONDS)
        began_at = time.monotonic()
        [row] = self.link.run(statement, workers.HEARTBEAT_SETTINGS)
        beat = workers.beat(row)
        self.beat_at = time.monotonic()
        self.context.set_turn(beat.turn, (began_at + self.beat_at) / 2)
        self.context.dead_rows = beat.dead_rows
        self.context.set_shards(beat.shards)
        self.rescuer.serve(self.context.stored_queues)
        if beat.is_asked_to_drain and not lifecycle.draining.is_set():
            _log.info("drain requested", worker=self.row.id)
            lifecycle.drain()


def _interrupt(lane: Lane, batch: ClaimedBatch) -> None:
    batch.lose()  # it was rescued, cancelled or finished elsewhere
    if lane.end_from_outside(batch, WRITTEN):
        _log.warning("lease lost", error="LeaseLost", batch_id=batch.id, kind=batch.kind, attempt=batch.attempt)


def _time_out(lane: Lane, batch: ClaimedBatch, timeout: float) -> None:
    """End an attempt as failed. A `def` handler gets `TimedOut` at its next checkpoint; an async task is cancelled."""
    error = timed_out(batch, timeout)
    current_batch.set(batch)
    lane.end_from_outside(batch, safely(failed_attempt, batch, lane.handlers[batch.kind], error), error)
    current_batch.set(None)


def _worker_row(context: Context) -> WorkerRow:
    return WorkerRow(
        context.worker_id,
        socket.gethostname(),
        os.getpid(),
        __version__,
        list(context.settings.queues),
        sorted({kind for lane in context.lanes for kind in lane.kinds}),
        sum(lane.concurrency for lane in context.lanes),
        [schedule["name"] for schedule in context.schedules or ()],
    )
