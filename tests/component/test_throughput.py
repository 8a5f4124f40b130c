"""What workers count: batchq.throughput, from the parts of a worker and from whole ones."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

import batchq
from batchq.errors import Cancel, OutcomeUnknown
from batchq.postgres.link import Link
from batchq.postgres.statements import workers
from batchq.postgres.statements.workers import Tally
from batchq.testing import drain, running_worker
from batchq.worker.throughput import BOUNDS, Throughput
from tests.component.rows import Conn, insert, run, value, values
from tests.support.alone import run_alone
from tests.support.steps import step
from tests.support.waiting import wait_until

ENDS = ("completed", "failed", "cancelled", "retried", "items")


def rows(conn: Conn) -> list[dict[str, Any]]:
    """Return batchq.throughput."""
    query = "SELECT * FROM batchq.throughput ORDER BY minute, queue, kind"
    return conn.cursor(row_factory=dict_row).execute(query).fetchall()


def totals(conn: Conn) -> dict[str, tuple[int, ...]]:
    """Return what was counted of each kind, over all minutes."""
    found = conn.execute(
        "SELECT kind, sum(completed)::int, sum(failed)::int, sum(cancelled)::int, sum(retried)::int, sum(items)::int "
        "FROM batchq.throughput GROUP BY kind"
    ).fetchall()
    return {kind: tuple(counts) for kind, *counts in found}


def count(conn: Conn, worker: str = "worker-1", **given: Any) -> None:
    """Count as a worker does."""
    zero = Tally("default", "work", 0, 0, 0, 0, 0, 0.0, [])
    assert run(conn, workers.count_throughput(worker, [zero._replace(**given)])) == [("default",)]


@pytest.fixture
def link(dsn: str) -> Iterator[Link]:
    """Return a connection as a worker has it."""
    link = Link(dsn, 10)
    yield link
    link.close()


# ------------------------------------------------------------------------------------------------------- the sums


def test_counts_of_one_worker_and_minute_add_up_in_one_row(conn: Conn) -> None:
    with conn.transaction():
        count(conn, completed=2, failed=1, items=10, run_seconds=1.5, run_times=[1, 0, 2])
        count(conn, completed=3, cancelled=1, retried=4, run_seconds=8.5, run_times=[0, 5, 0, 3])
    [row] = rows(conn)
    assert [row[end] for end in ENDS] == [5, 1, 1, 4, 10]
    assert row["run_seconds_mean"] == pytest.approx(10 / 11, abs=1e-6)
    assert value(conn, "SELECT run_times FROM batchq.throughput_minutes") == [1, 5, 2, 3]


def test_workers_have_rows_of_their_own_which_the_view_adds_up(conn: Conn) -> None:
    with conn.transaction():
        for worker in ("a", "b", "c"):
            count(conn, worker, completed=2, run_seconds=1.0, run_times=[0, 2])
        assert value(conn, "SELECT count(*) FROM batchq.throughput_minutes") == 3
    [row] = rows(conn)
    assert (row["completed"], row["run_seconds_mean"]) == (6, 0.5)


def test_two_workers_write_at_the_same_time_without_waiting(conn: Conn, dsn: str) -> None:
    with psycopg.connect(dsn, prepare_threshold=None) as other:
        run(other, workers.count_throughput("other", [Tally("default", "work", 1, 0, 0, 0, 0, 0.0, [])]))
        with conn.transaction():
            conn.execute("SET LOCAL lock_timeout = '1s'")
            count(conn, completed=1)
        other.commit()
    assert totals(conn) == {"work": (2, 0, 0, 0, 0)}


def test_percentiles_are_within_a_fifth_of_the_run_times(conn: Conn) -> None:
    counted = Throughput()
    run_times = [0.001 * number for number in range(1, 1001)]
    counted.ended("default", "work", "completed", 1000, run_times)
    [((queue, kind), counts)] = counted.counts.items()
    run(conn, workers.count_throughput("worker-1", [counts.tally(queue, kind)]))
    [row] = rows(conn)
    assert row["run_seconds_mean"] == pytest.approx(0.5005)
    assert [row[f"run_seconds_p{part}"] for part in (50, 95, 99)] == [
        pytest.approx(x, rel=0.2) for x in (0.5, 0.95, 0.99)
    ]


@pytest.mark.parametrize("seconds", [0.0, 1e-6, BOUNDS[0], 1.0, 3600.0, BOUNDS[-1], 1e7])
def test_every_run_time_has_its_place(conn: Conn, seconds: float) -> None:
    counted = Throughput()
    counted.ended("q", "k", "completed", 1, [seconds])
    tally = counted.counts["q", "k"].tally("q", "k")
    assert sum(tally.run_times) == tally.run_times[-1] == 1
    assert len(tally.run_times) <= len(BOUNDS) + 1
    run(conn, workers.count_throughput("worker-1", [tally]))
    shown = value(conn, "SELECT run_seconds_p50 FROM batchq.throughput")
    if BOUNDS[0] <= seconds < BOUNDS[-1]:
        assert shown == pytest.approx(seconds, rel=0.2)


def test_run_times_of_some_stand_for_all() -> None:
    counted = Throughput()
    counted.ended("q", "k", "completed", 10, [1.0, 1.0, 4.0])
    tally = counted.counts["q", "k"].tally("q", "k")
    assert (tally.completed, sum(tally.run_times), tally.run_seconds) == (10, 10, 7 * 1.0 + 3 * 4.0)


def test_without_a_batch_that_ran_there_is_no_percentile(conn: Conn) -> None:
    count(conn, items=5)
    [row] = rows(conn)
    assert (row["items"], row["run_seconds_mean"], row["run_seconds_p50"]) == (5, None, None)


# ------------------------------------------------------------------------------------------------------- kept small


def test_minutes_that_are_over_are_merged_into_one_row(conn: Conn) -> None:
    for worker in ("a", "b"):
        for kind in ("x", "y"):
            count(conn, worker, kind=kind, completed=1, items=2, run_seconds=0.5, run_times=[0, 1])
    before = rows(conn)
    assert value(conn, "SELECT batchq.merge_throughput()") == 0
    assert value(conn, "SELECT count(*) FROM batchq.throughput_minutes") == 4
    conn.execute("UPDATE batchq.throughput_minutes SET minute = minute - interval '2 minutes'")
    assert value(conn, "SELECT batchq.merge_throughput()") == 2
    assert values(conn, "SELECT worker FROM batchq.throughput_minutes") == ["", ""]
    assert [row | {"minute": None} for row in rows(conn)] == [row | {"minute": None} for row in before]
    step("what comes late is added")
    count(conn, "late", kind="x", completed=5, run_times=[5])
    conn.execute("UPDATE batchq.throughput_minutes SET minute = (SELECT min(minute) FROM batchq.throughput_minutes)")
    assert value(conn, "SELECT batchq.merge_throughput()") == 1
    assert totals(conn) == {"x": (7, 0, 0, 0, 4), "y": (2, 0, 0, 0, 4)}


def test_minutes_of_more_than_a_week_ago_are_dropped(conn: Conn) -> None:
    count(conn, "old", completed=1)
    conn.execute("UPDATE batchq.throughput_minutes SET minute = minute - interval '7 days 1 minute'")
    count(conn, "new", completed=1)
    conn.execute("SELECT batchq.merge_throughput()")
    assert values(conn, "SELECT worker FROM batchq.throughput_minutes") == ["new"]


def test_only_one_merges_at_a_time(conn: Conn, dsn: str) -> None:
    count(conn, completed=1)
    conn.execute("UPDATE batchq.throughput_minutes SET minute = minute - interval '2 minutes'")
    with psycopg.connect(dsn, prepare_threshold=None) as other:
        other.execute("SELECT batchq.merge_throughput()")
        assert value(conn, "SELECT batchq.merge_throughput()") == 0
        other.commit()
    assert values(conn, "SELECT worker FROM batchq.throughput_minutes") == [""]


# ----------------------------------------------------------------------------------------------------- what is lost


def test_what_could_not_be_written_is_written_later(conn: Conn, link: Link) -> None:
    counted = Throughput()
    counted.ended("default", "work", "completed", 2, [0.5])
    conn.execute("ALTER TABLE batchq.throughput_minutes RENAME TO elsewhere")
    with pytest.raises(psycopg.errors.UndefinedTable):
        counted.write(link, "worker-1")
    counted.ended("default", "work", "completed", 3, [0.5])
    conn.execute("ALTER TABLE batchq.elsewhere RENAME TO throughput_minutes")
    counted.write(link, "worker-1")
    counted.write(link, "worker-1")
    assert totals(conn) == {"work": (5, 0, 0, 0, 0)}


def test_what_may_have_been_written_is_not_written_again(
    conn: Conn, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Throughput()
    counted.ended("default", "work", "completed", 2, [0.5])
    really = link.run

    def cut_off(*given: Any) -> list[Any]:
        really(*given)
        raise OutcomeUnknown("connection lost during a transaction")

    monkeypatch.setattr(link, "run", cut_off)
    with pytest.raises(OutcomeUnknown):
        counted.write(link, "worker-1")
    monkeypatch.setattr(link, "run", really)
    counted.write(link, "worker-1")
    assert totals(conn) == {"work": (2, 0, 0, 0, 0)}


# ------------------------------------------------------------------------------------------------------ whole workers


def test_a_worker_counts_what_it_ended_and_how(conn: Conn, dsn: str) -> None:
    app = batchq.App()

    @app.handler("good")
    def good(batch: batchq.Batch) -> None:
        time.sleep(0.02)

    @app.handler("bad", backoff=batchq.Backoff(0.01))
    def bad(batch: batchq.Batch) -> None:
        raise ValueError("no")

    @app.handler("off")
    async def off(batch: batchq.Batch) -> None:
        raise Cancel("no more")

    @app.handler("own")
    def own(batch: batchq.Batch) -> None:
        with batch.transaction() as own_conn:
            own_conn.execute("SELECT 1")

    for _ in range(5):
        for kind in ("good", "off", "own"):
            insert(conn, kind=kind)
    insert(conn, kind="bad", max_attempts=3)
    with running_worker(app, dsn):
        wait_until(lambda: totals(conn).get("bad", (0, 0))[1] == 1, 20, "the last attempt to be counted")
    assert totals(conn) == {
        "good": (5, 0, 0, 0, 0),
        "bad": (0, 1, 0, 2, 0),
        "off": (0, 0, 5, 0, 0),
        "own": (5, 0, 0, 0, 0),
    }
    good_row = next(row for row in rows(conn) if row["kind"] == "good")
    assert 0.015 < good_row["run_seconds_p50"] < 1


def test_batches_that_are_not_kept_are_counted(conn: Conn, dsn: str) -> None:
    app = batchq.App()
    app.handler("work")(lambda _: None)
    for _ in range(300):
        insert(conn)
    drain(app, dsn, keep_completed="no")
    assert value(conn, "SELECT count(*) FROM batchq.all_batches") == 0
    assert totals(conn) == {"work": (300, 0, 0, 0, 0)}
    assert value(conn, "SELECT sum(n) FROM batchq.throughput_minutes, unnest(run_times) n") == 300


def test_items_are_counted_once_while_a_batch_runs_and_when_it_goes_on(conn: Conn, dsn: str) -> None:
    app = batchq.App()
    gate, waits = threading.Event(), threading.Event()

    @app.handler("import", backoff=batchq.Backoff(0.01))
    def load(batch: batchq.Batch) -> None:
        for chunk in batch.chunks(10):
            with chunk.transaction():
                pass
            if batch.items_done == 30:
                waits.set()
                gate.wait(30)
                raise ValueError("half-way")

    insert(conn, kind="import", items=list(range(50)))
    with running_worker(app, dsn):
        assert waits.wait(20)
        step("30 items are done, and the batch still runs")
        wait_until(lambda: totals(conn).get("import") == (0, 0, 0, 0, 30), 20, "the items to be counted")
        gate.set()
        wait_until(lambda: totals(conn)["import"] == (1, 0, 0, 1, 50), 20, "the end to be counted")
    assert totals(conn)["import"] == (1, 0, 0, 1, 50)


def test_a_worker_merges_the_minutes_that_are_over(conn: Conn, dsn: str) -> None:
    app = batchq.App()
    app.handler("work")(lambda _: None)
    count(conn, "gone", completed=1)
    conn.execute("UPDATE batchq.throughput_minutes SET minute = minute - interval '5 minutes'")
    with running_worker(app, dsn):
        wait_until(lambda: values(conn, "SELECT worker FROM batchq.throughput_minutes") == [""], 20, "the merge")


if __name__ == "__main__":
    run_alone(__file__)
