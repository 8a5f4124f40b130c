"""The protocol: SQL functions by which programs in any language work batches. See docs/protocol.md."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from batchq.postgres.statements import endings
from tests.component.rows import KIND, Conn, batch, change, insert, value, values
from tests.support.alone import run_alone
from tests.support.roles import role_for
from tests.support.steps import step
from tests.support.waiting import wait_until

CLAIM = "SELECT * FROM batchq.claim('default', %s, 'far-1', %s, 60)"
STATUS = "SELECT status FROM batchq.all_batches WHERE id = %s"


def claim(conn: Conn, most: int = 1, *kinds: str) -> list[dict[str, Any]]:
    """Claim batches by the function."""
    return conn.cursor(row_factory=dict_row).execute(CLAIM, [list(kinds or (KIND,)), most]).fetchall()


def call(conn: Conn, text: str, one: dict[str, Any], *more: Any) -> Any:
    """Return what ``batchq.<text>`` returns; its first arguments are the id and the token of a claim."""
    return value(conn, f"SELECT batchq.{text}", [one["id"], one["claim_token"], *map(adapted, more)])


def adapted(given: Any) -> Any:
    """Return what psycopg sends."""
    return Jsonb(given) if isinstance(given, dict | list) else given


@pytest.fixture
def worker(conn: Conn, admin_dsn: str) -> Any:
    """Return the connection of a role that has the duty of a worker, and nothing else."""
    with role_for(admin_dsn, "worker") as dsn, psycopg.connect(dsn, autocommit=True) as other:
        yield other


# ----------------------------------------------------------------------------------------------------------- the claim


def test_a_claim_takes_by_priority_then_run_at_and_gives_what_a_worker_needs(conn: Conn, worker: Conn) -> None:
    last = insert(conn, priority=5)
    late = insert(conn, payload={"n": 1})
    early = insert(conn, run_at="2020-01-01")
    insert(conn, run_at="2999-01-01")
    insert(conn, kind="other")
    rows = claim(worker, 10)
    assert [row["id"] for row in rows] == [early, late, last]
    assert len({row["claim_token"] for row in rows}) == 1
    row = rows[1]
    assert (row["kind"], row["payload"], row["attempt"], row["max_attempts"]) == (KIND, {"n": 1}, 1, 5)
    stored = batch(conn, late)
    assert (stored["status"], stored["claimed_by"], stored["claim_token"]) == (
        "processing",
        "far-1",
        row["claim_token"],
    )
    assert stored["lease_expires_at"] == row["lease_expires_at"] > stored["claimed_at"]
    assert claim(worker, 10) == []


def test_a_claim_takes_no_more_than_asked_for_and_skips_what_is_locked(dsn: str, conn: Conn) -> None:
    first, second, third = insert(conn), insert(conn), insert(conn)
    with psycopg.connect(dsn) as other:
        assert [row["id"] for row in claim(other, 1)] == [first]
        with conn.transaction():
            conn.execute("SET LOCAL lock_timeout = '5s'")
            assert [row["id"] for row in claim(conn, 1)] == [second]
        other.rollback()
    assert [row["id"] for row in claim(conn, 10)] == [first, third]


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT batchq.pause('default')",
        "SELECT batchq.pause(kind => 'work')",
        "SELECT batchq.set_limit('default', 'work', max_running => 1)",
        "INSERT INTO batchq.limits (per_second) VALUES (5)",
        "INSERT INTO batchq.throttles (queue, kind, until) VALUES ('default', 'work', now() + interval '1 hour')",
    ],
)
def test_a_claim_keeps_pauses_limits_and_throttles(conn: Conn, statement: str) -> None:
    insert(conn)
    conn.execute(statement.encode())
    assert claim(conn) == []


def test_a_limit_that_lifts_another_is_none(conn: Conn) -> None:
    batch_id = insert(conn)
    conn.execute("INSERT INTO batchq.limits (kind, max_running, per_second) VALUES ('work', 2147483647, 'infinity')")
    assert [row["id"] for row in claim(conn)] == [batch_id]


def test_a_claim_leaves_keys_and_batches_that_were_spread_to_workers_of_batchq(conn: Conn) -> None:
    insert(conn, key="a")
    spread = insert(conn, items=[1, 2, 3, 4], spread=2)
    [row] = claim(conn)
    assert row["id"] == spread
    step("one whose parts run is not claimed, and its parts are")
    value(conn, "SELECT parts FROM batchq.spread_batch('default', %s, %s, 2)", [spread, row["claim_token"]])
    assert value(conn, STATUS, [spread]) == "waiting"
    parts = claim(conn, 10)
    assert [part["part_of"] for part in parts] == [spread, spread]
    assert all(call(conn, "complete(%s, %s, NULL, false, false)", part) for part in parts)
    step("the ends of the parts are gathered, and the whole is for workers of batchq")
    for _ in range(3):
        conn.execute("SELECT batchq.follow_flows(0)")
    assert value(conn, STATUS, [spread]) == "pending"
    assert claim(conn) == []


@pytest.mark.parametrize(
    "call_", ["claim('default', '{work}', 'w', 1, 0)", "claim('default', '{work}', 'w', 1, 'infinity')",
              "claim('default', '{work}', 'w', 1, NULL)", "claim('default', '{work}', '')",
              "extend(1, gen_random_uuid(), 'nan')", "items(1, gen_random_uuid(), -1, 1)"],
)  # fmt: skip
def test_an_argument_that_makes_no_sense_is_refused(conn: Conn, call_: str) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue):
        conn.execute(f"SELECT batchq.{call_}".encode())


# ------------------------------------------------------------------------------------------------------------ its ends


def test_complete_with_a_result(conn: Conn, worker: Conn) -> None:
    batch_id = insert(conn, items=[1, 2, 3], unique_key="u")
    [row] = claim(worker)
    assert call(worker, "complete(%s, %s, %s)", row, {"n": 3}) is True
    stored = batch(conn, batch_id)
    assert (stored["status"], stored["result"], stored["items_done"]) == ("completed", {"n": 3}, 3)
    assert stored["finished_at"] is not None
    assert (stored["claimed_by"], stored["unique_key"]) == ("far-1", "u")
    assert call(worker, "complete(%s, %s)", row) is False


def test_complete_without_keeping_deletes_the_batch_and_its_failed_items(conn: Conn, worker: Conn) -> None:
    insert(conn, items=[1, 2], max_failed_items=1, max_attempts=1)
    [row] = claim(worker)
    call(worker, "checkpoint(%s, %s, 1, %s)", row, [{"index": 1, "error": "bad"}])
    assert call(worker, "complete(%s, %s, NULL, false, false)", row) is True
    assert values(conn, "SELECT id FROM batchq.all_batches") == []
    assert values(conn, "SELECT item_index FROM batchq.failed_items") == []


def test_fail_runs_it_again_until_no_attempts_are_left(conn: Conn, worker: Conn) -> None:
    batch_id = insert(conn, max_attempts=2)
    assert call(worker, "fail(%s, %s, 'first', '0 s')", claim(worker)[0]) is True
    assert value(conn, STATUS, [batch_id]) == "pending"
    assert call(worker, "fail(%s, %s, 'second')", claim(worker)[0]) is True
    stored = batch(conn, batch_id)
    assert stored["status"] == "failed"
    assert [(one["attempt"], one["error"]) for one in stored["errors"]] == [(1, "first"), (2, "second")]


def test_fail_waits_by_default_and_is_final_if_asked(conn: Conn, worker: Conn) -> None:
    batch_id, other = insert(conn), insert(conn)
    call(worker, "fail(%s, %s, 'x')", claim(worker)[0])
    assert (
        2
        < value(conn, "SELECT extract(epoch FROM run_at - now()) FROM batchq.all_batches WHERE id = %s", [batch_id])
        < 8
    )
    call(worker, "fail(%s, %s, 'x', is_final => true)", claim(worker)[0])
    assert value(conn, STATUS, [other]) == "failed"


def test_release_does_not_count_the_attempt(conn: Conn, worker: Conn) -> None:
    batch_id = insert(conn)
    assert call(worker, "release(%s, %s)", claim(worker)[0]) is True
    stored = batch(conn, batch_id)
    assert (stored["status"], stored["attempt"], stored["claimed_by"], stored["errors"]) == ("pending", 0, None, [])
    assert call(worker, "release(%s, %s, '1 h')", claim(worker)[0]) is True
    assert claim(worker) == []


def test_the_end_of_a_batch_that_others_need_is_noticed(conn: Conn, worker: Conn) -> None:
    needed = insert(conn)
    waiting = value(conn, "INSERT INTO batchq.batches (kind, after) VALUES ('work', %s) RETURNING id", [[needed]])
    call(worker, "complete(%s, %s)", claim(worker)[0])
    conn.execute("SELECT batchq.follow_flows(0)")
    assert [row["id"] for row in claim(worker)] == [waiting]


# --------------------------------------------------------------------------------------------------------------- items


def test_checkpoints_count_and_record_failed_items_and_another_attempt_runs_those_again(
    conn: Conn, worker: Conn
) -> None:
    batch_id = insert(conn, items=["a", "b", "c", "d"])
    [row] = claim(worker)
    assert call(worker, "items(%s, %s, 1, 2)", row) == ["b", "c"]
    assert call(worker, "items(%s, %s, 4, 2)", row) == []
    failures = [{"index": 0, "error": "bad\nbad"}, {"index": 2, "error": "worse", "retryable": False}]
    assert call(worker, "checkpoint(%s, %s, 1, %s, %s)", row, failures, {"at": 3}) is True
    stored = batch(conn, batch_id)
    assert (stored["items_done"], stored["items_failed"], stored["cursor"]) == (1, 2, {"at": 3})
    found = conn.execute("SELECT item_index, item, error, retryable, attempt FROM batchq.failed_items ORDER BY 1")
    assert found.fetchall() == [(0, "a", "bad bad", True, 1), (2, "c", "worse", False, 1)]
    assert call(worker, "checkpoint(%s, %s, 1)", row) is True
    assert call(worker, "complete(%s, %s)", row) is True
    stored = batch(conn, batch_id)
    assert (stored["status"], stored["errors"][0]["error"]) == ("pending", "2 of 4 items failed; the first: bad bad")

    step("the second attempt runs again what may succeed; the other item fails the batch")
    conn.execute("UPDATE batchq.batches_live SET run_at = now() - interval '1 s'")
    [row] = claim(worker)
    assert row["cursor"] == {"at": 3}
    retry = worker.execute("SELECT * FROM batchq.items_to_retry(%s, %s)", [row["id"], row["claim_token"]]).fetchall()
    assert retry == [(0, "a")]
    assert call(worker, "checkpoint(%s, %s, 0, '[]', NULL, 60, '{0}')", row) is True
    assert call(worker, "checkpoint(%s, %s, 0, '[]', NULL, 60, '{0}')", row) is True, "a second time changes nothing"
    assert (batch(conn, batch_id)["items_done"], batch(conn, batch_id)["items_failed"]) == (3, 1)
    call(worker, "complete(%s, %s)", row)
    assert value(conn, STATUS, [batch_id]) == "failed"


def test_an_item_that_fails_again_keeps_one_row(conn: Conn) -> None:
    insert(conn, items=["a"])
    [row] = claim(conn)
    call(conn, "checkpoint(%s, %s, 0, %s)", row, [{"index": 0, "error": "one"}])
    call(conn, "fail(%s, %s, 'x', '0 s')", row)
    [row] = claim(conn)
    call(conn, "checkpoint(%s, %s, 0, %s)", row, [{"index": 0, "error": "two"}])
    assert conn.execute("SELECT error, attempt FROM batchq.failed_items").fetchall() == [("two", 2)]
    assert value(conn, "SELECT items_failed FROM batchq.all_batches") == 1
    assert conn.execute("SELECT * FROM batchq.items_to_retry(%s, %s)", [row["id"], row["claim_token"]]).fetchall() == []


def test_an_item_that_is_to_run_later_has_not_failed(conn: Conn) -> None:
    batch_id = insert(conn, items=["a", "b"])
    [row] = claim(conn)
    call(conn, "checkpoint(%s, %s, 1, %s)", row, [{"index": 1, "error": "later", "delay_seconds": 3600}])
    assert call(conn, "complete(%s, %s)", row) is True
    stored = batch(conn, batch_id)
    assert (stored["status"], stored["attempt"], stored["errors"]) == ("pending", 0, [])
    assert value(conn, "SELECT run_at > now() + interval '59 minutes' FROM batchq.all_batches") is True


@pytest.mark.parametrize(
    ("done", "failures"),
    [(3, []), (-1, []), (0, [{"index": 1, "error": "x"}]), (2, [{"index": 2, "error": "x"}]), (0, [{"error": "x"}])],
)
def test_a_checkpoint_that_does_not_fit_the_items_is_refused(conn: Conn, done: int, failures: list[Any]) -> None:
    batch_id = insert(conn, items=[1, 2])
    [row] = claim(conn)
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="do not fit batch"):
        call(conn, "checkpoint(%s, %s, %s, %s)", row, done, failures)
    assert batch(conn, batch_id)["items_done"] == 0


def test_a_batch_completes_with_the_failed_items_that_it_tolerates(conn: Conn) -> None:
    batch_id = insert(conn, items=[1, 2], max_failed_items=1, max_attempts=1)
    [row] = claim(conn)
    call(conn, "checkpoint(%s, %s, 1, %s)", row, [{"index": 1, "error": "x"}])
    call(conn, "complete(%s, %s)", row)
    assert value(conn, STATUS, [batch_id]) == "completed"


# --------------------------------------------------------------------------------------------------- leases and claims


LOST = {
    "extend": "extend(%s, %s, 60)",
    "complete": "complete(%s, %s)",
    "checkpoint": "checkpoint(%s, %s, 1)",
    "fail": "fail(%s, %s, 'x')",
    "release": "release(%s, %s)",
}


@pytest.mark.parametrize("name", LOST)
def test_a_lost_claim_writes_nothing_and_raises_nothing(conn: Conn, name: str) -> None:
    batch_id = insert(conn, items=[1])
    [row] = claim(conn)
    before = batch(conn, batch_id)
    assert call(conn, LOST[name], row | {"claim_token": uuid4()}) is False
    assert call(conn, LOST[name], row | {"id": batch_id + 1}) is False
    assert batch(conn, batch_id) == before
    assert call(conn, "items(%s, %s, 0, 1)", row | {"claim_token": uuid4()}) is None


def test_extend_extends_and_never_waits_for_a_transaction_of_its_own_worker(dsn: str, conn: Conn) -> None:
    batch_id = insert(conn)
    [row] = claim(conn)
    assert call(conn, "extend(%s, %s, 600)", row) is True
    assert batch(conn, batch_id)["lease_expires_at"] > row["lease_expires_at"]
    with psycopg.connect(dsn) as other:
        call(other, "complete(%s, %s)", row)
        with conn.transaction():
            conn.execute("SET LOCAL lock_timeout = '5s'")
            assert call(conn, "extend(%s, %s, 600)", row) is True
        other.commit()
    assert call(conn, "extend(%s, %s, 600)", row) is False


def test_rescue_frees_what_has_expired_and_fails_what_has_no_attempts_left(conn: Conn, worker: Conn) -> None:
    again, dead, alive = insert(conn), insert(conn, max_attempts=1), insert(conn)
    rows = claim(worker, 3)
    for batch_id in (again, dead):
        change(conn, batch_id, lease_expires_at="2020-01-01")
    assert value(worker, "SELECT batchq.rescue('default')") == 2
    assert [value(conn, STATUS, [one]) for one in (again, dead, alive)] == ["pending", "failed", "processing"]
    assert batch(conn, again)["errors"][0]["error"] == "worker died: far-1 did not renew its lease"
    assert [call(worker, "complete(%s, %s)", row) for row in rows] == [False, False, True]


def test_rows_of_the_caller_commit_with_the_outcome_or_not_at_all(dsn: str, conn: Conn) -> None:
    conn.execute("CREATE TABLE done (batch_id bigint)")
    batch_id = insert(conn)
    [row] = claim(conn)
    with psycopg.connect(dsn) as own:
        own.execute("INSERT INTO done VALUES (%s)", [batch_id])
        assert call(own, "complete(%s, %s)", row) is True
        own.rollback()
        assert (value(conn, STATUS, [batch_id]), values(conn, "SELECT * FROM done")) == ("processing", [])
        own.execute("INSERT INTO done VALUES (%s)", [batch_id])
        assert call(own, "complete(%s, %s)", row) is True
        own.commit()
    assert (value(conn, STATUS, [batch_id]), values(conn, "SELECT * FROM done")) == ("completed", [batch_id])


def test_a_token_is_a_uuid(conn: Conn) -> None:
    insert(conn)
    assert isinstance(claim(conn)[0]["claim_token"], UUID)


@pytest.mark.parametrize("ends", ["complete(%s, %s)", "fail(%s, %s, 'x')", "release(%s, %s)", "checkpoint(%s, %s)"])
def test_a_claim_that_is_lost_while_a_write_waits_for_its_row_is_told(admin_dsn: str, conn: Conn, ends: str) -> None:
    insert(conn)
    [one] = claim(conn)
    with psycopg.connect(admin_dsn) as holder, ThreadPoolExecutor(1) as pool:
        holder.execute("UPDATE batchq.batches_live SET claim_token = gen_random_uuid() WHERE id = %s", [one["id"]])
        held = pool.submit(call, conn, ends, one)
        wait_until(
            lambda: value(holder, "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'") == 1,
            10,
            "it to wait",
        )
        holder.commit()
        assert held.result(10) is False
    assert value(conn, STATUS, [one["id"]]) == "processing"


def test_a_finish_keeps_the_columns_that_a_finish_of_a_python_worker_keeps(conn: Any) -> None:
    """A new column of batchq.batches belongs into both."""
    [body] = values(conn, "SELECT prosrc FROM pg_proc WHERE oid = 'batchq.finish_claim'::regproc")
    given = body[body.index("INSERT INTO") : body.index("OVERRIDING")]
    columns = {name.strip() for name in given[given.index("(") + 1 : given.rindex(")")].split(",")}
    kept = {name.strip() for name in endings.KEPT.split(",")}
    assert columns == kept | {"status", "items_done", "result", "errors", "finished_at"}


def test_items_to_retry_are_of_the_claim_alone(conn: Conn) -> None:
    batch_id = insert(conn, items=[1, 2], max_failed_items=0)
    [first] = claim(conn)
    call(conn, "checkpoint(%s, %s, 1, %s)", first, [{"index": 1, "error": "no"}])
    call(conn, "fail(%s, %s, 'x', interval '0')", first)
    [second] = claim(conn)
    query = "SELECT item_index FROM batchq.items_to_retry(%s, %s)"
    assert values(conn, query, [batch_id, second["claim_token"]]) == [1]
    assert values(conn, query, [batch_id, first["claim_token"]]) == []


@pytest.mark.parametrize("text", ["extend(%s, %s, 1)", "checkpoint(%s, %s, 0, '[]', NULL, 1)"])
def test_a_lease_never_becomes_shorter(conn: Conn, text: str) -> None:
    batch_id = insert(conn)
    [row] = claim(conn)  # for 60 s
    assert call(conn, text, row) is True
    assert batch(conn, batch_id)["lease_expires_at"] == row["lease_expires_at"]


def test_a_result_that_is_too_large_is_refused_and_the_claim_stays(conn: Conn) -> None:
    batch_id = insert(conn)
    [row] = claim(conn)
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="at most 1000000"):
        call(conn, "complete(%s, %s, %s)", row, {"x": "y" * 1_000_000})
    assert value(conn, STATUS, [batch_id]) == "processing"
    assert call(conn, "complete(%s, %s, %s)", row, {"x": "y" * 999_000}) is True


def test_a_pause_or_throttle_that_is_over_holds_nothing(conn: Conn) -> None:
    insert(conn)
    conn.execute("INSERT INTO batchq.pauses (queue, until) VALUES ('default', now() - interval '1 second')")
    conn.execute("INSERT INTO batchq.throttles (queue, until) VALUES ('default', now() - interval '1 second')")
    assert len(claim(conn)) == 1


def test_rescue_does_not_wait_for_a_batch_that_its_worker_has_locked(dsn: str, conn: Conn) -> None:
    busy, dead = insert(conn), insert(conn)
    [row, _] = claim(conn, 2)
    for batch_id in (busy, dead):
        change(conn, batch_id, lease_expires_at="2020-01-01")
    with psycopg.connect(dsn) as other, conn.transaction():
        assert call(other, "complete(%s, %s)", row) is True
        conn.execute("SET LOCAL lock_timeout = '5s'")
        assert value(conn, "SELECT batchq.rescue('default')") == 1
        other.commit()
    assert [value(conn, STATUS, [one]) for one in (busy, dead)] == ["completed", "pending"]


def test_a_batch_that_has_killed_two_workers_is_not_ready_at_once(conn: Conn) -> None:
    ids = [insert(conn, attempt=7, max_attempts=20, run_at="2020-01-01") for _ in range(3)]
    fresh = insert(conn, run_at="2020-01-01")
    claim(conn, 4)
    for batch_id in (*ids, fresh):
        change(conn, batch_id, lease_expires_at="2020-01-01")
    assert value(conn, "SELECT batchq.rescue('default')") == 4
    late = "SELECT count(*) FROM batchq.batches_live WHERE run_at > '2021-01-01' AND id = ANY (%s)"
    assert value(conn, late, [ids]) == 3
    assert value(conn, late, [[fresh]]) == 0


def test_a_part_alone_cannot_be_copied(conn: Conn) -> None:
    spread = insert(conn, items=[1, 2, 3, 4], spread=2)
    [row] = claim(conn)
    conn.execute("SELECT batchq.spread_batch('default', %s, %s, 2)", [spread, row["claim_token"]])
    part_id = claim(conn)[0]["id"]
    refusal = f"is a part of batch {spread}: only the whole can be copied"
    with pytest.raises(psycopg.errors.RaiseException, match=refusal):
        conn.execute("SELECT batchq.enqueue_copy(%s)", [part_id])
    assert value(conn, "SELECT count(*) FROM batchq.batches_live") == 3


if __name__ == "__main__":
    run_alone(__file__)
