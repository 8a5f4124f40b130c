"""The web UI as a part of an application: Starlette, FastAPI, Django under ASGI, or any other ASGI application."""

from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from batchq.errors import ConfigError
from batchq.postgres.databases import Database, read_names
from batchq.settings import Settings
from batchq.web.server import Web
from batchq.web.settings import MountedSettings
from batchq.web.several import SeveralWeb
from batchq.web.who import Application, MayAct, UserOf

_SHORTEST_SECRET = 16


class WebApp:
    """The web UI, to be mounted into an application that knows who its people are.

    For example ``Mount("/queue", WebApp(user_of=name_of))`` in Starlette, and ``api.mount("/queue", ...)`` in FastAPI.
    It connects to the database at its first request, with at most four connections.

    dsn: the database; without one, that of `BATCHQ_DSN`.

    databases: several instead: the DSN of each by its name, such as ``{"eu": ..., "us": ...}``.

    user_of: returns the name of the person who sends a request, or None: then nothing is served. It gets Starlette's
    `Request`, and must not read its body. It may raise Starlette's `HTTPException` to say why it refuses. The name is
    shown, and recorded in `batchq.audit` as the actor of everything the person does.

    may_act: returns whether that person may cancel, retry and so on; without it, everybody may whom `user_of` knows.
    Both may be `async def`. A `def` runs in a thread, so it may block.

    login_url: where a browser of somebody unknown is sent, with ``?next=`` and the page that was asked for. Without
    it, the answer is 403.

    secret: signs the forms; needed where several processes serve the application, which must all have the same one.

    hosts: host names to answer to, as in `BATCHQ_WEB_HOSTS`; others are refused. None: the application checks them.

    read_only: nobody may act. trace_url: as in `BATCHQ_WEB_TRACE_URL`.

    Raises ConfigError if no DSN is set, or if a host name, the secret or the address of traces is not usable.
    """

    def __init__(
        self,
        dsn: str | None = None,
        *,
        databases: Mapping[str, str] | None = None,
        user_of: UserOf,
        may_act: MayAct | None = None,
        login_url: str | None = None,
        secret: str = "",
        hosts: str | Iterable[str] | None = None,
        read_only: bool = False,
        trace_url: str = "",
    ) -> None:
        if secret and len(secret) < _SHORTEST_SECRET:
            raise ConfigError(f"the secret needs at least {_SHORTEST_SECRET} characters; run: openssl rand -hex 24")
        settings = MountedSettings.load(hosts=hosts or (), read_only=read_only, trace_url=trace_url)
        application = Application(user_of, may_act, login_url, secret, checks_host=hosts is not None)
        self._web: Web | SeveralWeb
        if databases:
            several = [Database(name, text) for name, text in zip(_checked(databases), databases.values(), strict=True)]
            self._web = SeveralWeb(several, settings, application=application)
        else:
            self._web = Web(dsn or Settings.load().require_dsn(), settings, application=application)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request. Also answers the messages of a lifespan, and closes the connections at its end."""
        if scope["type"] == "http":
            self._web.allow()
        await self._web.guard(scope, receive, send)

    @asynccontextmanager
    async def lifespan(self, _: Any = None) -> AsyncIterator[None]:
        """Close the connections at the end of the block. For example ``Starlette(lifespan=web.lifespan)``."""
        try:
            yield
        finally:
            await run_in_threadpool(self.close)

    def close(self) -> None:
        """Close the connections. The next request would open others."""
        self._web.close()


def _checked(names: Iterable[str]) -> tuple[str, ...]:
    """Return names of databases. Raises ConfigError for one that cannot be."""
    try:
        return tuple(dict.fromkeys(read_names(",".join(names))))
    except ValueError as error:
        raise ConfigError(f"databases: {error}") from None
