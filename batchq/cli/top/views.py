"""The screens of ``batchq top`` that are read again and again: what they ask the database, and what they share."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import Footer, Input, Static

from batchq.cli import listings
from batchq.cli.columns import Row
from batchq.cli.rate import Rate
from batchq.cli.show_tables import processed
from batchq.cli.top import batch_text
from batchq.cli.top.deeds import Deed, deeds_of, queue_text
from batchq.cli.top.dialogs import Confirmation, Help, Menu
from batchq.cli.top.filters import HELP
from batchq.cli.top.live_table import LiveTable, Order
from batchq.cli.top.source import MOST_ROWS, Source
from batchq.common.terminal import one_line, styled


class Host(Protocol):
    """What a view needs of the app."""

    is_paused: bool
    is_read_only: bool
    database: str

    def refresh_soon(self) -> None:
        """Read now."""


class View(Screen[None]):
    """A screen whose content comes from the database; `Top` asks its question again and again."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("a", "act", "Actions"),
        Binding("p", "app.pause", "Pause", show=False),
        Binding("t", "app.turn_colors", "Light or dark", show=False),
        Binding("question_mark", "help", "Keys", key_display="?"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.state = Static("reading ...", id="state", markup=False)
        self._said: Text = Text("reading ...")

    def question(self) -> Callable[[Source], Any]:
        """Return what to ask the database."""
        raise NotImplementedError

    def take(self, answer: Any) -> None:
        """Show the answer."""
        raise NotImplementedError

    def deeds(self) -> list[Deed]:
        """Return what can be done to what is chosen."""
        raise NotImplementedError

    def say(self, text: Text) -> None:
        """Show the line on top; after it, what holds for the whole screen."""
        self._said = text
        top = self.top
        notes = "  (display paused: p resumes)" * top.is_paused + "  (read-only)" * top.is_read_only
        self.state.update(Text.assemble(self._database(), text, (notes, "bold")))

    def say_again(self) -> None:
        """Show the line on top again."""
        self.say(self._said)

    def report(self, error: Exception) -> None:
        """Show that the database is away; what was read last stays on the screen."""
        told = styled(f"the database is unavailable, retrying: {one_line(str(error))}", "bold red")
        self.state.update(Text.assemble(self._database(), told))

    def _database(self) -> Text:
        """Return the name of the database that is shown, if there are several."""
        name = self.top.database
        return styled(f"{name}: " if name else "", "bold")

    @property
    def top(self) -> Host:
        """The app."""
        return self.app  # type: ignore[return-value]

    def on_mount(self) -> None:
        """Start reading."""
        self.top.refresh_soon()

    def on_screen_resume(self) -> None:
        """Read immediately: what another screen has changed is to be seen."""
        self.top.refresh_soon()

    def action_help(self) -> None:
        """Show the keys."""
        self.app.push_screen(Help())

    def action_act(self) -> None:
        """Offer the actions on what is chosen."""
        if self.top.is_read_only:
            self.notify("no actions: batchq top was started with --read-only", severity="warning")
        elif deeds := self.deeds():
            self.app.push_screen(Menu(deeds), self._confirm)
        else:
            self.notify("nothing can be done to this row", severity="warning")

    def _confirm(self, deed: Deed | None) -> None:
        if deed:
            self.app.push_screen(Confirmation(deed))


class Filter(Input):
    """Where the filter is typed: it applies at once; Enter keeps it, Esc clears it."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "screen.clear_filter", "Clear filter")]


class TableView(View):
    """A view with tables, of which one is on the screen: filter, order, actions on the chosen row."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "filter", "Filter", key_display="/"),
        Binding("s", "sort", "Sort"),
        Binding("r", "reverse", "Reverse", show=False),
        Binding("escape", "clear_filter", "Clear filter", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.filter_text = ""
        self._rates: defaultdict[int, Rate] = defaultdict(Rate)

    @property
    def table(self) -> LiveTable:
        """The table on the screen."""
        return self.query_one(LiveTable)

    def compose_filter(self) -> ComposeResult:
        """Yield the line that shows the filter, and where it is typed."""
        yield Static("", id="filter-line", markup=False)
        yield Filter(placeholder=HELP, id="filter")
        yield Footer()

    def show_filter(self) -> None:
        """Show the filter, and how many rows match it."""
        table, line = self.table, self.query_one("#filter-line", Static)
        line.display = bool(self.filter_text)
        counts = f"{len(table.shown_rows):,} of {len(table.all_rows):,} rows"
        line.update(styled(f"filter: {self.filter_text}  {counts}; Esc clears it", "bold"))

    def with_time_left(self, rows: Sequence[Row], now: float) -> list[Row]:
        """Return running batches with the seconds that are left, by the rate of their items in the last minute."""
        self._rates = defaultdict(Rate, {row["id"]: self._rates[row["id"]] for row in rows})
        for row in rows:
            self._rates[row["id"]].add(processed(row), now)
        return [row | {"seconds_left": self._rates[row["id"]].seconds_left(row["items_total"] or 0)} for row in rows]

    def action_filter(self) -> None:
        """Let the filter be typed."""
        typed = self.query_one("#filter", Filter)
        typed.display = True
        typed.focus()

    def action_clear_filter(self) -> None:
        """Show all rows."""
        typed = self.query_one("#filter", Filter)
        typed.value = ""
        typed.display = False
        self._find("")
        self.table.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Show what matches so far."""
        self._find(event.value)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Keep the filter, and go back to the table."""
        event.input.display = False
        self.table.focus()

    def _find(self, text: str) -> None:
        self.filter_text = text.strip()
        for table in self.query(LiveTable):
            table.find(self.filter_text)
        self.show_filter()

    def action_sort(self) -> None:
        """Sort by the next column."""
        self.table.sort_by(self.table.next_order())

    def action_reverse(self) -> None:
        """Reverse the order."""
        order = self.table.order
        self.table.sort_by(Order(order.title, not order.is_reversed))

    def on_data_table_header_selected(self, event: LiveTable.HeaderSelected) -> None:
        """Sort by the clicked column; at a second click, in reverse."""
        title, order = self.table.shown_titles()[event.column_index], self.table.order
        self.table.sort_by(Order(title, title == order.title and not order.is_reversed))


class Opened(TableView):
    """The running and the failed batches of a queue, a kind, or a kind in a queue."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q", "back", "Back")]

    def __init__(self, queue: str | None, kind: str | None) -> None:
        super().__init__()
        self.queue, self.kind = queue, kind

    def compose(self) -> ComposeResult:
        """Yield the widgets."""
        yield self.state
        yield LiveTable(listings.OPENED, lambda row: row["id"], Order("ID", is_reversed=True), "opened")
        yield from self.compose_filter()

    def on_mount(self) -> None:
        """Begin in the table."""
        self.table.focus()

    def question(self) -> Callable[[Source], Any]:
        """Return what to ask the database."""
        return lambda source: source.opened(self.queue, self.kind)

    def take(self, answer: list[Row]) -> None:
        """Show the batches."""
        self.table.take(answer)
        self.show_filter()
        failed = sum(row["status"] == "failed" for row in answer)
        text = (
            f"{queue_text(self.queue, self.kind)}: {len(answer) - failed:,} running, {failed:,} failed in the last day"
        )
        self.say(styled(text + (" (the latest)" if failed == MOST_ROWS else ""), "bold"))

    def deeds(self) -> list[Deed]:
        """Return what can be done to the chosen batch."""
        return deeds_of("running", self.table.chosen, {}) if self.table.chosen else []

    def on_data_table_row_selected(self) -> None:
        """Open the chosen batch."""
        if self.table.chosen:
            self.app.push_screen(BatchView(self.table.chosen["id"]))

    def action_back(self) -> None:
        """Clear the filter, or go back."""
        self.action_clear_filter() if self.filter_text else self.dismiss()


class BatchView(View):
    """The page of a batch."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,enter", "back", "Back")]

    def __init__(self, batch_id: int) -> None:
        super().__init__()
        self.batch_id = batch_id
        self.found: Row | None = None
        self.shown: Any = ""

    def compose(self) -> ComposeResult:
        """Yield the widgets."""
        yield self.state
        with batch_text.Scroll(id="page"):
            yield Static("", id="text", markup=False)
        yield Footer()

    def on_mount(self) -> None:
        """Let the arrows scroll."""
        self.query_one("#page").focus()

    def question(self) -> Callable[[Source], Any]:
        """Return what to ask the database."""
        return lambda source: source.page(self.batch_id)

    def take(self, answer: Any) -> None:
        """Show the batch; if it is gone, leave what was read last."""
        if answer is None:
            self.found = None
            self.say(
                Text(f"batch {self.batch_id} is gone: it was deleted, or it is a part of another batch", "bold red")
            )
            return
        self.found = answer.batch
        self.say(batch_text.headline(answer.batch))
        self.shown = batch_text.page(answer, self.app.size.width - 3)
        self.query_one("#text", Static).update(self.shown)

    def deeds(self) -> list[Deed]:
        """Return what can be done to the batch."""
        return deeds_of("running", self.found, {}) if self.found else []

    def action_back(self) -> None:
        """Go back."""
        self.dismiss()
