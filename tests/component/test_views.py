"""What people look at: batchq.status, batchq.queues and batchq.failures."""

import json
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from batchq.postgres.link import Link
from batchq.postgres.statements import running as running_statements
from batchq.postgres.statements import workers
from batchq.postgres.statements.checkpoints import Progress
from batchq.postgres.statements.endings import Finish, Requeue
from batchq.postgres.statements.workers import Tally, WorkerRow
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
    run,
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
    run_at = value(conn, "SELECT run_at FROM batchq.all_batches WHERE id = %s", [waiting])
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
    row = WorkerRow(worker_id, "host", 1, "1", queues or ["default"], kinds, 8)
    conn.execute(*workers.heartbeat(row, in_hand=0, stopping=stopping))


def test_a_queue_shows_how_many_batches_are_where(conn: Conn) -> None:
    step("each state as often as its place says")
    conn.execute("ALTER TABLE batchq.batches_live DISABLE TRIGGER keep_processing")  # to change their kind here
    for times, make in enumerate(SHOWN.values(), start=1):
        for _ in range(times):
            batch_id = make(conn)
            conn.execute("UPDATE batchq.batches SET kind = 'all' WHERE id = %s", [batch_id])
    row = queue_row(conn, "all")
    counted = {name: row[name] for name in ("ready", "scheduled", "processing", "stalled", "failed")}
    assert counted == {"ready": 1, "scheduled": 2 + 3, "processing": 4 + 5, "stalled": 5, "failed": 7}
    assert row["estimated"] == []


def test_each_queue_and_kind_has_a_row_of_its_own(conn: Conn) -> None:
    for queue in ("a", "b"):
        for kind in ("x", "y"):
            insert(conn, queue=queue, kind=kind)
    finished(conn, "failed", queue="c", kind="x")
    finished(conn, "completed", queue="gone", kind="x")
    ended(conn, 1, queue="d", kind="x")
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


def ended(conn: Conn, count: int, queue: str = "default", kind: str = KIND) -> None:
    """Count batches that have ended, as a worker does: a third each completed, failed and cancelled."""
    each, rest = divmod(count, 3)
    tally = Tally(queue, kind, each + rest, each, each, 0, 0, 1.0, [count])
    assert run(conn, workers.count_throughput("worker-1", [tally])) == [(queue,)]


def test_the_rate_is_of_the_last_minute_as_the_workers_counted(conn: Conn) -> None:
    with conn.transaction():  # its now() is the view's
        ended(conn, 15)
        assert float(queue_row(conn)["finished_per_second"]) == 0.25
        step("of the minute before, the share that is still within the last 60 s")
        conn.execute("UPDATE batchq.throughput_minutes SET minute = minute - interval '1 minute'")
        seconds = float(value(conn, "SELECT extract(second FROM now())"))
        assert float(queue_row(conn)["finished_per_second"]) == pytest.approx(0.25 * (1 - seconds / 60), abs=0.006)
        ended(conn, 45)
        assert float(queue_row(conn)["finished_per_second"]) == pytest.approx(1 - 0.25 * seconds / 60, abs=0.006)
        step("nothing of those before it")
        conn.execute("UPDATE batchq.throughput_minutes SET minute = minute - interval '3 minutes'")
        assert float(queue_row(conn)["finished_per_second"]) == 0


def test_counts_beyond_the_bound_are_estimates_and_say_so(conn: Conn) -> None:
    fill = "INSERT INTO batchq.batches (kind, queue, run_at) SELECT %s, %s, now() + %s * interval '1 hour' "
    fill += "FROM generate_series(1, %s)"
    for kind, queue, hours, count in (
        ("many", "large", -1, 21_000),
        ("later", "large", 1, 15_000),
        ("few", "small", -2, 30),
    ):
        conn.execute(fill.encode(), [kind, queue, hours, count])
    many, later, few = (
        queue_row(conn, "many", "large"),
        queue_row(conn, "later", "large"),
        queue_row(conn, "few", "small"),
    )
    step("36,030 batches: %s, %s", many, later)
    assert (many["estimated"], later["estimated"]) == (["ready"], ["scheduled"])
    assert many["ready"] == pytest.approx(21_000, rel=0.2)
    assert later["scheduled"] == pytest.approx(15_000, rel=0.2)
    assert round(many["oldest_wait"].total_seconds() / 3600) == 1
    assert (few["ready"], few["estimated"]) == (30, [])


def test_counts_are_exact_up_to_the_bound_however_many_queues_and_priorities_there_are(conn: Conn) -> None:
    step("given 5,860 batches, most of them in one of 12 queues with 5 priorities each, and 9,000 that run")
    conn.execute(
        "INSERT INTO batchq.batches (kind, queue, priority) "
        "SELECT 'work', 'q' || n % 12, n % 5 FROM generate_series(1, 1860) n"
    )
    conn.execute("INSERT INTO batchq.batches (kind, queue) SELECT 'work', 'q0' FROM generate_series(1, 3952)")
    conn.execute(
        "INSERT INTO batchq.batches (kind, queue, run_at) "
        "SELECT 'work', 'q0', now() + interval '1 hour' FROM generate_series(1, 48)"
    )
    conn.execute(
        "INSERT INTO batchq.batches (kind, queue) SELECT 'runs', CASE WHEN n <= 8900 THEN 'r' ELSE 's' || n % 50 END "
        "FROM generate_series(1, 9000) n"
    )
    conn.execute(
        "UPDATE batchq.batches_live SET status = 'processing', attempt = 1, claimed_by = 'w', "
        "  claim_token = gen_random_uuid(), claimed_at = now(), lease_expires_at = now() + interval '1 hour' "
        "WHERE kind = 'runs'"
    )
    first, running = queue_row(conn, "work", "q0"), queue_row(conn, "runs", "r")
    assert (first["ready"], first["scheduled"], first["estimated"]) == (3952 + 1860 // 12, 48, [])
    assert (running["processing"], running["estimated"]) == (8900, [])
    [sums] = conn.execute("SELECT sum(ready), sum(scheduled), sum(processing) FROM batchq.queues").fetchall()
    assert tuple(sums) == (5_812, 48, 9_000)
    step("when more wait than are counted, then those of the small levels are still exact, and the others say so")
    conn.execute("INSERT INTO batchq.batches (kind, queue) SELECT 'work', 'q0' FROM generate_series(1, 6000)")
    first, other = queue_row(conn, "work", "q0"), queue_row(conn, "work", "q1")
    assert (first["estimated"], other["ready"], other["estimated"]) == (["ready"], 155, [])


def test_a_kind_that_lies_behind_the_bound_is_estimated_with_its_wait(conn: Conn) -> None:
    fill = "INSERT INTO batchq.batches (kind, run_at) SELECT %s, now() - %s * interval '1 hour' "
    fill += "FROM generate_series(1, %s)"
    for kind, hours, count in (("first", 3, 25_000), ("second", 2, 25_000)):
        conn.execute(fill.encode(), [kind, hours, count])
    first, second = queue_row(conn, "first"), queue_row(conn, "second")
    assert (first["estimated"], second["estimated"]) == (["ready"], ["ready", "oldest_wait"])
    assert [first["ready"], second["ready"]] == pytest.approx([25_000, 25_000], rel=0.2)
    assert round(second["oldest_wait"].total_seconds() / 3600) == 2


def test_failed_batches_beyond_the_bound_are_told_as_at_least_so_many(conn: Conn) -> None:
    conn.execute(
        "INSERT INTO batchq.batches (kind, status, finished_at) "
        "SELECT 'bad', 'failed', now() - n * interval '1 minute' FROM generate_series(1, 10050) n"
    )
    row = queue_row(conn, "bad")
    assert (row["failed"], row["estimated"]) == (10_000, ["failed"])
    conn.execute("DELETE FROM batchq.batches WHERE id <= 50")
    row = queue_row(conn, "bad")
    assert (row["failed"], row["estimated"]) == (10_000, [])


# -------------------------------------------------------------------------------------------------- batchq.failures


def failures(conn: Conn) -> list[tuple[Any, ...]]:
    """Return kind, error, count and example of each row, the latest first."""
    query = "SELECT kind, error, failures, example_id FROM batchq.failures ORDER BY latest_at DESC"
    return conn.execute(query).fetchall()


def failed(conn: Conn, kind: str, error: str, minutes_ago: int) -> int:
    """Return the id of a batch that failed some time ago."""
    batch_id = finished(conn, "failed", kind=kind, error=json.dumps({"error": error}))
    query = "UPDATE batchq.batches SET finished_at = now() - %s * interval '1 minute' WHERE id = %s"
    conn.execute(query, [minutes_ago, batch_id])
    return batch_id


def test_failures_are_grouped_by_kind_and_first_line(conn: Conn) -> None:
    assert failures(conn) == []
    finished(conn, "completed")
    finished(conn, "cancelled", error=NO)
    failed(conn, "mail", "no route\nto host a", 50)
    same = failed(conn, "mail", "no route\nto host b", 40)
    other = failed(conn, "sms", "no route", 30)
    long = failed(conn, "sms", "x" * 1000, 20)
    silent = finished(conn, "failed", kind="sms")
    assert failures(conn) == [
        ("sms", "", 1, silent),
        ("sms", "x" * 300, 1, long),
        ("sms", "no route", 1, other),
        ("mail", "no route", 2, same),
    ]


def test_failures_are_the_latest_500_however_old(conn: Conn) -> None:
    conn.execute("SELECT batchq.create_finished_partitions((now() - interval '9 days')::date, 10)")
    insert_failed = (
        "INSERT INTO batchq.batches (kind, status, finished_at, errors) "
        "SELECT %s, 'failed', now() - %s * interval '1 hour' - n * interval '1 second', %s "
        "FROM generate_series(1, %s) n"
    )
    for kind, hours, count in (("ancient", 200, 100), ("old", 100, 300), ("yesterday", 12, 300), ("now", 0, 30)):
        conn.execute(insert_failed.encode(), [kind, hours, Jsonb([{"error": "no"}]), count])
        step("%s: %s", kind, failures(conn))
    assert [(row[0], row[2]) for row in failures(conn)] == [("now", 30), ("yesterday", 300), ("old", 170)]
    conn.execute("DELETE FROM batchq.batches WHERE kind IN ('old', 'yesterday')")
    assert [(row[0], row[2]) for row in failures(conn)] == [("now", 30), ("ancient", 100)]


def test_partitions_of_later_days_have_the_index_of_what_did_not_complete(conn: Conn) -> None:
    conn.execute("SELECT batchq.create_finished_partitions(((now() AT TIME ZONE 'UTC') + interval '30 days')::date, 1)")
    without = values(
        conn,
        "SELECT p.inhrelid::regclass::text FROM pg_inherits p WHERE p.inhparent = 'batchq.batches_finished'::regclass "
        "AND NOT EXISTS (SELECT FROM pg_index i JOIN pg_inherits h ON h.inhrelid = i.indexrelid "
        "WHERE i.indrelid = p.inhrelid AND h.inhparent = 'batchq.batches_finished_uncompleted'::regclass)",
    )
    assert without == []


# ---------------------------------------------------------------------------------------------------------- workers


def turn(conn: Conn, worker_id: str, *queue_names: str) -> tuple[int, int]:
    """Return a worker's number among those that live and serve one of its queues, and how many those are."""
    row = WorkerRow(worker_id, "host", 1, "1", list(queue_names) or ["default"], [KIND], 8)
    found = workers.beat(
        running_statements.fetch_one(conn, *workers.heartbeat(row, 0, stopping=False, silent_seconds=60))
    ).turn
    return found.number, found.workers


def test_the_long_dead_are_forgotten(conn: Conn) -> None:
    for worker_id in ("silent", "dead"):
        heartbeat(conn, worker_id, [KIND])
    conn.execute("UPDATE batchq.workers SET heartbeat_at = now() - interval '2 minutes' WHERE id = 'silent'")
    conn.execute("UPDATE batchq.workers SET heartbeat_at = now() - interval '61 minutes' WHERE id = 'dead'")
    for worker_id in ("one", "two"):
        heartbeat(conn, worker_id, [KIND])
    workers.forget_silent_workers(conn)
    assert values(conn, "SELECT id FROM batchq.workers ORDER BY id") == ["one", "silent", "two"]
    step("the silent one has no turn")
    assert [turn(conn, "one"), turn(conn, "two")] == [(0, 2), (1, 2)]
    workers.forget_worker(conn, "one")
    assert turn(conn, "two") == (0, 1)


def test_the_dead_that_another_forgets_are_passed_over(conn: Conn, dsn: str) -> None:
    heartbeat(conn, "dead", [KIND])
    conn.execute("UPDATE batchq.workers SET heartbeat_at = now() - interval '61 minutes'")
    with psycopg.connect(dsn, prepare_threshold=None) as other:
        other.execute("DELETE FROM batchq.workers")
        heartbeat(conn, "one", [KIND])
        with conn.transaction():
            workers.forget_silent_workers(conn)
        other.rollback()
    assert values(conn, "SELECT id FROM batchq.workers ORDER BY id") == ["dead", "one"]


def test_heartbeats_give_up_rather_than_wait_for_a_lock(conn: Conn, dsn: str) -> None:
    beat = workers.heartbeat(WorkerRow("one", "host", 1, "1", ["default"], [KIND], 8), 0, stopping=False)
    with psycopg.connect(dsn, prepare_threshold=None) as other, closing(Link(dsn, 10)) as link:
        link.run(beat, workers.HEARTBEAT_SETTINGS)
        other.execute("LOCK TABLE batchq.workers")
        for does in (
            lambda: link.run(beat, workers.HEARTBEAT_SETTINGS),
            lambda: in_transaction(link, workers.forget_silent_workers),
        ):
            began_at = time.monotonic()
            with pytest.raises(psycopg.errors.LockNotAvailable):
                does()
            assert time.monotonic() - began_at < 2


def in_transaction(link: Link, do: Callable[[Conn], object]) -> None:
    """Do something in one transaction."""
    with link.transaction() as conn:
        do(conn)


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
