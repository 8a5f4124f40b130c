"""The web UI of several databases: a page of all, and below /db/NAME the whole web UI of each; one log-in for all."""

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import psycopg
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from batchq.errors import DatabaseAway
from batchq.operate.watch import ANSWER_SECONDS, LIVE_SECONDS, State, Watch, in_parallel
from batchq.postgres.databases import Database
from batchq.postgres.statements.totals import totals
from batchq.web.answers import Answers
from batchq.web.guard import Guard
from batchq.web.live import EVERY_SECONDS
from batchq.web.reads import READ_SECONDS, KnownAway, Reader
from batchq.web.rendering import Rendering
from batchq.web.routes import login_routes
from batchq.web.server import DatabasePages, check_root_path, live_for, no_metrics
from batchq.web.settings import WebSettings
from batchq.web.view import redirect
from batchq.web.who import Application

Row = dict[str, Any]


class WatchedReader(Reader):
    """Reads one of several databases. While that one is away, it raises KnownAway at once: no page waits for it."""

    def __init__(self, database: Database, watch: Watch, seconds: float) -> None:
        super().__init__(database.dsn, seconds)
        self._name = database.name
        self._watch = watch

    def ask(self, question: Any) -> Any:
        """Return what *question* returns, from a read-only transaction."""
        with self._noticing():
            return super().ask(question)

    def act(self, action: Any) -> Any:
        """Return what *action* returns. Commits."""
        with self._noticing():
            return super().act(action)

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        if away := self._watch.away(self._name):
            raise KnownAway(f"the database {self._name} is {away.text}")
        try:
            yield
        except (psycopg.OperationalError, DatabaseAway):
            self._watch.begin(self._name)  # it may be away: the next page shall not wait for it
            raise


class SeveralWeb:
    """The web UI of several databases. `guard` is its ASGI application: every request passes it first."""

    def __init__(
        self,
        databases: Sequence[Database],
        settings: WebSettings,
        read_seconds: float = READ_SECONDS,
        every_seconds: float = EVERY_SECONDS,
        application: Application | None = None,
    ) -> None:
        self.settings = settings
        self.watch = Watch(databases, totals, min(read_seconds, ANSWER_SECONDS))
        self.live = live_for(application, every_seconds)
        self._pages = Rendering()
        self._pages.add_live_part("databases", lambda _: self._values())
        answers = Answers(self._pages, self.live, read_seconds)
        self.databases = {
            each.name: DatabasePages(WatchedReader(each, self.watch, read_seconds), settings, self.live, read_seconds)
            for each in databases
        }
        self._apps: dict[str, ASGIApp] = {
            name: Starlette(routes=[*pages.routes], exception_handlers=pages.answers.problems())
            for name, pages in self.databases.items()
        }
        routes = self._routes(answers)
        starlette = Starlette(routes=routes, lifespan=self._lifespan, exception_handlers=answers.problems())
        self.guard = Guard(self._named(starlette), settings, application)
        check_root_path(settings, [*routes, *(route for one in self.databases.values() for route in one.routes)])

    def _routes(self, answers: Answers) -> list[BaseRoute]:
        return [
            Route("/", self._show_all),
            Route("/db/{name}", self._to_database),
            Mount("/db/{name}", self._database),
            *answers.routes(),
            *login_routes(self._pages),
            Route("/readyz", self._readyz),
            Route("/metrics", self._metrics),
        ]

    def _named(self, inner: ASGIApp) -> ASGIApp:
        """Return an application that adds the names of the databases to each request."""

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            await inner({**scope, "databases": list(self.databases)}, receive, send)

        return answer

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        if self.guard.application is None:  # a mounted one connects at its first request
            self.allow()
            await run_in_threadpool(self.watch.read)  # the first page waits for no database that is away
        try:
            yield
        finally:
            await run_in_threadpool(self.close)

    def allow(self) -> None:
        """Let the next request connect, also after `close`."""
        self.watch.allow()
        for pages in self.databases.values():
            pages.reader.allow()

    def close(self) -> None:
        """Close the connections."""
        self.watch.close()
        for pages in self.databases.values():
            pages.reader.close()

    async def _database(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request to a page of one database: its web UI is mounted at /db/NAME."""
        name = scope["path_params"]["name"]
        if name not in self._apps:
            raise HTTPException(404, "no such database")
        home = scope["root_path"].removesuffix(f"/db/{name}")
        await self._apps[name]({**scope, "database": name, "home": home}, receive, send)

    def _to_database(self, request: Request) -> Response:
        return redirect(request, f"/db/{request.path_params['name']}/")

    def _show_all(self, request: Request) -> Response:
        """Show all databases."""
        return self._pages.page(request, "databases.html", live="databases", **self._values())

    def _values(self) -> dict[str, Any]:
        return {"rows": [_row(state) for state in self.watch.read(LIVE_SECONDS)]}

    def _readyz(self, _: Request) -> Response:
        """Answer that the web UI is ready if any database answers."""
        states = self.watch.read()
        away = ", ".join(state.name for state in states if state.away)
        if all(state.away for state in states):
            return PlainTextResponse("no database answers\n", 503)
        return PlainTextResponse(f"ready; away: {away}\n" if away else "ready\n")

    def _metrics(self, _: Request) -> Response:
        try:
            from batchq.common.exposition import CONTENT_TYPE, exposition
            from batchq.web.metrics import metrics_of, metrics_of_several
        except ModuleNotFoundError:
            return no_metrics()
        self.watch.read()  # those that are away are known then, and none of the reads waits for them
        reads = {name: lambda reader=pages.reader: metrics_of(reader) for name, pages in self.databases.items()}
        found = in_parallel(reads)
        return Response(exposition(lambda: metrics_of_several(found)), media_type=CONTENT_TYPE)


def _row(state: State) -> Row:
    """Return what the page of all databases shows of one."""
    if state.away is None:
        return {"name": state.name, "away": None, **state.answer}
    return {"name": state.name, "away": state.away}
