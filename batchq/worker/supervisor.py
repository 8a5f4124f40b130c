"""Several worker processes: started, watched, replaced when they die or stand still, stopped together."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from batchq.common.log import get_logger
from batchq.worker.signs import SIGNS_FD, Signs

POLL_SECONDS = 0.2
SHORT_LIFE_SECONDS = 10.0
MOST_WAIT_SECONDS = 30.0
LEAST_SILENT_SECONDS = 10.0
SILENT_AT_START_SECONDS = 60.0  # while it imports the app
EXIT_MISTAKE = 2
METRICS_PORT = "BATCHQ_METRICS_PORT"  # of the first process; the next one has the next port
EXIT_REPLACE = 75  # EX_TEMPFAIL: a worker that has lost too many of its slots wants a fresh process in its place

log = get_logger()


@dataclass
class Place:
    """A place for one worker process; begins a new one after *wait_seconds* where the last one died soon."""

    number: int
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    wait_seconds: float = 0.0
    is_done: bool = False
    signs: int = -1  # the end of the pipe on which its process gives signs of life
    has_signed: bool = False
    silent_seconds: float = 0.0

    def hear(self) -> bool:
        """Return whether the process has given a sign since the last time."""
        try:
            heard = bool(os.read(self.signs, 4096))
        except BlockingIOError:
            return False
        self.has_signed = self.has_signed or heard
        return heard


class Supervisor:
    """Keeps *count* processes of ``batchq worker`` running, with *environment* besides ours.

    One that gives no sign of life for *silent_seconds* is killed: some C call holds its interpreter. `stop` may be
    called from another thread; not from a signal handler.
    """

    def __init__(
        self,
        count: int,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        drain: bool,
        silent_seconds: float,
    ) -> None:
        self.places = [Place(number) for number in range(count)]
        self.command = command(arguments)
        self.own_signs = Signs(os.environ)
        self.environment = os.environ | dict(environment)
        self.drain = drain
        self.silent_seconds = max(silent_seconds, LEAST_SILENT_SECONDS)
        self.looked_at = time.monotonic()
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
        self.own_signs.start()
        while not all(place.is_done for place in self.places):
            passed_seconds = self.passed_seconds()
            for place in self.places:
                self.tend(place, passed_seconds)
            if os.getpid() == 1:
                self.bury_orphans()
            time.sleep(POLL_SECONDS)
        return self.exit_code

    def passed_seconds(self) -> float:
        """Return how much time has passed since the last look; a second at most: this process may have stood still."""
        before, self.looked_at = self.looked_at, time.monotonic()
        return min(self.looked_at - before, 1.0)

    def bury_orphans(self) -> None:
        """As the first process of a container: let go of ended processes that are ours because their parents died."""
        own = {place.process.pid for place in self.places if place.process is not None}
        with suppress(ChildProcessError):
            while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid not in own:
                os.waitpid(ended.si_pid, 0)

    def tend(self, place: Place, passed_seconds: float) -> None:
        """Start, watch, replace or close one place."""
        if place.is_done:
            return
        if place.process is None:
            if self.stopping.is_set():
                place.is_done = True
            elif time.monotonic() - place.started_at >= place.wait_seconds:
                self.start(place)
        elif (code := place.process.poll()) is not None:
            self.ended(place, code)
        else:
            self.watch(place, place.process, passed_seconds)

    def start(self, place: Place) -> None:
        """Start a process; in a session of its own, so that Ctrl-C reaches it through us alone."""
        place.signs, its_end = os.pipe()
        os.set_blocking(place.signs, False)
        environment = self.environment | {SIGNS_FD: str(its_end)}
        if (port := int(self.environment.get(METRICS_PORT, "0"))) > 0:
            environment[METRICS_PORT] = str(port + place.number)
        place.process = subprocess.Popen(self.command, env=environment, pass_fds=[its_end], start_new_session=True)
        os.close(its_end)
        place.started_at = time.monotonic()
        place.has_signed, place.silent_seconds = False, 0.0
        if self.stopping.is_set():
            place.process.send_signal(signal.SIGTERM)

    def watch(self, place: Place, process: subprocess.Popen[bytes], passed_seconds: float) -> None:
        """Kill a process that gives no sign of life; told to stop, it would not hear."""
        place.silent_seconds = 0.0 if place.hear() else place.silent_seconds + passed_seconds
        most = LEAST_SILENT_SECONDS if self.stopping.is_set() else self.silent_seconds
        if not place.has_signed:
            most = max(most, SILENT_AT_START_SECONDS)
        if place.silent_seconds > most:
            log.error("worker process stands still, killed", pid=process.pid, silent_seconds=round(most))
            process.kill()
            place.silent_seconds = 0.0

    def ended(self, place: Place, code: int) -> None:
        """Decide what follows the end of a process."""
        place.process = None
        os.close(place.signs)
        lived = time.monotonic() - place.started_at
        self.is_proven = self.is_proven or lived > SHORT_LIFE_SECONDS or code == EXIT_REPLACE
        if self.stopping.is_set() or (self.drain and code == 0):
            # By SIGTERM: it was told to stop before it could listen, and had nothing yet.
            ended_well = code in (0, EXIT_REPLACE, -signal.SIGTERM)
            self.exit_code = self.exit_code or (0 if ended_well else 1)
            place.is_done = True
        elif code == EXIT_MISTAKE and not self.is_proven:
            self.exit_code = EXIT_MISTAKE  # its settings or its schema are wrong, and so would be the next one's
            place.is_done = True
            self.stop()
        elif code == EXIT_REPLACE:
            place.wait_seconds = 0
            log.warning("worker process worn out, replaced")
        else:
            place.wait_seconds = 0 if lived > SHORT_LIFE_SECONDS else min(2 * place.wait_seconds + 1, MOST_WAIT_SECONDS)
            log.warning("worker process ended, replaced", exit_code=code, in_seconds=place.wait_seconds)


def command(arguments: Sequence[str]) -> list[str]:
    """Return the words that start a worker process. Its Python looks for no module in the current directory (-P), not
    for batchq itself either, unless that is where batchq lies."""
    try:
        lies_here = Path(__file__).parents[2] == Path.cwd()
    except OSError:  # the current directory is gone, with the release that this is replaced by
        lies_here = False
    return [sys.executable, *([] if lies_here else ["-P"]), "-m", "batchq", "worker", *arguments]
