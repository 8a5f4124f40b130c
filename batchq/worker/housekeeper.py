"""The housekeeper: one thread for the process counts, fires schedules, and keeps the schema tidy for everybody.

Its connection is its own, so a duty that is slow or waits for a lock delays no lease renewal, rescue or heartbeat.
"""

from collections.abc import Callable

import psycopg

from batchq.common.log import get_logger
from batchq.common.text import one_line
from batchq.postgres.statements import maintenance, workers
from batchq.worker.context import Context
from batchq.worker.duties import Do, DutyLoop, tick_of
from batchq.worker.schedules import Schedules
from batchq.worker.survey import SURVEY_SECONDS, Survey
from batchq.worker.throughput import Throughput

_THROUGHPUT_SECONDS = 1.0
_MERGING_SECONDS = 60.0
_MAINTENANCE_SECONDS = 3600.0
_PRUNING_SECONDS = 1.0
_PARTITIONS_AHEAD_DAYS = 8

_log = get_logger()


class Housekeeper(DutyLoop):
    """Runs the duties that may be late. *known_priorities*: returns the priorities for the survey."""

    def __init__(self, context: Context, throughput: Throughput, known_priorities: Callable[[], list[int]]) -> None:
        link = context.new_link()
        survey = Survey(context, link, known_priorities)
        self._context = context
        self._throughput = throughput
        self._has_more_to_prune = False
        self._schedules = None
        duties: list[tuple[str, float, Do]] = []
        if context.schedules is not None:
            self._schedules = Schedules(context, link, context.schedules, context.lifecycle.wake.set)
            duties.append(("schedules", 0.0, self._schedules.run_if_due))
        duties += [
            ("throughput", _THROUGHPUT_SECONDS, self.write_throughput),
            ("survey", SURVEY_SECONDS, survey.run_if_due),
            ("merging", _MERGING_SECONDS, self._merge_throughput),
            ("maintenance", _MAINTENANCE_SECONDS, self.maintain),
            ("pruning", _PRUNING_SECONDS, self._prune_more),
        ]
        super().__init__("housekeeper", link, tick_of(context.settings.lease_seconds), duties)

    def wait_seconds(self) -> float:
        """Return how long to wait: until the next tick, or until a schedule is due. Not before the end of a pause after
        a failure: the thread would check again and again."""
        if self._schedules is None:
            return self.tick_seconds
        due_seconds = max(self._schedules.wait_seconds(), self.duties["schedules"].wait_seconds())
        return min(due_seconds, self.tick_seconds)

    def write_throughput(self) -> None:
        """Write what was counted since the last time, including the progress of batches that run."""
        for lane in self._context.lanes:
            for batch in lane.list_in_flight():
                if batch.items_total is not None and batch.begun_at is not None:
                    self._throughput.progress(batch, batch.items_done + batch.items_failed)
        self._throughput.write(self.link, self._context.worker_id)

    def _merge_throughput(self) -> None:
        """Merge what all workers have counted in past minutes; forget workers without a heartbeat for an hour."""
        with self.link.transaction() as conn:
            maintenance.merge_throughput(conn)
        with self.link.transaction() as conn:
            workers.forget_silent_workers(conn)

    def maintain(self) -> None:
        """Create the partitions of the next days and drop old ones, unless another worker is doing so.

        A step that is refused (a lock is busy, another role owns the schema, a view needs a partition) is retried at
        the next run.
        """
        try:
            with self.link.transaction() as conn:
                if not maintenance.take_maintenance(conn):
                    return
                maintenance.create_finished_partitions(conn, _PARTITIONS_AHEAD_DAYS)
            self._prune()
            with self.link.transaction() as conn:
                maintenance.prune_records(conn)
                maintenance.prune_needs(conn, self._context.settings.keep_finished_days)
                maintenance.prune_parts(conn, self._context.settings.keep_finished_days)
        except psycopg.Error as error:
            if self.link.conn is None:  # lost: retried when the database is back
                raise
            _log.warning("maintenance postponed", error=one_line(error))

    def _prune(self) -> None:
        """Drop the oldest partitions that are too old, ten at most: more in one transaction would need more locks."""
        days = self._context.settings.keep_finished_days
        self._has_more_to_prune = False
        with self.link.transaction() as conn:
            dropped = maintenance.prune(conn, days) if maintenance.take_maintenance(conn) else 0
        if dropped:
            _log.info("partitions pruned", partitions=dropped, older_than_days=days)
        self._has_more_to_prune = dropped > 0

    def _prune_more(self) -> None:
        if self._has_more_to_prune:
            self._prune()
