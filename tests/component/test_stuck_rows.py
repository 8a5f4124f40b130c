"""Rows that a person has locked, or that the database refuses to change: each holds up itself and nothing else."""

import gc
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

import psycopg
import pytest
from structlog.testing import capture_logs

import batchq
from batchq.batch.claimed import ClaimedBatch
from batchq.postgres.link import Link
from batchq.postgres.statements.claims import END, START
from batchq.postgres.statements.session import OWN_LOCK_SECONDS
from batchq.worker import finisher, lanes, rescue
from batchq.worker.execution import COMPLETED, RELEASED, Outcome
from batchq.worker.outage import Outage
from batchq.worker.positions import Source
from tests.component.rows import Conn, claim, value, values
from tests.component.test_worker_parts import Parts, enqueue
from tests.support.alone import run_alone
from tests.support.steps import step
from tests.support.waiting import wait_until

MOST_STATEMENTS = 100
RESULT = Outcome("completed", result="1")
WAYS = {
    "completed": (COMPLETED, True, "completed"),
    "with a result": (RESULT, True, "completed"),
    "given back": (RELEASED, True, "pending"),
    "deleted": (COMPLETED, False, None),
}
ended = pytest.mark.parametrize(("outcome", "keep", "status"), WAYS.values(), ids=WAYS)


@pytest.fixture
def parts(dsn: str) -> Iterator[Parts]:
    """Return a worker's parts, on the test's database."""
    parts = Parts(dsn)
    yield parts
    parts.close()


@contextmanager
def locked(dsn: str, *batches: ClaimedBatch, cancel: bool = False) -> Iterator[Conn]:
    """Have a person change batches and leave the transaction open; it rolls back at the end, unless committed."""
    with psycopg.connect(dsn) as person:
        for batch in batches:
            person.execute("SELECT batchq.cancel(%s)", [batch.id])
        yield person
        person.rollback()


def end_all(parts: Parts, batches: list[ClaimedBatch], outcome: Outcome = COMPLETED) -> None:
    """Have all batches end."""
    for batch in batches:
        assert parts.lane.end(batch, outcome)


def count_statements(link: Link, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list that grows with each statement over a link; fail if there is no end to it."""
    sent: list[Any] = []
    really = link.run

    def run(*args: Any, **more: Any) -> Any:
        sent.append(args[0])
        if len(sent) > MOST_STATEMENTS:
            pytest.fail(f"over {MOST_STATEMENTS} statements")  # no Exception, which would be tried again
        return really(*args, **more)

    monkeypatch.setattr(link, "run", run)
    return sent


def statuses(conn: Conn) -> dict[str, int]:
    """Return how many batches have each status."""
    rows = conn.execute("SELECT status, count(*) FROM batchq.all_batches GROUP BY status").fetchall()
    return {str(status): int(count) for status, count in rows}


# ------------------------------------------------------------------------------------------------------- locked rows


@ended
def test_a_row_that_a_person_has_locked_costs_one_short_wait_and_holds_up_no_other(
    conn: Conn, admin_dsn: str, parts: Parts, monkeypatch: pytest.MonkeyPatch,
    outcome: Outcome, keep: bool, status: str | None,
) -> None:  # fmt: skip
    count = 600
    parts.finisher.keep_completed = keep
    enqueue(conn, count)
    batches = parts.claim(count)
    sent = count_statements(parts.finisher.link, monkeypatch)
    with locked(admin_dsn, batches[200]):
        end_all(parts, batches, outcome)
        began_at = time.monotonic()
        parts.finisher.write_group()
        step("one statement waits, one finds out which row is locked, one writes all the others")
        assert len(sent) == 3
        assert time.monotonic() - began_at < OWN_LOCK_SECONDS - 1, "it has waited for longer than 200 ms"
        assert values(conn, "SELECT id FROM batchq.all_batches WHERE status = 'processing'") == [batches[200].id]
        assert (parts.lane.unwritten, parts.lane.occupied) == (1, 0)
        step("its lease is extended as before, and it waits for its turn")
        assert parts.finisher.unwritten() == [batches[200]]
        assert 0 < (parts.finisher.retry_in_seconds() or 0) <= finisher.FIRST_RETRY_SECONDS
    write_postponed(parts)
    assert statuses(conn) == ({status: count} if status else {})
    assert (parts.lane.unwritten, parts.lane.postponed, parts.finisher.unwritten()) == (0, 0, [])


def write_postponed(parts: Parts) -> None:
    """Try again what is postponed until nothing is."""
    wait_until(lambda: parts.finisher.retry_postponed() or not parts.finisher.postponed, 10, "all to be written")


@ended
def test_a_postponed_batch_that_is_cancelled_meanwhile_is_lost_and_not_written(
    conn: Conn, admin_dsn: str, parts: Parts, monkeypatch: pytest.MonkeyPatch,
    outcome: Outcome, keep: bool, status: str | None,
) -> None:  # fmt: skip
    lost: list[Any] = []
    monkeypatch.setattr(finisher, "report_late", lost.extend)
    parts.finisher.keep_completed = keep
    enqueue(conn, 3)
    batches = parts.claim(3)
    with locked(admin_dsn, batches[0]) as person:
        end_all(parts, batches, outcome)
        parts.write()
        assert lost == [], "a locked row is ours still"
        person.commit()
    write_postponed(parts)
    assert [entry.batch for entry in lost] == [batches[0]]
    assert values(conn, "SELECT id FROM batchq.all_batches WHERE status = 'cancelled'") == [batches[0].id]
    assert parts.lane.unwritten == 0


# ------------------------------------------------------------------------------------------------------ refused rows

REFUSING = """
CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF old.payload ->> 'refuses' = tg_argv[0] THEN
    RAISE EXCEPTION 'batch % is under audit', old.id;
  END IF;
  RETURN CASE WHEN tg_op = 'DELETE' THEN old ELSE new END;
END
$$;
CREATE TRIGGER refuse_update BEFORE UPDATE ON batchq.batches_live
  FOR EACH ROW WHEN (old.payload ? 'refuses') EXECUTE FUNCTION public.refuse('change');
CREATE TRIGGER refuse_delete BEFORE DELETE ON batchq.batches_live
  FOR EACH ROW WHEN (old.payload ? 'refuses') EXECUTE FUNCTION public.refuse('end')
"""
BAD = {4, 5, 6, 40, 101}


@pytest.fixture
def refusing(admin_dsn: str) -> Iterator[None]:
    """Have the database refuse to change batches whose payload says so."""
    with psycopg.connect(admin_dsn, autocommit=True) as admin:
        admin.execute(REFUSING)
        yield


def enqueue_some_bad(conn: Conn, count: int, refuses: str) -> set[int]:
    """Enqueue batches, of which a few are refused; return the ids of those."""
    batchq.enqueue_many(conn, "work", [{"refuses": refuses} if number in BAD else {} for number in range(count)])
    return set(values(conn, "SELECT id FROM batchq.all_batches WHERE payload ? 'refuses'"))


def refuse(conn: Conn, ids: Iterable[int], refuses: str) -> None:
    """Have the database refuse batches that are processing from now on."""
    conn.execute(
        "UPDATE batchq.batches_live SET payload = jsonb_build_object('refuses', %s::text) WHERE id = ANY (%s)",
        [refuses, list(ids)],
    )


@pytest.mark.usefixtures("refusing")
def test_a_claim_takes_all_but_the_rows_that_the_database_refuses_to_change(
    conn: Conn, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = enqueue_some_bad(conn, 208, "change")
    source = Source("default", parts.lane)
    with capture_logs() as logs:
        assert len(parts.claimer.claim(source, 0, 208, START, END)) == 208 - len(bad)
    assert {batch.id for batch in parts.lane.list_in_flight()}.isdisjoint(bad)
    [line] = [line for line in logs if line["event"] == "batches refused"]
    assert set(line["batch_ids"]) == bad
    assert "is under audit" in line["error"]
    step("they are left out for a while, and take no room in the lane")
    assert parts.lane.unwritten == 208 - len(bad)
    enqueue(conn, 1)
    sent = count_statements(parts.claimer.link, monkeypatch)
    with capture_logs() as logs:
        assert len(parts.claimer.claim(source, 0, 208, START, END)) == 1
    assert (logs, len(sent)) == ([], 1)
    step("then they are tried again")
    conn.execute("DROP TRIGGER refuse_update ON batchq.batches_live")
    parts.claimer.skipped.until = dict.fromkeys(bad, time.monotonic())
    assert {row.id for row in parts.claimer.claim(source, 0, 208, START, END)} == bad


@pytest.mark.usefixtures("refusing")
def test_more_refused_rows_than_a_lane_has_room_for_do_not_stop_its_claims(conn: Conn, parts: Parts) -> None:
    batchq.enqueue_many(conn, "work", [{"refuses": "change"}] * 30)
    enqueue(conn, 1)
    source = Source("default", parts.lane)
    claimed: list[Any] = []
    for _ in range(5):
        claimed += parts.claimer.claim(source, 0, 8, START, END)
    assert len(claimed) == 1
    assert len(parts.claimer.skipped.ids()) == 30


@pytest.mark.usefixtures("refusing")
@ended
def test_a_finish_writes_all_but_the_rows_that_the_database_refuses_to_change(
    conn: Conn, parts: Parts, outcome: Outcome, keep: bool, status: str | None
) -> None:
    parts.finisher.keep_completed = keep
    enqueue(conn, 200)
    batches = parts.claim(200)
    bad = {batch.id for number, batch in enumerate(batches) if number in BAD}
    refuse(conn, bad, "change" if status == "pending" else "end")
    end_all(parts, batches, outcome)
    with capture_logs() as logs:
        parts.finisher.write_group()
    assert set(values(conn, "SELECT id FROM batchq.all_batches WHERE status = 'processing'")) == bad
    lines = [line for line in logs if line["event"] == "outcomes postponed"]
    assert {batch_id for line in lines for batch_id in line["batch_ids"]} == bad
    assert all("is under audit" in line["error"] for line in lines)
    assert (parts.lane.unwritten, parts.lane.occupied) == (len(bad), 0)
    step("once the database takes them, they are written as they ended")
    conn.execute("DROP TRIGGER refuse_update ON batchq.batches_live; DROP TRIGGER refuse_delete ON batchq.batches_live")
    write_postponed(parts)
    assert statuses(conn) == ({status: 200} if status else {})


@pytest.mark.usefixtures("refusing")
def test_when_every_finish_is_refused_what_takes_no_room_is_bounded(
    conn: Conn, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "MOST_POSTPONED", 5)
    enqueue(conn, 8)
    batches = parts.claim(8)
    refuse(conn, [batch.id for batch in batches], "end")
    end_all(parts, batches)
    parts.write()
    assert (parts.lane.unwritten, parts.lane.occupied) == (8, 3)


@pytest.mark.usefixtures("refusing")
def test_a_finish_that_is_refused_whatever_its_rows_is_not_halved_to_the_end(
    conn: Conn, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    enqueue(conn, 600)
    batches = parts.claim(600)
    refuse(conn, [batch.id for batch in batches], "end")
    end_all(parts, batches)
    sent = count_statements(parts.finisher.link, monkeypatch)
    parts.finisher.write_group()
    assert len(sent) < 60
    assert len(parts.finisher.unwritten()) == 600
    conn.execute("DROP TRIGGER refuse_delete ON batchq.batches_live")
    parts.write()
    write_postponed(parts)
    assert statuses(conn) == {"completed": 600}


@pytest.mark.usefixtures("refusing")
def test_the_leases_of_all_but_refused_rows_are_extended(conn: Conn, parts: Parts) -> None:
    enqueue(conn, 120)
    batches = parts.claim(120)
    bad = {batch.id for number, batch in enumerate(batches) if number in BAD}
    refuse(conn, bad, "change")
    conn.execute("ALTER TABLE batchq.batches_live DISABLE TRIGGER refuse_update")
    conn.execute("UPDATE batchq.batches_live SET lease_expires_at = now() + interval '1 second'")
    conn.execute("ALTER TABLE batchq.batches_live ENABLE TRIGGER refuse_update")
    for batch in batches:
        batch.leased_at -= 21
    parts.keeper.renew_leases()
    short = "SELECT id FROM batchq.batches_live WHERE lease_expires_at < now() + interval '50 seconds'"
    assert set(values(conn, short)) == bad
    assert len(parts.lane.list_in_flight()) == 120, "none is lost"


@pytest.mark.usefixtures("refusing")
@pytest.mark.parametrize(("attempts", "refuses", "status"), [(5, "change", "pending"), (1, "end", "failed")])
def test_all_but_refused_rows_are_rescued(
    conn: Conn, parts: Parts, monkeypatch: pytest.MonkeyPatch, attempts: int, refuses: str, status: str
) -> None:
    enqueue(conn, 120, max_attempts=attempts)
    batches = parts.claim(120)
    conn.execute("UPDATE batchq.batches_live SET lease_expires_at = now() - interval '1 second'")
    bad = {batch.id for number, batch in enumerate(batches) if number in BAD}
    refuse(conn, bad, refuses)
    parts.keeper.rescuer.rescue()
    assert statuses(conn) == {status: 120 - len(bad), "processing": len(bad)}
    assert set(values(conn, "SELECT id FROM batchq.all_batches WHERE status = 'processing'")) == bad
    step("they are left out for a while: no rescue fails for them, and no search for what has failed finds them")
    skipped = parts.keeper.rescuer.expiries["default"].skipped
    assert set(skipped.ids()) == bad
    with monkeypatch.context() as patch:
        searches = count_statements(parts.keeper.link, patch)
        assert parts.keeper.rescuer.rescue_expired("default", float("-inf"), skipped) == []
    assert searches == []
    another = bad.copy().pop()
    del skipped.until[another]
    with capture_logs() as logs:
        assert parts.keeper.rescuer.rescue_expired("default", float("-inf"), skipped) == []
    assert [line["batch_ids"] for line in logs] == [[another]]
    step("and are tried again after a while")
    conn.execute("DROP TRIGGER refuse_update ON batchq.batches_live; DROP TRIGGER refuse_delete ON batchq.batches_live")
    for expiries in parts.keeper.rescuer.expiries.values():
        expiries.skipped.until.clear()
        expiries.whole_at = 0.0  # else the next look from the beginning comes 20 times as long after as this one took
    wait_until(lambda: parts.keeper.rescuer.rescue() or statuses(conn) == {status: 120}, 5, "all to be rescued")


# ----------------------------------------------------------------------------------------------------- rescue in time


def expire_all(conn: Conn, ago: str) -> None:
    """Let every lease have run out so long ago."""
    conn.execute("UPDATE batchq.batches_live SET lease_expires_at = now() - %s::interval", [ago])


@pytest.mark.parametrize("ago", ["1 second", "2 hours"])
def test_all_that_a_killed_worker_held_is_rescued_in_a_few_ticks(conn: Conn, parts: Parts, ago: str) -> None:
    batchq.enqueue_many(conn, "work", [{}] * 4000)
    for _ in range(2):
        assert len(claim(conn, 2000)) == 2000
    expire_all(conn, ago)
    rescues = parts.keeper.duties["rescue"]
    ticks = 0
    while statuses(conn) != {"pending": 4000}:
        rescues.run_if_due()
        ticks += 1
        assert ticks <= 4, "a thousand a tick at least: the next round is not a tenth of the lease away"


def test_a_rescue_ends_after_a_tick_so_that_leases_are_extended(
    conn: Conn, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rescue, "RESCUES_A_ROUND", 2)
    parts.keeper.rescuer.most_seconds = 0.0
    batchq.enqueue_many(conn, "work", [{}] * 10)
    claim(conn, 10)
    expire_all(conn, "1 second")
    assert parts.keeper.rescuer.rescue()
    assert statuses(conn) == {"pending": 2, "processing": 8}
    parts.keeper.rescuer.most_seconds = 60.0
    assert not parts.keeper.rescuer.rescue()
    assert statuses(conn) == {"pending": 10}


# ----------------------------------------------------------------------------------------- back after an answer only


def test_an_outage_is_over_only_when_the_database_has_answered(dsn: str) -> None:
    link = Link(dsn, 5)
    outage = Outage("claimer", link)
    with closing(link), capture_logs() as logs:
        outage.failed(ConnectionError("away"))
        step("a round that asks nothing is no sign that it is back")
        outage.over()
        assert [line["event"] for line in logs] == ["database error"]
        with suppress(psycopg.Error), link.reading() as conn:
            conn.execute("SELECT 1 / 0")
        outage.over()
        assert outage.failures == 1
        with link.reading() as conn:
            conn.execute("SELECT 1")
        outage.over()
    assert [line["event"] for line in logs] == ["database error", "database recovered"]
    assert outage.failures == 0


def test_a_claimer_without_room_and_a_keeper_without_leases_do_not_call_the_database_back(parts: Parts) -> None:
    parts.claimer.outage.failed(ConnectionError("away"))
    parts.lane.claimed = 1  # no room in the one slot
    assert parts.claimer.round() == 0
    parts.claimer.outage.over()
    assert parts.claimer.outage.failures == 1
    leases = parts.keeper.duties["leases"]
    leases.outage.failed(ConnectionError("away"))
    assert leases.run_if_due() == 0
    assert leases.outage.failures == 1
    heartbeat = parts.keeper.duties["heartbeat"]
    heartbeat.outage.failed(ConnectionError("away"))
    assert heartbeat.run_if_due() == 0
    assert heartbeat.outage.failures == 0


# ------------------------------------------------------------------------------------- batches are forgotten at the end


@pytest.mark.parametrize("end", ["completed", "cancelled", "rescued", "given back", "refused"])
def test_a_batch_with_items_is_forgotten_however_it_ends(conn: Conn, parts: Parts, end: str) -> None:
    enqueue(conn, 1, items=[1, 2, 3], max_attempts=1)
    [batch] = parts.claim(1)
    assert parts.lane.pop_waiting() is batch
    assert parts.lane.mark_running(batch)
    batch.items_done = 2
    parts.housekeeper.write_throughput()
    if end == "cancelled":
        conn.execute("SELECT batchq.cancel(%s)", [batch.id])
    if end == "rescued":
        expire_all(conn, "1 second")
        parts.keeper.rescuer.rescue()
    if end in ("cancelled", "rescued"):
        batch.leased_at -= 60
        parts.lane.abandon = lambda _: None  # type: ignore[method-assign]
        parts.keeper.renew_leases()
        parts.lane.came_back(batch)
    else:
        outcomes = {"completed": Outcome("completed", all_done=True), "refused": Outcome("completed", result="no JSON")}
        assert parts.lane.end(batch, outcomes.get(end, RELEASED))
    parts.write()
    step("and a keeper that looked at it before counts nothing any more")
    parts.finisher.throughput.progress(batch, 2)
    parts.housekeeper.write_throughput()
    items = 3 if end == "completed" else 2
    assert value(conn, "SELECT sum(items)::integer FROM batchq.throughput") == items
    del batch
    gc.collect()
    assert [each for each in gc.get_objects() if type(each) in (ClaimedBatch, batchq.Batch)] == []


if __name__ == "__main__":
    run_alone(__file__)
