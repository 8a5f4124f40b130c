"""``batchq distribute``: give a database the tables that Citus can distribute, and distribute them by queue.

The second layout: `batches` has live batches only, and `batches_finished` is a table of its own; `all_batches` joins
them. No trigger reads or writes another table. Everything else is the same, so what batchq does on this layout can be
tested on a plain Postgres.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psycopg

from batchq.errors import ConfigError
from batchq.postgres.deadlines import deadline
from batchq.postgres.migrate import check_schema
from batchq.postgres.statements import ledger, session
from batchq.postgres.statements.running import Conn, load_statements
from batchq.postgres.transactions import transaction

SECONDS = 3600.0  # Citus copies all rows to the nodes
TABLES = (
    "batchq.batches", "batchq.batches_live", "batchq.batches_finished", "batchq.failed_items",
    "batchq.throughput_minutes", "batchq.needs",
)  # fmt: skip
_TRIGGERS = (
    "ring", "count_items", "count_changed_items", "keep_processing", "refuse_packed_values", "begin_waiting",
    "note_end", "forget_failed_items", "forget_flows", "forget_parts",
)  # fmt: skip
_INDEXES = ("batchq.batches_live_id", "batchq.needs_pkey")  # they are replaced
_ONCE = (
    "separate_finished", "join_in_view", "indexes", "forget_noted_ends", "drop_triggers", "waiting_may_be_unregistered",
)  # fmt: skip
_ALWAYS = ("count_own_items", "wait_unregistered", "collect_flows", "keep_what_is_needed", "owners")
_BY_TABLE = {
    "batchq.batches": "distribute_live",
    "batchq.batches_finished": "distribute_finished",
    "batchq.failed_items": "distribute_failed_items",
    "batchq.throughput_minutes": "distribute_throughput",
    "batchq.needs": "distribute_needs",
}


class Step(NamedTuple):
    """A step to make: its name, and its SQL, which may be several statements."""

    name: str
    text: str


def steps(conn: Conn, with_citus: bool) -> list[Step]:
    """Return the steps that are left to make; none if all were made before, but for functions that may have changed.

    Raises ConfigError for what keeps the database from being distributed: all of it at once.
    """
    _refuse_others(conn)
    check_schema(conn)
    texts = {name: text.decode() for name, text in _statements().items()}
    is_distributed = ledger.is_distributed(conn)
    names = ["lock", *(_ALWAYS if is_distributed else _ONCE + _ALWAYS)]
    if with_citus:
        names += _citus_steps(conn)
    _refuse(conn, is_distributed)
    [(columns,)] = _rows(conn, "columns")
    return [Step(name, texts[name].replace("{columns}", columns)) for name in names]


def distribute(conn: psycopg.Connection[Any], with_citus: bool = True, seconds: float = SECONDS) -> Iterator[Step]:
    """Make the steps that are left, in one transaction, and yield each when it is made.

    It waits for all transactions on the tables, and keeps others waiting until it commits: stop producers as well as
    workers. Raises ConfigError, and psycopg's errors.
    """
    with deadline(conn, seconds + 1), transaction(conn, seconds, settings=session.FIXED_FORMATS):
        _refuse_others(conn)
        ledger.lift_transaction_timeout(conn)
        ledger.take_migration_lock(conn)
        for step in steps(conn, with_citus):
            conn.execute(step.text.encode())
            yield step


def _refuse_others(conn: Conn) -> None:
    """Raise ConfigError unless the role owns the schema, or there is none."""
    if not all(is_owner for (is_owner,) in _rows(conn, "is_owner")):
        raise ConfigError("only the owner of the schema can distribute it: set BATCHQ_MIGRATION_DSN to that role's")


def _refuse(conn: Conn, is_distributed: bool) -> None:
    """Raise ConfigError for what Citus would refuse later, or what would lose work."""
    parameters = {"tables": list(TABLES), "triggers": list(_TRIGGERS), "indexes": list(_INDEXES)}
    found = conn.execute(_statements()["refusals"], parameters | {"is_distributed": is_distributed}).fetchall()
    if found:
        raise ConfigError("; ".join(f"{what}: {remedy}" for what, remedy in found))


def _citus_steps(conn: Conn) -> Sequence[str]:
    """Return the steps for Citus that are left. Raises ConfigError where Citus is not there, or not set up."""
    if not _rows(conn, "has_citus")[0][0]:
        raise ConfigError("this database has no Citus: CREATE EXTENSION citus, or try the layout with --without-citus")
    [(may_have_triggers, nodes)] = _rows(conn, "citus")
    if not may_have_triggers:
        raise ConfigError(
            "citus.enable_unsafe_triggers is off: turn it on, on every node. It is safe here: batchq's triggers read "
            "and write only their own row"
        )
    if not nodes:
        raise ConfigError("Citus has no node that may hold data: add one with citus_add_node")
    distributed = {name for (name,) in _rows(conn, "distributed_tables")}
    return ["settings_reach_nodes", *(step for table, step in _BY_TABLE.items() if table not in distributed)]


def _rows(conn: Conn, name: str) -> list[Any]:
    return conn.execute(_statements()[name]).fetchall()


def _statements() -> dict[str, bytes]:
    return load_statements(Path(__file__).with_name("distribute.sql"))
