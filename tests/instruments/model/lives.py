"""Random lives of batches: hypothesis chooses what happens next, and after each step the rows must be the model's."""

import json
import uuid
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import psycopg
import pytest
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import batchq
from batchq.batch import Batch, Chunk
from batchq.batch.claimed import UNCHANGED, Claim, ClaimedBatch
from batchq.batch.transactions import FencedTransaction
from batchq.errors import Cancel, InvalidInput, LeaseLost, Snooze, StopRequested
from batchq.postgres.statements import claims, maintenance
from batchq.postgres.statements import leases as lease_statements
from batchq.postgres.statements.claims import ClaimedRow
from batchq.postgres.statements.running import Statement
from batchq.worker import claimer, execution
from batchq.worker.execution import Outcome
from batchq.worker.finisher import pieces
from tests.instruments.model import reality
from tests.instruments.model.reality import (
    AT_ONCE,
    KEYS,
    KINDS,
    LATER_SECONDS,
    LEASE_SECONDS,
    QUEUES,
    Reality,
    Worker,
    item,
)
from tests.instruments.model.state import FINAL, Failure, Model, Row, Saved

LATER = 2 * LATER_SECONDS
INVARIANTS_EACH_STEPS = 5  # they take longer than the comparison with the model
UNKNOWN_ID = 1_000_000_000
PRUNE_DAYS = 30
OLD_DAYS = 40
MOST_OPEN = 4  # transactions of handlers

MOSTLY_VALID = 4
which = st.integers(0, 5)
queues = st.sampled_from([QUEUES[0], *QUEUES])
priorities = st.sampled_from([0, 0, 5])
keys = st.sampled_from([None, *KEYS])
seldom = st.sampled_from([False, False, False, False, True])
mostly = st.sampled_from([True, True, True, False])
some_items = st.frozensets(st.integers(0, 4), max_size=3)
VERBS = ("cancel", "retry", "retry whole", "retry failed items", "snooze", "snooze for long", "set priority", "move")
ENDS = ("returns", "raises", "is invalid", "snoozes", "snoozes for long", "cancels", "is stopped", "has a result")


@dataclass(eq=False)
class Held:
    """A batch that a worker claimed, for as long as that worker believes it is its own, or longer: it may be paused.

    done, failed: its counters as the worker knows them. chunk, stack: the chunk that it works, its open transaction.
    last: its last checkpoint and the statement, for when the answer to its COMMIT is lost, so that it is written again.
    """

    worker: Worker
    claimed: ClaimedBatch
    keep: bool
    done: int
    failed: int
    handler: str
    used_chunks: bool = False
    ends_with_finish: bool = False
    completed: bool = False
    chunk: Chunk | None = None
    transaction: FencedTransaction | None = None
    conn: psycopg.Connection[Any] | None = None
    stack: ExitStack = field(default_factory=ExitStack)
    last: tuple[Saved, Statement] | None = None

    @property
    def batch(self) -> Batch:
        """What its handler sees."""
        return Batch(self.claimed)

    @property
    def id(self) -> int:
        """The batch's id."""
        return self.claimed.id

    @property
    def token(self) -> uuid.UUID:
        """The token of its claim."""
        return self.claimed.claim.token

    @property
    def total(self) -> int:
        """How many items it has."""
        return self.claimed.items_total or 0

    @property
    def has_worked_all(self) -> bool:
        """Whether each item was tried."""
        return self.done + self.failed == self.total


class Lives(RuleBasedStateMachine):
    """What may happen to batches; `real` is set by the test, and the same for all lives."""

    real: ClassVar[Reality]
    steps: ClassVar[int] = 0
    seen: ClassVar[dict[str, int]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.held: list[Held] = []
        self.unwritten: list[tuple[Held, Outcome, Outcome]] = []

    @initialize()
    def begin(self) -> None:
        """Three batches are claimed; in one, an item has failed in an attempt before."""
        self.real.clean()
        self.enqueue_items(2)
        self.claim(0, QUEUES[0], 0, 1, KINDS, True)
        self.work_chunk(which=0, size=2, failing=frozenset({0}), is_paused=False, is_again=False)
        self.end(which=0, how="raises", waits=False, is_paused=False)
        self.snooze(0, is_due=True)
        self.enqueue_items(3)
        self.enqueue_items(5)
        self.claim(0, QUEUES[0], 0, 3, KINDS, True)
        self.begin_more()

    def begin_more(self) -> None:
        """Whatever else there is at first."""

    def enqueue_items(self, count: int) -> None:
        """Enqueue a batch with so many items."""
        options = {"priority": 0, "unique_key": None, "max_attempts": 4, "max_failed_items": 1, "key": None}
        self.enqueue(KINDS[0], QUEUES[0], count, True, **options)

    def teardown(self) -> None:
        for held in self.held:
            if held.conn is not None:
                self.roll_back(held)

    # -------------------------------------------------------------------------------------------------- after each step

    @invariant()
    def agrees(self) -> None:
        type(self).steps += 1
        rows = self.real.rows()
        assert rows == self.model.rows, difference(rows, self.model.rows)
        assert all(row.failed == len(row.failures) for row in rows.values())
        assert self.real.effects() == self.model.effects
        if self.steps % INVARIANTS_EACH_STEPS == 0:
            assert self.real.broken_invariants() == []

    def happened(self, what: str) -> None:
        """Count what happened, so that the test can see that everything did; and show it where a life is printed."""
        self.seen[what] = self.seen.get(what, 0) + 1
        note(f"    # {what}")

    # ---------------------------------------------------------------------------------------------------- who and which

    def one_held(self, number: int) -> Held:
        """Return one of the claims, the newest first."""
        return self.one_of(self.held, number)

    def one_of(self, held: list[Held], number: int) -> Held:
        """Return one of these claims, the newest first; mostly one that has its batch still, if there is one."""
        valid = [one for one in held if self.model.held(one.id, one.token)]
        chosen = valid if valid and number < MOSTLY_VALID else held
        return chosen[-1 - number % len(chosen)]

    def one_row(self, number: int, *statuses: str) -> Row | None:
        """Return one of the batches with such a status, if there is one, the newest first."""
        rows = [row for row in self.model.rows.values() if row.status in statuses]
        rows.sort(key=lambda row: -row.id)
        return rows[number % len(rows)] if rows else None

    # ---------------------------------------------------------------------------------------------------------- enqueue

    @rule(
        kind=st.sampled_from(KINDS),
        queue=queues,
        priority=priorities,
        items=st.sampled_from([None, 0, 1, 3, 5, 5]),
        is_due=mostly,
        unique_key=st.sampled_from([None, None, "a", "b"]),
        max_attempts=st.sampled_from([1, 2, 4]),
        max_failed_items=st.integers(0, 2),
        key=keys,
    )
    def enqueue(self, kind: str, queue: str, items: int | None, is_due: bool, **options: Any) -> None:
        names = None if items is None else list(map(item, range(items)))
        delay = 0 if is_due else LATER
        batch_id = batchq.enqueue(self.real.conn, kind, items=names, queue=queue, delay_seconds=delay, **options)
        twin = self.model.twin(queue, kind, options["unique_key"])
        self.happened("enqueued" if twin is None else "not enqueued: its key is taken")
        assert (batch_id is None) == (twin is not None)
        if batch_id is not None:
            row = Row(batch_id, queue, kind, items_total=items, is_due=is_due, **options)
            self.model.rows[batch_id] = row

    @rule(kind=st.sampled_from(KINDS), queue=queues, count=st.integers(1, 3), priority=priorities, key=keys)
    def enqueue_many(self, kind: str, queue: str, count: int, **options: Any) -> None:
        assert batchq.enqueue_many(self.real.conn, kind, range(count), queue=queue, **options) == count
        for batch_id in self.real.values("SELECT id FROM batchq.all_batches ORDER BY id DESC LIMIT %s", [count]):
            self.model.rows[batch_id] = Row(batch_id, queue, kind, **options)
        self.happened("enqueued by COPY")

    # ------------------------------------------------------------------------------------------------------------ claim

    @rule(
        number=st.integers(0, 2),
        queue=queues,
        priority=priorities,
        limit=st.integers(1, 3),
        kinds=st.sampled_from([KINDS, KINDS, KINDS[:1]]),
        keep=mostly,
    )
    def claim(self, number: int, queue: str, priority: int, limit: int, kinds: tuple[str, ...], keep: bool) -> None:
        worker, token = self.real.workers[number], uuid.uuid4()
        expected = self.in_order_of_claims(self.model.ready(queue, priority, kinds))[:limit]
        statement = claims.claim(queue, priority, kinds, limit, worker.name, token, LEASE_SECONDS)
        rows = list(map(ClaimedRow._make, worker.link.run(statement, claimer.SETTINGS)))
        assert sorted(row.id for row in rows) == sorted(expected)
        claim = Claim(queue, token, worker.runtimes[keep], 0.0)
        for row in rows:
            self.take(worker, row, claim, keep)
        self.happened("claimed" if rows else "claimed nothing")

    def take(self, worker: Worker, row: ClaimedRow, claim: Claim, keep: bool) -> None:
        """A worker has claimed a batch."""
        self.model.claim(row.id, worker.name, claim.token)
        self.held.append(Held(worker, ClaimedBatch(row, claim), keep, row.items_done, row.items_failed, row.kind))

    def in_order_of_claims(self, rows: list[Row]) -> list[int]:
        """Return the ids of batches in the order in which they are claimed: only the database knows run_at."""
        query = "SELECT id FROM batchq.all_batches WHERE id = ANY (%s) ORDER BY run_at, id"
        return self.real.values(query, [[row.id for row in rows]])

    def release_claim(self, which: int) -> None:
        """The answer to a claim was lost: whatever it claimed goes back."""
        held = self.one_held(which)
        mine = [row for row in self.model.rows.values() if row.is_held(held.token) and row.queue == held.batch.queue]
        with held.worker.link.transaction() as conn:
            assert claims.release_claim(conn, held.batch.queue, held.token) == len(mine)
        for row in mine:
            self.model.requeue(row.id, held.token, None, True, None)
        self.happened("gave a claim back" if mine else "gave back nothing")

    # --------------------------------------------------------------------------------------------------- a batch's work

    @precondition(lambda self: self.idle())
    @rule(which=which, size=st.integers(1, 3), opens=st.booleans())
    def begin_chunk(self, which: int, size: int, opens: bool) -> None:
        """A handler asks for its next chunk, and begins the transaction of its own rows, or does so later."""
        self.next_chunk_of(self.one_idle(which), size, opens)

    def next_chunk_of(self, held: Held, size: int, opens: bool) -> None:
        """Ask for a handler's next chunk."""
        held.used_chunks = True
        try:
            held.chunk = next(iter(held.batch.chunks(size)), None)
        except LeaseLost:
            assert not held.has_worked_all
            assert self.model.held(held.id, held.token) is None
            self.lost(held, "asked for a chunk, too late")
            return
        indexes = self.next_indexes(held, size)
        assert (list(held.chunk.indexes) if held.chunk else []) == indexes
        if held.chunk is not None:
            self.happened("began a chunk of items that had failed" if held.chunk.is_retry else "began a chunk")
            if opens and sum(other.conn is not None for other in self.held) < MOST_OPEN:
                self.open(held, held.chunk.transaction())

    def idle(self) -> list[Held]:
        """Return the claims whose handler is between two chunks."""
        return [held for held in self.ending() if not held.completed]

    def ending(self) -> list[Held]:
        """Return the claims whose handler may end now."""
        ended = [held for held, *_ in self.unwritten]
        return [held for held in self.held if held.chunk is None and held not in ended]

    def one_idle(self, number: int) -> Held:
        """Return one of the claims whose handler is between two chunks, the newest first."""
        return self.one_of(self.idle(), number)

    def next_indexes(self, held: Held, size: int) -> list[int]:
        """Return which items the next chunk has."""
        if not held.has_worked_all:
            assert self.model.held(held.id, held.token) is not None
            first = held.done + held.failed
            return list(range(first, min(first + size, held.total)))
        return self.curable(held)[:size] if held.failed else []

    def curable(self, held: Held) -> list[int]:
        """Return the failed items that this attempt has not tried yet; none for a worker that has lost the batch."""
        row = self.model.held(held.id, held.token)
        if row is None:
            return []
        return [i for i, f in sorted(row.failures.items()) if f.retryable and f.attempt < held.batch.attempt]

    def open(self, held: Held, transaction: FencedTransaction) -> None:
        """Begin a handler's transaction."""
        held.transaction = transaction
        held.conn = held.stack.enter_context(transaction)

    def end_transaction(self, held: Held) -> bool:
        """Commit a handler's transaction; tell whether the batch was still its own."""
        try:
            held.stack.close()
        except LeaseLost:
            return False
        finally:
            held.chunk, held.conn = None, None
        return True

    def lost(self, held: Held, what: str) -> None:
        """Note that a worker came too late. It goes on as if it did not know."""
        held.claimed.interrupt = None
        self.happened(what)

    @precondition(lambda self: self.idle())
    @rule(which=which, size=st.integers(1, 3), failing=some_items, is_paused=seldom, is_again=seldom)
    def work_chunk(self, which: int, size: int, failing: frozenset[int], is_paused: bool, is_again: bool) -> None:
        """A handler asks for its next chunk and works it, nothing between but maybe a pause."""
        held = self.one_idle(which)
        self.next_chunk_of(held, size, opens=False)
        if held.chunk is not None:
            self.end_chunk_of(held, failing, False, True, is_paused, is_again)

    @precondition(lambda self: any(held.chunk for held in self.held))
    @rule(
        which=which,
        failing=some_items,
        beyond_cure=st.booleans(),
        commits=mostly,
        is_paused=seldom,
        is_again=seldom,
    )
    def end_chunk(
        self, which: int, failing: frozenset[int], beyond_cure: bool, commits: bool, is_paused: bool, is_again: bool
    ) -> None:
        """A handler has worked a chunk: its rows and the checkpoint commit together; or it fails, and they do not."""
        working = [held for held in self.held if held.chunk]
        self.end_chunk_of(self.one_of(working, which), failing, beyond_cure, commits, is_paused, is_again)

    def end_chunk_of(
        self, held: Held, failing: frozenset[int], beyond_cure: bool, commits: bool, is_paused: bool, is_again: bool
    ) -> None:
        """End a handler's chunk."""
        chunk = held.chunk
        assert chunk
        if is_paused:
            self.paused(held)
        if held.conn is None:
            self.open(held, chunk.transaction())
        assert held.conn
        assert held.transaction
        for index in chunk.indexes:
            reality.add_effect(held.conn, held.id, index)
        if not commits:
            self.roll_back(held)
            return
        error: Exception = InvalidInput("no") if beyond_cure else ValueError("no")
        for position, index in enumerate(chunk.indexes):
            if index in failing:
                chunk.fail(position, error)
        saved = self.saved(held, chunk, failing, error)
        is_mine = self.model.checkpoint(held.id, held.token, saved)
        assert self.end_transaction(held) == is_mine
        if not is_mine:
            self.lost(held, "committed a chunk, too late")
            return
        self.model.effects.update((held.id, index) for index in chunk.indexes)
        self.took_over(held, saved, held.claimed.checkpoint_statement(held.transaction.progress))
        if is_again:
            self.write_again(held)
        self.happened("committed a chunk with failures" if saved.failures else "committed a chunk")

    def roll_back(self, held: Held) -> None:
        """Leave a handler's transaction by an error."""
        with pytest.raises(KeyError), held.stack:
            raise KeyError
        held.stack, held.chunk, held.conn = ExitStack(), None, None
        self.happened("rolled a chunk back")

    def saved(self, held: Held, chunk: Chunk, failing: frozenset[int], error: Exception) -> Saved:
        """Return what the commit of a chunk says."""
        failed = [index for index in chunk.indexes if index in failing]
        worked = tuple(index for index in chunk.indexes if index not in failing)
        text, is_curable = f"{type(error).__name__}: {error}", not isinstance(error, InvalidInput)
        values = dict(zip(chunk.indexes, chunk.items, strict=True))
        failures = {index: Failure(held.batch.attempt, is_curable, text, values[index]) for index in failed}
        if chunk.is_retry:
            return Saved(held.done, held.failed, recovered=worked, failures=failures, is_retry=True)
        return Saved(held.done, held.failed, done=len(worked), failures=failures)

    def took_over(self, held: Held, saved: Saved, statement: Statement) -> None:
        """The worker knows that its checkpoint was committed."""
        held.done += saved.done + len(saved.recovered)
        held.failed += -len(saved.recovered) if saved.is_retry else len(saved.failures)
        held.last = saved, statement
        assert (held.batch.items_done, held.batch.items_failed) == (held.done, held.failed)

    @precondition(lambda self: self.idle())
    @rule(which=which, cursor=st.integers(0, 9), is_paused=seldom)
    def checkpoint(self, which: int, cursor: int, is_paused: bool) -> None:
        """A handler saves its own cursor."""
        held = self.one_idle(which)
        if is_paused:
            self.paused(held)
        saved = Saved(held.done, held.failed, cursors=(cursor,))
        is_mine = self.model.checkpoint(held.id, held.token, saved)
        statement = held.claimed.checkpoint_statement(
            held.claimed.progress()._replace(keeps_cursor=False, cursor=str(cursor))
        )
        try:
            held.batch.checkpoint(cursor)
        except LeaseLost:
            assert not is_mine
            self.lost(held, "saved a cursor, too late")
        else:
            assert is_mine
            assert held.batch.cursor == cursor
            self.took_over(held, saved, statement)
            self.happened("saved a cursor")

    @precondition(lambda self: any(held.last for held in self.held))
    @rule(which=which)
    def checkpoint_again(self, which: int) -> None:
        saved_ones = [held for held in self.held if held.last]
        self.write_again(self.one_of(saved_ones, which))

    def write_again(self, held: Held) -> None:
        """The answer to a checkpoint's COMMIT was lost, so it is written again, maybe late."""
        assert held.last
        saved, statement = held.last
        is_mine = self.model.checkpoint(held.id, held.token, saved)
        with held.worker.link.transaction() as conn:
            assert conn.execute(*statement).rowcount == is_mine
        self.happened("wrote a checkpoint again" if is_mine else "wrote a checkpoint again, in vain")

    @precondition(lambda self: self.idle())
    @rule(
        which=which,
        result=st.sampled_from([None, 7]),
        cursor=st.sampled_from([UNCHANGED, UNCHANGED, 5]),
        is_paused=seldom,
    )
    def transaction(self, which: int, result: Any, cursor: Any, is_paused: bool) -> None:
        """A handler's own transaction: its row and the completion, or its row and the checkpoint."""
        held = self.one_idle(which)
        if is_paused:
            self.paused(held)
        completes = cursor is UNCHANGED
        if completes and held.batch.items_total is not None and not held.has_worked_all:
            with pytest.raises(InvalidInput):
                held.batch.transaction(result=result)
            self.happened("refused to complete items that were not worked")
            return
        transaction = held.batch.transaction(cursor=cursor, result=result)
        self.open(held, transaction)
        assert held.conn
        reality.add_effect(held.conn, held.id, -1)
        saved = Saved(held.done, held.failed, cursors=(cursor,))
        if completes:
            is_mine = self.model.finish(held.id, held.token, "completed", result, None, True, held.keep)
        else:
            is_mine = self.model.checkpoint(held.id, held.token, saved)
        statement = transaction.write()
        assert self.end_transaction(held) == is_mine
        if not is_mine:
            self.lost(held, "committed a transaction, too late")
            return
        self.model.effects[held.id, -1] += 1
        held.completed = completes
        self.happened("completed in a transaction" if completes else "committed a transaction")
        if not completes:
            self.took_over(held, saved, statement)

    # ------------------------------------------------------------------------------------------------------ how it ends

    @precondition(lambda self: self.ending())
    @rule(which=which, how=st.sampled_from(ENDS), waits=seldom, is_paused=seldom)
    def end(self, which: int, how: str, waits: bool, is_paused: bool) -> None:
        """A handler ends; the finisher writes that at once, or it waits until there is more to write."""
        self.end_of(self.one_of(self.ending(), which), how, waits, is_paused)

    def end_of(self, held: Held, how: str, waits: bool, is_paused: bool) -> None:
        """End a handler."""
        if is_paused:
            self.paused(held)
        handler = self.real.handlers[held.handler]
        error = self.error_of(how)
        if error is not None:
            outcome = execution.raised(held.claimed, handler, error)
            expected = self.expected_error(held, how)
        else:
            result = 3 if how == "has a result" else None
            outcome = execution.returned(held.claimed, handler, result)
            expected = self.expected_return(held, result)
        self.happened(f"a handler {how}")
        self.put(held, outcome, execution.WRITTEN if held.completed else expected, waits)

    def error_of(self, how: str) -> BaseException | None:
        """Return what a handler raises."""
        return {
            "raises": ValueError("no"),
            "is invalid": InvalidInput("no"),
            "snoozes": Snooze(0),
            "snoozes for long": Snooze(LATER),
            "cancels": Cancel("no"),
            "is stopped": StopRequested("no"),
        }.get(how)

    def expected_error(self, held: Held, how: str) -> Outcome:
        """Return the outcome of a handler that raised."""
        match how:
            case "snoozes":
                return Outcome("pending", delay_seconds=0, is_release=True)
            case "snoozes for long":
                return Outcome("pending", delay_seconds=LATER, is_release=True)
            case "is stopped":
                return Outcome("pending", is_release=True)
            case "cancels":
                return Outcome("cancelled", error="cancelled: no")
            case "is invalid":
                return Outcome("failed", error="InvalidInput: no")
        return self.again_or_failed(held, "ValueError: no")

    def back_off(self, held: Held) -> float:
        """Return how long a failed attempt waits for the next."""
        return 0 if held.handler in AT_ONCE else LATER

    def again_or_failed(self, held: Held, error: str) -> Outcome:
        """Return the outcome of a failed attempt."""
        if held.batch.attempt < held.batch.max_attempts:
            return Outcome("pending", error=error, delay_seconds=self.back_off(held))
        return Outcome("failed", error=error)

    def expected_return(self, held: Held, result: Any) -> Outcome:
        """Return the outcome of a handler that came to its end."""
        if held.used_chunks and not held.has_worked_all:
            worked = held.done + held.failed
            text = f"the handler returned after {worked} of {held.total} items; iterate to the end of chunks()"
            return self.again_or_failed(held, text)
        text = None if result is None else str(result)
        if held.failed == 0:
            all_done = held.batch.items_total is not None and (held.ends_with_finish or not held.used_chunks)
            return Outcome("completed", text, all_done=all_done)
        return self.expected_with_failures(held, text)

    def expected_with_failures(self, held: Held, result: str | None) -> Outcome:
        """Return the outcome of a batch some of whose items failed."""
        row = self.model.rows.get(held.id)
        failures = row.failures if row is not None and row.queue == held.batch.queue else {}
        first = failures[min(failures)].error if failures else None
        text = f"{held.failed} of {held.total} items failed; the first: {first}"
        if held.batch.attempt < held.batch.max_attempts and any(f.retryable for f in failures.values()):
            return Outcome("pending", error=text, delay_seconds=self.back_off(held))
        if held.failed <= held.claimed.row.max_failed_items:
            return Outcome("completed", result)
        return Outcome("failed", error=text)

    @precondition(lambda self: self.idle())
    @rule(
        which=which,
        kind=st.sampled_from(["plain", "transactional"]),
        failing=some_items,
        dies=st.sampled_from([False, False, False, True]),
    )
    def run_item_handler(self, which: int, kind: str, failing: frozenset[int], dies: bool) -> None:
        """An item handler works all that is left; its worker may die before that is written."""
        held = self.one_idle(which)
        self.real.failing, self.real.batch_id, held.handler = failing, held.id, kind
        outcome = execution.run(held.claimed, self.real.handlers[kind])
        expected = self.expected_run(held, kind == "transactional", failing)
        self.happened(f"ran a {kind} item handler, {'too late' if expected.written else 'and all was committed'}")
        if dies:
            self.held.remove(held)
        else:
            self.put(held, outcome, expected, waits=False)

    def expected_run(self, held: Held, is_transactional: bool, failing: frozenset[int]) -> Outcome:
        """Have the model work all items that are left, two a chunk; return the outcome."""
        held.used_chunks = True
        if not held.has_worked_all and self.model.held(held.id, held.token) is None:
            held.claimed.interrupt = None
            return execution.WRITTEN
        while indexes := self.next_chunk(held):
            failed = [index for index in indexes if index in failing]
            is_last = not held.has_worked_all and indexes[-1] == held.total - 1
            if is_last and not is_transactional and not failed and held.failed == 0:
                held.done, held.ends_with_finish = held.total, True
                break
            saved = self.saved_by_run(held, indexes, failed)
            if not self.model.checkpoint(held.id, held.token, saved):
                held.claimed.interrupt = None
                return execution.WRITTEN
            self.took_over_unseen(held, saved)
            if is_transactional:
                self.model.effects.update((held.id, index) for index in indexes if index not in failed)
        return self.expected_return(held, None)

    def next_chunk(self, held: Held) -> list[int]:
        """Return the items of the next chunk of two, as the worker sees it."""
        first = held.done + held.failed
        if first < held.total:
            return list(range(first, min(first + 2, held.total)))
        return self.curable(held)[:2] if held.failed else []

    def saved_by_run(self, held: Held, indexes: list[int], failed: list[int]) -> Saved:
        """Return what an item handler's checkpoint says."""
        text = "ValueError: {} fails"
        failures = {i: Failure(held.batch.attempt, True, text.format(item(i)), item(i)) for i in failed}
        worked = tuple(index for index in indexes if index not in failed)
        if held.has_worked_all:
            return Saved(held.done, held.failed, recovered=worked, failures=failures, is_retry=True)
        return Saved(held.done, held.failed, done=len(worked), failures=failures)

    def took_over_unseen(self, held: Held, saved: Saved) -> None:
        """Move the counters as the worker knows them."""
        held.done += saved.done + len(saved.recovered)
        held.failed += -len(saved.recovered) if saved.is_retry else len(saved.failures)
        held.last = None

    # ----------------------------------------------------------------------------------------------------- the finisher

    def put(self, held: Held, outcome: Outcome, expected: Outcome, waits: bool) -> None:
        """Hand an outcome to the finisher, after a look at it."""
        assert told(outcome) == expected, f"is: {told(outcome)}, should: {expected}"
        self.unwritten.append((held, outcome, expected))
        if not waits:
            self.write()

    @precondition(lambda self: self.unwritten)
    @rule()
    def write(self) -> None:
        """Write all that has ended and is not written yet, each worker its own, many in one statement."""
        for worker in self.real.workers:
            for keep in (True, False):
                self.write_of(worker, keep)

    def write_of(self, worker: Worker, keep: bool) -> None:
        """Write what has ended in one worker."""
        mine = [entry for entry in self.unwritten if entry[0].worker is worker and entry[0].keep == keep]
        self.unwritten = [entry for entry in self.unwritten if entry not in mine]
        finisher = worker.finishers[keep]
        lane: Any = SimpleNamespace(written=0)
        for held, outcome, _ in mine:
            finisher.put(lane, held.claimed, outcome)
        group = list(finisher.todo)
        finisher.todo.clear()
        expected = {id(held.claimed): (held, outcome) for held, _, outcome in mine}
        for (queue, way), entries in finisher.by_target(group).items():
            for piece in pieces(entries) if way == "complete" else [entries]:
                lost = {entry.batch.id for entry in finisher.write(queue, piece)}
                written = {entry.batch.id for entry in piece if self.end_in_model(*expected[id(entry.batch)])}
                assert lost == {entry.batch.id for entry in piece} - written
                self.happened("wrote outcomes, some too late" if lost else "wrote outcomes")

    def end_in_model(self, held: Held, outcome: Outcome) -> bool:
        """Have the model end a batch; tell whether it was still its worker's."""
        if outcome.status == "pending":
            is_due = None if outcome.delay_seconds is None else outcome.delay_seconds == 0
            return self.model.requeue(held.id, held.token, is_due, outcome.is_release, outcome.error)
        result = None if outcome.result is None else int(outcome.result)
        return self.model.finish(
            held.id, held.token, outcome.status, result, outcome.error, outcome.all_done, held.keep
        )

    # ----------------------------------------------------------------------------------------------------------- leases

    @precondition(lambda self: self.held)
    @rule(numbers=st.lists(which, min_size=1, max_size=3))
    def extend(self, numbers: list[int]) -> None:
        """A keeper extends leases, those of batches among them that are no longer its own."""
        queue = self.one_held(numbers[0]).batch.queue
        chosen = {held.id: held for held in map(self.one_held, numbers) if held.batch.queue == queue}
        keys = [(held.id, held.token) for held in chosen.values()]
        statement = lease_statements.extend(queue, [key[0] for key in keys], [key[1] for key in keys], LEASE_SECONDS)
        leases = lease_statements.leases(self.real.workers[0].link.run(statement))
        rows = {key: self.model.held(*key) for key in keys}
        assert leases.extended == {key for key, row in rows.items() if row}
        assert leases.lost == {key for key, row in rows.items() if not row}
        for row in filter(None, rows.values()):
            row.lease = "running"
        self.happened("extended leases" if leases.extended else "extended nothing")

    @precondition(lambda self: self.held)
    @rule(
        which=which,
        what=st.sampled_from(["runs out", "rescue", "rescue one", "dies", "pause", "claim is given back"]),
        queue=queues,
    )
    def leases(self, which: int, what: str, queue: str) -> None:
        match what:
            case "runs out":
                self.lease_runs_out(which)
            case "dies":
                self.worker_dies()
            case "pause":
                self.paused(self.one_held(which))
            case "claim is given back":
                self.release_claim(which)
            case _:
                self.rescue(queue, 1 if what == "rescue one" else 100)

    def lease_runs_out(self, which: int) -> None:
        """A worker is paused, or dead, for its whole lease."""
        if row := self.one_row(which, "processing"):
            self.end_lease(row)

    def end_lease(self, row: Row) -> None:
        """Have a batch's lease run out."""
        statement = "UPDATE batchq.batches_live SET lease_expires_at = now() - interval '9 s' WHERE id = %s"
        self.real.conn.execute(statement, [row.id])
        row.lease = "ran out"
        self.happened("a lease ran out")

    def worker_dies(self) -> None:
        """The worker of a batch with the fewest attempts left dies, and a keeper takes the batch back."""
        rows = [row for row in self.model.rows.values() if row.status == "processing"]
        if rows:
            row = min(rows, key=lambda row: row.max_attempts - row.attempt)
            self.end_lease(row)
            self.rescue(row.queue, 100)

    def rescue(self, queue: str, limit: int) -> None:
        """A keeper takes back what has no worker."""
        dead = [row.id for row in self.model.rows.values() if row.queue == queue and row.lease == "ran out"]
        query = "SELECT id FROM batchq.batches_live WHERE id = ANY (%s) ORDER BY lease_expires_at LIMIT %s"
        expected = self.real.values(query, [dead, limit])
        with self.real.workers[0].link.transaction() as conn:
            rescued = lease_statements.rescue(conn, queue, limit)
        attempts = {batch_id: self.model.rows[batch_id].attempt for batch_id in expected}
        statuses = {batch_id: self.model.rescue(batch_id) for batch_id in expected}
        kinds = {batch_id: self.model.rows[batch_id].kind for batch_id in expected}
        assert sorted(rescued) == sorted((i, kinds[i], attempts[i], statuses[i]) for i in expected)
        for status in statuses.values():
            self.happened(f"rescued: {status}")

    def paused(self, held: Held) -> None:
        """A worker is paused beyond its lease, and another has its batch: what it does later must change nothing."""
        row = self.model.held(held.id, held.token)
        if row is not None:
            lease_of = "UPDATE batchq.batches_live SET lease_expires_at = 'epoch' WHERE id = %s"
            self.real.conn.execute(lease_of, [row.id])
            row.lease = "ran out"
            self.rescue(row.queue, 100)
            self.claim_as_another((self.real.workers.index(held.worker) + 1) % 3, row)

    def claim_as_another(self, number: int, row: Row) -> None:
        """Another worker claims, maybe this batch."""
        self.claim(number, row.queue, row.priority, 3, KINDS, True)

    # ------------------------------------------------------------------------------------------------------- for people

    @rule(which=which, verb=st.sampled_from(VERBS), priority=priorities, queue=st.sampled_from(QUEUES))
    def person(self, which: int, verb: str, priority: int, queue: str) -> None:
        """A person does something to a batch."""
        match verb:
            case "cancel":
                self.cancel(which)
            case "retry" | "retry whole":
                self.retry(which, verb == "retry whole")
            case "retry failed items":
                self.retry_failed_items(which)
            case "snooze" | "snooze for long":
                self.snooze(which, verb == "snooze")
            case "set priority":
                self.set_priority(which, priority)
            case "move":
                self.move(which, queue)

    def any_id(self, number: int) -> int:
        """Return the id of a batch, or one that there is not."""
        row = self.one_row(number, "pending", "processing", *FINAL)
        return row.id if row else UNKNOWN_ID

    def cancel(self, which: int) -> None:
        batch_id = self.any_id(which)
        status = self.real.values("SELECT batchq.cancel(%s, 'no')", [batch_id])
        assert status == [self.model.cancel(batch_id, "no")]
        self.happened(f"asked to cancel: {status[0]}")

    def retry(self, which: int, whole: bool) -> None:
        batch_id = self.any_id(which)
        try:
            expected = self.model.retry(batch_id, whole)
        except ValueError as refused:
            with pytest.raises(psycopg.Error, match=str(refused)):
                self.real.values("SELECT batchq.retry(%s, %s)", [batch_id, whole])
            self.happened(f"asked to retry, refused: {refused}")
        else:
            assert self.real.values("SELECT batchq.retry(%s, %s)", [batch_id, whole]) == [expected]
            self.happened(f"asked to retry: {expected}")

    def retry_failed_items(self, which: int) -> None:
        row = self.one_row(which, *FINAL)
        if row is None or self.model.twin(row.queue, row.kind, row.unique_key):
            return
        expected = self.model.retry(row.id, False) if row.failed else row.status
        assert self.real.values("SELECT batchq.retry_items(%s)", [row.id]) == [expected]
        self.happened("had failed items retried" if expected == "pending" else "no failed items to retry")

    def snooze(self, which: int, is_due: bool) -> None:
        batch_id = self.any_id(which)
        row = self.model.rows.get(batch_id)
        delay = 0 if is_due else LATER
        found = self.real.values("SELECT batchq.snooze(%s, %s * interval '1 second')", [batch_id, delay])
        assert found == [row.status if row else None]
        if row and row.status == "pending":
            row.is_due = is_due
            self.happened("snoozed by a person")

    def set_priority(self, which: int, priority: int) -> None:
        batch_id = self.any_id(which)
        row = self.model.rows.get(batch_id)
        found = self.real.values("SELECT batchq.set_priority(%s, %s)", [batch_id, priority])
        assert found == [row.status if row else None]
        if row and row.status == "pending":
            row.priority = priority
            self.happened("had its priority set")

    def move(self, which: int, queue: str) -> None:
        batch_id = self.any_id(which)
        row = self.model.rows.get(batch_id)
        twin = self.model.twin(queue, row.kind, row.unique_key) if row else None
        if row and row.status == "pending" and twin not in (None, row):
            with pytest.raises(psycopg.errors.UniqueViolation):
                self.real.values("SELECT batchq.move(%s, %s)", [batch_id, queue])
            return
        assert self.real.values("SELECT batchq.move(%s, %s)", [batch_id, queue]) == [row.status if row else None]
        if row and row.status == "pending" and row.queue != queue:
            row.queue = queue
            self.happened("moved to another queue")

    # ------------------------------------------------------------------------------------------------------ maintenance

    @rule(which=which, what=st.sampled_from(["a batch becomes old", "prune", "prune a partition"]))
    def maintain(self, which: int, what: str) -> None:
        if what == "a batch becomes old":
            self.time_passes(which)
        else:
            self.prune(has_partition=what == "prune a partition")

    def time_passes(self, which: int) -> None:
        """A finished batch becomes old."""
        if row := self.one_row(which, *FINAL):
            moved = "UPDATE batchq.batches_finished SET finished_at = now() - %s * interval '1 day' WHERE id = %s"
            failed = "UPDATE batchq.failed_items SET failed_at = now() - %s * interval '1 day' WHERE batch_id = %s"
            for statement in (moved, failed):
                self.real.conn.execute(statement.encode(), [OLD_DAYS, row.id])
            row.is_old = True
            self.happened("a batch became old")

    def prune(self, has_partition: bool) -> None:
        """A keeper drops what is old, a partition of those days with it if there is one."""
        if has_partition:
            query = "SELECT batchq.create_finished_partitions((now() - %s * interval '1 day')::date, 1)"
            self.real.values(query, [OLD_DAYS + 1])
        with self.real.workers[0].link.transaction() as conn:
            maintenance.prune(conn, PRUNE_DAYS)
        self.happened("pruned" if any(row.is_old for row in self.model.rows.values()) else "had nothing to prune")
        self.model.prune()


def difference(real: dict[int, Row], model: dict[int, Row]) -> str:
    """Return the rows that differ, as they are and as the model has them."""
    ids = [batch_id for batch_id in real.keys() | model.keys() if real.get(batch_id) != model.get(batch_id)]
    return "\n".join(f"is:     {real.get(batch_id)}\nshould: {model.get(batch_id)}" for batch_id in ids)


def told(outcome: Outcome) -> Outcome:
    """Return an outcome without what varies: the traceback, and by how much a back-off is jittered."""
    if outcome.error is not None:
        outcome = replace(outcome, error=json.loads(outcome.error)["error"])
    return replace(outcome, delay_seconds=LATER) if outcome.delay_seconds else outcome
