"""How long batches waited: counted by workers in throughput_minutes.wait_times, merged, and added up in spans."""

from typing import Any

import pytest
from psycopg.rows import dict_row

import batchq
from batchq.postgres.statements import workers
from batchq.postgres.statements.workers import Tally, Turn
from batchq.testing import drain, running_worker
from batchq.worker.throughput import Counts, Throughput
from batchq.worker.turns import Turns
from tests.component.rows import Conn, run, value, values
from tests.support.alone import run_alone
from tests.support.steps import step
from tests.support.waiting import wait_until

NOTHING = Tally("default", "work", 0, 0, 0, 0, 0, 0.0, [])
SPANS = "SELECT minutes, queue, kind, completed, failed, retried, run_times, wait_times FROM batchq.throughput_spans"


def count(conn: Conn, worker: str = "worker-1", **given: Any) -> None:
    """Count as a worker does."""
    run(conn, workers.count_throughput(worker, [NOTHING._replace(**given)]))


def shift(conn: Conn, period: str) -> None:
    """Make all that is counted so far older."""
    conn.execute("UPDATE batchq.throughput_minutes SET minute = minute - %s::interval", [period])


def spans(conn: Conn) -> list[tuple[Any, ...]]:
    """Return the spans, the shorter and earlier ones first."""
    return conn.execute(f"{SPANS} ORDER BY minutes, starts_at, queue, kind").fetchall()


def merge(conn: Conn) -> None:
    """Do what one worker does once a minute."""
    conn.execute("SELECT batchq.merge_throughput()")


# ------------------------------------------------------------------------------------------------ counted by workers


def test_waits_have_a_histogram_of_their_own() -> None:
    counted = Throughput()
    counted.ended("q", "k", "completed", 10, [0.01], [1.0, 1.0, 4.0])
    tally = counted.counts["q", "k"].tally("q", "k")
    assert [(number, times) for number, times in enumerate(tally.wait_times) if times] == [(33, 7), (37, 3)]
    assert (sum(tally.run_times), tally.run_seconds) == (10, pytest.approx(0.1))
    other = Counts()
    other.add(counted.counts["q", "k"])
    other.add(counted.counts["q", "k"])
    assert sum(other.tally("q", "k").wait_times) == 20, "counts that could not be written are added to the next ones"


def test_the_database_s_clock_is_known_from_the_first_heartbeat_on() -> None:
    assert Turns(Turn(1, 0, 0.0), 0.0).clock_ahead is None
    assert Turns(Turn(3, 2, 1_000_050.0), 50.0).clock_ahead == 1_000_000.0


def test_a_drain_counts_the_wait_of_each_batch(conn: Conn, dsn: str) -> None:
    app = batchq.App()
    app.handler("work")(lambda _: None)
    conn.execute(
        "INSERT INTO batchq.batches (kind, run_at) SELECT 'work', "
        "now() - CASE WHEN n <= 150 THEN 100 ELSE 3000 END * interval '1 s' FROM generate_series(1, 200) n"
    )
    drain(app, dsn)
    assert value(conn, "SELECT sum(n) FROM batchq.throughput_minutes, unnest(wait_times) n") == 200
    query = "SELECT max(wait_seconds_p50), max(wait_seconds_p95), max(run_seconds_p50) FROM batchq.throughput"
    p50, p95, run_p50 = conn.execute(query).fetchone() or ()
    assert p50 == pytest.approx(100, rel=0.25)
    assert p95 == pytest.approx(3000, rel=0.25)
    assert run_p50 < 1


def test_a_retry_waits_from_its_own_time_on(conn: Conn, dsn: str) -> None:
    app = batchq.App()

    @app.handler("work", backoff=batchq.Backoff(0.01))
    def fail(_: batchq.Batch) -> None:
        raise ValueError("no")

    conn.execute(
        "INSERT INTO batchq.batches (kind, run_at, max_attempts) VALUES ('work', now() - interval '1 hour', 3)"
    )
    with running_worker(app, dsn):
        wait_until(lambda: value(conn, "SELECT max(failed) FROM batchq.throughput") == 1, 20, "the last attempt")
    waits = "SELECT sum(n) FROM batchq.throughput_minutes, unnest(wait_times) WITH ORDINALITY u(n, place)"
    assert value(conn, f"{waits} WHERE place > 50") == 1, "the first attempt only"
    assert value(conn, waits) == 3


# ----------------------------------------------------------------------------------------------- merged and added up


def test_counts_add_up_in_their_row_and_when_they_are_merged(conn: Conn) -> None:
    with conn.transaction():
        count(conn, completed=3, run_times=[3], wait_times=[1, 2])
        count(conn, completed=1, run_times=[1], wait_times=[0, 0, 1])
        count(conn, "worker-2", completed=1, run_times=[1], wait_times=[1])
    assert values(conn, "SELECT wait_times FROM batchq.throughput_minutes ORDER BY worker") == [[1, 2, 1], [1]]
    shift(conn, "5 minutes")
    merge(conn)
    assert values(conn, "SELECT wait_times FROM batchq.throughput_minutes") == [[2, 2, 1]]


def test_a_worker_of_before_goes_on_and_adds_no_waits(conn: Conn) -> None:
    before = workers.COUNT_THROUGHPUT
    for text in (", wait_times", ",\n    wait_times = batchq.add_counts(t.wait_times, excluded.wait_times)"):
        before = before.replace(text, "")  # type: ignore[assignment]
    before = before.replace(", wait_times::integer[]", "").replace(", %(wait_times)s::text[]", "")  # type: ignore[assignment]
    assert "wait" not in before
    _, parameters = workers.count_throughput("old", [NOTHING._replace(completed=2, run_times=[2])])
    with conn.transaction():
        for _ in range(2):
            conn.execute(before, parameters)
        count(conn, "new", completed=1, run_times=[1], wait_times=[0, 1])
    [row] = conn.cursor(row_factory=dict_row).execute("SELECT * FROM batchq.throughput").fetchall()
    assert (row["completed"], row["wait_seconds_p50"]) == (5, pytest.approx(2**-15.75, rel=0.1))


def test_spans_have_the_sums_of_their_minutes_once_they_are_over(conn: Conn) -> None:
    count(conn, completed=3, retried=1, run_times=[0, 4], wait_times=[4])
    count(conn, kind="other", failed=2, run_times=[2], wait_times=[0, 2])
    merge(conn)
    assert spans(conn) == [], "this minute is not over"
    conn.execute(
        "UPDATE batchq.throughput_minutes "
        "SET minute = date_bin('2 hours', now(), '2000-01-01 00:00:00+00') - interval '7 hours'"
    )
    merge(conn)
    expected = [
        (minutes, "default", kind, *sums)
        for minutes in (15, 120)
        for kind, sums in (("other", (0, 2, 0, [2], [0, 2])), ("work", (3, 0, 1, [0, 4], [4])))
    ]
    assert spans(conn) == expected
    starts = values(
        conn, "SELECT DISTINCT extract(epoch FROM starts_at)::bigint % (60 * minutes) FROM batchq.throughput_spans"
    )
    assert starts == [0]
    merge(conn)
    assert spans(conn) == expected, "each span is added up once"
    step("more after a gap: what is between has no rows")
    conn.execute("UPDATE batchq.throughput_minutes SET minute = minute + interval '4 hours' WHERE kind = 'work'")
    merge(conn)
    assert spans(conn) == [*expected[:2], expected[1], *expected[2:], expected[3]]


def test_a_week_of_an_older_version_is_added_up_within_some_calls(conn: Conn) -> None:
    conn.execute(
        "INSERT INTO batchq.throughput_minutes (minute, queue, kind, worker, completed, failed, cancelled, retried, "
        "items, run_seconds, run_times) SELECT date_trunc('minute', now()) - n * interval '5 minutes', 'q', 'k', '', "
        "1, 0, 0, 0, 0, 1.0, '{1}' FROM generate_series(1, 2015) n"
    )
    calls = 0
    while value(conn, "SELECT batchq.add_up_throughput()"):
        calls += 1
        assert calls < 20
        late = "(SELECT max(starts_at) < now() - interval '5 hours' FROM batchq.throughput_spans WHERE minutes = 120)"
        quarters = value(conn, "SELECT count(*) FROM batchq.throughput_spans WHERE minutes = 15")
        assert not (quarters and value(conn, f"SELECT {late}")), "the quarters begin where the hours end"
    found = dict(
        conn.execute("SELECT minutes, sum(completed)::integer FROM batchq.throughput_spans GROUP BY 1").fetchall()
    )
    assert 2 * 24 * 12 - 12 <= found[15] <= 2 * 24 * 12 + 3
    assert 2015 - 3 * 24 <= found[120] <= 2015


def test_spans_are_kept_for_two_days_and_for_a_week(conn: Conn) -> None:
    for minutes in (15, 120):
        conn.execute(
            "INSERT INTO batchq.throughput_spans SELECT %s, now() - n * interval '1 day 1 minute', 'q', 'k', 1, 0, 0, "
            "0, 0, 1, '{1}', '{1}' FROM generate_series(0, 9) n",
            [minutes],
        )
    merge(conn)
    query = "SELECT minutes, count(*) FROM batchq.throughput_spans GROUP BY 1 ORDER BY 1"
    assert conn.execute(query).fetchall() == [(15, 2), (120, 7)]


def test_only_the_owner_may_add_up(conn: Conn) -> None:
    query = "SELECT proacl::text FROM pg_proc WHERE proname = 'add_up_throughput'"
    assert value(conn, query).count("=X/") == 1, "its owner; others call batchq.merge_throughput"


if __name__ == "__main__":
    run_alone(__file__)
