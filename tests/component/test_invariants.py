"""The invariants: a hostile client violates each, and it is named; a busy database violates none."""

import threading
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

import batchq
from batchq.operate import invariants
from batchq.postgres.statements import endings, health, parts
from batchq.postgres.statements.checkpoints import Progress
from tests.component.rows import (
    Conn,
    checkpoint,
    failure,
    finished,
    insert,
    processing,
    value,
)
from tests.support.alone import run_alone
from tests.support.batches import drain
from tests.support.commands import CommandLine
from tests.support.steps import step

TODAY = "(now() AT TIME ZONE 'UTC')::date"

# A person with the rights of the owner, who takes away what would refuse the row.
LOOSEN = """
DO $$
DECLARE c record;
BEGIN
  ALTER TABLE batchq.batches_live DISABLE TRIGGER USER;
  ALTER TABLE batchq.batches_finished DISABLE TRIGGER USER;
  FOR c IN SELECT conname FROM pg_constraint WHERE conrelid = 'batchq.batches'::regclass AND contype = 'c' LOOP
    EXECUTE format('ALTER TABLE batchq.batches DROP CONSTRAINT %I', c.conname);
  END LOOP;
  DROP INDEX batchq.batches_live_id, batchq.batches_live_unique_key;
END
$$
"""
# A superuser puts a row where its partition does not take it.
MISPLACE = """
SET LOCAL allow_system_table_mods = on;
UPDATE pg_class SET relispartition = false WHERE oid = 'batchq.{partition}'::regclass;
INSERT INTO batchq.{partition} (id, kind, queue, status, payload, priority, run_at, max_attempts, max_failed_items,
  attempt, items_done, items_failed, errors, created_at, finished_at)
OVERRIDING SYSTEM VALUE
VALUES (1000, 'work', 'default', 'lost', '{{}}', 0, now(), 5, 0, 0, 0, 0, '[]', now(), {finished_at});
UPDATE pg_class SET relispartition = true WHERE oid = 'batchq.{partition}'::regclass;
"""
FAILED_ITEM = (
    "INSERT INTO batchq.failed_items (queue, batch_id, item_index, item, error, attempt) "
    "VALUES ('default', 99, 0, '1', 'no', 1)"
)
WORKER = (
    "INSERT INTO batchq.workers (id, hostname, pid, version, queues, kinds, concurrency, in_hand) "
    "VALUES ('w', 'h', 7, '1', '{default}', '{work}', 8, -1)"
)

# By the invariant: statements of the hostile client, over batches 1 (pending), 2 (processing), 3 (completed), 4
# (failed, with items a, b, c: b failed in its attempt 1, the others done), 5 (waits for 1), and 6 (spread; its parts 7
# and 8 have two items each).
HOSTILE: dict[str, list[str]] = {
    "live_is_not_final": [MISPLACE.format(partition="batches_live", finished_at="NULL")],
    "waiting_counts_what_it_needs": [
        "INSERT INTO batchq.batches (kind, status, needs_left) VALUES ('work', 'waiting', 1)",
    ],
    "end_of_what_is_needed_will_be_noticed": ["UPDATE batchq.batches SET is_needed = NULL WHERE id = 1"],
    "spread_counts_its_parts": ["UPDATE batchq.batches SET needs_left = 3 WHERE id = 6"],
    "open_part_is_worked_or_has_ended": ["UPDATE batchq.batches SET is_needed = NULL WHERE id = 7"],
    "open_part_has_a_waiting_whole": ["DELETE FROM batchq.batches WHERE id = 6"],
    "live_part_has_its_range": [
        "INSERT INTO batchq.batches (kind, items, items_total, part_of) VALUES ('work', '[1]', 1, 6)"
    ],
    "ranges_of_parts_fit_together": ["UPDATE batchq.parts SET first_item = 3 WHERE first_item = 2"],
    "items_of_parts_are_within_their_range": ["UPDATE batchq.parts SET items_done = 3 WHERE first_item = 0"],
    "finished_is_final": [MISPLACE.format(partition="finished_default", finished_at="now()")],
    "no_other_status": [
        "ALTER TABLE batchq.batches_refused DROP CONSTRAINT batches_status_is_known",
        "INSERT INTO batchq.batches (kind, status) VALUES ('work', 'lost')",
    ],
    "processing_is_claimed": ["UPDATE batchq.batches SET claim_token = NULL WHERE id = 2"],
    "processing_has_a_lease": ["UPDATE batchq.batches SET lease_expires_at = NULL WHERE id = 2"],
    "pending_or_waiting_is_unclaimed": ["UPDATE batchq.batches SET claimed_by = 'me' WHERE id = 1"],
    "finished_is_unclaimed": ["UPDATE batchq.batches SET claim_token = gen_random_uuid() WHERE id = 3"],
    "live_has_not_finished": ["UPDATE batchq.batches SET finished_at = now() WHERE id = 1"],
    "finished_has_finished_at": ["UPDATE batchq.batches SET finished_at = NULL WHERE id = 3"],
    "attempt_within_limits": ["UPDATE batchq.batches SET attempt = 6 WHERE id = 2"],
    "counters_are_not_negative": ["UPDATE batchq.batches SET items_done = -1 WHERE id = 1"],
    "position_within_items": ["UPDATE batchq.batches SET items_done = 3 WHERE id = 4"],
    "items_total_is_length_of_items": ["UPDATE batchq.batches SET items_total = 4 WHERE id = 4"],
    "items_failed_is_number_of_failed_items": ["UPDATE batchq.batches SET items_failed = 0 WHERE id = 4"],
    "failed_item_has_a_batch": [FAILED_ITEM],
    "failed_item_was_worked": ["UPDATE batchq.batches SET items_done = 0 WHERE id = 4"],
    "failed_item_is_the_batchs": ["UPDATE batchq.failed_items SET item = '\"z\"'"],
    "failed_item_attempt_within_limits": ["UPDATE batchq.failed_items SET attempt = 9"],
    "live_id_is_unique": ["INSERT INTO batchq.batches (id, kind) OVERRIDING SYSTEM VALUE VALUES (2, 'work')"],
    "not_live_and_finished": ["INSERT INTO batchq.batches (id, kind) OVERRIDING SYSTEM VALUE VALUES (3, 'work')"],
    "finished_id_is_unique": [
        "INSERT INTO batchq.batches (id, kind, status, finished_at) OVERRIDING SYSTEM VALUE "
        "VALUES (3, 'work', 'completed', now())"
    ],
    "unique_key_is_unique": ["INSERT INTO batchq.batches (kind, unique_key) VALUES ('work', 'k'), ('work', 'k')"],
    "key_is_on_one_shard": [
        "SELECT batchq.split_queue('mail', 2)",
        "INSERT INTO batchq.batches (queue, kind, key) VALUES ('mail', 'work', 'k')",
        "UPDATE batchq.batches_live SET queue = CASE queue WHEN 'mail' THEN 'mail#1' ELSE 'mail' END WHERE key = 'k'",
        "INSERT INTO batchq.batches (queue, kind, key) VALUES ('mail', 'work', 'k')",
    ],
    "finished_lies_in_its_day": [
        f"DO $$ BEGIN EXECUTE format('ALTER TABLE batchq.finished_%s RENAME TO finished_20010101', "
        f"to_char({TODAY}, 'YYYYMMDD')); END $$"
    ],
    "input_within_limits": ["INSERT INTO batchq.batches (kind, run_at) VALUES ('work', 'infinity')"],
    "errors_are_ten_at_most": ["UPDATE batchq.batches SET errors = '{}' WHERE id = 1"],
    "worker_is_sane": [WORKER],
    "pause_names_something": [
        "ALTER TABLE batchq.pauses DROP CONSTRAINT pauses_name_something",
        "INSERT INTO batchq.pauses (queue) VALUES (NULL)",
    ],
    "throughput_is_not_negative": [
        "INSERT INTO batchq.throughput_minutes VALUES (now(), 'default', 'work', '', 1, 0, 0, -1, 0, 0, '{}')"
    ],
    "audit_is_not_negative": ["INSERT INTO batchq.audit (verb, batches) VALUES ('cancel', -1)"],
    "migrations_have_no_gap": ["DELETE FROM batchq.migrations WHERE version = 2"],
}


def lives(conn: Conn) -> None:
    """Have one batch of each sort: 1 pending, 2 processing, 3 completed, 4 failed with a failed item of three, 5 that
    waits for 1, 6 that is spread, 7 and 8 its parts."""
    insert(conn, queue="later")
    processing(conn)
    finished(conn)
    taken = processing(conn, items=["a", "b", "c"])
    progress = Progress(done=2, failed=1, failures=[failure(1)], first_index=0)
    assert checkpoint(conn, taken, progress) == 1
    end = endings.Finish(taken.id, taken.token, "failed", error='{"error": "no"}')
    assert conn.execute(*endings.finish("default", [end])).fetchall() == [(taken.id,)]
    batchq.enqueue(conn, "work", after=[1])
    assert value(conn, "SELECT seen FROM batchq.follow_flows(0)") == 1
    whole = processing(conn, items=["a", "b", "c", "d"])
    assert parts.spread_batch(conn, "default", whole.id, whole.token, 2) == (2, None, True)


@pytest.fixture
def admin(admin_dsn: str) -> Any:
    """Return the hostile client's connection."""
    with psycopg.connect(admin_dsn, autocommit=True) as conn:
        yield conn


def test_every_invariant_has_its_hostile_client() -> None:
    assert HOSTILE.keys() == health.invariants().keys()


def test_what_a_hostile_client_does_is_named(admin: Conn) -> None:
    lives(admin)
    assert invariants.violations(admin) == []
    named = {name: sorted(names_after(admin, HOSTILE[name])) for name in HOSTILE}
    assert named == {name: [name] for name in HOSTILE}


def names_after(admin: Conn, statements: list[str]) -> set[str]:
    """Return which invariants are violated after those statements; undo them."""
    with admin.transaction(force_rollback=True):
        admin.execute(LOOSEN)
        for statement in statements:
            admin.execute(statement.encode())
        found = invariants.violations(admin)
    step(f"{found}")
    assert all(violation.id and violation.what for violation in found)
    return {violation.invariant for violation in found}


def test_offenders_are_bounded(conn: Conn, admin: Conn) -> None:
    admin.execute(LOOSEN)
    admin.execute("INSERT INTO batchq.batches (kind, items_done) SELECT 'work', -1 FROM generate_series(1, 25)")
    [verdict] = [verdict for verdict in invariants.verdicts(conn) if verdict.violations]
    assert (verdict.invariant, len(verdict.violations), verdict.has_more) == ("counters_are_not_negative", 10, True)
    assert len(invariants.violations(conn, most=3)) == 3


def test_the_command_names_what_is_violated(conn: Conn, admin: Conn, dsn: str, tmp_path: Path) -> None:
    command = CommandLine(dsn, tmp_path)
    lives(conn)
    healthy = command("check", "--invariants", "--json")
    assert (healthy.code, {row["holds"] for row in healthy.json}) == (0, {True})
    assert [row["invariant"] for row in healthy.json] == list(health.invariants())
    admin.execute("UPDATE batchq.failed_items SET attempt = 9")
    shown = command("check", "--invariants")
    line = "violated  failed_item_attempt_within_limits: 4: item 1 failed in attempt 9 of 5"
    assert (shown.code, [text for text in shown.out.splitlines() if not text.startswith("ok")]) == (1, [line])


def test_what_cannot_be_looked_at_is_unknown_and_nobody_waits(conn: Conn, admin: Conn) -> None:
    with admin.transaction():
        admin.execute("LOCK TABLE batchq.audit IN ACCESS EXCLUSIVE MODE")
        found = {verdict.invariant: verdict.unknown for verdict in invariants.verdicts(conn, seconds=1)}
    assert {name for name, unknown in found.items() if unknown} == {"audit_is_not_negative"}


def test_a_busy_database_violates_none(conn: Conn, admin: Conn, dsn: str) -> None:
    app = batchq.App()

    @app.handler("work")
    def work(batch: batchq.Batch) -> None:
        if batch.payload == "bad":
            raise ValueError("bad")

    @app.item_handler("items")
    def item(item: int) -> None:
        if item % 3 == 0:
            raise ValueError("no")

    for number in range(300):
        insert(conn, payload=Jsonb("bad" if number % 7 == 0 else "good"), max_attempts=1 + number % 2)
        insert(conn, kind="items", items=list(range(number % 9)), max_failed_items=number % 2, max_attempts=1)
    found = []
    worker = threading.Thread(target=drain, args=(app, dsn))
    worker.start()
    while worker.is_alive():
        found += invariants.violations(admin)
    worker.join()
    assert found + invariants.violations(admin) == []
    assert value(conn, "SELECT count(*) FROM batchq.failed_items") > 100


def test_a_batch_with_a_key_that_waits_to_continue_violates_none(conn: Conn, admin: Conn, dsn: str) -> None:
    """It keeps the time of its claim, and with it its place before the others of its key."""
    app = batchq.App()
    app.handler("work", backoff=batchq.Backoff(3600, 3600))(fail)
    insert(conn, key="k")
    drain(app, dsn)
    assert value(conn, "SELECT status || ' ' || (claimed_at IS NOT NULL) FROM batchq.all_batches") == "pending true"
    assert invariants.violations(admin) == []
    admin.execute("UPDATE batchq.batches SET key = NULL")
    assert [violation.invariant for violation in invariants.violations(admin)] == ["pending_or_waiting_is_unclaimed"]


def test_ranges_of_parts_begin_where_the_batch_itself_has_come(conn: Conn, admin: Conn) -> None:
    whole = processing(conn, items=list(range(6)))
    assert checkpoint(conn, whole, Progress(done=1, failed=1, failures=[failure(1)], first_index=0)) == 1
    assert parts.spread_batch(conn, "default", whole.id, whole.token, 2) == (2, None, True)
    assert invariants.violations(admin) == []
    for change in ("first_item = 1, items = 3 WHERE first_item = 2", "items = 1 WHERE first_item = 2"):
        with admin.transaction(force_rollback=True):
            admin.execute(f"UPDATE batchq.parts SET {change}".encode())
            admin.execute("UPDATE batchq.batches_live SET items_total = 1 WHERE part_of IS NOT NULL")
            assert "ranges_of_parts_fit_together" in {one.invariant for one in invariants.violations(admin)}


def fail(batch: batchq.Batch) -> None:
    """Fail."""
    raise ValueError("bad")


if __name__ == "__main__":
    run_alone(__file__)
