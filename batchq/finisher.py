"""The finisher: one thread for the process writes how batches ended, many in one fenced statement."""

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import psycopg

from batchq import queries
from batchq.batch import Batch
from batchq.database import Link
from batchq.errors import OutcomeUnknown
from batchq.execution import Outcome
from batchq.lanes import Lane
from batchq.log import get_logger
from batchq.outage import Outage
from batchq.queries import Conn, Finish, Requeue
from batchq.text import message_object, one_line

MOST_A_GROUP = 1000
FEW = 100
GATHER_SECONDS = 0.003
PUT_BACK_SECONDS = 0.5
ABOUT_CONTENT = (
    psycopg.DataError,
    psycopg.IntegrityError,
    psycopg.errors.ProgramLimitExceeded,
    psycopg.errors.StatementTooComplex,
)

log = get_logger()


@dataclass(frozen=True, slots=True)
class Ended:
    """A batch that has ended, and how."""

    lane: Lane
    batch: Batch
    outcome: Outcome
    is_last_word: bool = False
    is_put_back: bool = False


class Finisher:
    """Writes outcomes. *nudge* is called after each group that is written."""

    def __init__(self, link: Link, nudge: Callable[[], None]) -> None:
        self.link = link
        self.nudge = nudge
        self.todo: deque[Ended] = deque()
        self.filled = threading.Event()
        self.closing = threading.Event()
        self.give_up = threading.Event()
        self.outage = Outage("finisher")
        self.put_back = False
        self.counts: dict[str, int] = defaultdict(int)

    def put(self, lane: Lane, batch: Batch, outcome: Outcome) -> None:
        """Have the outcome of a batch written, soon."""
        self.todo.append(Ended(lane, batch, outcome))
        if not self.filled.is_set():
            self.filled.set()

    def run(self) -> None:
        """Write until closed and empty, or told to give up."""
        while not self.give_up.is_set():
            self.filled.wait()
            self.filled.clear()
            if len(self.todo) < FEW and not self.closing.is_set():
                time.sleep(GATHER_SECONDS)
            while self.todo and not self.give_up.is_set():
                self.write_group()
            if self.closing.is_set():
                return

    def close(self) -> None:
        """Let `run` end when everything is written."""
        self.closing.set()
        self.filled.set()

    def write_group(self) -> None:
        """Write the oldest outcomes, however often it takes."""
        group = [self.todo.popleft() for _ in range(min(len(self.todo), MOST_A_GROUP))]
        self.count([entry for entry in group if entry.outcome.written])
        for (queue, _), entries in by_target(group).items():
            self.write_stubbornly(queue, entries)
        self.nudge()
        if self.put_back:
            self.put_back = False
            self.give_up.wait(PUT_BACK_SECONDS)

    def write_stubbornly(self, queue: str, entries: list[Ended]) -> None:
        """Write entries of one queue, again and again while the database is away.

        Written twice does no harm: what was committed, with its answer lost, matches nothing the second time.
        """
        unknown = False
        while not self.give_up.is_set():
            try:
                lost = self.write(queue, entries)
            except Exception as error:
                if isinstance(error, psycopg.Error) and self.link.conn is not None:  # refused: the database is there
                    self.write_apart(queue, entries, error)
                    return
                unknown = unknown or isinstance(error, OutcomeUnknown)
                self.give_up.wait(self.outage.failed(error))
            else:
                self.outage.over()
                self.count(entries)
                report_lost([] if unknown else lost)
                return

    def write_apart(self, queue: str, entries: list[Ended], error: psycopg.Error) -> None:
        """Write what can be written of entries that were refused together.

        Halves them until the one that is refused is alone. That one has failed if it is to blame itself; else (a lock,
        no room on the disk) it goes to the end of the queue, and holds nothing up.
        """
        if len(entries) > 1:
            middle = len(entries) // 2
            self.write_stubbornly(queue, entries[:middle])
            self.write_stubbornly(queue, entries[middle:])
        elif isinstance(error, ABOUT_CONTENT):
            self.fail(queue, entries[0], error)
        else:
            if not entries[0].is_put_back:
                log.warning("outcome put off", batch_id=entries[0].batch.id, error=one_line(error))
            self.put_back = True
            self.todo.append(replace(entries[0], is_put_back=True))

    def fail(self, queue: str, entry: Ended, error: Exception) -> None:
        """Have a batch fail whose outcome Postgres cannot store. If it cannot store that either, its lease runs out."""
        message = f"the outcome could not be stored: {one_line(error)}"
        log.error("batch failed", batch_id=entry.batch.id, kind=entry.batch.kind, error=message)
        if entry.is_last_word:
            self.count([entry])
            return
        outcome = Outcome("failed", error=message_object(message))
        self.write_stubbornly(queue, [replace(entry, outcome=outcome, is_last_word=True)])

    def write(self, queue: str, entries: Sequence[Ended]) -> list[Ended]:
        """Write entries that are all final, or all pending again, in one transaction; return those no longer ours."""
        with self.link.transaction() as conn:
            if entries[0].outcome.status == "pending":
                ours = write_pending(conn, queue, entries)
            else:
                ours = write_final(conn, queue, entries)
        return [entry for entry in entries if entry.batch.id not in ours]

    def count(self, entries: Iterable[Ended]) -> None:
        """Count what is settled: for the lanes, and for the worker's last words."""
        for entry in entries:
            entry.lane.written += 1
            self.counts[entry.outcome.status] += 1


def by_target(group: Iterable[Ended]) -> dict[tuple[str, bool], list[Ended]]:
    """Return the entries that are to be written, by queue and by whether they are pending again."""
    targets: dict[tuple[str, bool], list[Ended]] = defaultdict(list)
    for entry in group:
        if not entry.outcome.written:
            targets[entry.batch.queue, entry.outcome.status == "pending"].append(entry)
    return targets


def write_final(conn: Conn, queue: str, entries: Sequence[Ended]) -> set[int]:
    """Move batches to their final status; return the ids of those that were still ours."""
    finishes = [
        Finish(e.batch.id, e.batch.claim.token, e.outcome.status, e.outcome.result, e.outcome.error, e.outcome.all_done)
        for e in entries
    ]
    return {row[0] for row in conn.execute(*queries.finish(queue, finishes))}


def write_pending(conn: Conn, queue: str, entries: Sequence[Ended]) -> set[int]:
    """Make batches pending again; return the ids of those that were still ours."""
    requeues = [
        Requeue(e.batch.id, e.batch.claim.token, e.outcome.delay_seconds, e.outcome.give_back, e.outcome.error)
        for e in entries
    ]
    return queries.requeue(conn, queue, requeues)


def report_lost(lost: Sequence[Ended]) -> None:
    """Log the batches whose end came too late: they were rescued, cancelled or finished by somebody else."""
    for entry in lost:
        log.warning(
            "lease lost",
            error="LeaseLost",
            batch_id=entry.batch.id,
            kind=entry.batch.kind,
            attempt=entry.batch.attempt,
            dropped=entry.outcome.status,
        )
