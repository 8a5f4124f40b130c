"""How a process exits in time and with its true exit code, whatever handlers left behind and whoever reads."""

import atexit
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from batchq.common.log import get_logger

_LEAVE_SECONDS = 2.5
_THREAD_SECONDS = 1.0
WRITE_SECONDS = 1.0

_log = get_logger()
_known_codes: list[int] = []  # the exit code, once it is known


def leave(code: int) -> NoReturn:
    """Exit with *code*, as Python does, but within _LEAVE_SECONDS.

    Python waits for the threads, pools and child processes that handlers left behind, and for whoever reads standard
    output, however long that takes. Here threads and pools get a second; then `atexit` functions are called.
    """
    _known_codes.append(code)
    leave_after(_LEAVE_SECONDS)
    join_threads: Callable[[], None] = vars(threading)["_shutdown"]  # the interpreter's own: it joins pools as well
    within(_THREAD_SECONDS, join_threads)
    with suppress(BaseException):
        atexit._run_exitfuncs()
    flush()
    os._exit(code)


def leave_after(seconds: float) -> None:
    """Exit after that time, whatever this process then waits for: the platform is about to kill it."""
    timer = threading.Timer(seconds, _leave_now)
    timer.daemon = True
    timer.start()


def _leave_now() -> None:
    if not _known_codes:
        _log.error("worker exited before all outcomes were written")
    flush()
    os._exit(_known_codes[0] if _known_codes else 1)


def flush() -> bool:
    """Write what was printed, whatever handlers did to the streams; return whether it was written (somebody reads)."""
    return within(WRITE_SECONDS, _flush_streams)


def _flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()


def within(seconds: float, call: Callable[[], object]) -> bool:
    """Return whether a call ended in that time. After a write that did not, only os._exit() is safe."""

    def guarded() -> None:
        with suppress(BaseException):
            call()

    thread = threading.Thread(target=guarded, name="batchq-last-words", daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()
