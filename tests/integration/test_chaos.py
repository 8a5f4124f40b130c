"""A short chaos run: nothing is lost, doubled or stuck. And the instrument itself: what is wrong is found."""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest

import batchq
from batchq.testing import drain
from tests.instruments.chaos import flows, ledger, report, spans
from tests.instruments.chaos.cli import main
from tests.instruments.chaos.faults import FAULTS, Fault, wait_for_work, worked_by_style
from tests.instruments.chaos.ledger import Violation, check_at_end, check_so_far
from tests.instruments.chaos.marks import DIRECTORY, Mark, read_marks
from tests.instruments.chaos.orders import ORDERS, STYLES
from tests.instruments.chaos.points import POINTS
from tests.instruments.chaos.producer import Producer
from tests.instruments.chaos.proxy import FaultyProxy
from tests.instruments.chaos.run import Run, Window
from tests.instruments.chaos.schedule import schedule
from tests.instruments.chaos.server import GivenServer
from tests.instruments.chaos.world import world
from tests.support.alone import run_alone
from tests.support.databases import Databases
from tests.support.servers import Server
from tests.support.steps import step
from tests.support.waiting import wait_until

Conn = psycopg.Connection[Any]

# Some of each group; bin/chaos has them all.
SHORT = [
    "kill", "kill-claim-within", "kill-commit-within", "kill-finish-within", "stop-commit-before", "freeze", "clock",
    "held-rows", "terminate-busy", "crash", "read-only", "odd-encoding",
    "pooler-restarted", "pooler-paused", "cut", "cut-commit", "half-open",
]  # fmt: skip
SEED = 20261125


# ---------------------------------------------------------------------------------------------------------- the run


def test_a_short_chaos_run_loses_doubles_and_blocks_nothing(server: Server) -> None:
    step("given a worker of each style, through a proxy and PgBouncer (seed %s)", SEED)
    with world(GivenServer(server), workers=1, through_pooler=True, backlog=30) as its:
        names = [name for name in SHORT if FAULTS[name].missing(its) is None]
        run = Run(its, SEED, 0.5, lambda window: step("%s", report.line(window)))
        step("when %s faults come, then all that is left is worked", len(names))
        run.work(one_round(names), 600)
    step("%s", report.verdict(run))
    assert run.violations == []
    assert all(window.recovery_seconds is not None for window in run.windows)
    assert {name for window in run.windows for name in window.injected} == set(names)
    assert len(names) >= len(SHORT) - 1  # a server of somebody else's is not crashed
    assert run.finished > 200
    assert its.operator.cancelled > 3
    assert its.operator.retried > 0


def one_round(names: list[str]) -> Iterator[list[str]]:
    """Yield the first round of the schedule."""
    seen = 0
    for together in schedule(SEED, names):
        yield together
        seen += len(together)
        if seen == len(names):
            return


# --------------------------------------------------------------------------------------------------- the arithmetic


COUNTS = {"hungry": 0, "keyed": 30, "needed": 0, "tick": 0}  # other than 10


@dataclass
class Worked:
    """A database in which some batches of each kind were worked, and the marks that they left."""

    conn: Conn
    lots: list[tuple[int, int]]
    marks: list[Mark]

    def check(self, marks: list[Mark] | None = None, lots: list[tuple[int, int]] | None = None) -> list[Violation]:
        """Check everything."""
        return check_at_end(self.conn, self.lots if lots is None else lots, self.marks if marks is None else marks)

    def id_of(self, kind: str) -> int:
        """Return the first batch of a kind."""
        row = self.conn.execute("SELECT min(id) FROM batchq.all_batches WHERE kind = %s", [kind]).fetchone()
        assert row
        return int(row[0])


@pytest.fixture(scope="module")
def worked_once(server: Server, databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worked]:
    """Return a database in which everything was worked, without any fault."""
    directory = tmp_path_factory.mktemp("marks")
    os.environ[DIRECTORY] = str(directory)
    from tests.instruments.chaos import apps

    with databases.migrated() as name, psycopg.connect(server.dsn(name), autocommit=True) as conn:
        conn.execute(ledger.TABLES)
        conn.execute(spans.LIMITS)
        os.environ[spans.DIRECT] = server.dsn(name)
        producer = Producer(lambda: psycopg.connect(server.dsn(name), autocommit=True), 0)
        for order in ORDERS.values():
            producer.order(order.kind, COUNTS.get(order.kind, 10))
        for style in STYLES:
            app: batchq.App = getattr(apps, f"{style}_app")
            wait_until(lambda app=app: is_drained(app, server.dsn(name), conn), 60, "everything to be worked")
        spans.close()
        yield Worked(conn, producer.known_lots, list(read_marks(directory)))


def is_drained(app: batchq.App, dsn: str, conn: Conn) -> bool:
    """Work what is ready; tell whether nothing of the app's kinds waits for another attempt."""
    drain(app, dsn, raises=False, concurrency=10, queues=["default", spans.QUEUE, flows.QUEUE])
    return conn.execute("SELECT FROM batchq.batches_live WHERE kind = ANY (%s)", [list(app.handlers)]).rowcount == 0


@pytest.fixture
def worked(worked_once: Worked) -> Iterator[Worked]:
    """Return the same for each test: what it changes is taken back."""
    with worked_once.conn.transaction(force_rollback=True):
        yield worked_once


def test_a_database_in_which_all_went_well_comes_out_even(worked: Worked) -> None:
    assert worked.check() == []
    assert worked.conn.execute("SELECT FROM effects").rowcount > 100
    assert {mark.batch_id for mark in worked.marks} == {
        row[0] for row in worked.conn.execute("SELECT id FROM batchq.all_batches")
    }


SCHEDULE = (  # due after two ticks
    "INSERT INTO batchq.schedules (name, cron, kind, paused) VALUES ('two', '@every 1 s', 'tick', true); "
    "UPDATE batchq.schedules SET next_at = date_trunc('second', changed_at) + interval '4 s', ticks_missed = {missed}"
)
LAST_OF_ITS_KEY = "(SELECT batch_id FROM spans WHERE kind = 'keyed' ORDER BY began_at DESC LIMIT 1)"
AGAIN = "INSERT INTO spans SELECT batch_id, token, queue, kind, key, priority, created_at, running"
BEGAN_AT_FIRST = f"{AGAIN}, began_at - interval '1 hour' FROM spans"
BEGAN_AT_LAST = f"{AGAIN}, began_at + interval '1 hour' FROM spans"
MORE_URGENT = f"UPDATE spans SET priority = -5 WHERE batch_id = {LAST_OF_ITS_KEY}"
NEVER_BEGAN = f"""
INSERT INTO batchq.batches (queue, kind, key, priority, created_at)
SELECT queue, kind, key, priority - 1, created_at FROM spans WHERE batch_id = {LAST_OF_ITS_KEY}
"""
PLANTED: dict[str, tuple[str, str]] = {
    "a batch that has vanished": ("lost", "DELETE FROM batchq.batches WHERE id = {tx}"),
    "an effect that is there twice": ("doubled", "INSERT INTO effects SELECT * FROM effects WHERE batch_id = {tx}"),
    "an effect of a chunk that is there twice": (
        "doubled", "INSERT INTO effects SELECT * FROM effects WHERE batch_id = {chunks} LIMIT 1"),
    "an effect of a step in another's place": (
        "doubled", "UPDATE effects SET item = 0 WHERE batch_id = {steps} AND item = 1"),
    "an effect that is not there": ("lost", "DELETE FROM effects WHERE batch_id = {tx_async}"),
    "an effect of an item that is not there": (
        "lost", "DELETE FROM effects WHERE batch_id = {items_tx} AND item = 1"),
    "an effect of a batch that failed": (
        "doubled", "UPDATE batchq.batches SET status = 'failed' WHERE id = {tx}"),
    "a counter that is behind": (
        "counters", "UPDATE batchq.batches SET items_done = items_done - 1 WHERE id = {items}"),
    "a failed item without a row": ("counters", "DELETE FROM batchq.failed_items"),
    "a batch that ended otherwise": ("status", "UPDATE batchq.batches SET status = 'failed' WHERE id = {plain}"),
    "a batch that is there twice": (
        "doubled",
        "INSERT INTO batchq.batches (kind, payload) SELECT kind, payload FROM batchq.all_batches WHERE id = {tx}"),
    "a text that has lost its letters in a result": (
        "lost", "UPDATE batchq.batches SET payload = payload || jsonb_build_object('text', '批') WHERE id = {plain}"),
    "a text that has lost its letters in a batch's error": (
        "lost", "UPDATE batchq.batches SET payload = payload || jsonb_build_object('text', '批') WHERE id = {failing}"),
    "a text that has lost its letters in an item's error": (
        "lost", "UPDATE batchq.batches SET payload = payload || jsonb_build_object('text', '批') WHERE kind = 'items'"),
    "more batches at once than the limit": (
        "limit", "UPDATE spans SET began_at = (SELECT min(began_at) FROM spans) WHERE kind = 'limited'"),
    "a batch that began beside too many others": ("limit", "UPDATE spans SET running = 4 WHERE batch_id = {limited}"),
    "a batch that began beside another of its key": ("limit", "UPDATE spans SET running = 2 WHERE batch_id = {keyed}"),
    "a limited batch that has left no trace": ("lost", "DELETE FROM spans WHERE batch_id = {limited}"),
    "two batches of a key at the same time": (
        "order", "UPDATE spans SET ended_at = ended_at + interval '1 hour' WHERE kind = 'keyed'"),
    "another batch of the key between two attempts": ("order", f"{BEGAN_AT_FIRST} WHERE batch_id = {LAST_OF_ITS_KEY}"),
    "a batch that was worked again": ("order", f"{BEGAN_AT_LAST} WHERE batch_id = {LAST_OF_ITS_KEY}"),
    "a batch that let a less urgent one go first": ("order", MORE_URGENT),
    "a batch that has let all others of its key go first": ("order", NEVER_BEGAN),
    "a batch that began before what it waits for": (
        "order", "UPDATE fan_ins SET unended = 1 WHERE batch_id = {fan_in}"),
    "a batch that began and waits": (
        "order",
        "WITH gone AS (DELETE FROM batchq.batches_finished WHERE id = {fan_in} RETURNING *) "
        "INSERT INTO batchq.batches (id, kind, status, needs_left) OVERRIDING SYSTEM VALUE "
        "SELECT id, kind, 'waiting', 1 FROM gone"),
    "a bar that is not full": (
        "counters", "UPDATE batchq.batches SET items_done = items_done - 1 WHERE id = {spread}"),
    "a bar over 100 %": ("counters", "UPDATE batchq.parts SET items_done = 3 WHERE batch_id = {spread}"),
    "a tick without a batch": ("lost", SCHEDULE.format(missed=1)),
    "a batch without a tick": (
        "doubled", SCHEDULE.format(missed=2) + "; INSERT INTO batchq.batches (kind, payload) VALUES ('tick', '{{}}')"),
    "a batch that nobody works": ("stuck", "INSERT INTO batchq.batches (kind) VALUES ('plain')"),
}  # fmt: skip


def test_ticks_that_come_out_even_are_no_violation(worked: Worked) -> None:
    worked.conn.execute(SCHEDULE.format(missed=2).encode())
    assert worked.check() == []


@pytest.mark.parametrize("planted", PLANTED)
def test_what_is_planted_is_found(worked: Worked, planted: str) -> None:
    what, statement = PLANTED[planted]
    ids = {kind: worked.id_of(kind) for kind in ORDERS if kind not in ("hungry", "tick")}
    step("when there is %s", planted)
    assert worked.conn.execute(statement.format(**ids).encode()).rowcount > 0
    assert what in {each.what for each in worked.check()}


def test_what_a_person_has_put_back_has_a_new_place(worked: Worked) -> None:
    worked.conn.execute(MORE_URGENT.encode())
    put_back = "INSERT INTO interventions SELECT batch_id, 'retried', min(began_at) - interval '1 ms' FROM spans"
    worked.conn.execute(f"{put_back} WHERE batch_id = {LAST_OF_ITS_KEY} GROUP BY batch_id".encode())
    assert worked.check() == []


def test_a_key_is_free_when_a_person_has_cancelled_its_batch(worked: Worked) -> None:
    worked.conn.execute("""
    INSERT INTO interventions SELECT batch_id, 'cancelled', ended_at FROM spans
    WHERE kind = 'keyed' AND ended_at IS NOT NULL ORDER BY began_at LIMIT 1
    """)
    worked.conn.execute("UPDATE spans SET ended_at = NULL WHERE batch_id IN (SELECT batch_id FROM interventions)")
    assert "order" not in {each.what for each in worked.check()}
    worked.conn.execute("UPDATE interventions SET at = 'infinity'")
    assert "order" in {each.what for each in worked.check()}


def test_a_row_whose_lease_ran_out_long_ago_is_stuck_while_work_goes_on(worked: Worked) -> None:
    step("given a batch that is processing, with a lease until a while ago")
    worked.conn.execute("INSERT INTO produced VALUES ('plain', 1000, 1)")
    stuck = batchq.enqueue(worked.conn, "plain", {"seq": 1000})
    claim = """
    UPDATE batchq.batches
    SET status = 'processing', attempt = 1, claimed_by = 'dead', claim_token = %s, claimed_at = now(),
        lease_expires_at = now() - %s * interval '1 second'
    WHERE id = %s
    """
    worked.conn.execute(claim, [uuid.uuid4(), 3, stuck])
    assert check_so_far(worked.conn, ledger.EVER, 4, 60) == []
    worked.conn.execute("UPDATE batchq.batches_live SET lease_expires_at = now() - interval '5 seconds'")
    step("when that is longer ago than rescue takes, then it is stuck")
    assert [(each.what, each.batch_id) for each in check_so_far(worked.conn, ledger.EVER, 4, 60)] == [("stuck", stuck)]


def test_a_batch_that_is_ready_and_never_claimed_is_stuck_while_work_goes_on(worked: Worked) -> None:
    worked.conn.execute("INSERT INTO produced VALUES ('plain', 1000, 1)")
    stuck = batchq.enqueue(worked.conn, "plain", {"seq": 1000})
    assert check_so_far(worked.conn, ledger.EVER, 4, 60) == []
    worked.conn.execute("UPDATE batchq.batches_live SET run_at = now() - interval '61 seconds'")
    assert [(each.what, each.batch_id) for each in check_so_far(worked.conn, ledger.EVER, 4, 60)] == [("stuck", stuck)]


def test_what_finished_long_ago_is_not_counted_again_until_the_end(worked: Worked) -> None:
    worked.conn.execute("INSERT INTO effects SELECT * FROM effects WHERE batch_id = %s", [worked.id_of("tx")])
    newest = worked.conn.execute("SELECT date_part('epoch', max(finished_at)) FROM batchq.all_batches").fetchone()
    assert newest
    assert check_so_far(worked.conn, newest[0] + 1, 4, 60) == []
    assert check_so_far(worked.conn, ledger.EVER, 4, 60) != []


def test_a_committed_lot_that_the_server_has_forgotten_is_lost(worked: Worked) -> None:
    forgotten = worked.check(lots=[*worked.lots, (10_000, 3)])
    assert [each.what for each in forgotten] == ["lost"]


def test_a_batch_or_an_item_that_never_began_is_lost(worked: Worked) -> None:
    plain, items = worked.id_of("plain"), worked.id_of("items")
    fewer = [mark for mark in worked.marks if mark.batch_id != plain and (mark.batch_id, mark.item) != (items, 4)]
    assert {(each.what, each.batch_id) for each in worked.check(fewer)} == {("lost", plain), ("lost", items)}


def test_a_claim_that_ran_twice_and_an_attempt_too_many_are_doubled(worked: Worked) -> None:
    failing = worked.id_of("failing")
    again, more = worked.marks[0], Mark(failing, -1, 3, uuid.uuid4())
    found = worked.check([*worked.marks, again, more])
    assert {(each.what, each.batch_id) for each in found} == {("doubled", again.batch_id), ("doubled", failing)}


# ---------------------------------------------------------------------------------------------------- the instruments


def test_what_workers_finish_is_counted_by_style_and_what_an_operator_cancels_is_not(worked: Worked) -> None:
    assert all(worked_by_style(worked.conn, ledger.EVER)[style] >= 10 for style in STYLES)
    worked.conn.execute(
        "UPDATE batchq.batches_finished SET status = 'cancelled' WHERE kind IN ('tx_async', 'plain_async')"
    )
    assert worked_by_style(worked.conn, ledger.EVER)["async"] == 0
    assert worked_by_style(worked.conn, time.time() + 1).total() == 0


def test_work_that_stands_beside_a_fault_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    world: Any = SimpleNamespace(hold=time.sleep)

    def holds_all_up(its: Any, _: object) -> None:
        wait_for_work(its, lambda: True, "nothing")
        wait_for_work(its, lambda: False, "the rest does not go on", 0.1)

    monkeypatch.setitem(FAULTS, "planted", Fault("planted", holds_all_up, frozenset()))
    window = Window(0, ["planted"], 0.0)
    Run(world, SEED, 0.0, lambda _: None).inject(window)
    assert window.violations == [Violation("stuck", None, "planted: the rest does not go on within 0.1 s")]
    assert window.injected == ["planted"]


def test_a_schedule_is_its_seeds_and_lets_each_fault_come_once_a_round() -> None:
    names = sorted(FAULTS)
    rounds = [list(one_round_of(seed, names)) for seed in (1, 1, 2)]
    assert rounds[0] == rounds[1] != rounds[2]
    for windows in rounds:
        assert sorted(name for window in windows for name in window) == names
        assert {1, 4} <= {len(window) for window in windows} <= {1, 2, 3, 4}


def one_round_of(seed: int, names: list[str]) -> Iterator[list[str]]:
    """Yield the first round of a seed's schedule."""
    left = len(names)
    for window in schedule(seed, names):
        yield window
        left -= len(window)
        if left == 0:
            return


def test_faults_that_get_in_each_others_way_do_not_come_at_once() -> None:
    for window in islice(schedule(3, sorted(FAULTS)), 500):
        touched = [thing for name in window for thing in FAULTS[name].touches]
        assert len(touched) == len(set(touched)), window


def test_faults_come_one_at_a_time_if_asked() -> None:
    assert [len(window) for window in islice(schedule(3, sorted(FAULTS), alone=True), 200)] == [1] * 200


def test_every_named_point_has_a_kill_and_a_stop() -> None:
    assert len(POINTS) == 9
    assert {f"{how}-{point}" for point in POINTS for how in ("kill", "stop")} <= FAULTS.keys()


@pytest.mark.parametrize("is_carried_out", [False, True])
def test_the_proxy_cuts_a_commit_before_it_arrives_or_in_its_answer(
    admin_dsn: str, is_carried_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with psycopg.connect(admin_dsn, autocommit=True) as admin, FaultyProxy(admin_dsn) as proxy:
        admin.execute("CREATE TABLE written ()")
        with psycopg.connect(proxy.dsn) as conn:
            conn.execute("INSERT INTO written DEFAULT VALUES")
            proxy.cut_share = 1.0
            monkeypatch.setattr(proxy.dice, "random", lambda: 0.9 if is_carried_out else 0.1)
            with pytest.raises(psycopg.OperationalError):
                conn.commit()
        wait_until(lambda: proxy.pairs == set(), 5, "the end of the connection")
        assert proxy.cuts == 1
        assert admin.execute("SELECT FROM written").rowcount == int(is_carried_out)


def test_the_proxy_swallows_what_it_is_given_and_takes_new_connections(admin_dsn: str) -> None:
    with FaultyProxy(admin_dsn) as proxy, closing(psycopg.connect(proxy.dsn, autocommit=True)) as old:
        assert proxy.swallow() == 1
        old.pgconn.send_query(b"SELECT 1")
        old.pgconn.flush()
        with psycopg.connect(proxy.dsn, autocommit=True) as new:
            assert new.execute("SELECT 1").fetchone() == (1,)
        old.pgconn.consume_input()
        assert old.pgconn.is_busy()


def test_the_report_compares_equal_times_and_names_what_was_violated(tmp_path: Path) -> None:
    windows = [
        Window(0, ["kill"], 0.0, recovery_seconds=1.0, rate_before=100, rate_after=90),
        Window(1, ["kill", "cut"], 5.0, recovery_seconds=3.0, rate_before=100, rate_after=110),
        Window(2, ["cut"], 9.0, recovery_seconds=2.0, not_injected={"cut": "no line"}),
    ]
    assert report.rows(windows) == [
        report.Row("cut", 1, 0, 3.0, 3.0, 1.1),
        report.Row("kill", 2, 1, 2.0, 3.0, 1.0),
    ]
    assert "| kill | 2 | 1 | 2.00 s | 3.00 s | 100% |" in report.table(windows)
    kept = tmp_path / "windows.jsonl"
    kept.write_text("".join(f"{report.json_line(window)}\n" for window in windows))
    assert report.table(report.read_windows(kept)) == report.table(windows)


def test_the_command_line_lists_the_faults_and_refuses_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(FAULTS)
    with pytest.raises(SystemExit) as ended:
        main(["--faults", "kill,nonsense"])
    assert ended.value.code == 2


if __name__ == "__main__":
    run_alone(__file__)
