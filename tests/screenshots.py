"""Make docs/screenshots/*.png: ``python -m tests.screenshots``. Each page in both themes, at two widths."""

from pathlib import Path

import psycopg
from playwright.sync_api import sync_playwright

from tests.support.browser import CHROMIUM, THEMES, WIDTHS
from tests.support.databases import Databases
from tests.support.scene import set_scene
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
        databases.close()


def take(pages: dict[str, str]) -> None:
    """Take a picture of each page in each way."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for theme in THEMES:
            for width in WIDTHS:
                context = browser.new_context(
                    color_scheme=theme, viewport={"width": width, "height": HEIGHTS[width]}, reduced_motion="reduce"
                )
                page = context.new_page()
                for name, url in pages.items():
                    page.goto(url)
                    page.wait_for_selector("#live-label:text('Live'), table")
                    page.screenshot(path=FOLDER / f"{name}-{theme}-{width}.png")
                    print(FOLDER / f"{name}-{theme}-{width}.png")
                context.close()
        browser.close()


if __name__ == "__main__":
    main()
