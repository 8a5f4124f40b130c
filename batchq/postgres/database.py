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
from psycopg.abc import Params
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import tuple_row
from psycopg_pool import AsyncConnectionPool, ConnectionPool, PoolTimeout

from batchq.common.forks import end_if_forked
from batchq.common.secrets import hide_password, know_password
from batchq.errors import ConfigError, ConnectionLost, DatabaseAway, OutcomeUnknown
from batchq.postgres.dsn import parameter_problems
from batchq.postgres.places import Patience, Places
from batchq.postgres.statements import session
from batchq.postgres.statements.running import Statement

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
    "application_name": "batchq",
    # Texts travel as UTF-8 whatever the role, the database or PGCLIENTENCODING says: else one text that LATIN1 has no
    # letter for would stop a claim or a finish. Supavisor drops it, as it may: `check_server` looks at what has come.
    "client_encoding": "UTF8",
}
# What a DSN may say otherwise, and the variable in which libpq looks for it too.
VARIABLES = {"connect_timeout": "PGCONNECT_TIMEOUT", "gssencmode": "PGGSSENCMODE", "application_name": "PGAPPNAME"}
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
# What ends a transaction and passes by itself.
CONFLICTS = (
    psycopg.errors.SerializationFailure,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.ReadOnlySqlTransaction,
)
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


def not_given(conninfo: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return *options* without those that *conninfo* or the environment gives itself: its own counts.

    The encoding stays ours.
    """
    given = conninfo_to_dict(conninfo).keys() | {name for name in VARIABLES if os.environ.get(VARIABLES[name])}
    return {name: value for name, value in options.items() if name not in given - {"client_encoding"}}


class Connection(psycopg.Connection[Any]):
    """A psycopg connection that asks the gate before it logs in; its BEGIN says READ COMMITTED.

    A role may have another default. A lease is extended while a handler's transaction is open: any other level fails.
    """

    is_direct: bool | None = None  # no pooler in between; None: not known yet
    is_used = False  # a handler's transaction has been on it

    @classmethod
    def connect(cls, conninfo: str = "", **kwargs: Any) -> Self:
        with gate.log_in(gate.take_turn()):
            conn = super().connect(conninfo, **not_given(conninfo, kwargs))
        know_password(conn.info.password, conn.info.user, conn.info.dbname)  # wherever it came from, a file for one
        conn.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
        return conn


class AsyncConnection(psycopg.AsyncConnection[Any]):
    """The same for asyncio."""

    is_direct: bool | None = None
    is_used = False

    @classmethod
    async def connect(cls, conninfo: str = "", **kwargs: Any) -> Self:
        with gate.log_in(await gate.take_turn_async()):
            conn = await super().connect(conninfo, **not_given(conninfo, kwargs))
        await conn.set_isolation_level(psycopg.IsolationLevel.READ_COMMITTED)
        return conn


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


def is_read_only(error: BaseException | None) -> bool:
    """Return whether a write was refused because the server, the role or the session is read-only.

    Its connection answers, and never writes again: that of a server which is a standby by now, or that of a role whose
    default_transaction_read_only was on when it was opened. Close it; a new one sees what has changed since.
    """
    return isinstance(error, psycopg.errors.ReadOnlySqlTransaction)


@contextmanager
def transaction(
    conn: psycopg.Connection[Any],
    seconds: float,
    lock_seconds: float = session.OWN_LOCK_SECONDS,
    settings: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[psycopg.Connection[Any]]:
    """Run the block in one transaction, within *seconds*, on the server and here; wait for locks no longer than that.

    Commits at the end. Raises OutcomeUnknown if the connection was lost while COMMIT was in flight.
    """
    committing = False
    try:
        with bounded(conn, seconds + 1), conn.transaction():
            conn.execute(session.limits(seconds, lock_seconds, settings))
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
                await conn.execute(session.limits(seconds, seconds))
                yield conn
                committing = True
    except psycopg.Error as error:
        if committing and is_lost(conn):
            raise OutcomeUnknown(f"connection lost during COMMIT: {error}") from error
        raise


# ---------------------------------------------------------------------------------------------------------- reads


class ReadingCursor(psycopg.Cursor[Any]):
    """Runs one SELECT in a READ COMMITTED transaction: one message, which costs as much as the SELECT alone.

    Otherwise the role's default would apply. A serializable read beside serializable producers can fail with 40001, or
    make theirs fail.
    """

    def execute(self, query: Any, params: Params | None = None, **_: Any) -> Self:
        """Run it. In three messages if its text has no room for the parameters."""
        conn = self.connection
        text = f"{session.BEGIN}; {session.OUR_NAMES}; {psycopg.ClientCursor(conn).mogrify(query, params)}; COMMIT"
        if len(text) > LONGEST_TEXT:
            with conn.transaction():
                super().execute(session.OUR_NAMES)
                return super().execute(query, params)
        try:
            super().execute(text)  # pyright: ignore[reportArgumentType, reportCallIssue]
        except psycopg.Error:
            if not is_lost(conn):
                conn.rollback()
            raise
        self.nextset()
        self.nextset()
        return self


@contextmanager
def reading(conn: psycopg.Connection[Any]) -> Iterator[psycopg.Connection[Any]]:
    """Have each statement of the block, a SELECT, run as a `ReadingCursor` does."""
    factory = conn.cursor_factory
    conn.cursor_factory = ReadingCursor
    try:
        yield conn
    finally:
        conn.cursor_factory = factory


# ------------------------------------------------------------------------------------------- who owns a connection


def connect(dsn: str) -> psycopg.Connection[Any]:
    """Open one connection, with the settings that every pooler takes.

    Raises ConfigError where trying again would not help (log-in refused, no such database, texts that are not UTF-8),
    else OperationalError; both in one line, without the password.
    """
    try:
        conn = Connection.connect(dsn, **CONNECT_OPTIONS)
    except psycopg.Error as error:
        message = f"cannot connect: {hide_password(' '.join(str(error).split()))}"
        if is_login_failure(error) and PASSES_BY_ITSELF not in message:
            raise ConfigError(message) from None
        raise psycopg.OperationalError(message) from None
    if conn.info.encoding != "utf-8":
        with conn:
            raise ConfigError("; ".join(encoding_problem(conn) or ()))
    return conn


def connect_options(seconds: float) -> dict[str, Any]:
    """Return the options for whoever waits at most *seconds* (from 2 up) for a connection."""
    return CONNECT_OPTIONS | {"connect_timeout": round(min(max(seconds, 2), CONNECT_OPTIONS["connect_timeout"]))}


class Link:
    """One thread's own connection: opened when needed, thrown away when broken. Not for sharing.

    *conn*: the first one, where the caller has it already.
    """

    def __init__(self, dsn: str, timeout_seconds: float, conn: psycopg.Connection[Any] | None = None) -> None:
        self.dsn = dsn
        self.timeout_seconds = timeout_seconds
        self.conn = conn
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
    def transaction(self, settings: Mapping[str, str] = session.PLAIN) -> Iterator[psycopg.Connection[Any]]:
        """Run the block in one transaction, with *settings*; see the module's `transaction`."""
        with self.kept() as conn, transaction(conn, self.timeout_seconds, settings=settings):
            yield conn

    def probe(self, statement: Statement) -> list[Any]:
        """Return the rows of a statement that probes an index, whatever the statistics say."""
        return self.run(statement, session.PROBING)

    def run(self, statement: Statement, settings: Mapping[str, str] = session.BY_INDEX) -> list[Any]:
        """Run one statement over many rows in a transaction of its own, with *settings*; return its rows.

        In one round trip if its text has room for the parameters, else in four. Raises OutcomeUnknown if the
        connection was lost, also where it cannot be told whether that was before the COMMIT.
        """
        with self.kept() as conn:
            cursor = psycopg.ClientCursor(conn, row_factory=tuple_row)
            script = (
                f"{session.BEGIN}; {session.limits(self.timeout_seconds, settings=settings)}; {statement[0]}; COMMIT"
            )
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
                cursor.execute(text)  # pyright: ignore[reportArgumentType, reportCallIssue]
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
        """Run the block, one SELECT, in one message; see the module's `reading`."""
        with self.kept() as conn, bounded(conn, self.timeout_seconds + 1), self.timed(), reading(conn):
            yield conn

    @contextmanager
    def kept(self) -> Iterator[psycopg.Connection[Any]]:
        """Give the connection, and close it if it comes back broken or read-only."""
        if self.conn is None:
            self.conn = Connection.connect(self.dsn, **connect_options(self.timeout_seconds))
            self.quickest_seconds = None
        try:
            yield self.conn
            self.answers += 1
        except psycopg.Error as error:
            if is_read_only(error):
                self.close()
            raise
        finally:
            if self.conn is not None and is_lost(self.conn):
                self.close()

    def close(self) -> None:
        """Close the connection; the next use opens another."""
        if self.conn is not None:
            self.conn.close()
            self.conn = None


class HandlerConnections:
    """The connections for handlers' transactions: a pool for threads, and one for the event loop.

    A borrower waits for as long as connections of the pool are in use, in order of arrival, *queue_seconds* at most.
    Where none can be made, *borrow_seconds*. *settings*: those of each transaction; a handler's are its role's.
    """

    def __init__(
        self,
        dsn: str,
        size: int,
        borrow_seconds: float,
        transaction_seconds: float,
        queue_seconds: float = float("inf"),
        *,
        cleans: bool = True,
        settings: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        kwargs = connect_options(borrow_seconds)
        self.options = POOL_OPTIONS | {"max_size": size, "kwargs": kwargs, "timeout": BORROW_SECONDS}
        self.dsn = dsn
        self.borrow_seconds = borrow_seconds
        self.transaction_seconds = transaction_seconds
        self.queue_seconds = queue_seconds
        self.cleans = cleans
        self.settings = settings
        self.pool: ConnectionPool[Any] = ConnectionPool(
            dsn, connection_class=Connection, name="handlers", reset=self.clean if cleans else None, **self.options
        )
        self.places = self.new_places(size)
        self.async_pool: AsyncConnectionPool[Any] | None = None
        self.async_places = self.new_places(size)
        self.threads = ThreadPoolExecutor(size, thread_name_prefix="batchq-reads")  # for the event loop

    def new_places(self, size: int) -> Places:
        """Return the places before a pool. A transaction is cut a second after its time."""
        return Places(size, max(self.transaction_seconds, self.borrow_seconds) + 2)

    def open(self) -> None:
        """Open the pool, and wait until it has a connection. Raises PoolTimeout."""
        self.pool.open()
        self.pool.wait(self.borrow_seconds)

    def close(self) -> None:
        """Close the threads' pool; handlers that still hold a connection keep it until they end."""
        self.pool.close(timeout=1)

    @contextmanager
    def transaction(self, check: Callable[[], None] = lambda: None) -> Iterator[psycopg.Connection[Any]]:
        """Run the block in one transaction on a connection of the pool.

        *check* is called while it waits for its turn, and may raise. Raises DatabaseAway if no transaction could be
        begun, OutcomeUnknown if the connection was lost while committing.
        """
        with ExitStack() as stack:
            yield self.begin(stack, check)

    def begin(self, stack: ExitStack, check: Callable[[], None]) -> psycopg.Connection[Any]:
        """Begin a transaction that ends with *stack*; on another connection if the pool's was dead already."""
        try:
            return self.begin_once(stack, check)
        except ConnectionLost:
            return self.begin_once(stack, check)

    def begin_once(self, stack: ExitStack, check: Callable[[], None]) -> psycopg.Connection[Any]:
        """Begin a transaction that ends with *stack*. Raises ConnectionLost if the pool's connection is dead."""
        with ExitStack() as begun:
            conn = begun.enter_context(self.borrowed(check))
            try:
                seconds = self.transaction_seconds
                begun.enter_context(transaction(conn, seconds, seconds, self.settings))
            except psycopg.Error as error:
                raise_if_lost(conn, error)
                raise
            stack.push(begun.pop_all())
        conn.is_used = True  # type: ignore[attr-defined]
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
                with bounded(conn, self.borrow_seconds + 1), reading(conn):
                    return query(conn, *args, **options)
            except psycopg.Error as error:
                raise_if_lost(conn, error)
                raise

    @contextmanager
    def borrowed(self, check: Callable[[], None] = lambda: None) -> Iterator[psycopg.Connection[Any]]:
        """Give a connection of the pool, and take it back; drain the pool if it comes back broken."""
        end_if_forked()
        patience = Patience(self.places, self.borrow_seconds, self.queue_seconds)
        with self.place(patience, check):
            conn = self.borrow(patience, check)
            try:
                with self.places.using(conn):
                    yield as_new(conn)
            except psycopg.errors.ReadOnlySqlTransaction:
                conn.close()  # a role that may write again, or a server that took over, is seen by a new one alone
                raise
            finally:
                if is_lost(conn):
                    self.pool.drain()  # its idle siblings are probably dead too
                self.pool.putconn(conn)

    def clean(self, conn: Connection) -> None:
        """Remove from the session what a handler has left there; the pool's thread does so before the next borrower.

        Only where no pooler is in between: behind one, the next transaction may meet another session.
        """
        if not conn.is_used or conn.is_direct is False:
            return
        conn.is_used = False
        with bounded(conn, self.borrow_seconds + 1):
            if conn.is_direct is None:
                conn.is_direct = session.backend_pid(conn) == conn.info.backend_pid
            if conn.is_direct:
                conn.execute(session.CLEAN_SESSION)

    async def clean_async(self, conn: AsyncConnection) -> None:
        """Do as `clean` does, in the event loop."""
        if not conn.is_used or conn.is_direct is False:
            return
        conn.is_used = False
        with bounded(conn, self.borrow_seconds + 1):
            if conn.is_direct is None:
                cursor = await conn.cursor(row_factory=tuple_row).execute(session.BACKEND_PID)
                conn.is_direct = await cursor.fetchone() == (conn.info.backend_pid,)
            if conn.is_direct:
                await conn.execute(session.CLEAN_SESSION)

    @contextmanager
    def place(self, patience: Patience, check: Callable[[], None]) -> Iterator[None]:
        """Hold a place before the pool for the block. Raises DatabaseAway, and what *check* raises."""
        event = threading.Event()
        go = event.set
        if not self.places.take(go):
            try:
                while not event.wait(BORROW_SECONDS / 2):
                    self.check_wait(patience, check)
            except BaseException:
                self.places.leave(go)
                raise
        taken_at = time.monotonic()
        try:
            yield
        finally:
            self.places.give_back(taken_at)

    def check_wait(self, patience: Patience, check: Callable[[], None]) -> None:
        """Raise what *check* raises, and DatabaseAway if a wait has been too long."""
        check()
        if patience.is_over():
            raise DatabaseAway(f"no connection for {min(patience.seconds, self.queue_seconds):g} s")

    def borrow(self, patience: Patience, check: Callable[[], None]) -> Any:
        """Take a connection out of the pool; ask again each half second, since only asking makes the pool try."""
        while True:
            try:
                return self.pool.getconn()
            except PoolTimeout:
                self.check_wait(patience, check)

    async def open_async(self) -> None:
        """Open the event loop's pool; call it in that loop, again if the tasks of the last one are dead."""
        old = self.async_pool
        options: dict[str, Any] = self.options | {"min_size": 0}
        self.async_pool = AsyncConnectionPool(
            self.dsn,
            connection_class=AsyncConnection,
            name="async-handlers",
            reset=self.clean_async if self.cleans else None,
            **options,
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
    async def transaction_async(
        self, check: Callable[[], None] = lambda: None
    ) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        """Do as `transaction` does, in the event loop."""
        async with AsyncExitStack() as stack:
            try:
                conn = await self.begin_async(stack, check)
            except ConnectionLost:
                conn = await self.begin_async(stack, check)
            yield conn

    async def begin_async(self, stack: AsyncExitStack, check: Callable[[], None]) -> psycopg.AsyncConnection[Any]:
        """Do as `begin_once` does, in the event loop."""
        async with AsyncExitStack() as begun:
            conn = await begun.enter_async_context(self.borrowed_async(check))
            try:
                await begun.enter_async_context(transaction_async(conn, self.transaction_seconds))
            except psycopg.Error as error:
                raise_if_lost(conn, error)
                raise
            stack.push_async_exit(begun.pop_all())
        conn.is_used = True  # type: ignore[attr-defined]
        return conn

    @asynccontextmanager
    async def borrowed_async(
        self, check: Callable[[], None] = lambda: None
    ) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        """Do as `borrowed` does, in the event loop."""
        end_if_forked()
        patience = Patience(self.async_places, self.borrow_seconds, self.queue_seconds)
        async with self.place_async(patience, check):
            if (pool := self.async_pool) is None:
                raise RuntimeError("no event loop runs here: `async with` is for `async def` handlers")
            conn = await self.borrow_async(pool, patience, check)
            try:
                with self.async_places.using(conn):
                    yield as_new(conn)
            except psycopg.errors.ReadOnlySqlTransaction:
                await conn.close()
                raise
            finally:
                if is_lost(conn):
                    await pool.drain()
                await pool.putconn(conn)

    @asynccontextmanager
    async def place_async(self, patience: Patience, check: Callable[[], None]) -> AsyncIterator[None]:
        """Do as `place` does, in the event loop."""
        future = asyncio.get_running_loop().create_future()

        def go() -> None:
            if not future.done():
                future.set_result(None)

        if not self.async_places.take(go):
            try:
                while not (await asyncio.wait([future], timeout=BORROW_SECONDS))[0]:
                    self.check_wait(patience, check)
            except BaseException:
                self.async_places.leave(go)
                raise
        taken_at = time.monotonic()
        try:
            yield
        finally:
            self.async_places.give_back(taken_at)

    async def borrow_async(self, pool: AsyncConnectionPool[Any], patience: Patience, check: Callable[[], None]) -> Any:
        """Do as `borrow` does, in the event loop."""
        while True:
            try:
                return await pool.getconn()
            except PoolTimeout:
                self.check_wait(patience, check)


def as_new(conn: Any) -> Any:
    """Return a pool's connection without what an earlier handler has set on it: how rows come, how values go."""
    conn.row_factory = tuple_row
    conn.cursor_factory = (psycopg.Cursor, psycopg.AsyncCursor)[isinstance(conn, psycopg.AsyncConnection)]
    conn.prepare_threshold = None
    return conn


def raise_if_lost(conn: AnyConnection, error: psycopg.Error) -> None:
    """Raise ConnectionLost if the connection is gone."""
    if is_lost(conn):
        raise ConnectionLost(f"connection lost: {error}") from error


def check_server(conn: psycopg.Connection[Any]) -> None:
    """Raise ConfigError for a server older than PostgreSQL 15, texts that are not UTF-8, or what no pooler takes.

    The last may come from a service of libpq, of which the DSN has only the name.
    """
    if problems := parameter_problems(conn.info.get_parameters()):
        raise ConfigError("; ".join(problems))
    if problem := encoding_problem(conn):  # first: nothing else could be read
        raise ConfigError("; ".join(problem))
    number, text = session.server_version(conn)
    if number < OLDEST_SERVER:
        raise ConfigError(f"batchq needs PostgreSQL 15 or later; the server is {text.split(',')[0]}")


def check_writable(conn: psycopg.Connection[Any]) -> None:
    """Raise ConfigError for a database that is read-only, which says who has made it so."""
    if problem := read_only_problem(conn):
        raise ConfigError("; ".join(problem))


Problem = tuple[str, str]
"""What is wrong, and what to do."""


def encoding_problem(conn: psycopg.Connection[Any]) -> Problem | None:
    """Return what is wrong if texts do not travel as UTF-8, though each connection asks for it: a pooler dropped that.

    What the pooler reports at log-in counts as well, since texts are read by it.
    """
    role, encoding = session.role_and_encoding(conn)
    if encoding == "UTF8" and conn.info.encoding == "utf-8":
        return None
    found = encoding if encoding != "UTF8" else conn.info.encoding
    remedy = f"run: alter role {role} set client_encoding to 'UTF8', and have the pooler reconnect"
    return f"client_encoding is {found}, not UTF8: the pooler drops it from the start of a connection", remedy


SETS_READ_ONLY = {
    "user": "run: ALTER ROLE {role} RESET default_transaction_read_only",
    "database": "run: ALTER DATABASE {database} RESET default_transaction_read_only",
    "database user": "run: ALTER ROLE {role} IN DATABASE {database} RESET default_transaction_read_only",
    "configuration file": "run: ALTER SYSTEM RESET default_transaction_read_only, or edit postgresql.conf, then reload",
}


def read_only_problem(conn: psycopg.Connection[Any]) -> Problem | None:
    """Return what is wrong if nothing can be written: on a standby, or by a setting, whose source is named."""
    role, database, is_standby, is_off, source = session.read_only_state(conn)
    if is_standby:
        return "the server is a standby, which is read-only", "point BATCHQ_DSN at the primary, or promote this server"
    if is_off:
        return None
    evidence = f"the database is read-only: default_transaction_read_only is on for role {role} (source: {source})"
    if source in SETS_READ_ONLY:
        return evidence, SETS_READ_ONLY[source].format(role=role, database=database)
    return evidence, "set default_transaction_read_only to off where it was set"
