"""Run statements and return their rows; load .sql files."""

import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, LiteralString, TypeVar

import psycopg
from psycopg.rows import tuple_row

Conn = psycopg.Connection[Any]
Statement = tuple[LiteralString, dict[str, Any]]
Value = TypeVar("Value")


def array_text(values: Iterable[object]) -> str:
    """Return numbers or uuids as the text of a Postgres array."""
    return f"{{{','.join(map(str, values))}}}"


@cache
def load_statements(file: Path) -> dict[str, bytes]:
    """Return the statements of a .sql file by name; each follows a line ``-- name: NAME``."""
    parts = re.split(r"^-- name: (\w+)\n", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name: text.strip().encode() + b"\n" for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def fetch_all(conn: Conn, statement: LiteralString, parameters: dict[str, Any] | None = None) -> list[Any]:
    """Return all rows, as tuples, whatever row factory the connection has."""
    return conn.cursor(row_factory=tuple_row).execute(statement, parameters or None).fetchall()


def fetch_one(conn: Conn, statement: LiteralString, parameters: dict[str, Any] | None = None) -> Any:
    """Return the one row."""
    return fetch_all(conn, statement, parameters)[0]


def fetch_value(
    conn: Conn, kind: Callable[[Any], Value], statement: LiteralString, parameters: dict[str, Any] | None = None
) -> Value:
    """Return the one value of the one row, as a *kind*."""
    return kind(fetch_all(conn, statement, parameters)[0][0])


def fetch_one_or_none(conn: Conn, statement: LiteralString, parameters: dict[str, Any]) -> tuple[Any, ...] | None:
    """Return the one row, or None."""
    rows = fetch_all(conn, statement, parameters)
    return rows[0] if rows else None


def fetch_json(conn: Conn, statement: LiteralString, parameters: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Return the JSON object of each row."""
    return [found for (found,) in fetch_all(conn, statement, parameters)]
