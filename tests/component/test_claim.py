"""The claim: order, locks, what it counts and returns, and that its cost does not follow the backlog."""

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql

from batchq.postgres.statements import checkpoints, claims, endings, inputs, leases, session
from batchq.postgres.statements.checkpoints import Progress
from batchq.postgres.statements.claims import END, START, Position
from batchq.postgres.statements.endings import Finish, Requeue
from batchq.postgres.statements.running import Statement
from batchq.postgres.transactions import LONGEST_TEXT
from tests.component.rows import (
    KIND,
    Conn,
    Taken,
    batch,
    change,
    claim,
    has_unknown_priority,
    insert,
    is_ready_between,
    priorities,
    processing,
    ready_priorities,
    requeue,
    run,
    value,
    values,
)
from tests.support.alone import run_alone
from tests.support.steps import step

NO = '{"error": "no"}'
STATUSES = "SELECT status FROM batchq.all_batches ORDER BY id"


def ready(conn: Conn, *, kind: str = KIND, queue: str = "default") -> list[int]:
    """Return the priorities in which something is ready, the most urgent first."""
    return ready_priorities(conn, queue, [kind], dict.fromkeys(priorities(conn, queue), START))


def ids(rows: list[claims.ClaimedRow]) -> list[int]:
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
    assert ready(conn) == [-2, 0, 5]
    assert ready(conn, kind="other") == [8]
    assert ready(conn, queue="elsewhere") == []


def test_every_priority_of_a_queue_is_told_whether_or_not_it_is_ready(conn: Conn) -> None:
    levels = [-32768, -7, 1, 3, 5, 32767]
    for priority in (*levels, 3, 3):
        insert(conn, priority=priority)
    conn.execute("UPDATE batchq.batches SET run_at = now() + interval '1 hour'")
    insert(conn, priority=4, queue="elsewhere")
    processing(conn, priority=2)
    assert priorities(conn, "default") == levels
    assert priorities(conn, "nowhere") == []


@pytest.mark.parametrize("unknown", [-32768, -7, 1, 3, 5, 32767])
def test_one_priority_that_is_not_known_is_noticed_wherever_it_lies(conn: Conn, unknown: int) -> None:
    levels = {-32768, -7, 1, 3, 5, 32767}
    for priority in levels - {unknown}:
        insert(conn, priority=priority)
    assert not has_unknown_priority(conn, "default", levels)
    assert not has_unknown_priority(conn, "default", levels - {unknown})
    insert(conn, priority=unknown)
    assert has_unknown_priority(conn, "default", levels - {unknown})
    assert has_unknown_priority(conn, "default", [])
    assert not has_unknown_priority(conn, "default", levels)


def test_a_priority_is_ready_only_behind_its_position(conn: Conn) -> None:
    batch_id = insert(conn)
    [row] = claim(conn, 1)
    requeue(conn, Requeue(batch_id, value(conn, "SELECT claim_token FROM batchq.all_batches"), None, True))
    before = Position(row.run_at, batch_id - 1)
    assert ready_priorities(conn, "default", [KIND], {0: before}) == [0]
    assert ready_priorities(conn, "default", [KIND], {0: row.position}) == []
    step("and up to another, the end of the part included")
    for after, until, is_found in ((before, row.position, True), (START, before, False), (row.position, END, False)):
        assert is_ready_between(conn, "default", 0, [KIND], after, until) is is_found
        with conn.transaction(force_rollback=True):
            assert len(claim(conn, after=after, until=until)) == is_found


@pytest.mark.parametrize("run_at", ["now()", "timestamptz '1999-12-31 23:59:59.999999'", "now() - interval '1 us'"])
def test_a_position_is_exact_to_the_microsecond(conn: Conn, run_at: str) -> None:
    step("of batches that differ by a microsecond, or by their id alone, a claim goes on with the next")
    inserted = [insert(conn) for _ in range(4)]
    conn.execute(f"UPDATE batchq.batches SET run_at = {run_at} - (id / 2) * interval '1 us'".encode())
    order = values(conn, "SELECT id FROM batchq.all_batches ORDER BY run_at, id")
    after, found = START, []
    while rows := claim(conn, 1, after=after):
        found += ids(rows)
        after = rows[0].position
    assert found == order
    assert sorted(found) == inserted


def test_a_batch_of_long_ago_is_claimed(conn: Conn) -> None:
    batch_id = insert(conn)
    conn.execute("UPDATE batchq.batches SET run_at = '4713-01-01 00:00:00.123456 BC'")
    assert ready(conn) == [0]
    [row] = claim(conn)
    assert row.id == batch_id
    assert claim(conn, after=row.position) == []


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
        other.execute(session.transaction_settings(5))
        step("one claims 4 and has not committed, the other claims all it can get")
        first = claim(other, 4, worker="worker-2")
        with conn.transaction():
            conn.execute("SELECT set_config('lock_timeout', '500ms', true)")
            second = claim(conn, 10)
    assert (ids(first), ids(second)) == (inserted[:4], inserted[4:])


def test_a_claim_that_rolls_back_took_nothing(conn: Conn) -> None:
    batch_id = insert(conn)
    with conn.transaction(force_rollback=True):
        assert ids(claim(conn, 1)) == [batch_id]
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
    run_at = batch(conn, batch_id)["run_at"].timestamp()
    assert row == claims.ClaimedRow(batch_id, KIND, 2, 4, '{"a": 1}', '{"at": 2}', 3, 1, 1, 2, 9, run_at)
    assert row.position == Position(run_at, batch_id)


def test_the_form_for_a_distributed_postgres_claims_and_returns_the_same(
    conn: Conn, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for statement in (claims.CLAIM, claims.CLAIM_DISTRIBUTED):
        monkeypatch.setattr(claims, "CLAIM", statement)
        for number in range(3):
            insert(conn, payload={"x": "y" * 700 * number}, items=[1], max_failed_items=number, run_at="2020-01-01")
        rows = sorted(claim(conn, 2))
        assert len(claim(conn)) == 1
        found.append([row._replace(id=0) for row in rows])
    assert found[0] == found[1]


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
    found = inputs.large_input(conn, "default", batch_id, token)
    assert found is not None
    assert "y" * 600 in f"{found}"
    assert inputs.large_input(conn, "default", batch_id, uuid4()) is None


def test_items_are_not_in_the_claim_but_read_in_pages_by_the_token(conn: Conn) -> None:
    taken = processing(conn, items=list(range(100)))
    assert inputs.items_page(conn, "default", *taken, 40, 5) == "[40, 41, 42, 43, 44]"
    assert inputs.items_page(conn, "default", *taken, 98, 5) == "[98, 99]"
    assert inputs.items_page(conn, "default", taken.id, uuid4(), 40, 5) is None


# --------------------------------------------------------------------------------------------------------- give back


def test_a_claim_of_unknown_outcome_is_given_back_by_its_token_unharmed(conn: Conn) -> None:
    inserted = [insert(conn) for _ in range(3)]
    before = [batch(conn, batch_id) for batch_id in inserted]
    token = uuid4()
    claim(conn, 2, token=token)
    claim(conn, 1)
    assert claims.release_claim(conn, "default", token) == 2
    assert [batch(conn, batch_id) for batch_id in inserted[:2]] == before[:2]
    assert batch(conn, inserted[2])["status"] == "processing", "of another claim"
    assert claims.release_claim(conn, "default", token) == 0, "again: nothing is left of it"


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


def test_the_index_by_id_has_room_for_what_claims_write(conn: Conn) -> None:
    count, size = 20_000, "SELECT pg_relation_size('batchq.batches_live_id')"
    conn.execute("INSERT INTO batchq.batches (kind) SELECT 'work' FROM generate_series(1, %s)", [count])
    [before] = values(conn, size)
    assert len(claim(conn, count)) == count
    [after] = values(conn, size)
    step("%s batches: %s bytes before they are claimed, %s afterwards", count, before, after)
    assert after < 1.05 * before


def test_no_trigger_reads_rows_before_each_update(conn: Conn) -> None:
    query = """
        SELECT tgname
        FROM pg_trigger
        WHERE tgrelid = 'batchq.batches_live'::regclass
          AND NOT tgisinternal
          AND pg_get_triggerdef(oid) LIKE '% BEFORE %UPDATE %'
    """
    assert values(conn, query) == []


class ExplainingCursor(psycopg.Cursor[Any]):
    """A cursor that keeps the plan of each statement, made with its real parameters, before it runs it."""

    plans: list[dict[str, Any]]

    def execute(self, query: Any, params: Any = None, **options: Any) -> "ExplainingCursor":
        text = query.as_string(self) if isinstance(query, sql.Composable) else query
        text = text.decode() if isinstance(text, bytes) else text
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


def plan_of(conn: Conn, statement: Statement) -> dict[str, Any]:
    """Run a statement as Link.run does, and undo it; return its plan."""
    text, parameters = statement
    with conn.transaction(force_rollback=True):
        conn.cursor_factory = psycopg.Cursor
        conn.execute(session.transaction_settings(60, settings=session.FORCE_INDEX_AND_HASH_JOIN))
        explain = f"EXPLAIN (ANALYZE, FORMAT JSON) {text}".encode()
        client = psycopg.ClientCursor(conn)
        is_short = len(client.mogrify(explain, parameters)) <= LONGEST_TEXT
        row = (client if is_short else psycopg.Cursor(conn)).execute(explain, parameters).fetchone()
        assert row
        assert "JIT" not in row[0][0], "compiled: that takes a second"
        return row[0][0]["Plan"]


def check_plan(conn: Conn, name: str, statement: Statement, rows: int, by: set[str]) -> None:
    """Fail unless a statement returns *rows* rows, goes by the indexes *by*, sorts nothing, and meets few others."""
    plan = plan_of(conn, statement)
    step("%s: by %s with %s", name, indexes([plan]), sorted({node["Node Type"] for node in nodes(plan)}))
    assert plan["Actual Rows"] == rows, name
    assert indexes([plan]) == by, name
    assert not has_sort([plan]), name
    for node in nodes(plan):
        met = node["Actual Rows"] + node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Join Filter", 0)
        assert met * node["Actual Loops"] <= 2 * rows + 100 or name.startswith("claim"), (
            f"{name} meets too many: {node}"
        )


@pytest.fixture(params=["with statistics", "without statistics"])
def any_backlog(request: pytest.FixtureRequest, conn: Conn, admin_dsn: str) -> None:
    """Make 50,000 live batches, with statistics; or with those of a table that was empty."""
    with psycopg.connect(admin_dsn, autocommit=True) as admin:
        admin.execute("ALTER TABLE batchq.batches_live SET (autovacuum_enabled = false)")
        admin.execute("ANALYZE batchq.batches_live")
        admin.execute(BACKLOG)
        if request.param == "with statistics":
            admin.execute("ANALYZE batchq.batches_live")


@pytest.mark.usefixtures("any_backlog")
@pytest.mark.parametrize("limit", [1, 300, 1000, 2000])
def test_the_claim_goes_by_the_order_of_its_index_without_a_sort(conn: Conn, limit: int) -> None:
    middle = Position(value(conn, "SELECT extract(epoch FROM now() - interval '25000 s')::float8"), 0)
    for after, until in ((START, END), (middle, END), (START, middle)):
        statement = claims.claim("default", 0, [KIND, "other"], limit, "worker-1", uuid4(), 60, after, until)
        check_plan(conn, f"claim of {limit}", statement, limit, {"batches_live_ready", "batches_live_id"})


@pytest.mark.usefixtures("any_backlog")
@pytest.mark.parametrize("count", [1, 300, 1000, 2000, 4000])
def test_what_is_written_for_claimed_batches_goes_by_their_id(conn: Conn, count: int) -> None:
    taken = take(conn, count)
    given_ids, tokens = [one.id for one in taken], [one.token for one in taken]
    texts = [str(token) for token in tokens]
    writes = {
        "complete": endings.complete("default", given_ids, texts),
        "complete and forget": endings.complete("default", given_ids, texts, keep=False),
        "finish": endings.finish("default", [Finish(*one, "completed", "1", NO, True) for one in taken]),
        "requeue": endings.requeue("default", [Requeue(*one, 1.0, True, NO) for one in taken]),
        "extend": leases.extend("default", given_ids, tokens, 60),
    }
    for name, statement in writes.items():
        check_plan(conn, f"{name} of {count}", statement, count, {"batches_live_id"})


def take(conn: Conn, count: int) -> list[Taken]:
    """Claim *count* batches."""
    token = uuid4()
    rows = run(conn, claims.claim("default", 0, [KIND, "other"], count, "worker-1", token, 60))
    assert len(rows) == count
    return [Taken(row[0], token) for row in rows]


LEVELS = [[0], [0, 1], list(range(1000))]


@pytest.mark.parametrize("levels", LEVELS, ids=["one", "two", "a thousand"])
def test_the_look_for_ready_priorities_goes_by_the_index_of_the_claim(
    conn: Conn, backlog: list[dict[str, Any]], levels: list[int]
) -> None:
    known = dict.fromkeys(levels, START)
    assert ready_priorities(conn, "default", [KIND], known) == levels[:2]
    near_the_end = Position(value(conn, "SELECT extract(epoch FROM now() - interval '60 s')::float8"), 0)
    assert ready_priorities(conn, "default", ["nobody"], dict.fromkeys(levels, near_the_end)) == []
    assert has_unknown_priority(conn, "default", levels) is (levels == [0])
    assert priorities(conn, "default") == [0, 1]
    assert is_ready_between(conn, "default", 0, [KIND], START, END)
    assert indexes(backlog) == {"batches_live_ready"}


def test_what_is_written_and_read_for_one_batch_goes_by_its_id(conn: Conn, backlog: list[dict[str, Any]]) -> None:
    batch_id, token = take(conn, 1)[0]
    backlog.clear()
    for progress in (Progress(keeps_cursor=False, cursor="1"), Progress(recovered=[1, 2])):
        assert conn.execute(*checkpoints.checkpoint("default", batch_id, token, 60, progress)).rowcount == 1
    assert inputs.large_input(conn, "default", batch_id, token) is not None
    inputs.items_page(conn, "default", batch_id, token, 0, 10)
    inputs.status_of(conn, "default", batch_id)
    assert indexes(backlog) == {"batches_live_id"}


def test_the_rescue_goes_by_the_index_of_leases(conn: Conn, backlog: list[dict[str, Any]]) -> None:
    assert leases.rescue(conn, "default", 100) == []
    assert not has_sort(backlog)
    scans = [node for plan in backlog for node in nodes(plan) if node.get("Index Name") == "batches_live_lease"]
    assert ["lease_expires_at" in scan["Index Cond"] for scan in scans] == [True]


def test_failed_items_are_read_by_the_key_of_their_batch(conn: Conn, backlog: list[dict[str, Any]]) -> None:
    batch_id, token = take(conn, 1)[0]
    with psycopg.connect(conn.info.dsn, password=conn.info.password, prepare_threshold=None) as other:
        other.execute(
            "INSERT INTO batchq.failed_items SELECT 'default', %s + n / 10, n %% 10, '1', 'no', 1 "
            "FROM generate_series(0, 20000) n",
            [batch_id],
        )
        other.execute("ANALYZE batchq.failed_items")
    backlog.clear()
    assert inputs.failed_page(conn, "default", batch_id, token, 2, 10) == [(n, "1") for n in range(10)]
    assert indexes(backlog) == {"batches_live_id"}
    assert {node.get("Index Name") for plan in backlog for node in nodes(plan)} & {"failed_items_pkey"}


if __name__ == "__main__":
    run_alone(__file__)
