"""The login backoff of the web UI: wrong passwords and tokens are counted and throttled; right ones never are."""

import time

from batchq.common.hosts import Seldom, group_of
from batchq.common.log import get_logger

_FREE_FAILURES = 3
_FREE_FAILURES_OF_ALL = 30
_SECONDS_PER_FAILURE_OF_ALL = 1.0
_LONGEST_WAIT_SECONDS = 60.0
_FORGOTTEN_SECONDS = 600.0
_MOST_ADDRESSES = 10_000

_log = get_logger()


class Throttle:
    """Counts wrong passwords and tokens.

    An address may give three, then one after 1 s, 2 s, and so on up to a minute. All addresses together may give 30,
    then one per second, because an attacker may have many addresses.
    """

    def __init__(self) -> None:
        self.failures: dict[str, tuple[int, float]] = {}  # per client: how many, and when it may give the next
        self._paid_until = 0.0  # of all addresses: each failure moves it by a second
        self._reported = Seldom()

    def failed(self, address: str) -> float:
        """Count a wrong password. Return 0 or, if it came too early and is not counted, the seconds to wait."""
        now, client = time.monotonic(), group_of(address)
        count, free_at = self.failures.get(client, (0, 0.0))
        ahead = self._paid_until - now - (_FREE_FAILURES_OF_ALL - 1) * _SECONDS_PER_FAILURE_OF_ALL
        if (wait := max(free_at - now, ahead)) > 0:
            if self._reported():
                _log.warning("wrong passwords throttled", address=address)
            return wait
        self._paid_until = max(self._paid_until, now) + _SECONDS_PER_FAILURE_OF_ALL
        self._record(client, 1 if now - free_at > _FORGOTTEN_SECONDS else count + 1, now)
        return 0.0

    def _record(self, client: str, count: int, now: float) -> None:
        wait = min(2.0 ** (count - _FREE_FAILURES), _LONGEST_WAIT_SECONDS) if count >= _FREE_FAILURES else 0.0
        self.failures.pop(client, None)
        self.failures[client] = (count, now + wait)
        if len(self.failures) > _MOST_ADDRESSES:
            del self.failures[next(iter(self.failures))]
