"""SQL clients that write what they should not: refused by name, or harmless to every other batch; no worker stops."""

import threading
from collections.abc import Iterator

import psycopg
import pytest

import batchq
from batchq.testing import running_worker
from tests.support.alone import run_alone
from tests.support.batches import await_status, look, put, values, wait_for_status
from tests.support.steps import step
from tests.support.waiting import wait_until

SOON = batchq.Backoff(0.02, 0.05)
gate = threading.Event()
app = batchq.App()


@app.handler("work", backoff=SOON)
def work(batch: batchq.Batch) -> str:
    """Wait for the gate."""
    gate.wait(30)
    return "fine"


@app.item_handler("items", chunk_size=1, backoff=SOON)
def items(item: object) -> None:
    """Wait for the gate."""
    gate.wait(30)


@app.handler("good")
def good(batch: batchq.Batch) -> str:
    """Be done at once."""
    return "fine"


@pytest.fixture(autouse=True)
def _gate() -> Iterator[None]:
    """Begin with a closed gate; open it at the end."""
    gate.clear()
    yield
    gate.set()


# ----------------------------------------------------------------------------------------- every combination of columns

EVERY_COMBINATION = """
DO $$
DECLARE
  one record;
  refused text;
BEGIN
  CREATE TABLE tried (status text, refused_by text);
  FOR one IN
    SELECT *
    FROM unnest(ARRAY['pending', 'processing', 'completed', 'failed', 'cancelled', 'odd']) AS status,
         unnest(ARRAY[NULL, gen_random_uuid()]) AS token,
         unnest(ARRAY[NULL, 'nobody']) AS who,
         unnest(ARRAY[NULL, now() - interval '1 hour']) AS claimed,
         unnest(ARRAY[NULL, now() - interval '1 minute']) AS lease,
         unnest(ARRAY[NULL, now() - interval '1 minute']) AS finished,
         unnest(ARRAY[0, 1, 5, 6]::smallint[]) AS attempt,
         unnest(ARRAY[NULL, '[1, 2]']::jsonb[]) AS its_items,
         (VALUES (0, 0), (1, 1), (2, 1), (-1, 0)) AS counted(done, failed)
  LOOP
    refused := '';
    BEGIN
      INSERT INTO batchq.batches (kind, status, claim_token, claimed_by, claimed_at, lease_expires_at, finished_at,
                                  attempt, items, items_done, items_failed)
      VALUES ('items', one.status, one.token, one.who, one.claimed, one.lease, one.finished, one.attempt,
              one.its_items, one.done, one.failed);
    EXCEPTION WHEN OTHERS THEN
      GET STACKED DIAGNOSTICS refused = CONSTRAINT_NAME;
      refused := coalesce(nullif(refused, ''), SQLERRM);
    END;
    INSERT INTO tried VALUES (one.status, refused);
  END LOOP;
END
$$
"""
NAMES = {
    "batches_claim_is_whole", "batches_finish_is_whole", "batches_attempts_are_left", "batches_counters_fit_items",
    "batches_status_is_known",
}  # fmt: skip


def test_every_combination_of_columns_is_refused_by_name_or_comes_to_an_end(dsn: str, conn: psycopg.Connection) -> None:
    gate.set()
    conn.execute(EVERY_COMBINATION.encode())
    assert set(values(conn, "SELECT DISTINCT refused_by FROM tried WHERE refused_by <> ''")) == NAMES
    accepted = "SELECT status, count(*) FROM tried WHERE refused_by = '' GROUP BY status"
    assert {row[0] for row in conn.execute(accepted).fetchall()} == {
        "pending", "processing", "completed", "failed", "cancelled",
    }  # fmt: skip
    step("accepted: %s of %s", conn.execute(accepted).fetchall(), values(conn, "SELECT count(*) FROM tried"))
    with running_worker(app, dsn, lease_seconds=1, shutdown_seconds=1):
        await_status(conn, put(conn, "good", priority=9), "completed", 30)
        live = "SELECT count(*) FROM batchq.all_batches WHERE status IN ('pending', 'processing')"
        wait_until(lambda: values(conn, live) == [0], 30, "all that is there to end")


# --------------------------------------------------------------------------- writes to a batch that is being processed

KEPT = {
    "its id": "id = DEFAULT",
    "its queue": "queue = 'elsewhere'",
    "its kind": "kind = 'another'",
    "its items": "items = '[1]'",
    "no items": "items = NULL, items_done = 0",
    "more items": "items = '[1, 2, 3, 4, 5, 6, 7]'",
}


@pytest.mark.parametrize("change", KEPT)
def test_what_a_batch_is_cannot_be_changed_while_it_is_processed(
    dsn: str, conn: psycopg.Connection, change: str
) -> None:
    batch_id = put(conn, "items", items=[1, 2, 3])
    with running_worker(app, dsn, shutdown_seconds=1):
        wait_for_status(conn, batch_id, "processing")
        with pytest.raises(psycopg.errors.CheckViolation) as caught:
            conn.execute(f"UPDATE batchq.batches SET {KEPT[change]} WHERE id = {batch_id}".encode())
        assert caught.value.diag.constraint_name == "batches_processing_is_kept"
        assert (
            caught.value.diag.message_primary
            == f"batch {batch_id} is being processed: its id, queue, kind and items cannot be changed"
        )
        assert (
            caught.value.diag.message_hint == f"SELECT batchq.cancel({batch_id}) first, or wait until it has finished."
        )
        gate.set()
        assert await_status(conn, batch_id, "completed").items_done == 3
    step("while it is pending it can be")
    pending = put(conn, "items", items=[1, 2, 3])
    conn.execute(
        "UPDATE batchq.batches SET queue = 'elsewhere', kind = 'another', items = '[1]' WHERE id = %s", [pending]
    )
    assert look(conn, pending).items_total == 1


HARMLESS = {
    "fewer attempts": "max_attempts = 1",
    "another token": "claim_token = gen_random_uuid()",
    "nobody": "claimed_by = ''",
    "a lease long over": "lease_expires_at = '4000-01-01 BC'",
    "a lease of a century": "lease_expires_at = now() + interval '100 years'",
    "no attempt": "attempt = 0",
    "the last attempt": "attempt = 5",
    "pending": "status = 'pending', claim_token = NULL, claimed_by = NULL, claimed_at = NULL, lease_expires_at = NULL",
    "completed": "status = 'completed', finished_at = now(), claim_token = NULL, lease_expires_at = NULL",
    "a payload": "payload = '\"another\"'",
    "errors that are none": "errors = '[1, null, \"x\", [], {}, 6, 7, 8, 9, 10, 11, 12]'",
    "a wrong count": "items_total = 2",
    "counters": "items_done = CASE WHEN items IS NULL THEN 0 ELSE 2 END",
    "a priority": "priority = 32767",
    "a time to come": "run_at = '9999-01-01'",
    "a cursor": "cursor = '{\"far\": 1e999}'",
    "a key": "unique_key = id::text",
}


@pytest.mark.parametrize("change", HARMLESS)
def test_what_else_is_written_to_a_batch_that_is_processed_harms_no_other(
    dsn: str, conn: psycopg.Connection, change: str
) -> None:
    ids = [put(conn, "work"), put(conn, "items", items=[1, 2, 3])]
    with running_worker(app, dsn, lease_seconds=1, shutdown_seconds=1) as worker:
        for batch_id in ids:
            wait_for_status(conn, batch_id, "processing")
            conn.execute(f"UPDATE batchq.batches SET {HARMLESS[change]} WHERE id = {batch_id}".encode())
        await_status(conn, put(conn, "good"), "completed", 20)
        gate.set()
        for batch_id in ids:
            # Not with look(): Python reads no date before year 1.
            ended = f"SELECT status IN ('completed', 'failed') FROM batchq.status WHERE id = {batch_id}".encode()
            wait_until(lambda query=ended: conn.execute(query).fetchone() == (True,), 20, "it to end")  # type: ignore[misc]
        await_status(conn, put(conn, "good"), "completed", 20)
        assert not worker.lifecycle.stopping.is_set()


GONE = {
    "deleted": "DELETE FROM batchq.batches",
    "truncated": "TRUNCATE batchq.batches",
    "truncated, its ids again": "TRUNCATE batchq.batches RESTART IDENTITY",
}


@pytest.mark.parametrize("how", GONE)
def test_what_is_gone_while_it_is_processed_is_gone_and_its_ids_begin_with_nothing(
    dsn: str, conn: psycopg.Connection, how: str
) -> None:
    failing = batchq.App(app.handlers.copy())

    @failing.item_handler("failing", backoff=SOON, chunk_size=1)
    def fail(item: object) -> None:
        if item != "good":
            raise ValueError(f"bad {item}")

    with running_worker(failing, dsn, lease_seconds=1, shutdown_seconds=1) as worker:
        await_status(conn, put(conn, "failing", items=["old", "old", "old"], max_attempts=1), "failed")
        for batch_id in [put(conn, "work"), put(conn, "items", items=[1, 2, 3])]:
            wait_for_status(conn, batch_id, "processing")
        conn.execute(GONE[how].encode())
        step("new batches have no failed items but their own")
        fresh = [put(conn, "failing", items=["good", "new", "good"], max_attempts=2) for _ in range(3)]
        for batch_id in fresh:
            row = await_status(conn, batch_id, "failed", 20)
            assert (row.items_done, row.items_failed, row.attempt) == (2, 1, 2)
            assert "the first: ValueError: bad new" in row.errors[-1]["error"]
        gate.set()
        await_status(conn, put(conn, "good"), "completed", 20)
        assert not worker.lifecycle.stopping.is_set()
    assert values(conn, "SELECT count(*) FROM batchq.all_batches WHERE status = 'processing'") == [0]


# ------------------------------------------------------------------------------------------- straight into partitions

ENDED = "(id, kind, status, finished_at) OVERRIDING SYSTEM VALUE"
STRAIGHT = {
    "live, without an id": "batches_live (kind) VALUES ('good')",
    "live, with an id": "batches_live (id, kind) OVERRIDING SYSTEM VALUE VALUES (1000000, 'good')",
    "live, and finished": f"batches_live {ENDED} VALUES (1000000, 'good', 'completed', now())",
    "finished, and live": "batches_finished (id, kind) OVERRIDING SYSTEM VALUE VALUES (1000000, 'good')",
    "finished, twice": f"batches_finished {ENDED} SELECT id, 'good', 'failed', now() FROM batchq.all_batches",
    "a day that has its own": f"finished_default {ENDED} VALUES (1000000, 'good', 'failed', now())",
    "a day without one": f"finished_default {ENDED} VALUES (1000000, 'good', 'failed', 'infinity')",
    "refused": "batches_refused (id, kind, status) OVERRIDING SYSTEM VALUE VALUES (1000000, 'good', 'odd')",
    "a failed item of none": "failed_items (queue, batch_id, item_index, item, error, attempt) "
    "VALUES ('', -1, -1, '1', '', -1)",
    "a worker of all": "workers (id, hostname, pid, version, queues, kinds, concurrency, heartbeat_at) "
    "VALUES ('', '', -1, '', '{default}', '{good}', -1, 'infinity')",
}


@pytest.mark.parametrize("what", STRAIGHT)
def test_what_is_written_beside_the_table_is_refused_or_harmless(dsn: str, conn: psycopg.Connection, what: str) -> None:
    before = put(conn, "good")
    try:
        conn.execute(f"INSERT INTO batchq.{STRAIGHT[what]}".encode())
    except psycopg.errors.IntegrityError as refused:
        step("refused: %s", refused.diag.message_primary)
    with running_worker(app, dsn, lease_seconds=1, shutdown_seconds=1):
        live = "SELECT count(*) FROM batchq.batches_live"
        wait_until(lambda: values(conn, live) == [0], 20, "all to be worked")
        after = put(conn, "good")
        await_status(conn, after, "completed", 20)
    assert values(conn, "SELECT DISTINCT status FROM batchq.status WHERE id IN (%s, %s)", before, after)[-1]
    for view in ("status", "queues"):
        conn.execute(f"SELECT * FROM batchq.{view}".encode())


def test_a_list_that_shrinks_under_a_handler_fails_its_batch(
    dsn: str, conn: psycopg.Connection, admin_dsn: str
) -> None:
    batch_id = put(conn, "items", items=[1, 2, 3])
    with running_worker(app, dsn, shutdown_seconds=1):
        wait_for_status(conn, batch_id, "processing")
        with psycopg.connect(admin_dsn, autocommit=True) as admin:
            admin.execute("SET session_replication_role = replica")  # no triggers
            admin.execute("UPDATE batchq.batches SET items = '[1]', items_total = 1 WHERE id = %s", [batch_id])
        gate.set()
        wait_until(lambda: look(conn, batch_id).status != "processing", 20, "it to end")
        await_status(conn, put(conn, "good"), "completed")


if __name__ == "__main__":
    run_alone(__file__)
