"""Flows: a batch with "after" begins once, when all of them have ended, whatever ends them."""

import threading
import time
from typing import Any

import psycopg
import pytest

import batchq
from batchq.errors import InvalidInput
from batchq.testing import running_worker
from tests.support.alone import run_alone
from tests.support.batches import drain, put, values
from tests.support.databases import holding_snapshot
from tests.support.steps import step
from tests.support.waiting import wait_until

Conn = psycopg.Connection[Any]
AT_ONCE = batchq.Backoff(0, 0)


class Ran:
    """An app whose kind "work" does what its payload says, and what ran, in its order."""

    def __init__(self) -> None:
        self.app = batchq.App()
        self.ids: list[int] = []
        self.needed: dict[int, list[batchq.Needed]] = {}
        self.app.handler("work", backoff=AT_ONCE)(self.work)

    def work(self, batch: batchq.Batch) -> Any:
        """Fail, cancel, or return the payload's "returns"."""
        self.ids.append(batch.id)
        if batch.payload.get("reads"):
            self.needed[batch.id] = batch.needed
        if batch.payload.get("fails"):
            raise InvalidInput("as told")
        if batch.payload.get("cancels"):
            raise batchq.Cancel("as told")
        return batch.payload.get("returns")


@pytest.fixture
def ran() -> Ran:
    """Return the app."""
    return Ran()


def enqueue(conn: Conn, payload: Any = None, **options: Any) -> int:
    """Enqueue a batch of kind work."""
    batch_id = batchq.enqueue(conn, "work", payload, **options)
    assert batch_id is not None
    if options.get("after"):
        conn.execute("SELECT batchq.collect_flows(10000)")  # as a worker does where no trigger could
    return batch_id


def status(conn: Conn, batch_id: int) -> str:
    """Return the stored status."""
    return str(values(conn, "SELECT status FROM batchq.all_batches WHERE id = %s", batch_id)[0])


# -------------------------------------------------------------------------------------------------------- begins once


def test_a_batch_runs_after_those_that_it_waits_for(dsn: str, conn: Conn, ran: Ran) -> None:
    first, second = enqueue(conn), enqueue(conn)
    third = enqueue(conn, after=[first, second], priority=-10)
    fourth = enqueue(conn, after=[third])
    assert [status(conn, one) for one in (third, fourth)] == ["waiting", "waiting"]
    drain(ran.app, dsn)
    assert sorted(ran.ids[:2]) == [first, second]
    assert ran.ids[2:] == [third, fourth]
    assert values(conn, "SELECT count(*) FROM batchq.flow_events") == [0]


@pytest.mark.parametrize("count", [0, 1, 25])
def test_the_items_of_a_batch_that_waited_are_worked(dsn: str, conn: Conn, ran: Ran, count: int) -> None:
    worked: list[int] = []
    ran.app.item_handler("list")(worked.append)
    first = enqueue(conn)
    listed = batchq.enqueue(conn, "list", items=list(range(count)), after=[first])
    assert values(conn, "SELECT items_total FROM batchq.all_batches WHERE id = %s", listed) == [count]
    drain(ran.app, dsn)
    assert worked == list(range(count))
    assert values(conn, "SELECT items_done FROM batchq.all_batches WHERE id = %s", listed) == [count]


def test_a_drain_does_not_end_while_others_follow_what_it_would_run(
    dsn: str, admin_dsn: str, conn: Conn, ran: Ran
) -> None:
    first = enqueue(conn)
    second = enqueue(conn, after=[first])
    draining = threading.Thread(target=drain, args=(ran.app, dsn))
    with psycopg.connect(admin_dsn) as holder:
        assert len(holder.execute("SELECT FROM batchq.flow_events FOR UPDATE").fetchall()) == 1
        draining.start()
        wait_until(lambda: ran.ids == [first], 10, "the first to run")
        draining.join(1)
        assert draining.is_alive()
    draining.join()
    assert ran.ids == [first, second]


def test_any_client_can_let_a_batch_wait(dsn: str, conn: Conn, ran: Ran) -> None:
    first = enqueue(conn)
    insert = "INSERT INTO batchq.batches (kind, after) VALUES ('work', ARRAY[%s, %s]::bigint[]) RETURNING id"
    [second] = values(conn, insert, first, first)
    assert values(conn, "SELECT needs_left FROM batchq.all_batches WHERE id = %s", second) == [1]
    assert batchq.enqueue_many(conn, "work", [{}, {}], after=[second]) == 2
    each = batchq.enqueue_each(conn, "work", [{"returns": n} for n in range(250)], after=[first])
    assert values(
        conn, "SELECT (payload ->> 'returns')::int FROM batchq.all_batches WHERE id = ANY (%s) ORDER BY id", each
    ) == [*range(250)]
    drain(ran.app, dsn)
    assert ran.ids[0] == first
    assert len(ran.ids) == len(set(ran.ids)) == 254


def test_one_that_waits_for_nothing_is_pending(conn: Conn) -> None:
    assert status(conn, enqueue(conn, after=[])) == "pending"


def test_a_batch_that_has_ended_is_not_waited_for(dsn: str, conn: Conn, ran: Ran) -> None:
    first = enqueue(conn)
    drain(ran.app, dsn)
    second = enqueue(conn, after=[first])
    drain(ran.app, dsn)
    assert ran.ids == [first, second]
    assert values(conn, "SELECT count(*) FROM batchq.flow_events") == [0]


def test_a_completed_batch_that_is_not_kept_counts(dsn: str, conn: Conn, ran: Ran) -> None:
    first = enqueue(conn, {"returns": 1})
    second = enqueue(conn, {"reads": True}, after=[first])
    drain(ran.app, dsn, keep_completed=False)
    assert ran.ids == [first, second]
    assert ran.needed[second] == [(first, None, "completed", None)]


def test_a_handler_reads_what_it_waited_for(dsn: str, conn: Conn, ran: Ran) -> None:
    first, second = enqueue(conn, {"returns": {"rows": 7}}), enqueue(conn, {"fails": True}, max_attempts=1)
    third = enqueue(conn, {"reads": True}, after=[second, first], on_failure="run")
    drain(ran.app, dsn)
    assert ran.needed[third] == [(first, "work", "completed", {"rows": 7}), (second, "work", "failed", None)]


def test_an_async_handler_reads_what_it_waited_for_also_within_its_transaction(dsn: str, conn: Conn, ran: Ran) -> None:
    found: list[Any] = []

    @ran.app.handler("async")
    async def read(batch: batchq.Batch) -> None:
        async with batch.transaction():
            found.append(await batch.needed_async())
        found.append(batch.needed)

    first = enqueue(conn, {"returns": 7})
    put(conn, "async", after=[first])
    drain(ran.app, dsn)
    assert found == [[(first, "work", "completed", 7)]] * 2
    assert found[0] is found[1], "it is read once"


def test_an_async_handler_that_would_block_the_event_loop_is_told_so(dsn: str, conn: Conn, ran: Ran) -> None:
    @ran.app.handler("async")
    async def read(batch: batchq.Batch) -> None:
        batch.needed  # noqa: B018

    put(conn, "async", max_attempts=1)
    drain(ran.app, dsn)
    [error] = values(conn, "SELECT errors -> -1 ->> 'error' FROM batchq.all_batches")
    assert "await batch.needed_async()" in error


def test_fan_out_and_fan_in_commit_with_the_handler(dsn: str, conn: Conn, ran: Ran) -> None:
    tries = []

    @ran.app.handler("fan", backoff=AT_ONCE)
    def fan(batch: batchq.Batch) -> None:
        with batch.transaction() as own:
            parts = batchq.enqueue_each(own, "work", [{"returns": n} for n in range(10)])
            batchq.enqueue(own, "work", {"reads": True}, after=parts)
            tries.append(batch.attempt)
            if batch.attempt == 1:
                raise ValueError("nothing is committed")

    put(conn, "fan")
    drain(ran.app, dsn)
    assert tries == [1, 2]
    assert len(ran.ids) == 11
    assert [needed.result for needed in ran.needed[ran.ids[-1]]] == [*range(10)]


def test_many_needs_of_one_and_many_that_need_one(dsn: str, conn: Conn, ran: Ran) -> None:
    first = enqueue(conn)
    middle = batchq.enqueue_each(conn, "work", [{}] * 6000, after=[first])
    last = enqueue(conn, after=middle)
    drain(ran.app, dsn, concurrency=4)
    assert (ran.ids[0], ran.ids[-1]) == (first, last)
    assert len(ran.ids) == len(set(ran.ids)) == 6002


# -------------------------------------------------------------------------------------- whoever fails or is cancelled


@pytest.mark.parametrize("how", ["fails", "cancels"])
@pytest.mark.parametrize(("on_failure", "end"), [(None, "waiting"), ("run", "completed"), ("cancel", "cancelled")])
def test_what_happens_if_a_needed_batch_does_not_complete(
    dsn: str, conn: Conn, ran: Ran, how: str, on_failure: Any, end: str
) -> None:
    first = enqueue(conn, {how: True}, max_attempts=1)
    second = enqueue(conn, after=[first], on_failure=on_failure)
    third = enqueue(conn, after=[second], on_failure=on_failure)
    drain(ran.app, dsn)
    assert [status(conn, one) for one in (second, third)] == [end, end]
    if end == "cancelled":
        [error] = values(conn, "SELECT errors -> -1 ->> 'error' FROM batchq.all_batches WHERE id = %s", second)
        assert (
            error == f"cancelled: batch {first}, which it waited for, {'failed' if how == 'fails' else 'was cancelled'}"
        )


def test_a_retry_that_succeeds_lets_the_others_go_on(dsn: str, conn: Conn, ran: Ran) -> None:
    first, other = enqueue(conn, {"fails": True}), enqueue(conn)
    second = enqueue(conn, after=[first, other])
    drain(ran.app, dsn)
    for _ in range(2):
        assert values(conn, "SELECT status, needs_left FROM batchq.all_batches WHERE id = %s", second) == ["waiting"]
        conn.execute("SELECT batchq.retry(%s)", [first])
        drain(ran.app, dsn)
    conn.execute("SELECT batchq.retry(%s)", [first])
    conn.execute("UPDATE batchq.batches SET payload = '{}' WHERE id = %s", [first])
    drain(ran.app, dsn)
    assert status(conn, second) == "completed"
    assert ran.ids.count(second) == 1


def test_one_that_runs_in_spite_of_a_failure_runs_once(dsn: str, conn: Conn, ran: Ran) -> None:
    first, other = enqueue(conn, {"fails": True}), enqueue(conn, delay_seconds=3600)
    second = enqueue(conn, after=[first, other], on_failure="run")
    drain(ran.app, dsn)
    conn.execute("SELECT batchq.retry(%s)", [first])
    conn.execute("UPDATE batchq.batches SET payload = '{}' WHERE id = %s", [first])
    drain(ran.app, dsn)
    assert status(conn, second) == "waiting", "the first ended twice, the other has not ended"
    conn.execute("SELECT batchq.snooze(%s, '0')", [other])
    drain(ran.app, dsn)
    assert ran.ids.count(second) == 1


def test_a_batch_that_was_cancelled_with_what_it_needs_waits_again(dsn: str, conn: Conn, ran: Ran) -> None:
    first = enqueue(conn, {"fails": True})
    second = enqueue(conn, after=[first], on_failure="cancel")
    drain(ran.app, dsn)
    conn.execute("SELECT batchq.retry(%s)", [first])
    conn.execute("UPDATE batchq.batches SET payload = '{}' WHERE id = %s", [first])
    assert values(conn, "SELECT batchq.retry(%s)", second) == ["pending"]
    assert status(conn, second) == "waiting"
    drain(ran.app, dsn)
    assert ran.ids == [first, first, second]


def test_a_retry_marks_a_batch_that_others_have_begun_to_wait_for(dsn: str, conn: Conn, ran: Ran) -> None:
    first = enqueue(conn, {"fails": True})
    drain(ran.app, dsn)
    enqueue(conn, after=[first])
    assert values(conn, "SELECT changed FROM batchq.bulk('retry')") == [1]
    assert values(conn, "SELECT is_needed FROM batchq.all_batches WHERE id = %s", first) == [True]


def test_a_batch_that_waits_holds_its_unique_key(conn: Conn) -> None:
    first = enqueue(conn)
    enqueue(conn, after=[first], unique_key="k")
    assert batchq.enqueue(conn, "work", unique_key="k") is None


def test_a_batch_that_ran_does_not_wait_again_when_it_is_retried(dsn: str, conn: Conn, ran: Ran) -> None:
    first = enqueue(conn)
    second = enqueue(conn, {"fails": True}, after=[first])
    drain(ran.app, dsn)
    conn.execute("SELECT batchq.retry(%s)", [second])
    assert status(conn, second) == "pending"
    conn.execute("SELECT batchq.move(%s, 'other')", [second])
    assert status(conn, second) == "pending"


def test_a_needed_batch_that_a_person_deletes_counts_as_cancelled(dsn: str, conn: Conn, ran: Ran) -> None:
    first = enqueue(conn, delay_seconds=3600)
    waits, runs = enqueue(conn, after=[first]), enqueue(conn, after=[first], on_failure="run")
    drain(ran.app, dsn)
    conn.execute("DELETE FROM batchq.batches WHERE id = %s", [first])
    drain(ran.app, dsn)
    assert ran.ids == [runs]
    assert status(conn, waits) == "waiting"


def test_a_needed_batch_that_moves_to_another_queue_is_still_needed(dsn: str, conn: Conn, ran: Ran) -> None:
    first = enqueue(conn, delay_seconds=3600)
    second = enqueue(conn, after=[first], queue="two", on_failure="cancel")
    drain(ran.app, dsn)
    conn.execute("SELECT batchq.move(%s, 'two')", [first])
    conn.execute("SELECT batchq.snooze(%s, '0')", [first])
    drain(ran.app, dsn, queues=["two"])
    assert ran.ids == [first, second]


# ------------------------------------------------------------------------------------------------------------ verbs


def test_a_cancel_goes_down_the_line_only_if_told(dsn: str, conn: Conn, ran: Ran) -> None:
    first = enqueue(conn, delay_seconds=3600)
    second = enqueue(conn, after=[first])
    third = enqueue(conn, after=[second, first], queue="other")
    other = enqueue(conn, after=[enqueue(conn)])
    assert values(conn, "SELECT batchq.cancel(%s)", second) == ["cancelled"]
    assert status(conn, third) == "waiting"
    assert values(conn, "SELECT batchq.cancel_with_dependents(%s)", first) == ["cancelled"]
    assert [status(conn, one) for one in (first, third)] == ["cancelled", "cancelled"]
    drain(ran.app, dsn)
    assert status(conn, other) == "completed"
    assert values(conn, "SELECT batches FROM batchq.audit ORDER BY id") == [1, 2]


def test_one_that_waits_can_be_run_anyway(dsn: str, conn: Conn, ran: Ran) -> None:
    first = enqueue(conn, delay_seconds=3600)
    second = enqueue(conn, {"reads": True}, after=[first])
    assert values(conn, "SELECT batchq.run_anyway(%s)", second) == ["pending"]
    assert values(conn, "SELECT batchq.run_anyway(%s)", second) == ["pending"]
    drain(ran.app, dsn)
    assert ran.ids == [second]
    assert ran.needed[second] == [(first, "work", "pending", None)]
    conn.execute("SELECT batchq.snooze(%s, '0')", [first])
    drain(ran.app, dsn)
    assert ran.ids == [second, first]
    assert values(conn, "SELECT verb FROM batchq.audit ORDER BY id") == ["run_anyway", "snooze"]


def test_a_truncate_forgets_flows(admin_dsn: str, conn: Conn) -> None:
    enqueue(conn, after=[enqueue(conn)])
    with psycopg.connect(admin_dsn, autocommit=True) as admin:
        admin.execute("TRUNCATE batchq.batches")
    assert values(conn, "SELECT (SELECT count(*) FROM batchq.needs) + (SELECT count(*) FROM batchq.flow_events)") == [0]


def test_bulk_cancels_what_waits(conn: Conn) -> None:
    waits = enqueue(conn, after=[enqueue(conn)])
    conn.execute("SELECT batchq.bulk('cancel', '{\"status\": \"waiting\"}')")
    assert values(conn, "SELECT id FROM batchq.all_batches WHERE status = 'cancelled'") == [waits]


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("after", [7, "17", {1: 2}, [1.5], ["a"], [True], [None], b"x", range(100_001)])
def test_python_refuses_what_are_not_ids(conn: Conn, after: Any) -> None:
    with pytest.raises(InvalidInput, match="after must"):
        batchq.enqueue(conn, "work", after=after)
    assert values(conn, "SELECT count(*) FROM batchq.all_batches") == [0]


@pytest.mark.parametrize("given", [{"on_failure": "explode"}, {"on_failure": 1}, {"on_failure": ""}])
def test_python_refuses_other_options(conn: Conn, given: Any) -> None:
    with pytest.raises(InvalidInput, match="must be"):
        batchq.enqueue(conn, "work", **given)


@pytest.mark.parametrize(
    ("columns", "given", "constraint"),
    [
        ("after", "ARRAY[1]::bigint[]", "batches_after_exist"),
        ("after", "ARRAY[-1]::bigint[]", "batches_after_exist"),
        ("after", "ARRAY(SELECT last_value FROM batchq.batches_id_seq)", "batches_after_is_not_itself"),
        ("after", "ARRAY[NULL]::bigint[]", "batches_after_fits"),
        ("after", "ARRAY(SELECT generate_series(1, 100001))", "batches_after_fits"),
        ("after, status", "'{1}', 'waiting'", "batches_waiting_is_counted"),
        ("status", "'waiting'", "batches_waiting_is_counted"),
        ("on_failure", "'explode'", "batches_on_failure_is_known"),
    ],
)
def test_the_table_refuses_by_name(conn: Conn, columns: str, given: str, constraint: str) -> None:
    enqueue(conn)
    conn.execute("DELETE FROM batchq.batches")
    with pytest.raises(psycopg.errors.CheckViolation) as refused:
        conn.execute(f"INSERT INTO batchq.batches (kind, {columns}) SELECT 'work', {given}".encode())
    assert refused.value.diag.constraint_name == constraint
    assert values(conn, "SELECT count(*) FROM batchq.all_batches") == [0]


def test_a_batch_of_a_transaction_that_is_open_does_not_exist_for_others(dsn: str, conn: Conn) -> None:
    with psycopg.connect(dsn) as other:
        theirs = enqueue(other)
        with pytest.raises(psycopg.errors.CheckViolation, match=f"cannot wait for {theirs}: no batch has that id"):
            enqueue(conn, after=[theirs])
        other.rollback()


# --------------------------------------------------------------------------------------------------- beside each other


def test_enqueueing_after_the_same_batches_waits_for_nobody_and_holds_up_nobody(
    admin_dsn: str, dsn: str, conn: Conn, ran: Ran
) -> None:
    first, second = enqueue(conn), enqueue(conn)
    with psycopg.connect(admin_dsn) as one, psycopg.connect(admin_dsn) as other:
        for mine in (one, other):
            mine.execute("SET LOCAL lock_timeout = '2s'")
        third = enqueue(one, after=[first])
        fourth = enqueue(other, after=[second])
        enqueue(one, after=[second, third])
        enqueue(other, after=[first, fourth])
        step("both transactions are open: the batches that they wait for run to their end")
        drain(ran.app, dsn)
        assert ran.ids == [first, second]
    drain(ran.app, dsn)
    assert len(ran.ids) == 6


def test_an_end_and_a_batch_that_begins_to_wait_for_it_at_the_same_time(dsn: str, conn: Conn, ran: Ran) -> None:
    for _ in range(20):
        first = enqueue(conn)
        with psycopg.connect(dsn) as other, running_worker(ran.app, dsn):
            second = enqueue(other, after=[first])
            other.commit()
            wait_until(lambda second=second: status(conn, second) == "completed", 10, "the second to run")


def test_an_idle_worker_goes_on_at_once(dsn: str, conn: Conn, ran: Ran) -> None:
    took = []
    ended: dict[int, float] = {}
    begun = threading.Event()

    @ran.app.handler("timed")
    def timed(batch: batchq.Batch) -> None:
        if batch.payload.get("last"):
            took.append(time.monotonic() - ended[0])
            begun.set()
        ended[0] = time.monotonic()

    with running_worker(ran.app, dsn):
        for _ in range(15):
            begun.clear()
            first = put(conn, "timed", {}, delay_seconds=0.3)
            put(conn, "timed", {"last": True}, after=[first])
            assert begun.wait(10)
    step("from the end of one to the beginning of the next: %s ms", [round(1000 * seconds) for seconds in took])
    assert sorted(took)[len(took) // 2] < 0.1


def follow(conn: Conn, after: int = 0) -> tuple[int, int]:
    """Follow flows as a worker does; return how many batches became pending, and how many events were left."""
    row = conn.execute("SELECT released, left_over FROM batchq.follow_flows(%s)", [after]).fetchone()
    assert row
    return row[0], row[1]


def test_a_waiting_batch_that_somebody_has_locked_delays_only_itself(admin_dsn: str, conn: Conn) -> None:
    with conn.transaction():
        first = enqueue(conn)
        second, third = enqueue(conn, after=[first]), enqueue(conn, after=[first])
    conn.execute("UPDATE batchq.batches SET run_at = now() - interval '1 hour'")
    conn.execute("DELETE FROM batchq.batches WHERE id = %s", [first])
    conn.execute("UPDATE batchq.flow_events SET status = 'completed'")
    with psycopg.connect(admin_dsn) as holder:
        holder.execute("SELECT 1 FROM batchq.batches_live WHERE id = %s FOR UPDATE", [second])
        with conn.transaction():
            conn.execute("SET LOCAL lock_timeout = '2s'")
            assert follow(conn) == (1, 1)
        assert [status(conn, one) for one in (second, third)] == ["waiting", "pending"]
        assert follow(conn) == (0, 1)
    assert follow(conn) == (1, 0)
    step("they are at the end of the claim order, where the next claim looks")
    assert values(conn, "SELECT run_at > now() - interval '1 minute' FROM batchq.all_batches ORDER BY id") == [
        True,
        True,
    ]


OLD_FINISH = """
WITH gone AS (DELETE FROM batchq.batches_live WHERE id = %s RETURNING *)
INSERT INTO batchq.batches_finished (id, queue, kind, payload, run_at, max_attempts, attempt, created_at, status,
  finished_at)
OVERRIDING SYSTEM VALUE
SELECT id, queue, kind, payload, run_at, max_attempts, 1, created_at, %s, clock_timestamp() FROM gone
"""


@pytest.mark.parametrize(("end", "then"), [("completed", "pending"), ("failed", "waiting")])
def test_an_end_that_a_worker_of_an_earlier_version_wrote_is_noticed(conn: Conn, end: str, then: str) -> None:
    with conn.transaction():
        first = enqueue(conn)
        second = enqueue(conn, after=[first])
    conn.execute(OLD_FINISH, [first, end])
    assert follow(conn) == (int(then == "pending"), 0)
    assert status(conn, second) == then


@pytest.mark.parametrize("on_failure", ["wait", "run"])
def test_who_counts_by_a_list_that_is_out_of_date_counts_nothing_twice(conn: Conn, on_failure: Any) -> None:
    first, other = enqueue(conn), enqueue(conn)
    second = enqueue(conn, after=[first, other], on_failure=on_failure)
    for _ in range(2):
        values(conn, "SELECT batchq.count_needs('default', %s, %s, %s, '{completed}')", [second], [first], [second])
    assert values(conn, "SELECT needs_left FROM batchq.all_batches WHERE id = %s", second) == [1]


def test_events_that_were_dealt_with_are_not_read_again_while_a_snapshot_is_held(
    admin_dsn: str, dsn: str, conn: Conn
) -> None:
    with holding_snapshot(dsn), psycopg.connect(admin_dsn, autocommit=True) as admin:
        admin.execute("INSERT INTO batchq.flow_events (needed_id) SELECT 0 FROM generate_series(1, 30000)")
        admin.execute("DELETE FROM batchq.flow_events")
        explain = "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) SELECT batchq.follow_flows(%s)"
        pages = []
        for after in (0, 30_000):
            follow(conn, after)
            plan = values(conn, explain, after)[0][0]["Plan"]
            pages.append(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])
    step("pages from the start, and from the last event on: %s", pages)
    assert pages[0] > 100, "the snapshot does not matter here, so this test proves nothing"
    assert pages[1] < 20


RUN = """
UPDATE batchq.batches SET status = 'processing', attempt = 1, claimed_by = 'w', claimed_at = now(),
  claim_token = gen_random_uuid(), lease_expires_at = now() + interval '1 hour' WHERE id = ANY (%s)
"""


def test_counting_ends_costs_the_same_however_many_were_counted_while_a_snapshot_is_held(conn: Conn, dsn: str) -> None:
    with conn.transaction():
        needed = batchq.enqueue_each(conn, "work", [{}] * 3000)
        last = enqueue(conn, after=needed)
    pages, after = [], 0
    with holding_snapshot(dsn):
        for start in range(0, 3000, 500):
            ids = needed[start : start + 500]
            conn.execute(RUN, [ids])
            conn.execute("DELETE FROM batchq.batches_live WHERE id = ANY (%s)", [ids])
            explain = "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) SELECT batchq.follow_flows(%s)"
            plan = values(conn, explain, after)[0][0]["Plan"]
            pages.append(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])
            [after] = values(conn, "SELECT last_value FROM batchq.flow_events_id_seq")
    step("pages for each 500 ends: %s", pages)
    assert status(conn, last) == "pending"
    assert min(pages) > 500, "nothing was counted"
    assert max(pages[1:]) < 1.3 * min(pages[1:])


if __name__ == "__main__":
    run_alone(__file__)
