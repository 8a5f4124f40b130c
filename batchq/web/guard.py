"""Who may use the web UI, and from where: every request passes `Guard` before a page is made.

A password or token is compared before anything is throttled: the right one always works, whatever others try from the
same address.
"""

import math
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from batchq.common.hosts import Network, Seldom, is_address, is_own_host, is_within, without_port
from batchq.common.log import get_logger
from batchq.web.sessions import Sessions, cookie, is_equal, session_in
from batchq.web.settings import WebSettings
from batchq.web.throttle import Throttle

_SAFE_METHODS = {"GET", "HEAD"}
_OPEN_PATHS = {"/login", "/static/style.css", "/static/icon.svg"}
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

    Each request's scope then holds its `session` and the `guard`.
    """

    def __init__(self, inner: ASGIApp, settings: WebSettings) -> None:
        self._inner = inner
        self.settings = settings
        self.sessions = Sessions()
        self.throttle = Throttle()
        self._host_reported = Seldom()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "lifespan":
            await self._inner(scope, receive, send)
        elif scope["type"] == "http":  # a WebSocket would bypass the checks
            await self._answer(Request(scope, receive), send)

    async def _answer(self, request: Request, send: Send) -> None:
        scope, session = request.scope, session_in(request)
        is_new = not self.sessions.is_genuine(session)
        scope["session"] = self.sessions.new() if is_new else session
        scope["guard"] = self

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                if is_new and "set-cookie" not in headers and not _is_from_elsewhere(request):
                    headers.append("Set-Cookie", cookie(scope["session"], request))
            await send(message)

        await (self._refusal(request) or self._inner)(scope, request.receive, send_with_headers)

    def _refusal(self, request: Request) -> Response | None:
        """Return the answer to a request that may not pass; None for one that may."""
        host = request.headers.get("host")  # None: an old health check, never a browser
        if host is not None and not is_own_host(host, self.settings.hosts):
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
        if _is_from_elsewhere(request):
            return HTMLResponse(_RELOAD)
        # The path by which Starlette chooses the route. That of request.url depends on the Host header as well.
        if request.scope["path"] in _OPEN_PATHS or self.is_let_in(request):
            return None
        return self._login_required(request)

    def _login_required(self, request: Request) -> Response:
        """Return the answer to somebody who is not let in. Counts a wrong token."""
        if _bearer(request) and (wait := self.throttle.failed(self.address_of(request))):
            return PlainTextResponse("too many wrong tokens\n", 429, {"Retry-After": str(math.ceil(wait))})
        if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
            return RedirectResponse("/login", 303)
        return PlainTextResponse("log in first\n", 401)

    def is_let_in(self, request: Request) -> bool:
        """Return whether a request has a session with the password, or the token, or needs neither."""
        if not self.settings.secrets or self.sessions.is_known(request.scope["session"]):
            return True
        given = _bearer(request)
        return bool(given) and self.is_secret(given)

    def is_secret(self, given: str) -> bool:
        """Return whether a text is the password or the token."""
        return sum(is_equal(given, secret) for secret in self.settings.secrets) > 0  # compares with all of them

    def address_of(self, request: Request) -> str:
        """Return the client's address."""
        address = request.client.host if request.client else ""
        return client_of(address, request.headers.getlist("x-forwarded-for"), self.settings.proxies)


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
