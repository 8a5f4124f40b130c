"""The web UI below prefixes, who sends a request, and the life of a mounted one: connections, streams, processes."""

import asyncio
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

import batchq.web
from batchq.errors import ConfigError
from batchq.web import WebApp
from batchq.web.server import Web
from batchq.web.settings import WebSettings
from batchq.web.view import place_of
from tests.component.rows import Conn, insert, value, values
from tests.support.alone import run_alone
from tests.support.pages import addresses, set_everything
from tests.support.web import READ_SECONDS, hosted, served

PREFIX = "/queue"
ADDRESS = re.compile(r'(?:href|src|action|formaction|data-live)="([^"]*)"')
Served = Callable[[str], AbstractContextManager[str]]


async def ann(_: Request) -> str:
    """Everybody is Ann."""
    return "Ann"


def client_of(url: str, **headers: str) -> httpx.Client:
    """Return a client that behaves as a browser."""
    own = {"Accept": "text/html", "Origin": url} | headers
    return httpx.Client(base_url=url, headers=own, timeout=READ_SECONDS, trust_env=False)


def form_token(client: httpx.Client, path: str) -> str:
    """Return the token of the form on a page."""
    found = re.search(r'name="form_token" value="(\w+)"', client.get(path).text)
    assert found, f"no form on {path}"
    return found[1]


def do(client: httpx.Client, path: str, **fields: Any) -> httpx.Response:
    """Send the form of a page that asks, at the same address."""
    token = form_token(client, path)
    return client.post(path, data={name: str(text) for name, text in fields.items()} | {"form_token": token})


def mounted(web: WebApp) -> Starlette:
    """Return an application with the web UI."""
    return Starlette(routes=[Mount(PREFIX, web), Route("/", lambda _: PlainTextResponse("the application"))])


# ----------------------------------------------------------------------------------------------- every address is right


@contextmanager
def in_starlette(dsn: str) -> Iterator[str]:
    """Serve a Starlette application that has the web UI."""
    web = WebApp(dsn, user_of=ann)
    with hosted(mounted(web)) as url:
        yield url


@contextmanager
def in_fastapi(dsn: str, *, strips: bool) -> Iterator[str]:
    """Serve a FastAPI application that has the web UI, by a server that knows of the prefix of the application."""
    web = WebApp(dsn, user_of=ann)
    api = FastAPI(lifespan=web.lifespan)
    api.mount(PREFIX, web)
    with hosted(proxy(api, "/api", strips=strips, root_path="/api")) as url:
        yield url


@contextmanager
def behind(dsn: str, *, strips: bool) -> Iterator[str]:
    """Serve `batchq web --root-path`, behind a proxy that has it below the prefix."""
    web = Web(dsn, WebSettings.load(root_path=PREFIX))
    with hosted(proxy(web.guard, PREFIX, strips=strips)) as url:
        yield url


def proxy(inner: Any, prefix: str, *, strips: bool, root_path: str = "") -> Any:
    """Return what a proxy makes of an application: one that is reached below a prefix only. root_path: its server's."""

    async def pass_on(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await inner(scope, receive, send)
            return
        path = scope["path"]
        if not path.startswith(f"{prefix}/"):
            await PlainTextResponse("another application", 404)(scope, receive, send)
            return
        path = path.removeprefix(prefix) if strips else path
        await inner({**scope, "path": path, "root_path": root_path}, receive, send)

    return pass_on


SERVED: dict[str, tuple[str, Served]] = {
    "Starlette": (PREFIX, in_starlette),
    "FastAPI below a prefix": (f"/api{PREFIX}", lambda dsn: in_fastapi(dsn, strips=False)),
    "FastAPI below a prefix that is stripped": (f"/api{PREFIX}", lambda dsn: in_fastapi(dsn, strips=True)),
    "a proxy that strips the prefix": (PREFIX, lambda dsn: behind(dsn, strips=True)),
    "a proxy that does not": (PREFIX, lambda dsn: behind(dsn, strips=False)),
}


def test_every_address_is_right_where_a_proxy_strips_a_prefix_before_the_mount(conn: Conn, dsn: str) -> None:
    first = set_everything(conn)
    prefix = f"/api{PREFIX}"
    with in_fastapi(dsn, strips=True) as url, client_of(url) as client:
        assert len(addresses(client, first, prefix)) > 15


@pytest.mark.parametrize(("prefix", "serve"), SERVED.values(), ids=SERVED)
def test_what_a_form_does_leads_back_below_the_prefix(conn: Conn, dsn: str, prefix: str, serve: Served) -> None:
    batch_id = insert(conn)
    with serve(dsn) as url, client_of(url) as client:
        answer = do(client, f"{prefix}/verbs/cancel?id={batch_id}", id=batch_id)
        assert answer.status_code == 303, answer.text
        assert answer.headers["location"] == f"{prefix}/batches/{batch_id}?said=cancel"
        assert client.get(f"{prefix}/batches", params={"id": batch_id}).headers["location"].startswith(f"{prefix}/")
        for path in ("/", "/batches", "/limits", f"/batches/{batch_id}"):
            page = client.get(prefix + path)
            assert page.status_code == 200
            assert [one for one in ADDRESS.findall(page.text) if not one.startswith((f"{prefix}/", "#"))] == []
        cookies = {cookie.name: cookie.path for cookie in client.cookies.jar}
    assert set(cookies.values()) == {prefix}
    assert value(conn, "SELECT status FROM batchq.batches_finished") == "cancelled"


def test_the_prefix_without_a_slash_is_the_first_page(dsn: str) -> None:
    with served(dsn, root_path=PREFIX) as site:
        page = site.client.get(PREFIX)
        assert (page.status_code, f'href="{PREFIX}/batches"' in page.text) == (200, True)
    with in_starlette(dsn) as url, client_of(url) as client:
        assert urlsplit(client.get(PREFIX).headers["location"]).path == f"{PREFIX}/"


def test_where_a_request_is() -> None:
    def place(path: str, root_path: str = "", app_root_path: str = "", setting: str = "") -> tuple[str, str]:
        return place_of({"path": path, "root_path": root_path, "app_root_path": app_root_path}, setting)

    assert place("/batches/5") == ("", "/batches/5")
    assert place("/queue/batches/5", "/queue") == ("/queue", "/batches/5")
    assert place("/queue", "/queue") == place("/queue/", "/queue") == ("/queue", "/")
    assert place("/queues", "/queue") == ("/queue", "/queues")
    assert place("/batches/5", setting="/queue") == place("/queue/batches/5", setting="/queue")
    assert place("/queue/batches", "/api/queue", "/api") == ("/api/queue", "/batches")
    assert place("/api/queue/batches", "/api/queue", "/api") == ("/api/queue", "/batches")


@pytest.mark.parametrize("given", ["queue", "/a b", "/../x", "//x", "/x/..", "/a;b", "/é", "/x?y", "http://x"])
def test_a_prefix_that_cannot_be_one_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match="BATCHQ_WEB_ROOT_PATH"):
        WebSettings.load(root_path=given)


def test_a_prefix_that_is_a_page_is_refused(dsn: str) -> None:
    for given in ("/batches", "/live/x", "/static"):
        with pytest.raises(ConfigError, match="is a page"):
            Web(dsn, WebSettings.load(root_path=given))
    Web(dsn, WebSettings.load(root_path="/batch"))
    assert WebSettings.load(root_path="/queue/").root_path == PREFIX


# ------------------------------------------------------------------------------------------------- who, and who may act


def test_who_may_look_only_sees_no_actions_and_the_live_parts_are_theirs(conn: Conn, dsn: str) -> None:
    batch_id = insert(conn)

    async def may_act(request: Request) -> bool:
        return request.headers["x-test-user"] == "boss"

    web = WebApp(dsn, user_of=lambda request: request.headers["x-test-user"], may_act=may_act)
    path = f"{PREFIX}/batches/{batch_id}"
    with hosted(mounted(web)) as url, client_of(url) as client:
        for name, acts in (("boss", True), ("guest", False)):
            client.headers["X-Test-User"] = name
            page = client.get(path).text
            assert ("/verbs/cancel" in page, "read-only" in page) == (acts, not acts)
            with client.stream("GET", f"{PREFIX}/live/batch/{batch_id}") as answer:
                lines: list[str] = []
                for line in answer.iter_lines():
                    lines.append(line)
                    if "data: </section>" in line:
                        break
            assert ("/verbs/cancel" in "".join(lines)) == acts
            assert name not in "".join(lines), "people share it"


def test_nobody_is_sent_to_the_log_in_of_the_application(dsn: str) -> None:
    web = WebApp(dsn, user_of=lambda _: None, login_url="/login?how=sso")
    with hosted(mounted(web)) as url, client_of(url) as client:
        answer = client.get(f"{PREFIX}/batches?kind=a b")
        assert answer.status_code == 303
        assert answer.headers["location"] == "/login?how=sso&next=%2Fqueue%2Fbatches%3Fkind%3Da%2520b"
        assert client.get(PREFIX + "/", headers={"Accept": "*/*"}).status_code == 403
        assert client.get(f"{PREFIX}/login").headers["location"].startswith("/login?how=sso")
        assert client.get(f"{PREFIX}/static/style.css").status_code == 200
    without = WebApp(dsn, user_of=lambda _: "")
    with hosted(mounted(without)) as url, client_of(url) as client:
        assert client.get(f"{PREFIX}/").status_code == 403


def test_an_applications_function_says_why_it_refuses_or_fails_closed(dsn: str) -> None:
    from fastapi import HTTPException

    def user_of(request: Request) -> Any:
        if request.headers["x-test"] == "forbidden":
            raise HTTPException(402, "pay first", {"X-Bill": "1"})
        return {"object": object(), "error": 1 / 0 if request.headers["x-test"] == "error" else None}["object"]

    with hosted(mounted(WebApp(dsn, user_of=user_of))) as url, client_of(url) as client:
        answer = client.get(f"{PREFIX}/", headers={"X-Test": "forbidden"})
        assert (answer.status_code, answer.text, answer.headers["x-bill"]) == (402, "pay first\n", "1")
        assert [client.get(f"{PREFIX}/", headers={"X-Test": test}).status_code for test in ("object", "error")] == [
            500,
            500,
        ]


def test_the_applications_session_and_middleware_are_its_own(dsn: str) -> None:
    """Starlette's SessionMiddleware puts its content where the web UI puts its own."""
    from starlette.middleware import Middleware

    class Sessions:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            scope["session"] = {"user": "Ann"}
            await self.app(scope, receive, send)
            if scope["type"] == "http":
                assert scope["session"] == {"user": "Ann"}

    web = WebApp(dsn, user_of=lambda request: request.session.get("user"))
    app = Starlette(routes=[Mount(PREFIX, web)], middleware=[Middleware(Sessions)])
    with hosted(app) as url, client_of(url) as client:
        assert "Ann" in client.get(f"{PREFIX}/").text


def test_the_header_of_a_trusted_proxy_says_who(conn: Conn, dsn: str) -> None:
    batch_id = insert(conn)
    with served(dsn, user_header="X-Forwarded-User", proxies="127.0.0.1", token="a-token-for-programs") as site:
        with site.new_client(**{"X-Forwarded-User": "ann@example.com"}) as client:
            assert "ann@example.com" in client.get("/").text
            token = site.form_token(f"/verbs/cancel?id={batch_id}", client)
            assert site.post("/verbs/cancel", token, client, id=batch_id, actor="Mallory").status_code == 303
        answer = site.client.get("/", headers={"Accept": "text/html"})
        assert (answer.status_code, "X-Forwarded-User" in answer.text) == (401, True)
        with site.new_client(Authorization="Bearer a-token-for-programs") as program:
            assert program.get("/metrics").status_code == 200
    assert values(conn, "SELECT actor FROM batchq.audit") == ["ann@example.com"]


def test_a_password_and_the_header_are_both_needed_where_both_are_set(conn: Conn, dsn: str) -> None:
    password = "correct horse battery"
    with served(dsn, user_header="X-Forwarded-User", proxies="127.0.0.1", password=password) as site:
        with site.new_client(**{"X-Forwarded-User": "ann"}) as client:
            assert client.get("/").status_code == 401
            assert site.log_in(password, client).status_code == 303
            assert "ann" in client.get("/").text
            cookies = dict(client.cookies)
        with site.new_client() as nameless:
            nameless.cookies.update(cookies)
            assert nameless.get("/").status_code == 401


def test_the_password_of_those_who_may_look_only(conn: Conn, dsn: str) -> None:
    batch_id = insert(conn)
    only_look = "only looking around"
    with served(dsn, password="correct horse battery", read_only_password=only_look) as site:
        assert site.log_in(only_look).status_code == 303
        page = site.client.get(f"/batches/{batch_id}").text
        assert ("/verbs/" in page, "read-only" in page, "Log out" in page) == (False, True, True)
        token = site.form_token("/")
        refused = site.post("/verbs/cancel", token, id=batch_id)
        assert (refused.status_code, refused.text) == (403, "No actions: you may look, but not change anything\n")
        with site.new_client() as boss:
            assert site.log_in("correct horse battery", boss).status_code == 303
            assert "/verbs/cancel" in boss.get(f"/batches/{batch_id}").text
        assert site.post("/logout", token).status_code == 303
        assert site.client.get("/").status_code == 401
    assert values(conn, "SELECT verb FROM batchq.audit") == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"read_only_password": "correct horse battery", "password": "correct horse battery"}, "must differ"),
        ({"read_only_password": "short"}, "at least 8"),
        ({"user_header": "X-Forwarded-User"}, "BATCHQ_WEB_PROXIES"),
        ({"user_header": "X User", "proxies": "127.0.0.1"}, "BATCHQ_WEB_USER_HEADER"),
    ],
)
def test_settings_of_who_that_are_mistakes(settings: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        WebSettings.load(**settings)


# ------------------------------------------------------------------------------------------------------ the connections

OWN = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = %s"


def test_an_application_whose_database_is_away_starts_and_says_so() -> None:
    web = WebApp("postgresql://nobody@127.0.0.1:1/none?connect_timeout=1", user_of=ann)
    web._web.reader._seconds = 0.5
    app = Starlette(routes=[Mount(PREFIX, web), Route("/", lambda _: PlainTextResponse("up"))], lifespan=web.lifespan)
    with hosted(app) as url, client_of(url) as client:
        assert client.get("/").text == "up"
        answer = client.get(f"{PREFIX}/")
        assert (answer.status_code, "The database does not answer" in answer.text) == (503, True)


AT_EXIT = """
import asyncio, sys
import httpx
from batchq.web import WebApp
web = WebApp(sys.argv[1], user_of=lambda _: "Ann")
async def ask():
    async with httpx.AsyncClient(transport=httpx.ASGITransport(web), base_url="http://127.0.0.1") as client:
        print((await client.get("/")).status_code)
asyncio.run(ask())
asyncio.run(ask())  # another event loop
"""


def test_a_process_that_never_closes_it_ends_quietly(dsn: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", AT_EXIT, dsn], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "200\n200\n", "")


def test_a_lifespan_of_its_own_and_a_websocket(dsn: str) -> None:
    """As the only application of a server that asks for both."""
    web = WebApp(dsn, user_of=ann)
    sent: list[str] = []

    async def converse(scope: dict[str, Any], *received: str) -> None:
        waiting = iter(received)

        async def receive() -> dict[str, str]:
            return {"type": next(waiting)}

        async def send(message: Any) -> None:
            sent.append(message["type"])

        await web(scope, receive, send)

    asyncio.run(converse({"type": "lifespan", "state": {}}, "lifespan.startup", "lifespan.shutdown"))
    asyncio.run(converse({"type": "websocket", "path": "/", "headers": []}, "websocket.connect"))
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete", "websocket.close"]


def test_live_streams_end_soon_so_that_a_server_can_stop(dsn: str) -> None:
    web = WebApp(dsn, user_of=ann)
    assert web._web.live._stream_seconds == 15
    web._web.live._stream_seconds = 1
    with hosted(mounted(web)) as url, client_of(url) as client, client.stream("GET", f"{PREFIX}/live/overview") as one:
        assert "data: " in "".join(one.iter_lines())


def test_several_processes_accept_each_others_forms_if_they_share_a_secret(conn: Conn, dsn: str) -> None:
    batch_id = insert(conn)
    options: dict[str, Any] = {"user_of": ann, "secret": "0123456789abcdef"}
    path, fields = f"{PREFIX}/verbs/cancel", {"id": str(batch_id)}
    with hosted(mounted(WebApp(dsn, **options))) as one, client_of(one) as client:
        fields["form_token"] = form_token(client, f"{path}?id={batch_id}")
        cookies = dict(client.cookies)
    for secret, code in (("", 403), ("another secret, quite long", 403), (options["secret"], 303)):
        with (
            hosted(mounted(WebApp(dsn, **options | {"secret": secret}))) as other,
            client_of(other) as client,
        ):
            client.cookies.update(cookies)
            assert client.post(path, data=fields).status_code == code
    with pytest.raises(ConfigError, match="at least 16"):
        WebApp(dsn, user_of=ann, secret="short")


def test_the_package_without_its_parts_loads_no_server() -> None:
    code = "import batchq, batchq.web, sys; sys.exit(any(name in sys.modules for name in ('starlette', 'jinja2')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="nothing"):
        batchq.web.nothing  # noqa: B018


if __name__ == "__main__":
    run_alone(__file__)
