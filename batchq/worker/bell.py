"""The bell: a NOTIFY on insert, received on a direct connection. Nothing depends on it, because workers poll."""

import threading
from collections.abc import Callable

import psycopg

from batchq.postgres.connections import CONNECT_OPTIONS, without_overridden
from batchq.postgres.logins import is_login_failure
from batchq.postgres.statements import session
from batchq.worker.outage import Outage

LISTEN_SECONDS = 1.0  # how long until a stop is seen
REFUSED_SECONDS = 60.0
REST_SECONDS = 0.01  # between two wake-ups, however often it rings: any role may NOTIFY


class Bell:
    """Calls *wake*, in a thread of its own, when the bell rings."""

    def __init__(self, dsn: str, wake: Callable[[], None]) -> None:
        self.dsn = dsn
        self.wake = wake
        self.closing = threading.Event()
        self.outage = Outage("bell")

    def run(self) -> None:
        """Listen until closed; reconnect, after a while, when the connection is lost."""
        while not self.closing.is_set():
            try:
                self._listen()
            except Exception as error:
                self.closing.wait(max(self.outage.failed(error), REFUSED_SECONDS if is_login_failure(error) else 0))

    def _listen(self) -> None:
        with psycopg.connect(self.dsn, **without_overridden(CONNECT_OPTIONS, self.dsn)) as conn:
            session.listen(conn)
            self.outage.over()
            self.wake()  # for batches that were inserted before
            is_ringing = False
            while not self.closing.is_set():
                if is_ringing or list(conn.notifies(timeout=LISTEN_SECONDS, stop_after=1)):
                    self.wake()
                    # Read on in between: what is not read fills the server's queue.
                    is_ringing = sum(1 for _ in conn.notifies(timeout=REST_SECONDS)) > 0

    def close(self) -> None:
        """Let `run` return."""
        self.closing.set()
