"""The pages of the web UI: what each one reads, and the template that shows it. A live part has its own template."""

from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from batchq.operate import flow_graph
from batchq.operate.limits import number_text, origin_text, use_text
from batchq.operate.schedules import ACTIONS, origin_of, rules_of, upcoming, words_of
from batchq.operate.verbs import VERBS, Verb
from batchq.postgres.statements import flows
from batchq.web import bulk, charts, formats, reads
from batchq.web.flows import flow_values
from batchq.web.guard import guard_of
from batchq.web.reads import HIGHEST_ID, MOST_CHARACTERS, MOST_ROWS, PAGE_ROWS, Reader, Row

_STATUSES = ("waiting", "ready", "scheduled", "retrying", "processing", "stalled", "completed", "failed", "cancelled")
_DONE = {name: verb.title.lower() for name, verb in VERBS.items()} | {
    "set_limit": "change limit", "set_schedule": "set schedule",
    **{f"{action.name}_schedule": action.title.lower() for action in ACTIONS.values()},
}  # fmt: skip
_MOST_FAILURES = 12
_MOST_FILTER_CHARACTERS = 300
_MOST_NEEDS = 20  # that the page of a batch lists


def _environment() -> Environment:
    """Return an environment that escapes everything and spells out hidden characters."""
    made = Environment(
        loader=PackageLoader("batchq.web"),
        autoescape=True,
        finalize=formats.visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "duration": formats.duration, "number": formats.number, "percent": formats.percent,
        "processed": formats.processed, "query": lambda given: formats.query(**given), "as_it_is": _as_it_is,
    }  # fmt: skip
    made.globals |= {"count": formats.count, "link": formats.query, "statuses": _STATUSES}
    made.globals |= {"use": use_text, "number_text": number_text, "origin": origin_text}
    made.globals |= {"in_words": words_of, "rules": rules_of, "upcoming": upcoming, "schedule_origin": origin_of}
    return made


def _as_it_is(text: str | None) -> Markup:
    """Return a text for a field that is sent back: escaped, but with its hidden characters."""
    return escape(text or "")


class Pages:
    """Makes pages. Its methods block; Starlette calls them in threads."""

    def __init__(self, reader: Reader, read_only: bool) -> None:
        self.read_only = read_only
        self._reader = reader
        self._templates = _environment()

    def page(self, request: Request, template: str, code: int = 200, **values: Any) -> HTMLResponse:
        """Return a whole page."""
        guard = guard_of(request)
        text = self._render(
            template,
            path=request.url.path,
            has_login=bool(guard.settings.secrets),
            form_token=guard.sessions.form_token(request.scope["session"]),
            done=_DONE.get(request.query_params.get("said", "")),
            **values,
        )
        return HTMLResponse(text, code)

    def problem(self, request: Request, code: int, text: str) -> HTMLResponse:
        """Return a page that says what went wrong."""
        return self.page(request, "problem.html", code, title=text[:1].upper() + text[1:])

    def _render(self, template: str, **values: Any) -> str:
        return self._templates.get_template(template).render(read_only=self.read_only, **values)

    def live_part(self, name: str) -> str:
        """Return the live part of a page: overview, workers, limits, schedules, batch/ID, flow/ID. Raises HTTPException
        404."""
        if name == "overview":
            return self._render("overview_live.html", **self._overview_values())
        if name == "workers":
            return self._render("workers_live.html", workers=self._workers())
        if name == "limits":
            return self._render("limits_live.html", **self._limit_values())
        if name.startswith("flow/"):
            return self._render("flow_live.html", **self._flow_values(_batch_id(name.removeprefix("flow/"))))
        if name == "schedules":
            return self._render("schedules_live.html", schedules=self._schedules())
        return self._render("batch_live.html", **self._batch_values(_batch_id(name.removeprefix("batch/"))))

    def _overview_values(self) -> dict[str, Any]:
        queues = self._reader.read("queues", limit=MOST_ROWS)
        minutes = self._reader.read("minutes")
        return {
            "queues": queues,
            "bars": charts.bars(minutes),
            "sparks": charts.sparks(minutes),
            "failures": self._reader.read("failures", limit=_MOST_FAILURES),
            "workers": self._workers(),
            "pauses": self._reader.read("pauses"),
            "totals": _totals(queues),
        }

    def _workers(self) -> list[Row]:
        return self._reader.read("workers", limit=MOST_ROWS)

    def _limit_values(self) -> dict[str, Any]:
        return {"limits": self._reader.read("limits", limit=MOST_ROWS), "throttles": self._reader.read("throttles")}

    def _schedules(self) -> list[Row]:
        return self._reader.read("schedules", limit=MOST_ROWS)

    def _batch_values(self, batch_id: int) -> dict[str, Any]:
        """Read a batch, except its payload, cursor, result and items. Raises HTTPException 404."""
        found = self._reader.read("batch", id=batch_id)
        if not found:
            raise HTTPException(404, f"no batch {batch_id}")
        [batch] = found
        errors = self._reader.read("errors", id=batch_id)
        needs = self._reader.ask(lambda conn: flows.needs_rows(conn, batch_id, _MOST_NEEDS + 1))
        dependents = self._reader.ask(lambda conn: flows.dependent_rows(conn, batch_id, _MOST_NEEDS + 1))
        return {
            "batch": batch, "errors": errors, "left_seconds": _left_seconds(batch), "actions": _actions(batch),
            "needs": needs, "dependents": dependents, "most_needs": _MOST_NEEDS,
        }  # fmt: skip

    def _flow_values(self, batch_id: int) -> dict[str, Any]:
        """Read the flow that a batch is part of. Raises HTTPException 404."""
        graph = self._reader.ask(lambda conn: flow_graph.read(conn, batch_id))
        if graph is None:
            raise HTTPException(404, f"no batch {batch_id}")
        return flow_values(graph, batch_id)

    def overview(self, request: Request) -> HTMLResponse:
        """Show queues, rates, failures and workers."""
        return self.page(request, "overview.html", live="overview", **self._overview_values())

    def workers(self, request: Request) -> HTMLResponse:
        """Show the workers."""
        return self.page(request, "workers.html", live="workers", workers=self._workers())

    def limits(self, request: Request) -> HTMLResponse:
        """Show the limits in force, what is in use of them, and the throttles."""
        return self.page(request, "limits.html", live="limits", **self._limit_values())

    def schedules(self, request: Request) -> HTMLResponse:
        """Show the schedules, their next runs, and the outcome of the latest batch of each."""
        return self.page(request, "schedules.html", live="schedules", schedules=self._schedules())

    def batches(self, request: Request) -> Response:
        """List batches by filters, the newest first; or redirect to one, by its id."""
        given = request.query_params
        if (wanted := given.get("id", "").strip()).isdecimal():
            return RedirectResponse(f"/batches/{int(wanted[:19])}", 303)
        names = ("queue", "kind", "status", "error")
        chosen = {name: given.get(name, "").strip()[:_MOST_FILTER_CHARACTERS] or None for name in names}
        if chosen["status"] not in _STATUSES:
            chosen["status"] = None
        if any("\0" in (text or "") for text in chosen.values()):
            raise HTTPException(400, "a filter contains a NUL character")
        rows, next_key, searched = self._reader.ask(reads.batch_list(before=given.get("before"), **chosen))
        return self.page(
            request, "batches.html", batches=rows, next_key=next_key, searched=searched, chosen=chosen,
            is_filtered=any(chosen.values()), is_first=not given.get("before"),
            in_bulk=bulk.verbs_for(chosen["status"]),
        )  # fmt: skip

    def batch(self, request: Request) -> HTMLResponse:
        """Show one batch: its progress, attempts, payload and failed items."""
        batch_id = _batch_id(request.path_params["id"])
        after = request.query_params.get("after", "-1")
        after_item = int(after) if after.isdecimal() and len(after) < 10 else -1
        values = self._batch_values(batch_id)
        inputs = self._reader.read("inputs", id=batch_id, most=MOST_CHARACTERS)
        items = self._reader.read("failed_items", id=batch_id, after=after_item, limit=PAGE_ROWS + 1)
        more = items[PAGE_ROWS - 1]["item_index"] if len(items) > PAGE_ROWS else None
        return self.page(
            request, "batch.html", live=f"batch/{batch_id}", inputs=inputs, most_characters=MOST_CHARACTERS,
            items=items[:PAGE_ROWS], after_item=after_item, more_items=more, **values,
        )  # fmt: skip

    def flow(self, request: Request) -> HTMLResponse:
        """Show the flow that a batch is part of: who waits for whom."""
        batch_id = _batch_id(request.path_params["id"])
        return self.page(request, "flow.html", live=f"flow/{batch_id}", **self._flow_values(batch_id))

    def audit(self, request: Request) -> HTMLResponse:
        """List the recorded actions, the newest first."""
        before = request.query_params.get("before", "")
        before_id = int(before) if before.isdecimal() and len(before) < 19 else None
        rows = self._reader.read("audit", before=before_id, limit=PAGE_ROWS + 1)
        older = rows[PAGE_ROWS - 1]["id"] if len(rows) > PAGE_ROWS else None
        return self.page(request, "audit.html", entries=rows[:PAGE_ROWS], older=older, is_first=before_id is None)


def _batch_id(text: str) -> int:
    """Return the id in an address. Raises HTTPException 404."""
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else 0
    if not 0 < number <= HIGHEST_ID:
        raise HTTPException(404, "no such batch")
    return number


def _totals(queues: list[Row]) -> dict[str, Any]:
    """Return the sums over all queues and kinds, and the longest wait."""
    names = ("ready", "scheduled", "waiting", "processing", "stalled", "failed")
    waits = [row["oldest_wait_seconds"] for row in queues if row["oldest_wait_seconds"] is not None]
    return {name: sum(row[name] for row in queues) for name in (*names, "finished_per_second")} | {
        "estimated": [name for name in names if any(name in row["estimated"] for row in queues)],
        "oldest_wait_seconds": max(waits, default=None),
    }


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
