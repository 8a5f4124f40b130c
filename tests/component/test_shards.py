"""Shards: a queue that is split is stored in several, and stays one queue to producers, limits and people."""

import threading
import time
from collections import Counter, defaultdict
from itertools import pairwise
from typing import Any

import psycopg
import pytest

import batchq
from batchq.errors import ConfigError
from batchq.operate.invariants import violations
from batchq.testing import running_worker
from tests.component.rows import finished
from tests.component.test_keys import AT_ONCE, Recorder, app_of
from tests.support.alone import run_alone
from tests.support.batches import drain, failed_items, look, put, register_items, values
from tests.support.databases import holding_snapshot
from tests.support.processes import Processes
from tests.support.roles import role_for
from tests.support.waiting import wait_until

Conn = psycopg.Connection[Any]
SHARD_OF_KEY = "SELECT DISTINCT queue FROM batchq.batches WHERE key = %s"
SPLITS = "SELECT batchq.split_queue(%s, %s)"


def split(conn: Conn, shards: int, queue: str = "mail") -> None:
    """Split a queue."""
    conn.execute(SPLITS, [queue, shards])


def by_shard(conn: Conn) -> Counter[str]:
    """Return how many batches are stored in each queue."""
    return Counter(values(conn, "SELECT queue FROM batchq.batches"))


def broken(conn: Conn) -> list[str]:
    """Return the invariants of batches that are violated."""
    return [violation.what for violation in violations(conn) if not violation.invariant.startswith("migrations_")]


def fill(conn: Conn, shards: int) -> list[int]:
    """Put 32 batches into each of so many shards; return the ids."""
    conn.execute("SELECT setval('batchq.batches_id_seq', (last_value / 32 + 1) * 32 - 1) FROM batchq.batches_id_seq")
    batchq.enqueue_many(conn, "work", [{}] * 32 * shards, queue="mail")
    return values(conn, "SELECT id FROM batchq.batches_live ORDER BY id DESC LIMIT %s", 32 * shards)


def keys_on(conn: Conn, shard: str, count: int) -> list[str]:
    """Return *count* keys that belong on a shard."""
    known = "SELECT 'k' || n AS key FROM generate_series(1, 2000) n"
    query = f"SELECT key FROM ({known}) k WHERE batchq.shard_of('mail', key) = %s LIMIT %s"
    return values(conn, query, shard, count)


# ------------------------------------------------------------------------------------- where batches go


def test_a_database_without_a_split_queue_has_neither_trigger_nor_index_for_shards(conn: Conn) -> None:
    triggers = "SELECT tgname FROM pg_trigger WHERE tgfoid = 'batchq.choose_shard'::regproc"
    indexes = "SELECT relname FROM pg_class WHERE relname LIKE 'batches_live_unique_key_%%'"
    assert values(conn, triggers) == values(conn, indexes.replace("%%", "%")) == []
    split(conn, 2)
    assert len(values(conn, triggers)) == len(values(conn, indexes.replace("%%", "%"))) == 1


@pytest.mark.parametrize("by", ["INSERT", "COPY"])
def test_batches_without_a_key_are_spread_evenly_and_those_of_a_key_are_together(conn: Conn, by: str) -> None:
    split(conn, 8)
    count = 8 * 32 * (5 if by == "COPY" else 1)
    batchq.enqueue_many(conn, "work", [{}] * count, queue="mail")
    counts = by_shard(conn)
    assert set(counts) == {"mail", *(f"mail#{n}" for n in range(1, 8))}
    assert max(counts.values()) - min(counts.values()) <= 32, "32 ids in a row"
    batchq.enqueue_many(conn, "work", list(range(400)), queue="mail", key=lambda number: f"k{number % 40}")
    assert all(len(values(conn, SHARD_OF_KEY, f"k{number}")) == 1 for number in range(40))
    assert len(values(conn, "SELECT DISTINCT queue FROM batchq.batches WHERE key IS NOT NULL")) > 4


def test_a_split_spreads_also_where_citus_is_installed_for_other_tables(conn: Conn, admin_dsn: str) -> None:
    with psycopg.connect(admin_dsn, autocommit=True) as admin:
        admin.execute("SET allow_system_table_mods = on")
        admin.execute("CREATE TABLE pg_catalog.pg_dist_partition (logicalrelid regclass)")
    split(conn, 4)
    fill(conn, 4)
    assert len(by_shard(conn)) == 4


def test_other_queues_keep_their_batches_also_with_a_number_sign(conn: Conn) -> None:
    put(conn, "work", queue="mail2#1")
    split(conn, 4)
    for queue in ("default", "mail2", "mail2#1", "mail#64", "mail#x", "#mail"):
        put(conn, "work", queue=queue)
        assert values(conn, "SELECT batchq.whole_queue(%s)", queue) == [queue]
    assert by_shard(conn) == {"default": 1, "mail2": 1, "mail2#1": 2, "mail#64": 1, "mail#x": 1, "#mail": 1}


def test_a_unique_key_stays_unique_also_after_a_shard_was_added(conn: Conn) -> None:
    put(conn, "work", queue="mail", unique_key="before")
    split(conn, 2)
    for number in range(20):
        put(conn, "work", queue="mail", unique_key=f"u{number}")
    split(conn, 7)
    for unique_key in ("before", *(f"u{number}" for number in range(20))):
        assert batchq.enqueue(conn, "work", queue="mail", unique_key=unique_key) is None
        assert batchq.enqueue(conn, "work", queue="mail", unique_key=unique_key, key="k") is None
    put(conn, "other", queue="mail", unique_key="u1")
    put(conn, "work", queue="default", unique_key="u1")


def test_a_key_with_live_batches_stays_on_its_shard_until_a_split_without_any(conn: Conn) -> None:
    first = put(conn, "work", queue="mail", key="old")
    split(conn, 8)
    put(conn, "work", queue="mail", key="old")
    assert values(conn, SHARD_OF_KEY, "old") == ["mail"]
    moved = [n for n in range(9, 65) if values(conn, "SELECT batchq.shard_number('old', %s)", n) != [0]]
    split(conn, moved[0])
    assert values(conn, SHARD_OF_KEY, "old") == ["mail"], "it still has live batches"
    conn.execute("SELECT count(batchq.cancel(id)) FROM batchq.batches_live")
    split(conn, moved[1])
    last = put(conn, "work", queue="mail", key="old")
    assert values(conn, "SELECT key FROM batchq.shard_pins") == []
    assert look(conn, last).queue == values(conn, "SELECT batchq.shard_of('mail', 'old')")[0] != "mail"
    conn.execute("SELECT batchq.retry(%s)", [first])
    assert look(conn, first).queue == look(conn, last).queue, "a retry joins the batches of its key"


def test_a_retry_on_a_shard_that_is_not_the_first_joins_its_key_after_a_split(conn: Conn) -> None:
    split(conn, 4)
    numbers = "batchq.shard_number('k' || n, 4) = 1 AND batchq.shard_number('k' || n, 5) = 2"
    key = values(conn, f"SELECT 'k' || n FROM generate_series(1, 999) n WHERE {numbers}")[0]
    batch_id = put(conn, "work", queue="mail", key=key)
    assert look(conn, batch_id).queue == "mail#1"
    conn.execute("SELECT batchq.cancel(%s)", [batch_id])
    split(conn, 5)
    conn.execute("SELECT batchq.retry(%s)", [batch_id])
    assert look(conn, batch_id).queue == "mail#2"


def test_failed_items_come_along_when_a_retry_comes_to_another_shard(conn: Conn, dsn: str) -> None:
    app = batchq.App()
    fails = [True]
    register_items(app, "def", "items", lambda item, _: 1 / 0 if fails[0] and item == 1 else None)
    split(conn, 2)
    key = keys_on(conn, "mail", 1)[0]
    other = put(conn, "items", queue="mail", items=[0, 1, 2], key=key, max_attempts=1)
    one = put(conn, "items", queue="mail", items=[0, 1, 2], max_attempts=1)
    drain(app, dsn, queues=["mail"])
    shards = next(n for n in range(3, 65) if values(conn, "SELECT batchq.shard_number(%s, %s)", key, n) != [0])
    split(conn, shards)
    fails.clear()
    fails.append(False)
    for batch_id in (one, other):
        conn.execute("SELECT batchq.retry_items(%s)", [batch_id])
        assert [item.queue for item in failed_items(conn, batch_id)] == [look(conn, batch_id).queue]
    assert look(conn, other).queue != "mail"
    drain(app, dsn, queues=["mail"])
    assert {look(conn, batch_id).status for batch_id in (one, other)} == {"completed"}
    assert broken(conn) == []


# ------------------------------------------------------------------------------------------------------------ to split


def test_an_older_snapshot_cannot_enqueue_with_a_key_since_it_does_not_see_the_pins(conn: Conn, dsn: str) -> None:
    put(conn, "work", queue="mail", key="k")
    split(conn, 2)
    with psycopg.connect(dsn) as other, holding_snapshot(dsn):
        other.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        other.execute("SELECT 1")
        split(conn, 9)
        put(other, "work", queue="mail")
        with pytest.raises(psycopg.errors.SerializationFailure, match="was split after this transaction began"):
            put(other, "work", queue="mail", key="k")
        other.rollback()
        put(other, "work", queue="mail", key="k")


def test_a_split_that_meets_a_long_transaction_gives_up_after_a_second_and_has_changed_nothing(
    conn: Conn, dsn: str
) -> None:
    with psycopg.connect(dsn) as producer:
        put(producer, "work", queue="mail", key="k")
        with pytest.raises(psycopg.errors.LockNotAvailable, match='queue "mail" cannot be split now'):
            split(conn, 2)
        assert values(conn, "SELECT queue FROM batchq.split_queues") == []
        producer.commit()
    split(conn, 2)
    assert values(conn, "SELECT batchq.shard_of('mail', 'k')") == values(conn, SHARD_OF_KEY, "k")


def test_what_cannot_be_split_is_refused_with_the_reason(conn: Conn) -> None:
    def refused(queue: str, shards: int | None, reason: str) -> None:
        with pytest.raises(psycopg.errors.RaiseException, match=reason):
            conn.execute(SPLITS, [queue, shards])

    for shards in (0, 1, 65, None):
        refused("mail", shards, "2 to 64 shards")
    split(conn, 3)
    split(conn, 3)  # changes nothing
    refused("mail", 2, 'queue "mail" has 3 shards: their number cannot shrink to 2')
    refused("mail#2", 2, 'queue "mail#2" is a shard of queue "mail"')
    put(conn, "work", queue="live#1")
    refused("live", 2, 'live batches are in queue "live#1"')
    conn.execute("INSERT INTO batchq.limits (queue, max_running) VALUES ('limited#63', 1)")
    refused("limited", 2, 'a limit is for queue "limited#63"')
    conn.execute("SELECT batchq.pause('paused#7')")
    refused("paused", 2, 'a pause is for queue "paused#7"')
    conn.execute("INSERT INTO batchq.throttles (queue, until) VALUES ('throttled#1', now() + interval '1 hour')")
    refused("throttled", 2, 'a throttle is for queue "throttled#1"')
    conn.execute("SELECT batchq.set_schedule('tick', '@every 1h', 'work', queue => 'scheduled#2')")
    refused("scheduled", 2, 'a schedule is for queue "scheduled#2"')
    conn.execute(
        "INSERT INTO batchq.workers (id, hostname, pid, version, queues, kinds, concurrency) "
        "VALUES ('w', 'h', 1, '1', '{served#3}', '{work}', 1)"
    )
    refused("served", 2, 'worker w serves queue "served#3"')
    finished(conn, "failed", queue="failed#4", error='{"error": "no"}')
    refused("failed", 2, 'failed batches are in queue "failed#4"')
    split(conn, 2, "split#5")
    refused("split", 2, 'it would rename the split queue "split#5"')
    refused("q" * 126, 2, "1 to 125 bytes")
    with conn.transaction():
        conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        with pytest.raises(psycopg.errors.RaiseException, match="READ COMMITTED"), conn.transaction():
            split(conn, 4)


def test_a_key_is_never_on_two_shards_however_splits_and_enqueues_meet(conn: Conn, dsn: str) -> None:
    done = threading.Event()
    counts: list[int] = []

    def enqueue(number: int) -> None:
        with psycopg.connect(dsn, autocommit=True) as producer:
            count = 0
            while not done.is_set():
                with producer.transaction():
                    for part in range(5):
                        put(producer, "work", queue="mail", key=f"k{(count + part * 7 + number) % 50}")
                count += 5
            counts.append(count)

    threads = [threading.Thread(target=enqueue, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for shards in range(2, 42, 4):
        if shards % 8 == 2:  # else all keys stay where they were
            conn.execute("DELETE FROM batchq.batches_live WHERE queue = ANY (batchq.shards_of('mail'))")
        split(conn, shards)
    done.set()
    for thread in threads:
        thread.join()
    assert values(conn, "SELECT max(id) FROM batchq.batches_live") >= [1]
    assert broken(conn) == []
    assert len(by_shard(conn)) > 4


def test_the_command_splits_lists_and_refuses(conn: Conn, dsn: str, tmp_path: Any) -> None:
    del tmp_path
    with Processes(dsn, "tests.e2e.apps:app") as processes:
        run = processes.command("split", "mail", "4", "--reason", "busy")
        assert run.wait() == 0
        assert "queue mail has 4 shards: mail to mail#3" in run.output()
        run = processes.command("split", "mail")
        assert run.wait() == 0
        assert run.output() == "queue mail has 4 shards: mail to mail#3\n"
        run = processes.command("split", "mail", "2")
        assert run.wait() == 1
        assert "cannot shrink" in run.text()
    audit = conn.execute("SELECT verb, queue, details ->> 'shards', reason FROM batchq.audit").fetchall()
    assert audit == [("split_queue", "mail", "4", "busy")]


def test_the_command_tries_for_longer_than_a_transaction_may_take(conn: Conn, dsn: str) -> None:
    with Processes(dsn, "tests.e2e.apps:app") as processes, psycopg.connect(dsn) as producer:
        batchq.enqueue(producer, "work", queue="mail")
        run = processes.run("split", "mail", "4", database_timeout_seconds=2)
        blocked = "SELECT count(*) FROM batchq.split_queues"
        until = time.monotonic() + 4
        wait_until(lambda: time.monotonic() > until, 20, "more than the time of one transaction")
        assert (run.is_running, values(conn, blocked)) == (True, [0])
        producer.rollback()
        assert run.wait() == 0, run.text()
    assert values(conn, blocked) == [1]


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT batchq.pause('mail#2')",
        "SELECT batchq.set_limit('mail#2', max_running => 3)",
        "INSERT INTO batchq.limits (queue, max_running) VALUES ('mail#2', 3)",
        "SELECT batchq.set_schedule('nightly', '0 2 * * *', 'work', queue => 'mail#2')",
    ],
)
def test_what_is_of_the_whole_is_refused_for_a_shard(conn: Conn, statement: str) -> None:
    conn.execute("SELECT batchq.split_queue('mail', 4)")
    with pytest.raises(psycopg.errors.CheckViolation, match='queue "mail#2" is a shard of queue "mail"'):
        conn.execute(statement.encode())
    conn.execute(statement.replace("#2", "#64").encode())  # can be no shard


# -------------------------------------------------------------------------------------------------------------- workers


def test_a_worker_serves_all_shards_and_its_handlers_see_the_whole_queue(conn: Conn, dsn: str) -> None:
    split(conn, 8)
    queues: list[str] = []
    for number in range(40):
        put(conn, "work", queue="mail", key=f"k{number}" if number % 2 else None)
    drain(app_of(lambda batch: queues.append(batch.queue)), dsn, queues=["mail"])
    assert queues == ["mail"] * 40
    assert values(conn, "SELECT DISTINCT queue FROM batchq.throughput_minutes") == ["mail"]


def test_a_worker_that_is_to_serve_a_shard_alone_is_refused(conn: Conn, dsn: str) -> None:
    split(conn, 4)
    with pytest.raises(ConfigError, match="queue 'mail#2' is a shard of queue 'mail'; let the worker serve 'mail'"):
        drain(app_of(lambda _: None), dsn, queues=["mail#2"])
    drain(app_of(lambda _: None), dsn, queues=["mail#64", "other#2"])


def test_shards_that_are_added_while_it_runs_are_served_within_seconds(conn: Conn, dsn: str) -> None:
    ran: list[int] = []
    with running_worker(app_of(lambda batch: ran.append(batch.id)), dsn, queues=["mail:2"]):
        put(conn, "work", queue="mail")
        wait_until(lambda: len(ran) == 1, 10, "the first to run")
        split(conn, 4)
        ids = fill(conn, 4)
        wait_until(lambda: set(ids) <= set(ran), 12, "those on the new shards to run")


def reads(admin_dsn: str, seconds: float) -> float:
    """Return how many transactions a second there are."""
    with psycopg.connect(admin_dsn, autocommit=True) as admin:
        query = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()"
        before = values(admin, query)[0]
        began_at = time.monotonic()
        time.sleep(seconds)
        return float((values(admin, query)[0] - before) / (time.monotonic() - began_at))


def test_a_worker_visits_the_one_shard_that_has_keys_as_often_as_a_queue_that_is_not_split(
    conn: Conn, dsn: str, admin_dsn: str
) -> None:
    split(conn, 64)
    rates = {}
    for queue in ("one", "mail"):
        put(conn, "work", queue=queue, key="k", delay_seconds=600)
        with running_worker(app_of(lambda _: None), dsn, queues=[queue]):
            time.sleep(1)
            rates[queue] = reads(admin_dsn, 2.5)
    assert rates["mail"] < 1.5 * rates["one"] + 5, rates


def test_an_idle_worker_reads_as_often_with_eight_shards_as_with_one(conn: Conn, dsn: str, admin_dsn: str) -> None:
    app = app_of(lambda _: None)
    split(conn, 8)
    for queue in ("one", "mail"):
        batchq.enqueue_many(conn, "work", [{}] * 256, queue=queue)
        drain(app, dsn, queues=[queue])
    rates = {}
    for queue in ("one", "mail"):
        batchq.enqueue_many(conn, "work", [{}] * 256, queue=queue)
        with running_worker(app, dsn, queues=[queue]):
            wait_until(lambda: not values(conn, "SELECT id FROM batchq.batches_live"), 10, "all to run")
            rates[queue] = reads(admin_dsn, 2.5)
    assert rates["mail"] < 1.35 * rates["one"] + 5, rates


def test_what_is_most_urgent_in_any_shard_comes_first(conn: Conn, dsn: str) -> None:
    split(conn, 8)
    fill(conn, 8)
    batchq.enqueue_many(conn, "work", [{}] * 3, queue="mail", priority=-5)
    batchq.enqueue_many(conn, "work", [{}] * 3, queue="mail", priority=5)
    order: list[int] = []
    app = app_of(lambda batch: order.append(look(conn, batch.id).priority))
    drain(app, dsn, queues=["mail"], concurrency=1)
    assert order[:3] == [-5] * 3
    assert order[-3:] == [5] * 3


def test_the_claims_take_the_shards_in_turn(conn: Conn, dsn: str) -> None:
    split(conn, 4)
    batchq.enqueue_many(conn, "work", [{}] * 400, queue="mail")
    order: list[str] = []

    def work(batch: batchq.Batch) -> None:
        order.append(batch._claimed.queue)
        time.sleep(0.02)  # so that a lane claims few

    drain(app_of(work), dsn, queues=["mail"], concurrency=2)
    first = {shard: order.index(shard) for shard in set(order)}
    assert max(first.values()) < 250, f"a shard waited for another one to be empty: {first}"


@pytest.mark.parametrize("most", [1, 2])
def test_order_and_limit_of_each_key_hold_in_all_shards(conn: Conn, dsn: str, most: int) -> None:
    split(conn, 8)
    conn.execute("INSERT INTO batchq.limits (queue, max_running_per_key) VALUES ('mail', %s)", [most])
    recorder = Recorder(0.002)
    batchq.enqueue_many(conn, "work", list(range(200)), queue="mail", key=lambda number: f"k{number % 20}")
    drain(app_of(recorder), dsn, queues=["mail"], concurrency=8)
    assert max(recorder.most.values()) <= most
    assert len(recorder.ran) == 200
    if most == 1:
        assert all(a < b for number in range(20) for a, b in pairwise(recorder.of(f"k{number}")))


def test_a_key_with_many_batches_delays_the_others_by_one_round_whatever_shard_they_are_on(
    conn: Conn, dsn: str
) -> None:
    split(conn, 4)
    hot = keys_on(conn, "mail#1", 1)[0]
    batchq.enqueue_many(conn, "work", [{}] * 500, queue="mail", key=hot)
    others = [key for shard in ("mail", "mail#2", "mail#3") for key in keys_on(conn, shard, 8)]
    for key in others:
        put(conn, "work", queue="mail", key=key)
    recorder = Recorder(0.001)
    drain(app_of(recorder), dsn, queues=["mail"], concurrency=4)
    last = max(number for number, (key, _) in enumerate(recorder.ran) if key != hot)
    assert last < 150, f"the last of the others ran as number {last}"


def test_a_limit_of_a_split_queue_is_of_the_whole(conn: Conn, dsn: str) -> None:
    split(conn, 4)
    conn.execute("INSERT INTO batchq.limits (queue, max_running) VALUES ('mail', 2)")
    fill(conn, 4)
    running, most, lock = [0], [0], threading.Lock()

    def work(_: batchq.Batch) -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.01)
        with lock:
            running[0] -= 1

    with running_worker(app_of(work), dsn, queues=["mail"], concurrency=8):
        wait_until(lambda: not values(conn, "SELECT id FROM batchq.batches_live"), 20, "all to run")
        assert values(conn, "SELECT DISTINCT queue FROM batchq.limit_shares") == ["mail"]
    assert most == [2]


def test_a_pause_and_a_throttle_hold_all_shards(conn: Conn, dsn: str) -> None:
    split(conn, 4)
    conn.execute("SELECT batchq.pause('mail')")
    ids = fill(conn, 4)
    ran: list[int] = []
    with running_worker(app_of(lambda batch: ran.append(batch.id)), dsn, queues=["mail", "default"]):
        other = put(conn, "work")
        wait_until(lambda: other in ran, 10, "the other queue to run")
        assert ran == [other]
        conn.execute("SELECT batchq.resume('mail')")
        wait_until(lambda: set(ids) <= set(ran), 10, "all to run")
    conn.execute("INSERT INTO batchq.throttles (queue, key, until) VALUES ('mail', 'k', now() + interval '1 hour')")
    throttled, free = put(conn, "work", queue="mail", key="k"), put(conn, "work", queue="mail", key="l")
    drain(app_of(lambda batch: ran.append(batch.id)), dsn, queues=["mail"])
    assert free in ran
    assert throttled not in ran


def test_what_a_handler_throttles_is_the_whole(conn: Conn, dsn: str) -> None:
    split(conn, 4)
    app = batchq.App()

    @app.handler("told")
    def told(_: batchq.Batch) -> None:
        raise batchq.Throttled(3600)

    @app.item_handler("told_items")
    def told_items(_: int) -> None:
        raise batchq.Throttled(3600)

    for key in keys_on(conn, "mail#1", 3):
        put(conn, "told", queue="mail", key=key)
        put(conn, "told_items", queue="mail", key=key, items=[1, 2])
    drain(app, dsn, queues=["mail"])
    rows = conn.execute("SELECT DISTINCT queue, kind FROM batchq.throttles ORDER BY kind").fetchall()
    assert rows == [("mail", "told"), ("mail", "told_items")]


def test_the_items_of_all_shards_together_keep_the_rate_of_the_whole(conn: Conn, dsn: str) -> None:
    split(conn, 4)
    conn.execute("INSERT INTO batchq.limits (queue, items_per_second) VALUES ('mail', 20)")
    app, begun = batchq.App(), []

    @app.item_handler("work")
    def work(_: int) -> None:
        begun.append(time.monotonic())

    for shard in ("mail#1", "mail#2"):
        put(conn, "work", queue="mail", key=keys_on(conn, shard, 1)[0], items=list(range(25)))
    drain(app, dsn, queues=["mail"])
    assert len(begun) == 50
    assert begun[-1] - begun[0] >= (50 - 20) / 20 - 0.1  # a second's worth at once, then the rate


def test_batches_of_a_shard_that_wait_in_a_worker_are_given_back_when_their_kind_is_throttled(
    conn: Conn, dsn: str
) -> None:
    split(conn, 4)
    calls: list[int] = []

    def work(batch: batchq.Batch) -> None:
        calls.append(batch.id)
        if len(calls) > 60:
            raise batchq.Throttled(3600)

    batchq.enqueue_many(conn, "work", list(range(128)), queue="mail")
    drain(app_of(work), dsn, queues=["mail"], concurrency=1)
    assert len(calls) == 61


def test_expired_leases_of_all_shards_are_rescued(conn: Conn, dsn: str) -> None:
    split(conn, 4)
    fill(conn, 4)
    conn.execute(
        "UPDATE batchq.batches_live SET status = 'processing', attempt = 1, claimed_by = 'dead', "
        "claim_token = gen_random_uuid(), claimed_at = now(), lease_expires_at = now() - interval '1 second'"
    )
    ran: list[int] = []
    with running_worker(app_of(lambda batch: ran.append(batch.id)), dsn, queues=["mail"], lease_seconds=2):
        wait_until(lambda: len(ran) == 128, 15, "all to be rescued")


def test_the_parts_of_a_batch_stay_beside_it(conn: Conn, dsn: str) -> None:
    split(conn, 4)
    app = batchq.App()
    seen: list[int] = []
    register_items(app, "def", "items", lambda item, _: seen.append(item))
    ids = [put(conn, "items", queue="mail", items=list(range(40)), spread=4, key=f"k{n}") for n in range(4)]
    drain(app, dsn, queues=["mail"])
    assert sorted(seen) == sorted(4 * list(range(40)))
    assert {look(conn, batch_id).status for batch_id in ids} == {"completed"}
    assert broken(conn) == []


def test_parts_without_a_key_stay_beside_a_batch_on_the_first_shard(conn: Conn, dsn: str) -> None:
    split(conn, 4)
    app = batchq.App()
    register_items(app, "def", "items", lambda item, _: 1 / 0 if item % 10 == 1 else None)
    conn.execute("SELECT setval('batchq.batches_id_seq', 158)")  # by their own ids, the parts belong on the next shard
    whole = put(conn, "items", queue="mail", items=list(range(40)), spread=4, max_attempts=1)
    assert look(conn, whole).queue == "mail"
    drain(app, dsn, queues=["mail"])
    assert [row.item_index for row in failed_items(conn, whole)] == [1, 11, 21, 31]
    assert (look(conn, whole).status, broken(conn)) == ("failed", [])


def test_parts_come_along_when_a_retry_comes_to_another_shard(conn: Conn, dsn: str) -> None:
    app = batchq.App()
    fails = [True]
    register_items(app, "def", "items", lambda item, _: 1 / 0 if fails[0] and item == 1 else None)
    key = values(conn, "SELECT 'k' || n FROM generate_series(1, 99) n WHERE batchq.shard_number('k' || n, 4) = 1")[0]
    whole = put(conn, "items", queue="mail", items=list(range(40)), spread=4, max_attempts=1, key=key)
    drain(app, dsn, queues=["mail"])
    split(conn, 4)
    conn.execute("SELECT batchq.retry_items(%s)", [whole])
    assert look(conn, whole).queue == "mail#1"
    assert set(values(conn, "SELECT queue FROM batchq.parts")) <= {"mail#1"}
    fails[0] = False
    drain(app, dsn, queues=["mail"])
    assert (look(conn, whole).status, broken(conn)) == ("completed", [])


def test_a_limit_of_one_per_key_keeps_a_batch_on_any_shard_in_one_part(conn: Conn, dsn: str) -> None:
    split(conn, 4)
    conn.execute("SELECT batchq.set_limit('mail', 'items', max_running_per_key => 1)")
    app = batchq.App()
    register_items(app, "def", "items", lambda _item, _: None)
    whole = put(conn, "items", queue="mail", items=list(range(40)), spread=4, key=keys_on(conn, "mail#1", 1)[0])
    drain(app, dsn, queues=["mail"])
    assert look(conn, whole).status == "completed"
    assert values(conn, "SELECT count(*) FROM batchq.parts") == [0]


def test_batches_that_need_others_wait_for_them_across_shards(conn: Conn, dsn: str) -> None:
    split(conn, 4)
    ran: list[int] = []
    needed = [put(conn, "work", queue="mail", key=f"k{n}") for n in range(4)]
    waits = [put(conn, "work", queue="mail", after=needed, key=f"w{n}") for n in range(4)]
    drain(app_of(lambda batch: ran.append(batch.id)), dsn, queues=["mail"])
    assert set(ran[:4]) == set(needed)
    assert set(ran[4:]) == set(waits)


def test_a_failure_hook_and_a_retry_in_place_know_the_whole_queue(conn: Conn, dsn: str) -> None:
    split(conn, 4)
    failures: list[str] = []
    app = batchq.App()

    @app.on_failure
    def failed(failure: batchq.Failure) -> None:
        failures.append(failure.queue)

    @app.handler("bad", backoff=AT_ONCE)
    def bad(batch: batchq.Batch) -> None:
        raise RuntimeError(batch.queue)

    for number in range(4):
        put(conn, "bad", queue="mail", max_attempts=2, key=f"k{number}")
    drain(app, dsn, queues=["mail"])
    assert failures == ["mail"] * 4
    assert values(conn, "SELECT error FROM batchq.failures") == ["RuntimeError: mail"]


# ------------------------------------------------------------------------------------- people


def test_views_and_filters_show_and_take_the_whole(conn: Conn) -> None:
    split(conn, 4)
    fill(conn, 4)
    batchq.enqueue_many(conn, "work", list(range(6)), queue="mail", key=lambda number: f"k{number}")
    put(conn, "work")
    assert conn.execute("SELECT queue, ready FROM batchq.queues ORDER BY queue").fetchall() == [
        ("default", 1),
        ("mail", 134),
    ]
    assert values(conn, "SELECT DISTINCT queue FROM batchq.keys") == ["mail"]
    assert len(values(conn, "SELECT key FROM batchq.count_keys(in_queue => 'mail')")) == 6
    assert values(conn, "SELECT count(*) FROM batchq.status WHERE queue = 'mail'") == [134]
    assert values(conn, "SELECT count(DISTINCT shard) FROM batchq.status WHERE queue = 'mail'")[0] > 3
    assert len(values(conn, "SELECT batchq.newest_live('mail', most => 200)")) == 134
    assert values(conn, "SELECT matched FROM batchq.bulk('cancel', '{\"queue\": \"mail\"}')") == [134]
    assert values(conn, "SELECT queue FROM batchq.queues WHERE ready > 0") == ["default"]


def test_failed_and_waiting_batches_are_shown_by_the_whole(conn: Conn, dsn: str) -> None:
    split(conn, 4)
    needed = put(conn, "work")
    for number in range(8):
        put(conn, "bad", queue="mail", max_attempts=1, key=f"k{number}")
        put(conn, "bad", queue="mail", after=[needed], key=f"k{number}")
    app = batchq.App()
    app.handler("bad")(lambda _: 1 / 0)
    drain(app, dsn, queues=["mail"])
    counts = "SELECT queue, failed, waiting FROM batchq.queues WHERE kind = 'bad'"
    assert conn.execute(counts).fetchall() == [("mail", 8, 8)]
    assert values(conn, "SELECT queues FROM batchq.failures") == [["mail"]]
    conn.execute("DELETE FROM batchq.batches WHERE id = %s", [needed])
    conn.execute("DELETE FROM batchq.flow_events")
    assert values(conn, "SELECT DISTINCT queue FROM batchq.stuck_waiting()") == ["mail"]


def test_a_move_brings_batches_to_their_shards_and_within_the_whole_is_none(conn: Conn) -> None:
    split(conn, 4)
    ids = [put(conn, "work", key="k" if number % 2 else None) for number in range(80)]
    for batch_id in ids:
        conn.execute("SELECT batchq.move(%s, 'mail')", [batch_id])
    assert len({look(conn, batch_id).queue for batch_id in ids}) > 1
    assert values(conn, SHARD_OF_KEY, "k") == values(conn, "SELECT batchq.shard_of('mail', 'k')")
    before = values(conn, "SELECT count(*) FROM batchq.audit")
    conn.execute("SELECT batchq.move(%s, 'mail')", [ids[0]])
    assert values(conn, "SELECT matched FROM batchq.bulk('move', '{}', '{\"to_queue\": \"mail\"}')") == [0]
    assert values(conn, "SELECT count(*) FROM batchq.audit") == before
    conn.execute("SELECT batchq.cancel(id) FROM batchq.batches_live")
    assert set(values(conn, "SELECT queue FROM batchq.audit WHERE verb = 'cancel'")) == {"mail"}


def test_workers_of_other_languages_claim_and_rescue_in_all_shards(conn: Conn) -> None:
    split(conn, 4)
    fill(conn, 4)
    claimed = values(conn, "SELECT id FROM batchq.claim('mail', '{work}', 'w', 5)")
    assert len(claimed) == 5
    claimed += values(conn, "SELECT id FROM batchq.claim('mail', '{work}', 'w', 500)")
    assert len(set(claimed)) == 128
    assert by_shard(conn) == dict.fromkeys(["mail", "mail#1", "mail#2", "mail#3"], 32)
    conn.execute(
        "UPDATE batchq.batches_live SET lease_expires_at = now() - interval '1 second' WHERE queue = ANY (%s)",
        [["mail", "mail#1", "mail#2", "mail#3"]],
    )
    assert values(conn, "SELECT batchq.rescue('mail', 7)") == [7]
    assert values(conn, "SELECT batchq.rescue('mail', 500)") == [121]


def test_workers_of_other_languages_begin_with_any_shard(conn: Conn) -> None:
    split(conn, 4)
    fill(conn, 4)
    ids = [values(conn, "SELECT id FROM batchq.claim('mail', '{work}', 'w', 1)")[0] for _ in range(20)]
    assert len({look(conn, batch_id).queue for batch_id in ids}) > 1


def test_each_duty_can_do_its_part_of_a_split_queue(admin_dsn: str, conn: Conn) -> None:
    split(conn, 4)
    with role_for(admin_dsn, "producer") as producer, psycopg.connect(producer, autocommit=True) as role:
        for number in range(8):
            put(role, "work", queue="mail", key=f"k{number}" if number % 2 else None)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            split(role, 8)
    ran: list[int] = []
    with role_for(admin_dsn, "worker") as worker:
        drain(app_of(lambda batch: ran.append(batch.id)), worker, queues=["mail"])
    assert len(ran) == 8
    with role_for(admin_dsn, "viewer") as viewer, psycopg.connect(viewer, autocommit=True) as role:
        assert values(role, "SELECT DISTINCT queue FROM batchq.status") == ["mail"]
        assert len(values(role, "SELECT shard FROM batchq.shards")) == 4
        assert values(role, "SELECT DISTINCT queue FROM batchq.queues") == ["mail"]


def test_a_schedule_and_a_copy_make_batches_of_the_split_queue(conn: Conn) -> None:
    split(conn, 4)
    conn.execute("SELECT batchq.set_schedule('tick', '@every 1h', 'work', queue => 'mail')")
    made = values(conn, "SELECT batchq.run_schedule('tick')")[0]
    copies = [values(conn, "SELECT batchq.enqueue_copy(%s)", made)[0] for _ in range(3)]
    found = defaultdict(list)
    for batch_id in (made, *copies):
        found[look(conn, batch_id).queue].append(batch_id)
    assert set(found) <= {"mail", "mail#1", "mail#2", "mail#3"}
    assert values(conn, "SELECT DISTINCT queue FROM batchq.status") == ["mail"]


def test_a_schedule_knows_how_its_latest_batch_stands_on_whatever_shard_it_is(conn: Conn, dsn: str) -> None:
    split(conn, 4)
    conn.execute("SELECT setval('batchq.batches_id_seq', 100)")  # 32 ids from 96 on belong on one shard
    conn.execute("SELECT batchq.set_schedule('tick', '@every 1s', 'work', queue => 'mail')")
    conn.execute("SELECT batchq.run_schedule('tick')")
    status = "SELECT last_status FROM batchq.schedule_status"
    assert values(conn, status) == ["pending"]
    with running_worker(app_of(lambda _: None), dsn, queues=["mail"]):
        wait_until(lambda: values(conn, "SELECT batches_made FROM batchq.schedules") >= [1], 10, "a tick")
        wait_until(lambda: values(conn, status) == ["completed"], 10, "its batch to run")
    assert values(conn, "SELECT DISTINCT last_queue FROM batchq.schedules") == ["mail#3"]


def test_no_more_keys_of_all_shards_are_counted_than_was_asked_for(conn: Conn) -> None:
    split(conn, 4)
    batchq.enqueue_many(conn, "work", list(range(50)), queue="mail", key=lambda number: f"k{number}")
    assert len(values(conn, "SELECT key FROM batchq.count_keys(5, 100, 'mail')")) == 5
    assert len(values(conn, "SELECT key FROM batchq.count_keys(100, 100, 'mail')")) == 50


def test_the_trigger_function_serves_the_tables_of_batchq_alone(conn: Conn) -> None:
    split(conn, 2)
    conn.execute("CREATE TABLE public.mine (id bigint, queue text, key text, unique_key text, part_of bigint)")
    trigger = "CREATE TRIGGER t BEFORE INSERT ON public.mine FOR EACH ROW EXECUTE FUNCTION"
    conn.execute(f"{trigger} batchq.choose_shard('mail', '2', '1')".encode())
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match=r"not of public\.mine"):
        conn.execute("INSERT INTO public.mine (id, queue, key) VALUES (1, 'mail', 'k')")


def test_a_worker_that_died_long_ago_keeps_no_queue_from_being_split(conn: Conn) -> None:
    conn.execute(
        "INSERT INTO batchq.workers (id, hostname, pid, version, queues, kinds, concurrency, heartbeat_at) "
        "VALUES ('w', 'h', 1, '1', '{mail#3}', '{work}', 1, now() - interval '2 minutes')"
    )
    split(conn, 2)
    assert values(conn, "SELECT queue FROM batchq.split_queues") == ["mail"]


@pytest.mark.parametrize("table", ["limits", "pauses", "schedules"])
def test_a_row_of_the_whole_cannot_become_one_of_a_shard(conn: Conn, table: str) -> None:
    split(conn, 2)
    conn.execute("INSERT INTO batchq.limits (queue, max_running) VALUES ('mail', 1)")
    conn.execute("SELECT batchq.pause('mail')")
    conn.execute("SELECT batchq.set_schedule('tick', '@every 1h', 'work', queue => 'mail')")
    with pytest.raises(psycopg.errors.CheckViolation, match='queue "mail#1" is a shard of queue "mail"'):
        conn.execute(f"UPDATE batchq.{table} SET queue = 'mail#1'".encode())


if __name__ == "__main__":
    run_alone(__file__)
