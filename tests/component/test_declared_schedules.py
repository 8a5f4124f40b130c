"""Schedules that code declares: written when a worker starts, due while one declares them; a person's word counts."""

from typing import Any

import pytest

import batchq
from batchq.errors import ConfigError
from batchq.postgres.statements import schedules as statements
from batchq.postgres.statements.schedules import DueSchedule
from batchq.testing import running_worker
from batchq.worker.schedules import plan
from tests.component.rows import Conn, value, values
from tests.component.test_schedules import add, app_of, fire, planned
from tests.support.alone import run_alone
from tests.support.waiting import wait_until

ROWS = "SELECT name, cron, time_zone, queue, kind, missed, overlap, is_declared FROM batchq.schedules ORDER BY name"


def test_a_worker_writes_what_its_code_declares(conn: Conn, dsn: str) -> None:
    app = app_of(cron="0 2 * * *", time_zone="Europe/Berlin", missed="skip", overlap="skip", payload={"x": 1})
    with running_worker(app, dsn):
        state = "SELECT state FROM batchq.schedule_status"
        wait_until(lambda: values(conn, state) == ["active"], 10, "the schedule to be active")
        assert conn.execute(ROWS).fetchall() == [
            ("a", "0 2 * * *", "Europe/Berlin", "default", "a", "skip", "skip", True)
        ]
        assert value(conn, "SELECT payload FROM batchq.schedules") == {"x": 1}
        assert value(conn, "SELECT schedules FROM batchq.workers") == ["a"]
    assert values(conn, state) == ["undeclared"], "no worker declares it any longer"
    planned(conn, 0, "a")
    assert fire(conn) == []
    [due] = conn.execute(
        "SELECT name, revision, cron, time_zone, missed, catch_up_most, date_part('epoch', next_at), 0.0::float8, "
        "date_part('epoch', now()) FROM batchq.schedules"
    ).fetchall()
    stale = DueSchedule._make(due)
    assert conn.execute(*statements.fire_schedules([plan(stale, stale.now)])).fetchall() == [], "a plan of before"
    assert value(conn, "SELECT count(*) FROM batchq.all_batches") == 0


def test_the_worker_that_starts_last_is_right_unless_a_person_has_changed_the_row(conn: Conn, dsn: str) -> None:
    for cron in ("0 2 * * *", "0 3 * * *"):
        with running_worker(app_of(cron=cron), dsn):
            wait_until(lambda cron=cron: values(conn, "SELECT cron FROM batchq.schedules") == [cron], 10, cron)  # type: ignore[misc]
    conn.execute("UPDATE batchq.schedules SET paused = true")
    assert value(conn, "SELECT is_declared FROM batchq.schedules"), "a pause changes no definition"
    conn.execute("UPDATE batchq.schedules SET paused = false, cron = '0 4 * * *'")
    assert not value(conn, "SELECT is_declared FROM batchq.schedules")
    with running_worker(app_of(cron="0 2 * * *"), dsn):
        shown = "SELECT state || ' ' || declaring_workers FROM batchq.schedule_status"
        wait_until(lambda: values(conn, shown) == ["active 1"], 10, "the worker's heartbeat")
        assert values(conn, "SELECT cron FROM batchq.schedules") == ["0 4 * * *"]


def test_a_persons_schedule_of_the_same_name_stays(conn: Conn, dsn: str) -> None:
    add(conn, "0 5 * * *", name="a")
    with running_worker(app_of(cron="0 2 * * *"), dsn):
        wait_until(lambda: values(conn, "SELECT state FROM batchq.schedule_status") == ["active"], 10, "its next time")
        assert values(conn, "SELECT cron FROM batchq.schedules") == ["0 5 * * *"]


def test_a_declared_schedule_is_due_again_when_a_worker_declares_it_again(conn: Conn, dsn: str) -> None:
    done: list[float] = []
    with running_worker(app_of(done, cron="@every 1 h"), dsn):
        wait_until(lambda: values(conn, "SELECT state FROM batchq.schedule_status") == ["active"], 10, "its next time")
    planned(conn, 2 * 3600, "a")
    with running_worker(app_of(done, cron="@every 1 h"), dsn):
        wait_until(lambda: bool(done), 10, "the batch of what was missed")
    assert conn.execute("SELECT batches_made, ticks_missed FROM batchq.schedules").fetchall() == [(1, 2)]


def test_a_schedule_may_stand_below_the_handler_and_a_handler_may_have_several() -> None:
    app = batchq.App()

    @app.schedule("0 2 * * *")
    @app.handler("report")
    @app.schedule("@hourly", name="hourly report", payload={"short": True})
    def report(batch: batchq.Batch) -> None:
        pass

    found = {row["name"]: (row["kind"], row["cron"], row["payload"]) for row in app.declared_schedules()}
    assert found == {
        "report": ("report", "0 2 * * *", {}),
        "hourly report": ("report", "@hourly", {"short": True}),
    }


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nonsense": ({"cron": "nonsense"}, "a cron expression has 5 fields"),
    "31 February": ({"cron": "0 0 31 2 *"}, "never comes"),
    "no text": ({"cron": 5}, "takes a cron expression"),
    "the decorator without its arguments": ({"cron": print}, "takes a cron expression"),
    "a time zone that is none": ({"time_zone": "Mars"}, "no time zone 'Mars'"),
    "no name": ({"name": ""}, "a schedule needs a name"),
    "a rule that is none": ({"missed": "all"}, "missed must be coalesce or skip or catch_up, not 'all'"),
    "an overlap that is none": ({"overlap": True}, "overlap must be allow or skip, not True"),
    "too many to catch up": ({"catch_up_most": 1001}, "a whole number from 1 to 1000, not 1001"),
    "half to catch up": ({"catch_up_most": 1.5}, "not 1.5"),
    "a queue without a name": ({"queue": ""}, "a schedule needs a queue"),
    "a payload that is no JSON": ({"payload": {1, 2}}, "the payload of a schedule cannot be stored as JSON"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_schedule_that_the_table_would_refuse_is_refused_in_code(wrong: str) -> None:
    given, message = WRONG[wrong]
    with pytest.raises((ConfigError, batchq.InvalidInput), match=message):
        app_of(**{"cron": "0 2 * * *", **given})


def test_a_schedule_needs_a_handler_and_a_name_of_its_own() -> None:
    app = batchq.App()
    app.schedule("0 2 * * *")(print)
    with pytest.raises(ConfigError, match="is not the handler of a kind"):
        app.declared_schedules()
    app = app_of(cron="0 2 * * *")
    app.schedule("0 3 * * *")(app.handlers["a"].function)
    with pytest.raises(ConfigError, match="two schedules have the name 'a'"):
        app.declared_schedules()


if __name__ == "__main__":
    run_alone(__file__)
