"""``batchq status``: queues, workers and the latest batches."""

import time
from argparse import Namespace
from typing import Any

from rich.live import Live

from batchq.cli import show_tables
from batchq.cli.arguments import add_command, add_filters, natural
from batchq.cli.connections import linked, patiently
from batchq.common.terminal import console, put_json, show
from batchq.postgres.link import Link
from batchq.postgres.statements import limits, schedules, verbs, views

_STATUSES = ("waiting", "ready", "scheduled", "retrying", "processing", "stalled", "completed", "failed", "cancelled")


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(subparsers, "status", _run, "show queues, workers and the latest batches")
    add_filters(parser)
    parser.add_argument("--status", choices=_STATUSES, help="show only batches with this status")
    parser.add_argument("--limit", type=natural, default=20, metavar="N", help="batches to show (default: 20)")
    parser.add_argument("--watch", action="store_true", help="redraw every second until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(options: Namespace) -> int:
    with linked(options) as link:
        if options.json:
            put_json(_read(link, options))
        elif options.watch:
            with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
                while True:
                    live.update(show_tables.overview(patiently(lambda: _read(link, options))), refresh=True)
                    time.sleep(1)
        else:
            show(show_tables.overview(_read(link, options)))
    return 0


def _read(link: Link, options: Namespace) -> dict[str, Any]:
    with link.transaction() as conn:
        return {
            "queues": views.queue_rows(conn, options.queue, options.kind),
            "workers": views.worker_objects(conn),
            "pauses": verbs.pause_rows(conn),
            "limits": limits.limit_rows(conn, options.queue, options.kind),
            "throttles": limits.throttle_rows(conn, options.queue, options.kind),
            "schedules": schedules.schedule_rows(conn, None, options.queue, options.kind),
            "batches": views.status_rows(conn, options.queue, options.kind, options.status, options.limit),
        }
