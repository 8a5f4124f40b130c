"""The web UI beside Django in one ASGI application, with Django's log-in and permissions."""

import hashlib
from importlib import import_module
from typing import Any

from asgiref.sync import sync_to_async
from django.conf import settings
from django.contrib.auth import get_user
from django.db import close_old_connections
from django.http import HttpRequest
from django.shortcuts import resolve_url
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse
from starlette.routing import Mount, Route, Router
from starlette.types import ASGIApp

from batchq.common.hosts import is_address
from batchq.contrib.django.project import settings_for
from batchq.web import WebApp

_MAY_ACT = "batchq may act"  # in the scope of a request


class _Session(dict[str, Any]):
    """A session's content, to be read only: Django's middleware is what changes or ends it."""

    def cycle_key(self) -> None:
        """Leave the session as it is."""

    def flush(self) -> None:
        """Leave the session as it is."""


async def user_of(request: Request) -> str | None:
    """Return "django:" and the name of the user whose session a request has, None for nobody.

    Raises HTTPException 403 for a user without the permission ``batchq.view_batch``.
    """
    name, may_look, request.scope[_MAY_ACT] = await sync_to_async(_look)(request)
    if name and not may_look:
        raise HTTPException(403, "you need the permission batchq.view_batch")
    return f"django:{name}" if name else None


def may_act(request: Request) -> bool:
    """Return whether the user of `user_of` has the permission ``batchq.operate_batch``."""
    return bool(request.scope[_MAY_ACT])


def _look(request: Request) -> tuple[str, bool, bool]:
    """Return the name of a user, "" for nobody, and whether they may look and act."""
    close_old_connections()
    try:
        key = request.cookies.get(settings.SESSION_COOKIE_NAME)
        if not key:
            return "", False, False
        asked: Any = HttpRequest()
        asked.session = _Session(import_module(settings.SESSION_ENGINE).SessionStore(key).load())
        user = get_user(asked)
        if not user.is_active:
            return "", False, False
        return user.get_username(), user.has_perm("batchq.view_batch"), user.has_perm("batchq.operate_batch")
    finally:
        close_old_connections()


def with_web_ui(application: ASGIApp, path: str = "/queue", **options: Any) -> ASGIApp:
    """Return Django's ASGI application with the web UI at *path*; for example in the project's ``asgi.py``.

    A user who is logged in needs the permission ``batchq.view_batch`` to look, and ``batchq.operate_batch`` to act.
    Others are sent to LOGIN_URL. The database is that of the workers, the host names are those of ALLOWED_HOSTS.

    options: arguments of `batchq.web.WebApp` to use instead, such as ``user_of`` or ``login_url``. Raises ConfigError.
    """
    given: dict[str, Any] = {
        "user_of": user_of, "may_act": None if "user_of" in options else may_act,
        "login_url": resolve_url(settings.LOGIN_URL), "hosts": _hosts(),
        "secret": hashlib.sha256(f"batchq.web {settings.SECRET_KEY}".encode()).hexdigest(),
    }  # fmt: skip
    dsn = options.pop("dsn", None) or settings_for(None, {}).require_dsn()
    web = WebApp(dsn, **given | options)

    def to_start(request: Request) -> RedirectResponse:
        return RedirectResponse(f"{request.scope.get('root_path', '')}{path}/")

    routes = [Route(path, to_start), Mount(path, web), Mount("", application)]
    return Router(routes, lifespan=web.lifespan)


def _hosts() -> list[str] | None:
    """Return the names of ALLOWED_HOSTS; None for any. Addresses are always allowed."""
    names = list(settings.ALLOWED_HOSTS)
    return None if "*" in names else [name for name in names if not is_address(name.strip("[]"))]
