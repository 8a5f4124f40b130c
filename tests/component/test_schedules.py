"""Schedules: each tick makes exactly one batch, or is counted as missed by the schedule's own rule."""

import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import psycopg
import pytest

import batchq
from batchq.common.cron import ScheduleError, check, next_ticks, ticks, words
from batchq.postgres.statements import schedules as statements
from batchq.postgres.statements.schedules import DueSchedule
from batchq.testing import running_worker
from batchq.worker.housekeeper import Housekeeper
from batchq.worker.schedules import plan
from tests.component.rows import Conn, value, values
from tests.support.alone import run_alone
from tests.support.batches import drain
from tests.support.steps import step
from tests.support.waiting import wait_until

COUNTS = "SELECT batches_made, ticks_missed, ticks_overlapped FROM batchq.schedules WHERE name = 'one'"


def app_of(done: list[float] | None = None, **schedule: Any) -> batchq.App:
    """Return an app with the kind a; with *schedule*, that is declared for it."""
    app = batchq.App()

    @app.handler("a")
    def work(batch: batchq.Batch) -> None:
        if done is not None:
            done.append(time.time())

    if schedule:
        app.schedule(**schedule)(work)
    return app


def add(conn: Conn, cron: str = "0 0 * * *", name: str = "one", **columns: Any) -> None:
    """Insert a schedule of the kind a, as any SQL client would."""
    given = {"name": name, "cron": cron, "kind": "a", **columns}
    names, marks = ", ".join(given), ", ".join(["%s"] * len(given))
    conn.execute(f"INSERT INTO batchq.schedules ({names}) VALUES ({marks})".encode(), list(given.values()))


def planned(conn: Conn, seconds_ago: float, name: str = "one") -> None:
    """Let the next tick of a schedule be so long ago."""
    conn.execute(
        "UPDATE batchq.schedules SET next_at = date_trunc('second', now()) - %s * interval '1 s' WHERE name = %s",
        [seconds_ago, name],
    )


def fire(conn: Conn) -> list[tuple[Any, ...]]:
    """Do once what a worker does with all that is due."""
    due = statements.due_schedules(conn, 0)
    statement = statements.fire_schedules([plan(schedule, schedule.now) for schedule in due])
    return conn.execute(*statement).fetchall()


def a_schedule(cron: str, next_at: datetime, time_zone: str = "UTC", **columns: Any) -> DueSchedule:
    """Return a schedule as a worker reads it, that is due at *next_at*."""
    given = {"missed": "coalesce", "catch_up_most": 100, "changed_at": 0.0, "now": 0.0, **columns}
    return DueSchedule("one", 0, cron, time_zone, next_at=next_at.timestamp(), **given)


# ------------------------------------------------------------------------------------------------------ when it is due

ODD_ZONES = (
    "Europe/Berlin", "America/St_Johns", "Australia/Lord_Howe", "Africa/Casablanca", "America/Santiago", "Asia/Beirut",
)  # fmt: skip
CRONS = ("30 2 * * *", "0 */2 * * *", "15 0,1,2,3 * * *", "0 30 1 * * *", "30 */6 * * 1-5")


@pytest.mark.parametrize("zone", ODD_ZONES)
def test_in_a_year_of_a_zone_with_odd_summer_times_each_tick_makes_one_batch(zone: str) -> None:
    start, end = datetime(2026, 1, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)
    for cron in CRONS:
        expected = list(until(ticks(cron, zone, start), end))
        step("%s in %s: %s ticks", cron, zone, len(expected))
        made, missed, schedule = [], 0, a_schedule(cron, next_ticks(cron, zone, start, 1)[0], zone)
        while schedule.next_at is not None and schedule.next_at < end.timestamp():
            done = plan(schedule, schedule.next_at + 0.01)
            made += done.ticks
            missed += done.missed
            assert done.next_at is not None
            schedule = schedule._replace(next_at=done.next_at.timestamp())
        assert (made, missed) == (expected, 0), "a worker that begins anew at each tick finds the same ticks"
        assert made == sorted(set(made))


@pytest.mark.parametrize("missed", ["coalesce", "skip", "catch_up"])
@pytest.mark.parametrize("zone", ODD_ZONES)
def test_with_workers_that_are_away_each_tick_of_a_year_makes_a_batch_or_is_missed(zone: str, missed: str) -> None:
    cron, start, end = "0 * * * *", datetime(2026, 1, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)
    expected = list(until(ticks(cron, zone, start), end))
    schedule = a_schedule(cron, next_ticks(cron, zone, start, 1)[0], zone, missed=missed, catch_up_most=5)
    now, made, lost = start.timestamp(), list[datetime](), 0
    while now < end.timestamp() + 86_400:
        now += 47_777.0  # the clock at which a worker comes by
        while schedule.next_at is not None and schedule.next_at <= min(now, end.timestamp() - 1):
            done = plan(schedule, min(now, end.timestamp() - 1))
            made += done.ticks
            lost += done.missed
            assert done.next_at is not None
            schedule = schedule._replace(next_at=done.next_at.timestamp())
    assert len(made) + lost == len(expected)
    assert set(made) <= set(expected)
    assert len(made) == len(set(made))
    assert {"coalesce": len(made) > 300, "skip": len(made) < 30, "catch_up": len(made) > 1500}[missed]


def until(times: Iterator[datetime], end: datetime) -> Iterator[datetime]:
    """Yield times before *end*."""
    for at in times:
        if at >= end:
            return
        yield at


def test_a_fixed_time_that_clocks_leave_out_comes_after_the_gap_and_a_repeated_one_once() -> None:
    berlin = ZoneInfo("Europe/Berlin")
    [before, gap, after] = next_ticks("30 2 * * *", "Europe/Berlin", datetime(2026, 3, 27, 12, tzinfo=UTC), 3)
    assert [at.astimezone(berlin).strftime("%d %H:%M") for at in (before, gap, after)] == [
        "28 02:30", "29 03:00", "30 02:30",
    ]  # fmt: skip
    repeated = next_ticks("30 2 * * *", "Europe/Berlin", datetime(2026, 10, 24, 12, tzinfo=UTC), 2)
    assert [at.astimezone(berlin).strftime("%d %H:%M %Z") for at in repeated] == ["25 02:30 CEST", "26 02:30 CET"]
    second_pass = datetime(2026, 10, 25, 1, 10, tzinfo=UTC)  # 02:10 for the second time
    assert next_ticks("30 2 * * *", "Europe/Berlin", second_pass, 1)[0].astimezone(berlin).day == 26


@pytest.mark.parametrize(
    ("cron", "zone", "text"),
    [
        ("0 2 * * *", "Europe/Berlin", "every day at 02:00 Europe/Berlin"),
        ("@daily", "UTC", "every day at 00:00 UTC"),
        ("@every 30 s", "UTC", "every 30 seconds"),
        ("@every 1h", "UTC", "every hour"),
        ("* * * * *", "Europe/Berlin", "every minute"),
        ("0 6 * * 1", "Asia/Tokyo", "at 06:00 on Monday, Asia/Tokyo"),
        ("0 9-17 * * MON-FRI", "UTC", "at minute 0 past every hour from 9 through 17 on Monday through Friday, UTC"),
        ("no such thing", "UTC", "no such thing"),
    ],
)
def test_an_expression_is_put_in_words(cron: str, zone: str, text: str) -> None:
    assert words(cron, zone) == text


@pytest.mark.parametrize(
    "alias", ["@hourly", "@daily", "@weekly", "@monthly", "@yearly", "@every 90 m", "@every 2 days"]
)
def test_aliases_and_periods_are_read(alias: str) -> None:
    first, second = next_ticks(alias, "Europe/Berlin", datetime(2026, 2, 3, 4, 5, 6, 7, tzinfo=UTC), 2)
    assert second - first >= timedelta(hours=1)


NONSENSE: dict[str, tuple[str, str]] = {
    "nothing": ("", "5 fields"),
    "one word": ("nonsense", "5 fields"),
    "four fields": ("* * * *", "5 fields"),
    "seven fields": ("* * * * * * *", "5 fields"),
    "hour 24": ("0 24 * * *", "hour cannot be '24'"),
    "minute -1": ("-1 * * * *", "minute cannot be '-1'"),
    "month 13": ("0 0 1 13 *", "month cannot be '13'"),
    "weekday 9": ("0 0 * * 9", "day-of-week cannot be '9'"),
    "second 60": ("60 0 0 * * *", "second cannot be '60'"),
    "a step of 0": ("*/0 * * * *", "minute cannot be '\\*/0'"),
    "a range backwards": ("0 17-9 * * *", "hour cannot be '17-9'"),
    "a name that is no day": ("0 0 * * MONDAY", "day-of-week cannot be 'MONDAY'"),
    "31 February": ("0 0 31 2 *", "never comes: no month 2 has such a day"),
    "31 in months of 30 days": ("0 0 31 4,6 *", "never comes: no month 4,6"),
    "a fifth Monday on 31 February": ("0 0 */31 2 1#5", "never comes: no date in the next 50 years"),
    "every nothing": ("@every", "@every takes a time from 1 s"),
    "every 0 s": ("@every 0 s", "not '@every 0 s'"),
    "every 400 d": ("@every 400 d", "not '@every 400 d'"),
    "half a second": ("@every 0.5 s", "not '@every 0.5 s'"),
    "an alias that is none": ("@reboot", "5 fields"),
}


@pytest.mark.parametrize("bad", NONSENSE)
def test_nonsense_is_named(bad: str) -> None:
    cron, message = NONSENSE[bad]
    with pytest.raises(ScheduleError, match=message):
        check(cron, "UTC")


@pytest.mark.parametrize("zone", ["", "Europe", "Europe/Atlantis", "../../etc/passwd", "europe/berlin\0", "CEST"])
def test_a_time_zone_that_is_none_is_named(zone: str) -> None:
    with pytest.raises(ScheduleError, match="there is no time zone"):
        check("0 0 * * *", zone)


# ------------------------------------------------------------------------------------- what Postgres refuses by itself

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a name without a letter": ({"name": ""}, "schedules_name_fits"),
    "a name of 201 bytes": ({"name": "n" * 201}, "schedules_name_fits"),
    "a cron of four fields": ({"cron": "* * * *"}, "schedules_cron_has_5_or_6_fields"),
    "an empty cron": ({"cron": ""}, "schedules_cron_has_5_or_6_fields"),
    "seven fields": ({"cron": "* * * * * * *"}, "schedules_cron_has_5_or_6_fields"),
    "strange characters": ({"cron": "0 0 * * ?"}, "schedules_cron_is_readable"),
    "an alias that is none": ({"cron": "@reboot"}, "schedules_cron_is_readable"),
    "every half second": ({"cron": "@every 0.5 s"}, "schedules_cron_is_readable"),
    "a cron of 301 bytes": ({"cron": "0 0 * * " + "1" * 300}, "schedules_cron_fits"),
    "an unknown time zone": ({"time_zone": "Europe/Atlantis"}, "there is no time zone"),
    "an offset": ({"time_zone": "+02:00"}, "there is no time zone"),
    "a kind without a name": ({"kind": ""}, "schedules_kind_is_named"),
    "no kind": ({"kind": None}, '"kind"'),
    "a queue without a name": ({"queue": ""}, "schedules_queue_is_named"),
    "a payload that is no JSON": ({"payload": "{"}, "invalid input syntax for type json"),
    "a payload of 2 MB": ({"payload": f'"{"p" * 2_000_000}"'}, "schedules_payload_fits"),
    "a rule that is none": ({"missed": "all"}, "schedules_missed_is_known"),
    "0 to catch up": ({"catch_up_most": 0}, "schedules_catch_up_is_bounded"),
    "1001 to catch up": ({"catch_up_most": 1001}, "schedules_catch_up_is_bounded"),
    "an overlap that is none": ({"overlap": "maybe"}, "schedules_overlap_is_known"),
}


@pytest.mark.parametrize("by", ["INSERT", "set_schedule"])
@pytest.mark.parametrize("bad", REFUSED)
def test_a_schedule_that_makes_no_sense_is_refused_by_name(conn: Conn, bad: str, by: str) -> None:
    columns, message = REFUSED[bad]
    given = {"name": "one", "cron": "0 0 * * *", "kind": "a", **columns}
    names, marks = ", ".join(given), ", ".join(["%s"] * len(given))
    statement = f"INSERT INTO batchq.schedules ({names}) VALUES ({marks})"
    if by == "set_schedule":
        statement = f"SELECT batchq.set_schedule({', '.join(f'{name} => %s' for name in given)})"
    with pytest.raises((psycopg.DataError, psycopg.IntegrityError), match=message):
        conn.execute(statement.encode(), list(given.values()))
    assert values(conn, "SELECT name FROM batchq.schedules") == []


def test_a_time_zone_in_other_letters_is_refused_with_a_hint(conn: Conn) -> None:
    with pytest.raises(psycopg.errors.CheckViolation) as caught:
        add(conn, time_zone="europe/berlin")
    assert caught.value.diag.message_hint == "Perhaps Europe/Berlin?"


# ------------------------------------------------------------------------------------------------- one tick, one batch


def test_a_due_schedule_makes_one_batch_and_gets_its_next_time_in_one_transaction(conn: Conn) -> None:
    add(conn, "* * * * *", queue="mail", payload='{"tick": null, "x": 1}')
    assert fire(conn) == [("one", 0, None, None)], "its first time is computed"
    planned(conn, 0)
    fire(conn)
    [(queue, kind, payload, unique_key)] = conn.execute(
        "SELECT queue, kind, payload, unique_key FROM batchq.all_batches"
    ).fetchall()
    tick = value(
        conn, "SELECT to_char(last_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"') FROM batchq.schedules"
    )
    assert (queue, kind, payload, unique_key) == ("mail", "a", {"tick": tick, "x": 1}, None)
    assert value(
        conn, "SELECT next_at > now() AND last_batch_id IS NOT NULL AND last_late_seconds < 5 FROM batchq.schedules"
    )
    assert fire(conn) == []


def test_what_was_planned_for_an_earlier_state_does_nothing(conn: Conn) -> None:
    add(conn, "* * * * *")
    fire(conn)
    planned(conn, 0)
    due = statements.due_schedules(conn, 0)
    stale = statements.fire_schedules([plan(schedule, schedule.now) for schedule in due])
    assert len(conn.execute(*stale).fetchall()) == 1
    assert conn.execute(*stale).fetchall() == [], "another worker was faster"
    planned(conn, 0)
    due = statements.due_schedules(conn, 0)
    conn.execute("UPDATE batchq.schedules SET cron = '0 * * * *'")
    assert conn.execute(*statements.fire_schedules([plan(due[0], due[0].now)])).fetchall() == []
    assert value(conn, "SELECT next_at FROM batchq.schedules") is None, "after a change, the time is computed anew"
    fire(conn)
    [later] = statements.due_schedules(conn, 7200)
    early = statements.fire_schedules([plan(later, later.now)])
    assert conn.execute(*early).fetchall() == [], "its time has not come"
    planned(conn, 0)
    due = statements.due_schedules(conn, 0)
    conn.execute("UPDATE batchq.schedules SET paused = true")
    assert conn.execute(*statements.fire_schedules([plan(due[0], due[0].now)])).fetchall() == []
    assert fire(conn) == []
    assert value(conn, "SELECT count(*) FROM batchq.all_batches") == 1


def test_a_plan_that_is_carried_out_twice_makes_one_batch_though_the_next_tick_is_due(conn: Conn) -> None:
    add(conn, "@every 1 s")
    fire(conn)
    planned(conn, 10)
    [due] = statements.due_schedules(conn, 0)
    assert due.next_at is not None
    twice = statements.fire_schedules([plan(due, due.next_at)])
    assert [len(conn.execute(*twice).fetchall()) for _ in range(2)] == [1, 0]
    assert conn.execute(COUNTS).fetchall() == [(1, 0, 0)]


def test_two_workers_with_the_same_plan_make_one_batch(conn: Conn, dsn: str) -> None:
    for number in range(40):
        add(conn, "* * * * *", name=f"s{number}")
    fire(conn)
    conn.execute("UPDATE batchq.schedules SET next_at = date_trunc('minute', now())")
    due = statements.due_schedules(conn, 0)
    statement = statements.fire_schedules([plan(schedule, schedule.now) for schedule in due])
    barrier = threading.Barrier(4)

    def work() -> None:
        with psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as own:
            barrier.wait()
            own.execute(*statement)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value(conn, "SELECT count(*) FROM batchq.all_batches") == 40
    assert values(conn, "SELECT DISTINCT batches_made FROM batchq.schedules") == [1]


def test_a_row_that_a_person_holds_delays_only_itself(conn: Conn, dsn: str) -> None:
    for name in ("one", "two"):
        add(conn, "* * * * *", name=name)
    fire(conn)
    conn.execute("UPDATE batchq.schedules SET next_at = date_trunc('minute', now())")
    with psycopg.connect(dsn) as other:
        other.execute("SELECT 1 FROM batchq.schedules WHERE name = 'one' FOR UPDATE")
        assert [row[0] for row in fire(conn)] == ["two"]
    assert [row[0] for row in fire(conn)] == ["one"]


@pytest.mark.parametrize(
    ("missed", "ago", "counts"),
    [
        ("coalesce", 5, (1, 0, 0)),
        ("coalesce", 3600, (1, 60, 0)),
        ("skip", 5, (1, 0, 0)),
        ("catch_up", 3600, (10, 51, 0)),
    ],
)
def test_missed_ticks_are_coalesced_skipped_or_caught_up(
    conn: Conn, missed: str, ago: int, counts: tuple[int, int, int]
) -> None:
    add(conn, "@every 60 s", missed=missed, catch_up_most=10)
    fire(conn)
    planned(conn, ago)
    fire(conn)
    assert conn.execute(COUNTS).fetchall() == [counts]


def test_a_daily_tick_that_was_missed_by_hours_is_skipped_or_made_up_for(conn: Conn) -> None:
    for rule in ("skip", "coalesce", "catch_up"):
        add(conn, "@every 1 d", name=rule, missed=rule)
    fire(conn)
    conn.execute("UPDATE batchq.schedules SET next_at = date_trunc('second', now()) - interval '61 hours'")
    fire(conn)
    found = conn.execute("SELECT name, batches_made, ticks_missed FROM batchq.schedules ORDER BY name").fetchall()
    assert found == [("catch_up", 3, 0), ("coalesce", 1, 2), ("skip", 0, 3)]


def test_a_week_of_missed_seconds_is_accounted_for_step_by_step() -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    now = start.timestamp() + 25_000.5
    schedule = a_schedule("* * * * * *", start, missed="catch_up", catch_up_most=1000)
    made, missed, steps = 0, 0, 0
    while schedule.next_at is not None and schedule.next_at <= now:
        done = plan(schedule, now)
        made, missed, steps = made + len(done.ticks), missed + done.missed, steps + 1
        assert done.next_at is not None
        schedule = schedule._replace(next_at=done.next_at.timestamp())
    assert (made, missed, steps) == (1000, 24_001, 3)


def test_with_overlap_skip_there_is_one_live_batch_at_most(conn: Conn, dsn: str) -> None:
    add(conn, "@every 1 s", overlap="skip", missed="catch_up")
    fire(conn)
    planned(conn, 5)
    fire(conn)
    assert conn.execute(COUNTS).fetchall() == [(1, 0, 5)]
    with pytest.raises(psycopg.errors.RaiseException, match="is pending or processing"):
        conn.execute("SELECT batchq.run_schedule('one')")
    drain(app_of(), dsn)
    planned(conn, 0)
    fire(conn)
    assert conn.execute(COUNTS).fetchall() == [(2, 0, 5)]


def test_a_batch_that_is_refused_fails_its_own_schedule_and_the_next_tick_tries_again(conn: Conn) -> None:
    for name in ("one", "two"):
        add(conn, "@every 1 h", name=name, kind="bad" if name == "one" else "a")
    fire(conn)
    conn.execute("ALTER TABLE batchq.batches ADD CONSTRAINT no_bad CHECK (kind <> 'bad')")
    for name in ("one", "two"):
        planned(conn, 0, name)
    fire(conn)
    assert conn.execute(COUNTS).fetchall() == [(0, 1, 0)]
    error, state = conn.execute("SELECT error, state FROM batchq.schedule_status WHERE name = 'one'").fetchall()[0]
    assert ("no_bad" in error, state) == (True, "active")
    assert value(conn, "SELECT batches_made FROM batchq.schedules WHERE name = 'two'") == 1
    conn.execute("ALTER TABLE batchq.batches DROP CONSTRAINT no_bad")
    planned(conn, 0)
    fire(conn)
    assert conn.execute(COUNTS).fetchall() == [(1, 1, 0)]
    assert value(conn, "SELECT error FROM batchq.schedules WHERE name = 'one'") is None


def test_an_expression_that_only_a_worker_can_judge_is_an_error_that_is_shown(conn: Conn) -> None:
    add(conn, "0 0 31 2 *")
    add(conn, "0 24 * * *", name="two")
    fire(conn)
    found = conn.execute("SELECT name, state, error FROM batchq.schedule_status ORDER BY name").fetchall()
    assert found == [
        ("one", "error", "'0 0 31 2 *' never comes: no month 2 has such a day"),
        ("two", "error", "hour cannot be '24' in '0 24 * * *'"),
    ]
    assert fire(conn) == []
    conn.execute("UPDATE batchq.schedules SET cron = '0 0 28 2 *'")
    assert len(fire(conn)) == 2
    assert values(conn, "SELECT DISTINCT state FROM batchq.schedule_status") == ["active"]


# ------------------------------------------------------------------------------------------------------- with a worker


def test_a_worker_fires_each_tick_and_its_handler_begins_within_a_moment(conn: Conn, dsn: str) -> None:
    add(conn, "* * * * * *", payload='{"tick": null}')
    begun: list[float] = []
    with running_worker(app_of(begun), dsn):
        wait_until(lambda: len(begun) >= 5, 20, "five ticks")
    lags = sorted(at % 1 for at in begun)
    step("lags in seconds: %s", [round(lag, 4) for lag in lags])
    assert lags[len(lags) // 2] < 0.3
    ticks_seen = values(conn, "SELECT payload ->> 'tick' FROM batchq.all_batches ORDER BY id")
    assert len(ticks_seen) == len(set(ticks_seen))
    made, missed, _ = conn.execute(COUNTS).fetchall()[0]
    assert (made, missed) == (len(ticks_seen), 0)


def test_a_change_of_a_person_takes_effect_within_two_seconds(conn: Conn, dsn: str) -> None:
    done: list[float] = []
    with running_worker(app_of(done), dsn):
        time.sleep(1)
        add(conn, "@every 1 h")
        wait_until(lambda: value(conn, "SELECT next_at FROM batchq.schedules") is not None, 2, "its next time")
        conn.execute("UPDATE batchq.schedules SET cron = '* * * * * *'")
        wait_until(lambda: bool(done), 4, "its first batch")
        conn.execute("DELETE FROM batchq.schedules")
        time.sleep(0.5)
        count = len(done)
        time.sleep(1.5)
        assert len(done) == count


def test_a_drain_neither_fires_nor_declares(conn: Conn, dsn: str) -> None:
    add(conn, "* * * * * *")
    fire(conn)
    planned(conn, 0)
    drain(app_of(name="mine", cron="* * * * *"), dsn)
    assert values(conn, "SELECT name FROM batchq.schedules") == ["one"]
    assert value(conn, "SELECT count(*) FROM batchq.all_batches") == 0


def test_a_worker_that_may_not_read_schedules_does_not_ask_again_and_again(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(*_: Any) -> list[Any]:
        raise psycopg.errors.InsufficientPrivilege("permission denied")

    def count(loop: Housekeeper) -> float:
        asked.append(seconds := wait_seconds(loop))
        return seconds

    wait_seconds = Housekeeper.wait_seconds
    monkeypatch.setattr(statements, "due_schedules", refuse)
    monkeypatch.setattr(Housekeeper, "wait_seconds", count)
    with running_worker(app_of(), dsn):
        time.sleep(2)
    step("it waited %s times", len(asked))
    assert 3 < len(asked) < 60


if __name__ == "__main__":
    run_alone(__file__)
