"""The parts of a batch that is spread, as people see them."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from batchq.postgres.statements.parts import part_row
from batchq.postgres.statements.running import Conn

_ENDED = ("completed", "failed", "cancelled")
_SHOWN = ("stalled", "processing", "retrying", "failed", "cancelled")  # those that have something to tell
_Row = dict[str, Any]


class Summary(NamedTuple):
    """How many parts there are, have ended and run now; *shown*: those that run or have a problem, and how many more
    there are of these."""

    total: int
    ended: int
    running: int
    statuses: list[tuple[str, int]]
    shown: list[_Row]
    more: int

    @property
    def text(self) -> str:
        """How many parts have which status."""
        return ", ".join(f"{count:,} {status}" for status, count in self.statuses)


def summary(rows: Sequence[_Row], most: int) -> Summary | None:
    """Return what to show of the parts of a batch, up to *most* of them; None without parts."""
    if not rows:
        return None
    counts = Counter(row["status"] for row in rows)
    of_interest = [row for row in rows if row["status"] in _SHOWN]
    of_interest.sort(key=lambda row: (_SHOWN.index(row["status"]), row["first_item"]))
    return Summary(
        total=len(rows),
        ended=sum(counts[status] for status in _ENDED),
        running=counts["processing"],
        statuses=counts.most_common(),
        shown=of_interest[:most],
        more=max(0, len(of_interest) - most),
    )


def range_text(row: _Row) -> str:
    """Return which items of the whole list a part has, from 0."""
    first, last = row["first_item"], row["last_item"]
    return f"item {first:,}" if first == last else f"items {first:,} to {last:,}"


def missing_text(conn: Conn, batch_id: int) -> str:
    """Return why batchq.status has no such batch."""
    if part := part_row(conn, batch_id):
        return f"batch {batch_id} is a part of batch {part['part_of']}: use {part['part_of']}"
    return f"there is no batch {batch_id}"
