"""A web UI of a test's own: the application served by uvicorn in a thread, and a client that has logged in."""

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from html import unescape
from typing import Any

import httpx
import uvicorn

from batchq.web.server import Web, server_of
from batchq.web.settings import WebSettings
from tests.support.waiting import wait_until

PASSWORD = "correct horse battery"
START_SECONDS = 30.0
READ_SECONDS = 30.0


class Site:
    """A web UI that is served, and a browser-like client of it."""

    def __init__(self, web: Web, port: int, server: uvicorn.Server) -> None:
        self.web = web
        self.server = server
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.client = self.new_client()

    def new_client(self, **headers: str) -> httpx.Client:
        """Return another client, with no cookie yet."""
        return httpx.Client(base_url=self.url, timeout=READ_SECONDS, headers=headers, trust_env=False)

    def form_token(self, path: str, client: httpx.Client | None = None) -> str:
        """Return the token of the form on a page."""
        found = re.search(r'name="form_token" value="(\w+)"', (client or self.client).get(path).text)
        assert found, f"no form on {path}"
        return found[1]

    def log_in(self, password: str = PASSWORD, client: httpx.Client | None = None) -> httpx.Response:
        """Give the password."""
        client = client or self.client
        return self.post("/login", self.form_token("/login", client), client=client, password=password)

    def post(
        self,
        path: str,
        form_token: str,
        client: httpx.Client | None = None,
        origin: str | None = None,
        **fields: object,
    ) -> httpx.Response:
        """Send a form, as a browser does."""
        data = {name: str(value) for name, value in fields.items()} | {"form_token": form_token}
        return (client or self.client).post(path, data=data, headers={"Origin": origin or self.url})

    def do(self, verb: str, target: str = "", **fields: object) -> httpx.Response:
        """Do a verb, by the form of the page that asks."""
        return self.post(f"/verbs/{verb}", self.form_token(f"/verbs/{verb}{target}"), **fields)


def text_of(site: Site, path: str) -> str:
    """Return the text of a page's main part, with one space between words."""
    answer = site.client.get(path)
    assert answer.status_code == 200, answer.text
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", answer.text.partition("<main")[2])).split())


def answers(url: str) -> bool:
    """Return whether a URL answers with 200."""
    try:
        return httpx.get(url, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def served(dsn: str, read_seconds: float = 20.0, every_seconds: float = 0.1, **settings: Any) -> Iterator[Site]:
    """Serve the web UI while the block runs."""
    web = Web(dsn, WebSettings.load(**settings), read_seconds, every_seconds)
    web.live.share = 1  # a busy machine makes reads slow, and what is waited for comes all the same
    server = server_of(web)
    with running(server) as port:
        site = Site(web, port, server)
        try:
            yield site
        finally:
            site.client.close()


@contextmanager
def running(server: uvicorn.Server) -> Iterator[int]:
    """Run a server in a thread while the block runs; yield its port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server.config.timeout_graceful_shutdown = 1
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            wait_until(lambda: server.started or not thread.is_alive(), START_SECONDS, "the web UI to be served")
            assert server.started, "the web UI could not be served"
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(START_SECONDS)
            with suppress(OSError):
                listening.close()


@contextmanager
def hosted(application: Any, **options: Any) -> Iterator[str]:
    """Serve an ASGI application while the block runs; yield its address, without a slash at the end."""
    config = uvicorn.Config(application, log_level="error", proxy_headers=False, **options)
    with running(uvicorn.Server(config)) as port:
        yield f"http://127.0.0.1:{port}"
