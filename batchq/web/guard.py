"""Who may use the web UI, and from where: every request passes `Guard` before a page is made.

A password or token is compared before anything is throttled: the right one always works, whatever others try from the
same address.
"""

import math
from typing import Literal
from urllib.parse import quote, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from batchq.common.hosts import Network, Seldom, is_address, is_own_host, is_within, without_port
from batchq.common.log import get_logger
from batchq.web.sessions import Sessions, cookie, has_session, is_equal, session_in
from batchq.web.settings import WebSettings
from batchq.web.throttle import Throttle
from batchq.web.view import place_of, redirect, view_of, why_read_only
from batchq.web.who import Application, Person, name_from_proxy

_SAFE_METHODS = {"GET", "HEAD"}
_OPEN_PATHS = {"/static/style.css", "/static/icon.svg"}
_LOGIN = "/login"
_NOBODY = Person(is_read_only=True)
# A browser that follows a link from another site leaves out the cookie (SameSite=Strict); a reload from here sends it.
_RELOAD = '<!doctype html><meta http-equiv="refresh" content="0"><title>batchq</title>'
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with no-referrer, browsers would send "Origin: null" with forms
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}

_log = get_logger()


class Guard:
    """Wraps the whole application: refuses what may not come in, and adds headers to every answer.

    Each request's scope then holds its `session`, its `person` and the `guard`; its path begins with its root_path.

    application: the one that the web UI is mounted in. Then that one's log-in holds, and the web UI has none.
    """

    def __init__(self, inner: ASGIApp, settings: WebSettings, application: Application | None = None) -> None:
        self._inner = inner
        self.settings = settings
        self.application = application
        self.sessions = Sessions(application.secret if application else "")
        self.throttle = Throttle()
        self._checks_host = application is None or application.checks_host
        self._host_reported = Seldom()

    @property
    def has_login(self) -> bool:
        """Whether the web UI has a log-in form of its own."""
        return self.application is None and bool(self.settings.secrets)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "lifespan":
            await self._inner(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(Request(scope, receive), send)
        elif scope["type"] == "websocket":  # would bypass the checks
            await send({"type": "websocket.close", "code": 1000})

    async def _answer(self, asked: Request, send: Send) -> None:
        """Answer a request. The application's functions see *asked*, which is as the application has made it."""
        try:
            base, address = place_of(asked.scope, self.settings.root_path)
        except ValueError as error:
            await PlainTextResponse(f"{error}\n", 404)(asked.scope, asked.receive, send)
            return
        session = session_in(asked, base, self.sessions)
        scope: Scope = {
            **asked.scope, "root_path": base, "path": base + address, "guard": self, "person": _NOBODY,
            "session": session or self.sessions.new(),
        }  # fmt: skip
        request = Request(scope, asked.receive)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                if not session and not has_session(headers) and not _is_from_elsewhere(request):
                    headers.append("Set-Cookie", cookie(scope["session"], request))
            await send(message)

        refusal = self._refusal(request) or await self._refused_person(asked, request, address)
        await (refusal or self._inner)(scope, request.receive, send_with_headers)

    def _refusal(self, request: Request) -> Response | None:
        """Return the answer to a request that may not pass, whoever sends it; None for one that may."""
        host = request.headers.get("host")  # None: an old health check, never a browser
        if self._checks_host and host is not None and not is_own_host(host, self.settings.hosts):
            if self._host_reported():
                _log.warning("request refused: unknown host name; list it in BATCHQ_WEB_HOSTS", host=host[:200])
            return PlainTextResponse("unknown host name; list it in BATCHQ_WEB_HOSTS\n", 421)
        if "transfer-encoding" in request.headers and "content-length" in request.headers:
            # A proxy that reads the other of the two would see this request end elsewhere, and another next one.
            return PlainTextResponse("two lengths\n", 400, {"Connection": "close"})
        if request.method not in _SAFE_METHODS:
            if request.method != "POST":
                return PlainTextResponse("method not allowed\n", 405)
            if not _is_own_origin(request.headers):
                return PlainTextResponse("this form comes from another site\n", 403)
        return HTMLResponse(_RELOAD) if _is_from_elsewhere(request) else None

    async def _refused_person(self, asked: Request, request: Request, address: str) -> Response | None:
        """Return the answer to somebody who may not see this address, or may look only and wants to act."""
        # By the address by which Starlette chooses the route. That of request.url depends on the Host header as well.
        if address in _OPEN_PATHS or (address == _LOGIN and self.application is None):
            return None
        try:
            person = await self.application.person_of(asked) if self.application else self._person_of(request)
        except HTTPException as error:  # by which an application's function says why it refuses
            return PlainTextResponse(f"{error.detail}\n", error.status_code, error.headers)
        if person is None:
            return self._login_required(request)
        request.scope["person"] = person
        if request.method == "POST" and address != "/logout" and view_of(request).is_read_only:
            text = why_read_only(request)
            return PlainTextResponse(f"{text[:1].upper()}{text[1:]}\n", 403)
        return None

    def _login_required(self, request: Request) -> Response:
        """Return the answer to somebody who is not let in. Counts a wrong token."""
        is_page = request.method == "GET" and "text/html" in request.headers.get("accept", "")
        if self.application:
            if is_page and self.application.login_url:
                return RedirectResponse(_with_next(self.application.login_url, request), 303)
            return PlainTextResponse("log in to the application first\n", 403)
        if _bearer(request) and (wait := self.throttle.failed(self.address_of(request))):
            return PlainTextResponse("too many wrong tokens\n", 429, {"Retry-After": str(math.ceil(wait))})
        if self.settings.user_header and self._name_of(request) is None:
            return PlainTextResponse(f"no trusted proxy says who you are, in {self.settings.user_header}\n", 401)
        return redirect(request, _LOGIN) if is_page else PlainTextResponse("log in first\n", 401)

    def _person_of(self, request: Request) -> Person | None:
        """Return who sends a request to `batchq web`; None for nobody."""
        settings, session = self.settings, request.scope["session"]
        if (given := _bearer(request)) and (access := self.access_of(given)):
            return Person("token" if settings.user_header else None, access == "read-only")
        name = self._name_of(request)
        if settings.user_header and name is None:
            return None
        if self.sessions.is_known(session):
            return Person(name, self.sessions.known[session])
        if settings.has_password or (settings.secrets and not settings.user_header):
            return None
        return Person(name)

    def _name_of(self, request: Request) -> str | None:
        """Return the name that a trusted proxy gives."""
        header = self.settings.user_header
        return name_from_proxy(request, header, self.settings.proxies) if header else None

    def is_let_in(self, request: Request) -> bool:
        """Return whether a person who was let in still is, with the same rights. An application is not asked again:
        a live page asks anew every few seconds."""
        return self.application is not None or self._person_of(request) == request.scope["person"]

    def access_of(self, given: str) -> Literal["full", "read-only"] | None:
        """Return what a password or token lets one do; None for a wrong one."""
        texts = self.settings.secrets
        found: list[Literal["full", "read-only"]] = [
            access for text, access in texts.items() if is_equal(given, text)
        ]  # compares with all of them
        return found[0] if found else None

    def address_of(self, request: Request) -> str:
        """Return the client's address."""
        address = request.client.host if request.client else ""
        return client_of(address, request.headers.getlist("x-forwarded-for"), self.settings.proxies)

    def form_token(self, request: Request) -> str:
        """Return what a form must carry: no other session, and no other person, can send it."""
        return self.sessions.form_token(request.scope["session"], request.scope["person"].name)

    def seal(self, request: Request, text: str) -> str:
        """Return the proof that a form of this session and person carries a text unchanged."""
        return self.sessions.seal(request.scope["session"], text, request.scope["person"].name)


def guard_of(request: Request) -> Guard:
    """Return the request's guard."""
    guard: Guard = request.scope["guard"]
    return guard


def _is_own_origin(headers: Headers) -> bool:
    try:
        return bool(headers.get("host")) and urlsplit(headers.get("origin", "")).netloc == headers["host"]
    except ValueError:
        return False


def _is_from_elsewhere(request: Request) -> bool:
    """Return whether a browser followed a link from another site, and therefore left out its cookie."""
    return request.headers.get("sec-fetch-site") == "cross-site" and request.headers.get("sec-fetch-mode") == "navigate"


def _bearer(request: Request) -> str:
    """Return the token of a request, "" for none."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    return given.strip() if scheme.lower() == "bearer" else ""


def client_of(address: str, forwarded: list[str], proxies: tuple[Network, ...]) -> str:
    """Return a client's address: that of the connection or, where a trusted proxy connects, the last one in
    X-Forwarded-For that is not a trusted proxy itself. The client may have invented the ones before that."""
    for given in reversed(",".join(forwarded).split(",")):
        client = without_port(given)
        if not is_within(address, proxies) or not is_address(client):
            break
        address = client
    return address


def _with_next(login_url: str, request: Request) -> str:
    """Return the address of the application's log-in, which then leads back to the page that was asked for."""
    path = "/" + quote(request.scope["path"].lstrip("/"))  # "//evil.example" would lead to another site
    query = request.scope.get("query_string", b"").decode("latin-1")
    address = f"{path}?{query}" if query else path
    return f"{login_url}{'&' if '?' in login_url else '?'}{urlencode({'next': address})}"
