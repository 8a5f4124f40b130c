"""Schedules as people see and set them: on the command line, in the web UI, in metrics, and in batchq doctor."""

from pathlib import Path

import psycopg
import pytest

from batchq.operate import doctor
from tests.component.rows import Conn, value, values
from tests.component.test_schedules import add, app_of, fire, planned
from tests.support.alone import run_alone
from tests.support.batches import drain
from tests.support.commands import CommandLine
from tests.support.steps import step
from tests.support.web import served

NIGHTLY = ["schedule", "add", "nightly", "0 2 * * *", "--kind", "a", "--time-zone", "Europe/Berlin"]


@pytest.fixture
def batchq(dsn: str, tmp_path: Path) -> CommandLine:
    """Return what runs commands on the test's database."""
    return CommandLine(dsn, tmp_path)


def live_worker(conn: Conn, *declares: str) -> None:
    """Let a worker of the kind a live, that declares schedules."""
    conn.execute(
        "INSERT INTO batchq.workers (id, hostname, pid, version, queues, kinds, concurrency, schedules) "
        "VALUES ('w', 'h', 1, '1', '{default}', '{a}', 1, %s)",
        [list(declares)],
    )


# ------------------------------------------------------------------------------------------------- the command line


def test_a_schedule_is_added_changed_and_listed_in_words(batchq: CommandLine, conn: Conn) -> None:
    assert batchq("schedule").out == "there are no schedules\n"
    first = batchq(*NIGHTLY, "--reason", "reports", "--actor", "ann")
    assert (first.code, first.out) == (0, "schedule nightly added: every day at 02:00 Europe/Berlin\n")
    assert "no live worker of queue default has a handler for kind a" in first.err
    assert batchq(*NIGHTLY).out == "schedule nightly unchanged: every day at 02:00 Europe/Berlin\n"
    changed = batchq("schedule", "add", "nightly", "@every 30 s", "--kind", "a", "--missed", "catch_up", "--json").json
    assert (changed["changed"], changed["before"]["cron"], changed["after"]["missed"]) == (
        True,
        "0 2 * * *",
        "catch_up",
    )
    batchq(*NIGHTLY)
    fire(conn)
    shown = batchq("schedule", "list").out
    for text in ("nightly", "every day at 02:00 Europe/Berlin", "active", "coalesce, allow", "set"):
        assert text in shown
    [row] = batchq("schedule", "list", "nightly", "--json").json
    assert (row["words"], len(row["upcoming"])) == ("every day at 02:00 Europe/Berlin", 3)
    assert "Schedules" in batchq("status").out
    noted = conn.execute("SELECT verb, kind, reason, actor, details ->> 'schedule' FROM batchq.audit ORDER BY id")
    assert noted.fetchall()[0] == ("set_schedule", "a", "reports", "ann", "nightly")
    assert value(conn, "SELECT count(*) FROM batchq.audit") == 3, "what changes nothing is not recorded"


def test_a_schedule_is_paused_resumed_run_and_removed(batchq: CommandLine, conn: Conn) -> None:
    add(conn, name="nightly")
    assert batchq("schedule", "pause", "nightly", "--reason", "holiday").out == "schedule nightly paused\n"
    assert batchq("schedule", "pause", "nightly").out == "schedule nightly already paused\n"
    made = batchq("schedule", "run", "nightly").out
    assert made == f"schedule nightly run: batch {value(conn, 'SELECT id FROM batchq.all_batches')}\n"
    assert value(conn, "SELECT last_status FROM batchq.schedule_status") == "pending"
    assert batchq("schedule", "resume", "nightly").out == "schedule nightly resumed\n"
    assert batchq("schedule", "resume", "nightly", "--json").json == {"changed": False}
    assert batchq("schedule", "remove", "nightly").out == "schedule nightly removed\n"
    for action in ("pause", "resume", "run", "remove"):
        ended = batchq("schedule", action, "nightly")
        assert (ended.code, ended.complaint) == (1, "there is no schedule nightly")
    assert values(conn, "SELECT verb FROM batchq.audit ORDER BY id") == [
        "pause_schedule", "run_schedule", "resume_schedule", "remove_schedule",
    ]  # fmt: skip


def test_ticks_of_a_pause_are_not_made_up_for(conn: Conn) -> None:
    add(conn, "@every 1 m", missed="catch_up")
    fire(conn)
    conn.execute("SELECT batchq.pause_schedule('one')")
    planned(conn, 600)
    assert fire(conn) == []
    conn.execute("SELECT batchq.resume_schedule('one')")
    fire(conn)
    found = conn.execute("SELECT batches_made, ticks_missed, next_at > now() FROM batchq.schedules").fetchall()
    assert found == [(0, 0, True)]


MISTAKES: dict[str, tuple[list[str], str]] = {
    "31 February": (["add", "x", "0 0 31 2 *", "--kind", "a"], "never comes: no month 2 has such a day"),
    "nonsense": (["add", "x", "nonsense", "--kind", "a"], "a cron expression has 5 fields"),
    "an hour too many": (["add", "x", "0 24 * * *", "--kind", "a"], "hour cannot be '24'"),
    "an unknown time zone": (["add", "x", "* * * * *", "--kind", "a", "--time-zone", "Mars"], "no time zone 'Mars'"),
    "no kind": (["add", "x", "* * * * *"], "a schedule needs a kind"),
    "no expression": (["add", "x", "--kind", "a"], "needs NAME and CRON, and --kind"),
    "no name": (["pause"], "batchq schedule pause needs NAME"),
    "a name of 201 bytes": (["add", "n" * 201, "* * * * *", "--kind", "a"], "must have at most 200 bytes, not 201"),
    "a payload that is no JSON": (["add", "x", "* * * * *", "--kind", "a", "--payload", "{"], "not valid JSON"),
    "a rule that is none": (["add", "x", "* * * * *", "--kind", "a", "--missed", "all"], "invalid choice: 'all'"),
    "0 to catch up": (["add", "x", "* * * * *", "--kind", "a", "--catch-up-most", "0"], "not 0"),
    "an overlap that is none": (["add", "x", "* * * * *", "--kind", "a", "--overlap", "no"], "invalid choice: 'no'"),
    "an expression to pause": (["pause", "x", "* * * * *"], "batchq schedule pause takes no CRON"),
    "a rule to remove": (["remove", "x", "--missed", "skip"], "batchq schedule remove takes no --missed"),
    "no such action": (["start", "x"], "invalid choice: 'start'"),
    "a NUL in the payload": (
        ["add", "x", "* * * * *", "--kind", "a", "--payload", '"\\u0000"'],
        "unsupported Unicode escape sequence",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_on_the_command_line_is_named(batchq: CommandLine, conn: Conn, mistake: str) -> None:
    arguments, message = MISTAKES[mistake]
    ended = batchq("schedule", *arguments)
    assert (ended.code, message in ended.err) == (2, True), ended
    assert "Traceback" not in ended.err
    assert values(conn, "SELECT name FROM batchq.schedules") == []


# ------------------------------------------------------------------------------------------------------- the page


def test_the_page_shows_the_next_runs_and_the_last_outcome_and_changes_schedules(conn: Conn, dsn: str) -> None:
    with served(dsn) as site:
        assert "Nothing is scheduled." in site.client.get("/schedules").text
        token = site.form_token("/schedules/set")
        fields = {"name": "nightly", "cron": "0 2 * * *", "kind": "a", "time_zone": "Europe/Berlin", "reason": "new"}
        answer = site.post("/schedules/set", token, **fields)
        assert (answer.status_code, answer.headers["location"]) == (303, "/schedules?said=set_schedule")
        fire(conn)
        made = site.post("/schedules/run", site.form_token("/schedules/run?name=nightly"), name="nightly")
        batch_id = value(conn, "SELECT last_batch_id FROM batchq.schedules")
        assert made.headers["location"] == f"/batches/{batch_id}"
        drain(app_of(), dsn)
        shown = site.client.get("/schedules").text
        for text in ("every day at 02:00 Europe/Berlin", f'href="/batches/{batch_id}"', "completed", "active"):
            assert text in shown
        assert shown.count(":00:00") >= 3, "the next runs"
        assert 'value="0 2 * * *"' in site.client.get("/schedules/set?name=nightly").text
        for action, column in (("pause", "paused"), ("resume", "NOT paused"), ("remove", "false")):
            page = f"/schedules/{action}?name=nightly"
            assert site.post(f"/schedules/{action}", site.form_token(page), name="nightly").status_code == 303
            assert values(conn, f"SELECT {column} FROM batchq.schedules") in ([True], [])
        gone = site.post("/schedules/pause", token, name="nightly")
        assert (gone.status_code, "there is no such schedule any more" in gone.text) == (409, True)
    assert values(conn, "SELECT actor FROM batchq.audit ORDER BY id")[0] == "web"


def test_the_page_names_what_it_refuses_and_keeps_what_was_typed(conn: Conn, dsn: str) -> None:
    with served(dsn) as site:
        token = site.form_token("/schedules/set")
        for fields, text in (
            ({"cron": "0 0 31 2 *"}, "never comes"),
            ({"time_zone": "Europe/Atlantis"}, "there is no time zone"),
            ({"kind": ""}, "a schedule needs a kind"),
            ({"payload": "{"}, "not valid JSON"),
            ({"name": ""}, "a schedule needs a name"),
            ({"catch_up_most": "many"}, "catch_up_most must be a whole number"),
            ({"missed": "<script>x"}, "missed must be coalesce or skip or catch_up"),
        ):
            given = {"name": "nightly", "cron": "0 2 * * *", "kind": "a", **fields}
            answer = site.post("/schedules/set", token, **given)
            assert (answer.status_code, text in answer.text) == (409, True), text
            assert "<script>x" not in answer.text
            assert "Change schedule" not in answer.text, "there is none yet"
        assert site.client.get("/schedules/start").status_code == 404
        assert site.client.get("/schedules/set?name=a%00b").status_code == 200
        forged = site.client.post("/schedules/remove", data={"name": "x", "form_token": "0" * 64})
        assert forged.status_code == 403
    assert values(conn, "SELECT name FROM batchq.schedules") == []


def test_a_read_only_page_changes_no_schedule(conn: Conn, dsn: str) -> None:
    add(conn)
    with served(dsn, read_only=True) as site:
        assert site.client.get("/schedules/set").status_code == 403
        assert site.client.get("/schedules/run?name=one").status_code == 403
        shown = site.client.get("/schedules").text
        assert ("one" in shown, "/schedules/run" in shown) == (True, False)
        token = site.web.guard.sessions.form_token(site.client.cookies["batchq_session"])
        assert "No actions" in site.post("/schedules/remove", token, name="one").text
    assert values(conn, "SELECT name FROM batchq.schedules") == ["one"]


def test_hidden_letters_and_markup_in_schedules_are_spelled_out(conn: Conn, dsn: str, batchq: CommandLine) -> None:
    add(conn, name="<b>\u202eevil", kind="<script>x", cron="0 24 * * *")
    fire(conn)
    with served(dsn) as site:
        shown = site.client.get("/schedules").text
    assert "<script>x" not in shown
    assert "<b>" not in shown
    assert "\u202e" not in shown + batchq("schedule").out


def test_metrics_show_lateness_failures_and_what_became_of_ticks(conn: Conn, dsn: str) -> None:
    add(conn, "@every 1 m", missed="coalesce")
    fire(conn)
    planned(conn, 300)
    fire(conn)
    with served(dsn) as site:
        shown = site.client.get("/metrics").text
    for text in (
        'batchq_schedule_ticks_total{outcome="batch",schedule="one"} 1.0',
        'batchq_schedule_ticks_total{outcome="missed",schedule="one"} 5.0',
        'batchq_schedule_failing{schedule="one"} 0.0',
        'batchq_schedule_overdue_seconds{schedule="one"} 0.0',
        'batchq_schedule_late_seconds{schedule="one"}',
    ):
        assert text in shown, shown


# ------------------------------------------------------------------------------------------------------- the doctor


def finding(dsn: str, check: str) -> tuple[str, str]:
    """Return severity and evidence of a check."""
    [found] = [found for found in doctor.findings(dsn) if found.check == check]
    step("%s", found)
    return found.severity, found.evidence


def test_the_doctor_names_errors_and_kinds_without_a_handler(conn: Conn, dsn: str) -> None:
    live_worker(conn)
    add(conn)
    fire(conn)
    for check in ("schedule_with_an_error", "schedule_without_a_worker", "schedule_overdue"):
        assert finding(dsn, check)[0] == "ok"
    add(conn, "0 0 31 2 *", name="never")
    add(conn, kind="other", name="lost")
    fire(conn)
    assert finding(dsn, "schedule_with_an_error") == (
        "critical", "schedule never (0 0 31 2 *): '0 0 31 2 *' never comes: no month 2 has such a day",
    )  # fmt: skip
    severity, evidence = finding(dsn, "schedule_without_a_worker")
    assert (severity, "schedule lost makes batches of kind other" in evidence) == ("warning", True)


def test_the_doctor_names_what_is_overdue_and_what_nobody_declares(conn: Conn, dsn: str) -> None:
    live_worker(conn, "declared")
    add(conn)
    add(conn, name="declared", is_declared=True)
    add(conn, name="forgotten", is_declared=True)
    fire(conn)
    assert finding(dsn, "schedule_overdue")[0] == "ok"
    planned(conn, 60)
    severity, evidence = finding(dsn, "schedule_overdue")
    assert (severity, "schedule one has been due since" in evidence) == ("warning", True)
    severity, evidence = finding(dsn, "schedule_that_nobody_declares")
    assert (severity, "schedule forgotten" in evidence) == ("warning", True)


def test_a_role_has_the_rights_of_its_duty_and_no_more(conn: Conn) -> None:
    granted = conn.execute(
        "SELECT duty, privilege, object FROM batchq.duties WHERE object LIKE '%%schedule%%' ORDER BY 1, 3, 2"
    ).fetchall()
    by_duty = {duty: {object_ for other, _, object_ in granted if other == duty} for duty, _, _ in granted}
    assert by_duty["worker"] == {"schedules", "fire_schedules", "declare_schedules"}
    assert by_duty["viewer"] == {"schedules", "schedule_status"}
    assert "producer" not in by_duty


def test_a_time_zone_is_checked_before_it_is_written(conn: Conn) -> None:
    add(conn, time_zone="Asia/Beirut")
    with pytest.raises(psycopg.errors.CheckViolation, match="there is no time zone 'Mars'"):
        conn.execute("UPDATE batchq.schedules SET time_zone = 'Mars'")


if __name__ == "__main__":
    run_alone(__file__)
