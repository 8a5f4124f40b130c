"""The web UI's pages of what work waits for: limits, keys, flows under way, spread batches."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

import batchq
from batchq.web.flow_list import Flow, flows_of
from batchq.web.nav import GROUPS, groups_on, pages_beside
from tests.component.rows import Conn, insert, value
from tests.support.alone import run_alone
from tests.support.held_scene import begin, set_held
from tests.support.scene import set_flow, set_scene, set_spread
from tests.support.steps import step
from tests.support.waiting import wait_until
from tests.support.web import Site, served, text_of

HOSTILE = "<script>alert(1)</script>'\"&{{ 7*7 }}/../\u202egnp.exe"


@pytest.fixture
def site(dsn: str) -> Iterator[Site]:
    """Serve the web UI without a password."""
    with served(dsn) as site:
        yield site


# ------------------------------------------------------------------------------------------------- limits


def test_limits_say_what_is_held_back_by_what_and_for_how_long(conn: Conn, site: Site) -> None:
    assert "Nothing is held back." in text_of(site, "/limits")
    set_scene(conn)
    set_held(conn)
    shown = text_of(site, "/limits")
    assert re.search(r"send mail no worker, max_running 28 ready batches of send in mail 7 min", shown)
    assert "send_receipt default" not in shown, "a worker handles it, and nothing holds it back"
    page = site.client.get("/limits").text
    assert 'href="/batches?queue=mail&amp;kind=send&amp;status=ready"' in page
    assert 'href="/kinds?queue=mail&amp;kind=send"' in page
    assert '<progress max="10.0" value="10.0" aria-label="Running, of the limit of send in mail">10 of 10' in page
    assert '<progress max="50.0" value="12.5"' in page
    assert "0 of infinity" in shown
    insert(conn, queue="bulk", kind="import_contacts")
    assert "import_contacts bulk paused 1" in text_of(site, "/limits")


# --------------------------------------------------------------------------------------------------- keys


def test_keys_are_listed_the_longest_waiting_first_with_what_holds_them_back(conn: Conn, site: Site) -> None:
    assert "No key has live batches. A batch gets one when" in text_of(site, "/keys")
    ids = [insert(conn, queue="mail", key=key) for key in ("a", "a", "b", "b", "c")]
    conn.execute("UPDATE batchq.batches SET run_at = now() - interval '1 hour' WHERE key = 'b'")
    conn.execute("UPDATE batchq.batches SET run_at = now() + interval '1 hour' WHERE key = 'c'")
    begin(conn, ids[0])
    assert "b mail 2 0 0 1 h none a mail 1 0 1" in text_of(site, "/keys")
    step("a limit per key: the second of a waits for the first, also while that waits for a retry")
    conn.execute("SELECT batchq.set_limit('mail', 'work', max_running_per_key => 1)")
    assert f"1 of kind work waits for batch {ids[0]} (processing)" in text_of(site, "/keys")
    conn.execute(
        "UPDATE batchq.batches_live SET status = 'pending', claim_token = NULL, claimed_by = NULL, "
        "lease_expires_at = NULL, run_at = now() + interval '1 minute', errors = '[{}]' WHERE id = %s",
        [ids[0]],
    )
    assert f"waits for batch {ids[0]} (retrying)" in text_of(site, "/keys")
    step("a limit of another kind holds nothing back")
    conn.execute("SELECT batchq.set_limit('mail', 'work')")
    conn.execute("SELECT batchq.set_limit('mail', 'other', max_running_per_key => 1)")
    assert "waits for batch" not in text_of(site, "/keys")
    step("a throttle of a key")
    conn.execute("SELECT batchq.throttle('mail', 'work', 'b', 90)")
    assert "throttled, 1 min" in text_of(site, "/keys")
    assert 'href="/batches?queue=mail&amp;key=b"' in site.client.get("/keys").text


def test_keys_are_searched_and_those_that_are_not_read_are_told_of(conn: Conn, site: Site) -> None:
    conn.execute("INSERT INTO batchq.batches (kind, key) SELECT 'work', 'key ' || n FROM generate_series(1, 1100) n")
    insert(conn, queue="mail", key="zebra")
    shown = text_of(site, "/keys")
    assert "Only the first 1,000 keys by queue and name are read; choose a queue to read others." in shown
    assert "Of 1,000 keys, the 100 that wait for longest are shown." in shown
    assert site.client.get("/keys").text.count('<th scope="row"') == 100
    step("a part of a key, among those that are read; a whole key, among all")
    assert set(re.findall(r"<bdi>(key [^<]*)</bdi>", site.client.get("/keys?key=KEY+77").text)) == {
        f"key 77{digit}" for digit in ("", *range(10))
    }
    assert "zebra mail 1" in text_of(site, "/keys?key=zebra")
    assert "No such key has live batches." in text_of(site, "/keys?key=zebra&queue=default")
    assert "zebra mail 1" in text_of(site, "/keys?queue=mail")
    assert site.client.get("/keys?key=a%00b").status_code == 404


def test_keys_are_live_also_those_of_a_queue(conn: Conn, site: Site) -> None:
    insert(conn, queue=HOSTILE, key="first")
    page = site.client.get("/keys", params={"queue": HOSTILE}).text
    [address] = re.findall(r'data-live="([^"]*)"', page)
    with site.client.stream("GET", address) as answer:
        pieces = answer.iter_text()
        wait_until(lambda: "first" in next(pieces), 30, "the keys to be sent")
        insert(conn, queue=HOSTILE, key="second")
        wait_until(lambda: "second" in next(pieces), 30, "the change to be sent")


# -------------------------------------------------------------------------------------------------- flows


def put(conn: Conn, kind: str = "work", **options: Any) -> int:
    """Enqueue a batch."""
    return batchq.enqueue(conn, kind, **options) or 0


def test_flows_under_way_are_listed_the_stuck_ones_first(conn: Conn, site: Site) -> None:
    assert "No flows are under way. A batch that waits for others makes one" in text_of(site, "/flows")
    first = put(conn, "extract")
    middle = [put(conn, "load", after=[first]) for _ in range(3)]
    last = put(conn, "report", after=middle, queue="reports")
    assert f"of batch {last} under way report reports 4 1 batch" in text_of(site, "/flows")
    set_flow(conn)
    shown = text_of(site, "/flows")
    assert re.search(r"of batch \d+ stuck: batch \d+ failed clean_up media 16 11 batches", shown)
    assert shown.index("stuck: ") < shown.index(f"of batch {last}")
    failed = value(conn, "SELECT id FROM batchq.all_batches WHERE status = 'failed'")
    page = site.client.get("/flows").text
    assert f'href="/batches/{failed}"' in page
    assert f'href="/flow/{last}"' in page
    step("what is retried sticks no longer")
    conn.execute("SELECT batchq.retry(%s)", [failed])
    assert "stuck: " not in text_of(site, "/flows")


def test_a_flow_that_waits_for_what_is_not_stored_is_stuck(conn: Conn, site: Site) -> None:
    first = put(conn)
    last = put(conn, after=[first])
    conn.execute("DELETE FROM batchq.batches WHERE id = %s", [first])
    conn.execute("DELETE FROM batchq.flow_events")
    assert f"of batch {last} stuck: batch {first} is not stored" in text_of(site, "/flows")


def row(one: int, age: float | None = 1.0) -> dict[str, Any]:
    """Return a batch that waits."""
    return {"id": one, "queue": "q", "kind": "k", "needs_left": 1, "age_seconds": age}


def need(batch: int, needed: int, ended_as: str | None = None, is_stuck: bool = False) -> dict[str, Any]:
    """Return what a batch waits for."""
    return {"batch_id": batch, "needed_id": needed, "ended_as": ended_as, "is_stuck": is_stuck}


def test_batches_that_wait_for_the_same_are_one_flow_and_others_are_not() -> None:
    assert flows_of([], [], []) == []
    found = flows_of([row(2), row(3, 9.0), row(12, 99.0)], [need(2, 1), need(3, 1), need(12, 11)], [])
    assert [(flow.last["id"], flow.waiting, flow.open, flow.age_seconds) for flow in found] == [
        (12, 1, 1, 99.0), (3, 2, 1, 9.0),
    ]  # fmt: skip
    step("what has ended is not open, but joins; a chain has one last batch")
    [flow] = flows_of([row(2), row(3), row(4)], [need(2, 1, "completed"), need(3, 1, "completed"), need(4, 3)], [])
    assert (flow.last["id"], flow.waiting, flow.open) == (4, 3, 0)
    step("stuck batches that were not read count, too")
    found = flows_of([row(2, 50.0)], [need(2, 1)], [need(9, 8, "failed") | {"queue": "q", "kind": "k"}])
    assert [(flow.last["id"], flow.stuck, flow.stuck_on) for flow in found] == [
        (9, 1, [(8, "failed")]), (2, 0, []),
    ]  # fmt: skip
    [flow] = flows_of([row(9)], [need(9, one, "failed", is_stuck=True) for one in range(1, 6)], [])
    assert isinstance(flow, Flow)
    assert (len(flow.stuck_on), flow.more_stuck, flow.open) == (3, 2, 0)


# ------------------------------------------------------------------------------------------------- spread


def test_spread_batches_show_items_parts_rate_and_time_left(conn: Conn, site: Site) -> None:
    assert "No spread batches are under way." in text_of(site, "/spread")
    whole, _ = set_spread(conn)
    conn.execute(
        "UPDATE batchq.batches_live SET items_done = 40, items_failed = 3 WHERE part_of = %s AND status = 'processing'",
        [whole],
    )
    conn.execute("UPDATE batchq.parts SET at = now() - interval '10 s'")
    shown = text_of(site, "/spread")
    assert f"{whole} work default 80 done, 6 failed, of 400 items 0 of 4 ended, 2 running 2 8." in shown
    assert re.search(r"10 s 3[67] s", shown), shown
    assert 'aria-label="80 done, 6 failed, of 400 items"' in site.client.get("/spread").text
    step("of a later attempt, no rate is made up")
    conn.execute("UPDATE batchq.batches_live SET attempt = 1 WHERE id = %s", [whole])
    assert "2 running 2 – 1" in text_of(site, "/spread")


# --------------------------------------------------------------------------------------------- navigation


def test_each_page_marks_its_place_in_the_navigation(conn: Conn, site: Site) -> None:
    flow = set_flow(conn)
    places = {"/": "Overview", "/kinds?queue=media&kind=unpack": "Overview", f"/batches/{flow}": "Batches",
              "/flows": "Flows", "/spread": "Flows", f"/flow/{flow}": "Flows", "/keys": "Limits",
              "/limits/set": "Limits", "/schedules/set": "Schedules", "/audit": "Audit"}  # fmt: skip
    for path, name in places.items():
        head = site.client.get(path).text.partition("<nav")[2].partition("</nav>")[0]
        assert re.findall(r'(?:aria-current="page"|class="within")>([^<]*)<', head) == [name], path
    assert [one.name for one in pages_beside("/keys") if one.is_current] == ["Keys"]
    assert [one.name for one in pages_beside("/flow/5")] == ["Flows", "Spread"]
    assert pages_beside("/audit") == []
    for group in GROUPS:
        for page in group.pages:
            assert site.client.get(page.address).status_code == 200
            assert sum(one.is_current or one.is_within for one in groups_on(page.address)) == 1, page


def test_hostile_names_are_text_and_lead_to_their_pages(conn: Conn, site: Site) -> None:
    first = insert(conn, queue=HOSTILE, kind=HOSTILE, key=HOSTILE)
    batchq.enqueue(conn, HOSTILE, queue=HOSTILE, after=[first])
    for path in ("/limits", "/keys", "/flows"):
        page = site.client.get(path).text
        assert "<script>alert" not in page, path
        assert "\u202e" not in page, path
        assert "⟨U+202E⟩gnp.exe" in page, path
    answer = site.client.get("/kinds", params={"queue": HOSTILE, "kind": HOSTILE})
    assert "Ready" in answer.text
    assert "<script>alert" not in answer.text


if __name__ == "__main__":
    run_alone(__file__)
