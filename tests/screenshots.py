"""Make docs/screenshots/*.png: ``python -m tests.screenshots``. Each page in both themes, at two widths."""

from collections.abc import Iterator
from pathlib import Path

import psycopg
from playwright.sync_api import Page, sync_playwright

from tests.support.browser import CHROMIUM, THEMES, WIDTHS
from tests.support.databases import Databases
from tests.support.scene import Conn, set_scene
from tests.support.servers import running_server
from tests.support.web import served

FOLDER = Path(__file__).parents[1] / "docs" / "screenshots"
HEIGHTS = {390: 844, 1280: 860}


def main() -> None:
    """Make them all."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with running_server() as server:
        databases = Databases(server)
        with databases.migrated() as name, psycopg.connect(server.dsn(name), autocommit=True) as conn:
            batch_id = set_scene(conn)
            with served(server.dsn(name)) as site:
                paths = {"overview": "/", "batch": f"/batches/{batch_id}", "list": "/batches?queue=bulk"}
                take({name: site.url + path for name, path in paths.items()})
                take_many(conn, site.url)
        databases.close()


def take(pages: dict[str, str]) -> None:
    """Take a picture of each page in each way."""
    for page, way in ways():
        for name, url in pages.items():
            page.goto(url)
            page.wait_for_selector("#live-label:text('Live'), table")
            save(page, f"{name}-{way}")


def take_many(conn: Conn, url: str) -> None:
    """Take pictures of a verb that is being done to many."""
    conn.execute("INSERT INTO batchq.batches (kind) SELECT 'mail' FROM generate_series(1, 2400)")
    for page, way in ways():
        conn.execute("UPDATE batchq.batches SET priority = 0 WHERE kind = 'mail'")
        go_half_way(page, url)
        save(page, f"many-{way}")


def ways() -> Iterator[tuple[Page, str]]:
    """Yield a tab in each theme and at each width, and what that is called."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for theme in THEMES:
            for width in WIDTHS:
                context = browser.new_context(
                    color_scheme=theme, viewport={"width": width, "height": HEIGHTS[width]}, reduced_motion="reduce"
                )
                yield context.new_page(), f"{theme}-{width}"
                context.close()
        browser.close()


def save(page: Page, name: str) -> None:
    """Take a picture."""
    page.screenshot(path=FOLDER / f"{name}.png")
    print(FOLDER / f"{name}.png")


def go_half_way(page: Page, url: str) -> None:
    """Change the priority of many batches, as far as the first chunk."""
    page.goto(f"{url}/bulk/set_priority?kind=mail&priority=-1&reason=the+customers+wait&actor=ann")
    page.get_by_role("button", name="Count them").click()
    page.route("**/bulk/*", lambda route: None if route.request.resource_type == "fetch" else route.continue_())
    page.get_by_role("button", name="batches").click()
    page.wait_for_selector("#bulk-stop:visible")


if __name__ == "__main__":
    main()
