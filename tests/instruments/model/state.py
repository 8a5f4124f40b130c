"""The model: what batchq promises of its rows, without SQL, locks and time. Each method is one thing that happens."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import UUID

FINAL = ("completed", "failed", "cancelled")
MOST_ERRORS = 10
DIED = "worker died: {} did not renew its lease"


class Failure(NamedTuple):
    """A failed item: the attempt in which it failed last, whether another may cure it, its error, itself."""

    attempt: int
    retryable: bool
    error: str
    item: Any


@dataclass
class Row:
    """A batch, as far as it does not depend on the clock. *lease*: "running", "ran out", or None."""

    id: int
    queue: str
    kind: str
    priority: int = 0
    unique_key: str | None = None
    max_attempts: int = 5
    max_failed_items: int = 0
    items_total: int | None = None
    key: str | None = None
    status: str = "pending"
    is_due: bool = True
    has_begun: bool = False  # and has a key, which it keeps until it ends
    attempt: int = 0
    worker: str | None = None
    token: UUID | None = None
    lease: str | None = None
    done: int = 0
    failed: int = 0
    cursor: Any = None
    result: Any = None
    errors: list[tuple[int, str]] = field(default_factory=list)
    failures: dict[int, Failure] = field(default_factory=dict)
    is_old: bool = False

    def is_held(self, token: UUID) -> bool:
        """Tell whether whoever claimed it with *token* has it still."""
        return self.status == "processing" and self.token == token

    def add_error(self, error: str | None) -> None:
        """Note the error of an attempt."""
        if error is not None:
            self.errors = [*self.errors, (self.attempt, error)][-MOST_ERRORS:]

    def end(self, status: str, error: str | None = None) -> None:
        """Come to a final status."""
        self.add_error(error)
        self.status, self.token, self.lease, self.has_begun = status, None, None, False

    def wait(self, is_due: bool, error: str | None = None) -> None:
        """Become pending again."""
        self.add_error(error)
        self.status, self.worker, self.token, self.lease, self.is_due = "pending", None, None, None, is_due

    def start_over(self) -> None:
        """Forget all progress."""
        self.done, self.failed, self.cursor, self.failures = 0, 0, None, {}


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says: the counters it starts from, the items that succeeded and that failed, the cursor."""

    done_before: int
    failed_before: int
    done: int = 0
    recovered: tuple[int, ...] = ()
    failures: Mapping[int, Failure] = field(default_factory=dict)
    is_retry: bool = False
    cursors: tuple[Any, ...] = ()


class Model:
    """Every batch there is, and *effects*: how often the handlers' own rows were committed for (batch, item).

    per_key: how many batches of a key may run, by queue and kind; the kind is None for all kinds of a queue.
    """

    def __init__(self) -> None:
        self.rows: dict[int, Row] = {}
        self.effects: Counter[tuple[int, int]] = Counter()
        self.per_key: dict[tuple[str, str | None], int] = {}

    def twin(self, queue: str, kind: str, unique_key: str | None) -> Row | None:
        """Return the live batch that has a unique key."""
        if unique_key is None:
            return None
        live = (row for row in self.rows.values() if row.status not in FINAL)
        return next((row for row in live if (row.queue, row.kind, row.unique_key) == (queue, kind, unique_key)), None)

    def ready(self, queue: str, priority: int, kinds: Iterable[str]) -> list[Row]:
        """Return the batches without a key that a worker may claim."""
        wanted = (queue, priority, "pending", True, None)
        return [
            row
            for row in self.rows.values()
            if (row.queue, row.priority, row.status, row.is_due, row.key) == wanted and row.kind in kinds
        ]

    def of_key(self, queue: str, key: str, kind: str | None = None) -> list[Row]:
        """Return the live batches of a key; *kind* None: of all kinds."""
        rows = [row for row in self.rows.values() if (row.queue, row.key) == (queue, key) and row.status not in FINAL]
        return [row for row in rows if kind in (None, row.kind)]

    def running(self, queue: str, kind: str | None, key: str) -> int:
        """Return how many batches of a key run; *kind* None: of all kinds."""
        return sum(row.status == "processing" for row in self.of_key(queue, key, kind))

    def may_run(self, row: Row, order: Sequence[int]) -> bool:
        """Tell whether the limits per key let a batch run next. *order*: the ids in the order of claims."""
        assert row.key
        if (row.status, row.is_due) != ("pending", True):
            return False
        for kind in (None, row.kind):
            most = self.per_key.get((row.queue, kind))
            if most is not None and self.running(row.queue, kind, row.key) >= most:
                return False
            if most == 1 and self.first(self.of_key(row.queue, row.key, kind), order) is not row:
                return False
        return True

    def first(self, rows: Iterable[Row], order: Sequence[int]) -> Row:
        """Return which of the live batches of a key comes first where they run strictly in order: what has begun, and
        then what is due."""
        return min(rows, key=lambda row: (0 if row.has_begun else 1 if row.is_due else 2, order.index(row.id)))

    def claim(self, batch_id: int, worker: str, token: UUID) -> None:
        """A worker takes a batch; the attempt counts."""
        row = self.rows[batch_id]
        row.status, row.worker, row.token, row.lease = "processing", worker, token, "running"
        row.attempt += 1
        row.has_begun = row.key is not None

    def held(self, batch_id: int, token: UUID) -> Row | None:
        """Return the batch if whoever claimed it with *token* has it still."""
        row = self.rows.get(batch_id)
        return row if row is not None and row.is_held(token) else None

    def checkpoint(self, batch_id: int, token: UUID, saved: Saved) -> bool:
        """Save progress if the fence holds; tell whether it does."""
        row = self.held(batch_id, token)
        if row is None or (row.done, row.failed) != (saved.done_before, saved.failed_before):
            return False
        row.lease = "running"
        row.done += saved.done + len(saved.recovered)
        row.failed += -len(saved.recovered) if saved.is_retry else len(saved.failures)
        for index in saved.recovered:
            del row.failures[index]
        row.failures |= saved.failures
        for cursor in saved.cursors:
            row.cursor = cursor
        return True

    def finish(
        self, batch_id: int, token: UUID, status: str, result: Any, error: str | None, all_done: bool, keep: bool
    ) -> bool:
        """A worker ends a batch; tell whether it was its own still."""
        row = self.held(batch_id, token)
        if row is None:
            return False
        if not keep and status == "completed":
            del self.rows[batch_id]
            return True
        if all_done:
            row.done = (row.items_total or 0) - row.failed
        row.end(status, error)
        row.result = result
        return True

    def requeue(self, batch_id: int, token: UUID, is_due: bool | None, give_back: bool, error: str | None) -> bool:
        """A worker puts a batch back; *is_due* None: as it was. Tell whether it was its own still."""
        row = self.held(batch_id, token)
        if row is None:
            return False
        row.wait(row.is_due if is_due is None else is_due, error)
        row.attempt -= give_back
        return True

    def rescue(self, batch_id: int) -> str:
        """A batch is taken back whose lease ran out; return its status."""
        row = self.rows[batch_id]
        died = DIED.format(row.worker)
        if row.attempt < row.max_attempts:
            row.wait(is_due=True, error=died)
        else:
            row.end("failed", f"{died}; no attempts left")
        return row.status

    def cancel(self, batch_id: int, reason: str) -> str | None:
        """A person cancels a batch; return its status."""
        row = self.rows.get(batch_id)
        if row is not None and row.status not in FINAL:
            row.end("cancelled", f"cancelled: {reason}")
        return row.status if row else None

    def retry(self, batch_id: int, whole: bool) -> str | None:
        """A person has a batch worked again; return its status. Raises ValueError where that is refused."""
        row = self.rows.get(batch_id)
        if row is None or row.status == "processing":
            return row.status if row else None
        if row.status in FINAL:
            self.revive(row, whole)
        row.is_due = True
        if whole:
            row.start_over()
        return "pending"

    def revive(self, row: Row, whole: bool) -> None:
        """Make a finished batch pending, with all its attempts."""
        if row.status == "completed" and row.failed == 0 and not whole:
            raise ValueError("nothing in it is left to retry")
        if self.twin(row.queue, row.kind, row.unique_key):
            raise ValueError("unique_key")
        row.wait(is_due=True)
        row.attempt, row.result, row.is_old = 0, None, False
        row.failures = {i: failure._replace(attempt=0, retryable=True) for i, failure in row.failures.items()}

    def prune(self) -> None:
        """What finished long ago is dropped."""
        self.rows = {batch_id: row for batch_id, row in self.rows.items() if not row.is_old}
