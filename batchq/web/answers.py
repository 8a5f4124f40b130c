"""The answers that every web UI gives, of one database or of several: live parts, files, and pages about problems."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from batchq.common.hosts import group_of
from batchq.common.log import get_logger
from batchq.common.secrets import hide_password
from batchq.errors import BatchqError
from batchq.web.guard import guard_of
from batchq.web.live import Live
from batchq.web.reads import KnownAway
from batchq.web.rendering import Rendering
from batchq.web.view import view_of

_STATIC = {
    "style.css": "text/css",
    "live.js": "text/javascript",
    "bulk.js": "text/javascript",
    "batch.js": "text/javascript",
    "keys.js": "text/javascript",
    "list.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}

_log = get_logger()


class Answers:
    """Answers with what *pages* renders; *live* holds the parts that are watched."""

    def __init__(self, pages: Rendering, live: Live, read_seconds: float) -> None:
        self._pages = pages
        self._live = live
        self._read_seconds = read_seconds

    def routes(self) -> list[Route]:
        """Return the routes of the live parts and of the files."""
        return [
            Route("/live/{name:path}", self._live_part),
            Route("/static/{name}", _static),
            Route("/healthz", _healthz),
        ]

    def problems(self) -> dict[Any, Callable[[Request, Exception], Response]]:
        """Return the answers to exceptions."""
        too_slow = f"the database did not answer within {self._read_seconds:g} s"
        forbidden = "the web UI's database role may not read this; see docs/web.md"
        read_only = "the database is read-only, for example a standby; nothing was changed; act on the primary"
        return {
            HTTPException: self._http_problem,
            ClientDisconnect: _client_left,
            KnownAway: lambda request, error: self._pages.problem(request, 503, str(error)),
            psycopg.errors.ReadOnlySqlTransaction: lambda request, _: self._pages.problem(request, 503, read_only),
            psycopg.errors.QueryCanceled: lambda request, _: self._pages.problem(request, 504, too_slow),
            psycopg.errors.InsufficientPrivilege: lambda request, _: self._pages.problem(request, 403, forbidden),
            psycopg.Error: self._database_problem,
            BatchqError: self._database_problem,
        }

    async def _live_part(self, request: Request) -> Response:
        """Send the live part of a page whenever it changes."""
        address, view = request.path_params["name"], replace(view_of(request), user=None)
        name = ("read-only " if view.is_read_only else "") + f"{view.base}/{address}"  # no address begins so
        if name not in self._live.watched:
            await run_in_threadpool(self._pages.live_part, address, view)  # raises HTTPException: no such page
        guard = guard_of(request)
        client = group_of(guard.address_of(request)) if guard.application is None else view_of(request).user or ""
        if self._live.is_full(name, client):
            return PlainTextResponse("too many viewers\n", 503, {"Retry-After": "30"})
        events = self._live.stream(
            name, lambda: self._pages.live_part(address, view), lambda: guard.is_let_in(request), client
        )
        return StreamingResponse(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})

    def _http_problem(self, request: Request, error: Exception) -> Response:
        code, text = (error.status_code, error.detail) if isinstance(error, HTTPException) else (500, "")
        return self._pages.problem(request, code, str(text) or "something went wrong")

    def _database_problem(self, request: Request, error: Exception) -> Response:
        text = hide_password(" ".join(str(error).split()))
        _log.warning("page not shown: database error", path=request.scope["path"], error=text)
        return self._pages.problem(request, 503, "the database does not answer")


def _healthz(_: Request) -> Response:
    return PlainTextResponse("alive\n")


def _static(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in _STATIC:
        raise HTTPException(404, "no such file")
    path = Path(__file__).with_name("static") / name
    return FileResponse(path, media_type=_STATIC[name], headers={"Cache-Control": "no-cache"})


def _client_left(_: Request, __: Exception) -> Response:
    """Answer a client that hung up: without this, a stranger could fill the log with tracebacks."""
    return Response(status_code=400)
