"""The survey: where reading the live table begins while dead rows fill its indexes; see batchq.positions."""

import time
from collections.abc import Sequence

from batchq.postgres.link import Link
from batchq.postgres.statements import probes, session

SURVEY_SECONDS = 1.0
PAUSE_FACTOR = 10
MANY_DEAD_ROWS = 20_000


class Survey:
    """Moves batchq.positions, for all workers, while the live table has many dead rows.

    Each survey reads the entries that died since the last one, so it takes at most a tenth of one connection's time.
    *dead_rows*: as the last heartbeat returned it.
    """

    def __init__(self, link: Link, queues: Sequence[str], lease_seconds: float) -> None:
        self.link = link
        self.queues = queues
        self.lease_seconds = lease_seconds
        self.dead_rows = 0
        self.due_at = 0.0
        self.took_seconds = 0.0

    def run_if_due(self, priorities: Sequence[int]) -> None:
        """Move the positions of these priorities, and of all others that need one."""
        began_at = time.monotonic()
        if self.dead_rows < MANY_DEAD_ROWS or began_at < self.due_at:
            return
        try:
            with self.link.transaction(session.FORCE_INDEX) as conn:
                probes.move_positions(conn, self.queues, priorities, self.lease_seconds)
        finally:
            self.took_seconds = time.monotonic() - began_at
            self.due_at = time.monotonic() + PAUSE_FACTOR * self.took_seconds
