"""The web UI of several databases: the page of all, the pages of each, one log-in, actions, and metrics."""

import json
import re
import time
from collections.abc import Iterator
from contextlib import closing

import httpx
import psycopg
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Mount

import batchq
from batchq.errors import ConfigError, DatabaseAway
from batchq.operate.watch import Watch
from batchq.postgres.databases import Database
from batchq.postgres.statements.totals import totals
from batchq.web import WebApp
from batchq.web.nav import ALL_PAGES
from batchq.web.reads import KnownAway
from batchq.web.settings import WebSettings
from batchq.web.several import SeveralWeb, WatchedReader
from tests.component.rows import Conn, insert, processing, value
from tests.support.alone import run_alone
from tests.support.databases import Databases
from tests.support.several import PASSWORD as DSN_PASSWORD
from tests.support.several import away_dsn, deaf_dsn, served_databases, served_several
from tests.support.steps import step
from tests.support.through import Way
from tests.support.waiting import wait_until
from tests.support.web import PASSWORD, Site, hosted, text_of

LINK = re.compile(r'(?:href|src|action|data-live)="([^"]*)"')


@pytest.fixture
def other_dsn(databases: Databases, way: Way) -> Iterator[str]:
    """Return the DSN of a second database."""
    with databases.migrated() as name, way(name) as dsn:
        yield dsn


@pytest.fixture
def site(dsn: str, other_dsn: str) -> Iterator[Site]:
    """Serve the web UI of two databases."""
    with served_several(eu=dsn, us=other_dsn) as site:
        yield site


def row_of(site: Site, name: str) -> str:
    """Return the text of a database's row on the page of all."""
    found = re.search(rf"<tr>\s*<th[^>]*><a[^>]*>{name}</a>.*?</tr>", site.client.get("/").text, re.DOTALL)
    assert found, f"no row of {name}"
    return " ".join(re.sub(r"<[^>]*>", " ", found[0]).split())


def test_the_first_page_has_a_row_for_each_database(conn: Conn, site: Site, other_dsn: str) -> None:
    processing(conn, kind="good")
    insert(conn, kind="good")
    assert row_of(site, "eu").startswith("eu up 1 0 1 0 0 ")
    assert row_of(site, "us") == "us up 0 0 0 0 0 – 0 0"
    with psycopg.connect(other_dsn, autocommit=True) as other:
        insert(other, kind="other")
    assert row_of(site, "us").startswith("us up 1 0 0 0 0")
    assert "good" in text_of(site, "/db/eu/")
    assert "good" not in text_of(site, "/db/us/")


def test_the_pages_of_a_database_lead_nowhere_else_but_to_the_same_page_of_another(conn: Conn, site: Site) -> None:
    batch_id = processing(conn, kind="good").id
    for address in [f"/db/eu{page.address}" for page in ALL_PAGES] + [f"/db/eu/batches/{batch_id}"]:
        links = [link for link in LINK.findall(site.client.get(address).text) if link.startswith("/")]
        elsewhere = {link for link in links if not link.startswith("/db/eu/")}
        same = "/" if address.endswith(str(batch_id)) else address.removeprefix("/db/eu")
        assert elsewhere == {"/", f"/db/us{same}"}, address
    step("the links of the page of all lead to the databases")
    assert {"/db/eu/", "/db/us/"} <= set(LINK.findall(site.client.get("/").text))
    assert site.client.get("/db/us").headers["location"] == "/db/us/"
    assert site.client.get("/db/nobody/").status_code == 404
    assert site.client.get("/db/us/nothing").status_code == 404
    assert site.client.get("/batches").status_code == 404


def test_an_action_changes_the_database_of_its_page_only(conn: Conn, site: Site, other_dsn: str) -> None:
    with psycopg.connect(other_dsn, autocommit=True) as other:
        ids = [batchq.enqueue(each, "good") for each in (conn, other)]
        assert ids[0] == ids[1]
        path = "/db/us/verbs/cancel"
        token = site.form_token(f"{path}?id={ids[0]}")
        assert site.post(path, token, id=ids[0], reason="why", actor="ann").status_code == 303
        assert [value(each, "SELECT status FROM batchq.batches") for each in (conn, other)] == ["pending", "cancelled"]


def test_one_log_in_is_for_all_databases_and_logging_out_as_well(dsn: str, other_dsn: str) -> None:
    both = [Database("eu", dsn), Database("us", other_dsn)]
    with served_databases(both, password=PASSWORD, read_only_password="only looking") as site:
        others = ("/metrics", "/db/us/metrics", "/live/databases", "/db/eu/live/overview")
        for path in ("/", "/db/eu/", "/db/us/workers", *others):
            assert site.client.get(path).status_code == 401, path
        assert site.client.get("/db/us/", headers={"Accept": "text/html"}).headers["location"] == "/login"
        assert site.log_in().status_code == 303
        for path in ("/", "/db/eu/", "/db/us/workers"):
            assert site.client.get(path).status_code == 200, path
        step("a form of one database is good for the next one, since the session is the same; logging out ends it")
        page = site.client.get("/db/us/").text
        assert 'action="/logout"' in page
        assert site.post("/logout", site.form_token("/db/us/")).status_code == 303
        assert site.client.get("/db/eu/").status_code == 401
        step("who may look only may act on no database")
        assert site.log_in("only looking").status_code == 303
        token = site.form_token("/db/us/")
        for name in ("eu", "us"):
            assert site.post(f"/db/{name}/verbs/pause", token, queue="x", actor="ann").status_code == 403
            assert "read-only" in site.client.get(f"/db/{name}/").text
        assert site.client.get("/db/eu/login").status_code == 404


def test_below_a_prefix_every_address_has_it(dsn: str, other_dsn: str) -> None:
    both = [Database("eu", dsn), Database("us", other_dsn)]
    with served_databases(both, root_path="/queue") as site:
        for path in ("/queue/", "/queue/db/us/workers", "/db/us/workers"):
            links = [link for link in LINK.findall(site.client.get(path).text) if link.startswith("/")]
            assert links
            assert [link for link in links if not link.startswith("/queue/")] == [], path
        assert site.client.get("/queue/db/us").headers["location"] == "/queue/db/us/"
    with pytest.raises(ConfigError, match="/db is a page"):
        SeveralWeb(both, WebSettings.load(root_path="/db"))
    with pytest.raises(ConfigError, match="/workers is a page"):
        SeveralWeb(both, WebSettings.load(root_path="/workers"))


def test_after_it_was_closed_it_reads_again_once_it_may(dsn: str) -> None:
    web = SeveralWeb([Database("eu", dsn)], WebSettings.load())
    web.close()
    web.allow()
    assert web.databases["eu"].reader.ask(totals)["workers"] == 0
    web.close()


def test_a_database_that_is_away_is_shown_and_delays_no_page(dsn: str) -> None:
    with deaf_dsn() as deaf, served_several(read_seconds=1, eu=dsn, us=away_dsn(), deaf=deaf) as site:
        assert re.match(r"us away(| for \d.*): connection refused$", row_of(site, "us"))
        assert row_of(site, "eu").startswith("eu up")
        wait_until(lambda: "no answer" in row_of(site, "deaf"), 30, "the deaf one to be known")
        began_at = time.monotonic()
        for path in ("/", "/db/eu/", "/db/us/", "/db/deaf/", "/db/deaf/batches"):
            answer = site.client.get(path)
            assert answer.status_code == (200 if path in ("/", "/db/eu/") else 503), path
            assert DSN_PASSWORD not in answer.text
            assert "127.0.0.1" not in answer.text
        assert time.monotonic() - began_at < 2
        assert "The database us is away" in site.client.get("/db/us/").text
        assert "/db/eu/" in LINK.findall(site.client.get("/db/us/").text)
        assert site.client.get("/readyz").text == "ready; away: us, deaf\n"
        assert site.client.get("/db/eu/readyz").status_code == 200
        assert site.client.get("/db/us/readyz").status_code == 503


@pytest.mark.parametrize("way", ["ask", "act"])
def test_a_page_that_finds_its_database_away_lets_no_other_wait_for_it(way: str) -> None:
    database = Database("us", away_dsn())
    with closing(Watch([database], totals, 1)) as watch, closing(WatchedReader(database, watch, 1)) as reader:
        with pytest.raises((psycopg.OperationalError, DatabaseAway)):
            getattr(reader, way)(lambda _: None)
        wait_until(lambda: watch.away("us") is not None, 10, "the watch to know")
        with pytest.raises(KnownAway, match="the database us is away"):
            getattr(reader, way)(lambda _: None)


def test_no_database_at_all_is_not_ready() -> None:
    with served_several(eu=away_dsn(), us=away_dsn()) as site:
        assert site.client.get("/readyz").status_code == 503
        assert site.client.get("/healthz").status_code == 200
        assert row_of(site, "eu").startswith("eu away")


def test_the_page_of_all_is_live_and_read_once_for_all_who_watch(conn: Conn, site: Site) -> None:
    with site.client.stream("GET", "/live/databases") as first, site.new_client() as client:
        lines = first.iter_lines()
        assert any("2 databases up, 0 away" in line for line in lines)
        with client.stream("GET", "/live/databases") as second:
            others = second.iter_lines()  # kept: httpx ends a stream with its iterator
            assert any("2 databases up" in line for line in others)
            assert {name: len(part.viewers) for name, part in site.web.live.watched.items()} == {"/databases": 2}
            insert(conn, kind="good")
            assert any('data-label="Ready">1<' in line for line in lines)
    with site.client.stream("GET", "/db/us/live/overview") as other:
        pieces = other.iter_lines()
        assert any("piece-figures" in line for line in pieces)
        assert "/db/us/overview" in site.web.live.watched


def test_metrics_have_the_label_database_only_if_there_are_several(conn: Conn, site: Site, dsn: str) -> None:
    insert(conn, kind="good")
    text = site.client.get("/metrics").text
    assert 'batchq_queue_depth{database="eu",kind="good",queue="default",state="ready"} 1.0' in text
    assert 'batchq_workers{database="us"} 0.0' in text
    assert 'batchq_database_up{database="us"} 1.0' in text
    assert len(re.findall("^# TYPE batchq_workers ", text, re.MULTILINE)) == 1
    alone = site.client.get("/db/eu/metrics").text
    assert "database" not in re.sub("^#.*", "", alone, flags=re.MULTILINE)
    assert 'batchq_queue_depth{kind="good",queue="default",state="ready"} 1.0' in alone
    with served_several(eu=dsn, us=away_dsn()) as half:
        text = half.client.get("/metrics").text
        assert 'batchq_database_up{database="us"} 0.0' in text
        assert 'batchq_workers{database="eu"} 0.0' in text
        assert 'batchq_workers{database="us"}' not in text


def test_mounted_into_an_application_it_may_have_several_databases(dsn: str, other_dsn: str) -> None:
    web = WebApp(databases={"eu": dsn, "us": other_dsn}, user_of=lambda request: request.headers.get("x-user"))
    assert isinstance(web, WebApp)
    with hosted(Starlette(routes=[Mount("/queue", web)], lifespan=web.lifespan)) as url:
        ann = httpx.Client(base_url=url, headers={"x-user": "Ann", "Origin": url}, trust_env=False)
        with ann:
            assert "Databases" in ann.get("/queue/").text
            page = ann.get("/queue/db/us/verbs/pause?queue=mail").text
            token = re.search(r'name="form_token" value="(\w+)"', page)
            assert token
            data = {"queue": "mail", "form_token": token[1]}
            assert ann.post("/queue/db/us/verbs/pause", data=data).status_code == 303
            assert httpx.get(f"{url}/queue/db/us/", trust_env=False).status_code == 403
    with psycopg.connect(other_dsn) as other, psycopg.connect(dsn) as one:
        assert value(other, "SELECT actor FROM batchq.pauses") == "Ann"
        assert value(one, "SELECT count(*) FROM batchq.pauses") == 0
    with pytest.raises(ConfigError, match="databases: 'EU' cannot be one"):
        WebApp(databases={"EU": dsn}, user_of=_nobody)


def _nobody(_: Request) -> None:
    return None


def test_the_sums_of_a_database_are_those_of_its_queues(conn: Conn) -> None:
    for queue in ("mail", "bulk"):
        processing(conn, kind="good", queue=queue)
        insert(conn, kind="good", queue=queue)
    found = totals(conn)
    sums = "SELECT sum(ready), sum(processing), max(oldest_wait) IS NOT NULL FROM batchq.queues"
    expected = (found["ready"], found["processing"], found["oldest_wait"] is not None)
    assert conn.execute(sums).fetchone() == expected
    assert (found["ready"], found["processing"], found["estimated"]) == (2, 2, [])
    assert json.dumps(found)


if __name__ == "__main__":
    run_alone(__file__)
