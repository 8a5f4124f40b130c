"""Charts in the web UI: rates, run times and waits of an hour, a day and a week, by queue and kind."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from html import unescape
from typing import Any

import pytest

from batchq.postgres.statements import workers
from batchq.postgres.statements.workers import Tally
from batchq.web.charts import RANGES, Span, axis_end, points, rate_chart, rate_text, time_chart, time_ends, time_labels
from tests.component.rows import Conn, run, value
from tests.support.alone import run_alone
from tests.support.steps import step
from tests.support.web import Site, served

SECOND, MILLISECOND = [0] * 32 + [1], [0] * 12 + [1]  # histograms of one attempt
HOUR = RANGES["1h"]


@pytest.fixture
def site(dsn: str) -> Iterator[Site]:
    """Serve the web UI without a password."""
    with served(dsn) as site:
        yield site


def count(conn: Conn, minutes_ago: int, **given: Any) -> None:
    """Count what a worker counted some minutes ago."""
    tally = Tally("bulk", "mail", 0, 0, 0, 0, 0, 0.0, [])._replace(**given)
    run(conn, workers.count_throughput(f"worker-{minutes_ago}", [tally]))
    conn.execute(
        "UPDATE batchq.throughput_minutes SET minute = minute - %s * interval '1 minute', worker = '' "
        "WHERE worker <> ''",
        [minutes_ago],
    )


def text_of(site: Site, path: str) -> str:
    """Return the text of a page, with one space between words."""
    answer = site.client.get(path)
    assert answer.status_code == 200, answer.text
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", answer.text.partition("<main")[2])).split())


def chart_label(page: str, name: str) -> str:
    """Return what a chart says to those who do not see it."""
    [text] = re.findall(
        rf'id="piece-chart-{name}".*?<svg class="chart" role="img" aria-label="([^"]*)"', page, re.DOTALL
    )
    return unescape(text)


# ---------------------------------------------------------------------------------------------------------- the pages


def test_an_hour_shows_rates_run_times_and_waits(conn: Conn, site: Site) -> None:
    count(conn, 5, completed=40, failed=2, retried=1, run_seconds=21.0, run_times=SECOND, wait_times=MILLISECOND)
    count(conn, 9, kind="sms", completed=20, run_seconds=1.0, run_times=MILLISECOND, wait_times=SECOND)
    page = site.client.get("/charts").text
    assert chart_label(page, "rate") == "Rate over the last 1 hour. Most per minute: 40 completed, 2 failed, 1 retried"
    assert chart_label(page, "run") == "Run time over the last 1 hour. Highest: p50 841 ms, p95 841 ms, p99 841 ms"
    assert chart_label(page, "wait") == "Wait over the last 1 hour. Highest: p50 841 ms, p95 841 ms, p99 841 ms"
    text = text_of(site, "/charts")
    assert "60 completed · 2 failed · 1 retried · 349 ms run time on average. Times are in UTC" in text
    assert "bulk mail 40 2 1 841 ms 841 ms 841 ms 1 ms 1 ms 1 ms" in text
    assert "bulk sms 20 0 0 1 ms 1 ms 1 ms 841 ms 841 ms 841 ms" in text
    assert "style=" not in page


def test_the_numbers_are_in_a_table_too(conn: Conn, site: Site) -> None:
    count(conn, 5, completed=40, run_times=SECOND, wait_times=MILLISECOND)
    page = site.client.get("/charts").text
    table = page.partition('<details id="chart-numbers">')[2].partition("</details>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", table.partition("<tbody>")[2], re.DOTALL)
    assert len(rows) == 60
    cells = [unescape(cell) for cell in re.findall(r"<t[hd][^>]*>([^<]*)<", rows[4])]
    assert cells[1:] == ["40", "0", "0", "841 ms", "841 ms", "841 ms", "1 ms", "1 ms", "1 ms"]
    minute = value(conn, "SELECT to_char(minute AT TIME ZONE 'UTC', 'HH24:MI') FROM batchq.throughput_minutes")
    assert any(f">{minute}</th>" in row and ">40<" in row for row in rows)


@pytest.mark.parametrize(("name", "parts", "minutes_ago"), [("24h", 97, 300), ("7d", 85, 4000)])
def test_longer_ranges_are_the_same_before_and_after_they_are_added_up(
    conn: Conn, site: Site, name: str, parts: int, minutes_ago: int
) -> None:
    for ago in (minutes_ago, minutes_ago + 1, 3):
        count(conn, ago, completed=600, run_times=SECOND, wait_times=SECOND)
    before = text_of(site, f"/charts?range={name}")
    while value(conn, "SELECT batchq.add_up_throughput()"):
        pass
    step("rows are in spans now")
    assert value(conn, "SELECT count(*) > 0 FROM batchq.throughput_spans WHERE minutes = %s", [RANGES[name].step])
    after = text_of(site, f"/charts?range={name}")
    assert "1,800 completed · 0 failed" in before
    assert "1,800 completed · 0 failed" in after
    table = site.client.get(f"/charts?range={name}").text.partition('id="chart-numbers"')[2].partition("</details>")[0]
    assert parts - 1 <= table.partition("<tbody>")[2].count("<tr>") <= parts


def test_queue_and_kind_can_be_chosen(conn: Conn, site: Site) -> None:
    count(conn, 5, completed=40)
    count(conn, 5, queue="fast", completed=7)
    count(conn, 5, kind="<b>sms & co", completed=3)
    assert "50 completed" in text_of(site, "/charts")
    assert "47 completed" in text_of(site, "/charts?kind=mail")
    assert "7 completed" in text_of(site, "/charts?queue=fast&kind=mail&range=24h")
    page = site.client.get("/charts?range=1h").text
    addresses = [unescape(each) for each in re.findall(r'id="pair-\d+" href="([^"]*)"', page)]
    assert len(addresses) == 3
    hostile = next(each for each in addresses if "sms" in each)
    assert "3 completed" in text_of(site, hostile)
    assert "<b>sms" not in site.client.get(hostile).text
    assert re.findall(r'<option value="(\w*)" selected', site.client.get("/charts?kind=gone").text) == ["gone"]
    assert "No batch ended in the last 1 hour." in text_of(site, "/charts?kind=gone")


def test_what_an_address_cannot_mean_is_left_out(conn: Conn, site: Site) -> None:
    count(conn, 5, completed=40)
    assert "40 completed" in text_of(site, "/charts?range=1y&kind=%00")


def test_only_the_hour_is_live_and_for_its_queue_and_kind(conn: Conn, site: Site) -> None:
    count(conn, 5, completed=40)
    count(conn, 5, kind="a&b=c/d", completed=3)
    assert "data-live" not in site.client.get("/charts?range=7d").text
    page = site.client.get("/charts?kind=a%26b%3Dc%2Fd").text
    [address] = re.findall(r'data-live="([^"]*)"', page)
    with site.client.stream("GET", unescape(address)) as answer:
        text = "".join(line for line, _ in zip(answer.iter_lines(), range(10), strict=False))
    assert "3 completed · 0 failed" in text


def test_a_database_without_workers_shows_empty_charts(site: Site) -> None:
    text = text_of(site, "/charts")
    assert "0 completed · 0 failed · 0 retried. Times" in text
    assert "No attempt ended in the last 1 hour." in text


# ---------------------------------------------------------------------------------------------------------- the axes


@pytest.mark.parametrize(
    ("most", "end"),
    [(0.03, 0.04), (0.1, 0.1), (0.7, 0.8), (1, 1), (3, 4), (8.1, 10), (11, 20), (999, 1000), (1001, 2000)],
)
def test_the_axis_of_rates_ends_at_a_round_number(most: float, end: float) -> None:
    assert axis_end(most) == end
    assert axis_end(0) == 1


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (0, "0"),
        (0.25, "0.25"),
        (0.5, "0.5"),
        (2.5, "2.5"),
        (10, "10"),
        (12.34, "12"),
        (75_000, "75,000"),
    ],
)
def test_rates_are_short(rate: float, text: str) -> None:
    assert rate_text(rate) == text


def test_the_axis_of_times_ends_at_round_times_around_them() -> None:
    assert time_ends([]) == (1e-3, 1.0)
    assert time_ends([0.002, 3.0]) == (1e-3, 10.0)
    assert time_ends([1.0]) == (1.0, 10.0)
    assert time_ends([30.0, 4000.0]) == (10.0, 36_000.0)
    bottom, top = time_ends([1e-6, 1e9])
    assert bottom < 1e-6 < 1e9 <= top


def at(text: str) -> int:
    """Return a time in UTC in seconds since 1970."""
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


def test_the_labels_of_time_are_round() -> None:
    labels = time_labels(Span(at("2026-11-29 12:03"), at("2026-11-29 13:03")), HOUR)
    assert [label.text for label in labels] == ["12:10", "12:20", "12:30", "12:40", "12:50", "13:00"]
    assert [label.anchor for label in labels] == ["middle"] * 6
    day = time_labels(Span(at("2026-11-28 12:15"), at("2026-11-29 12:05")), RANGES["24h"])
    assert [label.text for label in day] == ["16:00", "20:00", "00:00", "04:00", "08:00", "12:00"]
    week = time_labels(Span(at("2026-11-30 02:00"), at("2026-12-07 00:30")), RANGES["7d"])
    assert [label.text for label in week] == ["1 Dec", "2 Dec", "3 Dec", "4 Dec", "5 Dec", "6 Dec", "7 Dec"]


def row(at_second: int | None, **given: Any) -> dict[str, Any]:
    """Return a row of the statement `chart`."""
    return {"at": at_second, "completed": 0, "failed": 0, "retried": 0, "run": None, "wait": None} | given


def test_rates_are_per_minute_and_the_last_step_may_be_short() -> None:
    day = RANGES["24h"]
    span = Span(at("2026-11-29 12:00"), at("2026-11-29 12:20"))
    found = points([row(span.since, completed=30), row(span.since + 900, completed=10), row(None)], span, day)
    assert [point.rates[0] for point in found] == [2.0, 2.0]
    assert rate_chart(found, span, day).lines[0].path == "M37.5 0h0L100 0"


def test_a_line_is_broken_where_nothing_ran() -> None:
    span = Span(at("2026-11-29 12:00"), at("2026-11-29 12:04"))
    ran = [0.01, 0.1, 1.0]
    found = points([row(span.since + 60 * n, run=ran) for n in (0, 1, 3)], span, HOUR)
    chart = time_chart("run", "Run time", found, span, HOUR)
    assert chart.lines[0].path == "M12.5 100h0L37.5 100M87.5 100h0"
    assert [tick.text for tick in chart.ticks] == ["10 ms", "100 ms", "1.0 s"]
    assert chart.areas[2].text == "12:02 UTC: none"
    assert chart.areas[3].text == "12:03 UTC: p50 10 ms, p95 100 ms, p99 1.0 s"
    assert not chart.is_empty
    assert time_chart("wait", "Wait", found, span, HOUR).is_empty


if __name__ == "__main__":
    run_alone(__file__)
