"""The web UI beside Django in one ASGI application, with Django's sessions and permissions."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from django.contrib.auth.models import Permission, User
from django.core.asgi import get_asgi_application
from django.core.management import call_command
from django.test import Client
from django.test.utils import override_settings

from batchq.contrib.django.web import with_web_ui
from tests.support.web import READ_SECONDS, hosted

Sql = Callable[..., list[Any]]


@pytest.fixture(autouse=True)
def tables(db: str) -> None:
    """Make Django's own tables."""
    call_command("migrate", verbosity=0)


@pytest.fixture
def url(db: str) -> Iterator[str]:
    """Serve Django with the web UI."""
    with (
        override_settings(LOGIN_URL="/admin/login/", ALLOWED_HOSTS=["127.0.0.1"]),
        hosted(with_web_ui(get_asgi_application())) as url,
    ):
        yield url


def user_of(*permissions: str, **columns: Any) -> User:
    """Return a new user with these permissions."""
    user = User.objects.create_user(f"user-{'-'.join(permissions)}", **columns)
    user.user_permissions.set(Permission.objects.filter(codename__in=permissions))
    return user


@contextmanager
def browser(url: str, user: User | None = None) -> Iterator[httpx.Client]:
    """Return a browser, in which a user has logged in to Django."""
    headers = {"Accept": "text/html", "Origin": url}
    with httpx.Client(base_url=url, headers=headers, timeout=READ_SECONDS, trust_env=False) as client:
        if user:
            django = Client()
            django.force_login(user)
            client.cookies.update({"sessionid": django.cookies["sessionid"].value})
        yield client


def pause(client: httpx.Client) -> int:
    """Pause a queue by the form of its page; return the answer's code."""
    page = client.get("/queue/verbs/pause?queue=default")
    token = re.search(r'name="form_token" value="(\w+)"', page.text)
    data = {"form_token": token[1] if token else "", "queue": "default", "actor": "somebody else"}
    return client.post("/queue/verbs/pause", data=data).status_code


def test_django_answers_beside_it(url: str) -> None:
    with browser(url) as client:
        assert client.get("/admin/login/").status_code == 200
        assert client.get("/queue").headers["location"].endswith("/queue/")
        assert client.get("/queues").status_code == 404


def test_who_has_not_logged_in_is_sent_to_the_log_in(url: str) -> None:
    with browser(url) as client:
        answer = client.get("/queue/batches")
        assert (answer.status_code, answer.headers["location"]) == (303, "/admin/login/?next=%2Fqueue%2Fbatches")
        client.cookies.update({"sessionid": "forged"})
        assert client.get("/queue/batches").status_code == 303


def test_the_permissions_are_those_of_the_admin(url: str, sql: Sql) -> None:
    with browser(url, user_of()) as stranger:
        answer = stranger.get("/queue/")
        assert (answer.status_code, "batchq.view_batch" in answer.text) == (403, True)
    with browser(url, user_of("view_batch")) as viewer:
        page = viewer.get("/queue/").text
        assert ("django:user-view_batch" in page, "read-only" in page) == (True, True)
        assert pause(viewer) == 403
    with browser(url, user_of("view_batch", "operate_batch")) as operator:
        assert "read-only" not in operator.get("/queue/").text
        assert pause(operator) == 303
    assert sql("SELECT verb, actor FROM batchq.audit") == [("pause", "django:user-view_batch-operate_batch")]


def test_who_logs_out_or_loses_the_account_is_out(url: str) -> None:
    user = user_of("view_batch", "operate_batch")
    with browser(url, user) as client:
        assert client.get("/queue/").status_code == 200
        user.set_password("a new one")
        user.save()
        assert client.get("/queue/").status_code == 303, "the session belongs to the old password"
    user.is_active = False
    user.save()
    with browser(url, user) as client:
        assert client.get("/queue/").status_code == 303


def test_the_session_stays_when_the_secret_key_changes(url: str) -> None:
    """Django would give the session another key, which the browser would not learn from here."""
    user = user_of("view_batch")
    with browser(url, user) as client, override_settings(SECRET_KEY="the next one", SECRET_KEY_FALLBACKS=["tests"]):
        assert client.get("/queue/").status_code == 200
        assert client.get("/queue/").status_code == 200


def test_host_names_are_those_of_django(db: str) -> None:
    for allowed, code in ((["jobs.example.com", "[::1]"], 421), ([".example"], 303), (["*"], 303)):
        with (
            override_settings(ALLOWED_HOSTS=allowed),
            hosted(with_web_ui(get_asgi_application(), "/jobs")) as url,
            browser(url) as client,
        ):
            assert client.get("/jobs/", headers={"Host": "evil.example"}).status_code == code


def test_an_application_may_have_people_of_its_own(db: str) -> None:
    with hosted(with_web_ui(get_asgi_application(), user_of=lambda _: "ann")) as url, browser(url) as client:
        page = client.get("/queue/").text
        assert ("ann" in page, "read-only" in page) == (True, False)
