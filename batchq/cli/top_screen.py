"""The full screen of ``batchq top``. Needs the extra "top"."""

import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

from rich.progress_bar import ProgressBar
from rich.text import Text
from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import DataTable, Footer, Static, TabbedContent, TabPane

from batchq.cli import show_tables
from batchq.cli.rate import Rate, clock
from batchq.cli.show_tables import attempts, colored, first_line, processed, short, to_the_second
from batchq.common.terminal import one_line, styled
from batchq.operate.limits import origin_text

Row = dict[str, Any]
Rows = dict[str, list[Row]]
_BAR_WIDTH = 14
_REST_FACTOR, _MIN_REST_SECONDS, _MAX_REST_SECONDS = 100, 1.0, 10.0


class _Column(NamedTuple):
    """A column: its title, the value to sort by, and the cell, if it is not the value."""

    title: str
    value: Callable[[Row], Any]
    cell: Callable[[Row], Any] | None = None

    def shown(self, row: Row) -> Any:
        made = (self.cell or self.value)(row)
        if isinstance(made, Text | ProgressBar):
            return made
        return styled(made, justify="right" if isinstance(made, int | float) else "left")


def _field(name: str, title: str = "") -> _Column:
    return _Column(title or name.capitalize(), lambda row: row.get(name))


def length(interval: str | None) -> tuple[int, str] | None:
    """Return an interval of Postgres ("1 day 02:03:04") as a value that sorts by its length."""
    if interval is None:
        return None
    days, _, rest = interval.rpartition(" ")
    return int(days.split()[0]) if days else 0, rest.rjust(20, "0")


def _alarming(number: int) -> Text:
    """Return a number that stands out unless it is 0."""
    return Text(str(number), style="bold red" if number else "", justify="right")


def _limit_column(title: str, number: int) -> _Column:
    return _Column(title, lambda row: show_tables.limit_cells(row)[number])


_QUEUE_AND_KIND = (_field("queue"), _field("kind"))
_ATTEMPT = _Column("Attempt", lambda row: row["attempt"], attempts)
TABLES: dict[str, tuple[_Column, ...]] = {
    "queues": (
        *_QUEUE_AND_KIND,
        *map(_field, ("waiting", "ready", "scheduled", "processing")),
        _Column("Stalled", lambda row: row["stalled"], lambda row: _alarming(row["stalled"])),
        _field("failed"),
        _Column("Oldest wait", lambda row: length(row["oldest_wait"]), lambda row: short(row["oldest_wait"])),
        _field("finished_per_second", "Per second"),
        _Column("Workers", lambda row: row["workers"], show_tables.workers_of),
        _Column("Held back", lambda row: row["held_back"], show_tables.held_back),
    ),
    "running": (
        _field("id", "ID"),
        *_QUEUE_AND_KIND,
        _Column("Status", lambda row: row["status"], lambda row: colored(row["status"])),
        _Column("Progress", lambda row: row["progress_percent"] or 0, lambda row: show_tables.bar(row, _BAR_WIDTH)),
        _Column("Items", processed, show_tables.items),
        _Column("Time left", lambda row: row["seconds_left"] or 0, lambda row: clock(row["seconds_left"])),
        _ATTEMPT,
        _Column("Run time", lambda row: length(row["running_time"]), lambda row: short(row["running_time"])),
        _field("claimed_by", "Worker"),
    ),
    "failures": (
        _field("id", "ID"),
        *_QUEUE_AND_KIND,
        _ATTEMPT,
        _Column("Time", lambda row: row["finished_at"], lambda row: to_the_second(row["finished_at"])),
        _Column("Error", lambda row: row["last_error"], lambda row: first_line(row["last_error"])),
    ),
    "workers": (
        _field("id", "Worker"),
        _Column("Queues", lambda row: ", ".join(row["queues"])),
        _field("concurrency", "Capacity"),
        _field("in_hand", "Claimed"),
        _Column("Started", lambda row: to_the_second(row["started_at"])),
        _Column("State", lambda row: row["stopping"], show_tables.state_of),
    ),
    "limits": (
        _field("queue"),
        _Column("Kind", lambda row: row["kind"], lambda row: row["kind"] or "(all)"),
        *(_limit_column(title, number) for number, title in enumerate(show_tables.LIMIT_COLUMNS)),
        _Column("Origin", origin_text),
        _field("held_back_by", "Holds back by"),
    ),
}


class Details(ModalScreen[None]):
    """Everything about one batch, over the rest of the screen."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,enter", "dismiss", "Back")]
    CSS = (
        "Details { align: center middle; } #details { width: 90%; height: 90%; border: round $primary; padding: 0 1; }"
    )

    def __init__(self, shown: Any) -> None:
        super().__init__()
        self.shown = shown

    def compose(self) -> ComposeResult:
        """Yield the widgets."""
        with VerticalScroll(id="details", can_focus=True):
            yield Static(self.shown, markup=False)
        yield Footer()


class Top(App[None]):
    """The screen. *read* returns the rows of the tables; *show* what to show of one batch, None if it is gone.

    every_seconds: time between two reads; None: a hundred times as long as a read took, from 1 to 10 s.
    """

    TITLE = "batchq top"
    ENABLE_COMMAND_PALETTE = False
    CSS = (
        "#state { height: 1; padding: 0 1; } TabbedContent, ContentSwitcher, DataTable { height: 1fr; } "
        "DataTable > .datatable--cursor, DataTable:focus > .datatable--cursor { background: $primary-background; }"
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit"),
        Binding("1", "tab('queues')", "Queues"),
        Binding("2", "tab('running')", "Running"),
        Binding("3", "tab('failures')", "Failures"),
        Binding("4", "tab('workers')", "Workers"),
        Binding("5", "tab('limits')", "Limits"),
        Binding("s", "sort", "Sort by next column"),
        Binding("r", "reverse", "Reverse"),
        Binding("p", "pause", "Pause display"),
    ]

    def __init__(self, read: Callable[[], Rows], show: Callable[[int], Any], every_seconds: float | None) -> None:
        super().__init__()
        self._read, self._show, self._every_seconds = read, show, every_seconds
        self.rows: Rows = {name: [] for name in (*TABLES, "pauses", "throttles")}
        self._sorting: dict[str, tuple[int, bool]] = {
            "queues": (0, False), "running": (0, True), "failures": (0, True), "workers": (0, False),
            "limits": (0, False),
        }  # fmt: skip
        self._rates: defaultdict[int, Rate] = defaultdict(Rate)
        self._is_paused = False
        self.state = Static("reading ...", id="state", markup=False)

    def compose(self) -> ComposeResult:
        """Yield the widgets."""
        yield self.state
        with TabbedContent(initial="queues"):
            for name, columns in TABLES.items():
                with TabPane(name.capitalize(), id=name):
                    table: DataTable[Any] = DataTable(
                        cursor_type="row",
                        cursor_foreground_priority="renderable",
                        zebra_stripes=True,
                        id=f"{name}-table",
                    )
                    table.add_columns(*(column.title for column in columns))
                    yield table
        yield Footer()

    def on_mount(self) -> None:
        """Start reading."""
        self._refresh_rows()
        self.table("queues").focus()

    @work(thread=True, exclusive=True, exit_on_error=False)
    def _refresh_rows(self) -> None:
        """Read in a thread, unless paused; report an error of the database; repeat after a rest."""
        began_at = time.monotonic()
        update = self._read_rows() if not self._is_paused else None
        rest = self.rest_seconds(time.monotonic() - began_at)
        if update:
            self.call_from_thread(update)
        self.call_from_thread(self.set_timer, rest, self._refresh_rows)

    def _read_rows(self) -> Callable[[], None]:
        """Return what shows the rows, or the error."""
        try:
            return partial(self._take, self._read())
        except Exception as error:
            text = f"the database is unavailable, retrying: {one_line(str(error))}"
            return partial(self.state.update, styled(text, "bold red"))

    def rest_seconds(self, took_seconds: float) -> float:
        """Return how long to rest after a read: reads take at most a hundredth of one connection's time."""
        if self._every_seconds is not None:
            return self._every_seconds
        return min(max(_REST_FACTOR * took_seconds, _MIN_REST_SECONDS), _MAX_REST_SECONDS)

    def _take(self, rows: Rows) -> None:
        now = time.monotonic()
        self._rates = defaultdict(Rate, {row["id"]: self._rates[row["id"]] for row in rows["running"]})
        for row in rows["running"]:
            self._rates[row["id"]].add(processed(row), now)
            row["seconds_left"] = self._rates[row["id"]].seconds_left(row["items_total"] or 0)
        self.rows = rows
        for name in TABLES:
            self._fill(name)
        self._update_state()

    def _update_state(self) -> None:
        self.state.update(styled(_summary(self.rows) + ("  (display paused)" if self._is_paused else "")))

    def _fill(self, name: str) -> None:
        """Write the rows of a table again, sorted; keep the cursor in its row."""
        table = self.table(name)
        cursor_row = table.cursor_row
        table.clear()
        for row in self._sorted_rows(name):
            table.add_row(*(column.shown(row) for column in TABLES[name]))
        if table.row_count:
            table.move_cursor(row=min(cursor_row, table.row_count - 1), animate=False)

    def _sorted_rows(self, name: str) -> list[Row]:
        """Return the rows of a table in the chosen order; unknown values sort as the smallest."""
        number, is_reversed = self._sorting[name]
        value = TABLES[name][number].value

        def key(row: Row) -> tuple[bool, Any]:
            found = value(row)
            return (False, 0) if found is None else (True, found)

        return sorted(self.rows[name], key=key, reverse=is_reversed)

    def table(self, name: str) -> "DataTable[Any]":
        """Return the widget of a table."""
        return self.query_one(f"#{name}-table", DataTable)

    @property
    def _active(self) -> str:
        """The name of the table on the screen."""
        return self.query_one(TabbedContent).active

    def action_tab(self, name: str) -> None:
        """Show a table."""
        self.query_one(TabbedContent).active = name
        self.table(name).focus()

    def action_sort(self) -> None:
        """Sort by the next column."""
        number, is_reversed = self._sorting[self._active]
        self._sort((number + 1) % len(TABLES[self._active]), is_reversed)

    def action_reverse(self) -> None:
        """Reverse the order."""
        number, is_reversed = self._sorting[self._active]
        self._sort(number, not is_reversed)

    def _sort(self, number: int, is_reversed: bool) -> None:
        name = self._active
        self._sorting[name] = (number, is_reversed)
        self._fill(name)
        self.notify(f"sorted by {TABLES[name][number].title}{', reversed' if is_reversed else ''}", timeout=1)

    def action_pause(self) -> None:
        """Stop or resume reading."""
        self._is_paused = not self._is_paused
        self._update_state()

    def on_data_table_header_selected(self, event: DataTable.HeaderSelected) -> None:
        """Sort by the clicked column; at a second click, in reverse."""
        number, is_reversed = self._sorting[self._active]
        self._sort(event.column_index, not is_reversed if number == event.column_index else False)

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        """Show the batch of the row."""
        if self._active in ("running", "failures"):
            self._open(self._sorted_rows(self._active)[event.cursor_row]["id"])

    @work(thread=True, exit_on_error=False)
    def _open(self, batch_id: int) -> None:
        """Read a batch in a thread, then show it."""
        try:
            shown = self._show(batch_id)
        except Exception as error:
            shown = styled(one_line(str(error)))
        self.call_from_thread(self.push_screen, Details(shown or styled(f"batch {batch_id:d} is gone")))


def _summary(rows: Rows) -> str:
    """Return the line at the top."""
    total = {name: sum(row[name] for row in rows["queues"]) for name in ("ready", "processing", "stalled", "failed")}
    rate = sum(row["finished_per_second"] for row in rows["queues"])
    counts = "  ".join(f"{name} {number:,}" for name, number in total.items())
    text = f"{counts}  finished {rate:,.1f}/s  workers {len(rows['workers'])}"
    pauses = "; ".join(show_tables.pause_line(row) for row in rows["pauses"])
    throttles = "; ".join(show_tables.throttle_line(row) for row in rows["throttles"])
    parts = (text, f"PAUSED: {pauses}" if pauses else "", f"THROTTLED: {throttles}" if throttles else "")
    return "  ".join(filter(None, parts))


def run(every_seconds: float | None, read: Callable[[], Rows], show: Callable[[int], Any]) -> None:
    """Show the screen until the user leaves it."""
    Top(read, show, every_seconds).run()
