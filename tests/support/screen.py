"""The full screen of `batchq top`, driven without a terminal."""

from collections.abc import Callable
from typing import Any


async def until(pilot: Any, condition: Callable[[], bool]) -> None:
    """Let the screen go on until a condition holds."""
    for _ in range(300):
        if condition():
            return
        await pilot.pause(0.05)
    raise AssertionError("the screen never came to it")
