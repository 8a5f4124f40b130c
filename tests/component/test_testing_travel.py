"""batchq.testing.travel: what would be due later is due now; every time of the tables moves."""

import asyncio
from datetime import timedelta
from typing import Any

import psycopg
import pytest

import batchq
from batchq.errors import InvalidInput
from batchq.testing import Drained, drain, running_worker, travel, travel_async
from tests.component.rows import value
from tests.support.alone import run_alone
from tests.support.batches import look, put, values
from tests.support.waiting import wait_until

DAY = 86_400


def app_of(*kinds: str) -> batchq.App:
    """Return an app whose handlers do nothing."""
    app = batchq.App()
    for kind in kinds:
        app.handler(kind)(lambda _: None)
    return app


def test_what_is_scheduled_is_due(conn: psycopg.Connection) -> None:
    batch_id = put(conn, "work", delay_seconds=3600)
    before = look(conn, batch_id)
    travel(conn, 3599)
    assert look(conn, batch_id).shown == "scheduled"
    travel(conn, 2)
    after = look(conn, batch_id)
    assert after.shown == "ready"
    assert before.run_at - after.run_at == before.created_at - after.created_at == timedelta(seconds=3601)


def test_finished_batches_move_to_the_partition_of_their_day_and_expire(dsn: str, conn: psycopg.Connection) -> None:
    put(conn, "work")
    put(conn, "bad", max_attempts=1)
    app = app_of("work")

    @app.handler("bad")
    def bad(batch: batchq.Batch) -> None:
        raise ValueError

    drain(app, dsn, raises=False)
    assert values(conn, "SELECT finished_at > now() - interval '1 hour' FROM batchq.all_batches") == [True, True]
    travel(conn, DAY)
    partitions = "SELECT tableoid::regclass::text FROM batchq.batches_finished"
    conn.execute("SELECT batchq.create_finished_partitions((now() AT TIME ZONE 'UTC')::date - 2, 1)")
    assert set(values(conn, partitions)) == {"batchq.finished_default"}, "there is none for yesterday"
    travel(conn, DAY)
    assert set(values(conn, partitions)) == {
        value(conn, "SELECT 'batchq.finished_' || to_char((now() AT TIME ZONE 'UTC')::date - 2, 'YYYYMMDD')")
    }
    conn.execute("SELECT batchq.prune('2 days')")
    assert value(conn, "SELECT count(*) FROM batchq.all_batches") == 2
    travel(conn, 2 * DAY)
    conn.execute("SELECT batchq.prune('2 days')")
    assert value(conn, "SELECT count(*) FROM batchq.all_batches") == 0


def test_snoozed_items_throttles_and_pauses_are_over(conn: psycopg.Connection) -> None:
    app = batchq.App()
    snoozed: list[Any] = []

    @app.item_handler("items")
    def work(item: Any) -> None:
        if item not in snoozed:
            snoozed.append(item)
            raise batchq.Snooze(3600)

    batch_id = put(conn, "items", items=[1, 2])
    assert drain(app, conn) == Drained(snoozed=1)
    conn.execute("SELECT batchq.throttle('default', 'items', NULL, 3600)")
    conn.execute("SELECT batchq.pause(queue => 'default', until => now() + interval '1 hour')")
    travel(conn, 3601)
    assert drain(app, conn) == Drained(completed=1)
    assert look(conn, batch_id).items_done == 2


def test_a_lease_expires_and_another_worker_takes_over(dsn: str, conn: psycopg.Connection) -> None:
    put(conn, "work")
    conn.execute(
        "UPDATE batchq.batches SET status = 'processing', attempt = 1, claimed_by = 'dead', claimed_at = now(), "
        "claim_token = gen_random_uuid(), lease_expires_at = now() + interval '1 hour'"
    )
    travel(conn, 3601)
    with running_worker(app_of("work"), dsn):
        wait_until(lambda: values(conn, "SELECT status FROM batchq.all_batches") == ["completed"], 10, "the rescue")
    assert values(conn, "SELECT attempt FROM batchq.all_batches") == [2]


def test_a_schedule_is_due(dsn: str, conn: psycopg.Connection) -> None:
    app = app_of("nightly")
    app.schedule("0 2 * * *")(app.handlers["nightly"].function)
    done = "SELECT count(*) FROM batchq.all_batches WHERE status = 'completed'"
    with running_worker(app, dsn):
        known = "SELECT next_at IS NOT NULL FROM batchq.schedules"
        wait_until(lambda: values(conn, known) == [True], 10, "the next time to be known")
        for days in (1, 2):
            travel(conn, DAY)
            wait_until(lambda days=days: value(conn, done) == days, 10, "the batch of the day")  # type: ignore[misc]


def test_all_times_of_the_tables_move_or_are_known_to_stay(conn: psycopg.Connection) -> None:
    """A column that a later migration adds is noticed here."""
    columns = values(
        conn,
        "SELECT table_name || '.' || column_name FROM information_schema.columns WHERE table_schema = 'batchq' "
        "AND data_type LIKE 'timestamp%%' AND table_name IN (SELECT relname FROM pg_class WHERE relkind = 'r') "
        "AND table_name !~ '^finished_' ORDER BY 1",
    )
    from batchq.postgres.statements.testing import TRAVEL

    stay = {
        "batches_live.finished_at", "batches_refused", "declared_limits.declared_at", "migrations.applied_at",
        "positions.at", "positions.checked_at", "positions.moved_at", "schedules.declared_at", "split_queues.split_at",
        "throughput_minutes.minute", "throughput_spans.starts_at", "workers.drain_asked_at", "workers.heartbeat_at",
        "workers.started_at",
    }  # fmt: skip
    moved = {}
    for part in TRAVEL.split("UPDATE batchq.")[1:]:
        table, _, rest = part.partition("\n")
        moved[table] = rest.partition("FROM given")[0]
    for column in columns:
        table, _, name = column.partition(".")
        is_moved = f"{name} = {name} - span" in moved.get(table, "")
        assert is_moved != (column in stay or table in stay), column


def test_it_is_one_transaction_and_the_callers(dsn: str, conn: psycopg.Connection) -> None:
    put(conn, "work", delay_seconds=60)
    with psycopg.connect(dsn) as own:
        travel(own, 61)
        own.rollback()
    assert values(conn, "SELECT run_at > now() FROM batchq.all_batches") == [True]

    async def test() -> None:
        async with await psycopg.AsyncConnection.connect(dsn) as own:
            await travel_async(own, 61)

    asyncio.run(test())
    assert values(conn, "SELECT run_at > now() FROM batchq.all_batches") == [False]


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e12, "1"])
def test_other_than_forward_is_refused(conn: psycopg.Connection, seconds: Any) -> None:
    with pytest.raises(InvalidInput, match="travel takes a number of seconds over 0"):
        travel(conn, seconds)


if __name__ == "__main__":
    run_alone(__file__)
