"""Run something in a thread for as long as a block."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def running(run: Callable[[], object], close: Callable[[], object]) -> Iterator[threading.Thread]:
    """Run *run* in a thread while the block runs; then call *close*, which ends it, and wait for it."""
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield thread
    finally:
        close()
        thread.join()
