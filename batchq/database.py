"""Connections that survive transaction-mode poolers, restarts and frozen peers.

Each unit of work is one ``with conn.transaction()`` on an autocommit connection without prepared statements, its limits
set within the transaction, its round trips bounded by cutting the socket: while a pooler is frozen its kernel still
acknowledges, so neither keep-alives nor asyncio time-outs end a wait.
"""

import asyncio
import contextlib
import contextvars
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from types import MappingProxyType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import psycopg
from psycopg.rows import tuple_row
from psycopg_pool import AsyncConnectionPool, ConnectionPool, PoolTimeout

from batchq import queries
from batchq.errors import ConfigError, ConnectionLost, DatabaseAway, OutcomeUnknown
from batchq.forks import end_if_forked
from batchq.queries import Statement
from batchq.settings import hide_password

CONNECT_OPTIONS: dict[str, Any] = {
    "autocommit": True,  # a transaction exists only inside `with conn.transaction()`
    "prepare_threshold": None,  # a named statement lives on one backend; the next transaction may meet another
    "connect_timeout": 10,
    "keepalives": 1,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
    "gssencmode": "disable",  # Supavisor answers a GSS request with a FATAL
    "application_name": "batchq",  # the only optional start-up parameter that every pooler takes
}
POOL_OPTIONS: dict[str, Any] = {
    "min_size": 1,
    "open": False,
    "check": None,  # psycopg_pool backs off 1, 2, 4, 8 s for each stale connection that a check finds
    "max_lifetime": 15 * 60,
    "max_idle": 2 * 60,
    "reconnect_timeout": 0,  # one try: each borrower asks again, where the pool would wait 1, 2, 4, 8 s between tries
    "num_workers": 2,
}
OLDEST_SERVER = 150_000
BORROW_SECONDS = 0.5
TURN_SECONDS = 1.0
LONGEST_TEXT = 15_000  # characters of one statement: Amazon's RDS Proxy gives who sends 16 KB a backend for good


# ------------------------------------------------------------------------------------------------ log-in failures

LOGIN_REFUSED = (
    "password authentication failed",
    "no pg_hba.conf entry",
    "(ENOTFOUND)",
    "Tenant or user not found",
    "(ECIRCUITBREAKER)",
    "(ESSLREQUIRED)",
    "no such database",
    "does not exist",
)
PASSES_BY_ITSELF = "(ECIRCUITBREAKER)"


class LoginGate:
    """Let one refused log-in be followed by the next only after 15 s, then 30 s, up to 2 min.

    Supavisor blocks an address for 2 min after 10 refused log-ins in 150 s, and a pool alone makes more than that. When
    all connections are lost at once they log in one after the other, so that the first refusal spares the rest; but
    nobody waits for a turn longer than a second, since a peer may not answer at all.
    """

    def __init__(self) -> None:
        self.turn = threading.Lock()
        self.refused = 0
        self.not_before = 0.0

    def take_turn(self) -> bool:
        """Wait for the turn, a second at most; return whether it was taken."""
        return self.turn.acquire(timeout=TURN_SECONDS)

    async def take_turn_async(self) -> bool:
        """Do as `take_turn` does, in the event loop."""
        until = time.monotonic() + TURN_SECONDS
        while not (taken := self.turn.acquire(blocking=False)) and time.monotonic() < until:
            await asyncio.sleep(0.01)
        return taken

    @contextmanager
    def log_in(self, turn_taken: bool) -> Iterator[None]:
        """Watch the block, which logs in. Raises OperationalError, without a round trip, while it is too early."""
        try:
            self.check()
            yield
            self.refused = 0
        except psycopg.Error as error:
            self.failed(error)
            raise
        finally:
            if turn_taken:
                self.turn.release()

    def check(self) -> None:
        """Raise OperationalError while it is too early to try again."""
        if (left := self.not_before - time.monotonic()) > 0:
            raise psycopg.OperationalError(f"log-in was refused; not tried again for another {left:.0f} s")

    def failed(self, error: BaseException) -> None:
        """Take note of a failed log-in; of several at the same time, once."""
        now = time.monotonic()
        if is_login_failure(error) and now >= self.not_before:
            self.not_before = now + min(15 * 2**self.refused, 120)
            self.refused += 1


def is_login_failure(error: BaseException) -> bool:
    """Tell whether the server refused who we are; only the text tells, there is no SQLSTATE while connecting."""
    return any(text in str(error) for text in LOGIN_REFUSED)


gate = LoginGate()


class Connection(psycopg.Connection[Any]):
    """A psycopg connection that asks the gate before it logs in."""

    @classmethod
    def connect(cls, conninfo: str = "", **kwargs: Any) -> Self:
        with gate.log_in(gate.take_turn()):
            return super().connect(conninfo, **kwargs)


class AsyncConnection(psycopg.AsyncConnection[Any]):
    """The same for asyncio."""

    @classmethod
    async def connect(cls, conninfo: str = "", **kwargs: Any) -> Self:
        with gate.log_in(await gate.take_turn_async()):
            return await super().connect(conninfo, **kwargs)


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
AnyConnection = psycopg.Connection[Any] | psycopg.AsyncConnection[Any]

# ------------------------------------------------------------------------------------------------------ deadlines


class Deadlines:
    """One timer thread for all connections of the process: it cuts the socket of whoever is overdue."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.due: dict[int, float] = {}
        self.wakes_at = float("inf")
        self.thread: threading.Thread | None = None

    def start(self, fd: int, seconds: float) -> None:
        """Cut *fd* after *seconds*, unless `end` is called before."""
        at = time.monotonic() + seconds
        with self.condition:
            if self.thread is None:
                self.thread = threading.Thread(target=self.run, name="batchq-deadlines", daemon=True)
                self.thread.start()
            self.due[fd] = at
            if at < self.wakes_at:
                self.condition.notify()

    def end(self, fd: int) -> None:
        """Forget *fd* and close it."""
        with self.condition:
            self.due.pop(fd, None)
            os.close(fd)

    def run(self) -> None:
        """Wait for the earliest deadline, for ever."""
        with self.condition:
            while True:
                self.wakes_at = min(self.due.values(), default=float("inf"))
                left = self.wakes_at - time.monotonic()
                if left > 0:
                    self.condition.wait(None if left == float("inf") else left)
                self.cut_overdue()

    def cut_overdue(self) -> None:
        """Shut down every socket whose time is up: whoever waits on it gets an error at once."""
        now = time.monotonic()
        for fd in [fd for fd, at in self.due.items() if at <= now]:
            del self.due[fd]
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as peer:
                peer.shutdown(socket.SHUT_RDWR)


deadlines = Deadlines()


def forget_parent() -> None:
    """In a forked child: no timer thread, no locks, no refused log-ins of the parent's."""
    deadlines.__init__()  # type: ignore[misc]
    gate.__init__()  # type: ignore[misc]


os.register_at_fork(after_in_child=forget_parent)


@contextmanager
def bounded(conn: AnyConnection, seconds: float) -> Iterator[None]:
    """Break *conn* if the block takes longer than *seconds*; works for asyncio as well."""
    fd = os.dup(conn.pgconn.socket)
    deadlines.start(fd, seconds)
    try:
        yield
    finally:
        deadlines.end(fd)


# --------------------------------------------------------------------------------------------------- transactions


def is_lost(conn: AnyConnection) -> bool:
    """Tell whether the connection is gone: its state tells, the class of the error does not."""
    return conn.closed or conn.broken


@contextmanager
def transaction(
    conn: psycopg.Connection[Any],
    seconds: float,
    lock_seconds: float = queries.OWN_LOCK_SECONDS,
    settings: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[psycopg.Connection[Any]]:
    """Run the block in one transaction, within *seconds*, on the server and here; wait for locks no longer than that.

    Commits at the end. Raises OutcomeUnknown if the connection was lost while COMMIT was in flight.
    """
    committing = False
    try:
        with bounded(conn, seconds + 1), conn.transaction():
            conn.execute(queries.limits(seconds, lock_seconds, settings))
            yield conn
            committing = True
    except psycopg.Error as error:
        if committing and is_lost(conn):
            raise OutcomeUnknown(f"connection lost during COMMIT: {error}") from error
        raise


@asynccontextmanager
async def transaction_async(
    conn: psycopg.AsyncConnection[Any], seconds: float
) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """Do as `transaction` does, on an asyncio connection; locks are waited for as long as the transaction may take."""
    committing = False
    try:
        with bounded(conn, seconds + 1):
            async with conn.transaction():
                await conn.execute(queries.limits(seconds, seconds))
                yield conn
                committing = True
    except psycopg.Error as error:
        if committing and is_lost(conn):
            raise OutcomeUnknown(f"connection lost during COMMIT: {error}") from error
        raise


# ------------------------------------------------------------------------------------------- who owns a connection


def connect(dsn: str) -> psycopg.Connection[Any]:
    """Open one connection, with the settings that every pooler takes.

    Raises ConfigError where trying again would not help (log-in refused, no such database), else OperationalError;
    both in one line, without the password.
    """
    try:
        return Connection.connect(dsn, **CONNECT_OPTIONS)
    except psycopg.Error as error:
        message = f"cannot connect: {hide_password(' '.join(str(error).split()))}"
        if is_login_failure(error) and PASSES_BY_ITSELF not in message:
            raise ConfigError(message) from None
        raise psycopg.OperationalError(message) from None


def connect_options(seconds: float) -> dict[str, Any]:
    """Return the options for whoever waits at most *seconds* (from 2 up) for a connection."""
    return CONNECT_OPTIONS | {"connect_timeout": round(min(max(seconds, 2), CONNECT_OPTIONS["connect_timeout"]))}


class Link:
    """One thread's own connection: opened when needed, thrown away when broken. Not for sharing."""

    def __init__(self, dsn: str, timeout_seconds: float) -> None:
        self.dsn = dsn
        self.timeout_seconds = timeout_seconds
        self.conn: psycopg.Connection[Any] | None = None
        self.quickest_seconds: float | None = None
        self.answers = 0  # how often the database did what it was asked

    @property
    def round_trip_seconds(self) -> float:
        """About how long a message takes to the database and back: the quickest on this connection; 0 before any."""
        return self.quickest_seconds or 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Run the block, one message and its answer, and note how long it takes."""
        began_at = time.monotonic()
        yield
        seconds = time.monotonic() - began_at
        self.quickest_seconds = min(seconds, self.quickest_seconds or seconds)

    @contextmanager
    def transaction(self, settings: Mapping[str, str] = MappingProxyType({})) -> Iterator[psycopg.Connection[Any]]:
        """Run the block in one transaction; see the module's `transaction`."""
        with self.kept() as conn, transaction(conn, self.timeout_seconds, settings=settings):
            yield conn

    def run(self, statement: Statement, settings: Mapping[str, str] = queries.BY_INDEX) -> list[Any]:
        """Run one statement over many rows in a transaction of its own, with *settings*; return its rows.

        In one round trip if its text has room for the parameters, else in four. Raises OutcomeUnknown if the
        connection was lost, also where it cannot be told whether that was before the COMMIT.
        """
        with self.kept() as conn:
            cursor = psycopg.ClientCursor(conn, row_factory=tuple_row)
            script = f"BEGIN; {queries.limits(self.timeout_seconds, settings=settings)}; {statement[0]}; COMMIT"
            text = cursor.mogrify(script, statement[1])
            if len(text) <= LONGEST_TEXT:
                return self.run_text(cursor, text)
            with transaction(conn, self.timeout_seconds, settings=settings):
                return conn.cursor(row_factory=tuple_row).execute(*statement).fetchall()

    def run_text(self, cursor: psycopg.ClientCursor[Any], text: str) -> list[Any]:
        """Run the text of a whole transaction, which travels as one message; return the rows of its third statement."""
        conn = cursor.connection
        try:
            with bounded(conn, self.timeout_seconds + 1), self.timed():
                cursor.execute(text)
        except psycopg.Error as error:
            if is_lost(conn):
                raise OutcomeUnknown(f"connection lost during a transaction: {error}") from error
            conn.rollback()
            raise
        cursor.nextset()
        cursor.nextset()
        return cursor.fetchall()

    @contextmanager
    def reading(self) -> Iterator[psycopg.Connection[Any]]:
        """Run the block, one SELECT, without a transaction around it."""
        with self.kept() as conn, bounded(conn, self.timeout_seconds + 1), self.timed():
            yield conn

    @contextmanager
    def kept(self) -> Iterator[psycopg.Connection[Any]]:
        """Give the connection, and close it if it comes back broken."""
        if self.conn is None:
            self.conn = Connection.connect(self.dsn, **connect_options(self.timeout_seconds))
            self.quickest_seconds = None
        try:
            yield self.conn
            self.answers += 1
        finally:
            if is_lost(self.conn):
                self.close()

    def close(self) -> None:
        """Close the connection; the next use opens another."""
        if self.conn is not None:
            self.conn.close()
            self.conn = None


class HandlerConnections:
    """The connections for handlers' transactions: a pool for threads, and one for the event loop."""

    def __init__(self, dsn: str, size: int, borrow_seconds: float, transaction_seconds: float) -> None:
        kwargs = connect_options(borrow_seconds)
        self.options = POOL_OPTIONS | {"max_size": size, "kwargs": kwargs, "timeout": BORROW_SECONDS}
        self.dsn = dsn
        self.borrow_seconds = borrow_seconds
        self.transaction_seconds = transaction_seconds
        self.pool: ConnectionPool[Any] = ConnectionPool(
            dsn, connection_class=Connection, name="handlers", **self.options
        )
        self.async_pool: AsyncConnectionPool[Any] | None = None
        self.threads = ThreadPoolExecutor(size, thread_name_prefix="batchq-reads")  # for the event loop

    def open(self) -> None:
        """Open the pool, and wait until it has a connection. Raises PoolTimeout."""
        self.pool.open()
        self.pool.wait(self.borrow_seconds)

    def close(self) -> None:
        """Close the threads' pool; handlers that still hold a connection keep it until they end."""
        self.pool.close(timeout=1)

    @contextmanager
    def transaction(self) -> Iterator[psycopg.Connection[Any]]:
        """Run the block in one transaction on a connection of the pool.

        Raises DatabaseAway if none could be begun, OutcomeUnknown if the connection was lost while committing.
        """
        with ExitStack() as stack:
            yield self.begin(stack)

    def begin(self, stack: ExitStack) -> psycopg.Connection[Any]:
        """Begin a transaction that ends with *stack*; on another connection if the pool's was dead already."""
        try:
            return self.begin_once(stack)
        except ConnectionLost:
            return self.begin_once(stack)

    def begin_once(self, stack: ExitStack) -> psycopg.Connection[Any]:
        """Begin a transaction that ends with *stack*. Raises ConnectionLost if the pool's connection is dead."""
        with ExitStack() as begun:
            conn = begun.enter_context(self.borrowed())
            try:
                begun.enter_context(transaction(conn, self.transaction_seconds, self.transaction_seconds))
            except psycopg.Error as error:
                raise_if_lost(conn, error)
                raise
            stack.push(begun.pop_all())
        return conn

    def read(self, query: Callable[Concatenate[psycopg.Connection[Any], Arguments], Result], *args: Arguments.args,
             **options: Arguments.kwargs) -> Result:  # fmt: skip
        """Return what *query*, one SELECT, returns; asked again on another connection if the first one is dead.

        Raises DatabaseAway.
        """
        try:
            return self.read_once(query, *args, **options)
        except ConnectionLost:
            return self.read_once(query, *args, **options)

    def read_once(self, query: Callable[Concatenate[psycopg.Connection[Any], Arguments], Result],
                  *args: Arguments.args, **options: Arguments.kwargs) -> Result:  # fmt: skip
        """Return what *query* returns. Raises ConnectionLost."""
        with self.borrowed() as conn:
            try:
                with bounded(conn, self.borrow_seconds + 1):
                    return query(conn, *args, **options)
            except psycopg.Error as error:
                raise_if_lost(conn, error)
                raise

    @contextmanager
    def borrowed(self) -> Iterator[psycopg.Connection[Any]]:
        """Give a connection of the pool, and take it back; drain the pool if it comes back broken."""
        conn = self.borrow()
        try:
            yield as_new(conn)
        finally:
            if is_lost(conn):
                self.pool.drain()  # its idle siblings are probably dead too
            self.pool.putconn(conn)

    def borrow(self) -> Any:
        """Take a connection out of the pool; ask again each half second, since only asking makes the pool try."""
        end_if_forked()
        until = time.monotonic() + self.borrow_seconds
        while True:
            try:
                return self.pool.getconn()
            except PoolTimeout as error:
                if time.monotonic() > until:
                    raise DatabaseAway(f"no connection for {self.borrow_seconds:g} s: {error}") from error

    async def open_async(self) -> None:
        """Open the event loop's pool; call it in that loop, again if the tasks of the last one are dead."""
        old = self.async_pool
        self.async_pool = AsyncConnectionPool(
            self.dsn, connection_class=AsyncConnection, name="async-handlers", **(self.options | {"min_size": 0})
        )
        await self.async_pool.open()
        if old is not None:
            await old.close(timeout=0)

    async def close_async(self) -> None:
        """Close the event loop's pool."""
        self.threads.shutdown(wait=False)
        if self.async_pool is not None:
            await self.async_pool.close(timeout=1)

    async def in_thread(self, look: Callable[[], Result]) -> Result:
        """Return what *look* returns, which asks the database in a thread while the event loop goes on.

        Not by asyncio.to_thread: handlers may have lost all of its threads.
        """
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self.threads, lambda: context.run(look))

    @asynccontextmanager
    async def transaction_async(self) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        """Do as `transaction` does, in the event loop."""
        async with AsyncExitStack() as stack:
            try:
                conn = await self.begin_async(stack)
            except ConnectionLost:
                conn = await self.begin_async(stack)
            yield conn

    async def begin_async(self, stack: AsyncExitStack) -> psycopg.AsyncConnection[Any]:
        """Do as `begin_once` does, in the event loop."""
        async with AsyncExitStack() as begun:
            conn = await begun.enter_async_context(self.borrowed_async())
            try:
                await begun.enter_async_context(transaction_async(conn, self.transaction_seconds))
            except psycopg.Error as error:
                raise_if_lost(conn, error)
                raise
            stack.push_async_exit(begun.pop_all())
        return conn

    @asynccontextmanager
    async def borrowed_async(self) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        """Do as `borrowed` does, in the event loop."""
        if (pool := self.async_pool) is None:
            raise RuntimeError("no event loop runs here: `async with` is for `async def` handlers")
        conn = await self.borrow_async(pool)
        try:
            yield as_new(conn)
        finally:
            if is_lost(conn):
                await pool.drain()
            await pool.putconn(conn)

    async def borrow_async(self, pool: AsyncConnectionPool[Any]) -> Any:
        """Do as `borrow` does, in the event loop."""
        end_if_forked()
        until = time.monotonic() + self.borrow_seconds
        while True:
            try:
                return await pool.getconn()
            except PoolTimeout as error:
                if time.monotonic() > until:
                    raise DatabaseAway(f"no connection for {self.borrow_seconds:g} s: {error}") from error


def as_new(conn: Any) -> Any:
    """Return a pool's connection without what an earlier handler has set on it: how rows come, how values go."""
    conn.row_factory = tuple_row
    conn.cursor_factory = psycopg.AsyncCursor if isinstance(conn, psycopg.AsyncConnection) else psycopg.Cursor
    conn.prepare_threshold = None
    return conn


def raise_if_lost(conn: AnyConnection, error: psycopg.Error) -> None:
    """Raise ConnectionLost if the connection is gone."""
    if is_lost(conn):
        raise ConnectionLost(f"connection lost: {error}") from error


def check_server(conn: psycopg.Connection[Any]) -> None:
    """Raise ConfigError for a server older than PostgreSQL 15."""
    number, text = queries.server_version(conn)
    if number < OLDEST_SERVER:
        raise ConfigError(f"batchq needs PostgreSQL 15 or later; the server is {text.split(',')[0]}")
