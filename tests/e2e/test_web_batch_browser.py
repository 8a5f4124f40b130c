"""The page of one batch in a browser: its tree folds, its JSON is copied, a copy is enqueued, by mouse and keyboard."""

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from batchq.postgres.statements.checkpoints import Progress
from tests.component.rows import Conn, checkpoint, failure, insert, processing, value
from tests.e2e.test_web_all_pages_browser import SIZES, complaints, violations
from tests.support.alone import run_alone
from tests.support.browser import THEMES, WAIT_MILLISECONDS, Watched, chromium
from tests.support.scene import set_scene
from tests.support.steps import step
from tests.support.web import Site, served

expect.set_options(timeout=WAIT_MILLISECONDS)
HOSTILE = "<script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">\u202egnp.exe"
REFUSALS = ("409 (Conflict)", "503 (Service Unavailable)")  # that a test asks for
PAYLOAD = {"order": {"lines": [{"sku": "a", "count": 2}, {"sku": "b"}], "note": "a\u202eb"}, "dry_run": False}


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
    """Open a tab that may use the clipboard, and must have nothing to complain of."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    watched = Watched(context.new_page(), site.url)
    yield watched.page
    context.close()
    assert [text for text in watched.complaints if not any(code in text for code in REFUSALS)] == []


def opened(page: Page) -> list[str]:
    """Return the ids of what is unfolded in the tree of the payload."""
    found: list[str] = page.evaluate("[...document.querySelectorAll('#tree-payload details[open]')].map(e => e.id)")
    return found


def test_a_tree_folds_by_mouse_by_keyboard_and_all_at_once(conn: Conn, site: Site, page: Page) -> None:
    one = insert(conn, payload=PAYLOAD)
    page.goto(f"{site.url}/batches/{one}")
    deep = page.locator("#tree-payload").get_by_text('"sku": "b"')
    expect(deep).to_be_hidden()
    page.get_by_role("button", name="Expand all").click()
    expect(deep).to_be_visible()
    assert len(opened(page)) == 5
    page.get_by_role("button", name="Collapse all").click()
    assert opened(page) == []
    step("by keyboard only")
    page.locator("#t-payload-s").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert opened(page) == ["t-payload", "t-payload-1"]
    expect(page.locator("#tree-payload")).to_contain_text("a⟨U+202E⟩b")


def test_json_is_copied_as_it_is_stored_and_a_reader_hears_of_it(conn: Conn, site: Site, page: Page) -> None:
    one = insert(conn, payload={**PAYLOAD, "long": "x" * 50_000})
    page.goto(f"{site.url}/batches/{one}")
    copy = page.locator("#copy-payload")
    copy.focus()
    page.keyboard.press("Enter")
    expect(copy).to_have_text("Copied")
    expect(page.locator("#answer")).to_have_text("Copied")
    expect(copy).to_be_focused()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == value(conn, "SELECT payload::text FROM batchq.batches")
    assert ("a\u202eb" in copied, len(copied) > 50_000) == (True, True)
    step("a browser without a clipboard, and a server that does not answer")
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    expect(copy).to_have_text("Copy JSON")
    copy.click()
    expect(copy).to_have_text("Copied")
    page.route("**/payload.json", lambda route: route.fulfill(status=503))
    expect(copy).to_have_text("Copy JSON")
    copy.click()
    expect(copy).to_have_text("Not copied: open the raw JSON")


def test_a_copy_is_enqueued_by_hand_and_a_mistake_is_told(conn: Conn, site: Site, page: Page) -> None:
    one = insert(conn, payload=PAYLOAD, unique_key="once")
    page.goto(f"{site.url}/batches/{one}")
    page.get_by_role("link", name="Enqueue a copy").click()
    field = page.get_by_label("Payload")
    expect(field).to_have_value('{\n    "order": {\n        "note": "a\\u202eb",\n        "lines": [\n            {\n'
                                '                "sku": "a",\n                "count": 2\n            },\n'
                                '            {\n                "sku": "b"\n            }\n        ]\n    },\n'
                                '    "dry_run": false\n}')  # fmt: skip
    field.fill('{"order": 1,}')
    page.get_by_label("Reason").fill("with another order")
    page.get_by_role("button", name="Enqueue a copy").click()
    expect(page.get_by_role("alert")).to_contain_text("the payload is not valid JSON")
    expect(field).to_have_value('{"order": 1,}')
    field.fill('{"order": 1}')
    page.get_by_role("button", name="Enqueue a copy").click()
    expect(page.locator("h1")).to_contain_text(f"Batch {one + 1}")
    expect(page.locator(".timeline")).to_contain_text(f"enqueued as a copy of {one} by web: with another order")
    page.locator(".timeline").get_by_role("link", name=str(one), exact=True).click()
    expect(page.locator("h1")).to_contain_text(f"Batch {one}")
    assert value(conn, "SELECT payload::text FROM batchq.batches WHERE id = %s", [one + 1]) == '{"order": 1}'


def test_the_bar_of_a_failed_batch_has_two_colors(conn: Conn, site: Site, page: Page) -> None:
    taken = processing(conn, items=list(range(1500)))
    checkpoint(conn, taken, Progress(1485, 15, [failure(number) for number in range(15)], first_index=0))
    page.goto(f"{site.url}/batches/{taken.id}")
    bar = page.get_by_role("img", name="1,485 done, 15 failed, of 1,500 items")
    expect(page.locator("#live-dot[data-state=on]")).to_be_visible()
    page.locator("#live-switch").click()  # a bar that is replaced meanwhile has no style
    expect(bar).to_be_visible()
    colors = bar.evaluate("e => [...e.children].map(part => getComputedStyle(part).fill)")
    widths = bar.evaluate("e => [...e.children].map(part => part.getBoundingClientRect().width)")
    assert len(set(colors)) == 2
    assert widths[0] > 50 * widths[1] > 50
    whole = bar.evaluate("e => e.getBoundingClientRect().width")
    assert abs(sum(widths) - whole) < 1


def test_it_works_without_javascript(conn: Conn, site: Site, browser: Browser) -> None:
    one = insert(conn, payload=PAYLOAD)
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{site.url}/batches/{one}")
    deep = page.locator("#tree-payload").get_by_text('"sku": "b"')
    expect(deep).to_be_hidden()
    page.locator("#t-payload-1-2-s, #t-payload-1-1-s").filter(has_text="array").click()
    page.locator("#tree-payload summary", has_text="1 key").click()
    expect(deep).to_be_visible()
    for name in ("Expand all", "Collapse all", "Copy JSON"):
        expect(page.get_by_role("button", name=name)).to_be_hidden()
    page.locator("#text-payload-s").click()
    expect(page.locator("#text-payload pre")).to_be_visible()
    page.get_by_role("link", name="Enqueue a copy").click()
    page.get_by_role("button", name="Enqueue a copy").click()
    expect(page.locator("h1")).to_contain_text(f"Batch {one + 1}")
    page.goto(f"{site.url}/batches/{one}/payload.json")
    assert '"dry_run": false' in page.content()
    context.close()


def test_hostile_texts_are_text(conn: Conn, site: Site, page: Page) -> None:
    taken = processing(conn, payload={HOSTILE: [HOSTILE, {HOSTILE: HOSTILE}]}, worker=HOSTILE)
    conn.execute("SELECT batchq.cancel(%s, %s, %s)", [taken.id, HOSTILE, HOSTILE])
    raw = page.context.new_page()  # not watched: for a page that is no HTML, a browser asks for a favicon.ico
    raw.goto(f"{site.url}/batches/{taken.id}/payload.json")
    assert ("hacked" not in raw.title(), raw.locator("img").count()) == (True, 0)
    for path in ("", "/copy"):
        page.goto(f"{site.url}/batches/{taken.id}{path}")
        if not path:
            page.get_by_role("button", name="Expand all").click()
            expect(page.locator("#tree-payload")).to_contain_text("⟨U+202E⟩gnp.exe")
            expect(page.locator(".timeline")).to_contain_text("<script>document.title='hacked'</script>")
        assert "hacked" not in page.title(), path
        assert page.locator("img").count() == 0, path


@pytest.mark.parametrize("theme", THEMES)
def test_it_is_readable_at_every_width_unfolded_too(conn: Conn, site: Site, browser: Browser, theme: Any) -> None:
    running = set_scene(conn)
    deep: Any = "x" * 3000
    for number in range(20):
        deep = {f"key_{number}_" + "k" * 60: [deep, number]}
    other = insert(conn, payload=deep)
    context = browser.new_context(color_scheme=theme)
    watched = Watched(context.new_page(), site.url)
    found: list[str] = []
    for path in (f"/batches/{running}", f"/batches/{other}", f"/batches/{running}/copy"):
        watched.page.goto(site.url + path)
        if watched.page.locator("#unfold-payload").count():
            watched.page.locator("#unfold-payload").click()
        for width, height in SIZES.items():
            watched.page.set_viewport_size({"width": width, "height": height})
            found += [f"{path} at {width} px: {problem}" for problem in complaints(watched.page)]
        found += [f"{path}: {problem}" for problem in violations(watched.page)]
    step("on a phone, every action is in reach of a thumb")
    watched.page.goto(f"{site.url}/batches/{running}")
    watched.page.set_viewport_size({"width": 390, "height": 844})
    boxes = watched.page.evaluate(
        "[...document.querySelectorAll('.head .verbs a')].map(e => e.getBoundingClientRect())"
        ".map(box => [box.right <= innerWidth && box.bottom < innerHeight, box.height])"
    )
    assert [box for box in boxes if not box[0] or box[1] < 32] == []
    assert len(boxes) == 2
    context.close()
    assert not found, "\n".join(found)
    assert watched.complaints == []


if __name__ == "__main__":
    run_alone(__file__)
