"""Several databases: two of the session's server, two servers that can be stopped, and one that never answers."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

import batchq
from batchq.postgres import embedded, migrate
from batchq.postgres.databases import Database
from batchq.postgres.embedded import EmbeddedServer
from batchq.web.server import server_of
from batchq.web.settings import WebSettings
from batchq.web.several import SeveralWeb
from tests.support.servers import SETTINGS, free_port, open_directory
from tests.support.waiting import wait_until
from tests.support.web import Site, running

app = batchq.App()
PASSWORD = "not-to-be-seen-anywhere"


@app.handler("noop")
def noop(_: batchq.Batch) -> None:
    """Do nothing."""


def away_dsn() -> str:
    """Return the DSN of a server that is not there, with a password."""
    return f"postgresql://ann:{PASSWORD}@127.0.0.1:{free_port()}/shop"


@contextmanager
def deaf_dsn() -> Iterator[str]:
    """Yield the DSN of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"host=127.0.0.1 port={listening.getsockname()[1]} user=ann dbname=shop"


def variables(**dsns: str) -> dict[str, str]:
    """Return what names several databases in the environment."""
    return {"BATCHQ_DATABASES": ",".join(dsns), **{f"BATCHQ_DSN_{name.upper()}": dsn for name, dsn in dsns.items()}}


def settings(**dsns: str) -> dict[str, object]:
    """Return the same as settings of `Processes.run`."""
    return {name.removeprefix("BATCHQ_").lower(): text for name, text in variables(**dsns).items()}


def wait_until_done(conn: psycopg.Connection[Any], batch_id: int) -> None:
    """Wait until a batch is completed."""

    def status() -> Any:
        return conn.execute("SELECT status FROM batchq.batches WHERE id = %s", [batch_id]).fetchone()

    wait_until(lambda: status() == ("completed",), 60, f"batch {batch_id} to be completed")


@contextmanager
def two_servers() -> Iterator[tuple[EmbeddedServer, EmbeddedServer]]:
    """Yield two servers of a test's own, with batchq's schema. They may be stopped, and started by `open`."""
    with open_directory() as directory:
        servers = []
        try:
            for name in ("eu", "us"):
                own = directory / name
                own.mkdir(mode=0o755)
                servers.append(embedded.start(own, SETTINGS))
                migrate.migrate(servers[-1].dsn())
            yield servers[0], servers[1]
        finally:
            for server in servers:
                if server._is_running():
                    server.stop()


@contextmanager
def served_several(every_seconds: float = 0.1, read_seconds: float = 20.0, **dsns: str) -> Iterator[Site]:
    """Serve the web UI of several databases while the block runs."""
    with served_databases([Database(name, dsn) for name, dsn in dsns.items()], every_seconds, read_seconds) as site:
        yield site


@contextmanager
def served_databases(
    databases: list[Database], every_seconds: float = 0.1, read_seconds: float = 20.0, **settings: object
) -> Iterator[Site]:
    """Serve the web UI of several databases with some settings while the block runs."""
    web = SeveralWeb(databases, WebSettings.load(**settings), read_seconds, every_seconds)
    web.live.share = 1
    server = server_of(web)
    with running(server) as port:
        site = Site(web, port, server)  # type: ignore[arg-type]
        try:
            yield site
        finally:
            site.client.close()
