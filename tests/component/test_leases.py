"""Leases: what is fenced, what rescues, and that keeping a lease never stands in anybody's way."""

from collections.abc import Callable
from threading import Thread
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from batchq.postgres.statements import checkpoints, claims, endings, inputs, session
from batchq.postgres.statements import leases as lease_statements
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
    complete,
    expire_lease,
    extend,
    failure,
    finish,
    insert,
    processing,
    requeue,
    value,
    values,
)
from tests.support.alone import run_alone
from tests.support.steps import step
from tests.support.waiting import wait_until

DIED = "worker died: worker-1 did not renew its lease"
Write = Callable[[Conn, str, Taken], bool]

# ---------------------------------------------------------------------------------------------------------- the fence


def write_checkpoint(conn: Conn, queue: str, taken: Taken) -> bool:
    """Save a checkpoint that changes all it can; tell whether the batch was still ours."""
    done, failed = counters(conn)
    progress = Progress(1, 0, [failure(1)], [0], 1, False, "9", done_before=done, failed_before=failed)
    return checkpoint(conn, taken, progress, queue=queue, lease_seconds=600) == 1


def write_plain_checkpoint(conn: Conn, queue: str, taken: Taken) -> bool:
    """Save a checkpoint without a failed item."""
    done, failed = counters(conn)
    progress = Progress(1, keeps_cursor=False, cursor="9", done_before=done, failed_before=failed)
    return checkpoint(conn, taken, progress, queue=queue, lease_seconds=600) == 1


def counters(conn: Conn) -> tuple[int, int]:
    """Return how many items of the first batch are done, and how many have failed."""
    row = conn.execute("SELECT items_done, items_failed FROM batchq.all_batches ORDER BY id LIMIT 1").fetchone()
    return row or (0, 0)


def write_finish(conn: Conn, queue: str, taken: Taken) -> bool:
    """Finish the batch."""
    return finish(conn, Finish(*taken, "completed", "1", '{"error": "no"}', True), queue=queue) == {taken.id}


def write_complete(conn: Conn, queue: str, taken: Taken) -> bool:
    """Complete the batch, without a result."""
    return complete(conn, taken, queue=queue) == {taken.id}


def write_complete_and_forget(conn: Conn, queue: str, taken: Taken) -> bool:
    """Complete the batch, and keep nothing of it."""
    return complete(conn, taken, queue=queue, keep=False) == {taken.id}


def write_requeue(conn: Conn, queue: str, taken: Taken) -> bool:
    """Make the batch pending again."""
    return requeue(conn, Requeue(*taken, 5.0, True, '{"error": "no"}'), queue=queue) == {taken.id}


def write_extend(conn: Conn, queue: str, taken: Taken) -> bool:
    """Extend the lease."""
    leases = extend(conn, taken, queue=queue, lease_seconds=600)
    assert (leases.extended, leases.lost) in [({taken}, set()), (set(), {taken})]
    return leases.extended == {taken}


def give_back(conn: Conn, queue: str, taken: Taken) -> bool:
    """Give back the whole claim."""
    return claims.release_claim(conn, queue, taken.token) == 1


WRITES = [
    write_checkpoint,
    write_plain_checkpoint,
    write_finish,
    write_complete,
    write_complete_and_forget,
    write_requeue,
    write_extend,
    give_back,
]


def everything(conn: Conn) -> list[Any]:
    """Return all there is of batches and failed items."""
    return values(conn, "SELECT to_jsonb(b) FROM batchq.all_batches b ORDER BY id") + values(
        conn, "SELECT to_jsonb(f) FROM batchq.failed_items f ORDER BY batch_id, item_index"
    )


@pytest.fixture
def taken(conn: Conn) -> Taken:
    """Return a batch that is processing, one of its items done and one failed."""
    taken = processing(conn, items=[0, 1, 2, 3])
    assert checkpoint(conn, taken, Progress(1, 1, [failure(0)], first_index=0)) == 1
    return taken


@pytest.mark.parametrize("write", WRITES)
def test_a_write_with_the_token_is_made(conn: Conn, taken: Taken, write: Write) -> None:
    before = everything(conn)
    assert write(conn, "default", taken)
    assert everything(conn) != before


@pytest.mark.parametrize("write", WRITES)
def test_a_write_with_another_token_changes_nothing_and_says_so(conn: Conn, taken: Taken, write: Write) -> None:
    before = everything(conn)
    assert not write(conn, "default", taken._replace(token=uuid4()))
    assert everything(conn) == before


@pytest.mark.parametrize("write", WRITES)
def test_a_write_in_another_queue_changes_nothing_and_says_so(conn: Conn, taken: Taken, write: Write) -> None:
    before = everything(conn)
    assert not write(conn, "elsewhere", taken)
    assert everything(conn) == before


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("end", [write_finish, write_complete, write_complete_and_forget, write_requeue])
def test_a_write_after_the_end_changes_nothing_and_says_so(conn: Conn, taken: Taken, end: Write, write: Write) -> None:
    assert end(conn, "default", taken)
    before = everything(conn)
    assert not write(conn, "default", taken)
    assert everything(conn) == before


@pytest.mark.parametrize("write", [write for write in WRITES if write is not give_back])
def test_a_write_for_one_batch_leaves_alone_what_was_claimed_with_it(conn: Conn, write: Write) -> None:
    taken, beside = claimed_together(conn, items=[0, 1, 2, 3])
    for one in (taken, beside):
        assert checkpoint(conn, one, Progress(1, 1, [failure(0)], first_index=0)) == 1
    before = everything_of(conn, beside)
    assert write(conn, "default", taken)
    assert everything_of(conn, beside) == before


def claimed_together(conn: Conn, **columns: Any) -> list[Taken]:
    """Return two batches that one claim took: their token is the same."""
    token = uuid4()
    for _ in range(2):
        insert(conn, **columns)
    return [Taken(row.id, token) for row in claim(conn, token=token)]


def everything_of(conn: Conn, taken: Taken) -> list[Any]:
    """Return a batch and its failed items."""
    return [batch(conn, taken.id), *values(conn, FAILED_ITEMS, [taken.id])]


FAILED_ITEMS = "SELECT jsonb_build_array(item_index, error) FROM batchq.failed_items WHERE batch_id = %s ORDER BY 1"


def test_of_many_finishes_each_batch_has_its_own(conn: Conn) -> None:
    first, second = claimed_together(conn)
    ends = Finish(*first, "completed", "1"), Finish(*second, "failed", error='{"error": "no"}')
    assert finish(conn, *ends) == {first.id, second.id}
    rows = [batch(conn, one.id) for one in (first, second)]
    assert [(row["status"], row["result"], len(row["errors"] or [])) for row in rows] == [
        ("completed", 1, 0),
        ("failed", None, 1),
    ]


def test_of_many_requeues_each_batch_has_its_own(conn: Conn) -> None:
    first, second = claimed_together(conn)
    assert requeue(conn, Requeue(*first, 60, False), Requeue(*second, 7200, True)) == {first.id, second.id}
    delays = values(conn, "SELECT extract(epoch FROM run_at - now())::float8 FROM batchq.all_batches ORDER BY id")
    assert (delays[0] <= 60, delays[1] > 7000) == (True, True)
    assert [batch(conn, one.id)["attempt"] for one in (first, second)] == [1, 0]


def test_of_many_finishes_those_that_are_ours_are_written_and_named(conn: Conn) -> None:
    mine, theirs = processing(conn), processing(conn)
    forged = Finish(theirs.id, mine.token, "failed")
    assert finish(conn, Finish(*mine, "completed"), forged) == {mine.id}
    assert batch(conn, theirs.id)["status"] == "processing"


def test_every_column_is_kept_or_changed_by_a_finish(conn: Conn) -> None:
    columns = set(
        values(
            conn, "SELECT attname FROM pg_attribute WHERE attrelid = 'batchq.batches_finished'::regclass AND attnum > 0"
        )
    )
    changed = {"status", "items_done", "result", "errors", "finished_at", "claim_token", "lease_expires_at"}
    changed.add("needs_left")  # of a batch that ran, it is 0 or null
    assert {name.strip() for name in endings.KEPT.split(",")} == columns - changed


def test_a_finish_moves_the_whole_row_and_frees_it(conn: Conn) -> None:
    taken = processing(conn, payload={"a": 1}, items=[1, 2], unique_key="k", priority=3, max_failed_items=1)
    before = batch(conn, taken.id)
    finish(conn, Finish(*taken, "completed", '{"sum": 3}', all_done=True))
    after = batch(conn, taken.id)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"status", "claim_token", "lease_expires_at", "items_done", "result", "finished_at"}
    assert (after["status"], after["items_done"], after["result"]) == ("completed", 2, {"sum": 3})
    assert value(conn, "SELECT count(*) FROM batchq.batches_live") == 0


@pytest.mark.parametrize(("gives_back", "delay_seconds", "attempt"), [(True, None, 0), (False, 3600.0, 1)])
def test_a_requeue_gives_the_attempt_back_only_if_told_to(
    conn: Conn, taken: Taken, gives_back: bool, delay_seconds: float | None, attempt: int
) -> None:
    run_at = batch(conn, taken.id)["run_at"]
    requeue(conn, Requeue(*taken, delay_seconds, gives_back))
    row = batch(conn, taken.id)
    assert (row["status"], row["attempt"], row["claimed_by"]) == ("pending", attempt, None)
    assert (row["run_at"] == run_at) is gives_back


def test_whole_and_fractional_delays_go_in_one_requeue(conn: Conn) -> None:
    snoozed, failed, released = processing(conn), processing(conn), processing(conn)
    requeues = Requeue(*snoozed, 60, True), Requeue(*failed, 7.5, False), Requeue(*released, None, True)
    assert requeue(conn, *requeues) == {snoozed.id, failed.id, released.id}
    query = (
        "SELECT round(extract(epoch FROM run_at - now()))::integer FROM batchq.all_batches WHERE id <> %s ORDER BY id"
    )
    assert [delay >= 0 for delay in values(conn, query, [released.id])] == [True, True]


def test_counters_items_and_cursor_move_together(conn: Conn, taken: Taken) -> None:
    step("item 0 has failed, 1 is done: now 0 succeeds, 2 fails, 3 is done")
    progress = Progress(2, 0, [failure(2)], [0], 2, False, '{"at": 4}', done_before=1, failed_before=1)
    assert checkpoint(conn, taken, progress) == 1
    row = batch(conn, taken.id)
    assert (row["items_done"], row["items_failed"], row["cursor"]) == (3, 1, {"at": 4})
    assert values(conn, "SELECT item_index FROM batchq.failed_items") == [2]


def test_a_checkpoint_extends_the_lease(conn: Conn, taken: Taken) -> None:
    expire_lease(conn, taken.id)
    checkpoint(conn, taken, Progress(done_before=1, failed_before=1), lease_seconds=30)
    left = "SELECT extract(epoch FROM lease_expires_at - now())::float8 FROM batchq.all_batches"
    assert 25 < value(conn, left) <= 30


@pytest.mark.parametrize("failures", [[], [failure(0)]], ids=["plain", "with a failed item"])
def test_a_checkpoint_at_the_end_of_a_long_transaction_does_not_shorten_the_lease(
    conn: Conn, taken: Taken, failures: list[checkpoints.ItemFailure]
) -> None:
    step("the transaction begins; the keeper extends the lease; then the checkpoint ends the transaction")
    unchanged = Progress(failures=failures, done_before=1, failed_before=1)
    with psycopg.connect(conn.info.dsn, password=conn.info.password, prepare_threshold=None) as handler:
        handler.execute("SELECT now()")
        extend(conn, taken)
        kept = batch(conn, taken.id)["lease_expires_at"]
        handler.execute(*checkpoints.checkpoint("default", *taken, 30, unchanged))
    assert batch(conn, taken.id)["lease_expires_at"] == kept
    step("a lease that would run out earlier counts from the commit, not from the transaction's beginning")
    with conn.transaction():
        began = value(conn, "SELECT now()::text")
        wait_until(
            lambda: value(conn, f"SELECT clock_timestamp() > '{began}'::timestamptz + interval '0.2 s'"), 5, "0.2 s"
        )
        conn.execute(*checkpoints.checkpoint("default", *taken, 60, unchanged))
    left = f"SELECT extract(epoch FROM lease_expires_at - '{began}'::timestamptz)::float8 FROM batchq.all_batches"
    assert value(conn, left) >= 60.2


def test_a_checkpoint_that_was_committed_already_counts_nothing_twice(conn: Conn, taken: Taken) -> None:
    progress = Progress(2, 0, done_before=1, failed_before=1)
    assert checkpoint(conn, taken, progress) == 1
    before = everything(conn)
    assert checkpoint(conn, taken, progress) == 0
    assert everything(conn) == before


@pytest.mark.parametrize("failures", [[], [failure(1)]], ids=["plain", "with a failed item"])
@pytest.mark.parametrize("counted", [(0, 1), (2, 1), (1, 0), (1, 2)])
def test_a_checkpoint_that_starts_from_other_counters_changes_nothing(
    conn: Conn, taken: Taken, counted: tuple[int, int], failures: list[checkpoints.ItemFailure]
) -> None:
    done, failed = counted
    before = everything(conn)
    progress = Progress(1, len(failures), failures, first_index=1, done_before=done, failed_before=failed)
    assert checkpoint(conn, taken, progress) == 0
    assert everything(conn) == before


def test_only_items_that_are_cured_lose_their_error_and_each_that_fails_again_has_its_own(conn: Conn) -> None:
    taken = processing(conn, items=[0, 1, 2, 3])
    first = [failure(index) for index in range(4)]
    assert checkpoint(conn, taken, Progress(0, 4, first, first_index=0)) == 1
    again = [failure(1, "KeyError: one"), failure(3, "KeyError: three")]
    assert checkpoint(conn, taken, Progress(1, -1, again, [0], failed_before=4)) == 1
    assert values(conn, FAILED_ITEMS, [taken.id]) == [
        [1, "KeyError: one"],
        [2, "ValueError: no"],
        [3, "KeyError: three"],
    ]


def test_a_failed_item_is_stored_with_its_value_and_its_attempt(conn: Conn) -> None:
    taken = processing(conn, items=["a", {"b": None}, None, 4])
    checkpoint(conn, taken, Progress(1, 3, [failure(1), failure(2, "no", False), failure(3)], first_index=0))
    rows = "SELECT jsonb_build_array(item_index, item, error, attempt, retryable) FROM batchq.failed_items ORDER BY 1"
    assert values(conn, rows) == [
        [1, {"b": None}, "ValueError: no", 1, True],
        [2, None, "no", 1, False],
        [3, 4, "ValueError: no", 1, True],
    ]


def test_the_next_attempt_works_what_has_failed_and_may_be_cured(conn: Conn) -> None:
    taken = processing(conn, items=["a", "b", "c"])
    checkpoint(conn, taken, Progress(1, 2, [failure(0), failure(1, retryable=False)], first_index=0))
    pages = [inputs.failed_page(conn, "default", *taken, attempt, 10) for attempt in (1, 2)]
    assert pages == [[], [(0, '"a"')]]


def test_a_late_worker_is_given_no_failed_items(conn: Conn) -> None:
    late = processing(conn, items=["a", "b"])
    checkpoint(conn, late, Progress(1, 1, [failure(0)], first_index=0))
    step("cancelled and retried, the batch's attempts count from 0: to the late worker its own failure looks earlier")
    conn.execute("SELECT batchq.cancel(%s)", [late.id])
    conn.execute("SELECT batchq.retry(%s)", [late.id])
    token = uuid4()
    assert [row.attempt for row in claim(conn, token=token)] == [1]
    pages = [inputs.failed_page(conn, "default", late.id, its, 1, 10) for its in (late.token, token)]
    assert pages == [[], [(0, '"a"')]]


def test_an_item_that_fails_again_has_its_newest_error(conn: Conn, taken: Taken) -> None:
    requeue(conn, Requeue(*taken, 0, False))
    again = taken._replace(token=uuid4())
    claim(conn, token=again.token)
    progress = Progress(failures=[failure(0, "KeyError: still no")], done_before=1, failed_before=1)
    assert checkpoint(conn, again, progress) == 1
    rows = "SELECT jsonb_build_array(item_index, item, error, attempt) FROM batchq.failed_items"
    assert values(conn, rows) == [[0, 0, "KeyError: still no", 2]]


# ---------------------------------------------------------------------------------------------------------- the rescue


def test_a_batch_whose_lease_ran_out_is_pending_again_its_attempt_counted(conn: Conn, taken: Taken) -> None:
    change(conn, taken.id, cursor={"at": 2})
    before = batch(conn, taken.id)
    expire_lease(conn, taken.id)
    assert lease_statements.rescue(conn, "default", 10) == [(taken.id, KIND, 1, "pending")]
    after = batch(conn, taken.id)
    kept = ("attempt", "payload", "items", "items_done", "items_failed", "cursor", "run_at", "created_at")
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert (after["claim_token"], after["claimed_by"]) == (None, None)
    assert [(error["attempt"], error["error"]) for error in after["errors"]] == [(1, DIED)]
    step("any worker may claim it at once")
    assert [row.attempt for row in claim(conn)] == [2]


def test_nothing_is_rescued_by_when_it_started(conn: Conn, taken: Taken) -> None:
    change(conn, taken.id, claimed_at="2001-01-01", created_at="2001-01-01", run_at="2001-01-01")
    assert lease_statements.rescue(conn, "default", 10) == []
    assert batch(conn, taken.id)["status"] == "processing"


def test_the_rescue_needs_no_row_of_any_worker(conn: Conn, taken: Taken) -> None:
    assert value(conn, "SELECT count(*) FROM batchq.workers") == 0
    expire_lease(conn, taken.id)
    assert len(lease_statements.rescue(conn, "default", 10)) == 1


def test_pending_batches_and_other_queues_are_not_rescued(conn: Conn) -> None:
    insert(conn)
    other = processing(conn, queue="other")
    expire_lease(conn, other.id)
    assert lease_statements.rescue(conn, "default", 10) == []
    assert [row[0] for row in lease_statements.rescue(conn, "other", 10)] == [other.id]


def test_a_rescue_takes_no_more_than_its_limit_the_longest_silent_first(conn: Conn) -> None:
    silent = [processing(conn).id for _ in range(5)]
    for seconds, batch_id in enumerate(silent, start=1):
        expire_lease(conn, batch_id, seconds)
    found = [{row[0] for row in lease_statements.rescue(conn, "default", 2)} for _ in range(3)]
    assert found == [set(silent[3:]), set(silent[1:3]), set(silent[:1])]


def test_a_rescue_has_its_limit_for_its_own_queue(conn: Conn) -> None:
    other, mine = processing(conn, queue="other"), processing(conn)
    expire_lease(conn, other.id, seconds_ago=60)
    expire_lease(conn, mine.id)
    assert [row[0] for row in lease_statements.rescue(conn, "default", 1)] == [mine.id]


def test_a_rescue_looks_behind_where_it_is_told_to(conn: Conn) -> None:
    silent = processing(conn)
    expire_lease(conn, silent.id)
    ran_out_at = value(conn, "SELECT extract(epoch FROM lease_expires_at)::float8 FROM batchq.batches_live")
    assert lease_statements.rescue(conn, "default", 10, after=ran_out_at + 0.01) == []
    assert [row[0] for row in lease_statements.rescue(conn, "default", 10, after=ran_out_at - 0.01)] == [silent.id]


def test_a_rescue_passes_over_what_somebody_writes_just_now(conn: Conn, dsn: str) -> None:
    busy, silent = processing(conn), processing(conn)
    for batch_id in (busy.id, silent.id):
        expire_lease(conn, batch_id)
    with psycopg.connect(dsn, prepare_threshold=None) as late_worker:
        step("the worker of %s wakes up late, and saves a checkpoint", busy.id)
        late_worker.execute(session.transaction_settings(5))
        late_worker.execute(*checkpoints.checkpoint("default", *busy, 60, Progress()))
        with conn.transaction():
            conn.execute("SELECT set_config('lock_timeout', '500ms', true)")
            assert [row[0] for row in lease_statements.rescue(conn, "default", 10)] == [silent.id]
    assert lease_statements.rescue(conn, "default", 10) == [], "its lease is new"


def test_a_batch_that_kills_its_worker_ends_as_failed_with_its_attempts(conn: Conn) -> None:
    batch_id = insert(conn, max_attempts=3, items=[1, 2], unique_key="poison")
    for attempt in (1, 2, 3):
        assert [row.attempt for row in claim(conn)] == [attempt]
        expire_lease(conn, batch_id)
        status = "failed" if attempt == 3 else "pending"
        assert lease_statements.rescue(conn, "default", 10) == [(batch_id, KIND, attempt, status)]
    row = batch(conn, batch_id)
    assert (row["status"], row["attempt"], row["items"]) == ("failed", 3, [1, 2])
    assert row["finished_at"] is not None
    assert [error["error"] for error in row["errors"]] == [DIED, DIED, f"{DIED}; no attempts left"]
    assert claim(conn) == []


def test_what_is_rescued_again_is_spread_out_so_that_a_killer_has_other_neighbours(conn: Conn) -> None:
    for _ in range(8):
        insert(conn)
    waits = "SELECT greatest(extract(epoch FROM run_at - now()), 0)::float8 FROM batchq.all_batches ORDER BY id"
    for _ in range(2):
        change_all = "UPDATE batchq.batches_live SET run_at = now() - interval '1 s' WHERE status = 'pending'"
        conn.execute(change_all)
        assert len(claim(conn, 8)) == 8
        conn.execute("UPDATE batchq.batches_live SET lease_expires_at = now() - interval '1 s'")
        step("rescued for the first time: ready at once; again: each at a time of its own")
        lease_statements.rescue(conn, "default", 10, spread_seconds=30)
        seen = values(conn, waits)
        assert (max(seen) == 0) == (value(conn, "SELECT max(attempt) FROM batchq.all_batches") == 1)
    assert max(seen) <= 4 * 30
    assert len({round(seconds) for seconds in seen}) > 3


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("attempts", [1, 5])
def test_a_rescued_batch_takes_nothing_more_from_its_old_worker(conn: Conn, attempts: int, write: Write) -> None:
    taken = processing(conn, max_attempts=attempts, items=[1, 2])
    expire_lease(conn, taken.id)
    lease_statements.rescue(conn, "default", 10)
    before = everything(conn)
    assert not write(conn, "default", taken)
    assert everything(conn) == before


def test_after_a_rescue_the_new_worker_finishes_and_the_old_does_not(conn: Conn, taken: Taken) -> None:
    expire_lease(conn, taken.id)
    lease_statements.rescue(conn, "default", 10)
    token = uuid4()
    claim(conn, token=token, worker="worker-2")
    assert finish(conn, Finish(*taken, "failed")) == set()
    assert finish(conn, Finish(taken.id, token, "completed")) == {taken.id}
    assert batch(conn, taken.id)["claimed_by"] == "worker-2"


# ------------------------------------------------------------------------------------------------- keeping the lease


def leases(conn: Conn) -> list[float]:
    """Return how many seconds are left of each lease, in the order of ids."""
    query = "SELECT extract(epoch FROM lease_expires_at - now())::float8 FROM batchq.batches_live ORDER BY id"
    return values(conn, query)


def test_an_extension_names_only_those_that_are_lost(conn: Conn) -> None:
    mine, finished, stolen = processing(conn), processing(conn), processing(conn)
    finish(conn, Finish(*finished, "completed"))
    change(conn, stolen.id, claim_token=uuid4())
    unknown = Taken(987, uuid4())
    leases_of = extend(conn, mine, finished, stolen, unknown, lease_seconds=600)
    assert (leases_of.extended, leases_of.lost) == ({mine}, {finished, stolen, unknown})
    kept, not_mine = leases(conn)
    assert kept > 590
    assert not_mine <= 60


def test_an_extension_passes_over_a_locked_row_and_does_not_call_it_lost(conn: Conn, dsn: str) -> None:
    locked, free = processing(conn), processing(conn)
    with psycopg.connect(dsn, prepare_threshold=None) as own_finisher:
        own_finisher.execute(session.transaction_settings(5))
        own_finisher.execute(*endings.finish("default", [Finish(*locked, "completed")]))
        with conn.transaction():
            conn.execute("SELECT set_config('lock_timeout', '500ms', true)")
            assert extend(conn, locked, free, lease_seconds=600) == lease_statements.Leases({free}, set())
        own_finisher.rollback()
    assert leases(conn)[0] <= 60
    assert leases(conn)[1] > 590
    assert extend(conn, locked, free, lease_seconds=600) == lease_statements.Leases({free, locked}, set())
    assert min(leases(conn)) > 590


def test_finishes_and_extensions_in_opposite_orders_do_not_deadlock(conn: Conn, dsn: str) -> None:
    rounds, size, failures = 15, 60, []

    def keep(taken: list[Taken]) -> None:
        try:
            with psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as keeper:
                while keeping:
                    extend(keeper, *taken)
        except psycopg.Error as error:
            failures.append(error)

    for _ in range(rounds):
        token = uuid4()
        conn.execute("INSERT INTO batchq.batches (kind) SELECT 'work' FROM generate_series(1, %s)", [size])
        taken = [Taken(row.id, token) for row in claim(conn, token=token)]
        keeping = True
        thread = Thread(target=keep, args=[sorted(taken, reverse=True)])
        thread.start()
        with conn.transaction():
            for part in range(0, size, 10):
                conn.execute(*endings.finish("default", [Finish(*t, "completed") for t in taken[part : part + 10]]))
        keeping = False
        thread.join()
    assert failures == []
    assert value(conn, "SELECT count(*) FROM batchq.batches_finished") == rounds * size


if __name__ == "__main__":
    run_alone(__file__)
