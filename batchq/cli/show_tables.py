"""How rows look on a terminal; each text from the database becomes one line of a cell, as `cli.terminal` makes it."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from batchq.common.terminal import block, line, styled

STYLES = {
    "ready": "cyan",
    "scheduled": "dim",
    "retrying": "yellow",
    "processing": "blue",
    "stalled": "bold red",
    "completed": "green",
    "failed": "red",
    "cancelled": "magenta",
}
UNBROKEN = ("id", "status", "items", "attempt", "age", "oldest wait", "at", "verb", "until", "paused_at")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """Return a table; numbers are put to the right."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    made_rows = [list(row) for row in rows]
    for number, column in enumerate(columns):
        is_number = bool(made_rows) and all(isinstance(row[number], int | float) for row in made_rows)
        made.add_column(column, justify="right" if is_number else "left", overflow="fold", no_wrap=column in UNBROKEN)
    for row in made_rows:
        made.add_row(*(cell if isinstance(cell, Text | ProgressBar) else styled(cell) for cell in row))
    return made


def colored(status: str) -> Text:
    """Return a status in its color."""
    return styled(status, STYLES.get(status, ""))


def short(interval: str | None) -> str:
    """Return an interval of Postgres without its microseconds."""
    return (interval or "").split(".")[0]


def to_the_second(time: str | None) -> str:
    """Return a time of Postgres without its fraction and zone, which is the database's."""
    return (time or "")[:19]


def audit_table(rows: list[dict[str, Any]]) -> RenderableType:
    """Return who did what, and why."""
    cells = [
        [to_the_second(row["at"]), row["verb"], row["batches"], row["batch_id"], row["queue"], row["kind"],
         details(row["details"]), row["reason"], row["actor"] or row["role"]]
        for row in rows
    ]  # fmt: skip
    return table("audit", ("at", "verb", "batches", "id", "queue", "kind", "details", "reason", "who"), cells)


def details(given: Any) -> str:
    """Return what a verb was given, its filter among it, but for queue and kind, which have columns."""
    flat = given if isinstance(given, dict) else {"": given}
    if isinstance(flat.get("filter"), dict):
        flat = flat | flat["filter"]
    return ", ".join(f"{name} {fact(value)}" for name, value in flat.items() if name not in ("filter", "queue", "kind"))


def pause_table(rows: list[dict[str, Any]]) -> RenderableType:
    """Return what is paused."""
    cells = [
        [row["queue"], row["kind"], to_the_second(row["until"]), to_the_second(row["paused_at"]), row["reason"],
         row["actor"]]
        for row in rows
    ]  # fmt: skip
    return table("pauses", ("queue", "kind", "until", "paused_at", "reason", "actor"), cells)


def paused(row: dict[str, Any]) -> str:
    """Return what a pause is of, and until when."""
    what = " of ".join(filter(None, (row["kind"] and f"kind {row['kind']}", row["queue"] and f"queue {row['queue']}")))
    return line(what + (f" until {to_the_second(row['until'])}" if row["until"] else ""))


def overview(status: dict[str, Any]) -> RenderableType:
    """Return queues, what of them is paused, workers and batches."""
    parts = [queue_table(status["queues"]), worker_table(status["workers"]), batch_table(status["batches"])]
    if status["pauses"]:
        parts.insert(1, pause_table(status["pauses"]))
    return Group(*(part for shown in parts for part in (shown, Text())))


def queue_table(rows: list[dict[str, Any]]) -> RenderableType:
    """Return the queues; those that nobody works stand out."""
    if not rows:
        return Text("no batches yet", style="dim")
    columns = ("queue", "kind", "ready", "scheduled", "processing", "stalled", "failed", "oldest wait", "/s", "workers")
    cells = [
        [row["queue"], row["kind"], *(counted(row, name) for name in COUNTED),
         short(row["oldest_wait"]), row["finished_per_second"], workers_of(row)]
        for row in rows
    ]  # fmt: skip
    return table("queues", columns, cells)


COUNTED = ("ready", "scheduled", "processing", "stalled", "failed")


def counted(row: dict[str, Any], name: str) -> int | str:
    """Return a count of a queue; marked, if it is an estimate."""
    return f"~{row[name]:,}" if name in row["estimated"] else row[name]


def workers_of(row: dict[str, Any]) -> Any:
    """Return how many workers know the kind; none, while batches wait, is a warning."""
    if row["ready"] and not row["workers"]:
        return Text("none knows this kind", style="bold red")
    return row["workers"]


def worker_table(rows: list[dict[str, Any]]) -> RenderableType:
    """Return the live workers."""
    if not rows:
        return Text("no live workers", style="dim")
    cells = [
        [row["id"], ", ".join(row["queues"]), row["concurrency"], row["in_hand"], "stopping" if row["stopping"] else ""]
        for row in rows
    ]
    return table("workers", ("worker", "queues", "concurrency", "in hand", ""), cells)


def batch_table(rows: list[dict[str, Any]]) -> RenderableType:
    """Return batches with their progress."""
    if not rows:
        return Text("no such batches", style="dim")
    cells = [
        [str(row["id"]), row["queue"], row["kind"], colored(row["status"]), bar(row), items(row),
         f"{row['attempt']}/{row['max_attempts']}", short(row["age"]), first_line(row["last_error"])]
        for row in rows
    ]  # fmt: skip
    columns = ("id", "queue", "kind", "status", "progress", "items", "attempt", "age", "last error")
    return table("latest batches", columns, cells)


def bar(row: dict[str, Any]) -> ProgressBar | str:
    """Return a progress bar for a batch with items."""
    if not row["items_total"]:
        return ""
    return ProgressBar(total=row["items_total"], completed=row["items_done"] + row["items_failed"], width=16)


def items(row: dict[str, Any]) -> str:
    """Return how many items are worked."""
    if row["items_total"] is None:
        return ""
    failed = f", {row['items_failed']:,} failed" if row["items_failed"] else ""
    return f"{row['items_done']:,} of {row['items_total']:,}{failed}"


def first_line(text: str | None) -> str:
    """Return the beginning of an error."""
    return (text or "").split("\n")[0][:100]


def one_batch(batch: dict[str, Any], failed_items: list[dict[str, Any]]) -> RenderableType:
    """Return everything about one batch."""
    facts = table("", ("", ""), [[name, fact(value)] for name, value in batch.items() if name != "errors"])
    facts.show_header = False
    parts: list[RenderableType] = [facts]
    for error in map(as_error, batch["errors"]):
        parts += [
            Text(),
            styled(f"attempt {error.get('attempt')}, {error.get('at')}: {error.get('error') or ''}", "red"),
        ]
        parts.append(Text(block(error.get("traceback")), style="dim"))
    if failed_items:
        cells = [[row["item_index"], fact(row["item"]), row["attempt"], row["error"]] for row in failed_items]
        parts += [Text(), table("failed items", ("index", "item", "attempt", "error"), cells)]
    return Group(*parts)


def as_error(value: Any) -> dict[str, Any]:
    """Return an element of a batch's errors as the object that it is, unless somebody else has written it."""
    return value if isinstance(value, dict) else {"error": fact(value)}


def fact(value: Any) -> str:
    """Return a value of a batch: JSON for what is no text or number, cut where it is very long."""
    return line(value if isinstance(value, str | int | float | None) else json.dumps(value, ensure_ascii=False))


def change_line(row: dict[str, Any]) -> str:
    """Return the monitor's line for a batch."""
    progress = f"  {items(row)} items" if row["items_total"] is not None else ""
    error = f"  {first_line(row['last_error'])}" if row["status"] in ("failed", "retrying", "cancelled") else ""
    attempt = f"attempt {row['attempt']}/{row['max_attempts']}"
    return line(f"batch {row['id']}  {row['queue']}/{row['kind']}  {row['status']}  {attempt}{progress}{error}")
