"""`batchq distribute`: the layout of tables for Citus, on a plain Postgres: how it is made, what is special on it."""

import re
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

import batchq
from batchq.errors import ConfigError
from batchq.operate.distribute import TABLES, distribute, steps
from batchq.postgres import migrate
from batchq.postgres.link import Link
from batchq.postgres.statements import claims, endings, flows
from batchq.postgres.statements.checkpoints import Progress
from batchq.settings import Settings
from batchq.worker.flows import Flows
from batchq.worker.worker import Worker
from tests.component.rows import Conn, checkpoint, failure, finished, insert, processing, value, values
from tests.support.alone import run_alone
from tests.support.batches import drain
from tests.support.commands import CommandLine
from tests.support.databases import Databases
from tests.support.servers import Server

WORKS = """
INSERT INTO batchq.workers (id, hostname, pid, version, queues, kinds, concurrency)
VALUES ('w', 'h', 1, '1', '{q}', '{k}', 1)
"""


@pytest.fixture
def plain(databases: Databases, server: Server) -> Iterator[str]:
    """Return the DSN of a database with the schema as migrations make it."""
    with databases.empty() as name:
        migrate.migrate(server.dsn(name))
        yield server.dsn(name)


@pytest.fixture
def plain_conn(plain: str) -> Iterator[Conn]:
    """Return a connection to it."""
    with psycopg.connect(plain, autocommit=True, prepare_threshold=None) as conn:
        yield conn


def make(conn: Conn) -> list[str]:
    """Make the layout; return the names of the steps."""
    return [step.name for step in distribute(conn, with_citus=False)]


@pytest.fixture
def laid_out(plain: str, plain_conn: Conn) -> str:
    """Return the DSN of a database with the second layout."""
    make(plain_conn)
    return plain


@pytest.fixture
def app() -> batchq.App:
    """Return an app with a handler that returns how what it needed has ended, and one for items."""
    app = batchq.App()
    app.handler("work")(lambda batch: [needed.status for needed in batch.needed])

    @app.item_handler("items")
    def item(item: int) -> None:
        if item == 1:
            raise ValueError("bad item")

    return app


# ---------------------------------------------------------------------------------------------------- how it is made


def test_nothing_is_lost_and_what_was_begun_goes_on(plain: str, plain_conn: Conn, app: batchq.App) -> None:
    conn = plain_conn
    old = finished(conn, kind="work")
    needed = insert(conn, kind="work", run_at="2100-01-01")
    waits = batchq.enqueue(conn, "work", after=[needed])
    drain(app, plain)  # marks what is needed
    taken = processing(conn, kind="items", items=[1, 2, 3])
    checkpoint(conn, taken, Progress(0, 1, [failure(0)], first_index=0))
    conn.execute("UPDATE batchq.batches_live SET lease_expires_at = now() - interval '1 s' WHERE id = %s", [taken.id])
    conn.execute("DELETE FROM batchq.workers")
    before = values(conn, "SELECT to_jsonb(b) - 'is_needed' FROM batchq.all_batches b ORDER BY id")
    make(conn)
    assert values(conn, "SELECT to_jsonb(b) - 'is_needed' FROM batchq.all_batches b ORDER BY id") == before
    conn.execute("SELECT batchq.snooze(%s, '0')", [needed])
    drain(app, plain)
    statuses = dict(conn.execute("SELECT id, status FROM batchq.status").fetchall())
    assert statuses == {old: "completed", needed: "completed", waits: "completed", taken.id: "stalled"}
    assert value(conn, "SELECT result FROM batchq.batches_finished WHERE id = %s", [waits]) == ["completed"]


def test_ends_that_triggers_have_noted_are_not_noted_again(plain: str, plain_conn: Conn, app: batchq.App) -> None:
    first = insert(plain_conn, kind="work", run_at="2100-01-01")
    batchq.enqueue(plain_conn, "work", after=[first])
    drain(app, plain)
    plain_conn.execute("SELECT batchq.snooze(%s, '0')", [first])
    drain(app, plain)
    assert values(plain_conn, "SELECT id FROM batchq.batches_finished WHERE is_needed") == [first]
    make(plain_conn)
    assert value(plain_conn, "SELECT batchq.collect_flows(100)") == 0


def test_made_again_it_replaces_functions_only(plain_conn: Conn) -> None:
    first = make(plain_conn)
    assert {"separate_finished", "drop_triggers", "collect_flows"} <= set(first)
    assert make(plain_conn) == [
        "lock",
        "count_own_items",
        "wait_unregistered",
        "collect_flows",
        "keep_what_is_needed",
        "owners",
    ]


def test_it_may_be_made_again_after_a_queue_was_split(laid_out: str, plain_conn: Conn) -> None:
    plain_conn.execute("SELECT batchq.split_queue('mail', 4)")
    assert make(plain_conn)[0] == "lock"


def test_a_dry_run_prints_the_sql_and_changes_nothing(plain: str, plain_conn: Conn, tmp_path: Path) -> None:
    command = CommandLine(plain, tmp_path)
    ended = command("distribute", "--dry-run", "--without-citus")
    assert (ended.code, ended.err) == (0, "")
    assert "DETACH PARTITION batchq.batches_finished" in ended.out
    assert "{columns}" not in ended.out
    assert (
        value(plain_conn, "SELECT count(*) FROM pg_inherits WHERE inhrelid = 'batchq.batches_finished'::regclass") == 1
    )
    with psycopg.connect(plain) as conn:  # what it prints is what it does
        conn.execute(ended.out.encode())
    assert [step.name for step in steps(plain_conn, with_citus=False)][1] == "count_own_items"


def test_the_command_says_what_it_has_done(plain: str, plain_conn: Conn, tmp_path: Path) -> None:
    command = CommandLine(plain, tmp_path)
    ended = command("distribute", "--without-citus", "--yes")
    assert (ended.code, ended.err) == (0, "")
    assert "separate finished: done" in ended.out.splitlines()
    assert "before" not in ended.out
    assert (
        value(plain_conn, "SELECT count(*) FROM pg_inherits WHERE inhrelid = 'batchq.batches_finished'::regclass") == 0
    )
    again = command("distribute", "--without-citus", "--yes")
    assert (again.code, again.err) == (0, "")
    assert again.out.splitlines()[-1].startswith("the tables had this layout before")


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        (WORKS, "worker w is running: stop all workers first"),
        ("SELECT batchq.split_queue('mail', 4)", "queue mail is split into shards: this cannot be undone"),
        ("SELECT batchq.bell(true)", "the bell is on: it is a trigger of batchq.batches: run: SELECT batchq.bell("),
        (
            "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'; "
            "CREATE TRIGGER mine AFTER INSERT ON batchq.batches_live FOR EACH ROW EXECUTE FUNCTION f()",
            "batchq.batches_live has a trigger of yours: mine",
        ),
        ("ALTER TABLE batchq.batches_live ENABLE ROW LEVEL SECURITY", "batchq.batches_live has row security"),
        (
            "CREATE TABLE mine (id bigint PRIMARY KEY); "
            "ALTER TABLE batchq.needs ADD CONSTRAINT to_mine FOREIGN KEY (needed_id) REFERENCES mine",
            "foreign key to_mine of batchq.needs refers to public.mine: drop it",
        ),
        (
            "CREATE UNIQUE INDEX mine ON batchq.failed_items (batch_id, item_index)",
            "unique index batchq.mine of batchq.failed_items lacks the column queue: drop it",
        ),
    ],
)  # fmt: skip
def test_what_keeps_it_from_being_done_is_named(plain_conn: Conn, statement: str, words: str) -> None:
    plain_conn.execute(statement.encode())
    with pytest.raises(ConfigError, match=re.escape(words)):
        make(plain_conn)


def test_without_citus_it_says_how_to_have_it(plain: str, tmp_path: Path) -> None:
    ended = CommandLine(plain, tmp_path)("distribute", "--yes")
    assert ended.code == 2
    assert "this database has no Citus: CREATE EXTENSION citus, or try the layout with --without-citus" in ended.err


def test_only_the_owner_may(plain: str, plain_conn: Conn) -> None:
    plain_conn.execute("CREATE ROLE batchq_nobody_special LOGIN")
    try:
        plain_conn.execute("GRANT USAGE ON SCHEMA batchq TO batchq_nobody_special")
        plain_conn.execute("GRANT SELECT ON ALL TABLES IN SCHEMA batchq TO batchq_nobody_special")
        plain_conn.execute("SET ROLE batchq_nobody_special")
        with pytest.raises(ConfigError, match="only the owner of the schema can distribute it"):
            steps(plain_conn, with_citus=False)
    finally:
        plain_conn.execute("RESET ROLE")
        plain_conn.execute("DROP OWNED BY batchq_nobody_special; DROP ROLE batchq_nobody_special")


def test_a_superuser_may_do_it_for_the_owner(server: Server, plain: str, plain_conn: Conn, app: batchq.App) -> None:
    plain_conn.execute("CREATE ROLE batchq_owner_of_all LOGIN PASSWORD 'for the test'")
    try:
        plain_conn.execute(
            "DO $$ DECLARE one record; BEGIN ALTER SCHEMA batchq OWNER TO batchq_owner_of_all; "
            "FOR one IN SELECT c.oid::regclass AS name FROM pg_class c WHERE c.relnamespace = 'batchq'::regnamespace "
            "AND c.relkind IN ('r', 'p', 'v') LOOP "
            "EXECUTE format('ALTER TABLE %s OWNER TO batchq_owner_of_all', one.name); "
            "END LOOP; FOR one IN SELECT p.oid::regprocedure AS name FROM pg_proc p WHERE p.pronamespace = "
            "'batchq'::regnamespace LOOP EXECUTE format('ALTER FUNCTION %s OWNER TO batchq_owner_of_all', one.name); "
            "END LOOP; END $$"
        )
        make(plain_conn)
        first = insert(plain_conn, kind="work", run_at="2100-01-01")
        batchq.enqueue(plain_conn, "work", after=[first])
        drain(app, make_conninfo(plain, user="batchq_owner_of_all", password="for the test"))
        assert value(plain_conn, "SELECT count(*) FROM batchq.needs") == 1
    finally:
        plain_conn.execute("REASSIGN OWNED BY batchq_owner_of_all TO CURRENT_USER")
        plain_conn.execute("DROP OWNED BY batchq_owner_of_all; DROP ROLE batchq_owner_of_all")


def test_a_migration_that_was_not_written_for_it_is_refused(
    laid_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in migrate.directory().glob("*.sql"):
        (tmp_path / file.name).write_text(file.read_text())
    monkeypatch.setattr(migrate, "directory", lambda: tmp_path)
    (tmp_path / "9999_more.sql").write_text("ALTER TABLE batchq.batches ADD COLUMN more integer;\n")
    with pytest.raises(ConfigError, match="9999_more was not written for the layout that batchq distribute makes"):
        migrate.migrate(laid_out)
    (tmp_path / "9999_more.sql").write_text("-- for both layouts\nCREATE TABLE batchq.more ();\n")
    assert migrate.migrate(laid_out) == ["9999_more"]


# ---------------------------------------------------------------------------------------------- what Citus asks for


def test_each_unique_index_has_the_queue(laid_out: str, plain_conn: Conn) -> None:
    lacking = """
        SELECT i.indexrelid::regclass::text FROM pg_index i
        WHERE i.indrelid = ANY (%s::regclass[]) AND i.indisunique
          AND NOT EXISTS (SELECT 1 FROM pg_attribute a
                          WHERE a.attrelid = i.indrelid AND a.attname = 'queue' AND a.attnum = ANY (i.indkey))
    """
    assert [one for (one,) in plain_conn.execute(lacking, [list(TABLES)]).fetchall()] == []


def test_no_partition_has_partitions(laid_out: str, plain_conn: Conn) -> None:
    nested = "SELECT c.oid::regclass::text FROM pg_class c WHERE c.relispartition AND c.relkind = 'p'"
    assert values(plain_conn, nested) == []


def test_no_trigger_reads_or_writes_a_table(laid_out: str, plain_conn: Conn) -> None:
    rows = plain_conn.execute(
        "SELECT DISTINCT p.proname, p.prosrc FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid "
        "WHERE NOT t.tgisinternal AND (t.tgrelid = ANY (%s::regclass[]) OR t.tgrelid IN "
        "(SELECT i.inhrelid FROM pg_inherits i WHERE i.inhparent = ANY (%s::regclass[])))",
        [list(TABLES), list(TABLES)],
    ).fetchall()
    assert {name for name, _ in rows} == {
        "count_own_items", "refuse_other_total", "wait_unregistered",
        "keep_processing", "refuse_packed_values", "refuse_finish_ahead",
    }  # fmt: skip
    for name, source in rows:
        assert not re.search(r"\b(FROM|INTO|UPDATE|JOIN|PERFORM)\s+batchq\.", source), name


def test_the_planner_leaves_out_finished_batches_where_a_live_status_is_named(laid_out: str, plain_conn: Conn) -> None:
    plan = values(plain_conn, "EXPLAIN SELECT id FROM batchq.all_batches WHERE status = 'pending'")
    assert "finished" not in "\n".join(plan)


# --------------------------------------------------------------------------------------------- what is special on it


def test_a_worker_uses_the_second_forms(laid_out: str, plain_conn: Conn, app: batchq.App) -> None:
    # The first form of the finish that deletes calls this function; the second one deletes by itself.
    plain_conn.execute(
        "CREATE OR REPLACE FUNCTION batchq.forget_failed_items(in_queue text, of_batch bigint) RETURNS boolean "
        "LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'the first form'; END $$"
    )
    insert(plain_conn, kind="items", items=[1, 2], max_failed_items=1, max_attempts=1)
    worker = Worker(app, Settings.load(dsn=laid_out, keep_completed=False), drain=True)
    assert worker.run()
    assert worker.context.layout.is_distributed
    assert value(plain_conn, "SELECT count(*) FROM batchq.all_batches") == 0
    assert value(plain_conn, "SELECT count(*) FROM batchq.failed_items") == 0


def test_second_forms_are_chosen_by_the_layout() -> None:
    forms = [claims.claim("q", 0, ["k"], 1, "w", None, 1.0, is_distributed=choice)[0] for choice in (False, True)]  # type: ignore[arg-type]
    assert forms == [claims.CLAIM, claims.CLAIM_DISTRIBUTED]
    skipping = claims.claim("q", 0, ["k"], 1, "w", None, 1.0, skipped=[1], is_distributed=True)[0]  # type: ignore[arg-type]
    assert skipping == claims.CLAIM_SKIPPING_DISTRIBUTED
    forget = endings.complete("q", [1], ["t"], keep=False, is_distributed=True)[0]
    assert forget == endings.COMPLETE_AND_FORGET_DISTRIBUTED


def test_a_batch_that_waits_for_an_id_that_nobody_has_is_cancelled_by_name(
    laid_out: str, plain_conn: Conn, app: batchq.App
) -> None:
    batch_id = batchq.enqueue(plain_conn, "work", after=[1_000_000])
    drain(app, laid_out)
    row = plain_conn.execute("SELECT status, last_error FROM batchq.status WHERE id = %s", [batch_id]).fetchone()
    assert row == (
        "cancelled", "cancelled: it cannot wait for 1000000: no batch has that id (batches_after_exist)",
    )  # fmt: skip


def test_verbs_know_what_no_worker_has_registered_yet(laid_out: str, plain_conn: Conn) -> None:
    conn = plain_conn
    first = insert(conn, kind="work", run_at="2100-01-01")
    run, cancelled = (batchq.enqueue(conn, "work", after=[first]) for _ in range(2))
    assert value(conn, "SELECT batchq.run_anyway(%s)", [run]) == "pending"
    assert values(conn, "SELECT needed_id FROM batchq.needs WHERE batch_id = %s", [run]) == [first]
    last = batchq.enqueue(conn, "work", after=[first])
    conn.execute("SELECT batchq.cancel_with_dependents(%s)", [first])
    statuses = dict(conn.execute("SELECT id, status FROM batchq.status").fetchall())
    assert statuses == {first: "cancelled", run: "ready", cancelled: "cancelled", last: "cancelled"}


def test_a_batch_that_was_completed_and_deleted_before_it_was_waited_for_is_no_unknown_id(
    laid_out: str, plain_conn: Conn, app: batchq.App
) -> None:
    first = insert(plain_conn, kind="work")
    drain(app, laid_out, keep_completed=False)
    assert values(plain_conn, "SELECT id FROM batchq.all_batches") == []
    waits = batchq.enqueue(plain_conn, "work", after=[first])
    drain(app, laid_out)
    assert value(plain_conn, "SELECT status FROM batchq.status WHERE id = %s", [waits]) == "completed"


@pytest.mark.parametrize(
    ("given", "constraint"),
    [("ARRAY[1, NULL]", "batches_after_fits"), ("ARRAY[77]", "batches_after_is_not_itself")],
)
def test_a_list_that_cannot_be_waited_for_is_refused_by_name(
    laid_out: str, plain_conn: Conn, given: str, constraint: str
) -> None:
    plain_conn.execute("SELECT setval('batchq.batches_id_seq', 76)")
    with pytest.raises(psycopg.errors.CheckViolation, match=constraint):
        plain_conn.execute(f"INSERT INTO batchq.batches (kind, after) VALUES ('work', {given})".encode())


def test_who_changes_items_sets_their_number_as_well(laid_out: str, plain_conn: Conn) -> None:
    batch_id = insert(plain_conn, kind="items", items=[1, 2])
    with pytest.raises(psycopg.errors.CheckViolation, match="items_total must be the length of items"):
        plain_conn.execute("UPDATE batchq.batches_live SET items = '[1]' WHERE id = %s", [batch_id])
    plain_conn.execute("UPDATE batchq.batches_live SET items = '[1]', items_total = 1 WHERE id = %s", [batch_id])


def test_a_batch_that_is_needed_and_not_kept_is_kept_until_its_end_is_noted(
    laid_out: str, plain_conn: Conn, app: batchq.App
) -> None:
    first = insert(plain_conn, kind="work", run_at="2100-01-01")
    batchq.enqueue(plain_conn, "work", after=[first])
    drain(app, laid_out, keep_completed=False)
    plain_conn.execute("SELECT batchq.snooze(%s, '0')", [first])
    drain(app, laid_out, keep_completed=False)
    assert values(plain_conn, "SELECT id FROM batchq.all_batches") == [first]
    assert values(plain_conn, "SELECT is_needed FROM batchq.all_batches") == [None]


def test_a_status_that_is_final_is_refused_by_name(laid_out: str, plain_conn: Conn) -> None:
    with pytest.raises(psycopg.errors.CheckViolation, match="batches_status_is_known"):
        plain_conn.execute("INSERT INTO batchq.batches (kind, status, finished_at) VALUES ('k', 'completed', now())")


@pytest.mark.parametrize(("found", "reads"), [(0, 1), (7, 5)])
def test_an_idle_worker_collects_every_half_second_and_at_once_while_there_is_more(
    laid_out: str, monkeypatch: pytest.MonkeyPatch, found: int, reads: int
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(flows, "collect", lambda _, most: calls.append(most) or found)
    following = Flows()
    with closing(Link(laid_out, 5)) as link:
        assert [following.collect(link, False) for _ in range(5)] == [found > 0] * reads + [False] * (5 - reads)
        assert len(calls) == reads
        following.collect(link, True)
    assert len(calls) == reads + 1, "a drain does not wait"


def test_a_role_with_the_duty_of_a_worker_is_enough(laid_out: str, plain_conn: Conn, app: batchq.App) -> None:
    role = "batchq_distributed_worker"
    plain_conn.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'for the test'".encode())
    try:
        plain_conn.execute("SELECT batchq.grant_duty('worker', %s)", [role])
        first = insert(plain_conn, kind="work")
        batchq.enqueue(plain_conn, "work", after=[first])
        insert(plain_conn, kind="items", items=[2, 3], spread=2)
        drain(app, make_conninfo(laid_out, user=role, password="for the test"))
        assert values(plain_conn, "SELECT DISTINCT status FROM batchq.status") == ["completed"]
    finally:
        plain_conn.execute(f"DROP OWNED BY {role}; DROP ROLE {role}".encode())


def test_a_schema_of_another_version_is_not_distributed(plain_conn: Conn) -> None:
    plain_conn.execute("DELETE FROM batchq.migrations WHERE version = (SELECT max(version) FROM batchq.migrations)")
    with pytest.raises(ConfigError, match="batchq migrate"):
        make(plain_conn)
    assert value(plain_conn, "SELECT to_regclass('batchq.batches_live_unregistered') IS NULL")


def test_it_waits_for_a_migration_that_runs(plain: str, plain_conn: Conn) -> None:
    with psycopg.connect(plain) as migration:
        migration.execute("LOCK TABLE batchq.migrations IN SHARE ROW EXCLUSIVE MODE")
        with pytest.raises(psycopg.OperationalError):
            list(distribute(plain_conn, with_citus=False, seconds=1))
    assert make(plain_conn)[:2] == ["lock", "separate_finished"]


def test_a_transaction_timeout_of_the_role_does_not_end_it(plain_conn: Conn) -> None:
    if plain_conn.info.server_version >= 170000:  # before, there is no such timeout
        plain_conn.execute("SET transaction_timeout = '500ms'")
    for step in distribute(plain_conn, with_citus=False):
        if step.name == "lock":
            time.sleep(0.7)
    assert value(plain_conn, "SELECT to_regclass('batchq.batches_live_unregistered') IS NOT NULL")


if __name__ == "__main__":
    run_alone(__file__)
