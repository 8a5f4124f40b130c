"""The demonstration does what it says, from nothing, and leaves nothing running."""

import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx

from tests.support.alone import run_alone
from tests.support.processes import ROOT
from tests.support.servers import open_directory
from tests.support.steps import step
from tests.support.waiting import allowed, wait_until

DEMO_SECONDS = 60


def run_demo(directory: Path, files: int) -> str:
    """Run the demonstration; return what it printed. It must exit with 0."""
    command = [sys.executable, "-m", "batchq", "demo", "--files", str(files), "--directory", str(directory)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=DEMO_SECONDS, check=False, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def servers_of(directory: Path) -> list[Path]:
    """Return the lock files of servers that run in a directory."""
    return list(directory.rglob("postmaster.pid"))


def test_the_demonstration_works_every_file_exactly_once_though_a_worker_is_killed() -> None:
    step("given nothing, no database either")
    assert "BATCHQ_DSN" not in os.environ
    with open_directory() as directory:
        said = run_demo(directory, 150)
        step("then it has killed a worker, every file was worked exactly once, and its server is stopped")
        assert "-9" in said
        assert "every file exactly once: 150 files, 150 rows" in said
        assert servers_of(directory) == []

        step("and it can be shown again in the same place")
        assert "exactly once" in run_demo(directory, 20)
        assert servers_of(directory) == []


def test_with_a_page_it_begins_when_somebody_looks_and_ends_at_ctrl_c() -> None:
    with open_directory() as directory:
        log = directory / "demo.log"
        command = [sys.executable, "-m", "batchq", "demo", "--web", "--files", "60", "--directory", str(directory)]
        with log.open("w") as output:
            demo = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True
            )
        try:
            address = wait_until(
                lambda: re.search(r"(http://127.0.0.1:\d+)(/batches/\d+)", log.read_text()), 60, "an address"
            )
            batch = httpx.get(address[0], trust_env=False, timeout=30).text
            assert "0 of 30 items" in batch, "it has begun before anybody looked"
            with httpx.stream("GET", f"{address[1]}/live{address[2].replace('batches', 'batch')}", trust_env=False,
                              timeout=30) as live:  # fmt: skip
                step("it is looked at, and all is worked")
                assert any("30 of 30 items" in line for line in live.iter_lines())
            wait_until(lambda: "until Ctrl-C" in log.read_text(), DEMO_SECONDS, "the end of the work")
            assert "every file exactly once: 60 files, 60 rows" in log.read_text()
            demo.send_signal(signal.SIGINT)
            assert demo.wait(30) == 0, log.read_text()
        finally:
            demo.kill()
        assert servers_of(directory) == []


def test_with_a_page_it_stops_its_server_when_the_terminal_closes() -> None:
    with open_directory() as directory:
        words = [sys.executable, "-m", "batchq", "demo", "--web", "--files", "60", "--directory", str(directory)]
        screen, terminal = pty.openpty()
        demo = subprocess.Popen(
            ["setsid", "--ctty", *words], cwd=ROOT, stdin=terminal, stdout=terminal, stderr=terminal
        )
        try:
            os.close(terminal)
            said = b""
            while b"the demo starts when you do" not in said:
                said += os.read(screen, 65_536)
            assert len(servers_of(directory)) == 1
            step("the terminal closes")
            os.close(screen)
            demo.wait(allowed(30))
        finally:
            demo.kill()
            demo.wait()
        assert servers_of(directory) == []


if __name__ == "__main__":
    run_alone(__file__)
