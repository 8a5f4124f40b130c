"""Commands about one batch: `watch` follows it to its end, `logs` tells its attempts."""

import time
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from rich.progress import BarColumn, Progress, TaskID

from batchq.cli import show_tables
from batchq.cli.commands import database, linked, patiently
from batchq.cli.pace import Pace, clock
from batchq.common.terminal import column, complain, console, line, put, put_json
from batchq.postgres.statements import views

EXIT_CODES = {"completed": 0, "failed": 1, "cancelled": 3}
NO_SUCH_BATCH = 2


# ------------------------------------------------------------------------------------------------------------- watch


def watch(options: Namespace) -> int:
    """Follow one batch until its end; return 0 when it completed, 1 when it failed, 3 when it was cancelled, 2 if
    there is no such batch. A bar on a terminal; else a line, or with --json a JSON object, for each change."""
    looks = look_until_the_end(options)
    last = show_bar(looks) if console.is_terminal and not options.json else print_changes(looks, options.json)
    if last is None:
        complain(f"there is no batch {options.id}")
        return NO_SUCH_BATCH
    if last["last_error"] and last["status"] != "completed":
        complain(f"batch {options.id}: {show_tables.first_line(last['last_error'])}")
    return EXIT_CODES[last["status"]]


def look_until_the_end(options: Namespace) -> Iterator[dict[str, Any]]:
    """Yield the batch's row of batchq.status each --every-seconds, until it is in a final status or gone."""
    with linked(options) as link:

        def look() -> dict[str, Any] | None:
            with link.transaction() as conn:
                return views.status_row(conn, options.id)

        while (row := patiently(look)) is not None:
            yield row
            if row["status"] in EXIT_CODES:
                return
            time.sleep(options.every_seconds)


def print_changes(looks: Iterator[dict[str, Any]], as_json: bool) -> dict[str, Any] | None:
    """Print a line for each change; return the last row."""
    change, last = "", None
    for last in looks:
        before, change = change, show_tables.change_line(last)
        if change != before:
            put_json(last, indent=None) if as_json else put(change)
    return last


def show_bar(looks: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
    """Show a progress bar that moves with the batch; return the last row."""
    columns = (column("{task.description}"), BarColumn(40), column("{task.fields[told]}"))
    pace, last = Pace(), None
    with Progress(*columns, console=console) as progress:
        bar: TaskID | None = None
        for last in looks:
            worked = (last["items_done"] or 0) + (last["items_failed"] or 0)
            pace.see(worked, time.monotonic())
            if bar is None:
                bar = progress.add_task("", total=None, told="")
            total = last["items_total"] or (1 if last["status"] in EXIT_CODES else None)
            done = worked if last["items_total"] else int(last["status"] in EXIT_CODES)
            progress.update(bar, description=heading(last), total=total, completed=done, told=told(last, pace))
    return last


def heading(row: dict[str, Any]) -> str:
    """Return what stands before the bar."""
    return line(f"batch {row['id']} {row['kind']}: {row['status']}")


def told(row: dict[str, Any], pace: Pace) -> str:
    """Return what stands behind the bar: items, pace and time left, attempt."""
    parts = [show_tables.items(row)]
    if row["status"] == "processing" and row["items_total"]:
        per_second, left = pace.per_second(), clock(pace.seconds_left(row["items_total"]))
        parts += [f"{per_second:,.0f}/s" if per_second else "", f"{left} left" if left else ""]
    if row["attempt"] > 1:
        parts.append(f"attempt {row['attempt']} of {row['max_attempts']}")
    return ", ".join(part for part in parts if part)


# -------------------------------------------------------------------------------------------------------------- logs


def logs(options: Namespace) -> int:
    """Tell the attempts of one batch, with their errors, oldest first; 1 if there is no such batch, as `show`."""
    with database(options) as conn:
        batch = views.batch_object(conn, options.id, inputs_as_text=True)
    if batch is None:
        complain(f"there is no batch {options.id}")
        return 1
    for event in history(batch):
        put_json(event, indent=None) if options.json else put(event_line(event), event.get("traceback") or "")
    return 0


def history(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what is known of a batch's life, in its order: *at*, *event*; of a failed attempt, error and traceback."""
    yield {"at": batch["created_at"], "event": "enqueued"}
    for error in map(show_tables.as_error, batch["errors"]):
        yield {"at": error.get("at"), "event": f"attempt {error.get('attempt')} failed"} | {
            name: error.get(name) for name in ("error", "traceback")
        }
    if batch["status"] in ("processing", "stalled"):
        who = f"attempt {batch['attempt']} runs, claimed by {batch['claimed_by']}"
        yield {"at": batch["claimed_at"], "event": who}
    elif batch["finished_at"]:
        yield {"at": batch["finished_at"], "event": f"{batch['status']} in attempt {batch['attempt']}"}
    else:
        yield {"at": batch["next_run_at"], "event": f"{batch['status']}, to run from then on"}


def event_line(event: dict[str, Any]) -> str:
    """Return an event in a line."""
    error = f": {event['error']}" if event.get("error") else ""
    return f"{event['at']}  {event['event']}{error}"
