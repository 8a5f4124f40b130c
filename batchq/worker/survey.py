"""The survey: where reading the live table begins while dead rows fill its indexes; see batchq.positions."""

import time
from collections.abc import Callable

from batchq.postgres.link import Link
from batchq.postgres.statements import probes, session
from batchq.worker.context import Context

SURVEY_SECONDS = 1.0
_PAUSE_FACTOR = 10
_MANY_DEAD_ROWS = 20_000


class Survey:
    """Moves batchq.positions, for all workers, while the live table has many dead rows.

    Each survey reads the entries that died since the last one, so it takes at most a tenth of one connection's time.
    """

    def __init__(self, context: Context, link: Link, known_priorities: Callable[[], list[int]]) -> None:
        self._context = context
        self._link = link
        self._known_priorities = known_priorities
        self._due_at = 0.0

    def run_if_due(self) -> None:
        """Move the positions of the known priorities, and of all others that need one."""
        began_at = time.monotonic()
        if self._context.dead_rows < _MANY_DEAD_ROWS or began_at < self._due_at:
            return
        queues, lease_seconds = self._context.stored_queues, self._context.settings.lease_seconds
        try:
            with self._link.transaction(session.FORCE_INDEX) as conn:
                probes.move_positions(conn, queues, self._known_priorities(), lease_seconds)
        finally:
            now = time.monotonic()
            self._due_at = now + _PAUSE_FACTOR * (now - began_at)
