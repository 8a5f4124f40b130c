"""The server of the web UI: its routes, its error pages, and how uvicorn runs it."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psycopg
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from batchq.common.hosts import group_of
from batchq.common.log import get_logger
from batchq.common.secrets import hide_password
from batchq.errors import BatchqError, DatabaseAway
from batchq.settings import Settings
from batchq.web.actions import Actions
from batchq.web.connections import protocol_of
from batchq.web.forms import Login
from batchq.web.guard import Guard, guard_of
from batchq.web.limits import Limits
from batchq.web.live import EVERY_SECONDS, Live
from batchq.web.pages import Pages
from batchq.web.reads import READ_SECONDS, Reader
from batchq.web.schedules import Schedules
from batchq.web.settings import WebSettings

_STATIC = {
    "style.css": "text/css",
    "live.js": "text/javascript",
    "bulk.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
_MOST_HEAD_BYTES = 16_384
_GRACE_SECONDS = 3
_KEEP_ALIVE_SECONDS = 15
_MOST_SCRAPED = 5000

_log = get_logger()


class Web:
    """The web UI. `guard` is its ASGI application: every request passes it first."""

    def __init__(
        self,
        dsn: str,
        settings: WebSettings,
        read_seconds: float = READ_SECONDS,
        every_seconds: float = EVERY_SECONDS,
    ) -> None:
        self.settings = settings
        self.reader = Reader(dsn, read_seconds)
        self.live = Live(every_seconds)
        self._pages = Pages(self.reader, settings.read_only)
        starlette = Starlette(
            routes=self._routes(), lifespan=self._lifespan, exception_handlers=self._problems(read_seconds)
        )
        self.guard = Guard(starlette, settings)

    def _routes(self) -> list[Route]:
        pages, login, actions = self._pages, Login(self._pages), Actions(self.reader, self._pages)
        limits, schedules = Limits(self.reader, pages), Schedules(self.reader, pages)
        return [
            Route("/", pages.overview),
            Route("/batches", pages.batches),
            Route("/batches/{id}", pages.batch),
            Route("/flow/{id}", pages.flow),
            Route("/workers", pages.workers),
            Route("/limits", pages.limits),
            Route("/limits/set", limits.ask, methods=["GET"]),
            Route("/limits/set", limits.do, methods=["POST"]),
            Route("/schedules", pages.schedules),
            Route("/schedules/set", schedules.ask, methods=["GET"]),
            Route("/schedules/set", schedules.set, methods=["POST"]),
            Route("/schedules/{action}", schedules.ask_action, methods=["GET"]),
            Route("/schedules/{action}", schedules.act, methods=["POST"]),
            Route("/audit", pages.audit),
            Route("/live/{name:path}", self._live),
            Route("/verbs/{verb}", actions.ask, methods=["GET"]),
            Route("/verbs/{verb}", actions.do, methods=["POST"]),
            Route("/bulk/{verb}", actions.ask_bulk, methods=["GET"]),
            Route("/bulk/{verb}", actions.do_bulk, methods=["POST"]),
            Route("/login", login.ask, methods=["GET"]),
            Route("/login", login.log_in, methods=["POST"]),
            Route("/logout", login.log_out, methods=["POST"]),
            Route("/static/{name}", _static),
            Route("/healthz", _healthz),
            Route("/readyz", self._readyz),
            Route("/metrics", self._metrics),
        ]

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        await run_in_threadpool(self.reader.open)
        try:
            yield
        finally:
            await run_in_threadpool(self.reader.close)

    async def _live(self, request: Request) -> Response:
        """Send the live part of a page whenever it changes."""
        name = request.path_params["name"]
        if name not in self.live.watched:
            await run_in_threadpool(self._pages.live_part, name)  # raises HTTPException if there is no such page
        guard = guard_of(request)
        client = group_of(guard.address_of(request))
        if self.live.is_full(name, client):
            return PlainTextResponse("too many viewers\n", 503, {"Retry-After": "30"})
        events = self.live.stream(name, lambda: self._pages.live_part(name), lambda: guard.is_let_in(request), client)
        return StreamingResponse(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})

    def _problems(self, read_seconds: float) -> dict[Any, Callable[[Request, Exception], Response]]:
        too_slow = f"the database did not answer within {read_seconds:g} s"
        forbidden = "the web UI's database role may not read this; see docs/web.md"
        return {
            HTTPException: self._http_problem,
            ClientDisconnect: _client_left,
            psycopg.errors.QueryCanceled: lambda request, _: self._pages.problem(request, 504, too_slow),
            psycopg.errors.InsufficientPrivilege: lambda request, _: self._pages.problem(request, 403, forbidden),
            psycopg.Error: self._database_problem,
            BatchqError: self._database_problem,
        }

    def _http_problem(self, request: Request, error: Exception) -> Response:
        code, text = (error.status_code, error.detail) if isinstance(error, HTTPException) else (500, "")
        return self._pages.problem(request, code, str(text) or "something went wrong")

    def _database_problem(self, request: Request, error: Exception) -> Response:
        text = hide_password(" ".join(str(error).split()))
        _log.warning("page not shown: database error", path=request.scope["path"], error=text)
        return self._pages.problem(request, 503, "the database does not answer")

    def _readyz(self, _: Request) -> Response:
        try:
            self.reader.read("ping")
        except (psycopg.Error, DatabaseAway):
            return PlainTextResponse("the database does not answer\n", 503)
        return PlainTextResponse("ready\n")

    def _metrics(self, _: Request) -> Response:
        try:
            from batchq.common.exposition import CONTENT_TYPE, exposition
            from batchq.web.metrics import queue_metrics
        except ModuleNotFoundError:
            return PlainTextResponse("the extra is not installed; run pip install 'batchq[metrics]'\n", 501)
        stuck = {(row["queue"], row["kind"]): row["batches"] for row in self.reader.read("waiting_for_failed")}
        queues = [
            row | {"waiting_for_failed": stuck.get((row["queue"], row["kind"]), 0)}
            for row in self.reader.read("queues", limit=_MOST_SCRAPED)
        ]
        workers = self.reader.read("workers", limit=_MOST_SCRAPED)
        limits = self.reader.read("limits", limit=_MOST_SCRAPED)
        schedules = self.reader.read("schedules", limit=_MOST_SCRAPED)
        live = sum(row["state"] != "gone" for row in workers)
        return Response(exposition(lambda: queue_metrics(queues, live, limits, schedules)), media_type=CONTENT_TYPE)


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


def serve(settings: Settings, web_settings: WebSettings) -> None:
    """Serve the web UI until SIGTERM or SIGINT."""
    server_of(Web(settings.require_dsn(), web_settings)).run()


def server_of(web: Web) -> uvicorn.Server:
    """Return a server of the web UI that is not running yet."""
    config = uvicorn.Config(
        web.guard,
        host=web.settings.host,
        port=web.settings.port,
        http=protocol_of(web.settings.proxies),
        ws="none",  # a WebSocket would escape the limits of that protocol
        proxy_headers=False,  # Guard reads them, from the named proxies only
        log_level="error",  # uvicorn warns about what strangers send, a line or two per request
        server_header=False,
        timeout_graceful_shutdown=_GRACE_SECONDS,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        h11_max_incomplete_event_size=_MOST_HEAD_BYTES,
    )
    return uvicorn.Server(config)
