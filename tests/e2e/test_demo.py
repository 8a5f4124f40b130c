"""The demonstration does what it says, from nothing, and leaves nothing running."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.alone import run_alone
from tests.support.processes import ROOT
from tests.support.servers import open_directory
from tests.support.steps import step

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


if __name__ == "__main__":
    run_alone(__file__)
