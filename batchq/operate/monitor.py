"""Watch batches as their state changes. Reads only; needs nothing but the schema."""

from typing import Any

import psycopg

from batchq.postgres.link import Link
from batchq.postgres.statements import health, inserts, views

MOST_ROWS = 1000
OVERLAP_SECONDS = 10  # a finish is seen when it commits, a little after its finished_at


class Monitor:
    """Remembers what it has seen of each batch, and returns what is new."""

    def __init__(self, link: Link, queue: str | None = None, kind: str | None = None) -> None:
        self.link = link
        self.queue = queue
        self.kind = kind
        self.seen: dict[int, tuple[Any, ...]] = {}
        self.since: str | None = None
        self.after_id = 0

    def changes(self) -> list[dict[str, Any]]:
        """Return the rows of batchq.status (JSON objects) that are new or have changed since the last call.

        The first call returns what is processing. Where over 1,000 change at once, some are not
        told, but never in favour of one that has not failed or stalled. A connection
        that was lost is opened again at the next call. Raises psycopg.Error.
        """
        with self.link.transaction() as conn:
            rows = self.read(conn)
        before = self.seen
        self.seen = {row["id"]: state(row) for row in rows}
        return [row for row in rows if before.get(row["id"]) != state(row)]

    def read(self, conn: psycopg.Connection[Any]) -> list[dict[str, Any]]:
        """Read what may have changed."""
        if self.since is None:
            self.after_id = health.newest_id(conn)
        since = self.since or inserts.now_plus(conn, 0)
        rows = views.changed_rows(conn, since, self.after_id, list(self.seen), self.queue, self.kind, MOST_ROWS)
        self.since = inserts.now_plus(conn, -OVERLAP_SECONDS) if self.since else since
        self.after_id = max([self.after_id, *(row["id"] for row in rows)])
        return rows

    def is_done(self) -> bool:
        """Tell whether nothing of what is watched waits or runs."""
        with self.link.transaction() as conn:
            rows = views.queue_rows(conn, self.queue, self.kind)
        return not any(row["ready"] or row["scheduled"] or row["processing"] for row in rows)


def state(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what makes a change."""
    return row["status"], row["attempt"], row["items_done"], row["items_failed"]
