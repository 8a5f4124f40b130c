"""Checks of a whole database: invariants, batchq doctor, ids."""

from pathlib import Path
from typing import LiteralString

from psycopg.rows import tuple_row

from batchq.postgres.statements.running import Conn, fetch_all, fetch_value, load_statements
from batchq.postgres.statements.views import HIGHEST_ID

OPERATE = Path(__file__).parents[2] / "operate"


def newest_id(conn: Conn) -> int:
    """Return the highest id of any batch, 0 without batches."""
    return fetch_value(
        conn,
        int,
        """
        SELECT greatest((SELECT max(id) FROM batchq.batches_finished),
                        (SELECT max(id) FROM batchq.newest_live(NULL, NULL, NULL, %(highest_id)s, 1) AS live(id)), 0)
        """,
        {"highest_id": HIGHEST_ID},
    )


def ids_given_twice(conn: Conn, finished_days: float) -> list[tuple[str, int, int]]:
    """Return relation, last id given and largest id in use, where new rows would get ids that are in use.

    Reads what finished in the last *finished_days* days: each older day would cost another lock.
    """
    statement: LiteralString = """
        SELECT relation, last_given, newest
        FROM batchq.ids_given_twice(now() - %(days)s::float8 * interval '1 day')
    """
    return fetch_all(conn, statement, {"days": finished_days})


def invariants() -> dict[str, bytes]:
    """Return the invariants by name: each a query of the rows that violate it, see `violations`."""
    return load_statements(OPERATE / "invariants.sql")


def violations(conn: Conn, invariant: bytes, limit: int) -> list[tuple[str, str]]:
    """Return id and problem of up to *limit* rows that violate an invariant."""
    query = b"SELECT id::text, problem FROM (\n%b\n) AS violation(id, problem) LIMIT %d" % (invariant, limit)
    return conn.cursor(row_factory=tuple_row).execute(query).fetchall()


def doctor_checks() -> dict[str, bytes]:
    """Return the checks of batchq doctor by name: each a query of findings, see `findings`."""
    return load_statements(OPERATE / "doctor.sql")


def findings(conn: Conn, check: str, parameters: dict[str, float]) -> list[tuple[str, str, str]]:
    """Return severity, evidence and remedy of each finding of one check of doctor.sql."""
    return conn.cursor(row_factory=tuple_row).execute(doctor_checks()[check], parameters).fetchall()
