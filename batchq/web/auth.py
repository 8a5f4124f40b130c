"""Who may see the page, and from where: everything that comes in passes `Guard`, before any page is made.

A session is a cookie signed with a key that lives as long as the process: random text, a time (monotonic), and their
HMAC. A form carries a token made from its session, so that no other site can forge one.
"""

import hashlib
import hmac
import ipaddress
import re
import secrets
import time
from collections import OrderedDict
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from batchq.web.settings import WebSettings

COOKIE = "batchq_session"
SESSION_SECONDS = 12 * 3600
FREE_FAILURES = 3
LONGEST_WAIT_SECONDS = 60.0
MOST_ADDRESSES = 10_000
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


class Sessions:
    """Makes and checks session cookies and the tokens of forms."""

    def __init__(self) -> None:
        self.key = secrets.token_bytes(32)

    def sign(self, text: str) -> str:
        """Return the HMAC of a text."""
        return hmac.new(self.key, text.encode(), hashlib.sha256).hexdigest()

    def new(self, is_known: bool) -> str:
        """Return a session for somebody who *is_known*, that is, who gave the password."""
        body = f"{secrets.token_urlsafe(16)}.{int(time.monotonic())}.{int(is_known)}"
        return f"{body}.{self.sign(body)}"

    def is_genuine(self, session: str) -> bool:
        """Tell whether a session is one of ours and not too old."""
        body, _, signature = session.rpartition(".")
        if not re.fullmatch(r"[\w-]+\.\d+\.[01]", body, re.ASCII) or not same(signature, self.sign(body)):
            return False
        return time.monotonic() - int(body.split(".")[1]) < SESSION_SECONDS

    def is_known(self, session: str) -> bool:
        """Tell whether a session is of somebody who gave the password."""
        return self.is_genuine(session) and session.split(".")[2] == "1"

    def form_token(self, session: str) -> str:
        """Return what a form of this session has to carry."""
        return self.sign(f"form {session}")

    def seal(self, session: str, text: str) -> str:
        """Return what proves that a text in a form of this session is as it was sent."""
        return self.sign(f"seal {session} {text}")


class Attempts:
    """Slows down guessing: after three wrong passwords an address waits 1 s, then 2 s, up to a minute."""

    def __init__(self) -> None:
        self.failures: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def wait_seconds(self, address: str) -> float:
        """Return how long an address has to wait before its next attempt."""
        return max(0.0, self.failures.get(address, (0, 0.0))[1] - time.monotonic())

    def failed(self, address: str) -> None:
        """Take note of a wrong password."""
        count = self.failures.pop(address, (0, 0.0))[0] + 1
        wait = min(2.0 ** (count - FREE_FAILURES), LONGEST_WAIT_SECONDS) if count >= FREE_FAILURES else 0.0
        self.failures[address] = (count, time.monotonic() + wait)
        if len(self.failures) > MOST_ADDRESSES:
            self.failures.popitem(last=False)

    def succeeded(self, address: str) -> None:
        """Forget an address."""
        self.failures.pop(address, None)


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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
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
        if not self.is_own_host(request.headers.get("host", "")):
            return PlainTextResponse("unknown host name; list it in BATCHQ_WEB_HOSTS\n", 421)
        if request.method not in SAFE_METHODS:
            if request.method != "POST":
                return PlainTextResponse("method not allowed\n", 405)
            if not self.is_own_origin(request.headers):
                return PlainTextResponse("this form comes from another site\n", 403)
        if is_from_elsewhere(request):
            return HTMLResponse(COME_AGAIN)
        if request.url.path in OPEN_PATHS or self.is_let_in(request):
            return None
        if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
            return RedirectResponse("/login", 303)
        return PlainTextResponse("log in first\n", 401)

    def is_let_in(self, request: Request) -> bool:
        """Tell whether somebody has given the password or the token, or needs none."""
        if not self.settings.secrets or self.sessions.is_known(request.scope["session"]):
            return True
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or self.attempts.wait_seconds(address_of(request)):
            return False
        if self.is_secret(given.strip()):
            return True
        self.attempts.failed(address_of(request))
        return False

    def is_secret(self, given: str) -> bool:
        """Tell whether a text is the password or the token."""
        return sum(same(given, secret) for secret in self.settings.secrets) > 0  # compares all

    def is_own_host(self, header: str) -> bool:
        """Tell whether a Host header names us: an address, localhost, or a listed name. A page of somebody else's whose
        name was made to lead to our address (DNS rebinding) says its own name here."""
        try:
            name = urlsplit(f"//{header}").hostname or ""
        except ValueError:
            return False
        return name == "localhost" or name in self.settings.hosts or is_address(name)

    def is_own_origin(self, headers: Headers) -> bool:
        """Tell whether a form was sent by a page of ours."""
        try:
            return bool(headers.get("host")) and urlsplit(headers.get("origin", "")).netloc == headers["host"]
        except ValueError:
            return False


def is_from_elsewhere(request: Request) -> bool:
    """Tell whether a browser has followed a link from another site, and so kept its cookie back."""
    return request.headers.get("sec-fetch-site") == "cross-site" and request.headers.get("sec-fetch-mode") == "navigate"


def is_address(name: str) -> bool:
    """Tell whether a host is an address, which no DNS can make to mean something else."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def address_of(request: Request) -> str:
    """Return where a request comes from."""
    return request.client.host if request.client else ""


def cookie(session: str, request: Request) -> str:
    """Return the header that sets a session; over TLS, one that never travels without."""
    secure = "; Secure" if request.url.scheme == "https" else ""
    return f"{COOKIE}={session}; HttpOnly; SameSite=Strict; Path=/; Max-Age={SESSION_SECONDS}{secure}"
