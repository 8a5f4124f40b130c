"""The pages of the web UI: what each one reads. `Rendering` shows it by a template."""

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from batchq.operate import flow_graph
from batchq.postgres.statements.parts import part_row
from batchq.postgres.statements.views import HIGHEST_ID
from batchq.web import charts
from batchq.web.flows import flow_values
from batchq.web.reads import MOST_ROWS, PAGE_ROWS, Reader, Row
from batchq.web.rendering import Rendering
from batchq.web.view import redirect

_MOST_FAILURES = 12


class Pages(Rendering):
    """Makes pages. Its methods block; Starlette calls them in threads."""

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self._reader = reader
        self.add_live_part("overview", lambda _: self._overview_values())
        self.add_live_part("flow", lambda text: self._flow_values(batch_id_in(text)))

    def _overview_values(self) -> dict[str, Any]:
        queues = self._reader.read("queues", limit=MOST_ROWS)
        minutes = self._reader.read("minutes")
        return {
            "queues": queues,
            "bars": charts.bars(minutes),
            "sparks": charts.sparks(minutes),
            "failures": self._reader.read("failures", limit=_MOST_FAILURES),
            "workers": self._workers(),
            "pauses": self._reader.read("pauses"),
            "totals": _totals(queues),
        }

    def _workers(self) -> list[Row]:
        return self._reader.read("workers", limit=MOST_ROWS)

    def _flow_values(self, batch_id: int) -> dict[str, Any]:
        """Read the flow that a batch is part of. Raises HTTPException 404."""
        graph = self._reader.ask(lambda conn: flow_graph.read(conn, batch_id))
        if graph is None:
            raise HTTPException(404, f"no batch {batch_id}")
        return flow_values(graph, batch_id)

    def overview(self, request: Request) -> HTMLResponse:
        """Show queues, rates, failures and workers."""
        return self.page(request, "overview.html", live="overview", **self._overview_values())

    def part(self, batch_id: int) -> Row | None:
        """Return a part of a batch that is spread; None if the id is not that of a part."""
        return self._reader.ask(lambda conn: part_row(conn, batch_id))  # type: ignore[no-any-return]

    def flow(self, request: Request) -> Response:
        """Show the flow that a batch is part of: who waits for whom."""
        batch_id = batch_id_in(request.path_params["id"])
        try:
            values = self._flow_values(batch_id)
        except HTTPException:
            if part := self.part(batch_id):
                return redirect(request, f"/flow/{part['part_of']}")
            raise
        return self.page(request, "flow.html", live=f"flow/{batch_id}", **values)

    def audit(self, request: Request) -> HTMLResponse:
        """List the recorded actions, the newest first."""
        before = request.query_params.get("before", "")
        before_id = int(before) if before.isdecimal() and len(before) < 19 else None
        rows = self._reader.read("audit", before=before_id, limit=PAGE_ROWS + 1)
        older = rows[PAGE_ROWS - 1]["id"] if len(rows) > PAGE_ROWS else None
        return self.page(request, "audit.html", entries=rows[:PAGE_ROWS], older=older, is_first=before_id is None)


def batch_id_in(text: str) -> int:
    """Return the id in an address. Raises HTTPException 404."""
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else 0
    if not 0 < number <= HIGHEST_ID:
        raise HTTPException(404, "no such batch")
    return number


def _totals(queues: list[Row]) -> dict[str, Any]:
    """Return the sums over all queues and kinds, and the longest wait."""
    names = ("ready", "scheduled", "waiting", "processing", "stalled", "failed")
    waits = [row["oldest_wait_seconds"] for row in queues if row["oldest_wait_seconds"] is not None]
    return {name: sum(row[name] for row in queues) for name in (*names, "finished_per_second")} | {
        "estimated": [name for name in names if any(name in row["estimated"] for row in queues)],
        "oldest_wait_seconds": max(waits, default=None),
    }
