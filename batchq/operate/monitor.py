"""Watch batches as their state changes. Only reads; needs nothing but the schema."""

from typing import Any

from batchq.postgres.link import Link
from batchq.postgres.statements import flows, health, inserts, parts, views
from batchq.postgres.statements.running import Conn

_MOST_ROWS = 1000
_OVERLAP_SECONDS = 10  # a finish becomes visible when it commits, a little after its finished_at


class Monitor:
    """Remembers the last state of each batch, and returns what has changed."""

    def __init__(self, link: Link, queue: str | None = None, kind: str | None = None) -> None:
        self.link = link
        self._of = (queue, kind)
        self._seen: dict[int, tuple[Any, ...]] = {}
        self._since: str | None = None
        self._after_id = 0

    def changes(self) -> list[dict[str, Any]]:
        """Return the rows of batchq.status (JSON objects) that are new or have changed since the last call.

        The first call returns what is processing. If more than 1,000 change between two calls, some are left out, but
        never in favor of one that has not failed or stalled. A lost connection is opened again at the next call. Raises
        psycopg.Error.
        """
        with self.link.transaction() as conn:
            rows = self._read(conn)
        before, self._seen = self._seen, {row["id"]: _state(row) for row in rows}
        return [row for row in rows if before.get(row["id"]) != _state(row)]

    def is_done(self) -> bool:
        """Return whether nothing that is watched waits or runs. A batch that waits for others does, unless no batch of
        any queue can begin or run: then only a person can let it go on."""
        with self.link.transaction() as conn:
            rows = views.queue_rows(conn, *self._of)
            if any(map(_is_busy, rows)) or parts.has_spread(conn, *self._of):
                return False
            if not any(row["waiting"] for row in rows):
                return True
            is_idle = not any(map(_is_busy, views.queue_rows(conn, None, None))) and not flows.has_events(conn)
            return is_idle and not parts.has_spread(conn, None, None)

    def _read(self, conn: Conn) -> list[dict[str, Any]]:
        if self._since is None:
            self._after_id = health.newest_id(conn)
        since = self._since or inserts.now_plus(conn, 0)
        rows = views.changed_rows(conn, since, self._after_id, list(self._seen), *self._of, _MOST_ROWS)
        self._since = inserts.now_plus(conn, -_OVERLAP_SECONDS) if self._since else since
        self._after_id = max([self._after_id, *(row["id"] for row in rows)])
        return rows


def _is_busy(row: dict[str, Any]) -> bool:
    return bool(row["ready"] or row["scheduled"] or row["processing"])


def _state(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["status"], row["attempt"], row["items_done"], row["items_failed"]
