"""The web UI's pages of one kind, one worker and one schedule, and the next runs of all schedules."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from batchq.web.day_line import SLOTS, line_of, next_runs
from tests.component.rows import Conn, insert
from tests.support.alone import run_alone
from tests.support.held_scene import set_held
from tests.support.scene import set_scene, set_spread
from tests.support.steps import step
from tests.support.waiting import wait_until
from tests.support.web import Site, served, text_of

NOON = datetime(2026, 5, 4, 12, 3, 30, tzinfo=UTC)
MAIL = "/kinds?queue=mail&kind=send"


@pytest.fixture
def site(dsn: str) -> Iterator[Site]:
    """Serve the web UI without a password."""
    with served(dsn) as site:
        yield site


# --------------------------------------------------------------------------------------------------- kinds


def test_a_kind_shows_its_counts_run_times_limits_workers_failures_and_schedules(conn: Conn, site: Site) -> None:
    set_scene(conn)
    set_held(conn)
    conn.execute(
        "UPDATE batchq.throughput_minutes SET run_times = array_fill(0, ARRAY[34]) || '{90,9,1}'::integer[] "
        "WHERE queue = 'bulk' AND kind = 'geocode' AND minute > now() - interval '2 minutes'"
    )
    shown = text_of(site, "/kinds?queue=bulk&kind=geocode")
    assert "Kind geocode in queue bulk" in shown
    assert re.search(r"Ready 0 Processing 1 \S+ \S+ Scheduled 6", shown), shown
    assert re.search(r"Run time p50 \d.*Run time p95 \d.*Run time p99 \d", shown), shown
    assert "throttled kind geocode" in shown
    assert "Items per second 0 of 4.5" in shown
    assert "jobs-1-4411-5eed1" in shown
    assert "TimeoutError" in shown
    page = site.client.get("/kinds?queue=bulk&kind=geocode").text
    for status in ("scheduled", "failed"):
        assert f'href="/batches?queue=bulk&amp;kind=geocode&amp;status={status}"' in page
    assert 'href="/kinds?queue=bulk&amp;kind=geocode"' in site.client.get("/").text, "the overview leads there"
    step("limits of the queue and of keys")
    shown = text_of(site, MAIL)
    assert "28 ready batches, now by max_running" in shown
    assert "Limit of all kinds of the queue, set Running per key 1" in shown
    step("schedules that make it")
    assert "nightly report every day at 02:30 Europe/Berlin · active · next run" in text_of(
        site, "/kinds?queue=default&kind=report"
    )


def test_a_kind_is_paused_and_resumed_from_its_page(conn: Conn, site: Site) -> None:
    insert(conn, queue="mail", kind="send")
    assert "paused" not in text_of(site, MAIL)
    assert 'href="/verbs/pause?queue=mail&amp;kind=send"' in site.client.get(MAIL).text
    site.do("pause", "?queue=mail&kind=send", queue="mail", kind="send", reason="their API is down")
    page = site.client.get(MAIL).text
    assert 'id="verb-resume" href="/verbs/resume?queue=mail&amp;kind=send"' in page
    assert "verb-pause" not in page
    assert "their API is down" in page
    step("a pause of all of the queue is another")
    conn.execute("SELECT batchq.resume('mail', 'send')")
    conn.execute("SELECT batchq.pause('mail')")
    page = site.client.get(MAIL).text
    assert 'href="/verbs/resume?queue=mail"' in page
    assert "verb-pause" in page


def test_a_kind_without_batches_has_a_page_and_no_kind_has_none(conn: Conn, site: Site) -> None:
    shown = text_of(site, "/kinds?queue=nothing&kind=none")
    assert "Ready 0" in shown
    assert "No worker serves the queue and handles the kind." in shown
    assert "No failures." in shown
    for path in (
        "/kinds",
        "/kinds?queue=a",
        "/kinds?queue=a%00&kind=b",
        "/live/kind/x",
        "/live/kind/queue%3D%00%26kind%3Db",
    ):
        assert site.client.get(path).status_code == 404, path


def test_a_kind_is_live(conn: Conn, site: Site) -> None:
    insert(conn, queue="mail", kind="send")
    [address] = re.findall(r'data-live="([^"]*)"', site.client.get(MAIL).text)
    with site.client.stream("GET", address) as answer:
        pieces = answer.iter_text()
        wait_until(lambda: "1 ready" in next(pieces), 30, "the kind to be sent")
        insert(conn, queue="mail", kind="send")
        wait_until(lambda: "2 ready" in next(pieces), 30, "the change to be sent")


# ------------------------------------------------------------------------------------------------- workers


def test_a_worker_shows_what_it_runs_also_parts(conn: Conn, site: Site) -> None:
    batch_id = set_scene(conn)
    whole, taken = set_spread(conn, queue="bulk", kind="geocode")
    conn.execute(
        "INSERT INTO batchq.throughput_minutes (minute, queue, kind, worker, completed, failed, cancelled, retried, "
        "items, run_seconds, run_times) "
        "VALUES (date_trunc('minute', now()), 'bulk', 'geocode', 'jobs-1-4411-5eed1', 7, 1, 0, 2, 90, 1, '{}')"
    )
    address = "/workers?id=jobs-1-4411-5eed1"
    shown = text_of(site, address)
    assert "Worker jobs-1-4411-5eed1" in shown
    assert "7 completed, 1 failed, 2 retried, 90 items" in shown
    assert f"{batch_id} processing import_contacts bulk" in shown
    assert f"{taken[0].id} part of {whole} processing geocode bulk" in shown
    page = site.client.get(address).text
    assert f'href="/batches/{whole}"' in page
    assert 'href="/verbs/drain_worker?worker=jobs-1-4411-5eed1"' in page
    assert 'href="/workers?id=jobs-1-4411-5eed1"' in site.client.get("/workers").text
    step("one that does nothing, and one that nobody has seen")
    conn.execute("DELETE FROM batchq.batches WHERE claimed_by = 'jobs-2-4412-5eed2'")
    assert "The worker has claimed no batch now." in text_of(site, "/workers?id=jobs-2-4412-5eed2")
    answer = site.client.get("/workers?id=nobody")
    assert (answer.status_code, "No worker nobody was seen in the last hour" in answer.text) == (404, True)


# ----------------------------------------------------------------------------------------------- schedules


def test_schedules_list_the_next_run_of_each_the_earliest_first(conn: Conn, site: Site) -> None:
    assert "Nothing is scheduled. A schedule makes a batch at certain times" in text_of(site, "/schedules")
    set_held(conn)
    conn.execute("UPDATE batchq.schedules SET next_at = now() + interval '30 s' WHERE name = 'heartbeat'")
    page = site.client.get("/schedules").text
    listed = page.partition('class="next-runs"')[2].partition("</ol>")[0]
    assert re.findall(r"<bdi>([^<]*)</bdi></a>", listed) == ["heartbeat", "every-quarter-of-an-hour", "nightly report"]
    shown = text_of(site, "/schedules")
    assert re.search(r"in (2\d|30) s heartbeat at .*: ping in default", shown), shown
    assert "400 ms late" in shown
    assert re.search('aria-label="runs in 14[34] of the 144 periods of ten minutes of the next 24 hours"', page), page
    assert 'aria-label="no run in the next 24 hours"' in page, "the paused one"
    assert 'href="/schedules/of?name=nightly+report"' in page


def test_a_schedule_has_a_page_with_its_next_10_runs_and_its_latest_batches(conn: Conn, site: Site) -> None:
    set_held(conn)
    conn.execute("SELECT batchq.cancel(%s, 'disk full')", [insert(conn, kind="report")])
    address = "/schedules/of?name=nightly+report"
    shown = text_of(site, address)
    assert "Schedule nightly report every day at 02:30 Europe/Berlin" in shown
    assert "Missed ticks 3" in shown
    assert "inserted 400 ms late" in shown
    assert re.search(r"\d+ cancelled .* cancelled: disk full", shown)
    page = site.client.get(address).text
    assert page.count('<span class="when">') == 10
    assert re.findall(r'id="verb-(\w+)" href="/schedules/(\w+)\?name=nightly\+report"', page) == [
        ("run", "run"), ("pause", "pause"), ("change", "set"), ("remove", "remove"),
    ]  # fmt: skip
    assert "the schedule is paused" in text_of(site, "/schedules/of?name=office+hours")
    assert "there is no schedule" in site.client.get("/schedules/of?name=none").text.lower()
    for path in (
        "/schedules/of",
        "/schedules/of?name=none",
        "/schedules/of?name=a%00",
        "/live/schedule/schedule%3Dnone",
    ):
        assert site.client.get(path).status_code == 404, path
    step("one with a name of any characters is live; when it is removed, its viewers keep what they have")
    name = 'a/../b "<&>?#%2F'
    conn.execute("SELECT batchq.set_schedule(%s, '@hourly', 'tick')", [name])
    page = site.client.get("/schedules/of", params={"name": name}).text
    [live] = re.findall(r'data-live="([^"]*)"', page)
    with site.client.stream("GET", live) as answer:
        pieces = answer.iter_text()
        wait_until(lambda: "tick" in next(pieces), 30, "the schedule to be sent")
        conn.execute("SELECT batchq.pause_schedule(%s)", [name])
        wait_until(lambda: "paused" in next(pieces), 30, "the change to be sent")


def test_without_actions_no_page_offers_one(conn: Conn, dsn: str) -> None:
    set_scene(conn)
    set_held(conn)
    with served(dsn, read_only=True) as site:
        for path in (MAIL, "/kinds?queue=bulk&kind=import_contacts", "/workers",
                     "/workers?id=jobs-1-4411-5eed1", "/limits", "/schedules",
                     "/schedules/of?name=nightly+report"):  # fmt: skip
            page = site.client.get(path)
            assert page.status_code == 200, path
            assert re.findall(r'href="(/verbs/[^"]*|/limits/set[^"]*|/schedules/(?!of)[^"]*)"', page.text) == [], path


def schedule(cron: str, next_at: datetime, state: str = "active", **others: Any) -> dict[str, Any]:
    """Return what a line needs of a row of batchq.schedule_status."""
    return {"name": cron, "cron": cron, "time_zone": "UTC", "next_at": next_at, "state": state, "now": NOON} | others


@pytest.mark.parametrize(
    ("cron", "marks"),
    [
        ("0 14 * * *", [(12, 1)]),
        ("0,5 14 * * *", [(12, 1)]),
        ("*/10 14 * * *", [(12, 6)]),
        ("0 0,6 * * *", [(72, 1), (108, 1)]),
        ("* * * * *", [(0, 144)]),
        ("* * * * * *", [(0, 144)]),
        ("@every 5 s", [(0, 144)]),
        ("@every 12 h", [(12, 1), (84, 1)]),
        ("0 14 1 1 *", []),
    ],
)
def test_a_line_marks_the_periods_in_which_a_schedule_runs(cron: str, marks: list[tuple[int, int]]) -> None:
    first = {"* * * * *": NOON.replace(minute=4, second=0), "* * * * * *": NOON, "@every 5 s": NOON,
             "@every 12 h": NOON.replace(hour=14, minute=0, second=0), "0 0,6 * * *": datetime(2026, 5, 5, tzinfo=UTC),
             "0 14 1 1 *": datetime(2027, 1, 1, 14, tzinfo=UTC)}  # fmt: skip
    next_at = first.get(cron, NOON.replace(hour=14, minute=0, second=0))
    line = line_of(schedule(cron, next_at))
    assert line.marks == marks
    assert line.hours == [(36, "18:00"), (72, "00:00"), (108, "06:00")] or line.hours[-1] == (143, "12:00")
    assert all(0 <= position < SLOTS for position, _ in line.hours)
    assert ("no run" in line.text) == (not marks)
    assert line_of(schedule(cron, next_at, "paused")).marks == []


def test_next_runs_are_those_of_all_schedules_together() -> None:
    rows = [schedule("0 14 * * *", NOON + timedelta(hours=2)), schedule("@every 1 s", NOON + timedelta(seconds=1))]
    assert [(run.schedule["cron"], run.in_seconds) for run in next_runs(rows, 5)] == [
        ("@every 1 s", 1), ("0 14 * * *", 7200),
    ]  # fmt: skip
    assert [run.in_seconds for run in next_runs(rows, 3, 3)] == [1, 2, 3]
    assert next_runs([schedule("0 14 * * *", NOON, "error")], 5) == []


if __name__ == "__main__":
    run_alone(__file__)
