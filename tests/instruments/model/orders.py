"""Every order of two transactions: operations that touch batches, all merges of their steps, and what must come out.

A transaction is one step that begins it and runs its statement, and one that commits it; between them is a step for its
second statement, if it has one. A step that waits for a lock lets the other transaction go on. A gate, a third session
that holds one of the two batches at first, lets a statement be interrupted between its two rows. What waits for no lock
(a claim, an extension, a rescue, a verb in bulk) passes over locked rows and finds them at its next round: so it is run
once more at the end, in a serial run as well.
"""

import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple
from uuid import UUID

import psycopg

from batchq.postgres.statements import checkpoints, claims, endings, leases
from batchq.postgres.statements import session as session_statements
from batchq.postgres.statements.checkpoints import ItemFailure, Progress
from batchq.postgres.statements.endings import Finish, Requeue
from batchq.postgres.statements.running import Statement
from tests.instruments.model.reality import LOOK, as_row, broken_invariants

TOKEN, NEW_TOKEN = UUID(int=1), UUID(int=2)
BOTH = (1, 2)
REVERSED = (2, 1)
LEASE_SECONDS = 3600
BUSY_SECONDS = 60.0
MAINTENANCE_MILLISECONDS = 500
TRIES = 20


class Operation(NamedTuple):
    """What one session does to the batches 1 and 2. *stages*: where it changes anything. *skips_locked*: see above.

    *may_give_way*: it may be refused a lock, by design, and is then tried again. *then*: returns its second statement,
    if there is to be one, from the rows of the first.
    """

    name: str
    statement: Statement
    stages: Sequence[str]
    skips_locked: bool = False
    may_give_way: bool = False
    then: Callable[[Sequence[Any]], Statement | None] | None = None

    @property
    def steps(self) -> int:
        """How many steps its transaction has."""
        return 2 if self.then is None else 3


STAGES = ("pending", "processing", "expired", "failed", "old")


def call(text: str, **parameters: Any) -> Statement:
    """Return a statement of a person's."""
    return text, parameters  # type: ignore[return-value]


def operations() -> Iterator[Operation]:
    """Yield every operation; those over two rows with the rows in both orders."""
    live, running, ended = ("pending", "processing"), ("processing", "expired"), ("failed", "old")
    claim = claims.claim("q", 0, ["k"], 10, "w2", NEW_TOKEN, LEASE_SECONDS)
    yield Operation("claim", claim, ["pending"], skips_locked=True)
    rescue = {"queue": "q", "limit": 10, "spread_seconds": 0.0, "after": float("-inf"), "skipped": [], "only": None}
    yield Operation("rescue", (leases.RESCUE, rescue), ["expired"], skips_locked=True)
    completed = ("q", BOTH, [str(TOKEN)] * 2)  # in the order of the ids, as the finisher gives them
    yield Operation("complete", endings.complete(*completed), running)
    yield Operation("complete and forget", endings.complete(*completed, keep=False), running)
    for name, ids in (("1, 2", BOTH), ("2, 1", REVERSED)):
        tokens = [TOKEN] * 2
        finishes = [Finish(i, TOKEN, "failed", None, '{"error": "no"}') for i in ids]
        requeues = [Requeue(i, TOKEN, 0.0, False, '{"error": "no"}') for i in ids]
        yield Operation(f"finish {name}", endings.finish("q", finishes), running)
        yield Operation(f"requeue {name}", endings.requeue("q", requeues), running)
        yield Operation(f"extend {name}", leases.extend("q", ids, tokens, LEASE_SECONDS), running, skips_locked=True)
        array = list(ids)
        cancel = call("SELECT batchq.cancel_live('q', %(ids)s, '{pending,processing}', 'no')", ids=array)
        yield Operation(f"bulk cancel {name}", cancel, live, skips_locked=True)
        retry = call("SELECT batchq.revive('q', %(ids)s, 'failed', false, '-infinity', 'infinity')", ids=array)
        yield Operation(f"bulk retry {name}", retry, ended, skips_locked=True)
        move = call("SELECT batchq.change_pending('q', %(ids)s, new_queue => 'q2')", ids=array)
        yield Operation(f"bulk move {name}", move, ["pending"], skips_locked=True)
    for i in BOTH:
        yield from operations_on(i)
    yield from maintenance()


def operations_on(i: int) -> Iterator[Operation]:
    """Yield the operations on one batch."""
    live, running, ended = ("pending", "processing"), ("processing", "expired"), ("failed", "old")
    cures = Progress(2, 0, [ItemFailure(3, "no", True)], [1], 2, done_before=1, failed_before=1)
    moves = Progress(1, 0, keeps_cursor=False, cursor="7", done_before=1, failed_before=1)
    yield Operation(f"checkpoint {i}", checkpoints.checkpoint("q", i, TOKEN, LEASE_SECONDS, cures), running)
    yield Operation(f"plain checkpoint {i}", checkpoints.checkpoint("q", i, TOKEN, LEASE_SECONDS, moves), running)
    yield Operation(f"cancel {i}", call("SELECT batchq.cancel(%(i)s)", i=i), live)
    yield Operation(f"retry {i}", call("SELECT batchq.retry(%(i)s)", i=i), ["pending", *ended])
    yield Operation(f"retry whole {i}", call("SELECT batchq.retry(%(i)s, true)", i=i), ["pending", *ended])
    yield Operation(f"retry items {i}", call("SELECT batchq.retry_items(%(i)s)", i=i), ended)
    yield Operation(f"snooze {i}", call("SELECT batchq.snooze(%(i)s, '1 day')", i=i), ["pending"])
    yield Operation(f"set priority {i}", call("SELECT batchq.set_priority(%(i)s, 3)", i=i), ["pending"])
    yield Operation(f"move {i}", call("SELECT batchq.move(%(i)s, 'q2')", i=i), ["pending"])


def maintenance() -> Iterator[Operation]:
    """Yield what keepers and migrations do to the tables, and an INSERT that meets a unique key."""
    everywhere = ("processing", "failed", "old")
    insert = call(
        "INSERT INTO batchq.batches (queue, kind, unique_key) VALUES ('q', 'k', 'key 1') ON CONFLICT DO NOTHING"
    )
    yield Operation("enqueue its unique key", insert, ["pending", "failed"])
    prune = call("SELECT batchq.prune('30 days')")
    yield Operation("prune", prune, everywhere, may_give_way=True)
    create = call("SELECT batchq.create_finished_partitions('2099-01-01', 1)")
    yield Operation("create partitions", create, everywhere, may_give_way=True)
    columns = call(
        "ALTER TABLE batchq.batches ADD COLUMN IF NOT EXISTS more text; "
        "ALTER TABLE batchq.batches_live ALTER COLUMN more SET DEFAULT ''; "
        "ALTER TABLE batchq.batches_finished ALTER COLUMN more SET DEFAULT ''"
    )
    yield Operation("migrate columns", columns, everywhere, may_give_way=True)
    yield Operation("migrate triggers", call("SELECT batchq.bell(true)"), everywhere, may_give_way=True)


class Case(NamedTuple):
    """Two operations on batches in one stage, the order of their steps, and the batch that a gate holds at first.

    *most_of_key*: how many batches with a key may run at any time.
    """

    one: Operation
    other: Operation
    stage: str
    order: tuple[int, ...]
    gate: int | None = None
    most_of_key: int | None = None

    def __str__(self) -> str:
        steps = " ".join(f"{'AB'[who]}{self.order[:place].count(who) + 1}" for place, who in enumerate(self.order))
        gate = f", batch {self.gate} held at first" if self.gate else ""
        return f"A: {self.one.name} | B: {self.other.name} | {self.stage}: {steps}{gate}"


def cases() -> Iterator[Case]:
    """Yield every pair of operations, in each stage that concerns one of them, in every order."""
    table = list(operations())
    for number, one in enumerate(table):
        for other in table[number:]:
            for stage in STAGES:
                if stage in one.stages or stage in other.stages:
                    yield from cases_of(one, other, stage)


def merges(one: Operation, other: Operation) -> Iterator[tuple[int, ...]]:
    """Yield all merges of the steps of two operations."""
    count = one.steps + other.steps
    for places in combinations(range(count), one.steps):
        yield tuple(0 if place in places else 1 for place in range(count))


def cases_of(one: Operation, other: Operation, stage: str) -> Iterator[Case]:
    """Yield all merges of the steps; behind a gate only who comes first makes a difference."""
    for order in merges(one, other):
        yield Case(one, other, stage, order)
    if one.skips_locked or other.skips_locked:
        return
    for gate in BOTH:
        for order in ((0, 1, 0, 1), (1, 0, 1, 0)):
            yield Case(one, other, stage, order, gate)


# -------------------------------------------------------------------------------------------------------------- running


class Session:
    """A connection in a thread of its own, so that a step of it may wait for a lock."""

    def __init__(self, dsn: str) -> None:
        self.conn = psycopg.connect(dsn, autocommit=True, prepare_threshold=None)
        self.pid = self.conn.info.backend_pid
        self.thread = ThreadPoolExecutor(1)
        self.todo: deque[Callable[[], None]] = deque()
        self.now: Future[None] | None = None
        self.error: str | None = None
        self.rows: Sequence[Any] = ()

    def begin(self, operation: Operation) -> None:
        """Have the steps of an operation before it."""
        self.error = None
        self.todo = deque([lambda: self.run(operation), lambda: self.execute("COMMIT")])
        if operation.then is not None:
            self.todo.insert(1, lambda: self.go_on(operation))

    def run(self, operation: Operation) -> None:
        """Begin a transaction, bounded as everywhere, and run its statement."""
        self.execute("BEGIN")
        self.execute(session_statements.transaction_settings(30, 30, session_statements.FORCE_INDEX_AND_HASH_JOIN))
        if operation.may_give_way:
            session_statements.set_lock_timeout(self.conn, MAINTENANCE_MILLISECONDS)
        statement, parameters = operation.statement
        cursor = self.conn.execute(statement, parameters or None)
        self.rows = cursor.fetchall() if cursor.description else ()

    def go_on(self, operation: Operation) -> None:
        """Run the second statement."""
        statement = operation.then(self.rows) if operation.then else None
        if statement is not None:
            self.conn.execute(*statement)

    def execute(self, text: str) -> None:
        """Run a command."""
        self.conn.execute(text.encode())

    def step(self) -> None:
        """Begin the next step, if there is one."""
        if self.todo:
            self.now = self.thread.submit(self.todo.popleft())

    def is_busy(self) -> bool:
        """Tell whether a step has not ended. After one that failed the transaction is rolled back."""
        if self.now is not None and self.now.done():
            error = self.now.exception()
            if error is not None:
                if not isinstance(error, psycopg.Error):
                    raise error
                self.error = error.sqlstate
                self.todo.clear()
                self.execute("ROLLBACK")
            self.now = None
        return self.now is not None

    def close(self) -> None:
        """End the thread and the connection."""
        self.thread.shutdown()
        self.conn.close()


Outcome = tuple[str, tuple[str | None, ...]]


@dataclass
class Laboratory:
    """Two sessions, one that looks, and one for the gate."""

    sessions: tuple[Session, Session]
    looker: psycopg.Connection[Any]
    gate: psycopg.Connection[Any]
    serial: dict[tuple[str, str, str], list[Outcome]]

    @classmethod
    def at(cls, dsn: str) -> "Laboratory":
        """Open all connections."""
        looker = psycopg.connect(dsn, autocommit=True, prepare_threshold=0)
        looker.execute(RELEASES, prepare=False)
        return cls((Session(dsn), Session(dsn)), looker, psycopg.connect(dsn), {})

    def close(self) -> None:
        """Close all connections."""
        for session in self.sessions:
            session.close()
        self.looker.close()
        self.gate.close()

    # ------------------------------------------------------------------------------------------------------ one case

    def outcome(self, case: Case) -> Outcome:
        """Run a case; return the rows that came out, and the errors that were met."""
        self.set_up(case.stage)
        operations = (case.one, case.other)
        for session, operation in zip(self.sessions, operations, strict=True):
            session.begin(operation)
        if case.gate:
            self.gate.execute("SELECT FROM batchq.batches WHERE id = %s FOR UPDATE", [case.gate])
        for place, who in enumerate(case.order):
            if not self.sessions[who].is_busy():
                self.sessions[who].step()
            self.settle()
            self.check_limit(case)
            if place == 1:
                self.gate.rollback()
                self.settle()
        self.run_out()
        return self.after(operations)

    def check_limit(self, case: Case) -> None:
        """Check how many batches with a key run now."""
        if case.most_of_key is not None:
            query = "SELECT count(*) FROM batchq.batches_live WHERE key IS NOT NULL AND status = 'processing'"
            row = self.looker.execute(query).fetchone()
            assert row
            assert row[0] <= case.most_of_key, f"{case}: {row[0]} run"

    def after(self, operations: Sequence[Operation]) -> Outcome:
        """Let who gave way try again, and who passes over locked rows have its next round; return what came out."""
        errors = [session.error for session in self.sessions]
        for number, (session, operation) in enumerate(zip(self.sessions, operations, strict=True)):
            if operation.may_give_way and errors[number] == "55P03":
                errors[number] = None
                self.alone(session, operation)
        for session, operation in zip(self.sessions, operations, strict=True):
            if operation.skips_locked:
                self.alone(session, operation)
        self.looker.execute(FOLLOW_FLOWS)
        broken = map(str, broken_invariants(self.looker))
        return "\n".join([self.digest(), *broken]), tuple(errors)

    def alone(self, session: Session, operation: Operation) -> None:
        """Run an operation while nothing else runs."""
        session.begin(operation)
        self.run_out()
        assert session.error is None, f"{operation.name}: {session.error}"

    def run_out(self) -> None:
        """Let both sessions come to their end."""
        until = time.monotonic() + BUSY_SECONDS
        while any(session.is_busy() or session.todo for session in self.sessions):
            assert time.monotonic() < until, "two transactions wait for ever"
            for session in self.sessions:
                if not session.is_busy():
                    session.step()
            self.settle()

    def settle(self) -> None:
        """Wait until each session has ended its step, or waits for a lock."""
        until = time.monotonic() + BUSY_SECONDS
        for session in self.sessions:
            while session.is_busy() and not self.waits(session):
                assert time.monotonic() < until, "a step neither ends nor waits for a lock"

    def waits(self, session: Session) -> bool:
        """Tell whether a session waits for a lock that somebody holds; else give it a moment to end its step."""
        try:
            assert session.now is not None
            session.now.exception(timeout=0.002)
        except TimeoutError:
            query = "SELECT wait_event_type IS NOT DISTINCT FROM 'Lock' FROM pg_stat_activity WHERE pid = %s"
            row = self.looker.execute(query, [session.pid]).fetchone()
            return bool(row and row[0])
        return False

    def serial_outcomes(self, case: Case) -> list[Outcome]:
        """Return what comes out when one operation follows the other, in both orders."""
        key = (case.one.name, case.other.name, case.stage)
        if key not in self.serial:
            one, other = (0,) * case.one.steps, (1,) * case.other.steps
            orders = (one + other, other + one)
            self.serial[key] = [self.outcome(case._replace(order=order, gate=None)) for order in orders]
        return self.serial[key]

    # ------------------------------------------------------------------------------------------------------- the rows

    def set_up(self, stage: str) -> None:
        """Have the batches 1 and 2 in a stage, each with four items, of which one is done and one has failed."""
        self.looker.execute(f"{CLEAN}; {STAGE[stage]}; {FAILED_ITEMS.get(stage, '')}".encode(), prepare=False)

    def digest(self) -> str:
        """Return all rows, as far as they do not depend on the clock; batches by their age, since ids may be new."""
        rows = [as_row(row) for row in self.looker.execute(LOOK).fetchall()]
        items = (
            "SELECT batch_id, queue, item_index, attempt, retryable, error FROM batchq.failed_items ORDER BY 1, 2, 3"
        )
        found = [row for query in (items, SHARES, *FLOWS) for row in self.looker.execute(query).fetchall()]
        return with_small_ids("\n".join(map(str, [*rows, *found])))


def with_small_ids(text: str) -> str:
    """Return a text with its ids from 1000 up in one row: a transaction that came to nothing leaves a gap."""
    ids = sorted(set(map(int, NEW_ID.findall(text))))
    return NEW_ID.sub(lambda found: f"new {ids.index(int(found[0]))}", text)


NEW_ID = re.compile(r"\b1\d{3}\b")
SHARES = "SELECT worker, running, wanted_running, in_use FROM batchq.limit_shares ORDER BY worker"
# The rest of what belongs to flows and parts. Nobody has anything left to do for them, and each was released so often.
FLOWS = (
    "SELECT 'live', id, needs_left, is_needed, spread, part_of FROM batchq.batches_live ORDER BY id",
    "SELECT 'needs', needed_id, batch_id, queue, on_failure, ended_as FROM batchq.needs ORDER BY needed_id, batch_id",
    "SELECT 'part', batch_id, first_item, items, queue, part_id, items_done, items_failed, ended_as, error, "
    "is_gathered FROM batchq.parts ORDER BY batch_id, first_item",
    "SELECT 'left to do', needed_id, status FROM batchq.flow_events ORDER BY id",
    "SELECT 'released', batch_id, count(*) FROM releases GROUP BY batch_id ORDER BY batch_id",
)
FOLLOW_FLOWS = "SELECT batchq.follow_flows(0) FROM generate_series(1, 4) WHERE EXISTS (SELECT FROM batchq.flow_events)"
RELEASES = """
CREATE TABLE releases (batch_id bigint NOT NULL);
CREATE FUNCTION note_release() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO public.releases VALUES (NEW.id);
  RETURN NULL;
END $$;
CREATE TRIGGER note_release AFTER UPDATE ON batchq.batches_live
  FOR EACH ROW WHEN (OLD.status = 'waiting' AND NEW.status = 'pending') EXECUTE FUNCTION note_release();
"""
CLEAN = (
    "DELETE FROM batchq.batches; DELETE FROM batchq.batches_finished; DELETE FROM batchq.failed_items; "
    "DELETE FROM batchq.limits; "
    "DELETE FROM batchq.limit_shares; DELETE FROM batchq.needs; DELETE FROM batchq.flow_events; "
    "DELETE FROM batchq.parts; DELETE FROM releases; "
    "SELECT setval(pg_get_serial_sequence('batchq.batches', 'id'), 999)"
)
INSERT = """
INSERT INTO batchq.batches (id, queue, kind, unique_key, items, items_done, items_failed, attempt, status, claimed_by,
  claimed_at, claim_token, lease_expires_at, run_at, finished_at)
OVERRIDING SYSTEM VALUE
SELECT id, 'q', 'k', 'key ' || id, '["a", "b", "c", "d"]', 1, 1, 1, {}, '2020-01-01', {}
FROM generate_series(1, 2) AS id
"""
CLAIMED = "'processing', 'w1', now(), '00000000-0000-0000-0000-000000000001'"
STAGE = {
    "pending": INSERT.format("'pending', NULL, NULL, NULL, NULL::timestamptz", "NULL::timestamptz"),
    "processing": INSERT.format(f"{CLAIMED}, now() + interval '10 min'", "NULL::timestamptz"),
    "expired": INSERT.format(f"{CLAIMED}, now() - interval '10 min'", "NULL::timestamptz"),
    "failed": INSERT.format("'failed', 'w1', now(), NULL, NULL::timestamptz", "now()"),
    "old": INSERT.format("'failed', 'w1', now(), NULL, NULL::timestamptz", "now() - interval '40 days'"),
}
FAILED = """
INSERT INTO batchq.failed_items (queue, batch_id, item_index, item, error, attempt, failed_at)
SELECT 'q', id, 1, '"b"', 'no', 1, {}
FROM generate_series(1, 2) AS id
"""
FAILED_ITEMS = {stage: FAILED.format("now() - interval '40 days'" if stage == "old" else "now()") for stage in STAGES}
