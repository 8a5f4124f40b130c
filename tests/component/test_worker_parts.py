"""The parts of a worker on their own: nothing that one batch does may stop a slot, the finisher or the keeper."""

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any
from uuid import uuid4

import psycopg
import pytest

import batchq
from batchq.batch.claimed import Claim, ClaimedBatch
from batchq.errors import DatabaseAway, OutcomeUnknown
from batchq.postgres.link import Link
from batchq.postgres.statements import maintenance
from batchq.postgres.statements.claims import END, START
from batchq.postgres.statements.workers import Turn
from batchq.settings import Settings
from batchq.testing import drain, running_worker
from batchq.worker import finisher, rescue
from batchq.worker import turns as turns_module
from batchq.worker.claimer import Claimer
from batchq.worker.context import Context
from batchq.worker.execution import COMPLETED, Outcome
from batchq.worker.finisher import Finisher
from batchq.worker.housekeeper import Housekeeper
from batchq.worker.keeper import Keeper
from batchq.worker.lifecycle import Services
from batchq.worker.positions import Source
from batchq.worker.prefetch import MOST_LIMIT_FACTOR
from batchq.worker.shutdown import Shutdown
from batchq.worker.thread_lane import ThreadLane
from batchq.worker.turns import POLLS_A_SECOND, Turns
from tests.component.rows import Conn, claim, expire_lease, has_expired, insert, value, values
from tests.instruments.bench.proxy import DelayingProxy
from tests.support import supasim
from tests.support.alone import run_alone
from tests.support.steps import step
from tests.support.supasim import SupaSim
from tests.support.waiting import wait_until

app = batchq.App()
gate = threading.Event()
began = threading.Event()
worked: list[int] = []


@app.handler("work")
def work(batch: batchq.Batch) -> None:
    """Remember that it ran; wait for the gate if it is told to."""
    worked.append(batch.id)
    if batch.payload.get("waits"):
        began.set()
        gate.wait(20)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Begin with a closed gate; open it at the end, so that no thread waits for ever."""
    gate.clear()
    began.clear()
    worked.clear()
    yield
    gate.set()


class Parts:
    """A worker's parts without their threads: each step is called by the test."""

    def __init__(self, dsn: str) -> None:
        settings = Settings.load(
            dsn=dsn, pool_size=2, database_timeout_seconds=5, transaction_timeout_seconds=10, lease_seconds=60
        )
        self.context = Context(settings)
        self.context.worker_id = "worker-1"
        self.context.connections.open()
        self.finisher = Finisher(self.context.new_link(10), lambda: None)
        self.lane = ThreadLane(app.handlers, 1, self.finisher.put)
        self.context.lanes = [self.lane]
        self.claimer = Claimer(self.context, self.context.new_link(10))
        self.keeper = Keeper(self.context, self.finisher.unwritten)
        self.housekeeper = Housekeeper(self.context, self.finisher.throughput, self.claimer.known_priorities)

    def claim(self, count: int) -> list[ClaimedBatch]:
        """Claim *count* batches, which wait in the lane."""
        assert len(self.claimer.claim(Source("default", self.lane), 0, count, START, END)) == count
        return sorted(self.lane.list_in_flight(), key=lambda batch: batch.id)

    def write(self) -> None:
        """Write every outcome that there is."""
        while self.finisher.todo:
            self.finisher.write_group()

    def close(self) -> None:
        """Close every connection."""
        self.context.connections.close()
        for link in self.context.links:
            link.close()


@pytest.fixture
def parts(dsn: str) -> Iterator[Parts]:
    """Return the parts, on the test's database."""
    parts = Parts(dsn)
    yield parts
    parts.close()


def enqueue(conn: Conn, count: int, **options: Any) -> None:
    """Enqueue batches for `work`."""
    for _ in range(count):
        batchq.enqueue(conn, "work", **options)


def statuses(conn: Conn) -> list[str]:
    """Return the status of each batch, in the order of ids."""
    return values(conn, "SELECT status FROM batchq.all_batches ORDER BY id")


# -------------------------------------------------------------------------------------------------------- the finisher


@pytest.mark.parametrize("error", [OutcomeUnknown("lost"), psycopg.OperationalError("lost"), RuntimeError("a bug")])
def test_ends_that_cannot_be_counted_at_once_are_counted_later(conn: Conn, parts: Parts, error: Exception) -> None:
    def fail(_: Link) -> None:
        raise error

    parts.finisher.on_needed = fail
    with conn.transaction():
        first = batchq.enqueue(conn, "work")
        batchq.enqueue(conn, "work", after=[first])
    [batch] = parts.claim(1)
    assert parts.lane.end(batch, COMPLETED)
    parts.write()
    assert statuses(conn) == ["completed", "waiting"]
    assert parts.context.flows.follow(parts.claimer.link) == 1
    assert statuses(conn) == ["completed", "pending"]


@pytest.mark.parametrize(
    "refused",
    [Outcome("completed", result='{"a": "\\u0000"}'), Outcome("completed", result="[" * 100_000 + "]" * 100_000)],
)
def test_an_outcome_that_postgres_refuses_fails_its_batch_and_no_other(
    conn: Conn, parts: Parts, refused: Outcome
) -> None:
    enqueue(conn, 5)
    batches = parts.claim(5)
    for number, batch in enumerate(batches):
        parts.lane.end(batch, refused if number == 2 else COMPLETED)
    parts.write()
    assert statuses(conn) == ["completed", "completed", "failed", "completed", "completed"]
    error = value(conn, "SELECT errors -> -1 ->> 'error' FROM batchq.all_batches WHERE status = 'failed'")
    assert error.startswith("the outcome could not be stored: ")
    assert parts.lane.unwritten == 0


def test_an_outcome_that_cannot_even_fail_is_left_to_its_lease(conn: Conn, admin_dsn: str, parts: Parts) -> None:
    with psycopg.connect(admin_dsn, autocommit=True) as admin:
        admin.execute("ALTER TABLE batchq.batches_finished ADD CONSTRAINT no_threes CHECK (id <> 3)")
    enqueue(conn, 4)
    for batch in parts.claim(4):
        parts.lane.end(batch, COMPLETED)
    parts.write()
    assert statuses(conn) == ["completed", "completed", "processing", "completed"]
    assert parts.lane.unwritten == 0


def test_an_outcome_that_must_wait_for_a_lock_holds_up_no_other(conn: Conn, admin_dsn: str, parts: Parts) -> None:
    enqueue(conn, 4)
    batches = parts.claim(4)
    with psycopg.connect(admin_dsn) as person:
        person.execute("SELECT FROM batchq.batches_live WHERE id = %s FOR UPDATE", [batches[0].id])
        for batch in batches:
            parts.lane.end(batch, COMPLETED)
        parts.write()
        assert statuses(conn) == ["processing", *["completed"] * 3]
        person.rollback()
    wait_until(lambda: parts.finisher.retry_postponed() or not parts.finisher.postponed, 10, "it to be written")
    assert statuses(conn) == ["completed"] * 4
    assert parts.lane.unwritten == 0


def test_a_finish_whose_answer_was_lost_is_written_again_and_reported_by_nobody(
    conn: Conn, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls, lost = parts.finisher.write, [], []

    def lose_the_answer(queue: str, entries: Any) -> Any:
        answer = write(queue, entries)
        calls.append(answer)
        if len(calls) == 1:
            raise OutcomeUnknown("lost")
        return answer

    monkeypatch.setattr(parts.finisher, "write", lose_the_answer)
    monkeypatch.setattr(finisher, "report_late", lost.extend)
    enqueue(conn, 2)
    for batch in parts.claim(2):
        parts.lane.end(batch, COMPLETED)
    parts.write()
    assert [len(answer) for answer in calls] == [0, 2]
    assert lost == []
    assert statuses(conn) == ["completed", "completed"]


# ---------------------------------------------------------------------------------------------------------- the slots


def test_a_batch_lost_while_it_waits_is_not_begun_and_its_slot_works_on(conn: Conn, parts: Parts) -> None:
    enqueue(conn, 3)
    batches = parts.claim(3)
    step("one of three is cancelled while it waits, and the keeper notices")
    conn.execute("SELECT batchq.cancel(%s)", [batches[1].id])
    for batch in batches:
        batch.leased_at -= 60
    parts.keeper.renew_leases()
    step("then the one slot works the other two")
    parts.lane.start()
    wait_until(lambda: len(worked) == 2, 5, "both to be worked")
    enqueue(conn, 1)
    parts.claim(1)
    wait_until(lambda: len(worked) == 3, 5, "the slot to work on")
    assert batches[1].id not in worked
    assert parts.lane.given_up == {}
    parts.lane.stop()


def test_a_slot_outlives_an_outcome_that_cannot_be_told(dsn: str, conn: Conn, monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(batchq.Snooze):
        """A Snooze that lacks what `raised` looks at."""

        def __init__(self) -> None:
            pass

    odd = batchq.App()

    @odd.handler("odd")
    def handle(batch: batchq.Batch) -> None:
        raise Odd

    for attempts in (1, 2):
        batchq.enqueue(conn, "odd", max_attempts=attempts)
    drain(odd, dsn, raises=False, concurrency=1)
    assert statuses(conn) == ["failed", "pending"]
    assert (
        value(conn, "SELECT count(*) FROM batchq.all_batches WHERE errors -> 0 ->> 'error' LIKE 'Odd%AttributeError%'")
        == 2
    )


def test_without_a_connection_the_batch_is_given_back_and_not_charged(
    dsn: str, conn: Conn, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = batchq.App()
    tries: list[int] = []

    @away.handler("away")
    def handle(batch: batchq.Batch) -> None:
        tries.append(batch.attempt)
        if len(tries) < 3:
            raise DatabaseAway("no connection for 15 s")

    batchq.enqueue(conn, "away", max_attempts=1)
    drain(away, dsn)
    assert tries == [1, 1, 1]
    assert conn.execute("SELECT status, attempt, errors FROM batchq.all_batches").fetchall() == [("completed", 1, [])]


def test_the_result_is_kept_when_failed_items_are_tolerated(dsn: str, conn: Conn) -> None:
    tolerant = batchq.App()

    @tolerant.handler("some")
    def some(batch: batchq.Batch) -> dict[str, int]:
        for chunk in batch.chunks(10):
            chunk.fail(0, "no")
        return {"imported": 3}

    batchq.enqueue(conn, "some", items=[1, 2, 3, 4], max_failed_items=1, max_attempts=1)
    drain(tolerant, dsn)
    assert conn.execute("SELECT status, result FROM batchq.all_batches").fetchall() == [("completed", {"imported": 3})]


# ---------------------------------------------------------------------------------------------------------- the keeper


def test_the_keeper_stops_only_the_claim_that_is_lost_not_a_newer_one_of_the_same_batch(
    conn: Conn, parts: Parts
) -> None:
    enqueue(conn, 1)
    (old,) = parts.claim(1)
    step("the batch is given back behind the worker's back, and claimed by it anew")
    conn.execute(
        "UPDATE batchq.batches_live SET status = 'pending', claimed_by = NULL, claim_token = NULL, claimed_at = NULL, "
        "lease_expires_at = NULL"
    )
    parts.lane.claimed -= 1
    assert len(parts.claimer.claim(Source("default", parts.lane), 0, 1, START, END)) == 1
    (new,) = [batch for batch in parts.lane.list_in_flight() if batch is not old]
    old.leased_at = new.leased_at = time.monotonic() - 60
    parts.keeper.renew_leases()
    assert parts.lane.list_in_flight() == [new]
    assert (type(old.interrupt), new.interrupt) == (batchq.LeaseLost, None)


def test_the_leases_of_what_waits_to_be_written_are_extended_too(conn: Conn, admin_dsn: str, parts: Parts) -> None:
    enqueue(conn, 4)
    running, writing, waiting, cancelled = parts.claim(4)
    for batch in (writing, waiting, cancelled):
        assert parts.lane.end(batch, COMPLETED)
    step("one is being written, as long as a lock or the line makes it take, and the others wait behind it")
    parts.finisher.group = [parts.finisher.todo.popleft()]
    conn.execute("SELECT batchq.cancel(%s)", [cancelled.id])
    conn.execute("UPDATE batchq.batches_live SET lease_expires_at = now() + interval '1 second'")
    for batch in (running, writing, waiting, cancelled):
        batch.leased_at -= 21
    parts.keeper.renew_leases()
    extended = "SELECT id FROM batchq.batches_live WHERE lease_expires_at > now() + interval '50 seconds' ORDER BY id"
    assert values(conn, extended) == [running.id, writing.id, waiting.id]
    assert parts.lane.list_in_flight() == [running], (
        "what was cancelled meanwhile has ended, and is the finisher's to tell"
    )
    step("extended once, not at every round; and not when it is written")
    conn.execute("UPDATE batchq.batches_live SET lease_expires_at = now() + interval '1 second'")
    parts.keeper.renew_leases()
    assert values(conn, extended) == []
    while parts.finisher.todo:
        parts.finisher.write_group()
    assert parts.finisher.unwritten() == []


def test_a_lease_on_a_locked_row_is_extended_at_the_next_round(conn: Conn, admin_dsn: str, parts: Parts) -> None:
    enqueue(conn, 1)
    (batch,) = parts.claim(1)
    batch.leased_at = long_ago = time.monotonic() - 60
    with psycopg.connect(admin_dsn) as person:
        person.execute("SELECT FROM batchq.batches_live FOR UPDATE")
        parts.keeper.renew_leases()
        assert batch.leased_at == long_ago
        person.rollback()
    parts.keeper.renew_leases()
    assert batch.leased_at > long_ago
    assert parts.lane.list_in_flight() == [batch]


@pytest.mark.parametrize(("age_seconds", "is_extended"), [(19, False), (21, True)])
def test_a_lease_of_60_seconds_is_extended_after_20(
    conn: Conn, parts: Parts, age_seconds: float, is_extended: bool
) -> None:
    enqueue(conn, 1)
    (batch,) = parts.claim(1)
    batch.leased_at = before = time.monotonic() - age_seconds
    parts.keeper.renew_leases()
    assert (batch.leased_at > before) is is_extended


def expired(conn: Conn, seconds_ago: float) -> int:
    """Insert and claim a batch whose lease ran out so long ago; return its id."""
    batch_id = insert(conn, priority=9)
    claim(conn, priority=9)
    expire_lease(conn, batch_id, seconds_ago)
    return batch_id


def test_a_look_for_leases_that_ran_out_is_of_one_queue_and_of_what_ran_out_since(conn: Conn) -> None:
    lasting, stuck = insert(conn), insert(conn, queue="other")
    claim(conn)
    claim(conn, queue="other")
    assert [has_expired(conn, queue, float("-inf"))[1] for queue in ("default", "other")] == [False, False]
    expire_lease(conn, stuck, 60)
    assert [has_expired(conn, queue, float("-inf"))[1] for queue in ("default", "other")] == [False, True]
    now, _ = has_expired(conn, "other", float("-inf"))
    assert abs(now - time.time()) < 60
    assert has_expired(conn, "other", now - 61)[1]
    assert not has_expired(conn, "other", now - 59)[1]
    assert status(conn, lasting) == "processing"


def test_a_rescue_goes_on_behind_the_last_one_and_from_the_beginning_only_so_often(
    conn: Conn, admin_dsn: str, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rescue, "PAUSE_FACTOR", 1e9)
    first = expired(conn, 3600)
    parts.keeper.rescuer.rescue()
    assert status(conn, first) == "pending"
    step("a lease that ran out since then is found; one from before, which came late, when it is time for a whole look")
    late, new = expired(conn, 3600), expired(conn, 0.001)
    parts.keeper.rescuer.rescue()
    assert (status(conn, late), status(conn, new)) == ("processing", "pending")
    parts.keeper.rescuer.expiries["default"].whole_at = 0.0
    parts.keeper.rescuer.rescue()
    assert status(conn, late) == "pending"


def test_a_cheap_rescue_is_always_from_the_beginning(conn: Conn, admin_dsn: str, parts: Parts) -> None:
    parts.keeper.rescuer.rescue()
    stuck = expired(conn, 3600)
    with psycopg.connect(admin_dsn) as person:
        person.execute("SELECT FROM batchq.batches_live WHERE id = %s FOR UPDATE", [stuck])
        parts.keeper.rescuer.rescue()
        assert status(conn, stuck) == "processing", "it is locked"
        person.rollback()
    wait_until(lambda: parts.keeper.rescuer.rescue() or status(conn, stuck) == "pending", 5, "it to be rescued")


def test_a_rescue_that_fails_looks_again_where_it_was(conn: Conn, admin_dsn: str, parts: Parts) -> None:
    parts.keeper.rescuer.rescue()
    before = parts.keeper.rescuer.expiries["default"].passed_until
    terminate = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'batchq'"
    with psycopg.connect(admin_dsn, autocommit=True) as admin:
        admin.execute(f"{terminate} AND datname = current_database()".encode())
    stuck = expired(conn, 0.001)
    if parts.keeper.link.conn is not None:
        with suppress(psycopg.Error, OutcomeUnknown):
            parts.keeper.rescuer.rescue()
    assert parts.keeper.rescuer.expiries["default"].passed_until >= before
    wait_until(lambda: parts.keeper.rescuer.rescue() or status(conn, stuck) == "pending", 5, "it to be rescued")


def test_more_leases_than_a_round_takes_are_all_rescued(
    conn: Conn, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rescue, "RESCUES_A_ROUND", 3)
    monkeypatch.setattr(rescue, "PAUSE_FACTOR", 1e9)
    parts.keeper.rescuer.rescue()
    for seconds in range(8):
        expired(conn, seconds / 1000)
    for _ in range(3):
        parts.keeper.rescuer.rescue()
    assert statuses(conn) == ["pending"] * 8


def status(conn: Conn, batch_id: int) -> str:
    """Return a batch's status."""
    return str(value(conn, "SELECT status FROM batchq.all_batches WHERE id = %s", [batch_id]))


def test_a_service_that_fails_stops_the_worker_instead_of_leaving_half_of_it(
    dsn: str, conn: Conn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(keeper: Keeper) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Keeper, "run", fail)
    worker = batchq.Worker(app, Settings.load(dsn=dsn))
    assert worker.run() is False


# ---------------------------------------------------------------------------------------------------------- the claimer


def test_a_claim_of_unknown_outcome_is_given_back_also_at_a_stop(conn: Conn, dsn: str) -> None:
    enqueue(conn, 2)
    worker = batchq.Worker(app, Settings.load(dsn=dsn))
    token = uuid4()
    assert len(claim(conn, 2, worker=worker.id, token=token)) == 2
    worker.claimer.unknown.append(Claim("default", token, worker.context.runtime, time.monotonic()))
    Shutdown(worker.context, Services(worker.lifecycle), worker.claimer, worker.finisher).release_claims()
    assert conn.execute("SELECT DISTINCT status, attempt FROM batchq.all_batches").fetchall() == [("pending", 0)]
    for link in worker.context.links:
        link.close()


@pytest.mark.parametrize("carried_out", [True, False])
def test_what_a_claim_of_unknown_outcome_has_claimed_comes_back_by_its_token(
    conn: Conn, sim: SupaSim, monkeypatch: pytest.MonkeyPatch, carried_out: bool
) -> None:
    relay, armed, cut = supasim.Client._relay, threading.Event(), []

    async def cutting(client: supasim.Client, kind: bytes, body: bytes) -> None:
        if b"claim_token" not in body or not armed.is_set():
            await relay(client, kind, body)
            return
        armed.clear()
        cut.append(body)
        if carried_out:
            with psycopg.connect(conn.info.dsn, password=conn.info.password, autocommit=True) as own:
                own.execute(body[:-1])
        raise supasim.DisconnectError

    monkeypatch.setattr(supasim.Client, "_relay", cutting)
    parts = Parts(sim.dsn())
    enqueue(conn, 3)
    parts.claimer.round()
    (first,) = parts.lane.list_in_flight()
    parts.lane.written += 1
    armed.set()
    with pytest.raises(OutcomeUnknown):
        parts.claimer.round()
    assert statuses(conn).count("processing") == 1 + carried_out
    parts.claimer.round()
    assert len(cut) == 1
    assert parts.claimer.unknown == []
    assert values(conn, "SELECT attempt FROM batchq.all_batches ORDER BY id") == [1, 1, 0]
    _, second = sorted(parts.lane.list_in_flight(), key=lambda batch: batch.id)
    step("the batch that comes next is the same one, under the token of a claim of which the outcome is known")
    found = values(conn, "SELECT claim_token FROM batchq.all_batches WHERE status = 'processing' ORDER BY id")
    assert found == [first.claim.token, second.claim.token]
    parts.close()


def test_the_claimer_tells_its_lanes_how_far_the_database_is(dsn: str, conn: Conn) -> None:
    enqueue(conn, 1)
    with DelayingProxy(dsn, 0.004) as proxy, closing(Parts(proxy.dsn)) as parts:
        link = parts.claimer.link
        assert link.round_trip_seconds == 0
        assert parts.claimer.round() == 1
        step("the quickest message to the database and back was that of a look, or of the claim")
        assert link.round_trip_seconds >= 0.008
        parts.claimer.round()
        assert parts.lane.prefetch.limit_factor >= 1.8


def test_a_worker_that_begins_with_an_empty_queue_knows_how_far_its_database_is(dsn: str, conn: Conn) -> None:
    with DelayingProxy(dsn, 0.025) as proxy, closing(Parts(proxy.dsn)) as parts:
        (source,) = parts.claimer.sources
        assert parts.claimer.round() == 0
        assert parts.claimer.link.round_trip_seconds >= 0.05
        enqueue(conn, 1)
        for _ in range(3):
            assert len(parts.claimer.probe(source)) == 1
        step("what the line takes is no look's own cost: else this worker would poll once a second only")
        assert source.probe_cost_seconds < 0.025
        assert parts.claimer.idle_seconds() < 0.5
        assert parts.lane.prefetch.limit_factor == 1
        parts.claimer.round()
        assert parts.lane.prefetch.limit_factor == MOST_LIMIT_FACTOR


def test_what_has_waited_is_counted_from_when_it_was_here_not_from_when_it_was_asked_for(dsn: str, conn: Conn) -> None:
    enqueue(conn, 3)
    with DelayingProxy(dsn, 0.2) as proxy, closing(Parts(proxy.dsn)) as parts:
        parts.claim(3)
        assert parts.lane.release_waiting(0.4) == 0
        assert parts.lane.release_waiting(0) == 3


def test_a_dear_look_is_made_less_often_but_not_for_one_that_met_a_busy_machine(parts: Parts) -> None:
    (source,) = parts.claimer.sources

    def least_wait(*looks: float) -> float:
        source.probe_costs.clear()
        for seconds in (0.001, *looks):
            source.probed({}, seconds)
        return min(parts.claimer.idle_seconds() for _ in range(50))

    assert least_wait(0.001, 0.001, 0.001) < 0.05
    assert least_wait(0.101, 0.001, 0.101) < 0.05
    assert least_wait(0.111, 0.111, 0.111) >= 0.1 * 20 / 2


def test_idle_workers_poll_in_turn_by_the_databases_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    step("20 workers whose heartbeats came at different times each know when it is their turn")
    clock = 1000.0
    monkeypatch.setattr(turns_module.time, "monotonic", lambda: clock)
    epoch = 1.7e9
    known = [clock - 0.37 * number for number in range(20)]
    turns = [Turns(Turn(20, number, epoch + at - clock), at) for number, at in enumerate(known)]
    at = sorted(one.wait_seconds() for one in turns)
    gaps = [after - before for before, after in itertools.pairwise(at)]
    assert gaps == pytest.approx([1 / POLLS_A_SECOND] * 19, abs=1e-4)
    assert {one.period_seconds for one in turns} == {20 / POLLS_A_SECOND}


def test_a_turn_that_has_just_been_or_comes_at_once_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    period = 1 / POLLS_A_SECOND
    turns = Turns(Turn(1, 0, 0.0), 1000.0)
    for since, wait in ((0.0, 1.0), (0.01, 0.99), (0.5, 0.5), (0.89, 0.11), (0.95, 1.05)):
        monkeypatch.setattr(turns_module.time, "monotonic", lambda since=since: 1000.0 + since * period)
        assert turns.wait_seconds() == pytest.approx(wait * period, abs=1e-6), since


def test_the_heartbeat_tells_the_claimer_its_turn(conn: Conn, parts: Parts) -> None:
    conn.execute(
        "INSERT INTO batchq.workers (id, hostname, pid, version, queues, kinds, concurrency, in_hand, stopping) "
        "VALUES ('a worker', 'h', 1, '0', '{default}', '{work}', 1, 0, false)"
    )
    parts.keeper.send_heartbeat()
    assert parts.context.turns.period_seconds == 2 / POLLS_A_SECOND


def test_maintenance_is_left_to_the_worker_that_is_at_it(
    conn: Conn, admin_dsn: str, parts: Parts, capsys: pytest.CaptureFixture[str]
) -> None:
    partitions = "SELECT count(*) FROM pg_inherits WHERE inhparent = 'batchq.batches_finished'::regclass"
    conn.execute("SELECT batchq.create_finished_partitions((now() AT TIME ZONE 'UTC')::date - 60, 1)")
    before = values(conn, partitions)
    with psycopg.connect(admin_dsn) as other:
        assert maintenance.take_maintenance(other)
        parts.housekeeper.maintain()
        assert values(conn, partitions) == before
        assert "maintenance" not in capsys.readouterr().out
        other.rollback()
    parts.housekeeper.maintain()
    assert values(conn, partitions) == [before[0] - 1], "that of 60 days ago is dropped"


def test_housekeeping_that_is_blocked_for_longer_than_a_lease_costs_no_lease(
    conn: Conn, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked, released = threading.Event(), threading.Event()

    def hold_transaction(held: Conn) -> bool:
        blocked.set()
        while not released.is_set():
            held.execute("SELECT pg_sleep(0.1)")
        return False

    monkeypatch.setattr(maintenance, "take_maintenance", hold_transaction)
    enqueue(conn, 1, payload={"waits": True})
    with running_worker(app, dsn, lease_seconds=2) as worker:
        assert began.wait(20)
        assert blocked.wait(20)
        step("while maintenance holds the housekeeper's connection, the lease is renewed and the heartbeat is sent")
        until = time.monotonic() + 5
        while time.monotonic() < until:
            assert value(conn, "SELECT lease_expires_at > now() FROM batchq.batches_live")
            time.sleep(0.05)
        assert value(conn, "SELECT heartbeat_at > now() - interval '4 seconds' FROM batchq.workers")
        assert time.monotonic() - worker.keeper.beat_at < 4
        released.set()
        gate.set()
        wait_until(lambda: statuses(conn) == ["completed"], 20, "the batch to be completed")
    assert value(conn, "SELECT attempt FROM batchq.all_batches") == 1


if __name__ == "__main__":
    run_alone(__file__)
