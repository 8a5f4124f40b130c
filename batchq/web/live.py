"""Live parts of pages, by server-sent events: however many people watch a part, it is read once for all of them.

Each watched part has a task that reads and renders it, and sends the same text to all its viewers. After a read the
task waits 100 times as long as the read took, or 50 times for each part if people watch several. So one part costs a
hundredth of one database connection's time, and all together cost a fiftieth, unless a read takes so long that the
longest wait, 10 s, is too short for that.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

import psycopg
from starlette.exceptions import HTTPException

from batchq.errors import BatchqError

EVERY_SECONDS = 1.5
_SLOWEST_SECONDS = 10.0
_SHARE = 100
_COMMENT_SECONDS = 15.0  # how often a stream without news sends something, which also finds viewers that are gone
STREAM_SECONDS = 3600.0  # then the browser reconnects, and its session is checked again
_MOST_PARTS = 200
_MOST_VIEWERS = 500
_MOST_OF_A_CLIENT = 150  # of the 200 connections that a client may have: the others are for its requests

Render = Callable[[], str]


@dataclass
class LivePart:
    """A part of a page that somebody watches.

    viewers: a queue of length one for each, which holds the newest text, and the client that it belongs to.
    """

    render: Render
    viewers: dict[asyncio.Queue[str], str] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None
    text: str | None = None
    reads: int = 0

    def publish(self, text: str) -> None:
        """Send a changed text to every viewer; one that has not taken the previous text misses that one."""
        if text == self.text:
            return
        self.text = text
        for texts in self.viewers:
            if texts.full():
                texts.get_nowait()
            texts.put_nowait(text)


class Live:
    """The parts that are watched now. Used in the event loop only."""

    def __init__(self, every_seconds: float = EVERY_SECONDS, stream_seconds: float = STREAM_SECONDS) -> None:
        self._every_seconds = every_seconds
        self._stream_seconds = stream_seconds
        self.share = _SHARE
        self.watched: dict[str, LivePart] = {}

    @property
    def viewers(self) -> int:
        """Viewers of all parts."""
        return len(self._clients())

    def _clients(self) -> list[str]:
        return [client for part in self.watched.values() for client in part.viewers.values()]

    def is_full(self, name: str, client: str = "") -> bool:
        """Return whether one more viewer would be too many: of this client, in all, or of one more part."""
        clients = self._clients()
        return (
            clients.count(client) >= _MOST_OF_A_CLIENT
            or len(clients) >= _MOST_VIEWERS
            or (name not in self.watched and len(self.watched) >= _MOST_PARTS)
        )

    async def stream(
        self, name: str, render: Render, is_let_in: Callable[[], bool], client: str = ""
    ) -> AsyncIterator[str]:
        """Yield an event whenever the part has changed, and a comment when 15 s have passed without one. End once the
        viewer is no longer let in, for example after logging out, or when its time is over: the browser reconnects."""
        until = time.monotonic() + self._stream_seconds
        with self._viewing(name, render, client) as texts:
            yield "retry: 2000\n\n"
            while (left := until - time.monotonic()) > 0:
                try:
                    news = _event(await asyncio.wait_for(texts.get(), min(left, _COMMENT_SECONDS)))
                except TimeoutError:
                    news = ": no change\n\n"
                if not is_let_in():
                    return
                yield news

    @contextlib.contextmanager
    def _viewing(self, name: str, render: Render, client: str) -> Iterator[asyncio.Queue[str]]:
        """Add a viewer during the block: the first one of a part starts its task, the last one ends it."""
        part = self.watched.setdefault(name, LivePart(render))
        texts: asyncio.Queue[str] = asyncio.Queue(1)
        part.viewers[texts] = client
        if part.text is not None:
            texts.put_nowait(part.text)
        if part.task is None:
            part.task = asyncio.get_running_loop().create_task(self._keep_reading(part))
        try:
            yield texts
        finally:
            del part.viewers[texts]
            if not part.viewers:
                part.task.cancel()
                self.watched.pop(name, None)

    async def _keep_reading(self, part: LivePart) -> None:
        while True:
            began_at = time.monotonic()
            # Viewers keep the last text while the database is unavailable, and of what is gone (HTTPException 404).
            with contextlib.suppress(psycopg.Error, BatchqError, HTTPException):
                text = await asyncio.to_thread(part.render)
                part.reads += 1
                part.publish(text)
            await asyncio.sleep(self.rest_seconds(time.monotonic() - began_at))

    def rest_seconds(self, spent_seconds: float) -> float:
        """Return how long to wait after a read."""
        parts = max(1.0, len(self.watched) / 2)
        return min(max(self.share * parts * spent_seconds, self._every_seconds), _SLOWEST_SECONDS)


def _event(text: str) -> str:
    """Return a text as one server-sent event."""
    lines = text.replace("\r", "").split("\n")
    return "".join(f"data: {line}\n" for line in lines) + "\n"
