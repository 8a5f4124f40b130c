"""The door: roles. Each duty is done by a role that owns nothing and has the grants of its duty alone, and no grant is
broader than that; what the docs say is what is tried here."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.component.rows import value, values
from tests.support import tour
from tests.support.alone import run_alone
from tests.support.roles import role_for
from tests.support.steps import step

Conn = psycopg.Connection
DUTIES = ("producer", "worker", "viewer", "operator")


@pytest.fixture
def roles(admin_dsn: str) -> Iterator[dict[str, str]]:
    """Return the DSN of a role for each duty."""
    with ExitStack() as stack:
        yield {duty: stack.enter_context(role_for(admin_dsn, duty)) for duty in DUTIES}


def test_each_duty_is_done_with_its_own_grants_and_without_ownership(
    roles: dict[str, str], admin_dsn: str, tmp_path: Path
) -> None:
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
    assert {name for kind, name, privilege in granted["producer"] if kind == "relation"} == set()
    assert {privilege for kind, _, privilege in granted["viewer"] if kind != "function"} == {"SELECT", "USAGE"}
    more = set(granted["operator"]) - set(granted["viewer"])
    assert {kind for kind, _, _ in more} == {"function"}
    assert set(granted["viewer"]) <= set(granted["operator"])
    assert not [cell for cell in granted["worker"] if cell[:2] == ("relation", "audit")]
    written = {name for kind, name, privilege in granted["worker"] if kind == "relation" and privilege == "UPDATE"}
    assert written == {"failed_items", "workers", "throughput_minutes"}


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


if __name__ == "__main__":
    run_alone(__file__)
