"""The page of the batches that are worked in parts now."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from batchq.web.pages import Pages
from batchq.web.reads import Reader, Row

MOST = 50


class Spread:
    """Answers requests for the page of batches that are spread."""

    def __init__(self, reader: Reader, pages: Pages) -> None:
        self._reader = reader
        self._pages = pages
        pages.add_live_part("spread", lambda _: self._values())

    def show_all(self, request: Request) -> Response:
        """Show the batches that are worked in parts, the newest first."""
        return self._pages.page(request, "spread.html", live="spread", **self._values())

    def _values(self) -> dict[str, Any]:
        rows = self._reader.read_by_index("spread", limit=MOST + 1)
        return {"batches": [row | _pace(row) for row in rows[:MOST]], "is_cut": len(rows) > MOST, "most": MOST}


def _pace(row: Row) -> dict[str, float | None]:
    """Return the items per second since the parts were made, and how long the rest takes at that rate. Nothing is
    returned of later attempts: their rate would count what earlier ones did."""
    seconds, done = row["running_seconds"], row["items_of_parts"]
    if row["attempt"] > 1 or not done or not seconds or seconds <= 0:
        return {"items_per_second": None, "left_seconds": None}
    left = row["items_total"] - row["items_done"] - row["items_failed"]
    return {"items_per_second": done / seconds, "left_seconds": left * seconds / done}
