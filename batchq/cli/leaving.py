"""How a process ends in time and with its true exit code, whatever handlers have left behind and whoever reads."""

import atexit
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from batchq.common.log import get_logger

LEAVE_SECONDS = 2.5
THREAD_SECONDS = 1.0
WRITE_SECONDS = 1.0

log = get_logger()
known_codes: list[int] = []  # the exit code, from when it is known


def leave(code: int) -> NoReturn:
    """End the process with *code*, as Python does, but within LEAVE_SECONDS.

    Python waits for the threads, pools and child processes that handlers left behind, and for whoever reads standard
    output, however long that takes. Threads and pools get a second here, then what is registered with `atexit` is
    called.
    """
    known_codes.append(code)
    leave_after(LEAVE_SECONDS)
    join_threads: Callable[[], None] = vars(threading)["_shutdown"]  # the interpreter's own: it joins pools as well
    within(THREAD_SECONDS, join_threads)
    with suppress(BaseException):
        atexit._run_exitfuncs()
    flush()
    os._exit(code)


def leave_after(seconds: float) -> None:
    """End the process after so many seconds, whatever it waits for then: the platform is about to kill it."""
    timer = threading.Timer(seconds, leave_now)
    timer.daemon = True
    timer.start()


def leave_now() -> None:
    """End the process: with its exit code if that is known, else as one that has not written everything."""
    if not known_codes:
        log.error("the worker leaves, though not all was written; the leases will bring those batches back")
    flush()
    os._exit(known_codes[0] if known_codes else 1)


def flush() -> bool:
    """Write what was printed, if somebody reads it: let nothing be lost with the process, whatever handlers have done
    to its streams. Return whether it could be."""
    return within(WRITE_SECONDS, flush_streams)


def flush_streams() -> None:
    """Write what was printed, however long it takes."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()


def within(seconds: float, call: Callable[[], object]) -> bool:
    """Return whether a call has ended within so many seconds. One that writes and has not: only os._exit() is safe."""

    def guarded() -> None:
        with suppress(BaseException):
            call()

    thread = threading.Thread(target=guarded, name="batchq-last-words", daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()
