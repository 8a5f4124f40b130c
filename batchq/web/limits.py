"""The pages of limits: what holds work back, what is in force and in use, and a form that changes one limit.

Not a verb: a limit has several numbers; see batchq.operate.verbs.
"""

from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from batchq.operate.limits import LIMITING, NUMBERS, number_text, replace
from batchq.postgres.statements import limits
from batchq.web import formats
from batchq.web.forms import read_form
from batchq.web.pages import Pages
from batchq.web.reads import MOST_ROWS, Conn, Reader, Row
from batchq.web.verbs import Refused, refusals, why
from batchq.web.view import redirect, refuse_if_read_only


class Limits:
    """Answers requests for the page of all limits, and for the form of one."""

    def __init__(self, reader: Reader, pages: Pages) -> None:
        self._reader = reader
        self._pages = pages
        pages.add_live_part("limits", lambda _: self._values())

    def show_all(self, request: Request) -> Response:
        """Show what holds work back, the limits in force, what is in use of them, and the throttles."""
        return self._pages.page(request, "limits.html", live="limits", **self._values())

    def _values(self) -> dict[str, Any]:
        ready = self._reader.read("held_back", limit=MOST_ROWS)
        return {
            "held": [row | {"reasons": found} for row in ready if (found := held_by(row))],
            "limits": self._reader.read("limits", limit=MOST_ROWS),
            "throttles": self._reader.read("throttles"),
        }

    def ask(self, request: Request) -> Response:
        """Show the form, with the numbers that batchq.limits has for the queue and kind."""
        refuse_if_read_only(request)
        given = dict(request.query_params)
        queue, kind = _target(given)
        row = self._reader.ask(lambda conn: limits.own_limit(conn, queue, kind)) if _is_readable(queue, kind) else None
        texts = {name: number_text(number) for name, number in (row or {}).items() if number is not None}
        return self._form(request, {**texts, **given})

    async def do(self, request: Request) -> Response:
        """Set what the form has, or remove the limit; then show all limits."""
        refuse_if_read_only(request)
        form = await read_form(request)
        return await run_in_threadpool(self._do, request, form)

    def _do(self, request: Request, form: dict[str, str]) -> Response:
        try:
            _change(self._reader, form)
        except Refused as error:
            return self._form(request, form, str(error))
        return redirect(request, f"/limits?{formats.query(said='set_limit')}")

    def _form(self, request: Request, given: dict[str, str], problem: str = "") -> Response:
        code = 409 if problem else 200
        return self._pages.page(request, "limit.html", code, numbers=NUMBERS, given=given, problem=problem)


def held_by(row: Row) -> str:
    """Return what holds the ready batches of a queue and kind back, such as "paused, max_running"; empty if nothing."""
    reasons = ["paused"] if row["is_paused"] else []
    if not row["workers"]:
        reasons.append("no worker")
    return ", ".join([*reasons, *([row["held_back_by"]] if row["held_back_by"] else [])])


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
