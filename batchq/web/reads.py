"""The database connections of the web UI: a small pool, and short transactions with a time limit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row

from batchq.postgres.handler_connections import HandlerConnections
from batchq.postgres.statements import running, session, views

Conn = psycopg.Connection[Any]
Row = dict[str, Any]

POOL_SIZE = 4
READ_SECONDS = 5.0
MOST_ROWS = 500
PAGE_ROWS = 50
LOOK_ROWS = 5000  # how many batches one page of a filtered list searches
MOST_CHARACTERS = 20_000  # of a payload
HIGHEST_ID = 2**63 - 1
SQL = running.load_statements(Path(__file__).with_name("queries.sql"))
_STORED_STATUSES = {
    "waiting": ["waiting"],
    "ready": ["pending"],
    "scheduled": ["pending"],
    "retrying": ["pending"],
    "completed": ["completed"],
    "cancelled": ["cancelled"],
}
_EVERY_STATUS = ["waiting", "pending", "processing", "completed", "failed", "cancelled"]
_SEARCHES = {"failed": "searched_failed", "processing": "searched_processing", "stalled": "searched_processing"}


class Reader:
    """The pool. Each method runs one transaction, and raises QueryCanceled if it takes too long, or DatabaseAway."""

    def __init__(self, dsn: str, seconds: float = READ_SECONDS) -> None:
        self._pool = HandlerConnections(
            dsn, POOL_SIZE, seconds, seconds, queue_seconds=seconds, cleans=False, settings=session.FIXED_FORMATS
        )

    def open(self) -> None:
        """Connect. Raises PoolTimeout."""
        self._pool.open()

    def close(self) -> None:
        """Close the connections."""
        self._pool.close()

    def read(self, name: str, **parameters: Any) -> list[Row]:
        """Return the rows of a named statement, from a read-only transaction."""
        return self.ask(lambda conn: _rows(conn, SQL[name], parameters))  # type: ignore[no-any-return]

    def ask(self, question: Callable[[Conn], Any]) -> Any:
        """Return what *question* returns, from a read-only transaction."""
        with self._pool.transaction() as conn:
            conn.execute(SQL["only_read"])
            return question(conn)

    def act(self, action: Callable[[Conn], Any]) -> Any:
        """Return what *action* returns. Commits."""
        with self._pool.transaction() as conn:
            return action(conn)


def _rows(conn: Conn, statement: bytes, parameters: Row) -> list[Row]:
    return conn.cursor(row_factory=dict_row).execute(statement, parameters or None).fetchall()


def batch_list(
    queue: str | None, kind: str | None, status: str | None, error: str | None, before: str | None
) -> Callable[[Conn], tuple[list[Row], str | None, int]]:
    """Return a question for `Reader.ask` that reads one page of batches: its rows, the key of the next page (None: this
    is the last one), and how many batches it searched, at most 5,000 however rare the matches are."""
    before_time, before_id = _read_key(before, is_failed=status == "failed")
    is_filtered = any((queue, kind, error, status in ("ready", "scheduled", "retrying", "stalled")))
    most = LOOK_ROWS if is_filtered else PAGE_ROWS + 1
    statement = SQL[_SEARCHES.get(status or "", "searched_by_id")] + SQL["matching"]
    statuses = _STORED_STATUSES.get(status or "", _EVERY_STATUS)
    parameters = {
        "queue": queue, "kind": kind, "status": status, "error": error, "most": most, "limit": PAGE_ROWS,
        "live_status": "waiting" if status == "waiting" else None,
        "before_time": before_time, "before_id": before_id, "statuses": statuses,
        "final_statuses": [final for final in views.FINAL_STATUSES if final in statuses],
    }  # fmt: skip

    def read(conn: Conn) -> tuple[list[Row], str | None, int]:
        found = _rows(conn, statement, parameters)
        searched, last_key = found[0]["searched"], found[0]["last_key"]
        page = [row for row in found if row["id"] is not None]
        if len(page) > PAGE_ROWS:
            return page[:PAGE_ROWS], page[PAGE_ROWS - 1]["key"], searched
        return page, last_key if searched == most else None, searched

    return read


def _read_key(key: str | None, is_failed: bool) -> tuple[float, int]:
    """Return the time and id in a page's key; those of the first page if it is not a key."""
    try:
        time_text, _, id_text = (key or "").rpartition(" ")
        before_id = int(id_text)
        if 0 <= before_id <= HIGHEST_ID and bool(time_text) == is_failed:
            return float(time_text or "inf"), before_id
    except ValueError:
        pass
    return float("inf"), HIGHEST_ID
