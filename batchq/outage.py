"""What a service thread does while the database is away: wait longer and longer, and say so once."""

import random
import time

from batchq.log import get_logger
from batchq.text import one_line

FIRST_SECONDS = 0.05
MOST_SECONDS = 1.0
LOG_AGAIN_SECONDS = 60.0

log = get_logger()


class Outage:
    """The troubles of one service thread, or of one of its duties, from the first failure to the next success."""

    def __init__(self, service: str, **labels: str) -> None:
        self.labels = {"service": service, **labels}
        self.failures = 0
        self.since = 0.0
        self.logged_at = 0.0

    def failed(self, error: BaseException) -> float:
        """Log the first failure, and one each minute; return how long to wait: 0.05 s, doubled to 1 s, with jitter."""
        now = time.monotonic()
        if self.failures == 0:
            self.since = now
        if self.failures == 0 or now - self.logged_at > LOG_AGAIN_SECONDS:
            self.logged_at = now
            log.warning("database trouble", **self.labels, error=one_line(error), failures=self.failures + 1)
        most = min(FIRST_SECONDS * 2.0 ** min(self.failures, 10), MOST_SECONDS)
        self.failures += 1
        return most * random.uniform(0.5, 1.0)  # noqa: S311 (spreads load; not a secret)

    def over(self) -> None:
        """Note a success."""
        if self.failures:
            log.info("database is back", **self.labels, after_seconds=round(time.monotonic() - self.since, 1))
            self.failures = 0
