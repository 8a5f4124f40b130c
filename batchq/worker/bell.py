"""The bell: a NOTIFY that tells of new batches, heard on a direct connection. Nothing depends on it: workers poll."""

import threading
from collections.abc import Callable

import psycopg

from batchq.postgres.connections import CONNECT_OPTIONS, without_overridden
from batchq.postgres.logins import is_login_failure
from batchq.postgres.statements import session
from batchq.worker.outage import Outage

LISTEN_SECONDS = 1.0  # how long until a stop is seen
REFUSED_SECONDS = 60.0
REST_SECONDS = 0.01  # between two nudges, however often it rings: any role may NOTIFY


class Bell:
    """Listens, in a thread of its own, and calls *nudge* when the bell rings."""

    def __init__(self, dsn: str, nudge: Callable[[], None]) -> None:
        self.dsn = dsn
        self.nudge = nudge
        self.closing = threading.Event()
        self.outage = Outage("bell")

    def run(self) -> None:
        """Listen until closed; connect again, after a while, when the connection is lost."""
        while not self.closing.is_set():
            try:
                self.listen()
            except Exception as error:
                self.closing.wait(max(self.outage.failed(error), REFUSED_SECONDS if is_login_failure(error) else 0))

    def listen(self) -> None:
        """Listen on one connection until closed or lost."""
        with psycopg.connect(self.dsn, **without_overridden(CONNECT_OPTIONS, self.dsn)) as conn:
            session.listen(conn)
            self.outage.over()
            self.nudge()  # what came meanwhile made no sound
            is_ringing = False
            while not self.closing.is_set():
                if is_ringing or list(conn.notifies(timeout=LISTEN_SECONDS, stop_after=1)):
                    self.nudge()
                    # Read on meanwhile: what is not read fills the server's queue.
                    is_ringing = sum(1 for _ in conn.notifies(timeout=REST_SECONDS)) > 0

    def close(self) -> None:
        """Let `run` end."""
        self.closing.set()
