"""``batchq watch``: follow one batch until it finishes."""

import time
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from rich.progress import Progress

from batchq.cli import show_tables
from batchq.cli.arguments import add_command, add_id, add_interval
from batchq.cli.bars import BatchBarColumn
from batchq.cli.connections import database, linked, patiently
from batchq.cli.rate import Rate, clock
from batchq.common.terminal import column, complain, console, line, put, put_json
from batchq.operate.parts import missing_text
from batchq.postgres.statements import views

_EXIT_CODES = {"completed": 0, "failed": 1, "cancelled": 3}
_NO_SUCH_BATCH = 1


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(subparsers, "watch", _run, "follow one batch until it finishes")
    parser.epilog = "Exits 0 if the batch completes, 1 if it fails or does not exist, 3 if it is cancelled."
    add_id(parser)
    add_interval(parser, 0.5, "0.5")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")


def _run(options: Namespace) -> int:
    """Show a bar on a terminal; else print a line, or with --json a JSON object, for each change."""
    rows = _rows_until_final(options)
    last = _show_bar(rows) if console().is_terminal and not options.json else _print_changes(rows, options.json)
    if last is None:
        with database(options) as conn:
            complain(missing_text(conn, options.id))
        return _NO_SUCH_BATCH
    if last["last_error"] and last["status"] != "completed":
        complain(f"batch {options.id}: {show_tables.first_line(last['last_error'])}")
    return _EXIT_CODES[last["status"]]


def _rows_until_final(options: Namespace) -> Iterator[dict[str, Any]]:
    """Yield the batch's row of batchq.status at each poll, until it is in a final status or gone."""
    with linked(options) as link:

        def read() -> dict[str, Any] | None:
            with link.transaction() as conn:
                return views.status_row(conn, options.id)

        while (row := patiently(read)) is not None:
            yield row
            if row["status"] in _EXIT_CODES:
                return
            time.sleep(options.every_seconds)


def _print_changes(rows: Iterator[dict[str, Any]], as_json: bool) -> dict[str, Any] | None:
    """Return the last row."""
    change, last = "", None
    for last in rows:
        before, change = change, show_tables.change_line(last)
        if change != before:
            put_json(last, indent=None) if as_json else put(change)
    return last


def _show_bar(rows: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the last row."""
    columns = (column("{task.description}"), BatchBarColumn(40), column("{task.fields[state]}"))
    rate, last = Rate(), None
    with Progress(*columns, console=console()) as progress:
        bar = progress.add_task("", total=None, visible=False, state="", row=None)
        for last in rows:
            processed, is_final = show_tables.processed(last), last["status"] in _EXIT_CODES
            rate.add(processed, time.monotonic())
            total = last["items_total"] or (1 if is_final else None)
            completed = processed if last["items_total"] else int(is_final)
            description = line(f"batch {last['id']} {last['kind']}: {last['status']}")
            state = _state(last, rate)
            progress.update(
                bar, description=description, total=total, completed=completed, state=state, row=last, visible=True
            )
    return last


def _state(row: dict[str, Any], rate: Rate) -> str:
    """Return items, rate and time left, attempt."""
    parts = [show_tables.items(row) if row["items_total"] is not None else ""]
    if row["status"] == "processing" and row["items_total"]:
        per_second, left = rate.per_second(), clock(rate.seconds_left(row["items_total"]))
        parts += [f"{per_second:,.0f}/s" if per_second else "", f"{left} left" if left else ""]
    if row["attempt"] > 1:
        parts.append(f"attempt {row['attempt']} of {row['max_attempts']}")
    return ", ".join(part for part in parts if part)
