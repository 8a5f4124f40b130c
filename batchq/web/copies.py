"""The form that enqueues a copy of a batch, perhaps with another payload, queue, priority or delay.

Not a verb: it makes another batch each time, and it is recorded with the new one. See batchq.enqueue_copy.
"""

import json
from typing import Any, Never

import psycopg
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from batchq.common.hidden import is_changed
from batchq.common.text import json_text, period_seconds, visible_json
from batchq.operate.verbs import whole_number
from batchq.postgres.statements import views
from batchq.postgres.statements.verbs import enqueue_copy
from batchq.web.forms import read_form
from batchq.web.pages import Pages, batch_id_in
from batchq.web.reads import MOST_CHARACTERS, Reader, Row
from batchq.web.verbs import Refused, refusals, why
from batchq.web.view import redirect, refuse_if_read_only

MOST_ITEMS = 10_000  # that batchq.enqueue_copy copies
_MOST_FORM_BYTES = 1_048_576


class Copies:
    """Answers requests for the form."""

    def __init__(self, reader: Reader, pages: Pages) -> None:
        self._reader = reader
        self._pages = pages

    def ask(self, request: Request) -> Response:
        """Show the form, with the batch's own values."""
        refuse_if_read_only(request)
        batch, payload = self._batch(batch_id_in(request.path_params["id"]))
        texts = {"queue": batch["queue"], "priority": str(batch["priority"]), "payload": payload["text"], "delay": "0"}
        return self._form(request, batch, payload, texts)

    async def do(self, request: Request) -> Response:
        """Enqueue what the form has; then show the new batch."""
        refuse_if_read_only(request)
        form = await read_form(request, _MOST_FORM_BYTES)
        return await run_in_threadpool(self._do, request, form)

    def _do(self, request: Request, form: dict[str, str]) -> Response:
        batch, payload = self._batch(batch_id_in(request.path_params["id"]))
        try:
            made = _enqueue(self._reader, batch["id"], form, can_edit=_can_edit(payload))
        except Refused as error:
            return self._form(request, batch, payload, form, str(error))
        return redirect(request, f"/batches/{made}")

    def _batch(self, batch_id: int) -> tuple[Row, Row]:
        """Return a batch and its payload, shortened if it is long. Raises HTTPException 404."""
        found = self._reader.read("batch", id=batch_id)
        inputs = self._reader.ask(lambda conn: views.batch_texts(conn, batch_id, MOST_CHARACTERS))
        if not found or not inputs:
            raise HTTPException(404, f"no batch {batch_id}")
        [payload] = [field for field in inputs if field["name"] == "payload"]
        is_hidden = is_changed(payload["text"])  # also a sealed one: neither can be edited here
        return found[0], payload | {"text": visible_json(payload["text"]), "is_hidden": is_hidden}

    def _form(self, request: Request, batch: Row, payload: Row, given: dict[str, str], problem: str = "") -> Response:
        return self._pages.page(
            request, "batch_copy.html", 409 if problem else 200, batch=batch, given=given, problem=problem,
            payload_characters=payload["characters"], is_hidden=payload["is_hidden"], can_edit=_can_edit(payload),
            most_characters=MOST_CHARACTERS, most_items=MOST_ITEMS,
        )  # fmt: skip


def _can_edit(payload: Row) -> bool:
    return bool(payload["characters"] <= MOST_CHARACTERS) and not payload["is_hidden"]


def _enqueue(reader: Reader, batch_id: int, form: dict[str, str], *, can_edit: bool) -> int:
    """Enqueue a copy of a batch; return its id. Commits. Raises Refused."""
    with refusals():
        values: dict[str, Any] = _values(form) | {"payload": _payload(form.get("payload", "")) if can_edit else None}
        reason, actor = why(form)
        try:
            made = reader.act(lambda conn: enqueue_copy(conn, batch_id, **values, reason=reason, actor=actor))
        except psycopg.errors.UndefinedFunction:
            raise Refused("the database has no batchq.enqueue_copy yet; run batchq migrate") from None
    if made is None:
        raise Refused(f"batch {batch_id} is not there any more")
    return int(made)


def _values(form: dict[str, str]) -> dict[str, Any]:
    """Return what a form has besides the payload, as enqueue_copy takes it. Raises ValueError."""
    queue = form.get("queue", "").strip()
    if not queue:
        raise ValueError("the queue has no name; give the queue that the copy goes to")
    try:
        delay_seconds = period_seconds(form.get("delay", "").strip() or "0")
    except ValueError as error:
        raise ValueError(f"the delay {error}") from None
    return {
        "queue": queue,
        "priority": whole_number("priority", form.get("priority", "").strip(), -32_768, 32_767),
        "delay_seconds": delay_seconds,
    }


def _payload(text: str) -> str:
    """Return a JSON text as it is, so that no number changes. Raises ValueError unless Postgres can store it."""
    try:
        value = json.loads(text, parse_int=str, parse_float=str, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        problem = f"{error.msg} in line {error.lineno}, column {error.colno}"
        raise ValueError(f"the payload is not valid JSON: {problem}; correct it and try again") from None
    except RecursionError:
        raise ValueError("the payload is nested too deeply to be checked here; enqueue it with your code") from None
    json_text(value, "the payload")
    return text


def _refuse(name: str) -> Never:
    raise ValueError(f"the payload has {name}, which is not JSON; write null or a number")
