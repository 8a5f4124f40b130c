"""Make docs/screenshots, each page in both themes, at two widths; `batchq top`.

python -m tests.instruments.screenshots
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
from playwright.sync_api import Page

from batchq.cli.top.app import Top
from tests.support.browser import THEMES, WIDTHS, chromium
from tests.support.databases import Databases
from tests.support.scene import Conn, advance, set_flow, set_scene
from tests.support.screen import on_screen, until
from tests.support.servers import running_server
from tests.support.web import served

FOLDER = Path(__file__).parents[2] / "docs" / "screenshots"
HEIGHTS = {390: 844, 1280: 860}
TERMINAL = (132, 16)
TABS = {"queues": "1", "running": "2", "failures": "3"}
FONTS_FROM_ELSEWHERE = re.compile(r"@font-face \{.*?\}", re.DOTALL)


def main() -> None:
    """Make them all."""
    with running_server() as server:
        databases = Databases(server)
        with databases.migrated() as name, psycopg.connect(server.dsn(name), autocommit=True) as conn:
            make(conn, server.dsn(name), FOLDER)
        databases.close()


def make(conn: Conn, dsn: str, folder: Path) -> None:
    """Make them all in a folder, of an empty queue that is filled for it."""
    folder.mkdir(parents=True, exist_ok=True)
    batch_id = set_scene(conn)
    take_top(conn, dsn, batch_id, folder)
    with served(dsn) as site:
        paths = {"overview": "/", "batch": f"/batches/{batch_id}", "list": "/batches?queue=bulk",
                 "failures": "/failures", "charts": "/charts"}  # fmt: skip
        take({name: site.url + path for name, path in paths.items()}, folder)
        take_many(conn, site.url, folder)
        take({"flow": f"{site.url}/flow/{set_flow(conn)}"}, folder)


# ------------------------------------------------------------------------------------------------------ the terminal


def take_top(conn: Conn, dsn: str, batch_id: int, folder: Path) -> None:
    """Take pictures of `batchq top`, while the batch goes on."""

    async def act(screen: Top, pilot: Any) -> None:
        for number, (name, key) in enumerate(TABS.items()):
            advance(conn, batch_id, 620 + 10 * number)
            await pilot.press(key)
            if name == "running":
                await until(pilot, lambda: bool(screen.main.rows.get("running")))
                advance(conn, batch_id, 700)
                await until(pilot, lambda: any(row.get("seconds_left") for row in screen.main.rows["running"]))
            await pilot.pause(0.5)
            picture = FONTS_FROM_ELSEWHERE.sub("", screen.export_screenshot(title=f"batchq top: {name}"))
            (folder / f"top-{name}.svg").write_text(picture)
            print(folder / f"top-{name}.svg")

    on_screen(dsn, act, TERMINAL)


# -------------------------------------------------------------------------------------------------------- the web UI


def take(pages: dict[str, str], folder: Path) -> None:
    """Take a picture of each page in each way."""
    for page, way in ways():
        for name, url in pages.items():
            page.goto(url)
            page.wait_for_selector("#live-label:text('Live'), table")
            save(page, folder / f"{name}-{way}.png")


def take_many(conn: Conn, url: str, folder: Path) -> None:
    """Take pictures of a verb that is being done to many."""
    conn.execute("INSERT INTO batchq.batches (kind) SELECT 'mail' FROM generate_series(1, 2400)")
    for page, way in ways():
        conn.execute("UPDATE batchq.batches SET priority = 0 WHERE kind = 'mail'")
        go_half_way(page, url)
        save(page, folder / f"many-{way}.png")
        page.unroute_all(behavior="ignoreErrors")


def ways() -> Iterator[tuple[Page, str]]:
    """Yield a tab in each theme and at each width, and what that is called."""
    with chromium() as browser:
        for theme in THEMES:
            for width in WIDTHS:
                context = browser.new_context(
                    color_scheme=theme, viewport={"width": width, "height": HEIGHTS[width]}, reduced_motion="reduce"
                )
                yield context.new_page(), f"{theme}-{width}"
                context.close()


def save(page: Page, path: Path) -> None:
    """Take a picture."""
    page.screenshot(path=path)
    print(path)


def go_half_way(page: Page, url: str) -> None:
    """Change the priority of many batches, as far as the first chunk."""
    page.goto(f"{url}/bulk/set_priority?kind=mail&priority=-1&reason=the+customers+wait&actor=ann")
    page.get_by_role("button", name="Count batches").click()
    page.route("**/bulk/*", lambda route: None if route.request.resource_type == "fetch" else route.continue_())
    page.get_by_role("button", name="batches").click()
    page.wait_for_selector("#bulk-stop:visible")


if __name__ == "__main__":
    main()
