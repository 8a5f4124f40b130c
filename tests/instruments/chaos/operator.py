"""An operator: cancels batches that run, puts some of them back, and writes down which are cancelled."""

import random
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self

import psycopg

PAUSE_SECONDS = 0.3
RUNNING = """
SELECT coalesce(part_of, id)
FROM batchq.batches_live
WHERE status = 'processing' AND kind NOT IN ('hungry', 'tick')
ORDER BY random()
LIMIT 1
"""


class Operator:
    """Cancels one batch after the other; each second one is retried, from its checkpoint."""

    def __init__(self, connect: Callable[[], psycopg.Connection[Any]]) -> None:
        self.connect = connect
        self.dice = random.Random()
        self.cancelled = self.retried = 0
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self.run, name="operator", daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Do nothing more."""
        self.ending.set()
        self.thread.join()

    def run(self) -> None:
        """Go on until told to end; connect again when the server was away."""
        while not self.ending.wait(PAUSE_SECONDS):
            with suppress(psycopg.OperationalError, psycopg.errors.DiskFull), self.connect() as conn:
                while not self.ending.wait(PAUSE_SECONDS):
                    self.cancel(conn)
                    if self.dice.random() < 0.5:
                        self.retry(conn)

    def cancel(self, conn: psycopg.Connection[Any]) -> None:
        """Cancel a batch that runs, and write that down with it."""
        with conn.transaction():
            if row := conn.execute(RUNNING.encode()).fetchone():
                status = conn.execute("SELECT batchq.cancel(%s)", row).fetchone()
                if status == ("cancelled",):
                    note_cancelled(conn, row[0])
                    self.cancelled += 1

    def retry(self, conn: psycopg.Connection[Any]) -> None:
        """Put back a batch that was cancelled, and strike it out with that."""
        with conn.transaction():
            if row := conn.execute("DELETE FROM cancelled WHERE batch_id = (SELECT max(batch_id) FROM cancelled)"
                                   " RETURNING batch_id").fetchone():  # fmt: skip
                conn.execute("SELECT batchq.retry(%s)", row)
                conn.execute("INSERT INTO interventions (batch_id, what) VALUES (%s, 'retried')", row)
                self.retried += 1


def note_cancelled(conn: psycopg.Connection[Any], batch_id: int) -> None:
    """Write down, in the transaction that has cancelled a batch, that it is, and when."""
    conn.execute("INSERT INTO cancelled (batch_id) VALUES (%s)", [batch_id])
    conn.execute("INSERT INTO interventions (batch_id, what) VALUES (%s, 'cancelled')", [batch_id])
