"""``batchq monitor``: print batches as their status changes."""

import time
from argparse import Namespace
from typing import Any

from batchq.cli.arguments import add_command, add_filters, add_interval
from batchq.cli.connections import linked, patiently
from batchq.cli.known import warn_of_unknown
from batchq.cli.show_tables import change_line
from batchq.common.terminal import put, put_json
from batchq.errors import ConfigError
from batchq.operate.monitor import Monitor


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(subparsers, "monitor", _run, "print batches as their status changes")
    add_filters(parser)
    add_interval(parser, 1.0, "1")
    parser.add_argument(
        "--exit-on",
        default="",
        metavar="STATUS,...",
        help="exit 1 when a batch becomes one of these: failed, stalled, cancelled, retrying",
    )
    parser.add_argument("--until-done", action="store_true", help="exit 0 when no batch is waiting or running any more")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")


def _run(options: Namespace) -> int:
    exit_on = {name.strip() for name in options.exit_on.split(",") if name.strip()}
    if unknown := exit_on - {"failed", "stalled", "cancelled", "retrying"}:
        raise ConfigError(f"--exit-on takes failed, stalled, cancelled or retrying, not {', '.join(sorted(unknown))}")
    with linked(options) as link:
        with link.transaction() as conn:
            warn_of_unknown(conn, options.queue, options.kind)
        return _follow(Monitor(link, options.queue, options.kind), options, exit_on)


def _follow(monitor: Monitor, options: Namespace, exit_on: set[str]) -> int:
    is_done = False
    while True:
        changes = patiently(monitor.changes)
        for row in changes:
            put_json(row, indent=None) if options.json else put(change_line(row))
        if any(row["status"] in exit_on for row in changes):
            return 1
        if is_done:
            return 0
        is_done = options.until_done and patiently(monitor.is_done)
        if not is_done:  # else read once more: the last batch may have finished, and failed, since the last time
            time.sleep(options.every_seconds)
