"""The server of the web UI: its routes, and how uvicorn runs it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

import psycopg
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from batchq.errors import ConfigError, DatabaseAway
from batchq.web.answers import Answers
from batchq.web.connections import protocol_of
from batchq.web.guard import Guard
from batchq.web.live import EVERY_SECONDS, STREAM_SECONDS, Live
from batchq.web.pages import Pages
from batchq.web.reads import READ_SECONDS, Reader
from batchq.web.routes import login_routes, routes_of
from batchq.web.settings import WebSettings
from batchq.web.who import Application

_MOST_HEAD_BYTES = 16_384
_GRACE_SECONDS = 3
_KEEP_ALIVE_SECONDS = 15
# An application's server may wait for open streams when it stops, and only a new request shows who has logged out.
_MOUNTED_STREAM_SECONDS = 15.0


class Served(Protocol):
    """What is served: the web UI of one database, or of several."""

    guard: Guard
    settings: WebSettings


class DatabasePages:
    """The pages of one database, as an ASGI application behind a `Guard`."""

    def __init__(self, reader: Reader, settings: WebSettings, live: Live, read_seconds: float) -> None:
        self.reader = reader
        pages = Pages(reader)
        self.answers = Answers(pages, live, read_seconds)
        self.pages = pages
        self.routes: list[Route] = [
            *routes_of(reader, pages, settings),
            *self.answers.routes(),
            Route("/readyz", self._readyz),
            Route("/metrics", self._metrics),
        ]

    def _readyz(self, _: Request) -> Response:
        try:
            self.reader.read("ping")
        except (psycopg.Error, DatabaseAway):
            return PlainTextResponse("the database does not answer\n", 503)
        return PlainTextResponse("ready\n")

    def _metrics(self, _: Request) -> Response:
        try:
            from batchq.common.exposition import CONTENT_TYPE, exposition
            from batchq.web.metrics import metrics_of
        except ModuleNotFoundError:
            return no_metrics()
        metrics = metrics_of(self.reader)
        return Response(exposition(lambda: metrics), media_type=CONTENT_TYPE)


class Web:
    """The web UI. `guard` is its ASGI application: every request passes it first."""

    def __init__(
        self,
        dsn: str,
        settings: WebSettings,
        read_seconds: float = READ_SECONDS,
        every_seconds: float = EVERY_SECONDS,
        application: Application | None = None,
    ) -> None:
        self.settings = settings
        self.reader = Reader(dsn, read_seconds)
        self.live = live_for(application, every_seconds)
        database = DatabasePages(self.reader, settings, self.live, read_seconds)
        routes = [*database.routes, *login_routes(database.pages)]
        starlette = Starlette(routes=routes, lifespan=self._lifespan, exception_handlers=database.answers.problems())
        self.guard = Guard(starlette, settings, application)
        check_root_path(settings, routes)

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        if self.guard.application is None:  # a mounted one connects at its first request
            await run_in_threadpool(self.reader.open)
        try:
            yield
        finally:
            await run_in_threadpool(self.reader.close)

    def allow(self) -> None:
        """Let the next request connect, also after `close`."""
        self.reader.allow()

    def close(self) -> None:
        """Close the connections."""
        self.reader.close()


def live_for(application: Application | None, every_seconds: float) -> Live:
    """Return what holds the live parts of a web UI, which may be mounted into an application."""
    return Live(every_seconds, _MOUNTED_STREAM_SECONDS if application else STREAM_SECONDS)


def check_root_path(settings: WebSettings, routes: list[Route] | list[BaseRoute]) -> None:
    """Raise ConfigError if a path could be that of a page as well as one with the prefix."""
    root_path = settings.root_path
    first = "/" + root_path[1:].partition("/")[0]
    paths = [getattr(route, "path", "") for route in routes]
    if root_path and any(path == first or path.startswith(f"{first}/") for path in paths):
        raise ConfigError(f"BATCHQ_WEB_ROOT_PATH is {root_path}, but {first} is a page; choose another prefix")


def no_metrics() -> Response:
    """Return the answer where the extra is not installed."""
    return PlainTextResponse("the extra is not installed; run pip install 'pgbatchq[metrics]'\n", 501)


def server_of(web: Served) -> uvicorn.Server:
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
