"""A handler that forks has two processes come back; only the first one goes on.

The child has the parent's connections, and a copy of the batches in its hand: it would write into the one and work the
other once more. What it does before it comes back is the handler's own business: subprocess and multiprocessing, whose
children never come back, are not touched by this.
"""

import os
import threading

from batchq.common.log import current_batch, get_logger

EXIT_FORK = 70  # EX_SOFTWARE

is_fork_of_handler = threading.Event()
log = get_logger()


def note_fork() -> None:
    """In a child: note whether it was a handler that forked."""
    if current_batch.get() is not None:
        is_fork_of_handler.set()


os.register_at_fork(after_in_child=note_fork)


def end_if_forked() -> None:
    """End the process if it is the child of a handler that forked."""
    if is_fork_of_handler.is_set():
        log.error("a handler has forked, and its child came back; it ends here", pid=os.getpid())
        os._exit(EXIT_FORK)
