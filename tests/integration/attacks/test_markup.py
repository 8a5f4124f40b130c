"""Markup: no text that somebody hostile has chosen is markup, on the terminal or on the full screen of `batchq top`."""

import json
from pathlib import Path
from typing import Any

import psycopg
import pytest

from batchq.cli.top.app import Top
from batchq.cli.top.dialogs import Confirmation, Menu
from batchq.cli.top.views import BatchView
from batchq.postgres.statements import workers
from batchq.postgres.statements.checkpoints import Progress
from batchq.postgres.statements.workers import WorkerRow
from tests.component.rows import change, checkpoint, failure, finished, insert, processing
from tests.support.alone import run_alone
from tests.support.commands import CommandLine
from tests.support.hostile import MARKUP
from tests.support.screen import lines, on_screen, table, until
from tests.support.terminals import on_terminal

Conn = psycopg.Connection[Any]
WIDE = {"COLUMNS": "2000"}
KINDS = ("oops[/green]", "[/]", "[link=https://evil.example]x[/link]", "\\[/green]", "[@click=app.quit]z[/]", MARKUP)


@pytest.fixture
def command(dsn: str, tmp_path: Path) -> CommandLine:
    """Return what runs commands on the test's database."""
    return CommandLine(dsn, tmp_path)


@pytest.mark.parametrize("text", KINDS)
def test_a_producer_breaks_or_colors_what_others_look_at_by_one_row(
    conn: Conn, command: CommandLine, text: str
) -> None:
    insert(conn, kind=text, queue=text)
    taken = processing(conn, kind=text, items=[text, 1], worker=text, payload={text: text})
    checkpoint(conn, taken, Progress(1, 1, [failure(0, text)], first_index=0))
    change(conn, taken.id, errors=[{"error": text, "traceback": text, "attempt": text, "at": text}])
    ended_id = finished(conn, "failed", kind=text, queue="other", error=json.dumps({"error": text}))
    conn.execute("SELECT batchq.pause(queue => %s, reason => %s, actor => %s)", [text] * 3)
    with conn.transaction():
        conn.execute(*workers.heartbeat(WorkerRow(text, text, 1, text, [text], ["k"], 8), 3, stopping=False))
    for arguments in (
        ("status",), ("top",), ("audit",), ("pause",), ("check",), ("check", "--invariants"), ("doctor",),
        ("show", str(taken.id)), ("logs", str(taken.id)), ("watch", str(ended_id)), ("cancel", str(taken.id)),
        ("drain", text), ("enqueue", text), ("cancel", "--kind", text, "--dry-run"),
    ):  # fmt: skip
        ended = command(*arguments, **WIDE)
        assert "Traceback (most recent" not in ended.err, arguments
        assert ended.code in (0, 1), (arguments, ended.err)
        if arguments[0] in ("status", "top", "audit", "pause", "show", "logs", "watch", "drain"):
            assert text in ended.out + ended.err, (arguments, ended.out)
    assert repr(text) in command("check", **WIDE).out
    assert text in command("doctor", **WIDE).out.replace("''", "'")


def test_a_producer_writes_markup_into_the_bar_of_who_watches(conn: Conn, command: CommandLine) -> None:
    batch_id = finished(conn, "failed", kind=MARKUP, error=json.dumps({"error": MARKUP}))
    code, seen = on_terminal(command, "watch", str(batch_id), COLUMNS="300")
    assert code == 1
    assert seen.count(MARKUP) >= 2
    assert "evil.example\x1b" not in seen


def test_somebody_gives_markup_as_an_argument(command: CommandLine) -> None:
    for arguments in (("show", "[/x]"), ("enqueue", "k", "--items", "[/x]"), ("monitor", "--exit-on", "[/x]")):
        ended = command(*arguments)
        assert (ended.code, "[/x]" in ended.err) == (2, True), ended.err
    ended = command("enqueue", "k", "--unique-key", "[/x]")
    assert "[/x]" in command("enqueue", "k", "--unique-key", "[/x]").out


def test_a_producer_takes_the_full_screen(conn: Conn, dsn: str) -> None:
    taken = processing(conn, kind=MARKUP, queue=MARKUP, items=[MARKUP], worker=MARKUP, payload={MARKUP: MARKUP})
    checkpoint(conn, taken, Progress(0, 1, [failure(0, MARKUP)], first_index=0), queue=MARKUP)
    finished(conn, "failed", kind=MARKUP, error=json.dumps({"error": MARKUP, "traceback": MARKUP, "attempt": MARKUP}))
    conn.execute("SELECT batchq.pause(kind => %s, reason => %s, actor => %s)", [MARKUP] * 3)
    seen = MARKUP.split("\n")[0][:10]

    async def act(screen: Top, pilot: Any) -> None:
        await until(pilot, lambda: table(screen, "queues").row_count > 0)
        await pilot.press("a")
        await until(pilot, lambda: isinstance(screen.screen, Menu))
        await pilot.press("p")
        await until(pilot, lambda: isinstance(screen.screen, Confirmation))
        assert seen in "\n".join(lines(screen))
        await pilot.press("escape")
        await pilot.press("slash", *"[/x]", "enter")
        await pilot.press("escape")
        for key in ("2", "3"):
            await pilot.press(key)
            await until(pilot, lambda: screen.main.table.row_count > 0)
            await pilot.press("enter")
            await until(pilot, lambda: isinstance(screen.screen, BatchView) and bool(screen.screen.shown))
            assert seen in "\n".join(lines(screen))
            assert screen.is_running
            await pilot.press("escape")
            await until(pilot, lambda: screen.screen is screen.main)

    on_screen(dsn, act)


def test_a_worker_writes_errors_that_are_no_objects(conn: Conn, command: CommandLine) -> None:
    batch_id = insert(conn)
    change(conn, batch_id, errors=[1, "text", None, ["[/x]"], {"error": {"a": ["[/x]"]}, "traceback": 7}])
    for name in ("show", "logs"):
        ended = command(name, str(batch_id), **WIDE)
        assert (ended.code, "[/x]" in ended.out) == (0, True), ended.err
    conn.execute("INSERT INTO batchq.audit (verb, details) VALUES ('x', '[\"[/x]\"]'), ('y', '{\"filter\": 7}')")
    ended = command("audit", **WIDE)
    assert (ended.code, "[/x]" in ended.out) == (0, True), ended.err


if __name__ == "__main__":
    run_alone(__file__)
