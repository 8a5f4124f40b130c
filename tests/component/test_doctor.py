"""batchq doctor: every finding is provoked for real, and a healthy database has none."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

import batchq
from batchq.operate import doctor
from batchq.operate.doctor import Finding
from batchq.postgres.statements import health
from batchq.postgres.statements.endings import Finish
from tests.component.rows import Conn, claim, expire_lease, finish, insert, processing, value
from tests.support.alone import run_alone
from tests.support.commands import CommandLine
from tests.support.poolers import PgBouncer
from tests.support.servers import free_port
from tests.support.steps import step
from tests.support.supasim import SupaSim
from tests.support.waiting import wait_until

NOW = "(now() AT TIME ZONE 'UTC')::date"


@pytest.fixture
def admin(admin_dsn: str) -> Iterator[Conn]:
    """Return a superuser's connection."""
    with psycopg.connect(admin_dsn, autocommit=True) as conn:
        yield conn


def found(dsn: str, check: str, **limits: Any) -> Finding:
    """Return the worst finding of a check."""
    of_check = [finding for finding in doctor.findings(dsn, **limits) if finding.check == check]
    step(f"{of_check}")
    return max(of_check, key=lambda finding: doctor.SEVERITIES.index(finding.severity))


def test_a_healthy_database_has_no_warning(dsn: str, conn: Conn, tmp_path: Path) -> None:
    processing(conn)
    ended = CommandLine(dsn, tmp_path)("doctor", "--json")
    assert {row["severity"] for row in ended.json} <= {"ok", "note"}, ended.out
    assert ended.code == 0
    assert {"writing", "schema", "clock", "pooler", *health.doctor_checks()} == {row["check"] for row in ended.json}


def test_a_session_that_holds_a_snapshot_is_named(dsn: str, admin: Conn, admin_dsn: str) -> None:
    with psycopg.connect(admin_dsn, application_name="report") as holder:
        holder.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        holder.execute("SELECT 1 FROM pg_class LIMIT 1")
        finding = found(dsn, "snapshot_held_by_a_session", patience=0)
        assert finding.severity == "critical"  # 12 times a patience of 0
        assert f"session {holder.info.backend_pid}" in finding.evidence
        assert "report" in finding.evidence
        assert found(dsn, "snapshot_held_by_a_session").severity == "ok"


def test_a_slot_that_nobody_reads_is_named(dsn: str, admin: Conn) -> None:
    admin.execute("SELECT pg_create_physical_replication_slot('batchq_doctor', true)")
    try:
        finding = found(dsn, "replication_slot")
        assert (finding.severity, "batchq_doctor" in finding.evidence) == ("warning", True)
    finally:
        admin.execute("SELECT pg_drop_replication_slot('batchq_doctor')")


def test_autovacuum_that_is_off_or_behind_is_told(dsn: str, conn: Conn, admin: Conn) -> None:
    admin.execute("ALTER TABLE batchq.batches_live SET (autovacuum_enabled = false)")
    assert found(dsn, "autovacuum_off").severity == "critical"
    admin.execute("INSERT INTO batchq.batches (kind) SELECT 'x' FROM generate_series(1, 50001)")
    admin.execute("DELETE FROM batchq.batches_live")
    wait_until(lambda: found(dsn, "autovacuum_behind").severity == "warning", 30, "the statistics to show dead rows")


def test_a_publication_that_stops_writes_is_named(dsn: str, admin: Conn) -> None:
    check = "writes_stopped_by_a_publication"
    admin.execute("CREATE PUBLICATION everything FOR ALL TABLES")
    assert found(dsn, check).severity == "ok"
    admin.execute("ALTER TABLE batchq.batches_live REPLICA IDENTITY NOTHING")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="does not have a replica identity"):
        processing(admin)
    finding = found(dsn, check)
    assert (finding.severity, "everything covers 1" in finding.evidence) == ("critical", True)
    admin.execute(finding.remedy.removeprefix("as the owner: "))
    assert found(dsn, check).severity == "ok"
    assert len(claim(admin)) == 1


@pytest.mark.parametrize(
    "covers", ["TABLE batchq.batches", "TABLE batchq.batches_live", "TABLES IN SCHEMA batchq", "ALL TABLES"]
)
def test_a_publication_covers_a_partition_by_each_way(dsn: str, admin: Conn, covers: str) -> None:
    admin.execute("ALTER TABLE batchq.batches_live REPLICA IDENTITY NOTHING")
    assert found(dsn, "writes_stopped_by_a_publication").severity == "ok"
    admin.execute(f"CREATE PUBLICATION new_ones FOR {covers} WITH (publish = 'insert')".encode())
    assert found(dsn, "writes_stopped_by_a_publication").severity == "ok"
    processing(admin)
    admin.execute("ALTER PUBLICATION new_ones SET (publish = 'insert, update')")
    assert found(dsn, "writes_stopped_by_a_publication").severity == "critical"
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
        processing(admin)


@pytest.mark.parametrize("part", ["(queue, status)", "WHERE (kind = 'mail')"])
def test_a_publication_of_parts_of_rows_is_named(dsn: str, admin: Conn, part: str) -> None:
    admin.execute(f"CREATE PUBLICATION parts FOR TABLE batchq.batches_live {part}".encode())
    with pytest.raises(psycopg.errors.InvalidColumnReference):
        processing(admin)
    finding = found(dsn, "writes_stopped_by_a_publication")
    assert (finding.severity, "parts has a column list or a row filter" in finding.evidence) == ("warning", True)


def test_what_others_have_put_on_the_tables_is_named(dsn: str, admin: Conn) -> None:
    admin.execute("CREATE FUNCTION public.note() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'")
    admin.execute("CREATE TRIGGER notes AFTER INSERT ON batchq.batches FOR EACH ROW EXECUTE FUNCTION public.note()")
    finding = found(dsn, "triggers_of_others")
    assert (finding.severity, finding.evidence) == ("note", "trigger notes on batchq.batches calls public.note()")
    admin.execute("CREATE RULE keep AS ON DELETE TO batchq.workers DO INSTEAD NOTHING")
    assert "rule keep on batchq.workers" in found(dsn, "triggers_of_others").evidence
    admin.execute("DROP RULE keep ON batchq.workers")
    admin.execute("CREATE TABLE public.theirs (version integer REFERENCES batchq.migrations)")
    finding = found(dsn, "triggers_of_others")
    assert (finding.severity, "of public.theirs references batchq.migrations" in finding.evidence) == ("warning", True)


def test_rows_hidden_by_row_level_security_are_told(admin: Conn, admin_dsn: str) -> None:
    with role(admin, "batchq_hidden"):
        admin.execute("GRANT SELECT ON batchq.batches_live TO batchq_hidden")
        hidden = make_conninfo(admin_dsn, user="batchq_hidden", password="secret")
        assert found(hidden, "row_level_security").severity == "ok"
        admin.execute("ALTER TABLE batchq.batches_live ENABLE ROW LEVEL SECURITY")
        finding = found(hidden, "row_level_security")
        assert finding.severity == "critical"
        assert "hides rows of batchq.batches_live from batchq_hidden" in finding.evidence
        admin.execute("CREATE POLICY part ON batchq.batches_live TO batchq_hidden USING (kind = 'mail')")
        assert found(hidden, "row_level_security").severity == "critical"
        admin.execute("CREATE POLICY whole ON batchq.batches_live TO batchq_hidden USING (true)")
        assert found(hidden, "row_level_security").severity == "ok"


COPIES = {
    "live": "INSERT INTO batchq.batches (id, kind) OVERRIDING SYSTEM VALUE VALUES (1000, 'mail')",
    "finished": "INSERT INTO batchq.batches (id, kind, status, finished_at) OVERRIDING SYSTEM VALUE "
    "VALUES (1000, 'mail', 'failed', now())",
    "failed item": "INSERT INTO batchq.failed_items (queue, batch_id, item_index, item, error, attempt) "
    "VALUES ('default', 1000, 0, '1', 'no', 1)",
    "audit": "INSERT INTO batchq.audit (id, verb) OVERRIDING SYSTEM VALUE VALUES (1000, 'cancel')",
}


@pytest.mark.parametrize("given_before", [0, 3], ids=["never", "some"])
@pytest.mark.parametrize("copied", COPIES)
def test_ids_that_begin_again_are_told(dsn: str, admin: Conn, copied: str, given_before: int) -> None:
    for _ in range(given_before):
        insert(admin)
    assert found(dsn, "ids_given_twice").severity == "ok"
    step("a row whose id the sequence has not given, as logical replication copies it")
    admin.execute(COPIES[copied].encode())
    finding = found(dsn, "ids_given_twice")
    assert (finding.severity, "1000 is in use" in finding.evidence) == ("critical", True)
    admin.execute(finding.remedy.removeprefix("as the owner: ").encode())
    assert found(dsn, "ids_given_twice").severity == "ok"


def test_days_whose_locks_leave_little_room_are_told(dsn: str, admin: Conn) -> None:
    assert found(dsn, "locks_near_limit").severity == "ok"
    room = value(
        admin, "SELECT current_setting('max_locks_per_transaction')::int * current_setting('max_connections')::int"
    )
    days = "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'batchq.batches_finished'::regclass"
    tables = [name for (name,) in admin.execute(days)]
    for table in tables:  # in place of hundreds of days, as many indexes
        each = f"EXECUTE format('CREATE INDEX ON {table} (id) WHERE id > %s', n)"
        admin.execute(f"DO $$BEGIN FOR n IN 1 .. {room // 3 // len(tables) + 1} LOOP {each}; END LOOP; END$$".encode())
    finding = found(dsn, "locks_near_limit")
    assert (finding.severity, f"of {room} that" in finding.evidence) == ("warning", True)


def test_days_without_a_partition_are_told(dsn: str, admin: Conn) -> None:
    today = value(admin, f"SELECT to_char({NOW}, 'YYYYMMDD')")
    admin.execute(f"DROP TABLE batchq.finished_{today}")
    assert found(dsn, "partitions_missing").severity == "critical"
    assert found(dsn, "rows_in_the_default_partition").severity == "ok"
    admin.execute("INSERT INTO batchq.batches (kind, status, finished_at) VALUES ('x', 'completed', now())")
    assert found(dsn, "rows_in_the_default_partition").severity == "warning"


def test_batches_in_trouble_are_named(dsn: str, conn: Conn, tmp_path: Path) -> None:
    insert(conn, kind="nobodys")
    stalled = processing(conn)
    expire_lease(conn, stalled.id, 60)
    died = [{"error": "worker died: w gave no sign of life"}] * 2
    poison = insert(conn, kind="poison", errors=died)
    assert "nobodys" in " ".join(f.evidence for f in doctor.findings(dsn) if f.check == "kind_without_a_worker")
    assert f"batch {stalled.id} " in found(dsn, "stalled").evidence
    assert f"batch {poison} of kind poison: its worker died 2 times" in found(dsn, "poisoned").evidence
    shown = CommandLine(dsn, tmp_path)("doctor")
    assert shown.code == 1
    assert any(line.startswith("warning   poisoned: ") for line in shown.out.splitlines())


def limit(conn: Conn, **given: Any) -> None:
    """Set a limit of the queue default."""
    named = ", ".join(f"{name} => %s" for name in given)
    conn.execute(f"SELECT batchq.set_limit({named})".encode(), list(given.values()))


def test_a_limit_that_nothing_can_pass_is_named(dsn: str, conn: Conn) -> None:
    check = "limit_that_nothing_can_pass"
    limit(conn, kind="work", max_running=0, per_second=1)
    assert found(dsn, check).severity == "ok", "nothing waits"
    insert(conn)
    finding = found(dsn, check)
    assert (finding.severity, finding.evidence) == (
        "warning", "max_running of kind work in queue default is 0 while 1 batches are ready and 0 are processing"
    )  # fmt: skip
    assert finding.remedy.startswith("batchq limit --queue 'default' --kind 'work' --max-running N raises it")
    limit(conn, kind="work", max_running=1)
    limit(conn, items_per_second=0)
    processing(conn, kind="items")
    assert "items_per_second of queue default is 0 while" in found(dsn, check).evidence
    limit(conn, max_running_per_key=0)
    assert "batches with a key never run" in found(dsn, check).evidence


def test_a_limit_of_what_nobody_knows_is_a_note(dsn: str, conn: Conn) -> None:
    limit(conn, kind="wrok", max_running=1)
    limit(conn, queue="mial", max_running=1)
    evidence = " ".join(f.evidence for f in doctor.findings(dsn) if f.check == "limit_without_a_use")
    assert ("kind wrok in queue default" in evidence, "queue mial" in evidence) == (True, True)
    finding = found(dsn, "limit_without_a_use")
    assert (finding.severity, "batchq limit --queue 'default' --kind 'wrok' --remove" in finding.remedy) == (
        "note",
        True,
    )
    insert(conn, kind="wrok")
    insert(conn, queue="mial")
    assert found(dsn, "limit_without_a_use").severity == "ok"


def test_a_queue_that_a_limit_holds_up_for_long_is_named(dsn: str, conn: Conn) -> None:
    limit(conn, max_running=1)
    batch_id = insert(conn)
    conn.execute(
        "INSERT INTO batchq.limit_shares (queue, worker, lease_seconds, held_back_by, refreshed_at) "
        "VALUES ('default', 'a', 15, 'max_running', now() + interval '1 minute')"
    )
    assert found(dsn, "held_up_by_a_limit").severity == "ok", "not for long"
    conn.execute("UPDATE batchq.batches SET run_at = now() - interval '2 hours' WHERE id = %s", [batch_id])
    finding = found(dsn, "held_up_by_a_limit")
    assert finding.severity == "warning"
    assert "1 ready batches are held back by max_running; the oldest has waited for 02:00:0" in finding.evidence


def test_a_throttle_of_more_than_a_day_is_named(dsn: str, conn: Conn) -> None:
    conn.execute("SELECT batchq.throttle('mail', 'send', 'acme', 80000, 'w1')")
    assert found(dsn, "long_throttle").severity == "ok"
    conn.execute("SELECT batchq.throttle('mail', 'send', 'acme', 90000, 'w1')")
    finding = found(dsn, "long_throttle")
    assert (finding.severity, "kind send of queue mail, key acme, is throttled until" in finding.evidence) == (
        "warning", True
    )  # fmt: skip
    assert finding.remedy.endswith("batchq unthrottle --queue 'mail' --kind 'send' --key 'acme'")


def test_a_number_that_differs_from_the_codes_is_a_note(dsn: str, conn: Conn) -> None:
    check = "limit_that_differs_from_code"
    declared = """[{"kind": "work", "max_running": 8, "per_second": 4, "burst_seconds": 2}]"""
    conn.execute("SELECT batchq.declare_limits('{default}', '{work}', %s)", [declared])
    limit(conn, kind="work", max_running=8, burst_seconds=2)
    assert found(dsn, check).severity == "ok", "the same, and one that only code has"
    limit(conn, kind="work", max_running=3, burst_seconds=2)
    finding = found(dsn, check)
    assert (finding.severity, finding.evidence) == (
        "note",
        "max_running of kind work in queue default: 3 is set, and code declares 8; the number that is set holds",
    )
    assert finding.remedy == "to follow the code: batchq limit --queue 'default' --kind 'work' --max-running none"
    limit(conn, kind="work", per_second=4)
    assert found(dsn, check).remedy.endswith("--burst-seconds 2")


def test_connections_near_a_limit_are_told(dsn: str, admin: Conn) -> None:
    database = admin.info.dbname
    admin.execute(f'ALTER DATABASE "{database}" CONNECTION LIMIT 2')
    finding = found(dsn, "connections_near_limit")
    assert (finding.severity, f"database {database}" in finding.evidence) == ("critical", True)


def test_transaction_ids_that_grow_old_are_told(dsn: str) -> None:
    assert found(dsn, "wraparound", ages=0).severity == "critical"


def test_a_schema_of_another_version_is_told(dsn: str, admin: Conn) -> None:
    admin.execute("INSERT INTO batchq.migrations (version, name) VALUES (9000, 'later')")
    assert found(dsn, "schema").severity == "note"
    admin.execute("UPDATE batchq.migrations SET breaking = true WHERE version = 9000")
    assert found(dsn, "schema").severity == "critical"
    admin.execute("DELETE FROM batchq.migrations WHERE version IN (9000, 3)")
    assert found(dsn, "schema").remedy == "run: batchq migrate"


def end(conn: Conn, batch_id: int, status: str) -> None:
    """End the one ready batch, and let those that wait for it know."""
    token = uuid4()
    assert [row.id for row in claim(conn, 1, token=token)] == [batch_id]
    finish(conn, Finish(batch_id, token, status, error='{"error": "no"}'))
    while conn.execute("SELECT seen FROM batchq.follow_flows(0)").fetchall() != [(0,)]:
        pass


@pytest.mark.parametrize(("status", "how"), [("failed", "failed"), ("cancelled", "was cancelled")])
def test_batches_that_wait_for_one_that_failed_are_named(dsn: str, conn: Conn, status: str, how: str) -> None:
    check, gone = "waits_for_a_failed_batch", "waits_for_a_batch_that_is_gone"
    bad = insert(conn)
    first = batchq.enqueue(conn, "report", after=[bad], queue="b")
    batchq.enqueue(conn, "mail", after=[bad], on_failure="run", priority=-1)
    batchq.enqueue(conn, "report", after=[bad], queue="c")
    assert found(dsn, check).severity == "ok"
    end(conn, bad, status)
    finding = found(dsn, check)
    assert finding.severity == "warning"
    assert finding.evidence == (
        f"2 waiting batches wait for batch {bad}, which {how}; the first is batch {first} of kind report in queue b"
    )
    assert f"batchq retry {bad}; " in finding.remedy
    assert f"batchq run-anyway {first}" in finding.remedy
    assert f"batchq cancel {first} --with-dependents" in finding.remedy
    assert found(dsn, gone).severity == "ok"
    step("while it is being retried, nothing is wrong")
    conn.execute("SELECT batchq.retry(%s)", [bad])
    assert found(dsn, check).severity == "ok"
    end(conn, bad, status)
    step("it is pruned: nobody can retry it any more")
    conn.execute("DELETE FROM batchq.batches_finished WHERE id = %s", [bad])
    assert found(dsn, check).severity == "ok"
    finding = found(dsn, gone)
    assert finding.severity == "warning"
    assert finding.evidence.endswith(f"waits for batch {bad}, which {how} and is not stored any more")
    assert f"batchq run-anyway {first}, or batchq cancel {first} --with-dependents" in finding.remedy


def test_a_needed_batch_whose_end_nobody_has_noticed_is_named(dsn: str, conn: Conn, admin: Conn) -> None:
    bad = insert(conn)
    first = batchq.enqueue(conn, "report", after=[bad])
    while conn.execute("SELECT seen FROM batchq.follow_flows(0)").fetchall() != [(0,)]:
        pass
    conn.execute("DELETE FROM batchq.batches_live WHERE id = %s", [bad])
    assert found(dsn, "waits_for_a_batch_that_is_gone").severity == "ok", "a worker will follow"
    admin.execute("DELETE FROM batchq.flow_events")
    finding = found(dsn, "waits_for_a_batch_that_is_gone")
    assert finding.evidence == (
        f"batch {first} of kind report in queue default waits for batch {bad}, "
        "which has gone and is not stored any more"
    )


def test_without_a_schema_only_that_is_wrong(empty_dsn: str) -> None:
    by_check = {finding.check: finding for finding in doctor.findings(empty_dsn)}
    assert by_check["schema"].severity == "critical"
    assert "not checked" in by_check["stalled"].evidence


def test_a_clock_that_is_wrong_is_told(conn: Conn) -> None:
    right = doctor.clock(conn, 5)
    wrong = doctor.clock(conn, 5, lambda: 0.0)
    assert (right.severity, wrong.severity) == ("ok", "warning")


@contextmanager
def role(admin: Conn, name: str) -> Iterator[None]:
    """Have a role that may enqueue and look, no more."""
    admin.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'secret'")
    try:
        admin.execute(f"GRANT USAGE ON SCHEMA batchq TO {name}")
        admin.execute(f"GRANT SELECT ON batchq.migrations TO {name}")
        yield
    finally:
        admin.execute(f"DROP OWNED BY {name}")
        admin.execute(f"DROP ROLE {name}")


def test_what_a_role_may_not_do_or_see_is_a_note(admin: Conn, admin_dsn: str) -> None:
    with role(admin, "batchq_little"):
        little = make_conninfo(admin_dsn, user="batchq_little", password="secret")
        list_of = list(doctor.findings(little))
    notes = {finding.evidence for finding in list_of if finding.check == "rights"}
    step(f"{list_of}")
    assert notes == {
        f"role batchq_little cannot {what}" for what in ("enqueue", "claim and finish", "make and drop partitions")
    }
    assert all("not checked" in finding.evidence for finding in list_of if finding.check == "stalled")
    assert any(finding.check == "sessions_not_seen" and finding.severity == "note" for finding in list_of)
    assert doctor.exit_code(list_of) == 0


def test_the_poolers_mode_is_found_by_its_behaviour(
    admin_dsn: str, pgbouncer: PgBouncer, sim: SupaSim, database: str
) -> None:
    assert found(admin_dsn, "pooler").evidence.startswith("direct")
    assert found(pgbouncer.dsn(database), "pooler").evidence.startswith("transaction mode")
    assert found(sim.dsn(), "pooler").evidence.startswith("transaction mode")


def test_exit_code_is_that_of_the_worst() -> None:
    codes = [doctor.exit_code([Finding("x", "ok", ""), Finding("x", severity, "")]) for severity in doctor.SEVERITIES]
    assert codes == [0, 0, 1, 2]


def test_no_connection_is_critical(tmp_path: Path) -> None:
    ended = CommandLine(f"postgresql://u:secret@127.0.0.1:{free_port()}/x", tmp_path)("doctor", "--json")
    assert ended.code == 2
    (finding,) = ended.json
    assert (finding["check"], finding["severity"]) == ("connection", "critical")
    assert "refused" in finding["evidence"]
    assert "secret" not in ended.out


if __name__ == "__main__":
    run_alone(__file__)
