"""Spread: one batch with a long list of items, worked in parts by many, is one batch to people."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest

import batchq
from batchq.errors import InvalidInput
from batchq.postgres.statements import views
from batchq.testing import running_worker
from tests.support.alone import run_alone
from tests.support.batches import drain, values
from tests.support.steps import step
from tests.support.waiting import wait_until

Conn = psycopg.Connection[Any]
AT_ONCE = batchq.Backoff(0, 0)


class Worked:
    """An app whose item handler "work" records its items; those in *bad* fail."""

    def __init__(self, **options: Any) -> None:
        self.app = batchq.App()
        self.counts: Counter[Any] = Counter()
        self.ids: set[int] = set()
        self.bad: set[Any] = set()
        self.seconds = 0.0
        self.cancels_at: Any = None
        self.app.item_handler("work", backoff=AT_ONCE, chunk_size=5, **options)(self.work)

    def work(self, item: Any, batch: batchq.Batch) -> None:
        """Record the item, and fail if it is bad."""
        time.sleep(self.seconds)
        if item == self.cancels_at:
            raise batchq.Cancel("as told")
        self.counts[item] += 1
        self.ids.add(batch.id)
        if item in self.bad:
            raise ValueError(f"bad {item}")


@pytest.fixture
def worked() -> Worked:
    """Return the app."""
    return Worked()


def enqueue(conn: Conn, count: int = 100, **options: Any) -> int:
    """Enqueue a batch of kind work with the items 0, 1, 2 and so on."""
    batch_id = batchq.enqueue(conn, "work", items=list(range(count)), **({"spread": 4} | options))
    assert batch_id is not None
    return batch_id


def shown(conn: Conn, batch_id: int) -> dict[str, Any]:
    """Return the batch's row of batchq.status."""
    row = views.status_row(conn, batch_id)
    assert row is not None
    return row


@pytest.fixture
def slow(dsn: str) -> Iterator[Worked]:
    """Run a worker whose items take 20 ms."""
    slow = Worked()
    slow.seconds = 0.02
    with running_worker(slow.app, dsn, concurrency=4):
        yield slow


# ----------------------------------------------------------------------------------------------------------- one batch


def test_each_item_is_worked_once_and_to_people_it_is_one_batch(dsn: str, conn: Conn, worked: Worked) -> None:
    whole = enqueue(conn, 103)
    drain(worked.app, dsn)
    assert worked.counts == Counter(range(103))
    assert worked.ids == {whole}, "handlers see the id of the whole"
    row = shown(conn, whole)
    assert (row["status"], row["items_done"], row["items_failed"], row["progress_percent"]) == (
        "completed",
        103,
        0,
        100,
    )
    assert (row["spread"], row["attempt"]) == (4, 1)
    assert values(conn, "SELECT id FROM batchq.all_batches") == [whole]
    assert values(conn, "SELECT items FROM batchq.parts ORDER BY first_item") == [25, 26, 26, 26]
    assert values(conn, "SELECT count(*) FROM batchq.flow_events") == [0]
    assert values(conn, "SELECT sum(completed)::integer FROM batchq.throughput_minutes") == [1]
    assert values(conn, "SELECT sum(items)::integer FROM batchq.throughput_minutes") == [103]


def test_while_its_parts_run_the_whole_shows_their_progress(conn: Conn, slow: Worked) -> None:
    whole = enqueue(conn, 400)
    wait_until(lambda: shown(conn, whole)["items_done"] >= 40, 10, "some items to be done")
    row = shown(conn, whole)
    assert (row["status"], row["stored_status"], row["spread"]) == ("processing", "waiting", 4)
    assert 0 < row["progress_percent"] < 100
    assert row["running_time"] is not None
    assert {r["id"] for r in views.status_rows(conn, None, None, None, 100)} == {whole}
    assert {r["id"] for r in views.status_rows(conn, None, None, "processing", 100)} == {whole}
    assert views.status_rows(conn, None, None, "waiting", 100) == []
    assert {r["id"] for r in views.running_rows(conn, None, None, 100)} == {whole}
    assert {r["id"] for r in views.changed_rows(conn, "2100-01-01", 0, [], None, None, 100)} == {whole}
    [queue] = views.queue_rows(conn)
    assert (queue["processing"], queue["waiting"]) == (4, 0), "queues count what workers have to do: the parts"
    wait_until(lambda: shown(conn, whole)["status"] == "completed", 30, "it to be completed")
    assert slow.counts == Counter(range(400))
    assert float(values(conn, "SELECT extract(epoch FROM running_time) FROM batchq.status")[0]) > 1, (
        "of all, not of the last claim"
    )


def test_the_item_handler_has_a_default_and_the_batch_overrides_it(dsn: str, conn: Conn) -> None:
    worked = Worked(spread=3)
    default, alone = enqueue(conn, spread=None), enqueue(conn, spread=1)
    drain(worked.app, dsn)
    assert worked.counts == Counter(dict.fromkeys(range(100), 2))
    assert values(conn, "SELECT count(*) FROM batchq.parts WHERE batch_id = %s", default) == [3]
    assert values(conn, "SELECT count(*) FROM batchq.parts") == [3], "parts are not spread again"
    assert values(conn, "SELECT count(*) FROM batchq.parts WHERE batch_id = %s", alone) == [0]
    assert [shown(conn, one)["spread"] for one in (default, alone)] == [3, 1]


@pytest.mark.parametrize(("count", "parts"), [(0, 0), (1, 0), (2, 2), (3, 3), (5, 4)])
def test_few_items_make_few_parts(dsn: str, conn: Conn, worked: Worked, count: int, parts: int) -> None:
    whole = enqueue(conn, count)
    drain(worked.app, dsn)
    assert worked.counts == Counter(range(count))
    assert shown(conn, whole)["status"] == "completed"
    assert values(conn, "SELECT count(*) FROM batchq.parts") == [parts]


def test_values_of_items_are_kept_as_they_are(dsn: str, conn: Conn) -> None:
    items = [None, True, 1.50, "é\u2028", {"a": [1, {"b": None}]}, [], [[]], "", 12345678901234567890, {"": {}}]
    seen: list[Any] = []
    app = batchq.App()
    app.item_handler("work")(seen.append)
    batchq.enqueue(conn, "work", items=items, spread=3)
    drain(app, dsn)
    assert sorted(map(repr, seen)) == sorted(map(repr, items))


def test_async_item_handlers_are_spread_too(dsn: str, conn: Conn) -> None:
    seen: list[int] = []
    app = batchq.App()

    @app.item_handler("work", concurrency=3)
    async def work(item: int) -> None:
        seen.append(item)

    whole = enqueue(conn)
    drain(app, dsn)
    assert sorted(seen) == list(range(100))
    assert shown(conn, whole)["status"] == "completed"
    assert values(conn, "SELECT count(*) FROM batchq.parts") == [4]


def test_parts_have_the_columns_of_the_whole_and_no_unique_key(conn: Conn, slow: Worked) -> None:
    given = {"priority": -3, "key": "customer", "timeout_seconds": 60, "max_attempts": 7, "unique_key": "once"}
    whole = enqueue(conn, 400, **given)
    wait_until(lambda: len(slow.counts) > 5, 10, "it to begin")
    rows = conn.execute(
        "SELECT priority, key, timeout_seconds, max_attempts, unique_key, payload FROM batchq.all_batches "
        "WHERE part_of = %s",
        [whole],
    ).fetchall()
    assert set(map(repr, rows)) == {repr((-3, "customer", 60, 7, None, {}))}
    assert batchq.enqueue(conn, "work", items=[1], unique_key="once") is None, "the whole is live"


def test_a_batch_after_the_whole_waits_for_all_of_it(dsn: str, conn: Conn, worked: Worked) -> None:
    order: list[str] = []
    worked.app.handler("report")(lambda batch: order.append(f"{len(worked.counts)} {[n.id for n in batch.needed]}"))
    first = batchq.enqueue(conn, "work", items=[1000, 1001])
    whole = enqueue(conn, after=[first])
    batchq.enqueue(conn, "report", after=[whole])
    drain(worked.app, dsn)
    assert order == [f"102 [{whole}]"]


# -------------------------------------------------------------------------------------------------------- failed items


def test_failed_items_have_their_indexes_in_the_whole_and_a_retry_works_those_alone(
    dsn: str, conn: Conn, worked: Worked
) -> None:
    worked.bad = {0, 26, 51, 99}
    whole = enqueue(conn, max_attempts=2)
    drain(worked.app, dsn)
    row = shown(conn, whole)
    assert (row["status"], row["items_done"], row["items_failed"]) == ("failed", 96, 4)
    assert row["attempt"] == 1, "the whole is not tried again: its parts were"
    assert values(conn, "SELECT DISTINCT ended_as FROM batchq.parts") == ["completed"]
    assert row["last_error"] == "4 of 100 items failed; the first: ValueError: bad 0"
    listed = views.failed_item_objects(conn, whole, 100)
    assert [(item["item_index"], item["item"], item["error"]) for item in listed] == [
        (index, index, f"ValueError: bad {index}") for index in (0, 26, 51, 99)
    ]
    assert {worked.counts[item] for item in worked.bad} == {2}, "each part has all attempts, and the whole none more"
    step("retry")
    worked.bad = set()
    worked.counts.clear()
    assert values(conn, "SELECT batchq.retry_items(%s)", whole) == ["pending"]
    drain(worked.app, dsn)
    assert worked.counts == Counter({0: 1, 26: 1, 51: 1, 99: 1})
    row = shown(conn, whole)
    assert (row["status"], row["items_done"], row["items_failed"]) == ("completed", 100, 0)
    assert values(conn, "SELECT count(*) FROM batchq.failed_items") == [0]


def test_failed_items_are_listed_while_the_parts_run(conn: Conn, slow: Worked) -> None:
    slow.bad = {1, 101, 201, 301}
    whole = enqueue(conn, 400, max_attempts=1)
    wait_until(lambda: shown(conn, whole)["items_failed"] == 4, 10, "all to have failed")
    assert shown(conn, whole)["stored_status"] == "waiting"
    assert [item["item_index"] for item in views.failed_item_objects(conn, whole, 100)] == [1, 101, 201, 301]
    assert [item["item_index"] for item in views.failed_item_objects(conn, whole, 2)] == [1, 101]
    assert values(conn, "SELECT item_index FROM batchq.failed_items_of(%s, 101, 1)", whole) == [201]


def test_tolerated_failed_items_complete_the_whole(dsn: str, conn: Conn, worked: Worked) -> None:
    worked.bad = {0, 99}
    whole, other = (enqueue(conn, max_attempts=1, max_failed_items=most) for most in (2, 1))
    drain(worked.app, dsn)
    assert [shown(conn, one)["status"] for one in (whole, other)] == ["completed", "failed"]


def test_completed_parts_are_kept_until_they_are_gathered(dsn: str, conn: Conn, worked: Worked) -> None:
    worked.bad = {7, 77}
    whole = enqueue(conn, max_attempts=1)
    with running_worker(worked.app, dsn, keep_completed=False):
        wait_until(
            lambda: values(conn, "SELECT status FROM batchq.batches_finished") == ["failed"], 10, "it to have failed"
        )
    assert values(conn, "SELECT item_index FROM batchq.failed_items WHERE batch_id = %s ORDER BY 1", whole) == [7, 77]
    assert values(conn, "SELECT batchq.retry(%s, whole => true)", whole) == ["pending"]
    worked.bad = set()
    with running_worker(worked.app, dsn, keep_completed=False):
        wait_until(
            lambda: values(conn, "SELECT count(*) FROM batchq.all_batches") == [0],
            10,
            "it to be completed, and deleted",
        )
    assert worked.counts == Counter(dict.fromkeys(range(100), 2))
    assert values(conn, "SELECT count(*) FROM batchq.failed_items") == [0]


# --------------------------------------------------------------------------------------------- parts that end otherwise


def test_a_part_that_fails_fails_the_whole_and_a_retry_works_what_is_left(dsn: str, conn: Conn, worked: Worked) -> None:
    whole = enqueue(conn, max_attempts=1, timeout_seconds=1)
    work = worked.work
    stuck = threading.Event()

    def hang(item: Any, batch: batchq.Batch) -> None:
        if item == 30:
            stuck.wait(4)
        work(item, batch)

    app = batchq.App()
    app.item_handler("work", backoff=AT_ONCE, chunk_size=5)(hang)
    with running_worker(app, dsn):
        wait_until(lambda: shown(conn, whole)["status"] == "failed", 20, "it to have failed")
        stuck.set()
    row = shown(conn, whole)
    assert "items 25 to 49 (batch " in row["last_error"]
    assert "ran for more than 1 s" in row["last_error"]
    assert (row["items_done"], row["items_failed"], row["progress_percent"]) == (80, 0, 80)
    worked.counts.clear()
    assert values(conn, "SELECT batchq.retry(%s)", whole) == ["pending"]
    drain(worked.app, dsn)
    assert worked.counts == Counter(range(30, 50))
    row = shown(conn, whole)
    assert (row["status"], row["items_done"], row["progress_percent"]) == ("completed", 100, 100)


def test_an_item_that_cancels_its_batch_cancels_the_whole(conn: Conn, slow: Worked) -> None:
    slow.cancels_at = 110
    whole = enqueue(conn, 400)
    wait_until(lambda: shown(conn, whole)["status"] == "cancelled", 10, "it to be cancelled")
    assert shown(conn, whole)["last_error"] == "cancelled: as told"
    assert values(conn, "SELECT count(*) FROM batchq.batches_live") == [0]
    time.sleep(0.5)
    count = sum(slow.counts.values())
    time.sleep(0.5)
    assert sum(slow.counts.values()) == count < 300


def test_a_whole_is_cancelled_even_if_a_part_was_locked_at_first(admin_dsn: str, conn: Conn, slow: Worked) -> None:
    slow.cancels_at = 20
    whole = enqueue(conn, 400)
    wait_until(lambda: len(slow.counts) > 5, 10, "it to begin")
    with psycopg.connect(admin_dsn) as other:
        other.execute("SELECT FROM batchq.batches_live WHERE part_of = %s ORDER BY id DESC LIMIT 1 FOR UPDATE", [whole])
        wait_until(
            lambda: values(conn, "SELECT 1 FROM batchq.parts WHERE ended_as = 'cancelled'") == [1],
            10,
            "the part to end",
        )
        time.sleep(0.3)
        assert shown(conn, whole)["status"] == "processing"
    wait_until(lambda: shown(conn, whole)["status"] == "cancelled", 10, "it to be cancelled")
    assert shown(conn, whole)["last_error"] == "cancelled: as told"


@pytest.mark.parametrize("verb", ["SELECT batchq.cancel(%s)", "SELECT batchq.cancel_with_dependents(%s)", "bulk"])
def test_a_cancel_stops_all_parts_and_a_retry_goes_on(dsn: str, conn: Conn, slow: Worked, verb: str) -> None:
    slow.bad = {0, 100, 200, 300}
    whole = enqueue(conn, 400)
    wait_until(lambda: shown(conn, whole)["items_done"] >= 40, 10, "some items to be done")
    step("cancel")
    if verb == "bulk":
        wait_until(
            lambda: sum(values(conn, "SELECT changed FROM batchq.bulk('cancel')")) == 1, 10, "nothing to be locked"
        )
    else:
        assert values(conn, verb, whole) == ["cancelled"]
    assert values(conn, "SELECT count(*) FROM batchq.batches_live") == [0]
    done = shown(conn, whole)["items_done"]
    time.sleep(0.6)
    count = sum(slow.counts.values())
    time.sleep(0.5)
    assert sum(slow.counts.values()) == count, "all handlers have stopped"
    row = shown(conn, whole)
    assert (row["status"], row["items_done"], row["items_failed"]) == ("cancelled", done, 4)
    assert 40 <= done <= count - 4
    assert [item["item_index"] for item in views.failed_item_objects(conn, whole, 100)] == [0, 100, 200, 300]
    step("retry")
    slow.bad, slow.seconds = set(), 0
    slow.counts.clear()
    assert values(conn, "SELECT batchq.retry(%s)", whole) == ["pending"]
    wait_until(lambda: shown(conn, whole)["status"] == "completed", 10, "it to be completed")
    assert len(slow.counts) == sum(slow.counts.values()) == 400 - done
    assert shown(conn, whole)["items_done"] == 400
    assert values(conn, "SELECT count(*) FROM batchq.failed_items") == [0]


def test_a_retry_as_a_whole_begins_with_new_parts(conn: Conn, slow: Worked) -> None:
    whole = enqueue(conn, 400)
    wait_until(lambda: shown(conn, whole)["items_done"] >= 40, 10, "some items to be done")
    conn.execute("SELECT batchq.cancel(%s)", [whole])
    time.sleep(0.6)
    slow.seconds = 0
    slow.counts.clear()
    assert values(conn, "SELECT batchq.retry(%s, whole => true)", whole) == ["pending"]
    wait_until(lambda: shown(conn, whole)["status"] == "completed", 10, "it to be completed")
    assert slow.counts == Counter(range(400))


# --------------------------------------------------------------------------------------------------------------- verbs


@pytest.mark.parametrize(
    "verb",
    ["cancel(%s)", "cancel_with_dependents(%s)", "retry(%s)", "snooze(%s, '1 hour')", "set_priority(%s, 1)",
     "move(%s, 'other')", "run_anyway(%s)", "retry_items(%s)"],
)  # fmt: skip
def test_a_part_alone_cannot_be_changed(conn: Conn, slow: Worked, verb: str) -> None:
    whole = enqueue(conn, 400)
    wait_until(lambda: len(slow.counts) > 5, 10, "it to begin")
    part = values(conn, "SELECT max(id) FROM batchq.batches_live WHERE part_of = %s", whole)[0]
    with pytest.raises(psycopg.errors.RaiseException, match=f"batch {part} is a part of batch {whole}"):
        conn.execute(f"SELECT batchq.{verb}".encode(), [part])


@pytest.mark.parametrize(
    "verb",
    ["retry(%s)", "snooze(%s, '1 hour')", "move(%s, 'other')", "run_anyway(%s)", "retry_items(%s)"],
)
def test_other_verbs_leave_a_batch_alone_whose_parts_run(conn: Conn, slow: Worked, verb: str) -> None:
    whole = enqueue(conn, 200)
    wait_until(lambda: len(slow.counts) > 5, 10, "it to begin")
    assert values(conn, f"SELECT batchq.{verb}", whole) == ["waiting"]
    wait_until(lambda: shown(conn, whole)["status"] == "completed", 30, "it to be completed")
    assert slow.counts == Counter(range(200))


def spread(conn: Conn, batch_id: int) -> None:
    """Claim the batch and make its parts, which nobody works."""
    claim = """
        UPDATE batchq.batches_live
        SET status = 'processing', attempt = 1, claimed_by = 'nobody', claim_token = gen_random_uuid(),
            claimed_at = now(), lease_expires_at = now() + interval '1 minute'
        WHERE id = %s
        RETURNING claim_token
    """
    [token] = values(conn, claim, batch_id)
    assert values(conn, "SELECT parts FROM batchq.spread_batch('default', %s, %s, 4)", batch_id, token) == [4]


def test_parts_become_ready_when_they_are_made(conn: Conn) -> None:
    whole = enqueue(conn, run_at=datetime(2020, 1, 1, tzinfo=UTC))
    spread(conn, whole)
    [claimed_at] = values(conn, "SELECT claimed_at FROM batchq.batches_live WHERE id = %s", whole)
    assert min(values(conn, "SELECT run_at FROM batchq.batches_live WHERE part_of = %s", whole)) >= claimed_at


def test_nobody_waits_for_a_whole_that_is_locked(dsn: str, admin_dsn: str, conn: Conn, worked: Worked) -> None:
    whole = enqueue(conn)
    spread(conn, whole)
    with psycopg.connect(admin_dsn) as other, running_worker(worked.app, dsn):
        other.execute("SELECT FROM batchq.batches_live WHERE id = %s FOR UPDATE", [whole])
        ended = "SELECT count(*) FROM batchq.parts WHERE ended_as IS NOT NULL"
        wait_until(lambda: values(conn, ended) == [4], 10, "the parts to end")
        for _ in range(20):
            assert values(conn, "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'") == [0]
            time.sleep(0.02)
        other.rollback()
        wait_until(lambda: shown(conn, whole)["status"] == "completed", 10, "it to be completed")


def test_a_new_priority_is_that_of_the_pending_parts(conn: Conn) -> None:
    whole = enqueue(conn)
    spread(conn, whole)
    conn.execute("SELECT batchq.set_priority(%s, -5)", [whole])
    assert values(conn, "SELECT DISTINCT priority FROM batchq.batches_live WHERE part_of = %s", whole) == [-5]


def test_bulk_verbs_see_no_parts(conn: Conn, slow: Worked) -> None:
    whole = enqueue(conn, 200)
    wait_until(lambda: len(slow.counts) > 5, 10, "it to begin")
    for verb, change in (("snooze", '{"delay_seconds": 5}'), ("move", '{"to_queue": "other"}')):
        assert values(conn, "SELECT matched FROM batchq.bulk(%s, '{}', %s)", verb, change) == [0]
    assert values(conn, "SELECT matched FROM batchq.bulk('cancel', dry_run => true)") == [1]
    wait_until(lambda: shown(conn, whole)["status"] == "completed", 30, "it to be completed")


def test_a_bulk_cancel_leaves_out_a_batch_of_which_one_part_is_locked(admin_dsn: str, conn: Conn, slow: Worked) -> None:
    whole = enqueue(conn, 400)
    wait_until(lambda: len(slow.counts) > 5, 10, "it to begin")
    with psycopg.connect(admin_dsn) as other:
        other.execute("SELECT FROM batchq.batches_live WHERE part_of = %s ORDER BY id LIMIT 1 FOR UPDATE", [whole])
        assert values(conn, "SELECT matched - changed FROM batchq.bulk('cancel')") == [1]
        assert values(conn, "SELECT count(*) FROM batchq.batches_live") == [5]
    conn.execute("SELECT batchq.cancel(%s)", [whole])
    assert values(conn, "SELECT count(*) FROM batchq.batches_live") == [0]


def test_a_key_with_a_limit_of_one_keeps_its_order(dsn: str, conn: Conn, worked: Worked) -> None:
    conn.execute("SELECT batchq.set_limit('default', 'work', max_running_per_key => 1)")
    whole = enqueue(conn, key="customer")
    enqueue(conn, 1, key="customer")
    with running_worker(worked.app, dsn, concurrency=4):
        wait_until(
            lambda: values(conn, "SELECT count(*) FROM batchq.batches_finished") == [2], 10, "both to be completed"
        )
    assert values(conn, "SELECT count(*) FROM batchq.parts WHERE batch_id = %s", whole) == [0]
    assert list(worked.counts) == list(range(100))


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("spread", [0, -1, 1001, 32767])
def test_a_number_of_parts_that_does_not_fit_is_refused(conn: Conn, spread: int) -> None:
    with pytest.raises(psycopg.errors.CheckViolation, match="batches_spread_fits"):
        enqueue(conn, spread=spread)
    with pytest.raises(
        batchq.ConfigError, match=f"spread of 'work' is a number of parts from 1 to 1,000, not {spread}"
    ):
        Worked(spread=spread)


@pytest.mark.parametrize("spread", ["4", 1.5, True, [4]])
def test_what_is_no_number_is_refused(conn: Conn, spread: Any) -> None:
    with pytest.raises(InvalidInput, match="spread must be a whole number"):
        enqueue(conn, spread=spread)
    with pytest.raises(batchq.ConfigError, match="spread of 'work'"):
        Worked(spread=spread)


def test_spread_without_items_is_refused(conn: Conn) -> None:
    with pytest.raises(psycopg.errors.CheckViolation, match="batches_spread_has_items"):
        batchq.enqueue(conn, "work", spread=4)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_handler_of_whole_batches_refuses_spread(dsn: str, conn: Conn, is_async: bool) -> None:
    app = batchq.App()
    if is_async:

        @app.handler("work")
        async def work_async(batch: batchq.Batch) -> None:
            raise AssertionError(batch)

    else:

        @app.handler("work")
        def work(batch: batchq.Batch) -> None:
            raise AssertionError(batch)

    whole, alone = enqueue(conn), enqueue(conn, spread=1, max_attempts=1)
    drain(app, dsn)
    assert shown(conn, alone)["last_error"].startswith("AssertionError: "), "one part is none"
    row = shown(conn, whole)
    assert (row["status"], row["attempt"]) == ("failed", 1)
    assert "spread is for item handlers, and 'work' has a handler for whole batches" in row["last_error"]


def test_a_claim_that_is_lost_spreads_nothing(conn: Conn) -> None:
    whole = enqueue(conn)
    lost = "SELECT parts FROM batchq.spread_batch('default', %s, gen_random_uuid(), 4)"
    assert values(conn, lost, whole) == [None]
    assert values(conn, "SELECT count(*) FROM batchq.parts") == [0]


def test_parts_that_somebody_deletes_count_as_cancelled(conn: Conn, slow: Worked) -> None:
    whole = enqueue(conn, 400)
    wait_until(lambda: len(slow.counts) > 5, 10, "it to begin")
    conn.execute(
        "UPDATE batchq.batches_live SET status = 'pending', claim_token = NULL, lease_expires_at = NULL, "
        "run_at = now() + interval '1 hour', claimed_by = NULL, claimed_at = NULL WHERE part_of = %s",
        [whole],
    )
    conn.execute("DELETE FROM batchq.batches_live WHERE part_of = %s", [whole])
    wait_until(lambda: shown(conn, whole)["status"] == "cancelled", 10, "it to be cancelled")
    assert shown(conn, whole)["last_error"] == "cancelled: a part was cancelled"


def test_rows_of_parts_go_with_their_batch(dsn: str, conn: Conn, worked: Worked) -> None:
    enqueue(conn)
    drain(worked.app, dsn)
    assert values(conn, "SELECT batchq.prune_parts('0 seconds')") == [0]
    conn.execute("DELETE FROM batchq.batches_finished")
    assert values(conn, "SELECT batchq.prune_parts('1 hour')") == [0]
    assert values(conn, "SELECT batchq.prune_parts('0 seconds')") == [4]
    enqueue(conn)
    drain(worked.app, dsn)
    conn.execute("TRUNCATE batchq.batches")
    assert values(conn, "SELECT count(*) FROM batchq.parts") == [0]


if __name__ == "__main__":
    run_alone(__file__)
