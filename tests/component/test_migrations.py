"""Migrations: any number of migrators at once, all of a file or nothing, and messages that say what to do."""

import re
import shutil
import time
from pathlib import Path
from threading import Thread

import psycopg
import pytest
from psycopg import sql

import batchq
from batchq.errors import ConfigError
from batchq.postgres import migrate as migrations
from batchq.postgres.migrate import all_migrations, check_schema, migrate
from batchq.postgres.statements import (
    checkpoints,
    claims,
    endings,
    inputs,
    leases,
    ledger,
    maintenance,
    running,
    verbs,
    views,
    workers,
)
from tests.component.rows import (
    KIND,
    Conn,
    Taken,
    claim,
    complete,
    extend,
    failure,
    finished,
    has_unknown_priority,
    insert,
    is_ready_between,
    priorities,
    processing,
    ready_priorities,
    requeue,
    value,
    values,
)
from tests.support.alone import run_alone
from tests.support.databases import MIGRATIONS
from tests.support.servers import Server
from tests.support.steps import step
from tests.support.waiting import wait_until

LEDGER = "SELECT to_char(version, 'FM0000') || '_' || name FROM batchq.migrations ORDER BY version"
NAMES = [f"{migration.version:04}_{migration.name}" for migration in all_migrations()]


def connect(dsn: str) -> Conn:
    """Connect as batchq does."""
    return psycopg.connect(dsn, autocommit=True, prepare_threshold=None)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of migrations/ that batchq takes for its own."""
    copy = tmp_path / "migrations"
    shutil.copytree(MIGRATIONS, copy)
    monkeypatch.setattr(migrations, "directory", lambda: copy)
    return copy


# ------------------------------------------------------------------------------------------------------------ apply


def test_an_empty_database_gets_every_file_in_order(empty_dsn: str) -> None:
    assert migrate(empty_dsn) == NAMES
    with connect(empty_dsn) as conn:
        assert values(conn, LEDGER) == NAMES
        assert insert(conn) > 0
        step("the first batches find a partition of their day before any worker has run")
        place = "SELECT tableoid::regclass::text FROM batchq.batches WHERE id = %s"
        assert value(conn, place, [finished(conn, kind="first")]) != "batchq.finished_default"


def test_migrating_again_changes_nothing(dsn: str, conn: Conn) -> None:
    before = values(conn, "SELECT applied_at FROM batchq.migrations ORDER BY version")
    assert migrate(dsn) == []
    assert values(conn, "SELECT applied_at FROM batchq.migrations ORDER BY version") == before


def test_of_several_migrators_at_once_each_file_is_applied_by_one(empty_dsn: str) -> None:
    applied: list[str] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            applied.extend(migrate(empty_dsn))
        except BaseException as error:
            errors.append(error)

    threads = [Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(applied) == NAMES
    with connect(empty_dsn) as conn:
        assert values(conn, LEDGER) == NAMES


def test_a_migration_waits_for_one_that_runs(dsn: str, admin_dsn: str, files: Path) -> None:
    (files / "0090_more.sql").write_text("SELECT 1;")
    applied: list[str] = []
    thread = Thread(target=lambda: applied.extend(migrate(dsn)))
    with psycopg.connect(admin_dsn) as other, connect(admin_dsn) as admin:
        ledger.take_migration_lock(other)
        thread.start()
        waiting = "SELECT count(*) FROM pg_locks WHERE mode = 'ShareRowExclusiveLock' AND NOT granted"
        wait_until(lambda: value(admin, waiting), 10, "the migration to wait")
        assert applied == []
        other.rollback()
    thread.join(10)
    assert applied == ["0090_more"]


SHORT = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout", "transaction_timeout")


def set_short_limits(admin_dsn: str) -> None:
    """Have the database end whatever takes longer than 100 ms."""
    with connect(admin_dsn) as admin:
        known = set(values(admin, "SELECT name FROM pg_settings WHERE name = ANY (%s)", [list(SHORT)]))
        for name in known:
            statement = sql.SQL("ALTER DATABASE {} SET {} = '100ms'")
            admin.execute(statement.format(sql.Identifier(admin.info.dbname), sql.Identifier(name)))


def test_a_migration_is_not_bounded_by_the_limits_of_role_or_database(admin_dsn: str, files: Path) -> None:
    set_short_limits(admin_dsn)
    (files / "9000_slow.sql").write_text("SELECT pg_sleep(0.3);\nSELECT pg_sleep(0.3);\n")
    assert migrate(admin_dsn) == ["9000_slow"]


def test_a_migration_waits_for_another_for_longer_than_the_limits_of_role_or_database(
    admin_dsn: str, files: Path
) -> None:
    applied: list[str] = []
    (files / "9000_new.sql").write_text("SELECT 1;\n")
    with connect(admin_dsn) as other, other.transaction():
        ledger.take_migration_lock(other)
        set_short_limits(admin_dsn)
        waiting = Thread(target=lambda: applied.extend(migrate(admin_dsn)))
        waiting.start()
        long = (
            "SELECT count(*) FROM pg_locks "
            "WHERE mode = 'ShareRowExclusiveLock' AND NOT granted AND waitstart < clock_timestamp() - interval '0.3 s'"
        )
        wait_until(lambda: value(other, long), 10, "it to wait for long")
    waiting.join(10)
    assert applied == ["9000_new"]


def test_a_new_file_is_applied_to_a_database_with_data(dsn: str, conn: Conn, files: Path) -> None:
    insert(conn, kind="waits")
    processing(conn)
    finished(conn, "failed")
    before = values(conn, "SELECT to_jsonb(b) FROM batchq.all_batches b ORDER BY id")
    (files / "0090_more.sql").write_text("ALTER TABLE batchq.batches ADD COLUMN more integer NOT NULL DEFAULT 7;")
    assert migrate(dsn) == ["0090_more"]
    assert values(conn, "SELECT to_jsonb(b) - 'more' FROM batchq.all_batches b ORDER BY id") == before
    assert values(conn, "SELECT DISTINCT more FROM batchq.batches") == [7]


def test_a_migration_gives_way_while_its_lock_is_not_free_and_holds_up_nobody(
    dsn: str, admin_dsn: str, conn: Conn, files: Path
) -> None:
    (files / "0090_more.sql").write_text("ALTER TABLE batchq.batches ADD COLUMN more integer;")
    applied: list[str] = []
    thread = Thread(target=lambda: applied.extend(migrate(dsn)))
    with psycopg.connect(admin_dsn) as person:
        person.execute("SELECT count(*) FROM batchq.all_batches")
        thread.start()
        waits = []
        until = time.monotonic() + 2.5
        while time.monotonic() < until:
            began_at = time.monotonic()
            with conn.transaction():
                conn.execute("SELECT set_config('lock_timeout', '3s', true)")
                insert(conn)
            waits.append(time.monotonic() - began_at)
        step("%s inserts beside it, the longest took %.2f s", len(waits), max(waits))
        assert max(waits) < 0.8
        assert applied == []
        person.rollback()
    thread.join(10)
    assert applied == ["0090_more"]


def test_a_file_that_fails_leaves_nothing_of_itself_and_those_before_it_stay(dsn: str, conn: Conn, files: Path) -> None:
    (files / "0090_good.sql").write_text("CREATE TABLE batchq.good ();")
    (files / "0091_bad.sql").write_text("CREATE TABLE batchq.half ();\nSELECT 1 / 0;")
    (files / "0092_never.sql").write_text("CREATE TABLE batchq.never ();")
    with pytest.raises(ConfigError, match="migration failed: division by zero"):
        migrate(dsn)
    tables = "SELECT relname FROM pg_class WHERE relnamespace = 'batchq'::regnamespace AND relname = ANY (%s)"
    assert values(conn, tables, [["good", "half", "never"]]) == ["good"]
    assert values(conn, LEDGER) == [*NAMES, "0090_good"]
    step("mended, it goes on from there")
    (files / "0091_bad.sql").write_text("CREATE TABLE batchq.half ();")
    assert migrate(dsn) == ["0091_bad", "0092_never"]


def test_a_first_migration_that_fails_leaves_no_schema(empty_dsn: str, files: Path) -> None:
    (files / "0001_batches.sql").write_text("SELECT 1 / 0;")
    with pytest.raises(ConfigError, match="migration failed"):
        migrate(empty_dsn)
    with connect(empty_dsn) as conn:
        assert value(conn, "SELECT to_regnamespace('batchq')") is None


def test_a_schema_that_an_administrator_has_made_is_used(empty_dsn: str) -> None:
    with connect(empty_dsn) as conn:
        conn.execute("CREATE SCHEMA batchq")
        assert migrate(empty_dsn) == NAMES
        assert insert(conn) > 0


def test_the_schema_works_where_the_search_path_is_empty(empty_database: str, empty_dsn: str, server: Server) -> None:
    with connect(server.dsn(empty_database)) as admin:
        admin.execute(sql.SQL("ALTER DATABASE {} SET search_path = ''").format(sql.Identifier(empty_database)))
    with connect(server.dsn(empty_database)) as admin:
        assert value(admin, "SHOW search_path") == '""'
    migrate(empty_dsn)
    with connect(empty_dsn) as conn:
        check_every_statement(conn)


# --------------------------------------------------------------------------------------------------- publications

WITHOUT_IDENTITY = """
SELECT c.relname
FROM pg_class c
WHERE c.relnamespace = 'batchq'::regnamespace
  AND c.relkind = 'r'
  AND c.relreplident <> 'f'
  AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid
                  AND CASE c.relreplident WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident END)
"""


def test_every_statement_works_beside_a_publication_of_all_tables(empty_dsn: str) -> None:
    migrate(empty_dsn)
    with connect(empty_dsn) as conn:
        conn.execute("CREATE PUBLICATION everything FOR ALL TABLES")
        check_every_statement(conn)
        for verb in ("retry", "cancel"):
            conn.execute("SELECT batchq.bulk(%s)", [verb])
        conn.execute("SELECT batchq.pause(kind => 'x'), batchq.resume(kind => 'x'), batchq.prune_records()")
        with conn.transaction():
            maintenance.merge_throughput(conn)


def test_every_table_has_a_replica_identity_and_each_new_day_too(conn: Conn) -> None:
    conn.execute("SELECT batchq.create_finished_partitions('2031-05-06', 1)")
    assert values(conn, WITHOUT_IDENTITY) == []


@pytest.mark.parametrize("index", ["(id, queue)", "(id) INCLUDE (queue)"])
def test_the_replica_identity_follows_the_unique_index_that_there_is(conn: Conn, index: str) -> None:
    identity = (
        "SELECT indexrelid::regclass::text FROM pg_index "
        "WHERE indrelid = 'batchq.batches_live'::regclass AND indisreplident"
    )
    conn.execute("DROP INDEX batchq.batches_live_id")
    conn.execute(f"CREATE UNIQUE INDEX another ON batchq.batches_live {index}".encode())
    assert values(conn, WITHOUT_IDENTITY) == ["batches_live"]
    assert value(conn, "SELECT batchq.give_replica_identities()") == 1
    assert values(conn, identity) == ["batchq.another"]
    assert value(conn, "SELECT batchq.give_replica_identities()") == 0
    conn.execute("CREATE PUBLICATION everything FOR ALL TABLES")
    finished(conn)
    conn.execute("DROP INDEX batchq.another")
    assert value(conn, "SELECT batchq.give_replica_identities()") == 1, "the whole row, where no index is left"
    finished(conn)


def check_every_statement(conn: Conn) -> None:
    """Run every statement of batchq."""
    check_schema(conn)
    batchq.enqueue(conn, KIND)
    batchq.enqueue_many(conn, KIND, items=[1, 2], items_per_batch=1, delay_seconds=-1)
    assert priorities(conn, "default") == [0]
    assert has_unknown_priority(conn, "default", [1])
    assert ready_priorities(conn, "default", [KIND], {0: claims.START}) == [0]
    assert ready_priorities(conn, "default", [KIND], {0: claims.START, 1: claims.START}) == [0]
    assert is_ready_between(conn, "default", 0, [KIND], claims.START, claims.END)
    assert len(claim(conn, 2, token=(token := processing(conn, kind="other").token))) == 2
    assert claims.release_claim(conn, "default", token) == 3
    taken = processing(conn, kind="third", items=[1, 2])
    write_everything(conn, taken)
    failed = finished(conn, "failed", kind="fourth", error='{"error": "no"}')
    assert value(conn, "SELECT batchq.retry(%s)", [failed]) == "pending"
    assert verbs.call_verb(conn, "cancel", {"batch_id": failed, "reason": "no reason"}) == "cancelled"
    read_everything(conn, failed)
    with conn.transaction():
        worker = workers.WorkerRow("w", "h", 1, "1", ["default"], [KIND], 1)
        assert workers.beat(running.fetch_one(conn, *workers.heartbeat(worker, 0, stopping=False))).turn[:2] == (1, 0)
        workers.forget_worker(conn, "w")
        assert maintenance.create_finished_partitions(conn, 20) > 0
        assert maintenance.prune(conn, 1) == 0


def write_everything(conn: Conn, taken: Taken) -> None:
    """Run every fenced write on a batch with two items."""
    progress = checkpoints.Progress(1, 1, [failure(1)], first_index=0)
    assert conn.execute(*checkpoints.checkpoint("default", *taken, 60, progress)).rowcount == 1
    assert extend(conn, taken).lost == set()
    inputs.large_input(conn, "default", *taken)
    inputs.items_page(conn, "default", *taken, 0, 1)
    assert len(inputs.failed_page(conn, "default", *taken, 2, 10)) == 1
    inputs.left_items(conn, "default", taken.id)
    assert requeue(conn, endings.Requeue(*taken, 1, False, '{"error": "no"}')) == {taken.id}
    for keep in (True, False):
        done = processing(conn, kind="done")
        assert complete(conn, done, keep=keep) == {done.id}
    silent = processing(conn, kind="silent")
    conn.execute("UPDATE batchq.batches_live SET lease_expires_at = now() - interval '1 s' WHERE id = %s", [silent.id])
    assert len(leases.rescue(conn, "default", 10)) == 1


def read_everything(conn: Conn, batch_id: int) -> None:
    """Run what people look at."""
    views.status_rows(conn, None, None, None, 10)
    views.queue_rows(conn)
    views.batch_object(conn, batch_id)
    views.failed_item_objects(conn, batch_id, 10)
    views.worker_objects(conn)


# ------------------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("file", sorted(MIGRATIONS.glob("*.sql")), ids=lambda file: file.name)
def test_a_file_goes_in_parts_that_are_small_enough_for_every_pooler(file: Path) -> None:
    text = file.read_text()
    parts = list(migrations.parts(text))
    assert max(len(part.encode()) for part in parts) < 16 * 1024
    assert "".join(parts).rstrip("\n") == text.rstrip("\n")
    assert [part for part in parts if part.count("$$") % 2 or not part.rstrip().endswith(";")] == []


BASE = 9  # the last file of the schema that people begin with
NAMED = re.compile(
    r"^CREATE (?:UNIQUE )?(TABLE|VIEW|INDEX|AGGREGATE|FUNCTION|TRIGGER) ([\w.]+)(\([^$]*?\)\s*(?=RETURNS|LANGUAGE))?"
    r"|^COMMENT ON ((?:TABLE|VIEW|COLUMN|FUNCTION|AGGREGATE) [^\n]*?) IS\b",
    re.MULTILINE,
)


def test_each_object_of_the_schema_that_people_begin_with_is_made_once_in_its_final_form() -> None:
    made = []
    for file in sorted(MIGRATIONS.glob("*.sql"))[: BASE + 1]:
        text = file.read_text()
        changed = re.findall(r"^(?:CREATE OR REPLACE|ALTER|DROP|UPDATE|DELETE) .*", text, re.MULTILINE)
        assert changed == [], file.name
        for match in NAMED.finditer(text):
            kind, name, arguments, comment = match.groups()
            place = re.search(r" ON (\S+)", text[match.end() :].split(";")[0]) if kind == "TRIGGER" else None
            made.append(
                (kind or "COMMENT", comment or name, arguments and " ".join(arguments.split()), place and place[1])
            )
    assert len(made) > 200
    assert len(made) == len(set(made)), sorted({str(one) for one in made if made.count(one) > 1})


def test_the_schema_that_people_begin_with_has_ten_files() -> None:
    assert len([file for file in MIGRATIONS.glob("*.sql") if int(file.name[:4]) <= BASE]) == 10


def test_a_schema_from_before_the_first_release_is_told_what_to_do(dsn: str, conn: Conn) -> None:
    conn.execute("UPDATE batchq.migrations SET name = 'failed_items_and_workers' WHERE version = 2")
    for do in (lambda: migrate(dsn), lambda: migrations.check_schema(conn)):
        with pytest.raises(
            ConfigError, match=r"first release \(0002_failed_items_and_workers\).*drop schema batchq cascade"
        ):
            do()


SETS_SEARCH_PATH = re.compile(
    r"(^|;|\bBEGIN\b)\s*SET\s+((SESSION|LOCAL)\s+)?SEARCH_PATH|SET_CONFIG\W+SEARCH_PATH", re.M
)


def test_a_search_path_is_seen_where_it_is_set_for_the_session() -> None:
    for statement in (
        "SET SEARCH_PATH = X;",
        "SELECT 1; SET LOCAL SEARCH_PATH TO X",
        "SELECT SET_CONFIG('SEARCH_PATH', '')",
    ):
        assert SETS_SEARCH_PATH.search(statement)
    assert not SETS_SEARCH_PATH.search(
        "CREATE FUNCTION F() LANGUAGE PLPGSQL SECURITY DEFINER SET SEARCH_PATH = X AS ''"
    )


@pytest.mark.parametrize("file", sorted(MIGRATIONS.glob("*.sql")), ids=lambda file: file.name)
def test_a_file_is_known_by_its_name_and_runs_within_a_transaction(file: Path) -> None:
    assert migrations.FILE_NAME.fullmatch(file.name)
    text = file.read_text().upper()
    assert not any(word in text for word in ("CONCURRENTLY", "COMMIT;", "VACUUM;"))
    assert not SETS_SEARCH_PATH.search(text), "a statement; as a clause of CREATE FUNCTION it is of the function alone"


def test_versions_have_no_gap_and_no_twin() -> None:
    assert [migration.version for migration in all_migrations()] == list(range(1, len(NAMES) + 1))


OBVIOUS_COLUMNS = {
    "audit": {"id", "at", "reason"},
    "pauses": {"paused_at", "reason"},
    "failures": {"kind", "latest_at"},
    "throughput": {"minute", "queue", "kind"},
    "throughput_minutes": {
        *("minute", "queue", "kind", "completed", "failed", "cancelled", "retried", "items"),
    },
    "batches": {"id", "created_at", "finished_at"},
    "failed_items": {"queue", "failed_at"},
    "migrations": {"version", "name", "applied_at"},
    "queues": {"queue", "kind", "processing"},
    "status": {
        *("id", "queue", "kind", "items_total", "items_done", "items_failed", "attempt", "max_attempts", "priority"),
        *("age", "claimed_by", "lease_expires_at", "unique_key", "created_at", "claimed_at", "finished_at"),
    },
    "workers": {"hostname", "pid", "version", "queues", "stopping", "started_at"},
}


def test_every_table_view_and_function_explains_itself(conn: Conn) -> None:
    assert (
        values(
            conn,
            """
        SELECT relname FROM pg_class
        WHERE relnamespace = 'batchq'::regnamespace AND relkind IN ('r', 'p', 'v') AND relname !~ '^finished_[0-9]+$'
          AND obj_description(oid, 'pg_class') IS NULL
        UNION ALL
        SELECT proname FROM pg_proc
        WHERE pronamespace = 'batchq'::regnamespace AND obj_description(oid, 'pg_proc') IS NULL
        UNION ALL
        SELECT 'schema' WHERE obj_description('batchq'::regnamespace, 'pg_namespace') IS NULL
        """,
        )
        == []
    )


@pytest.mark.parametrize("table", OBVIOUS_COLUMNS)
def test_every_column_explains_itself_but_for_the_obvious(conn: Conn, table: str) -> None:
    silent = values(
        conn,
        "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped "
        "AND col_description(attrelid, attnum) IS NULL",
        [f"batchq.{table}"],
    )
    assert set(silent) == OBVIOUS_COLUMNS[table]


def test_the_files_are_found_in_the_package_or_else_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "batchq"
    package.mkdir()
    monkeypatch.setattr(migrations, "__file__", str(package / "postgres" / "migrate.py"))
    assert migrations.directory() == tmp_path / "migrations"
    (package / "migrations").mkdir()
    assert migrations.directory() == package / "migrations"


# -------------------------------------------------------------------------------------------------- is it our schema


def test_a_database_without_the_schema_says_what_to_run(empty_dsn: str) -> None:
    with connect(empty_dsn) as conn, pytest.raises(ConfigError, match="has no batchq schema; run: batchq migrate"):
        check_schema(conn)


def test_the_schema_of_this_code_will_do(conn: Conn) -> None:
    check_schema(conn)


def test_an_older_schema_is_named_with_what_is_missing(conn: Conn, files: Path) -> None:
    (files / "0090_more.sql").write_text("SELECT 1;")
    with pytest.raises(ConfigError, match="the schema is older than this code: 'more' is missing; run: batchq migrate"):
        check_schema(conn)


def test_an_older_worker_goes_on_beside_a_newer_schema(conn: Conn) -> None:
    conn.execute("INSERT INTO batchq.migrations (version, name) VALUES (9001, 'expands')")
    check_schema(conn)


def test_an_older_worker_refuses_a_newer_schema_that_breaks_it(dsn: str, conn: Conn, files: Path) -> None:
    (files / "0090_contracts.sql").write_text("-- breaking: workers before 2.0 write this column\nSELECT 1;")
    assert migrate(dsn) == ["0090_contracts"]
    check_schema(conn)
    step("now a worker that does not know the file")
    (files / "0090_contracts.sql").unlink()
    with pytest.raises(ConfigError, match=r"in a way that breaks it \(contracts\); upgrade batchq"):
        check_schema(conn)


if __name__ == "__main__":
    run_alone(__file__)
