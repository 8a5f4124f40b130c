"""Attacks on a mounted web UI, and on who one is: forged names, people who may look only, odd prefixes."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Mount

from batchq.web import WebApp
from tests.component.rows import Conn, insert, values
from tests.support.alone import run_alone
from tests.support.web import PASSWORD, READ_SECONDS, hosted, served
from tests.support.wire import exchange, request, status_of

PREFIX = "/queue"
USER = "X-Forwarded-User"
TOKEN = "a-token-for-programs"
WEB: list[WebApp] = []
ACTIONS = {
    "/verbs/cancel": {"id": "1"},
    "/verbs/pause": {"queue": "default"},
    "/verbs/drain_worker": {"worker": "host-1"},
    "/bulk/cancel": {"kind": "work"},
    "/chosen/cancel": {"ids": "1", "back": ""},
    "/batches/1/copy": {"payload": "{}", "priority": "0", "delay": "0"},
    "/limits/set": {"queue": "mail", "max_running": "1"},
    "/schedules/set": {"name": "a", "cron": "0 2 * * *", "kind": "a"},
    "/schedules/run": {"name": "nightly"},
    "/schedules/remove": {"name": "nightly"},
}


def client_of(url: str, **headers: str) -> httpx.Client:
    """Return a client that behaves as a browser of somebody."""
    own = {"Accept": "text/html", "Origin": url} | headers
    return httpx.Client(base_url=url, headers=own, timeout=READ_SECONDS, trust_env=False)


def token_on(html: str) -> str:
    """Return the token of the first form on a page."""
    found = re.search(r'name="form_token" value="(\w+)"', html)
    assert found
    return found[1]


def token_of(guest: httpx.Client) -> str:
    """Return the token that a form for this session and name must carry, though no page shows the guest one: the
    attacker is given it."""
    guest.get(f"{PREFIX}/")
    [session] = [cookie.value for cookie in guest.cookies.jar]
    return WEB[-1]._web.guard.sessions.form_token(session or "", guest.headers["X-Test-User"])


def by_header(dsn: str, **options: Any) -> Starlette:
    """Return an application whose log-in is a header of the test's, in which the guests may look only."""

    def user_of(asked: Request) -> str | None:
        return asked.headers.get("x-test-user")

    options = {"may_act": lambda asked: not user_of(asked).startswith("guest"), **options}  # type: ignore[union-attr]
    WEB.append(WebApp(dsn, user_of=user_of, **options))
    return Starlette(routes=[Mount(PREFIX, WEB[-1])])


@pytest.fixture
def url(conn: Conn, dsn: str) -> Iterator[str]:
    """Serve that application."""
    insert(conn)
    conn.execute("SELECT batchq.set_schedule('nightly', '0 2 * * *', 'send_receipt', actor => 'setup')")
    with hosted(by_header(dsn)) as url:
        yield url


def done_by(conn: Conn) -> list[Any]:
    """Return who has done something, besides the fixture."""
    return values(conn, "SELECT DISTINCT actor FROM batchq.audit WHERE actor <> 'setup'")


# ------------------------------------------------------------------------------------------------------ forged names


@pytest.mark.parametrize("proxies", ["10.9.9.9", "10.0.0.0/8, ::1"])
def test_a_name_from_a_client_that_is_no_proxy(conn: Conn, dsn: str, proxies: str) -> None:
    """As a stranger, and as a program with the token, who send the proxy's header themselves."""
    insert(conn)
    with served(dsn, user_header=USER, proxies=proxies, token=TOKEN) as site:
        with site.new_client(**{USER: "ann", "X-Forwarded-For": "10.9.9.9"}) as stranger:
            for path in ("/", "/batches/1", "/metrics", "/live/overview"):
                assert stranger.get(path).status_code == 401
            assert "batch" not in stranger.get("/login").headers.get("location", "")
        with site.new_client(Authorization=f"Bearer {TOKEN}", **{USER: "ann"}) as program:
            token = site.form_token("/verbs/cancel?id=1", program)
            assert site.post("/verbs/cancel", token, program, id=1, actor="ann").status_code == 303
    assert done_by(conn) == ["token"]


def test_a_name_that_a_client_adds_to_the_proxys(dsn: str) -> None:
    """As a client of a proxy that appends the header instead of replacing it: two names are none."""
    with served(dsn, user_header=USER, proxies="127.0.0.1") as site:
        for names in (["ann", "mallory"], ["mallory", "mallory"], [""]):
            assert site.client.get("/", headers=[(USER, name) for name in names]).status_code == 401, names
        for raw in (b"a\xe2\x80\xaeb", b"x" * 201, b"tab\there", b"\xc2\x85"):
            assert site.client.get("/", headers=[(USER.encode(), raw)]).status_code == 401, raw
        page = site.client.get("/", headers=[(USER.encode(), "<b>Zoë</b>".encode())]).text
        assert "&lt;b&gt;Zoë&lt;/b&gt;" in page
        for other in ("X_Forwarded_User", "X-Forwarded-Users"):
            assert site.client.get("/", headers={other: "ann"}).status_code == 401


def test_a_form_in_which_the_actor_is_forged(conn: Conn, url: str) -> None:
    """As Ann, who wants Bob to be blamed: by the field, twice, in the address, and in a sealed job."""
    with client_of(url, **{"X-Test-User": "ann"}) as ann:
        page = ann.get(f"{PREFIX}/verbs/pause?queue=default&actor=bob").text
        assert "bob" not in page
        for body in ("actor=bob", "actor=&actor=bob", "ACTOR=bob&actor=bob"):
            sent = f"form_token={token_on(page)}&queue=default&reason=x&{body}"
            kind = {"Content-Type": "application/x-www-form-urlencoded"}
            assert ann.post(f"{PREFIX}/verbs/pause?actor=bob", content=sent, headers=kind).status_code == 303
        counted = ann.post(f"{PREFIX}/bulk/cancel", data={"form_token": token_on(page), "kind": "work"}).text
        fields = dict(re.findall(r'name="(job|seal)" value="([^"]*)"', counted))
        job = fields["job"].replace("&#34;", '"').replace("&quot;", '"')
        assert '"actor": "ann"' in job
        forged = {"form_token": token_on(page), "job": job.replace('"ann"', '"bob"'), "seal": fields["seal"]}
        assert ann.post(f"{PREFIX}/bulk/cancel", data=forged).status_code == 403
    assert done_by(conn) == ["ann"]


def test_a_form_of_one_person_sent_as_another(conn: Conn, url: str) -> None:
    """As Mallory, who has Bob's browser send the form and the job that were made for Mallory."""
    with client_of(url, **{"X-Test-User": "mallory"}) as browser:
        form = token_on(browser.get(f"{PREFIX}/verbs/pause?queue=default").text)
        counted = browser.post(f"{PREFIX}/bulk/cancel", data={"form_token": form, "kind": "work"}).text
        fields = dict(re.findall(r'name="(job|seal)" value="([^"]*)"', counted))
        job = fields["job"].replace("&#34;", '"')
        browser.headers["X-Test-User"] = "bob"
        assert browser.post(f"{PREFIX}/verbs/pause", data={"form_token": form, "queue": "default"}).status_code == 403
        own = token_on(browser.get(f"{PREFIX}/verbs/pause?queue=default").text)
        sent = {"form_token": own, "job": job, "seal": fields["seal"]}
        assert browser.post(f"{PREFIX}/bulk/cancel", data=sent).status_code == 403
    assert done_by(conn) == []


# ------------------------------------------------------------------------------------------------ people who may look


def test_a_person_who_may_look_only_posts_every_action(conn: Conn, url: str) -> None:
    """As a guest with a valid form token and session, at every form that changes something, and by odd addresses."""
    before = values(conn, "SELECT id FROM batchq.audit")
    with client_of(url, **{"X-Test-User": "guest-1"}) as guest:
        token = token_of(guest)
        for path, fields in ACTIONS.items():
            assert guest.get(PREFIX + path).status_code in (403, 404, 405), path
            for form in (token, "0" * 64):
                answer = guest.post(PREFIX + path, data={**fields, "form_token": form})
                assert (answer.status_code, "No actions" in answer.text) == (403, True), path
        for path in (
            "/logout/../verbs/pause",
            "/logout%2f..%2fverbs%2fpause",
            "//logout",
            "/verbs/pause/",
            "/static/../verbs/pause",
        ):
            raw = request(PREFIX + path, url[7:], "POST", b"queue=default", Origin=url, X_Test_User="guest-1")
            assert status_of(exchange(int(url.rpartition(":")[2]), raw)) in (403, 404, 405), path
    assert values(conn, "SELECT id FROM batchq.audit") == before


def test_a_guest_with_the_form_of_a_person_who_may_act(conn: Conn, dsn: str) -> None:
    """As somebody who may look only, by the second password, with a token that is valid for that session."""
    insert(conn)
    with served(dsn, password=PASSWORD, read_only_password="only looking around") as site:
        assert site.log_in("only looking around").status_code == 303
        token = site.form_token("/")
        for path, fields in ACTIONS.items():
            assert site.post(path, token, **fields).status_code == 403, path
        with site.new_client(Authorization="Bearer only looking around") as program:
            assert program.get("/").status_code == 200
            form = site.web.guard.sessions.form_token(program.cookies["batchq_session"])
            assert site.post("/verbs/cancel", form, program, id=1).status_code == 403
        forged = site.client.cookies["batchq_session"].replace(".1.", ".2.")
        with site.new_client(Cookie=f"batchq_session={forged}") as forger:
            assert forger.get("/").status_code in (303, 401)
    assert values(conn, "SELECT verb FROM batchq.audit") == []


def test_guesses_of_the_second_password_are_throttled(dsn: str) -> None:
    """As a stranger who guesses the password of those who may look only."""
    with served(dsn, read_only_password="only looking around") as site:
        codes = [site.log_in(f"guess {number}").status_code for number in range(6)]
        assert codes[:3] == [401] * 3
        assert 429 in codes
        assert site.log_in("only looking around").status_code == 303


# --------------------------------------------------------------------------------------------- strangers, other sites


def test_strangers_at_a_mounted_page(conn: Conn, url: str) -> None:
    """As somebody whom the application does not know, at every address."""
    with client_of(url) as stranger:
        stranger.headers.pop("X-Test-User", None)
        for path in (
            "/",
            "/batches/1",
            "/live/overview",
            "/metrics",
            "/readyz",
            "/static/live.js",
            "/login",
            "/nothing",
        ):
            answer = stranger.get(PREFIX + path)
            assert (answer.status_code, answer.text) == (403, "log in to the application first\n"), path
        for path, fields in {**ACTIONS, "/login": {"password": ""}, "/logout": {}}.items():
            assert stranger.post(PREFIX + path, data=fields).status_code == 403, path
        assert stranger.get(f"{PREFIX}/", headers={"Authorization": "Bearer"}).status_code == 403
    with client_of(url, **{"X-Test-User": "ann"}) as ann:
        assert ann.post(f"{PREFIX}/login", data={"password": ""}).status_code == 404
    assert done_by(conn) == []


def test_forms_from_another_site_and_pages_in_a_frame(conn: Conn, url: str) -> None:
    """As another site, whose page the browser of somebody who may act has open."""
    with client_of(url, **{"X-Test-User": "ann"}) as ann:
        page = ann.get(f"{PREFIX}/verbs/cancel?id=1")
        fields = {"id": "1", "form_token": token_on(page.text)}
        for origin in ("https://evil.example", "null", f"{url}.evil.example", ""):
            answer = ann.post(f"{PREFIX}/verbs/cancel", data=fields, headers={"Origin": origin})
            assert answer.status_code == 403, origin
        cross = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
        assert "Cancel" not in ann.get(f"{PREFIX}/verbs/cancel?id=1", headers=cross).text
        assert "form-action 'self'" in page.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
        assert page.headers["x-frame-options"] == "DENY"
        no_cookie = {"Cookie": "batchq_session=x; batchq_session_0=y"}
        ann.cookies.clear()
        assert ann.post(f"{PREFIX}/verbs/cancel", data=fields, headers=no_cookie).status_code == 403
    assert done_by(conn) == []


def test_host_names_where_the_application_leaves_them_to_the_web_ui(conn: Conn, dsn: str) -> None:
    """As a site whose name was made to resolve to the application (DNS rebinding)."""
    with hosted(by_header(dsn, hosts="jobs.example.com")) as url:
        for host, code in (("evil.example", 421), ("jobs.example.com", 200), ("jobs.example.com.evil.example", 421)):
            with client_of(url, **{"X-Test-User": "ann", "Host": host}) as client:
                assert client.get(f"{PREFIX}/").status_code == code


# ------------------------------------------------------------------------------------ addresses that lead elsewhere


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "evil.example:80"])
def test_a_login_address_never_leads_to_another_site(conn: Conn, dsn: str, host: str) -> None:
    """As the author of a link to the application that shall lead to another site after the log-in."""
    root = Starlette(routes=[Mount("", WebApp(dsn, user_of=lambda _: None, login_url="/login"))])
    with hosted(root) as url:
        port = int(url.rpartition(":")[2])
        for path in ("//evil.example/", "///evil.example", "/%2fevil.example", "/%5cevil.example", "/\\evil.example",
                     "/..//evil.example", "/%0d%0aSet-Cookie:%20a=b", "/a?next=//evil.example"):  # fmt: skip
            answer = exchange(port, request(path, host, Accept="text/html")).decode("latin-1")
            head = answer.partition("\r\n\r\n")[0].lower()
            location = next(
                (line for line in head.split("\r\n") if line.startswith("location:")), "location: /login?next=%2f"
            )
            assert location.startswith("location: /login?next=%2f"), (path, location)
            rest = location.removeprefix("location: /login?next=%2f")
            assert not rest.startswith(("%2f", "%5c", "/", "\\")), (path, location)
            assert "set-cookie: a=b" not in head


@pytest.mark.parametrize("route", ["/{anything:path}/queue", "/{tenant}/queue"])
def test_a_prefix_that_a_visitor_chooses(conn: Conn, dsn: str, route: str) -> None:
    """As the author of a link, where the application mounts the web UI below a part that anybody may choose."""
    app = Starlette(routes=[Mount(route, WebApp(dsn, user_of=lambda _: "ann"))])
    with hosted(app) as url:
        port = int(url.rpartition(":")[2])
        for tenant in ("/evil.example", "\\evil.example", "%5cevil.example", "..", ".", "a/../b", "%0d%0ax", "a//b"):
            answer = exchange(port, request(f"/{tenant}/queue/batches?id=1", url[7:], Accept="text/html"))
            assert status_of(answer) in (400, 404), (tenant, answer[:200])
        for tenant, shown in (
            ("%22%3E%3Cscript%3E", "/%22%3E%3Cscript%3E/queue"),
            ("a;b%20c", "/a%3Bb%20c/queue"),
            ("%C3%A9", "/%C3%A9/queue"),
        ):
            answer = exchange(port, request(f"/{tenant}/queue/", url[7:], Accept="text/html")).decode()
            assert status_of(answer.encode()) == 200
            assert f'href="{shown}/batches"' in answer
            assert "<script>" not in answer
            [path] = re.findall(
                r"(?i)set-cookie: batchq_session_\w+=[^;]+; HttpOnly; SameSite=Strict; Path=([^;]+);", answer
            )
            assert path == shown


def test_odd_paths_reach_no_page_without_the_password(dsn: str) -> None:
    """As a stranger who writes the open addresses, or the prefix, in other ways."""
    with served(dsn, password=PASSWORD, root_path=PREFIX) as site:
        for path in ("/static/style.css/../../batches", "/login/../batches", "/login%2f..%2fbatches", "//login",
                     "/queue//batches", "/queue/queue/batches", "/queue/login/", "/queue%2fbatches", "/%71ueue/batches",
                     "/queue/static/style.css%00", "/queue/./batches", "/queue;/batches", "/batches;/login",
                     "/queue/batches#/login"):  # fmt: skip
            answer = exchange(site.port, request(path, f"127.0.0.1:{site.port}"))
            assert status_of(answer) in (303, 400, 401, 404), (path, answer[:100])
            assert b"Batches" not in answer


def test_two_mounts_and_their_neighbours_do_not_meet(conn: Conn, dsn: str) -> None:
    """As a browser that has a page of each open: at the top, below it, and below that."""
    insert(conn)
    names = ("/a/b", "/a", "")
    apps = [Mount(name, WebApp(dsn, user_of=lambda _: "ann")) for name in names]
    with hosted(Starlette(routes=apps)) as url, client_of(url) as client:
        forms = {name: token_on(client.get(f"{name}/verbs/pause?queue=default").text) for name in names}
        assert len({(cookie.name, cookie.path) for cookie in client.cookies.jar}) == 3
        assert {cookie.path for cookie in client.cookies.jar} == {"/a/b", "/a", "/"}
        for name, form in forms.items():
            again = token_on(client.get(f"{name}/verbs/pause?queue=default").text)
            assert again == form, "its session has stayed"
            for other in names:
                code = client.post(f"{other}/verbs/pause", data={"queue": "default", "form_token": form}).status_code
                assert code == (303 if other == name else 403)


if __name__ == "__main__":
    run_alone(__file__)
