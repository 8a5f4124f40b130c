"""The web UI within an application, in a real browser: it is live below a prefix, and people can use it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, expect
from starlette.applications import Starlette
from starlette.routing import Mount

from batchq.web import WebApp
from tests.component.rows import Conn, insert, processing, value, values
from tests.support.alone import run_alone
from tests.support.browser import WAIT_MILLISECONDS, Watched, chromium
from tests.support.scene import advance
from tests.support.web import hosted

expect.set_options(timeout=WAIT_MILLISECONDS)
# What the label has said, from the beginning.
LABELS = """() => {
  const label = document.getElementById("live-label");
  window.labels = [label.textContent];
  new MutationObserver(() => window.labels.push(label.textContent)).observe(label, {childList: true});
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Run one browser for all tests."""
    with chromium() as browser:
        yield browser


@contextmanager
def watched_page(browser: Browser, url: str) -> Iterator[Page]:
    """Open a tab that must have nothing to complain of."""
    with browser.new_context(base_url=url) as context:
        watched = Watched(context.new_page(), url)
        yield watched.page
    assert watched.complaints == []


def test_a_mounted_page_is_live_and_stays_so_when_its_stream_is_renewed(conn: Conn, dsn: str, browser: Browser) -> None:
    taken = processing(conn, items=list(range(100)))
    web = WebApp(dsn, user_of=lambda _: "Ann")
    web._web.live._stream_seconds = 1
    app = Starlette(routes=[Mount("/admin/queue", web)], lifespan=web.lifespan)
    with hosted(app) as url, watched_page(browser, url) as page:
        streams: list[str] = []
        page.on("request", lambda request: streams.append(request.url) if "/live/" in request.url else None)
        page.goto(f"/admin/queue/batches/{taken.id}")
        expect(page.locator(".who")).to_have_text("You are Ann")
        expect(page.locator("#live-label")).to_have_text("Live")
        page.evaluate(LABELS)
        for _ in range(2):
            with page.expect_request("**/live/**"):
                pass
        advance(conn, taken.id, 42)
        expect(page.locator("#piece-head")).to_contain_text("42 %")
        assert len(streams) >= 3
        assert set(streams) == {f"{url}/admin/queue/live/batch/{taken.id}"}
        assert "Connection lost" not in page.evaluate("window.labels")


def test_a_verb_and_one_for_many_are_done_by_scripts_below_the_prefix(conn: Conn, dsn: str, browser: Browser) -> None:
    batch_id = insert(conn)
    for _ in range(3):
        insert(conn, kind="mail")
    web = WebApp(dsn, user_of=lambda _: "Ann")
    app = Starlette(routes=[Mount("/admin/queue", web)], lifespan=web.lifespan)
    with hosted(app) as url, watched_page(browser, url) as page:
        page.goto(f"/admin/queue/batches/{batch_id}")
        page.locator("#verb-cancel").click()
        assert page.get_by_label("Your name").count() == 0
        page.get_by_role("button", name="Cancel", exact=True).click()
        expect(page.locator(".notice")).to_contain_text("Done: cancel")
        page.goto("/admin/queue/bulk/cancel?kind=mail")
        page.get_by_role("button", name="Count batches").click()
        page.get_by_role("button", name="Cancel: 3 batches").click()
        expect(page.locator("#bulk-text")).to_contain_text("3 batches cancelled")
        expect(page.locator("#keys-open")).to_be_visible()  # its script has run
        page.keyboard.press("g")
        page.keyboard.press("b")
        expect(page).to_have_url(f"{url}/admin/queue/batches")
    assert value(conn, "SELECT count(*) FROM batchq.status WHERE status = 'cancelled'") == 4
    assert values(conn, "SELECT DISTINCT actor FROM batchq.audit") == ["Ann"]


def test_the_connection_is_lost_where_the_person_is_no_longer_known(conn: Conn, dsn: str, browser: Browser) -> None:
    people = ["Ann"]
    web = WebApp(dsn, user_of=lambda _: next(iter(people), None))
    web._web.live._stream_seconds = 1
    app = Starlette(routes=[Mount("/admin/queue", web)], lifespan=web.lifespan)
    with hosted(app) as url, browser.new_context(base_url=url) as context:
        page = context.new_page()
        page.goto("/admin/queue/workers")
        expect(page.locator("#live-label")).to_have_text("Live")
        people.clear()
        expect(page.locator("#live-label")).to_have_text("Connection lost")


if __name__ == "__main__":
    run_alone(__file__)
