"""Real worker processes: started, killed, frozen, thawed, stopped; their log lines read; none outlives its test."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

from tests.support.programs import path_of
from tests.support.waiting import allowed, wait_until

ROOT = Path(__file__).parents[2]
START_SECONDS = 20.0
END_SECONDS = 20.0
HANDLERS_DSN = "BATCHQ_TEST_HANDLERS_DSN"


class Process:
    """One ``batchq ...`` process. Its standard error, JSON log lines among it, goes to a file; its output is kept."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("wb") as errors, log.with_suffix(".out").open("wb") as output:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "batchq", *arguments],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=True,  # Ctrl-C is for pytest, which then ends it
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.popen.pid

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self.popen.poll() is None

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.popen.send_signal(number)

    def kill(self) -> None:
        """End it as kill -9 does, and wait until it has gone."""
        self.popen.kill()
        self.popen.wait()

    def freeze(self) -> None:
        """Stop it with SIGSTOP, and wait until it stands still: it holds what it holds, and does nothing."""
        self.send(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def thaw(self) -> None:
        """Let it go on after freeze()."""
        self.send(signal.SIGCONT)

    def stop(self, timeout_seconds: float = END_SECONDS) -> int:
        """Stop it with SIGTERM; return its exit code."""
        self.send(signal.SIGTERM)
        return self.wait(timeout_seconds)

    def wait(self, timeout_seconds: float = END_SECONDS) -> int:
        """Wait until it ends; return its exit code, which is negative when a signal ended it."""
        most_seconds = allowed(timeout_seconds)
        try:
            return self.popen.wait(most_seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"no end after {most_seconds:g} s; its log:\n{self.text()[-3000:]}") from None

    def text(self) -> str:
        """Return its standard error so far."""
        return self.log.read_text(errors="replace")

    def output(self) -> str:
        """Return its standard output so far."""
        return self.log.with_suffix(".out").read_text(errors="replace")

    def lines(self, event: str | None = None, **having: object) -> list[dict[str, Any]]:
        """Return its log lines so far: those of one *event*, those whose fields are as given."""
        found = [line for text in self.text().splitlines() if (line := _parsed(text))]
        return [line for line in found if event in (None, line["event"]) and having.items() <= line.items()]

    def wait_for(self, event: str, timeout_seconds: float = START_SECONDS, **having: object) -> dict[str, Any]:
        """Wait for a log line of *event*; return the first."""

        def look() -> list[dict[str, Any]]:
            if not (found := self.lines(event, **having)) and not self.is_running:
                raise RuntimeError(f"the process ended with {self.popen.returncode}; its log:\n{self.text()[-3000:]}")
            return found

        return wait_until(look, timeout_seconds, f"the log line {event!r} of process {self.pid}")[0]

    def children(self) -> list[int]:
        """Return the ids of its child processes, which `batchq workers` has."""
        return [int(pid) for pid, parent in listed_processes("pid", "ppid") if int(parent) == self.pid]

    def end(self) -> None:
        """End it and its children, whatever state they are in."""
        if self.is_running:
            self.freeze()  # so that it replaces no child
            children = self.children()
            self.kill()
            for pid in children:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


class Processes:
    """The processes of one test, all on the database *dsn*; at its end they end, too.

    Settings are given by name, as in ``worker(lease_seconds=1)``. *handlers_dsn* is for the connections that handlers
    open themselves, by default *dsn*.
    """

    def __init__(self, dsn: str, app: str, handlers_dsn: str | None = None) -> None:
        self.dsn = dsn
        self.app = app
        self.handlers_dsn = handlers_dsn or dsn
        self.count = 0
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        self.directory = Path(self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="batchq-logs-")))
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def worker(self, *arguments: str, app: str | None = None, is_started: bool = True, **settings: object) -> Process:
        """Start ``batchq worker``; return when it works, at once with is_started=False."""
        process = self.run("worker", *arguments, app or self.app, **settings)
        if is_started:
            process.wait_for("worker started")
        return process

    def run(self, *arguments: str, **settings: object) -> Process:
        """Start ``batchq`` with *arguments*."""
        self.count += 1
        given = {"dsn": self.dsn, "log_format": "json"} | settings
        environment = os.environ | {f"BATCHQ_{name.upper()}": str(value) for name, value in given.items()}
        environment[HANDLERS_DSN] = self.handlers_dsn
        process = Process(list(arguments), environment, self.directory / f"{self.count}.log")
        self._cleanup.callback(process.end)
        return process

    def command(self, *arguments: str, timeout_seconds: float = END_SECONDS, **settings: object) -> Process:
        """Run ``batchq`` with *arguments* to its end."""
        process = self.run(*arguments, **settings)
        process.wait(timeout_seconds)
        return process


def listed_processes(*columns: str) -> list[list[str]]:
    """Return these columns of ps, for each process of the machine."""
    command = [path_of("ps"), "-A", "-o", ",".join(f"{column}=" for column in columns)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line.split() for line in listed.splitlines()]


def _parsed(text: str) -> dict[str, Any] | None:
    """Return the log line in *text*, None for other text, such as a half-written line."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and "event" in line else None
