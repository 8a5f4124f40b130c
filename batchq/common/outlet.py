"""Lines on their way out of the process: a writer never waits forever for a reader.

A pipe whose reader has stopped, or a terminal that is stopped by Ctrl-S, accepts no more after 64 KB. A service thread
that waited there would renew no lease and handle no signal.
"""

import os
import select
import socket
import stat
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from batchq.common.portable import after_fork_in_child

MOST_BYTES = 4_000_000
_STUCK_SECONDS = 1.0


class Outlet:
    """Writes lines to the file *fd*, in order.

    `put` writes a line itself while the reader keeps up. Otherwise up to 4 MB wait for a thread that does nothing else.
    If there is no room, `put` waits; but if nothing was written for a second, the line is dropped. When all that waited
    is written, *on_dropped* is called with the number of dropped lines.
    """

    def __init__(self, fd: int, on_dropped: Callable[[int], None]) -> None:
        self._fd = fd
        self._on_dropped = on_dropped
        self._write_now = _writer_that_never_waits(fd)
        self._begin()
        after_fork_in_child(self._begin)

    def _begin(self) -> None:
        # Also in a child process: the parent writes the lines that waited.
        self._moved = threading.Condition()
        self._waiting: deque[bytes] = deque()
        self.waiting_bytes = 0
        self._moved_at = time.monotonic()
        self._dropped = 0
        self._is_reporting = False
        self._has_thread = False

    def put(self, line: bytes) -> None:
        """Write a line now or soon, or drop it. Raises nothing."""
        with self._moved:
            if not self._waiting:
                line = line[self._written_now(line) :]
                self._moved_at = time.monotonic()
            elif not self.has_room(len(line)):
                self._dropped += 1
                return
            if line:
                self._waiting.append(line)
                self.waiting_bytes += len(line)
                self._have_thread()

    def _written_now(self, line: bytes) -> int:
        """Return how many bytes were written without waiting; all, if nobody can read them."""
        try:
            return self._write_now(line)
        except BlockingIOError:
            return 0
        except (OSError, ValueError):
            return len(line)

    def has_room(self, size: int) -> bool:
        """Return whether there is room for a line; wait for room while the reader reads."""
        seconds = self._moved_at + _STUCK_SECONDS - time.monotonic()
        return self._moved.wait_for(lambda: self.waiting_bytes + size <= MOST_BYTES, max(0.0, seconds))

    def _have_thread(self) -> None:
        if self._has_thread:
            self._moved.notify_all()
        else:
            self._has_thread = True
            threading.Thread(target=self._run, name="batchq-log", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._moved:
                self._moved.wait_for(lambda: self._waiting)
                line = self._waiting[0]
            with suppress(OSError):
                self._write_out(line)
            with self._moved:
                self.waiting_bytes -= len(self._waiting.popleft())
                self._moved_at = time.monotonic()
                dropped = 0 if self._waiting else self._dropped
                self._dropped -= dropped
                self._is_reporting = dropped > 0
                self._moved.notify_all()
            if dropped:
                self._on_dropped(dropped)
                self._is_reporting = False

    def _write_out(self, line: bytes) -> None:
        while line:
            try:
                line = line[os.write(self._fd, line) :]
            except BlockingIOError:  # another process that shares the file has set it to O_NONBLOCK
                select.select([], [self._fd], [], _STUCK_SECONDS)

    def flush(self) -> None:
        """Wait until everything is written, or nothing was written for a second."""
        with self._moved:
            while (self._waiting or self._is_reporting) and time.monotonic() - self._moved_at < _STUCK_SECONDS:
                self._moved.wait(0.05)


def _writer_that_never_waits(fd: int) -> Callable[[bytes], int]:
    """Return a function that writes without waiting and returns how many bytes: 0 where that is impossible."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return lambda line: os.write(fd, line)
    if stat.S_ISSOCK(mode):
        sock = socket.socket(fileno=os.dup(fd))
        return lambda line: sock.send(line, socket.MSG_DONTWAIT)
    try:  # O_NONBLOCK on the file description that others share would change it for them, too
        own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:  # not Linux, or the pipe belongs to another user
        return lambda _: 0
    return lambda line: os.write(own, line)
