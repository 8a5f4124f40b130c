"""What the page reads: each in a short read-only transaction, with a time limit, on a connection of a small pool."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row

from batchq.postgres.database import HandlerConnections
from batchq.postgres.statements import running, session, views

Conn = psycopg.Connection[Any]
Row = dict[str, Any]

POOL_SIZE = 4
READ_SECONDS = 5.0
MOST_ROWS = 500
PAGE_ROWS = 50
LOOK_ROWS = 5000  # how many batches one page of a filtered list looks at
MOST_CHARACTERS = 20_000  # of a payload
HIGHEST_ID = 2**63 - 1
SQL = running.statements_of(Path(__file__).with_name("queries.sql"))
BASES = {
    "ready": ["pending"],
    "scheduled": ["pending"],
    "retrying": ["pending"],
    "completed": ["completed"],
    "cancelled": ["cancelled"],
}
EVERY_BASE = ["pending", "processing", "completed", "failed", "cancelled"]


class Reader:
    """The page's few connections."""

    def __init__(self, dsn: str, seconds: float = READ_SECONDS) -> None:
        self.connections = HandlerConnections(
            dsn, POOL_SIZE, seconds, seconds, queue_seconds=seconds, cleans=False, settings=session.PLAIN
        )

    def open(self) -> None:
        """Connect. Raises PoolTimeout."""
        self.connections.open()

    def close(self) -> None:
        """Close the connections."""
        self.connections.close()

    def read(self, name: str, **parameters: Any) -> list[Row]:
        """Return the rows of a named statement, run alone in a read-only transaction. Raises QueryCanceled if it takes
        too long, DatabaseAway."""
        with self.connections.transaction() as conn:
            conn.execute(SQL["only_read"])
            return rows(conn, SQL[name], parameters)

    def ask(self, question: Callable[[Conn], Any]) -> Any:
        """Return what *question* returns, asked in a read-only transaction."""
        with self.connections.transaction() as conn:
            conn.execute(SQL["only_read"])
            return question(conn)

    def act(self, action: Callable[[Conn], Any]) -> Any:
        """Return what *action* returns, done in a transaction of its own. Commits."""
        with self.connections.transaction() as conn:
            return action(conn)


def rows(conn: Conn, statement: bytes, parameters: Row) -> list[Row]:
    """Return rows as dicts."""
    return conn.cursor(row_factory=dict_row).execute(statement, parameters or None).fetchall()


def batch_list(
    queue: str | None, kind: str | None, status: str | None, error: str | None, before: str | None
) -> Callable[[Conn], tuple[list[Row], str | None, int]]:
    """Return what reads a page of batches: rows, the key of the next page (None: there is none), how many batches were
    looked at. However rare the matches, a page looks at 5,000 batches at most; then the next one goes on."""
    before_time, before_id = read_key(before, is_failed=status == "failed")
    is_filtered = any((queue, kind, error, status in ("ready", "scheduled", "retrying", "stalled")))
    look = LOOK_ROWS if is_filtered else PAGE_ROWS + 1
    looked_at = {"failed": "looked_at_failed", "processing": "looked_at_processing", "stalled": "looked_at_processing"}
    statement = SQL[looked_at.get(status or "", "looked_at_by_id")] + SQL["matching"]
    parameters = {
        "queue": queue, "kind": kind, "status": status, "error": error, "look": look, "limit": PAGE_ROWS,
        "before_time": before_time, "before_id": before_id, "statuses": BASES.get(status or "", EVERY_BASE),
        "final_statuses": [final for final in views.FINAL_STATUSES if final in BASES.get(status or "", EVERY_BASE)],
    }  # fmt: skip

    def read(conn: Conn) -> tuple[list[Row], str | None, int]:
        found = rows(conn, statement, parameters)
        looked, last_key = found[0]["looked_at"], found[0]["last_key"]
        page = [row for row in found if row["id"] is not None]
        if len(page) > PAGE_ROWS:
            return page[:PAGE_ROWS], page[PAGE_ROWS - 1]["key"], looked
        return page, last_key if looked == look else None, looked

    return read


def read_key(key: str | None, is_failed: bool) -> tuple[float, int]:
    """Return time and id of a page's key; of the first page where it is none."""
    try:
        time_text, _, id_text = (key or "").rpartition(" ")
        before_id = int(id_text)
        if 0 <= before_id <= HIGHEST_ID and bool(time_text) == is_failed:
            return float(time_text or "inf"), before_id
    except ValueError:
        pass
    return float("inf"), HIGHEST_ID
