"""What `batchq status` shows: on a terminal, tables as wide as it is; into a pipe, all of every column."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from batchq.cli import listings
from batchq.cli.columns import Column, Row, fitted_table, whole_table
from batchq.common.terminal import put_json, show, styled
from batchq.operate.watch import State


class _Fitted:
    """A table that is laid out for the terminal on which it is printed."""

    def __init__(self, title: str, columns: Sequence[Column], rows: list[Row]) -> None:
        self._title, self._columns, self._rows = title, columns, rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table."""
        if console.is_terminal:
            yield fitted_table(self._title, self._columns, self._rows, options.max_width)
        else:
            yield whole_table(self._title, self._columns, self._rows)


def show_several(
    states: Sequence[State], is_json: bool, shown: Callable[[dict[str, Any]], dict[str, Any]] = dict
) -> int:
    """Print several databases; return 1 if one is away, else 0. *shown*: makes of an answer what `overview` shows."""
    if is_json:
        put_json({"databases": [_as_json(state) for state in states]})
    else:
        show(overview_of_several(states, shown))
    return int(any(state.away for state in states))


def overview_of_several(
    states: Sequence[State], shown: Callable[[dict[str, Any]], dict[str, Any]] = dict
) -> RenderableType:
    """Return a table of all databases, whose answers have "totals", and what `overview` shows of each that answers."""
    rows = [database_row(state, "totals") for state in states]
    parts: list[RenderableType] = [_Fitted("Databases", listings.DATABASES, rows), *away_lines(rows), Text()]
    for state in states:
        if state.away is None:
            parts += [styled(f"Database {state.name}", "bold reverse"), overview(shown(state.answer))]
    return Group(*parts)


def _as_json(state: State) -> dict[str, Any]:
    if state.away:
        return {"database": state.name, "state": "away", "away": state.away.why, "away_seconds": state.away.seconds}
    return {"database": state.name, "state": "up", **state.answer}


def database_row(state: State, part: str = "") -> Row:
    """Return the row of a database in the table of all. *part*: where in the answer its sums are; "": it is them."""
    row: Row = {"database": state.name, "away": "", "away_seconds": None}
    if state.away:
        return row | {"away": state.away.text, "state": state.away.time_text, "away_seconds": state.away.seconds}
    row |= state.answer[part] if part else state.answer
    return row


def away_lines(rows: Sequence[Row]) -> list[Text]:
    """Return a line for each database that is away: how long, and why."""
    return [styled(f"{row['database']}: {row['away']}", "bold red") for row in rows if row["away"]]


def overview(status: dict[str, Any]) -> RenderableType:
    """Return queues, pauses, limits, throttles, schedules, workers and batches."""
    queues: Sequence[Column] = listings.QUEUES
    if not any(row["waiting"] for row in status["queues"]):  # few use flows
        queues = tuple(column for column in queues if column.title != "Waiting")
    status = status | {"queues": listings.with_pauses(status["queues"], status["pauses"])}
    parts: list[RenderableType] = []
    for name, title, columns, nothing in (
        ("queues", "Queues", queues, "no batches yet"),
        ("pauses", "Pauses", listings.PAUSES, ""),
        ("limits", "Limits", listings.LIMITS, ""),
        ("throttles", "Throttles", listings.THROTTLES, ""),
        ("schedules", "Schedules", listings.SCHEDULES, ""),
        ("workers", "Workers", listings.WORKERS, "no workers seen in the last hour"),
        ("batches", "Latest batches", listings.BATCHES, "no such batches"),
    ):
        if status.get(name):
            parts += [_Fitted(title, columns, status[name]), Text()]
        elif nothing:
            parts += [Text(nothing, style="dim"), Text()]
    return Group(*parts)
