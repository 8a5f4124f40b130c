"""The pages of failures: the latest ones in groups by what their errors have in common, and one group."""

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse

from batchq.web.charts import trend
from batchq.web.pages import Pages
from batchq.web.reads import MOST_ROWS, Reader, Row

_MOST_GROUP_CHARACTERS = 300  # as batchq.error_group returns
_MOST_KIND_CHARACTERS = 1000
_MOST_SHOWN = 100


class Failures:
    """Answers requests for failures."""

    def __init__(self, reader: Reader, pages: Pages) -> None:
        self._reader = reader
        self._pages = pages
        pages.add_live_part("failures", lambda _: self._values())

    def groups(self, request: Request) -> HTMLResponse:
        """Show the groups of the latest failures, the latest first."""
        return self._pages.page(request, "failures.html", live="failures", **self._values())

    def group(self, request: Request) -> HTMLResponse:
        """Show one group, and the latest batches that are in it."""
        kind = request.query_params.get("kind", "")[:_MOST_KIND_CHARACTERS]
        error = request.query_params.get("error", "")[:_MOST_GROUP_CHARACTERS]
        if "\0" in kind + error:
            raise HTTPException(400, "a filter contains a NUL character")
        found = self._read(kind, error)
        group = found[0] if found else None
        batches = self._reader.read("failures_of_group", kind=kind, error_group=error, limit=_MOST_SHOWN)
        return self._pages.page(
            request, "failures_group.html", kind=kind, error=error, group=group, batches=batches, most=_MOST_SHOWN,
        )  # fmt: skip

    def _values(self) -> dict[str, Any]:
        return {"groups": self._read(None, None)}

    def _read(self, kind: str | None, error: str | None) -> list[Row]:
        rows = self._reader.read("failure_groups", kind=kind, error_group=error, limit=MOST_ROWS)
        return [row | {"trend": trend(row["times"], row["read_from"], row["read_to"])} for row in rows]
