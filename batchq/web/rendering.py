"""How the pages of the web UI are rendered: the templates, what all of them show, and their live parts."""

import functools
from collections.abc import Callable
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse

from batchq.common.numbers import counted
from batchq.operate.limits import number_text, origin_text, use_text
from batchq.operate.schedules import ACTIONS, origin_of, rules_of, upcoming, words_of
from batchq.operate.verbs import VERBS
from batchq.postgres.statements.views import STATUSES
from batchq.web import formats
from batchq.web.guard import guard_of
from batchq.web.nav import ALL_PAGES, databases_beside, groups_on, pages_beside
from batchq.web.view import View, path_of, view_of

Values = Callable[[str], dict[str, Any]]

_DONE = {name: verb.title.lower() for name, verb in VERBS.items()} | {
    "set_limit": "change limit", "set_schedule": "set schedule",
    **{f"{action.name}_schedule": action.title.lower() for action in ACTIONS.values()},
}  # fmt: skip


@functools.cache
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
        "duration": formats.duration, "ago": formats.ago, "number": formats.number, "counted": counted,
        "percent": formats.percent, "items": formats.items, "shares": formats.shares,
        "query": lambda given: formats.query(**given), "as_it_is": _as_it_is,
    }  # fmt: skip
    made.globals |= {"count": formats.count, "link": formats.query, "statuses": STATUSES}
    made.globals |= {"use": use_text, "number_text": number_text, "origin": origin_text}
    made.globals |= {"groups_on": groups_on, "pages_beside": pages_beside, "all_pages": ALL_PAGES}
    made.globals |= {"in_words": words_of, "rules": rules_of, "upcoming": upcoming, "schedule_origin": origin_of}
    return made


def _as_it_is(text: str | None) -> Markup:
    """Return a text for a field that is sent back: escaped, but with its hidden characters."""
    return escape(text or "")


class Rendering:
    """Renders pages. Its methods block; Starlette calls them in threads."""

    def __init__(self) -> None:
        self._templates = _environment()
        self._live_parts: dict[str, Values] = {}

    def page(self, request: Request, template: str, code: int = 200, **values: Any) -> HTMLResponse:
        """Return a whole page."""
        guard, view = guard_of(request), view_of(request)
        text = self._render(
            template,
            view,
            path=path_of(request),
            databases=databases_beside(request.scope.get("databases", ()), view.database, path_of(request)),
            has_login=guard.has_login,
            who=view.user,
            form_token=guard.form_token(request),
            done=_DONE.get(request.query_params.get("said", "")),
            **values,
        )
        return HTMLResponse(text, code)

    def problem(self, request: Request, code: int, text: str) -> HTMLResponse:
        """Return a page that says what went wrong."""
        return self.page(request, "problem.html", code, title=text[:1].upper() + text[1:])

    def _render(self, template: str, view: View, **values: Any) -> str:
        return self._templates.get_template(template).render(
            base=view.base, home=view.home, database=view.database, read_only=view.is_read_only, **values
        )

    def add_live_part(self, name: str, values: Values) -> None:
        """Have a live part of a page: NAME or NAME/TEXT in its address, shown by NAME_live.html.

        values: returns what the template shows, from the text in the address; raises HTTPException 404.
        """
        self._live_parts[name] = values

    def live_part(self, address: str, view: View) -> str:
        """Return the live part of a page, such as "overview" or "batch/5". Raises HTTPException 404."""
        name, _, text = address.partition("/")
        if name not in self._live_parts:
            raise HTTPException(404, "no such page")
        return self._render(f"{name}_live.html", view, **self._live_parts[name](text))
