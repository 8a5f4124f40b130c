"""Several worker processes: started, watched, replaced when they exit or do not respond, stopped together."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from batchq.common.log import get_logger
from batchq.worker.liveness import LIVENESS_FD, LivenessPings

EXIT_REPLACE = 75  # EX_TEMPFAIL: a worker that has lost too many of its slots is to be replaced
_EXIT_USAGE = 2
_POLL_SECONDS = 0.2
_SHORT_LIFE_SECONDS = 10.0
_MOST_WAIT_SECONDS = 30.0
_LEAST_SILENT_SECONDS = 10.0
_SILENT_AT_START_SECONDS = 60.0  # while it imports the app
_METRICS_PORT = "BATCHQ_METRICS_PORT"  # of the first process; the next one has the next port

_log = get_logger()


@dataclass
class _Child:
    """One worker process after another; the next one starts *wait_seconds* after the last one exited early."""

    number: int
    labels: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    wait_seconds: float = 0.0
    is_done: bool = False
    pings_fd: int = -1
    has_pinged: bool = False
    silent_seconds: float = 0.0

    def take_pings(self) -> bool:
        """Return whether the process has pinged since the last call."""
        try:
            pinged = bool(os.read(self.pings_fd, 4096))
        except BlockingIOError:
            return False
        self.has_pinged = self.has_pinged or pinged
        return pinged


class Supervisor:
    """Keeps *count* processes of ``batchq worker`` running, with *environment* added to this process's own.

    *databases*: where there are several, the environment of the processes of each, by its name; then *count* processes
    work for each. What is wrong with one database does not end the processes of another.

    A process without a liveness ping for *silent_seconds* is killed: a C call holds its interpreter. `stop` may be
    called from another thread; not from a signal handler.
    """

    def __init__(
        self,
        count: int,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        drain: bool,
        silent_seconds: float,
        databases: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        groups = [({"database": name}, own) for name, own in (databases or {}).items()] or [({}, {})]
        children = [group for group in groups for _ in range(count)]
        self._children = [_Child(number, *group) for number, group in enumerate(children)]
        self._is_several = len(groups) > 1
        self._command = command(arguments)
        self._own_pings = LivenessPings(os.environ)
        self._environment = os.environ | dict(environment)
        self._drain = drain
        self._silent_seconds = max(silent_seconds, _LEAST_SILENT_SECONDS)
        self._polled_at = time.monotonic()
        self._stopping = threading.Event()
        self._exit_code = 0
        self._is_proven = False  # a process has worked: the settings are right, and a later failure may be temporary

    def stop(self) -> None:
        """Send SIGTERM to every process; a second time, each exits immediately."""
        self._stopping.set()
        for process in [child.process for child in self._children]:
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def run(self) -> int:
        """Run until stopped or, with drain, until each process has drained; return 0 if all exited well."""
        self._own_pings.start()
        while not all(child.is_done for child in self._children):
            passed_seconds = self._passed_seconds()
            for child in self._children:
                self._tend(child, passed_seconds)
            if os.getpid() == 1:
                self._reap_orphans()
            time.sleep(_POLL_SECONDS)
        return self._exit_code

    def _passed_seconds(self) -> float:
        """Return the time since the last poll, a second at most: this process may have been suspended."""
        before, self._polled_at = self._polled_at, time.monotonic()
        return min(self._polled_at - before, 1.0)

    def _reap_orphans(self) -> None:
        """As the first process of a container, reap exited processes whose parents are gone."""
        own = {child.process.pid for child in self._children if child.process is not None}
        with suppress(ChildProcessError):
            while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid not in own:
                os.waitpid(ended.si_pid, 0)

    def _tend(self, child: _Child, passed_seconds: float) -> None:
        if child.is_done:
            return
        if child.process is None:
            if self._stopping.is_set():
                child.is_done = True
            elif time.monotonic() - child.started_at >= child.wait_seconds:
                self._start(child)
        elif (code := child.process.poll()) is not None:
            self._exited(child, code)
        else:
            self._watch(child, child.process, passed_seconds)

    def _start(self, child: _Child) -> None:
        """Start a process, in a session of its own, so that Ctrl-C reaches it only through this one."""
        child.pings_fd, its_end = os.pipe()
        os.set_blocking(child.pings_fd, False)
        environment = {**self._environment, **child.environment, LIVENESS_FD: str(its_end)}
        if (port := int(self._environment.get(_METRICS_PORT, "0"))) > 0:
            environment[_METRICS_PORT] = str(port + child.number)
        child.process = subprocess.Popen(self._command, env=environment, pass_fds=[its_end], start_new_session=True)
        os.close(its_end)
        child.started_at = time.monotonic()
        child.has_pinged, child.silent_seconds = False, 0.0
        if self._stopping.is_set():
            child.process.send_signal(signal.SIGTERM)

    def _watch(self, child: _Child, process: subprocess.Popen[bytes], passed_seconds: float) -> None:
        """Kill an unresponsive process: it would ignore SIGTERM."""
        child.silent_seconds = 0.0 if child.take_pings() else child.silent_seconds + passed_seconds
        most = _LEAST_SILENT_SECONDS if self._stopping.is_set() else self._silent_seconds
        if not child.has_pinged:
            most = max(most, _SILENT_AT_START_SECONDS)
        if child.silent_seconds > most:
            _log.error(
                "worker process unresponsive, killed", **child.labels, pid=process.pid, silent_seconds=round(most)
            )
            process.kill()
            child.silent_seconds = 0.0

    def _exited(self, child: _Child, code: int) -> None:
        child.process = None
        os.close(child.pings_fd)
        lived = time.monotonic() - child.started_at
        self._is_proven = self._is_proven or lived > _SHORT_LIFE_SECONDS or code == EXIT_REPLACE
        if self._stopping.is_set() or (self._drain and code == 0):
            # -SIGTERM: it was asked to stop before it handled signals, and had claimed nothing yet.
            exited_well = code in (0, EXIT_REPLACE, -signal.SIGTERM)
            self._exit_code = self._exit_code or (0 if exited_well else 1)
            child.is_done = True
        elif code == _EXIT_USAGE and not self._is_proven and not self._is_several:
            self._exit_code = _EXIT_USAGE  # the settings or the schema are wrong: another process would exit, too
            child.is_done = True
            self.stop()
        elif code == EXIT_REPLACE:
            child.wait_seconds = 0
            _log.warning("worker process replaced", **child.labels, reason="lost slots")
        else:
            is_early = lived <= _SHORT_LIFE_SECONDS
            child.wait_seconds = min(2 * child.wait_seconds + 1, _MOST_WAIT_SECONDS) if is_early else 0
            _log.warning(
                "worker process exited", **child.labels, exit_code=code, replaced_in_seconds=child.wait_seconds
            )


def command(arguments: Sequence[str]) -> list[str]:
    """Return the words that start a worker process.

    Its Python does not search the current directory for modules (-P), unless batchq itself lies there.
    """
    try:
        lies_here = Path(__file__).parents[2] == Path.cwd()
    except OSError:  # the current directory is gone, with the release that this one replaces
        lies_here = False
    return [sys.executable, *([] if lies_here else ["-P"]), "-m", "batchq", "worker", *arguments]
