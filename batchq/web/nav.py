"""The pages that every page leads to: in groups, since a phone shows only a few names beside each other."""

from collections.abc import Sequence
from typing import NamedTuple


class Page(NamedTuple):
    """A page that has a name of its own. key: after "g", it leads there."""

    name: str
    address: str
    key: str


class Entry(NamedTuple):
    """A page of the navigation. is_current: it is the page that is shown. is_within: the shown page belongs to it."""

    name: str
    address: str
    is_current: bool
    is_within: bool


class Group(NamedTuple):
    """A name of the navigation, which leads to the first of its pages. below: the beginnings of the addresses of other
    pages that belong to it."""

    name: str
    pages: tuple[Page, ...]
    below: tuple[str, ...] = ()

    def has(self, path: str) -> bool:
        """Return whether a page belongs to it."""
        return any(path == page.address for page in self.pages) or path.startswith(self.below)


GROUPS = (
    Group("Overview", (Page("Overview", "/", "o"),), ("/kinds",)),
    Group("Batches", (Page("Batches", "/batches", "b"),), ("/batches/",)),
    Group("Failures", (Page("Failures", "/failures", "f"),), ("/failures/",)),
    Group("Charts", (Page("Charts", "/charts", "c"),)),
    Group("Flows", (Page("Flows", "/flows", "d"), Page("Spread", "/spread", "p")), ("/flow/",)),
    Group("Workers", (Page("Workers", "/workers", "w"),)),
    Group("Limits", (Page("Limits", "/limits", "l"), Page("Keys", "/keys", "k")), ("/limits/",)),
    Group("Schedules", (Page("Schedules", "/schedules", "s"),), ("/schedules/",)),
    Group("Audit", (Page("Audit", "/audit", "a"),)),
)
ALL_PAGES = tuple(page for group in GROUPS for page in group.pages)


def groups_on(path: str) -> list[Entry]:
    """Return the navigation of all pages, as the page with that address shows it."""
    return [
        Entry(group.name, first.address, path == first.address, group.has(path) and path != first.address)
        for group in GROUPS
        for first in group.pages[:1]
    ]


def pages_beside(path: str) -> list[Entry]:
    """Return the pages of the group that a page belongs to; none if that has only one."""
    for group in GROUPS:
        if len(group.pages) > 1 and group.has(path):
            return [Entry(page.name, page.address, path == page.address, False) for page in group.pages]
    return []


def databases_beside(names: Sequence[str], shown: str | None, path: str) -> list[Entry]:
    """Return the databases, after the page of all: from a page that every database has, to the same page of each."""
    if not names:
        return []
    same = path if shown and any(path == page.address for page in ALL_PAGES) else "/"
    return [
        Entry("All databases", "/", shown is None and path == "/", False),
        *(Entry(name, f"/db/{name}{same}", name == shown, False) for name in names),
    ]
