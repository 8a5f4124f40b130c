"""The pages of schedules: all of them, one of them, and forms that add, change, pause, resume, run or remove one."""

from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from batchq.common.hidden import shown_text
from batchq.operate.schedules import ACTIONS, FIELDS, Action, change, definition, do
from batchq.postgres.statements import schedules
from batchq.web import formats
from batchq.web.day_line import line_of, next_runs
from batchq.web.forms import read_form
from batchq.web.list_reads import batch_list, sort_of
from batchq.web.pages import Pages
from batchq.web.reads import MOST_CHARACTERS, MOST_ROWS, Reader, Row
from batchq.web.search import Terms
from batchq.web.verbs import Refused, refusals, why
from batchq.web.view import live_address, names_in, redirect, refuse_if_read_only, without_nul

_NEXT = 12  # schedules whose next run is listed
_NEXT_OF_ONE = 10
_LATEST = 10  # batches of one schedule


class Schedules:
    """Answers requests for the pages of schedules, and for their forms."""

    def __init__(self, reader: Reader, pages: Pages) -> None:
        self._reader = reader
        self._pages = pages
        pages.add_live_part("schedules", lambda _: self._values())
        pages.add_live_part("schedule", lambda text: self._values_of(names_in(text, "schedule")["schedule"] or ""))

    def show_all(self, request: Request) -> Response:
        """Show the schedules, their next runs, and the outcome of the latest batch of each."""
        return self._pages.page(request, "schedules.html", live="schedules", **self._values())

    def _values(self) -> dict[str, Any]:
        rows = self._reader.read("schedules", limit=MOST_ROWS)
        rows = [row | {"line": line_of(row)} for row in rows]
        return {"schedules": rows, "next_runs": next_runs(rows, _NEXT)}

    def show(self, request: Request) -> Response:
        """Show one schedule: its definition, its next runs, and the latest batches of its kind."""
        name = without_nul(request.query_params.get("name", ""))
        values = self._values_of(name)
        return self._pages.page(request, "one_schedule.html", live=live_address("schedule", schedule=name), **values)

    def _values_of(self, name: str) -> dict[str, Any]:
        """Read one schedule. Raises HTTPException 404."""
        if not (found := self._reader.read("schedule", schedule=name)):
            raise HTTPException(404, f"there is no schedule {name!r}")
        [row] = found
        found = self._reader.ask(batch_list(Terms(queue=row["queue"], kind=row["kind"]), sort_of(None, None)))
        return {
            "s": row | {"payload": shown_text(row["payload"])}, "batches": found.rows[:_LATEST], "line": line_of(row),
            "most_characters": MOST_CHARACTERS, "next_runs": next_runs([row], _NEXT_OF_ONE, _NEXT_OF_ONE),
        }  # fmt: skip

    def ask(self, request: Request) -> Response:
        """Show the form, with the definition that batchq.schedules has for the name."""
        refuse_if_read_only(request)
        given = dict(request.query_params)
        row = self._own(given.get("name", ""))
        texts = {column: str(value) for column, value in (row or {}).items()}
        return self._form(request, {**texts, **given}, is_new=row is None)

    async def set(self, request: Request) -> Response:
        """Write what the form has; then show all schedules."""
        refuse_if_read_only(request)
        form = await read_form(request)
        return await run_in_threadpool(self._set, request, form)

    def _set(self, request: Request, form: dict[str, str]) -> Response:
        try:
            with refusals():
                wanted = definition(form.get("name", "").strip(), form.get("cron", "").strip(), form)
                self._reader.act(lambda conn: change(conn, wanted, *why(form)))
        except Refused as error:
            is_new = self._own(form.get("name", "").strip()) is None
            return self._form(request, form, str(error), is_new=is_new)
        return redirect(request, f"/schedules?{formats.query(said='set_schedule')}")

    def _form(self, request: Request, given: dict[str, str], problem: str = "", *, is_new: bool) -> Response:
        code = 409 if problem else 200
        return self._pages.page(
            request, "schedule.html", code, fields=FIELDS, given=given, problem=problem, is_new=is_new
        )

    def _own(self, name: str) -> Row | None:
        """Return the definition that batchq.schedules has for a name."""
        return self._reader.ask(lambda conn: schedules.own_schedule(conn, name)) if name and "\0" not in name else None

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
        return redirect(request, f"/batches/{answer}" if action.name == "run" else f"/schedules?{said}")

    def _question(self, request: Request, action: Action, given: dict[str, str], problem: str = "") -> Response:
        code = 409 if problem else 200
        return self._pages.page(request, "schedule_action.html", code, action=action, given=given, problem=problem)

    def _action(self, request: Request) -> Action:
        """Return the action in an address. Raises HTTPException."""
        refuse_if_read_only(request)
        if (action := ACTIONS.get(request.path_params["action"])) is None:
            raise HTTPException(404, "no such action")
        return action
