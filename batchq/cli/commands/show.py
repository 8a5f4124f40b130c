"""``batchq show``: one batch, its failed items and its parts; or one part."""

from argparse import Namespace
from typing import Any

import psycopg

from batchq.cli import batch_view
from batchq.cli.arguments import add_command, add_id, natural
from batchq.cli.connections import database, settings_of
from batchq.common import hidden, sealed
from batchq.common.terminal import complain, put_json, show
from batchq.operate.parts import summary
from batchq.postgres.statements import flows, parts, views
from batchq.postgres.statements.verbs import clock_json


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(subparsers, "show", _run, "show one batch and its failed items")
    add_id(parser)
    shown = "failed items, needed batches and parts to show (default: 20)"
    parser.add_argument("--limit", type=natural, default=20, metavar="N", help=shown)
    opened = "open what is sealed, with the keys in BATCHQ_ENCRYPTION_KEYS (default: show which key it is sealed with)"
    parser.add_argument("--open", action="store_true", help=opened)
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(options: Namespace) -> int:
    if options.open:
        settings_of(options).use_encryption_keys()
    with database(options) as conn:
        batch = read_batch(conn, options.id)
        failed_items = views.failed_item_objects(conn, options.id, options.limit)
        needs = flows.needs_rows(conn, options.id, options.limit)
        spread = parts.part_rows(conn, options.id) if batch and (batch["spread"] or 0) > 1 else []
        part = None if batch else parts.part_row(conn, options.id)
        now = clock_json(conn)
    if batch and options.open:
        batch, failed_items = _opened(batch), [_opened_item(row, batch["kind"]) for row in failed_items]
    show_field = hidden.without_hidden if options.json else hidden.shown_value  # programs get envelopes as they are
    failed_items = [row | {"item": show_field(row["item"])} for row in failed_items]
    if batch:
        batch |= {name: show_field(batch[name]) for name in ("payload", "cursor", "result")}
    if part:
        put_json(part) if options.json else show(batch_view.one_part(part, now))
    elif batch is None:
        complain(f"there is no batch {options.id}")
        return 1
    elif options.json:
        put_json(batch | {"failed_items": failed_items, "after": needs, "parts": spread})
    else:
        failed_items = [row | {"error": sealed.shortened(row["error"])} for row in failed_items]
        show(batch_view.one_batch(batch, failed_items, needs, summary(spread, options.limit), now))
    return 0


def read_batch(conn: psycopg.Connection[Any], batch_id: int) -> dict[str, Any] | None:
    """Return a batch; payload and cursor are text if nested too deeply, or if a number in them is too long."""
    try:
        return views.batch_object(conn, batch_id)
    except (ValueError, RecursionError):
        batch = views.batch_object(conn, batch_id, inputs_as_text=True)
        names = ("payload", "cursor")
        return batch and batch | {name: hidden.shown_text(batch[name]) for name in names if batch[name] is not None}


def _opened(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch with its sealed values opened. Raises KeyMissing, CannotOpen."""
    kind = batch["kind"]
    fields: tuple[sealed.Field, ...] = ("payload", "cursor", "result")
    opened = {name: sealed.open_value(batch[name], kind, name) for name in fields}
    return batch | opened | {"errors": [sealed.open_error(error, kind) for error in batch["errors"]]}


def _opened_item(row: dict[str, Any], kind: str) -> dict[str, Any]:
    keys = sealed.current()
    error = keys.open_line(row["error"], kind) if keys else row["error"]
    return row | {"item": sealed.open_value(row["item"], kind, "item"), "error": error}
