"""The first screen of ``batchq top``: a tab for each table, and a line on top about all of them."""

import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import TabbedContent, TabPane

from batchq.cli import listings, show_tables
from batchq.cli.columns import Column, Row
from batchq.cli.top.deeds import Deed, Rows, deeds_of
from batchq.cli.top.live_table import LiveTable, Order
from batchq.cli.top.source import ALWAYS, Source
from batchq.cli.top.views import BatchView, Opened, TableView
from batchq.common.terminal import styled


def _id(row: Row) -> Any:
    return row["id"]


def _queue_and_kind(row: Row) -> Any:
    return row["queue"], row["kind"]


class _Listing(NamedTuple):
    """A table. reads: what its rows are made of, besides what is always read."""

    columns: tuple[Column, ...]
    key: Callable[[Row], Any]
    order: Order
    reads: tuple[str, ...]


LISTINGS = {
    "queues": _Listing(listings.QUEUES_LIVE, _queue_and_kind, Order("Queue"), ("minutes",)),
    "running": _Listing(listings.RUNNING, _id, Order("ID", is_reversed=True), ("running",)),
    "failures": _Listing(
        listings.FAILURES, lambda row: (row["kind"], row["error"]), Order("Latest", is_reversed=True), ("groups",)
    ),
    "workers": _Listing(listings.WORKERS, _id, Order("Worker"), ()),
    "limits": _Listing(listings.LIMITS, _queue_and_kind, Order("Queue"), ("limits",)),
    "keys": _Listing(
        listings.KEYS, lambda row: (row["queue"], row["key"]), Order("Oldest wait", is_reversed=True), ("keys",)
    ),
    "flows": _Listing(listings.FLOWS, _id, Order("ID", is_reversed=True), ("flows",)),
    "schedules": _Listing(listings.SCHEDULES, lambda row: row["name"], Order("Schedule"), ("schedules",)),
}
_EACH_FAILURE = _Listing(listings.FAILED, _id, Order("Failed at", is_reversed=True), ("failures",))
_OPENS_BATCH = ("running", "flows")
_UNSEEN = ("late", "gone")


class MainView(TableView):
    """The screen."""

    BINDINGS: ClassVar[list[BindingType]] = [
        *(
            Binding(str(number), f"tab('{name}')", name.capitalize(), show=False)
            for number, name in enumerate(LISTINGS, 1)
        ),
        Binding("g", "group", "Group"),
        Binding("q", "app.quit", "Quit"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, list[Row]] = {}
        self._is_by_queue = False
        self._is_by_error = True

    def compose(self) -> ComposeResult:
        """Yield the widgets."""
        yield self.state
        with TabbedContent(initial="queues"):
            for number, (name, listing) in enumerate(LISTINGS.items(), 1):
                with TabPane(f"{number} {name.capitalize()}", id=name):
                    yield LiveTable(listing.columns, listing.key, listing.order, name)
        yield from self.compose_filter()

    def on_mount(self) -> None:
        """Begin in the first table."""
        self.table.focus()

    @property
    def active(self) -> str:
        """The name of the table on the screen."""
        return self.query_one(TabbedContent).active or "queues"

    @property
    def table(self) -> LiveTable:
        """The table on the screen."""
        return self.query_one(f"#{self.active}-table", LiveTable)

    def question(self) -> Callable[[Source], Any]:
        """Return what to ask the database: only what the table on the screen and the line on top need."""
        listing = self._listing()
        names = (*ALWAYS, *(name for name in listing.reads if name not in ALWAYS))
        return lambda source: source.tables(names)

    def _listing(self) -> _Listing:
        return _EACH_FAILURE if self.active == "failures" and not self._is_by_error else LISTINGS[self.active]

    def take(self, answer: Rows) -> None:
        """Show the rows. Tables that were not read keep theirs."""
        self.rows |= answer
        if "running" in answer:
            self.rows["running"] = self.with_time_left(answer["running"], time.monotonic())
        queues = listings.with_minutes(self.rows["queues"], self.rows.get("minutes", []))
        self.rows["queues"] = listings.with_pauses(queues, self.rows["pauses"])
        self._fill()
        self.say(summary(self.rows))

    def _fill(self) -> None:
        for name in LISTINGS:
            rows = self._rows_of(name)
            if rows is not None:
                self.query_one(f"#{name}-table", LiveTable).take(rows)
        self.show_filter()

    def _rows_of(self, name: str) -> list[Row] | None:
        """Return the rows of a table, grouped as chosen; None before they are read."""
        if name == "queues" and self._is_by_queue:
            return listings.by_queue(self.rows["queues"])
        if name == "failures":
            return self.rows.get("groups" if self._is_by_error else "failures")
        return self.rows.get(name)

    def deeds(self) -> list[Deed]:
        """Return what can be done to the chosen row."""
        return deeds_of(self.active, self.table.chosen, self.rows) if self.table.chosen else []

    def action_tab(self, name: str) -> None:
        """Show a table."""
        self.query_one(TabbedContent).active = name
        self.query_one(f"#{name}-table", LiveTable).focus()

    def on_tabbed_content_tab_activated(self) -> None:
        """Read the table that is shown now."""
        self.top.refresh_soon()
        self.show_filter()

    def action_group(self) -> None:
        """Group queues by queue, or failures by error, or not any more."""
        if self.active == "queues":
            self._is_by_queue = not self._is_by_queue
            self._fill()
        elif self.active == "failures":
            self._is_by_error = not self._is_by_error
            listing = self._listing()
            self.table.take([])
            self.table.list_columns(listing.columns, listing.key, listing.order)
            self.table.take(self._rows_of("failures") or [])
            self.top.refresh_soon()
        else:
            self.notify("queues and failures can be grouped: press 1 or 3 first", severity="warning")

    def on_data_table_row_selected(self) -> None:
        """Open the batch of the row, or the batches of its queue and kind."""
        row = self.table.chosen
        if row is None:
            return
        if self.active == "queues":
            self.app.push_screen(Opened(row["queue"], None if "kinds" in row else row["kind"]))
        elif self.active == "failures":
            self.app.push_screen(BatchView(row["example_id"] if self._is_by_error else row["id"]))
        elif self.active in _OPENS_BATCH:
            self.app.push_screen(BatchView(row["id"]))
        elif self.active == "schedules" and row["last_batch_id"]:
            self.app.push_screen(BatchView(row["last_batch_id"]))


def summary(rows: Rows) -> Text:
    """Return the line on top: counts, the rate, workers, and what is paused or throttled."""
    made = Text("  ").join(_counts(rows))
    notes: list[Text] = []
    for title, found in (
        ("PAUSED", "; ".join(map(show_tables.pause_line, rows["pauses"]))),
        ("THROTTLED", "; ".join(map(show_tables.throttle_line, rows["throttles"]))),
    ):
        if found:
            notes.append(styled(f"{title}: {found}", "bold yellow"))
    return Text("\n").join(filter(None, (made, _unseen(rows["workers"]), Text("  ").join(notes))))


def _counts(rows: Rows) -> Iterator[Text]:
    for name in ("ready", "processing", "stalled", "failed"):
        number = sum(row[name] for row in rows["queues"])
        yield styled(f"{name} {number:,}", "bold red" if name == "stalled" and number else "")
    yield styled(f"finished {sum(row['finished_per_second'] for row in rows['queues']):,.1f}/s")
    yield styled(f"workers {sum(row['state'] not in _UNSEEN for row in rows['workers'])}")


def _unseen(workers: list[Row]) -> Text:
    """Return how many workers write no heartbeat, and since when."""
    unseen = sorted((row for row in workers if row["state"] in _UNSEEN), key=lambda row: row["heartbeat_seconds"])
    if not unseen:
        return Text()
    count = "1 worker" if len(unseen) == 1 else f"{len(unseen):,} workers without a heartbeat, the latest"
    return Text.assemble((f"{count} ", "bold red"), show_tables.state_of(unseen[0]))
