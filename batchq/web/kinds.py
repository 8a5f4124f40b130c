"""The page of one kind in one queue: its counts, rate, limits, workers, failures and schedules."""

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from batchq.web.pages import Pages
from batchq.web.reads import MOST_ROWS, Reader, Row
from batchq.web.view import live_address, names_in, without_nul

_MOST_FAILURES = 10
_MOST_WORKERS = 20
_MOST_SCHEDULES = 20
_NOTHING: Row = {
    "ready": 0, "scheduled": 0, "waiting": 0, "processing": 0, "stalled": 0, "failed": 0, "workers": 0, "estimated": [],
    "held_back": 0, "held_back_by": None, "oldest_wait_seconds": None, "finished_per_second": 0.0,
}  # fmt: skip


class Kinds:
    """Answers requests for the page of a kind in a queue."""

    def __init__(self, reader: Reader, pages: Pages) -> None:
        self._reader = reader
        self._pages = pages
        pages.add_live_part("kind", lambda text: self._values(**names_in(text, "queue", "kind")))

    def show(self, request: Request) -> Response:
        """Show one kind in one queue."""
        names = {name: without_nul(request.query_params.get(name, "")) or None for name in ("queue", "kind")}
        return self._pages.page(request, "kind.html", live=live_address("kind", **names), **self._values(**names))

    def _values(self, queue: str | None, kind: str | None) -> dict[str, Any]:
        """Read all of a kind. Raises HTTPException 404 without a queue or kind; one that has no batches has a page."""
        if not queue or not kind:
            raise HTTPException(404, "give the queue and the kind: /kinds?queue=default&kind=send_mail")
        names = {"queue": queue, "kind": kind}
        read = self._reader.read
        workers = [w for w in read("workers", limit=MOST_ROWS) if queue in w["queues"] and kind in w["kinds"]]
        return names | {
            "k": (read("kind", **names) or [names | _NOTHING])[0],
            "hour": read("kind_hour", **names)[0],
            "pauses": read("kind_pauses", **names),
            "limits": read("kind_limits", **names),
            "throttles": read("kind_throttles", **names),
            "workers": workers[:_MOST_WORKERS],
            "more_workers": max(0, len(workers) - _MOST_WORKERS),
            "failures": read("kind_failures", **names, limit=_MOST_FAILURES),
            "schedules": read("kind_schedules", **names, limit=_MOST_SCHEDULES),
        }
