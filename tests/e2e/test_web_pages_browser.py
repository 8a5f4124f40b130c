"""The web UI's pages of limits, keys, flows, spread batches, schedules, kinds and workers in a real browser."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect

from tests.component.rows import Conn, insert
from tests.e2e.test_web_browser import check_readable
from tests.support.alone import run_alone
from tests.support.browser import THEMES, WAIT_MILLISECONDS, Watched, chromium
from tests.support.held_scene import set_held
from tests.support.scene import set_flow, set_scene
from tests.support.steps import step
from tests.support.web import Site, served

expect.set_options(timeout=WAIT_MILLISECONDS)
WIDTHS = (390, 768, 1280)
PATHS = ("/limits", "/keys", "/keys?key=customer", "/flows", "/spread", "/schedules",
         "/schedules/of?name=nightly+report", "/kinds?queue=mail&kind=send", "/kinds?queue=bulk&kind=geocode",
         "/workers", "/workers?id=jobs-1-4411-5eed1")  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Run one browser for all tests."""
    with chromium() as browser:
        yield browser


@pytest.fixture
def site(dsn: str) -> Iterator[Site]:
    """Serve the web UI."""
    with served(dsn) as site:
        yield site


@pytest.mark.parametrize("theme", THEMES)
def test_they_can_be_read_in_both_themes_at_all_widths(conn: Conn, site: Site, browser: Browser, theme: str) -> None:
    for width in WIDTHS:
        context = browser.new_context(color_scheme=theme, viewport={"width": width, "height": 844})  # type: ignore[arg-type]
        watched = Watched(context.new_page(), site.url)
        if width == WIDTHS[0]:
            for path in ("/limits", "/keys", "/flows", "/spread", "/schedules"):
                watched.page.goto(site.url + path)
                check_readable(watched.page, f"{path} {theme} {width}, empty")
            set_scene(conn)
            set_flow(conn)
            set_held(conn)
        for path in PATHS:
            watched.page.goto(site.url + path)
            check_readable(watched.page, f"{path} {theme} {width}")
            expect(watched.page.locator("#live-label")).to_have_text("Live")
        context.close()
        assert watched.complaints == []


def test_a_person_finds_what_holds_work_back_and_pauses_it(conn: Conn, site: Site, browser: Browser) -> None:
    set_held(conn)
    context = browser.new_context()
    watched = Watched(context.new_page(), site.url)
    page = watched.page
    page.goto(site.url)
    page.get_by_role("navigation", name="Pages", exact=True).get_by_role("link", name="Limits").click()
    step("from the limits to the keys, to the batch that the others of the key wait for")
    page.get_by_role("navigation", name="Pages of this group").get_by_role("link", name="Keys").click()
    expect(page.locator("#live-label")).to_have_text("Live")
    page.locator("#key-1").focus()
    insert(conn, queue="mail", kind="send", key="new customer")
    expect(page.locator("#piece-keys")).to_contain_text("new customer")
    assert page.evaluate("document.activeElement.id") == "key-1"
    page.locator("#piece-keys").get_by_role("link", name="batch ").first.click()
    expect(page.locator("h1")).to_contain_text("send")
    step("from the overview to the kind, which is paused and resumed")
    page.goto(site.url)
    page.get_by_role("link", name="send", exact=True).click()
    expect(page.locator("h1")).to_contain_text("Kind send in queue mail")
    page.get_by_role("link", name="Pause").click()
    page.get_by_role("button", name="Pause").click()
    page.goto(f"{site.url}/kinds?queue=mail&kind=send")
    expect(page.locator("h1")).to_contain_text("paused")
    page.locator("#verb-resume").click()
    page.get_by_role("button", name="Resume").click()
    page.goto(f"{site.url}/kinds?queue=mail&kind=send")
    expect(page.locator("#verb-pause")).to_be_visible()
    context.close()
    assert watched.complaints == []


if __name__ == "__main__":
    run_alone(__file__)
