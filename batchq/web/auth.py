"""Who may see the page, and from where: everything that comes in passes `Guard`, before any page is made.

A session is a cookie signed with a key that lives as long as the process: random text, a time (monotonic), and their
HMAC. The sessions of those who have logged in are also kept here, so that logging out ends one. A form carries a token
made from its session, so that no other site can forge one.

The password and the token are compared before anything is throttled: whoever has the right one is let in, whatever
others guess from the same address. Only wrong ones are throttled.
"""

import hashlib
import hmac
import math
import re
import secrets
import time
from collections import OrderedDict
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from batchq.common.hosts import Network, Seldom, group_of, is_address, is_own_host, is_within, without_port
from batchq.common.log import get_logger
from batchq.web.settings import WebSettings

COOKIE = "batchq_session"
SESSION_SECONDS = 12 * 3600
FREE_FAILURES = 3
LONGEST_WAIT_SECONDS = 60.0
FORGOTTEN_SECONDS = 600.0
MOST_ADDRESSES = 10_000
FREE_FAILURES_OF_ALL = 30
SECONDS_PER_FAILURE_OF_ALL = 1.0
MOST_SESSIONS = 10_000
SAFE_METHODS = {"GET", "HEAD"}
OPEN_PATHS = {"/login", "/static/style.css", "/static/icon.svg"}
# Who follows a link from another site comes without the cookie (SameSite=Strict), and with it at the second try.
COME_AGAIN = '<!doctype html><meta http-equiv="refresh" content="0"><title>batchq</title>'
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # no-referrer would have browsers send "Origin: null" with forms
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}


log = get_logger()


class Sessions:
    """Makes and checks session cookies and the tokens of forms. `known`: who gave the password, the oldest first."""

    def __init__(self) -> None:
        self.key = secrets.token_bytes(32)
        self.known: dict[str, None] = {}

    def sign(self, text: str) -> str:
        """Return the HMAC of a text."""
        return hmac.new(self.key, text.encode(), hashlib.sha256).hexdigest()

    def new(self, is_known: bool) -> str:
        """Return a session for somebody who *is_known*, that is, who gave the password."""
        body = f"{secrets.token_urlsafe(16)}.{int(time.monotonic())}.{int(is_known)}"
        session = f"{body}.{self.sign(body)}"
        if is_known:
            self.known[session] = None
            if len(self.known) > MOST_SESSIONS:
                self.end(next(iter(self.known)))
        return session

    def end(self, session: str) -> None:
        """Let a session be nobody's from now on, whoever has copied its cookie."""
        self.known.pop(session, None)

    def is_genuine(self, session: str) -> bool:
        """Tell whether a session is one of ours and not too old."""
        body, _, signature = session.rpartition(".")
        if not re.fullmatch(r"[\w-]+\.\d+\.[01]", body, re.ASCII) or not same(signature, self.sign(body)):
            return False
        return time.monotonic() - int(body.split(".")[1]) < SESSION_SECONDS

    def is_known(self, session: str) -> bool:
        """Return whether a session is of somebody who gave the password and has not logged out."""
        return self.is_genuine(session) and session in self.known

    def form_token(self, session: str) -> str:
        """Return what a form of this session has to carry."""
        return self.sign(f"form {session}")

    def seal(self, session: str, text: str) -> str:
        """Return what proves that a text in a form of this session is as it was sent."""
        return self.sign(f"seal {session} {text}")


class Attempts:
    """Counts wrong passwords and tokens, and throttles them.

    An address has three, then one after 1 s, 2 s, and so on up to a minute. All addresses together have 30, then one a
    second, because an attacker may have many addresses.
    """

    def __init__(self) -> None:
        self.failures: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self.paid_until = 0.0  # of all addresses: each wrong one moves it by a second
        self.reported = Seldom()

    def failed(self, address: str) -> float:
        """Count a wrong password; return 0, or how long to wait if it is one too many, which is not counted."""
        now, client = time.monotonic(), group_of(address)
        count, free_at = self.failures.get(client, (0, 0.0))
        ahead = self.paid_until - now - (FREE_FAILURES_OF_ALL - 1) * SECONDS_PER_FAILURE_OF_ALL
        if (wait := max(free_at - now, ahead)) > 0:
            self.report(address)
            return wait
        self.paid_until = max(self.paid_until, now) + SECONDS_PER_FAILURE_OF_ALL
        self.note(client, 1 if now - free_at > FORGOTTEN_SECONDS else count + 1, now)
        return 0.0

    def note(self, client: str, count: int, now: float) -> None:
        """Write down how many wrong ones a client has had, and when it may have the next."""
        wait = min(2.0 ** (count - FREE_FAILURES), LONGEST_WAIT_SECONDS) if count >= FREE_FAILURES else 0.0
        self.failures.pop(client, None)
        self.failures[client] = (count, now + wait)
        if len(self.failures) > MOST_ADDRESSES:
            self.failures.popitem(last=False)

    def report(self, address: str) -> None:
        """Log that somebody guesses, once a minute."""
        if self.reported():
            log.warning("wrong passwords throttled", address=address)


def same(given: str, expected: str) -> bool:
    """Compare in a time that tells nothing, not even the length."""
    digests = [hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest() for text in (given, expected)]
    return hmac.compare_digest(*digests)


class Guard:
    """Wraps the whole application: refuses what may not come in, and adds headers to whatever goes out."""

    def __init__(self, app: ASGIApp, settings: WebSettings) -> None:
        self.app = app
        self.settings = settings
        self.sessions = Sessions()
        self.attempts = Attempts()
        self.refusals = Seldom()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":  # nothing else comes in but by the checks below
                await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        session = request.cookies.get(COOKIE, "")
        is_new = not self.sessions.is_genuine(session)
        scope["session"] = self.sessions.new(is_known=False) if is_new else session
        scope["guard"] = self

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                if is_new and "set-cookie" not in headers and not is_from_elsewhere(request):
                    headers.append("Set-Cookie", cookie(scope["session"], request))
            await send(message)

        answer = self.refusal(request) or self.app
        await answer(scope, receive, send_with_headers)

    def refusal(self, request: Request) -> Response | None:
        """Return what is answered instead of a page, None if the request may pass."""
        host = request.headers.get("host")  # None: an old health check, and no browser
        if host is not None and not is_own_host(host, self.settings.hosts):
            if self.refusals():
                log.warning("refused: unknown host name; list it in BATCHQ_WEB_HOSTS", host=host[:200])
            return PlainTextResponse("unknown host name; list it in BATCHQ_WEB_HOSTS\n", 421)
        if "transfer-encoding" in request.headers and "content-length" in request.headers:
            # A proxy that reads the other one of the two would see another end of this request, and another next one.
            return PlainTextResponse("two lengths\n", 400, {"Connection": "close"})
        if request.method not in SAFE_METHODS:
            if request.method != "POST":
                return PlainTextResponse("method not allowed\n", 405)
            if not self.is_own_origin(request.headers):
                return PlainTextResponse("this form comes from another site\n", 403)
        if is_from_elsewhere(request):
            return HTMLResponse(COME_AGAIN)
        # The path by which Starlette finds the page. That of request.url is made from the Host header as well.
        if request.scope["path"] in OPEN_PATHS or self.is_let_in(request):
            return None
        return self.closed_door(request)

    def closed_door(self, request: Request) -> Response:
        """Return the answer to somebody who is not let in. Counts a wrong token."""
        if bearer(request) and (wait := self.attempts.failed(self.address_of(request))):
            return PlainTextResponse("too many wrong tokens\n", 429, {"Retry-After": str(math.ceil(wait))})
        if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
            return RedirectResponse("/login", 303)
        return PlainTextResponse("log in first\n", 401)

    def is_let_in(self, request: Request) -> bool:
        """Return whether somebody has given the password or the token, or needs none."""
        if not self.settings.secrets or self.sessions.is_known(request.scope["session"]):
            return True
        given = bearer(request)
        return bool(given) and self.is_secret(given)

    def is_secret(self, given: str) -> bool:
        """Return whether a text is the password or the token."""
        return sum(same(given, secret) for secret in self.settings.secrets) > 0  # compares all

    def address_of(self, request: Request) -> str:
        """Return where a request comes from."""
        address = request.client.host if request.client else ""
        return client_of(address, request.headers.getlist("x-forwarded-for"), self.settings.proxies)

    def is_own_origin(self, headers: Headers) -> bool:
        """Tell whether a form was sent by a page of ours."""
        try:
            return bool(headers.get("host")) and urlsplit(headers.get("origin", "")).netloc == headers["host"]
        except ValueError:
            return False


def is_from_elsewhere(request: Request) -> bool:
    """Tell whether a browser has followed a link from another site, and so kept its cookie back."""
    return request.headers.get("sec-fetch-site") == "cross-site" and request.headers.get("sec-fetch-mode") == "navigate"


def bearer(request: Request) -> str:
    """Return the token that a request gives, "" for none."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    return given.strip() if scheme.lower() == "bearer" else ""


def client_of(address: str, forwarded: list[str], proxies: tuple[Network, ...]) -> str:
    """Return the address of a client: the other end of the connection or, if a trusted proxy is there, the last one in
    X-Forwarded-For that is not a trusted proxy itself. What stands before that, the client may have made up."""
    for given in reversed(",".join(forwarded).split(",")):
        client = without_port(given)
        if not is_within(address, proxies) or not is_address(client):
            break
        address = client
    return address


def is_over_tls(request: Request) -> bool:
    """Return whether a browser speaks TLS, to this server or to a proxy. Anybody may say so: it only makes the cookie
    of the one who says it stricter."""
    forwarded = request.headers.get("x-forwarded-proto", "").partition(",")[0].strip().lower()
    return "https" in (request.scope["scheme"], forwarded)


def cookie(session: str, request: Request) -> str:
    """Return the header that sets a session; over TLS, one that never travels without."""
    secure = "; Secure" if is_over_tls(request) else ""
    return f"{COOKIE}={session}; HttpOnly; SameSite=Strict; Path=/; Max-Age={SESSION_SECONDS}{secure}"
