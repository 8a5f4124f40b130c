"""Failures in the web UI: groups by what their errors have in common, the page of a group, and the retry of a group."""

import json
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from urllib.parse import urlencode

import psycopg
import pytest

from batchq.operate.verbs import VERBS
from batchq.postgres import migrate as migrations
from batchq.postgres.migrate import all_migrations
from batchq.web.charts import trend
from tests.component.rows import Conn, finished, insert, value, values
from tests.support.alone import run_alone
from tests.support.later_migrations import known
from tests.support.roles import role_for
from tests.support.servers import Server
from tests.support.steps import step
from tests.support.web import Site, served

DONE = VERBS["retry"].done
IMPORTS = "ValueError: row <n>: no such customer <value>"


@pytest.fixture
def site(dsn: str) -> Iterator[Site]:
    """Serve the web UI without a password."""
    with served(dsn) as site:
        yield site


def failed(conn: Conn, error: str, kind: str = "import", minutes_ago: int = 0, **columns: object) -> int:
    """Return the id of a batch that failed some time ago."""
    batch_id = finished(conn, "failed", kind=kind, error=json.dumps({"error": error}), **columns)
    query = "UPDATE batchq.batches SET finished_at = finished_at - %s * interval '1 minute' WHERE id = %s"
    conn.execute(query, [minutes_ago, batch_id])
    return batch_id


def imports(conn: Conn, count: int = 20) -> list[int]:
    """Return batches that failed with the same error of different rows and customers."""
    return [
        failed(conn, f"ValueError: row {n}: no such customer 'C-{1000 + n}'", minutes_ago=count - n)
        for n in range(count)
    ]


def text_of(site: Site, path: str) -> str:
    """Return the text of a page, with one space between words."""
    answer = site.client.get(path)
    assert answer.status_code == 200, answer.text
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", answer.text.partition("<main")[2])).split())


def group_path(kind: str = "import", error: str = IMPORTS) -> str:
    """Return the address of the page of a group."""
    return f"/failures/group?{urlencode({'kind': kind, 'error': error})}"


# -------------------------------------------------------------------------------------------------------- the groups


def test_twenty_failures_that_differ_in_numbers_and_values_are_one_group(conn: Conn, site: Site) -> None:
    ids = imports(conn)
    other = failed(conn, "ConnectionRefusedError: [Errno 111] Connection refused", kind="mail", queue="slow")
    page = text_of(site, "/failures")
    assert f"{IMPORTS} 20 failed At most" in page
    assert f"Example {ids[-1]} ValueError: row 19: no such customer 'C-1019'" in page
    assert re.search(
        r"Connection refused 1 failed At most 1 in 2 min 30 s, over the last 1 h Kind mail Queue slow", page
    )
    assert page.index(str(other)) < page.index(IMPORTS), "the latest first"
    assert "the latest 21 failed batches" in page


def test_without_failures_the_page_says_so(conn: Conn, site: Site) -> None:
    finished(conn, "completed")
    assert "No failures." in text_of(site, "/failures")


def test_the_overview_shows_the_first_groups_and_leads_to_them(conn: Conn, site: Site) -> None:
    imports(conn, 3)
    page = site.client.get("/").text
    assert f'href="{group_path()}"'.replace("&", "&amp;") in page
    assert '<a id="all-failures" href="/failures">' in page


def test_the_live_part_has_the_same_groups(conn: Conn, site: Site) -> None:
    imports(conn, 3)
    with site.client.stream("GET", "/live/failures") as answer:
        text = "".join(line for line, _ in zip(answer.iter_lines(), range(30), strict=False))
    assert 'id="piece-groups"' in text
    assert "no such customer &lt;value&gt;" in text


def test_hostile_errors_and_kinds_are_shown_and_lead_to_their_group(conn: Conn, site: Site) -> None:
    kind, error = "<b>\u202ekind & co", "</bdi><script>alert(1)</script>\u202e & %"
    batch_id = failed(conn, error, kind=kind)
    page = site.client.get("/failures").text
    assert "<script>alert" not in page
    assert "\u202e" not in page
    [path] = re.findall(r'id="group-1" href="([^"]*)"', page)
    group = site.client.get(unescape(path)).text
    assert f'href="/batches/{batch_id}"' in group
    assert "<script>alert" not in group
    assert "\u202e" not in group


# --------------------------------------------------------------------------------------------------------- one group


def test_a_group_shows_its_pattern_an_example_and_its_batches(conn: Conn, site: Site) -> None:
    ids = imports(conn)
    others = [failed(conn, "ValueError: no"), failed(conn, "ValueError: row 3: no such customer 'x'", kind="export")]
    page = site.client.get(group_path()).text
    assert re.findall(r'id="batch-(\d+)"', page) == [str(each) for each in reversed(ids)]
    shown = text_of(site, group_path())
    assert f"Among the latest {len(ids) + len(others)} failed batches Failed 20 Kind import Queue default" in shown
    assert "Latest error ValueError: row 19: no such customer 'C-1019'" in shown
    assert 'aria-current="page"' not in page.partition("<nav")[2].partition("/failures")[0]


def test_a_group_that_is_gone_says_so(conn: Conn, site: Site) -> None:
    assert "None of the latest failures of import is in this group." in text_of(site, group_path())
    assert site.client.get("/failures/group").status_code == 200
    assert site.client.get("/failures/group?kind=%00").status_code == 400


def test_a_trend_has_a_bar_for_each_part_of_the_time_in_which_some_failed() -> None:
    drawn = trend([0.0, 10.0, 500.0, 7200.0, 7200.0, 7200.0], 0.0, 7200.0)
    assert [(x, height) for x, _, height in drawn.bars] == [(0, 14.7), (5, 7.3), (115, 22.0)]
    assert (drawn.most, drawn.each_seconds, drawn.seconds) == (3, 300.0, 7200.0)
    now = trend([5.0], 5.0, 5.0)
    assert (now.bars, now.most, now.seconds) == ([(115, 1.0, 22.0)], 1, 3600)


# ------------------------------------------------------------------------------------------------ the retry of a group


def field(page: str, name: str) -> str:
    """Return the value of a field of a form."""
    [text] = re.findall(rf'name="{name}" value="([^"]*)"', page)
    return unescape(text)


def retry(site: Site, path: str) -> list[str]:
    """Follow the link of a retry to its end; return what the page said at each step."""
    page, said = site.client.get(path).text, []
    form = {name: field(page, name) for name in ("form_token", "kind", "grouped", "error_group")}
    form |= {"status": "failed", "reason": "fixed", "actor": "ada"}
    while True:
        page = site.client.post("/bulk/retry", data=form, headers={"Origin": site.url}).text
        [text] = re.findall(r'<p id="bulk-text"[^>]*>(.*?)</p>', page, re.DOTALL)
        said.append(" ".join(unescape(re.sub(r"<[^>]*>", "", text)).split()))
        if "<button class=" not in page.partition('id="bulk-form"')[2]:
            return said
        form = {name: field(page, name) for name in ("form_token", "job", "seal")}


def retry_path(site: Site, path: str) -> str:
    """Return the address of the retry that the page of a group offers."""
    [address] = re.findall(r'id="retry-group" href="([^"]*)"', site.client.get(path).text)
    return unescape(address)


def test_a_retry_takes_all_of_the_group_and_no_other(conn: Conn, site: Site) -> None:
    ids = imports(conn)
    others = [
        failed(conn, "ValueError: row 3: no such supplier 'C-1003'"),
        failed(conn, "ValueError: row 3: no such customer 'C-1003' in 'x'"),
        failed(conn, "ValueError: row 3: no such customer 'C-1003'", kind="export"),
    ]
    said = retry(site, retry_path(site, group_path()))
    assert said[0].startswith(f"20 batches match and would be {DONE}.")
    assert said[-1] == f"20 batches {DONE}."
    assert values(conn, "SELECT id FROM batchq.all_batches WHERE status = 'pending' ORDER BY id") == ids
    assert values(conn, "SELECT id FROM batchq.all_batches WHERE status = 'failed' ORDER BY id") == others
    [entry] = conn.execute("SELECT verb, batches, kind, details, reason, actor FROM batchq.audit").fetchall()
    assert entry[:3] == ("retry", 20, "import")
    assert entry[3]["filter"]["error_group"] == IMPORTS
    assert entry[4:] == ("fixed", "ada")


def test_a_retry_says_how_many_were_not_retried_and_why(conn: Conn, site: Site) -> None:
    imports(conn, 4)
    failed(conn, "ValueError: row 9: no such customer 'x'", unique_key="taken")
    insert(conn, kind="import", unique_key="taken")
    said = retry(site, retry_path(site, group_path()))
    assert said[-1] == f"4 batches {DONE}. 1 left unchanged: 1 with the unique_key of a live batch."


def test_a_retry_finds_failures_before_the_latest_500(conn: Conn, site: Site) -> None:
    conn.execute(
        "INSERT INTO batchq.batches (kind, status, finished_at, errors) SELECT 'import', 'failed', now(), "
        "jsonb_build_array(jsonb_build_object('error', 'no row ' || n)) FROM generate_series(1, 700) n"
    )
    path = group_path(error="no row <n>")
    assert "Failed 500" in text_of(site, path)
    assert retry(site, retry_path(site, path))[-1] == f"700 batches {DONE}."


def test_batches_without_an_error_are_a_group_that_can_be_retried(conn: Conn, site: Site) -> None:
    silent = finished(conn, "failed", kind="import")
    failed(conn, "ValueError: no")
    assert "(no error message)" in text_of(site, "/failures")
    retry(site, retry_path(site, group_path(error="")))
    assert values(conn, "SELECT id FROM batchq.all_batches WHERE status = 'pending'") == [silent]


def test_a_group_with_hidden_characters_can_be_retried(conn: Conn, site: Site) -> None:
    batch_id = failed(conn, 'a\u202eb "x" <n> & co')
    error = value(conn, "SELECT error FROM batchq.failures")
    retry(site, retry_path(site, group_path(error=error)))
    step("the group in the form is the very text, not its spelled-out characters")
    assert values(conn, "SELECT id FROM batchq.all_batches WHERE status = 'pending'") == [batch_id]


def test_who_may_only_look_gets_no_retry(conn: Conn, dsn: str) -> None:
    imports(conn, 2)
    with served(dsn, read_only=True) as site:
        for path in ("/failures", group_path()):
            assert "/bulk/retry" not in site.client.get(path).text
        assert site.client.get("/bulk/retry").status_code == 403


def test_a_viewer_sees_failures_and_charts_and_an_operator_retries(conn: Conn, admin_dsn: str) -> None:
    imports(conn, 3)
    with role_for(admin_dsn, "viewer") as dsn, served(dsn) as site:
        for path in ("/", "/failures", group_path(), "/charts", "/charts?range=24h", "/charts?range=7d"):
            assert site.client.get(path).status_code == 200, path
    with role_for(admin_dsn, "operator") as dsn, served(dsn) as site:
        assert retry(site, retry_path(site, group_path()))[-1] == f"3 batches {DONE}."


@pytest.mark.parametrize("privileges", ["duty", "by hand"])
def test_who_could_read_failures_before_the_upgrade_still_can(
    empty_database: str, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, privileges: str
) -> None:
    dsn, role = server.dsn(empty_database), f"reader_{empty_database}"
    files, directory = all_migrations(), known(tmp_path / "before", 18)
    with monkeypatch.context() as patched:
        patched.setattr(migrations, "directory", lambda: directory)
        migrations.migrate(dsn)
    assert len(files) > 18
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(f'CREATE ROLE "{role}"'.encode())
        try:
            if privileges == "duty":
                conn.execute("SELECT batchq.grant_duty('viewer', %s)", [role])
            else:
                conn.execute(f'GRANT USAGE ON SCHEMA batchq TO "{role}"'.encode())
                conn.execute(f'GRANT SELECT ON batchq.failures TO "{role}"'.encode())
                conn.execute(f'GRANT EXECUTE ON FUNCTION batchq.latest_failures(integer) TO "{role}"'.encode())
            migrations.migrate(dsn)
            with conn.transaction():
                conn.execute(f'SET LOCAL ROLE "{role}"'.encode())
                assert conn.execute("SELECT * FROM batchq.failures").fetchall() == []
        finally:
            conn.execute(f'DROP OWNED BY "{role}"'.encode())
            conn.execute(f'DROP ROLE "{role}"'.encode())


if __name__ == "__main__":
    run_alone(__file__)
