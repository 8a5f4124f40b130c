"""The full screen of `batchq top`, driven without a terminal."""

import asyncio
from argparse import Namespace
from collections.abc import Callable, Coroutine
from contextlib import closing
from typing import Any

from batchq.cli.top.app import Top
from batchq.cli.top.live_table import LiveTable
from batchq.cli.top.source import Source
from batchq.postgres.link import Link

WIDE, NARROW = (200, 50), (80, 24)


async def until(pilot: Any, condition: Callable[[], bool]) -> None:
    """Let the screen go on until a condition holds."""
    for _ in range(300):
        if condition():
            return
        await pilot.pause(0.05)
    raise AssertionError("the screen never came to it")


def on_screen(
    dsn: str, act: Callable[[Top, Any], Coroutine[Any, Any, None]], size: tuple[int, int] = WIDE, **given: Any
) -> None:
    """Run the full screen on a database, without a terminal, and *act* on it. *given*: of `Top`."""

    async def run(source: Source) -> None:
        screen = Top(source, 0.1, **given)
        async with screen.run_test(size=size) as pilot:
            await act(screen, pilot)

    with closing(Link(dsn, 5)) as link:
        asyncio.run(run(Source(link, Namespace(queue=None, kind=None), "ann")))


def table(screen: Top, name: str) -> LiveTable:
    """Return a table."""
    return screen.view.query_one(f"#{name}-table", LiveTable)


def cells(screen: Top, name: str) -> list[list[str]]:
    """Return the texts of a table."""
    found = table(screen, name)
    return [[str(cell).strip() for cell in found.get_row_at(number)] for number in range(found.row_count)]


def lines(screen: Top) -> list[str]:
    """Return what is on the screen, line by line."""
    return ["".join(part.text for part in line).rstrip() for line in screen.screen._compositor.render_strips()]


def state(screen: Top) -> str:
    """Return the line on top."""
    return str(screen.view.state.render())
