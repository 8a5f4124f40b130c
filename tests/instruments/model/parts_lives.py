"""Random lives of batches that are spread: after each step they, their parts and the ranges of these are those of a
simple model, in which the ends of parts count only when a worker follows flows."""

from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar
from uuid import UUID

import psycopg
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from psycopg.types.json import Jsonb

from batchq.postgres.statements import checkpoints, claims, endings
from batchq.postgres.statements.checkpoints import ItemFailure, Progress
from batchq.postgres.statements.endings import Finish, Requeue
from batchq.postgres.statements.running import Statement
from tests.instruments.model.orders import CLEAN, RELEASES
from tests.instruments.model.reality import COLLECT, broken_invariants, drop_partitions_ahead
from tests.instruments.model.state import FINAL
from tests.support.layouts import layout

QUEUE, KIND, TOKEN = "default", "k", UUID(int=1)
IS_DISTRIBUTED = layout() != "plain"
LEASE_SECONDS = 3600
LOOK = """
SELECT id, status, items_done, items_failed, CASE status WHEN 'waiting' THEN needs_left END FROM batchq.all_batches
"""
RANGES = """
SELECT batch_id, first_item, items, part_id, items_done, items_failed, is_gathered
FROM batchq.parts
ORDER BY batch_id, first_item
"""
BARS = """
SELECT b.id
FROM batchq.all_batches b CROSS JOIN LATERAL batchq.progress_of_parts(b.id) p
WHERE b.items_done + p.items_done + b.items_failed + p.items_failed > b.items_total
"""

MANY = 100
MOST_ROUNDS = 500

which = st.integers(0, 7)


@dataclass
class Row:
    """A batch, or a part of one. *left*: for how many parts it waits."""

    id: int
    total: int
    status: str = "pending"
    done: int = 0
    failed: int = 0
    left: int | None = None
    whole: "Row | None" = None
    ranges: "list[Range]" = field(default_factory=list)

    @property
    def worked(self) -> int:
        """How many items it has tried."""
        return self.done + self.failed


@dataclass
class Range:
    """Items of a batch, and the part that works them; its counters, once it has ended."""

    first: int
    size: int
    part: int | None = None
    done: int = 0
    failed: int = 0
    is_gathered: bool = False
    ended: str | None = None

    @property
    def is_worked(self) -> bool:
        """Whether all its items have been tried."""
        return self.done + self.failed == self.size

    @property
    def is_open(self) -> bool:
        """Whether the batch waits for its part."""
        return self.part is not None and not self.is_gathered


class PartsModel:
    """Batches and parts, by id."""

    def __init__(self) -> None:
        self.rows: dict[int, Row] = {}

    def ranges_to_be(self, row: Row, most: int) -> list[Range] | None:
        """Return the ranges that a batch gets when it is spread; None: it is left as it is."""
        if any(one.part is not None and not one.is_worked for one in row.ranges):
            return None
        if not row.ranges:
            count, start = row.total - row.worked, row.worked
            parts = min(most, count)
            bounds = [start + count * number // parts for number in range(parts + 1)] if parts > 1 else []
            found = [Range(first, end - first) for first, end in pairwise(bounds)]
            return found or None
        return [piece for one in row.ranges for piece in self.pieces(one)]

    def pieces(self, one: Range) -> list[Range]:
        """Return a range that was worked in part as two."""
        worked = one.done + one.failed
        if worked in (0, one.size):
            return [one]
        return [Range(one.first, worked, None, one.done, one.failed, True, one.ended),
                Range(one.first + worked, one.size - worked)]  # fmt: skip

    def end_part(self, part: Row, status: str) -> None:
        """A part ends, whatever ends it."""
        assert part.whole
        part.status = status
        one = next(one for one in part.whole.ranges if one.part == part.id)
        one.done, one.failed, one.ended = part.done, part.failed, status

    def gather(self, ended: list[Range]) -> None:
        """Parts that have ended belong to the whole."""
        for one in ended:
            assert one.part is not None
            one.is_gathered = True
            del self.rows[one.part]

    def cancel(self, row: Row) -> None:
        """A batch is cancelled with its parts."""
        for one in [one for one in row.ranges if one.is_open]:
            assert one.part is not None
            if self.rows[one.part].status not in FINAL:
                self.end_part(self.rows[one.part], "cancelled")
            self.gather([one])
        row.status, row.left = "cancelled", None

    def count(self, row: Row) -> None:
        """No part is open: the batch is ready, and has worked what they have, if that is all."""
        row.status, row.left = "pending", None
        if all(one.is_worked for one in row.ranges):
            row.done += sum(one.done for one in row.ranges)
            row.failed += sum(one.failed for one in row.ranges)
            for one in row.ranges:
                one.done = one.failed = 0

    def follow(self) -> None:
        """A worker follows flows until nothing is left to do."""
        for row in [row for row in self.rows.values() if row.status == "waiting"]:
            ended = [one for one in row.ranges if one.is_open and one.ended]
            if not ended:
                continue
            self.gather(ended)
            if any(one.ended == "cancelled" for one in ended):
                self.cancel(row)
                continue
            row.left = sum(one.is_open for one in row.ranges)
            if row.left == 0:
                self.count(row)

    def retry(self, row: Row, whole: bool) -> None:
        """A person retries a batch that has ended."""
        row.status = "pending"
        for one in row.ranges:
            one.part = None
        if whole:
            row.done, row.failed, row.ranges = 0, 0, []


class PartsLives(RuleBasedStateMachine):
    """What may happen to batches that are spread; `conn` is set by the test, and the same for all lives."""

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
        self.model = PartsModel()
        self.conn.execute(CLEAN.encode(), prepare=False)

    # -------------------------------------------------------------------------------------------------- after each step

    @invariant()
    def agrees(self) -> None:
        type(self).steps += 1
        self.conn.execute(COLLECT)
        rows = self.model.rows.values()
        found = {batch_id: rest for batch_id, *rest in self.conn.execute(LOOK).fetchall()}
        assert found == {row.id: [row.status, row.done, row.failed, row.left] for row in rows}
        assert self.conn.execute(RANGES).fetchall() == [
            (row.id, one.first, one.size, one.part, one.done, one.failed, one.is_gathered)
            for row in sorted(rows, key=lambda row: row.id)
            for one in row.ranges
        ]
        assert self.conn.execute(BARS).fetchall() == []
        if self.steps % 3 == 0:
            assert broken_invariants(self.conn) == []

    def happened(self, what: str) -> None:
        """Count what happened."""
        self.seen[what] += 1

    def wholes(self, *statuses: str) -> list[Row]:
        """Return the batches that are no parts and have such a status."""
        return [row for row in self.model.rows.values() if row.whole is None and row.status in statuses]

    def parts(self) -> list[Row]:
        """Return the parts that are processing."""
        return [row for row in self.model.rows.values() if row.whole is not None and row.status == "processing"]

    def value(self, text: str, *parameters: Any) -> Any:
        """Return the value of a query."""
        row = self.conn.execute(text.encode(), parameters or None).fetchone()
        assert row
        return row[0]

    def run(self, statement: Statement) -> list[Any]:
        """Run a statement of a worker's; return its rows, if it has any."""
        cursor = self.conn.execute(*statement)
        return cursor.fetchall() if cursor.description else []

    # ------------------------------------------------------------------------------------------------------------ steps

    @initialize()
    def begin(self) -> None:
        """A batch is spread, and its parts are claimed."""
        self.enqueue_and_spread(8, 3)

    @rule(total=st.sampled_from([5, 8]), most=st.integers(2, 3))
    def enqueue_and_spread(self, total: int, most: int) -> None:
        self.enqueue(total)
        self.claim(MANY)
        self.spread(0, most)
        self.claim(MANY)

    @rule(total=st.sampled_from([1, 2, 3]))
    def enqueue(self, total: int) -> None:
        insert = "INSERT INTO batchq.batches (kind, items, max_attempts) VALUES ('k', %s, 1000) RETURNING id"
        batch_id = self.value(insert, Jsonb(list(range(total))))
        self.model.rows[batch_id] = Row(batch_id, total)

    @rule(most=st.sampled_from([1, 3, MANY]))
    def claim(self, most: int) -> None:
        statement = claims.claim(QUEUE, 0, [KIND], most, "w", TOKEN, LEASE_SECONDS, is_distributed=IS_DISTRIBUTED)
        claimed = self.run(statement)
        ready = [row for row in self.model.rows.values() if row.status == "pending"]
        assert len(claimed) == min(most, len(ready))
        for batch_id, *_ in claimed:
            assert self.model.rows[batch_id].status == "pending"
            self.model.rows[batch_id].status = "processing"

    @precondition(lambda self: any(row.worked < row.total for row in self.wholes("processing")))
    @rule(which=which, most=st.integers(2, 3))
    def spread(self, which: int, most: int) -> None:
        rows = [row for row in self.wholes("processing") if row.worked < row.total]
        row = rows[-1 - which % len(rows)]
        was_spread, ranges = bool(row.ranges), self.model.ranges_to_be(row, most)
        call = "SELECT parts, error IS NOT NULL, is_left FROM batchq.spread_batch(%s, %s, %s, %s)"
        answer = self.conn.execute(call.encode(), [QUEUE, row.id, TOKEN, most]).fetchone()
        if ranges is None:
            assert answer == ((0, True, None) if was_spread else (1, False, None))
            self.happened("not spread: a part has failed" if was_spread else "not spread: too few items")
            return
        row.ranges = ranges
        new = [one for one in ranges if not one.is_worked]
        assert answer == (len(new), False, True)
        query = "SELECT part_id FROM batchq.parts WHERE batch_id = %s AND first_item = %s"
        for one in new:
            one.part, one.is_gathered, one.ended = self.value(query, row.id, one.first), False, None
            self.model.rows[one.part] = Row(one.part, one.size, whole=row)
        row.status, row.left = "waiting", len(new)
        if not new:
            self.model.count(row)
        self.happened(f"spread{' again' if was_spread else ''}, {'some' if new else 'no'} items left")

    @precondition(lambda self: self.parts())
    @rule(which=which, done=st.integers(0, 2), fails=st.booleans())
    def work(self, which: int, done: int, fails: bool) -> None:
        part = self.parts()[-1 - which % len(self.parts())]
        first = part.worked
        done = min(done, part.total - first)
        fails = fails and first + done < part.total
        failures = [ItemFailure(first + done, "no", False)] if fails else []
        progress = Progress(done, len(failures), failures, (), first, done_before=part.done, failed_before=part.failed)
        self.run(checkpoints.checkpoint(QUEUE, part.id, TOKEN, LEASE_SECONDS, progress))
        part.done, part.failed = part.done + done, part.failed + len(failures)
        self.happened("worked some of a part")

    @precondition(lambda self: self.parts())
    @rule(which=which, how=st.sampled_from(["completed", "completed", "completed", "failed", "cancelled", "put back"]))
    def end_part(self, which: int, how: str) -> None:
        part = self.parts()[-1 - which % len(self.parts())]
        if how == "put back":
            assert self.run(endings.requeue(QUEUE, [Requeue(part.id, TOKEN, 0.0, True, None)]))
            part.status = "pending"
        else:
            error = None if how == "completed" else '{"error": "no"}'
            self.run(endings.finish(QUEUE, [Finish(part.id, TOKEN, how, None, error, how == "completed")]))
            part.done = part.total - part.failed if how == "completed" else part.done
            self.model.end_part(part, how)
        self.happened(f"a part was {how}")

    @precondition(lambda self: self.parts())
    @rule(first=st.sampled_from(["completed", "completed", "failed"]), follows=st.booleans())
    def end_all_parts(self, first: str, follows: bool) -> None:
        """All parts that run end; then maybe a batch that is ready because of that."""
        self.end_part(0, first)
        while self.parts():
            self.end_part(0, "completed")
        if not follows:
            return
        self.follow(MANY)
        self.claim(MANY)
        if any(row.worked < row.total for row in self.wholes("processing")):
            self.spread(0, 3)
        if self.wholes("processing"):
            self.end(0, False)

    @precondition(lambda self: self.wholes("processing"))
    @rule(which=which, is_failed=st.booleans())
    def end(self, which: int, is_failed: bool) -> None:
        rows = self.wholes("processing")
        row = rows[-1 - which % len(rows)]
        is_failed = is_failed or (bool(row.ranges) and row.worked < row.total)
        row.status = "failed" if is_failed else "completed"
        error = '{"error": "no"}' if is_failed else None
        assert self.run(endings.finish(QUEUE, [Finish(row.id, TOKEN, row.status, None, error, not is_failed)]))
        row.done = row.done if is_failed else row.total - row.failed
        self.happened(f"{row.status}, after it was spread" if row.ranges else row.status)

    @precondition(lambda self: self.wholes("pending", "processing", "waiting"))
    @rule(which=which)
    def cancel(self, which: int) -> None:
        rows = self.wholes("pending", "processing", "waiting")
        row = rows[-1 - which % len(rows)]
        self.happened(f"cancelled, {row.status}")
        self.model.cancel(row)
        assert self.value("SELECT batchq.cancel(%s)", row.id) == "cancelled"

    @precondition(lambda self: self.wholes("failed", "cancelled"))
    @rule(which=which, whole=st.sampled_from([False, False, True]))
    def retry(self, which: int, whole: bool) -> None:
        rows = self.wholes("failed", "cancelled")
        row = rows[-1 - which % len(rows)]
        self.happened(f"retried{' as a whole' if whole else ''}, {row.status}{', spread' if row.ranges else ''}")
        self.model.retry(row, whole)
        assert self.value("SELECT batchq.retry(%s, %s)", row.id, whole) == "pending"

    @precondition(lambda self: any(row.ranges for row in self.wholes("failed", "cancelled")))
    @rule(which=which, whole=st.sampled_from([False, False, True]))
    def retry_and_spread(self, which: int, whole: bool) -> None:
        """What was spread and has ended is worked again."""
        self.retry(which, whole)
        self.claim(MANY)
        if any(row.worked < row.total for row in self.wholes("processing")):
            self.spread(0, 3)
            self.claim(MANY)

    @rule(most=st.sampled_from([500, 500, 1]))
    def follow(self, most: int) -> None:
        for _ in range(MOST_ROUNDS):
            if not self.value("SELECT seen FROM batchq.follow_flows(0, %s)", most):
                break
        self.model.follow()
        assert self.value("SELECT count(*) FROM batchq.flow_events") == 0
        self.happened("followed flows")
