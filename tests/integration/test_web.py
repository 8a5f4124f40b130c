"""The web UI over HTTP, on the real database: who gets in, what is refused, what is shown, what it costs."""

import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from html import unescape
from html.parser import HTMLParser
from typing import Any
from uuid import uuid4

import httpx
import psycopg
import pytest
from psycopg import sql

from batchq.errors import ConfigError
from batchq.postgres.statements import views, workers
from batchq.postgres.statements.checkpoints import Progress
from batchq.postgres.statements.endings import Finish
from batchq.postgres.statements.workers import Tally, WorkerRow
from batchq.web import list_reads, reads
from batchq.web.formats import duration, visible
from batchq.web.live import Live, LivePart
from batchq.web.settings import WebSettings
from tests.component.rows import (
    Conn,
    checkpoint,
    claim,
    expire_lease,
    failure,
    finish,
    finished,
    insert,
    processing,
    run,
    value,
    values,
)
from tests.support.alone import run_alone
from tests.support.processes import Processes
from tests.support.steps import step
from tests.support.waiting import wait_until
from tests.support.web import PASSWORD, Site, served

PATHS = ("/", "/batches", "/batches/1", "/workers", "/audit", "/limits", "/limits/set", "/live/overview",
         "/static/live.js", "/healthz", "/readyz", "/verbs/cancel?id=1", "/bulk/cancel", "/nothing",
         "/static/../server.py", "/login/")  # fmt: skip

LOOKED_AT = ("/", "/batches", "/batches?status=failed", "/batches/1", "/workers", "/audit", "/readyz", "/limits",
             "/keys?key=a", "/flows", "/spread", "/schedules", "/kinds?queue=a&kind=b")  # fmt: skip


@pytest.fixture
def site(dsn: str) -> Iterator[Site]:
    """Serve the web UI without a password."""
    with served(dsn) as site:
        yield site


@pytest.fixture
def closed_site(dsn: str) -> Iterator[Site]:
    """Serve the web UI with a password."""
    with served(dsn, password=PASSWORD) as site:
        yield site


class Reading(HTMLParser):
    """What a browser makes of a page: the elements it has, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def ids_of(answer: httpx.Response) -> list[int]:
    """Return the batches that a list shows."""
    assert answer.status_code == 200, answer.text
    return [int(number) for number in re.findall(r'href="/batches/(\d+)">\1</a>', answer.text)]


def worker(conn: Conn, worker_id: str = "host-1-abc") -> None:
    """Let a worker show itself."""
    with conn.transaction():
        conn.execute(
            *workers.heartbeat(WorkerRow(worker_id, "host", 1, "1", ["default"], ["work"], 8), 3, stopping=False)
        )


# ------------------------------------------------------------------------------------------------- who gets in


def test_without_the_password_nothing_but_the_login_is_served(conn: Conn, closed_site: Site) -> None:
    insert(conn, kind="secret-kind")
    for path in PATHS:
        for headers in ({}, {"Accept": "text/html"}, {"Authorization": "Bearer wrong-token"}):
            with closed_site.new_client() as stranger:
                answer = stranger.get(path, headers=headers)
            assert answer.status_code in (303, 401, 429), (path, answer.status_code)
            assert answer.headers.get("location", "/login") == "/login"
            assert "secret-kind" not in answer.text
    for path in ("/verbs/cancel", "/logout", "/login"):
        assert closed_site.client.post(path, data={"id": "1"}).status_code == 403
    assert closed_site.client.get("/login").status_code == 200
    assert closed_site.client.get("/static/style.css").status_code == 200


def test_the_password_lets_in_and_logging_out_lets_nobody_in(closed_site: Site) -> None:
    assert closed_site.log_in("wrong").status_code == 401
    assert closed_site.client.get("/").status_code == 401
    answer = closed_site.log_in()
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert re.search("HttpOnly; SameSite=Strict; Path=/", answer.headers["set-cookie"])
    assert closed_site.client.get("/").status_code == 200
    closed_site.post("/logout", closed_site.form_token("/"))
    assert closed_site.client.get("/").status_code == 401


def test_a_session_that_was_tampered_with_is_none(dsn: str, closed_site: Site) -> None:
    closed_site.log_in()
    good = closed_site.client.cookies["batchq_session"]
    stranger = closed_site.web.guard.sessions.new()
    body, _, signature = stranger.rpartition(".")
    forged = f"{body[:-1]}1.{signature}"
    for session in (
        forged,
        good[:-1] + ("0" if good[-1] != "0" else "1"),
        "",
        "...",
        "a.1.1.",
        good.replace(".1.", ".0."),
    ):
        with closed_site.new_client(Cookie=f"batchq_session={session}") as client:
            assert client.get("/").status_code == 401, session
    assert closed_site.web.guard.sessions.is_known(good)
    with served(dsn, password=PASSWORD) as restarted:
        step("a key lives as long as its process")
        with restarted.new_client(Cookie=f"batchq_session={good}") as client:
            assert client.get("/").status_code == 401


def test_a_token_lets_programs_in(dsn: str) -> None:
    with served(dsn, token="a-token-for-programs") as site:
        with site.new_client(Authorization="Bearer a-token-for-programs") as program:
            assert program.get("/readyz").text == "ready\n"
        with site.new_client(Authorization="Basic a-token-for-programs") as program:
            assert program.get("/readyz").status_code == 401


def test_guessing_is_slowed_down(closed_site: Site) -> None:
    form_token = closed_site.form_token("/login")
    codes = [closed_site.post("/login", form_token, password="wrong").status_code for _ in range(5)]
    assert codes == [401, 401, 401, 429, 429]
    refused = closed_site.post("/login", form_token, password="wrong")
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    step("the right one is taken all the same")
    assert closed_site.post("/login", form_token, password=PASSWORD).status_code == 303


def test_it_is_not_open_to_others_without_a_password() -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.com"):
        with pytest.raises(ConfigError, match="BATCHQ_WEB_PASSWORD"):
            WebSettings.load(host=host)
        assert WebSettings.load(host=host, password=PASSWORD).host == host
    with pytest.raises(ConfigError, match="8 characters"):
        WebSettings.load(password="short")
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        assert WebSettings.load(host=host).host == host
    with pytest.raises(ConfigError, match="BATCHQ_WEB_PORT"):
        WebSettings.load(port=70_000)


def test_the_command_serves_until_it_is_told_to_stop(dsn: str) -> None:
    with Processes(dsn, "none") as processes:
        refused = processes.command("web", "--host", "0.0.0.0", timeout_seconds=60)
        assert (refused.popen.returncode, "BATCHQ_WEB_PASSWORD" in refused.text()) == (2, True)
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]
        page = processes.run("web", "--port", str(port), web_password=PASSWORD)
        wait_until(lambda: f":{port}/" in page.text(), 60, "the address to be told")

        def is_served() -> bool:
            try:
                return httpx.get(f"http://127.0.0.1:{port}/login", trust_env=False, timeout=30).status_code == 200
            except httpx.ConnectError:
                return False

        wait_until(is_served, 60, "the web UI to be served")
        assert page.stop(60) in (0, -signal.SIGTERM)


# ------------------------------------------------------------------------------------------- what is refused


def test_a_forged_form_is_refused(conn: Conn, site: Site) -> None:
    batch_id = insert(conn)
    form_token = site.form_token(f"/verbs/cancel?id={batch_id}")
    forged: list[tuple[str, dict[str, str]]] = [
        (form_token, {"Origin": "http://evil.example"}),
        (form_token, {"Origin": "null"}),
        (form_token, {}),
        (form_token, {"Origin": site.url.replace("127.0.0.1", "localhost")}),
        ("", {"Origin": site.url}),
        ("0" * 64, {"Origin": site.url}),
    ]
    for given, headers in forged:
        data = {"id": str(batch_id), "form_token": given}
        assert site.client.post("/verbs/cancel", data=data, headers=headers).status_code == 403, (given, headers)
    with site.new_client() as other:
        step("a token of another session")
        other.get("/")
        assert site.post("/verbs/cancel", form_token, client=other, id=batch_id).status_code == 403
    assert site.client.get(f"/verbs/cancel?id={batch_id}").status_code == 200
    assert value(conn, "SELECT status FROM batchq.all_batches WHERE id = %s", [batch_id]) == "pending"
    assert site.post("/verbs/cancel", form_token, id=batch_id).status_code == 303


def test_methods_but_get_and_post_are_refused(site: Site) -> None:
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        assert site.client.request(method, "/", headers={"Origin": site.url}).status_code == 405
    for path in ("/", "/batches/1", "/verbs/nothing"):
        assert site.post(path, "x").status_code in (403, 404, 405)


def test_a_host_name_that_leads_here_by_foreign_dns_is_refused(conn: Conn, site: Site, dsn: str) -> None:
    for host in (
        "evil.example",
        f"evil.example:{site.port}",
        "127.0.0.1.evil.example",
        "",
        "[",
        "localhost.evil.example",
    ):
        assert site.client.get("/", headers={"Host": host}).status_code in (400, 421), host
    for host in (f"127.0.0.1:{site.port}", "localhost", "[::1]:80", "192.0.2.1"):
        assert site.client.get("/", headers={"Host": host}).status_code == 200, host
    with served(dsn, hosts="jobs.example") as named:
        assert named.client.get("/", headers={"Host": "jobs.example"}).status_code == 200


def test_every_answer_has_the_headers_that_keep_it_apart(closed_site: Site, site: Site) -> None:
    for answer in (
        closed_site.client.get("/"), closed_site.client.get("/login"), closed_site.client.post("/login"),
        site.client.get("/"), site.client.get("/nothing"), site.client.get("/static/style.css"),
        site.client.get("/", headers={"Host": "evil.example"}),
    ):  # fmt: skip
        policy = answer.headers["content-security-policy"]
        assert "unsafe" not in policy
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "same-origin"
        assert "server" not in answer.headers


def test_no_page_has_a_style_or_script_of_its_own(conn: Conn, site: Site) -> None:
    batch_id = finished(conn, "failed", error='{"error": "no", "traceback": "at"}')
    paths = ("/", "/batches", f"/batches/{batch_id}", "/workers", "/limits", "/limits/set", "/audit")
    for path in (*paths, f"/verbs/retry?id={batch_id}"):
        page = Reading(site.client.get(path).text)
        assert "style" not in page.tags
        names = [name for name, _ in page.attributes]
        assert [name for name in names if name == "style" or name.startswith("on")] == []
        outside = [text for name, text in page.attributes if name in ("src", "href", "action") and "//" in (text or "")]
        assert outside == []


def test_read_only_refuses_every_verb(conn: Conn, dsn: str) -> None:
    batch_id = insert(conn)
    worker(conn)
    with served(dsn, read_only=True) as site:
        form_token = site.web.guard.sessions.form_token(site.client.get("/").cookies["batchq_session"])
        for verb in ("cancel", "retry", "pause", "drain_worker", "move"):
            assert site.client.get(f"/verbs/{verb}?id={batch_id}").status_code == 403
            assert site.post(f"/verbs/{verb}", form_token, id=batch_id, queue="default").status_code == 403
        for path in ("/", "/workers", f"/batches/{batch_id}"):
            assert "/verbs/" not in site.client.get(path).text
    assert value(conn, "SELECT status FROM batchq.all_batches") == "pending"
    assert values(conn, "SELECT verb FROM batchq.audit") == []


def test_a_form_that_is_too_large_or_no_text_is_refused(site: Site) -> None:
    form_token = site.form_token("/verbs/pause")
    assert site.post("/verbs/pause", form_token, queue="x" * 70_000).status_code == 413
    assert site.post("/verbs/pause", form_token, queue="a\0b").status_code == 400
    headers = {"Origin": site.url, "Content-Type": "application/x-www-form-urlencoded"}
    assert site.client.post("/verbs/pause", content=b"queue=%ff%fe", headers=headers).status_code == 400


# ------------------------------------------------------------------------------------------- what is shown

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>'\"&{{ 7*7 }}\u202egnp.exe\u200b\x1b[31m\x07\u2066"
SHOWN = "⟨U+202E⟩gnp.exe⟨U+200B⟩⟨U+001B⟩[31m⟨U+0007⟩⟨U+2066⟩"


def hostile_batch(conn: Conn) -> int:
    """Return a batch of which every text is hostile."""
    columns = {"kind": HOSTILE, "queue": HOSTILE, "payload": {"x": HOSTILE}, "unique_key": HOSTILE}
    taken = processing(conn, items=[HOSTILE, 2], worker=HOSTILE, **columns)
    checkpoint(conn, taken, Progress(1, 1, [failure(0, HOSTILE)], first_index=0), queue=HOSTILE)
    error = {"error": HOSTILE, "traceback": HOSTILE, "attempt": HOSTILE, "at": HOSTILE}
    conn.execute(
        "UPDATE batchq.batches SET errors = %s, cursor = %s WHERE id = %s",
        [psycopg.types.json.Jsonb([error]), psycopg.types.json.Jsonb(HOSTILE), taken.id],
    )
    return taken.id


def test_hostile_texts_are_shown_as_text(conn: Conn, site: Site) -> None:
    batch_id = hostile_batch(conn)
    conn.execute("SELECT batchq.pause(queue => %s, reason => %s, actor => %s)", [HOSTILE] * 3)
    with conn.transaction():
        conn.execute(
            *workers.heartbeat(WorkerRow(HOSTILE, HOSTILE, 1, HOSTILE, [HOSTILE], [HOSTILE], 8), 3, stopping=False)
        )
    conn.execute("SELECT batchq.set_limit(%s, %s, max_running => 1)", [HOSTILE] * 2)
    conn.execute("SELECT batchq.throttle(%s, %s, %s, 60, %s)", [HOSTILE] * 4)
    paths = ("/", "/batches", f"/batches/{batch_id}", "/workers", "/limits", "/audit", f"/verbs/cancel?id={batch_id}")
    for path in paths:
        answer = site.client.get(path)
        assert answer.status_code == 200
        page = Reading(answer.text)
        assert "img" not in page.tags
        assert re.findall(r'<script(?! src="/static/[a-z]+\.js" defer></script>)', answer.text) == []
        assert [name for name, _ in page.attributes if name.startswith("on")] == []
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200b]", answer.text), path
        if "verbs" not in path:
            assert f"<script>alert(1)</script><img src=x onerror=alert(2)>'\"&{{{{ 7*7 }}}}{SHOWN}" in page.text, path
    for form in (
        "cancel?id=<script>x</script>",
        "pause?queue=<script>x</script>",
        "drain_worker?worker=<script>x</script>",
    ):
        assert "<script>x" not in site.client.get(f"/verbs/{form}").text
    assert "<script>x" not in site.client.get("/limits/set?queue=<script>x&kind=<script>x&max_running=<script>x").text
    assert "<script>x" not in site.client.get("/batches?kind=<script>x</script>&error=<script>x").text


def test_megabytes_are_shortened_by_the_database(conn: Conn, site: Site) -> None:
    taken = processing(conn, payload={"x": "a" * 4_000_000}, items=["b" * 10_000_000])
    checkpoint(conn, taken, Progress(0, 1, [failure(0)], first_index=0))
    long = psycopg.types.json.Jsonb("c" * 10_000_000)
    conn.execute("UPDATE batchq.batches SET cursor = %s, result = %s WHERE id = %s", [long, long, taken.id])
    answer = site.client.get(f"/batches/{taken.id}")
    assert (len(answer.content) < 100_000, answer.text.count("shortened")) == (True, 3)
    fields = site.web.reader.ask(lambda asked: views.batch_texts(asked, taken.id, reads.MOST_CHARACTERS))
    assert [len(field["text"]) for field in fields] == [reads.MOST_CHARACTERS] * 3
    assert max(field["characters"] for field in fields) == 10_000_002


def test_what_python_cannot_hold_is_shown_all_the_same(conn: Conn, site: Site) -> None:
    deep = "[" * 5000 + "]" * 5000
    conn.execute("INSERT INTO batchq.batches (kind, payload, run_at) VALUES ('a', %s::jsonb, '294000-01-01')", [deep])
    conn.execute(
        "INSERT INTO batchq.batches (kind, payload, created_at) VALUES ('a', %s::jsonb, '294000-01-01')", ["9" * 5000]
    )
    conn.execute("INSERT INTO batchq.batches (kind, created_at) VALUES ('a', '4000-01-01 BC')")
    for path in ("/", "/batches", *(f"/batches/{number}" for number in (1, 2, 3))):
        assert site.client.get(path).status_code == 200, path


def test_hidden_characters_are_spelled_out() -> None:
    assert visible("a\u202eb\x00c\n\td\u2028") == "a⟨U+202E⟩b⟨U+0000⟩c\n\td⟨U+2028⟩"
    assert visible("grüße, שלום, 漢字, 🙂") == "grüße, שלום, 漢字, 🙂"
    assert [visible(None), visible(3)] == ["", 3]


def test_durations_are_short() -> None:
    given = (None, 0.0204, 9.5, 61, 3600, 93_784, -2.5, float("inf"))
    assert [duration(seconds) for seconds in given] == [
        "–", "20 ms", "9.5 s", "1 min 1 s", "1 h", "1 d 2 h", "-2.5 s", "forever"
    ]  # fmt: skip


def test_the_overview_shows_queues_rates_failures_and_workers(conn: Conn, site: Site) -> None:
    insert(conn, kind="mail", queue="bulk")
    finished(conn, "failed", error='{"error": "no route to host"}', kind="mail")
    worker(conn)
    run(conn, workers.count_throughput("worker-1", [Tally("bulk", "mail", 40, 2, 0, 0, 7, 21.0, [42])]))
    page = Reading(site.client.get("/").text)
    assert "40 completed · 2 failed · 7 items · 500 ms per batch" in page.text
    assert "no route to host" in page.text
    assert {"bulk", "mail", "host"} <= set(page.text.split())
    assert page.tags.count("polyline") == 1


def test_a_batch_shows_its_attempts_progress_and_failed_items(conn: Conn, site: Site) -> None:
    taken = processing(conn, items=list(range(300)), payload={"order": 42})
    checkpoint(conn, taken, Progress(40, 60, [failure(number, f"no {number}") for number in range(60)], first_index=0))
    conn.execute("UPDATE batchq.batches SET claimed_at = now() - interval '10 s' WHERE id = %s", [taken.id])
    first = site.client.get(f"/batches/{taken.id}").text
    assert "33 %" in first
    assert "about 20 s left" in first
    assert "&#34;order&#34;: 42" in first
    assert re.findall(r'<th scope="row" class="num">(\d+)</th>', first) == [str(number) for number in range(50)]
    [more] = re.findall(r'href="(/batches/\d+\?after=49)#items"', first)
    assert re.findall(r'class="num">(\d+)</th>', site.client.get(more).text) == [
        str(number) for number in range(50, 60)
    ]


# ------------------------------------------------------------------------------------------- lists


def test_lists_filter_by_queue_kind_status_and_error(conn: Conn, site: Site) -> None:
    mail, bulk = insert(conn, kind="mail"), insert(conn, queue="bulk")
    later = insert(conn, run_at="2100-01-01")
    taken, lost = processing(conn).id, processing(conn).id
    expire_lease(conn, lost)
    failed_ids = [finished(conn, "failed", error=f'{{"error": "Timeout {word}"}}') for word in ("red", "blue")]
    done, off = finished(conn), finished(conn, "cancelled")
    expected = {
        "kind=mail": [mail], "queue=bulk": [bulk], "status=scheduled": [later], "status=processing": [taken],
        "status=stalled": [lost], "status=failed": failed_ids[::-1], "status=completed": [done],
        "status=cancelled": [off], "status=ready": [bulk, mail], "error=timeout": failed_ids[::-1],
        "status=failed&error=RED": failed_ids[:1], "error=%25": [], "status=nonsense&kind=mail": [mail],
        "status=failed&kind=mail": [],
    }  # fmt: skip
    for query, ids in expected.items():
        assert ids_of(site.client.get(f"/batches?{query}")) == ids, query


@pytest.mark.parametrize("status", ["", "failed", "ready"])
def test_lists_are_paged_by_key_and_miss_nothing_while_batches_come(conn: Conn, site: Site, status: str) -> None:
    if status == "failed":
        conn.execute(
            "INSERT INTO batchq.batches (kind, status, finished_at) "
            "SELECT 'work', 'failed', now() - n % 7 * interval '1 hour' FROM generate_series(1, 170) n"
        )
    else:
        conn.execute("INSERT INTO batchq.batches (kind) SELECT 'work' FROM generate_series(1, 170)")
    seen: list[int] = []
    path: str | None = f"/batches?status={status}"
    while path:
        answer = site.client.get(path)
        seen += ids_of(answer)
        insert(conn)
        found = re.search(r'href="([^"]*)" rel="next"', answer.text)
        path = found[1].replace("&amp;", "&") if found else None
    assert len(seen) == len(set(seen)) == 170
    assert set(seen) == set(range(1, 171))


def test_a_page_looks_at_a_bounded_number_of_batches_however_rare_the_matches(conn: Conn, site: Site) -> None:
    rare = insert(conn, kind="rare")
    conn.execute("INSERT INTO batchq.batches (kind) SELECT 'work' FROM generate_series(1, %s)", [2 * reads.LOOK_ROWS])
    path, pages = "/batches?kind=rare", 0
    while not (ids := ids_of(answer := site.client.get(path))):
        pages += 1
        [path] = [found.replace("&amp;", "&") for found in re.findall(r'href="([^"]*)" rel="next"', answer.text)]
    assert (ids, pages) == ([rare], 2)


def test_a_key_that_is_none_begins_at_the_first_page(conn: Conn, site: Site) -> None:
    batch_id = insert(conn)
    for key in ("x", "1e9", "-5", "9" * 40, "nan 5", "%00", "1 1", "inf inf"):
        assert ids_of(site.client.get(f"/batches?before={key}")) == [batch_id], key


def test_no_statement_of_the_page_uses_offset() -> None:
    assert [name for name, text in (reads.SQL | list_reads.SQL).items() if b"OFFSET" in text.upper()] == []


# ------------------------------------------------------------------------------------------- verbs


def test_verbs_change_batches_once_and_are_noted(conn: Conn, site: Site) -> None:
    batch_id = insert(conn)
    ask = f"?id={batch_id}"
    for _ in range(2):
        site.do("set_priority", ask, id=batch_id, priority=7, reason="hurry", actor="ann")
        site.do("move", ask, id=batch_id, to_queue="bulk")
    assert conn.execute("SELECT priority, queue FROM batchq.all_batches").fetchall() == [(7, "bulk")]
    site.do("snooze", ask, id=batch_id, minutes=60)
    assert value(conn, "SELECT status FROM batchq.status") == "scheduled"
    site.do("retry", ask, id=batch_id)
    assert value(conn, "SELECT status FROM batchq.status") == "ready"
    for _ in range(2):
        answer = site.do("cancel", ask, id=batch_id, reason="enough")
        assert (answer.status_code, answer.headers["location"]) == (303, f"/batches/{batch_id}?said=cancel")
    assert "Done: cancel" in site.client.get(answer.headers["location"]).text
    assert "enough" in site.client.get("/audit").text
    site.do("retry_whole", ask, id=batch_id)
    noted = conn.execute("SELECT verb, reason, actor FROM batchq.audit ORDER BY id").fetchall()
    assert noted == [
        ("set_priority", "hurry", "ann"), ("move", None, "web"), ("snooze", None, "web"), ("retry", None, "web"),
        ("cancel", "enough", "web"), ("retry", None, "web"),
    ]  # fmt: skip


def test_queues_are_paused_and_resumed_and_workers_drained(conn: Conn, site: Site) -> None:
    insert(conn)
    worker(conn)
    site.do("pause", "?queue=default", queue="default", minutes=30)
    assert "until" in Reading(site.client.get("/").text).text
    site.do("resume", queue="default")
    assert values(conn, "SELECT queue FROM batchq.pauses") == []
    site.do("drain_worker", "?worker=host-1-abc", worker="host-1-abc")
    assert "draining" in site.client.get("/workers").text


def test_a_worker_without_a_heartbeat_is_last_seen_and_never_working(conn: Conn, site: Site) -> None:
    worker(conn)
    conn.execute("UPDATE batchq.workers SET heartbeat_at = now() - interval '12 seconds'")
    for path in ("/", "/workers"):
        text = Reading(site.client.get(path).text).text
        assert "last seen 12 s ago" in text or "last seen 13 s ago" in text
        assert "working" not in text.split()


def test_the_pages_of_limits_show_what_is_in_use_and_what_is_held_back(conn: Conn, site: Site) -> None:
    assert "Nothing is limited." in site.client.get("/limits").text
    insert(conn)
    conn.execute("SELECT batchq.set_limit('default', 'work', max_running => 10, per_second => 50)")
    conn.execute(
        "INSERT INTO batchq.limit_shares (queue, kind, worker, in_use, starts_per_second, lease_seconds, held_back_by) "
        "VALUES ('default', 'work', 'a', 3, 48, 15, 'max_running')"
    )
    conn.execute("SELECT batchq.throttle('default', 'work', 'acme', 90, 'worker-1')")
    shown = Reading(site.client.get("/limits").text).text
    for text in ("3 of 10", "48 of 50", "set", "max_running", "acme", "worker-1", "1 min 30 s"):
        assert text in shown, text
    assert "1 by max_running" in Reading(site.client.get("/").text).text


def test_a_limit_is_set_changed_and_removed_by_its_form(conn: Conn, site: Site) -> None:
    ask = "/limits/set?queue=mail&kind=send"

    def send(**fields: object) -> httpx.Response:
        return site.post("/limits/set", site.form_token(ask), queue="mail", kind="send", **fields)

    answer = send(max_running=5, per_second="2.5", reason="their API", actor="ann")
    assert (answer.status_code, answer.headers["location"]) == (303, "/limits?said=set_limit")
    assert "Done: change limit" in site.client.get(answer.headers["location"]).text
    step("the form has what is set, and what it leaves empty is removed")
    asked = site.client.get(ask).text
    assert ('name="max_running" value="5"' in asked, 'name="per_second" value="2.5"' in asked) == (True, True)
    send(max_running=7, burst_seconds=2)
    numbers = "SELECT queue, kind, max_running, per_second, burst_seconds FROM batchq.limits"
    assert conn.execute(numbers).fetchall() == [("mail", "send", 7, None, 2)]
    send(max_running=7, remove="yes")
    assert conn.execute(numbers).fetchall() == []
    noted = conn.execute("SELECT verb, queue, kind, reason, actor FROM batchq.audit ORDER BY id").fetchall()
    assert noted[0] == ("set_limit", "mail", "send", "their API", "ann")
    assert [row[4] for row in noted] == ["ann", "web", "web"]


def test_a_limit_that_cannot_be_set_is_said_and_the_form_keeps_what_was_written(conn: Conn, site: Site) -> None:
    problems: list[tuple[dict[str, object], str]] = [
        ({"queue": "mail"}, "give at least one number that limits something"),
        ({"queue": "mail", "burst_seconds": 3}, "give at least one number that limits something"),
        ({"max_running": 1}, "give the queue"),
        ({"queue": "mail", "max_running": -1}, "max_running must be a whole number"),
        ({"queue": "mail", "per_second": "nan"}, "per_second must be a number"),
        ({"queue": "mail", "per_second": 1, "burst_seconds": 0}, "burst_seconds must be a number from 0.001 to 3600"),
        ({"queue": "m" * 129, "max_running": 1}, "the name of a queue must have 1 to 128 bytes"),
    ]
    for fields, said in problems:
        answer = site.post("/limits/set", site.form_token("/limits/set"), **fields)
        assert (answer.status_code, said in unescape(answer.text)) == (409, True), (fields, answer.text)
        for name, text in fields.items():
            assert f'name="{name}" value="{text}"' in answer.text
    assert values(conn, "SELECT queue FROM batchq.limits") == []
    assert site.client.get("/limits/set?queue=a%00b").status_code == 200


def test_a_forged_form_sets_no_limit_and_a_read_only_page_has_none(conn: Conn, site: Site, dsn: str) -> None:
    form_token = site.form_token("/limits/set")
    data = {"queue": "mail", "max_running": "1"}
    for given, headers in ((form_token, {"Origin": "http://evil.example"}), ("0" * 64, {"Origin": site.url})):
        answer = site.client.post("/limits/set", data={**data, "form_token": given}, headers=headers)
        assert answer.status_code == 403
    with served(dsn, read_only=True) as read_only:
        assert read_only.client.get("/limits/set").status_code == 403
        shown = read_only.client.get("/limits")
        token = read_only.web.guard.sessions.form_token(read_only.client.cookies["batchq_session"])
        assert "No actions" in read_only.post("/limits/set", token, **data).text
        assert "/limits/set" not in shown.text
    assert values(conn, "SELECT queue FROM batchq.limits") == []


def test_a_throttle_is_ended_from_the_page(conn: Conn, site: Site) -> None:
    conn.execute("SELECT batchq.throttle('mail', 'send', 'acme', 90)")
    [address] = re.findall(r'href="(/verbs/end_throttle[^"]*)"', unescape(site.client.get("/limits").text))
    asked = site.client.get(address).text
    for name, text in (("queue", "mail"), ("kind", "send"), ("key", "acme")):
        assert f'name="{name}" value="{text}"' in asked
    site.do("end_throttle", queue="mail", kind="send", key="acme", reason="they recovered")
    assert values(conn, "SELECT key FROM batchq.throttles") == []
    assert values(conn, "SELECT reason FROM batchq.audit") == ["they recovered"]
    assert site.do("end_throttle", kind="send").status_code == 409


def test_what_cannot_be_done_is_said(conn: Conn, site: Site) -> None:
    done = finished(conn)
    problems = {
        ("retry", f"?id={done}"): ({"id": done}, "nothing in it is left to retry"),
        ("cancel", "?id=99"): ({"id": 99}, "not there any more"),
        ("cancel", "?id="): ({"id": "x"}, "whole number"),
        ("set_priority", "?id=1"): ({"id": done, "priority": 99_999}, "whole number"),
        ("snooze", "?id=1"): ({"id": done, "minutes": "soon"}, "whole number"),
        ("move", "?id=1"): ({"id": done, "to_queue": "x" * 129}, "128 bytes"),
        ("pause", ""): ({}, "takes a queue, a kind, or both"),
        ("drain_worker", ""): ({"worker": "nobody"}, "not there any more"),
    }
    for (verb, ask), (fields, said) in problems.items():
        answer = site.do(verb, ask, **fields)
        assert answer.status_code == 409, (verb, answer.text)
        assert said in answer.text
    assert site.client.get("/verbs/explode").status_code == 404


def test_a_role_that_may_only_look_looks_and_changes_nothing(
    conn: Conn, admin_dsn: str, dsn: str, database: str
) -> None:
    insert(conn)
    role = f"looker_{database}"[:63]
    grants = re.findall(r"^SELECT batchq.grant_duty.*;$", readers_sql(), re.MULTILINE)
    assert len(grants) == 1
    with psycopg.connect(admin_dsn, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'looks-only'").format(sql.Identifier(role)))
        try:
            for grant in grants:
                admin.execute(grant.replace("batchq_reader", role).encode())
            with served(psycopg.conninfo.make_conninfo(admin_dsn, user=role, password="looks-only")) as site:
                for path in LOOKED_AT:
                    assert site.client.get(path).status_code == 200, path
                answer = site.do("cancel", "?id=1", id=1)
                assert (answer.status_code, "may not do that" in answer.text) == (409, True)
                answer = go_on(site, ask_many(site, "cancel", all="yes"))
                assert (answer.status_code, "may not do that" in answer.text) == (409, True)
        finally:
            admin.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(role)))
            admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))
    assert value(conn, "SELECT status FROM batchq.all_batches") == "pending"


def readers_sql() -> str:
    """Return the SQL of docs/web.md that makes a role that may only look."""
    from pathlib import Path

    text = (Path(__file__).parents[2] / "docs" / "web.md").read_text(encoding="utf-8")
    found = re.search(r"```sql\n(CREATE ROLE batchq_reader.*?)```", text, re.DOTALL)
    assert found
    return found[1]


# ------------------------------------------------------------------------------------------- verbs for many


def ask_many(site: Site, verb: str, **fields: object) -> httpx.Response:
    """Send the form that asks for a filter; return the page that shows how many match."""
    return site.post(f"/bulk/{verb}", site.form_token(f"/bulk/{verb}"), **fields)


def hidden(answer: httpx.Response) -> dict[str, str]:
    """Return what the form of a page carries along."""
    return {
        name: unescape(text) for name, text in re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', answer.text)
    }


def go_on(site: Site, answer: httpx.Response) -> httpx.Response:
    """Press the button of a page that does a verb for many."""
    found = re.search(r'<form id="bulk-form" method="post" action="([^"]*)"', answer.text)
    assert found, answer.text
    assert "<button class" in answer.text.split("bulk-form")[1], "there is no button"
    return site.client.post(found[1], data=hidden(answer), headers={"Origin": site.url})


def to_the_end(site: Site, answer: httpx.Response) -> httpx.Response:
    """Press it until it is done."""
    while "The list</a>" not in answer.text:
        answer = go_on(site, answer)
        assert answer.status_code == 200, answer.text
    return answer


def said(answer: httpx.Response) -> str:
    """Return what a page says of a verb for many."""
    found = re.search(r'<p id="bulk-text"[^>]*>(.*?)</p>', answer.text, re.DOTALL)
    assert found, answer.text
    return Reading(found[1]).text


def cancelled(conn: Conn) -> int:
    """Return how many batches are cancelled."""
    return int(value(conn, "SELECT count(*) FROM batchq.all_batches WHERE status = 'cancelled'"))


def insert_many(conn: Conn, count: int, kind: str = "mail") -> None:
    """Insert batches."""
    conn.execute("INSERT INTO batchq.batches (kind) SELECT %s FROM generate_series(1, %s)", [kind, count])


def test_all_that_match_are_counted_first_and_then_done_in_chunks_and_stopping_leaves_the_rest(
    conn: Conn, site: Site
) -> None:
    insert_many(conn, 2500)
    other = insert(conn, kind="other")
    listed = site.client.get("/batches?kind=mail")
    [address] = [unescape(found) for found in re.findall(r'href="(/bulk/cancel[^"]*)"', listed.text)]
    assert 'name="kind" value="mail"' in site.client.get(address).text
    answer = ask_many(site, "cancel", kind="mail", reason="too many", actor="ann")
    assert said(answer).startswith("2,500 batches match and would be cancelled")
    step("counting has changed nothing; each press does a chunk")
    assert (cancelled(conn), values(conn, "SELECT verb FROM batchq.audit")) == (0, [])
    answer = go_on(site, answer)
    assert (said(answer), cancelled(conn)) == ("1,000 of 2,500 batches cancelled; 1,500 left.", 1000)
    assert re.search(r'<progress id="bulk-bar" max="2500" value="1000">', answer.text)
    step("whoever stops here leaves the rest; whoever goes on later does the rest")
    assert value(conn, "SELECT count(*) FROM batchq.all_batches WHERE kind = 'mail' AND status = 'pending'") == 1500
    answer = to_the_end(site, answer)
    assert (said(answer), cancelled(conn)) == ("2,500 batches cancelled.", 2500)
    assert value(conn, "SELECT status FROM batchq.all_batches WHERE id = %s", [other]) == "pending"
    noted = conn.execute("SELECT verb, batches, kind, reason, actor FROM batchq.audit").fetchall()
    assert noted == [("cancel", 2500, "mail", "too many", "ann")]
    step("the last form sent once more changes nothing")
    assert said(go_on_again(site, answer)) == "2,500 batches cancelled."


def go_on_again(site: Site, answer: httpx.Response) -> httpx.Response:
    """Send the form of a page that is done once more, as a browser does that reloads it."""
    return site.client.post("/bulk/cancel", data=hidden(answer), headers={"Origin": site.url})


def test_every_verb_can_be_done_to_all_that_match(conn: Conn, site: Site) -> None:
    insert_many(conn, 3)
    to_the_end(site, ask_many(site, "set_priority", kind="mail", priority=7))
    to_the_end(site, ask_many(site, "move", kind="mail", to_queue="bulk"))
    to_the_end(site, ask_many(site, "snooze", queue="bulk", minutes=60))
    assert conn.execute(
        "SELECT priority, queue, run_at > now() + interval '59 min' AND run_at < now() + interval '61 min', count(*) "
        "FROM batchq.all_batches GROUP BY 1, 2, 3"
    ).fetchall() == [(7, "bulk", True, 3)]
    assert said(ask_many(site, "move", kind="mail", to_queue="bulk")) == "No batch matches: nothing would be moved."
    to_the_end(site, ask_many(site, "cancel", all="yes", status="pending"))
    to_the_end(site, ask_many(site, "retry", kind="mail", status="cancelled"))
    assert values(conn, "SELECT DISTINCT status FROM batchq.status") == ["ready"]
    done = finished(conn)
    to_the_end(site, ask_many(site, "retry_whole", kind="work", status="completed"))
    assert value(conn, "SELECT status FROM batchq.all_batches WHERE id = %s", [done]) == "pending"
    taken = processing(conn, kind="list", items=[1, 2])
    checkpoint(conn, taken, Progress(1, 1, [failure(0)], first_index=0))
    conn.execute("SELECT batchq.cancel(%s)", [taken.id])
    to_the_end(site, ask_many(site, "retry_items", kind="list", status="cancelled"))
    assert value(conn, "SELECT status FROM batchq.all_batches WHERE id = %s", [taken.id]) == "pending"
    verbs = values(conn, "SELECT verb FROM batchq.audit WHERE batch_id IS NULL ORDER BY id")
    assert verbs == ["set_priority", "move", "snooze", "cancel", "retry", "retry", "retry_items"]


def test_the_filters_of_many_match_what_the_list_shows(conn: Conn, site: Site) -> None:
    for error in ("50% off_by one", "50x off-by one", "50% offxby one"):
        finished(conn, "failed", error=f'{{"error": "{error}"}}')
    begins = {0: "No batch", 1: "1 batch matches", 2: "2 batches match", 3: "3 batches match"}
    for error, count in {"50%": 2, "OFF_BY": 1, "off": 3, "\\": 0}.items():
        assert len(ids_of(site.client.get("/batches", params={"error": error}))) == count, error
        assert said(ask_many(site, "retry", error=error)).startswith(begins[count]), error
    conn.execute("UPDATE batchq.batches_finished SET finished_at = now() - interval '3 h' WHERE id = 1")
    assert said(ask_many(site, "retry", older="2h")).startswith("1 batch matches")
    step("a finer status of the list is told to be wider")
    ask = site.client.get("/bulk/cancel?status=ready&kind=mail").text
    assert "The list shows only batches that are ready. This applies to all that are pending." in ask
    assert '<option value="pending" selected>' in ask
    step("only verbs that take what the list shows are offered")
    offered = re.findall(r'href="/bulk/(\w+)\?', site.client.get("/batches?status=completed").text)
    assert offered == ["retry", "retry_items", "retry_whole"]


def test_what_is_left_out_is_told(conn: Conn, admin_dsn: str, site: Site) -> None:
    for _ in range(2):
        finished(conn, "failed", error='{"error": "no"}', kind="mail", unique_key=None)
    keyed = finished(conn, "failed", error='{"error": "no"}', kind="mail", unique_key="a")
    insert(conn, kind="mail", unique_key="a")
    answer = to_the_end(site, ask_many(site, "retry", kind="mail"))
    assert said(answer) == ("2 batches made pending again. 1 left unchanged: 1 with the unique_key of a live batch.")
    assert value(conn, "SELECT status FROM batchq.all_batches WHERE id = %s", [keyed]) == "failed"


def test_what_fails_again_meanwhile_is_not_retried_for_ever(conn: Conn, site: Site) -> None:
    def fail(count: int) -> None:
        conn.execute(
            "INSERT INTO batchq.batches (kind, status, finished_at) "
            "SELECT 'mail', 'failed', clock_timestamp() FROM generate_series(1, %s)",
            [count],
        )

    fail(1500)
    answer = go_on(site, ask_many(site, "retry", kind="mail"))
    assert said(answer) == "1,000 of 1,500 batches made pending again; 500 left."
    fail(5000)
    answer = go_on(site, answer)
    assert said(answer) == "1,500 batches made pending again."
    assert "The list</a>" in answer.text, "it goes on"


def test_many_that_fail_again_at_once_are_retried_once_though_one_is_left_out(conn: Conn, site: Site) -> None:
    conn.execute(
        "INSERT INTO batchq.batches (kind, status, finished_at) "
        "SELECT 'mail', 'failed', now() FROM generate_series(1, 1500)"
    )
    finished(conn, "failed", kind="mail", unique_key="a")
    insert(conn, kind="mail", unique_key="a", run_at="2100-01-01")
    answer = ask_many(site, "retry", kind="mail")
    while "<button class" in answer.text.split("bulk-form")[1]:
        answer = go_on(site, answer)
        token = uuid4()
        if ready := claim(conn, 5000, kinds=["mail"], token=token):
            finish(conn, *(Finish(taken.id, token, "failed", error='{"error": "again"}') for taken in ready))
    assert said(answer) == (
        "1,500 batches made pending again. 1 left unchanged: 1 with the unique_key of a live batch."
    )
    assert value(conn, "SELECT batches FROM batchq.audit") == 1500


def test_what_many_cannot_be_done_to_is_said(conn: Conn, site: Site) -> None:
    insert(conn)
    problems: dict[tuple[str, str], dict[str, object]] = {
        ("cancel", "no batches selected"): {},
        ("cancel", "does not apply to batches that are failed"): {"kind": "work", "status": "failed"},
        ("set_priority", "whole number"): {"kind": "work", "priority": 99_999},
        ("snooze", "whole number"): {"kind": "work", "minutes": "soon"},
        ("move", "128 bytes"): {"kind": "work", "to_queue": ""},
        ("retry", "must be a length of time"): {"older": "soon"},
    }
    for (verb, text), fields in problems.items():
        answer = ask_many(site, verb, **fields)
        assert (answer.status_code, text in answer.text) == (409, True), (verb, answer.text)
    for path in ("/bulk/pause", "/bulk/drain_worker", "/bulk/explode"):
        assert site.client.get(path).status_code == 404, path
        assert site.post(path, site.form_token("/bulk/cancel"), kind="work").status_code == 404, path
    assert values(conn, "SELECT verb FROM batchq.audit") == []


def test_a_forged_form_for_many_is_refused(conn: Conn, site: Site) -> None:
    insert_many(conn, 5)
    insert_many(conn, 5, kind="other")
    answer = ask_many(site, "cancel", kind="mail")
    fields = hidden(answer)
    wider = fields["job"].replace('"mail"', '"other"')
    assert wider != fields["job"]
    forged: list[tuple[dict[str, str], dict[str, str]]] = [
        (fields | {"job": wider}, {"Origin": site.url}),
        (fields | {"job": fields["job"].replace('"audit_id": null', '"audit_id": 1')}, {"Origin": site.url}),
        (fields | {"seal": ""}, {"Origin": site.url}),
        (fields | {"seal": "0" * 64}, {"Origin": site.url}),
        (fields | {"job": "{}"}, {"Origin": site.url}),
        (fields | {"form_token": ""}, {"Origin": site.url}),
        (fields, {"Origin": "http://evil.example"}),
        (fields, {}),
    ]
    for data, headers in forged:
        assert site.client.post("/bulk/cancel", data=data, headers=headers).status_code == 403, (data, headers)
    with site.new_client() as other:
        step("a form that another session was sent")
        token = site.form_token("/bulk/cancel", other)
        stolen = fields | {"form_token": token}
        assert other.post("/bulk/cancel", data=stolen, headers={"Origin": site.url}).status_code == 403
    assert (cancelled(conn), values(conn, "SELECT verb FROM batchq.audit")) == (0, [])
    assert said(go_on(site, answer)) == "5 batches cancelled."


def test_read_only_refuses_verbs_for_many(conn: Conn, dsn: str) -> None:
    insert_many(conn, 5)
    with served(dsn) as open_site, served(dsn, read_only=True) as site:
        assert "/bulk/" in open_site.client.get("/batches?kind=mail").text
        assert "/bulk/" not in site.client.get("/batches?kind=mail").text
        form_token = site.web.guard.sessions.form_token(site.client.cookies["batchq_session"])
        assert site.client.get("/bulk/cancel?kind=mail").status_code == 403
        assert site.post("/bulk/cancel", form_token, kind="mail").status_code == 403
        assert site.post("/bulk/cancel", form_token, job="{}", seal="x").status_code == 403
    assert cancelled(conn) == 0


def test_hostile_filters_of_many_are_shown_as_text(conn: Conn, site: Site) -> None:
    hostile = HOSTILE.replace("\x1b", "")
    insert(conn, kind=hostile, queue=hostile)
    fields = {"kind": hostile, "queue": hostile, "reason": hostile, "actor": hostile}
    counted = ask_many(site, "cancel", **fields)
    assert said(counted).startswith("1 batch matches")
    refused = ask_many(site, "cancel", **fields, error=hostile, older=hostile)
    asked = site.client.get("/bulk/cancel", params=fields)
    done = go_on(site, counted)
    assert cancelled(conn) == 1
    for answer in (counted, refused, asked, done):
        page = Reading(answer.text)
        assert "img" not in page.tags
        assert re.findall(r'<script(?! src="/static/[a-z]+\.js" defer></script>)', answer.text) == []
        assert [name for name, _ in page.attributes if name.startswith("on")] == []
        assert "<script>alert(1)" not in answer.text
    for answer in (counted, done):
        assert SHOWN.replace("⟨U+001B⟩", "") in Reading(answer.text).text


def test_a_chunk_that_meets_a_lock_can_be_tried_again(conn: Conn, admin_dsn: str, dsn: str) -> None:
    insert_many(conn, 5)
    with served(dsn, read_seconds=5.0) as site:
        answer = ask_many(site, "cancel", kind="mail")
        with locked(admin_dsn):
            late = go_on(site, answer)
            assert (late.status_code, "try again" in late.text) == (503, True)
        assert said(go_on(site, late)) == "5 batches cancelled."


# ------------------------------------------------------------------------------------------- what it costs


@contextmanager
def locked(admin_dsn: str) -> Iterator[None]:
    """Lock the batches, so that every read of them waits."""
    with psycopg.connect(admin_dsn) as locker:
        locker.execute("LOCK TABLE batchq.batches IN ACCESS EXCLUSIVE MODE")
        yield


def test_reads_are_read_only_and_end_within_their_time(conn: Conn, admin_dsn: str, dsn: str) -> None:
    insert(conn)
    with served(dsn, read_seconds=1.0) as site:
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            site.web.reader.ask(lambda its: its.execute("DELETE FROM batchq.batches"))
        with locked(admin_dsn):
            answer = site.client.get("/batches")
            assert answer.status_code in (503, 504)
            assert answer.elapsed.total_seconds() < 15
        assert site.client.get("/batches").status_code == 200


def test_many_viewers_cost_one_query(conn: Conn, site: Site) -> None:
    batch_id = insert(conn, kind="watched")
    live = site.web.live
    with ExitStack() as stack:
        viewers = [Viewer(site, f"/live/batch/{batch_id}", stack) for _ in range(10)]
        wait_until(lambda: all("ready" in one.text for one in viewers), 30, "all to see the batch")
        assert len(live.watched) == 1
        page = live.watched[f"/batch/{batch_id}"]
        before = page.reads
        conn.execute("SELECT batchq.cancel(%s)", [batch_id])
        wait_until(lambda: all("cancelled" in one.text for one in viewers), 30, "all to see the change")
        step("%s reads for 10 viewers", page.reads - before)
        assert len({one.text[-500:] for one in viewers}) == 1
    wait_until(lambda: not live.watched, 60, "nobody to watch")
    step("nothing is read when nobody watches")
    assert page.task
    wait_until(page.task.done, 10, "the task to end")


class Viewer:
    """Somebody who watches a live page, in a thread, until the stack is closed."""

    def __init__(self, site: Site, path: str, stack: ExitStack) -> None:
        self.text = ""
        self.client = stack.enter_context(site.new_client())
        self.answer = stack.enter_context(self.client.stream("GET", path))
        assert self.answer.headers["content-type"].startswith("text/event-stream")
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()
        stack.callback(self.hang_up)

    def read(self) -> None:
        try:
            for piece in self.answer.iter_text():
                self.text += piece
        except (httpx.HTTPError, httpx.StreamError):
            pass

    def hang_up(self) -> None:
        """Close the connection as a browser does that goes away."""
        stream: Any = self.answer.extensions["network_stream"]
        stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
        self.thread.join(10)


def test_a_watched_page_costs_a_hundredth_of_a_connections_time() -> None:
    live = Live()
    assert [live.rest_seconds(spent) for spent in (0.001, 0.05, 3.0)] == [1.5, 5.0, 10.0]
    step("and ten that are watched cost a fiftieth in all")
    live.watched = {str(number): LivePart(str) for number in range(10)}
    assert [live.rest_seconds(spent) for spent in (0.001, 0.01, 3.0)] == [1.5, 5.0, 10.0]


def test_live_parts_of_what_is_not_there_are_not_found(site: Site) -> None:
    for name in ("batch/7", "batch/x", "nothing", "batch/"):
        assert site.client.get(f"/live/{name}").status_code == 404, name
    assert site.web.live.watched == {}


def test_a_page_says_when_the_database_is_away(conn: Conn, site: Site, crash_server: Any) -> None:
    assert site.client.get("/readyz").status_code == 200
    crash_server()
    wait_until(lambda: site.client.get("/readyz").status_code == 200, 60, "the web UI to find the database again")
    assert site.client.get("/").status_code == 200


if __name__ == "__main__":
    run_alone(__file__)
