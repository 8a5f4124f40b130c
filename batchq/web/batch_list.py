"""The list of batches: tabs by status, sorts, a search, columns to choose, and rows that can be selected."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import parse_qsl, quote

import psycopg
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from batchq.common.numbers import read_whole
from batchq.postgres.statements.views import STATUSES
from batchq.web import bulk, chosen, formats, list_reads
from batchq.web.list_reads import Found, Sort
from batchq.web.pages import Pages
from batchq.web.reads import MOST_ROWS, Reader, Row
from batchq.web.search import MOST_CHARACTERS, Terms, parse, term, without
from batchq.web.view import redirect, view_of

COLUMNS = {
    "queue": "Queue", "key": "Key", "unique_key": "Unique key", "priority": "Priority", "progress": "Progress",
    "attempt": "Attempt", "age": "Age", "run_at": "Run at", "claimed_at": "Claimed at", "ended": "Ended",
    "worker": "Worker", "error": "Last error",
}  # fmt: skip
_DEFAULT_COLUMNS = ("queue", "progress", "attempt", "age", "error")
_COLUMNS_COOKIE = "batchq_columns"
_COOKIE_SECONDS = 365 * 86_400
_MOST_SUGGESTED = 100
_ERRORS_SECONDS = 10.0
_MOST_ERRORS = 8
_MOST_ERROR_CHARACTERS = 60
_TOO_LONG = "The search took too long and was stopped. Choose a status, a queue or a kind, and search again."
# Why a list has no other sorts.
_SORT_NOTES = {
    "": "The list of all batches is sorted by ID only. Choose a status for other sorts.",
    "waiting": "Waiting batches are sorted by ID only.",
    "completed": "Completed batches are sorted by ID only: no index has their times.",
    "failed": "Failed batches are sorted by the time when they ended.",
    "cancelled": "Cancelled batches are sorted by the time when they ended.",
}


@dataclass(frozen=True)
class Given:
    """What an address asks the list for. search: the text of the field. columns: as in the address; remembered: as in
    the cookie. before: the key of a page."""

    queue: str | None = None
    kind: str | None = None
    status: str | None = None
    search: str = ""
    sort: str | None = None
    columns: str | None = None
    remembered: str | None = None
    before: str | None = None

    def query(self, **changes: Any) -> str:
        """Return the query of the list's address, with changes; without the page."""
        new = replace(self, before=None, **changes)
        sort = new.sort if new.sort in [sort.name for sort in list_reads.sorts_for(new.status)[1:]] else None
        given = {"queue": new.queue, "kind": new.kind, "status": new.status, "q": new.search, "sort": sort}
        return formats.query(**given, columns=new.columns)

    @property
    def live_query(self) -> str:
        """The query of the live part's address: with the remembered columns, without the page."""
        return "&".join(filter(None, (self.query(), formats.query(remembered=self.remembered))))

    def terms(self) -> Terms:
        """Return what is searched for. Raises ValueError."""
        terms = parse(self.search)
        for name in ("queue", "kind", "status"):
            if (given := getattr(self, name)) and getattr(terms, name) not in (None, given):
                raise ValueError(f"the search asks for {name} {getattr(terms, name)}, and the list for {name} {given}")
        return replace(
            terms,
            queue=self.queue or terms.queue,
            kind=self.kind or terms.kind,
            status=self.status or terms.status,
        )

    def shown_columns(self, sort: Sort) -> list[str]:
        """Return the columns to show; the one that the list is sorted by is always among them."""
        names = (self.columns or self.remembered or "").split(".")
        wanted = names if names[0] == "id" else list(_DEFAULT_COLUMNS)
        return [name for name in COLUMNS if name in wanted or name == sort.column]


def given_of(fields: Mapping[str, str]) -> Given:
    """Return what the fields of an address ask for. "key" and "error" are terms of the search.

    Raises HTTPException 400 for NUL characters.
    """
    texts = {name: text.strip()[:MOST_CHARACTERS] or None for name, text in fields.items() if name != "q"}
    extra = " ".join(term(name, text) for name in ("key", "error") if (text := texts.get(name)))
    search = " ".join(filter(None, (fields.get("q", "").strip()[: MOST_CHARACTERS + 1], extra)))
    if any("\0" in (text or "") for text in (texts.get("queue"), texts.get("kind"), search)):
        raise HTTPException(400, "a filter contains a NUL character")
    status, sort = texts.get("status"), texts.get("sort")
    return Given(
        queue=texts.get("queue"), kind=texts.get("kind"), status=status if status in STATUSES else None, search=search,
        sort=sort if sort in [known.name for known in list_reads.SORTS] else None, before=texts.get("before"),
        columns=_columns(texts.get("columns")), remembered=_columns(texts.get("remembered")),
    )  # fmt: skip


def _columns(text: str | None) -> str | None:
    """Return names of columns, "id" first, as an address and the cookie have them; None for any other text."""
    first, *names = (text or "").split(".")
    return ".".join(["id", *(name for name in COLUMNS if name in names)]) if first == "id" else None


class BatchList:
    """Answers requests for the list."""

    def __init__(self, reader: Reader, pages: Pages) -> None:
        self._reader = reader
        self._pages = pages
        self._errors: tuple[float, list[str]] = float("-inf"), []
        pages.add_live_part("batches", self._live_values)

    def show(self, request: Request) -> Response:
        """List batches; or redirect to one, by its id."""
        fields = dict(request.query_params)
        if wanted := _id_in(fields.get("id", "")):
            return redirect(request, f"/batches/{wanted}")
        if names := request.query_params.getlist("column"):
            fields["columns"] = ".".join(["id", *names])
        fields["remembered"] = request.cookies.get(_COLUMNS_COOKIE, "") if fields.get("columns") != "default" else ""
        given = given_of(fields)
        answer = self._page(request, given)
        _remember(answer, given, fields.get("columns"), view_of(request).base)
        return answer

    def _page(self, request: Request, given: Given) -> Response:
        known = self._known()
        values: dict[str, Any] = {"suggested": self._suggested(known), "given": given, "to": given.query}
        try:
            shown = self._values(given, known)
        except ValueError as error:
            return self._problem(request, given, values, f"{str(error)[:1].upper()}{str(error)[1:]}.")
        except psycopg.errors.QueryCanceled:
            return self._problem(request, given, values, _TOO_LONG, 504)
        except psycopg.DataError as error:
            return self._problem(request, given, values, f"The search cannot be done: {error.diag.message_primary}.")
        live = f"batches/{quote(given.live_query, safe='')}" if not given.before else None
        return self._pages.page(request, "batches.html", live=live, problem=None, **values, **shown)

    def _problem(
        self, request: Request, given: Given, values: dict[str, Any], problem: str, code: int = 400
    ) -> Response:
        """Return the list without rows, with what is wrong; the fields keep their texts."""
        found = Found([], None, 0, 0)
        shown = self._shown(given, Terms(status=given.status), list_reads.sort_of(given.status, given.sort), found)
        return self._pages.page(
            request, "batches.html", code, problem=problem, tabs=[], **{**values, **shown, "in_bulk": []}
        )

    def _known(self) -> list[Row]:
        return self._reader.read("queues", limit=MOST_ROWS)

    def _live_values(self, text: str) -> dict[str, Any]:
        """Return what the live part of the first page shows. text: the query of `Given.live_query`."""
        given = replace(given_of(dict(parse_qsl(text))), before=None)
        try:
            return {"to": given.query, "given": given, **self._values(given, self._known())}
        except (ValueError, psycopg.DataError):
            raise HTTPException(404, "no such page") from None

    def _values(self, given: Given, known: list[Row]) -> dict[str, Any]:
        """Read the tabs and a page of rows. Raises ValueError."""
        terms = given.terms()
        sort = list_reads.sort_of(terms.status, given.sort)
        pairs = [(row["queue"], row["kind"]) for row in known]
        counted = self._reader.ask(list_reads.counts(terms.queue, terms.kind, known))
        found = self._reader.ask(list_reads.batch_list(terms, sort, given.before, pairs))
        return {"tabs": _tabs(given, terms, counted), **self._shown(given, terms, sort, found)}

    def _shown(self, given: Given, terms: Terms, sort: Sort, found: Found) -> dict[str, Any]:
        is_filtered = terms.is_any
        others = (terms.id, terms.unique_key, terms.worker, terms.words, terms.payload)
        of_bulk = {name: getattr(terms, name) for name in ("queue", "kind", "key", "status", "error")}
        can_bulk = is_filtered and not any(others)
        return {
            "batches": found.rows, "next_key": found.next_key, "searched": found.searched, "sort": sort,
            "columns": COLUMNS, "sorts": list_reads.sorts_for(terms.status),
            "sort_note": _SORT_NOTES.get(terms.status or ""),
            "shown_columns": given.shown_columns(sort), "is_filtered": is_filtered, "is_first": not given.before,
            "in_bulk": bulk.verbs_for(terms.status) if can_bulk else [], "of_bulk": of_bulk,
            "verbs": chosen.verbs_for(terms.status), "in_payload": terms.payload is not None,
        }  # fmt: skip

    def _latest_errors(self) -> list[str]:
        """Return the groups of the latest errors, as they were up to 10 s ago: many pages suggest them."""
        read_at, errors = self._errors
        if time.monotonic() - read_at > _ERRORS_SECONDS:
            errors = [row["error"] for row in self._reader.read("failures", limit=_MOST_ERRORS) if row["error"]]
            self._errors = time.monotonic(), errors
        return errors

    def _suggested(self, known: list[Row]) -> dict[str, list[str]]:
        """Return what the fields suggest: known queues and kinds; for the search, also statuses and latest errors."""
        queues = sorted({row["queue"] for row in known if _is_plain(row["queue"])})[:_MOST_SUGGESTED]
        kinds = sorted({row["kind"] for row in known if _is_plain(row["kind"])})[:_MOST_SUGGESTED]
        errors = self._latest_errors()
        begins = dict.fromkeys(error[:_MOST_ERROR_CHARACTERS].strip() for error in errors)
        search = [term("error", begin) for begin in begins if _is_plain(begin)]
        search += [term("status", status) for status in STATUSES]
        search += [term("kind", kind) for kind in kinds] + [term("queue", queue) for queue in queues]
        return {"queues": queues, "kinds": kinds, "search": search}


def _id_in(text: str) -> int | None:
    """Return the id that a person gave, as 5562 or 5,562; None for anything else."""
    try:
        return abs(read_whole(text[:30]))
    except ValueError:
        return None


def _is_plain(text: str) -> bool:
    """Return whether a browser can suggest a text: it is short, and no character is hidden."""
    return 0 < len(text) < MOST_CHARACTERS and formats.visible(text) == text


def _tabs(given: Given, terms: Terms, counted: dict[str, tuple[int, str]]) -> list[dict[str, Any]]:
    """Return a tab for each status: its name, count, address, and whether it is the current one."""
    space = "\N{NARROW NO-BREAK SPACE}"
    return [
        {
            "name": status or "all",
            "count": ""
            if mark == "≥" and not number
            else f"{mark}{space if mark == '≥' else ''}{formats.number(number)}",
            "has_any": number > 0,
            "query": given.query(status=status or None, search=without(given.search, "status")),
            "is_current": status == (terms.status or ""),
        }
        for status, (number, mark) in counted.items()
    ]


def _remember(answer: Response, given: Given, asked: str | None, base: str) -> None:
    """Keep the columns that were chosen, in a cookie."""
    if asked == "default":
        answer.delete_cookie(_COLUMNS_COOKIE, base or "/")
    elif given.columns:
        answer.set_cookie(
            _COLUMNS_COOKIE, given.columns, _COOKIE_SECONDS, path=base or "/", httponly=True, samesite="strict"
        )
