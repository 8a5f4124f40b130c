"""Liveness pings of a process, one each second: to its supervisor (`batchq workers`), and to systemd's watchdog.

A handler that holds the interpreter's lock (a C call that never returns) stops every thread of its process: no duty
runs, and no signal is handled. The only trace of that is that the pings stop.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import MutableMapping

# Set only by the supervisor: the pipe of the pings. Its name stays: a supervisor of an older version sets it, too.
LIVENESS_FD = "BATCHQ_SIGNS_FD"
PING_SECONDS = 1.0


class LivenessPings:
    """Who gets the pings, by the process's *environment*; the pipe is removed there, so that no child finds it."""

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        self.fd = int(environment.pop(LIVENESS_FD, "-1"))
        self._watchdog = ""
        if environment.get("WATCHDOG_PID") == str(os.getpid()):
            self._watchdog = environment.get("NOTIFY_SOCKET", "").replace("@", "\0", 1)
        if self.is_supervised:
            os.set_inheritable(self.fd, False)
            os.set_blocking(self.fd, False)  # do not wait for an unresponsive supervisor

    @property
    def is_supervised(self) -> bool:
        """Whether a supervisor replaces this process when it exits."""
        return self.fd >= 0

    def start(self) -> None:
        """Ping every second, as long as the process lives."""
        if self.is_supervised or self._watchdog:
            threading.Thread(target=self._run, name="batchq-liveness", daemon=True).start()

    def _run(self) -> None:
        while True:
            self.ping()
            time.sleep(PING_SECONDS)

    def ping(self) -> None:
        """Ping once. A supervisor that is gone or does not read, and a systemd that does not, are no error here."""
        with contextlib.suppress(OSError):
            if self.is_supervised:
                os.write(self.fd, b".")
            if self._watchdog:
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
                    peer.setblocking(False)
                    peer.sendto(b"WATCHDOG=1", self._watchdog)
