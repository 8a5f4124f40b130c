"""Checks of a whole database: invariants, what doctor looks for, ids."""

import re
from functools import cache
from pathlib import Path
from typing import LiteralString

from psycopg.rows import tuple_row

from batchq.postgres.statements.running import Conn, every, one
from batchq.postgres.statements.views import HIGHEST_ID


def newest_id(conn: Conn) -> int:
    """Return the highest id of a batch, 0 without any."""
    newest: int = one(
        conn,
        """
        SELECT greatest((SELECT max(id) FROM batchq.batches_finished),
                        (SELECT max(id) FROM batchq.newest_live(NULL, NULL, NULL, %(highest_id)s, 1) AS live(id)), 0)
        """,
        {"highest_id": HIGHEST_ID},
    )[0]
    return newest


def ids_given_twice(conn: Conn, finished_days: float) -> list[tuple[str, int, int]]:
    """Return relation, last id given and largest id in use, where new rows would get ids that are in use.

    Looks at what finished in the last *finished_days* days: each older day would be another lock.
    """
    statement: LiteralString = """
        SELECT relation, last_given, newest
        FROM batchq.ids_given_twice(now() - %(days)s::float8 * interval '1 day')
    """
    return every(conn, statement, {"days": finished_days})


@cache
def named(file: str) -> dict[str, str]:
    """Return the queries of a file beside this one, by the name that stands before each as "-- name: ..."."""
    text = (Path(__file__).parents[2] / "operate" / file).read_text(encoding="utf-8")
    _, *parts = re.split(r"^-- name: (\w+)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def invariants() -> dict[str, str]:
    """Return what is always true, by name: each a query of the rows for which it is not, see `offenders`."""
    return named("invariants.sql")


def offenders(conn: Conn, invariant: str, most: int) -> list[tuple[str, str]]:
    """Return id and what is wrong of up to *most* rows for which an invariant does not hold."""
    statement = f"SELECT id::text, what FROM (\n{invariant}\n) AS offender(id, what) LIMIT {most:d}"  # noqa: S608 (ours)
    return conn.cursor(row_factory=tuple_row).execute(statement.encode()).fetchall()


def ailments() -> dict[str, str]:
    """Return what batchq doctor looks at, by name: each a query of findings, see `ailing`."""
    return named("doctor.sql")


def ailing(conn: Conn, name: str, parameters: dict[str, float]) -> list[tuple[str, str, str]]:
    """Return severity, evidence and remedy of each finding of one query of doctor.sql."""
    statement = ailments()[name]
    return conn.cursor(row_factory=tuple_row).execute(statement.encode(), parameters).fetchall()
