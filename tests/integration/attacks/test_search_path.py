"""The door: names. Whoever may create in a schema of the search path makes functions and operators that fit better than
those of pg_catalog; an ordinary worker, viewer, operator or owner must never call one of them."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import psycopg
import pytest

from batchq.postgres.migrate import migrate
from tests.support import tour
from tests.support.alone import run_alone
from tests.support.callers import sqlalchemy_caller
from tests.support.steps import step

ROOT = Path(__file__).parents[3]
TYPES = (
    "text", "varchar", "name", "boolean", "smallint", "integer", "bigint", "real", "float8", "numeric", "jsonb", "json",
    "timestamptz", "timestamp", "date", "interval", "uuid", "oid", "regclass", "text[]", "integer[]", "bigint[]",
    "smallint[]", "uuid[]", "jsonb[]", "boolean[]", "float8[]",
)  # fmt: skip
SOME_TYPES = (
    "text", "boolean", "smallint", "integer", "bigint", "float8", "jsonb", "timestamptz", "interval", "text[]",
    "bigint[]",
)  # fmt: skip
FEW_TYPES = ("text", "integer", "bigint", "boolean", "jsonb")

# Each function and operator that batchq's texts name, for all types that the real one does not take as they are; and
# so that they are preferred to a real one that would need a cast, or that takes any type. All they do is to tell.
POISON = """
DO $do$
DECLARE
  made text;
BEGIN
  FOR made IN
    SELECT format('CREATE FUNCTION public.%I(%s) RETURNS boolean LANGUAGE plpgsql AS $f$ BEGIN
                   RAISE EXCEPTION ''POISON: %s(%s)''; END $f$', f.name, types.list, f.name, types.list)
    FROM unnest(%(functions)s::text[]) AS f(name)
    CROSS JOIN (
      SELECT a AS list FROM unnest(%(types)s::text[]) a
      UNION ALL
      SELECT a || ', ' || b FROM unnest(%(some)s::text[]) a, unnest(%(some)s::text[]) b
      UNION ALL
      SELECT concat_ws(', ', a, b, c)
      FROM unnest(%(few)s::text[]) a, unnest(%(few)s::text[]) b, unnest(%(few)s::text[]) c
    ) AS types
    WHERE to_regprocedure(format('pg_catalog.%I(%s)', f.name, types.list)) IS NULL
  LOOP
    EXECUTE made;
  END LOOP;
  FOR made IN
    SELECT format('CREATE FUNCTION public.poison_operator(%1$s, %2$s) RETURNS boolean LANGUAGE plpgsql AS $f$ BEGIN
                   RAISE EXCEPTION ''POISON: operator of %1$s, %2$s''; END $f$', a, b)
    FROM unnest(%(types)s::text[]) a, unnest(%(types)s::text[]) b
  LOOP
    EXECUTE made;
  END LOOP;
  FOR made IN
    SELECT format('CREATE OPERATOR public.%s (LEFTARG = %s, RIGHTARG = %s, FUNCTION = public.poison_operator)',
                  o.name, a, b)
    FROM unnest(%(operators)s::text[]) AS o(name), unnest(%(types)s::text[]) a, unnest(%(types)s::text[]) b
    WHERE to_regoperator(format('pg_catalog.%s(%s,%s)', o.name, a, b)) IS NULL
  LOOP
    EXECUTE made;
  END LOOP;
END
$do$;
"""
OPERATORS = (
    "=",
    "<>",
    "<",
    ">",
    "<=",
    ">=",
    "+",
    "-",
    "*",
    "/",
    "^",
    "||",
    "->",
    "->>",
    "#>>",
    "#>",
    "?",
    "@>",
    "~",
    "~~",
)


def functions_named() -> list[str]:
    """Return every word before a parenthesis in what batchq is made of."""
    files = [
        *(ROOT / "batchq" / "postgres" / "statements").glob("*.py"),
        *(ROOT / "batchq").rglob("*.sql"),
        *(ROOT / "migrations").glob("*.sql"),
    ]
    return sorted({word for file in files for word in re.findall(r"(?<![\w.])([a-z_][a-z0-9_]+)\(", file.read_text())})


def poison(admin_dsn: str) -> int:
    """Make the poison in public; return how many functions there are."""
    with psycopg.connect(admin_dsn, autocommit=True) as admin, psycopg.ClientCursor(admin) as cursor:
        named = functions_named()
        found = admin.execute(
            "SELECT DISTINCT proname::text FROM pg_proc WHERE pronamespace = 'pg_catalog'::regnamespace"
            " AND proname = ANY (%s)",
            [named],
        )
        functions = [name for (name,) in found]
        admin.execute("SET search_path = pg_catalog; SET check_function_bodies = off")
        types = {"types": list(TYPES), "some": list(SOME_TYPES), "few": list(FEW_TYPES)}
        parameters = types | {"functions": functions, "operators": list(OPERATORS)}
        cursor.execute(re.sub(r"%(?![(]\w+[)]s)", "%%", POISON).encode(), parameters)
        row = admin.execute("SELECT count(*) FROM pg_proc WHERE pronamespace = 'public'::regnamespace").fetchone()
        return row[0] if row else 0


@pytest.fixture(scope="module")
def poisoned(databases) -> Iterator[str]:
    """Return the name of a migrated database in which public is full of poison."""
    with databases.migrated() as name:
        made = poison(databases.server.dsn(name))
        step("public has %s functions that fit better than pg_catalog's", made)
        assert made > 10_000
        yield name


def test_the_poison_works(databases, poisoned: str) -> None:
    with psycopg.connect(databases.server.dsn(poisoned), autocommit=True) as conn:
        for victim in (
            "SELECT hashtextextended('x', 0)",
            "SELECT '{}'::jsonb ->> 'key'",
            "SELECT * FROM unnest(ARRAY[1, 2])",
            "SELECT jsonb_build_object('a'::text, 1)",
            "SELECT 2 * interval '1 s'",
        ):
            with pytest.raises(psycopg.Error, match=r"POISON|boolean|json"):
                conn.execute(victim).fetchall()
            conn.execute("SET search_path = pg_catalog, pg_temp")
            conn.execute(victim).fetchall()
            conn.execute("RESET search_path")


def test_nobody_who_works_looks_or_operates_takes_poison(databases, poisoned: str, tmp_path: Path) -> None:
    dsn = databases.server.dsn(poisoned)
    step("producer")
    tour.produce(dsn)
    step("worker")
    assert tour.work(dsn, dsn) == tour.AFTER_WORK
    step("viewer")
    assert tour.look(dsn, tmp_path) == {}
    step("operator")
    assert tour.operate(dsn, dsn, tmp_path) == {}


def test_who_inserts_many_without_copy_takes_no_poison(databases, poisoned: str) -> None:
    with sqlalchemy_caller(databases.server.dsn(poisoned), "psycopg2") as caller:
        needed = caller.each("mail", [{"n": 1}, None], delay_seconds=5, priority=3)
        options = {"after": needed, "run_at": datetime(2090, 1, 1, tzinfo=UTC), "max_attempts": 2, "spread": 2}
        assert caller.many("mail", items=[1, 2, 3], items_per_batch=2, timeout_seconds=5, key="k", **options) == 2
        assert caller.many("mail", ["k"], key=str, delay_seconds=5, on_failure="run") == 1
        caller.rollback()


def test_who_migrates_takes_no_poison(databases) -> None:
    with databases.empty() as name:
        dsn = databases.server.dsn(name)
        poison(dsn)
        assert migrate(dsn)


if __name__ == "__main__":
    run_alone(__file__)
