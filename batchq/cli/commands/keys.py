"""``batchq keys``: the keys that have live batches, and how many wait and run of each."""

from argparse import Namespace
from typing import Any

from batchq.cli import show_tables
from batchq.cli.arguments import add_command, natural, queue_name
from batchq.cli.connections import database
from batchq.cli.known import warn_of_unknown
from batchq.common.terminal import put, put_json, show
from batchq.postgres.statements import views


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(subparsers, "keys", _run, "show keys that have live batches, the longest waiting first")
    parser.description = (
        "Show keys that have live batches, the longest waiting first: of the first 1,000 keys by queue and name, or of "
        "the first 1,000 of one queue. Of each key, at most 100 waiting and 100 running batches are counted."
    )
    parser.add_argument("--queue", type=queue_name, help="show only this queue")
    parser.add_argument("--limit", type=natural, default=20, metavar="N", help="maximum number of keys (default: 20)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(options: Namespace) -> int:
    with database(options) as conn:
        rows = views.key_rows(conn, options.queue, options.limit)
        warn_of_unknown(conn, options.queue, None)
    if options.json:
        put_json(rows)
    elif rows:
        show(show_tables.key_table(rows))
    else:
        put("no key has live batches")
    return 0
