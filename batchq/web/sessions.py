"""Sessions of the web UI: signed cookies, and the tokens that its forms carry.

A session is random text, the time it began (monotonic), and their HMAC by a key that lives as long as the process. The
sessions of people who logged in are also kept in memory, so that logging out ends one.
"""

import hashlib
import hmac
import re
import secrets
import time

from starlette.requests import Request

_COOKIE = "batchq_session"
_SESSION_SECONDS = 12 * 3600
MOST_SESSIONS = 10_000


class Sessions:
    """Makes and checks sessions and what is signed for them."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)
        self.known: dict[str, None] = {}  # those of people who logged in, the oldest first

    def new(self) -> str:
        """Return a session of somebody who has not logged in."""
        return self._signed("0")

    def log_in(self) -> str:
        """Return a session of somebody who gave the password. Beyond 10,000, ends the oldest one."""
        session = self._signed("1")
        self.known[session] = None
        if len(self.known) > MOST_SESSIONS:
            self.log_out(next(iter(self.known)))
        return session

    def log_out(self, session: str) -> None:
        """End a session, also for everybody who has copied its cookie."""
        self.known.pop(session, None)

    def is_genuine(self, session: str) -> bool:
        """Return whether this process made a session, at most 12 hours ago."""
        body, _, signature = session.rpartition(".")
        if not re.fullmatch(r"[\w-]+\.\d+\.[01]", body, re.ASCII) or not is_equal(signature, self._sign(body)):
            return False
        return time.monotonic() - int(body.split(".")[1]) < _SESSION_SECONDS

    def is_known(self, session: str) -> bool:
        """Return whether a session is of somebody who gave the password and has not logged out."""
        return self.is_genuine(session) and session in self.known

    def form_token(self, session: str) -> str:
        """Return what a form of this session must carry, so that no other site can forge it."""
        return self._sign(f"form {session}")

    def seal(self, session: str, text: str) -> str:
        """Return the proof that a form of this session carries a text unchanged."""
        return self._sign(f"seal {session} {text}")

    def _signed(self, mark: str) -> str:
        body = f"{secrets.token_urlsafe(16)}.{int(time.monotonic())}.{mark}"
        return f"{body}.{self._sign(body)}"

    def _sign(self, text: str) -> str:
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()


def is_equal(given: str, expected: str) -> bool:
    """Compare in a time that reveals nothing, not even the length."""
    digests = [hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest() for text in (given, expected)]
    return hmac.compare_digest(*digests)


def session_in(request: Request) -> str:
    """Return the session in a request's cookie, unchecked."""
    return request.cookies.get(_COOKIE, "")


def cookie(session: str, request: Request) -> str:
    """Return the header that sets a session; where the browser uses TLS, the cookie is sent over TLS only."""
    secure = "; Secure" if _is_over_tls(request) else ""
    return f"{_COOKIE}={session}; HttpOnly; SameSite=Strict; Path=/; Max-Age={_SESSION_SECONDS}{secure}"


def _is_over_tls(request: Request) -> bool:
    """Return whether the browser uses TLS, to this server or to a proxy.

    Any client can claim it in X-Forwarded-Proto: that only makes the client's own cookie stricter.
    """
    forwarded = request.headers.get("x-forwarded-proto", "").partition(",")[0].strip().lower()
    return "https" in (request.scope["scheme"], forwarded)
