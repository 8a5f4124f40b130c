"""The web application: its routes, and how it is served."""

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import parse_qsl

import psycopg
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from batchq.common.hosts import group_of
from batchq.common.log import get_logger
from batchq.common.secrets import hide_password
from batchq.errors import BatchqError, DatabaseAway
from batchq.operate.verbs import VERBS, Verb
from batchq.settings import Settings
from batchq.web import bulk, shown, verbs
from batchq.web.auth import Guard, cookie, same
from batchq.web.connections import protocol_of
from batchq.web.live import EVERY_SECONDS, Live
from batchq.web.pages import Pages
from batchq.web.reads import READ_SECONDS, Reader
from batchq.web.settings import WebSettings

STATIC = {
    "style.css": "text/css",
    "live.js": "text/javascript",
    "bulk.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
MOST_FORM_BYTES = 65_536
MOST_HEAD_BYTES = 16_384
GRACE_SECONDS = 3
KEEP_ALIVE_SECONDS = 15
MOST_SCRAPED = 5000

log = get_logger()


class Web:
    """The application: `app` is its ASGI entrance."""

    def __init__(
        self,
        dsn: str,
        settings: WebSettings,
        read_seconds: float = READ_SECONDS,
        every_seconds: float = EVERY_SECONDS,
    ) -> None:
        self.settings = settings
        self.reader = Reader(dsn, read_seconds)
        self.pages = Pages(self.reader, settings.read_only)
        self.live = Live(every_seconds)
        starlette = Starlette(
            routes=self.routes(),
            lifespan=self.lifespan,
            exception_handlers={
                HTTPException: self.show_problem,
                ClientDisconnect: gone,
                psycopg.errors.QueryCanceled: self.show_slow,
                psycopg.errors.InsufficientPrivilege: self.show_forbidden,
                psycopg.Error: self.show_away,
                BatchqError: self.show_away,
            },
        )
        self.app = Guard(starlette, settings)

    def routes(self) -> list[Route]:
        """Return what answers where."""
        pages = self.pages
        return [
            Route("/", pages.overview),
            Route("/batches", pages.batches),
            Route("/batches/{id}", pages.batch),
            Route("/workers", pages.workers),
            Route("/schedules", pages.schedules),
            Route("/audit", pages.audit),
            Route("/live/{name:path}", self.stream),
            Route("/verbs/{verb}", self.ask_verb, methods=["GET"]),
            Route("/verbs/{verb}", self.do_verb, methods=["POST"]),
            Route("/bulk/{verb}", self.ask_bulk, methods=["GET"]),
            Route("/bulk/{verb}", self.do_bulk, methods=["POST"]),
            Route("/login", self.ask_login, methods=["GET"]),
            Route("/login", self.log_in, methods=["POST"]),
            Route("/logout", self.log_out, methods=["POST"]),
            Route("/static/{name}", static),
            Route("/healthz", healthz),
            Route("/readyz", self.readyz),
            Route("/metrics", self.metrics),
        ]

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Hold the connections open while the application runs."""
        await run_in_threadpool(self.reader.open)
        try:
            yield
        finally:
            await run_in_threadpool(self.reader.close)

    # -------------------------------------------------------------------------------------------------------- live

    async def stream(self, request: Request) -> Response:
        """Send a page's live part, again whenever it changes."""
        name = request.path_params["name"]
        if name not in self.live.watched:
            await run_in_threadpool(self.pages.live_part, name)  # raises where there is no such page
        guard: Guard = request.scope["guard"]
        client = group_of(guard.address_of(request))
        if self.live.is_full(name, client):
            return PlainTextResponse("too many watch\n", 503, {"Retry-After": "30"})
        events = self.live.stream(name, lambda: self.pages.live_part(name), lambda: guard.is_let_in(request), client)
        return StreamingResponse(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})

    # ------------------------------------------------------------------------------------------------------- verbs

    def ask_verb(self, request: Request) -> Response:
        """Ask whether a verb is meant."""
        return self.pages.page(request, "verb.html", verb=self.verb_of(request), given=dict(request.query_params))

    async def do_verb(self, request: Request) -> Response:
        """Do a verb; show the page of its target."""
        verb = self.verb_of(request)
        form = await read_form(request)
        try:
            await run_in_threadpool(verbs.do, self.reader, verb, form)
        except verbs.Refused as error:
            return await run_in_threadpool(
                self.pages.page, request, "verb.html", 409, verb=verb, given=form, problem=str(error)
            )
        target = {"batch": f"/batches/{form.get('id')}", "worker": "/workers"}.get(verb.target, "/")
        return RedirectResponse(f"{target}?{shown.query(said=verb.name)}", 303)

    def ask_bulk(self, request: Request) -> Response:
        """Ask for the filter of a verb in bulk."""
        return self.show_bulk_form(request, self.verb_of(request, in_bulk=True), dict(request.query_params))

    async def do_bulk(self, request: Request) -> Response:
        """Take the next step of a verb in bulk; show how far it is, with the form for the step after."""
        verb = self.verb_of(request, in_bulk=True)
        form = await read_form(request)
        try:
            job = self.opened(request, form) if "job" in form else bulk.asked(verb, form)
        except verbs.Refused as error:
            return await run_in_threadpool(self.show_bulk_form, request, verb, form, str(error))
        code, problem = 200, None
        try:
            await run_in_threadpool(bulk.take_step, self.reader, job)
        except verbs.Refused as error:
            code, problem = 503 if isinstance(error, bulk.TryAgain) else 409, str(error)
        return await run_in_threadpool(self.show_bulk, request, job, code, problem)

    def show_bulk_form(self, request: Request, verb: Verb, given: dict[str, str], problem: str = "") -> Response:
        """Show the form that asks for a filter."""
        return self.pages.page(
            request, "bulk.html", 409 if problem else 200, verb=verb, given=given, problem=problem,
            status=bulk.shown_status(given),
        )  # fmt: skip

    def show_bulk(self, request: Request, job: bulk.Job, code: int, problem: str | None) -> Response:
        """Show how far it is, and the form that continues, which carries all of it."""
        text = job.as_text()
        seal = request.scope["guard"].sessions.seal(request.scope["session"], text)
        return self.pages.page(
            request, "bulk_job.html", code, job=job, bulk=job.bulk, job_text=text, seal=seal, problem=problem
        )

    def opened(self, request: Request, form: dict[str, str]) -> bulk.Job:
        """Return the job of a form that was sent to this session. Raises HTTPException."""
        text = form["job"]
        if not same(form.get("seal", ""), request.scope["guard"].sessions.seal(request.scope["session"], text)):
            raise HTTPException(403, "this form was changed, or belongs to another session; start again from the list")
        return bulk.Job.of_text(text)

    def verb_of(self, request: Request, in_bulk: bool = False) -> Verb:
        """Return the verb of an address. Raises HTTPException where there is none, or none is allowed."""
        if self.settings.read_only:
            raise HTTPException(403, "this web UI is read-only: it was started with --read-only")
        verb = VERBS.get(request.path_params["verb"])
        if verb is None:
            raise HTTPException(404, "there is no such verb")
        if in_bulk and not verb.statuses:
            raise HTTPException(404, "this verb cannot be done in bulk")
        return verb

    # ------------------------------------------------------------------------------------------------------- login

    def ask_login(self, request: Request) -> Response:
        """Ask for the password."""
        if not self.settings.secrets:
            return RedirectResponse("/", 303)
        return self.pages.page(request, "login.html")

    async def log_in(self, request: Request) -> Response:
        """Let in whoever has the password or the token; slow down whoever guesses."""
        guard: Guard = request.scope["guard"]
        form = await read_form(request)
        if guard.is_secret(form.get("password", "")):
            guard.sessions.end(request.scope["session"])
            answer: Response = RedirectResponse("/", 303)
            answer.headers["Set-Cookie"] = cookie(guard.sessions.new(is_known=True), request)
            return answer
        if wait := guard.attempts.failed(guard.address_of(request)):
            problem = f"too many attempts: wait {math.ceil(wait)} s"
            answer = self.pages.page(request, "login.html", 429, problem=problem)
            answer.headers["Retry-After"] = str(math.ceil(wait))
            return answer
        return self.pages.page(request, "login.html", 401, problem="that is not it")

    async def log_out(self, request: Request) -> Response:
        """End the session."""
        await read_form(request)
        guard: Guard = request.scope["guard"]
        guard.sessions.end(request.scope["session"])
        answer = RedirectResponse("/login", 303)
        answer.headers["Set-Cookie"] = cookie(guard.sessions.new(is_known=False), request)
        return answer

    # ---------------------------------------------------------------------------------------------------- problems

    def show_problem(self, request: Request, error: Exception) -> Response:
        """Say what is wrong with an address."""
        code, text = (error.status_code, error.detail) if isinstance(error, HTTPException) else (500, "")
        return self.pages.page(request, "problem.html", code, title=str(text) or "something went wrong")

    def show_slow(self, request: Request, _: Exception) -> Response:
        """Say that a read took too long."""
        title = f"this took the database over {self.reader.connections.transaction_seconds:g} s, and was given up"
        return self.pages.page(request, "problem.html", 504, title=title)

    def show_forbidden(self, request: Request, _: Exception) -> Response:
        """Say that the database role may not read this."""
        title = "the database role of this page may not read this: see docs/web.md"
        return self.pages.page(request, "problem.html", 403, title=title)

    def show_away(self, request: Request, error: Exception) -> Response:
        """Say that the database does not answer."""
        log.warning(
            "a page could not be read", path=request.scope["path"], error=hide_password(" ".join(str(error).split()))
        )
        return self.pages.page(request, "problem.html", 503, title="the database does not answer")

    # ------------------------------------------------------------------------------------------------------ health

    def readyz(self, _: Request) -> Response:
        """Tell whether the database answers."""
        try:
            self.reader.read("ping")
        except (psycopg.Error, DatabaseAway):
            return PlainTextResponse("the database does not answer\n", 503)
        return PlainTextResponse("ready\n")

    def metrics(self, _: Request) -> Response:
        """Show what stands in batchq.queues to Prometheus."""
        try:
            from batchq.common.exposition import CONTENT_TYPE, exposition
            from batchq.web.metrics import queue_metrics
        except ModuleNotFoundError:
            return PlainTextResponse("this needs an extra: pip install 'batchq[metrics]'\n", 501)
        queues = self.reader.read("queues", limit=MOST_SCRAPED)
        live = [row for row in self.reader.read("workers", limit=MOST_SCRAPED) if not row["is_silent"]]
        return Response(exposition(lambda: queue_metrics(queues, len(live))), media_type=CONTENT_TYPE)


def healthz(_: Request) -> Response:
    """Tell that the process lives."""
    return PlainTextResponse("alive\n")


def static(request: Request) -> Response:
    """Serve one of the page's own files."""
    from importlib.resources import files

    name = request.path_params["name"]
    if name not in STATIC:
        raise HTTPException(404, "there is no such file")
    path = files("batchq.web").joinpath("static", name)
    return FileResponse(str(path), media_type=STATIC[name], headers={"Cache-Control": "no-cache"})


def gone(_: Request, __: Exception) -> Response:
    """Answer somebody who has gone: without this, a stranger could fill the log with tracebacks."""
    return Response(status_code=400)


async def read_form(request: Request) -> dict[str, str]:
    """Return the fields of a form, which carries the token of its session. Raises HTTPException."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MOST_FORM_BYTES:
            raise HTTPException(413, "the form is too large")
    try:
        form = dict(parse_qsl(body.decode(), max_num_fields=50, errors="strict"))
    except ValueError:
        raise HTTPException(400, "the form cannot be read") from None
    if any("\0" in text for text in form.values()):
        raise HTTPException(400, "the form has a NUL character")
    guard: Guard = request.scope["guard"]
    if not same(form.pop("form_token", ""), guard.sessions.form_token(request.scope["session"])):
        raise HTTPException(403, "this form is not of your session: go back, load the page again, and try again")
    return form


def serve(settings: Settings, web_settings: WebSettings) -> None:
    """Serve the page until SIGTERM or SIGINT."""
    server_of(Web(settings.require_dsn(), web_settings)).run()


def server_of(web: Web) -> uvicorn.Server:
    """Return what serves the page."""
    config = uvicorn.Config(
        web.app,
        host=web.settings.host,
        port=web.settings.port,
        http=protocol_of(web.settings.proxies),
        ws="none",  # a WebSocket would leave the bounds of that protocol
        proxy_headers=False,  # Guard reads them, from the proxies that are named
        log_level="error",  # its warnings are about what strangers send, a line or two for each request
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        h11_max_incomplete_event_size=MOST_HEAD_BYTES,
    )
    return uvicorn.Server(config)
