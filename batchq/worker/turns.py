"""When the idle workers of a queue poll: one after the other, by the database's clock."""

import time

from batchq.postgres.statements.workers import Turn

POLLS_A_SECOND = 54  # of all idle workers together
MOST_IDLE_SECONDS = 5.0
LOOK_SECONDS = 1.5  # between two queries for schedules, of all workers together


class Turns:
    """When it is this worker's turn to poll. *known_at*: the monotonic time when the database's clock was *turn.now*.
    *polls_a_second*: of all idle workers together. clock_ahead: what to add to a monotonic time for the database's
    clock, in seconds since 1970; None if it is not known yet.

    So a batch is found within 1/54 s, whatever the number of workers. If each polled at times of its own, there would
    be as many polls, but now and then a gap that is five times as long.
    """

    def __init__(self, turn: Turn, known_at: float, polls_a_second: float = POLLS_A_SECOND) -> None:
        self.number = turn.number
        self.period_seconds = min(max(turn.workers, 1) / polls_a_second, MOST_IDLE_SECONDS)
        share = turn.number / max(turn.workers, 1)
        self.clock_ahead = turn.now - known_at if turn.now else None
        self._turn_at = known_at - turn.now % self.period_seconds + share * self.period_seconds

    def wait_seconds(self) -> float:
        """Return how long it is until the next turn, leaving out one that has just passed or comes immediately."""
        left = (self._turn_at - time.monotonic()) % self.period_seconds
        return left if left > self.period_seconds / 10 else left + self.period_seconds
