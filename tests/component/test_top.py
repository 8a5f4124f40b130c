"""`batchq top`: each table at 80 columns and at 200, filter, groups, pages, and what can be done to a row."""

import asyncio
import re
from pathlib import Path
from typing import Any, cast

import psycopg
import pytest
from textual.color import Color
from textual.widgets import Button, Input, TabbedContent

import batchq
from batchq.cli import listings
from batchq.cli.top.app import Top, is_light_terminal
from batchq.cli.top.dialogs import Confirmation, Help, Menu
from batchq.cli.top.filters import matches, words_of
from batchq.cli.top.main_view import LISTINGS
from batchq.cli.top.source import TABLES, Source
from batchq.cli.top.views import BatchView, Opened
from batchq.postgres.statements import workers
from batchq.postgres.statements.checkpoints import Progress
from batchq.postgres.statements.workers import WorkerRow
from tests.component.rows import change, checkpoint, failure, finished, insert, processing, value, values
from tests.support.alone import run_alone
from tests.support.commands import CommandLine
from tests.support.scene import set_flow, set_scene
from tests.support.screen import NARROW, WIDE, cells, lines, on_screen, state, table, until
from tests.support.steps import step

Conn = psycopg.Connection[Any]
QUEUE = "customer-notifications-high-priority-eu-west-1"
KIND = "import_contacts_from_external_crm_system"


def set_long_names(conn: Conn) -> int:
    """Fill a queue with a long name; return the id of its running batch, of whose items 300 succeeded and 40 failed."""
    for number in range(12):
        insert(conn, kind=KIND, queue=QUEUE, key=f"account-{number % 3}")
    finished(conn, "failed", kind=KIND, queue=QUEUE, error='{"error": "ValueError: no address", "attempt": 3}')
    taken = processing(
        conn, kind=KIND, queue=QUEUE, items=list(range(1000)), worker="worker-eu-west-1a-0123456789-4711"
    )
    checkpoint(conn, taken, Progress(300, 40, [failure(number) for number in range(40)], first_index=0), queue=QUEUE)
    conn.execute("SELECT batchq.set_limit(%s, per_second => 50)", [QUEUE])
    conn.execute("SELECT batchq.set_schedule('nightly-report-of-all-accounts', '0 2 * * *', 'report')")
    return taken.id


def beat(conn: Conn, worker: str, seconds_ago: float = 0, stopping: bool = False) -> None:
    """Let a worker have written its last heartbeat some time ago."""
    with conn.transaction():
        conn.execute(*workers.heartbeat(WorkerRow(worker, "host", 1, "0.1.0", ["mail"], ["send"], 8), 3, stopping))
    conn.execute(
        "UPDATE batchq.workers SET heartbeat_at = now() - %s * interval '1 second' WHERE id = %s", [seconds_ago, worker]
    )


async def press(pilot: Any, keys: str) -> None:
    """Press keys, which are separated by spaces."""
    for key in keys.split():
        await pilot.press(key)


async def confirm(screen: Top, pilot: Any, letter: str) -> Confirmation:
    """Choose an action of the chosen row; return the dialog that asks."""
    await pilot.press("a")
    await until(pilot, lambda: isinstance(screen.screen, Menu))
    await pilot.press(letter)
    await until(pilot, lambda: isinstance(screen.screen, Confirmation))
    return cast("Confirmation", screen.screen)


async def do(screen: Top, pilot: Any) -> str:
    """Press the button of a dialog; return the result, and close it."""
    dialog = cast("Confirmation", screen.screen)
    dialog.result = ""
    dialog.query_one("#do", Button).press()
    await until(pilot, lambda: dialog.result not in ("", "working ..."))
    await pilot.press("enter")
    await until(pilot, lambda: screen.screen is not dialog)
    return dialog.result


# ------------------------------------------------------------------------------------------------------- 80 columns


@pytest.mark.parametrize(("key", "numbers", "names"), [
    ("1", ["12", "0", "1", "0", "1"], ["cust", "impo"]),
    ("2", ["34 %", "1/5"], ["cust", "impo", "processing"]),
    ("3", ["1", "ValueError: no ad"], ["impo"]),
    ("5", ["0 of 50", "1"], ["cust", "(all)"]),
    ("6", ["4", "0"], ["account-0", "cust"]),
    ("8", ["new"], ["nightl"]),
])  # fmt: skip
def test_numbers_stay_at_80_columns_with_long_names(
    conn: Conn, dsn: str, key: str, numbers: list[str], names: list[str]
) -> None:
    set_long_names(conn)

    async def act(screen: Top, pilot: Any) -> None:
        await pilot.press(key)
        await until(pilot, lambda: screen.main.table.row_count > 0)
        await pilot.pause()
        [row] = [line for line in lines(screen) if names[0] in line and "…" in line][:1] or [""]
        assert [text for text in (*numbers, *names) if text not in row] == []
        assert max(map(len, lines(screen))) <= 80
        assert screen.main.table.max_scroll_x == 0, "nothing is right of the screen"
        assert screen.main.table.size.height >= 16, "24 lines show many rows"

    on_screen(dsn, act, NARROW)


def test_everything_is_shown_at_200_columns(conn: Conn, dsn: str) -> None:
    set_long_names(conn)

    async def act(screen: Top, pilot: Any) -> None:
        await until(pilot, lambda: table(screen, "queues").row_count == 1)
        await pilot.pause()
        text = "\n".join(lines(screen))
        assert QUEUE in text
        assert KIND in text
        columns = LISTINGS["queues"].columns
        assert [each.title for each in columns if each.title not in text and (each.short or "-") not in text] == []

    on_screen(dsn, act, WIDE)


@pytest.mark.parametrize("size", [NARROW, WIDE])
def test_each_table_sorts_by_each_column_and_nothing_is_wider_than_the_screen(
    conn: Conn, dsn: str, size: tuple[int, int]
) -> None:
    set_scene(conn)
    set_flow(conn)
    set_long_names(conn)

    async def act(screen: Top, pilot: Any) -> None:
        for number, name in enumerate(LISTINGS, 1):
            await pilot.press(str(number))
            await until(pilot, lambda name=name: table(screen, name).row_count > 0)  # type: ignore[misc]
            seen = set()
            for _ in LISTINGS[name].columns:
                await press(pilot, "s r")
                seen.add(table(screen, name).order.title)
            assert seen >= set(table(screen, name).shown_titles()), name
            assert table(screen, name).max_scroll_x == 0, name

    on_screen(dsn, act, size)


# --------------------------------------------------------------------------------------- what stays when it is read


def test_the_chosen_row_stays_chosen_when_others_come_and_go(conn: Conn, dsn: str) -> None:
    for number in range(60):
        finished(conn, "failed", kind=f"kind-{number:02}", error='{"error": "E"}')

    async def act(screen: Top, pilot: Any) -> None:
        await press(pilot, "3 g")
        await until(pilot, lambda: table(screen, "failures").row_count == 60)
        await pilot.press(*["down"] * 40)
        await pilot.pause()
        failures = table(screen, "failures")
        chosen, top = failures.chosen, failures.scroll_y
        assert chosen
        assert top > 0
        newest = finished(conn, "failed", error='{"error": "E"}')
        await until(pilot, lambda: failures.row_count == 61)
        await pilot.pause(0.2)
        assert failures.chosen
        assert failures.chosen["id"] == chosen["id"]
        assert abs(failures.scroll_y - top) <= 1
        step("what is typed into the filter stays, too")
        await press(pilot, "slash k i n d - 0")
        conn.execute("DELETE FROM batchq.batches WHERE id = %s", [newest])
        await until(pilot, lambda: len(failures.all_rows) == 60)
        assert screen.main.query_one("#filter", Input).value == "kind-0"
        assert failures.row_count == 10

    on_screen(dsn, act, NARROW)


def test_the_database_is_away_and_comes_back() -> None:
    answers: list[Any] = [OSError("gone away")]

    class Away:
        def tables(self, names: Any) -> Any:
            if isinstance(answers[-1], Exception):
                raise answers[-1]
            return {name: [] for name in names}

    async def act() -> None:
        screen = Top(cast("Source", Away()), 0.05)
        async with screen.run_test() as pilot:
            await until(pilot, lambda: "the database is unavailable, retrying: gone away" in state(screen))
            await press(pilot, "slash x")
            answers.append({})
            await until(pilot, lambda: "ready 0" in state(screen))
            assert screen.main.query_one("#filter", Input).value == "x"

    asyncio.run(act())


def test_it_reads_the_less_often_the_longer_it_takes_unless_told() -> None:
    source = cast("Source", None)
    assert [Top(source, None).rest_seconds(took) for took in (0.001, 0.05, 3.0)] == [1.0, 5.0, 10.0]
    assert Top(source, 0.1).rest_seconds(3.0) == 0.1


def test_only_the_table_on_the_screen_is_read(conn: Conn, dsn: str) -> None:
    insert(conn)
    asked: list[set[str]] = []

    async def act(screen: Top, pilot: Any) -> None:
        tables = screen.source.tables
        screen.source.tables = lambda names=TABLES: asked.append(set(names)) or tables(names)  # type: ignore[method-assign, func-returns-value, assignment]
        await until(pilot, lambda: {"queues", "workers", "pauses", "throttles", "minutes"} in asked)
        await pilot.press("6")
        await until(pilot, lambda: {"queues", "workers", "pauses", "throttles", "keys"} in asked)
        assert not any({"minutes", "keys"} <= names for names in asked)
        step("a paused screen reads nothing")
        await pilot.press("p")
        await until(pilot, lambda: "display paused" in state(screen))
        await pilot.pause(0.3)
        count = len(asked)
        await pilot.pause(0.5)
        assert len(asked) == count
        await pilot.press("p")
        await until(pilot, lambda: len(asked) > count)

    on_screen(dsn, act)


# --------------------------------------------------------------------------------------- filter, groups, sparklines


@pytest.mark.parametrize(("text", "found"), [
    ("", True), ("crm", True), ("CRM cust", True), ("crm nothing", False), ("kind:crm", True), ("kind:cust", False),
    ("queue:cust kind:import", True), ("status:paused", True), ("status:failed", False), ("12", True), ("kind:", True),
    ("colour:red", False),
])  # fmt: skip
def test_a_filter_is_words_that_all_must_match(text: str, found: bool) -> None:
    row = {"queue": QUEUE, "kind": KIND, "is_paused": True}
    assert matches(words_of(text), row, f"{QUEUE} {KIND} 12") is found


def test_the_filter_is_shown_and_escape_clears_it(conn: Conn, dsn: str) -> None:
    for queue in ("mail", "bulk", "slow"):
        insert(conn, queue=queue)

    async def act(screen: Top, pilot: Any) -> None:
        await until(pilot, lambda: table(screen, "queues").row_count == 3)
        await press(pilot, "slash q u e u e colon b u enter")
        assert [row[0] for row in cells(screen, "queues")] == ["bulk"]
        await pilot.pause()
        assert "filter: queue:bu  1 of 3 rows; Esc clears it" in lines(screen)
        await pilot.press("escape")
        assert len(cells(screen, "queues")) == 3
        await pilot.pause()
        assert not [line for line in lines(screen) if line.startswith("filter:")]

    on_screen(dsn, act, NARROW)


def test_queues_are_grouped_and_failures_too(conn: Conn, dsn: str) -> None:
    for kind in ("a", "b", "b"):
        finished(conn, "failed", queue="mail", kind=kind, error='{"error": "ValueError: the same"}')
    for kind in ("a", "b"):
        insert(conn, queue="mail", kind=kind)

    async def act(screen: Top, pilot: Any) -> None:
        await until(pilot, lambda: table(screen, "queues").row_count == 2)
        await pilot.press("g")
        assert [row[:3] for row in cells(screen, "queues")] == [["mail", "2 kinds", "2"]]
        await pilot.press("g")
        assert [row[:3] for row in cells(screen, "queues")] == [["mail", "a", "1"], ["mail", "b", "1"]]
        await pilot.press("3")
        await until(pilot, lambda: table(screen, "failures").row_count == 2)
        assert sorted(row[:2] for row in cells(screen, "failures")) == [["1", "a"], ["2", "b"]]
        await pilot.press("g")
        await until(pilot, lambda: table(screen, "failures").row_count == 3)

    on_screen(dsn, act)


def test_sparklines_show_the_last_hour(conn: Conn, dsn: str) -> None:
    insert(conn, queue="mail", kind="send")
    conn.execute(
        "INSERT INTO batchq.throughput_minutes (minute, queue, kind, worker, completed, failed, cancelled, retried, "
        "items, run_seconds, run_times) SELECT date_trunc('minute', now()) - n * interval '1 minute', 'mail', 'send', "
        "'', n, 0, 0, 0, 0, 0, '{}' FROM generate_series(1, 59) n"
    )

    async def act(screen: Top, pilot: Any) -> None:
        await until(pilot, lambda: table(screen, "queues").row_count == 1)
        [[*_, line]] = cells(screen, "queues")
        assert line[0] == "█"
        assert line[-1] == "▁"
        assert list(line) == sorted(line, reverse=True)
        assert len(line) == 60

    on_screen(dsn, act)


@pytest.mark.parametrize(
    ("less", "more"), [("00:00:09", "00:10:00"), ("23:59:59.9", "1 day 00:00:00"), ("9 days", "10 days 01:00:00")]
)
def test_intervals_sort_by_their_length(less: str, more: str) -> None:
    shorter, longer = listings.length(less), listings.length(more)
    assert shorter is not None
    assert longer is not None
    assert shorter < longer


# ------------------------------------------------------------------------------------------------- what is shown


def test_what_is_paused_and_throttled_is_told_on_top_and_held_back_in_its_row(conn: Conn, dsn: str) -> None:
    insert(conn, kind="good")
    conn.execute("SELECT batchq.set_limit('default', 'good', max_running => 10), batchq.set_limit(per_second => 50)")
    conn.execute("SELECT batchq.throttle('mail', 'send', 'acme', 600)")
    conn.execute(
        "INSERT INTO batchq.limit_shares (queue, kind, worker, in_use, lease_seconds, held_back_by, refreshed_at) "
        "VALUES ('default', 'good', 'a', 3, 15, 'max_running', now() + interval '1 minute')"
    )

    async def act(screen: Top, pilot: Any) -> None:
        await until(pilot, lambda: table(screen, "queues").row_count == 1)
        assert cells(screen, "queues")[0][-2] == "1 by max_running"
        assert "THROTTLED: kind send in queue mail key acme for " in state(screen)
        await pilot.press("5")
        assert screen.main.query_one(TabbedContent).active == "limits"
        await until(pilot, lambda: table(screen, "limits").row_count == 2)
        rows = {row[1]: row[2:] for row in cells(screen, "limits")}
        assert rows["good"] == ["3 of 10", "", "", "", "1", "set", "max_running"]
        assert rows["(all)"][:2] == ["", "0 of 50"]
        conn.execute("SELECT batchq.pause('mail', 'bad', '2100-01-01 06:00+00'), batchq.pause('default')")
        said = "PAUSED: queue default; kind bad in queue mail until 2100-01-01 06:00:00"
        await until(pilot, lambda: said in state(screen))
        assert cells(screen, "queues")[0][-2] == "paused"

    on_screen(dsn, act)


def test_schedules_show_what_became_of_their_latest_batch(conn: Conn, dsn: str) -> None:
    conn.execute("SELECT batchq.set_schedule('nightly', '0 2 * * *', 'report')")
    conn.execute("UPDATE batchq.schedules SET next_at = '2100-01-01 02:00+00', ticks_missed = 3")
    batch_id = value(conn, "SELECT batchq.run_schedule('nightly')")

    async def act(screen: Top, pilot: Any) -> None:
        await pilot.press("8")
        await until(pilot, lambda: table(screen, "schedules").row_count == 1)
        shown = dict(zip(table(screen, "schedules").shown_titles(), cells(screen, "schedules")[0], strict=True))
        expected = {"Schedule": "nightly", "State": "active", "Next": "2100-01-01 02:00:00", "Missed": "3",
                    "Latest batch": f"{batch_id} pending", "Error": ""}  # fmt: skip
        assert shown | expected == shown
        await pilot.press("enter")
        await until(pilot, lambda: f"batch {batch_id}" in state(screen))

    on_screen(dsn, act)


def test_a_worker_without_a_heartbeat_is_last_seen_and_never_working(conn: Conn, dsn: str) -> None:
    beat(conn, "alive", 4)
    beat(conn, "stops", 4, stopping=True)
    beat(conn, "killed", 12)
    beat(conn, "long-gone", 200)

    async def act(screen: Top, pilot: Any) -> None:
        await pilot.press("4")
        await until(pilot, lambda: table(screen, "workers").row_count == 4)
        states = {row[0]: row[1] for row in cells(screen, "workers")}
        assert (states["alive"], states["stops"]) == ("working", "stopping")
        assert states["killed"] in {f"last seen {seconds} s ago" for seconds in range(12, 20)}
        assert states["long-gone"].startswith("last seen 3 min 2")
        assert "workers 2\n2 workers without a heartbeat, the latest last seen 1" in state(screen)

    on_screen(dsn, act, NARROW)


def test_status_says_so_in_the_same_words(conn: Conn, dsn: str, tmp_path: Path) -> None:
    beat(conn, "killed", 12)
    shown = CommandLine(dsn, tmp_path)("status").out
    assert re.search(r"killed +last seen 1\d s ago", shown), shown
    assert "working" not in shown


def test_enter_opens_a_queue_and_then_a_batch_with_all_about_it(conn: Conn, dsn: str) -> None:
    batch_id = set_long_names(conn)
    payload = {"address": {"street": "7 High Street"}, "many": list(range(60))}
    error = {"attempt": 1, "at": "2026-05-04T10:12:00", "error": "ValueError: no @", "traceback": "Traceback\n  line 7"}
    change(conn, batch_id, payload=payload, errors=[error])

    async def act(screen: Top, pilot: Any) -> None:
        await until(pilot, lambda: table(screen, "queues").row_count == 1)
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(screen.screen, Opened) and table(screen, "opened").row_count == 2)
        assert "1 running, 1 failed in the last day" in state(screen)
        await press(pilot, "slash s t a t u s colon f a i l e d enter")
        assert table(screen, "opened").row_count == 1
        await press(pilot, "escape s r")
        await until(pilot, lambda: table(screen, "opened").row_count == 2)
        found = [row["id"] for row in table(screen, "opened").shown_rows].index(batch_id)
        table(screen, "opened").move_cursor(row=found)
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(screen.screen, BatchView) and bool(screen.screen.shown))
        await pilot.pause()
        text = "\n".join(lines(screen))
        assert "300 done, 40 failed, of 1,000 items" in text
        bar = next(line for line in lines(screen) if "━" in line and "%" in line)
        assert (bar.count("━"), bar.count("╍"), bar.count("─")) == (17, 2, 38), "done and failed differ"
        assert "34 %" in bar
        assert "attempt 1  2026-05-04 10:12:00  ValueError: no @" in text
        await pilot.press("end")
        await until(pilot, lambda: any(line.startswith("39 ") for line in map(str.strip, lines(screen))))
        top = screen.screen.query_one("#page").scroll_y
        await pilot.pause(0.5)
        assert screen.screen.query_one("#page").scroll_y == top > 20, "it is not scrolled back when it is read again"
        await press(pilot, "escape escape")
        await until(pilot, lambda: screen.screen is screen.main)

    on_screen(dsn, act, NARROW)


def test_a_batch_that_is_gone_is_said_to_be_gone(conn: Conn, dsn: str) -> None:
    batch_id = finished(conn, "failed", error='{"error": "E"}')

    async def act(screen: Top, pilot: Any) -> None:
        await press(pilot, "3")
        await until(pilot, lambda: table(screen, "failures").row_count == 1)
        await pilot.press("enter")
        await until(pilot, lambda: f"batch {batch_id}" in state(screen))
        conn.execute("DELETE FROM batchq.batches WHERE id = %s", [batch_id])
        await until(pilot, lambda: f"batch {batch_id} is gone" in state(screen))

    on_screen(dsn, act)


def test_a_question_mark_shows_all_keys_also_on_24_lines(conn: Conn, dsn: str) -> None:
    insert(conn)

    async def act(screen: Top, pilot: Any) -> None:
        await pilot.press("question_mark")
        await until(pilot, lambda: isinstance(screen.screen, Help))
        await pilot.pause()
        text = "\n".join(lines(screen))
        for said in ("1 to 8", "filter: words", "reverse the order", "light or dark", "quit", "Esc closes this"):
            assert said in text
        await pilot.press("escape")
        await until(pilot, lambda: screen.screen is screen.main)

    on_screen(dsn, act, NARROW)


# -------------------------------------------------------------------------------------------------------- actions


def audit(conn: Conn) -> list[tuple[Any, ...]]:
    """Return what was done."""
    return conn.execute("SELECT verb, batch_id, queue, kind, reason, actor FROM batchq.audit ORDER BY id").fetchall()


def test_a_running_batch_is_cancelled_only_after_it_was_confirmed(conn: Conn, dsn: str) -> None:
    taken = processing(conn, kind="send", queue="mail")

    async def act(screen: Top, pilot: Any) -> None:
        await pilot.press("2")
        await until(pilot, lambda: table(screen, "running").row_count == 1)
        dialog = await confirm(screen, pilot, "c")
        await pilot.pause()
        text = "\n".join(lines(screen))
        assert f"batch {taken.id}: kind send in queue mail, processing" in text
        assert "Ends the batch as cancelled" in text
        assert dialog.focused
        assert dialog.focused.id == "leave", "Enter does not cancel"
        await pilot.press("enter")
        await until(pilot, lambda: screen.screen is screen.main)
        assert audit(conn) == []
        dialog = await confirm(screen, pilot, "c")
        dialog.query_one("#reason", Input).value = "wrong list"
        assert (await do(screen, pilot)).startswith(f"batch {taken.id}: cancelled")
        assert audit(conn) == [("cancel", taken.id, None, None, "wrong list", "ann")] or audit(conn)[0][4:] == (
            "wrong list", "ann"
        )  # fmt: skip
        await until(pilot, lambda: table(screen, "running").row_count == 0)

    on_screen(dsn, act, NARROW)


def test_a_failed_batch_is_retried_then_postponed_moved_and_run_now(conn: Conn, dsn: str) -> None:
    batch_id = finished(conn, "failed", kind="send", queue="mail", error='{"error": "E"}')

    async def act(screen: Top, pilot: Any) -> None:
        await press(pilot, "3")
        await until(pilot, lambda: table(screen, "failures").row_count == 1)
        await pilot.press("enter")
        await until(pilot, lambda: f"batch {batch_id}" in state(screen))
        await confirm(screen, pilot, "r")
        assert await do(screen, pilot) == f"batch {batch_id}: made pending again; it is pending"
        await until(pilot, lambda: state(screen).endswith("ready"))
        step("what is given wrongly is told, and stays as it was typed")
        dialog = await confirm(screen, pilot, "z")
        dialog.query_one("#argument", Input).value = "soon"
        dialog.query_one("#do", Button).press()
        await until(pilot, lambda: dialog.result == "minutes must be a whole number from 1 to 525600, not 'soon'")
        assert dialog.query_one("#argument", Input).value == "soon"
        dialog.query_one("#argument", Input).value = "90"
        assert "snoozed" in await do(screen, pilot)
        assert value(
            conn, "SELECT run_at > now() + interval '80 minutes' FROM batchq.all_batches WHERE id = %s", [batch_id]
        )
        await until(pilot, lambda: "scheduled" in state(screen) or "retrying" in state(screen))
        await confirm(screen, pilot, "n")
        assert "made ready" in await do(screen, pilot)
        await until(pilot, lambda: state(screen).endswith("ready"))
        dialog = await confirm(screen, pilot, "y")
        dialog.query_one("#argument", Input).value = "-5"
        assert "given the new priority" in await do(screen, pilot)
        dialog = await confirm(screen, pilot, "m")
        dialog.query_one("#argument", Input).value = "slow"
        assert "moved" in await do(screen, pilot)
        assert conn.execute("SELECT queue, priority FROM batchq.all_batches WHERE id = %s", [batch_id]).fetchall() == [
            ("slow", -5)
        ]
        assert {row[5] for row in audit(conn)} == {"ann"}

    on_screen(dsn, act)


def test_a_verb_that_comes_too_late_says_that_nothing_was_changed(conn: Conn, dsn: str) -> None:
    batch_id = insert(conn, kind="send", queue="mail", run_at="2100-01-01")

    async def act(screen: Top, pilot: Any) -> None:
        screen.push_screen(BatchView(batch_id))
        await until(pilot, lambda: "scheduled" in state(screen))
        await confirm(screen, pilot, "z")
        conn.execute("SELECT batchq.cancel(%s)", [batch_id])
        assert await do(screen, pilot) == f"batch {batch_id}: nothing was changed, because it is cancelled"
        await until(pilot, lambda: "cancelled" in state(screen))
        await confirm(screen, pilot, "r")
        conn.execute("DELETE FROM batchq.batches WHERE id = %s", [batch_id])
        assert await do(screen, pilot) == f"there is no batch {batch_id} any more"

    on_screen(dsn, act)


def test_queues_are_paused_and_resumed_workers_drained_schedules_run(conn: Conn, dsn: str) -> None:
    insert(conn, kind="send", queue="mail")
    beat(conn, "alive")
    conn.execute("SELECT batchq.set_schedule('nightly', '0 2 * * *', 'report')")
    conn.execute("UPDATE batchq.schedules SET next_at = '2100-01-01 02:00+00'")

    async def act(screen: Top, pilot: Any) -> None:
        await until(pilot, lambda: table(screen, "queues").row_count == 1)
        for letter, said in (("p", "kind send in queue mail"), ("o", "queue mail"), ("k", "kind send in all queues")):
            await confirm(screen, pilot, letter)
            assert await do(screen, pilot) == f"{said}: paused"
        await until(pilot, lambda: len(screen.main.rows["pauses"]) == 3)
        for _ in range(3):
            await until(pilot, lambda: bool(screen.main.rows["pauses"]))
            count = len(screen.main.rows["pauses"])
            await confirm(screen, pilot, "1")
            assert (await do(screen, pilot)).endswith(": resumed")
            await until(pilot, lambda count=count: len(screen.main.rows["pauses"]) == count - 1)  # type: ignore[misc]
        await pilot.press("4")
        await until(pilot, lambda: table(screen, "workers").row_count == 1)
        await confirm(screen, pilot, "d")
        assert await do(screen, pilot) == "worker alive: draining"
        await pilot.press("8")
        await until(pilot, lambda: table(screen, "schedules").row_count == 1)
        await confirm(screen, pilot, "n")
        assert (await do(screen, pilot)).startswith("schedule nightly: batch ")
        await confirm(screen, pilot, "p")
        assert await do(screen, pilot) == "schedule nightly: paused"
        await until(pilot, lambda: screen.main.rows["schedules"][0]["state"] == "paused")
        await confirm(screen, pilot, "u")
        assert await do(screen, pilot) == "schedule nightly: resumed"
        assert set(values(conn, "SELECT actor FROM batchq.audit WHERE verb <> 'set_schedule'")) == {"ann"}

    on_screen(dsn, act)


def test_read_only_offers_no_actions(conn: Conn, dsn: str) -> None:
    insert(conn)

    async def act(screen: Top, pilot: Any) -> None:
        await until(pilot, lambda: table(screen, "queues").row_count == 1)
        await pilot.press("a")
        await pilot.pause()
        assert screen.screen is screen.main
        assert "(read-only)" in state(screen)

    on_screen(dsn, act, is_read_only=True)


def test_an_error_of_the_database_is_shown_and_stays(conn: Conn, dsn: str) -> None:
    failed = finished(conn, "failed", kind="send", unique_key="one", error='{"error": "E"}')
    batchq.enqueue(conn, "send", unique_key="one")

    async def act(screen: Top, pilot: Any) -> None:
        screen.push_screen(BatchView(failed))
        await until(pilot, lambda: "failed" in state(screen))
        dialog = await confirm(screen, pilot, "r")
        dialog.query_one("#do", Button).press()
        await until(pilot, lambda: bool(dialog.result) and dialog.result != "working ...")
        await pilot.pause(0.5)
        assert screen.screen is dialog
        assert "unique_key" in dialog.result
        assert "unique_key" in "\n".join(lines(screen))

    on_screen(dsn, act, NARROW)


# --------------------------------------------------------------------------------------------------- light and dark


@pytest.mark.parametrize("is_light", [False, True])
def test_all_text_can_be_read_on_light_and_on_dark(conn: Conn, dsn: str, is_light: bool) -> None:
    set_scene(conn)
    set_long_names(conn)
    beat(conn, "killed", 12)

    async def act(screen: Top, pilot: Any) -> None:
        for number, name in enumerate(LISTINGS, 1):
            await pilot.press(str(number))
            await until(pilot, lambda name=name: table(screen, name).row_count > 0 or name == "flows")  # type: ignore[misc]
            await pilot.pause()
            assert hard_to_read(screen) == [], name
        await press(pilot, "2 enter")
        await until(pilot, lambda: isinstance(screen.screen, BatchView) and bool(screen.screen.shown))
        await pilot.pause()
        assert hard_to_read(screen) == [], name
        await pilot.press("a")
        await until(pilot, lambda: isinstance(screen.screen, Menu))
        await pilot.pause()
        assert hard_to_read(screen) == [], name
        await pilot.press("c")
        await until(pilot, lambda: isinstance(screen.screen, Confirmation))
        await pilot.pause()
        assert hard_to_read(screen) == [], name

    on_screen(dsn, act, is_light=is_light)


def contrast(one: Color, other: Color) -> float:
    """Return the ratio of the luminances of two colors, as WCAG defines it."""

    def luminance(color: Color) -> float:
        parts = [part / 255 for part in color.rgb]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one) + 0.05, luminance(other) + 0.05), reverse=True)
    return light / dark


def hard_to_read(screen: Top) -> list[tuple[str, str, str, float]]:
    """Return the texts on the screen, or in its dialog, with a contrast below 4.5; lines and bars are no text."""
    found = []
    boxes = [box.region for box in screen.screen.query("#box")] or [screen.screen.region]
    for line in screen.screen._compositor.render_strips()[boxes[0].y : boxes[0].bottom]:
        for text, style, _ in line.crop(boxes[0].x, boxes[0].right):
            if not any(letter.isalnum() for letter in text) or not style or not style.color or not style.bgcolor:
                continue
            colors = (style.bgcolor, style.color) if style.reverse else (style.color, style.bgcolor)
            ahead, behind = (Color.from_rich_color(color) for color in colors)
            if (ratio := contrast(ahead, behind)) < 4.5:
                found.append((text.strip(), ahead.hex, behind.hex, round(ratio, 1)))
    return found


@pytest.mark.parametrize(("said", "is_light"), [("", False), ("15;0", False), ("0;15", True), ("0;default;15", True)])
def test_the_colors_are_those_of_the_terminal(monkeypatch: pytest.MonkeyPatch, said: str, is_light: bool) -> None:
    monkeypatch.setenv("COLORFGBG", said)
    assert is_light_terminal() is is_light
    assert Top(cast("Source", None), 1).theme == ("textual-light" if is_light else "textual-dark")


def test_t_turns_light_into_dark(conn: Conn, dsn: str) -> None:
    insert(conn)

    async def act(screen: Top, pilot: Any) -> None:
        await until(pilot, lambda: table(screen, "queues").row_count == 1)
        await pilot.press("t")
        assert screen.theme == "textual-light"
        await pilot.press("t")
        assert screen.theme == "textual-dark"

    on_screen(dsn, act, is_light=False)


if __name__ == "__main__":
    run_alone(__file__)
