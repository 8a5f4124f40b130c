"""What people look at: batchq.status and batchq.queues."""

from typing import Any
from uuid import uuid4

import pytest
from psycopg.rows import dict_row

from batchq import queries
from batchq.queries import Finish, Progress, Requeue, WorkerRow
from tests.component.rows import (
    KIND,
    Conn,
    change,
    checkpoint,
    claim,
    expire_lease,
    failure,
    finish,
    finished,
    insert,
    processing,
    requeue,
    value,
    values,
)
from tests.support.alone import run_alone
from tests.support.steps import step

NO = '{"error": "ValueError: no"}'


def status(conn: Conn, batch_id: int) -> dict[str, Any]:
    """Return a batch's row of batchq.status."""
    cursor = conn.cursor(row_factory=dict_row).execute("SELECT * FROM batchq.status WHERE id = %s", [batch_id])
    row = cursor.fetchone()
    assert row
    return row


def queue_row(conn: Conn, kind: str = KIND, queue: str = "default") -> dict[str, Any]:
    """Return the row of batchq.queues for *kind*."""
    query = "SELECT * FROM batchq.queues WHERE queue = %s AND kind = %s"
    [row] = conn.cursor(row_factory=dict_row).execute(query, [queue, kind]).fetchall()
    return row


# ---------------------------------------------------------------------------------------------------- batchq.status


def ready(conn: Conn) -> int:
    return insert(conn)


def scheduled(conn: Conn) -> int:
    batch_id = insert(conn)
    conn.execute("UPDATE batchq.batches SET run_at = now() + interval '1 hour' WHERE id = %s", [batch_id])
    return batch_id


def retrying(conn: Conn) -> int:
    taken = processing(conn)
    requeue(conn, Requeue(*taken, 60, False, NO))
    return taken.id


def stalled(conn: Conn) -> int:
    taken = processing(conn)
    expire_lease(conn, taken.id)
    return taken.id


SHOWN = {
    "ready": ready,
    "scheduled": scheduled,
    "retrying": retrying,
    "processing": lambda conn: processing(conn).id,
    "stalled": stalled,
    "completed": lambda conn: finished(conn, "completed"),
    "failed": lambda conn: finished(conn, "failed", error=NO),
    "cancelled": lambda conn: finished(conn, "cancelled"),
}


@pytest.mark.parametrize("shown", SHOWN)
def test_each_batch_shows_where_it_stands(conn: Conn, shown: str) -> None:
    assert status(conn, SHOWN[shown](conn))["status"] == shown


def test_every_status_that_is_shown_is_explained_in_the_comment(conn: Conn) -> None:
    comment = value(
        conn,
        "SELECT col_description(attrelid, attnum) FROM pg_attribute "
        "WHERE attrelid = 'batchq.status'::regclass AND attname = 'status'",
    )
    assert [shown for shown in SHOWN if shown not in comment] == []


def test_a_retry_that_is_due_is_ready(conn: Conn) -> None:
    batch_id = retrying(conn)
    conn.execute("UPDATE batchq.batches SET run_at = now()")
    assert status(conn, batch_id)["status"] == "ready"


@pytest.mark.parametrize(
    ("total", "done", "failed", "percent"),
    [(3, 0, 0, 0), (3, 1, 0, 33), (3, 1, 1, 66), (3, 2, 1, 100), (200, 199, 0, 99)],
)
def test_progress_is_the_share_of_items_worked_rounded_down(
    conn: Conn, total: int, done: int, failed: int, percent: int
) -> None:
    taken = processing(conn, items=list(range(total)))
    checkpoint(conn, taken, Progress(done, failed, [failure(n) for n in range(failed)], first_index=0))
    row = status(conn, taken.id)
    assert row["progress_percent"] == percent
    assert (row["items_total"], row["items_done"], row["items_failed"]) == (total, done, failed)


def test_progress_without_items_is_known_only_at_the_end(conn: Conn) -> None:
    empty = processing(conn, items=[])
    none = processing(conn)
    assert [status(conn, taken.id)["progress_percent"] for taken in (empty, none)] == [None, None]
    finish(conn, *(Finish(*taken, "completed", all_done=True) for taken in (empty, none)))
    assert [status(conn, taken.id)["progress_percent"] for taken in (empty, none)] == [100, 100]
    assert status(conn, finished(conn, "failed"))["progress_percent"] is None


def test_times_tell_how_old_a_batch_is_and_how_long_its_attempt_ran(conn: Conn) -> None:
    running = processing(conn).id
    ended = finished(conn, "completed")
    change(conn, running, created_at="2030-01-01 12:00+00", claimed_at="2030-01-01 12:00+00")
    conn.execute(
        "UPDATE batchq.batches SET claimed_at = finished_at - interval '90 seconds', "
        "created_at = now() - interval '3 days' WHERE id = %s",
        [ended],
    )
    difference = "SELECT now() - timestamptz '2030-01-01 12:00+00'"
    with conn.transaction():
        assert status(conn, running)["age"] == status(conn, running)["running_time"] == value(conn, difference)
    assert status(conn, ended)["running_time"].total_seconds() == 90
    assert status(conn, ended)["age"].days == 3


def test_next_run_at_is_only_of_batches_that_wait(conn: Conn) -> None:
    waiting, running = scheduled(conn), processing(conn).id
    run_at = value(conn, "SELECT run_at FROM batchq.batches WHERE id = %s", [waiting])
    assert status(conn, waiting)["next_run_at"] == run_at
    assert status(conn, waiting)["running_time"] is None
    assert status(conn, running)["next_run_at"] is None


def test_the_last_error_is_the_newest(conn: Conn) -> None:
    batch_id = insert(conn)
    assert status(conn, batch_id)["last_error"] is None
    for number in (1, 2):
        token = uuid4()
        claim(conn, token=token)
        requeue(conn, Requeue(batch_id, token, 0, False, f'{{"error": "number {number}"}}'))
    assert status(conn, batch_id)["last_error"] == "number 2"


# ---------------------------------------------------------------------------------------------------- batchq.queues


def heartbeat(
    conn: Conn, worker_id: str, kinds: list[str], queues: list[str] | None = None, stopping: bool = False
) -> None:
    """Let a worker show itself."""
    with conn.transaction():
        row = WorkerRow(worker_id, "host", 1, "1", queues or ["default"], kinds, 8)
        queries.heartbeat(conn, row, in_hand=0, stopping=stopping)


def test_a_queue_shows_how_many_batches_are_where(conn: Conn) -> None:
    step("each state as often as its place says")
    for times, make in enumerate(SHOWN.values(), start=1):
        for _ in range(times):
            batch_id = make(conn)
            conn.execute("UPDATE batchq.batches SET kind = 'all' WHERE id = %s", [batch_id])
    row = queue_row(conn, "all")
    counted = {name: row[name] for name in ("ready", "scheduled", "processing", "stalled", "failed")}
    assert counted == {"ready": 1, "scheduled": 2 + 3, "processing": 4 + 5, "stalled": 5, "failed": 7}
    assert float(row["finished_per_second"]) == round((6 + 7 + 8) / 60, 2)


def test_each_queue_and_kind_has_a_row_of_its_own(conn: Conn) -> None:
    for queue in ("a", "b"):
        for kind in ("x", "y"):
            insert(conn, queue=queue, kind=kind)
    finished(conn, "failed", queue="c", kind="x")
    finished(conn, "completed", queue="d", kind="x")
    rows = values(conn, "SELECT queue || kind FROM batchq.queues ORDER BY 1")
    assert rows == ["ax", "ay", "bx", "by", "cx", "dx"]


def test_a_kind_that_no_live_worker_knows_shows_no_workers(conn: Conn) -> None:
    insert(conn)
    heartbeat(conn, "other-kind", ["mail"])
    heartbeat(conn, "other-queue", [KIND], ["bulk"])
    assert queue_row(conn)["workers"] == 0
    assert queue_row(conn)["ready"] == 1


def test_workers_that_serve_the_queue_and_know_the_kind_are_counted_while_they_live(conn: Conn) -> None:
    insert(conn)
    heartbeat(conn, "one", [KIND, "mail"], ["bulk", "default"])
    heartbeat(conn, "two", [KIND])
    assert queue_row(conn)["workers"] == 2
    conn.execute("UPDATE batchq.workers SET heartbeat_at = now() - interval '61 seconds' WHERE id = 'two'")
    assert queue_row(conn)["workers"] == 1


def test_the_longest_wait_is_of_the_batch_that_has_been_ready_for_longest(conn: Conn) -> None:
    ids = [insert(conn), insert(conn), scheduled(conn), processing(conn, kind="other").id]
    old = [ids[0], ids[3]]
    conn.execute("UPDATE batchq.batches SET run_at = now() - interval '2 hours' WHERE id = ANY (%s)", [old])
    assert round(queue_row(conn)["oldest_wait"].total_seconds() / 3600) == 2
    assert queue_row(conn, "other")["oldest_wait"] is None


def test_the_rate_is_of_the_last_minute(conn: Conn) -> None:
    ids = [finished(conn, status) for status in ("completed", "failed", "cancelled") * 5]
    assert float(queue_row(conn)["finished_per_second"]) == 0.25
    conn.execute("UPDATE batchq.batches SET finished_at = now() - interval '61 seconds' WHERE id = ANY (%s)", [ids[:9]])
    assert float(queue_row(conn)["finished_per_second"]) == 0.1


# ---------------------------------------------------------------------------------------------------------- workers


def turn(conn: Conn, worker_id: str, *queue_names: str) -> tuple[int, int]:
    """Return a worker's number among those that live and serve one of its queues, and how many those are."""
    found = queries.turn(conn, worker_id, queue_names or ["default"], silent_seconds=60)
    return found.number, found.workers


def test_a_heartbeat_drops_the_long_dead(conn: Conn) -> None:
    for worker_id in ("silent", "dead"):
        heartbeat(conn, worker_id, [KIND])
    conn.execute("UPDATE batchq.workers SET heartbeat_at = now() - interval '2 minutes' WHERE id = 'silent'")
    conn.execute("UPDATE batchq.workers SET heartbeat_at = now() - interval '61 minutes' WHERE id = 'dead'")
    for worker_id in ("one", "two"):
        heartbeat(conn, worker_id, [KIND])
    assert values(conn, "SELECT id FROM batchq.workers ORDER BY id") == ["one", "silent", "two"]
    step("the silent one has no turn")
    assert [turn(conn, "one"), turn(conn, "two")] == [(0, 2), (1, 2)]
    queries.forget_worker(conn, "one")
    assert turn(conn, "two") == (0, 1)


def test_turns_are_shared_by_those_that_serve_the_same_queue_and_do_not_stop(conn: Conn) -> None:
    heartbeat(conn, "a", [KIND], ["mail"])
    heartbeat(conn, "b", [KIND], ["mail", "default"])
    heartbeat(conn, "c", [KIND])
    heartbeat(conn, "d", [KIND])
    assert [turn(conn, name) for name in ("b", "c", "d")] == [(0, 3), (1, 3), (2, 3)]
    assert turn(conn, "a", "mail") == (0, 2)
    assert turn(conn, "b", "mail", "default") == (1, 4)
    step("one stops: its turn is another's")
    heartbeat(conn, "c", [KIND], stopping=True)
    assert [turn(conn, name) for name in ("b", "d")] == [(0, 2), (1, 2)]


if __name__ == "__main__":
    run_alone(__file__)
