"""Every page of the web UI in a browser: in both themes, on a phone, a tablet and a desktop, and for a screen reader.

axe-core checks contrast, names, roles, landmarks, headings and more, by the rules of WCAG 2.2 A and AA and its own best
practices. Beside it: nothing is wider than the screen, what one touches is large enough, no id is there twice.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from tests.component.rows import Conn
from tests.support.alone import run_alone
from tests.support.browser import THEMES, WAIT_MILLISECONDS, Watched, chromium
from tests.support.pages import addresses, set_everything, set_hostile
from tests.support.several import away_dsn, served_several
from tests.support.steps import step
from tests.support.web import Site, served

expect.set_options(timeout=WAIT_MILLISECONDS)
SIZES = {390: 844, 768: 1024, 1280: 860}
TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]

# What is wider than the screen, or has to be scrolled sideways. The bar of pages and the graph of a flow may.
TOO_WIDE = """() => [...document.querySelectorAll("body *")].filter(e => e.checkVisibility()
    && !e.closest(".unseen, svg, pre, nav, #scroll-flow") && !e.parentElement.closest(".scroll")
    && (e.getBoundingClientRect().right > innerWidth + 1 || e.matches(".scroll") && e.scrollWidth > e.clientWidth + 1))
  .map(e => e.tagName + "." + e.className + "#" + e.id + " " + e.textContent.trim().slice(0, 40))"""

# Of everything one touches but links within a text (WCAG 2.2, 2.5.8): below 24 px, unless nothing else is near.
TOO_SMALL = """() => [...document.querySelectorAll("button, select, input:not([type=hidden]), .verb, summary, nav a")]
  .filter(e => e.checkVisibility() && !e.closest(".unseen"))
  .map(e => [e, (e.matches("input[type=checkbox], input[type=radio]") && e.labels[0] || e).getBoundingClientRect()])
  .filter(([, box]) => box.height < 24 || box.width < 24)
  .map(([e, box]) => `${e.outerHTML.slice(0, 80)} ${Math.round(box.width)} x ${Math.round(box.height)}`)"""
REACHABLE = """[...document.querySelectorAll('a[href], button, input:not([type=hidden]), select, textarea, summary, '
    + '[tabindex="0"]')].filter(e => e.checkVisibility() && !e.disabled && e.tabIndex >= 0).length"""
REACHED = "number => { const e = document.activeElement; e.dataset.reached ??= number; return e.dataset.reached; }"
HOSTILE = "<script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">\u202egnp.exe"
IDS_TWICE = """() => [...document.querySelectorAll("[id]")].map(e => e.id)
  .filter((id, number, all) => all.indexOf(id) !== number)"""


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


@pytest.fixture
def pages(conn: Conn, site: Site) -> list[str]:
    """Return the addresses of all pages, of a queue that has something on each."""
    return addresses(site.client, set_everything(conn))


@pytest.mark.parametrize("theme", THEMES)
def test_every_page_is_readable_at_every_width(pages: list[str], site: Site, browser: Browser, theme: Any) -> None:
    context = browser.new_context(color_scheme=theme)
    watched = Watched(context.new_page(), site.url)
    found: list[str] = []
    for address in pages:
        watched.page.goto(site.url + address)
        for width, height in SIZES.items():
            watched.page.set_viewport_size({"width": width, "height": height})
            found += [f"{address} at {width} px: {problem}" for problem in complaints(watched.page)]
        found += [f"{address}: {problem}" for problem in violations(watched.page)]
    context.close()
    step("%s pages, %s", len(pages), theme)
    assert len(pages) > 15
    assert not found, "\n".join(found)
    assert watched.complaints == []


@pytest.mark.parametrize("theme", THEMES)
def test_the_pages_of_several_databases_are_readable_at_every_width(
    conn: Conn, dsn: str, browser: Browser, theme: Any
) -> None:
    set_everything(conn)
    long = "orders-of-all-customers-in-the-eu-west-1"
    given = {"eu": dsn, long: away_dsn(), **{f"region-{number}": away_dsn() for number in range(8)}}
    found: list[str] = []
    with served_several(**given) as several:
        context = browser.new_context(color_scheme=theme)
        watched = Watched(context.new_page(), several.url)
        for address in ("/", "/db/eu/workers", f"/db/{long}/"):
            watched.page.goto(several.url + address)
            for width, height in SIZES.items():
                watched.page.set_viewport_size({"width": width, "height": height})
                found += [f"{address} at {width} px: {problem}" for problem in complaints(watched.page)]
            found += [f"{address}: {problem}" for problem in violations(watched.page)]
            assert watched.page.get_by_role("main").is_visible()
        step("the page of all leads to a database, and that one back")
        watched.page.goto(several.url)
        watched.page.get_by_role("link", name="eu", exact=True).first.click()
        expect(watched.page).to_have_url(f"{several.url}/db/eu/")
        watched.page.get_by_role("link", name="All databases").click()
        expect(watched.page.locator("#live-label")).to_have_text("Live")
        context.close()
    assert not found, "\n".join(found)
    assert [text for text in watched.complaints if "503" not in text] == []


def violations(page: Page) -> Iterator[str]:
    """Yield the rules of accessibility that a page breaks."""
    for violation in Axe().run(page, options={"runOnly": {"type": "tag", "values": TAGS}}).response["violations"]:
        nodes = [node["html"][:150] for node in violation["nodes"][:3]]
        yield f"{violation['id']}: {violation['help']}: {nodes}"


def complaints(page: Page) -> Iterator[str]:
    """Yield what is wrong with a page at its current width."""
    if not page.evaluate("document.documentElement.scrollWidth <= innerWidth"):
        yield "scrolls sideways"
    yield from (f"too wide: {text}" for text in page.evaluate(TOO_WIDE)[:5])
    yield from (f"too small: {text}" for text in page.evaluate(TOO_SMALL)[:5])
    yield from (f"this id is there twice: {text}" for text in page.evaluate(IDS_TWICE)[:5])


def test_a_screen_reader_finds_the_parts_of_each_page(pages: list[str], site: Site, browser: Browser) -> None:
    page = browser.new_page()
    for address in pages:
        page.goto(site.url + address)
        tree = page.locator("body").aria_snapshot()
        for part in ("- banner:", '- navigation "Pages":', "- main:"):
            assert part in tree, (address, part, tree)
        assert tree.count("[level=1]") == 1, (address, tree)
    page.close()


def test_hostile_texts_are_text_on_every_page(conn: Conn, site: Site, browser: Browser) -> None:
    page = browser.new_page()
    watched = Watched(page, site.url)
    for address in addresses(site.client, set_hostile(conn, HOSTILE)):
        page.goto(site.url + address)
        assert "hacked" not in page.title().replace(HOSTILE.replace("\u202e", "⟨U+202E⟩"), ""), address
        assert page.locator("img").count() == 0, address
        assert page.evaluate("document.querySelectorAll('script:not([src])').length") == 0, address
        assert "\u202e" not in page.locator("body").inner_text(), address
    page.close()
    assert watched.complaints == []


def test_keys_lead_to_pages_and_the_search_and_are_listed(site: Site, browser: Browser) -> None:
    context = browser.new_context()
    watched = Watched(context.new_page(), site.url)
    page = watched.page
    page.goto(site.url)
    page.keyboard.press("g")
    page.keyboard.press("b")
    expect(page.locator("h1")).to_contain_text("Batches")
    expect(page.locator("#keys-open")).to_be_visible()
    step("a key within a field is a letter")
    page.keyboard.press("/")
    page.keyboard.type("g?b")
    assert page.evaluate("document.activeElement.value") == "g?b"
    page.evaluate("document.activeElement.blur()")
    step("? lists the keys, Escape closes the list, and focus is where it was")
    page.locator(".brand").focus()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keyboard shortcuts")).to_be_visible()
    expect(page.locator("#keys-list")).to_contain_text("Workers")
    page.keyboard.press("Escape")
    expect(page.locator("#keys")).to_be_hidden()
    step("switched off, they do nothing, also on the next page")
    page.keyboard.press("?")
    page.get_by_label("Shortcuts are on").uncheck()
    page.keyboard.press("Escape")
    page.goto(f"{site.url}/workers")
    page.keyboard.press("g")
    page.keyboard.press("b")
    page.keyboard.press("?")
    expect(page.locator("#keys")).to_be_hidden()
    assert page.url == f"{site.url}/workers"
    step("the button shows them all the same")
    page.get_by_role("button", name="Keyboard shortcuts").click()
    page.get_by_label("Shortcuts are on").check()
    page.keyboard.press("Escape")
    page.keyboard.press("g")
    page.keyboard.press("o")
    expect(page).to_have_url(f"{site.url}/")
    context.close()
    assert watched.complaints == []


def test_every_link_and_button_is_reached_by_tab_alone(pages: list[str], site: Site, browser: Browser) -> None:
    page = browser.new_page()
    for address in pages[:12]:
        page.goto(site.url + address)
        if page.locator("#live-switch").is_visible():
            page.locator("#live-switch").click()  # a piece that is replaced would be counted twice
            page.evaluate("document.activeElement.blur()")
        wanted = page.evaluate(REACHABLE)
        reached = set()
        for number in range(wanted + 5):
            page.keyboard.press("Tab")
            reached.add(page.evaluate(REACHED, number))
        assert len(reached) >= wanted, (address, wanted, len(reached))
    page.close()


if __name__ == "__main__":
    run_alone(__file__)
