"""The claim: order, locks, what it counts and returns, and that its cost does not follow the backlog."""

from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import sql

from batchq import queries
from batchq.queries import Finish, Progress, Requeue
from tests.component.rows import KIND, Conn, Taken, batch, change, claim, insert, processing, values
from tests.support.alone import run_alone
from tests.support.steps import step

STATUSES = "SELECT status FROM batchq.batches ORDER BY id"


def ids(rows: list[queries.ClaimedRow]) -> list[int]:
    """Return the ids of a claim, in order."""
    return sorted(row.id for row in rows)


# ------------------------------------------------------------------------------------------------------------ order


def test_the_earliest_run_at_is_claimed_first_then_the_lowest_id(conn: Conn) -> None:
    late, twin, early = insert(conn), insert(conn), insert(conn)
    for batch_id, minutes in ((late, 1), (twin, 1), (early, 2)):
        conn.execute(
            "UPDATE batchq.batches SET run_at = date_trunc('hour', now()) - %s * interval '1 day' WHERE id = %s",
            [minutes, batch_id],
        )
    assert [ids(claim(conn, 1)) for _ in range(3)] == [[early], [late], [twin]]


def test_the_priorities_in_which_a_batch_is_ready_come_most_urgent_first(conn: Conn) -> None:
    for priority in (5, -2, 0, 5, 7, 8, 9):
        insert(conn, priority=priority)
    step("7 is only for later, 8 only of a kind unknown here, 9 only processing")
    conn.execute("UPDATE batchq.batches SET run_at = now() + interval '1 hour' WHERE priority = 7")
    conn.execute("UPDATE batchq.batches SET kind = 'other' WHERE priority = 8")
    claim(conn, priority=9)
    assert queries.ready_priorities(conn, "default", [KIND]) == [-2, 0, 5]
    assert queries.ready_priorities(conn, "default", ["other"]) == [8]
    assert queries.ready_priorities(conn, "elsewhere", [KIND]) == []


def test_a_claim_takes_one_queue_and_one_priority(conn: Conn) -> None:
    here = insert(conn, queue="mail", priority=2)
    insert(conn, queue="mail", priority=1)
    insert(conn, queue="default", priority=2)
    assert ids(claim(conn, queue="mail", priority=2)) == [here]
    assert values(conn, STATUSES) == ["processing", "pending", "pending"]


def test_a_claim_takes_no_more_than_its_limit(conn: Conn) -> None:
    inserted = [insert(conn) for _ in range(5)]
    assert ids(claim(conn, 3)) == inserted[:3]
    assert ids(claim(conn, 3)) == inserted[3:]
    assert claim(conn, 3) == []


def test_a_batch_is_not_claimed_before_its_time(conn: Conn) -> None:
    batch_id = insert(conn)
    conn.execute("UPDATE batchq.batches SET run_at = now() + interval '1 second'")
    assert claim(conn) == []
    conn.execute("UPDATE batchq.batches SET run_at = now() - interval '1 microsecond'")
    assert ids(claim(conn)) == [batch_id]


def test_a_kind_that_the_worker_does_not_know_stays_pending(conn: Conn) -> None:
    unknown, known = insert(conn, kind="nobody"), insert(conn)
    assert ids(claim(conn)) == [known]
    assert batch(conn, unknown)["status"] == "pending"
    assert batch(conn, unknown)["attempt"] == 0


def test_two_claims_at_once_take_different_batches_and_neither_waits(conn: Conn, dsn: str) -> None:
    inserted = [insert(conn) for _ in range(10)]
    with psycopg.connect(dsn, prepare_threshold=None) as other:
        other.execute(queries.limits(5))
        step("one claims 4 and has not committed, the other claims all it can get")
        first = queries.claim(other, "default", 0, [KIND], 4, "worker-2", uuid4(), 60)
        with conn.transaction():
            conn.execute("SELECT set_config('lock_timeout', '500ms', true)")
            second = queries.claim(conn, "default", 0, [KIND], 10, "worker-1", uuid4(), 60)
    assert (ids(first), ids(second)) == (inserted[:4], inserted[4:])


def test_a_claim_that_rolls_back_took_nothing(conn: Conn) -> None:
    batch_id = insert(conn)
    with conn.transaction(force_rollback=True):
        assert ids(queries.claim(conn, "default", 0, [KIND], 1, "worker-1", uuid4(), 60)) == [batch_id]
    assert batch(conn, batch_id)["attempt"] == 0
    assert ids(claim(conn)) == [batch_id]


# ------------------------------------------------------------------------------------------ what it writes, returns


def test_a_claim_counts_the_attempt_and_says_who_has_the_batch_until_when(conn: Conn) -> None:
    taken = processing(conn, worker="worker-7", lease_seconds=90)
    row = batch(conn, taken.id)
    assert (row["status"], row["attempt"], row["claimed_by"], row["claim_token"]) == (
        "processing",
        1,
        "worker-7",
        taken.token,
    )
    assert (row["lease_expires_at"] - row["claimed_at"]).total_seconds() == 90


def test_a_claim_returns_what_the_handler_needs(conn: Conn) -> None:
    batch_id = insert(
        conn, payload={"a": 1}, items=[1, 2, 3], max_attempts=4, max_failed_items=2, timeout_seconds=9, attempt=1
    )
    change(conn, batch_id, items_done=1, items_failed=1, cursor={"at": 2})
    [row] = claim(conn)
    assert row == queries.ClaimedRow(batch_id, KIND, 2, 4, '{"a": 1}', '{"at": 2}', 3, 1, 1, 2, 9)


@pytest.mark.parametrize(
    ("payload", "cursor"), [({"x": "y" * 2000}, None), ({}, {"x": "y" * 2000}), ({"x": "y" * 600}, {"x": "y" * 600})]
)
def test_a_large_payload_or_cursor_is_left_out_and_fetched_by_the_token(conn: Conn, payload: Any, cursor: Any) -> None:
    batch_id, token = insert(conn, payload=payload), uuid4()
    if cursor:
        change(conn, batch_id, cursor=cursor)
    [row] = claim(conn, token=token)
    assert (row.payload, row.cursor) == (None, None)
    step("fetch it by the token, then by another")
    found = queries.large_input(conn, "default", batch_id, token)
    assert found is not None
    assert "y" * 600 in f"{found}"
    assert queries.large_input(conn, "default", batch_id, uuid4()) is None


def test_items_are_not_in_the_claim_but_read_in_pages_by_the_token(conn: Conn) -> None:
    taken = processing(conn, items=list(range(100)))
    assert queries.items_page(conn, "default", *taken, 40, 5) == "[40, 41, 42, 43, 44]"
    assert queries.items_page(conn, "default", *taken, 98, 5) == "[98, 99]"
    assert queries.items_page(conn, "default", taken.id, uuid4(), 40, 5) is None


# --------------------------------------------------------------------------------------------------------- give back


def test_a_claim_of_unknown_outcome_is_given_back_by_its_token_unharmed(conn: Conn) -> None:
    inserted = [insert(conn) for _ in range(3)]
    before = [batch(conn, batch_id) for batch_id in inserted]
    token = uuid4()
    claim(conn, 2, token=token)
    claim(conn, 1)
    assert queries.give_back_claim(conn, "default", token) == 2
    assert [batch(conn, batch_id) for batch_id in inserted[:2]] == before[:2]
    assert batch(conn, inserted[2])["status"] == "processing", "of another claim"
    assert queries.give_back_claim(conn, "default", token) == 0, "again: nothing is left of it"


# ----------------------------------------------------------------------------------------------------- flat cost

BACKLOG = """
INSERT INTO batchq.batches (kind, payload, queue, priority, run_at, attempt, status, claimed_by, claim_token,
                            claimed_at, lease_expires_at)
SELECT CASE WHEN n % 10 = 0 THEN 'other' ELSE 'work' END, jsonb_build_object('n', n), 'default', n % 2,
       now() + (CASE WHEN n % 20 = 0 THEN 1 ELSE -1 END) * n * interval '1 second',
       (p.claimed)::integer, CASE WHEN p.claimed THEN 'processing' ELSE 'pending' END,
       CASE WHEN p.claimed THEN 'w' END, CASE WHEN p.claimed THEN gen_random_uuid() END,
       CASE WHEN p.claimed THEN now() END, CASE WHEN p.claimed THEN now() + interval '1 hour' END
FROM generate_series(1, 50000) n, LATERAL (SELECT n % 40 = 7 AS claimed) p
"""


class ExplainingCursor(psycopg.Cursor[Any]):
    """A cursor that keeps the plan of each statement, made with its real parameters, before it runs it."""

    plans: list[dict[str, Any]]

    def execute(self, query: Any, params: Any = None, **options: Any) -> "ExplainingCursor":
        text = query.as_string(self) if isinstance(query, sql.Composable) else query
        super().execute(f"EXPLAIN (FORMAT JSON) {text}".encode(), params)
        [(explained,)] = [tuple(row) for row in self.fetchall()]
        self.plans.append(explained[0]["Plan"])
        return super().execute(query, params, **options)


@pytest.fixture
def backlog(conn: Conn, admin_dsn: str) -> Iterator[list[dict[str, Any]]]:
    """Make 50,000 live batches, with statistics; return the plans of what then runs on *conn*."""
    with psycopg.connect(admin_dsn, autocommit=True) as admin:
        admin.execute(BACKLOG)
        admin.execute("ANALYZE batchq.batches_live")
    plans: list[dict[str, Any]] = []
    conn.cursor_factory = type("Cursor", (ExplainingCursor,), {"plans": plans})
    yield plans
    conn.cursor_factory = psycopg.Cursor


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every node of a plan."""
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes(child)


def indexes(plans: list[dict[str, Any]]) -> set[str]:
    """Return the indexes of the live partition that the plans go by; fail if they read it whole, or sort it."""
    found = [node for plan in plans for node in nodes(plan)]
    for node in found:
        on_live = node.get("Relation Name") == "batches_live"
        assert not (on_live and node["Node Type"] == "Seq Scan"), f"reads the whole partition: {plans}"
    return {node["Index Name"] for node in found if node.get("Index Name", "").startswith("batches_live")}


def has_sort(plans: list[dict[str, Any]]) -> bool:
    """Tell whether anything is sorted."""
    return any("Sort" in node["Node Type"] for plan in plans for node in nodes(plan))


def test_the_claim_goes_by_the_order_of_its_index_without_a_sort(conn: Conn, backlog: list[dict[str, Any]]) -> None:
    for limit in (1, 300):
        assert len(claim(conn, limit)) == limit
    assert indexes(backlog) == {"batches_live_ready", "batches_live_id"}
    assert not has_sort(backlog)


def test_the_look_for_ready_priorities_goes_by_the_index_of_the_claim(
    conn: Conn, backlog: list[dict[str, Any]]
) -> None:
    assert queries.ready_priorities(conn, "default", [KIND]) == [0, 1]
    assert indexes(backlog) == {"batches_live_ready"}


@pytest.mark.parametrize("count", [1, 300])
def test_what_is_written_for_claimed_batches_goes_by_their_id(
    conn: Conn, backlog: list[dict[str, Any]], count: int
) -> None:
    taken = take(conn, count)
    for name, write in (("finish", write_finish), ("requeue", write_requeue), ("extend", write_extend)):
        backlog.clear()
        with conn.transaction(force_rollback=True):
            write(conn, taken)
        step("%s of %s: %s", name, count, indexes(backlog))
        assert indexes(backlog) == {"batches_live_id"}, name


def take(conn: Conn, count: int) -> list[Taken]:
    """Claim *count* batches."""
    token = uuid4()
    return [Taken(row.id, token) for row in claim(conn, count, token=token)]


def write_finish(conn: Conn, taken: list[Taken]) -> None:
    """Finish batches."""
    statement = queries.finish("default", [Finish(*one, "completed") for one in taken])
    assert len(conn.execute(*statement).fetchall()) == len(taken)


def write_requeue(conn: Conn, taken: list[Taken]) -> None:
    """Requeue batches."""
    assert len(queries.requeue(conn, "default", [Requeue(*one, 1.0, True) for one in taken])) == len(taken)


def write_extend(conn: Conn, taken: list[Taken]) -> None:
    """Extend leases."""
    given_ids: list[int] = [one.id for one in taken]
    tokens: list[UUID] = [one.token for one in taken]
    assert queries.extend(conn, "default", given_ids, tokens, 60).lost == set()


def test_what_is_written_and_read_for_one_batch_goes_by_its_id(conn: Conn, backlog: list[dict[str, Any]]) -> None:
    batch_id, token = take(conn, 1)[0]
    backlog.clear()
    progress = Progress(keeps_cursor=False, cursor="1")
    assert conn.execute(*queries.checkpoint("default", batch_id, token, 60, progress)).rowcount == 1
    assert queries.large_input(conn, "default", batch_id, token) is not None
    queries.items_page(conn, "default", batch_id, token, 0, 10)
    queries.status_of(conn, "default", batch_id)
    assert indexes(backlog) == {"batches_live_id"}


def test_the_rescue_goes_by_the_index_of_leases(conn: Conn, backlog: list[dict[str, Any]]) -> None:
    assert queries.rescue(conn, "default", 100) == []
    assert not has_sort(backlog)
    scans = [node for plan in backlog for node in nodes(plan) if node.get("Index Name") == "batches_live_lease"]
    assert ["lease_expires_at" in scan["Index Cond"] for scan in scans] == [True]


def test_failed_items_are_read_by_the_key_of_their_batch(conn: Conn, backlog: list[dict[str, Any]]) -> None:
    with psycopg.connect(conn.info.dsn, password=conn.info.password, prepare_threshold=None) as other:
        other.execute(
            "INSERT INTO batchq.failed_items SELECT 'default', n / 10, n % 10, '1', 'no', 1 "
            "FROM generate_series(1, 20000) n"
        )
        other.execute("ANALYZE batchq.failed_items")
    assert queries.failed_page(conn, "default", 7, 2, 10) == [(n, "1") for n in range(10)]
    assert {node.get("Index Name") for plan in backlog for node in nodes(plan)} & {"failed_items_pkey"}


if __name__ == "__main__":
    run_alone(__file__)
