"""The log: every line that a handler causes names its batch, in every form; no line shows a password."""

import asyncio
import io
import json
import logging
import sys
import threading
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
import structlog
from psycopg.conninfo import make_conninfo

import batchq
from batchq.common import log
from batchq.errors import ConfigError
from tests.support.alone import run_alone
from tests.support.batches import STYLES, drain, put
from tests.support.servers import free_port

both_styles = pytest.mark.parametrize("style", STYLES)
SECRET = "s3cr3t-w0rd"


class Captured:
    """What was logged: its text, and its lines as objects where the format is JSON."""

    def __init__(self, stream: io.StringIO) -> None:
        self.stream = stream

    @property
    def text(self) -> str:
        """All that was logged."""
        return self.stream.getvalue()

    def lines(self, event: str) -> list[dict[str, Any]]:
        """Return the JSON lines of one event."""
        objects = [json.loads(line) for line in self.text.splitlines()]
        return [line for line in objects if line["event"] == event]


@pytest.fixture
def logged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Captured]:
    """Configure the log as a worker does, and capture it; the parameter is the format, json by default."""
    root = logging.getLogger()
    before = root.handlers[:], root.level, structlog.get_config()
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    log.configure(getattr(request, "param", "json"), "info")
    monkeypatch.undo()
    yield Captured(stream)
    root.handlers[:], level = before[0], before[1]
    root.setLevel(level)
    structlog.configure(**before[2])


def say(how: str, item: object = None) -> None:
    """Log a line by structlog, and one by logging, in every way a handler may."""
    structlog.get_logger().info("by structlog", how=how, item=item)
    structlog.get_logger("mine").bind(bound=1).warning("bound", how=how)
    logging.getLogger("mine").warning("by %s", "logging", extra={"how": how})
    logging.getLogger("mine.deeper").info("deeper")


def make_talking_app() -> batchq.App:
    """Return an app of handlers that log."""
    app = batchq.App()

    @app.handler("def")
    def work(batch: batchq.Batch) -> None:
        say("thread")

    @app.handler("async def")
    async def work_async(batch: batchq.Batch) -> None:
        say("coroutine")
        await asyncio.sleep(0)
        await asyncio.gather(later(), asyncio.to_thread(say, "thread of a coroutine"))

    async def later() -> None:
        say("task of a coroutine")

    @app.item_handler("items def", concurrency=3)
    def item(item: int) -> None:
        say("thread of an item", item)

    @app.item_handler("items async def", concurrency=3)
    async def item_async(item: int) -> None:
        await asyncio.sleep(0)
        say("coroutine of an item", item)

    return app


EVENTS = ("by structlog", "bound", "by logging", "deeper")


@pytest.mark.parametrize("kind", ["def", "async def", "items def", "items async def"])
def test_every_line_of_a_handler_names_its_batch(
    dsn: str, conn: psycopg.Connection, logged: Captured, kind: str
) -> None:
    items = list(range(4)) if kind.startswith("items") else None
    ids = [put(conn, kind, items=items) for _ in range(3)]

    drain(make_talking_app(), dsn)

    lines_each = {"def": 1, "async def": 3}.get(kind, 4)
    for event in EVENTS:
        lines = logged.lines(event)
        assert sorted(line["batch_id"] for line in lines) == sorted(ids * lines_each)
        assert {(line["kind"], line["attempt"]) for line in lines} == {(kind, 1)}
        assert all({"timestamp", "level"} <= line.keys() for line in lines)


@pytest.mark.parametrize("logged", ["console"], indirect=True)
@pytest.mark.parametrize("kind", ["def", "async def", "items def", "items async def"])
def test_every_line_for_people_names_its_batch_too(
    dsn: str, conn: psycopg.Connection, logged: Captured, kind: str
) -> None:
    batch_id = put(conn, kind, items=[1] if kind.startswith("items") else None)

    drain(make_talking_app(), dsn)

    for event in EVENTS:
        lines = [line for line in logged.text.splitlines() if event in line]
        assert lines
        assert all(f"batch_id={batch_id}" in line and "attempt=1" in line for line in lines)


@both_styles
def test_batchqs_own_lines_of_a_batch_name_it(dsn: str, conn: psycopg.Connection, logged: Captured, style: str) -> None:
    app = batchq.App()

    def end(batch: batchq.Batch) -> None:
        ends = {
            "error": ValueError("bad"),
            "snooze": batchq.Snooze(60),
            "cancel": batchq.Cancel("no"),
            "invalid": batchq.InvalidInput("never"),
        }
        raise ends[batch.payload]

    @app.handler("def")
    def work(batch: batchq.Batch) -> None:
        end(batch)

    @app.handler("async def")
    async def work_async(batch: batchq.Batch) -> None:
        end(batch)

    ids = {end: put(conn, style, end) for end in ("error", "snooze", "cancel", "invalid")}
    drain(app, dsn)

    found = {
        event: [(line["batch_id"], line["kind"], line["attempt"]) for line in logged.lines(event)]
        for event in ("attempt failed", "batch snoozed", "batch cancelled", "batch failed")
    }
    assert found == {
        "attempt failed": [(ids["error"], style, 1)],
        "batch snoozed": [(ids["snooze"], style, 1)],
        "batch cancelled": [(ids["cancel"], style, 1)],
        "batch failed": [(ids["invalid"], style, 1)],
    }


def test_lines_of_no_batch_name_none(dsn: str, conn: psycopg.Connection, logged: Captured) -> None:
    put(conn, "def")
    drain(make_talking_app(), dsn)
    for event in ("worker started", "worker stopped"):
        [line] = logged.lines(event)
        assert not {"batch_id", "kind", "attempt"} & line.keys()
    assert logged.lines("worker stopped")[0]["completed"] == 1


def test_a_worker_that_starts_where_ids_begin_again_logs_it(
    dsn: str, conn: psycopg.Connection, logged: Captured
) -> None:
    copied = (
        "INSERT INTO batchq.batches (id, kind, status, finished_at) OVERRIDING SYSTEM VALUE VALUES (7, 'x', %s, now())"
    )
    drain(make_talking_app(), dsn)
    assert logged.lines("ids given twice") == []
    conn.execute(copied, ["failed"])
    drain(make_talking_app(), dsn)
    [line] = logged.lines("ids given twice")
    assert (line["level"], line["relation"], line["last_given"], line["newest"]) == ("error", "batches", 0, 7)


def test_two_batches_at_once_do_not_mix_their_lines(dsn: str, conn: psycopg.Connection, logged: Captured) -> None:
    app = batchq.App()
    together = threading.Barrier(4)

    @app.handler("def")
    def work(batch: batchq.Batch) -> None:
        together.wait(10)
        structlog.get_logger().info("mine", mine=batch.id)
        together.wait(10)
        logging.getLogger().warning("mine", extra={"mine": batch.id})

    for _ in range(4):
        put(conn, "def")
    drain(app, dsn, concurrency=4)
    lines = [line for line in logged.lines("mine") if "mine" in line]
    assert len(lines) >= 4
    assert all(line["mine"] == line["batch_id"] for line in lines)


def test_what_the_handler_binds_itself_wins(dsn: str, conn: psycopg.Connection, logged: Captured) -> None:
    app = batchq.App()

    @app.handler("def")
    def work(batch: batchq.Batch) -> None:
        structlog.get_logger().info("own", kind="of their own")

    put(conn, "def")
    drain(app, dsn)
    assert logged.lines("own")[0]["kind"] == "of their own"


# ------------------------------------------------------------------------------------------------ no passwords

DSNS = [
    f"postgresql://user:{SECRET}@host:6543/db",
    f"postgresql://user:{SECRET}@host/db?sslmode=require",
    f"host=h user=u password={SECRET} dbname=d",
    f"host=h user=u password = '{SECRET}' dbname=d",
    f"postgresql://host/db?user=u&password={SECRET}",
]


@pytest.mark.parametrize("logged", ["json", "console"], indirect=True)
@pytest.mark.parametrize("dsn_text", DSNS)
def test_no_line_shows_a_password(logged: Captured, dsn_text: str) -> None:
    logging.getLogger("mine").warning("connecting to %s", dsn_text)
    structlog.get_logger().warning("connecting", dsn=dsn_text)
    log.get_logger().warning(f"connecting to {dsn_text}")
    log.get_logger().warning("connecting", tried=[dsn_text], options={"dsn": (dsn_text,)}, error=ValueError(dsn_text))
    try:
        raise ValueError(f"cannot connect to {dsn_text}")
    except ValueError:
        logging.getLogger("mine").exception("it failed")
        structlog.get_logger().exception("it failed")
    assert "connecting" in logged.text
    assert "it failed" in logged.text
    assert SECRET not in logged.text


@pytest.mark.parametrize("logged", ["json", "console"], indirect=True)
@pytest.mark.parametrize("form", ["url", "words"])
def test_a_worker_that_cannot_connect_shows_no_password(
    logged: Captured, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    words = make_conninfo(host="127.0.0.1", port=port, user="me", password=SECRET, dbname="d", connect_timeout=2)
    dsn = words if form == "words" else f"postgresql://me:{SECRET}@127.0.0.1:{port}/d"
    with pytest.raises((ConfigError, psycopg.OperationalError)) as caught:
        drain(make_talking_app(), dsn)
    assert "connection refused" in str(caught.value).lower()
    assert SECRET not in str(caught.value) + logged.text


@pytest.mark.parametrize("logged", ["json", "console"], indirect=True)
def test_an_error_that_a_handler_raises_shows_no_password_in_the_log(
    dsn: str, conn: psycopg.Connection, logged: Captured
) -> None:
    app = batchq.App()

    @app.handler("work")
    def work(batch: batchq.Batch) -> None:
        raise ValueError(f"cannot connect to postgresql://me:{SECRET}@host/db")

    put(conn, "work")
    drain(app, dsn)
    assert "me:***@host" in logged.text
    assert SECRET not in logged.text


def test_the_settings_show_no_password() -> None:
    settings = batchq.Settings.load(dsn=DSNS[0], migration_dsn=DSNS[2])
    assert SECRET not in repr(settings) + str(settings) + str(settings.model_dump())


if __name__ == "__main__":
    run_alone(__file__)
