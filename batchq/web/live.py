"""Live pages by server-sent events: however many people watch a page, it is read once for all of them.

Each watched page has a task that reads and renders it while somebody watches, and hands the same text to all. After a
read it waits 100 times what the read took, at least a second and a half and at most ten: so a page costs the database
a hundredth of one connection's time.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

import psycopg

from batchq.errors import BatchqError

EVERY_SECONDS = 1.5
SLOWEST_SECONDS = 10.0
SHARE = 100
SIGN_OF_LIFE_SECONDS = 15.0
LONGEST_STREAM_SECONDS = 3600.0  # then the browser comes again, and is asked for its session
MOST_PAGES = 200
MOST_VIEWERS = 500
MOST_OF_A_CLIENT = 150  # of the 200 connections that it may have: the others are for its requests

Render = Callable[[], str]


@dataclass
class Watched:
    """A page that somebody watches. Each viewer has a queue of one place, for the newest text."""

    render: Render
    viewers: set[asyncio.Queue[str]] = field(default_factory=set)
    task: asyncio.Task[None] | None = None
    text: str | None = None
    reads: int = 0


class Live:
    """The pages that are watched now. Used in the event loop alone."""

    def __init__(self, every_seconds: float = EVERY_SECONDS) -> None:
        self.every_seconds = every_seconds
        self.share = SHARE
        self.watched: dict[str, Watched] = {}
        self.of_client: Counter[str] = Counter()

    @property
    def viewers(self) -> int:
        """How many watch, all pages together."""
        return sum(len(page.viewers) for page in self.watched.values())

    def is_full(self, name: str, client: str = "") -> bool:
        """Tell whether one more viewer of a page would be too many, or one more of this client's."""
        return (
            self.of_client[client] >= MOST_OF_A_CLIENT
            or self.viewers >= MOST_VIEWERS
            or (name not in self.watched and len(self.watched) >= MOST_PAGES)
        )

    async def stream(
        self, name: str, render: Render, is_let_in: Callable[[], bool], client: str = ""
    ) -> AsyncIterator[str]:
        """Yield events: the page whenever it has changed, and now and then a comment as a sign of life. End when the
        viewer is no longer let in, because he has logged out."""
        until = time.monotonic() + LONGEST_STREAM_SECONDS
        with self.counted(client), self.viewing(name, render) as texts:
            yield "retry: 2000\n\n"
            while time.monotonic() < until:
                try:
                    news = event(await asyncio.wait_for(texts.get(), SIGN_OF_LIFE_SECONDS))
                except TimeoutError:
                    news = ": still here\n\n"
                if not is_let_in():
                    return
                yield news

    @contextlib.contextmanager
    def counted(self, client: str) -> Iterator[None]:
        """Count one more viewer of a client's while the block runs."""
        self.of_client[client] += 1
        try:
            yield
        finally:
            self.of_client[client] -= 1
            if not self.of_client[client]:
                del self.of_client[client]

    @contextlib.contextmanager
    def viewing(self, name: str, render: Render) -> Iterator[asyncio.Queue[str]]:
        """Be a viewer of a page while the block runs: the first one starts its task, the last one ends it."""
        page = self.watched.setdefault(name, Watched(render))
        texts: asyncio.Queue[str] = asyncio.Queue(1)
        page.viewers.add(texts)
        if page.text is not None:
            texts.put_nowait(page.text)
        if page.task is None:
            page.task = asyncio.get_running_loop().create_task(self.keep_reading(page))
        try:
            yield texts
        finally:
            page.viewers.discard(texts)
            if not page.viewers:
                page.task.cancel()
                self.watched.pop(name, None)

    async def keep_reading(self, page: Watched) -> None:
        """Read and render a page, again and again, and hand out what has changed."""
        while True:
            began_at = time.monotonic()
            with contextlib.suppress(psycopg.Error, BatchqError):  # the database is away; the page says how old it is
                text = await asyncio.to_thread(page.render)
                page.reads += 1
                self.hand_out(page, text)
            spent = time.monotonic() - began_at
            await asyncio.sleep(self.rest_seconds(spent))

    def rest_seconds(self, spent_seconds: float) -> float:
        """Return how long to wait after a read."""
        return min(max(self.share * spent_seconds, self.every_seconds), SLOWEST_SECONDS)

    def hand_out(self, page: Watched, text: str) -> None:
        """Give every viewer the newest text; one that has not taken the one before misses that."""
        if text == page.text:
            return
        page.text = text
        for texts in page.viewers:
            if texts.full():
                texts.get_nowait()
            texts.put_nowait(text)


def event(text: str) -> str:
    """Return a text as one server-sent event."""
    lines = text.replace("\r", "").split("\n")
    return "".join(f"data: {line}\n" for line in lines) + "\n"
