"""The list of batches in a real browser: it is live and keeps the selection, and the keyboard alone does everything."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.component.rows import Conn, finished, insert, processing, value, values
from tests.support.alone import run_alone
from tests.support.browser import WAIT_MILLISECONDS, Watched, chromium
from tests.support.scene import set_scene
from tests.support.steps import step
from tests.support.web import Site, served

expect.set_options(timeout=WAIT_MILLISECONDS)
HOSTILE = "<script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">"
FOCUSED = "document.activeElement.id"


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
    check_nothing_but_refused_searches(watched)


def check_nothing_but_refused_searches(watched: Watched) -> None:
    """Check that a tab complained of nothing, except of pages that explain what is wrong with a search."""
    assert [text for text in watched.complaints if "status of 400" not in text] == []


def open_list(page: Page, site: Site, query: str = "") -> None:
    """Open the first page of a list, and wait until it is live."""
    page.goto(f"{site.url}/batches{query}")
    wait_until_live(page)


def wait_until_live(page: Page) -> None:
    """Wait until the scripts of a page run."""
    expect(page.locator("#live-dot[data-state=on]")).to_be_visible()


def test_new_rows_come_by_themselves_and_selection_focus_and_scroll_stay(conn: Conn, site: Site, page: Page) -> None:
    first = [insert(conn, kind="a-kind-with-quite-a-long-name") for _ in range(4)]
    page.set_viewport_size({"width": 700, "height": 700})
    open_list(page, site)
    page.get_by_label(f"Select batch {first[1]}").check()
    page.get_by_label(f"Select batch {first[2]}").check()
    expect(page.locator("#chosen-text")).to_have_text("2 selected")
    page.locator(f"#row-{first[2]}").focus()
    new = insert(conn)
    expect(page.locator(f"#row-{new}")).to_be_visible()
    expect(page.locator("#tab-ready .count")).to_have_text("5")
    assert page.evaluate(FOCUSED) == f"row-{first[2]}"
    expect(page.locator("input[name=id]:checked")).to_have_count(2)
    step("a selected batch that leaves the list stays selected, and is said to")
    conn.execute("INSERT INTO batchq.batches (kind) SELECT 'work' FROM generate_series(1, 47)")
    expect(page.locator("#chosen-text")).to_have_text("2 selected, 1 of them not shown here any more")
    step("focus that would be lost goes to the row that is now in that place")
    conn.execute("INSERT INTO batchq.batches (kind) SELECT 'work' FROM generate_series(1, 60)")
    expect(page.locator("#chosen-text")).to_have_text("2 selected, 2 of them not shown here any more")
    assert page.evaluate(FOCUSED).startswith("row-")
    page.get_by_role("button", name="Cancel", exact=True).click()
    expect(page.locator("#chosen-would")).to_have_text("2 would be cancelled.")


def test_an_older_page_is_not_live_and_says_so(conn: Conn, site: Site, page: Page) -> None:
    conn.execute("INSERT INTO batchq.batches (kind) SELECT 'work' FROM generate_series(1, 60)")
    open_list(page, site)
    page.get_by_role("link", name="Older").click()
    expect(page.get_by_text("This page does not update itself.")).to_be_visible()
    expect(page.locator("#live-switch")).to_have_count(0)
    page.locator("tbody input").first.check()
    expect(page.locator("#chosen-text")).to_have_text("1 selected")


def test_the_keyboard_alone_goes_from_the_list_to_an_action_on_three_rows(conn: Conn, site: Site, page: Page) -> None:
    made = [insert(conn) for _ in range(6)][::-1]
    ended = finished(conn, kind="other")
    made = [ended, *made]
    open_list(page, site)
    keys = page.keyboard
    keys.press("j")
    assert page.evaluate(FOCUSED) == f"row-{ended}"
    keys.press("x")
    for _ in range(2):
        keys.press("ArrowDown")
    assert page.evaluate(FOCUSED) == f"row-{made[2]}"
    keys.press("x")
    keys.press("ArrowDown")
    keys.press("Shift+X")
    expect(page.locator("#chosen-text")).to_have_text("3 selected")
    keys.press("End")
    assert page.evaluate(FOCUSED) == f"row-{made[-1]}"
    keys.press("ArrowDown")
    keys.press("ArrowUp")
    assert page.evaluate(FOCUSED) == f"row-{made[-2]}"
    keys.press("Home")
    step("v goes to the actions, Escape back to the row")
    keys.press("v")
    assert page.evaluate(FOCUSED) == "chosen-retry"
    keys.press("Escape")
    assert page.evaluate(FOCUSED) == f"row-{ended}"
    keys.press("v")
    while page.evaluate(FOCUSED) != "chosen-cancel":
        keys.press("Tab")
    keys.press("Enter")
    expect(page.locator("#chosen-would")).to_have_text("2 would be cancelled. 1 has ended already.")
    page.get_by_label("Reason").focus()
    keys.type("not needed")
    keys.press("Enter")
    expect(page.locator("#chosen-said")).to_have_text("2 batches cancelled. 1 has ended already.")
    assert values(conn, "SELECT batch_id FROM batchq.audit ORDER BY 1") == sorted(made[2:4])
    page.locator("#chosen-list").focus()
    keys.press("Enter")
    wait_until_live(page)
    step("Enter opens a row")
    keys.press("j")
    keys.press("Enter")
    expect(page.locator("h1")).to_contain_text(f"Batch {ended}")


def test_keys_do_nothing_in_fields_and_all_or_none_of_a_page_is_selected(conn: Conn, site: Site, page: Page) -> None:
    for _ in range(3):
        insert(conn)
    open_list(page, site)
    page.locator("#f-search").focus()
    page.keyboard.type("xjkv")
    assert page.locator("#f-search").input_value() == "xjkv"
    expect(page.locator("input[name=id]:checked")).to_have_count(0)
    expect(page.locator("#chosen-verbs")).to_be_hidden()
    page.get_by_role("button", name="Select all on this page").click()
    expect(page.locator("#chosen-text")).to_have_text("3 selected")
    page.get_by_role("button", name="Clear selection").click()
    expect(page.locator("#chosen-text")).to_have_text("None selected")
    page.locator("#row-2").focus()
    page.keyboard.press("Control+x")
    page.keyboard.press("x")
    page.keyboard.press("Escape")
    expect(page.locator("input[name=id]:checked")).to_have_count(0)
    step("a range by mouse")
    page.locator("#choose-3").click()
    page.locator("#choose-1").click(modifiers=["Shift"])
    expect(page.locator("#chosen-text")).to_have_text("3 selected")


def test_the_list_works_without_javascript(conn: Conn, site: Site, browser: Browser) -> None:
    made = [insert(conn, kind="mail", payload={"n": n % 2}, key=f"k{n}") for n in range(4)]
    finished(conn, "failed", error='{"error": "OSError: no"}')
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{site.url}/batches")
    page.get_by_role("link", name="ready 4").click()
    page.get_by_label("Search", exact=True).fill("payload.n = 1")
    page.get_by_role("button", name="Search").click()
    expect(page.locator("tbody tr")).to_have_count(2)
    page.get_by_text("Columns", exact=True).click()
    page.get_by_label("Key", exact=True).check()
    page.get_by_role("button", name="Show columns").click()
    expect(page.locator("thead")).to_contain_text("Key")
    expect(page.locator("tbody tr")).to_have_count(2)
    for batch_id in (made[1], made[3]):
        page.get_by_label(f"Select batch {batch_id}").check()
    page.get_by_role("button", name="Snooze").click()
    page.get_by_label("Minutes").fill("7")
    page.get_by_role("button", name="Snooze: 2 batches").click()
    expect(page.locator("#chosen-said")).to_have_text("2 batches snoozed.")
    page.get_by_role("link", name="The list").click()
    expect(page.locator("tbody tr")).to_have_count(0)
    assert "payload.n" in page.get_by_label("Search", exact=True).input_value()
    assert value(conn, "SELECT count(*) FROM batchq.batches WHERE run_at > now() + interval '6 minutes'") == 2
    page.get_by_role("button", name="Search").click()
    context.close()


def test_hostile_texts_in_columns_fields_and_suggestions_are_text(conn: Conn, site: Site, page: Page) -> None:
    insert(conn, kind=HOSTILE, queue=HOSTILE, key=HOSTILE, unique_key=HOSTILE, payload={HOSTILE: HOSTILE})
    processing(conn, worker=HOSTILE)
    finished(conn, "failed", error=f'{{"error": "{HOSTILE[:40]}"}}')
    columns = ".".join(["id", "queue", "key", "unique_key", "worker", "error"])
    open_list(page, site, f"?columns={columns}")
    expect(page.locator("tbody")).to_contain_text(HOSTILE)
    for text in (HOSTILE, f"kindd:{HOSTILE}", "payload." + HOSTILE, "key:" + HOSTILE):
        page.get_by_label("Search", exact=True).fill(text)
        page.get_by_role("button", name="Search").click()
        expect(page.get_by_label("Search", exact=True)).to_have_value(text)
        assert "hacked" not in page.title()
        assert page.locator("img").count() == 0
    assert page.locator("datalist option").count() > 10


@pytest.fixture
def phone(browser: Browser, site: Site) -> Iterator[Page]:
    """Open a tab of a phone's size."""
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True)
    watched = Watched(context.new_page(), site.url)
    yield watched.page
    context.close()
    check_nothing_but_refused_searches(watched)


def test_actions_are_reachable_on_a_phone_and_nothing_is_wider(conn: Conn, site: Site, phone: Page) -> None:
    set_scene(conn)
    every = ".".join(["id", "queue", "key", "unique_key", "priority", "progress", "run_at", "ended", "worker", "error"])
    for path in ("/batches", f"/batches?status=failed&columns={every}", "/chosen/cancel?id=1&id=2", "/batches?q=x:1"):
        phone.goto(site.url + path)
        assert phone.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
    open_list(phone, site, "?status=ready")
    phone.locator("tbody input").nth(0).tap()
    phone.locator("tbody input").nth(1).tap()
    button = phone.locator("#chosen-cancel")
    expect(button).to_be_in_viewport()
    box = button.bounding_box()
    assert box
    assert box["height"] >= 32
    button.tap()
    expect(phone.locator("#chosen-would")).to_have_text("2 would be cancelled.")


if __name__ == "__main__":
    run_alone(__file__)
