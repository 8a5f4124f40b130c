"""`batchq watch`, `batchq logs` and `batchq top` into a pipe: one batch to its end, its past, and all tables."""

import json
import os
import pty
import subprocess
import threading
from pathlib import Path
from typing import Any

import psycopg
import pytest

import batchq
from batchq.cli.rate import Rate, clock
from batchq.settings import Settings
from batchq.worker.worker import Worker
from tests.support.alone import run_alone
from tests.support.batches import await_status, drain, put
from tests.support.commands import CommandLine
from tests.support.steps import step
from tests.support.terminals import read_all

Conn = psycopg.Connection[Any]
AT_ONCE = batchq.Backoff(0, 0)


@pytest.fixture
def command(dsn: str, tmp_path: Path) -> CommandLine:
    """Return what runs commands on the test's database."""
    return CommandLine(dsn, tmp_path)


@pytest.fixture
def app() -> batchq.App:
    """Return an app with a good kind, a bad one and one with items."""
    app = batchq.App()

    @app.handler("good")
    def good(batch: batchq.Batch) -> str:
        return "fine"

    @app.handler("bad", backoff=AT_ONCE)
    def bad(batch: batchq.Batch) -> None:
        raise ValueError("no good\nbecause")

    return app


# ------------------------------------------------------------------------------------------------------------- rate


def test_the_rate_is_of_the_last_minute_and_begins_anew_with_a_retry() -> None:
    rate = Rate()
    assert (rate.per_second(), rate.seconds_left(10)) == (None, None)
    rate.add(0, 100)
    assert rate.per_second() is None
    rate.add(20, 110)
    assert (rate.per_second(), rate.seconds_left(100)) == (2, 40)
    rate.add(20, 170)
    rate.add(20, 180)
    assert rate.per_second() == 0, "what was worked more than a minute ago does not count"
    assert rate.seconds_left(100) is None
    rate.add(0, 181)
    assert rate.per_second() is None


@pytest.mark.parametrize(("seconds", "text"), [(None, ""), (0, "0:00"), (61.4, "1:01"), (3600, "1:00:00")])
def test_the_clock(seconds: float | None, text: str) -> None:
    assert clock(seconds) == text


# ------------------------------------------------------------------------------------------------------------ watch


@pytest.mark.parametrize(("kind", "code"), [("good", 0), ("bad", 1)])
def test_watch_ends_with_the_batch_and_tells_how(
    conn: Conn, dsn: str, command: CommandLine, app: batchq.App, kind: str, code: int
) -> None:
    batch_id = put(conn, kind, max_attempts=2)
    drain(app, dsn)
    ended = command("watch", str(batch_id))
    assert ended.code == code
    assert ended.out.count("\n") == 1
    assert f"batch {batch_id}  default/{kind}  {'completed' if kind == 'good' else 'failed'}" in ended.out
    assert ended.err == ("" if kind == "good" else f"batchq: batch {batch_id}: ValueError: no good because\n")


def test_watch_of_a_cancelled_batch_ends_with_3_and_of_none_with_1(conn: Conn, command: CommandLine) -> None:
    batch_id = put(conn, "good")
    conn.execute("SELECT batchq.cancel(%s)", [batch_id])
    assert command("watch", str(batch_id)).code == 3
    ended = command("watch", str(batch_id + 1))
    assert (ended.code, ended.err) == (1, f"batchq: there is no batch {batch_id + 1}\n")


def test_watch_follows_the_items_a_line_a_change(conn: Conn, dsn: str, command: CommandLine) -> None:
    gate = threading.Semaphore(0)
    app = batchq.App()

    @app.item_handler("items", chunk_size=1)
    def one(item: int) -> None:
        assert gate.acquire(timeout=30)

    batch_id = batchq.enqueue(conn, "items", items=[1, 2, 3])
    worker = Worker(app, Settings.load(dsn=dsn), drain=True)
    thread = threading.Thread(target=worker.run)
    with command.start("watch", str(batch_id), "--json", "--every-seconds", "0.05") as watching:
        assert watching.stdout is not None
        assert json.loads(watching.stdout.readline())["status"] == "ready"
        thread.start()
        seen = []
        while not seen or seen[-1]["status"] != "completed":
            gate.release()
            seen.append(json.loads(watching.stdout.readline()))
        assert watching.wait(10) == 0
    thread.join()
    assert [row["items_done"] for row in seen] == sorted(row["items_done"] for row in seen)
    assert seen[-1]["items_done"] == 3


def test_watch_shows_a_bar_on_a_terminal(conn: Conn, dsn: str, command: CommandLine) -> None:
    app = batchq.App()

    @app.item_handler("items")
    def one(item: int) -> None:
        pass

    batch_id = batchq.enqueue(conn, "items", items=list(range(50)))
    drain(app, dsn)
    screen, terminal = pty.openpty()
    with subprocess.Popen(
        command.command("watch", str(batch_id)),
        cwd=command.directory,
        env=command.environment | {"TERM": "xterm", "COLUMNS": "120"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    ) as process:
        os.close(terminal)
        seen = read_all(screen)
        assert process.wait(30) == 0
    os.close(screen)
    assert f"batch {batch_id} items: completed" in seen
    assert "\N{BOX DRAWINGS HEAVY HORIZONTAL}" * 40 in seen, "the bar is full"
    assert "50 of 50" in seen


# ------------------------------------------------------------------------------------------------------------- logs


def test_logs_tell_each_attempt_with_its_error(conn: Conn, dsn: str, command: CommandLine, app: batchq.App) -> None:
    batch_id = put(conn, "bad", max_attempts=2)
    drain(app, dsn)
    await_status(conn, batch_id, "failed")
    ended = command("logs", str(batch_id), "--json")
    events = [json.loads(line) for line in ended.out.splitlines()]
    assert [event["event"] for event in events] == [
        "enqueued", "attempt 1 failed", "attempt 2 failed", "failed in attempt 2"
    ]  # fmt: skip
    assert events[1]["error"] == "ValueError: no good because"
    assert 'raise ValueError("no good' in events[1]["traceback"]
    step("for people the traceback stands below its attempt")
    text = command("logs", str(batch_id)).out
    assert "attempt 1 failed: ValueError: no good because\n" in text
    assert "\n    Traceback" in text


def test_logs_tell_what_a_batch_waits_for_or_who_runs_it(conn: Conn, command: CommandLine) -> None:
    waiting = put(conn, "good")
    assert "ready, next run: as soon as a worker is free; ready since " in command("logs", str(waiting)).out
    assert '"event": "ready, to run from then on"' in command("logs", str(waiting), "--json").out
    conn.execute(
        "UPDATE batchq.batches SET status = 'processing', attempt = 1, claimed_by = 'worker-7', claim_token = "
        "gen_random_uuid(), claimed_at = now(), lease_expires_at = now() + interval '1 minute' WHERE id = %s",
        [waiting],
    )
    assert "attempt 1 runs, claimed by worker-7" in command("logs", str(waiting)).out
    assert command("logs", str(waiting + 1)).code == 1


# -------------------------------------------------------------------------------------------------------------- top


def test_top_into_a_pipe_is_plain_and_json_has_all_tables(
    conn: Conn, dsn: str, command: CommandLine, app: batchq.App
) -> None:
    put(conn, "bad", max_attempts=1)
    put(conn, "good", delay_seconds=60)
    drain(app, dsn)
    shown = command("top", "--json").json
    assert {row["kind"] for row in shown["queues"]} == {"good", "bad"}
    assert [row["kind"] for row in shown["failures"]] == ["bad"]
    assert (shown["running"], shown["workers"]) == ([], [])
    plain = command("top").out
    assert "\x1b" not in plain
    assert "ValueError: no good" in plain
    assert "Pauses" not in plain
    conn.execute("SELECT batchq.pause(kind => 'good', reason => 'too dear')")
    assert [row["kind"] for row in command("top", "--json").json["pauses"]] == ["good"]
    for name in ("top", "status"):
        assert "too dear" in command(name).out
    assert [row["kind"] for row in command("top", "--json", "--kind", "good").json["queues"]] == ["good"]


if __name__ == "__main__":
    run_alone(__file__)
