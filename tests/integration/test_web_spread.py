"""A batch that is spread in the web UI: one in the lists, one bar on its page, and its parts; lists filter by key."""

import re
from collections.abc import Iterator
from html import unescape

import pytest

import batchq
from batchq.postgres.statements.checkpoints import Progress
from batchq.postgres.statements.endings import Finish
from tests.component.rows import Conn, Taken, checkpoint, claim, failure, finish, finished, insert, processing, values
from tests.support.alone import run_alone
from tests.support.scene import set_spread
from tests.support.steps import step
from tests.support.web import Site, served


@pytest.fixture
def site(dsn: str) -> Iterator[Site]:
    """Serve the web UI without a password."""
    with served(dsn) as site:
        yield site


def text_of(site: Site, path: str) -> str:
    """Return the text of a page, with one space between words."""
    answer = site.client.get(path)
    assert answer.status_code == 200, answer.text
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", answer.text.partition("<main")[2])).split())


def listed(site: Site, query: str = "") -> list[int]:
    """Return the batches that a list shows."""
    answer = site.client.get(f"/batches?{query}")
    assert answer.status_code == 200, answer.text
    return [int(number) for number in re.findall(r'href="/batches/(\d+)">\1</a>', answer.text)]


def half_way(conn: Conn) -> tuple[int, list[Taken]]:
    """Return a batch of 400 items in 4 parts: one has ended, one runs with 40 of its items done and one failed."""
    whole, taken = set_spread(conn)
    checkpoint(conn, taken[0], Progress(100, 0))
    checkpoint(conn, taken[1], Progress(40, 1, [failure(7, "ValueError: bad")], first_index=0))
    finish(conn, Finish(taken[0].id, taken[0].token, "completed"))
    conn.execute("SELECT batchq.follow_flows(0)")
    return whole, taken


@pytest.mark.parametrize("has_positions", [False, True])
def test_lists_show_the_whole_as_processing_and_no_part(conn: Conn, site: Site, has_positions: bool) -> None:
    whole, _ = half_way(conn)
    other, waiting = processing(conn, kind="other").id, batchq.enqueue(conn, "later", after=[whole])
    if has_positions:  # as workers make them once many claims have left dead rows
        conn.execute("INSERT INTO batchq.positions (index, queue) VALUES ('ready', 'default')")
    assert listed(site) == [waiting, other, whole]
    assert listed(site, "status=processing") == [other, whole]
    assert listed(site, "status=processing&kind=work") == [whole]
    assert listed(site, "status=waiting") == [waiting]
    assert listed(site, "status=ready") == listed(site, "status=stalled") == listed(site, "status=completed") == []
    for query in ("kind=work", "status=processing"):
        shown = text_of(site, f"/batches?{query}")
        assert f"{whole} processing work default 35 % 140 done, 1 failed, of 400 1/5" in shown
    step("parts that are cancelled with it are in no list")
    conn.execute("SELECT batchq.cancel(%s)", [whole])
    assert listed(site, "status=cancelled") == [whole]
    shown = text_of(site, "/batches?status=cancelled")
    assert f"{whole} cancelled work default 35 % 140 done, 1 failed, of 400" in shown


def test_a_part_that_has_failed_is_in_no_list(conn: Conn, site: Site) -> None:
    whole, taken = set_spread(conn)
    finish(conn, Finish(taken[0].id, taken[0].token, "failed", error='{"error": "no"}'))
    assert values(conn, "SELECT count(*) FROM batchq.batches_finished WHERE status = 'failed'") == [1]
    assert listed(site, "status=failed") == []
    assert listed(site) == [whole]


def test_lists_are_paged_with_batches_that_are_spread(conn: Conn, site: Site) -> None:
    ids = []
    for _ in range(3):
        ids.append(set_spread(conn, 10, 2, 2)[0])
        conn.execute("INSERT INTO batchq.batches (kind) SELECT 'mail' FROM generate_series(1, 40)")
        mails = claim(conn, 40, kinds=["mail"])
        ids += [row.id for row in mails]
    seen: list[int] = []
    path: str | None = "/batches?status=processing"
    while path:
        answer = site.client.get(path)
        seen += [int(number) for number in re.findall(r'href="/batches/(\d+)">\1</a>', answer.text)]
        found = re.search(r'href="/([^"]*)" rel="next"', answer.text)
        path = f"/{found[1]}".replace("&amp;", "&") if found else None
    assert seen == sorted(ids, reverse=True)


def test_the_page_has_one_bar_and_the_parts(conn: Conn, site: Site) -> None:
    whole, taken = half_way(conn)
    page = site.client.get(f"/batches/{whole}").text
    shown = text_of(site, f"/batches/{whole}")
    assert 'role="img" aria-label="140 done, 1 failed, of 400 items"' in page
    assert '<rect class="done" width="340" height="8"/><rect class="failed" x="340" width="12" height="8"/>' in page
    assert "35 % 140 done, 1 failed, of 400 items" in shown
    assert re.search(r"about [\d.]+ m?s left", shown)
    assert "Attempt 1 of 5" in shown
    assert "Waits for" not in shown
    assert "attempt 1 started in 4 parts" in shown
    assert "Parts 4 in all: 2 ready, 1 completed, 1 processing" in shown
    assert f"{taken[1].id} processing 100 to 199 41 % 40 1 1/5 jobs-2-4412-5eed2" in shown
    assert " 0 to 99" not in shown, "it has ended"
    assert "Failed items" in shown
    assert "107 107 ValueError: bad 1" in shown, "by its index in the whole"
    assert re.findall(r'id="verb-(\w+)"', page) == ["cancel"]
    step("the whole is cancelled, and retried")
    assert site.do("cancel", f"?id={whole}", id=whole).headers["location"] == f"/batches/{whole}?said=cancel"
    assert "cancelled" in text_of(site, f"/batches/{whole}")
    assert values(conn, "SELECT count(*) FROM batchq.batches_live") == [0]
    site.do("retry", f"?id={whole}", id=whole)
    assert values(conn, "SELECT status FROM batchq.status") == ["ready"]


def test_the_page_of_a_batch_that_is_not_spread_has_no_parts(conn: Conn, site: Site) -> None:
    alone = processing(conn, items=[1, 2]).id
    assert "Parts" not in text_of(site, f"/batches/{alone}")


def test_fifty_parts_are_listed(conn: Conn, site: Site) -> None:
    whole, taken = set_spread(conn, 120, 60, 55)
    page = site.client.get(f"/batches/{whole}").text
    assert len(re.findall(r'id="part-\d+"', page)) == 50
    assert "5 more are not shown." in text_of(site, f"/batches/{whole}")
    assert "Parts 60 in all: 55 processing, 5 ready" in text_of(site, f"/batches/{whole}")
    assert f'href="/batches/{taken[0].id}"' in page


def test_the_page_of_a_part_leads_to_the_whole(conn: Conn, site: Site) -> None:
    whole, taken = half_way(conn)
    for number, part in enumerate(taken):
        answer = site.client.get(f"/batches/{part.id}")
        assert answer.status_code == 200
        assert f'This is a part of <a href="/batches/{whole}">batch {whole}</a>' in answer.text
        assert f"works items {100 * number} to {100 * number + 99} of its list" in answer.text
        assert site.client.get(f"/flow/{part.id}").headers["location"] == f"/flow/{whole}"
    assert "40 done, 1 failed, of 100 items Attempt 1 of 5 Worker jobs-2-4412-5eed2" in text_of(
        site, f"/batches/{taken[1].id}"
    )
    refused = site.do("cancel", f"?id={taken[1].id}", id=taken[1].id)
    assert refused.status_code == 409
    assert f"batch {taken[1].id} is a part of batch {whole}: only the whole can be changed" in refused.text
    assert site.client.get("/batches/999").status_code == site.client.get("/flow/999").status_code == 404
    assert site.client.get(f"/batches?id={taken[1].id}").headers["location"] == f"/batches/{taken[1].id}"


def test_a_flow_shows_it_as_processing(conn: Conn, site: Site) -> None:
    whole, _ = half_way(conn)
    report = batchq.enqueue(conn, "report", after=[whole])
    shown = text_of(site, f"/flow/{report}")
    assert "1 processing 1 waiting" in shown
    assert f"Waits for 1 left Batches that this one waits for ID Status Kind Queue If it fails {whole} processing" in (
        text_of(site, f"/batches/{report}")
    )


def test_the_overview_counts_parts_as_what_workers_run(conn: Conn, site: Site) -> None:
    half_way(conn)
    assert '<th scope="col" class="num">Waiting' not in site.client.get("/").text
    [row] = conn.execute("SELECT processing, waiting FROM batchq.queues").fetchall()
    assert row == (1, 0)


# --------------------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize("has_positions", [False, True])
def test_lists_filter_by_key(conn: Conn, site: Site, has_positions: bool) -> None:
    taken, lost = processing(conn).id, finished(conn, "failed")
    whole, _ = set_spread(conn, 10, 2, 1, kind="many")
    conn.execute("UPDATE batchq.batches SET key = 'ann'")
    mine, later = insert(conn, key="ann"), insert(conn, key="ann", run_at="2100-01-01", queue="b")
    insert(conn, key="anna")
    insert(conn)
    if has_positions:
        conn.execute("INSERT INTO batchq.positions (index, queue) VALUES ('ready', 'default')")
    assert listed(site, "key=ann") == [later, mine, whole, lost, taken]
    assert listed(site, "key=ann&status=failed") == [lost]
    assert listed(site, "key=ann&status=processing") == [whole, taken]
    assert listed(site, "key=ann&status=ready") == [mine]
    assert listed(site, "key=ann&queue=b") == [later]
    assert listed(site, "key=nobody") == []
    page = site.client.get("/batches?key=ann").text
    assert 'name="q" type="search" value="key:ann"' in page
    assert 'href="/bulk/cancel?key=ann"' in page
    assert "key <bdi>ann</bdi>" in page
    assert 'name="key" value="ann"' in site.client.get("/bulk/cancel?key=ann").text


def test_a_rare_key_is_found_beside_many(conn: Conn, site: Site) -> None:
    rare = insert(conn, key="zoe")
    conn.execute("INSERT INTO batchq.batches (kind, key) SELECT 'work', 'ann' FROM generate_series(1, 6000)")
    conn.execute("INSERT INTO batchq.positions (index, queue) VALUES ('ready', 'default')")
    seen, path = [], "/batches?key=zoe"
    while path:
        answer = site.client.get(path)
        seen += re.findall(r'href="/batches/(\d+)">\1</a>', answer.text)
        found = re.search(r'href="([^"]*)" rel="next"', answer.text)
        path = found[1].replace("&amp;", "&") if found else ""
    assert seen == [str(rare)]


if __name__ == "__main__":
    run_alone(__file__)
