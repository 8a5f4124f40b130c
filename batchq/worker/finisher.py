"""The finisher: one thread for the process writes how batches ended, many in one fenced statement."""

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import psycopg

from batchq.batch.claimed import ClaimedBatch
from batchq.common.log import get_logger
from batchq.common.text import message_object, one_line, plain_object
from batchq.errors import OutcomeUnknown
from batchq.postgres.link import Link
from batchq.postgres.statements import endings, session
from batchq.postgres.statements.endings import Finish, Requeue
from batchq.postgres.statements.running import Statement
from batchq.worker.execution import COMPLETED, Outcome
from batchq.worker.lanes import Lane
from batchq.worker.outage import Outage
from batchq.worker.throughput import MOST_TIMED, Throughput, run_times_of

MOST_A_GROUP = 2000
MOST_RUNS = 800  # of ids that follow each other: the text of so many still travels as one message
FEW = 500
GATHER_SECONDS = 0.003
PUT_BACK_SECONDS = 0.5
LOCK_MILLISECONDS = 200  # our keeper's extension of the same leases takes less, also where it takes four round trips
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 0.25, 5.0
MOST_RETRIED = 100
MOST_REFUSED_IN_A_ROW = 10
MOST_LOGGED = 20
SETTINGS = session.FORCE_INDEX_AND_HASH_JOIN | {"lock_timeout": str(LOCK_MILLISECONDS)}
ABOUT_CONTENT = (
    UnicodeError,
    psycopg.DataError,
    psycopg.IntegrityError,
    psycopg.errors.ProgramLimitExceeded,
    psycopg.errors.StatementTooComplex,
)

log = get_logger()


class Ended(NamedTuple):
    """A batch that has ended, and how."""

    lane: Lane
    batch: ClaimedBatch
    outcome: Outcome
    ended_at: float  # monotonic
    is_last_word: bool = False
    postponements: int = 0
    postponed_at: float = 0.0  # monotonic, the last time


class Finisher:
    """Writes outcomes. *nudge* is called after each group that is written."""

    def __init__(self, link: Link, nudge: Callable[[], None], keep_completed: bool = True) -> None:
        self.link = link
        self.nudge = nudge
        self.keep_completed = keep_completed
        self.todo: deque[Ended] = deque()
        self.group: list[Ended] = []  # that is being written
        self.postponed: list[Ended] = []  # whose rows are locked or refused: each is tried again alone, see `postpone`
        self.filled = threading.Event()
        self.closing = threading.Event()
        self.give_up = threading.Event()
        self.outage = Outage("finisher", link)
        self.put_back = False
        self.refused_in_a_row = 0
        self.counts: dict[str, int] = defaultdict(int)
        self.throughput = Throughput()

    def put(self, lane: Lane, batch: ClaimedBatch, outcome: Outcome) -> None:
        """Have the outcome of a batch written, soon."""
        self.todo.append(Ended(lane, batch, outcome, time.monotonic()))
        if not self.filled.is_set():
            self.filled.set()

    def unwritten(self) -> list[ClaimedBatch]:
        """Return the batches that have ended and wait for that to be written, those that just are among them."""
        waiting = (*self.group, *self.todo.copy(), *self.postponed)
        return [entry.batch for entry in waiting if not entry.outcome.written]

    def run(self) -> None:
        """Write until closed and empty, or told to give up."""
        while not self.give_up.is_set():
            self.filled.wait(self.retry_in_seconds())
            self.filled.clear()
            if len(self.todo) < FEW and not self.closing.is_set():
                time.sleep(GATHER_SECONDS)
            while self.todo and not self.give_up.is_set():
                self.write_group()
            self.retry_postponed()
            if self.closing.is_set() and not self.todo and not self.postponed:
                return

    def close(self) -> None:
        """Let `run` end when everything is written."""
        self.closing.set()
        self.filled.set()

    def write_group(self) -> None:
        """Write the oldest outcomes, however often it takes."""
        self.group = group = [self.todo.popleft() for _ in range(min(len(self.todo), MOST_A_GROUP))]
        if written := [entry for entry in group if entry.outcome.written]:
            self.count(written)
            self.tally([entry for entry in written if entry.batch.completed])
        for (queue, way), entries in self.by_target(group).items():
            for piece in pieces(entries) if way == "complete" else [entries]:
                self.write_stubbornly(queue, piece)
        self.group = []
        self.nudge()
        self.retry_postponed()
        if self.put_back:
            self.put_back = False
            self.give_up.wait(PUT_BACK_SECONDS)

    def write_stubbornly(self, queue: str, entries: list[Ended]) -> None:
        """Write entries of one queue, again and again while the database is away.

        Written twice does no harm: what was committed, with its answer lost, matches nothing the second time.
        """
        unknown = False
        while entries and not self.give_up.is_set():
            try:
                lost = self.write(queue, entries)
            except Exception as error:
                is_refused = isinstance(error, psycopg.Error | UnicodeError)
                if is_refused and self.link.conn is not None:  # the database is there
                    entries = self.write_apart(queue, entries, error)
                else:
                    unknown = unknown or isinstance(error, OutcomeUnknown)
                    self.give_up.wait(self.outage.failed(error))
            else:
                self.outage.over()
                self.refused_in_a_row = 0
                self.count(entries)
                if unknown or not lost:
                    self.tally(entries)
                else:
                    report_lost(lost)
                    late = {entry.batch for entry in lost}
                    self.tally([entry for entry in entries if entry.batch not in late])
                return

    def write_apart(self, queue: str, entries: list[Ended], error: Exception) -> list[Ended]:
        """Write what can be written of entries that were refused together; return those to write again.

        If rows are locked, those wait, and the others are written again at once. Else halves the entries until the one
        that is refused is alone. After ten such in a row it is probably not about the rows (a full disk, a locked
        table): the rest goes to the end of the queue as it is.
        """
        if isinstance(error, psycopg.errors.LockNotAvailable):
            free = self.without_locked(queue, entries)
            if free is None:
                return entries
            if len(free) < len(entries):
                return free
        if len(entries) == 1:
            self.refused(queue, entries[0], error)
        elif self.refused_in_a_row >= MOST_REFUSED_IN_A_ROW:
            self.todo.extend(entries)
            self.put_back = True
        else:
            middle = len(entries) // 2
            self.write_stubbornly(queue, entries[:middle])
            self.write_stubbornly(queue, entries[middle:])
        return []

    def refused(self, queue: str, entry: Ended, error: Exception) -> None:
        """Have a batch fail whose outcome was refused, if that is to blame itself; else postpone it."""
        if isinstance(error, ABOUT_CONTENT):
            self.fail(queue, entry, error)
        else:
            self.refused_in_a_row += 1
            self.postpone([entry], one_line(error))

    def without_locked(self, queue: str, entries: list[Ended]) -> list[Ended] | None:
        """Postpone the entries whose rows another session has locked; return the others, None if that is not known."""
        try:
            rows = self.link.run(endings.locked(queue, [entry.batch.id for entry in entries]), SETTINGS)
        except Exception as error:  # the table is locked, or the connection is lost
            self.give_up.wait(self.outage.failed(error))
            return None
        locked = {batch_id for (batch_id,) in rows}
        self.postpone([entry for entry in entries if entry.batch.id in locked], "another session has locked the row")
        return [entry for entry in entries if entry.batch.id not in locked]

    # ------------------------------------------------------------------------------------------------- the postponed

    def postpone(self, entries: Sequence[Ended], error: str) -> None:
        """Try entries again later, 0.25 s to 5 s from now. They hold up no other, and take no room in their lane."""
        if new := [entry.batch.id for entry in entries if not entry.postponements]:
            log.warning("outcomes postponed", count=len(new), batch_ids=new[:MOST_LOGGED], error=error)
        now = time.monotonic()
        for entry in entries:
            entry.lane.postponed += 1
            postponements = min(entry.postponements + 1, 10)
            self.postponed.append(entry._replace(postponements=postponements, postponed_at=now))

    def retry_at(self, entry: Ended) -> float:
        """Return the monotonic time when to try a postponed entry again."""
        return entry.postponed_at + min(FIRST_RETRY_SECONDS * 2.0 ** (entry.postponements - 1), LAST_RETRY_SECONDS)

    def retry_in_seconds(self) -> float | None:
        """Return how long it is until a postponed entry is to be tried again, None without any."""
        if not self.postponed:
            return None
        return max(0.0, min(map(self.retry_at, self.postponed)) - time.monotonic())

    def retry_postponed(self) -> None:
        """Write those of the postponed entries whose time has come, a hundred at most, if nobody locks their rows."""
        now = time.monotonic()
        if not (due := [entry for entry in self.postponed if self.retry_at(entry) <= now][:MOST_RETRIED]):
            return
        self.group = due  # before they leave `postponed`: the keeper extends the leases of both
        is_due = {entry.batch for entry in due}
        self.postponed = [entry for entry in self.postponed if entry.batch not in is_due]
        for entry in due:
            entry.lane.postponed -= 1
        for (queue, _), entries in self.by_target(due).items():
            free = self.without_locked(queue, entries)
            self.write_stubbornly(queue, entries if free is None else free)
        self.group = []
        self.nudge()

    def fail(self, queue: str, entry: Ended, error: Exception) -> None:
        """Have a batch fail whose outcome Postgres cannot store. If it cannot store that either, its lease runs out.

        An error in letters that a database in another encoding than UTF8 does not have is written without them.
        """
        if (plain := in_plain_letters(entry.outcome)) != entry.outcome:
            self.write_stubbornly(queue, [entry._replace(outcome=plain)])
            return
        message = f"the outcome could not be stored: {one_line(error)}"
        log.error("batch failed", batch_id=entry.batch.id, kind=entry.batch.kind, error=message)
        if entry.is_last_word:
            self.count([entry])
            return
        outcome = Outcome("failed", error=message_object(message))
        self.write_stubbornly(queue, [entry._replace(outcome=outcome, is_last_word=True)])

    def write(self, queue: str, entries: Sequence[Ended]) -> list[Ended]:
        """Write entries of one queue that are written alike, in one transaction; return those no longer ours."""
        rows = self.link.run(self.statement(queue, entries), SETTINGS)
        if len(rows) == len(entries):
            return []
        ours = {batch_id for (batch_id,) in rows}
        return [entry for entry in entries if entry.batch.id not in ours]

    def statement(self, queue: str, entries: Sequence[Ended]) -> Statement:
        """Return the statement that writes entries that are written alike."""
        match self.way(entries[0].outcome):
            case "complete":
                ids = [entry.batch.id for entry in entries]
                tokens = [entry.batch.claim.token_text for entry in entries]
                return endings.complete(queue, ids, tokens, self.keep_completed)
            case "finish":
                return endings.finish(queue, list(map(as_finish, entries)))
            case _:
                return endings.requeue(queue, list(map(as_requeue, entries)))

    def way(self, outcome: Outcome) -> str:
        """Return how an outcome is written."""
        if outcome is COMPLETED:
            return "complete"
        if outcome.status == "completed":
            return "finish" if self.keep_completed else "complete"
        return "requeue" if outcome.status == "pending" else "finish"

    def by_target(self, group: Iterable[Ended]) -> dict[tuple[str, str], list[Ended]]:
        """Return the entries that are to be written, by queue and by how they are written."""
        targets: dict[tuple[str, str], list[Ended]] = defaultdict(list)
        for entry in group:
            if not entry.outcome.written:
                targets[entry.batch.claim.queue, self.way(entry.outcome)].append(entry)
        return targets

    def count(self, entries: Iterable[Ended]) -> None:
        """Count what is settled: for the lanes, and for the worker's last words."""
        for entry in entries:
            entry.lane.written += 1
            self.counts[entry.outcome.status] += 1

    def tally(self, entries: Sequence[Ended]) -> None:
        """Count what is written, for batchq.throughput."""
        for entry in entries:
            if entry.batch.items_total is not None:
                self.throughput.progress(entry.batch, items_worked(entry))
        for (queue, kind, end), alike in by_end(entries).items():
            timed = alike[:: len(alike) // MOST_TIMED + 1]
            run_times = run_times_of((entry.batch, entry.ended_at) for entry in timed)
            self.throughput.ended(queue, kind, end, len(alike), run_times)


def items_worked(entry: Ended) -> int:
    """Return how many items of a batch have been worked, those that its end counts included."""
    batch = entry.batch
    is_whole = entry.outcome.all_done or batch.completed
    return batch.items_total or 0 if is_whole else batch.items_done + batch.items_failed


def by_end(entries: Sequence[Ended]) -> dict[tuple[str, str, str], Sequence[Ended]]:
    """Return the entries by queue, kind and how they ended, leaving out those that were only given back."""
    if entries and entries[0].outcome is COMPLETED and len({entry.batch.kind for entry in entries}) == 1:
        return {(entries[0].batch.queue, entries[0].batch.kind, "completed"): entries}  # all are written alike
    found: dict[tuple[str, str, str], list[Ended]] = defaultdict(list)
    for entry in entries:
        if end := end_of(entry.outcome):
            found[entry.batch.queue, entry.batch.kind, end].append(entry)
    return dict(found)


def end_of(outcome: Outcome) -> str | None:
    """Return how an attempt has ended: completed, failed, cancelled, retried; None if it was only given back."""
    if outcome.written:
        return "completed"
    if outcome.status == "pending":
        return "retried" if outcome.error is not None else None
    return outcome.status


def pieces(entries: list[Ended]) -> Iterator[list[Ended]]:
    """Yield the entries in the order of their ids, at most MOST_RUNS runs of ids at a time."""
    entries.sort(key=lambda entry: entry.batch.id)
    ids = [entry.batch.id for entry in entries]
    tokens = [entry.batch.claim.token_text for entry in entries]
    starts = [place for place, is_start in enumerate(endings.starts_of_runs(ids, tokens)) if is_start]
    cuts = [*starts[::MOST_RUNS], len(entries)]
    for first, end in pairwise(cuts):
        yield entries[first:end]


def as_finish(entry: Ended) -> Finish:
    """Return an entry as the statement takes it that moves batches to their final status."""
    batch, outcome = entry.batch, entry.outcome
    return Finish(batch.id, batch.claim.token, outcome.status, outcome.result, outcome.error, outcome.all_done)


def as_requeue(entry: Ended) -> Requeue:
    """Return an entry as the statement takes it that makes batches pending again."""
    batch, outcome = entry.batch, entry.outcome
    return Requeue(batch.id, batch.claim.token, outcome.delay_seconds, outcome.give_back, outcome.error)


def in_plain_letters(outcome: Outcome) -> Outcome:
    """Return an outcome with an error of ASCII letters only."""
    return outcome if outcome.error is None else replace(outcome, error=plain_object(outcome.error))


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
