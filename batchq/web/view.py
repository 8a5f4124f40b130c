"""How one person sees the web UI: under which address it is mounted, who they are, and whether they may act."""

import re
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse
from starlette.types import Scope

from batchq.web.formats import query
from batchq.web.who import Person

_NO_BASE = re.compile(r"(?!/)|.*//|.*/\.{1,2}(/|$)|.*[\\\x00-\x1f\x7f]", re.DOTALL)
_UNQUOTED = "/:@!$&'()*+,=~"  # no ";", which would end a cookie's path


@dataclass(frozen=True)
class View:
    """base: the address under which the web UI is mounted, "" or for example "/admin/queue". user: the name of the
    person, if the application or a proxy has said it; live parts, which many people share, have none.

    database: the name of the one that is shown, of several; its pages are below an address of their own. home: the
    address above it, of all databases; that of the web UI if there is only one.
    """

    base: str
    is_read_only: bool
    user: str | None = None
    database: str | None = None
    home: str = ""


def place_of(scope: Scope, root_path: str = "") -> tuple[str, str]:
    """Return where a request is: the address of the web UI ("" or "/queue"), and that within it ("/batches/5").

    root_path: the prefix behind a proxy, if the server does not know it. The path may have the prefix or not: some
    proxies strip it. Of a mounted web UI, they may also strip only the part that stands before the application's own.
    Raises ValueError for a prefix that a browser would read as something else, such as "//evil.example".
    """
    base: str = scope.get("root_path", "").rstrip("/") or root_path
    if base and _NO_BASE.match(base):
        raise ValueError("the address of the web UI is not usable")
    path: str = scope["path"]
    own = base.removeprefix(scope.get("app_root_path", "").rstrip("/"))
    for prefix in (base, own):
        if path == prefix or path.startswith(f"{prefix}/"):
            return base, path[len(prefix) :] or "/"
    return base, path


def view_of(request: Request) -> View:
    """Return how the person who sent a request sees the web UI."""
    person: Person = request.scope["person"]
    read_only = person.is_read_only or request.scope["guard"].settings.read_only
    base, home = request.scope["root_path"], request.scope.get("home", request.scope["root_path"])
    return View(
        quote(base, safe=_UNQUOTED), read_only, person.name, request.scope.get("database"), quote(home, safe=_UNQUOTED)
    )


def path_of(request: Request) -> str:
    """Return the address of a request within the web UI, such as "/batches/5"."""
    return place_of(request.scope)[1]


def redirect(request: Request, address: str) -> RedirectResponse:
    """Return the answer that sends a browser to an address of the web UI, such as "/batches/5"."""
    return RedirectResponse(view_of(request).base + address, 303)


def refuse_if_read_only(request: Request) -> None:
    """Raise HTTPException 403 if the person may look only."""
    if view_of(request).is_read_only:
        raise HTTPException(403, why_read_only(request))


def why_read_only(request: Request) -> str:
    """Return what is answered to a person who may look only and wants to act."""
    is_all = request.scope["guard"].settings.read_only
    return f"no actions: {'the web UI is read-only' if is_all else 'you may look, but not change anything'}"


def live_address(name: str, **given: str | None) -> str:
    """Return the address of a live part that is of something with names, such as a queue and a kind: any characters."""
    return f"{name}/{quote(query(**given), safe='')}"


def names_in(text: str, *wanted: str) -> dict[str, str | None]:
    """Return the names in the address of a live part; None for one that is not there. Raises HTTPException 404."""
    found = dict(parse_qsl(text))
    return {name: without_nul(found.get(name, "")) or None for name in wanted}


def without_nul(text: str) -> str:
    """Return a name that a person gave. Raises HTTPException 404 if it has a NUL character, which no name has."""
    if "\0" in text:
        raise HTTPException(404, "no name contains a NUL character")
    return text
