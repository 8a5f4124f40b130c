"""Retention: a partition a day, whole days dropped, and never a wait for a lock."""

import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import psycopg
import pytest

from batchq import App, Settings
from batchq.postgres.statements import maintenance
from batchq.settings import MAX_KEEP_FINISHED_DAYS
from batchq.worker.worker import Worker
from tests.component.rows import KIND, Conn, batch, finished, insert, value, values
from tests.support.alone import run_alone
from tests.support.commands import CommandLine
from tests.support.steps import step
from tests.support.waiting import wait_until

PARTITIONS = """
SELECT c.relname
FROM pg_inherits i
JOIN pg_class c ON c.oid = i.inhrelid
WHERE i.inhparent = 'batchq.batches_finished'::regclass
ORDER BY c.relname
"""
TODAY = "(now() AT TIME ZONE 'UTC')::date"
WHERE = "SELECT tableoid::regclass::text FROM batchq.batches_finished WHERE id = %s"


@pytest.fixture(autouse=True)
def no_partitions(conn: Conn) -> None:
    """Drop the partitions that the migration made for its first days."""
    for partition in values(conn, PARTITIONS):
        if partition != "finished_default":
            conn.execute(f"DROP TABLE batchq.{partition}".encode())


def create(conn: Conn, days_ago: int, days: int | None = 1) -> int:
    """Create partitions of *days* days from *days_ago* on; return how many."""
    return value(conn, f"SELECT batchq.create_finished_partitions({TODAY} - %s, %s)", [days_ago, days])


def name(conn: Conn, days_ago: int) -> str:
    """Return the name of the partition of a day."""
    return value(conn, f"SELECT 'finished_' || to_char({TODAY} - %s, 'YYYYMMDD')", [days_ago])


def prune(conn: Conn, days: float) -> int:
    """Prune as the keeper does."""
    with conn.transaction():
        return maintenance.prune(conn, days)


def ended(conn: Conn, days_ago: int) -> int:
    """Return the id of a batch that ended in the last second of a day."""
    batch_id = finished(conn)
    conn.execute(
        f"UPDATE batchq.batches_finished SET finished_at = ({TODAY} - %s + 1) AT TIME ZONE 'UTC' - interval '1 second' "
        "WHERE id = %s".encode(),
        [days_ago, batch_id],
    )
    return batch_id


# ------------------------------------------------------------------------------------------------------- partitions


def test_the_missing_days_are_created_once(conn: Conn) -> None:
    with conn.transaction():
        assert maintenance.create_finished_partitions(conn, 3) == 3
    with conn.transaction():
        assert maintenance.create_finished_partitions(conn, 5) == 2
    with conn.transaction():
        assert maintenance.create_finished_partitions(conn, 5) == 0
    assert values(conn, PARTITIONS) == [*(name(conn, -ahead) for ahead in range(5)), "finished_default"]


def test_a_batch_that_ends_today_lies_in_the_partition_of_today(conn: Conn) -> None:
    step("and with tomorrow's there, also when midnight comes in between")
    create(conn, 0, 2)
    place = value(conn, WHERE, [finished(conn)])
    assert place in (f"batchq.{name(conn, 0)}", f"batchq.{name(conn, 1)}")


def test_a_batch_that_ends_on_a_day_without_a_partition_lies_in_the_default_one(conn: Conn) -> None:
    batch_id = finished(conn)
    assert value(conn, WHERE, [batch_id]) == "batchq.finished_default"
    assert batch(conn, batch_id)["status"] == "completed"


@pytest.mark.parametrize("zone", ["Pacific/Auckland", "America/Los_Angeles"])
def test_a_day_is_one_of_utc_whatever_the_time_zone_of_the_session(conn: Conn, zone: str) -> None:
    with conn.transaction():
        conn.execute("SELECT set_config('TimeZone', %s, true)", [zone])
        assert value(conn, "SELECT batchq.create_finished_partitions('2031-05-06', 1)") == 1
    with conn.transaction():
        conn.execute("SELECT set_config('TimeZone', 'UTC', true)")
        bounds = value(
            conn, "SELECT pg_get_expr(relpartbound, oid) FROM pg_class WHERE oid = 'batchq.finished_20310506'::regclass"
        )
    assert bounds == "FOR VALUES FROM ('2031-05-06 00:00:00+00') TO ('2031-05-07 00:00:00+00')"


@pytest.mark.parametrize("days", [-1, 0, 401, 2_000_000_000, None])
def test_one_call_makes_partitions_for_1_to_400_days(conn: Conn, days: int | None) -> None:
    with pytest.raises(psycopg.errors.RaiseException, match="days must be between 1 and 400, not"):
        create(conn, 0, days)
    assert values(conn, PARTITIONS) == ["finished_default"]


def test_a_day_whose_batches_lie_in_the_default_partition_is_left_there(conn: Conn) -> None:
    batch_id = ended(conn, 3)
    assert create(conn, 4, 3) == 2
    assert values(conn, PARTITIONS) == [name(conn, 4), name(conn, 2), "finished_default"]
    assert value(conn, "SELECT to_regclass(%s)", [f"batchq.{name(conn, 3)}"]) is None, "nothing is left of the try"
    assert value(conn, WHERE, [batch_id]) == "batchq.finished_default"


def test_a_partition_has_the_indexes_and_checks_of_its_parent(conn: Conn) -> None:
    create(conn, 0)
    indexes = "SELECT count(*) FROM pg_indexes WHERE schemaname = 'batchq' AND tablename = %s"
    assert value(conn, indexes, [name(conn, 0)]) == value(conn, indexes, ["batches_finished"]) > 0
    checks = "SELECT count(*) FROM pg_constraint WHERE contype = 'c' AND conrelid = %s::regclass"
    assert value(conn, checks, [f"batchq.{name(conn, 0)}"]) == value(conn, checks, ["batchq.batches"]) > 0


# ------------------------------------------------------------------------------------------------------------ prune


def test_only_days_that_lie_wholly_before_are_dropped(conn: Conn) -> None:
    for days_ago in (40, 31, 30, 29, 0):
        create(conn, days_ago)
    kept, gone = ended(conn, 30), ended(conn, 31)
    assert prune(conn, 30) == 2
    assert values(conn, PARTITIONS) == [*(name(conn, days_ago) for days_ago in (30, 29, 0)), "finished_default"]
    assert values(conn, "SELECT id FROM batchq.all_batches WHERE id = ANY (%s)", [[kept, gone]]) == [kept]
    assert prune(conn, 30) == 0


def test_live_batches_are_never_pruned_however_old(conn: Conn) -> None:
    batch_id = insert(conn)
    conn.execute("UPDATE batchq.batches SET created_at = '2001-01-01', run_at = '2001-01-01'")
    prune(conn, 0)
    assert batch(conn, batch_id)["status"] == "pending"


def test_old_rows_of_the_default_partition_go_with_the_days(conn: Conn) -> None:
    kept, gone = ended(conn, 30), ended(conn, 31)
    assert prune(conn, 30) == 0
    assert values(conn, "SELECT id FROM batchq.all_batches WHERE id = ANY (%s)", [[kept, gone]]) == [kept]


def fail_an_item(conn: Conn, batch_id: int, days_ago: int) -> None:
    """Record a failed item of a batch, *days_ago*."""
    conn.execute(
        "INSERT INTO batchq.failed_items (queue, batch_id, item_index, item, error, attempt, failed_at) "
        "VALUES ('default', %s, 0, '1', 'no', 1, now() - %s * interval '1 day')",
        [batch_id, days_ago],
    )


def test_failed_items_go_with_their_batch_and_not_before(conn: Conn) -> None:
    create(conn, 40)
    gone, kept, live = ended(conn, 40), ended(conn, 5), insert(conn)
    for batch_id in (gone, kept, live):
        fail_an_item(conn, batch_id, 40)
    assert prune(conn, 30) == 1
    assert values(conn, "SELECT batch_id FROM batchq.failed_items ORDER BY 1") == [kept, live]


LOCKS = "SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid()"


def test_old_days_are_dropped_a_few_in_each_transaction_the_oldest_first(conn: Conn) -> None:
    create(conn, 65, 60)
    steps = []
    while not steps or steps[-1]:
        with conn.transaction():
            steps.append(maintenance.prune(conn, 30))
            assert value(conn, LOCKS) < 800, "of 6,400 that a server has room for by default"
        assert values(conn, PARTITIONS)[0] == name(conn, max(30, 65 - sum(steps)))
    assert steps == [10, 10, 10, 5, 0]


def test_the_command_drops_all_that_is_old(conn: Conn, dsn: str, tmp_path: Path) -> None:
    create(conn, 65, 60)
    ended = CommandLine(dsn, tmp_path)("prune", "--older-than-days", "30")
    assert (ended.code, ended.out) == (0, "dropped 35 daily partitions\n"), ended.err
    assert values(conn, PARTITIONS)[0] == name(conn, 30)


def test_a_worker_drops_all_that_is_old_within_one_maintenance(conn: Conn, dsn: str) -> None:
    create(conn, 55, 20)
    app = App()
    app.handler(KIND)(print)
    worker = Worker(app, Settings.load(dsn=dsn, keep_finished_days=30))
    running = Thread(target=worker.run)
    running.start()
    try:
        wait_until(lambda: values(conn, PARTITIONS)[0] > name(conn, 31), 20, "all steps")
    finally:
        worker.stop()
        running.join(20)


def test_as_many_days_as_may_be_kept_leave_room_for_three_looks_over_all_of_them(conn: Conn) -> None:
    create(conn, 9, 10)
    days = value(conn, "SELECT count(*) FROM pg_inherits WHERE inhparent = 'batchq.batches_finished'::regclass")
    with conn.transaction():
        conn.execute("SELECT FROM batchq.batches_finished WHERE id = 1")
        each_day = (value(conn, LOCKS) - 10) / days  # less those of the tables above, and of pg_locks
    step("%s locks a day", each_day)
    default_room = 64 * 100
    assert 3 * each_day * (MAX_KEEP_FINISHED_DAYS + 10) <= default_room


def test_a_negative_age_is_refused(conn: Conn) -> None:
    with pytest.raises(psycopg.errors.RaiseException, match=r"batchq.prune: older_than must be zero or more, not -"):
        conn.execute("SELECT batchq.prune(interval '-1 day')")


def test_today_stays_even_if_nothing_is_to_be_kept(conn: Conn) -> None:
    create(conn, 0, 2)
    batch_id = finished(conn)
    assert prune(conn, 0) == 0
    assert batch(conn, batch_id)["kind"] == KIND


# ------------------------------------------------------------------------------------------------------------ locks

MAINTENANCE: list[tuple[str, Callable[[Conn], Any]]] = [
    ("SELECT FROM batchq.batches_finished", lambda conn: maintenance.prune(conn, 30)),
    ("SELECT FROM batchq.batches_finished", lambda conn: maintenance.create_finished_partitions(conn, 2)),
]


@pytest.mark.parametrize(("report", "maintain"), MAINTENANCE, ids=["prune", "create"])
def test_maintenance_gives_up_rather_than_stand_in_the_queue_for_a_lock(
    conn: Conn, dsn: str, report: str, maintain: Callable[[Conn], Any]
) -> None:
    create(conn, 40)
    with psycopg.connect(dsn, prepare_threshold=None) as reader:
        step("somebody reads the finished batches, in a transaction that stays open")
        reader.execute(report.encode())
        began_at = time.monotonic()
        with pytest.raises(psycopg.errors.LockNotAvailable), conn.transaction():
            maintain(conn)
        assert time.monotonic() - began_at < 2
        step("meanwhile batches finish as ever")
        finished(conn)
    with conn.transaction():
        assert maintain(conn) > 0, "later it works"


@pytest.mark.parametrize(
    "maintain",
    ["SELECT batchq.prune('30 days')", f"SELECT batchq.create_finished_partitions({TODAY}, 1)"],
    ids=["prune", "create"],
)
def test_who_comes_to_maintenance_beside_another_waits_and_then_finds_it_done(
    conn: Conn, dsn: str, admin_dsn: str, maintain: str
) -> None:
    create(conn, 40)
    found: list[int] = []
    with psycopg.connect(dsn, prepare_threshold=None) as first:
        assert value(first, maintain) == 1
        second = Thread(target=lambda: found.append(value(conn, maintain)))
        second.start()
        with psycopg.connect(admin_dsn, autocommit=True) as admin:
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
            wait_until(lambda: value(admin, waiting), 10, "the second to wait")
        first.commit()
        second.join(10)
    assert found == [0]


def test_maintenance_bounds_its_waits_to_100_ms_until_the_end_of_its_transaction(conn: Conn) -> None:
    for maintain in (lambda: maintenance.prune(conn, 30), lambda: maintenance.create_finished_partitions(conn, 1)):
        with conn.transaction():
            maintain()
            assert value(conn, "SELECT current_setting('lock_timeout')") == "100ms"
        assert value(conn, "SELECT current_setting('lock_timeout')") == "0"


if __name__ == "__main__":
    run_alone(__file__)
