"""Flows in the web UI and in metrics: what a batch waits for, the page of a flow, waiting as a status."""

import re
from collections.abc import Iterator
from html import unescape
from typing import Any
from uuid import uuid4

import pytest
from prometheus_client.parser import text_string_to_metric_families

import batchq
from batchq.operate.flow_graph import Edge, Graph
from batchq.postgres.statements.endings import Finish
from batchq.web.flow_chart import MOST_BOXES, Chart, chart
from tests.component.rows import Conn, claim, finish, insert, value, values
from tests.support.alone import run_alone
from tests.support.scene import set_flow
from tests.support.steps import step
from tests.support.waiting import wait_until
from tests.support.web import Site, served


@pytest.fixture
def site(dsn: str) -> Iterator[Site]:
    """Serve the web UI without a password."""
    with served(dsn) as site:
        yield site


def put(conn: Conn, kind: str = "work", **options: Any) -> int:
    """Enqueue a batch."""
    return batchq.enqueue(conn, kind, **options) or 0


def end(conn: Conn, batch_id: int, status: str = "completed") -> None:
    """End a ready batch of kind work, and let those that wait for it know."""
    conn.execute("UPDATE batchq.batches SET priority = -9 WHERE id = %s", [batch_id])
    token = uuid4()
    assert [row.id for row in claim(conn, 1, priority=-9, token=token)] == [batch_id]
    finish(conn, Finish(batch_id, token, status, error=None if status == "completed" else '{"error": "no"}'))
    follow(conn)


def follow(conn: Conn) -> None:
    """Do what a worker does for flows."""
    while conn.execute("SELECT seen FROM batchq.follow_flows(0)").fetchall() != [(0,)]:
        pass


def text_of(site: Site, path: str) -> str:
    """Return the text of a page, with one space between words."""
    answer = site.client.get(path)
    assert answer.status_code == 200, answer.text
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", answer.text.partition("<main")[2])).split())


# ------------------------------------------------------------------------------------------- the page of a batch


def test_a_batch_shows_what_it_waits_for_and_what_waits_for_it(conn: Conn, site: Site) -> None:
    first, bad = put(conn), put(conn)
    middle = put(conn, "middle", after=[first, bad])
    last = put(conn, "last", after=[middle], on_failure="run", queue="b")
    end(conn, first)
    end(conn, bad, "failed")
    shown = text_of(site, f"/batches/{middle}")
    assert "Waits for 1 batch" in shown
    assert (
        f"Waits for 1 left Batches that this one waits for ID Status Kind Queue If it fails {bad} failed work" in shown
    )
    assert f"If it fails {bad} failed work default wait for a retry" in shown
    assert f"{first} completed work default" in shown
    assert f"Queue If this one fails {last} waiting for 1 last b run anyway" in shown
    page = site.client.get(f"/batches/{middle}").text
    assert f'href="/flow/{middle}"' in page
    assert f'href="/batches/{bad}"' in page
    assert "/flow/" not in site.client.get(f"/batches/{put(conn)}").text


def test_a_batch_lists_20_of_those_that_it_waits_for(conn: Conn, site: Site) -> None:
    needed = batchq.enqueue_each(conn, "part", [{}] * 30)
    last = put(conn, "last", after=needed)
    page = site.client.get(f"/batches/{last}").text
    assert len(re.findall(r'id="needs-\d+"', page)) == 20
    assert "30 left · first 20 shown" in text_of(site, f"/batches/{last}")
    many = batchq.enqueue_each(conn, "part", [{}] * 30, after=[last])
    page = site.client.get(f"/batches/{last}").text
    assert re.findall(r'id="dependents-(\d+)"', page) == [str(one) for one in many[:20]]


def test_what_is_not_stored_any_more_is_said(conn: Conn, site: Site) -> None:
    first = put(conn)
    second = put(conn, after=[first])
    end(conn, first)
    conn.execute("DELETE FROM batchq.batches WHERE id = %s", [first])
    assert f"{first} completed, not stored – –" in text_of(site, f"/batches/{second}")
    shown = site.client.get(f"/flow/{second}").text
    assert f'href="/batches/{first}"' not in shown
    assert "completed, not stored" in shown
    assert site.client.get(f"/flow/{first}").status_code == 200, "its flow is still known"


def test_a_waiting_batch_is_run_anyway_from_its_page(conn: Conn, site: Site) -> None:
    first = put(conn)
    second = put(conn, after=[first])
    page = site.client.get(f"/batches/{second}").text
    assert re.findall(r'id="verb-(\w+)"', page) == ["run_anyway", "cancel", "cancel_with_dependents"]
    ask = f"?id={second}"
    asked = text_of(site, f"/verbs/run_anyway{ask}")
    assert f"Run anyway batch {second} ?" in asked
    answer = site.do("run_anyway", ask, id=second, reason="it will not come", actor="ann")
    assert (answer.status_code, answer.headers["location"]) == (303, f"/batches/{second}?said=run_anyway")
    shown = text_of(site, answer.headers["location"])
    assert "Done: run anyway." in shown
    assert f"Batch {second} work ready" in shown
    assert conn.execute("SELECT verb, reason, actor FROM batchq.audit").fetchall() == [
        ("run_anyway", "it will not come", "ann")
    ]
    assert "run_anyway" not in site.client.get(f"/batches/{second}").text


def test_a_waiting_batch_is_cancelled_with_its_dependents_from_its_page(conn: Conn, site: Site) -> None:
    first = put(conn)
    second = put(conn, after=[first])
    third = put(conn, after=[second], queue="b")
    ask = f"?id={second}"
    assert "all that wait for it" in text_of(site, f"/verbs/cancel_with_dependents{ask}")
    answer = site.do("cancel_with_dependents", ask, id=second)
    assert "Done: cancel with dependents." in text_of(site, answer.headers["location"])
    statuses = "SELECT status FROM batchq.all_batches WHERE id = ANY (%s) ORDER BY id"
    assert values(conn, statuses, [[first, second, third]]) == ["pending", "cancelled", "cancelled"]
    assert values(conn, "SELECT batches FROM batchq.audit") == [2]


# ------------------------------------------------------------------------------------------- the page of a flow


def test_a_flow_is_drawn_and_listed(conn: Conn, site: Site) -> None:
    index = set_flow(conn)
    page = site.client.get(f"/flow/{index}").text
    shown = text_of(site, f"/flow/{index}")
    assert "41 batches 1 failed 3 processing 8 ready 16 waiting 13 completed" in shown
    ids = values(conn, "SELECT id FROM batchq.all_batches ORDER BY id")
    boxes = re.findall(r'<a class="box (\w+)[^"]*" tabindex="-1" href="/batches/(\d+)" title="([^"]*)">', page)
    assert sorted(int(one) for _, one, _ in boxes) == ids
    assert {title for status, _, title in boxes if status == "failed"} == {"15 resize_images in media: failed"}
    assert sorted(int(one) for one in re.findall(r'id="flow-(\d+)" href="/batches/\1"', page)) == ids
    assert page.count(" own") == 1
    assert [state for state in ("met", "open", "stuck") if f'class="line {state}"' in page] == ["met", "open", "stuck"]
    assert "style=" not in page
    step("the same from its other end")
    assert "41 batches" in text_of(site, "/flow/1")


def test_a_large_flow_is_counted_by_level(conn: Conn, site: Site) -> None:
    top = put(conn, "top")
    last = put(conn, "last", after=batchq.enqueue_each(conn, "part", [{}] * MOST_BOXES, after=[top], queue="b"))
    shown = text_of(site, f"/flow/{last}")
    assert "302 batches 1 ready 301 waiting" in shown
    assert "Level 0 top in default 1 ready Level 1 part in b 300 waiting Level 2 last in default 1 waiting" in shown
    assert "1 part b waiting 300" in shown
    page = site.client.get(f"/flow/{last}").text
    assert "<svg" not in page
    assert "/batches?queue=b&amp;kind=part&amp;status=waiting" in page
    step("one that is larger than what is read")
    batchq.enqueue_each(conn, "more", [{}] * 1000, after=[last])
    assert "The flow is larger. Only the nearest" in text_of(site, f"/flow/{last}")


def test_a_batch_without_a_flow_has_a_page_of_it_and_one_that_is_not_there_has_none(conn: Conn, site: Site) -> None:
    assert "waits for no other" in text_of(site, f"/flow/{insert(conn)}")
    for one in ("999", "0", "-1", "x", "9" * 30, "%00", "1%20", "²"):
        for path in (f"/flow/{one}", f"/live/flow/{one}"):
            assert site.client.get(path).status_code == 404, path
    assert "No batch 999" in site.client.get("/flow/999").text


def test_a_flow_is_live(conn: Conn, site: Site) -> None:
    first = put(conn)
    second = put(conn, after=[first])
    with site.client.stream("GET", f"/live/flow/{second}") as answer:
        pieces = answer.iter_text()
        wait_until(lambda: "waiting for 1" in next(pieces), 30, "the flow to be sent")
        end(conn, first)
        wait_until(lambda: "1 ready" in next(pieces), 30, "the change to be sent")


HOSTILE = "<script>alert(1)</script>'\"&{{ 7*7 }}\u202egnp.exe"


def test_hostile_names_are_text(conn: Conn, site: Site) -> None:
    first = put(conn, HOSTILE, queue=HOSTILE)
    second = put(conn, HOSTILE, after=[first], queue=HOSTILE)
    batchq.enqueue_each(conn, HOSTILE, [{}] * MOST_BOXES, after=[put(conn, "x", after=[put(conn, HOSTILE)])])
    for path in (f"/flow/{second}", f"/batches/{second}", "/flow/3"):
        page = site.client.get(path).text
        assert "<script>alert" not in page
        assert "\u202e" not in page
        assert "⟨U+202E⟩gnp.exe" in page


def flow(edges: list[tuple[int, int]]) -> Graph:
    """Return a graph of such edges."""
    ids = sorted({one for edge in edges for one in edge})
    rows = {one: {"id": one, "status": "waiting", "queue": "q", "kind": "k", "needs_left": 1} for one in ids}
    return Graph(rows, [Edge(*edge, "wait", None) for edge in edges], False)


@pytest.mark.parametrize("width", [3, 12, 40, 280])
def test_no_box_lies_on_another_and_lines_come_from_the_left(width: int) -> None:
    middle = range(2, width + 2)
    last = width + 2
    edges = [(1, one) for one in middle] + [(one, last) for one in middle] + [(1, last), (last, last + 1)]
    drawn = chart(flow(edges))
    assert isinstance(drawn, Chart)
    assert len(drawn.boxes) == width + 3
    at = {box.id: (box.x, box.y) for box in drawn.boxes}
    for one, (x, y) in at.items():
        assert 0 <= x <= drawn.width - drawn.box_width
        assert 0 <= y <= drawn.height - drawn.box_height
        assert not any(
            abs(x - other_x) < drawn.box_width and abs(y - other_y) < drawn.box_height
            for other, (other_x, other_y) in at.items()
            if other != one
        )
    assert all(at[needed][0] + drawn.box_width < at[waits][0] for needed, waits in edges)
    assert [line.state for line in drawn.lines] == ["open"]
    assert drawn.lines[0].path.count("M") == len(edges)
    assert drawn.height < 1600


def test_what_would_be_too_many_lines_is_not_drawn() -> None:
    assert chart(flow([(one, other) for one in range(1, 51) for other in range(51, 101)])) is None
    deep = chart(flow([(one, other) for one in range(1, 50) for other in range(one + 1, 51)]))
    assert deep, "without lanes of their own, the lines are drawn all the same"


# ------------------------------------------------------------------------------------------- waiting as a status


def test_lists_filter_by_waiting(conn: Conn, site: Site) -> None:
    first = put(conn)
    mine = [put(conn, after=[first]), put(conn, after=[first], queue="b")]
    conn.execute("INSERT INTO batchq.batches (kind) SELECT 'other' FROM generate_series(1, 200)")
    for has_positions in (False, True):
        if has_positions:  # as workers make them once many claims have left dead rows
            conn.execute("INSERT INTO batchq.positions (index, queue) VALUES ('ready', 'default')")
        for query, ids in {"": mine[::-1], "&queue=b": mine[1:], "&kind=work": mine[::-1], "&kind=other": []}.items():
            answer = site.client.get(f"/batches?status=waiting{query}")
            assert [int(one) for one in re.findall(r'href="/batches/(\d+)">\1</a>', answer.text)] == ids, query
        assert f'href="/batches/{mine[1]}"' in site.client.get("/batches?queue=b").text


def test_the_overview_shows_waiting_only_if_there_is_any(conn: Conn, site: Site) -> None:
    first = put(conn)
    assert "Waiting" not in text_of(site, "/")
    put(conn, "next", after=[first])
    shown = text_of(site, "/")
    assert "Waiting 1" in shown
    assert 'href="/batches?queue=default&amp;kind=next&amp;status=waiting"' in site.client.get("/").text


def test_waiting_batches_are_cancelled_in_bulk(conn: Conn, site: Site) -> None:
    first = put(conn)
    batchq.enqueue_each(conn, "part", [{}] * 5, after=[first])
    listed = site.client.get("/batches?status=waiting").text
    assert re.findall(r'href="/bulk/(\w+)\?', listed) == ["cancel"]
    assert '<option value="waiting" selected>' in site.client.get("/bulk/cancel?status=waiting").text
    answer = site.post("/bulk/cancel", site.form_token("/bulk/cancel"), kind="part", status="waiting")
    assert "<b>5 batches match</b>" in answer.text
    fields = dict(re.findall(r'name="(form_token|job|seal)" value="([^"]*)"', answer.text))
    data = {name: unescape(text) for name, text in fields.items()}
    site.client.post("/bulk/cancel", data=data, headers={"Origin": site.url})
    assert value(conn, "SELECT count(*) FROM batchq.all_batches WHERE status = 'cancelled'") == 5
    assert value(conn, "SELECT status FROM batchq.all_batches WHERE id = %s", [first]) == "pending"


def test_metrics_count_what_waits_and_what_waits_for_a_failed_batch(conn: Conn, site: Site) -> None:
    good, bad = put(conn), put(conn)
    batchq.enqueue_each(conn, "part", [{}] * 3, after=[good, bad])
    put(conn, "part", after=[good])

    def shown() -> dict[tuple[str, str], float]:
        families = text_string_to_metric_families(site.client.get("/metrics").text)
        return {
            (sample.name, sample.labels.get("state", "")): sample.value
            for family in families
            for sample in family.samples
            if sample.labels.get("kind") == "part"
        }

    assert shown()["batchq_queue_depth", "waiting"] == 4
    assert shown()["batchq_waiting_for_failed", ""] == 0
    end(conn, bad, "failed")
    assert shown()["batchq_waiting_for_failed", ""] == 3
    conn.execute("SELECT batchq.retry(%s)", [bad])
    assert shown()["batchq_waiting_for_failed", ""] == 0, "it is being retried"


if __name__ == "__main__":
    run_alone(__file__)
