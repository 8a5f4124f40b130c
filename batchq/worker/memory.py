"""Memory of a worker process: large buffers are returned to the system immediately, garbage collection is rare."""

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # of glibc's malloc.h; see mallopt(3)
_ARENAS = 2
_LARGE_BYTES = 128 * 1024
NEW_OBJECTS = 10_000  # containers allocated between two collections; Python's default is 700 to 2,000


def return_large_buffers() -> bool:
    """Limit glibc's malloc to few arenas, and keep large buffers out of them; return whether it was done.

    By default each thread gets its own arena, and the size from which a freed buffer is returned immediately grows with
    the largest buffer ever freed. Occasional payloads of a megabyte then leave holes in every arena, and the process
    grows for hours. Other C libraries have no mallopt. Settings in the environment take precedence.
    """
    if any(name in os.environ for name in ("MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_ARENA_MAX, _ARENAS)) and bool(mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES))


@contextmanager
def collecting_seldom() -> Iterator[None]:
    """Collect garbage less often during the block, and never what existed before it.

    The thousands of batches in flight are not garbage, but each collection traverses them: a fifth of the cost of a
    batch in Python (drains of 100,000, 2026-11-26). A disabled collector stays disabled, a larger threshold is kept.
    """
    before, *older = gc.get_threshold()
    if not gc.isenabled() or before == 0:
        yield
        return
    gc.freeze()
    gc.set_threshold(max(before, NEW_OBJECTS), *older)
    try:
        yield
    finally:
        gc.set_threshold(before, *older)
        gc.unfreeze()
