"""The pages of schedules: a form that adds or changes one, and forms that pause, resume, run or remove it."""

from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from batchq.operate.schedules import ACTIONS, FIELDS, Action, change, definition, do
from batchq.postgres.statements import schedules
from batchq.web import formats
from batchq.web.forms import read_form
from batchq.web.pages import Pages
from batchq.web.reads import Conn, Reader
from batchq.web.verbs import Refused, refusals, why


class Schedules:
    """Answers requests for the forms of schedules."""

    def __init__(self, reader: Reader, pages: Pages) -> None:
        self._reader = reader
        self._pages = pages

    def ask(self, request: Request) -> Response:
        """Show the form, with the definition that batchq.schedules has for the name."""
        self._refuse_if_read_only()
        given = dict(request.query_params)
        name = given.get("name", "")
        row = self._reader.ask(lambda conn: schedules.own_schedule(conn, name)) if name and "\0" not in name else None
        texts = {column: str(value) for column, value in (row or {}).items()}
        return self._form(request, {**texts, **given}, is_new=row is None)

    async def set(self, request: Request) -> Response:
        """Write what the form has; then show all schedules."""
        self._refuse_if_read_only()
        form = await read_form(request)
        return await run_in_threadpool(self._set, request, form)

    def _set(self, request: Request, form: dict[str, str]) -> Response:
        try:
            with refusals():
                wanted = definition(form.get("name", "").strip(), form.get("cron", "").strip(), form)
                self._reader.act(lambda conn: _change(conn, wanted, form))
        except Refused as error:
            return self._form(request, form, str(error))
        return RedirectResponse(f"/schedules?{formats.query(said='set_schedule')}", 303)

    def _form(self, request: Request, given: dict[str, str], problem: str = "", *, is_new: bool = False) -> Response:
        code = 409 if problem else 200
        return self._pages.page(
            request, "schedule.html", code, fields=FIELDS, given=given, problem=problem, is_new=is_new
        )

    def ask_action(self, request: Request) -> Response:
        """Ask whether to pause, resume, run or remove a schedule."""
        return self._question(request, self._action(request), dict(request.query_params))

    async def act(self, request: Request) -> Response:
        """Do it; then show all schedules, or the batch that was made."""
        action = self._action(request)
        return await run_in_threadpool(self._act, request, action, await read_form(request))

    def _act(self, request: Request, action: Action, form: dict[str, str]) -> Response:
        try:
            with refusals():
                answer = self._reader.act(lambda conn: do(conn, action, form.get("name", ""), *why(form)))
            if answer is None:
                raise Refused("there is no such schedule any more")
        except Refused as error:
            return self._question(request, action, form, str(error))
        said = formats.query(said=f"{action.name}_schedule")
        return RedirectResponse(f"/batches/{answer}" if action.name == "run" else f"/schedules?{said}", 303)

    def _question(self, request: Request, action: Action, given: dict[str, str], problem: str = "") -> Response:
        code = 409 if problem else 200
        return self._pages.page(request, "schedule_action.html", code, action=action, given=given, problem=problem)

    def _action(self, request: Request) -> Action:
        """Return the action in an address. Raises HTTPException."""
        self._refuse_if_read_only()
        if (action := ACTIONS.get(request.path_params["action"])) is None:
            raise HTTPException(404, "no such action")
        return action

    def _refuse_if_read_only(self) -> None:
        if self._pages.read_only:
            raise HTTPException(403, "no actions: the web UI was started with --read-only")


def _change(conn: Conn, wanted: dict[str, Any], form: dict[str, str]) -> None:
    change(conn, wanted, *why(form))
