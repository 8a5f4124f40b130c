"""Limits as people see and set them, from SQL and on the command line: in use, refused, held back; and throttles."""

from pathlib import Path
from typing import Any

import psycopg
import pytest

from batchq.operate.limits import NUMBERS, number_text, use_text
from tests.component.rows import Conn, insert, value, values
from tests.support.alone import run_alone
from tests.support.commands import CommandLine
from tests.support.steps import step

CHANGING = ["limit", "--queue", "mail"]


@pytest.fixture
def batchq(dsn: str, tmp_path: Path) -> CommandLine:
    """Return what runs commands on the test's database."""
    return CommandLine(dsn, tmp_path)


def share(conn: Conn, worker: str, age_seconds: float = 0, **columns: Any) -> None:
    """Let a worker with a lease of 15 s hold a share of the limit of mail/send."""
    given = {"queue": "mail", "kind": "send", "worker": worker, "lease_seconds": 15, **columns}
    names, marks = ", ".join(given), ", ".join(["%s"] * len(given))
    conn.execute(
        f"INSERT INTO batchq.limit_shares ({names}, refreshed_at) "
        f"VALUES ({marks}, now() - %s * interval '1 second')".encode(),
        [*given.values(), age_seconds],
    )


def declare(conn: Conn, **numbers: Any) -> None:
    """Declare a limit of mail/send, as a worker does when it starts."""
    declared = [{"kind": "send", **numbers}]
    conn.execute("SELECT batchq.declare_limits('{mail}', '{send}', %s)", [psycopg.types.json.Jsonb(declared)])


def rows(conn: Conn) -> list[tuple[Any, ...]]:
    """Return the rows of batchq.limits."""
    return conn.execute(
        "SELECT queue, kind, max_running, per_second, items_per_second, burst_seconds, max_running_per_key "
        "FROM batchq.limits ORDER BY queue, kind NULLS FIRST"
    ).fetchall()


# ------------------------------------------------------------------------------------------------- what is refused

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a queue without a name": ({"queue": ""}, "limits_queue_is_named"),
    "a queue of 129 bytes": ({"queue": "q" * 129}, "limits_queue_is_named"),
    "a kind without a name": ({"kind": ""}, "limits_kind_is_named"),
    "a kind of 201 bytes": ({"kind": "k" * 201}, "limits_kind_is_named"),
    "fewer than none running": ({"max_running": -1}, "limits_max_running_is_not_negative"),
    "a negative rate": ({"per_second": -0.5}, "limits_per_second_is_not_negative"),
    "minus infinity": ({"per_second": "-infinity"}, "limits_per_second_is_not_negative"),
    "a rate that is no number": ({"per_second": "NaN"}, "limits_per_second_is_not_negative"),
    "a negative rate of items": ({"items_per_second": -1}, "limits_items_per_second_is_not_negative"),
    "a rate of items that is no number": ({"items_per_second": "NaN"}, "limits_items_per_second_is_not_negative"),
    "a burst of 0": ({"per_second": 1, "burst_seconds": 0}, "limits_burst_is_positive"),
    "a burst of more than an hour": ({"per_second": 1, "burst_seconds": 3601}, "limits_burst_is_positive"),
    "a burst that is no number": ({"per_second": 1, "burst_seconds": "NaN"}, "limits_burst_is_positive"),
    "fewer than none per key": ({"max_running_per_key": -1}, "limits_max_running_per_key_is_not_negative"),
    "a number that is text": ({"max_running": "ten"}, 'invalid input syntax for type integer: "ten"'),
    "a half batch": ({"max_running": "1.5"}, 'invalid input syntax for type integer: "1.5"'),
    "more than an integer": ({"max_running": "2147483648"}, 'value "2147483648" is out of range for type integer'),
    "a rate that is text": ({"per_second": "fast"}, 'invalid input syntax for type double precision: "fast"'),
    "a NUL in a name": ({"queue": "a\0b"}, "NUL"),
}


@pytest.mark.parametrize("by", ["INSERT", "set_limit"])
@pytest.mark.parametrize("bad", REFUSED)
def test_a_limit_that_makes_no_sense_is_refused_by_name(conn: Conn, bad: str, by: str) -> None:
    columns, message = REFUSED[bad]
    given = {"queue": "mail", "max_running": 1, **columns}
    names, marks = ", ".join(given), ", ".join(["%s"] * len(given))
    named = ", ".join(f"{name} => %s" for name in given)
    statement = f"INSERT INTO batchq.limits ({names}) VALUES ({marks})"
    if by == "set_limit":
        statement = f"SELECT batchq.set_limit({named})"
    with pytest.raises((psycopg.DataError, psycopg.IntegrityError), match=message):
        conn.execute(statement.encode(), [None if given is None else str(given) for given in given.values()])
    assert (rows(conn), values(conn, "SELECT verb FROM batchq.audit")) == ([], [])


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("INSERT INTO batchq.limits (queue) VALUES ('mail')", "limits_limit_something"),
        ("INSERT INTO batchq.limits (queue, burst_seconds) VALUES ('mail', 2)", "limits_limit_something"),
        ("INSERT INTO batchq.limits (queue, max_running) VALUES (NULL, 2)", '"queue"'),
        ("INSERT INTO batchq.limits (queue, max_running) VALUES ('twice', 1), ('twice', 2)", "limits_one_each"),
        ("SELECT batchq.set_limit(NULL, max_running => 1)", '"queue"'),
    ],
)
def test_a_row_that_limits_nothing_or_is_there_already_is_refused(conn: Conn, statement: str, message: str) -> None:
    with pytest.raises(psycopg.IntegrityError, match=message):
        conn.execute(statement.encode())


MISTAKES: dict[str, tuple[list[str], str]] = {
    "a negative number": (["--max-running", "-1"], "max_running must be a whole number, 0 or more"),
    "a half batch": (["--max-running", "1.5"], "not '1.5'"),
    "too large a number": (["--max-running", "2147483648"], "not '2147483648'"),
    "nan": (["--per-second", "nan"], "per_second must be a number, 0 or more"),
    "minus infinity": (["--per-second=-inf"], "not '-inf'"),
    "text": (["--items-per-second", "fast"], "not 'fast'"),
    "a burst of 0": (["--burst-seconds", "0"], "burst_seconds must be a number from 0.001 to 3600, not '0'"),
    "a burst of none": (["--burst-seconds", "none"], "not 'none'"),
    "a negative number per key": (["--max-running-per-key=-3"], "not '-3'"),
    "only a burst": (["--burst-seconds", "2"], "burst_seconds limits nothing without a rate"),
    "a number to remove": (["--remove", "--max-running", "3"], "leave out --max-running, or leave out --remove"),
    "a kind of 201 bytes": (["--kind", "k" * 201, "--max-running", "1"], "must be a kind, which has 1 to 200 bytes"),
    "a kind without a name": (["--kind", "", "--max-running", "1"], "must be a kind, which has 1 to 200 bytes"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_on_the_command_line_is_named_with_its_value(batchq: CommandLine, conn: Conn, mistake: str) -> None:
    arguments, message = MISTAKES[mistake]
    ended = batchq(*CHANGING, *arguments)
    assert (ended.code, message in ended.err) == (2, True), ended
    assert "Traceback" not in ended.err
    assert rows(conn) == []


def test_a_limit_needs_its_queue(batchq: CommandLine) -> None:
    for words in (["--max-running", "3"], ["--kind", "send", "--remove"]):
        ended = batchq("limit", *words)
        assert (ended.code, "a limit needs --queue" in ended.complaint) == (2, True)


# ------------------------------------------------------------------------------------------------------- what is set


def test_numbers_that_are_not_given_stay_and_what_changes_is_told(batchq: CommandLine, conn: Conn) -> None:
    send = [*CHANGING, "--kind", "send"]
    first = batchq(*send, "--max-running", "10", "--per-second", "50", "--reason", "their API", "--actor", "ann")
    assert (first.code, "max_running none -> 10, per_second none -> 50, burst_seconds none -> 1" in first.out) == (
        0,
        True,
    )
    second = batchq(*send, "--max-running", "5", "--items-per-second", "2.5", "--burst-seconds", "2")
    assert second.out.endswith("changed: max_running 10 -> 5, items_per_second none -> 2.5, burst_seconds 1 -> 2\n"), (
        second.out
    )
    again = batchq(*send, "--max-running", "5")
    assert "unchanged: max_running 5, per_second 50" in again.out
    assert rows(conn) == [("mail", "send", 5, 50, 2.5, 2, None)]
    step("none removes one number")
    assert "per_second 50 -> none" in batchq(*send, "--per-second", "none").out
    assert "max_running_per_key none -> 1" in batchq(*send, "--max-running-per-key", "1").out
    assert rows(conn) == [("mail", "send", 5, None, 2.5, 2, 1)]
    step("the limit of the whole queue is another row")
    batchq(*CHANGING, "--max-running", "0")
    assert rows(conn)[0] == ("mail", None, 0, None, None, 1, None)
    noted = conn.execute("SELECT verb, queue, kind, reason, actor FROM batchq.audit ORDER BY id LIMIT 1").fetchall()
    assert noted == [("set_limit", "mail", "send", "their API", "ann")]
    assert value(conn, "SELECT count(*) FROM batchq.audit") == 5, "what changes nothing is not recorded"


def test_a_limit_is_removed_as_a_whole_or_with_its_last_number(batchq: CommandLine, conn: Conn) -> None:
    for last in (["--remove"], ["--max-running", "none"]):
        batchq(*CHANGING, "--max-running", "3")
        ended = batchq(*CHANGING, *last)
        assert (ended.code, "removed: max_running 3" in ended.out) == (0, True)
        assert rows(conn) == []
        assert "unchanged: none is set" in batchq(*CHANGING, *last).out
    assert values(conn, "SELECT details FROM batchq.audit WHERE details ? 'removed'") == [{"removed": True}] * 2


def test_json_has_the_row_before_and_after_and_what_is_in_force(batchq: CommandLine, conn: Conn) -> None:
    declare(conn, max_running=8, per_second=4)
    send = [*CHANGING, "--kind", "send", "--json"]
    shown = batchq(*send, "--per-second", "infinity").json
    assert (shown["changed"], shown["before"], shown["after"]["per_second"]) == (True, None, "Infinity")
    assert (shown["in_force"]["max_running"], shown["in_force"]["per_second"]) == (8, "Infinity")
    shown = batchq(*send, "--remove").json
    assert (shown["after"], shown["in_force"]["per_second"], shown["in_force"]["is_set"]) == (None, 4, False)


def test_what_code_declares_holds_where_the_table_says_nothing_and_is_told(batchq: CommandLine, conn: Conn) -> None:
    declare(conn, max_running=8, per_second=4)
    ended = batchq(*CHANGING, "--kind", "send", "--max-running", "infinity")
    assert "max_running none -> infinity" in ended.out
    assert "in force (set and declared in code): max_running infinity, per_second 4" in ended.out
    assert "in force (declared in code): max_running 8" in batchq(*CHANGING, "--kind", "send", "--remove").out


def test_a_queue_that_nobody_knows_is_limited_all_the_same_with_a_hint(batchq: CommandLine, conn: Conn) -> None:
    ended = batchq(*CHANGING, "--max-running", "3")
    assert (ended.code, "no batch and no live worker of queue mail is known" in ended.err) == (0, True)
    insert(conn, queue="mail", kind="send")
    assert batchq(*CHANGING, "--max-running", "4").err == ""
    assert "kind other in queue mail is known" in batchq(*CHANGING, "--kind", "other", "--max-running", "4").err


# ------------------------------------------------------------------------------------------------------ what is shown


def test_the_limits_in_use_are_the_sums_of_live_shares(conn: Conn) -> None:
    conn.execute("SELECT batchq.set_limit('mail', 'send', max_running => 10, per_second => 50, items_per_second => 9)")
    share(conn, "a", running=5, in_use=2, starts_per_second=30, items_per_second=4, held_back_by="per_second")
    share(conn, "b", running=5, in_use=1, starts_per_second=18, held_back_by="max_running,per_second")
    share(conn, "dead for 10 s", 10, in_use=4, starts_per_second=7, items_per_second=7, held_back_by="items_per_second")
    share(conn, "dead for long", 18, in_use=3)
    assert conn.execute(
        "SELECT workers, running, starts_per_second_shared, items_per_second_shared, held_back_by "
        "FROM batchq.limits_in_use"
    ).fetchall() == [(2, 7, 48, 4, "max_running, per_second")]


def test_every_limit_in_force_is_shown_though_nobody_uses_it(conn: Conn) -> None:
    conn.execute("SELECT batchq.set_limit('mail', max_running => 1)")
    declare(conn, per_second=3)
    found = conn.execute(
        "SELECT kind, is_set, is_declared, workers, running, held_back_by FROM batchq.limits_in_use ORDER BY kind"
    ).fetchall()
    assert found == [("send", False, True, 0, 0, None), (None, True, False, 0, 0, None)]


def test_the_list_shows_what_is_in_use_of_each_limit_and_the_throttles(batchq: CommandLine, conn: Conn) -> None:
    assert batchq("limit").out == "nothing is limited\n"
    conn.execute("SELECT batchq.set_limit('mail', 'send', max_running => 10, per_second => 50)")
    conn.execute("SELECT batchq.set_limit('bulk', max_running_per_key => 1)")
    conn.execute("SELECT batchq.throttle('mail', 'send', 'acme', 90, 'worker-1')")
    share(conn, "a", in_use=3, starts_per_second=48, held_back_by="per_second")
    shown = batchq("limit").out
    for text in ("3 of 10", "48 of 50", "(all)", "per_second", "Throttles", "acme", "worker-1"):
        assert text in shown
    of_mail = batchq("limit", "--queue", "mail", "--json").json
    assert [row["kind"] for row in of_mail["limits"]] == ["send"]
    assert [(row["key"], 60 < row["seconds_left"] <= 90) for row in of_mail["throttles"]] == [("acme", True)]
    assert batchq("limit", "--kind", "other", "--json").json == {"limits": [], "throttles": []}


def test_status_and_top_show_what_is_held_back_and_by_which_limit(batchq: CommandLine, conn: Conn) -> None:
    for _ in range(2):
        insert(conn, queue="mail", kind="send")
    assert "Limits" not in batchq("status").out
    conn.execute("SELECT batchq.set_limit('mail', 'send', max_running => 10)")
    conn.execute("SELECT batchq.throttle('bulk', NULL, NULL, 90)")
    share(conn, "a", in_use=3, held_back_by="max_running")
    for command in ("status", "top"):
        shown = batchq(command).out
        for text in ("2 by max_running", "3 of 10", "Throttles"):
            assert text in shown, command
    assert batchq("status", "--json").json["queues"][0]["held_back"] == 2


@pytest.mark.parametrize(
    ("used", "limit", "text"),
    [
        (3, 10, "3 of 10"),
        (48.0, 50.0, "48 of 50"),
        (0.25, 0.5, "0.25 of 0.5"),
        (1, None, ""),
        (2, "Infinity", "2 of infinity"),
    ],
)
def test_use_is_so_much_of_a_limit(used: float, limit: float | str | None, text: str) -> None:
    assert use_text(used, limit) == text


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)
def test_what_is_read_is_shown_as_it_was_written(number: Any) -> None:
    for text in (
        "1",
        "30",
        *(() if number.is_whole else ("0.5", "2.25")),
        *(("0", "none", "infinity") * number.is_optional),
    ):
        assert number_text(number.read(text)) == text


# --------------------------------------------------------------------------------------------------------- throttles


def test_a_throttle_is_ended_once_by_its_name(batchq: CommandLine, conn: Conn) -> None:
    for kind, key in ((None, None), ("send", None), ("send", "acme")):
        conn.execute("SELECT batchq.throttle('mail', %s, %s, 60)", [kind, key])
    send = ["unthrottle", "--queue", "mail", "--kind", "send"]
    assert batchq(*send, "--key", "acme", "--reason", "they recovered").out == (
        "throttle ended: kind send in queue mail\n"
    )
    ended = batchq(*send, "--key", "acme")
    assert ended.out.startswith("no matching throttle: kind send in queue mail; throttled now: ")
    assert conn.execute("SELECT kind, key FROM batchq.throttles ORDER BY kind").fetchall() == [("", ""), ("send", "")]
    assert batchq(*send, "--json").json == {"changed": True}
    assert batchq("unthrottle", "--queue", "mail").out == "throttle ended: queue mail\n"
    noted = conn.execute("SELECT verb, queue, kind, details, reason FROM batchq.audit ORDER BY id").fetchall()
    assert noted[0] == ("end_throttle", "mail", "send", {"key": "acme"}, "they recovered")
    assert [row[2] for row in noted] == ["send", "send", None]


def test_a_throttle_that_has_ended_by_itself_is_not_there_to_be_ended(conn: Conn) -> None:
    conn.execute("INSERT INTO batchq.throttles (queue, kind, until) VALUES ('mail', 'send', now() - interval '1 s')")
    assert value(conn, "SELECT batchq.end_throttle('mail', 'send')") is False
    assert values(conn, "SELECT verb FROM batchq.audit") == []


def test_a_throttle_to_end_needs_its_queue(batchq: CommandLine, conn: Conn) -> None:
    with pytest.raises(psycopg.errors.RaiseException, match="takes a queue"):
        conn.execute("SELECT batchq.end_throttle()")
    assert "unthrottle needs --queue" in batchq("unthrottle").complaint
    assert "unthrottle needs --queue" in batchq("unthrottle", "--kind", "send").complaint


if __name__ == "__main__":
    run_alone(__file__)
