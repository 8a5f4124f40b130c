"""Handlers that do what no handler should: each costs its own batch, is told in one line, and stops no worker."""

import asyncio
import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from typing import Any

import psycopg
import pytest
import structlog
from psycopg.rows import dict_row

import batchq
from batchq.common.text import error_object, one_line
from batchq.testing import running_worker
from tests.support.alone import run_alone
from tests.support.batches import await_status, look, put, values
from tests.support.steps import step
from tests.support.waiting import wait_until

gate = threading.Event()


@pytest.fixture(autouse=True)
def _open_gate_at_the_end() -> Iterator[None]:
    """Begin with a closed gate; open it at the end, so that no thread is left."""
    gate.clear()
    yield
    gate.set()


def is_fine(dsn: str, conn: psycopg.Connection, app: batchq.App, *ids: int, shown: str = "failed") -> list[str]:
    """Work batches with one slot of each style, and a good one of each after them; return their last errors."""

    @app.handler("good")
    def good(batch: batchq.Batch) -> str:
        return "fine"

    @app.handler("good_async")
    async def good_async(batch: batchq.Batch) -> str:
        return "fine"

    with running_worker(app, dsn, concurrency=1, async_concurrency=1, pool_size=1) as worker:
        for batch_id in ids:
            await_status(conn, batch_id, shown, 20)
        for kind in ("good", "good_async"):
            assert await_status(conn, put(conn, kind), "completed", 20).result == "fine"
        assert not worker.lifecycle.stopping.is_set()
    return [(look(conn, batch_id).errors or [{}])[-1].get("error", "") for batch_id in ids]


# ---------------------------------------------------------------------------------------------- errors, as they are


class Meta(type):
    """A metaclass that names no class."""

    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise RuntimeError("no name")


class NamelessError(Exception, metaclass=Meta):
    """An exception whose class has no name to tell."""


class Slippery(str):
    """A text that cannot be split, formatted or measured."""

    __slots__ = ()

    def split(self, *_: Any) -> Any:  # type: ignore[override]
        raise RuntimeError("no parts")

    def __format__(self, _: str) -> str:
        raise RuntimeError("no format")

    def __len__(self) -> int:
        raise RuntimeError("no length")


class SlipperyError(Exception):
    """An exception whose text is no plain text."""

    def __str__(self) -> str:
        return Slippery("slippery")


class EndlessError(Exception):
    """An exception whose text never ends."""

    def __str__(self) -> str:
        return str(self)


class LoudError(Exception):
    """An exception whose repr() and str() end the program."""

    def __repr__(self) -> str:
        raise SystemExit(1)

    __str__ = __repr__


def chain(length: int) -> BaseException:
    """Return an error with as many causes, one behind the other, each of 10 KB."""
    error: BaseException = ValueError("the root of it all")
    for number in range(length):
        try:
            raise RuntimeError(f"{number} " + "x" * 10_000) from error
        except RuntimeError as next_one:
            error = next_one
    return error


def recursive() -> None:
    """Call itself for ever."""
    recursive()


def raised_by(call: Callable[[], None]) -> BaseException:
    """Return what a call raises."""
    try:
        call()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def group(depth: int) -> BaseException:
    """Return groups of errors in groups of errors."""
    error: Exception = ValueError("innermost")
    for number in range(depth):
        error = ExceptionGroup(f"group {number}", [error, ValueError("x" * 1000)] * 20)
    return error


ERRORS: dict[str, tuple[Callable[[], BaseException], str, str]] = {
    "no name": (lambda: NamelessError("said"), "NamelessError: said", "said"),
    "no plain text": (SlipperyError, "SlipperyError: slippery", "slippery"),
    "no end": (EndlessError, "EndlessError: (its str() raised RecursionError)", ""),
    "its text exits": (LoudError, "LoudError: (its str() raised SystemExit)", ""),
    "a chain of 500": (lambda: chain(500), "RuntimeError: 499 xxx", "ValueError: the root of it all"),
    "recursion": (lambda: raised_by(recursive), "RecursionError: maximum recursion depth exceeded", "in recursive"),
    "groups of groups": (lambda: group(3), "ExceptionGroup: group 2 (40 sub-exceptions)", "ExceptionGroup: group 2"),
    "10 MB": (lambda: ValueError("a" * 5_000_000 + "b" * 5_000_000), "ValueError: aaa", "bbb"),
    "NUL and surrogates": (lambda: ValueError("a\0b\ud800c"), "ValueError: a\ufffdb?c", "a\ufffdb?c"),
    "many lines": (lambda: ValueError("one\ntwo\r\n\tthree"), "ValueError: one two three", "one\ntwo"),
    "out of memory": (MemoryError, "MemoryError", "MemoryError"),
    "StopIteration": (lambda: StopIteration(1), "StopIteration: 1", "StopIteration"),
    "StopAsyncIteration": (lambda: StopAsyncIteration(2), "StopAsyncIteration: 2", "StopAsyncIteration"),
    "a name of 10 KB": (lambda: type("N" * 10_000, (Exception,), {})("said"), "NNN", "said"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_what_is_stored_of_an_error_is_8_kb_at_most_one_line_and_readable(name: str) -> None:
    make, begins, in_trace = ERRORS[name]
    error = raised_by(lambda: (_ for _ in ()).throw(make())) if "Stop" not in name else make()
    stored = json.loads(error_object(error))
    assert stored["error"].startswith(begins)
    assert "\n" not in stored["error"]
    assert in_trace in stored["traceback"]
    assert len(stored["error"].encode()) + len(stored["traceback"].encode()) <= 8_192
    assert "\0" not in stored["traceback"]
    assert len(one_line(error).encode()) <= 2_000


def test_every_error_is_a_failed_attempt_and_the_one_slot_goes_on(dsn: str, conn: psycopg.Connection) -> None:
    app = batchq.App()

    @app.handler("raise")
    def raising(batch: batchq.Batch) -> None:
        raise ERRORS[batch.payload][0]()

    @app.handler("raise_async")
    async def raising_async(batch: batchq.Batch) -> None:
        raise ERRORS[batch.payload][0]()

    @app.item_handler("raise_items")
    def raising_item(item: str) -> None:
        raise ERRORS[item][0]()

    ids = [put(conn, kind, name, max_attempts=1) for kind in ("raise", "raise_async") for name in ERRORS]
    ids.append(put(conn, "raise_items", items=list(ERRORS), max_attempts=1))
    is_fine(dsn, conn, app, *ids)
    sizes = values(conn, "SELECT octet_length(errors -> 0 ->> 'error') FROM batchq.all_batches WHERE status = 'failed'")
    assert max(sizes) <= 2_000
    assert values(conn, "SELECT count(*) FROM batchq.failed_items WHERE octet_length(error) <= 2000") == [len(ERRORS)]


def test_a_cancellation_whose_reason_is_10_mb_or_none_is_a_cancellation(dsn: str, conn: psycopg.Connection) -> None:
    app = batchq.App()

    class MuteCancelError(batchq.Cancel):
        def __str__(self) -> str:
            raise RuntimeError("mute")

    @app.handler("cancel")
    def cancel(batch: batchq.Batch) -> None:
        raise MuteCancelError if batch.payload == "mute" else batchq.Cancel("x" * 10_000_000)

    ids = [put(conn, "cancel", how) for how in ("mute", "long")]
    mute, long = is_fine(dsn, conn, app, *ids, shown="cancelled")
    assert mute == "cancelled: (its str() raised RuntimeError)"
    assert long.startswith("cancelled: xxx")
    assert len(long) <= 2_000


# ------------------------------------------------------------------------------------------------- results, no JSON


def deep(levels: int) -> Any:
    """Return a list in a list, and so on."""
    nested: Any = []
    for _ in range(levels):
        nested = [nested]
    return nested


def cycle() -> Any:
    """Return a mapping that contains itself."""
    found: dict[str, Any] = {}
    found["self"] = found
    return found


def unawaited() -> Coroutine[Any, Any, None]:
    """Return a closed coroutine: of another one Python says, whenever the collector runs, that nobody awaited it."""
    made = asyncio.sleep(0)
    made.close()
    return made


RESULTS: dict[str, tuple[Callable[[], Any], str]] = {
    "a set": (lambda: {1, 2}, "Object of type set is not JSON serializable"),
    "bytes": (lambda: b"x", "Object of type bytes is not JSON serializable"),
    "NaN": (lambda: [float("nan")], "Out of range float values are not JSON compliant"),
    "infinity": (lambda: -float("inf"), "Out of range float values are not JSON compliant"),
    "a cycle": (cycle, "Circular reference detected"),
    "10,000 levels": (lambda: deep(10_000), "maximum recursion depth exceeded"),
    "a huge number": (lambda: 10**5_000, "Exceeds the limit (4300 digits) for integer string conversion"),
    "64 MB": (lambda: "x" * 67_108_864, "67,108,866 bytes of JSON; at most 1,000,000"),
    "a little too much": (lambda: "é" * 500_000, "1,000,002 bytes of JSON; at most 1,000,000"),
    "a tuple as a key": (lambda: {(1, 2): 3}, "keys must be str, int, float, bool or None, not tuple"),
    "a lone surrogate": (lambda: "\ud800", "surrogates not allowed"),
    "a surrogate in a key": (lambda: {"\udfff": 1}, "surrogates not allowed"),
    "NUL": (lambda: "a\0b", "it has a NUL character (\\u0000), which Postgres refuses"),
    "a generator": (lambda: (number for number in range(3)), "Object of type generator is not JSON serializable"),
    "a coroutine": (unawaited, "Object of type coroutine is not JSON serializable"),
    "an exception": (lambda: ValueError("x"), "Object of type ValueError is not JSON serializable"),
    "the batch": (lambda: batchq.Batch, "Object of type type is not JSON serializable"),
}


def test_a_result_that_is_no_json_fails_its_batch_and_says_why(dsn: str, conn: psycopg.Connection) -> None:
    app = batchq.App()

    @app.handler("return")
    def returning(batch: batchq.Batch) -> Any:
        return RESULTS[batch.payload][0]()

    @app.handler("return_async")
    async def returning_async(batch: batchq.Batch) -> Any:
        return RESULTS[batch.payload][0]()

    @app.handler("complete")
    def completing(batch: batchq.Batch) -> None:
        with batch.transaction(result=RESULTS[batch.payload][0]()):
            pass

    names = list(RESULTS)
    for kind in ("return", "return_async"):
        errors = is_fine(dsn, conn, batchq.App(app.handlers.copy()), *[put(conn, kind, name) for name in names])
        for name, error in zip(names, errors, strict=True):
            assert error.startswith("InvalidInput: what the handler returned "), name
            assert RESULTS[name][1] in error, name
    no_json = [name for name in names if "64 MB" not in name and "too much" not in name]
    for error in is_fine(dsn, conn, app, *[put(conn, "complete", name) for name in no_json]):
        assert error.startswith("InvalidInput: the result cannot be stored as JSON: ")


def test_what_is_odd_but_json_is_the_result(dsn: str, conn: psycopg.Connection) -> None:
    app = batchq.App()
    odd = [{7: "a", None: "b", True: "c", 1.5: "d"}, 10**4_000, -0.0, "\u2028\x7f\ufffe", "x" * 999_000, deep(300)]
    app.handler("return")(lambda batch: odd[batch.payload])
    ids = [put(conn, "return", number) for number in range(len(odd))]
    is_fine(dsn, conn, app, *ids, shown="completed")
    assert look(conn, ids[0]).result == {"7": "a", "true": "c", "null": "b", "1.5": "d"}
    assert look(conn, ids[1]).result == 10**4_000
    assert look(conn, ids[3]).result == odd[3]


def test_a_snooze_for_longer_than_there_is_time_fails_its_batch(dsn: str, conn: psycopg.Connection) -> None:
    app = batchq.App()

    @app.handler("snooze")
    def snooze(batch: batchq.Batch) -> None:
        raise batchq.Snooze(1e300)

    [error] = is_fine(dsn, conn, app, put(conn, "snooze"))
    assert error.startswith("the outcome could not be stored: ")


@pytest.mark.parametrize("is_async", [False, True])
def test_a_generator_is_refused_as_a_handler(is_async: bool) -> None:
    def generator(batch: batchq.Batch) -> Iterator[int]:
        yield 1

    async def async_generator(batch: batchq.Batch) -> Any:
        yield 1

    with pytest.raises(batchq.ConfigError, match="is a generator: nobody would run its body"):
        batchq.App().handler("generator")(async_generator if is_async else generator)


# -------------------------------------------------------------------------------------------- abused transactions

ROWS = "CREATE TABLE rows (batch_id bigint)"


def transactions(*statements: str) -> Callable[[batchq.Batch], None]:
    """Return a handler that writes a row and runs statements in its transaction."""

    def handler(batch: batchq.Batch) -> None:
        with batch.transaction() as conn:
            conn.execute("INSERT INTO rows VALUES (%s)", [batch.id])
            for statement in statements:
                conn.execute(statement.encode())

    return handler


def left_open(batch: batchq.Batch) -> None:
    """Begin a transaction, and never end it."""
    batch.transaction().__enter__().execute("INSERT INTO rows VALUES (%s)", [batch.id])


def left_open_and_raised(batch: batchq.Batch) -> None:
    """Begin a transaction, and raise out of it."""
    left_open(batch)
    raise ValueError("out of it")


def chunk_left_open(batch: batchq.Batch) -> None:
    """Begin a chunk's transaction, and never end it."""
    for chunk in batch.chunks(10):
        chunk.transaction().__enter__().execute("INSERT INTO rows VALUES (%s)", [batch.id])
        return


def closed(batch: batchq.Batch) -> None:
    """Close the connection within the block."""
    with batch.transaction() as conn:
        conn.execute("INSERT INTO rows VALUES (%s)", [batch.id])
        conn.close()


def socket_closed(batch: batchq.Batch) -> None:
    """Close the connection's file behind its back."""
    with batch.transaction() as conn:
        conn.execute("INSERT INTO rows VALUES (%s)", [batch.id])
        os.close(conn.fileno())


def call(name: str) -> Callable[[batchq.Batch], None]:
    """Return a handler that calls a method of its connection within the block."""

    def handler(batch: batchq.Batch) -> None:
        with batch.transaction() as conn:
            conn.execute("INSERT INTO rows VALUES (%s)", [batch.id])
            getattr(conn, name)()

    return handler


def autocommit(batch: batchq.Batch) -> None:
    """Change the connection's autocommit within the block."""
    with batch.transaction() as conn:
        conn.execute("INSERT INTO rows VALUES (%s)", [batch.id])
        conn.autocommit = False


def swallowed(batch: batchq.Batch) -> None:
    """Swallow the error of a statement within the block."""
    with batch.transaction() as conn:
        conn.execute("INSERT INTO rows VALUES (%s)", [batch.id])
        with suppress(psycopg.Error):
            conn.execute("SELECT 1 / 0")


def inner_left_open(batch: batchq.Batch) -> None:
    """Begin a savepoint within the block, and never end it."""
    with batch.transaction() as conn:
        conn.execute("INSERT INTO rows VALUES (%s)", [batch.id])
        conn.transaction().__enter__()


def streamed(batch: batchq.Batch) -> None:
    """Leave a result half read within the block."""
    with batch.transaction() as conn:
        conn.execute("INSERT INTO rows VALUES (%s)", [batch.id])
        next(iter(conn.cursor().stream("SELECT generate_series(1, 1000)")))


ABUSED: dict[str, tuple[Callable[[batchq.Batch], None], str, int]] = {
    "COMMIT": (transactions("COMMIT"), "InvalidInput: the handler of batch", 1),
    "ROLLBACK": (transactions("ROLLBACK"), "InvalidInput: the handler of batch", 0),
    "a lock left": (transactions("SELECT pg_advisory_lock(7)"), "", 1),
    "commit()": (call("commit"), "ProgrammingError: Explicit commit() forbidden within a Transaction", 0),
    "rollback()": (call("rollback"), "ProgrammingError: Explicit rollback() forbidden within a Transaction", 0),
    "cancel()": (call("cancel"), "", 1),
    "close()": (closed, "OperationalError: the connection is closed", 0),
    "its file closed": (socket_closed, "", 0),
    "autocommit": (autocommit, "ProgrammingError: can't change 'autocommit' now", 0),
    "left open": (left_open, "InvalidInput: the handler of batch", 0),
    "left open, raised": (left_open_and_raised, "ValueError: out of it", 0),
    "a swallowed error": (swallowed, "InFailedSqlTransaction: current transaction is aborted", 0),
    "a savepoint left open": (inner_left_open, "", 1),
    "a result half read": (streamed, "", 1),
}


@pytest.mark.parametrize("name", ABUSED)
def test_an_abused_transaction_costs_its_own_batch_and_the_one_connection_serves_the_next(
    dsn: str, conn: psycopg.Connection, name: str
) -> None:
    handler, said, rows = ABUSED[name]
    app = batchq.App()
    conn.execute(ROWS)
    app.handler("abuse", timeout_seconds=15)(handler)
    app.handler("next")(transactions())
    abused = put(conn, "abuse", max_attempts=1)
    with running_worker(app, dsn, concurrency=1, pool_size=1, transaction_timeout_seconds=5) as worker:
        wait_until(lambda: look(conn, abused).status in ("completed", "failed"), 20, "it to end")
        after = put(conn, "next")
        await_status(conn, after, "completed", 20)
        assert not worker.lifecycle.stopping.is_set()
    ended = look(conn, abused)
    step("%s: %s", name, ended.errors)
    found = values(conn, "SELECT count(*) FROM rows WHERE batch_id = %s", abused)
    assert found == [rows]
    assert ended.status == ("completed" if rows and not said else "failed")
    assert said in (ended.errors[0]["error"] if ended.errors else "")
    assert values(conn, "SELECT count(*) FROM rows WHERE batch_id = %s", after) == [1]


def test_a_chunks_transaction_left_open_is_rolled_back(dsn: str, conn: psycopg.Connection) -> None:
    conn.execute(ROWS)
    app = batchq.App()
    app.handler("abuse")(chunk_left_open)
    [error] = is_fine(dsn, conn, app, put(conn, "abuse", items=[1, 2, 3]))
    assert "returned with a transaction still open; open it in a `with` block" in error
    assert values(conn, "SELECT count(*) FROM rows") == [0]


def test_an_async_transaction_left_open_is_rolled_back_and_its_connection_serves_the_next(
    dsn: str, conn: psycopg.Connection
) -> None:
    conn.execute(ROWS)
    app = batchq.App()

    @app.handler("abuse")
    async def abuse(batch: batchq.Batch) -> None:
        transaction = await batch.transaction().__aenter__()
        await transaction.execute("INSERT INTO rows VALUES (%s)", [batch.id])
        if batch.payload == "COMMIT":
            await transaction.execute("COMMIT")

    @app.handler("next")
    async def following(batch: batchq.Batch) -> None:
        async with batch.transaction() as transaction:
            await transaction.execute("INSERT INTO rows VALUES (%s)", [batch.id])

    ids = [put(conn, "abuse"), put(conn, "abuse", "COMMIT")]
    for error in is_fine(dsn, conn, app, *ids):
        assert "returned with a transaction still open; open it in a `with` block" in error
    with running_worker(app, dsn, pool_size=1):
        await_status(conn, put(conn, "next"), "completed", 20)
    assert values(conn, "SELECT count(*) FROM rows") == [2]


def test_what_a_handler_sets_on_its_connection_is_gone_for_the_next_one(dsn: str, conn: psycopg.Connection) -> None:
    app = batchq.App()

    @app.handler("sets")
    def sets(batch: batchq.Batch) -> None:
        with batch.transaction() as own:
            own.row_factory = dict_row  # type: ignore[assignment]
            own.cursor_factory = psycopg.ClientCursor
            own.prepare_threshold = 0

    @app.handler("finds")
    def finds(batch: batchq.Batch) -> Any:
        with batch.transaction(cursor=1) as own:
            row = own.execute("SELECT 1").fetchone()
            return [row, own.cursor_factory is psycopg.Cursor, own.prepare_threshold]

    with running_worker(app, dsn, concurrency=1, pool_size=1):
        await_status(conn, put(conn, "sets"), "completed")
        assert await_status(conn, put(conn, "finds"), "completed").result == [[1], True, None]


def test_a_transaction_in_a_thread_of_the_handlers_own_is_the_batchs(dsn: str, conn: psycopg.Connection) -> None:
    conn.execute(ROWS)
    app = batchq.App()

    @app.handler("threads")
    def threads(batch: batchq.Batch) -> None:
        def write() -> None:
            with batch.transaction() as own:
                own.execute("INSERT INTO rows VALUES (%s)", [batch.id])

        thread = threading.Thread(target=write)
        thread.start()
        thread.join()

    is_fine(dsn, conn, app, put(conn, "threads"), shown="completed")
    assert values(conn, "SELECT count(*) FROM rows") == [1]


# --------------------------------------------------------------------------------------------- the process, abused


@pytest.mark.parametrize("style", ["def", "async def"])
@pytest.mark.parametrize("how", ["returns", "raises", "exits the transaction", "asks the database"])
def test_of_a_handler_that_forks_only_the_parent_comes_back(
    dsn: str, conn: psycopg.Connection, style: str, how: str
) -> None:
    if style == "async def" and "trans" in how:
        how = "returns"
    app = batchq.App()
    conn.execute(ROWS)
    children: list[int] = []

    def fork(batch: batchq.Batch) -> str:
        if how == "exits the transaction":
            with batch.transaction(cursor=1) as own:
                own.execute("INSERT INTO rows VALUES (%s)", [batch.id])
                child = os.fork()
        else:
            child = os.fork()
        if child == 0:
            if how == "raises":
                raise ValueError("in the child")
            if how == "asks the database" and style == "def":
                batch.checkpoint(2)
            return "child"
        children.append(child)
        return "parent"

    async def fork_async(batch: batchq.Batch) -> str:
        return fork(batch)

    app.handler("fork")(fork if style == "def" else fork_async)
    batch_id = put(conn, "fork")
    is_fine(dsn, conn, app, batch_id, shown="completed")
    assert look(conn, batch_id).result == "parent"
    [child] = children
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 70
    assert values(conn, "SELECT count(*) FROM rows") == [how == "exits the transaction"]


def test_a_handlers_children_of_the_usual_kinds_are_left_alone(dsn: str, conn: psycopg.Connection) -> None:
    app = batchq.App()

    @app.handler("children")
    def children(batch: batchq.Batch) -> Any:
        with multiprocessing.get_context("fork").Pool(1) as pool:
            return [pool.apply(abs, (-7,)), subprocess.run([sys.executable, "-c", "print(1)"], check=True).returncode]

    batch_id = put(conn, "children")
    is_fine(dsn, conn, app, batch_id, shown="completed")
    assert look(conn, batch_id).result == [7, 0]


def test_a_handler_that_closes_or_replaces_the_streams_stops_nothing(
    dsn: str, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        """A stream that cannot be written."""

        def write(self, _: str) -> int:
            raise ValueError("I/O operation on closed file")

        flush = close = isatty = fileno = write  # type: ignore[assignment]

    app = batchq.App()
    structlog.reset_defaults()

    @app.handler("streams")
    def streams(batch: batchq.Batch) -> None:
        monkeypatch.setattr(sys, "stdout", Broken())
        monkeypatch.setattr(sys, "stderr", None)
        raise ValueError("told nowhere")

    try:
        with running_worker(app, dsn, concurrency=1) as worker:
            batch_id = put(conn, "streams", max_attempts=1)
            await_status(conn, batch_id, "failed")
            again = put(conn, "streams", max_attempts=1)
            await_status(conn, again, "failed")
            conn.execute("SELECT batchq.cancel(%s)", [put(conn, "nobody")])
            assert not worker.lifecycle.stopping.is_set()
    finally:
        monkeypatch.undo()


def test_threads_and_generators_that_handlers_leave_behind_stop_nothing(dsn: str, conn: psycopg.Connection) -> None:
    app = batchq.App()
    kept: list[Any] = []

    @app.handler("leave")
    def leave(batch: batchq.Batch) -> None:
        threading.Thread(target=gate.wait, args=(60,), daemon=True).start()
        chunks = iter(batch.chunks(1))
        kept.append((next(chunks), chunks))
        gc.disable()

    @app.handler("leave_async")
    async def leave_async(batch: batchq.Batch) -> None:
        chunks = aiter(batch.chunks(1))
        kept.append((await anext(chunks), chunks, asyncio.create_task(asyncio.sleep(3600))))

    try:
        ids = [put(conn, kind, items=[1, 2], max_attempts=1) for kind in ("leave", "leave_async")]
        for error in is_fine(dsn, conn, app, *ids):
            assert error.startswith("the handler returned after 0 of 2 items")
    finally:
        gc.enable()


def test_a_handler_that_sets_signal_handlers_is_refused_by_python(dsn: str, conn: psycopg.Connection) -> None:
    app = batchq.App()

    @app.handler("signals")
    def signals(batch: batchq.Batch) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    [error] = is_fine(dsn, conn, app, put(conn, "signals", max_attempts=1))
    assert error == "ValueError: signal only works in main thread of the main interpreter"


# ------------------------------------------------------------------------------------------- the event loop, abused


def stop_loop() -> None:
    """Stop the event loop."""
    asyncio.get_running_loop().stop()


def cancel_all() -> None:
    """Cancel every task there is."""
    for task in asyncio.all_tasks():
        task.cancel()


def close_loop() -> None:
    """Close the event loop."""
    asyncio.get_running_loop().close()


@pytest.mark.parametrize("abuse", [stop_loop, cancel_all, close_loop])
def test_an_event_loop_that_a_handler_stops_or_empties_runs_on(
    dsn: str, conn: psycopg.Connection, abuse: Callable[[], None]
) -> None:
    conn.execute(ROWS)
    app = batchq.App()

    @app.handler("abuse", backoff=batchq.Backoff(0.01, 0.02))
    async def abusing(batch: batchq.Batch) -> None:
        if batch.attempt == 1:
            abuse()
        await asyncio.sleep(0)

    @app.handler("rows", backoff=batchq.Backoff(0.01, 0.02))
    async def rows(batch: batchq.Batch) -> None:
        async with batch.transaction() as own:
            await own.execute("INSERT INTO rows VALUES (%s)", [batch.id])

    first = put(conn, "rows")
    with running_worker(app, dsn, async_concurrency=50, lease_seconds=5):
        await_status(conn, first, "completed", 20)
        ids = [put(conn, kind) for _ in range(5) for kind in ("rows", "abuse", "rows")]
        for batch_id in ids:
            await_status(conn, batch_id, "completed", 20)
    assert values(conn, "SELECT count(*) FROM rows") == [11]
    assert values(conn, "SELECT count(*) FROM (SELECT FROM rows GROUP BY batch_id HAVING count(*) > 1) twice") == [0]


def test_threads_that_coroutines_have_lost_do_not_keep_batchq_from_its_own(dsn: str, conn: psycopg.Connection) -> None:
    app = batchq.App()

    @app.handler("lost", timeout_seconds=0.2)
    async def lost(batch: batchq.Batch) -> None:
        await asyncio.to_thread(gate.wait, 60)

    @app.item_handler("items")
    async def items(item: str) -> None:
        raise ValueError(item)

    ids = [put(conn, "lost", max_attempts=1) for _ in range(40)]
    with running_worker(app, dsn, async_concurrency=50):
        for batch_id in ids:
            await_status(conn, batch_id, "failed", 20)
        step("payloads too large for a claim, items and their errors are read in threads of batchq's own")
        batch_id = put(conn, "items", "x" * 100_000, items=["a", "b"], max_attempts=1)
        await_status(conn, batch_id, "failed", 20)
        gate.set()


if __name__ == "__main__":
    run_alone(__file__)
