"""For the documentation site: files beside docs/ become pages, and links that leave docs/ lead to the repository."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent
PAGES = {"index.md": "README.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that come from files beside docs/."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Rewrite the links of a page, except in code blocks."""
    uri = page.file.src_uri
    here = posixpath.dirname(PAGES.get(uri, f"docs/{uri}"))
    parts = FENCE.split(markdown)
    return "".join(
        part if part.startswith("```") else LINK.sub(lambda link: _link(link, here, uri, config), part)
        for part in parts
    )


def _link(link: re.Match[str], here: str, uri: str, config: MkDocsConfig) -> str:
    """Return a link: to a page of the site where its target is one, else to the file in the repository."""
    target = posixpath.normpath(posixpath.join(here, link[1]))
    anchor = link[2] or ""
    page = next((page for page, source in PAGES.items() if source == target), target.removeprefix("docs/"))
    is_on_site = page != target and not (ROOT / target).is_dir()
    if is_on_site:
        return f"]({posixpath.relpath(page, posixpath.dirname(uri) or '.')}{anchor})"
    return f"]({config.repo_url.rstrip('/')}/{'tree' if (ROOT / target).is_dir() else 'blob'}/main/{target}{anchor})"
