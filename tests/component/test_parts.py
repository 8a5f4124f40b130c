"""Parts of a batch that is spread: what batchq's functions make of them, step by step, without workers between."""

from collections import Counter
from typing import Any
from uuid import uuid4

import batchq
from batchq.operate import invariants
from batchq.postgres.statements.checkpoints import Progress
from batchq.postgres.statements.endings import Finish
from tests.component.rows import Conn, Taken, batch, checkpoint, claim, finish, processing, value, values
from tests.support.alone import run_alone
from tests.support.batches import drain
from tests.support.steps import step


def spread(conn: Conn, taken: Taken, most: int = 2) -> list[Taken]:
    """Make parts of a claimed batch, and claim these; return them in the order of their items."""
    made = value(conn, "SELECT parts FROM batchq.spread_batch('default', %s, %s, %s)", [taken.id, taken.token, most])
    token = uuid4()
    parts = sorted(row.id for row in claim(conn, token=token) if row.part_of == taken.id)
    assert len(parts) == made
    return [Taken(part, token) for part in parts]


def whole_and_parts(conn: Conn, count: int = 4, most: int = 2, **columns: Any) -> tuple[int, list[Taken]]:
    """Return a batch with the items 0, 1, 2 and so on, and its parts, which are processing."""
    taken = processing(conn, items=list(range(count)), **columns)
    return taken.id, spread(conn, taken, most)


def end(conn: Conn, part: Taken, status: str = "completed") -> None:
    """End a part as a worker does; completed with all its items."""
    error = None if status == "completed" else '{"error": "no"}'
    assert finish(conn, Finish(part.id, part.token, status, None, error, status == "completed")) == {-part.id}


def follow(conn: Conn, most: int = 500) -> list[int]:
    """Follow flows as a worker does: return how many events were seen, how many batches released, how many are left."""
    row = conn.execute("SELECT seen, released, left_over FROM batchq.follow_flows(0, %s)", [most]).fetchone()
    assert row
    return list(row)


def worked(dsn: str, bad: tuple[int, ...] = ()) -> Counter[int]:
    """Drain the queue; return how often each item was worked."""
    counts: Counter[int] = Counter()
    app = batchq.App()

    @app.item_handler("work")
    def work(item: int) -> None:
        counts[item] += 1
        if item in bad:
            raise ValueError(f"bad {item}")

    drain(app, dsn)
    return counts


def ended(conn: Conn, whole: int) -> tuple[Any, ...]:
    """Return status and counters of a batch; no invariant may be violated."""
    assert invariants.violations(conn) == []
    row = batch(conn, whole)
    return row["status"], row["items_done"], row["items_failed"]


def test_the_items_of_parts_whose_ends_are_read_one_by_one_are_counted_once(conn: Conn, dsn: str) -> None:
    whole, parts = whole_and_parts(conn)
    for part in parts:
        end(conn, part)
    assert follow(conn, 1) == [1, 0, 0]
    assert ended(conn, whole) == ("waiting", 0, 0), "one part is not gathered yet"
    assert follow(conn, 1) == [1, 1, 0]
    assert ended(conn, whole) == ("pending", 4, 0)
    assert worked(dsn) == Counter()
    assert ended(conn, whole) == ("completed", 4, 0)


def test_a_whole_that_is_cancelled_when_all_its_items_are_worked_can_be_retried(conn: Conn, dsn: str) -> None:
    whole, parts = whole_and_parts(conn)
    for part in parts:
        end(conn, part)
    step("cancel before anybody has followed the ends of the parts")
    assert value(conn, "SELECT batchq.cancel(%s)", [whole]) == "cancelled"
    follow(conn)
    assert ended(conn, whole)[0] == "cancelled"
    assert value(conn, "SELECT batchq.retry(%s)", [whole]) == "pending"
    assert worked(dsn) == Counter()
    assert ended(conn, whole) == ("completed", 4, 0)
    assert batch(conn, whole)["attempt"] == 1


def test_one_range_that_is_left_becomes_one_part(conn: Conn, dsn: str) -> None:
    whole, (first, second) = whole_and_parts(conn)
    end(conn, first)
    assert checkpoint(conn, second, Progress(1, 0, done_before=0, failed_before=0)) == 1
    assert value(conn, "SELECT batchq.cancel(%s)", [whole]) == "cancelled"
    assert value(conn, "SELECT batchq.retry(%s)", [whole]) == "pending"
    assert worked(dsn) == Counter([3]), "nobody works the whole besides its part"
    assert ended(conn, whole) == ("completed", 4, 0)
    assert batch(conn, whole)["attempt"] == 1


def test_what_a_batch_no_longer_waits_for_changes_nothing_while_its_parts_run(conn: Conn) -> None:
    for on_failure, status in (("run", "failed"), ("cancel", "failed"), ("wait", "completed")):
        needed = [processing(conn, priority=1) for _ in range(2)]
        after = [one.id for one in needed]
        whole = batchq.enqueue(conn, "work", items=[0, 1, 2, 3], spread=2, after=after, on_failure=on_failure)
        assert whole
        assert follow(conn)[2] == 0
        assert value(conn, "SELECT batchq.run_anyway(%s)", [whole]) == "pending"
        token = uuid4()
        assert [row.id for row in claim(conn, token=token)] == [whole]
        parts = spread(conn, Taken(whole, token))
        for one in needed:
            end(conn, one, status)
        assert follow(conn)[1:] == [0, 0]
        assert ended(conn, whole) == ("waiting", 0, 0)
        assert batch(conn, whole)["needs_left"] == 2
        for part in parts:
            end(conn, part)
        assert follow(conn)[1:] == [1, 0]
        assert ended(conn, whole) == ("pending", 4, 0)
        token = uuid4()
        assert [row.id for row in claim(conn, token=token)] == [whole]
        assert finish(conn, Finish(whole, token, "completed")) == {whole}


def test_dependents_that_run_anyway_in_parts_are_not_cancelled(conn: Conn) -> None:
    needed = processing(conn)
    whole = batchq.enqueue(conn, "work", items=[0, 1], spread=2, after=[needed.id])
    assert whole
    follow(conn)
    assert value(conn, "SELECT batchq.run_anyway(%s)", [whole]) == "pending"
    token = uuid4()
    assert [row.id for row in claim(conn, token=token)] == [whole]
    spread(conn, Taken(whole, token))
    assert value(conn, "SELECT batchq.cancel_with_dependents(%s)", [needed.id]) == "cancelled"
    assert ended(conn, whole) == ("waiting", 0, 0)
    assert values(conn, "SELECT status FROM batchq.batches_live WHERE part_of = %s", [whole]) == ["processing"] * 2
    follow(conn)
    assert values(conn, "SELECT batch_id FROM batchq.stuck_waiting()") == [], "it waits for its parts, not for that one"


if __name__ == "__main__":
    run_alone(__file__)
