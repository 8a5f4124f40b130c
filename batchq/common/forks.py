"""If a handler forks, two processes return from it; only the first one continues.

The child has the parent's connections, and a copy of its batches: it would write to those connections, and run the
batches once more. What the child does before it returns is up to the handler: subprocess and multiprocessing, whose
children never return, are not affected.
"""

import os
import threading

from batchq.common.log import current_batch, get_logger
from batchq.common.portable import after_fork_in_child

_EXIT_FORK = 70  # EX_SOFTWARE

_is_fork_of_handler = threading.Event()
_log = get_logger()


def _note_fork() -> None:
    if current_batch.get() is not None:
        _is_fork_of_handler.set()


after_fork_in_child(_note_fork)


def end_if_forked() -> None:
    """Exit if this process is the child of a handler that forked."""
    if _is_fork_of_handler.is_set():
        _log.error("forked child of a handler ended", pid=os.getpid())
        os._exit(_EXIT_FORK)
