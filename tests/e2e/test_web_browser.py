"""The web UI in a real browser: it is live, it obeys its policy, hostile texts are text, and people can use it."""

from collections.abc import Iterator
from urllib.parse import urlencode

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from tests.component.rows import Conn, insert, processing, value
from tests.support.alone import run_alone
from tests.support.browser import THEMES, WAIT_MILLISECONDS, WIDTHS, Watched, chromium
from tests.support.scene import advance, end_of_kind, set_flow, set_scene
from tests.support.steps import step
from tests.support.web import PASSWORD, Site, served

LEAST_CONTRAST = 4.5
expect.set_options(timeout=WAIT_MILLISECONDS)
PATHS = ("/", "/batches", "/batches/{id}", "/workers", "/audit", "/verbs/cancel?id={id}", "/verbs/pause",
         "/batches?queue=bulk", "/bulk/retry?queue=bulk", "/flow/{flow}", "/batches/{flow}", "/failures",
         "/failures/group?{group}", "/bulk/retry?status=failed&grouped=yes&{group}", "/charts",
         "/charts?range=7d")  # fmt: skip
HOSTILE = "<script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">\u202egnp.exe"

# The contrast of every text with what lies behind it (WCAG 2.1, 1.4.3), from the styles that the browser has computed.
CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = text => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
  };
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const color = rgba(getComputedStyle(e).backgroundColor);
      if (color[3] === 1) return color;
      if (color[3] > 0) throw new Error("half transparent: " + e.outerHTML.slice(0, 100));
    }
    return [255, 255, 255, 1];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, style = getComputedStyle(element);
    if (!walker.currentNode.textContent.trim() || element.closest(".unseen, svg, option")) continue;
    if (!element.checkVisibility()) continue;
    const [a, b] = [light(rgba(style.color)), light(behind(element))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), walker.currentNode.textContent.trim().slice(0, 40)]);
  }
  return found;
}"""
UNNAMED = """() => [...document.querySelectorAll(
    "input:not([type=hidden]), select, button, a, progress, [role=region], nav")]
  .filter(e => e.checkVisibility() && !(e.labels?.length || e.textContent.trim() || e.ariaLabel
    || e.getAttribute("aria-labelledby"))).map(e => e.outerHTML.slice(0, 100))"""


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
def page(browser: Browser, site: Site) -> Iterator[Page]:
    """Open a tab that must have nothing to complain of."""
    context = browser.new_context()
    watched = Watched(context.new_page(), site.url)
    yield watched.page
    context.close()
    assert watched.complaints == []


def test_a_bar_moves_by_itself_and_focus_and_opened_details_stay(conn: Conn, site: Site, page: Page) -> None:
    batch_id = set_scene(conn)
    page.goto(f"{site.url}/batches/{batch_id}")
    expect(page.locator("#live-label")).to_have_text("Live")
    bar = page.locator(".whole .share")
    expect(bar).to_have_accessible_name("614 done, 6 failed, of 1,000 items")
    page.locator("[id^=summary-]").click()
    page.locator("#verb-cancel").focus()
    for done in (700, 994):
        advance(conn, batch_id, done)
        expect(bar).to_have_accessible_name(f"{done} done, 6 failed, of 1,000 items")
    expect(page.locator(".under b")).to_have_text("100 %")
    assert page.evaluate("document.activeElement.id") == "verb-cancel"
    expect(page.locator(".timeline pre")).to_be_visible()


def test_live_updates_can_be_paused(conn: Conn, site: Site, page: Page) -> None:
    batch_id = set_scene(conn)
    page.goto(f"{site.url}/batches/{batch_id}")
    expect(page.locator("#live-label")).to_have_text("Live")
    page.locator("#live-switch").click()
    expect(page.locator("#live-label")).to_have_text("Paused")
    advance(conn, batch_id, 700)
    page.locator("#live-switch").click()
    expect(page.locator(".whole .share")).to_have_accessible_name("700 done, 6 failed, of 1,000 items")


def test_a_batch_is_cancelled_and_retried_by_hand(conn: Conn, site: Site, page: Page) -> None:
    batch_id = insert(conn)
    page.goto(f"{site.url}/batches")
    page.get_by_role("link", name=str(batch_id), exact=True).click()
    page.get_by_role("link", name="Cancel").click()
    page.get_by_label("Reason").fill("not needed")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("h1 .status")).to_have_text("cancelled")
    assert value(conn, "SELECT status FROM batchq.batches") == "cancelled"
    page.get_by_role("link", name="Retry", exact=True).click()
    page.get_by_role("button", name="Retry").click()
    expect(page.locator("h1 .status")).to_have_text("ready")
    expect(page.locator(".notice")).to_be_visible()


def test_a_flow_is_drawn_moves_by_itself_and_leads_to_its_batches(conn: Conn, site: Site, page: Page) -> None:
    index = set_flow(conn)
    page.goto(f"{site.url}/batches/{index}")
    page.get_by_role("link", name="Who waits for whom").click()
    expect(page.locator("#live-label")).to_have_text("Live")
    expect(page.locator("svg.flow a.box")).to_have_count(41)
    step("every text fits into its box, or ends with dots and is told in full")
    cut = page.evaluate(
        "[...document.querySelectorAll('.flow .box *')].filter(e => e.scrollWidth > e.clientWidth + 1 && "
        "getComputedStyle(e).display !== 'inline').map(e => e.textContent)"
    )
    assert set(cut) <= {"notify_subscribers_of_the_new_catalog"}  # a narrow font shows all of it
    assert page.locator("svg.flow a.box", has_text="notify_subscribers").get_attribute("title") == (
        "40 notify_subscribers_of_the_new_catalog in media: waiting for 1"
    )
    step("focus in the table and the scrolled graph stay when something changes")
    page.locator("#scroll-flow").evaluate("e => e.scrollTo(300, 0)")
    page.locator("#flow-6").focus()
    expect(page.locator("svg.flow .box.completed")).to_have_count(13)
    end_of_kind(conn, "unpack", 1)
    expect(page.locator("svg.flow .box.completed")).to_have_count(14)
    assert page.evaluate("document.activeElement.id") == "flow-6"
    assert page.locator("#scroll-flow").evaluate("e => e.scrollLeft") == 300
    step("a box is a link; the keyboard takes the table")
    page.locator("svg.flow a.box", has_text="failed").click()
    expect(page.locator("h1")).to_contain_text("Batch 15")
    page.locator("#dependents-20").focus()
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_contain_text("Batch 20")


def ask_to_cancel(page: Page, site: Site) -> None:
    """Go from the list of mails to the page that shows how many would be cancelled."""
    page.goto(f"{site.url}/batches?kind=mail")
    page.get_by_text("Act on all matching batches").click()
    page.get_by_role("link", name="Cancel", exact=True).click()
    page.get_by_label("Reason").fill("too many")
    page.get_by_role("button", name="Count batches").click()
    expect(page.locator("#bulk-text")).to_contain_text("3,000 batches match")
    expect(page.locator("#bulk-stop")).to_be_hidden()


def test_a_verb_is_done_to_all_that_match_with_a_bar_to_the_end(conn: Conn, site: Site, page: Page) -> None:
    conn.execute("INSERT INTO batchq.batches (kind) SELECT 'mail' FROM generate_series(1, 3000)")
    insert(conn)
    ask_to_cancel(page, site)
    assert value(conn, "SELECT count(*) FROM batchq.batches WHERE status = 'cancelled'") == 0
    page.get_by_role("button", name="Cancel: 3").click()
    bar = page.get_by_label("Batches cancelled")
    expect(bar).to_have_js_property("value", 3000)
    expect(page.locator("#bulk-text")).to_have_text("3,000 batches cancelled.")
    expect(page.locator("#bulk-stop")).to_be_hidden()
    step("who cannot see the bar is told")
    expect(page.locator("#live-news[aria-live=polite]")).to_have_text("3,000 batches cancelled.")
    assert value(conn, "SELECT count(*) FROM batchq.batches WHERE status = 'cancelled'") == 3000
    assert value(conn, "SELECT status FROM batchq.batches WHERE kind = 'work'") == "pending"


def test_a_verb_for_all_that_match_is_stopped_and_gone_on_with(conn: Conn, site: Site, page: Page) -> None:
    conn.execute("INSERT INTO batchq.batches (kind) SELECT 'mail' FROM generate_series(1, 3000)")
    ask_to_cancel(page, site)
    held: list[Route] = []
    page.route(
        "**/bulk/cancel",
        lambda route: held.append(route) if route.request.resource_type == "fetch" else route.continue_(),
    )
    step("stopped while the second chunk is on its way")
    with page.expect_request(lambda sent: sent.resource_type == "fetch"):
        page.get_by_role("button", name="Cancel: 3").click()
    expect(page.locator("#bulk-bar")).to_have_js_property("value", 1000)
    page.locator("#bulk-stop").focus()
    page.keyboard.press("Enter")
    held[0].continue_()
    expect(page.locator("#bulk-text")).to_contain_text("Stopped. 2,000 of 3,000")
    assert page.evaluate("document.activeElement.id") == "bulk-text"
    assert value(conn, "SELECT count(*) FROM batchq.batches WHERE status = 'cancelled'") == 2000
    assert len(held) == 1
    page.unroute("**/bulk/cancel")
    page.get_by_role("button", name="Continue").click()
    expect(page.locator("#bulk-text")).to_have_text("3,000 batches cancelled.")
    assert value(conn, "SELECT batches FROM batchq.audit") == 3000


def test_everything_works_without_javascript(conn: Conn, site: Site, browser: Browser) -> None:
    insert(conn, kind="mail")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(site.url)
    page.get_by_role("link", name="Pause mail in default").click()
    page.get_by_role("button", name="Pause").click()
    expect(page.locator(".pauses")).to_contain_text("paused")
    step("a verb for many has a button for each chunk")
    conn.execute("INSERT INTO batchq.batches (kind) SELECT 'mail' FROM generate_series(1, 2999)")
    ask_to_cancel(page, site)
    page.get_by_role("button", name="Cancel: 3").click()
    for done in (1000, 2000):
        expect(page.locator("#bulk-bar")).to_have_js_property("value", done)
        page.get_by_role("button", name="Continue").click()
    expect(page.locator("#bulk-text")).to_have_text("3,000 batches cancelled.")
    context.close()


def test_one_logs_in_and_out(dsn: str, browser: Browser) -> None:
    with served(dsn, password=PASSWORD) as site:
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"{site.url}/batches")
        page.get_by_label("Password").fill("wrong")
        page.get_by_role("button", name="Log in").click()
        expect(page.get_by_role("alert")).to_have_text("Wrong password.")
        page.get_by_label("Password").fill(PASSWORD)
        page.keyboard.press("Enter")
        expect(page.locator("#piece-queues")).to_be_visible()
        page.get_by_role("button", name="Log out").click()
        expect(page.get_by_label("Password")).to_be_focused()
        context.close()


def test_hostile_texts_are_text(conn: Conn, site: Site, page: Page) -> None:
    payload = {"x": HOSTILE, "long": "a" * 4_000_000}
    taken = processing(conn, kind=HOSTILE, queue=HOSTILE, payload=payload, worker=HOSTILE)
    conn.execute("UPDATE batchq.batches SET result = to_jsonb(repeat('a', 10000000)) WHERE id = %s", [taken.id])
    for path in ("/", "/batches", f"/batches/{taken.id}", f"/verbs/cancel?id={taken.id}"):
        page.goto(site.url + path)
        if path != "/":
            expect(page.locator("h1")).to_be_visible()
        assert "hacked" not in page.title()
        assert page.locator("img").count() == 0
        if "verbs" not in path:
            expect(page.locator("main")).to_contain_text("⟨U+202E⟩gnp.exe")
            expect(page.locator("main")).to_contain_text("<script>document.title='hacked'</script>")
    page.goto(site.url)
    expect(page.locator("#live-label")).to_have_text("Live")
    insert(conn, kind=HOSTILE + "!", queue="b")
    expect(page.locator("#piece-queues")).to_contain_text("gnp.exe!")
    assert "hacked" not in page.title()


@pytest.mark.parametrize("theme", THEMES)
def test_it_can_be_read_in_both_themes_and_at_both_widths(conn: Conn, site: Site, browser: Browser, theme: str) -> None:
    batch_id, flow = set_scene(conn), set_flow(conn)
    [(kind, error)] = conn.execute("SELECT kind, error FROM batchq.failures ORDER BY failures DESC LIMIT 1").fetchall()
    group = urlencode({"kind": kind, "error": error, "error_group": error})
    for width in WIDTHS:
        context = browser.new_context(color_scheme=theme, viewport={"width": width, "height": 844})  # type: ignore[arg-type]
        watched = Watched(context.new_page(), site.url)
        for path in PATHS:
            watched.page.goto(site.url + path.format(id=batch_id, flow=flow, group=group))
            check_readable(watched.page, f"{path} {theme} {width}")
        context.close()
        assert watched.complaints == []


def check_readable(page: Page, where: str) -> None:
    """Contrast, no sideways scrolling, names for everything that is used, landmarks."""
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 5, where
    assert [(text, round(ratio, 2)) for ratio, text in contrasts if ratio < LEAST_CONTRAST] == [], where
    step("%s: %s texts, contrast %.1f at least", where, len(contrasts), min(ratio for ratio, _ in contrasts))
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{where} scrolls sideways"
    assert page.evaluate(UNNAMED) == [], where
    assert page.locator("main, header, nav[aria-label='Pages']").count() == 3, where
    assert page.locator("h1").count() == 1, where
    assert page.locator("table:not(:has(caption)), thead th:not([scope])").count() == 0, where
    sizes = "[...document.querySelectorAll('main p, main td')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    assert min(page.evaluate(sizes), default=12) >= 12, where


def test_the_keyboard_goes_everywhere_in_order_and_shows_where_it_is(conn: Conn, site: Site, page: Page) -> None:
    batch_id = set_scene(conn)
    page.goto(f"{site.url}/batches/{batch_id}")
    expect(page.locator("#live-label")).to_have_text("Live")
    page.locator("#live-switch").click()
    page.evaluate("document.activeElement.blur(); document.body.focus()")
    page.goto(f"{site.url}/batches/{batch_id}")
    expect(page.locator("#live-label")).to_have_text("Live")
    names = []
    for _ in range(19):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.textContent.trim() || document.activeElement.id"))
        style = page.evaluate(
            "(s => s.outlineStyle + parseFloat(s.outlineWidth))(getComputedStyle(document.activeElement))"
        )
        assert style.startswith("solid"), (names[-1], style)
    assert names[:6] == ["Skip to content", "batchq", "Overview", "Batches", "Failures", "Charts"]
    assert names[6:11] == ["Flows", "Workers", "Limits", "Schedules", "Audit"]
    assert names[11:16] == ["find-id", "Live", "?", "import_contacts", "Cancel"]
    assert names[16:] == ["Enqueue a copy", "bulk", "jobs-1-4411-5eed1"]
    step("the skip link skips")
    page.goto(f"{site.url}/batches/{batch_id}")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "kind-link"


if __name__ == "__main__":
    run_alone(__file__)
