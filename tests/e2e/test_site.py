"""The documentation site is built without a warning, can be searched, and asks no other host for anything."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

import batchq
from tests.support.alone import run_alone
from tests.support.wheels import ROOT, build_wheel, install, new_environment, run


@pytest.fixture(scope="module")
def site() -> Iterator[Path]:
    """Build the site with what the extra `docs` installs; return its directory."""
    with TemporaryDirectory(prefix="batchq-site-") as directory:
        place = Path(directory)
        programs = new_environment(place / "venv")
        install(programs, build_wheel(place), "docs")
        said = run(programs / "mkdocs", "build", "--strict", "--site-dir", place / "site", cwd=ROOT)
        assert re.findall(r"^WARNING.*", said, re.MULTILINE) == []
        yield place / "site"


def test_the_reference_can_be_searched(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text())
    titles = {entry["title"] for entry in index["docs"] if entry["location"].startswith("reference/")}
    assert set(batchq.__all__) <= titles


def test_every_page_of_docs_is_there_and_the_readme_is_the_home(site: Path) -> None:
    pages = {path.parent.relative_to(site).as_posix() for path in site.rglob("index.html")}
    sources = {path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")}
    assert {(path.parent if path.name == "README" else path).as_posix() for path in sources} < pages
    home = (site / "index.html").read_text()
    assert '<a href="tutorial/">' in home
    assert '<img alt="batchq top: running batches" src="screenshots/top-running.svg"' in home


def test_a_page_loads_nothing_from_another_host(site: Path) -> None:
    page = (site / "index.html").read_text()
    loaded = re.findall(
        r"<(?:script|img|iframe)[^>]*\ssrc=\"?(https?:[^\" >]+)|<link[^>]*href=\"?(https?:[^\" >]+)", page
    )
    assert loaded == []


if __name__ == "__main__":
    run_alone(__file__)
