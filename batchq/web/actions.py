"""The pages of actions: each verb, on one target or on all batches that match a filter, asks first and then acts."""

from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from batchq.operate.verbs import VERBS, Verb
from batchq.web import bulk, formats, verbs
from batchq.web.forms import read_form
from batchq.web.guard import guard_of
from batchq.web.pages import Pages
from batchq.web.reads import Reader
from batchq.web.sessions import is_equal
from batchq.web.view import redirect, refuse_if_read_only


class Actions:
    """Answers requests for actions."""

    def __init__(self, reader: Reader, pages: Pages) -> None:
        self._reader = reader
        self._pages = pages

    def ask(self, request: Request) -> Response:
        """Ask whether to do a verb."""
        verb = self._verb(request)
        return self._pages.page(request, "verb.html", **_verb_values(verb, dict(request.query_params)))

    async def do(self, request: Request) -> Response:
        """Do a verb, then show the page of its target."""
        verb = self._verb(request)
        return await run_in_threadpool(self._do, request, verb, await read_form(request))

    def _do(self, request: Request, verb: Verb, form: dict[str, str]) -> Response:
        try:
            verbs.do(self._reader, verb, form)
        except verbs.Refused as error:
            return self._pages.page(request, "verb.html", 409, **_verb_values(verb, form, str(error)))
        target = {"batch": f"/batches/{form.get('id')}", "worker": "/workers"}.get(verb.target, "/")
        return redirect(request, f"{target}?{formats.query(said=verb.name)}")

    def ask_bulk(self, request: Request) -> Response:
        """Ask for the filter of the batches to do a verb to."""
        return self._bulk_form(request, self._verb(request, in_bulk=True), dict(request.query_params))

    async def do_bulk(self, request: Request) -> Response:
        """Count what matches or take the next step; show the progress, with the form that continues."""
        verb = self._verb(request, in_bulk=True)
        return await run_in_threadpool(self._do_bulk, request, verb, await read_form(request))

    def _do_bulk(self, request: Request, verb: Verb, form: dict[str, str]) -> Response:
        try:
            job = _opened(request, form) if "job" in form else bulk.asked(verb, form)
        except verbs.Refused as error:
            return self._bulk_form(request, verb, form, str(error))
        code, problem = 200, None
        try:
            bulk.take_step(self._reader, job)
        except verbs.Refused as error:
            code, problem = 503 if isinstance(error, bulk.TryAgain) else 409, str(error)
        return self._bulk_progress(request, job, code, problem)

    def _bulk_form(self, request: Request, verb: Verb, given: dict[str, str], problem: str = "") -> Response:
        values = _verb_values(verb, given, problem)
        return self._pages.page(
            request, "bulk.html", 409 if problem else 200, status=bulk.shown_status(given), **values
        )

    def _bulk_progress(self, request: Request, job: bulk.Job, code: int, problem: str | None) -> Response:
        text = job.as_text()
        return self._pages.page(
            request, "bulk_job.html", code, job=job, bulk=job.bulk, job_text=text, seal=_seal(request, text),
            problem=problem,
        )  # fmt: skip

    def _verb(self, request: Request, *, in_bulk: bool = False) -> Verb:
        """Return the verb in an address. Raises HTTPException if there is none, or if the web UI is read-only."""
        refuse_if_read_only(request)
        verb = VERBS.get(request.path_params["verb"])
        if verb is None:
            raise HTTPException(404, "no such action")
        if in_bulk and not verb.statuses:
            raise HTTPException(404, "this action is not available in bulk")
        return verb


def _verb_values(verb: Verb, given: dict[str, str], problem: str = "") -> dict[str, Any]:
    return {"verb": verb, "given": given, "problem": problem}


def _opened(request: Request, form: dict[str, str]) -> bulk.Job:
    """Return the job in a form that was sent to this session. Raises HTTPException."""
    text = form["job"]
    if not is_equal(form.get("seal", ""), _seal(request, text)):
        raise HTTPException(403, "this form was changed or belongs to another session; start again from the list")
    return bulk.Job.of_text(text)


def _seal(request: Request, text: str) -> str:
    return guard_of(request).seal(request, text)
