"""The door: roles. Each duty is done by a role that owns nothing and has the grants of its duty alone, and no grant is
broader than that; what the docs say is what is tried here."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

import batchq
from batchq.postgres import migrate as migrations
from tests.component.rows import value, values
from tests.support import matrix, tour
from tests.support.alone import run_alone
from tests.support.commands import CommandLine
from tests.support.databases import MIGRATIONS
from tests.support.poolers import PgBouncer
from tests.support.roles import role_for
from tests.support.steps import step

Conn = psycopg.Connection
DUTIES = ("producer", "worker", "viewer", "operator")


# What an operator may write of a schedule; the other columns are the workers'.
DEFINITION = (
    "name", "cron", "time_zone", "queue", "kind", "payload", "missed", "catch_up_most", "overlap", "paused",
)  # fmt: skip


@pytest.fixture
def roles(admin_dsn: str) -> Iterator[dict[str, str]]:
    """Return the DSN of a role for each duty."""
    with ExitStack() as stack:
        yield {duty: stack.enter_context(role_for(admin_dsn, duty)) for duty in DUTIES}


@pytest.mark.parametrize("through", ["direct", "pgbouncer"])
def test_each_duty_is_done_with_its_own_grants_and_without_ownership(
    roles: dict[str, str], admin_dsn: str, pgbouncer: PgBouncer, tmp_path: Path, through: str
) -> None:
    if through == "pgbouncer":
        roles = {duty: pgbouncer.dsn_of(dsn) for duty, dsn in roles.items()}
    step("a producer enqueues")
    tour.produce(roles["producer"])
    step("a worker works, rescues, makes partitions and drops old ones")
    with psycopg.connect(admin_dsn, autocommit=True) as admin:
        admin.execute("SELECT batchq.create_finished_partitions('2020-01-01', 1)")
    assert tour.work(roles["worker"], admin_dsn) == tour.AFTER_WORK
    with psycopg.connect(admin_dsn, autocommit=True) as admin:
        assert values(admin, "SELECT relname FROM pg_class WHERE relname = 'finished_20200101'") == []
    step("a viewer looks")
    assert tour.look(roles["viewer"], tmp_path) == {}
    step("an operator looks and operates")
    assert tour.look(roles["operator"], tmp_path) == {}
    assert tour.operate(roles["operator"], admin_dsn, tmp_path) == {}


PRIVILEGES = """
SELECT kind, name, privilege
FROM (
  SELECT 'relation' AS kind, c.relname::text AS name, p.privilege,
    has_table_privilege(%(role)s, c.oid, p.privilege) AS has
  FROM pg_class c
  CROSS JOIN unnest('{SELECT,INSERT,UPDATE,DELETE,TRUNCATE,REFERENCES,TRIGGER}'::text[]) AS p(privilege)
  WHERE c.relnamespace = 'batchq'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
  UNION ALL
  SELECT 'column', c.relname || '.' || a.attname, p.privilege,
    has_column_privilege(%(role)s, c.oid, a.attnum, p.privilege)
      AND NOT has_table_privilege(%(role)s, c.oid, p.privilege)
  FROM pg_class c
  JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
  CROSS JOIN unnest('{SELECT,INSERT,UPDATE,REFERENCES}'::text[]) AS p(privilege)
  WHERE c.relnamespace = 'batchq'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
  UNION ALL
  SELECT 'sequence', c.relname, p.privilege, has_sequence_privilege(%(role)s, c.oid, p.privilege)
  FROM pg_class c
  CROSS JOIN unnest('{USAGE,SELECT,UPDATE}'::text[]) AS p(privilege)
  WHERE c.relnamespace = 'batchq'::regnamespace AND c.relkind = 'S'
  UNION ALL
  SELECT 'function', p.oid::regprocedure::text, 'EXECUTE', has_function_privilege(%(role)s, p.oid, 'EXECUTE')
  FROM pg_proc p
  WHERE p.pronamespace = 'batchq'::regnamespace
  UNION ALL
  SELECT 'schema', 'batchq', p.privilege, has_schema_privilege(%(role)s, 'batchq', p.privilege)
  FROM unnest('{USAGE,CREATE}'::text[]) AS p(privilege)
) AS tried
WHERE has
ORDER BY 1, 2, 3
"""


def privileges(conn: Conn, dsn: str) -> list[tuple[str, str, str]]:
    """Return every privilege on anything in the schema that the role of *dsn* has: every cell is asked for."""
    return conn.execute(PRIVILEGES.encode(), {"role": conninfo_to_dict(dsn)["user"]}).fetchall()


def test_a_role_has_the_privileges_of_its_duty_and_no_other(conn: Conn, roles: dict[str, str]) -> None:
    granted = {duty: privileges(conn, dsn) for duty, dsn in roles.items()}
    for duty, found in granted.items():
        step("%s: %s cells", duty, len(found))
        assert ("schema", "batchq", "USAGE") in found
        assert ("schema", "batchq", "CREATE") not in found
        assert not [cell for cell in found if cell[0] == "sequence" or cell[2] in ("TRUNCATE", "REFERENCES", "TRIGGER")]
    assert {name for kind, name, privilege in granted["producer"] if kind == "relation"} == {"migrations"}
    assert {privilege for kind, _, privilege in granted["viewer"] if kind != "function"} == {"SELECT", "USAGE"}
    more = set(granted["operator"]) - set(granted["viewer"])
    assert {cell for cell in more if cell[0] != "function"} == {
        *(("relation", "limits", privilege) for privilege in ("INSERT", "UPDATE", "DELETE")),
        ("relation", "schedules", "DELETE"),
        *(("column", f"schedules.{column}", privilege) for column in DEFINITION for privilege in ("INSERT", "UPDATE")),
    }
    assert set(granted["viewer"]) <= set(granted["operator"])
    assert not [cell for cell in granted["worker"] if cell[:2] == ("relation", "audit")]
    written = {name for kind, name, privilege in granted["worker"] if kind == "relation" and privilege == "UPDATE"}
    assert written == {"failed_items", "workers", "throughput_minutes"}


def test_the_docs_have_the_matrix_of_what_each_role_may_do(admin_dsn: str) -> None:
    assert matrix.shown() == matrix.matrix(admin_dsn), "run: python -m tests.instruments.reference"


def test_a_worker_rewrites_no_input_and_forges_no_batch(conn: Conn, roles: dict[str, str]) -> None:
    conn.execute("INSERT INTO batchq.batches (kind) VALUES ('x')")
    with psycopg.connect(roles["worker"], autocommit=True) as worker:
        for statement in (
            "UPDATE batchq.batches_live SET payload = '{}'",
            "UPDATE batchq.batches_live SET kind = 'y'",
            "INSERT INTO batchq.batches (kind) VALUES ('y')",
            "UPDATE batchq.batches_finished SET result = '1'",
            "DELETE FROM batchq.batches_finished",
            "DELETE FROM batchq.audit",
            "DROP TABLE batchq.batches",
            "TRUNCATE batchq.failed_items",
            "CREATE TABLE batchq.mine (a integer)",
            "SELECT batchq.cancel(1)",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                worker.execute(statement.encode())
    assert value(conn, "SELECT kind FROM batchq.batches") == "x"


@pytest.mark.parametrize("is_public", [False, True])
def test_who_could_read_the_status_before_an_upgrade_can_read_it_afterwards(
    empty_dsn: str, admin_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_public: bool
) -> None:
    before = tmp_path / "migrations"
    shutil.copytree(MIGRATIONS, before, ignore=lambda _, names: [name for name in names if name >= "0016"])
    with monkeypatch.context() as patched, role_for(admin_dsn) as reader:
        patched.setattr(migrations, "directory", lambda: before)
        migrations.migrate(empty_dsn)
        name = str(conninfo_to_dict(reader)["user"])
        with psycopg.connect(empty_dsn, autocommit=True) as owner:
            grantee = "PUBLIC" if is_public else name
            owner.execute(f"GRANT USAGE ON SCHEMA batchq TO {grantee}".encode())
            owner.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA batchq TO {grantee}".encode())
            owner.execute("INSERT INTO batchq.batches (kind, items) VALUES ('x', '[1, 2]')")
            patched.undo()
            migrations.migrate(empty_dsn)
            owner.execute("UPDATE batchq.batches SET spread = 2")
            owner.execute(f"SET ROLE {name}".encode())
            assert value(owner, "SELECT items_done FROM batchq.status") == 0
            owner.execute(f"RESET ROLE; DROP OWNED BY {name}".encode())


def test_a_role_with_a_duty_gets_what_an_upgrade_adds_to_it(
    empty_dsn: str, admin_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tmp_path / "migrations"
    shutil.copytree(MIGRATIONS, before, ignore=lambda _, names: [name for name in names if name >= "0021"])
    with monkeypatch.context() as patched, role_for(admin_dsn) as role:
        patched.setattr(migrations, "directory", lambda: before)
        migrations.migrate(empty_dsn)
        name = str(conninfo_to_dict(role)["user"])
        with psycopg.connect(empty_dsn, autocommit=True) as owner:
            for duty in ("producer", "worker", "viewer"):
                owner.execute("SELECT batchq.grant_duty(%s, %s)", [duty, name])
            owner.execute("GRANT SELECT ON batchq.batches TO PUBLIC")
            patched.undo()
            migrations.migrate(empty_dsn)
            assert value(owner, "SELECT has_table_privilege('public', 'batchq.all_batches', 'SELECT')"), "as a reader"
            owner.execute(f"SET ROLE {name}".encode())
            assert value(owner, "SELECT batchq.shard_of('mail')") == "mail", "as a producer"
            assert value(owner, "SELECT batchq.shards_of_queues('{mail}')") is None, "as a worker"
            assert value(owner, "SELECT count(*) FROM batchq.shards") == 0, "as a viewer"
            owner.execute(f"RESET ROLE; DROP OWNED BY {name}".encode())


# ------------------------------------------------------------------------------------- what the shell says of grants


@pytest.mark.parametrize("duty", DUTIES)
def test_the_shell_prints_the_grants_of_a_duty_and_applies_them(
    dsn: str, admin_dsn: str, duty: str, tmp_path: Path, conn: Conn
) -> None:
    shell = CommandLine(dsn, tmp_path)
    with role_for(admin_dsn) as bare, role_for(admin_dsn, duty) as granted:
        name = conninfo_to_dict(bare)["user"]
        printed = shell("roles", duty, name).out
        assert f"GRANT USAGE ON SCHEMA batchq TO {name};" in printed
        assert privileges(conn, bare) == [], "printed only"
        assert shell("roles", duty, name, "--apply").out == printed
        assert privileges(conn, bare) == privileges(conn, granted)
        step("what a duty needs is not more than it needs")
        assert shell("roles").out == "no role has more rights than a duty needs\n"


BEYOND = {
    "GRANT SELECT ON batchq.batches TO PUBLIC": "PUBLIC has more than any duty needs: SELECT on batches",
    "GRANT INSERT ON batchq.batches TO {}": "role {} has more than any duty needs: INSERT on batches",
    "GRANT UPDATE (payload) ON batchq.batches_live TO {}": "UPDATE on batches_live.payload",
    "GRANT TRUNCATE ON batchq.failed_items TO {}": "TRUNCATE on failed_items",
    "GRANT TRIGGER ON batchq.batches TO {}": "TRIGGER on batches",
    "GRANT CREATE ON SCHEMA batchq TO {}": "CREATE on schema batchq",
    "GRANT USAGE ON SEQUENCE batchq.batches_id_seq TO {}": "USAGE on batches_id_seq",
    "GRANT SELECT ON batchq.workers TO {} WITH GRANT OPTION": "SELECT on workers with grant option",
    "GRANT pg_write_all_data TO {}": "membership on role pg_write_all_data",
    "GRANT EXECUTE ON FUNCTION batchq.count_items() TO {}": "EXECUTE on batchq.count_items()",
    "GRANT EXECUTE ON FUNCTION batchq.forget_failed_items() TO {}": "EXECUTE on batchq.forget_failed_items()",
    "GRANT EXECUTE ON FUNCTION batchq.cancel(bigint, text, text) TO PUBLIC": "PUBLIC has more",
}


@pytest.mark.parametrize("grant", BEYOND)
def test_a_grant_beyond_every_duty_is_told(dsn: str, admin_dsn: str, tmp_path: Path, grant: str) -> None:
    shell = CommandLine(dsn, tmp_path)
    with role_for(admin_dsn, *DUTIES) as granted:
        name = conninfo_to_dict(granted)["user"]
        with psycopg.connect(admin_dsn, autocommit=True) as admin:
            admin.execute(grant.format(name).encode())
        ended = shell("roles", "--json")
        assert ended.code == 1
        (finding,) = ended.json
        assert BEYOND[grant].format(name) in finding["evidence"]
        assert BEYOND[grant].format(name) in shell("doctor", "--json").out


def test_whoever_migrates_what_is_up_to_date_needs_no_ownership(roles: dict[str, str], tmp_path: Path) -> None:
    """A container that runs `batchq migrate && batchq worker` with the worker's role."""
    for duty in ("worker", "viewer", "producer"):
        ended = CommandLine(roles[duty], tmp_path)("migrate")
        assert (ended.code, ended.out) == (0, "the schema is up to date\n"), (duty, ended.err)


def test_a_worker_without_its_grants_is_told_what_to_do(admin_dsn: str, tmp_path: Path) -> None:
    with role_for(admin_dsn, "viewer") as dsn:
        ended = CommandLine(dsn, tmp_path)("worker", "tasks:app", "--drain")
        assert "permission denied" in ended.complaint
        assert "batchq roles worker " + str(conninfo_to_dict(dsn)["user"]) in ended.complaint


# ------------------------------------------------------------------------------- one tenant: Supabase's roles

TENANT = re.search(
    r"```sql\n(ALTER TABLE batchq.batches ENABLE ROW LEVEL SECURITY.*?)```",
    (Path(__file__).parents[3] / "docs" / "security.md").read_text(encoding="utf-8"),
    re.DOTALL,
)
AUTH = """
CREATE SCHEMA auth;
CREATE FUNCTION auth.uid() RETURNS uuid LANGUAGE sql STABLE AS
$$ SELECT (current_setting('request.jwt.claims', true)::jsonb ->> 'sub')::uuid $$;
GRANT USAGE ON SCHEMA auth TO PUBLIC;
"""
ALICE, BOB = "11111111-1111-1111-1111-111111111111", "22222222-2222-2222-2222-222222222222"


@contextmanager
def as_user(conn: Conn, role: str, user: str) -> Iterator[Conn]:
    """Do as PostgREST does for a request: the role and the claims, in the transaction alone."""
    with conn.transaction():
        conn.execute("SELECT set_config('role', %s, true)", [role])
        conn.execute("SELECT set_config('request.jwt.claims', %s, true)", [json.dumps({"sub": user, "role": role})])
        yield conn


def test_a_tenant_enqueues_for_itself_and_sees_its_own_and_nothing_else(
    dsn: str, admin_dsn: str, roles: dict[str, str], tmp_path: Path, conn: Conn
) -> None:
    assert TENANT, "docs/security.md does not say how"
    with role_for(admin_dsn) as tenant, psycopg.connect(admin_dsn, autocommit=True) as admin:
        role = str(conninfo_to_dict(tenant)["user"])
        others = [str(conninfo_to_dict(roles[duty])["user"]) for duty in DUTIES]
        admin.execute(AUTH)
        recipe = (
            TENANT[1]
            .replace("authenticated", role)
            .replace("app_worker, app_viewer, app_operator, app_producer", ", ".join(others))
        )
        admin.execute(recipe.encode())

        step("two users enqueue, each for itself")
        for user in (ALICE, BOB):
            with as_user(admin, role, user):
                for kind in ("good", "alone"):
                    batchq.enqueue(admin, kind, {"user_id": user, "secret": kind})
        step("one for the other is refused")
        with (
            pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"),
            as_user(admin, role, ALICE),
        ):
            batchq.enqueue(admin, "good", {"user_id": BOB})
        step("each sees its own, in the table and in the view")
        for user in (ALICE, BOB):
            with as_user(admin, role, user):
                assert {payload["user_id"] for (payload,) in admin.execute("SELECT payload FROM batchq.batches")} == {
                    user
                }
                assert admin.execute("SELECT FROM batchq.status").rowcount == 2
        with as_user(admin, role, "33333333-3333-3333-3333-333333333333"):
            assert admin.execute("SELECT FROM batchq.batches").rowcount == 0
        step("and does nothing else")
        for statement in (
            "SELECT FROM batchq.batches_live",
            "SELECT FROM batchq.batches_finished",
            "SELECT FROM batchq.queues",
            "SELECT FROM batchq.failures",
            "SELECT FROM batchq.audit",
            "SELECT FROM batchq.newest_live()",
            "SELECT batchq.cancel(1)",
            "UPDATE batchq.batches SET payload = '{}'",
            "DELETE FROM batchq.batches",
            "INSERT INTO batchq.batches (kind, payload, status, finished_at) VALUES ('x', '{}', 'completed', now())",
            "INSERT INTO batchq.batches (id, kind, payload) OVERRIDING SYSTEM VALUE VALUES (99, 'x', '{}')",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege), as_user(admin, role, ALICE):
                admin.execute(statement.encode())
        step("a worker works for all, a viewer and an operator see all")
        assert tour.work(roles["worker"], admin_dsn) == set()
        assert tour.look(roles["viewer"], tmp_path) == {}
        with as_user(admin, role, BOB):
            assert admin.execute("SELECT FROM batchq.status WHERE status = 'completed'").rowcount == 2
        with psycopg.connect(roles["viewer"], autocommit=True) as viewer:
            assert viewer.execute("SELECT FROM batchq.status").rowcount == 5


if __name__ == "__main__":
    run_alone(__file__)
