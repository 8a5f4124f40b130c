"""The connections for handlers' transactions: a pool for threads, and one for the event loop."""

import asyncio
import contextvars
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from types import MappingProxyType
from typing import Any, Concatenate, ParamSpec, TypeVar

import psycopg
from psycopg.rows import tuple_row
from psycopg_pool import AsyncConnectionPool, ConnectionPool, PoolTimeout

from batchq.common.forks import end_if_forked
from batchq.errors import ConnectionLost, DatabaseAway
from batchq.postgres.connections import AnyConnection, AsyncConnection, Connection, connect_options, is_lost
from batchq.postgres.deadlines import deadline
from batchq.postgres.fair_queue import BorrowTimeout, FairQueue
from batchq.postgres.statements import session
from batchq.postgres.transactions import reading, transaction, transaction_async

POOL_OPTIONS: dict[str, Any] = {
    "min_size": 1,
    "open": False,
    "check": None,  # psycopg_pool backs off 1, 2, 4, 8 s for each stale connection that a check finds
    "max_lifetime": 15 * 60,
    "max_idle": 2 * 60,
    "reconnect_timeout": 0,  # one try: each borrower asks again; the pool would wait 1, 2, 4, 8 s between tries
    "num_workers": 2,
}
BORROW_SECONDS = 0.5

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Check = Callable[[], None]


class HandlerConnections:
    """Lends connections in order of arrival.

    While connections are in use a borrower waits, for up to *queue_seconds*; where none can be made, for up to
    *borrow_seconds*. *cleans*: remove what a handler left in the session. *settings*: those of each transaction; a
    handler's transactions have its role's.
    """

    # Twelve attributes: one pool for threads and one for the event loop, which differ only in `await`.
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
        self._options = POOL_OPTIONS | {"max_size": size, "kwargs": kwargs, "timeout": BORROW_SECONDS}
        self.dsn = dsn
        self._borrow_seconds = borrow_seconds
        self.transaction_seconds = transaction_seconds
        self._queue_seconds = queue_seconds
        self._cleans = cleans
        self._settings = settings
        self._threads = ThreadPoolExecutor(size, thread_name_prefix="batchq-reads")  # for the event loop
        self.pool: ConnectionPool[Any] = ConnectionPool(
            dsn, connection_class=Connection, name="handlers", reset=self._clean if cleans else None, **self._options
        )
        self.async_pool: AsyncConnectionPool[Any] | None = None
        max_hold_seconds = max(transaction_seconds, borrow_seconds) + 2  # a transaction's socket closes after 1 s more
        self.fair_queue = FairQueue(size, max_hold_seconds)
        self.async_fair_queue = FairQueue(size, max_hold_seconds)

    # ---------------------------------------------------------------------------------------------------- threads

    def open(self) -> None:
        """Open the pool, and wait until it has a connection. Raises PoolTimeout."""
        self.pool.open()
        self.pool.wait(self._borrow_seconds)

    def close(self) -> None:
        """Close the threads' pool; handlers that still hold a connection keep it until they return."""
        self.pool.close(timeout=1)

    @contextmanager
    def transaction(self, check: Check = lambda: None) -> Iterator[psycopg.Connection[Any]]:
        """Run the block in one transaction on a connection of the pool.

        *check* is called during the wait for a connection, and may raise. Raises DatabaseAway if no transaction could
        be begun, OutcomeUnknown if the connection was lost while committing.
        """
        with ExitStack() as stack:
            try:
                conn = self._begin(stack, check)
            except ConnectionLost:  # the pool's was lost already; it has been drained
                conn = self._begin(stack, check)
            yield conn

    def _begin(self, stack: ExitStack, check: Check) -> psycopg.Connection[Any]:
        """Begin a transaction that ends with *stack*. Raises ConnectionLost if the pool's connection is lost."""
        with ExitStack() as begun:
            conn = begun.enter_context(self.borrowed(check))
            try:
                seconds = self.transaction_seconds
                begun.enter_context(transaction(conn, seconds, seconds, self._settings))
            except psycopg.Error as error:
                _raise_if_lost(conn, error)
                raise
            stack.push(begun.pop_all())
        conn.is_used = True  # type: ignore[attr-defined]
        return conn

    def read(self, query: Callable[Concatenate[psycopg.Connection[Any], Arguments], Result], *args: Arguments.args,
             **options: Arguments.kwargs) -> Result:  # fmt: skip
        """Return what *query*, one SELECT, returns; retry it on another connection if the first one is lost.

        Raises DatabaseAway.
        """
        try:
            return self._read_once(lambda conn: query(conn, *args, **options))
        except ConnectionLost:
            return self._read_once(lambda conn: query(conn, *args, **options))

    def _read_once(self, query: Callable[[psycopg.Connection[Any]], Result]) -> Result:
        with self.borrowed() as conn:
            try:
                with deadline(conn, self._borrow_seconds + 1), reading(conn):
                    return query(conn)
            except psycopg.Error as error:
                _raise_if_lost(conn, error)
                raise

    @contextmanager
    def borrowed(self, check: Check = lambda: None) -> Iterator[psycopg.Connection[Any]]:
        """Yield a connection of the pool, and return it; drain the pool if it comes back lost."""
        end_if_forked()
        timeout = BorrowTimeout(self.fair_queue, self._borrow_seconds, self._queue_seconds)
        with self._place(timeout, check):
            conn = self._borrow(timeout, check)
            try:
                with self.fair_queue.using(conn):
                    yield _restored(conn)
            except psycopg.errors.ReadOnlySqlTransaction:
                conn.close()  # only a new one sees that a role may write again, or that another server took over
                raise
            finally:
                if is_lost(conn):
                    self.pool.drain()  # its idle siblings are probably lost, too
                self.pool.putconn(conn)

    @contextmanager
    def _place(self, timeout: BorrowTimeout, check: Check) -> Iterator[None]:
        """Hold a place of the fair queue for the block. Raises DatabaseAway, and what *check* raises."""
        event = threading.Event()
        on_turn = event.set
        if not self.fair_queue.take(on_turn):
            try:
                while not event.wait(BORROW_SECONDS / 2):
                    self._check_wait(timeout, check)
            except BaseException:
                self.fair_queue.leave(on_turn)
                raise
        taken_at = time.monotonic()
        try:
            yield
        finally:
            self.fair_queue.release(taken_at)

    def _check_wait(self, timeout: BorrowTimeout, check: Check) -> None:
        check()
        if timeout.is_over():
            raise DatabaseAway(f"no connection for {min(self._borrow_seconds, self._queue_seconds):g} s")

    def _borrow(self, timeout: BorrowTimeout, check: Check) -> Any:
        """Take a connection out of the pool; ask again each half second, since only asking makes the pool try."""
        while True:
            try:
                return self.pool.getconn()
            except PoolTimeout:
                self._check_wait(timeout, check)

    def _clean(self, conn: Connection) -> None:
        """Remove from the session what a handler left there; the pool's thread does so before the next borrower.

        Only where no pooler is in between: behind one, the next transaction may meet another session.
        """
        if not conn.is_used or conn.is_direct is False:
            return
        conn.is_used = False
        with deadline(conn, self._borrow_seconds + 1):
            if conn.is_direct is None:
                conn.is_direct = session.backend_pid(conn) == conn.info.backend_pid
            if conn.is_direct:
                conn.execute(session.CLEAN_SESSION)

    # ------------------------------------------------------------------------------------------------- event loop

    async def open_async(self) -> None:
        """Open the event loop's pool; call it in that loop, again if the tasks of the last one are dead."""
        old = self.async_pool
        options: dict[str, Any] = self._options | {"min_size": 0}
        self.async_pool = AsyncConnectionPool(
            self.dsn,
            connection_class=AsyncConnection,
            name="async-handlers",
            reset=self._clean_async if self._cleans else None,
            **options,
        )
        await self.async_pool.open()
        if old is not None:
            await old.close(timeout=0)

    async def close_async(self) -> None:
        """Close the event loop's pool."""
        self._threads.shutdown(wait=False)
        if self.async_pool is not None:
            await self.async_pool.close(timeout=1)

    async def in_thread(self, query: Callable[[], Result]) -> Result:
        """Return what *query* returns, which it reads from the database in a thread while the event loop runs.

        Not by asyncio.to_thread: handlers may block all of its threads.
        """
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: context.run(query))

    @asynccontextmanager
    async def transaction_async(self, check: Check = lambda: None) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        """Async version of `transaction`."""
        async with AsyncExitStack() as stack:
            try:
                conn = await self._begin_async(stack, check)
            except ConnectionLost:
                conn = await self._begin_async(stack, check)
            yield conn

    async def _begin_async(self, stack: AsyncExitStack, check: Check) -> psycopg.AsyncConnection[Any]:
        async with AsyncExitStack() as begun:
            conn = await begun.enter_async_context(self._borrowed_async(check))
            try:
                await begun.enter_async_context(transaction_async(conn, self.transaction_seconds))
            except psycopg.Error as error:
                _raise_if_lost(conn, error)
                raise
            stack.push_async_exit(begun.pop_all())
        conn.is_used = True  # type: ignore[attr-defined]
        return conn

    @asynccontextmanager
    async def _borrowed_async(self, check: Check) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        end_if_forked()
        timeout = BorrowTimeout(self.async_fair_queue, self._borrow_seconds, self._queue_seconds)
        async with self._place_async(timeout, check):
            if (pool := self.async_pool) is None:
                raise RuntimeError("no event loop runs here: `async with` is for `async def` handlers")
            conn = await self._borrow_async(pool, timeout, check)
            try:
                with self.async_fair_queue.using(conn):
                    yield _restored(conn)
            except psycopg.errors.ReadOnlySqlTransaction:
                await conn.close()
                raise
            finally:
                if is_lost(conn):
                    await pool.drain()
                await pool.putconn(conn)

    @asynccontextmanager
    async def _place_async(self, timeout: BorrowTimeout, check: Check) -> AsyncIterator[None]:
        future = asyncio.get_running_loop().create_future()

        def on_turn() -> None:
            if not future.done():
                future.set_result(None)

        if not self.async_fair_queue.take(on_turn):
            try:
                while not (await asyncio.wait([future], timeout=BORROW_SECONDS))[0]:
                    self._check_wait(timeout, check)
            except BaseException:
                self.async_fair_queue.leave(on_turn)
                raise
        taken_at = time.monotonic()
        try:
            yield
        finally:
            self.async_fair_queue.release(taken_at)

    async def _borrow_async(self, pool: AsyncConnectionPool[Any], timeout: BorrowTimeout, check: Check) -> Any:
        while True:
            try:
                return await pool.getconn()
            except PoolTimeout:
                self._check_wait(timeout, check)

    async def _clean_async(self, conn: AsyncConnection) -> None:
        if not conn.is_used or conn.is_direct is False:
            return
        conn.is_used = False
        with deadline(conn, self._borrow_seconds + 1):
            if conn.is_direct is None:
                cursor = await conn.cursor(row_factory=tuple_row).execute(session.BACKEND_PID)
                conn.is_direct = await cursor.fetchone() == (conn.info.backend_pid,)
            if conn.is_direct:
                await conn.execute(session.CLEAN_SESSION)


def _restored(conn: Any) -> Any:
    """Return a pool's connection without what an earlier handler set on it: how rows are returned, values sent."""
    conn.row_factory = tuple_row
    conn.cursor_factory = (psycopg.Cursor, psycopg.AsyncCursor)[isinstance(conn, psycopg.AsyncConnection)]
    conn.prepare_threshold = None
    return conn


def _raise_if_lost(conn: AnyConnection, error: psycopg.Error) -> None:
    if is_lost(conn):
        raise ConnectionLost(f"connection lost: {error}") from error
