"""Memory of a worker process: large buffers go back to the system at once; rubbish is not looked for all the time."""

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of glibc's malloc.h; see mallopt(3)
ARENAS = 2
LARGE_BYTES = 128 * 1024
NEW_OBJECTS = 10_000  # containers that are made until the collector looks at them; Python's own figure is 700 to 2,000


def return_large_buffers() -> bool:
    """Keep glibc's malloc to few arenas, and large buffers out of them; return whether it was done.

    By default each thread gets an arena of its own, and the size from which a buffer is given back at once grows with
    the largest one that was ever freed: a payload of a megabyte here and there then leaves holes in every arena, and
    the process grows for hours. Other C libraries have no mallopt; what the environment sets stays.
    """
    if any(name in os.environ for name in ("MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_ARENA_MAX, ARENAS)) and bool(mallopt(M_MMAP_THRESHOLD, LARGE_BYTES))


@contextmanager
def collecting_seldom() -> Iterator[None]:
    """Have the garbage collector look less often, and never again at what was there before the block.

    The thousands of batches that a worker has in hand are no rubbish, but each look goes through them: a fifth of what
    a batch costs in Python (drains of 100,000, 2026-11-26). One that is off stays off, a larger figure stays as it is.
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
