"""Sessions of the web UI: signed cookies, and the tokens that its forms carry.

A session is random text, the time it began (monotonic), and their HMAC by a key that lives as long as the process. The
sessions of people who logged in are also kept in memory, so that logging out ends one.
"""

import hashlib
import hmac
import re
import secrets
import time

from starlette.datastructures import MutableHeaders
from starlette.requests import Request

from batchq.web.view import view_of

_COOKIE = "batchq_session"
_SESSION_SECONDS = 12 * 3600
MOST_SESSIONS = 10_000


class Sessions:
    """Makes and checks sessions and what is signed for them."""

    def __init__(self, secret: str = "") -> None:
        self._key = hashlib.sha256(f"batchq web {secret}".encode()).digest() if secret else secrets.token_bytes(32)
        self._is_shared = bool(secret)
        self.known: dict[str, bool] = {}  # those of people who logged in, the oldest first; whether they may look only

    def new(self) -> str:
        """Return a session of somebody who has not logged in."""
        return self._signed("0")

    def log_in(self, *, is_read_only: bool = False) -> str:
        """Return a session of somebody who gave a password. Beyond 10,000, ends the oldest one."""
        session = self._signed("1")
        self.known[session] = is_read_only
        if len(self.known) > MOST_SESSIONS:
            self.log_out(next(iter(self.known)))
        return session

    def log_out(self, session: str) -> None:
        """End a session, also for everybody who has copied its cookie."""
        self.known.pop(session, None)

    def is_genuine(self, session: str) -> bool:
        """Return whether this process made a session, at most 12 hours ago; or any process with the same secret."""
        body, _, signature = session.rpartition(".")
        if not re.fullmatch(r"[\w-]+\.\d+\.[01]", body, re.ASCII) or not is_equal(signature, self._sign(body)):
            return False
        # Another machine's clock may be far from this one's. A shared session lets nobody in: it is for forms only.
        return self._is_shared or time.monotonic() - int(body.split(".")[1]) < _SESSION_SECONDS

    def is_known(self, session: str) -> bool:
        """Return whether a session is of somebody who gave the password and has not logged out."""
        return self.is_genuine(session) and session in self.known

    def form_token(self, session: str, name: str | None = None) -> str:
        """Return what a form of this session and person must carry, so that no other site can forge it."""
        return self._sign(f"form {session} {name or ''}")

    def seal(self, session: str, text: str, name: str | None = None) -> str:
        """Return the proof that a form of this session and person carries a text unchanged."""
        return self._sign(f"seal {session} {len(name or '')} {name or ''} {text}")

    def _signed(self, mark: str) -> str:
        body = f"{secrets.token_urlsafe(16)}.{int(time.monotonic())}.{mark}"
        return f"{body}.{self._sign(body)}"

    def _sign(self, text: str) -> str:
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()


def is_equal(given: str, expected: str) -> bool:
    """Compare in a time that reveals nothing, not even the length."""
    digests = [hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest() for text in (given, expected)]
    return hmac.compare_digest(*digests)


def session_in(request: Request, base: str, sessions: Sessions) -> str:
    """Return the session in a request's cookies; "" if none of them is genuine. base: where the web UI is mounted."""
    given = request.cookies.get(_name(base), "")
    return given if sessions.is_genuine(given) else ""


def cookie(session: str, request: Request) -> str:
    """Return the header that sets a session, for the address of the web UI only; where the browser uses TLS, the cookie
    is sent over TLS only."""
    base = request.scope["root_path"]
    secure = "; Secure" if _is_over_tls(request) else ""
    path = view_of(request).base or "/"
    return f"{_name(base)}={session}; HttpOnly; SameSite=Strict; Path={path}; Max-Age={_SESSION_SECONDS}{secure}"


def has_session(headers: MutableHeaders) -> bool:
    """Return whether an answer sets a session already."""
    return any(one.startswith(_COOKIE) for one in headers.getlist("set-cookie"))


def _name(base: str) -> str:
    """Return the name of the cookie: one of its own for each address, since a browser also sends those of the addresses
    above it."""
    return f"{_COOKIE}_{hashlib.sha256(base.encode()).hexdigest()[:8]}" if base else _COOKIE


def _is_over_tls(request: Request) -> bool:
    """Return whether the browser uses TLS, to this server or to a proxy.

    Any client can claim it in X-Forwarded-Proto: that only makes the client's own cookie stricter.
    """
    forwarded = request.headers.get("x-forwarded-proto", "").partition(",")[0].strip().lower()
    return "https" in (request.scope["scheme"], forwarded)
