"""Wait for a condition instead of sleeping and hoping."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
POLL_SECONDS = 0.01


def wait_until(condition: Callable[[], T], timeout_seconds: float, what: str) -> T:
    """Call *condition* until it returns something true, and return that.

    Raise TimeoutError naming *what* and the last value when *timeout_seconds* have passed.
    """
    end = time.monotonic() + timeout_seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout_seconds:g} s for {what}; last seen: {value!r}")
        time.sleep(POLL_SECONDS)
    return value
