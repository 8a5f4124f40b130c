"""A small transaction-mode pooler that behaves like Supavisor and records each breach of its contract.

    with SupaSim("host=127.0.0.1 user=app dbname=app") as sim:
        conn = psycopg.connect(sim.dsn())  # the user is "app.tenant", as on Supabase
        ...
        assert sim.settled() == []

Each transaction goes to the backend that rested longest, so that two transactions of one client in a
row never share a backend. Nothing is reset between clients: state left on a backend leaks to the next
one. The rules look at the text of the SQL only: a SET inside a function is not seen.
"""

import asyncio
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn, Self

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

TENANT = "tenant"
ALLOWED_STARTUP_PARAMETERS = {"user", "database", "application_name", "client_encoding"}
MAX_STARTUP_BYTES = 1024
MAX_SQL_BYTES = 16 * 1024  # RDS Proxy pins a client that sends more
REFUSAL_SECONDS = 0.5  # how long Supavisor thinks before it refuses a login

CANCEL_REQUEST, SSL_REQUEST, GSS_REQUEST = 80877102, 80877103, 80877104
REPORTED_PARAMETERS = [
    "server_version",
    "server_encoding",
    "client_encoding",
    "application_name",
    "DateStyle",
    "IntervalStyle",
    "TimeZone",
    "integer_datetimes",
    "standard_conforming_strings",
]


class Breach(NamedTuple):
    """One breach of the contract: the name of the rule, and what broke it."""

    rule: str
    what: str


def _rule(name: str, pattern: str) -> tuple[str, re.Pattern[str]]:
    return name, re.compile(pattern, re.IGNORECASE | re.DOTALL)


SQL_PREPARE = r"^\s*(PREPARE\s+(?!TRANSACTION\b)|EXECUTE\s|DEALLOCATE\b)"
SQL_RULES = [
    _rule("LISTEN", r"^\s*(UN)?LISTEN\b"),
    _rule("SESSION_SET", r"^\s*SET\s+(?!LOCAL\b|TRANSACTION\b|CONSTRAINTS\b)"),
    _rule("SESSION_SET", r"\bset_config\s*\([^()]*,\s*(false|'f'|'false'|0)\s*\)"),
    _rule("SESSION_SET", r"^\s*RESET\b"),
    _rule("SESSION_LOCK", r"\bpg_(try_)?advisory_(lock|unlock)(_shared|_all)?\s*\("),
    _rule("TEMP", r"^\s*CREATE\s+((LOCAL|GLOBAL)\s+)?TEMP(ORARY)?\b(?!.*ON\s+COMMIT\s+DROP)"),
    _rule("HOLD_CURSOR", r"\bCURSOR\s+WITH\s+HOLD\b"),
    _rule("SQL_PREPARE", SQL_PREPARE),
    _rule("DISCARD", r"^\s*DISCARD\b"),
    _rule("LOAD", r"^\s*LOAD\s"),
    _rule("SEQUENCE_FN", r"\b(nextval|currval|lastval|setval)\s*\("),
]
IS_SQL_PREPARE = re.compile(SQL_PREPARE, re.IGNORECASE)
ENDS_TRANSACTION = re.compile(r"\s*(COMMIT|END|ROLLBACK(?!\s+TO))\b", re.IGNORECASE)
SETS_LOCALLY = re.compile(r"\s*SET\s+LOCAL\b", re.IGNORECASE)


class DisconnectError(Exception):
    """The client's connection ends here."""


class SupaSim:
    """The pooler: listens on a free port of 127.0.0.1 in a thread of its own.

    *upstream* is the conninfo of the one database behind it. With *password* clients must give it.
    """

    def __init__(
        self,
        upstream: str,
        *,
        pool_size: int = 2,
        max_clients: int = 100,
        checkout_timeout_seconds: float = 15.0,
        client_idle_timeout_seconds: float | None = None,
        password: str | None = None,
    ) -> None:
        parts = conninfo_to_dict(upstream)
        self.database, self.user = str(parts["dbname"]), str(parts["user"])
        self.pool = BackendPool(upstream, pool_size, checkout_timeout_seconds)
        self.max_clients = max_clients
        self.client_idle_timeout_seconds = client_idle_timeout_seconds
        self.password = password
        self.clients: dict[bytes, Client] = {}
        self.breaches: list[Breach] = []
        self.port = 0

    def __enter__(self) -> Self:
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="supasim", daemon=True)
        self._thread.start()
        if not self._ready.wait(5):
            raise TimeoutError("the pooler simulator did not start")
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(5)

    def dsn(self, **changes: object) -> str:
        """Return the conninfo for clients, with *changes*."""
        given = {
            "host": "127.0.0.1",
            "port": self.port,
            "dbname": self.database,
            "user": f"{self.user}.{TENANT}",
            "password": self.password or "x",
            "sslmode": "disable",
            "gssencmode": "disable",
        }
        return make_conninfo(**given | changes)

    def settled(self, wait_seconds: float = 0.05) -> list[Breach]:
        """Return the breaches so far, after a moment.

        A trailing Flush arrives after psycopg's call has returned.
        """
        time.sleep(wait_seconds)
        return self.breaches

    def kill_backends(self, busy: bool = True, idle: bool = True) -> None:
        """Break the connections to the database: a busy client sees a bare EOF, an idle one nothing."""
        self._call(lambda: self.pool.kill(busy, idle))

    def drop_clients(self, error: bool = True) -> None:
        """Break the connections of all clients as a restart of the pooler does: with 57P01, or a bare EOF."""

        def drop() -> None:
            for client in list(self.clients.values()):
                client.drop(error)

        self._call(drop)

    def record(self, rule: str, what: str) -> None:
        """Note a breach."""
        self.breaches.append(Breach(rule, what[:120]))

    def _call(self, function: Callable[[], None]) -> None:
        async def call() -> None:
            function()

        asyncio.run_coroutine_threadsafe(call(), self._loop).result(5)

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for client in list(self.clients.values()):
            client.drop(error=False)
        self.pool.kill(busy=True, idle=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = Client(self, reader, writer)
        with suppress(DisconnectError, EOFError, OSError, asyncio.CancelledError, psycopg.OperationalError):
            await client.run()
        await client.leave()


class Backend:
    """A connection to the database: libpq logs in, then its socket is spoken to directly."""

    def __init__(self, login: psycopg.AsyncConnection[Any], stream: "Stream") -> None:
        self.login = login
        self.reader, self.writer = stream
        self.idle_since = 0.0

    @classmethod
    async def connect(cls, conninfo: str) -> "Backend":
        """Log in to the database."""
        plain = make_conninfo(conninfo, sslmode="disable", gssencmode="disable", application_name="Supavisor")
        login = await psycopg.AsyncConnection.connect(plain, autocommit=True)
        stream = await asyncio.open_connection(sock=socket.socket(fileno=os.dup(login.fileno())))
        return cls(login, stream)

    def parameters(self) -> bytes:
        """Return its ParameterStatus messages."""
        values = ((name, self.login.pgconn.parameter_status(name.encode())) for name in REPORTED_PARAMETERS)
        return b"".join(message(b"S", name.encode() + b"\0" + value + b"\0") for name, value in values if value)

    def is_alive(self) -> bool:
        """Return whether the connection stands."""
        return not self.reader.at_eof() and not self.writer.is_closing()

    def close(self) -> None:
        """End the connection; a statement that is running runs on to its end."""
        self.login.pgconn.finish()
        self.writer.close()


Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class BackendPool:
    """At most *size* backends, handed out in turn."""

    def __init__(self, conninfo: str, size: int, checkout_timeout_seconds: float) -> None:
        self.conninfo, self.size = conninfo, size
        self.checkout_timeout_seconds = checkout_timeout_seconds
        self.free: list[Backend] = []
        self.all: set[Backend] = set()
        self.changed = asyncio.Condition()
        self._parameters: bytes | None = None

    async def parameters(self) -> bytes:
        """Return what clients are told at login: the ParameterStatus of the first backend, cached."""
        if self._parameters is None:
            backend = await self.take()
            self._parameters = backend.parameters()
            await self.give_back(backend)
        return self._parameters

    async def take(self) -> Backend:
        """Return a backend for one transaction; raise TimeoutError when all stay busy."""
        async with asyncio.timeout(self.checkout_timeout_seconds), self.changed:
            while not self._has_one():
                await self.changed.wait()
            return await self._take_now()

    async def give_back(self, backend: Backend) -> None:
        """Take *backend* back."""
        async with self.changed:
            backend.idle_since = time.monotonic()
            self.free.append(backend)
            self.changed.notify()

    async def discard(self, backend: Backend) -> None:
        """Close *backend*, whose client vanished."""
        async with self.changed:
            self.all.discard(backend)
            backend.close()
            self.changed.notify()

    def kill(self, busy: bool, idle: bool) -> None:
        """Close the backends that are busy, idle, or both."""
        for backend in list(self.all):
            if idle if backend in self.free else busy:
                backend.close()

    def _has_one(self) -> bool:
        self.all = {backend for backend in self.all if backend.is_alive()}
        self.free = [backend for backend in self.free if backend in self.all]
        return bool(self.free) or len(self.all) < self.size

    async def _take_now(self) -> Backend:
        if len(self.all) < self.size:
            backend = await Backend.connect(self.conninfo)
            self.all.add(backend)
            return backend
        backend = min(self.free, key=lambda candidate: candidate.idle_since)
        self.free.remove(backend)
        return backend


class Client:
    """The pooler's side of one client connection."""

    def __init__(self, sim: SupaSim, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.sim, self.reader, self.writer = sim, reader, writer
        self.cancel_key = os.urandom(8)
        self.backend: Backend | None = None
        self.answering: asyncio.Task[None] | None = None
        self.outstanding = 0  # messages that a ReadyForQuery will answer
        self.in_transaction = False

    async def run(self) -> None:
        """Serve the client until it leaves."""
        parameters = await self._start_up()
        await self._authenticate(parameters)
        await self._greet()
        while True:
            await self._relay(*await self._next_message())

    async def leave(self) -> None:
        """Clean up after the client has gone."""
        self.sim.clients.pop(self.cancel_key, None)
        if self.answering:
            self.answering.cancel()
        if self.backend:
            await self.sim.pool.discard(self.backend)
        self.writer.close()

    def drop(self, error: bool) -> None:
        """Break the connection, with an error message or without."""
        if error:
            self.writer.write(fatal("57P01", "terminating connection due to administrator command"))
        self.writer.close()

    # Start-up

    async def _start_up(self) -> dict[str, str]:
        """Return the start-up parameters; a request to cancel is carried out instead."""
        while True:
            size, code = struct.unpack("!II", await self.reader.readexactly(8))
            body = await self.reader.readexactly(size - 8)
            if code == SSL_REQUEST:
                self.writer.write(b"N")
            elif code == CANCEL_REQUEST:
                await self._cancel(body)
            elif code == GSS_REQUEST:
                await self._refuse("08P01", "(ESTARTUPMESSAGE) Invalid startup message: :bad_startup_payload")
            else:
                return await self._parameters(size, body)

    async def _parameters(self, size: int, body: bytes) -> dict[str, str]:
        if size > MAX_STARTUP_BYTES:
            limit = f"{size} bytes (max {MAX_STARTUP_BYTES} bytes)"
            await self._refuse("08P01", f"(ESTARTUPPACKETTOOLARGE) Startup packet too large: {limit}")
        words = [word.decode() for word in body.rstrip(b"\0").split(b"\0")]
        parameters = dict(zip(words[::2], words[1::2], strict=False))
        for name in parameters.keys() - ALLOWED_STARTUP_PARAMETERS:
            self.sim.record("STARTUP_PARAM", f"{name}={parameters[name]}")
        return parameters

    async def _cancel(self, key: bytes) -> NoReturn:
        target = self.sim.clients.get(key)
        if target and target.backend:
            await target.backend.login.cancel_safe()
        raise DisconnectError

    async def _authenticate(self, parameters: dict[str, str]) -> None:
        user, _, tenant = parameters.get("user", "").rpartition(".")
        if (user, tenant) != (self.sim.user, TENANT):
            await asyncio.sleep(REFUSAL_SECONDS)
            await self._refuse("XX000", f"(ENOTFOUND) tenant/user {parameters.get('user', '')} not found")
        if len(self.sim.clients) >= self.sim.max_clients:
            limit = self.sim.max_clients
            await self._refuse("XX000", f"(EMAXCONN) max client connections reached, limit: {limit}")
        if self.sim.password is not None and await self._ask_password() != self.sim.password:
            await asyncio.sleep(REFUSAL_SECONDS)
            await self._refuse("28P01", f'password authentication failed for user "{user}"')

    async def _ask_password(self) -> str:
        self.writer.write(message(b"R", struct.pack("!I", 3)))
        _, password = await read_message(self.reader)
        return password.rstrip(b"\0").decode()

    async def _greet(self) -> None:
        """Let the client in."""
        self.sim.clients[self.cancel_key] = self
        accepted = message(b"R", struct.pack("!I", 0))
        key, ready = message(b"K", self.cancel_key), message(b"Z", b"I")
        self.writer.write(accepted + await self.sim.pool.parameters() + key + ready)

    async def _refuse(self, code: str, text: str) -> NoReturn:
        self.writer.write(fatal(code, text))
        await self.writer.drain()
        raise DisconnectError(text)

    # Work

    async def _next_message(self) -> tuple[bytes, bytes]:
        limit = None if self.backend else self.sim.client_idle_timeout_seconds
        try:
            return await asyncio.wait_for(read_message(self.reader), limit)
        except TimeoutError:
            raise DisconnectError("idle for too long") from None  # a bare EOF, as from Supavisor

    async def _relay(self, kind: bytes, body: bytes) -> None:
        """Send one message of the client on to its backend, which it gets now if it has none."""
        if kind == b"X":
            raise DisconnectError
        await self._inspect(kind, body)
        if self.backend is None and kind in b"SH":
            if kind == b"S":  # nothing to synchronise; a Flush is only recorded
                self.writer.write(message(b"Z", b"I"))
            return
        backend = self.backend or await self._take_backend()
        if kind in b"QSF":
            self.outstanding += 1
        backend.writer.write(message(kind, body))
        await backend.writer.drain()

    async def _take_backend(self) -> Backend:
        try:
            self.backend = await self.sim.pool.take()
        except TimeoutError:
            waited = f"{self.sim.pool.checkout_timeout_seconds * 1000:.0f}ms in Transaction mode"
            await self._refuse(
                "XX000", f"(ECHECKOUTTIMEOUT) unable to check out connection from the pool after {waited}"
            )
        self.answering = asyncio.create_task(self._answer(self.backend))
        return self.backend

    async def _answer(self, backend: Backend) -> None:
        """Send the backend's messages to the client until its transaction has ended."""
        ended = False
        try:
            while not ended:
                kind, body = await read_message(backend.reader)
                ended = kind == b"Z" and await self._ready(backend, body)
                self.writer.write(message(kind, body))
                await self.writer.drain()
        except (EOFError, OSError):
            self.writer.close()  # the backend died: a bare EOF

    async def _ready(self, backend: Backend, status: bytes) -> bool:
        """Note that one request is answered; give the backend back, and return True, after the last one."""
        self.outstanding = max(0, self.outstanding - 1)
        self.in_transaction = status != b"I"
        if self.outstanding or self.in_transaction:
            return False
        self.backend = None
        await self.sim.pool.give_back(backend)
        return True

    # The contract

    async def _inspect(self, kind: bytes, body: bytes) -> None:
        """Record what the message breaches; SQL PREPARE also costs the client its connection."""
        self._inspect_protocol(kind)
        sql = self._sql_of(kind, body)
        self._inspect_sql(sql)
        if kind == b"Q" and IS_SQL_PREPARE.match(sql):
            await self._refuse(
                "XX000",
                "(EPSSIMPLEQUERY) transaction mode only supports prepared statements using the Extended Query Protocol",
            )

    def _inspect_protocol(self, kind: bytes) -> None:
        if self.in_transaction:
            return
        if kind == b"H":
            self.sim.record("FLUSH_OUTSIDE_TX", "Flush sent outside a transaction (pipeline mode)")
        if kind in b"QSFPB" and self.outstanding:
            self.sim.record("PIPELINE_OUTSIDE_TX", f"{kind!r} sent with {self.outstanding} reply outstanding")

    def _sql_of(self, kind: bytes, body: bytes) -> str:
        """Return the SQL text in a Query or Parse message, else nothing."""
        if kind == b"Q":
            return body[:-1].decode(errors="replace")
        if kind != b"P":
            return ""
        name, sql = body.decode(errors="replace").split("\0")[:2]
        if name:
            self.sim.record("NAMED_PREPARE", f"{name}: {sql}")
        return sql

    def _inspect_sql(self, sql: str) -> None:
        if self.outstanding and ENDS_TRANSACTION.match(sql):
            self.sim.record("COMMIT_PIPELINED", sql)
        if len(sql) > MAX_SQL_BYTES:
            self.sim.record("OVER_16K", f"{len(sql)} characters of SQL")
        if not self.in_transaction and SETS_LOCALLY.match(sql):
            self.sim.record("SET_LOCAL_OUTSIDE_TX", sql)
        for name, pattern in SQL_RULES:
            if pattern.search(sql):
                self.sim.record(name, sql)


async def read_message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Return the kind and the body of the next message of the protocol."""
    kind, size = struct.unpack("!cI", await reader.readexactly(5))
    return kind, await reader.readexactly(size - 4)


def message(kind: bytes, body: bytes) -> bytes:
    """Return a message of the protocol."""
    return kind + struct.pack("!I", len(body) + 4) + body


def fatal(code: str, text: str) -> bytes:
    """Return the error message that ends a connection."""
    fields = ("SFATAL", "VFATAL", f"C{code}", f"M{text}", "")
    return message(b"E", b"".join(field.encode() + b"\0" for field in fields))
