"""Who sends a request: what an application's log-in, or a trusted proxy, says about a person."""

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from batchq.common.hosts import Network, Seldom, is_within
from batchq.common.log import get_logger

_MOST_CHARACTERS = 200

UserOf = Callable[[Request], str | Awaitable[str | None] | None]
MayAct = Callable[[Request], bool | Awaitable[bool]]

_log = get_logger()
_name_reported = Seldom()


@dataclass(frozen=True)
class Person:
    """A person who is let in. name: the actor of what they do, None if nobody has said it."""

    name: str | None = None
    is_read_only: bool = False


@dataclass(frozen=True)
class Application:
    """The application that the web UI is mounted in, which knows who its people are; see `batchq.web.WebApp`."""

    user_of: UserOf
    may_act: MayAct | None = None
    login_url: str | None = None
    secret: str = ""
    checks_host: bool = False

    async def person_of(self, request: Request) -> Person | None:
        """Return who sends a request; None for nobody. Raises TypeError if user_of returns anything but a text."""
        given = await _call(self.user_of, request)
        if given is not None and not isinstance(given, str):
            raise TypeError(f"user_of must return a name or None, not {type(given).__name__}; return its name")
        if (name := usable_name(given)) is None:
            return None
        return Person(name, is_read_only=self.may_act is not None and not await _call(self.may_act, request))


async def _call(function: Callable[[Request], Any], request: Request) -> Any:
    """Return what a function of the application returns. One that is not async may block: it runs in a thread."""
    if inspect.iscoroutinefunction(function):
        return await function(request)
    given = await run_in_threadpool(function, request)
    return await given if inspect.isawaitable(given) else given


def name_from_proxy(request: Request, header: str, proxies: tuple[Network, ...]) -> str | None:
    """Return the name that a trusted proxy gives in a header; None if anybody else connects, or if it gives two."""
    values = request.headers.getlist(header)
    if len(values) != 1 or not is_within(request.client.host if request.client else "", proxies):
        return None
    raw = values[0].encode("latin-1")
    try:
        return usable_name(raw.decode())
    except UnicodeDecodeError:
        return usable_name(values[0])


def usable_name(given: str | None) -> str | None:
    """Return a name as the audit records it; None, with a line in the log, for one that cannot be shown or is long."""
    name = (given or "").strip()
    if name and (len(name) > _MOST_CHARACTERS or not name.isprintable()):
        if _name_reported():
            _log.warning("person refused: the name is too long or has hidden characters", name=ascii(name[:50]))
        return None
    return name or None
