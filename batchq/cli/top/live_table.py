"""A table that is read again and again: it fits its width, and keeps the chosen row, the scroll and the order."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.coordinate import Coordinate
from textual.widgets import DataTable

from batchq.cli.columns import GAP, Column, Fitted, Row, fit
from batchq.cli.top.filters import matches, words_of


class Order(NamedTuple):
    """By which column rows are sorted."""

    title: str
    is_reversed: bool = False


class LiveTable(DataTable[Any]):
    """The table. key: what tells one row from another, so that the chosen one is found again."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "select_cursor", "Open", show=True)]

    def __init__(self, columns: Sequence[Column], key: Callable[[Row], Any], order: Order, name: str) -> None:
        super().__init__(
            cursor_type="row", cursor_foreground_priority="renderable", zebra_stripes=True, cell_padding=0,
            id=f"{name}-table",
        )  # fmt: skip
        self.listed, self.key_of, self.order = columns, key, order
        self.filter_text = ""
        self.all_rows: Sequence[Row] = []
        self.shown_rows: list[Row] = []
        self._heads: list[tuple[str, int]] = []
        self._cells: list[list[Text]] = []

    @property
    def chosen(self) -> Row | None:
        """The row under the cursor."""
        return self.shown_rows[self.cursor_row] if 0 <= self.cursor_row < len(self.shown_rows) else None

    def take(self, rows: Sequence[Row]) -> None:
        """Show other rows."""
        self.all_rows = rows
        self.fill()

    def list_columns(self, columns: Sequence[Column], key: Callable[[Row], Any], order: Order) -> None:
        """Show other columns, from the next rows on."""
        self.listed, self.key_of, self.order = columns, key, order

    def find(self, text: str) -> None:
        """Show only the rows that match a filter."""
        self.filter_text = text
        self.fill()

    def sort_by(self, order: Order) -> None:
        """Show the rows in another order."""
        self.order = order
        self.fill()

    def next_order(self) -> Order:
        """Return the order by the column after the one that rows are sorted by, of those on the screen."""
        titles = self.shown_titles()
        place = titles.index(self.order.title) if self.order.title in titles else -1
        return Order(titles[(place + 1) % len(titles)], self.order.is_reversed) if titles else self.order

    def shown_titles(self) -> list[str]:
        """Return the whole titles of the columns on the screen."""
        return [each.column.title for each in self._fitted()]

    def fill(self) -> None:
        """Write the rows: only the cells that differ, or all if the rows or the columns are others than before."""
        before = [self.key_of(row) for row in self.shown_rows]
        chosen = self.chosen
        self.shown_rows = self._sorted(self._matching())
        fitted = self._fitted()
        heads = [(each.title, each.width + (GAP if place else 0)) for place, each in enumerate(fitted)]
        cells = [[_spaced(each, row, place) for place, each in enumerate(fitted)] for row in self.shown_rows]
        keys = [self.key_of(row) for row in self.shown_rows]
        if keys == before and heads == self._heads:
            self._write_changes(cells)
        else:
            self._write_all(fitted, heads, cells)
            self._choose(keys.index(self.key_of(chosen)) if chosen and self.key_of(chosen) in keys else None)
        self._cells = cells

    def _fitted(self) -> list[Fitted]:
        marks = ["" if column.title != self.order.title else "↓" if self.order.is_reversed else "↑"
                 for column in self.listed]  # fmt: skip
        return fit(self.listed, self.shown_rows, self.app.size.width - 1, marks)  # a cell for the scroll bar

    def _matching(self) -> list[Row]:
        words = words_of(self.filter_text)
        if not words:
            return list(self.all_rows)
        return [
            row
            for row in self.all_rows
            if matches(words, row, " ".join(c.text(row).plain for c in self.listed if not c.drawn))
        ]

    def _sorted(self, rows: list[Row]) -> list[Row]:
        """Return the rows in the chosen order; unknown values sort as the smallest."""
        value = next((column.value for column in self.listed if column.title == self.order.title), None)
        if value is None:
            return rows

        def key(row: Row) -> tuple[bool, Any]:
            found = value(row)
            return (False, 0) if found is None else (True, found)

        return sorted(rows, key=key, reverse=self.order.is_reversed)

    def _write_changes(self, cells: list[list[Text]]) -> None:
        for place, (old, new) in enumerate(zip(self._cells, cells, strict=True)):
            for number, (one, other) in enumerate(zip(old, new, strict=True)):
                if (one.plain, one.style) != (other.plain, other.style) or one.spans != other.spans:
                    self.update_cell_at(Coordinate(place, number), other)

    def _write_all(self, fitted: list[Fitted], heads: list[tuple[str, int]], cells: list[list[Text]]) -> None:
        top = self.scroll_y
        is_other = heads != self._heads
        self.clear(columns=is_other)
        if is_other:
            self._heads = heads
            for place, ((title, width), each) in enumerate(zip(heads, fitted, strict=True)):
                number = each.column.is_number
                text = title if number or not place else " " * GAP + title
                self.add_column(Text(text, justify="right" if number else "left", no_wrap=True), width=width)
        for row in cells:
            self.add_row(*row)
        self.call_after_refresh(self._scroll_back, top)

    def _choose(self, place: int | None) -> None:
        """Put the cursor on its row again; if that is gone, leave it where it was."""
        if self.row_count:
            found = self._last_place if place is None else place
            self.move_cursor(row=min(found, self.row_count - 1), animate=False, scroll=False)

    _last_place = 0

    def watch_cursor_coordinate(self, old_coordinate: Coordinate, new_coordinate: Coordinate) -> None:
        """Remember the place of the cursor; clearing the table puts it on the first row."""
        super().watch_cursor_coordinate(old_coordinate, new_coordinate)
        if self.row_count:
            self._last_place = new_coordinate.row

    def _scroll_back(self, top: float) -> None:
        self.scroll_to(y=top, animate=False, force=True)
        self.call_after_refresh(self.move_cursor, row=self.cursor_row, animate=False)

    def on_resize(self) -> None:
        """Fit the columns again."""
        self.fill()


def _spaced(fitted: Fitted, row: Row, place: int) -> Text:
    """Return a cell with the gap before it, if it is not the first one of its row."""
    text = fitted.column.fitting(row, fitted.width)
    if place and not fitted.column.is_number:
        text = Text.assemble(" " * GAP, text)
    text.no_wrap = True
    return text
