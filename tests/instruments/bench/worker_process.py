"""Real worker processes: started, let go together, measured, stopped; none outlives its run."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

from tests.instruments.bench.records import Records
from tests.support.waiting import wait_until

ROOT = Path(__file__).resolve().parents[3]
START_SECONDS = 60.0
STOP_SECONDS = 40.0
STALL_SECONDS = 60.0
STARTED_AT_ONCE = 4


class Stalled(Exception):
    """Nothing has happened for a long time, or a worker has died; the message says what was seen."""


class Workers:
    """*count* processes of `batchq worker APP` on *dsn*; *settings* as in BATCHQ_NAME. As a context manager they wait
    at the gate within, and are gone at the end. The app imports `tests.instruments.bench.apps`."""

    def __init__(
        self,
        dsn: str,
        count: int,
        directory: Path,
        settings: dict[str, object] | None = None,
        app: str = "tests.instruments.bench.apps:app",
    ) -> None:
        self.app = app
        given = {"dsn": dsn} | (settings or {})
        self.environment = os.environ | {f"BATCHQ_{name.upper()}": str(value) for name, value in given.items()}
        self.environment["BATCHQ_BENCH_DIRECTORY"] = str(directory)
        self.count = count
        self.directory = directory
        self.records = Records(directory)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.warnings = 0

    def __enter__(self) -> Self:
        try:
            while len(self.processes) < self.count:
                for _ in range(min(STARTED_AT_ONCE, self.count - len(self.processes))):
                    self.processes.append(self.launch(len(self.processes)))
                wait_until(self.are_ready, START_SECONDS, "the workers to be ready")
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def launch(self, number: int) -> "subprocess.Popen[bytes]":
        """Start one process; what it says goes to a file."""
        with (self.directory / f"worker-{number}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "batchq", "worker", self.app, "--log-level", "warning"],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the benchmark, which then ends it
            )

    def are_ready(self) -> bool:
        """Tell whether all that were started wait at the gate."""
        self.check_alive()
        return len(list(self.directory.glob("ready-*"))) == len(self.processes)

    def check_alive(self) -> None:
        """Raise Stalled if one has ended."""
        if any(process.poll() is not None for process in self.processes):
            raise Stalled(f"a worker has ended by itself: {self.said()[-1500:]}")

    def said(self) -> str:
        """Return what they have said, warnings and worse."""
        logs = sorted(self.directory.glob("worker-*.log"))
        return "".join(log.read_text(errors="replace") for log in logs)

    def go(self) -> float:
        """Open the gate; return when."""
        (self.directory / "go").touch()
        return time.monotonic()

    def wait_for(self, is_done: Callable[[], bool], poll_seconds: float = 0.02) -> None:
        """Wait until *is_done*. Raises Stalled when no batch has started for a long time, or a worker has died."""
        seen, seen_at = -1, time.monotonic()
        while not is_done():
            self.check_alive()
            count, now = self.records.count(), time.monotonic()
            if count != seen:
                seen, seen_at = count, now
            elif now - seen_at > STALL_SECONDS:
                raise Stalled(
                    f"nothing has started for {STALL_SECONDS:g} s; {count} batches have: {self.said()[-1500:]}"
                )
            time.sleep(poll_seconds)

    def cpu_seconds(self) -> float:
        """Return the CPU time of all processes so far."""
        times = [psutil.Process(process.pid).cpu_times() for process in self.processes]
        return sum(each.user + each.system for each in times)

    def rss_mb(self) -> float:
        """Return the resident memory of the largest process, in MiB."""
        return max(psutil.Process(process.pid).memory_info().rss for process in self.processes) / 2**20

    def peak_rss_mb(self) -> float:
        """Return the most that one process had in memory, in MiB; where the kernel does not tell, what it has now."""
        return max(peak_rss_mb(process.pid) for process in self.processes)

    def stop(self) -> list[str]:
        """Stop them with SIGTERM; return what went wrong."""
        for process in self.processes:
            process.terminate()
        until = time.monotonic() + STOP_SECONDS
        problems = []
        for process in self.processes:
            try:
                code: int | None = process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                code = None
            if code != 0:
                problems.append("a worker did not stop" if code is None else f"a worker exited with {code}")
        if problems:
            problems.append(self.said()[-1500:])
        self.warnings = len(self.said().splitlines())
        return problems

    def kill(self) -> None:
        """End those that still run, at once."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                process.kill()
        for process in self.processes:
            process.wait()


def peak_rss_mb(pid: int) -> float:
    """Return VmHWM of a process, in MiB."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return psutil.Process(pid).memory_info().rss / 2**20
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
