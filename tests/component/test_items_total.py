"""items_total: filled in however a batch comes in, kept to its end, beside workers from before it was a trigger's."""

from collections.abc import Callable
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql

import batchq
from batchq.postgres.statements import endings, leases
from batchq.postgres.statements.checkpoints import Progress
from batchq.postgres.statements.endings import Finish
from tests.component.rows import (
    KIND,
    Conn,
    Taken,
    batch,
    checkpoint,
    complete,
    expire_lease,
    failure,
    finish,
    insert,
    processing,
    run,
    value,
    values,
)
from tests.support.alone import run_alone

TOTALS = "SELECT items_total FROM batchq.all_batches ORDER BY id"

# What workers from before wrote at the end of batches: it does not name items_total.
OLD_FINISH = """
WITH gone AS (
  DELETE FROM batchq.batches_live b
  USING unnest(%(ids)s::bigint[], %(tokens)s::uuid[], %(statuses)s::text[], %(results)s::jsonb[], %(errors)s::jsonb[],
               %(all_done)s::boolean[]) AS u(id, token, new_status, new_result, new_error, all_done)
  WHERE b.queue = %(queue)s
    AND b.id = u.id
    AND b.claim_token = u.token
  RETURNING b.*, u.new_status, u.new_result, u.new_error, u.all_done
)
INSERT INTO batchq.batches (id, queue, kind, status, payload, items, priority, run_at, unique_key, max_attempts,
  max_failed_items, timeout_seconds, attempt, claimed_by, claimed_at, items_done, items_failed, cursor, result,
  errors, created_at, finished_at)
OVERRIDING SYSTEM VALUE
SELECT id, queue, kind, new_status, payload, items, priority, run_at, unique_key, max_attempts,
  max_failed_items, timeout_seconds, attempt, claimed_by, claimed_at,
  CASE WHEN all_done THEN coalesce(items_total, 0) - items_failed ELSE items_done END, items_failed, cursor, new_result,
  CASE WHEN new_error IS NULL THEN errors ELSE batchq.append_error(errors, attempt, new_error) END,
  created_at, clock_timestamp()
FROM gone
RETURNING id
"""


def old_finish(conn: Conn, *finishes: Finish) -> set[int]:
    """Finish batches as a worker from before does; return the ids of those that were still its own."""
    _, parameters = endings.finish("default", finishes)
    return {batch_id for (batch_id,) in run(conn, (OLD_FINISH, parameters))}


# ------------------------------------------------------------------------------------------------- how it is filled in


def test_an_insert_counts_its_items(conn: Conn) -> None:
    for items in ([], [1], list(range(1000)), None):
        insert(conn, **({} if items is None else {"items": items}))
    assert values(conn, TOTALS) == [0, 1, 1000, None]


def test_an_insert_of_many_rows_counts_each(conn: Conn) -> None:
    conn.execute(
        """
        INSERT INTO batchq.batches (kind, items)
        SELECT 'work', CASE WHEN n % 3 > 0 THEN (SELECT jsonb_agg(0) FROM generate_series(1, n)) END
        FROM generate_series(1, 9) n
        """
    )
    assert values(conn, TOTALS) == [1, 2, None, 4, 5, None, 7, 8, None]


def copy(conn: Conn, columns: list[str], *given: list[Any]) -> None:
    """Insert rows by COPY."""
    statement = f"COPY batchq.batches ({', '.join(['kind', *columns])}) FROM STDIN"
    with conn.transaction(), conn.cursor() as cursor, cursor.copy(statement.encode()) as writer:
        for one in given:
            writer.write_row(["work", *one])


def test_a_copy_counts_each(conn: Conn) -> None:
    copy(conn, ["items"], ["[1, 2]"], [None], ["[]"], ["[[1, 2, 3]]"])
    assert values(conn, TOTALS) == [2, None, 0, 1]


def test_enqueue_counts(conn: Conn) -> None:
    batchq.enqueue(conn, KIND, items=["a", "b"])
    batchq.enqueue(conn, KIND)
    batchq.enqueue_many(conn, KIND, items=range(5), items_per_batch=2)
    assert values(conn, TOTALS) == [2, None, 2, 2, 1]


def test_an_insert_that_meets_its_unique_key_changes_nothing(conn: Conn) -> None:
    batchq.enqueue(conn, KIND, items=[1, 2], unique_key="k")
    assert batchq.enqueue(conn, KIND, items=[1, 2, 3], unique_key="k") is None
    assert values(conn, TOTALS) == [2]


def test_a_total_of_ones_own_is_corrected(conn: Conn) -> None:
    for columns in ({"items_total": 7, "items": [1]}, {"items_total": 7}, {"items_total": 0, "items": []}):
        insert(conn, **columns)
    copy(conn, ["items", "items_total"], ["[1, 2]", 1])
    assert values(conn, TOTALS) == [1, None, 0, 2]
    conn.execute("UPDATE batchq.batches SET items_total = 99")
    assert values(conn, TOTALS) == [1, None, 0, 2]


def test_an_update_of_the_items_counts_anew(conn: Conn) -> None:
    batch_id = insert(conn, items=[1])
    for items, total in (("[1, 2, 3]", 3), ("[]", 0), (None, None), ("[null]", 1)):
        conn.execute("UPDATE batchq.batches SET items = %s::jsonb WHERE id = %s", [items, batch_id])
        assert values(conn, TOTALS) == [total]


def test_a_retry_counts_again(conn: Conn) -> None:
    taken = processing(conn, items=[1, 2, 3])
    checkpoint(conn, taken, Progress(1, 1, [failure(1)], first_index=0))
    assert finish(conn, Finish(*taken, "failed")) == {taken.id}
    for whole in (False, True):
        assert value(conn, "SELECT batchq.retry(%s, whole => %s)", [taken.id, whole]) == "pending"
        assert values(conn, TOTALS) == [3]


def by_insert(conn: Conn, items: str) -> None:
    """Insert a batch."""
    conn.execute("INSERT INTO batchq.batches (kind, items) VALUES ('work', %s)", [items])


def by_copy(conn: Conn, items: str) -> None:
    """Copy a batch in."""
    copy(conn, ["items"], [items])


def by_update(conn: Conn, items: str) -> None:
    """Change the batch that there is."""
    conn.execute("UPDATE batchq.batches SET items = %s", [items])


@pytest.mark.parametrize("items", ["{}", "null", "7", '"[]"'])
@pytest.mark.parametrize("write", [by_insert, by_copy, by_update])
def test_items_that_are_no_array_are_refused_by_name(
    conn: Conn, items: str, write: Callable[[Conn, str], None]
) -> None:
    insert(conn, items=[1])
    with pytest.raises(psycopg.errors.CheckViolation, match="batches_items_is_array") as caught:
        write(conn, items)
    assert caught.value.diag.constraint_name == "batches_items_is_array"
    assert (caught.value.diag.schema_name, caught.value.diag.table_name) == ("batchq", "batches_live")
    assert values(conn, TOTALS) == [1]


@pytest.mark.parametrize(
    "columns", [{"items": [1], "items_done": 2}, {"items_done": 1}, {"items": [], "items_failed": 1}]
)
def test_counters_beyond_the_items_are_refused_by_name(conn: Conn, columns: dict[str, Any]) -> None:
    with pytest.raises(psycopg.errors.CheckViolation, match="batches_counters_fit_items"):
        insert(conn, **columns)
    assert values(conn, TOTALS) == []


def test_a_checkpoint_beyond_the_items_is_refused_by_name(conn: Conn) -> None:
    taken = processing(conn, items=[1, 2])
    assert checkpoint(conn, taken, Progress(2)) == 1
    with pytest.raises(psycopg.errors.CheckViolation, match="batches_counters_fit_items"):
        checkpoint(conn, taken, Progress(1, done_before=2))


def test_who_may_only_insert_may_insert_items(conn: Conn, admin_dsn: str, database: str) -> None:
    role = f"{database}_writer"
    with psycopg.connect(admin_dsn, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(role)))
        try:
            admin.execute(sql.SQL("GRANT USAGE ON SCHEMA batchq TO {}").format(sql.Identifier(role)))
            admin.execute(sql.SQL("GRANT INSERT ON batchq.batches TO {}").format(sql.Identifier(role)))
            admin.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role)))
            admin.execute("INSERT INTO batchq.batches (kind, items) VALUES ('work', '[1, 2]')")
            copy(admin, ["items"], ["[1]"])
            with pytest.raises(psycopg.errors.CheckViolation, match="batches_items_is_array"):
                admin.execute("INSERT INTO batchq.batches (kind, items) VALUES ('work', '{}')")
            for forbidden in ("UPDATE batchq.batches SET items_total = 1", "SELECT id FROM batchq.all_batches"):
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    admin.execute(forbidden)
        finally:
            admin.execute("RESET ROLE")
            admin.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(role)))
            admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))
    assert values(conn, TOTALS) == [2, 1]


# -------------------------------------------------------------------------------------------------------- to its end


def end_by_finish(conn: Conn, taken: Taken) -> None:
    """Finish with a result."""
    assert finish(conn, Finish(*taken, "completed", "1", all_done=True)) == {taken.id}


def end_by_complete(conn: Conn, taken: Taken) -> None:
    """Complete without a result."""
    assert complete(conn, taken) == {taken.id}


def end_by_an_old_worker(conn: Conn, taken: Taken) -> None:
    """Finish as a worker from before does."""
    assert old_finish(conn, Finish(*taken, "completed", all_done=True)) == {taken.id}


def end_by_cancel(conn: Conn, taken: Taken) -> None:
    """Cancel."""
    assert value(conn, "SELECT batchq.cancel(%s)", [taken.id]) == "cancelled"


def end_by_rescue(conn: Conn, taken: Taken) -> None:
    """Let the lease of the last attempt run out."""
    conn.execute("UPDATE batchq.batches_live SET max_attempts = attempt")
    expire_lease(conn, taken.id)
    assert [row[3] for row in leases.rescue(conn, "default", 10)] == ["failed"]


def end_by_hand(conn: Conn, taken: Taken) -> None:
    """End it as no person should."""
    conn.execute(
        "UPDATE batchq.batches SET status = 'failed', finished_at = now(), claim_token = NULL, lease_expires_at = NULL"
    )


ENDS = [end_by_finish, end_by_complete, end_by_an_old_worker, end_by_cancel, end_by_rescue, end_by_hand]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("items", [[1, 2, 3], [], None])
def test_a_finished_batch_keeps_its_total(
    conn: Conn, items: list[int] | None, end: Callable[[Conn, Taken], None]
) -> None:
    taken = processing(conn, **({} if items is None else {"items": items}))
    end(conn, taken)
    row = batch(conn, taken.id)
    assert row["finished_at"] is not None
    assert (row["items"], row["items_total"]) == (items, None if items is None else len(items))
    assert value(conn, "SELECT items_total FROM batchq.status WHERE id = %s", [taken.id]) == row["items_total"]


def test_an_old_worker_fills_the_total_in_a_partition_that_is_made_later_and_in_the_default_one(conn: Conn) -> None:
    conn.execute("SELECT batchq.create_finished_partitions((now() AT TIME ZONE 'UTC')::date, 3)")
    later = OLD_FINISH.replace("clock_timestamp()", "clock_timestamp() + %(days)s * interval '1 day'")
    for days in (1, 2, -400):
        taken = processing(conn, items=[1, 2])
        _, parameters = endings.finish("default", [Finish(*taken, "completed")])
        assert run(conn, (later, parameters | {"days": days})) == [(taken.id,)]
    places = values(conn, "SELECT tableoid::regclass::text FROM batchq.batches ORDER BY id")
    assert len(set(places)) == 3
    assert places[2] == "batchq.finished_default"
    assert values(conn, TOTALS) == [2, 2, 2]


def test_an_old_worker_works_beside_the_new_schema(conn: Conn) -> None:
    taken = [processing(conn, items=[1] * number) for number in range(1, 5)]
    assert checkpoint(conn, taken[0], Progress(1)) == 1
    ended = [Finish(*one, "completed", '{"a": 1}', all_done=True) for one in taken]
    stale = Finish(taken[3].id, uuid4(), "failed")
    assert old_finish(conn, *ended[:3], stale) == {one.id for one in taken[:3]}
    assert values(conn, "SELECT items_done FROM batchq.all_batches WHERE status = 'completed' ORDER BY id") == [1, 2, 3]
    assert values(conn, TOTALS) == [1, 2, 3, 4]


if __name__ == "__main__":
    run_alone(__file__)
