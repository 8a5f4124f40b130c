"""Whole lives of batches, worked by real worker processes on a real Postgres, whatever dies and when.

The handlers are in apps.py: rows of ``ledger`` are written in the batch's transaction, rows of ``executions`` outside.
"""

import random
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import psycopg
import pytest

import batchq
from tests.e2e import apps
from tests.support.alone import run_alone
from tests.support.processes import Process, Processes
from tests.support.steps import step
from tests.support.waiting import wait_until

APP = "tests.e2e.apps:app"
SEED = 20261124
KILLS = 12
MANY_ATTEMPTS = 1000


@pytest.fixture
def batches(conn: psycopg.Connection[Any]) -> psycopg.Connection[Any]:
    """Return a connection to the test's database, which has the tables of the handlers."""
    conn.execute(apps.TABLES)
    return conn


@pytest.fixture
def processes(dsn: str, batches: psycopg.Connection[Any]) -> Iterator[Processes]:
    """Return what starts worker processes."""
    with Processes(dsn, APP) as processes:
        yield processes


@pytest.fixture
def direct_processes(admin_dsn: str, batches: psycopg.Connection[Any]) -> Iterator[Processes]:
    """Return what starts worker processes past every pooler, whose few backends handlers would hold that wait."""
    with Processes(admin_dsn, APP) as processes:
        yield processes


def values(conn: psycopg.Connection[Any], query: str, *parameters: object) -> list[Any]:
    """Return the first column of *query*."""
    return [row[0] for row in conn.execute(query, parameters)]


def row_of(conn: psycopg.Connection[Any], batch_id: int | None) -> tuple[Any, ...]:
    """Return status, attempt, cursor, claimed_by and last error of a batch."""
    row = conn.execute(
        "SELECT status, attempt, cursor, claimed_by, errors -> -1 ->> 'error' FROM batchq.batches WHERE id = %s",
        [batch_id],
    ).fetchone()
    assert row is not None, f"batch {batch_id} is lost"
    return row


def statuses(conn: psycopg.Connection[Any]) -> dict[str, int]:
    """Return how many batches there are of each status."""
    return dict(conn.execute("SELECT status, count(*) FROM batchq.batches GROUP BY status").fetchall())


def wait_for_statuses(conn: psycopg.Connection[Any], timeout_seconds: float, **expected: int) -> None:
    """Wait until the batches are in these statuses, and no other."""
    wait_until(lambda: statuses(conn) == expected or None, timeout_seconds, f"{expected}, not {statuses(conn)}")


def wait_for_executions(conn: psycopg.Connection[Any], count: int, attempt: int = 1) -> None:
    """Wait until *count* batches have begun their *attempt*."""
    query = "SELECT count(DISTINCT batch_id) FROM executions WHERE attempt = %s"
    wait_until(lambda: values(conn, query, attempt) == [count], 20, f"{count} batches in attempt {attempt}")


def open_gate(conn: psycopg.Connection[Any], name: str) -> None:
    """Let the handlers at a gate go on."""
    conn.execute("INSERT INTO gates (name) VALUES (%s)", [name])


def open_gates(conn: psycopg.Connection[Any], kinds: Sequence[str], attempt: int) -> None:
    """Let the handlers of *kinds* go on that wait in their *attempt*."""
    for kind in set(kinds):
        open_gate(conn, f"{kind} {attempt}")


def ledger(conn: psycopg.Connection[Any]) -> Counter[int]:
    """Return how often each number is in the ledger."""
    return Counter(values(conn, "SELECT seq FROM ledger"))


def enqueue_notes(conn: psycopg.Connection[Any], kind: str, seqs: Sequence[int]) -> None:
    """Enqueue a batch for each number."""
    batchq.enqueue_many(conn, kind, [{"seq": seq} for seq in seqs], max_attempts=MANY_ATTEMPTS)


# Exactly once


def test_two_workers_work_10_000_batches_each_exactly_once(
    batches: psycopg.Connection[Any], processes: Processes
) -> None:
    step("given 10,000 batches, each writing one row in its own transaction")
    enqueue_notes(batches, "note", range(10_000))

    step("when two workers drain the queue")
    started = time.monotonic()
    pair = [processes.worker("--drain") for _ in range(2)]
    codes = [worker.wait(60) for worker in pair]
    step("drained in %.1f s", time.monotonic() - started)

    step("then every row is there once, every batch is completed in its first attempt, and both have worked")
    assert codes == [0, 0]
    assert ledger(batches) == Counter(range(10_000))
    assert batches.execute("SELECT DISTINCT status, attempt FROM batchq.batches").fetchall() == [("completed", 1)]
    assert set(values(batches, "SELECT DISTINCT pid FROM ledger")) == {worker.pid for worker in pair}


def test_kill_9_at_any_moment_neither_loses_nor_doubles_a_row(
    batches: psycopg.Connection[Any], processes: Processes
) -> None:
    dice = random.Random(SEED)
    seqs = iter(range(10**9))

    def enqueue_more() -> int:
        enqueue_notes(batches, "note", [next(seqs) for _ in range(400)])
        enqueue_notes(batches, "note_async", [next(seqs) for _ in range(100)])
        items = [next(seqs) for _ in range(2000)]
        batchq.enqueue_many(batches, "items", items=items, items_per_batch=200, max_attempts=MANY_ATTEMPTS)
        return items[-1] + 1

    step("given load, and two workers with a lease of 1 s")
    total = enqueue_more()
    running = [processes.worker(lease_seconds=1) for _ in range(2)]

    step("when one of them is killed at %s moments (seed %s), and replaced each time", KILLS, SEED)
    for _ in range(KILLS):
        total = enqueue_more()
        wait_for_progress(batches)
        time.sleep(dice.uniform(0, 0.1))
        victim = running.pop(dice.randrange(2))
        victim.kill()
        running.append(processes.worker(lease_seconds=1))

    step("then every one of %s rows is there once, and every batch is completed", total)
    wait_until(lambda: statuses(batches).keys() == {"completed"}, 150, "all batches to be completed")
    rows = ledger(batches)
    assert rows == Counter(range(total)), wrong_rows(rows, total)
    died = values(batches, "SELECT count(*) FROM batchq.batches WHERE errors::text ~ 'worker died'")
    step("%s batches were in hand when their worker was killed", died[0])
    assert died[0] > 0


def wait_for_progress(conn: psycopg.Connection[Any]) -> None:
    """Wait until another row has come into the ledger."""
    query = "SELECT count(*) FROM ledger"
    before = values(conn, query)
    wait_until(lambda: values(conn, query) > before, 20, "progress")


def wrong_rows(rows: Counter[int], total: int) -> str:
    """Say which rows are missing or doubled."""
    missing = [seq for seq in range(total) if seq not in rows]
    doubled = [seq for seq, count in rows.items() if count > 1]
    return f"{len(missing)} missing ({missing[:5]}), {len(doubled)} doubled ({doubled[:5]})"


# A lease that ran out


def test_a_paused_worker_that_wakes_up_late_changes_nothing(
    batches: psycopg.Connection[Any], direct_processes: Processes
) -> None:
    kinds = ["gated", "gated_inside", "gated_async", *["stubborn"] * 4, *["late_failure"] * 4]
    step("given a worker in the middle of %s batches: %s", len(kinds), ", ".join(kinds))
    ids = [batchq.enqueue(batches, kind, {"seq": seq}) for seq, kind in enumerate(kinds)]
    paused = direct_processes.worker(lease_seconds=1, concurrency=10)
    wait_for_executions(batches, len(kinds))

    step("when it is paused for longer than its lease, another takes the batches back, and it wakes up meanwhile")
    paused.freeze()
    other = direct_processes.worker(lease_seconds=1, concurrency=10)
    wait_for_executions(batches, len(kinds), attempt=2)
    open_gates(batches, kinds, attempt=1)
    paused.thaw()

    step("then it is told so for each batch, and nothing of what it wrote has landed")
    wait_until(lambda: lost_batches(paused) == set(ids), 10, "LeaseLost for every batch")
    assert paused.stop() == 0
    assert ledger(batches) == Counter()
    for batch_id in ids:
        status, attempt, _, claimed_by, _ = row_of(batches, batch_id)
        assert (status, attempt) == ("processing", 2)
        assert f"-{other.pid}-" in claimed_by

    step("and the other worker finishes them, each once")
    open_gates(batches, kinds, attempt=2)
    wait_for_statuses(batches, 10, completed=len(kinds))
    assert ledger(batches) == Counter(seq for seq, kind in enumerate(kinds) if kind.startswith("gated"))
    assert values(batches, "SELECT DISTINCT pid FROM ledger") == [other.pid]
    assert values(batches, "SELECT count(*) FROM executions") == [2 * len(kinds)]


def test_a_worker_keeps_its_batches_for_as_long_as_they_run(
    batches: psycopg.Connection[Any], processes: Processes
) -> None:
    step("given a lease of 1 s, and batches that run for 3 s; one of them blocks the event loop")
    for seq, kind in enumerate(["busy", "busy", "busy_async"]):
        batchq.enqueue(batches, kind, {"seq": seq, "seconds": 3})
    worker = processes.worker(lease_seconds=1)
    wait_for_executions(batches, 3)

    step("when another worker is idle beside it, then it takes nothing: each runs once, where it began")
    idle = processes.worker(lease_seconds=1)
    wait_for_statuses(batches, 10, completed=3)
    assert batches.execute("SELECT DISTINCT pid, attempt FROM executions").fetchall() == [(worker.pid, 1)]
    assert values(batches, "SELECT count(*) FROM executions") == [3]
    assert [worker.stop(), idle.stop()] == [0, 0]


def lost_batches(process: Process) -> set[int]:
    """Return the batches that a worker said it has lost."""
    return {line["batch_id"] for line in process.lines("lease lost", error="LeaseLost")}


# Items


def test_an_import_of_100_000_items_that_is_killed_goes_on_at_its_checkpoint(
    batches: psycopg.Connection[Any], processes: Processes
) -> None:
    bad = {1_500: -1, 70_000: -2, 99_999: -3}
    items = [bad.get(seq, seq) for seq in range(100_000)]
    step("given one batch of 100,000 items, 3 of them bad, and a worker that is killed half-way")
    batch_id = batchq.enqueue(batches, "chunks", items=items, max_attempts=2)
    first = processes.worker(lease_seconds=1)
    wait_until(lambda: values(batches, "SELECT count(*) > 30000 FROM ledger")[0], 30, "30,000 rows")
    first.kill()
    checkpoint = sum(batches.execute("SELECT items_done, items_failed FROM batchq.batches").fetchone() or ())
    assert 30_000 < checkpoint < 100_000

    step("when another worker takes it over at %s items", checkpoint)
    second = processes.worker(lease_seconds=1)
    wait_for_statuses(batches, 30, failed=1)

    step("then no item of a committed chunk has run twice, and every good one is in the ledger once")
    runs = Counter(values(batches, "SELECT seq FROM executions"))
    assert runs.keys() == set(items)
    assert [seq for seq in items[:checkpoint] if runs[seq] > 1 and seq >= 0] == []
    again = [seq for seq in items if runs[seq] > 1]
    assert set(again) <= {-1, *items[checkpoint : checkpoint + 1000]}, "more than one chunk was worked twice"
    assert ledger(batches) == Counter(seq for seq in items if seq >= 0)

    step("and the 3 bad items are 3 rows of failed_items")
    query = "SELECT item_index, item, error FROM batchq.failed_items WHERE batch_id = %s ORDER BY item_index"
    expected = [(index, item, f"item {item} is bad") for index, item in bad.items()]
    assert batches.execute(query, [batch_id]).fetchall() == expected
    assert "3 of 100000 items failed; the first: item -1 is bad" in row_of(batches, batch_id)[4]

    step("and when they are mended, `batchq retry` works those 3 alone")
    open_gate(batches, "mended")
    batches.execute("TRUNCATE executions")
    assert processes.command("retry", str(batch_id)).output() == f"batch {batch_id} made pending again\n"
    wait_for_statuses(batches, 30, completed=1)
    assert second.stop() == 0
    assert sorted(values(batches, "SELECT seq FROM executions")) == [-3, -2, -1]
    assert ledger(batches) == Counter(items)
    assert batches.execute("SELECT items_done, items_failed FROM batchq.batches").fetchall() == [(100_000, 0)]
    assert batches.execute(query, [batch_id]).fetchall() == []


# Poison


def test_a_batch_that_kills_its_process_runs_max_attempts_times_and_then_fails(
    batches: psycopg.Connection[Any], processes: Processes
) -> None:
    step("given two batches that kill whoever works them, among 50 harmless ones")
    poison = {how: batchq.enqueue(batches, "poison", {"how": how}, max_attempts=2) for how in ("exit", "kill")}
    enqueue_notes(batches, "quick", range(50))

    step("when `batchq workers 2` works them, replacing the processes that die")
    supervisor = processes.run("workers", "2", APP, lease_seconds=1, concurrency=2)
    wait_for_statuses(batches, 40, completed=50, failed=2)

    step("then each is failed, its workers dead, after two attempts at most, and so many processes were replaced")
    for batch_id in poison.values():
        status, attempt, _, _, error = row_of(batches, batch_id)
        assert (status, attempt) == ("failed", 2)
        assert error.startswith("worker died")
        assert values(batches, "SELECT count(*) FROM executions WHERE batch_id = %s", batch_id)[0] <= 2
    replaced = supervisor.lines("worker process exited")
    assert len(replaced) == values(batches, "SELECT count(DISTINCT pid) FROM executions WHERE seq IS NULL")[0]
    assert 2 <= len(replaced) <= 4
    assert {line["exit_code"] for line in replaced} <= {3, -9}

    step("and the supervisor, stopped, stops its workers and exits 0")
    assert supervisor.stop() == 0
    killed = "SELECT pid FROM executions WHERE seq IS NULL"
    assert values(batches, f"SELECT pid FROM batchq.workers WHERE pid NOT IN ({killed})") == [], "but for the killed"


# Stopping


def test_a_graceful_stop_costs_nothing(batches: psycopg.Connection[Any], processes: Processes) -> None:
    step("given a worker with full hands: batches that end soon, that reach a checkpoint, that never do, that wait")
    kinds = ["gated", "patient", "stubborn", "patient_async"]
    ids = [batchq.enqueue(batches, kind, {"seq": seq}, max_attempts=1) for seq, kind in enumerate(kinds)]
    gated, patient, stubborn, patient_async = ids
    worker = processes.worker(concurrency=3, shutdown_seconds=2)
    wait_for_executions(batches, len(kinds))
    wait_until(lambda: row_of(batches, patient)[2] and row_of(batches, patient_async)[2], 5, "checkpoints")

    step("when it gets SIGTERM")
    started = time.monotonic()
    worker.send(signal.SIGTERM)
    wait_until(lambda: row_of(batches, patient)[0] == row_of(batches, patient_async)[0] == "pending", 1, "give-back")
    given_back_after = time.monotonic() - started
    open_gates(batches, ["gated"], attempt=1)
    code = worker.wait(10)
    stopped_after = time.monotonic() - started
    step("given back at a checkpoint after %.2f s; exit code %s after %.2f s", given_back_after, code, stopped_after)

    step("then it ends well, soon after shutdown_seconds; it has finished what ended, and given back the rest")
    assert code == 0
    assert 2 <= stopped_after < 4
    assert row_of(batches, gated)[:2] == ("completed", 1)
    query = "SELECT status, attempt FROM batchq.status WHERE id = ANY (%s)"
    rest = batches.execute(query, [[patient, stubborn, patient_async]]).fetchall()
    assert rest == [("ready", 0)] * 3, "no attempt is charged, and whoever is idle goes on at once"
    assert values(batches, "SELECT count(*) FROM batchq.workers") == [0]
    cursors = [row_of(batches, batch_id)[2] for batch_id in (patient, patient_async)]
    assert min(cursors) > 0

    step("and another worker goes on where it was")
    open_gate(batches, "enough")
    open_gates(batches, ["stubborn"], attempt=1)
    assert processes.worker("--drain").wait() == 0
    assert [row_of(batches, batch_id)[:2] for batch_id in ids] == [("completed", 1)] * 4
    assert [row_of(batches, batch_id)[2] for batch_id in (patient, patient_async)] == cursors


def test_a_batch_that_has_not_begun_is_given_back_first_at_a_stop(
    batches: psycopg.Connection[Any], processes: Processes
) -> None:
    step("given a worker that has taken more than it can run: its one thread is held by the first of many")
    enqueue_notes(batches, "quick", range(2000))
    worker = processes.worker(concurrency=1, shutdown_seconds=5)
    wait_until(lambda: values(batches, "SELECT count(*) > 500 FROM executions")[0], 20, "a measured pace")
    blocker = batchq.enqueue(batches, "stubborn", {"seq": 0}, priority=-1)
    enqueue_notes(batches, "quick", range(2000, 4000))
    begun = "SELECT FROM executions WHERE batch_id = %s"
    wait_until(lambda: batches.execute(begun, [blocker]).rowcount and len(in_hand(batches)) > 1, 10, "full hands")

    step("when it gets SIGTERM")
    worker.send(signal.SIGTERM)

    step("then only the batch that runs is left in its hand, at once")
    wait_until(lambda: in_hand(batches) == {blocker}, 0.5, "the give-back")
    open_gates(batches, ["stubborn"], attempt=1)
    assert worker.wait(5) == 0
    assert values(batches, "SELECT DISTINCT attempt FROM batchq.batches_live") == [0]


def in_hand(conn: psycopg.Connection[Any]) -> set[int]:
    """Return the batches that are processing."""
    return set(values(conn, "SELECT id FROM batchq.batches_live WHERE status = 'processing'"))


def test_a_second_sigterm_gives_back_and_leaves_at_once(batches: psycopg.Connection[Any], processes: Processes) -> None:
    step("given a worker with a batch that does not end, and a minute to end it in")
    batch_id = batchq.enqueue(batches, "stubborn", {"seq": 0}, max_attempts=1)
    worker = processes.worker(shutdown_seconds=60)
    wait_for_executions(batches, 1)

    step("when it gets SIGTERM, waits, and gets it again")
    worker.send(signal.SIGTERM)
    wait_until(lambda: values(batches, "SELECT stopping FROM batchq.workers") == [True], 10, "the stop to show")
    assert worker.is_running
    started = time.monotonic()
    worker.send(signal.SIGTERM)
    code = worker.wait(5)
    step("exit code %s after %.2f s", code, time.monotonic() - started)

    step("then it has left with its batch given back")
    assert code == 0
    assert row_of(batches, batch_id)[:2] == ("pending", 0)


def test_drain_ends_when_nothing_is_ready(batches: psycopg.Connection[Any], processes: Processes) -> None:
    step("given 100 batches that are ready, one that is scheduled, and one of an unknown kind")
    enqueue_notes(batches, "quick", range(100))
    batchq.enqueue(batches, "quick", delay_seconds=3600)
    batchq.enqueue(batches, "unknown")

    step("when a worker drains the queue, then it exits 0 and has left those two alone")
    assert processes.worker("--drain").wait() == 0
    assert statuses(batches) == {"completed": 100, "pending": 2}


# Time, retries, keys, versions


def test_batches_run_when_they_should(batches: psycopg.Connection[Any], processes: Processes) -> None:
    step("given a batch scheduled in 1.5 s, one that fails twice, one with a unique key, one of a newer program")
    scheduled = batchq.enqueue(batches, "quick", {"seq": 1}, delay_seconds=1.5)
    flaky = batchq.enqueue(batches, "flaky", {"failures": 2}, max_attempts=3)
    keyed = batchq.enqueue(batches, "patient", {"seq": 2}, unique_key="only one")
    newer = batchq.enqueue(batches, "only_newer")
    worker = processes.worker()

    step("when a worker runs, then the key is taken for as long as its batch lives")
    wait_until(lambda: row_of(batches, keyed)[0] == "processing", 10, "the keyed batch to run")
    assert batchq.enqueue(batches, "patient", {"seq": 3}, unique_key="only one") is None
    open_gate(batches, "enough")
    wait_until(lambda: row_of(batches, keyed)[0] == "completed", 10, "the keyed batch to end")
    again = batchq.enqueue(batches, "patient", {"seq": 3}, unique_key="only one")
    wait_until(lambda: row_of(batches, again)[0] == "completed", 10, "its successor to end")

    step("then the failing one is tried again after a back-off, until it succeeds")
    wait_until(lambda: row_of(batches, flaky)[0] == "completed", 10, "the flaky batch to succeed")
    assert row_of(batches, flaky)[1] == 3
    gaps = "SELECT extract(epoch FROM at - lag(at) OVER (ORDER BY at)) FROM executions WHERE batch_id = %s OFFSET 1"
    assert all(0.1 <= gap < 5 for gap in values(batches, gaps, flaky))

    step("then the scheduled one runs at its time")
    wait_until(lambda: row_of(batches, scheduled)[0] == "completed", 10, "the scheduled batch to run")
    late = "SELECT extract(epoch FROM e.at - b.run_at) FROM executions e JOIN batchq.batches b ON b.id = e.batch_id"
    assert 0 <= values(batches, f"{late} WHERE b.id = %s", scheduled)[0] < 2

    step("and the kind that only a newer program knows has waited for it: the two work side by side")
    assert row_of(batches, newer)[0] == "pending"
    beside = processes.worker(app="tests.e2e.apps:newer_app")
    wait_until(lambda: row_of(batches, newer)[0] == "completed", 10, "the newer program to work it")
    assert f"-{beside.pid}-" in row_of(batches, newer)[3]
    assert worker.stop() == 0


def test_a_newer_schema_stops_an_older_worker_only_when_it_says_so(
    batches: psycopg.Connection[Any], processes: Processes
) -> None:
    step("given a schema with a migration that this program does not know")
    batches.execute("INSERT INTO batchq.migrations (version, name) VALUES (9998, 'adds_a_column')")
    batchq.enqueue(batches, "quick")
    assert processes.worker("--drain").wait() == 0
    assert statuses(batches) == {"completed": 1}

    step("when that migration is marked as breaking, then the worker refuses to start, and says why")
    batches.execute("UPDATE batchq.migrations SET breaking = true WHERE version = 9998")
    refused = processes.worker("--drain", is_started=False)
    assert refused.wait() == 2
    assert "the schema is newer than this code" in refused.text()


if __name__ == "__main__":
    run_alone(__file__)
