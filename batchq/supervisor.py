"""Several worker processes: started, watched, replaced when they die, stopped together."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from batchq.log import get_logger

POLL_SECONDS = 0.2
SHORT_LIFE_SECONDS = 10.0
MOST_WAIT_SECONDS = 30.0
EXIT_MISTAKE = 2

log = get_logger()


@dataclass
class Place:
    """A place for one worker process; begins a new one after *wait_seconds* where the last one died soon."""

    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    wait_seconds: float = 0.0
    is_done: bool = False


class Supervisor:
    """Keeps *count* processes of ``batchq worker`` running, with *environment* besides ours.

    `stop` may be called from another thread; not from a signal handler.
    """

    def __init__(self, count: int, arguments: Sequence[str], environment: Mapping[str, str], drain: bool) -> None:
        self.places = [Place() for _ in range(count)]
        self.command = [sys.executable, "-m", "batchq", "worker", *arguments]
        self.environment = os.environ | dict(environment)
        self.drain = drain
        self.stopping = threading.Event()
        self.exit_code = 0
        self.is_proven = False  # a process has worked: the settings are right, and what fails later may pass

    def stop(self) -> None:
        """Tell every process to stop; told again, each leaves at once."""
        self.stopping.set()
        for process in [place.process for place in self.places]:
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def run(self) -> int:
        """Run until stopped or, with drain, until each process has drained; return 0 if all ended well."""
        while not all(place.is_done for place in self.places):
            for place in self.places:
                self.tend(place)
            if os.getpid() == 1:
                self.bury_orphans()
            time.sleep(POLL_SECONDS)
        return self.exit_code

    def bury_orphans(self) -> None:
        """As the first process of a container: let go of ended processes that are ours because their parents died."""
        own = {place.process.pid for place in self.places if place.process is not None}
        with suppress(ChildProcessError):
            while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid not in own:
                os.waitpid(ended.si_pid, 0)

    def tend(self, place: Place) -> None:
        """Start, replace or close one place."""
        if place.is_done:
            return
        if place.process is None:
            if self.stopping.is_set():
                place.is_done = True
            elif time.monotonic() - place.started_at >= place.wait_seconds:
                self.start(place)
        elif (code := place.process.poll()) is not None:
            self.ended(place, code)

    def start(self, place: Place) -> None:
        """Start a process; in a session of its own, so that Ctrl-C reaches it through us alone."""
        place.process = subprocess.Popen(self.command, env=self.environment, start_new_session=True)
        place.started_at = time.monotonic()
        if self.stopping.is_set():
            place.process.send_signal(signal.SIGTERM)

    def ended(self, place: Place, code: int) -> None:
        """Decide what follows the end of a process."""
        place.process = None
        lived = time.monotonic() - place.started_at
        self.is_proven = self.is_proven or lived > SHORT_LIFE_SECONDS
        if self.stopping.is_set() or (self.drain and code == 0):
            ended_well = code in (0, -signal.SIGTERM)  # it was told to stop before it could listen: it had nothing yet
            self.exit_code = self.exit_code or (0 if ended_well else 1)
            place.is_done = True
        elif code == EXIT_MISTAKE and not self.is_proven:
            self.exit_code = EXIT_MISTAKE  # its settings or its schema are wrong, and so would be the next one's
            place.is_done = True
            self.stop()
        else:
            place.wait_seconds = 0 if lived > SHORT_LIFE_SECONDS else min(2 * place.wait_seconds + 1, MOST_WAIT_SECONDS)
            log.warning("worker process ended, replaced", exit_code=code, in_seconds=place.wait_seconds)
