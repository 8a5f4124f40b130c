"""Where claims go on: their cost stays flat while a snapshot is held, and whatever lands behind a position is found."""

import threading
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import psycopg
import pytest

import batchq
from batchq.batch.claimed import ClaimedBatch
from batchq.postgres.statements import claims as claim_statements
from batchq.postgres.statements import leases, probes, session
from batchq.postgres.statements.claims import END, START, ClaimedRow, Position
from batchq.postgres.statements.endings import Requeue
from batchq.postgres.statements.running import Statement
from batchq.settings import Settings
from batchq.testing import drain
from batchq.worker import positions
from batchq.worker.claimer import Claimer
from batchq.worker.context import Context
from batchq.worker.lanes import Lane
from batchq.worker.positions import (
    BUSY_PAUSE_SECONDS,
    CHEAP_SECONDS,
    MOST_PARTS,
    MOST_PRIORITIES,
    PART_ROWS,
    PAUSE_FACTOR,
    Source,
    Track,
)
from tests.component.rows import (
    KIND,
    Conn,
    Taken,
    claim,
    complete,
    expire_lease,
    finished,
    insert,
    requeue,
    value,
    values,
)
from tests.support.alone import run_alone
from tests.support.clock import Clock
from tests.support.steps import step
from tests.support.waiting import wait_until

DEAR_SECONDS = 2 * CHEAP_SECONDS


def rows(*run_ats: float) -> list[ClaimedRow]:
    """Return rows as a claim returns them; the id is that of the run_at."""
    return [ClaimedRow(int(at), KIND, 1, 5, "{}", None, None, 0, 0, 0, None, at) for at in run_ats]


def at(number: float) -> Position:
    """Return the position of a row of `rows`."""
    return Position(number, int(number))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return the clock that positions go by."""
    clock = Clock()
    monkeypatch.setattr(positions, "time", clock)
    return clock


# ---------------------------------------------------------------------------------------------------- one priority


def test_a_claim_moves_the_position_behind_the_last_row_in_the_order_of_claims() -> None:
    track = Track()
    track.claimed(rows(3, 5, 9), START, is_full=True)
    assert track.position == at(9)
    track.claimed([], at(9), is_full=False)
    assert track.position == at(9)


def test_rows_of_the_same_time_are_told_apart_by_their_id() -> None:
    first, second = (row._replace(run_at=7.0) for row in rows(1, 2))
    track = Track()
    track.claimed([first, second], START, is_full=True)
    assert track.position == second.position > first.position


def test_a_full_claim_from_the_beginning_moves_the_position_back() -> None:
    track = Track()
    track.claimed(rows(100), START, is_full=True)
    track.claimed(rows(5), START, is_full=False)
    assert track.position == at(100), "not full: it has met everything up to the position"
    track.claimed(rows(5), START, is_full=True)
    assert track.position == at(5), "full: there may be more between"


def test_a_position_that_moves_back_takes_the_marks_behind_it_along() -> None:
    track = marked(10, 20, 30)
    track.claimed(rows(20), START, is_full=True)
    assert (track.marks, track.position) == ([START, at(10)], at(20))
    track.claimed(rows(1), START, is_full=True)
    assert (track.marks, track.position, track.is_whole) == ([START], at(1), True)


def marked(*numbers: float) -> Track:
    """Return a track with a mark at each position, and one claim more."""
    track = Track()
    for number in numbers:
        track.claimed(rows(number), START, is_full=True)
        track.mark()
    track.claimed(rows(numbers[-1] + 5), track.position, is_full=True)
    return track


def test_a_part_ends_after_so_many_rows_that_were_claimed_from_the_position() -> None:
    track = Track()
    track.claimed(rows(*range(PART_ROWS)), START, is_full=True)
    assert track.is_whole, "what is claimed from the beginning lies in no part"
    track.claimed(rows(*range(PART_ROWS, 2 * PART_ROWS - 1)), track.position, is_full=True)
    assert track.is_whole
    track.claimed(rows(2 * PART_ROWS - 1), track.position, is_full=True)
    assert track.marks == [START, at(2 * PART_ROWS - 1)]


def test_of_more_parts_than_the_most_each_two_become_one() -> None:
    track = marked(*range(1, MOST_PARTS + 1))
    assert len(track.marks) == (MOST_PARTS + 2) // 2
    assert track.marks[0] == START
    assert track.marks == sorted(track.marks)
    assert parts_of(track) == cover(track), "the parts still cover everything up to the position"


def cover(track: Track) -> list[tuple[Position, Position]]:
    """Return the parts from the beginning to the position, without a gap."""
    return list(zip(track.marks, [*track.marks[1:], track.position], strict=True))


def parts_of(track: Track) -> list[tuple[Position, Position]]:
    """Return the bounds of the parts that sweeps visit, in order."""
    return sorted({track.next_part()[1:] for _ in range(2 * len(track.marks) + 2)})


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_sweep_in_parts_visits_every_part_and_the_newest_each_second_time(count: int) -> None:
    track = marked(*range(10, 10 + 10 * count, 10))
    visits = [track.next_part()[0] for _ in range(4 * (count + 1))]
    assert visits[::2] == [count] * (2 * (count + 1))
    assert set(visits[1::2]) == set(range(count + 1))
    assert parts_of(track) == cover(track)


def test_a_cheap_part_becomes_one_with_the_next(clock: Clock) -> None:
    track = marked(10, 20, 30)
    track.was_swept(DEAR_SECONDS, False, number=1)
    assert track.marks == [START, at(10), at(20), at(30)]
    track.was_swept(CHEAP_SECONDS / 2, False, number=1)
    assert track.marks == [START, at(10), at(30)]
    track.was_swept(CHEAP_SECONDS / 2, False, number=2)
    assert track.marks == [START, at(10), at(30)], "the newest has none that follows"
    for _ in range(2):
        track.was_swept(CHEAP_SECONDS / 2, False, number=0)
    assert track.is_whole


def test_a_dear_sweep_waits_for_twenty_times_its_cost(clock: Clock) -> None:
    track = Track()
    track.claimed(rows(10), START, is_full=True)
    assert PAUSE_FACTOR == 20
    track.was_swept(0.3, is_busy=False)
    assert track.start(clock.now + 5.9) == at(10)
    assert track.start(clock.now + 6.0) == START
    step("while there is more to claim than there is room for, a sweep comes no more often than each second")
    track.was_swept(0.0, is_busy=True)
    assert track.start(clock.now + BUSY_PAUSE_SECONDS / 2) == at(10)
    assert track.start(clock.now + BUSY_PAUSE_SECONDS) == START


def test_a_track_of_several_parts_never_looks_from_the_beginning(clock: Clock) -> None:
    track = marked(10)
    assert track.start(clock.now + 1e9) == track.position


def test_a_part_with_more_in_it_than_there_was_room_for_is_swept_again_at_once(clock: Clock) -> None:
    track = marked(10, 20)
    track.next_part()
    before = track.next_part()
    track.was_swept(DEAR_SECONDS, True, before[0])
    track.sweep_again()
    assert track.sweep_at <= clock.now
    assert track.next_part() == before


# ------------------------------------------------------------------------------------------------------- one source


class StillLane(Lane):
    """A lane that takes up to *size* batches a claim, and begins none."""

    size = 1000

    def wanted(self) -> int:
        """Return the size, whatever is in hand."""
        return self.size + self.unwritten

    def begin(self, batches: list[ClaimedBatch]) -> None:
        """Run nothing."""


app = batchq.App()


@app.handler(KIND)
def work(batch: batchq.Batch) -> None:
    """Do nothing."""


@pytest.fixture
def lane() -> StillLane:
    """Return a lane for batches of the kind "work"."""
    return StillLane(app.handlers, 1, lambda *_: None)


def test_a_kind_that_is_resumed_is_looked_for_from_the_beginning_in_every_shard(lane: Lane) -> None:
    source = Source("mail", lane)
    source.split(["mail", "mail#1"])
    source.serve(["k"], {("mail", "k")})
    assert [shard.kinds for shard in source.shards] == [[], []]
    for shard in source.shards:
        shard.tracks[0] = Track()
    source.serve(["k"], set())
    assert [(shard.kinds, shard.tracks) for shard in source.shards] == [(["k"], {})] * 2


def test_a_look_costs_what_it_takes_longer_than_the_fastest(clock: Clock, lane: StillLane) -> None:
    source = Source("default", lane)
    noise = positions.NOISE_SECONDS
    looks = (0.05, 0.25 + noise, 0.01, 0.01 + noise, 0.06 + noise)
    assert [source.cost(seconds) for seconds in looks] == pytest.approx([0.0, 0.2, 0.0, 0.0, 0.05])


def test_a_full_claim_is_followed_by_the_next_without_a_look_but_for_a_moment(clock: Clock, lane: StillLane) -> None:
    source = Source("default", lane)
    source.tracks[3] = Track()
    source.tracks[3].claimed(rows(10), START, is_full=True)
    source.probed({}, 0.001)
    assert source.continues_at() is None
    source.busy_priority = 3
    assert source.continues_at() == at(10)
    clock.now += positions.PROBE_VALID_SECONDS * 1.01
    assert source.continues_at() is None, "something more urgent may have come"


def test_of_several_priorities_that_are_due_the_one_that_has_waited_longest_is_swept(
    clock: Clock, lane: StillLane
) -> None:
    source = Source("default", lane)
    source.tracks = {1: marked(10), 2: marked(10), 3: Track()}
    source.tracks[1].was_swept(0.1, False)
    assert source.due_part() == 2
    source.tracks[2].was_swept(0.2, False)
    assert source.due_part() is None
    clock.now += 3
    assert source.due_part() == 1


# --------------------------------------------------------------------------------------------------- what it costs


def pages_met(conn: Conn, statement: Statement, index: str = "batches_live_ready") -> int:
    """Run a statement as Link.run does, and undo it; return how many pages its scan by *index* met.

    Where a function scans them: how many it met in all, when it has run ten times.
    """
    text, parameters = statement
    with conn.transaction(force_rollback=True):
        conn.execute(session.transaction_settings(60, settings=session.FORCE_INDEX_AND_HASH_JOIN))
        cursor = psycopg.ClientCursor(conn)
        for _ in range(10 if "batchq.has_ready(" in text else 0):
            cursor.execute(text, parameters)
        cursor.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {text}".encode(), parameters)
        [(explained,)] = cursor.fetchall()
    plan = explained[0]["Plan"]
    [scan] = [node for node in nodes(plan) if node.get("Index Name") == index] or [plan]
    return scan["Shared Hit Blocks"] + scan["Shared Read Blocks"]


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every node of a plan."""
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes(child)


@pytest.fixture
def person(conn: Conn, admin_dsn: str) -> Iterator[Conn]:
    """Make 6,000 batches; return somebody who holds a snapshot of them."""
    conn.execute("INSERT INTO batchq.batches (kind) SELECT 'work' FROM generate_series(1, 6000)")
    with psycopg.connect(admin_dsn) as person:
        person.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        person.execute("SELECT count(*) FROM batchq.all_batches")
        yield person
        person.rollback()


def test_a_claim_does_not_walk_over_what_was_claimed_while_a_snapshot_is_held(conn: Conn, person: Conn) -> None:
    def next_claim(after: Position) -> Statement:
        return claim_statements.claim("default", 0, [KIND], 20, "worker-1", uuid4(), 60, after)

    first, position, seen = pages_met(conn, next_claim(START)), START, []
    for _ in range(10):
        position = max(row.position for row in claim(conn, 500, after=position))
        seen.append((pages_met(conn, next_claim(START)), pages_met(conn, next_claim(position))))
    step("the first claim met %s pages; after each 500, from the beginning and from the position: %s", first, seen)
    assert seen[-1][0] > 5 * first, "the snapshot does not matter here, so this test proves nothing"
    assert max(pages for _, pages in seen) <= first + 10


def test_a_look_does_not_walk_over_what_was_claimed_while_a_snapshot_is_held(
    conn: Conn, person: Conn, monkeypatch: pytest.MonkeyPatch
) -> None:
    conn.execute("ANALYZE batchq.batches_live")
    last = max(row.position for row in claim(conn, 5000))
    statements: list[Statement] = []

    def keep(_conn: Conn, *statement: Any) -> tuple[bool, bool, bool]:
        statements.append(statement)
        return False, False, False

    monkeypatch.setattr(probes, "fetch_one", keep)
    for position in (START, last):
        probes.has_ready(conn, "default", 0, [KIND], position)
        statements.append(probes.ready_between("default", 0, [KIND], position, END))
        statements.append(probes.ready_priorities("default", [KIND], {0: position, 1: position}))
    from_start, from_position = [[pages_met(conn, one) for one in three] for three in (statements[:3], statements[3:])]
    step("from the beginning %s pages, from the position %s", from_start, from_position)
    assert min(from_start) > 30, "the snapshot does not matter here, so this test proves nothing"
    assert max(from_position) <= 10


def test_a_rescue_does_not_walk_over_the_leases_of_what_has_ended_while_a_snapshot_is_held(
    conn: Conn, person: Conn
) -> None:
    token = uuid4()
    taken = [Taken(row.id, token) for row in claim(conn, 5000, lease_seconds=0, token=token)]
    assert len(complete(conn, *taken)) == 5000
    now = session.now(conn)
    met = []
    for after in (float("-inf"), now):
        parameters = {
            "queue": "default",
            "limit": 100,
            "spread_seconds": 0,
            "after": after,
            "skipped": [],
            "only": None,
        }
        met.append(pages_met(conn, (leases.RESCUE, parameters), "batches_live_lease"))
    step("from the beginning %s pages, behind the last look %s", *met)
    assert met[0] > 30, "the snapshot does not matter here, so this test proves nothing"
    assert met[1] <= 10


@pytest.mark.parametrize("filled", ["before its plan is kept", "after its plan is kept"])
def test_the_look_of_an_idle_worker_meets_few_pages_whenever_its_plan_was_made(admin_dsn: str, filled: str) -> None:
    look = "SELECT batchq.has_ready('default', 0::smallint, '{work}', '-infinity', 0)"
    with psycopg.connect(admin_dsn, autocommit=True) as conn:
        conn.execute("ALTER TABLE batchq.batches_live SET (autovacuum_enabled = false)")
        fill = "INSERT INTO batchq.batches (kind) SELECT 'work' FROM generate_series(1, 30000)"
        if filled == "before its plan is kept":
            conn.execute(fill)
        assert {value(conn, look) for _ in range(10)} == {filled == "before its plan is kept"}
        if filled == "after its plan is kept":
            conn.execute(fill)
        assert value(conn, look) is True
        assert pages_met(conn, (look, {})) <= 10


# ------------------------------------------------------------------------------------- what lands behind a position


class Claiming:
    """A claimer without its thread: each round is called by the test."""

    def __init__(self, dsn: str, lane: StillLane) -> None:
        self.lane = lane
        self.context = Context(Settings.load(dsn=dsn, pool_size=1, lease_seconds=60))
        self.context.worker_id, self.context.lanes = "worker-1", [lane]
        self.link = self.context.new_link(10)
        self.claimer = Claimer(self.context, self.link)
        (self.source,) = self.claimer.sources

    def claimed(self) -> list[int]:
        """Do a round; return the ids of all that was claimed so far."""
        self.claimer.round()
        return sorted(batch.id for batch in self.lane.list_in_flight())

    def claims(self, batch_id: int, seconds: float = 5.0) -> None:
        """Do rounds until a batch is claimed."""
        wait_until(lambda: batch_id in self.claimed(), seconds, f"batch {batch_id} to be claimed")


@pytest.fixture
def claiming(dsn: str, lane: StillLane) -> Iterator[Claiming]:
    """Return a claimer of the queue "default"."""
    claiming = Claiming(dsn, lane)
    yield claiming
    claiming.link.close()


def test_batches_are_handed_over_in_the_order_of_claims_and_the_position_is_behind_the_last(
    conn: Conn, claiming: Claiming, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed_over: list[int] = []
    monkeypatch.setattr(claiming.lane, "begin", lambda batches: handed_over.extend(batch.id for batch in batches))
    for _ in range(5):
        insert(conn)
    conn.execute("UPDATE batchq.batches SET run_at = now() - id % 3 * interval '1 hour'")
    order = values(conn, "SELECT id FROM batchq.all_batches ORDER BY run_at, id")
    claiming.claimed()
    assert handed_over == order != sorted(order)
    assert claiming.source.tracks[0].position.id == order[-1]


@pytest.fixture(params=["swept as a whole", "swept in parts"])
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, conn: Conn, claiming: Claiming) -> Claiming:
    """Return a claimer that has claimed eight batches, one after the other, and whose position is behind them."""
    if request.param == "swept in parts":
        monkeypatch.setattr(positions, "PART_ROWS", 2)
        monkeypatch.setattr(positions, "CHEAP_SECONDS", 0.0)
    claiming.lane.size = 1
    for _ in range(8):
        batch_id = insert(conn)
        conn.execute("UPDATE batchq.batches SET run_at = now() - interval '1 minute' + id * interval '1 second'")
        claiming.claims(batch_id)
    claiming.lane.size = 1000
    track = claiming.source.tracks[0]
    step("the marks are %s", track.marks)
    assert track.is_whole is (request.param == "swept as a whole")
    assert track.position > START
    return claiming


def late_commit(conn: Conn, dsn: str) -> int:
    """Insert in a transaction that began before everything else."""
    with psycopg.connect(dsn, prepare_threshold=None) as slow:
        batch_id = insert(slow)
        slow.execute("UPDATE batchq.batches SET run_at = now() - interval '55 seconds' WHERE id = %s", [batch_id])
    return batch_id


def given_back(conn: Conn, dsn: str) -> int:
    """Give back a batch of the first claims, unharmed."""
    batch_id, token = one_claimed(conn)
    assert requeue(conn, Requeue(batch_id, token, None, True)) == {batch_id}
    return batch_id


def given_back_by_its_token(conn: Conn, dsn: str) -> int:
    """Give back what a claim of unknown outcome has claimed."""
    batch_id, token = one_claimed(conn)
    assert claim_statements.release_claim(conn, "default", token) == 1
    return batch_id


def rescued(conn: Conn, dsn: str) -> int:
    """Let the lease of a batch run out."""
    batch_id, _ = one_claimed(conn)
    expire_lease(conn, batch_id)
    assert [row[0] for row in leases.rescue(conn, "default", 10)] == [batch_id]
    return batch_id


def one_claimed(conn: Conn) -> tuple[int, Any]:
    """Return one of the batches claimed first, and its token."""
    row = conn.execute("SELECT id, claim_token FROM batchq.batches_live WHERE id = 2").fetchone()
    assert row
    return row[0], row[1]


def retried(conn: Conn, dsn: str) -> int:
    """Retry a batch that failed long ago."""
    batch_id = finished(conn, "failed", priority=100)
    conn.execute("UPDATE batchq.batches SET priority = 0, run_at = now() - interval '1 hour' WHERE id = %s", [batch_id])
    assert value(conn, "SELECT batchq.retry(%s)", [batch_id]) == "pending"
    return batch_id


def inserted_for_the_past(conn: Conn, dsn: str) -> int:
    """Insert a batch that was to run long ago."""
    return insert(conn, run_at="2001-01-01")


def moved_to_the_past(conn: Conn, dsn: str) -> int:
    """Bring forward a batch that was to run later."""
    batch_id = insert(conn, run_at="2999-01-01")
    conn.execute("UPDATE batchq.batches SET run_at = '2001-01-01' WHERE id = %s", [batch_id])
    return batch_id


def of_a_new_more_urgent_priority(conn: Conn, dsn: str) -> int:
    """Insert a batch of a priority that was never seen before."""
    return insert(conn, priority=-7, run_at="2001-01-01")


def of_a_new_less_urgent_priority(conn: Conn, dsn: str) -> int:
    """Insert a batch of a priority that was never seen before."""
    return insert(conn, priority=7, run_at="2001-01-01")


LANDINGS = [
    late_commit,
    given_back,
    given_back_by_its_token,
    rescued,
    retried,
    inserted_for_the_past,
    moved_to_the_past,
    of_a_new_more_urgent_priority,
    of_a_new_less_urgent_priority,
]


@pytest.mark.parametrize("land", LANDINGS)
def test_what_lands_behind_the_position_is_found(
    conn: Conn, dsn: str, ahead: Claiming, land: Callable[[Conn, str], int]
) -> None:
    ahead.lane.in_flight.clear()
    batch_id = land(conn, dsn)
    assert value(conn, "SELECT status FROM batchq.all_batches WHERE id = %s", [batch_id]) == "pending"
    ahead.claims(batch_id)


@pytest.mark.parametrize("land", [given_back, rescued, inserted_for_the_past])
def test_what_lies_before_a_recorded_position_is_found_soon_by_a_worker_that_begins_there(
    conn: Conn, dsn: str, claiming: Claiming, land: Callable[[Conn, str], int]
) -> None:
    for _ in range(3):
        insert(conn)
    assert len(claim(conn, 3)) == 3
    step("somebody has recorded that nothing is pending before now")
    conn.execute("INSERT INTO batchq.positions (index, queue, at) VALUES ('ready', 'default', now())")
    batch_id = land(conn, dsn)
    assert claiming.claimed() == []
    assert claiming.source.tracks[0].position > START, "it has not begun at the recorded position"
    claiming.claims(batch_id, 4.0)


def test_what_lands_behind_the_position_is_found_while_the_backlog_never_ends(conn: Conn, claiming: Claiming) -> None:
    conn.execute("INSERT INTO batchq.batches (kind) SELECT 'work' FROM generate_series(1, 20000)")
    claiming.lane.size = 5
    for _ in range(3):
        claiming.claimed()
    assert claiming.source.busy_priority == 0
    batch_id = insert(conn, run_at="2001-01-01")
    claiming.claims(batch_id, 4 * BUSY_PAUSE_SECONDS)
    assert claiming.source.busy_priority == 0, "it was busy all the time"


def test_what_is_more_urgent_goes_before_a_backlog_at_the_latest_after_a_moment(conn: Conn, claiming: Claiming) -> None:
    conn.execute("INSERT INTO batchq.batches (kind) SELECT 'work' FROM generate_series(1, 20000)")
    claiming.lane.size = 5
    claiming.claimed()
    for priority in (-1, -2, -1):
        claiming.claims(insert(conn, priority=priority), 2)
        assert len(claiming.lane.in_flight) < 15_000


def test_a_full_claim_from_the_beginning_leaves_nothing_out(conn: Conn, claiming: Claiming) -> None:
    claiming.claims(insert(conn))
    conn.execute("INSERT INTO batchq.batches (kind, run_at) SELECT 'work', '2001-01-01' FROM generate_series(1, 50)")
    claiming.lane.size = 7
    wait_until(lambda: len(claiming.claimed()) == 51, 5, "all to be claimed")


def test_more_priorities_than_are_remembered_all_get_claimed(conn: Conn, claiming: Claiming) -> None:
    count = MOST_PRIORITIES + 500
    conn.execute("INSERT INTO batchq.batches (kind, priority) SELECT 'work', n FROM generate_series(1, %s) n", [count])
    wait_until(lambda: len(claiming.claimed()) == count, 30, "all to be claimed")
    step("and when some come again")
    conn.execute(
        "INSERT INTO batchq.batches (kind, priority) SELECT 'work', n FROM generate_series(-3, %s, 50) n", [count]
    )
    wait_until(
        lambda: len(claiming.claimed()) == value(conn, "SELECT count(*) FROM batchq.all_batches"), 10, "the rest"
    )
    assert len(claiming.source.tracks) <= count + 100


def test_a_drain_ends_only_when_a_look_from_the_beginning_finds_nothing(
    conn: Conn, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step("no sweep comes in the time of this test; each batch leaves another one behind the position")
    monkeypatch.setattr(positions, "PAUSE_FACTOR", 1e9)
    monkeypatch.setattr(positions, "BUSY_PAUSE_SECONDS", 1e9)
    chain = batchq.App()

    @chain.handler("link")
    def link(batch: batchq.Batch) -> None:
        number = batch.payload["n"]
        if number < 8:
            with psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as own:
                columns = {"payload": {"n": number + 1}, "run_at": f"2001-01-{9 - number:02}"}
                insert(own, kind="link", priority=number % 3, **columns)

    insert(conn, kind="link", payload={"n": 0})
    drain(chain, dsn)
    assert sorted(
        values(conn, "SELECT (payload ->> 'n')::integer FROM batchq.all_batches WHERE status = 'completed'")
    ) == [*range(9)]


def test_nothing_is_ever_left_whatever_commits_when(
    conn: Conn, dsn: str, admin_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step("small parts, that are never merged; writers that commit late, for any time and any of 5 priorities")
    monkeypatch.setattr(positions, "PART_ROWS", 40)
    monkeypatch.setattr(positions, "CHEAP_SECONDS", 0.0)
    monkeypatch.setattr(positions, "MOST_PARTS", 7)
    insert_some = """
        INSERT INTO batchq.batches (kind, priority, run_at)
        SELECT 'work', (random() * 4)::integer, now() - random() ^ 4 * interval '1 hour' FROM generate_series(1, 10)
    """

    def write(number: int) -> None:
        with psycopg.connect(admin_dsn) as own:
            for _ in range(60):
                own.execute(insert_some)
                own.execute("SELECT pg_sleep(random() * 0.05)")
                own.commit()

    workers = [batchq.Worker(app, batchq.Settings.load(dsn=dsn, concurrency=2, lease_seconds=60)) for _ in range(2)]
    threads = [threading.Thread(target=worker.run) for worker in workers]
    writers = [threading.Thread(target=write, args=[number]) for number in range(3)]
    for thread in (*threads, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    count = "SELECT count(*) FROM batchq.all_batches WHERE status = 'completed' AND attempt = 1"
    wait_until(lambda: value(conn, count) == 3 * 60 * 10, 20, f"all to be completed, not {value(conn, count)}")
    for worker in workers:
        worker.stop()
    for thread in threads:
        thread.join(10)


if __name__ == "__main__":
    run_alone(__file__)
