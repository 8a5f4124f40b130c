"""The page of a batch in ``batchq top``: facts, a bar, attempts with errors, payload, failed items, what it needs."""

from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from textual.containers import VerticalScroll

from batchq.cli.bars import progress
from batchq.cli.columns import Row
from batchq.cli.show_tables import as_error, attempts, colored, items, short, table, to_the_second
from batchq.cli.top.source import MOST_CHARACTERS, Page
from batchq.common.terminal import block, line, styled
from batchq.operate.parts import range_text

_WIDE = 100  # from this width on, facts stand in two columns
_BAR_WIDTH = 60


class Scroll(VerticalScroll):
    """What holds the page; the arrows scroll it."""

    can_focus = True


def headline(batch: Row) -> Text:
    """Return the line on top."""
    return Text.assemble(
        styled(f"batch {batch['id']}  kind {batch['kind']}  queue {batch['queue']}  ", "bold"), colored(batch["status"])
    )


def page(found: Page, width: int) -> RenderableType:
    """Return the whole page, for *width* cells."""
    return Group(*_parts(found, width))


def _parts(found: Page, width: int) -> Iterator[RenderableType]:
    batch = found.batch
    if batch["items_total"]:
        share = 100 * ((batch["items_done"] or 0) + (batch["items_failed"] or 0)) // batch["items_total"]
        bar = progress(batch, min(_BAR_WIDTH, width - 20))
        yield Text.assemble(bar, f" {share} %")
        yield styled(f"{items(batch)} items")
    yield _facts(batch, width)
    if found.attempts:
        yield from _titled(f"Failed attempts (the latest first, {len(found.attempts)})")
    for each in map(as_error, found.attempts):
        yield styled(
            f"attempt {each.get('attempt')}  {to_the_second(each.get('at'))}  {each.get('error') or ''}", "red"
        )
        if each.get("traceback"):
            yield Text(block(each["traceback"]))
    for each in found.texts:
        yield from _titled(each["name"].capitalize())
        yield Text(block("{}" if each["text"] == "{\n}" else each["text"]))
        if each["characters"] > MOST_CHARACTERS:
            yield styled(f"    ... {each['characters']:,} characters; all: batchq show {batch['id']} --json")
    yield from _tables(found)


def _titled(title: str) -> Iterator[Text]:
    yield Text()
    yield Text(title, style="bold")


def _facts(batch: Row, width: int) -> Table:
    facts = [(name, value) for name, value in _known(batch) if value not in (None, "")]
    count = 2 if width >= _WIDE else 1
    made = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(count):
        made.add_column(style="bold", no_wrap=True)
        made.add_column(overflow="fold")
    size = (len(facts) + count - 1) // count
    for place in range(size):
        row: list[Text] = []
        for name, value in facts[place::size]:
            row += [Text(name), value if isinstance(value, Text) else styled(value)]
        made.add_row(*row)
    return made


def _known(batch: Row) -> Iterator[tuple[str, Any]]:
    """Yield the facts, the important ones first."""
    yield "Status", colored(batch["status"])
    yield "Attempt", attempts(batch)
    yield "Waits for", batch["needs_left"] or None
    yield "Worker", batch["claimed_by"]
    yield "Run time", short(batch["running_time"])
    yield "Next run", to_the_second(batch["next_run_at"])
    yield "Lease expires", to_the_second(batch["lease_expires_at"])
    yield "Created", to_the_second(batch["created_at"])
    yield "Claimed", to_the_second(batch["claimed_at"])
    yield "Finished", to_the_second(batch["finished_at"])
    yield "Priority", batch["priority"]
    yield "Key", batch["key"]
    yield "Unique key", batch["unique_key"]


def _tables(found: Page) -> Iterator[RenderableType]:
    if found.failed_items:
        cells = [[row["item_index"], line(row["item"]), row["attempt"], row["error"]] for row in found.failed_items]
        yield Text()
        yield table("Failed items", ("Index", "Item", "Attempt", "Error"), cells)
    if found.needs:
        rows = [[row["id"], row["queue"], row["kind"], row["status"], row["on_failure"]] for row in found.needs]
        yield Text()
        yield table("Waits or waited for", ("ID", "Queue", "Kind", "Status", "If it fails"), rows)
    if found.spread:
        shown = [
            [row["id"], range_text(row), colored(row["status"]), items(row), row["claimed_by"]]
            for row in found.spread.shown
        ]
        yield Text()
        yield styled(f"Parts: {found.spread.total:,}: {found.spread.text}", "bold")
        if shown:
            yield table("", ("ID", "Range", "Status", "Items", "Worker"), shown)
