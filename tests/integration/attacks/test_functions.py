"""The door: functions. They serve those whose duty it is, on batchq's own tables, and nobody else."""

from collections.abc import Iterator

import psycopg
import pytest

from tests.component.rows import insert, value, values
from tests.support.alone import run_alone
from tests.support.roles import role_for
from tests.support.steps import step

Conn = psycopg.Connection
NOT_ALLOWED = psycopg.errors.InsufficientPrivilege

EVERY_FUNCTION = """
SELECT p.oid::regprocedure::text
FROM pg_catalog.pg_proc p
WHERE p.pronamespace = 'batchq'::regnamespace
"""


@pytest.fixture
def viewer(admin_dsn: str) -> Iterator[Conn]:
    """Return the connection of a viewer, who may make temporary tables, as anybody."""
    with role_for(admin_dsn, "viewer") as dsn, psycopg.connect(dsn, autocommit=True) as conn:
        yield conn


@pytest.fixture
def stranger(admin_dsn: str) -> Iterator[Conn]:
    """Return the connection of a role that has USAGE of the schema and nothing else."""
    with role_for(admin_dsn) as dsn:
        role = psycopg.conninfo.conninfo_to_dict(dsn)["user"]
        with psycopg.connect(admin_dsn, autocommit=True) as admin:
            admin.execute(f'GRANT USAGE ON SCHEMA batchq TO "{role}"'.encode())
        with psycopg.connect(dsn, autocommit=True) as conn:
            yield conn


def test_public_may_execute_no_function(conn: Conn) -> None:
    assert values(conn, EVERY_FUNCTION + "AND has_function_privilege('public', p.oid, 'EXECUTE')") == []


def test_every_function_has_its_own_search_path_or_was_parsed_when_it_was_made(conn: Conn) -> None:
    parsed_late = "AND p.prosqlbody IS NULL AND p.prolang <> (SELECT oid FROM pg_language WHERE lanname = 'internal')"
    own_path = "AND NOT coalesce('search_path=pg_catalog, pg_temp' = ANY (p.proconfig), false)"
    assert values(conn, EVERY_FUNCTION + parsed_late + own_path) == []


def test_no_view_lends_the_owners_eyes_to_who_may_not_see_the_table(conn: Conn, stranger: Conn) -> None:
    for view in values(conn, "SELECT viewname FROM pg_views WHERE schemaname = 'batchq'"):
        with pytest.raises(NOT_ALLOWED):
            stranger.execute(f"SELECT FROM batchq.{view}".encode())


def test_a_stranger_may_call_nothing(conn: Conn, stranger: Conn) -> None:
    callable_by_stranger = "AND has_function_privilege(%s, p.oid, 'EXECUTE')"
    assert values(conn, EVERY_FUNCTION + callable_by_stranger, [stranger.info.user]) == []


@pytest.mark.parametrize(
    "function", ["count_items", "forget_failed_items", "keep_processing", "ring", "refuse_finish_ahead"]
)
def test_a_trigger_function_cannot_be_had_for_a_table_of_ones_own(conn: Conn, viewer: Conn, function: str) -> None:
    insert(conn, items=[1, 2])
    conn.execute("INSERT INTO batchq.failed_items (queue, batch_id, item_index, item, error, retryable, attempt)"
                 " VALUES ('default', 1, 0, '1', 'bad', true, 1)")  # fmt: skip
    viewer.execute("CREATE TEMPORARY TABLE bait (LIKE batchq.batches)")
    with pytest.raises(NOT_ALLOWED, match="permission denied for function"):
        viewer.execute(f"CREATE TRIGGER bite AFTER INSERT ON bait EXECUTE FUNCTION batchq.{function}()".encode())
    assert value(conn, "SELECT count(*) FROM batchq.failed_items") == 1


@pytest.mark.parametrize(
    ("function", "event"),
    [("count_items", "INSERT ON bait FOR EACH ROW"), ("forget_failed_items", "TRUNCATE ON bait")],
)
def test_a_trigger_function_that_was_had_before_does_nothing_elsewhere(
    conn: Conn, admin_dsn: str, viewer: Conn, function: str, event: str
) -> None:
    step("given a role that was granted the function, as everybody was before")
    batch_id = insert(conn, items=[1, 2])
    with psycopg.connect(admin_dsn, autocommit=True) as admin:
        admin.execute(f'GRANT EXECUTE ON FUNCTION batchq.{function}() TO "{viewer.info.user}"'.encode())
    viewer.execute("CREATE TEMPORARY TABLE bait (LIKE batchq.batches)")
    viewer.execute(f"CREATE TRIGGER bite AFTER {event} EXECUTE FUNCTION batchq.{function}()".encode())
    step("when it fires on a table of that role's own, then it refuses")
    with pytest.raises(NOT_ALLOWED, match=f"batchq.{function} is (a|the) trigger function of"):
        viewer.execute(
            b"TRUNCATE bait" if "TRUNCATE" in event
            else f"INSERT INTO bait SELECT b.* FROM batchq.batches b WHERE id = {batch_id}".encode()
        )  # fmt: skip
    assert value(conn, "SELECT items_total FROM batchq.batches") == 2


VERBS = (
    "cancel(1)", "retry(1)", "retry_items(1)", "snooze(1, '1 h')", "set_priority(1, 3)", "move(1, 'other')",
    "pause('default')", "resume('default')", "drain_worker('w')", "bulk('cancel')",
)  # fmt: skip
DUTIES_OF_WORKERS = (
    "prune('0 s')", "prune_records()", "merge_throughput()", "create_finished_partitions(current_date, 1)",
    "move_positions('{}', '{}', 60)", "give_replica_identities()", "bell(true)", "forget_failed_items('default', 1)",
    "grant_duty('operator', current_user::text)",
)  # fmt: skip


@pytest.mark.parametrize("call", [*VERBS, *DUTIES_OF_WORKERS])
def test_a_viewer_changes_nothing(conn: Conn, viewer: Conn, call: str) -> None:
    insert(conn)
    with pytest.raises(NOT_ALLOWED):
        viewer.execute(f"SELECT batchq.{call}".encode())
    assert values(conn, "SELECT status FROM batchq.batches") == ["pending"]
    assert values(conn, "SELECT verb FROM batchq.audit") == []


def test_who_called_a_verb_is_noted_though_it_has_the_owners_rights(conn: Conn, admin_dsn: str) -> None:
    first, second = insert(conn), insert(conn)
    with role_for(admin_dsn, "operator") as dsn, role_for(admin_dsn) as login:
        operator, user = (psycopg.conninfo.conninfo_to_dict(one)["user"] for one in (dsn, login))
        with psycopg.connect(admin_dsn, autocommit=True) as admin:
            admin.execute(f'GRANT "{operator}" TO "{user}"'.encode())
        with psycopg.connect(dsn, autocommit=True) as own:
            own.execute("SELECT batchq.cancel(%s)", [first])
        with psycopg.connect(login, autocommit=True) as other, other.transaction():
            other.execute(f'SET LOCAL ROLE "{operator}"'.encode())
            other.execute("SELECT batchq.cancel(%s)", [second])
            other.execute("SELECT batchq.pause('default')")
        assert values(conn, "SELECT role FROM batchq.audit ORDER BY id") == [operator] * 3
        assert values(conn, "SELECT role FROM batchq.pauses") == [operator]


def test_an_operator_writes_no_table_and_forges_no_audit(conn: Conn, admin_dsn: str) -> None:
    insert(conn)
    with role_for(admin_dsn, "operator") as dsn, psycopg.connect(dsn, autocommit=True) as operator:
        for statement in (
            "UPDATE batchq.batches SET payload = '{}'",
            "DELETE FROM batchq.batches",
            "INSERT INTO batchq.batches (kind) VALUES ('x')",
            "INSERT INTO batchq.audit (verb, role) VALUES ('cancel', 'somebody else')",
            "UPDATE batchq.audit SET role = 'somebody else'",
            "DELETE FROM batchq.audit",
            "TRUNCATE batchq.batches",
            "SELECT batchq.note_verb('cancel', 1, 1, 'q', 'k', '{}', 'r', 'a')",
            "SELECT batchq.cancel_live('q', '{1}', '{pending}', 'x')",
            "SELECT batchq.lock_batch(1)",
        ):
            with pytest.raises(NOT_ALLOWED):
                operator.execute(statement.encode())


def test_an_argument_of_a_verb_is_never_a_statement(conn: Conn, admin_dsn: str) -> None:
    batch_id = insert(conn)
    evil = "x'); DROP TABLE batchq.audit; --"
    with role_for(admin_dsn, "operator") as dsn, psycopg.connect(dsn, autocommit=True) as operator:
        operator.execute("SELECT batchq.move(%s, %s, %s, %s)", [batch_id, evil, evil, evil])
        operator.execute("SELECT batchq.pause(%s, %s, NULL, %s, %s)", [evil] * 4)
        operator.execute(
            "SELECT * FROM batchq.bulk('cancel', jsonb_build_object('queue', %s::text, 'error_like', %s::text))",
            [evil, evil],
        )
        operator.execute("SELECT batchq.drain_worker(%s)", [evil])
    assert values(conn, "SELECT queue FROM batchq.batches") == [evil]
    with pytest.raises(psycopg.errors.UndefinedObject):
        conn.execute("SELECT batchq.grant_duty('viewer', %s)", [evil])
    with pytest.raises(psycopg.errors.RaiseException, match="batchq knows no duty"):
        conn.execute("SELECT batchq.grant_duty(%s, 'postgres')", [evil])
    assert values(conn, "SELECT verb FROM batchq.audit ORDER BY id") == ["move", "pause"]


def test_temporary_objects_of_a_callers_own_are_not_met_by_a_function_with_the_owners_rights(
    conn: Conn, admin_dsn: str
) -> None:
    batch_id = insert(conn)
    with role_for(admin_dsn, "operator") as dsn, psycopg.connect(dsn, autocommit=True) as operator:
        operator.execute("CREATE TEMPORARY TABLE audit (LIKE batchq.audit)")
        operator.execute(
            "CREATE FUNCTION pg_temp.now() RETURNS timestamptz LANGUAGE sql AS $$ SELECT 'epoch'::timestamptz $$"
        )
        operator.execute(
            "CREATE FUNCTION pg_temp.left(text, integer) RETURNS text LANGUAGE sql AS $$ SELECT 'forged' $$"
        )
        operator.execute("SET search_path = pg_temp, public")
        operator.execute("SELECT batchq.cancel(%s, 'true')", [batch_id])
    assert value(conn, "SELECT reason FROM batchq.audit") == "true"
    assert value(conn, "SELECT finished_at > now() - interval '1 hour' FROM batchq.batches")


if __name__ == "__main__":
    run_alone(__file__)
