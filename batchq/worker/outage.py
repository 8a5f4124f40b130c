"""How a service thread waits, and what it logs, while the database is unavailable."""

import random
import time
from typing import Protocol

from batchq.common.log import get_logger
from batchq.common.text import one_line

_FIRST_SECONDS = 0.05
_MOST_SECONDS = 1.0
_LOG_AGAIN_SECONDS = 60.0

_log = get_logger()


class _Answering(Protocol):
    answers: int  # how often the database has answered on this connection


class Outage:
    """The errors of one service thread, or of one of its duties, from the first failure to the next success.

    *link*: its connection. A success that did not ask the database does not end the outage. Without a link, any does.
    """

    def __init__(self, service: str, link: _Answering | None = None, **labels: str) -> None:
        self.failures = 0
        self._labels = {"service": service, **labels}
        self._link = link
        self._answers = 0  # at the last failure
        self._since = 0.0
        self._logged_at = 0.0

    def failed(self, error: BaseException) -> float:
        """Log the first failure, then one per minute. Return how long to wait: 0.05 s, doubled up to 1 s, jittered."""
        now = time.monotonic()
        if self.failures == 0:
            self._since = now
        if self.failures == 0 or now - self._logged_at > _LOG_AGAIN_SECONDS:
            self._logged_at = now
            _log.warning("database error", **self._labels, error=one_line(error), failures=self.failures + 1)
        self._answers = self._link.answers if self._link else 0
        most = min(_FIRST_SECONDS * 2.0 ** min(self.failures, 10), _MOST_SECONDS)
        self.failures += 1
        return most * random.uniform(0.5, 1.0)  # noqa: S311 (spreads load; not a secret)

    def over(self) -> None:
        """Record a success: it ends the outage if the database has answered since the last failure."""
        if self.failures and (self._link is None or self._link.answers > self._answers):
            _log.info("database recovered", **self._labels, after_seconds=round(time.monotonic() - self._since, 1))
            self.failures = 0
