"""``batchq status``: queues, workers and the latest batches, of one database or of several."""

import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import closing
from typing import Any, NoReturn

from rich.console import RenderableType
from rich.live import Live

from batchq.cli.arguments import add_command, add_filters, natural
from batchq.cli.connections import linked, one_or_several, patiently
from batchq.cli.known import warn_of_unknown
from batchq.cli.overview import overview, overview_of_several, show_several
from batchq.common.terminal import console, put_json, show
from batchq.operate.schedules import shown_rows
from batchq.operate.watch import ONCE_SECONDS, Watch
from batchq.postgres.databases import Database
from batchq.postgres.link import Link
from batchq.postgres.statements import limits, verbs, views
from batchq.postgres.statements.running import Conn
from batchq.postgres.statements.totals import totals


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(subparsers, "status", _run, "show queues, workers and the latest batches")
    add_filters(parser)
    parser.add_argument("--status", choices=views.STATUSES, help="show only batches with this status")
    parser.add_argument("--limit", type=natural, default=20, metavar="N", help="batches to show (default: 20)")
    parser.add_argument("--watch", action="store_true", help="redraw every second until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(options: Namespace) -> int:
    settings, databases = one_or_several(options)
    if databases:
        return _run_several(options, databases)
    with linked(options, settings) as link:
        with link.transaction() as conn:
            warn_of_unknown(conn, options.queue, options.kind)
        if options.json:
            put_json(_read(link, options))
        elif options.watch:
            _redraw(lambda: overview(patiently(lambda: _read(link, options))))
        else:
            show(overview(_read(link, options)))
    return 0


def _run_several(options: Namespace, databases: list[Database]) -> int:
    """Show all databases, those that are away as well; return 1 if one is."""
    with closing(Watch(databases, lambda conn: {"totals": totals(conn), **_tables(conn, options)})) as watch:
        if options.watch and not options.json:
            _redraw(lambda: overview_of_several(watch.read()))
        return show_several(watch.read(ONCE_SECONDS), options.json)


def _redraw(read: Callable[[], RenderableType]) -> NoReturn:
    """Redraw every second until Ctrl-C."""
    with Live(console=console(), auto_refresh=False, screen=console().is_terminal) as live:
        while True:
            live.update(read(), refresh=True)
            time.sleep(1)


def _read(link: Link, options: Namespace) -> dict[str, Any]:
    with link.transaction() as conn:
        return _tables(conn, options)


def _tables(conn: Conn, options: Namespace) -> dict[str, Any]:
    return {
        "queues": views.queue_rows(conn, options.queue, options.kind),
        "workers": views.worker_objects(conn),
        "pauses": verbs.pause_rows(conn),
        "limits": limits.limit_rows(conn, options.queue, options.kind),
        "throttles": limits.throttle_rows(conn, options.queue, options.kind),
        "schedules": shown_rows(conn, None, options.queue, options.kind),
        "batches": views.status_rows(conn, options.queue, options.kind, options.status, options.limit),
    }
