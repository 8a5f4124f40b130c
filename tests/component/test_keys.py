"""Keys: batches with a key run key by key, in turn, and with a limit per key no more of them, or strictly in order."""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from typing import Any
from uuid import uuid4

import psycopg
import pytest

import batchq
from batchq.errors import InvalidInput
from batchq.postgres.statements import claims
from batchq.testing import running_worker
from batchq.worker import key_ring
from batchq.worker.key_ring import MOST_KEYS, KeyRing, Visited, per_turn
from tests.support.alone import run_alone
from tests.support.batches import drain, look, put, values
from tests.support.databases import holding_snapshot
from tests.support.steps import step
from tests.support.waiting import wait_until

Conn = psycopg.Connection[Any]
AT_ONCE = batchq.Backoff(0, 0)
CLAIM_ALL = """
UPDATE batchq.batches_live
SET status = 'processing', attempt = 1, claimed_by = 'w', claim_token = gen_random_uuid(), claimed_at = now(),
  lease_expires_at = now() + interval '1 hour'
"""


class Recorder:
    """Records what runs, by key, and how many of a key ran at the same time."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.ran: list[tuple[str | None, int]] = []
        self.most: Counter[str | None] = Counter()
        self._now: Counter[str | None] = Counter()
        self._seconds = seconds
        self._lock = threading.Lock()

    def __call__(self, batch: batchq.Batch) -> None:
        key = batch.key
        with self._lock:
            self.ran.append((key, batch.id))
            self._now[key] += 1
            self.most[key] = max(self.most[key], self._now[key])
        time.sleep(self._seconds)
        with self._lock:
            self._now[key] -= 1

    def of(self, key: str | None) -> list[int]:
        """Return the ids that ran of a key, in their order."""
        return [batch_id for ran_key, batch_id in self.ran if ran_key == key]


def app_of(function: Callable[[batchq.Batch], Any], **options: Any) -> batchq.App:
    """Return an app whose kind work is handled by *function*."""
    app = batchq.App()

    @app.handler("work", backoff=AT_ONCE, **options)
    def work(batch: batchq.Batch) -> Any:
        return function(batch)

    return app


def limit(conn: Conn, per_key: int, kind: str | None = None) -> None:
    """Set the limit per key of a kind, or of the queue."""
    conn.execute("DELETE FROM batchq.limits")
    conn.execute("INSERT INTO batchq.limits (kind, max_running_per_key) VALUES (%s, %s)", [kind, per_key])


# ------------------------------------------------------------------------------------------------------------ enqueue


def test_a_key_is_stored_by_every_way_in(conn: Conn) -> None:
    put(conn, "work", key="one")
    batchq.enqueue_many(conn, "work", [{"c": "a"}, {"c": None}], key=lambda payload: payload["c"])
    batchq.enqueue_many(conn, "work", items=[1, 2], items_per_batch=1, key="all")
    assert values(conn, "SELECT key FROM batchq.all_batches ORDER BY id") == ["one", "a", None, "all", "all"]
    assert values(conn, "SELECT key FROM batchq.status ORDER BY id") == ["one", "a", None, "all", "all"]


@pytest.mark.parametrize("key", [1, b"a", "a\0b", "\ud800", ["a"]])
def test_a_key_that_is_no_text_is_refused_and_nothing_is_inserted(conn: Conn, key: Any) -> None:
    with pytest.raises(InvalidInput, match=r"^key "):
        put(conn, "work", key=key)
    keys = iter(["good", key])
    with pytest.raises(InvalidInput, match=r"^key "):
        batchq.enqueue_many(conn, "work", [1, 2], key=lambda _: next(keys))
    assert values(conn, "SELECT count(*) FROM batchq.all_batches") == [0]


def test_a_function_as_the_key_needs_payloads(conn: Conn) -> None:
    with pytest.raises(InvalidInput, match="a function as the key takes a payload"):
        batchq.enqueue_many(conn, "work", items=[1], key=lambda _: "a")


def test_enqueueing_for_the_same_keys_waits_for_nobody(dsn: str, admin_dsn: str, conn: Conn) -> None:
    limit(conn, 1)
    put(conn, "work", key="old")
    with ExitStack() as stack:
        first, second = (stack.enter_context(psycopg.connect(dsn)) for _ in range(2))
        for one in (first, second):
            one.execute("SET LOCAL lock_timeout = '1s'")
        for key, other in (("old", "new"), ("new", "old")):
            put(first, "work", key=key)
            put(second, "work", key=other)
        with psycopg.connect(admin_dsn) as another:
            another.execute("UPDATE batchq.limits SET max_running_per_key = 2")
        first.commit()
        second.commit()
    assert values(conn, "SELECT count(*) FROM batchq.all_batches") == [5]


# -------------------------------------------------------------------------------------------------------------- turns


def test_a_key_with_many_delays_no_other_by_more_than_a_round(dsn: str, conn: Conn) -> None:
    recorder = Recorder()
    batchq.enqueue_many(conn, "work", [{}] * 300, key="hot")
    batchq.enqueue_many(conn, "work", [{"n": n} for n in range(50)], key=lambda payload: f"small {payload['n']}")
    drain(app_of(recorder), dsn, concurrency=1)
    last_small = max(place for place, (key, _) in enumerate(recorder.ran) if key != "hot")
    assert len(recorder.ran) == 350
    assert last_small < 120, "51 keys, and a few rounds of each claim's turn"


def test_batches_without_a_key_and_with_one_take_turns(dsn: str, conn: Conn) -> None:
    """A turn is a claim, which takes what the slots run in about 0.2 s."""
    recorder = Recorder(0.002)
    batchq.enqueue_many(conn, "work", [{}] * 1500, key="hot")
    batchq.enqueue_many(conn, "work", [{}] * 1500)
    drain(app_of(recorder), dsn, concurrency=2)
    half = Counter(key for key, _ in recorder.ran[:1500])
    assert min(half["hot"], half[None]) >= 200


def test_within_a_key_the_lowest_priority_number_comes_first_then_the_earliest(dsn: str, conn: Conn) -> None:
    recorder = Recorder()
    limit(conn, 1)
    late, urgent, first = (
        put(conn, "work", key="k"),
        put(conn, "work", key="k", priority=-1),
        put(conn, "work", key="k"),
    )
    conn.execute("UPDATE batchq.batches SET run_at = now() - interval '1 hour' WHERE id = %s", [first])
    drain(app_of(recorder), dsn)
    assert recorder.of("k") == [urgent, first, late]


def test_a_scheduled_batch_does_not_hold_its_key_before_its_time(dsn: str, conn: Conn) -> None:
    recorder = Recorder()
    limit(conn, 1)
    later, now = put(conn, "work", key="k", delay_seconds=3600), put(conn, "work", key="k")
    drain(app_of(recorder), dsn)
    assert recorder.of("k") == [now]
    assert look(conn, later).shown == "scheduled"


# ----------------------------------------------------------------------------------------------------- limits per key


@pytest.mark.parametrize("kind", [None, "work"])
@pytest.mark.parametrize("most", [1, 3])
def test_no_more_of_a_key_run_than_its_limit_in_several_workers(
    dsn: str, conn: Conn, kind: str | None, most: int
) -> None:
    recorder = Recorder(0.005)
    limit(conn, most, kind)
    for key in ("a", "b"):
        batchq.enqueue_many(conn, "work", [{}] * 40, key=key)
    app = app_of(recorder)
    with running_worker(app, dsn), running_worker(app, dsn), running_worker(app, dsn):
        wait_until(lambda: values(conn, "SELECT count(*) FROM batchq.batches_live") == [0], 60, "all to end")
    assert all(recorder.most[key] <= most for key in ("a", "b"))
    assert max(recorder.most.values()) == most
    assert [len(recorder.of(key)) for key in ("a", "b")] == [40, 40]


def test_a_limit_of_the_queue_counts_all_kinds_of_a_key(dsn: str, conn: Conn) -> None:
    recorder = Recorder(0.01)
    app = app_of(recorder)
    app.handler("other")(recorder)
    limit(conn, 1)
    for _ in range(10):
        put(conn, "work", key="a")
        put(conn, "other", key="a")
    with running_worker(app, dsn), running_worker(app, dsn):
        wait_until(lambda: values(conn, "SELECT count(*) FROM batchq.batches_live") == [0], 60, "all to end")
    assert recorder.most["a"] == 1
    assert recorder.of("a") == sorted(recorder.of("a")), "in order over both kinds"


def test_with_a_limit_of_one_a_key_keeps_its_order_through_failures_snoozes_and_several_workers(
    dsn: str, conn: Conn
) -> None:
    limit(conn, 1, "work")
    ended: dict[str, list[int]] = defaultdict(list)
    running: Counter[str] = Counter()
    faults: list[str] = []

    def work(batch: batchq.Batch) -> None:
        key = str(batch.key)
        running[key] += 1
        if running[key] != 1:
            faults.append(f"{running[key]} of {key} at once")
        time.sleep(0.001)
        running[key] -= 1
        if batch.id % 5 == 0 and batch.attempt == 1:
            raise ValueError("fails once")
        if batch.id % 7 == 0 and batch.attempt == 1 and batch.id not in snoozed:
            snoozed.add(batch.id)
            raise batchq.Snooze(0.05)
        ended[key].append(batch.id)

    snoozed: set[int] = set()
    batchq.enqueue_many(conn, "work", [{"k": f"k{n % 6}"} for n in range(180)], key=lambda payload: payload["k"])
    app = batchq.App()
    app.handler("work", backoff=batchq.Backoff(0.02, 0.05))(work)
    with running_worker(app, dsn), running_worker(app, dsn):
        wait_until(lambda: values(conn, "SELECT count(*) FROM batchq.batches_live") == [0], 60, "all to end")
    assert faults == []
    assert {key: sorted(ids) for key, ids in ended.items()} == dict(ended)
    assert sum(map(len, ended.values())) == 180


def test_a_batch_that_has_begun_keeps_its_key_until_it_ends(dsn: str, conn: Conn) -> None:
    limit(conn, 1)
    recorder = Recorder()

    def work(batch: batchq.Batch) -> None:
        recorder(batch)
        if batch.id == first and len(recorder.ran) == 1:
            raise batchq.Snooze(3600)

    first, second = put(conn, "work", key="k"), put(conn, "work", key="k", priority=-5)
    conn.execute("UPDATE batchq.batches SET priority = 0 WHERE id = %s", [second])
    drain(app_of(work), dsn)
    assert recorder.of("k") == [first]
    step("an urgent one that comes later waits as well")
    put(conn, "work", key="k", priority=-10)
    drain(app_of(work), dsn)
    assert recorder.of("k") == [first]
    step("a cancelled one frees its key")
    conn.execute("SELECT batchq.cancel(%s)", [first])
    drain(app_of(work), dsn)
    assert len(recorder.of("k")) == 3


def test_with_a_limit_of_one_for_the_queue_a_batch_that_has_begun_keeps_its_key_from_all_kinds(
    dsn: str, conn: Conn
) -> None:
    limit(conn, 1)
    recorder = Recorder()

    def work(batch: batchq.Batch) -> None:
        recorder(batch)
        raise batchq.Snooze(3600)

    app = app_of(work)
    app.handler("other")(recorder)
    first = put(conn, "work", key="k")
    drain(app, dsn)
    put(conn, "other", key="k")
    drain(app, dsn)
    assert recorder.of("k") == [first]


def test_a_failed_batch_frees_its_key(dsn: str, conn: Conn) -> None:
    limit(conn, 1)
    recorder = Recorder()

    def work(batch: batchq.Batch) -> None:
        recorder(batch)
        if batch.id == first:
            raise ValueError("bad")

    first = put(conn, "work", key="k", max_attempts=1)
    second = put(conn, "work", key="k")
    drain(app_of(work), dsn)
    assert recorder.of("k") == [first, second]
    assert look(conn, first).status == "failed"


def test_a_limit_of_zero_holds_back_only_batches_with_a_key_and_its_end_frees_them(dsn: str, conn: Conn) -> None:
    recorder = Recorder()
    limit(conn, 0)
    put(conn, "work", key="k")
    plain = put(conn, "work")
    drain(app_of(recorder), dsn)
    assert recorder.ran == [(None, plain)]
    conn.execute("DELETE FROM batchq.limits")
    drain(app_of(recorder), dsn)
    assert len(recorder.of("k")) == 1


# --------------------------------------------------------------------------- two claims of one key, step by step


def find(conn: Conn, per_key: int | None = 1, most: int = 10) -> list[int]:
    """Return the ids that a claim finds; the keys stay locked while its transaction is open."""
    statement = claims.ready_of_keys("default", ["work"], [per_key], None, "", None, 100, most, most, {})
    return [batch_id for row in conn.execute(*statement).fetchall() for batch_id in row[1] or ()]


def take(conn: Conn, ids: list[int]) -> list[int]:
    """Claim these batches; return which were claimed."""
    rows = conn.execute(*claims.claim_keyed("default", ids, "w", uuid4(), 60)).fetchall()
    return [row[0] for row in rows]


def test_a_key_that_another_claim_has_locked_is_left_out_without_waiting(dsn: str, conn: Conn) -> None:
    first, _ = put(conn, "work", key="k"), put(conn, "work", key="k")
    with psycopg.connect(dsn) as one, psycopg.connect(dsn) as other:
        other.execute("SET LOCAL lock_timeout = '1s'")
        assert find(one) == [first]
        assert find(other) == []
        one.rollback()
        assert find(other) == [first]


def test_a_claim_sees_what_the_last_holder_of_the_lock_has_committed(dsn: str, conn: Conn) -> None:
    """Its transaction began, and another statement of it had its snapshot, before the other claim committed."""
    first, second = put(conn, "work", key="k"), put(conn, "work", key="k")
    with psycopg.connect(dsn) as one, psycopg.connect(dsn) as other:
        assert other.execute("SELECT count(*) FROM batchq.all_batches").fetchone() == (2,)
        assert take(one, find(one)) == [first]
        assert find(other) == []
        one.commit()
        assert find(other) == [], "the first runs"
        other.rollback()
        assert find(other, per_key=2) == [second]


def test_a_claim_counts_with_a_snapshot_that_is_newer_than_its_lock(admin_dsn: str, conn: Conn) -> None:
    """The other claim commits after this one's statement began, and before it has the lock."""
    first, _ = put(conn, "work", key="k"), put(conn, "work", key="k")
    found: list[int] = []
    with psycopg.connect(admin_dsn) as one, psycopg.connect(admin_dsn) as other, psycopg.connect(admin_dsn) as holder:
        holder.execute("LOCK TABLE batchq.key_locks")
        thread = threading.Thread(target=lambda: found.extend(find(other)))
        thread.start()
        waits = "SELECT count(*) FROM pg_stat_activity WHERE pid = %s AND wait_event_type = 'Lock'"
        wait_until(lambda: values(conn, waits, other.info.backend_pid) == [1], 10, "the claim to wait")
        assert take(one, [first]) == [first]
        one.commit()
        holder.rollback()
        thread.join()
    assert found == []


@pytest.mark.parametrize("position", ["now() + interval '30 seconds'", "now() + interval '1 day'"])
def test_a_claim_that_committed_behind_the_position_of_leases_counts(conn: Conn, position: str) -> None:
    """Its transaction began long before its COMMIT, or its worker has a shorter lease than the others."""
    first, _ = put(conn, "work", key="k"), put(conn, "work", key="k")
    assert take(conn, find(conn)) == [first]
    conn.execute("UPDATE batchq.batches_live SET lease_expires_at = now() - interval '1 minute' WHERE id = %s", [first])
    move = f"INSERT INTO batchq.positions (index, queue, at) VALUES ('lease', 'default', {position})"
    conn.execute(move.encode())
    assert find(conn) == [], "the first runs"


def test_a_batch_that_is_snoozed_after_a_claim_has_found_it_is_not_claimed(dsn: str, conn: Conn) -> None:
    first = put(conn, "work", key="k")
    with psycopg.connect(dsn) as one:
        found = find(one)
        assert values(conn, "SELECT batchq.snooze(%s, '1 hour')", first) == ["pending"]
        assert (found, take(one, found)) == ([first], [])


# --------------------------------------------------------------------------------------------------- beside the dead


def visit(conn: Conn, ring: KeyRing, room: int) -> int:
    """Make one claim as a worker does; return the buffers that finding the batches took."""
    keys = ring.next_range()
    assert keys is not None
    statement, given = claims.ready_of_keys(
        "default",
        ["work"],
        [None],
        None,
        *keys,
        MOST_KEYS,
        room,
        per_turn(room, ring.known_keys, ring.known_keys),
        ring.positions(),
    )
    before = buffers(conn)
    rows = [Visited._make(row) for row in conn.execute(statement, given).fetchall()]
    spent = buffers(conn) - before
    ring.visited(rows)
    take(conn, [batch_id for row in rows for batch_id in row.ids or ()])
    return spent


def buffers(conn: Conn) -> int:
    """Return how many buffers this session's statements have read of the live table and its indexes so far."""
    conn.execute("SELECT pg_stat_force_next_flush()")
    query = (
        "SELECT heap_blks_hit + heap_blks_read + idx_blks_hit + idx_blks_read FROM pg_statio_all_tables "
        "WHERE relid = 'batchq.batches_live'::regclass"
    )
    return int(values(conn, query)[0])


def test_claims_of_a_key_do_not_read_its_dead_entries(dsn: str, conn: Conn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_ring, "SLOW_KEY_SECONDS", 0.0)  # a fast machine reads 20,000 dead entries in 2 ms
    batchq.enqueue_many(conn, "work", [{}] * 30_000, key="hot")
    ring = KeyRing()
    with holding_snapshot(dsn):
        spent = [visit(conn, ring, 1000) for _ in range(48)]
    assert values(conn, "SELECT count(*) FROM batchq.batches_live WHERE status = 'processing'")[0] > 20_000
    assert ring.positions().keys() == {"hot"}
    step("%s", spent)
    assert median(spent[-24::2]) + median(spent[-23::2]) < 550, "what is live becomes less, what is dead more"


def test_a_batch_that_was_found_but_is_locked_keeps_its_turn(admin_dsn: str, dsn: str, conn: Conn) -> None:
    """Its key is slow to read, so that the next claims would read from behind it."""
    limit(conn, 1)
    first, second = put(conn, "work", key="k"), put(conn, "work", key="k")
    ran: list[int] = []
    app = app_of(lambda batch: ran.append(batch.id))
    with psycopg.connect(admin_dsn) as holder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(key_ring, "SLOW_KEY_SECONDS", 0.0)
        patch.setattr(key_ring, "PAUSE_FACTOR", 300)
        holder.execute("SELECT 1 FROM batchq.batches_live WHERE id = %s FOR UPDATE", [first])
        with running_worker(app, dsn):
            time.sleep(1.5)
            assert ran == []
            holder.rollback()
            wait_until(lambda: ran == [first, second], 10, "both to run, in their order")


def test_an_urgent_batch_comes_next_though_its_key_is_slow_to_read(dsn: str, conn: Conn) -> None:
    limit(conn, 1)
    first = put(conn, "work", key="k")
    ran: list[int] = []
    app = app_of(lambda batch: ran.append(batch.id))
    with pytest.MonkeyPatch.context() as patch, running_worker(app, dsn):
        patch.setattr(key_ring, "SLOW_KEY_SECONDS", 0.0)
        patch.setattr(key_ring, "PAUSE_FACTOR", 300)
        for _ in range(3):
            wait_until(lambda: len(ran) == 1, 10, "the first to run")
            with conn.transaction():
                usual, urgent = put(conn, "work", key="k"), put(conn, "work", key="k", priority=-1)
            wait_until(lambda: len(ran) == 3, 10, "both to run")
            assert ran == [first, urgent, usual]
            ran.clear()
            first = put(conn, "work", key="k")


def test_a_range_of_keys_without_a_live_batch_is_read_again_after_a_pause(dsn: str, conn: Conn) -> None:
    batchq.enqueue_many(conn, "work", list(range(30_000)), key=lambda number: f"k{number // 10:05}")
    ring = KeyRing()
    with holding_snapshot(dsn):
        conn.execute(CLAIM_ALL)
        put(conn, "work", key="a")
        while ring.parts[0].due_at == 0 and ring.next_range() is not None:
            visit(conn, ring, 100)
    assert ring.next_range() is None, "all that is left is dead"
    assert ring.has_keys, "it will be read again"


if __name__ == "__main__":
    run_alone(__file__)
