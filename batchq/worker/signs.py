"""Signs of life of a process, one a second: for `batchq workers`, and for systemd's watchdog.

A handler that holds the interpreter's lock (a C call that never returns) stops every thread of its process: no duty is
done, no signal is heard. All that is left is that the signs cease to come.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import MutableMapping

SIGNS_FD = "BATCHQ_SIGNS_FD"  # set by the supervisor alone: the pipe on which it hears of its process
SIGN_SECONDS = 1.0


class Signs:
    """To whom this process shows that it is alive, by its *environment*: where its children will find no pipe."""

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        self.fd = int(environment.pop(SIGNS_FD, "-1"))
        self.watchdog = ""
        if environment.get("WATCHDOG_PID") == str(os.getpid()):
            self.watchdog = environment.get("NOTIFY_SOCKET", "").replace("@", "\0", 1)
        if self.is_supervised:
            os.set_inheritable(self.fd, False)
            os.set_blocking(self.fd, False)  # nobody waits for a supervisor that stands still

    @property
    def is_supervised(self) -> bool:
        """Whether a supervisor replaces this process when it ends."""
        return self.fd >= 0

    def start(self) -> None:
        """Give a sign each second, for as long as the process lives."""
        if self.is_supervised or self.watchdog:
            threading.Thread(target=self.run, name="batchq-signs", daemon=True).start()

    def run(self) -> None:
        """Give signs for ever."""
        while True:
            self.give()
            time.sleep(SIGN_SECONDS)

    def give(self) -> None:
        """Give one sign. A supervisor that has gone, or does not read, is no trouble of ours."""
        with contextlib.suppress(OSError):
            if self.is_supervised:
                os.write(self.fd, b".")
            if self.watchdog:
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
                    peer.setblocking(False)  # nor for a systemd that does not read
                    peer.sendto(b"WATCHDOG=1", self.watchdog)
