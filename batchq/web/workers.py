"""The pages of workers: all of them, and what one of them runs now."""

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from batchq.web.pages import Pages
from batchq.web.reads import MOST_ROWS, Reader, Row
from batchq.web.view import live_address, names_in, without_nul

_MOST_BATCHES = 100  # that are shown of one worker


class Workers:
    """Answers requests for the pages of workers."""

    def __init__(self, reader: Reader, pages: Pages) -> None:
        self._reader = reader
        self._pages = pages
        pages.add_live_part("workers", lambda _: {"workers": self._workers()})
        pages.add_live_part("worker", lambda text: self._values(names_in(text, "id")["id"] or ""))

    def _workers(self) -> list[Row]:
        return self._reader.read("workers", limit=MOST_ROWS)

    def show_all(self, request: Request) -> Response:
        """Show the workers; or one, by its id."""
        if worker_id := without_nul(request.query_params.get("id", "")):
            values = self._values(worker_id)
            return self._pages.page(request, "worker.html", live=live_address("worker", id=worker_id), **values)
        return self._pages.page(request, "workers.html", live="workers", workers=self._workers())

    def _values(self, worker_id: str) -> dict[str, Any]:
        """Read what a worker is, and what it runs. Raises HTTPException 404."""
        found = [row for row in self._workers() if row["id"] == worker_id]
        if not found:
            raise HTTPException(404, f"no worker {worker_id} was seen in the last hour")
        batches = self._reader.read_by_index(
            "worker_batches", worker=worker_id, queues=found[0]["queues"], limit=_MOST_BATCHES
        )
        return {
            "w": found[0], "batches": batches, "claimed": batches[0]["claimed"] if batches else 0,
            "most_batches": _MOST_BATCHES, "minutes": self._reader.read("worker_minutes", worker=worker_id)[0],
        }  # fmt: skip
