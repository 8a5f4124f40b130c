"""`batchq top`: queues, workers, running batches and failures on a full screen, live. Needs the extra "top"."""

import time
from argparse import Namespace
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
from batchq.cli.pace import Pace, clock
from batchq.cli.show_tables import colored, short
from batchq.common.terminal import one_line, styled

Row = dict[str, Any]
Look = dict[str, list[Row]]
BAR_WIDTH = 14
REST_FACTOR, LEAST_REST_SECONDS, MOST_REST_SECONDS = 100, 1.0, 10.0


class Column(NamedTuple):
    """A column: its title, what is sorted by, and what is shown."""

    title: str
    value: Callable[[Row], Any]
    cell: Callable[[Row], Any] | None = None

    def shown(self, row: Row) -> Any:
        """Return the cell of a row; numbers to the right, texts without their markup."""
        made = (self.cell or self.value)(row)
        if isinstance(made, Text | ProgressBar):
            return made
        return styled(made, justify="right" if isinstance(made, int | float) else "left")


def field(name: str, title: str = "") -> Column:
    """Return the column of a field."""
    return Column(title or name.replace("_", " "), lambda row: row.get(name))


def worked(row: Row) -> int:
    """Return how many items of a batch are worked."""
    return (row["items_done"] or 0) + (row["items_failed"] or 0)


def bar(row: Row) -> ProgressBar | str:
    """Return a bar for a batch with items."""
    return ProgressBar(row["items_total"], worked(row), width=BAR_WIDTH) if row["items_total"] else ""


def length(interval: str | None) -> tuple[int, str] | None:
    """Return an interval of Postgres ("1 day 02:03:04") as what sorts by its length."""
    if interval is None:
        return None
    days, _, rest = interval.rpartition(" ")
    return int(days.split()[0]) if days else 0, rest.rjust(20, "0")


TABLES: dict[str, tuple[Column, ...]] = {
    "queues": (
        field("queue"),
        field("kind"),
        field("ready"),
        field("scheduled"),
        field("processing"),
        Column("stalled", lambda row: row["stalled"], lambda row: alarming(row["stalled"])),
        field("failed"),
        Column("oldest wait", lambda row: length(row["oldest_wait"]), lambda row: short(row["oldest_wait"])),
        Column("/s", lambda row: row["finished_per_second"]),
        Column("workers", lambda row: row["workers"], lambda row: show_tables.workers_of(row)),
    ),
    "running": (
        field("id"),
        field("queue"),
        field("kind"),
        Column("status", lambda row: row["status"], lambda row: colored(row["status"])),
        Column("progress", lambda row: row["progress_percent"] or 0, bar),
        Column("items", worked, show_tables.items),
        Column("left", lambda row: row["seconds_left"] or 0, lambda row: clock(row["seconds_left"])),
        Column("attempt", lambda row: row["attempt"], lambda row: f"{row['attempt']}/{row['max_attempts']}"),
        Column("running", lambda row: length(row["running_time"]), lambda row: short(row["running_time"])),
        field("claimed_by", "worker"),
    ),
    "failures": (
        field("id"),
        field("queue"),
        field("kind"),
        Column("attempt", lambda row: row["attempt"], lambda row: f"{row['attempt']}/{row['max_attempts']}"),
        Column("at", lambda row: row["finished_at"], lambda row: (row["finished_at"] or "")[:19]),
        Column("error", lambda row: row["last_error"], lambda row: show_tables.first_line(row["last_error"])),
    ),
    "workers": (
        field("id", "worker"),
        Column("queues", lambda row: ", ".join(row["queues"])),
        field("concurrency"),
        field("in_hand"),
        Column("since", lambda row: row["started_at"], lambda row: row["started_at"][:19]),
        Column("state", lambda row: row["stopping"], lambda row: "stopping" if row["stopping"] else ""),
    ),
}


def alarming(number: int) -> Text:
    """Return a number that stands out unless it is 0."""
    return Text(str(number), style="bold red" if number else "", justify="right")


class Details(ModalScreen[None]):
    """All about one batch, over the rest of the screen."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,enter", "dismiss", "Back")]
    CSS = (
        "Details { align: center middle; } #details { width: 90%; height: 90%; border: round $primary; padding: 0 1; }"
    )

    def __init__(self, shown: Any) -> None:
        super().__init__()
        self.shown = shown

    def compose(self) -> ComposeResult:
        """Lay out."""
        with VerticalScroll(id="details", can_focus=True):
            yield Static(self.shown, markup=False)
        yield Footer()


class Top(App[None]):
    """The screen. *look* reads the tables; *show* returns what is shown of one batch, None if it is gone.

    every_seconds: how long to rest between two looks; None: a hundred times as long as the look took, from 1 to 10 s.
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
        Binding("s", "sort", "Sort by next column"),
        Binding("r", "reverse", "Reverse"),
        Binding("p", "pause", "Stand still"),
    ]

    def __init__(self, look: Callable[[], Look], show: Callable[[int], Any], every_seconds: float | None) -> None:
        super().__init__()
        self.look, self.show, self.every_seconds = look, show, every_seconds
        self.rows: Look = {name: [] for name in (*TABLES, "pauses")}
        self.sorting: dict[str, tuple[int, bool]] = {
            "queues": (0, False), "running": (0, True), "failures": (0, True), "workers": (0, False)
        }  # fmt: skip
        self.paces: defaultdict[int, Pace] = defaultdict(Pace)
        self.is_paused = False
        self.state = Static("reading ...", id="state", markup=False)

    def compose(self) -> ComposeResult:
        """Lay out."""
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
        """Begin to look."""
        self.refresh_rows()
        self.table("queues").focus()

    @work(thread=True, exclusive=True, exit_on_error=False)
    def refresh_rows(self) -> None:
        """Read, in a thread, unless paused; a database that is away is told, and asked again. Again after a rest."""
        began_at = time.monotonic()
        show = self.looked() if not self.is_paused else None
        rest = self.rest_seconds(time.monotonic() - began_at)
        if show:
            self.call_from_thread(show)
        self.call_from_thread(self.set_timer, rest, self.refresh_rows)

    def looked(self) -> Callable[[], None]:
        """Read; return what shows what was read, or that nothing could be."""
        try:
            return partial(self.take, self.look())
        except Exception as error:
            return partial(self.state.update, styled(f"the database is away: {one_line(str(error))}", "bold red"))

    def rest_seconds(self, took_seconds: float) -> float:
        """Return how long to rest after a look: so it costs the database a hundredth of one connection's time."""
        if self.every_seconds is not None:
            return self.every_seconds
        return min(max(REST_FACTOR * took_seconds, LEAST_REST_SECONDS), MOST_REST_SECONDS)

    def take(self, rows: Look) -> None:
        """Show what was read."""
        now = time.monotonic()
        self.paces = defaultdict(Pace, {row["id"]: self.paces[row["id"]] for row in rows["running"]})
        for row in rows["running"]:
            self.paces[row["id"]].see(worked(row), now)
            row["seconds_left"] = self.paces[row["id"]].seconds_left(row["items_total"] or 0)
        self.rows = rows
        for name in TABLES:
            self.fill(name)
        self.state.update(styled(summary(rows) + ("  (stands still)" if self.is_paused else "")))

    def fill(self, name: str) -> None:
        """Write the rows of a table anew, sorted; the cursor stays where it was."""
        table = self.table(name)
        place = table.cursor_row
        table.clear()
        for row in self.sorted_rows(name):
            table.add_row(*(column.shown(row) for column in TABLES[name]))
        if table.row_count:
            table.move_cursor(row=min(place, table.row_count - 1), animate=False)

    def sorted_rows(self, name: str) -> list[Row]:
        """Return the rows of a table in the order asked for; unknown values come first."""
        number, is_reversed = self.sorting[name]
        value = TABLES[name][number].value

        def place(row: Row) -> tuple[bool, Any]:
            found = value(row)
            return (False, 0) if found is None else (True, found)

        return sorted(self.rows[name], key=place, reverse=is_reversed)

    def table(self, name: str) -> "DataTable[Any]":
        """Return the widget of a table."""
        return self.query_one(f"#{name}-table", DataTable)

    @property
    def shown_table(self) -> str:
        """The name of the table on the screen."""
        return self.query_one(TabbedContent).active

    def action_tab(self, name: str) -> None:
        """Show a table."""
        self.query_one(TabbedContent).active = name
        self.table(name).focus()

    def action_sort(self) -> None:
        """Sort by the next column."""
        name = self.shown_table
        number, is_reversed = self.sorting[name]
        self.sort(name, (number + 1) % len(TABLES[name]), is_reversed)

    def action_reverse(self) -> None:
        """Sort the other way round."""
        number, is_reversed = self.sorting[self.shown_table]
        self.sort(self.shown_table, number, not is_reversed)

    def sort(self, name: str, number: int, is_reversed: bool) -> None:
        """Sort a table by a column."""
        self.sorting[name] = (number, is_reversed)
        self.fill(name)
        self.notify(f"sorted by {TABLES[name][number].title}{', reversed' if is_reversed else ''}", timeout=1)

    def action_pause(self) -> None:
        """Stop reading, or go on."""
        self.is_paused = not self.is_paused
        self.state.update(styled(summary(self.rows) + ("  (stands still)" if self.is_paused else "")))

    def on_data_table_header_selected(self, event: DataTable.HeaderSelected) -> None:
        """Sort by a column that was clicked; clicked again, the other way round."""
        name = self.shown_table
        number, is_reversed = self.sorting[name]
        self.sort(name, event.column_index, not is_reversed if number == event.column_index else False)

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        """Show all about the batch of a row."""
        name = self.shown_table
        if name in ("running", "failures"):
            self.open(self.sorted_rows(name)[event.cursor_row]["id"])

    @work(thread=True, exit_on_error=False)
    def open(self, batch_id: int) -> None:
        """Read a batch, in a thread, and show it."""
        try:
            shown = self.show(batch_id)
        except Exception as error:
            shown = styled(one_line(str(error)))
        self.call_from_thread(self.push_screen, Details(shown or styled(f"batch {batch_id:d} is gone")))


def summary(rows: Look) -> str:
    """Return the line on top: how much of what."""
    total = {name: sum(row[name] for row in rows["queues"]) for name in ("ready", "processing", "stalled", "failed")}
    pace = sum(row["finished_per_second"] for row in rows["queues"])
    counts = "  ".join(f"{name} {number:,}" for name, number in total.items())
    told = f"{counts}  finished {pace:,.1f}/s  workers {len(rows['workers'])}"
    pauses = "; ".join(show_tables.paused(row) for row in rows["pauses"])
    return f"{told}  PAUSED: {pauses}" if pauses else told


def run(options: Namespace, look: Callable[[], Look], show: Callable[[int], Any]) -> int:
    """Show the screen until the user leaves it."""
    Top(look, show, options.every_seconds).run()
    return 0
