"""Backoff after rejected logins, shared by all connections of the process to the same database."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from batchq.common.portable import after_fork_in_child

TURN_SECONDS = 1.0
CIRCUIT_BREAKER = "(ECIRCUITBREAKER)"  # Supavisor blocks the address for 2 min; this passes without a fix
LOGIN_REJECTED = (
    "password authentication failed",
    "no pg_hba.conf entry",
    "(ENOTFOUND)",
    "Tenant or user not found",
    CIRCUIT_BREAKER,
    "(ESSLREQUIRED)",
    "no such database",
    "does not exist",
)


class LoginBackoff:
    """After a rejected login, allow the next one only after 15 s, then 30 s, up to 2 min.

    Supavisor blocks an address for 2 min after 10 rejected logins in 150 s, and one pool makes more than that. When all
    connections are lost together they log in one after the other, so that the first rejection spares the rest. No login
    waits longer than a second for its turn, because a server may not answer at all.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._rejected = 0
        self._not_before = 0.0

    def take_turn(self) -> bool:
        """Wait up to a second for the turn; return whether it was taken."""
        return self._turn.acquire(timeout=TURN_SECONDS)

    async def take_turn_async(self) -> bool:
        """Async version of `take_turn`."""
        until = time.monotonic() + TURN_SECONDS
        while not (taken := self._turn.acquire(blocking=False)) and time.monotonic() < until:
            await asyncio.sleep(0.01)
        return taken

    @contextmanager
    def log_in(self, turn_taken: bool) -> Iterator[None]:
        """Run the block, which logs in. Raises OperationalError, without a round trip, while it is too early."""
        try:
            self.check()
            yield
            self._rejected = 0
        except psycopg.Error as error:
            self._record(error)
            raise
        finally:
            if turn_taken:
                self._turn.release()

    def check(self) -> None:
        """Raise OperationalError while it is too early to try again."""
        if (left := self._not_before - time.monotonic()) > 0:
            raise psycopg.OperationalError(f"login was rejected; the next attempt is in {left:.0f} s")

    def _record(self, error: BaseException) -> None:
        """Count a rejected login; concurrent ones count once."""
        now = time.monotonic()
        if is_login_failure(error) and now >= self._not_before:
            self._not_before = now + min(15 * 2**self._rejected, 120)
            self._rejected += 1


def is_login_failure(error: BaseException) -> bool:
    """Return whether the server rejected the login. Only the text shows it: a failed connect has no SQLSTATE."""
    return any(text in str(error) for text in LOGIN_REJECTED)


class LoginBackoffs:
    """The backoff of each DSN: a database that rejects logins, or does not answer, does not delay those to another."""

    def __init__(self) -> None:
        self._of: dict[str, LoginBackoff] = {}

    def of(self, dsn: str) -> LoginBackoff:
        """Return the backoff of a DSN."""
        return self._of.setdefault(dsn, LoginBackoff())


backoffs = LoginBackoffs()
# A forked child must not inherit a lock that a thread of the parent holds.
after_fork_in_child(backoffs.__init__)  # type: ignore[misc]
