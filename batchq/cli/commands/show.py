"""``batchq show``: one batch and its failed items."""

from argparse import Namespace
from typing import Any

import psycopg

from batchq.cli import show_tables
from batchq.cli.arguments import add_command, add_id, natural
from batchq.cli.connections import database
from batchq.common.terminal import complain, put_json, show
from batchq.postgres.statements import flows, views


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(subparsers, "show", _run, "show one batch and its failed items")
    add_id(parser)
    parser.add_argument(
        "--limit", type=natural, default=20, metavar="N", help="failed items, and needed batches, to show (default: 20)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(options: Namespace) -> int:
    with database(options) as conn:
        batch = read_batch(conn, options.id)
        failed_items = views.failed_item_objects(conn, options.id, options.limit)
        needs = flows.needs_rows(conn, options.id, options.limit)
    if batch is None:
        complain(f"there is no batch {options.id}")
        return 1
    if options.json:
        put_json(batch | {"failed_items": failed_items, "after": needs})
    else:
        show(show_tables.one_batch(batch, failed_items, needs))
    return 0


def read_batch(conn: psycopg.Connection[Any], batch_id: int) -> dict[str, Any] | None:
    """Return a batch; payload and cursor are text if nested too deeply, or if a number in them is too long."""
    try:
        return views.batch_object(conn, batch_id)
    except (ValueError, RecursionError):
        return views.batch_object(conn, batch_id, inputs_as_text=True)
