"""Registering handlers and finding the app: every mistake is told at once, in one line."""

import asyncio
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pydantic import BaseModel

import batchq
from batchq.app import load_app
from batchq.errors import ConfigError, InvalidInput
from batchq.worker.worker import Worker
from tests.support.alone import run_alone
from tests.support.batches import drain, look, put

# ------------------------------------------------------------------------------------------------ the decorator


def test_the_decorator_leaves_a_plain_function() -> None:
    app = batchq.App()

    def double(batch: int) -> int:
        return 2 * batch

    async def double_async(item: int) -> int:
        return 2 * item

    assert app.handler("a")(double) is double
    assert app.item_handler("b")(double_async) is double_async
    assert double(21) == 42
    assert asyncio.run(double_async(21)) == 42
    assert sorted(app.handlers) == ["a", "b"]
    assert (app.handlers["a"].is_async, app.handlers["b"].is_async) == (False, True)


def test_one_function_may_work_several_kinds(dsn: str, conn: psycopg.Connection) -> None:
    app = batchq.App()

    @app.handler("one")
    @app.handler("two")
    def work(batch: batchq.Batch) -> str:
        return batch.kind

    ids = [put(conn, kind) for kind in ("one", "two")]
    drain(app, dsn)
    assert [look(conn, batch_id).result for batch_id in ids] == ["one", "two"]


def test_methods_partials_and_callables_may_be_handlers(dsn: str, conn: psycopg.Connection) -> None:
    class Mailer:
        def send(self, _batch: batchq.Batch) -> str:
            return "method"

        def __call__(self, _batch: batchq.Batch) -> str:
            return "callable"

    def send(how: str, batch: batchq.Batch) -> str:
        return how

    app = batchq.App()
    app.handler("method")(Mailer().send)
    app.handler("partial")(functools.partial(send, "partial"))
    app.handler("callable")(Mailer())
    ids = {kind: put(conn, kind) for kind in app.handlers}
    drain(app, dsn)
    assert {kind: look(conn, batch_id).result for kind, batch_id in ids.items()} == {kind: kind for kind in ids}


# ------------------------------------------------------------------------------------------------ registering


def nothing() -> None:
    """Take no argument."""


def one(batch: Any) -> None:
    """Take a batch or an item."""


def two(batch: Any, more: Any) -> None:
    """Take more than a handler gets."""


def with_conn(item: Any, conn: Any) -> None:
    """Take the connection."""


REFUSED: dict[str, tuple[Callable[[batchq.App], object], str]] = {
    "no text": (lambda app: app.handler(7)(one), "a kind is a text of 1 to 200 bytes, not 7"),  # type: ignore[arg-type]
    "empty": (lambda app: app.handler("")(one), "a kind is a text of 1 to 200 bytes, not ''"),
    "too long": (lambda app: app.handler("ü" * 101)(one), "a kind is a text of 1 to 200 bytes, not 'üüü"),
    "taken": (lambda app: (app.handler("a")(one), app.item_handler("a")(one)), "kind 'a' has a handler already"),
    "no argument": (
        lambda app: app.handler("a")(nothing),
        "the handler of 'a', nothing(), must take an argument, the batch",
    ),
    "no item": (lambda app: app.item_handler("a")(nothing), "must take an argument, the item"),
    "two arguments": (lambda app: app.handler("a")(two), "the handler of 'a', two(), is called with only the batch"),
    "no function": (lambda app: app.handler("a")("send"), "the handler of 'a' is not a function: 'send'"),
    "a decorator without its call": (lambda app: app.handler(one), "a kind is a text of 1 to 200 bytes"),  # type: ignore[arg-type]
    "an unknown argument": (
        lambda app: app.item_handler("a")(two),
        "the item handler of 'a' takes (item, batch), not more",
    ),
    "conn without a transaction": (
        lambda app: app.item_handler("a")(with_conn),
        "the item handler of 'a' takes (item, batch), not conn; conn is for transactional=True",
    ),
    "concurrency 0": (lambda app: app.item_handler("a", concurrency=0)(one), "start at 1, not 0 and 1000"),
    "chunk size 0": (lambda app: app.item_handler("a", chunk_size=0)(one), "start at 1, not 1 and 0"),
    "one connection for several": (
        lambda app: app.item_handler("a", transactional=True, concurrency=2)(one),
        "'a': a transactional item handler has one connection, so concurrency must be 1",
    ),
    "no time": (lambda app: app.handler("a", timeout_seconds=0)(one), "timeout_seconds of 'a' must be over 0, not 0"),
    "time NaN": (
        lambda app: app.handler("a", timeout_seconds=float("nan"))(one),
        "timeout_seconds of 'a' must be over 0, not nan",
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_in_registering_is_told_at_once(mistake: str) -> None:
    register, said = REFUSED[mistake]
    with pytest.raises(ConfigError) as caught:
        register(batchq.App())
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_kind_that_is_taken_names_who_has_it() -> None:
    app = batchq.App()
    app.handler("a")(one)
    with pytest.raises(ConfigError, match=r"kind 'a' has a handler already: one"):
        app.handler("a")(one)


def test_an_app_without_handlers_makes_no_worker() -> None:
    with pytest.raises(ConfigError, match="the app has no handlers"):
        Worker(batchq.App(), batchq.Settings.load(dsn="postgresql://nowhere"))


# ------------------------------------------------------------------------------------------------ load_app


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in a new directory, from which modules can be imported; forget them afterwards."""
    before = set(sys.modules), list(sys.path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.path[:] = before[1]
    for name in set(sys.modules) - before[0]:
        del sys.modules[name]


GOOD = """
import batchq
app = batchq.App()
other = 7
empty = batchq.App()

@app.handler("send")
def send(batch): pass
"""


def test_an_app_is_found_in_the_current_directory(here: Path) -> None:
    (here / "good_tasks.py").write_text(GOOD)
    (here / "package").mkdir()
    (here / "package" / "good_tasks.py").write_text(GOOD)
    assert list(load_app("good_tasks:app").handlers) == ["send"]
    assert list(load_app("package.good_tasks:app").handlers) == ["send"]


@pytest.mark.parametrize(
    ("name", "source", "said"),
    [
        ("tasks", GOOD, "name the app as MODULE:APP, such as tasks:app, not 'tasks'"),
        (":app", GOOD, "name the app as MODULE:APP"),
        ("tasks:", GOOD, "name the app as MODULE:APP"),
        ("no_such_module:app", GOOD, "cannot import 'no_such_module': ModuleNotFoundError: No module named"),
        ("tasks.deeper:app", GOOD, "cannot import 'tasks.deeper': ModuleNotFoundError"),
        ("../tasks:app", GOOD, "cannot import '../tasks'"),
        (".tasks:app", GOOD, "cannot import '.tasks': TypeError"),
        ("tasks:app", "def broken(:\n  pass\n", "cannot import 'tasks': SyntaxError: invalid syntax"),
        ("tasks:app", "import no_such_module", "cannot import 'tasks': ModuleNotFoundError: No module named"),
        ("tasks:app", "raise ValueError('two\\nlines')", "cannot import 'tasks': ValueError: two lines"),
        ("tasks:app", "raise SystemExit('bye')", "cannot import 'tasks': SystemExit: bye"),
        ("tasks:app", "x = '\\0'\n\0", "cannot import 'tasks': "),
        ("tasks:nothing", GOOD, "'tasks' has no 'nothing'; its apps: app, empty"),
        ("tasks:other", GOOD, "'tasks:other' is not a batchq.App (it is int)"),
        ("tasks:empty", GOOD, "'tasks:empty' has no handlers; decorate functions with @empty.handler(kind)"),
    ],
)
def test_an_app_that_cannot_be_had_is_told_in_one_line(here: Path, name: str, source: str, said: str) -> None:
    (here / "tasks.py").write_text(source)
    with pytest.raises(ConfigError) as caught:
        load_app(name)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ back-off


@pytest.mark.parametrize(
    ("attempt", "seconds"), [(0, 5), (1, 5), (2, 10), (3, 20), (8, 640), (11, 3600), (10**9, 3600)]
)
def test_the_wait_doubles_up_to_its_most_with_jitter_of_half(attempt: int, seconds: float) -> None:
    waits = [batchq.Backoff().delay_seconds(attempt) for _ in range(500)]
    assert 0.5 * seconds <= min(waits) < 0.6 * seconds
    assert 1.4 * seconds < max(waits) <= 1.5 * seconds


def test_a_back_off_of_nothing_does_not_wait() -> None:
    assert {batchq.Backoff(0, 0).delay_seconds(attempt) for attempt in range(1, 9)} == {0}


@pytest.mark.parametrize(("first", "most"), [(-1, 5), (6, 5), (0, float("inf")), (float("nan"), 5), (1, float("nan"))])
def test_a_back_off_that_cannot_be_is_refused(first: float, most: float) -> None:
    with pytest.raises(InvalidInput, match="Backoff needs 0 <= first_seconds <= most_seconds"):
        batchq.Backoff(first, most)


@pytest.mark.parametrize("seconds", [-1, float("inf"), float("nan")])
def test_a_snooze_that_cannot_be_is_refused(seconds: float) -> None:
    with pytest.raises(InvalidInput, match="Snooze takes a number of seconds from 0 up"):
        batchq.Snooze(seconds)


def test_a_models_message_is_one_line() -> None:
    from batchq.worker.items import validate

    class Two(BaseModel):
        first: int
        second: int

    with pytest.raises(InvalidInput) as caught:
        validate(Two, {"first": "x"}, "payload")
    assert "first: " in str(caught.value)
    assert "; second: Field required" in str(caught.value)
    assert "\n" not in str(caught.value)


if __name__ == "__main__":
    run_alone(__file__)
