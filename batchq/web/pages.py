"""The pages: what each reads, and the template that shows it. A page's live part is a template of its own."""

from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from batchq.operate.verbs import VERBS, Verb
from batchq.web import bulk, charts, reads, shown
from batchq.web.auth import Guard
from batchq.web.reads import HIGHEST_ID, MOST_CHARACTERS, MOST_ROWS, PAGE_ROWS, Reader, Row

STATUSES = ("ready", "scheduled", "retrying", "processing", "stalled", "completed", "failed", "cancelled")
MOST_FAILURES = 12


def environment() -> Environment:
    """Return what renders: everything is escaped, and hidden characters are spelled out."""
    made = Environment(
        loader=PackageLoader("batchq.web"),
        autoescape=True,
        finalize=shown.visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "duration": shown.duration, "number": shown.number, "percent": shown.percent, "worked": shown.worked,
        "query": lambda given: shown.query(**given), "as_it_is": as_it_is,
    }  # fmt: skip
    made.globals |= {"count": shown.count, "link": shown.query, "statuses": STATUSES}
    return made


def as_it_is(text: str | None) -> Markup:
    """Return a text for a field that is sent back: escaped, its hidden characters kept."""
    return escape(text or "")


class Pages:
    """Makes pages. Its methods block; Starlette calls them in threads."""

    def __init__(self, reader: Reader, read_only: bool) -> None:
        self.reader = reader
        self.read_only = read_only
        self.templates = environment()

    def render(self, template: str, **values: Any) -> str:
        """Return a template filled in."""
        return self.templates.get_template(template).render(read_only=self.read_only, **values)

    def page(self, request: Request, template: str, code: int = 200, **values: Any) -> HTMLResponse:
        """Answer with a whole page."""
        guard: Guard = request.scope["guard"]
        text = self.render(
            template,
            path=request.url.path,
            has_login=bool(guard.settings.secrets),
            form_token=guard.sessions.form_token(request.scope["session"]),
            said=VERBS.get(request.query_params.get("said", "")),
            **values,
        )
        return HTMLResponse(text, code)

    # -------------------------------------------------------------------------------------------------- live parts

    def live_part(self, name: str) -> str:
        """Return the live part of a page: overview, workers, or batch/ID. Raises HTTPException 404."""
        if name == "overview":
            return self.render("overview_live.html", **self.overview_values())
        if name == "workers":
            return self.render("workers_live.html", workers=self.reader.read("workers", limit=MOST_ROWS))
        return self.render("batch_live.html", **self.batch_values(batch_id_of(name.removeprefix("batch/"))))

    def overview_values(self) -> dict[str, Any]:
        """Read the overview."""
        queues = self.reader.read("queues", limit=MOST_ROWS)
        minutes = self.reader.read("minutes")
        return {
            "queues": queues,
            "bars": charts.bars(minutes),
            "sparks": charts.sparks(minutes),
            "failures": self.reader.read("failures", limit=MOST_FAILURES),
            "workers": self.reader.read("workers", limit=MOST_ROWS),
            "pauses": self.reader.read("pauses"),
            "totals": totals(queues),
        }

    def batch_values(self, batch_id: int) -> dict[str, Any]:
        """Read a batch, but its input. Raises HTTPException 404."""
        found = self.reader.read("batch", id=batch_id)
        if not found:
            raise HTTPException(404, f"there is no batch {batch_id}")
        batch = found[0]
        errors = self.reader.read("errors", id=batch_id)
        return {"batch": batch, "errors": errors, "left_seconds": left_seconds(batch), "actions": actions(batch)}

    # ------------------------------------------------------------------------------------------------------- pages

    def overview(self, request: Request) -> HTMLResponse:
        """Queues, rates, failures and workers."""
        return self.page(request, "overview.html", live="overview", **self.overview_values())

    def workers(self, request: Request) -> HTMLResponse:
        """The workers that live, or were seen within the hour."""
        return self.page(request, "workers.html", live="workers", workers=self.reader.read("workers", limit=MOST_ROWS))

    def batches(self, request: Request) -> Response:
        """Batches, the newest first, by filters; or straight to one, by its id."""
        given = request.query_params
        if (wanted := given.get("id", "").strip()).isdecimal():
            return RedirectResponse(f"/batches/{int(wanted[:19])}", 303)
        chosen = {name: given.get(name, "").strip()[:300] or None for name in ("queue", "kind", "status", "error")}
        if chosen["status"] not in STATUSES:
            chosen["status"] = None
        if any("\0" in (text or "") for text in chosen.values()):
            raise HTTPException(400, "a filter has a NUL character")
        question = reads.batch_list(before=given.get("before"), **chosen)
        rows, next_key, looked_at = self.reader.ask(question)
        return self.page(
            request, "batches.html", batches=rows, next_key=next_key, looked_at=looked_at, chosen=chosen,
            is_filtered=any(chosen.values()), is_first=not given.get("before"),
            in_bulk=bulk.verbs_for(chosen["status"]),
        )  # fmt: skip

    def batch(self, request: Request) -> HTMLResponse:
        """One batch: where it stands, its attempts, its input, its failed items."""
        batch_id = batch_id_of(request.path_params["id"])
        after = request.query_params.get("after", "-1")
        after_item = int(after) if after.isdecimal() and len(after) < 10 else -1
        values = self.batch_values(batch_id)
        inputs = self.reader.read("inputs", id=batch_id, most=MOST_CHARACTERS)
        items = self.reader.read("failed_items", id=batch_id, after=after_item, limit=PAGE_ROWS + 1)
        more = items[PAGE_ROWS - 1]["item_index"] if len(items) > PAGE_ROWS else None
        return self.page(
            request, "batch.html", live=f"batch/{batch_id}", inputs=inputs, most_characters=MOST_CHARACTERS,
            items=items[:PAGE_ROWS], after_item=after_item, more_items=more, **values,
        )  # fmt: skip

    def schedules(self, request: Request) -> HTMLResponse:
        """The place of schedules."""
        return self.page(request, "schedules.html")

    def audit(self, request: Request) -> HTMLResponse:
        """What people did, and why."""
        before = request.query_params.get("before", "")
        before_id = int(before) if before.isdecimal() and len(before) < 19 else None
        rows = self.reader.read("audit", before=before_id, limit=PAGE_ROWS + 1)
        older = rows[PAGE_ROWS - 1]["id"] if len(rows) > PAGE_ROWS else None
        return self.page(request, "audit.html", entries=rows[:PAGE_ROWS], older=older, is_first=before_id is None)


def batch_id_of(text: str) -> int:
    """Return the id of a batch. Raises HTTPException 404."""
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else 0
    if not 0 < number <= HIGHEST_ID:
        raise HTTPException(404, "there is no such batch")
    return number


def totals(queues: list[Row]) -> dict[str, Any]:
    """Return the sums over all queues and kinds, and the longest wait."""
    names = ("ready", "scheduled", "processing", "stalled", "failed")
    sums: dict[str, Any] = {name: sum(row[name] for row in queues) for name in names}
    waits = [row["oldest_wait_seconds"] for row in queues if row["oldest_wait_seconds"] is not None]
    sums["estimated"] = [name for name in names if any(name in row["estimated"] for row in queues)]
    sums["oldest_wait_seconds"] = max(waits, default=None)
    sums["finished_per_second"] = sum(row["finished_per_second"] for row in queues)
    return sums


def left_seconds(batch: Row) -> float | None:
    """Return about how long a batch will go on, by the pace of its first attempt; None where that tells nothing."""
    worked = shown.worked(batch)
    is_told = batch["status"] == "processing" and batch["items_total"] and worked and batch["attempt"] == 1
    if not is_told or not batch["running_seconds"]:
        return None
    return float((batch["items_total"] - worked) * batch["running_seconds"] / worked)


def actions(batch: Row) -> list[Verb]:
    """Return the verbs that would change a batch in its current status, the grave ones last."""
    offered = [verb for verb in VERBS.values() if verb.is_offered(batch["status"], batch["items_failed"])]
    return sorted(offered, key=lambda verb: verb.is_grave)
