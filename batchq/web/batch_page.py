"""The page of one batch: its progress, what has happened to it, its payload as a tree, and what it belongs to."""

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from batchq.common import hidden, sealed
from batchq.common.traces import trace_id_of
from batchq.operate import parts
from batchq.operate.verbs import VERBS, Verb
from batchq.postgres.statements import flows, views
from batchq.postgres.statements.parts import part_rows
from batchq.web import formats, json_tree
from batchq.web.pages import Pages, batch_id_in
from batchq.web.reads import MOST_CHARACTERS, PAGE_ROWS, Reader, Row
from batchq.web.timeline import events

INPUTS = ("payload", "cursor", "result")
_MOST_NEEDS = 20
_MOST_PARTS = 50
_OF_SCHEDULE = "schedule:"  # how the unique_key of a schedule's batches begins, if they may not overlap


class BatchPage:
    """Answers requests for the page of a batch, and for its payload, cursor and result as they are."""

    def __init__(self, reader: Reader, pages: Pages, trace_url: str = "") -> None:
        self._reader = reader
        self._pages = pages
        self._trace_url = trace_url
        pages.add_live_part("batch", lambda text: self._values(batch_id_in(text)))

    def show(self, request: Request) -> HTMLResponse:
        """Show one batch, or one part of a batch that is spread."""
        batch_id = batch_id_in(request.path_params["id"])
        after = request.query_params.get("after", "-1")
        after_item = int(after) if after.isdecimal() and len(after) < 10 else -1
        try:
            values = self._values(batch_id)
        except HTTPException:
            if part := self._pages.part(batch_id):
                return self._pages.page(request, "part.html", part=part)
            raise
        items = self._reader.read("failed_items", id=batch_id, after=after_item, limit=PAGE_ROWS + 1)
        for item in items:
            item["item"], item["error"] = hidden.shown_text(item["item"]), sealed.shortened(item["error"])
        more = items[PAGE_ROWS - 1]["item_index"] if len(items) > PAGE_ROWS else None
        return self._pages.page(
            request, "batch.html", live=f"batch/{batch_id}", inputs=self._inputs(batch_id),
            most_characters=MOST_CHARACTERS, items=items[:PAGE_ROWS], after_item=after_item, more_items=more, **values,
        )  # fmt: skip

    def raw(self, request: Request) -> Response:
        """Send a payload, cursor or result as JSON, whole and unchanged, except for hidden fields."""
        batch_id, name = batch_id_in(request.path_params["id"]), request.path_params["name"]
        found = self._reader.read("raw_input", id=batch_id, field=name) if name in INPUTS else []
        if not found or found[0]["text"] is None:
            raise HTTPException(404, f"batch {batch_id} has no {name}")
        return Response(hidden.text_without_hidden(found[0]["text"]), media_type="application/json")

    def _inputs(self, batch_id: int) -> list[Row]:
        """Read the beginnings of payload, cursor and result, and make their trees."""
        fields: list[Row] = self._reader.ask(lambda conn: views.batch_texts(conn, batch_id, MOST_CHARACTERS))
        for field in fields:
            field["text"] = hidden.shown_text(field["text"])
            field["is_cut"] = field["characters"] > MOST_CHARACTERS
            field["tree"] = json_tree.tree(field["text"], field["is_cut"])
        return fields

    def _values(self, batch_id: int) -> dict[str, Any]:
        """Read a batch, except its payload, cursor, result and items. Raises HTTPException 404."""
        found = self._reader.read("batch", id=batch_id)
        if not found:
            raise HTTPException(404, f"no batch {batch_id}")
        [batch] = found
        errors = self._reader.read("errors", id=batch_id)
        needs = self._reader.ask(lambda conn: flows.needs_rows(conn, batch_id, _MOST_NEEDS + 1))
        dependents = self._reader.ask(lambda conn: flows.dependent_rows(conn, batch_id, _MOST_NEEDS + 1))
        spread = self._reader.ask(lambda conn: part_rows(conn, batch_id)) if (batch["spread"] or 0) > 1 else []
        return {
            "batch": batch, "left_seconds": None if errors else _left_seconds(batch),
            "events": self._events(batch, errors, needs, len(spread)),
            "actions": _actions(batch), "needs": needs, "dependents": dependents, "most_needs": _MOST_NEEDS,
            "spread": parts.summary(spread, _MOST_PARTS), "schedule": self._schedule(batch), **self._trace(batch),
        }  # fmt: skip

    def _events(self, batch: Row, errors: list[Row], needs: list[Row], spread: int) -> list[Any]:
        audit = self._reader.read("batch_audit", id=batch["id"])
        waited = None
        if needs and len(needs) <= _MOST_NEEDS:  # of more, it would have to read the ends of all
            [waited] = self._reader.read("batch_waited", id=batch["id"], limit=_MOST_NEEDS)
        held = []
        if batch["status"] == "ready":
            held = self._reader.read("batch_held", queue=batch["queue"], kind=batch["kind"], key=batch["key"] or "")
        return events(batch, errors, audit, waited, held, spread)

    def _schedule(self, batch: Row) -> str | None:
        """Return the schedule that made a batch, if that is known."""
        key = batch["unique_key"] or ""
        name = key.removeprefix(_OF_SCHEDULE) if key.startswith(_OF_SCHEDULE) else None
        found = self._reader.read("batch_schedule", id=batch["id"], schedule=name)
        return found[0]["name"] if found else None

    def _trace(self, batch: Row) -> dict[str, str | None]:
        trace_id = trace_id_of(batch["trace_context"])
        url = self._trace_url.replace("{trace_id}", trace_id) if trace_id and self._trace_url else None
        return {"trace_id": trace_id, "trace_url": url}


def _left_seconds(batch: Row) -> float | None:
    """Estimate how long a batch will still run, from the rate of its first attempt; None in later attempts, whose rate
    does not include what earlier ones did."""
    done = formats.processed(batch)
    is_first_attempt = batch["status"] == "processing" and batch["attempt"] == 1
    if not (is_first_attempt and batch["items_total"] and done and batch["running_seconds"]):
        return None
    return float((batch["items_total"] - done) * batch["running_seconds"] / done)


def _actions(batch: Row) -> list[Verb]:
    """Return the verbs that would change a batch in its current status, the grave ones last."""
    offered = [verb for verb in VERBS.values() if verb.is_offered(batch["status"], batch["items_failed"])]
    return sorted(offered, key=lambda verb: verb.is_grave)
