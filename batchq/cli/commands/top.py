"""``batchq top``: queues, workers, running batches and failures on a full screen; into a pipe, once and plain."""

from argparse import Namespace
from threading import Lock
from typing import Any

import psycopg

from batchq.cli import show_tables
from batchq.cli.arguments import add_command, add_filters, add_interval
from batchq.cli.commands.show import read_batch
from batchq.cli.connections import linked
from batchq.common.terminal import console, put_json, show
from batchq.errors import ConfigError
from batchq.postgres.link import Link
from batchq.postgres.statements import flows, limits, verbs, views

_MAX_ROWS = 200


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(subparsers, "top", _run, "show everything live on a full screen; needs batchq[top]")
    add_filters(parser)
    parser.add_argument("--json", action="store_true", help="print JSON once")
    add_interval(parser, None, "100 times the duration of a query, from 1 to 10")


def _run(options: Namespace) -> int:
    with linked(options) as link:
        reads = _Reads(link, options)
        if options.json:
            put_json(reads.tables())
        elif not console.is_terminal:
            tables = reads.tables()
            show(show_tables.overview(tables | {"batches": tables["running"] + tables["failures"]}))
        else:
            load_screen().run(options.every_seconds, reads.tables, reads.batch)
    return 0


class _Reads:
    """The queries of `top`, over one connection: the screen's threads take turns at it."""

    def __init__(self, link: Link, options: Namespace) -> None:
        self._link = link
        self._options = options
        self._turn = Lock()

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        with self._turn, self._link.transaction() as conn:
            return read_tables(conn, self._options)

    def batch(self, batch_id: int) -> Any:
        """Return what to show of one batch; None if it is gone."""
        with self._turn, self._link.transaction() as conn:
            batch, failed_items = read_batch(conn, batch_id), views.failed_item_objects(conn, batch_id, _MAX_ROWS)
            needs = flows.needs_rows(conn, batch_id, _MAX_ROWS)
        return show_tables.one_batch(batch, failed_items, needs) if batch else None


def read_tables(conn: psycopg.Connection[Any], options: Namespace) -> dict[str, list[dict[str, Any]]]:
    """Return rows by table."""
    return {
        "queues": views.queue_rows(conn, options.queue, options.kind),
        "running": views.running_rows(conn, options.queue, options.kind, _MAX_ROWS),
        "failures": views.failed_rows(conn, options.queue, options.kind, _MAX_ROWS),
        "workers": views.worker_objects(conn),
        "pauses": verbs.pause_rows(conn),
        "limits": limits.limit_rows(conn, options.queue, options.kind),
        "throttles": limits.throttle_rows(conn, options.queue, options.kind),
    }


def load_screen() -> Any:
    """Return the module of the full screen. Raises ConfigError where its extra is not installed."""
    try:
        from batchq.cli import top_screen
    except ImportError as error:
        raise ConfigError(f'batchq top needs an extra ({error}); run: pip install "batchq[top]"') from None
    return top_screen
