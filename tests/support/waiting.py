"""Wait for a condition instead of sleeping and hoping."""

import os
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
POLL_SECONDS = 0.01
PATIENCE = float(os.environ.get("BATCHQ_TEST_PATIENCE", "1"))


def allowed(seconds: float) -> float:
    """Return *seconds*, a bound for a quiet machine, times BATCHQ_TEST_PATIENCE.

    Not for a bound that tells right from wrong: one just below a lock's time limit means nothing three times as long.
    """
    return seconds * PATIENCE


def wait_until(condition: Callable[[], T], timeout_seconds: float, what: str) -> T:
    """Call *condition* until it returns something true, and return that.

    Raise TimeoutError naming *what* and the last value when *timeout_seconds* have passed, as `allowed` says.
    """
    timeout_seconds = allowed(timeout_seconds)
    end = time.monotonic() + timeout_seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout_seconds:g} s for {what}; last seen: {value!r}")
        time.sleep(POLL_SECONDS)
    return value
