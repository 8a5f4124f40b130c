"""How rows look on a terminal. `common.terminal` makes each text from the database one line of a cell."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from batchq.cli.bars import progress
from batchq.cli.rate import clock
from batchq.common.numbers import duration
from batchq.common.terminal import line, styled
from batchq.operate.flow_graph import Group as FlowGroup
from batchq.operate.limits import name_text, number_text, origin_text, use_text
from batchq.operate.parts import Summary, range_text
from batchq.operate.progress import items_text
from batchq.operate.schedules import origin_of, rules_of, words_of
from batchq.postgres.statements.views import MOST_OF_A_KEY

_Row = dict[str, Any]
_STYLES = {
    "ready": "cyan",
    "scheduled": "",
    "waiting": "",
    "retrying": "yellow",
    "processing": "blue",
    "stalled": "bold red",
    "completed": "green",
    "failed": "red",
    "cancelled": "magenta",
    "working": "green",
}
_UNBROKEN = ("ID", "Status", "Items", "Attempt", "Age", "Oldest wait", "Time", "Action", "Until", "Paused since")
_KEY_COLUMNS = ("Queue", "Key", "Waiting", "Scheduled", "Running", "Oldest wait")
LIMIT_COLUMNS = ("Running", "Per second", "Items per second", "Per key", "Burst seconds")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """Return a table with numbers on the right of their columns."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    made_rows = [list(row) for row in rows]
    for number, column in enumerate(columns):
        is_number = bool(made_rows) and all(isinstance(row[number], int | float) for row in made_rows)
        made.add_column(column, justify="right" if is_number else "left", overflow="fold", no_wrap=column in _UNBROKEN)
    for row in made_rows:
        made.add_row(*(cell if isinstance(cell, Text) else styled(cell) for cell in row))
    return made


def key_table(rows: Iterable[_Row]) -> Table:
    """Return keys and what waits and runs of them; a count with a plus sign is a lower bound."""
    cells = [
        [row["queue"], row["key"], _at_least(row["waiting"], is_more), _at_least(row["scheduled"], is_more),
         _at_least(row["running"], row["running"] > MOST_OF_A_KEY), short(row["oldest_wait"])]
        for row in rows
        for is_more in (row["waiting"] + row["scheduled"] > MOST_OF_A_KEY,)
    ]  # fmt: skip
    return table("Keys", _KEY_COLUMNS, cells)


def _at_least(count: int, is_more: bool) -> str:
    return f"{count:,}+" if is_more and count else f"{count:,}"


# ------------------------------------------------------------------------------------------------------------- cells


def colored(status: str) -> Text:
    """Return a status in its color."""
    return styled(status, _STYLES.get(status, ""))


def short(interval: str | None) -> str:
    """Return an interval of Postgres without its microseconds."""
    return (interval or "").split(".")[0]


def to_the_second(time: str | None) -> str:
    """Return a time of Postgres without its fraction and zone, which is the database's."""
    return (time or "")[:19].replace("T", " ")


def processed(row: _Row) -> int:
    """Return how many items are processed."""
    return (row["items_done"] or 0) + (row["items_failed"] or 0)


def items(row: _Row) -> str:
    """Return how many items succeeded and failed, in the words of the web UI."""
    return items_text(row)


def attempts(row: _Row) -> str:
    """Return this attempt and the maximum."""
    return f"{row['attempt']}/{row['max_attempts']}"


def first_line(text: str | None) -> str:
    """Return the beginning of an error."""
    return (text or "").split("\n")[0][:100]


def as_error(value: Any) -> _Row:
    """Return an element of a batch's errors as the object that it is, unless somebody else wrote it."""
    return value if isinstance(value, dict) else {"error": _fact(value)}


def workers_of(row: _Row) -> Any:
    """Return how many workers have a handler for the kind; none, while batches wait, stands out."""
    if row["ready"] and not row["workers"]:
        return Text("none has a handler", style="bold red")
    return row["workers"]


def state_of(worker: _Row) -> Text:
    """Return what a worker does, or when it was last seen if its heartbeat is late: then nobody knows what it does."""
    if worker["state"] in ("late", "gone"):
        return styled(f"last seen {duration(worker['heartbeat_seconds'])} ago", "bold red")
    return styled(worker["state"], _STYLES.get(worker["state"], "yellow"))


def held_back(row: _Row) -> str:
    """Return how many ready batches of a queue are held back, and by which limits; empty if none is."""
    return f"{count_text(row, 'held_back')} by {row['held_back_by']}" if row["held_back"] else ""


def count_text(row: _Row, name: str) -> str:
    """Return a count of batchq.queues; an estimate has a ~."""
    is_estimate = ("ready" if name == "held_back" else name) in row["estimated"]
    return f"{'~' if is_estimate else ''}{row[name]:,}"


def _fact(value: Any) -> str:
    """Return a value as text or number, or else as JSON; cut if it is very long."""
    return line(value if isinstance(value, str | int | float | None) else json.dumps(value, ensure_ascii=False))


# ------------------------------------------------------------------------------------------------------------- lines


def change_line(row: _Row) -> str:
    """Return the line of a batch for `monitor` and `watch`."""
    progress = f"  {items(row)} items" if row["items_total"] is not None else ""
    error = f"  {first_line(row['last_error'])}" if row["status"] in ("failed", "retrying", "cancelled") else ""
    return line(
        f"batch {row['id']}  {row['queue']}/{row['kind']}  {row['status']}  attempt {attempts(row)}{progress}{error}"
    )


def name_of(queue: str | None, kind: str | None) -> str:
    """Return what a pause is of: "kind send in queue mail", "kind send", "queue mail"."""
    return " in ".join(filter(None, (kind and f"kind {kind}", queue and f"queue {queue}")))


def pause_line(row: _Row) -> str:
    """Return what is paused, and until when."""
    until = f" until {to_the_second(row['until'])}" if row["until"] else ""
    return line(name_of(row["queue"], row["kind"]) + until)


def throttle_line(row: _Row) -> str:
    """Return what is throttled, and for how long."""
    key = f" key {row['key']}" if row["key"] else ""
    return line(f"{name_text(row['queue'], row['kind'])}{key} for {clock(row['seconds_left'])}")


# ------------------------------------------------------------------------------------------------------------ tables


def pause_table(rows: list[_Row]) -> RenderableType:
    """Return the pauses."""
    cells = [
        [row["queue"], row["kind"], to_the_second(row["until"]), to_the_second(row["paused_at"]), row["reason"],
         row["actor"]]
        for row in rows
    ]  # fmt: skip
    return table("Pauses", ("Queue", "Kind", "Until", "Paused since", "Reason", "Actor"), cells)


def limit_cells(row: _Row) -> list[str]:
    """Return the cells of LIMIT_COLUMNS: what is in use of each number, as "3 of 10"."""
    return [
        use_text(row["running"], row["max_running"]),
        use_text(row["starts_per_second_shared"], row["per_second"]),
        use_text(row["items_per_second_shared"], row["items_per_second"]),
        "" if row["max_running_per_key"] is None else number_text(row["max_running_per_key"]),
        number_text(row["burst_seconds"]),
    ]


def limit_table(rows: list[_Row]) -> RenderableType:
    """Return the limits in force, and what is in use of them."""
    cells = [
        [row["queue"], row["kind"] or "(all)", *limit_cells(row), origin_text(row), row["held_back_by"]] for row in rows
    ]
    return table("Limits", ("Queue", "Kind", *LIMIT_COLUMNS, "Origin", "Holds back by"), cells)


def throttle_table(rows: list[_Row]) -> RenderableType:
    """Return the throttles, and how long they last."""
    cells = [
        [row["queue"], row["kind"] or "(all)", row["key"] or "(all)", clock(row["seconds_left"]),
         to_the_second(row["throttled_at"]), row["worker"]]
        for row in rows
    ]  # fmt: skip
    return table("Throttles", ("Queue", "Kind", "Key", "Time left", "Throttled since", "Worker"), cells)


def schedule_table(rows: list[_Row]) -> RenderableType:
    """Return schedules, their next tick, and the outcome of the latest batch."""
    cells = [
        [row["name"], words_of(row), row["kind"], row["queue"], row["state"], to_the_second(row["next_at"]),
         latest(row), row["batches_made"], row["ticks_missed"], row["ticks_overlapped"], rules_of(row),
         origin_of(row), row["error"]]
        for row in rows
    ]  # fmt: skip
    columns = ("Schedule", "When", "Kind", "Queue", "State", "Next", "Latest batch", "Batches", "Missed", "Overlapped",
               "Rules", "Origin", "Error")  # fmt: skip
    return table("Schedules", columns, cells)


def latest(row: _Row) -> str:
    """Return the latest batch of a schedule, and what became of it."""
    return f"{row['last_batch_id']} {row['last_status'] or 'deleted'}" if row["last_batch_id"] else ""


def audit_table(rows: list[_Row]) -> RenderableType:
    """Return who did what, and why."""
    cells = [
        [to_the_second(row["at"]), row["verb"], row["batches"], row["batch_id"], row["queue"], row["kind"],
         _details(row["details"]), row["reason"], row["actor"] or row["role"]]
        for row in rows
    ]  # fmt: skip
    columns = ("Time", "Action", "Batches", "ID", "Queue", "Kind", "Details", "Reason", "Actor")
    return table("Audit", columns, cells)


def _details(given: Any) -> str:
    """Return the arguments of an action, including its filter, except queue and kind, which have columns."""
    flat = given if isinstance(given, dict) else {"": given}
    if isinstance(flat.get("filter"), dict):
        flat = flat | flat["filter"]
    return ", ".join(
        f"{name} {_fact(value)}" for name, value in flat.items() if name not in ("filter", "queue", "kind")
    )


def part_table(spread: Summary) -> RenderableType:
    """Return how many parts there are, and those that run or have a problem."""
    more = f" ({spread.more:,} more run or have a problem)" if spread.more else ""
    title = f"Parts: {spread.total:,}: {spread.text}{more}"
    cells = [
        [row["id"], range_text(row), colored(row["status"]), progress(row, 16), items(row),
         attempts(row) if row["attempt"] is not None else "", row["claimed_by"]]
        for row in spread.shown
    ]  # fmt: skip
    if not cells:
        return Text(title, style="bold")
    return table(title, ("ID", "Range", "Status", "Progress", "Items", "Attempt", "Worker"), cells)


def flow_groups(groups: Iterable[FlowGroup], is_cut: bool) -> Table:
    """Return how many batches of a flow there are of each level, kind and status."""
    cells = [[one.level, one.queue, one.kind, one.status, one.batches] for one in groups]
    title = "Flow (the nearest batches; there are more)" if is_cut else "Flow"
    return table(title, ("Level", "Queue", "Kind", "Status", "Batches"), cells)
