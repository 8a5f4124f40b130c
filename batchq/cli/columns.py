"""Columns that fit a terminal: numbers stay, names are shortened with …, and less important columns leave first."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from batchq.common.terminal import styled

Row = dict[str, Any]
Cut = Literal["end", "middle"]
GAP = 1  # between two columns
_SHORTEST = 4
_STEPS = "▁▂▃▄▅▆▇█"


class Column(NamedTuple):
    """A column of a table.

    value: what to sort by. cell: what is shown, if not the value. short, brief: title and cell where width is scarce.

    leaves: 0: the column always stays; of others, the one with the highest number leaves first. least: the width to
    which its texts may be shortened; 0: they may not. drawn: makes the cell for a width; *widths*: those it may have.
    """

    title: str
    value: Callable[[Row], Any]
    cell: Callable[[Row], Any] | None = None
    short: str = ""
    leaves: int = 0
    least: int = 0
    cut: Cut = "end"
    is_number: bool = False
    drawn: Callable[[Row, int], Text] | None = None
    widths: tuple[int, ...] = ()
    brief: Callable[[Row], Any] | None = None

    def text(self, row: Row, is_brief: bool = False) -> Text:
        """Return the whole cell."""
        if self.drawn:
            return self.drawn(row, self.widths[-1])
        made = ((self.brief if is_brief else None) or self.cell or self.value)(row)
        if not isinstance(made, Text):
            made = styled(made)
        if self.is_number:
            made.justify = "right"
        return made

    def fitting(self, row: Row, width: int) -> Text:
        """Return the cell, shortened to a width."""
        if self.drawn:
            return self.drawn(row, width)
        for is_brief in (False, True):
            text = self.text(row, is_brief)
            if cell_len(text.plain) <= width:
                return text
        return Text(shortened(text.plain, width, self.cut), style=text.style, justify=text.justify)


class Fitted(NamedTuple):
    """A column with the title and the width that it has on the screen."""

    column: Column
    title: str
    width: int


class _Plan(NamedTuple):
    """A column with the widths that it may have. is_empty: no row has anything in it."""

    column: Column
    title: str
    least: int
    natural: int
    is_empty: bool


def shortened(text: str, width: int, cut: Cut = "end") -> str:
    """Return a text that takes at most *width* cells, with … for what was left out of its middle or end."""
    if cell_len(text) <= width:
        return text
    head = width - 1 if cut == "end" else width // 2
    tail = width - 1 - head
    return f"{_first_cells(text, head)}…{_first_cells(text[::-1], tail)[::-1]}"


def _first_cells(text: str, width: int) -> str:
    taken = ""
    for letter in text[: max(width, 0) + 1]:
        if cell_len(taken + letter) > width:
            break
        taken += letter
    return taken


def fit(columns: Sequence[Column], rows: Sequence[Row], width: int, marks: Sequence[str] = ()) -> list[Fitted]:
    """Return which columns are shown on *width* cells, and how wide each is.

    marks: a text behind the title of each column, such as an arrow.
    """
    marks = marks or [""] * len(columns)
    for is_short in (False, True):
        plans = [_plan(*each, rows, is_short) for each in zip(columns, marks, strict=True)]
        whole = [plan if plan.column.drawn else plan._replace(least=plan.natural) for plan in plans]
        if _total(plan.least for plan in whole) <= width:
            return _widened(whole, width)
    plans = [plan for plan in plans if not (plan.is_empty and plan.column.leaves)]
    while _total(plan.least for plan in plans) > width:
        leaving = [(plan.column.leaves, place) for place, plan in enumerate(plans) if plan.column.leaves]
        if not leaving:
            break
        del plans[max(leaving)[1]]
    return _widened(plans, width)


def _plan(column: Column, mark: str, rows: Sequence[Row], is_short: bool) -> _Plan:
    title = ((column.short if is_short else "") or column.title) + mark
    if column.drawn:
        texts = [column.widths[-1]] if rows else [0]
        least = max(cell_len(title), column.widths[0])
    else:
        texts = [cell_len(column.text(row, is_short).plain) for row in rows]
        least = max(cell_len(title), column.least)
    natural = max(cell_len(title), *texts, 1)
    is_rigid = not column.least and not column.drawn
    is_empty = not any(column.value(row) for row in rows)
    return _Plan(column, title, natural if is_rigid else min(least, natural), natural, is_empty)


def _total(widths: Iterable[int]) -> int:
    found = list(widths)
    return sum(found) + GAP * max(len(found) - 1, 0)


def _widened(plans: list[_Plan], width: int) -> list[Fitted]:
    """Give the width that is left to the shortened columns, the narrowest first; take from them if it is not enough."""
    widths = [plan.least for plan in plans]
    left = width - _total(widths)
    while left > 0:
        growing = [place for place, plan in enumerate(plans) if widths[place] < plan.natural]
        if not growing:
            break
        widths[min(growing, key=widths.__getitem__)] += 1
        left -= 1
    while left < 0:
        shrinking = [place for place, plan in enumerate(plans) if plan.column.least and widths[place] > _SHORTEST]
        if not shrinking:
            break
        widths[max(shrinking, key=widths.__getitem__)] -= 1
        left += 1
    return [
        Fitted(plan.column, plan.title, _allowed(plan.column, each)) for plan, each in zip(plans, widths, strict=True)
    ]


def _allowed(column: Column, width: int) -> int:
    """Return the widest drawing that has room in *width*."""
    return max((each for each in column.widths if each <= width), default=width)


def fitted_table(title: str, columns: Sequence[Column], rows: Sequence[Row], width: int) -> Table:
    """Return a table that is at most *width* wide, one line per row."""
    fitted = fit(columns, rows, width)
    made = Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, GAP, 0, 0)
    )
    for column, name, wide in fitted:
        made.add_column(
            name, justify="right" if column.is_number else "left", width=wide, no_wrap=True, overflow="ellipsis"
        )
    for row in rows:
        made.add_row(*(column.fitting(row, wide) for column, _, wide in fitted))
    return made


def whole_table(title: str, columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    """Return a table with all columns, and all of each cell."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column.title, justify="right" if column.is_number else "left", overflow="fold")
    for row in rows:
        made.add_row(*(column.text(row) for column in columns))
    return made


# ----------------------------------------------------------------------------------------------------------- drawings


def spark(counts: Sequence[int], width: int) -> str:
    """Return a line of *width* steps from counts per minute, whose number is a multiple of it; the highest is full."""
    size = len(counts) // width
    sums = [sum(counts[start : start + size]) for start in range(0, size * width, size)]
    top = max(*sums, 1)
    return "".join(_STEPS[0 if not each else max(1, round(each * (len(_STEPS) - 1) / top))] for each in sums)
