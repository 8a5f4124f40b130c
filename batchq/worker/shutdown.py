"""How a worker ends, step by step: in the order in which nothing is lost, and within a known time."""

import time
from dataclasses import dataclass

from batchq.common.log import get_logger
from batchq.common.text import one_line
from batchq.errors import StopRequested
from batchq.postgres.statements import workers
from batchq.worker.claimer import Claimer
from batchq.worker.context import Context
from batchq.worker.execution import RELEASED
from batchq.worker.finisher import Finisher
from batchq.worker.hooks import LEAST_SECONDS
from batchq.worker.lifecycle import Services
from batchq.worker.refused import MOST_LOGGED

_WRITING_SECONDS = 2.0

_log = get_logger()


@dataclass(frozen=True)
class Shutdown:
    """The steps. Times count from when the stop was asked for: the claimer may have waited long since."""

    context: Context
    services: Services
    claimer: Claimer
    finisher: Finisher

    def release_claims(self) -> None:
        """Release what is claimed and has not begun, also of a claim whose outcome is unknown."""
        for lane in self.context.lanes:
            lane.release_waiting(0)
        try:
            self.claimer.release_unknown()
        except Exception as error:  # its lease expires
            _log.warning("claim not released", error=one_line(error))

    def wait_for_handlers(self) -> None:
        """Wait until all handlers have finished, `shutdown_seconds` at most; not at all when leaving."""
        until = self._handlers_until()
        while any(lane.in_flight for lane in self.context.lanes) and time.monotonic() < until:
            if self.context.lifecycle.leaving.wait(0.02):
                return

    def release_running(self) -> None:
        """Release what still runs. A handler receives `StopRequested` at its next checkpoint."""
        for lane in self.context.lanes:
            for batch in lane.list_in_flight():
                batch.interrupt = StopRequested(f"the worker has stopped: batch {batch.id} was released")
                if lane.end_from_outside(batch, RELEASED):
                    _log.info("batch released while running", batch_id=batch.id, kind=batch.kind)

    def finish_writing(self) -> bool:
        """Wait until every outcome is written; return False if the database did not allow it.

        At most 2 s longer than the handlers' time: the platform is about to kill the process.
        """
        now = time.monotonic()
        last = now if self.context.lifecycle.leaving.is_set() else max(now, self._handlers_until())
        until = min(now + self.context.settings.database_timeout_seconds, last + _WRITING_SECONDS)
        while any(lane.unwritten for lane in self.context.lanes) and time.monotonic() < until:
            time.sleep(0.01)  # an outcome may still be on its way to the finisher
        self.finisher.close()
        if self.services.has_ended("finisher", until - time.monotonic()):
            return True
        self.finisher.give_up.set()
        left = [batch.id for batch in self.finisher.unwritten()]
        _log.error("outcomes not written", count=len(left), batch_ids=left[:MOST_LOGGED])
        return False

    def remove_row(self) -> None:
        """Write the last counts, and remove this worker's row of batchq.workers, if the database answers."""
        link, worker_id = self.claimer.link, self.context.worker_id
        try:
            self.finisher.throughput.write(link, worker_id)
            with link.transaction() as conn:
                workers.forget_worker(conn, worker_id)
            self.context.permits.give_up(link)
        except Exception:
            _log.info("worker row not removed", worker=worker_id)

    def seconds_left(self) -> float:
        """Return how long hooks may take at the end: what is left of the handlers' time, but half a second at least."""
        is_leaving = self.context.lifecycle.leaving.is_set()
        return max(LEAST_SECONDS, 0.0 if is_leaving else self._handlers_until() - time.monotonic())

    def _handlers_until(self) -> float:
        return self.context.lifecycle.stopping_since + self.context.settings.shutdown_seconds
