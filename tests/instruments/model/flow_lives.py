"""Random lives of batches that wait for others: after each step their statuses are those of a simple model, in which
the ends of batches count only when a worker follows flows."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar
from uuid import UUID

import psycopg
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import batchq
from batchq.postgres.statements import claims, endings
from batchq.postgres.statements.endings import Finish, Requeue
from batchq.postgres.statements.running import Statement
from tests.instruments.model.orders import CLEAN, RELEASES
from tests.instruments.model.reality import COLLECT, broken_invariants, drop_partitions_ahead
from tests.instruments.model.state import FINAL
from tests.support.layouts import layout

QUEUE, KIND, TOKEN = "default", "k", UUID(int=1)
IS_DISTRIBUTED = layout() != "plain"
LOOK = "SELECT id, status, coalesce(needs_left, 0) FROM batchq.all_batches"
NEEDS = "SELECT batch_id, needed_id, ended_as FROM batchq.needs"
RELEASED = "SELECT batch_id, count(*) FROM releases GROUP BY batch_id"
MOST_ROUNDS = 100
MANY = 100

which = st.integers(0, 7)
policies = st.sampled_from(["wait", "run", "cancel"])


@dataclass
class Row:
    """A batch. *needs*: how each that it waits for has ended, as far as that was counted. *is_needed*: its end will be
    written down. *is_stored*: it is in the table."""

    id: int
    after: tuple[int, ...] = ()
    on_failure: str = "wait"
    status: str = "pending"
    needs: dict[int, str | None] = field(default_factory=dict)
    left: int = 0
    is_needed: bool = False
    is_stored: bool = True


class FlowModel:
    """Batches, and what workers have yet to do for flows: *asked*, to look at a batch that somebody began to wait for;
    *noted*, how batches have ended. *released*: how often each became pending."""

    def __init__(self) -> None:
        self.rows: dict[int, Row] = {}
        self.asked: set[int] = set()
        self.noted: dict[int, str] = {}
        self.released: Counter[int] = Counter()

    def add(self, row: Row) -> None:
        """Somebody enqueues a batch."""
        self.rows[row.id] = row
        self.begin_to_wait(row)

    def begin_to_wait(self, row: Row) -> None:
        """A batch waits, from now on, for all that it needs."""
        row.needs = dict.fromkeys(row.after)
        row.left = len(row.after)
        row.status = "waiting" if row.after else "pending"
        self.asked |= set(row.after)

    def end(self, row: Row, status: str, is_stored: bool = True) -> None:
        """A batch ends, whatever ends it."""
        row.status, row.is_stored = status, is_stored
        if row.is_needed:
            self.noted[row.id] = status
        row.is_needed = False

    def retry(self, row: Row) -> None:
        """A person retries a batch that has ended: if that was while it waited, it waits again."""
        if row.left > 0:
            self.begin_to_wait(row)
        else:
            row.status = "pending"
        row.is_needed = any(row.id in other.needs for other in self.rows.values())

    def dependents(self, row: Row) -> list[Row]:
        """Return what waits for a batch, and what waits for that, and so on."""
        reached = {row.id}
        while more := {other.id for other in self.rows.values() if reached & other.needs.keys()} - reached:
            reached |= more
        return [other for other in self.rows.values() if other.id in reached - {row.id} and other.status == "waiting"]

    def follow(self) -> None:
        """A worker follows flows until nothing is left to do."""
        while self.asked or self.noted:
            ended = {batch_id: end for batch_id in sorted(self.asked) if (end := self.mark(self.rows[batch_id]))}
            ended |= self.noted
            self.asked, self.noted = set(), {}
            for row in [row for row in self.rows.values() if row.status == "waiting"]:
                self.count(row, {i: ended[i] for i in row.needs if i in ended})

    def mark(self, row: Row) -> str | None:
        """A worker looks at a batch that is needed; return how it has ended, if it has."""
        if row.status in FINAL:
            return row.status
        row.is_needed = True
        return None

    def count(self, row: Row, ended: dict[int, str]) -> None:
        """Ends count for a batch that waits."""
        new = {i: end for i, end in ended.items() if row.needs[i] is None or row.on_failure == "wait"}
        if row.on_failure == "cancel" and any(end != "completed" for end in new.values()):
            self.end(row, "cancelled")
            return
        for i, end in new.items():
            if row.needs[i] != "completed":
                row.needs[i] = end
                row.left -= row.on_failure != "wait" or end == "completed"
        if row.left == 0:
            row.status = "pending"
            self.released[row.id] += 1


class FlowLives(RuleBasedStateMachine):
    """What may happen to batches in flows; `conn` is set by the test, and the same for all lives."""

    conn: ClassVar[psycopg.Connection[Any]]
    steps: ClassVar[int] = 0
    seen: ClassVar[Counter[str]] = Counter()

    @classmethod
    def prepare(cls, conn: psycopg.Connection[Any]) -> None:
        """Use a database."""
        drop_partitions_ahead(conn)
        conn.execute(RELEASES, prepare=False)
        cls.conn, cls.steps, cls.seen = conn, 0, Counter()

    def __init__(self) -> None:
        super().__init__()
        self.model = FlowModel()
        self.conn.execute(CLEAN.encode(), prepare=False)

    # -------------------------------------------------------------------------------------------------- after each step

    @invariant()
    def agrees(self) -> None:
        type(self).steps += 1
        self.conn.execute(COLLECT)
        rows = {batch_id: rest for batch_id, *rest in self.conn.execute(LOOK).fetchall()}
        assert rows == {row.id: [row.status, row.left] for row in self.model.rows.values() if row.is_stored}
        assert dict(self.conn.execute(RELEASED).fetchall()) == dict(self.model.released)
        if self.steps % 5 == 0:
            assert broken_invariants(self.conn) == []

    def happened(self, what: str) -> None:
        """Count what happened."""
        self.seen[what] += 1

    def one(self, number: int, *statuses: str) -> Row | None:
        """Return one of the batches that have such a status, the newest first."""
        rows = [row for row in self.model.rows.values() if row.is_stored and row.status in statuses]
        return rows[-1 - number % len(rows)] if rows else None

    def call(self, text: str, *parameters: Any) -> Any:
        """Return the value of a query."""
        row = self.conn.execute(text.encode(), parameters or None).fetchone()
        assert row
        return row[0]

    def run(self, statement: Statement) -> list[Any]:
        """Run a statement of a worker's; return its rows."""
        return self.conn.execute(*statement).fetchall()

    # ------------------------------------------------------------------------------------------------------------ steps

    @initialize()
    def begin(self) -> None:
        """Some wait for others, which run."""
        self.enqueue_flow("wait")

    @rule(on_failure=policies)
    def enqueue_flow(self, on_failure: str) -> None:
        """Two batches, one after both, and one after this; all that may run does."""
        for needed in ([], [], [0, 1], [0]):
            self.enqueue(needed, on_failure)
        self.follow()
        self.claim(MANY)

    @rule(needed=st.lists(which, max_size=3), on_failure=policies)
    def enqueue(self, needed: Sequence[int], on_failure: str) -> None:
        ids = [row.id for row in self.model.rows.values() if row.is_stored]
        after = tuple(sorted({ids[-1 - number % len(ids)] for number in needed})) if ids else ()
        batch_id = batchq.enqueue(self.conn, KIND, after=after or None, on_failure=on_failure if after else None)
        assert batch_id
        self.model.add(Row(batch_id, after, on_failure))
        self.happened("enqueued" if not after else f"enqueued to wait, {on_failure}")

    @rule(most=st.sampled_from([1, 2, MANY]))
    def claim(self, most: int) -> None:
        claimed = self.run(claims.claim(QUEUE, 0, [KIND], most, "w", TOKEN, 3600, is_distributed=IS_DISTRIBUTED))
        ready = [row for row in self.model.rows.values() if row.status == "pending"]
        assert len(claimed) == min(most, len(ready))
        for batch_id, *_ in claimed:
            assert self.model.rows[batch_id].status == "pending"
            self.model.rows[batch_id].status = "processing"
        self.happened("claimed" if claimed else "claimed nothing")

    @precondition(lambda self: self.one(0, "processing"))
    @rule(which=which, how=st.sampled_from(["completed", "completed", "failed", "cancelled", "forgotten", "put back"]))
    def end(self, which: int, how: str) -> None:
        row = self.one(which, "processing")
        assert row
        shown = -row.id if row.is_needed else row.id
        if how == "put back":
            assert self.run(endings.requeue(QUEUE, [Requeue(row.id, TOKEN, 0.0, True, None)]))[0][0] in (row.id, shown)
            row.status = "pending"
        elif how in ("failed", "cancelled"):
            end = Finish(row.id, TOKEN, how, None, '{"error": "no"}')
            assert self.run(endings.finish(QUEUE, [end])) == [(shown,)]
            self.model.end(row, how)
        else:
            statement = endings.complete(QUEUE, [row.id], [str(TOKEN)], how == "completed", IS_DISTRIBUTED)
            assert self.run(statement) == [(shown,)]
            is_kept = how == "completed" or (IS_DISTRIBUTED and row.is_needed)  # there, its row is the note of its end
            self.model.end(row, "completed", is_stored=is_kept)
        self.happened(f"{how}, needed" if shown < 0 else how)

    @rule(which=which, with_dependents=st.booleans())
    def cancel(self, which: int, with_dependents: bool) -> None:
        row = self.one(which, "pending", "processing", "waiting", *FINAL)
        if row is None:
            return
        dependents = self.model.dependents(row) if with_dependents else []
        if row.status not in FINAL:
            self.model.end(row, "cancelled")
        verb = "cancel_with_dependents" if with_dependents else "cancel"
        assert self.call(f"SELECT batchq.{verb}(%s)", row.id) == row.status
        for other in dependents:
            self.model.end(other, "cancelled")
        self.happened(f"{verb}{' some' if dependents else ''}")

    @precondition(lambda self: self.one(0, "failed", "cancelled"))
    @rule(which=which)
    def retry(self, which: int) -> None:
        row = self.one(which, "failed", "cancelled")
        assert row
        self.model.retry(row)
        assert self.call("SELECT batchq.retry(%s)", row.id) == "pending"
        self.happened("retried, waits again" if row.status == "waiting" else "retried")

    @rule(which=which)
    def run_anyway(self, which: int) -> None:
        row = self.one(which, "waiting", "waiting", "pending", "processing", *FINAL)
        if row is not None:
            if row.status == "waiting":
                row.status, row.left = "pending", 0
                self.model.released[row.id] += 1
                self.happened("run anyway")
            assert self.call("SELECT batchq.run_anyway(%s)", row.id) == row.status

    @rule()
    def follow(self) -> None:
        before = self.model.released.total()
        for _ in range(MOST_ROUNDS):
            if not self.call("SELECT seen FROM batchq.follow_flows(0)"):
                break
        self.model.follow()
        assert self.call("SELECT count(*) FROM batchq.flow_events") == 0
        self.happened("followed flows, released some" if self.model.released.total() > before else "followed flows")
        self.agrees_with_needs(row for row in self.model.rows.values() if row.status == "waiting")

    def agrees_with_needs(self, rows: Iterable[Row]) -> None:
        """Compare how what batches wait for has ended, as far as that was counted."""
        ends = {(batch_id, needed): end for batch_id, needed, end in self.conn.execute(NEEDS).fetchall()}
        for row in rows:
            assert {needed: ends[row.id, needed] for needed in row.after} == row.needs
