"""The web UI within applications: every address has the prefix, who acts is in the audit, some people may look only."""

import asyncio
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Mount
from starlette.types import ASGIApp, Receive, Scope, Send

from batchq.errors import ConfigError, DatabaseAway
from batchq.web import WebApp
from batchq.web.server import Web
from batchq.web.settings import WebSettings
from tests.component.rows import Conn, insert, value, values
from tests.support.alone import run_alone
from tests.support.pages import addresses, set_everything
from tests.support.steps import step
from tests.support.web import hosted

ADDRESS = re.compile(r'(?:href|src|action|data-live)="([^"]*)"')
PREFIX = "/queue"


def name_of(request: Request) -> str | None:
    """Return who a test says that it is."""
    return request.headers.get("x-test-user")


def may_act(request: Request) -> bool:
    """Return whether that person may act: everybody but visitors."""
    return request.headers["x-test-user"] != "visitor"


def in_starlette(web: WebApp) -> ASGIApp:
    """Mount it into Starlette."""
    return Starlette(routes=[Mount(PREFIX, web)], lifespan=web.lifespan)


def in_fastapi(web: WebApp) -> ASGIApp:
    """Mount it into FastAPI."""
    api = FastAPI(lifespan=web.lifespan)
    api.mount(PREFIX, web)
    return api


def stripped(application: ASGIApp) -> ASGIApp:
    """Return an application behind a proxy that strips the prefix."""

    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "path": scope["path"].removeprefix(PREFIX) or "/"}
        await application(scope, receive, send)

    return proxy


@contextmanager
def client_of(application: ASGIApp, user: str | None = "ann", path: str = "") -> Iterator[httpx.Client]:
    """Serve an application; give a client that is a person's browser."""
    with hosted(application) as url:
        headers = {"Origin": url} | ({"X-Test-User": user} if user else {})
        with httpx.Client(base_url=url + path, timeout=30, trust_env=False, headers=headers) as client:
            yield client


@pytest.fixture
def web(dsn: str) -> Iterator[WebApp]:
    """Give a web UI to mount."""
    web = WebApp(dsn, user_of=name_of, may_act=may_act)
    yield web
    web.close()


def ways(web: WebApp, dsn: str) -> dict[str, ASGIApp]:
    """Return the application in each of its places."""
    alone = Web(dsn, WebSettings.load(root_path=PREFIX)).guard
    return {"FastAPI": in_fastapi(web), "a proxy strips": stripped(alone)}


@pytest.mark.parametrize("place", ["FastAPI", "a proxy strips"])  # test_web_prefix.py has the others
def test_every_address_of_every_page_has_the_prefix_and_answers(web: WebApp, dsn: str, conn: Conn, place: str) -> None:
    first = set_everything(conn)
    with client_of(ways(web, dsn)[place]) as client:
        found = addresses(client, first, PREFIX)
        step("%s: %s pages", place, len(found))
        assert len(found) > 15
        others: set[str] = set()
        for address in found:
            answer = client.get(address)
            for target in ADDRESS.findall(answer.text):
                assert target.startswith((f"{PREFIX}/", "#")), (address, target)
                others.add(target.partition("#")[0])
            for line in answer.headers.get_list("set-cookie"):
                assert f"Path={PREFIX}" in line
        for target in sorted(one for one in others if "/static/" in one):
            assert client.get(target).status_code == 200, target
        for target in sorted(one for one in others if "/live/" in one)[:5]:
            with client.stream("GET", target) as stream:
                assert stream.headers["content-type"].startswith("text/event-stream"), target


def token_of(client: httpx.Client, path: str) -> dict[str, str]:
    """Return the token of the form on a page, as a field."""
    answer = client.get(path)
    found = re.search(r'name="form_token" value="(\w+)"', answer.text)
    assert found, f"no form on {path}: {answer.status_code}"
    assert 'name="actor"' not in answer.text, "who acts is known"
    return {"form_token": found[1]}


def acts(conn: Conn) -> dict[str, dict[str, Any]]:
    """Return what a person can do, by the path of the form."""
    one, other = insert(conn, kind="one"), insert(conn, kind="two")
    insert(conn, kind="many")
    return {
        f"/verbs/cancel?id={one}": {"id": one},
        "/verbs/pause?kind=one": {"kind": "one"},
        "/limits/set": {"queue": "default", "kind": "one", "max_running": 3},
        "/schedules/set": {"name": "nightly", "cron": "0 3 * * *", "kind": "one"},
        f"/batches/{other}/copy": {"payload": "{}", "priority": 0, "queue": "default", "delay": "0s"},
    }


def test_who_acts_is_in_the_audit_whatever_the_form_says(web: WebApp, conn: Conn) -> None:
    with client_of(in_starlette(web), path=PREFIX) as client:
        for path, fields in acts(conn).items():
            step(path)
            data = {name: str(text) for name, text in fields.items()} | {"actor": "forged"} | token_of(client, path)
            answer = client.post(path.partition("?")[0], data=data)
            assert answer.status_code == 303, answer.text
            assert answer.headers["location"].startswith(f"{PREFIX}/")
        assert "ann" in client.get("/").text
    assert values(conn, "SELECT DISTINCT actor FROM batchq.audit") == ["ann"]
    assert value(conn, "SELECT count(*) FROM batchq.audit") == 5


def test_a_verb_for_many_is_recorded_with_who_did_it(web: WebApp, conn: Conn) -> None:
    insert(conn, kind="many")
    insert(conn, kind="many")
    with client_of(in_starlette(web), path=PREFIX) as client:
        path, data = "/bulk/cancel", {"kind": "many", "actor": "forged"} | token_of(client, "/bulk/cancel?kind=many")
        for _ in range(2):  # counts, then acts
            answer = client.post(path, data=data)
            assert answer.status_code == 200, answer.text
            fields = re.findall(r'name="(job|seal|form_token)" value="([^"]*)"', answer.text)
            data = {name: text.replace("&#34;", '"').replace("&amp;", "&") for name, text in fields}
    assert conn.execute("SELECT batches, actor FROM batchq.audit").fetchall() == [(2, "ann")]


def test_some_people_may_look_only(web: WebApp, conn: Conn) -> None:
    forms = acts(conn)
    with client_of(in_fastapi(web), path=PREFIX) as ann:
        tokens = {path: token_of(ann, path) for path in forms}
        cookies = ann.cookies
        visitor = {"X-Test-User": "visitor"}
        for page in ("/", "/batches", "/limits", "/schedules", "/workers"):
            shown = ann.get(page, headers=visitor)
            assert shown.status_code == 200
            assert re.findall(r'href="/queue/(?:verbs|bulk|limits/set|schedules/set)', shown.text) == [], page
        assert cookies
        for path, fields in forms.items():
            assert ann.get(path, headers=visitor).status_code == 403, path
            data = {name: str(text) for name, text in fields.items()} | tokens[path]
            answer = ann.post(path.partition("?")[0], data=data, headers=visitor)
            assert answer.status_code == 403, path
            assert "you may look" in answer.text
    assert value(conn, "SELECT count(*) FROM batchq.audit") == 0


def test_a_stranger_is_refused_or_sent_to_the_log_in(dsn: str) -> None:
    web = WebApp(dsn, user_of=name_of)
    with client_of(in_starlette(web), user=None) as client:
        assert client.get(f"{PREFIX}/").status_code == 403
        assert client.get(f"{PREFIX}/live/overview").status_code in (401, 403)
    web = WebApp(dsn, user_of=name_of, login_url="/accounts/login")
    with client_of(in_starlette(web), user=None) as client:
        answer = client.get(f"{PREFIX}/batches?kind=a%26b", headers={"Accept": "text/html"})
        assert answer.status_code == 303
        assert answer.headers["location"] == "/accounts/login?next=%2Fqueue%2Fbatches%3Fkind%3Da%2526b"


def test_functions_that_are_async_and_an_answer_of_the_application(dsn: str) -> None:
    async def user_of(request: Request) -> str | None:
        await asyncio.sleep(0)
        return request.headers.get("x-test-user")

    async def nobody(_: Request) -> bool:
        return False

    web = WebApp(dsn, user_of=user_of, may_act=nobody)
    with client_of(in_starlette(web)) as client:
        shown = client.get(f"{PREFIX}/limits").text
        assert "read-only" in shown
        assert "limits/set" not in shown


def test_connections_are_opened_once_when_they_are_needed_and_closed_at_the_end(dsn: str, conn: Conn) -> None:
    mine = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
        "AND backend_type = 'client backend'"
    )
    before = value(conn, mine)
    web = WebApp(dsn, user_of=name_of)
    assert value(conn, mine) == before

    async def many() -> None:
        transport = httpx.ASGITransport(in_starlette(web))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            answers = await asyncio.gather(
                *(client.get(f"{PREFIX}/workers", headers={"X-Test-User": "ann"}) for _ in range(20))
            )
        assert {answer.status_code for answer in answers} == {200}

    asyncio.run(many())
    assert before < value(conn, mine) <= before + 4
    web.close()
    for _ in range(100):
        if value(conn, mine) == before:
            break
        conn.execute("SELECT pg_sleep(0.05)")
    assert value(conn, mine) == before


def test_a_page_that_is_still_read_does_not_connect_again_after_the_end(dsn: str) -> None:
    reader = Web(dsn, WebSettings.load()).reader
    reader.open()
    reader.close()
    with pytest.raises(DatabaseAway, match="has closed its connections"):
        reader.read("workers", limit=1)
    reader.open()
    assert reader.read("workers", limit=1) == []
    reader.close()


def test_two_mounts_on_one_host_do_not_meet(dsn: str, conn: Conn) -> None:
    batch_id = insert(conn)
    with ExitStack() as stack:
        webs = [WebApp(dsn, user_of=name_of) for _ in range(2)]
        for web in webs:
            stack.callback(web.close)
        both = Starlette(routes=[Mount("/one", webs[0]), Mount("/two", webs[1])])
        client = stack.enter_context(client_of(both))
        token = token_of(client, f"/one/verbs/cancel?id={batch_id}")
        token_of(client, f"/two/verbs/cancel?id={batch_id}")
        assert len(client.cookies) == 2
        refused = client.post("/two/verbs/cancel", data={"id": str(batch_id)} | token)
        assert refused.status_code == 403
        assert client.post("/one/verbs/cancel", data={"id": str(batch_id)} | token).status_code == 303


def test_arguments_that_cannot_work_are_refused_at_once(dsn: str) -> None:
    with pytest.raises(ConfigError, match="the secret needs at least"):
        WebApp(dsn, user_of=name_of, secret="short")
    with pytest.raises(ConfigError, match="hosts"):
        WebApp(dsn, user_of=name_of, hosts="not a host/")


def test_a_function_that_returns_no_name_says_what_to_return(dsn: str) -> None:
    web = WebApp(dsn, user_of=lambda _: 5)  # type: ignore[arg-type, return-value]

    async def ask() -> None:
        transport = httpx.ASGITransport(in_starlette(web))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            await client.get(f"{PREFIX}/")

    with pytest.raises(TypeError, match="user_of must return a name or None, not int; return its name"):
        asyncio.run(ask())
    web.close()


if __name__ == "__main__":
    run_alone(__file__)
