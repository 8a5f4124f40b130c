"""Where ``batchq top`` reads and acts: one connection, at which the screen's threads take turns."""

from argparse import Namespace
from collections.abc import Callable, Iterable
from threading import Lock
from typing import Any, NamedTuple

from batchq.cli.columns import Row
from batchq.cli.top.deeds import Deed, Rows
from batchq.common.hidden import shown_item, shown_text
from batchq.operate.parts import Summary, summary
from batchq.operate.schedules import shown_rows
from batchq.postgres.link import Link
from batchq.postgres.statements import flows, limits, parts, verbs, views
from batchq.postgres.statements.running import Conn

MOST_ROWS = 200
MOST_CHARACTERS = 20_000
# What the line on top says comes from these, whatever table is shown.
ALWAYS = ("queues", "workers", "pauses", "throttles")
_READS: dict[str, Callable[[Conn, str | None, str | None], list[Row]]] = {
    "queues": views.queue_rows,
    "minutes": views.minute_rows,
    "running": lambda conn, queue, kind: views.running_rows(conn, queue, kind, MOST_ROWS),
    "failures": lambda conn, queue, kind: views.failed_rows(conn, queue, kind, MOST_ROWS),
    "groups": lambda conn, _, kind: views.failure_groups(conn, kind, MOST_ROWS),
    "workers": lambda conn, *_: views.worker_objects(conn),
    "pauses": lambda conn, *_: verbs.pause_rows(conn),
    "limits": limits.limit_rows,
    "throttles": limits.throttle_rows,
    "keys": lambda conn, queue, _: views.key_rows(conn, queue, MOST_ROWS),
    "flows": lambda conn, queue, kind: views.status_rows(conn, queue, kind, "waiting", MOST_ROWS),
    "schedules": lambda conn, queue, kind: shown_rows(conn, None, queue, kind),
}
TABLES = tuple(_READS)
PLAIN_TABLES = tuple(name for name in TABLES if name != "minutes")  # those of --json


class Page(NamedTuple):
    """What the page of a batch shows. texts: payload, cursor, result; spread: its parts, if it has any."""

    batch: Row
    texts: list[Row]
    attempts: list[Row]
    failed_items: list[Row]
    needs: list[Row]
    spread: Summary | None = None


def read_tables(conn: Conn, options: Namespace, names: Iterable[str] = TABLES) -> dict[str, list[Row]]:
    """Return the rows of the tables of some names."""
    return {name: _READS[name](conn, options.queue, options.kind) for name in names}


def read_page(conn: Conn, batch_id: int) -> Page | None:
    """Return all that is shown of one batch; None if it is gone."""
    batch = views.status_row(conn, batch_id)
    if batch is None:
        return None
    is_spread = (batch["spread"] or 0) > 1
    return Page(
        batch,
        [each | {"text": shown_text(each["text"])} for each in views.batch_texts(conn, batch_id, MOST_CHARACTERS)],
        views.failed_attempts(conn, batch_id),
        [shown_item(row) for row in views.failed_item_objects(conn, batch_id, MOST_ROWS)],
        flows.needs_rows(conn, batch_id, MOST_ROWS),
        summary(parts.part_rows(conn, batch_id), MOST_ROWS) if is_spread else None,
    )


class Source:
    """The database. Each method runs one transaction, and raises what the database raises."""

    def __init__(self, link: Link, options: Namespace, actor: str | None) -> None:
        self._link, self._options, self._actor = link, options, actor
        self._turn = Lock()

    def tables(self, names: Iterable[str] = TABLES) -> Rows:
        """Return the rows of the tables of some names."""
        return self._ask(lambda conn: read_tables(conn, self._options, names))  # type: ignore[no-any-return]

    def opened(self, queue: str | None, kind: str | None) -> list[Row]:
        """Return the running and the failed batches of a queue and a kind, at most 200 of each."""

        def read(conn: Conn) -> list[Row]:
            running = views.running_rows(conn, queue, kind, MOST_ROWS)
            return running + views.failed_rows(conn, queue, kind, MOST_ROWS)

        return self._ask(read)  # type: ignore[no-any-return]

    def page(self, batch_id: int) -> Page | None:
        """Return all that is shown of one batch; None if it is gone."""
        return self._ask(lambda conn: read_page(conn, batch_id))  # type: ignore[no-any-return]

    def act(self, deed: Deed, change: dict[str, Any], reason: str | None) -> str:
        """Do a deed; return its result in words. Commits."""
        return self._ask(lambda conn: deed.do(conn, change, reason, self._actor))  # type: ignore[no-any-return]

    def _ask(self, question: Callable[[Conn], Any]) -> Any:
        with self._turn, self._link.transaction() as conn:
            return question(conn)
