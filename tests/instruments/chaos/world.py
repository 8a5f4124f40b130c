"""What a chaos run is made of: server, pooler, proxy, workers, producer. Every fault gets it."""

import secrets
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from batchq.postgres.migrate import migrate
from tests.instruments.chaos import flows, ledger, spans
from tests.instruments.chaos.fleet import Fleet
from tests.instruments.chaos.operator import Operator
from tests.instruments.chaos.orders import STYLES
from tests.instruments.chaos.producer import Producer
from tests.instruments.chaos.proxy import FaultyProxy
from tests.instruments.chaos.server import ROLE, GivenServer, PrivateServer, as_role
from tests.support import citus
from tests.support.layouts import lay_out, layout
from tests.support.poolers import PgBouncer
from tests.support.processes import ROOT
from tests.support.servers import Server

OLD_CODE = "1d0172d"  # deployed in turn with this checkout's; the first with migrations 0 to 9 as they are now
POOL_SIZE = 12
MOST_CLIENTS = 150
OWN_OPTIONS: dict[str, Any] = {  # of the run's own connections, whatever a fault sets for role or database
    "autocommit": True,
    "connect_timeout": 5,
    "client_encoding": "UTF8",
    "options": "-c default_transaction_read_only=off",
}
PATIENCE_SECONDS = 40.0


class Stopped(Exception):
    """The run ends."""


@dataclass
class World:
    """A run's parts. *pooler* is None where the proxy stands straight before the server.

    *longest_seconds*: how long a fault of any length may last, so that a short run has them all.
    """

    server: GivenServer
    dbname: str
    role: str
    password: str
    directory: Path
    pooler: PgBouncer | None
    proxy: FaultyProxy
    fleet: Fleet
    producer: Producer
    operator: Operator
    longest_seconds: float = 6.0
    stopping: threading.Event = field(default_factory=threading.Event)

    def hold(self, seconds: float) -> None:
        """Let a fault last. Raises Stopped if the run is broken off meanwhile."""
        if self.stopping.wait(seconds):
            raise Stopped

    def admin(self, dbname: str | None = None) -> psycopg.Connection[Any]:
        """Return a superuser's connection past pooler and proxy, as soon as the server answers."""
        until = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return psycopg.connect(self.server.dsn(dbname or self.dbname), **OWN_OPTIONS)
            except psycopg.OperationalError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)

    def code(self, commit: str) -> Path:
        """Return a directory with batchq as it was at a commit. Raises CalledProcessError where it is not at hand."""
        directory = self.directory / f"code-{commit}"
        if not directory.exists():
            archive = subprocess.run(
                ["git", "-C", ROOT, "archive", commit, "batchq", "migrations"], capture_output=True, check=True
            ).stdout
            directory.mkdir()
            subprocess.run(["tar", "-x", "-C", directory], input=archive, check=True)
            info = directory / "batchq-0.dist-info"  # older code asks for its version by this name
            info.mkdir()
            (info / "METADATA").write_text("Metadata-Version: 2.1\nName: batchq\nVersion: 0\n")
        return directory


@contextmanager
def world(
    server: GivenServer, *, workers: int, through_pooler: bool, backlog: int, styles: tuple[str, ...] = STYLES
) -> Iterator[World]:
    """Yield the whole, with workers that work; nothing of it is left at the end, but a given server."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="batchq-chaos-run-")))
        suffix = secrets.token_hex(4)
        password, dbname = secrets.token_hex(8), f"chaos_{suffix}"
        role = ROLE if isinstance(server, PrivateServer) else f"chaos_{suffix}"
        stack.callback(drop, server, dbname, role)
        make_database(server, dbname, role, password)
        upstream = Server(as_role(server.dsn(), password, role), "")
        dsn = as_role(server.dsn(dbname), password, role)
        pooler = stack.enter_context(pgbouncer(upstream)) if through_pooler else None
        proxy = stack.enter_context(FaultyProxy(pooler.dsn(dbname) if pooler else dsn))
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute(ledger.TABLES)
            conn.execute(spans.LIMITS)
            conn.execute(flows.SET_UP)
        connect = partial(psycopg.connect, server.dsn(dbname), **OWN_OPTIONS)
        producer, operator = Producer(connect, backlog), Operator(connect)
        fleet = Fleet(proxy.dsn, server.dsn(dbname), directory, workers, styles)
        its = World(server, dbname, role, password, directory, pooler, proxy, fleet, producer, operator)
        stack.enter_context(fleet)
        stack.enter_context(producer)
        stack.enter_context(operator)
        stack.callback(its.stopping.set)
        yield its


def pgbouncer(upstream: Server) -> PgBouncer:
    """Return a PgBouncer in transaction mode; what a session sets leaks to the next client."""
    return PgBouncer(
        upstream, default_pool_size=POOL_SIZE, max_client_conn=MOST_CLIENTS, server_login_retry=0.2, log_connections=0,
        log_disconnections=0, log_pooler_errors=0,
    )  # fmt: skip


def make_database(server: GivenServer, dbname: str, role: str, password: str) -> None:
    """Make a database with batchq's schema, both owned by the role that the workers log in as."""
    names = {"role": sql.Identifier(role), "dbname": sql.Identifier(dbname), "password": sql.Literal(password)}
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        if layout() == "citus":  # only a superuser may do all that is needed on the nodes
            conn.execute(sql.SQL("CREATE ROLE {role} LOGIN SUPERUSER PASSWORD {password}").format(**names))
            citus.create_database(server.server, dbname)
        else:
            conn.execute(sql.SQL("CREATE ROLE {role} LOGIN PASSWORD {password}").format(**names))
            conn.execute(sql.SQL("CREATE DATABASE {dbname} OWNER {role}").format(**names))
    migrate(as_role(server.dsn(dbname), password, role))
    lay_out(server.dsn(dbname))


def drop(server: GivenServer, dbname: str, role: str) -> None:
    """Remove database and role, from a server that goes on."""
    if isinstance(server, PrivateServer):
        return
    names = {"role": sql.Identifier(role), "dbname": sql.Identifier(dbname)}
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        if layout() == "citus":
            citus.drop_database(server.server, dbname)
        conn.execute(sql.SQL("DROP DATABASE IF EXISTS {dbname} WITH (FORCE)").format(**names))
        conn.execute(sql.SQL("DROP ROLE IF EXISTS {role}").format(**names))
