"""The finisher: one thread for the process writes the outcomes of batches, many in one fenced statement."""

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
from batchq.worker import permits
from batchq.worker.execution import COMPLETED, Outcome
from batchq.worker.failures import Failed
from batchq.worker.lanes import Lane
from batchq.worker.outage import Outage
from batchq.worker.refused import MOST_LOGGED
from batchq.worker.throughput import MOST_TIMED, Throughput, run_times_of, waits_of

MOST_A_GROUP = 2000
MOST_RUNS = 800  # of consecutive ids: the text of so many still travels as one message
FIRST_RETRY_SECONDS = 0.25
LOCK_MILLISECONDS = 200  # this worker's own lease renewal takes less, even if it takes four round trips
SETTINGS = session.FORCE_INDEX_AND_HASH_JOIN | {"lock_timeout": str(LOCK_MILLISECONDS)}
_LAST_RETRY_SECONDS = 5.0
_MOST_RETRIED = 100
_MOST_REFUSED_IN_A_ROW = 10
_FEW = 500
_GATHER_SECONDS = 0.003
_REFUSED_PAUSE_SECONDS = 0.5
_ABOUT_CONTENT = (
    UnicodeError,
    psycopg.DataError,
    psycopg.IntegrityError,
    psycopg.errors.ProgramLimitExceeded,
    psycopg.errors.StatementTooComplex,
)

_log = get_logger()


class Ended(NamedTuple):
    """A batch whose handler has finished, or that was released, and its outcome."""

    lane: Lane
    batch: ClaimedBatch
    outcome: Outcome
    ended_at: float  # monotonic
    is_last_try: bool = False  # the outcome is that the first one could not be stored
    postponements: int = 0
    postponed_at: float = 0.0  # monotonic, the last time


class Finisher:
    """Writes outcomes. *on_written* is called after each group, *on_needed* after one with batches that others wait
    for, with the connection, *on_failed* with each batch that has failed for good."""

    def __init__(
        self,
        link: Link,
        on_written: Callable[[], None],
        keep_completed: bool = True,
        on_needed: Callable[[Link], object] = lambda _: None,
        on_failed: Callable[[Failed], None] | None = None,
    ) -> None:
        self.link = link
        self.on_failed = on_failed
        self.on_written = on_written
        self.on_needed = on_needed
        self.keep_completed = keep_completed
        self.todo: deque[Ended] = deque()
        self.group: list[Ended] = []  # that is being written
        self.postponed: list[Ended] = []  # whose rows are locked or refused
        self.closing = threading.Event()
        self.give_up = threading.Event()
        self.counts: dict[str, int] = defaultdict(int)
        self.throughput = Throughput()
        self._filled = threading.Event()
        self._outage = Outage("finisher", link)
        self._has_ended_needed = False
        self._must_pause = False  # whole groups are refused: do not retry them in a busy loop
        self._refused_in_a_row = 0

    def put(self, lane: Lane, batch: ClaimedBatch, outcome: Outcome) -> None:
        """Queue an outcome for writing."""
        self.todo.append(Ended(lane, batch, outcome, time.monotonic()))
        if not self._filled.is_set():
            self._filled.set()

    def unwritten(self) -> list[ClaimedBatch]:
        """Return the batches whose outcome is not written yet, or is being written."""
        waiting = (*self.group, *self.todo.copy(), *self.postponed)
        return [entry.batch for entry in waiting if not entry.outcome.written]

    def run(self) -> None:
        """Write until closed and empty, or until `give_up` is set."""
        while not self.give_up.is_set():
            self._filled.wait(self.retry_in_seconds())
            self._filled.clear()
            if len(self.todo) < _FEW and not self.closing.is_set():
                time.sleep(_GATHER_SECONDS)
            while self.todo and not self.give_up.is_set():
                self.write_group()
            self.retry_postponed()
            if self.closing.is_set() and not self.todo and not self.postponed:
                return

    def close(self) -> None:
        """Let `run` return once everything is written."""
        self.closing.set()
        self._filled.set()

    def write_group(self) -> None:
        """Write the oldest outcomes, retrying as often as it takes."""
        self.group = group = [self.todo.popleft() for _ in range(min(len(self.todo), MOST_A_GROUP))]
        if written := [entry for entry in group if entry.outcome.written]:
            self._count(written)
            self._tally([entry for entry in written if entry.batch.completed])
        for (queue, way), entries in self.by_target(group).items():
            for piece in pieces(entries) if way == "complete" else [entries]:
                self._write_persistently(queue, piece)
        self.group = []
        self._follow_flows()
        self.on_written()
        self.retry_postponed()
        if self._must_pause:
            self._must_pause = False
            self.give_up.wait(_REFUSED_PAUSE_SECONDS)

    def _write_persistently(self, queue: str, entries: list[Ended]) -> None:
        """Write entries of one queue, retrying while the database is unavailable.

        Writing twice does no harm: if the first COMMIT was carried out and its answer lost, the second matches nothing.
        """
        is_unknown = False
        while entries and not self.give_up.is_set():
            try:
                late = self.write(queue, entries)
            except Exception as error:
                is_refused = isinstance(error, psycopg.Error | UnicodeError)
                if is_refused and self.link.conn is not None:  # the database is there
                    entries = self._write_apart(queue, entries, error)
                else:
                    is_unknown = is_unknown or isinstance(error, OutcomeUnknown)
                    self.give_up.wait(self._outage.failed(error))
            else:
                self._outage.over()
                self._refused_in_a_row = 0
                self._count(entries)
                if late and not is_unknown:
                    report_late(late)
                    late_batches = {entry.batch for entry in late}
                    entries = [entry for entry in entries if entry.batch not in late_batches]
                self._tally(entries)
                if self.on_failed is not None:
                    self._report_failed(entries, late if is_unknown else ())
                return

    # ----------------------------------------------------------------------------------------- locked and refused rows

    def _write_apart(self, queue: str, entries: list[Ended], error: Exception) -> list[Ended]:
        """Write what can be written of entries that were refused together; return those to write again.

        Entries with locked rows are postponed, and the others are written again immediately. Without a locked row, the
        entries are halved until the refused one is alone. After ten refusals in a row the rows are probably not the
        cause (a full disk, a locked table): the rest goes to the end of the queue as it is.
        """
        if isinstance(error, psycopg.errors.LockNotAvailable):
            free = self._without_locked(queue, entries)
            if free is None:
                return entries
            if len(free) < len(entries):
                return free
        if len(entries) == 1:
            self._refuse(queue, entries[0], error)
        elif self._refused_in_a_row >= _MOST_REFUSED_IN_A_ROW:
            self.todo.extend(entries)
            self._must_pause = True
        else:
            middle = len(entries) // 2
            self._write_persistently(queue, entries[:middle])
            self._write_persistently(queue, entries[middle:])
        return []

    def _refuse(self, queue: str, entry: Ended, error: Exception) -> None:
        """Fail a batch whose outcome itself was refused; postpone it if something else is the cause."""
        if isinstance(error, _ABOUT_CONTENT):
            self._fail(queue, entry, error)
        else:
            self._refused_in_a_row += 1
            self._postpone([entry], one_line(error))

    def _fail(self, queue: str, entry: Ended, error: Exception) -> None:
        """Fail a batch whose outcome Postgres cannot store. If it cannot store that either, the lease expires.

        An error with characters that the database's encoding lacks (not UTF8) is first written without them.
        """
        if (plain := _in_ascii(entry.outcome)) != entry.outcome:
            self._write_persistently(queue, [entry._replace(outcome=plain)])
            return
        message = f"the outcome could not be stored: {one_line(error)}"
        _log.error("batch failed", batch_id=entry.batch.id, kind=entry.batch.kind, error=message)
        if entry.is_last_try:
            self._count([entry])
            return
        outcome = Outcome("failed", error=message_object(message))
        self._write_persistently(queue, [entry._replace(outcome=outcome, is_last_try=True)])

    def _without_locked(self, queue: str, entries: list[Ended]) -> list[Ended] | None:
        """Postpone the entries whose rows another session has locked; return the others, None if that is unknown."""
        try:
            rows = self.link.run(endings.locked(queue, [entry.batch.id for entry in entries]), SETTINGS)
        except Exception as error:  # the table is locked, or the connection is lost
            self.give_up.wait(self._outage.failed(error))
            return None
        locked = {batch_id for (batch_id,) in rows}
        self._postpone([entry for entry in entries if entry.batch.id in locked], "another session has locked the row")
        return [entry for entry in entries if entry.batch.id not in locked]

    def _postpone(self, entries: Sequence[Ended], error: str) -> None:
        """Retry entries 0.25 s to 5 s from now. They hold up no other, and take no room in their lane."""
        if new := [entry.batch.id for entry in entries if not entry.postponements]:
            _log.warning("outcomes postponed", count=len(new), batch_ids=new[:MOST_LOGGED], error=error)
        now = time.monotonic()
        for entry in entries:
            entry.lane.postponed += 1
            postponements = min(entry.postponements + 1, 10)
            self.postponed.append(entry._replace(postponements=postponements, postponed_at=now))

    def retry_in_seconds(self) -> float | None:
        """Return how long it is until the next postponed entry is due; None without any."""
        if not self.postponed:
            return None
        return max(0.0, min(map(_retry_at, self.postponed)) - time.monotonic())

    def retry_postponed(self) -> None:
        """Write the postponed entries that are due, a hundred at most, unless their rows are still locked."""
        now = time.monotonic()
        if not (due := [entry for entry in self.postponed if _retry_at(entry) <= now][:_MOST_RETRIED]):
            return
        self.group = due  # before they leave `postponed`: the keeper renews the leases of both
        is_due = {entry.batch for entry in due}
        self.postponed = [entry for entry in self.postponed if entry.batch not in is_due]
        for entry in due:
            entry.lane.postponed -= 1
        for (queue, _), entries in self.by_target(due).items():
            free = self._without_locked(queue, entries)
            self._write_persistently(queue, entries if free is None else free)
        self.group = []
        self._follow_flows()
        self.on_written()

    def _follow_flows(self) -> None:
        """Let go on what waited for what has just ended. What fails here is done later, by any worker's claimer."""
        if self._has_ended_needed:
            self._has_ended_needed = False
            try:
                self.on_needed(self.link)
            except Exception as error:  # the outcomes are written; nothing here may end the thread
                _log.warning("flows postponed", error=one_line(error))

    # ------------------------------------------------------------------------------------------------- one statement

    def write(self, queue: str, entries: Sequence[Ended]) -> list[Ended]:
        """Write entries of one queue and one way in one transaction; return those whose claim this worker has lost."""
        rows = self.link.run(self.statement(queue, entries), SETTINGS)
        if any(batch_id < 0 for (batch_id,) in rows):
            self._has_ended_needed = True
        if len(rows) == len(entries):
            return []
        still_claimed = {abs(batch_id) for (batch_id,) in rows}
        return [entry for entry in entries if entry.batch.id not in still_claimed]

    def statement(self, queue: str, entries: Sequence[Ended]) -> Statement:
        """Return the statement that writes entries of one way."""
        match self._way(entries[0]):
            case "complete":
                ids = [entry.batch.id for entry in entries]
                tokens = [entry.batch.claim.token_text for entry in entries]
                is_distributed = entries[0].batch.claim.runtime.layout.is_distributed
                return endings.complete(queue, ids, tokens, self.keep_completed, is_distributed)
            case "finish":
                return endings.finish(queue, list(map(_as_finish, entries)))
            case _:
                return endings.requeue(queue, list(map(_as_requeue, entries)))

    def _way(self, entry: Ended) -> str:
        outcome = entry.outcome
        if not self.keep_completed and outcome.status == "completed":  # parts are kept until they are gathered
            return "finish" if entry.batch.row.part_of is not None else "complete"
        if outcome is COMPLETED:
            return "complete"
        return "requeue" if outcome.status == "pending" else "finish"

    def by_target(self, group: Iterable[Ended]) -> dict[tuple[str, str], list[Ended]]:
        """Return the entries that are not written yet, by queue and by the way to write them."""
        targets: dict[tuple[str, str], list[Ended]] = defaultdict(list)
        for entry in group:
            if not entry.outcome.written:
                targets[entry.batch.claim.queue, self._way(entry)].append(entry)
        return targets

    # ----------------------------------------------------------------------------------------------------- counting

    def _count(self, entries: Iterable[Ended]) -> None:
        for entry in entries:
            entry.lane.written += 1
            self.counts[entry.outcome.status] += 1
            if entry.batch.claim.permits:
                permits.has_ended(entry.batch.claim.permits, entry.batch)

    def _report_failed(self, entries: Sequence[Ended], doubtful: Sequence[Ended]) -> None:
        """Report the failures. *doubtful*: entries that the first COMMIT may have written, or that were lost before."""
        in_doubt = {entry.batch for entry in doubtful}
        for entry in entries:
            batch = entry.batch
            if entry.outcome.status == "failed" and batch.row.part_of is None and self.on_failed is not None:
                self.on_failed(Failed(batch.queue, batch.id, batch.attempt, batch not in in_doubt))

    def _tally(self, entries: Sequence[Ended]) -> None:
        has_parts = False
        for entry in entries:
            if entry.batch.items_total is not None:
                self.throughput.progress(entry.batch, _items_processed(entry))
                has_parts = has_parts or entry.batch.row.part_of is not None
        if has_parts:  # their items count; the batch itself counts once, as a whole
            entries = [entry for entry in entries if entry.batch.row.part_of is None]
        for (queue, kind, end), alike in _by_end(entries).items():
            timed = alike[:: len(alike) // MOST_TIMED + 1]
            run_times = run_times_of((entry.batch, entry.ended_at) for entry in timed)
            waits = waits_of((entry.batch for entry in timed), self.throughput.clock_ahead())
            self.throughput.ended(queue, kind, end, len(alike), run_times, waits)


def _retry_at(entry: Ended) -> float:
    return entry.postponed_at + min(FIRST_RETRY_SECONDS * 2.0 ** (entry.postponements - 1), _LAST_RETRY_SECONDS)


def _items_processed(entry: Ended) -> int:
    batch = entry.batch
    is_whole = entry.outcome.all_done or batch.completed
    return batch.items_total or 0 if is_whole else batch.items_done + batch.items_failed


def _by_end(entries: Sequence[Ended]) -> dict[tuple[str, str, str], Sequence[Ended]]:
    """Return the entries by queue, kind and how they ended, without those that were only released."""
    if entries and entries[0].outcome is COMPLETED and len({entry.batch.kind for entry in entries}) == 1:
        return {
            (entries[0].batch.whole_queue, entries[0].batch.kind, "completed"): entries
        }  # one way: all are completed
    found: dict[tuple[str, str, str], list[Ended]] = defaultdict(list)
    for entry in entries:
        if end := _end_of(entry.outcome):
            found[entry.batch.whole_queue, entry.batch.kind, end].append(entry)
    return dict(found)


def _end_of(outcome: Outcome) -> str | None:
    """Return completed, failed, cancelled or retried; None if the batch was only released."""
    if outcome.written:
        return "completed"
    if outcome.status == "pending":
        return "retried" if outcome.error is not None else None
    return outcome.status


def pieces(entries: list[Ended]) -> Iterator[list[Ended]]:
    """Yield the entries in the order of their ids, at most MOST_RUNS runs of consecutive ids at a time."""
    entries.sort(key=lambda entry: entry.batch.id)
    ids = [entry.batch.id for entry in entries]
    tokens = [entry.batch.claim.token_text for entry in entries]
    starts = [index for index, is_start in enumerate(endings.starts_of_runs(ids, tokens)) if is_start]
    cuts = [*starts[::MOST_RUNS], len(entries)]
    for first, end in pairwise(cuts):
        yield entries[first:end]


def _as_finish(entry: Ended) -> Finish:
    batch, outcome = entry.batch, entry.outcome
    return Finish(batch.id, batch.claim.token, outcome.status, outcome.result, outcome.error, outcome.all_done)


def _as_requeue(entry: Ended) -> Requeue:
    batch, outcome = entry.batch, entry.outcome
    return Requeue(batch.id, batch.claim.token, outcome.delay_seconds, outcome.is_release, outcome.error)


def _in_ascii(outcome: Outcome) -> Outcome:
    return outcome if outcome.error is None else replace(outcome, error=plain_object(outcome.error))


def report_late(late: Sequence[Ended]) -> None:
    """Log the outcomes that came too late: the batches were rescued, cancelled or finished elsewhere."""
    for entry in late:
        _log.warning(
            "lease lost",
            error="LeaseLost",
            batch_id=entry.batch.id,
            kind=entry.batch.kind,
            attempt=entry.batch.attempt,
            dropped=entry.outcome.status,
        )
