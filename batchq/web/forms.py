"""The forms of the web UI: how one is read, and the log-in form."""

import math
from urllib.parse import parse_qsl

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from batchq.web.guard import guard_of
from batchq.web.rendering import Rendering
from batchq.web.sessions import cookie, is_equal
from batchq.web.view import redirect, view_of

_MOST_BYTES = 65_536
_MOST_FIELDS = 50


async def read_form(request: Request, most_bytes: int = _MOST_BYTES) -> dict[str, str]:
    """Return the fields of a form, which must carry the token of its session. Where the person is known, "actor" is
    their name, whatever the form says. Raises HTTPException."""
    try:
        form = dict(
            parse_qsl((await _body(request, most_bytes)).decode(), max_num_fields=_MOST_FIELDS, errors="strict")
        )
    except ValueError:
        raise HTTPException(400, "the form cannot be read") from None
    if any("\0" in text for text in form.values()):
        raise HTTPException(400, "the form contains a NUL character")
    if not is_equal(form.pop("form_token", ""), guard_of(request).form_token(request)):
        raise HTTPException(403, "this form belongs to another session; go back, reload the page, and try again")
    if user := view_of(request).user:
        form["actor"] = user
    return form


async def _body(request: Request, most_bytes: int) -> bytes:
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > most_bytes:
            raise HTTPException(413, "the form is too large")
    return body


class Login:
    """Logs people in and out."""

    def __init__(self, pages: Rendering) -> None:
        self._pages = pages

    def ask(self, request: Request) -> Response:
        """Show the log-in form."""
        if not guard_of(request).has_login:
            return redirect(request, "/")
        return self._pages.page(request, "login.html")

    async def log_in(self, request: Request) -> Response:
        """Start a session if the password or the token is right; throttle wrong ones."""
        guard = guard_of(request)
        if not guard.has_login:
            raise HTTPException(404, "there is no password to log in with")
        form = await read_form(request)
        if access := guard.access_of(form.get("password", "")):
            guard.sessions.log_out(request.scope["session"])
            return _redirect("/", guard.sessions.log_in(is_read_only=access == "read-only"), request)
        if wait := math.ceil(guard.throttle.failed(guard.address_of(request))):
            problem = f"Too many wrong passwords. Try again in {wait} s."
            answer = self._pages.page(request, "login.html", 429, problem=problem)
            answer.headers["Retry-After"] = str(wait)
            return answer
        return self._pages.page(request, "login.html", 401, problem="Wrong password.")

    async def log_out(self, request: Request) -> Response:
        """End the session."""
        await read_form(request)
        sessions = guard_of(request).sessions
        sessions.log_out(request.scope["session"])
        return _redirect("/login", sessions.new(), request)


def _redirect(path: str, session: str, request: Request) -> Response:
    answer = redirect(request, path)
    answer.headers["Set-Cookie"] = cookie(session, request)
    return answer
