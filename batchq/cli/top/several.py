"""``batchq top`` over several databases: a table of all, from which Enter leads to the screen of one."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType

from batchq.cli import listings
from batchq.cli.columns import Row
from batchq.cli.overview import away_lines, database_row
from batchq.cli.top.deeds import Deed
from batchq.cli.top.live_table import LiveTable, Order
from batchq.cli.top.main_view import MainView
from batchq.cli.top.source import Source
from batchq.cli.top.views import TableView
from batchq.common.numbers import counted
from batchq.common.terminal import styled
from batchq.operate.watch import State, Watch

_MOST_AWAY_LINES = 2  # below the line on top


class Several(NamedTuple):
    """Several databases. watch: reads the sums of all; sources: reads and acts on each, by its name."""

    watch: Watch
    sources: dict[str, Source]


class DatabasesView(TableView):
    """The first screen: a row for each database."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("q", "app.quit", "Quit")]

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def compose(self) -> ComposeResult:
        """Yield the widgets."""
        yield self.state
        yield LiveTable(listings.DATABASES, lambda row: row["database"], Order("Database"), "databases")
        yield from self.compose_filter()

    def on_mount(self) -> None:
        """Begin in the table."""
        self.table.focus()

    def question(self) -> Callable[[Source], Any]:
        """Return what to ask: all databases, whatever was opened last."""
        return lambda _: self._watch.read()

    def take(self, answer: list[State]) -> None:
        """Show the databases."""
        rows = [database_row(state) for state in answer]
        self.table.take(rows)
        self.show_filter()
        self.say(summary(rows))

    def deeds(self) -> list[Deed]:
        """Return what can be done to a database: nothing."""
        return []

    def on_data_table_row_selected(self) -> None:
        """Open the chosen database."""
        if self.table.chosen:
            self.app.open_database(self.table.chosen["database"])  # type: ignore[attr-defined]


class DatabaseView(MainView):
    """The screen of one of several databases. *leave*: called when it is left."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("q", "back", "Databases")]

    def __init__(self, leave: Callable[[], None]) -> None:
        super().__init__()
        self._leave = leave

    def action_back(self) -> None:
        """Go back to all databases."""
        self._leave()
        self.dismiss()


def summary(rows: list[Row]) -> Text:
    """Return the line on top: how many databases are up, and below it which are away, how long and why."""
    away = away_lines(rows)
    head = Text.assemble(
        f"{counted(len(rows) - len(away), 'database')} up  ", (f"away {len(away)}", "bold red" if away else "")
    )
    more = [styled(f"and {len(away) - _MOST_AWAY_LINES} more", "bold red")] if len(away) > _MOST_AWAY_LINES else []
    shown = away[: _MOST_AWAY_LINES - len(more)] if more else away
    return Text("\n").join([head, *shown, *more])
