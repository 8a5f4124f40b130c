"""Somebody who wants to be another person, to act without the right, or to lead a browser elsewhere."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from batchq.web import WebApp
from tests.component.rows import Conn, insert, value, values
from tests.support.alone import run_alone
from tests.support.web import PASSWORD, Site, hosted, served

HEADER = "X-Forwarded-User"
ELSEWHERE = ("//evil.example", "/%2f%2fevil.example", "/\\evil.example", "/%5c%5cevil.example", "/..//evil.example/",
             "/static/../verbs/cancel", "/static/%2e%2e/batches", "//batches", "/batches//1")  # fmt: skip


def cancel(site: Site, batch_id: int, **fields: Any) -> httpx.Response:
    """Cancel a batch by its form."""
    return site.do("cancel", f"?id={batch_id}", id=batch_id, **fields)


def test_a_client_that_is_no_proxy_names_nobody(conn: Conn, dsn: str) -> None:
    batch_id = insert(conn)
    with served(dsn, user_header=HEADER, proxies="10.1.2.3") as site:
        site.client.headers[HEADER] = "admin"
        for path in ("/", f"/verbs/cancel?id={batch_id}", "/live/overview"):
            answer = site.client.get(path)
            assert (answer.status_code, "admin" in answer.text) == (401, False), path


@pytest.mark.parametrize("name", ["a\tb", "x" * 201, "\u202egnp".encode(), ""])
def test_a_name_that_cannot_be_shown_is_nobodys(conn: Conn, dsn: str, name: str | bytes) -> None:
    with served(dsn, user_header=HEADER, proxies="127.0.0.1") as site:
        text = name.decode("latin-1") if isinstance(name, bytes) else name
        answer = site.client.get("/", headers={HEADER.encode(): text.encode("latin-1")})
        assert 'class="who"' not in answer.text


def test_two_names_are_none(dsn: str) -> None:
    with served(dsn, user_header=HEADER, proxies="127.0.0.1") as site:
        answer = site.client.get("/", headers=[(HEADER, "ann"), (HEADER, "admin")])
        assert "admin" not in answer.text
        assert ">ann<" not in answer.text


def test_a_proxys_name_counts_and_the_forms_does_not(conn: Conn, dsn: str) -> None:
    batch_id = insert(conn)
    with served(dsn, user_header=HEADER, proxies="127.0.0.1") as site:
        site.client.headers[HEADER] = "ann"
        assert cancel(site, batch_id, actor="admin").status_code == 303
    assert values(conn, "SELECT actor FROM batchq.audit") == ["ann"]


def test_one_who_logged_in_to_look_cannot_act_with_anothers_form(conn: Conn, dsn: str) -> None:
    batch_id = insert(conn)
    with served(dsn, password=PASSWORD, read_only_password="only looking") as site, site.new_client() as reader:
        assert site.log_in().status_code == 303
        assert site.log_in("only looking", reader).status_code == 303
        token = site.form_token(f"/verbs/cancel?id={batch_id}")
        assert reader.get(f"/verbs/cancel?id={batch_id}").status_code == 403
        for path in ("/verbs/cancel", "/bulk/cancel", "/chosen/cancel", "/limits/set", "/schedules/set",
                     "/schedules/run", f"/batches/{batch_id}/copy"):  # fmt: skip
            own = site.form_token("/", reader)  # of the form to log out
            for stolen in (token, own):
                answer = site.post(
                    path, stolen, client=reader, id=batch_id, queue="a", kind="a", name="a", cron="* * * * *"
                )
                assert answer.status_code == 403, path
    assert value(conn, "SELECT count(*) FROM batchq.audit") == 0


@pytest.fixture
def mounted(dsn: str) -> Iterator[str]:
    """Serve a web UI that is mounted twice."""
    webs = [WebApp(dsn, user_of=lambda request: request.headers.get("x-test-user"), login_url="/login") for _ in "ab"]
    with hosted(Starlette(routes=[Mount("/a", webs[0]), Mount("/b", webs[1])])) as url:
        yield url
    for web in webs:
        web.close()


@pytest.mark.parametrize("path", ELSEWHERE)
def test_no_path_leads_elsewhere(mounted: str, path: str) -> None:
    for host in ("127.0.0.1", "evil.example"):
        for prefix in ("/a", ""):
            answer = httpx.get(
                f"{mounted}{prefix}{path}", headers={"Host": host, "Accept": "text/html"}, trust_env=False
            )
            location = answer.headers.get("location", "/")
            assert re.match(r"(?:https?://(?:127\.0\.0\.1:\d+|evil\.example)/a/|/(?![/\\]))", location), location
            if "next=" in location:
                assert re.search(r"next=%2F(?!%2F|%5C)", location, re.IGNORECASE), location


def test_a_root_path_of_a_client_changes_nothing(dsn: str) -> None:
    with served(dsn) as site:
        answer = site.client.get("/", headers={"X-Forwarded-Prefix": "//evil.example", "X-Script-Name": "/evil"})
        assert "evil" not in answer.text


def test_a_session_of_one_mount_is_none_of_the_other(mounted: str, conn: Conn) -> None:
    batch_id = insert(conn)
    headers = {"X-Test-User": "ann", "Origin": mounted}
    with httpx.Client(base_url=mounted, headers=headers, trust_env=False) as client:
        page = client.get(f"/a/verbs/cancel?id={batch_id}")
        token = re.findall(r'name="form_token" value="(\w+)"', page.text)[0]
        cookies = "; ".join(
            f"{name}={text}" for name, text in client.cookies.items()
        )  # sent to the other mount by somebody who writes headers by hand
        data = {"id": str(batch_id), "form_token": token}
        refused = httpx.post(
            f"{mounted}/b/verbs/cancel", data=data, headers=headers | {"Cookie": cookies}, trust_env=False
        )
        assert refused.status_code == 403
    assert value(conn, "SELECT status FROM batchq.batches") == "pending"


def test_another_persons_form_is_refused(mounted: str, conn: Conn) -> None:
    batch_id = insert(conn)
    with httpx.Client(base_url=mounted, headers={"Origin": mounted}, trust_env=False) as client:
        page = client.get(f"/a/verbs/cancel?id={batch_id}", headers={"X-Test-User": "ann"})
        token = re.findall(r'name="form_token" value="(\w+)"', page.text)[0]
        data = {"id": str(batch_id), "form_token": token}
        answer = client.post("/a/verbs/cancel", data=data, headers={"X-Test-User": "eve"})
        assert answer.status_code == 403
    assert value(conn, "SELECT count(*) FROM batchq.audit") == 0


if __name__ == "__main__":
    run_alone(__file__)
