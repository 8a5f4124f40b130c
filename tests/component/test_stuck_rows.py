"""Rows that a person has locked, or that the database refuses to change: each holds up itself and nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from batchq import finisher
from batchq.batch import Batch
from batchq.execution import COMPLETED, RELEASED, Outcome
from tests.component.rows import Conn, values
from tests.component.test_worker_parts import Parts, enqueue
from tests.support.alone import run_alone
from tests.support.steps import step
from tests.support.waiting import wait_until

RESULT = Outcome("completed", result="1")
WAYS = {
    "completed": (COMPLETED, True, "completed"),
    "with a result": (RESULT, True, "completed"),
    "given back": (RELEASED, True, "pending"),
    "deleted": (COMPLETED, False, None),
}
ended = pytest.mark.parametrize(("outcome", "keep", "status"), WAYS.values(), ids=WAYS)


@pytest.fixture
def parts(dsn: str) -> Iterator[Parts]:
    """Return a worker's parts, on the test's database."""
    parts = Parts(dsn)
    yield parts
    parts.close()


@contextmanager
def locked(dsn: str, *batches: Batch, cancel: bool = False) -> Iterator[Conn]:
    """Have a person change batches and leave the transaction open; it rolls back at the end, unless committed."""
    with psycopg.connect(dsn) as person:
        for batch in batches:
            person.execute("SELECT batchq.cancel(%s)", [batch.id])
        yield person
        person.rollback()


def end_all(parts: Parts, batches: list[Batch], outcome: Outcome = COMPLETED) -> None:
    """Have all batches end."""
    for batch in batches:
        assert parts.lane.end(batch, outcome)


def count_statements(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list that grows with each statement of the finisher."""
    link, sent = parts.links[0], []
    run = link.run
    monkeypatch.setattr(link, "run", lambda *args, **more: sent.append(args[0]) or run(*args, **more))
    return sent


def statuses(conn: Conn) -> dict[str, int]:
    """Return how many batches have each status."""
    rows = conn.execute("SELECT status, count(*) FROM batchq.batches GROUP BY status").fetchall()
    return {str(status): int(count) for status, count in rows}


# ------------------------------------------------------------------------------------------------------- locked rows


@ended
def test_a_row_that_a_person_has_locked_costs_one_short_wait_and_holds_up_no_other(
    conn: Conn, admin_dsn: str, parts: Parts, monkeypatch: pytest.MonkeyPatch,
    outcome: Outcome, keep: bool, status: str | None,
) -> None:  # fmt: skip
    count = 600
    parts.finisher.keep_completed = keep
    enqueue(conn, count)
    batches = parts.claim(count)
    sent = count_statements(parts, monkeypatch)
    with locked(admin_dsn, batches[200]):
        end_all(parts, batches, outcome)
        parts.finisher.write_group()
        step("one statement waits, one finds out which row is locked, one writes all the others")
        assert len(sent) == 3
        assert values(conn, "SELECT id FROM batchq.batches WHERE status = 'processing'") == [batches[200].id]
        assert (parts.lane.unwritten, parts.lane.occupied) == (1, 0)
        step("its lease is extended as before, and it waits for its turn")
        assert parts.finisher.unwritten() == [batches[200]]
        assert 0 < (parts.finisher.retry_in_seconds() or 0) <= finisher.FIRST_RETRY_SECONDS
    write_postponed(parts)
    assert statuses(conn) == ({status: count} if status else {})
    assert (parts.lane.unwritten, parts.lane.postponed, parts.finisher.unwritten()) == (0, 0, [])


def write_postponed(parts: Parts) -> None:
    """Try again what is postponed until nothing is."""
    wait_until(lambda: parts.finisher.retry_postponed() or not parts.finisher.postponed, 10, "all to be written")


@ended
def test_a_postponed_batch_that_is_cancelled_meanwhile_is_lost_and_not_written(
    conn: Conn, admin_dsn: str, parts: Parts, monkeypatch: pytest.MonkeyPatch,
    outcome: Outcome, keep: bool, status: str | None,
) -> None:  # fmt: skip
    lost: list[Any] = []
    monkeypatch.setattr(finisher, "report_lost", lost.extend)
    parts.finisher.keep_completed = keep
    enqueue(conn, 3)
    batches = parts.claim(3)
    with locked(admin_dsn, batches[0]) as person:
        end_all(parts, batches, outcome)
        parts.write()
        assert lost == [], "a locked row is ours still"
        person.commit()
    write_postponed(parts)
    assert [entry.batch for entry in lost] == [batches[0]]
    assert values(conn, "SELECT id FROM batchq.batches WHERE status = 'cancelled'") == [batches[0].id]
    assert parts.lane.unwritten == 0


if __name__ == "__main__":
    run_alone(__file__)
