"""The pages of limits: what is in force and in use, and a form that sets or removes the numbers of one limit.

Not a verb: a limit has several numbers; see batchq.operate.verbs.
"""

from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from batchq.operate.limits import LIMITING, NUMBERS, number_text, replace
from batchq.postgres.statements import limits
from batchq.web import formats
from batchq.web.forms import read_form
from batchq.web.pages import Pages
from batchq.web.reads import Conn, Reader
from batchq.web.verbs import Refused, refusals, why


class Limits:
    """Answers requests for the form of a limit."""

    def __init__(self, reader: Reader, pages: Pages) -> None:
        self._reader = reader
        self._pages = pages

    def ask(self, request: Request) -> Response:
        """Show the form, with the numbers that batchq.limits has for the queue and kind."""
        self._refuse_if_read_only()
        given = dict(request.query_params)
        queue, kind = _target(given)
        row = self._reader.ask(lambda conn: limits.own_limit(conn, queue, kind)) if _is_readable(queue, kind) else None
        texts = {name: number_text(number) for name, number in (row or {}).items() if number is not None}
        return self._form(request, {**texts, **given})

    async def do(self, request: Request) -> Response:
        """Set what the form has, or remove the limit; then show all limits."""
        self._refuse_if_read_only()
        form = await read_form(request)
        return await run_in_threadpool(self._do, request, form)

    def _do(self, request: Request, form: dict[str, str]) -> Response:
        try:
            _change(self._reader, form)
        except Refused as error:
            return self._form(request, form, str(error))
        return RedirectResponse(f"/limits?{formats.query(said='set_limit')}", 303)

    def _form(self, request: Request, given: dict[str, str], problem: str = "") -> Response:
        code = 409 if problem else 200
        return self._pages.page(request, "limit.html", code, numbers=NUMBERS, given=given, problem=problem)

    def _refuse_if_read_only(self) -> None:
        if self._pages.read_only:
            raise HTTPException(403, "no actions: the web UI was started with --read-only")


def _target(given: dict[str, str]) -> tuple[str, str | None]:
    return given.get("queue", "").strip(), given.get("kind", "").strip() or None


def _is_readable(queue: str, kind: str | None) -> bool:
    return bool(queue) and "\0" not in queue + (kind or "")


def _change(reader: Reader, form: dict[str, str]) -> None:
    """Do what a form asks for. Commits. Raises Refused."""
    queue, kind = _target(form)
    with refusals():
        if not queue:
            raise ValueError("give the queue that the limit is of")
        numbers = {} if "remove" in form else _numbers(form)
        reader.act(lambda conn: _replace(conn, queue, kind, numbers, *why(form)))


def _numbers(form: dict[str, str]) -> dict[str, Any]:
    """Return the numbers of a form; an empty burst is the default. Raises ValueError."""
    given = {"burst_seconds": "1"} | {name: text for name, text in form.items() if text.strip()}
    numbers = {number.name: number.read(given.get(number.name, "none")) for number in NUMBERS}
    if all(numbers[name] is None for name in LIMITING):
        raise ValueError("give at least one number that limits something, or remove the limit")
    return numbers


def _replace(conn: Conn, queue: str, kind: str | None, numbers: dict[str, Any], reason: str | None, actor: str) -> None:
    replace(conn, queue, kind, numbers, reason, actor)
