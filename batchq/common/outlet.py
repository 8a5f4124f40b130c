"""Lines on their way out of the process: who writes one never waits for ever for whoever reads them.

A pipe whose reader stands still, or a terminal that is stopped by Ctrl-S, takes no more after 64 KB. A service thread
that waited there would extend no lease, and hear no signal.
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

MOST_BYTES = 4_000_000
STUCK_SECONDS = 1.0


class Outlet:
    """Writes lines to the file *fd*, in order.

    `put` writes a line itself while the reader keeps up. What the reader is too slow for waits, up to 4 MB of it, for a
    thread that does nothing else; then `put` waits for room, but if nothing has moved for a second the line is dropped.
    *tell_dropped* is called with the number of dropped lines when all that waited is written.
    """

    def __init__(self, fd: int, tell_dropped: Callable[[int], None]) -> None:
        self.fd = fd
        self.tell_dropped = tell_dropped
        self.write_now = writer_that_never_waits(fd)
        self.begin()
        os.register_at_fork(after_in_child=self.begin)

    def begin(self) -> None:
        """Begin with nothing that waits; in a child process too, since the parent writes what it has."""
        self.moved = threading.Condition()
        self.waiting: deque[bytes] = deque()
        self.waiting_bytes = 0
        self.moved_at = time.monotonic()
        self.dropped = 0
        self.is_telling = False
        self.has_thread = False

    def put(self, line: bytes) -> None:
        """Write a line; or have it written, or drop it. Raises nothing."""
        with self.moved:
            if not self.waiting:
                line = line[self.written_now(line) :]
                self.moved_at = time.monotonic()
            elif not self.has_room(len(line)):
                self.dropped += 1
                return
            if line:
                self.waiting.append(line)
                self.waiting_bytes += len(line)
                self.have_thread()

    def written_now(self, line: bytes) -> int:
        """Return how many bytes of a line could be written without a wait; all of it where nobody can read it."""
        try:
            return self.write_now(line)
        except BlockingIOError:
            return 0
        except (OSError, ValueError):
            return len(line)

    def has_room(self, size: int) -> bool:
        """Return whether a line may wait; wait for that while the reader reads."""
        seconds = self.moved_at + STUCK_SECONDS - time.monotonic()
        return self.moved.wait_for(lambda: self.waiting_bytes + size <= MOST_BYTES, max(0.0, seconds))

    def have_thread(self) -> None:
        """Start the thread, if this is the first line that has to wait; else wake it."""
        if self.has_thread:
            self.moved.notify_all()
        else:
            self.has_thread = True
            threading.Thread(target=self.run, name="batchq-log", daemon=True).start()

    def run(self) -> None:
        """Write what waits, for as long as the process lives."""
        while True:
            with self.moved:
                self.moved.wait_for(lambda: self.waiting)
                line = self.waiting[0]
            with suppress(OSError):
                self.write_out(line)
            with self.moved:
                self.waiting_bytes -= len(self.waiting.popleft())
                self.moved_at = time.monotonic()
                dropped = 0 if self.waiting else self.dropped
                self.dropped -= dropped
                self.is_telling = dropped > 0
                self.moved.notify_all()
            if dropped:
                self.tell_dropped(dropped)
                self.is_telling = False

    def write_out(self, line: bytes) -> None:
        """Write a line, however long it takes."""
        while line:
            try:
                line = line[os.write(self.fd, line) :]
            except BlockingIOError:  # whoever shares the file has set it to O_NONBLOCK
                select.select([], [self.fd], [], STUCK_SECONDS)

    def flush(self) -> None:
        """Wait until everything is written, or nothing has moved for a second."""
        with self.moved:
            while (self.waiting or self.is_telling) and time.monotonic() - self.moved_at < STUCK_SECONDS:
                self.moved.wait(0.05)


def writer_that_never_waits(fd: int) -> Callable[[bytes], int]:
    """Return what writes to a file without a wait, and returns how many bytes; nothing at all where there is no way.

    A pipe or a terminal is opened once more, for a description that is ours: O_NONBLOCK on the one that others share
    would be theirs too.
    """
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return lambda line: os.write(fd, line)
    if stat.S_ISSOCK(mode):
        sock = socket.socket(fileno=os.dup(fd))
        return lambda line: sock.send(line, socket.MSG_DONTWAIT)
    try:
        own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:  # not Linux, or the pipe belongs to another user
        return lambda _: 0
    return lambda line: os.write(own, line)
