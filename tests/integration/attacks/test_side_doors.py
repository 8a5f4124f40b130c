"""The side doors: what is not a statement on batchq's tables, and leads there all the same."""

import re
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from batchq import enqueue, enqueue_many
from tests.component.rows import insert, value, values
from tests.support.alone import run_alone
from tests.support.roles import role_for
from tests.support.steps import step

Conn = psycopg.Connection[Any]
DENIED = psycopg.errors.InsufficientPrivilege


@pytest.fixture
def producer(admin_dsn: str) -> Iterator[Conn]:
    """Return the connection of a producer."""
    with role_for(admin_dsn, "producer") as dsn, psycopg.connect(dsn, autocommit=True) as conn:
        yield conn


@pytest.fixture
def operator(admin_dsn: str) -> Iterator[Conn]:
    """Return the connection of an operator."""
    with role_for(admin_dsn, "operator") as dsn, psycopg.connect(dsn, autocommit=True) as conn:
        yield conn


# --------------------------------------------------------------------------------------------- more rights, more reach

SIDE_DOORS = {
    "an event trigger": "CREATE EVENT TRIGGER mine ON ddl_command_end EXECUTE FUNCTION pg_temp.mine()",
    "triggers off for the session": "SET session_replication_role = replica",
    "the owner's role": "SET ROLE {owner}",
    "the owner's session": "SET SESSION AUTHORIZATION {owner}",
    "the owner's things": "REASSIGN OWNED BY {owner} TO {me}",
    "the owner's things gone": "DROP OWNED BY {owner}",
    "the owner's future things": "ALTER DEFAULT PRIVILEGES FOR ROLE {owner} GRANT ALL ON TABLES TO {me}",
    "settings of another role": "ALTER ROLE {owner} SET search_path = public",
    "settings of the database": "ALTER DATABASE {database} SET search_path = public",
    "settings of a function": "ALTER FUNCTION batchq.cancel(bigint, text, text) RESET ALL",
    "another owner of a function": "ALTER FUNCTION batchq.cancel(bigint, text, text) OWNER TO {me}",
    "a function made anew": "CREATE OR REPLACE FUNCTION batchq.bell(boolean) RETURNS void LANGUAGE sql AS 'SELECT 1'",
    "a function that fits better": "CREATE FUNCTION batchq.cancel(integer) RETURNS text LANGUAGE sql AS 'SELECT ''x'''",
    "an operator in the schema": "CREATE OPERATOR batchq.= (LEFTARG = text, RIGHTARG = bigint, FUNCTION = texteq)",
    "a publication": "CREATE PUBLICATION mine FOR TABLE batchq.batches",
    "a subscription": "CREATE SUBSCRIPTION mine CONNECTION 'dbname=x' PUBLICATION mine WITH (connect = false)",
    "statistics": "CREATE STATISTICS pg_temp.mine ON queue, kind FROM batchq.batches_live",
    "an index with a function": "CREATE INDEX ON batchq.batches_live ((pg_temp.mine(payload)))",
    "a table rewritten": "CLUSTER batchq.batches_live USING batches_live_ready",
    "an index rebuilt": "REINDEX TABLE batchq.batches_live",
    "a column more": "ALTER TABLE batchq.batches ADD COLUMN mine text DEFAULT current_user",
    "a default of another function": "ALTER TABLE batchq.batches ALTER COLUMN priority SET DEFAULT pg_temp.mine()",
    "a cast between others' types": "CREATE CAST (jsonb AS bigint) WITH INOUT AS IMPLICIT",
    "MERGE": "MERGE INTO batchq.batches b USING (SELECT 1 AS id) s ON b.id = s.id"
    " WHEN MATCHED THEN UPDATE SET kind = 'forged'",
    "the whole row": "SELECT b FROM batchq.batches b",
    "the row as JSON": "SELECT to_jsonb(b) FROM batchq.batches b",
    "a system column": "SELECT ctid, xmin FROM batchq.batches",
    "a plan that runs": "EXPLAIN ANALYZE SELECT payload FROM batchq.batches",
    "a cursor that locks": "SELECT id FROM batchq.batches FOR KEY SHARE",
    "a program on the server": "COPY batchq.batches (kind) FROM PROGRAM 'echo forged'",
    "a file on the server": "COPY batchq.batches (kind) FROM '/etc/hostname'",
    "a large object from a file": "SELECT lo_import('/etc/passwd')",
    "a file read": "SELECT pg_read_file('postgresql.conf')",
    "the worker's backend": "SELECT pg_terminate_backend({pid})",
    "the worker's statement": "SELECT pg_cancel_backend({pid})",
    "what the schema is named": "ALTER SCHEMA batchq RENAME TO mine",
    "a table taken elsewhere": "ALTER TABLE batchq.pauses SET SCHEMA public",
    "a view lent to others": "ALTER VIEW batchq.status RESET (security_invoker)",
}


@pytest.mark.parametrize("door", SIDE_DOORS)
def test_a_producer_finds_no_side_door(conn: Conn, admin_dsn: str, producer: Conn, door: str) -> None:
    insert(conn, kind="untouched")
    producer.execute("CREATE FUNCTION pg_temp.mine() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END'")
    producer.execute("CREATE FUNCTION pg_temp.mine(jsonb) RETURNS bigint LANGUAGE sql IMMUTABLE AS 'SELECT 1::bigint'")
    with psycopg.connect(admin_dsn) as worker:
        names = {"owner": str(worker.info.user), "me": str(producer.info.user), "database": worker.info.dbname}
        statement = sql.SQL(SIDE_DOORS[door]).format(
            **{name: sql.Identifier(text) for name, text in names.items()},
            pid=sql.Literal(worker.info.backend_pid),
        )
        with pytest.raises(DENIED):
            producer.execute(statement)
        assert worker.execute("SELECT 1").fetchone() == (1,)
    assert values(conn, "SELECT kind FROM batchq.batches") == ["untouched"]


def test_a_producer_passes_none_of_its_rights_on(conn: Conn, producer: Conn) -> None:
    granted = "SELECT count(*) FROM pg_attribute, aclexplode(attacl) a WHERE attrelid = 'batchq.batches'::regclass"
    before = value(conn, granted)
    for right in ("SELECT (id)", "SELECT (payload)", "INSERT (kind)"):
        producer.execute(f"GRANT {right} ON batchq.batches TO PUBLIC".encode())  # warns, and grants nothing
    with pytest.raises(DENIED):
        producer.execute("GRANT EXECUTE ON FUNCTION batchq.cancel(bigint, text, text) TO PUBLIC")
    assert value(conn, granted) == before


def test_a_producer_reads_no_payload_in_the_statistics_or_in_others_statements(conn: Conn, producer: Conn) -> None:
    for _ in range(50):
        insert(conn, kind="secret-kind", payload={"card": "4111"})
    with psycopg.connect(conn.info.dsn, password=conn.info.password, autocommit=True) as owner:
        owner.execute("ANALYZE batchq.batches_live; ANALYZE batchq.batches")
        owner.execute("SELECT 'a secret in a statement'")
        assert value(owner, "SELECT count(*) FROM pg_stats WHERE schemaname = 'batchq'") > 0
        assert values(producer, "SELECT attname FROM pg_stats WHERE schemaname = 'batchq' AND attname <> 'id'") == []
        seen = values(producer, "SELECT query FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
    assert not [query for query in seen if query and "secret" in query]
    with pytest.raises(DENIED):
        producer.execute("SELECT FROM pg_statistic")


# ------------------------------------------------------------------------------------------ functions with more rights


def test_a_type_of_the_callers_own_is_cast_with_the_callers_rights(conn: Conn, operator: Conn) -> None:
    """The cast's function runs before the verb does, so it never has the owner's rights."""
    batch_id = insert(conn)
    operator.execute("CREATE TYPE pg_temp.evil AS (a bigint)")
    operator.execute(
        "CREATE FUNCTION pg_temp.told(pg_temp.evil) RETURNS bigint LANGUAGE plpgsql AS"
        " 'BEGIN RAISE NOTICE ''ran as %'', current_user; RETURN ($1).a; END'"
    )
    operator.execute("CREATE CAST (pg_temp.evil AS bigint) WITH FUNCTION pg_temp.told(pg_temp.evil) AS IMPLICIT")
    heard: list[str] = []
    operator.add_notice_handler(lambda notice: heard.append(str(notice.message_primary)))
    operator.execute(f"SELECT batchq.cancel(ROW({batch_id})::pg_temp.evil)".encode())
    assert heard == [f"ran as {operator.info.user}"]
    assert values(conn, "SELECT status FROM batchq.batches") == ["cancelled"]


def test_no_function_with_the_owners_rights_evaluates_anything_by_default(conn: Conn) -> None:
    defaults = values(
        conn,
        "SELECT pg_get_expr(proargdefaults, 0) FROM pg_proc"
        " WHERE pronamespace = 'batchq'::regnamespace AND prosecdef AND pronargdefaults > 0",
    )
    assert len(defaults) > 5
    for default in defaults:
        constants = re.sub(r"NULL|true|false|'[^']*'|[\d.]+|::[\w ]+(\[\])?", "", default)
        assert not re.search(r"\w", constants), f"{default} is evaluated with the caller's search path"


def test_no_function_with_the_owners_rights_runs_text_that_it_was_given(conn: Conn) -> None:
    """EXECUTE with the owner's rights only for what was made by format, from names that it has looked up itself."""
    found = conn.execute(
        "SELECT proname::text, prosrc FROM pg_proc WHERE pronamespace = 'batchq'::regnamespace AND prosecdef"
    ).fetchall()
    assert len(found) > 15
    run = {(name, what) for name, text in found for what in re.findall(r"\bEXECUTE\s+(?!FUNCTION)(\w+)", text)}
    assert {what for _, what in run} <= {"format"}, run
    quoted = [text for _, text in found for text in re.findall(r"EXECUTE format\(([^;]*)\);", text)]
    assert quoted
    assert not [text for text in quoted if "%s" in text], "%I and %L quote, %s does not"


def test_a_role_with_a_hostile_name_gets_its_duty_and_nothing_else(conn: Conn, admin_dsn: str) -> None:
    name = "x\"; DROP TABLE batchq.audit; -- /* ' $$"
    with psycopg.connect(admin_dsn, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(name)))
        try:
            admin.execute("SELECT batchq.grant_duty('viewer', %s)", [name])
            privilege = "SELECT has_table_privilege(%s, 'batchq.audit', %s)"
            assert [value(conn, privilege, [name, verb]) for verb in ("SELECT", "DELETE")] == [True, False]
        finally:
            admin.execute(sql.SQL("DROP OWNED BY {role}; DROP ROLE {role}").format(role=sql.Identifier(name)))


# ------------------------------------------------------------------------------------------------------ row security


@pytest.fixture
def tenant(conn: Conn, admin_dsn: str) -> Iterator[Conn]:
    """Return the connection of a tenant, who may see and make batches with its own name in their payload."""
    for who in ("me", "somebody else"):
        enqueue(conn, "mail", {"tenant": who, "card": f"card of {who}"})
    with role_for(admin_dsn, "producer") as dsn:
        role = sql.Identifier(str(conninfo_to_dict(dsn)["user"]))
        with psycopg.connect(admin_dsn, autocommit=True) as admin:
            admin.execute(
                sql.SQL("""
                ALTER TABLE batchq.batches ENABLE ROW LEVEL SECURITY;
                CREATE POLICY own ON batchq.batches TO {role}
                  USING (payload ->> 'tenant' = 'me') WITH CHECK (payload ->> 'tenant' = 'me');
                GRANT SELECT ON batchq.batches, batchq.all_batches, batchq.status TO {role};
                GRANT EXECUTE ON FUNCTION batchq.progress_of_parts(bigint) TO {role}
                """).format(role=role)
            )
        with psycopg.connect(dsn, autocommit=True) as conn_of_tenant:
            yield conn_of_tenant


def test_a_tenant_makes_no_condition_that_is_asked_before_its_policy(tenant: Conn) -> None:
    tenant.execute(
        "CREATE FUNCTION pg_temp.leak(jsonb) RETURNS boolean COST 0.000001 LANGUAGE plpgsql AS"
        " 'BEGIN RAISE NOTICE ''%'', $1 ->> ''card''; RETURN true; END'"
    )
    heard: list[str] = []
    tenant.add_notice_handler(lambda notice: heard.append(str(notice.message_primary)))
    for relation in ("batches", "batches b JOIN batchq.batches c USING (id, payload)"):
        tenant.execute(f"SELECT FROM batchq.{relation} WHERE pg_temp.leak(payload)".encode())
    assert set(heard) == {"card of me"}
    step("nor one that fails by what others' rows have")
    assert tenant.execute("SELECT 1 / (payload ->> 'card' <> 'card of somebody else')::integer FROM batchq.batches"
                          ).fetchall() == [(1,)]  # fmt: skip


@pytest.mark.parametrize(
    "statement",
    [
        "SET row_security = off; SELECT FROM batchq.batches",
        "SELECT FROM batchq.batches_live",
        "SELECT FROM ONLY batchq.batches_live",
        "SELECT FROM batchq.finished_default",
        "DROP POLICY own ON batchq.batches",
        "ALTER TABLE batchq.batches DISABLE ROW LEVEL SECURITY",
        "ALTER TABLE batchq.batches NO FORCE ROW LEVEL SECURITY",
        "INSERT INTO batchq.batches (kind, payload) VALUES ('x', '{\"tenant\": \"somebody else\"}')",
        "INSERT INTO batchq.batches (kind) VALUES ('x')",
        "COPY batchq.batches (kind, payload) TO PROGRAM 'cat'",
    ],
)
def test_a_tenant_does_not_get_round_its_policy(conn: Conn, tenant: Conn, statement: str) -> None:
    with pytest.raises(DENIED):
        tenant.execute(statement.encode())
    assert value(conn, "SELECT count(*) FROM batchq.batches") == 2


def test_a_tenant_sees_its_own_as_before_once_a_queue_is_split(conn: Conn, tenant: Conn) -> None:
    conn.execute("SELECT batchq.split_queue('default', 4)")
    assert tenant.execute("SELECT queue, kind FROM batchq.status").fetchall() == [("default", "mail")]


def test_a_tenant_enqueues_many_of_its_own_and_none_of_others(conn: Conn, tenant: Conn) -> None:
    """COPY does not work with row security."""
    given = ({"tenant": "me", "n": n} for n in range(250))
    assert enqueue_many(tenant, "mail", given, delay_seconds=5) == 250
    assert value(conn, "SELECT count(*) FROM batchq.batches WHERE run_at > now()") == 250
    with pytest.raises(DENIED):
        enqueue_many(tenant, "mail", [{"tenant": "me"}, {"tenant": "somebody else"}])
    assert enqueue_many(tenant, "mail", items=range(5), items_per_batch=2, payload={"tenant": "me"}) == 3
    assert value(conn, "SELECT count(*) FROM batchq.batches") == 255


def test_an_error_in_the_middle_of_many_loses_none_of_them_silently(conn: Conn) -> None:
    """A generator that fails with the error that COPY gives beside row security, when some have been taken."""

    def payloads() -> Iterator[int]:
        yield from range(150)
        raise psycopg.errors.FeatureNotSupported("of another database")

    with pytest.raises(psycopg.errors.FeatureNotSupported, match="of another database"):
        enqueue_many(conn, "mail", payloads())
    assert value(conn, "SELECT count(*) FROM batchq.batches") == 0


def test_a_tenant_copies_and_counts_its_own_alone(tenant: Conn) -> None:
    with tenant.cursor().copy("COPY (SELECT payload ->> 'card' FROM batchq.batches) TO STDOUT") as copy:
        assert b"".join(bytes(part) for part in copy) == b"card of me\n"
    for relation in ("batches", "status"):
        assert value(tenant, f"SELECT count(*) FROM batchq.{relation}") == 1
    assert values(tenant, "SELECT attname FROM pg_stats WHERE schemaname = 'batchq' AND tablename = 'batches'") == []


if __name__ == "__main__":
    run_alone(__file__)
