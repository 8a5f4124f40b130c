"""Statements that a distributed Postgres can run: rules that are checked on plain Postgres."""

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from batchq.operate.distribute import distribute
from batchq.postgres import statements as statement_modules
from batchq.postgres.statements import running
from tests.component.rows import Conn
from tests.support import neutral
from tests.support.alone import run_alone
from tests.support.layouts import layout
from tests.support.neutral import RULES, Catalog, Routine
from tests.support.processes import ROOT
from tests.support.steps import step

FILES = ("batchq/web/queries.sql", "batchq/operate/doctor.sql", "batchq/operate/invariants.sql")
# A statement that is faster on a plain Postgres has a second form for a distributed one, which keeps the rules.
SECOND_FORM = "_DISTRIBUTED"

BREACHES = {
    "returning": (
        "UPDATE batchq.batches_live b SET status = 'pending' WHERE b.queue = $1 RETURNING extract(epoch FROM b.run_at)",
        "UPDATE batchq.batches_live b SET run_at = CASE WHEN b.attempt > 1 THEN now() ELSE b.run_at END "
        "WHERE b.queue = $1",
        "UPDATE batchq.batches_live b SET run_at = coalesce(b.claimed_at, statement_timestamp()) WHERE b.queue = $1",
        "DELETE FROM batchq.batches_live b WHERE b.queue = $1 RETURNING b.run_at + interval '1 second'",
        "INSERT INTO batchq.batches (kind) VALUES ('k') RETURNING id, now()",
    ),
    "volatile": (
        "UPDATE batchq.batches_live b SET run_at = clock_timestamp() WHERE b.queue = $1",
        "UPDATE batchq.batches_live b SET priority = (100 * random())::integer WHERE b.queue = $1",
    ),
    "nested write": ("SELECT batchq.cancel(b.id) FROM batchq.batches_live b WHERE b.queue = $1",),
    "queue": (
        "DELETE FROM batchq.batches_live WHERE id = $1",
        "UPDATE batchq.batches b SET priority = 1 WHERE b.id = $1 OR b.queue = $2",
        "SELECT b.id FROM batchq.batches_live b WHERE b.id = $1 FOR UPDATE",
        "DELETE FROM batchq.failed_items f USING batchq.batches_live b WHERE f.batch_id = b.id AND b.queue = $1",
    ),
    "moved": ("UPDATE batchq.batches_live b SET queue = $2 WHERE b.queue = $1",),
    "join": (
        "SELECT f.item FROM batchq.all_batches b JOIN batchq.failed_items f ON f.batch_id = b.id WHERE b.queue = $1",
        "SELECT b.id FROM batchq.all_batches b "
        "WHERE EXISTS (SELECT 1 FROM batchq.failed_items f WHERE f.batch_id = b.id)",
    ),
    "recursive": (
        "WITH RECURSIVE q AS (SELECT min(b.queue) AS queue FROM batchq.batches_live b UNION ALL "
        "SELECT (SELECT min(b.queue) FROM batchq.batches_live b WHERE b.queue > q.queue) FROM q) SELECT queue FROM q",
    ),
    "no columns": ("SELECT EXISTS (SELECT FROM batchq.all_batches b WHERE b.queue = $1)",),
    "setting": ("SELECT set_config('enable_seqscan', 'off', true)",),
    "whole row": ("SELECT to_jsonb(s) FROM batchq.status s WHERE s.id = $1",),
}
KEPT = (
    "UPDATE batchq.batches_live b SET run_at = now() + interval '1 second' WHERE b.queue = $1 RETURNING b.id, b.run_at",
    "WITH gone AS (DELETE FROM batchq.batches_live b WHERE b.queue = $1 AND b.id = $2 RETURNING b.*) "
    "SELECT extract(epoch FROM g.run_at) FROM gone g",
    "SELECT f.item FROM batchq.all_batches b JOIN batchq.failed_items f ON f.queue = b.queue AND f.batch_id = b.id",
    "UPDATE batchq.failed_items f SET attempt = 0 FROM batchq.batches_live b WHERE f.queue = $1 AND f.batch_id = b.id "
    "AND b.queue = $1",
    "SELECT to_jsonb(s) FROM (SELECT * FROM batchq.status WHERE id = $1 OFFSET 0) s",
    "SELECT batchq.cancel($1)",
    "UPDATE batchq.workers SET heartbeat_at = clock_timestamp() WHERE id = $1",
)


@pytest.fixture
def routines(conn: Conn) -> list[Routine]:
    """Return the functions and views of the schema, as a distributed database has them."""
    if layout() == "plain":
        list(distribute(conn, with_citus=False))
    return neutral.routines(conn)


@pytest.fixture
def known(conn: Conn, routines: list[Routine]) -> Catalog:
    """Return what the rules need to know of functions."""
    return neutral.catalog(conn, routines)


def all_statements(routines: list[Routine]) -> Iterator[tuple[str, Any]]:
    """Yield every statement of batchq: of the schema, of the workers, of what people look at."""
    for routine in routines:
        yield from ((routine.name, statement) for statement in routine.statements)
    for module in pkgutil.iter_modules(statement_modules.__path__):
        yield from neutral.statements_of_module(importlib.import_module(f"{statement_modules.__name__}.{module.name}"))
    for file in FILES:
        for name, text in running.load_statements(ROOT / file).items():
            yield from neutral.parsed(f"{Path(file).stem}.{name}", text.decode())


def test_every_statement_keeps_the_rules_or_has_a_second_form_that_does(
    routines: list[Routine], known: Catalog
) -> None:
    statements = list(all_statements(routines))
    second_forms = {name for name, _ in statements if name.endswith(SECOND_FORM)}
    found: dict[str, set[str]] = {}
    for name, statement in statements:
        if f"{name}{SECOND_FORM}" not in second_forms and (broken := neutral.breaches(statement, known)):
            found.setdefault(name, set()).update(broken)
    step("%s statements; second forms: %s; broken: %s", len(statements), second_forms, neutral.as_json(found))
    assert len(statements) > 300, "the test does not see the statements"
    assert found == {}


@pytest.mark.parametrize(
    ("rule", "statement"),
    [(rule, statement) for rule, statements in BREACHES.items() for statement in statements],
)
def test_a_statement_that_breaks_a_rule_is_caught(known: Catalog, rule: str, statement: str) -> None:
    [(_, parsed)] = neutral.parsed("planted", statement)
    assert rule in neutral.breaches(parsed, known), RULES[rule]


@pytest.mark.parametrize("statement", KEPT)
def test_a_statement_that_keeps_the_rules_is_let_through(known: Catalog, statement: str) -> None:
    [(_, parsed)] = neutral.parsed("planted", statement)
    assert neutral.breaches(parsed, known) == set()


def test_each_rule_has_a_statement_that_breaks_it() -> None:
    assert RULES.keys() == BREACHES.keys()


if __name__ == "__main__":
    run_alone(__file__)
