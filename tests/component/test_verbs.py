"""What a person may do from any SQL client: batchq.cancel, batchq.retry, and the other verbs for one batch."""

from collections.abc import Callable
from threading import Thread
from typing import Any
from uuid import uuid4

import psycopg
import pytest

import batchq
from batchq.postgres.statements import claims, endings, inputs
from batchq.postgres.statements.checkpoints import Progress
from batchq.postgres.statements.endings import Finish, Requeue
from tests.component.rows import (
    KIND,
    Conn,
    Taken,
    batch,
    change,
    checkpoint,
    claim,
    extend,
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
from tests.support.waiting import wait_until

NO = '{"error": "ValueError: no"}'


def cancel(conn: Conn, batch_id: int) -> str | None:
    """Cancel as a person does."""
    return value(conn, "SELECT batchq.cancel(%s)", [batch_id])


def retry(conn: Conn, batch_id: int, whole: bool = False) -> str | None:
    """Retry as a person does."""
    return value(conn, "SELECT batchq.retry(%s, whole => %s)", [batch_id, whole])


def errors(row: dict[str, Any]) -> list[str]:
    """Return the texts of a batch's errors."""
    return [error["error"] for error in row["errors"]]


# ----------------------------------------------------------------------------------------------------------- cancel


@pytest.mark.parametrize("make", [insert, lambda conn: processing(conn).id], ids=["pending", "processing"])
def test_a_live_batch_is_cancelled_at_once_and_nobody_works_it(conn: Conn, make: Callable[[Conn], int]) -> None:
    batch_id = make(conn)
    assert cancel(conn, batch_id) == "cancelled"
    row = batch(conn, batch_id)
    assert (row["status"], errors(row)) == ("cancelled", ["cancelled: by an operator"])
    assert row["finished_at"] is not None
    assert claim(conn) == []


def test_a_cancelled_batch_takes_nothing_more_from_its_worker(conn: Conn) -> None:
    taken = processing(conn)
    cancel(conn, taken.id)
    before = batch(conn, taken.id)
    assert finish(conn, Finish(*taken, "completed")) == set()
    assert checkpoint(conn, taken, Progress()) == 0
    assert requeue(conn, Requeue(*taken, 0, True)) == set()
    assert extend(conn, taken).lost == {taken}
    assert batch(conn, taken.id) == before


def test_a_cancelled_batch_keeps_its_input_and_its_progress(conn: Conn) -> None:
    taken = processing(conn, payload={"a": 1}, items=[1, 2, 3], priority=2)
    checkpoint(conn, taken, Progress(1, 1, [failure(1)], first_index=0, keeps_cursor=False, cursor="7"))
    before = batch(conn, taken.id)
    cancel(conn, taken.id)
    after = batch(conn, taken.id)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"status", "claim_token", "lease_expires_at", "errors", "finished_at"}
    assert value(conn, "SELECT count(*) FROM batchq.failed_items") == 1


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
def test_cancelling_what_has_ended_changes_nothing_and_says_how_it_ended(conn: Conn, status: str) -> None:
    batch_id = finished(conn, status)
    before = batch(conn, batch_id)
    assert cancel(conn, batch_id) == cancel(conn, batch_id) == status
    assert batch(conn, batch_id) == before


def test_cancelling_twice_cancels_once(conn: Conn) -> None:
    batch_id = insert(conn)
    assert [cancel(conn, batch_id) for _ in range(2)] == ["cancelled", "cancelled"]
    assert len(batch(conn, batch_id)["errors"]) == 1


def test_a_batch_that_does_not_exist_has_no_status(conn: Conn) -> None:
    assert cancel(conn, 404) is None
    assert retry(conn, 404) is None


def test_the_reason_is_kept_in_the_errors_at_2000_characters_at_most(conn: Conn) -> None:
    first, second = insert(conn), insert(conn)
    conn.execute("SELECT batchq.cancel(%s, %s)", [first, "too dear"])
    conn.execute("SELECT batchq.cancel(%s, repeat('x', 5000))", [second])
    assert errors(batch(conn, first)) == ["cancelled: too dear"]
    assert len(errors(batch(conn, second))[0]) == len("cancelled: ") + 2000


def test_without_a_reason_the_error_says_only_that_it_was_cancelled(conn: Conn) -> None:
    batch_id = insert(conn)
    conn.execute("SELECT batchq.cancel(%s, NULL)", [batch_id])
    assert errors(batch(conn, batch_id)) == ["cancelled"]


@pytest.mark.parametrize("ends", [False, True], ids=["claimed", "finished"])
def test_a_cancel_that_meets_a_write_in_flight_waits_and_then_tells_the_truth(
    conn: Conn, dsn: str, admin_dsn: str, ends: bool
) -> None:
    taken = processing(conn) if ends else Taken(insert(conn), uuid4())
    found: list[str | None] = []
    with psycopg.connect(dsn, prepare_threshold=None) as worker:
        if ends:
            worker.execute(*endings.finish("default", [Finish(*taken, "completed")]))
        else:
            run(worker, claims.claim("default", 0, [KIND], 1, "worker-1", taken.token, 60))
        person = Thread(target=lambda: found.append(cancel(conn, taken.id)))
        person.start()
        with psycopg.connect(admin_dsn, autocommit=True) as admin:
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
            wait_until(lambda: value(admin, waiting), 10, "the cancel to wait")
        worker.commit()
        person.join(10)
    assert found == ["completed" if ends else "cancelled"]
    assert batch(conn, taken.id)["status"] == found[0]


# ------------------------------------------------------------------------------------------------------------ retry


def test_a_failed_batch_is_pending_again_with_all_its_attempts(conn: Conn) -> None:
    batch_id = finished(conn, "failed", error=NO, payload={"a": 1}, max_attempts=1, unique_key="k", priority=4)
    before = batch(conn, batch_id)
    assert retry(conn, batch_id) == "pending"
    after = batch(conn, batch_id)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"status", "attempt", "run_at", "claimed_by", "claimed_at", "finished_at"}
    assert (after["attempt"], errors(after)) == (0, ["ValueError: no"])
    assert [(row.id, row.attempt) for row in claim(conn, priority=4)] == [(batch_id, 1)]


def test_a_cancelled_batch_can_be_retried(conn: Conn) -> None:
    batch_id = insert(conn)
    cancel(conn, batch_id)
    assert retry(conn, batch_id) == "pending"
    assert [row.id for row in claim(conn)] == [batch_id]


def half_done(conn: Conn, status: str, **columns: Any) -> int:
    """Return the id of a batch that ended with its items 0 and 3 done, 1 and 2 failed, 2 for good."""
    taken = processing(conn, items=[0, 1, 2, 3], **columns)
    progress = Progress(
        2, 2, [failure(1), failure(2, retryable=False)], first_index=0, keeps_cursor=False, cursor='"here"'
    )
    assert checkpoint(conn, taken, progress) == 1
    assert finish(conn, Finish(*taken, status, '"result"')) == {taken.id}
    return taken.id


@pytest.mark.parametrize("status", ["failed", "completed", "cancelled"])
def test_a_retry_runs_the_failed_items_alone(conn: Conn, status: str) -> None:
    step("%s with items 1 and 2 failed, within its tolerance or not", status)
    batch_id = half_done(conn, status, max_failed_items=2)
    assert retry(conn, batch_id) == "pending"
    row = batch(conn, batch_id)
    assert (row["items_done"], row["items_failed"], row["cursor"], row["result"]) == (2, 2, "here", None)
    [claimed] = claim(conn, token=(token := uuid4()))
    assert inputs.failed_page(conn, "default", batch_id, token, claimed.attempt, 10) == [(1, "1"), (2, "2")]


@pytest.mark.parametrize("status", ["failed", "completed", "cancelled"])
def test_a_whole_retry_starts_from_nothing(conn: Conn, status: str) -> None:
    batch_id = half_done(conn, status)
    assert retry(conn, batch_id, whole=True) == "pending"
    row = batch(conn, batch_id)
    assert (row["items_done"], row["items_failed"], row["cursor"], row["result"]) == (0, 0, None, None)
    assert value(conn, "SELECT count(*) FROM batchq.failed_items") == 0


@pytest.mark.parametrize(("whole", "left"), [(True, []), (False, [0, 0])])
def test_a_retry_leaves_the_failed_items_of_other_batches(conn: Conn, whole: bool, left: list[int]) -> None:
    first, second = half_done(conn, "failed"), half_done(conn, "failed")
    retry(conn, first, whole)
    items = "SELECT attempt FROM batchq.failed_items WHERE batch_id = %s"
    assert (values(conn, items, [first]), values(conn, items, [second])) == (left, [1, 1])


def test_a_completed_batch_without_failed_items_is_retried_only_whole(conn: Conn) -> None:
    batch_id = finished(conn, "completed")
    before = batch(conn, batch_id)
    with pytest.raises(psycopg.errors.RaiseException, match="is completed: nothing in it is left to retry") as caught:
        retry(conn, batch_id)
    assert (
        caught.value.diag.message_hint == f"batchq.retry({batch_id}, whole => true) runs it again from the beginning."
    )
    assert batch(conn, batch_id) == before
    assert retry(conn, batch_id, whole=True) == "pending"


def test_a_pending_batch_runs_at_once_and_its_place_in_the_order_stays(conn: Conn) -> None:
    waiting, ready = insert(conn), insert(conn)
    conn.execute("UPDATE batchq.batches SET run_at = now() + interval '1 hour' WHERE id = %s", [waiting])
    conn.execute("UPDATE batchq.batches SET run_at = now() - interval '1 hour' WHERE id = %s", [ready])
    before = batch(conn, ready)
    assert (retry(conn, waiting), retry(conn, ready)) == ("pending", "pending")
    assert batch(conn, ready) == before
    assert {row.id for row in claim(conn)} == {waiting, ready}


def test_a_whole_retry_of_a_pending_batch_starts_from_nothing_too(conn: Conn) -> None:
    taken = processing(conn, items=[1, 2, 3])
    checkpoint(conn, taken, Progress(1, 1, [failure(1)], first_index=0, keeps_cursor=False, cursor="7"))
    requeue(conn, Requeue(*taken, 3600, False))
    assert retry(conn, taken.id, whole=True) == "pending"
    row = batch(conn, taken.id)
    assert (row["items_done"], row["items_failed"], row["cursor"]) == (0, 0, None)
    assert value(conn, "SELECT count(*) FROM batchq.failed_items") == 0
    assert [claimed.id for claimed in claim(conn)] == [taken.id]


def test_a_retry_of_a_pending_batch_keeps_what_has_failed(conn: Conn) -> None:
    taken = processing(conn, items=[1, 2, 3])
    checkpoint(conn, taken, Progress(1, 1, [failure(1)], first_index=0))
    requeue(conn, Requeue(*taken, 3600, False))
    assert retry(conn, taken.id) == "pending"
    assert values(conn, "SELECT item_index FROM batchq.failed_items") == [1]


def test_a_batch_that_is_processing_is_left_alone(conn: Conn) -> None:
    taken = processing(conn)
    before = batch(conn, taken.id)
    assert retry(conn, taken.id) == "processing"
    assert batch(conn, taken.id) == before


def test_retrying_twice_is_retrying_once(conn: Conn) -> None:
    batch_id = half_done(conn, "failed")
    retry(conn, batch_id)
    before = batch(conn, batch_id)
    assert retry(conn, batch_id) == "pending"
    assert batch(conn, batch_id) == before


@pytest.mark.parametrize("whole", [False, True])
def test_a_retry_beside_a_live_batch_of_its_key_says_so_and_changes_nothing(conn: Conn, whole: bool) -> None:
    batch_id = half_done(conn, "failed", unique_key="daily")
    before = batch(conn, batch_id)
    batchq.enqueue(conn, KIND, unique_key="daily")
    message = f'batch {batch_id} cannot be retried: another batch of kind "work" with unique_key "daily" is pending'
    with pytest.raises(psycopg.errors.UniqueViolation, match=message):
        retry(conn, batch_id, whole)
    assert batch(conn, batch_id) == before
    assert values(conn, "SELECT attempt FROM batchq.failed_items") == [1, 1]


def test_verbs_join_the_callers_transaction(conn: Conn) -> None:
    live, failed = insert(conn), finished(conn, "failed", queue="other")
    with conn.transaction(force_rollback=True):
        cancel(conn, live)
        retry(conn, failed)
    assert (batch(conn, live)["status"], batch(conn, failed)["status"]) == ("pending", "failed")


@pytest.mark.parametrize("status", ["failed", "completed", "cancelled"])
def test_retrying_items_works_the_failed_items_alone(conn: Conn, status: str) -> None:
    batch_id = half_done(conn, status, max_failed_items=2)
    assert value(conn, "SELECT batchq.retry_items(%s)", [batch_id]) == "pending"
    [claimed] = claim(conn, token=(token := uuid4()))
    assert inputs.failed_page(conn, "default", batch_id, token, claimed.attempt, 10) == [(1, "1"), (2, "2")]


def test_retrying_items_leaves_alone_what_has_no_failed_items(conn: Conn) -> None:
    ids = [insert(conn), processing(conn, kind="other").id, finished(conn, "failed", kind="third", items=[1])]
    before = [batch(conn, batch_id) for batch_id in ids]
    statuses = [value(conn, "SELECT batchq.retry_items(%s)", [batch_id]) for batch_id in (*ids, 404)]
    assert statuses == ["pending", "processing", "failed", None]
    assert [batch(conn, batch_id) for batch_id in ids] == before
    assert audit(conn) == []


@pytest.mark.parametrize(
    ("status", "first", "second", "expected"),
    [
        ("pending", "batchq.move(%s, 'slow')", "batchq.cancel(%s)", {"status": "cancelled", "queue": "slow"}),
        ("failed", "batchq.retry(%s)", "batchq.retry(%s, whole => true)", {"status": "pending", "items_done": 0}),
    ],
    ids=["cancel beside a move", "whole retry beside a retry"],
)
def test_a_verb_that_waits_for_another_is_done_after_it(
    conn: Conn, dsn: str, admin_dsn: str, status: str, first: str, second: str, expected: dict[str, Any]
) -> None:
    batch_id = insert(conn) if status == "pending" else half_done(conn, status)
    with psycopg.connect(dsn, prepare_threshold=None) as other:
        value(other, f"SELECT {first}", [batch_id])
        person = Thread(target=lambda: value(conn, f"SELECT {second}", [batch_id]))
        person.start()
        with psycopg.connect(admin_dsn, autocommit=True) as admin:
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
            wait_until(lambda: value(admin, waiting), 10, "the second to wait")
        other.commit()
        person.join(10)
    row = batch(conn, batch_id)
    assert {name: row[name] for name in expected} == expected


# ------------------------------------------------------------------------------------------ snooze, priority, queue

CHANGES = {
    "snooze": ("SELECT batchq.snooze(%s, until => '2100-01-01')", "run_at"),
    "set_priority": ("SELECT batchq.set_priority(%s, -5)", "priority"),
    "move": ("SELECT batchq.move(%s, 'slow')", "queue"),
}


@pytest.mark.parametrize("verb", CHANGES)
def test_a_change_of_a_pending_batch_changes_that_alone_and_once(conn: Conn, verb: str) -> None:
    query, column = CHANGES[verb]
    batch_id = insert(conn, payload={"a": 1})
    before = batch(conn, batch_id)
    assert [value(conn, query, [batch_id]) for _ in range(2)] == ["pending", "pending"]
    after = batch(conn, batch_id)
    assert {name for name in before if before[name] != after[name]} == {column}
    assert [row[:2] for row in audit(conn)] == [(verb, batch_id)]


@pytest.mark.parametrize("verb", CHANGES)
def test_a_change_leaves_alone_what_is_not_pending(conn: Conn, verb: str) -> None:
    query, _ = CHANGES[verb]
    ids = [finished(conn, status) for status in ("completed", "failed", "cancelled")] + [processing(conn).id]
    before = [batch(conn, batch_id) for batch_id in ids]
    statuses = [value(conn, query, [batch_id]) for batch_id in (*ids, 404)]
    assert statuses == ["completed", "failed", "cancelled", "processing", None]
    assert [batch(conn, batch_id) for batch_id in ids] == before
    assert audit(conn) == []


def test_a_snoozed_batch_waits_for_so_long(conn: Conn) -> None:
    batch_id = insert(conn)
    conn.execute("SELECT batchq.snooze(%s, '2 hours')", [batch_id])
    hours = value(
        conn, "SELECT extract(epoch FROM run_at - now()) / 3600 FROM batchq.all_batches WHERE id = %s", [batch_id]
    )
    assert 1.9 < hours <= 2
    assert claim(conn) == []


@pytest.mark.parametrize("given", ["", ", '1 hour', '2100-01-01'"])
def test_a_snooze_needs_a_delay_or_a_time(conn: Conn, given: str) -> None:
    with pytest.raises(psycopg.errors.RaiseException, match="takes either a delay or a time"):
        value(conn, f"SELECT batchq.snooze(%s{given})", [insert(conn)])


def test_a_batch_is_claimed_by_its_new_priority(conn: Conn) -> None:
    batch_id = insert(conn, priority=9)
    conn.execute("SELECT batchq.set_priority(%s, 1)", [batch_id])
    assert (claim(conn, priority=9), [row.id for row in claim(conn, priority=1)]) == ([], [batch_id])


def test_a_priority_out_of_range_leaves_a_finished_batch_as_it_is(conn: Conn) -> None:
    batch_id = finished(conn)
    assert [value(conn, "SELECT batchq.set_priority(%s, 99999)", [batch_id]) for _ in range(7)] == ["completed"] * 7


def test_a_retry_that_says_null_for_whole_is_no_conflict_of_unique_keys(conn: Conn) -> None:
    batch_id = finished(conn)
    assert value(conn, "SELECT batchq.retry(%s, NULL)", [batch_id]) == "pending"


def test_a_moved_batch_takes_its_failed_items_with_it(conn: Conn) -> None:
    batch_id = half_done(conn, "failed")
    retry(conn, batch_id)
    conn.execute("SELECT batchq.move(%s, 'slow')", [batch_id])
    [claimed] = claim(conn, queue="slow", token=(token := uuid4()))
    assert inputs.failed_page(conn, "slow", batch_id, token, claimed.attempt, 10) == [(1, "1"), (2, "2")]


def test_a_move_leaves_the_failed_items_of_other_batches(conn: Conn) -> None:
    moved, stays = half_done(conn, "failed"), half_done(conn, "failed")
    for batch_id in (moved, stays):
        retry(conn, batch_id)
    conn.execute("SELECT batchq.move(%s, 'slow')", [moved])
    queue_of = "SELECT DISTINCT queue FROM batchq.failed_items WHERE batch_id = %s"
    assert (values(conn, queue_of, [moved]), values(conn, queue_of, [stays])) == (["slow"], ["default"])


def test_a_batch_is_not_moved_beside_another_of_its_key(conn: Conn) -> None:
    batch_id = insert(conn, unique_key="daily")
    insert(conn, unique_key="daily", queue="slow")
    message = f'batch {batch_id} cannot be moved: another batch of kind "work" with unique_key "daily" is pending'
    with pytest.raises(psycopg.errors.UniqueViolation, match=message):
        conn.execute("SELECT batchq.move(%s, 'slow')", [batch_id])
    assert batch(conn, batch_id)["queue"] == "default"


# ------------------------------------------------------------------------------------------------------------ audit


def audit(conn: Conn) -> list[tuple[Any, ...]]:
    """Return verb, batch, how many, queue, kind, details, reason, actor of each row of the audit."""
    query = "SELECT verb, batch_id, batches, queue, kind, details, reason, actor FROM batchq.audit ORDER BY id"
    return conn.execute(query).fetchall()


def test_each_verb_that_changes_something_notes_who_and_why(conn: Conn) -> None:
    live, failed = insert(conn), finished(conn, "failed", kind="mail", queue="other")
    conn.execute("SELECT batchq.cancel(%s, 'too dear', actor => 'ann')", [live])
    conn.execute("SELECT batchq.retry(%s, reason => 'fixed', actor => 'bob')", [failed])
    assert audit(conn) == [
        ("cancel", live, 1, "default", KIND, {}, "too dear", "ann"),
        ("retry", failed, 1, "other", "mail", {"whole": False}, "fixed", "bob"),
    ]
    assert values(conn, "SELECT DISTINCT role = current_user FROM batchq.audit") == [True]


def test_a_verb_that_changes_nothing_notes_nothing(conn: Conn) -> None:
    batch_id = insert(conn)
    for _ in range(2):
        conn.execute("SELECT batchq.cancel(%s)", [batch_id])
    retry(conn, insert(conn))
    assert [row[0] for row in audit(conn)] == ["cancel"]
    step("and a transaction that is rolled back leaves none")
    with conn.transaction(force_rollback=True):
        retry(conn, batch_id)
    assert [row[0] for row in audit(conn)] == ["cancel"]


def test_old_rows_of_the_audit_are_dropped(conn: Conn) -> None:
    for _ in range(2):
        cancel(conn, insert(conn))
    conn.execute(
        "UPDATE batchq.audit SET at = now() - interval '91 days' WHERE id = (SELECT min(id) FROM batchq.audit)"
    )
    assert [value(conn, "SELECT batchq.prune_records()") for _ in range(2)] == [1, 0]
    assert len(audit(conn)) == 1


# ----------------------------------------------------------------------------------------------------------- errors


def test_only_the_newest_ten_errors_are_kept(conn: Conn) -> None:
    batch_id = insert(conn, max_attempts=30)
    for number in range(1, 13):
        token = uuid4()
        claim(conn, token=token)
        requeue(conn, Requeue(batch_id, token, 0, False, f'{{"error": "number {number}"}}'))
    row = batch(conn, batch_id)
    assert errors(row) == [f"number {number}" for number in range(3, 13)]
    assert [error["attempt"] for error in row["errors"]] == list(range(3, 13))
    assert all(error["at"] for error in row["errors"])
    step("a cancel adds one more")
    cancel(conn, batch_id)
    assert errors(batch(conn, batch_id))[-2:] == ["number 12", "cancelled: by an operator"]
    assert len(batch(conn, batch_id)["errors"]) == 10


def test_errors_that_a_person_wrote_do_not_stop_a_worker(conn: Conn) -> None:
    taken = processing(conn)
    change(conn, taken.id, errors=["text", None, 7])
    assert finish(conn, Finish(*taken, "failed", error=NO)) == {taken.id}
    assert batch(conn, taken.id)["errors"][-1]["error"] == "ValueError: no"


if __name__ == "__main__":
    run_alone(__file__)
