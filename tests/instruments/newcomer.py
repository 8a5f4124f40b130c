"""A newcomer's path, timed: ``bin/newcomer``. Clone, the README's first command, a browser, a bar that moves.

Prints the seconds that each step took; the exit code is 1 if the bar took more than 180 s, or anything went wrong.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import Page

from tests.support.browser import chromium
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
MOST_SECONDS = 180.0
PATIENCE_SECONDS = 900.0  # a machine that is slow is told how slow
BAR = ".whole .share .done"  # its width: how many thousandths of the items are done
ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+/batches/\d+")
# What the command says when a step is over, and what that step was.
MILESTONES = {
    "installing batchq": "making a virtual environment",
    "starting a private Postgres": "installing batchq and what it needs",
    "enqueueing": "making and starting a private Postgres, creating the schema",
    "http://": "enqueueing the files, starting the page",
}


class Failed(Exception):
    """A newcomer would have been stuck; the text says where."""


@dataclass
class Watch:
    """How long each step took."""

    began_at: float = field(default_factory=time.monotonic)
    last_at: float = field(default_factory=time.monotonic)

    @property
    def total(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.began_at

    def done(self, what: str) -> None:
        """Print the seconds of a step that is over."""
        now = time.monotonic()
        print(f"{now - self.last_at:7.1f} s  {what}", flush=True)
        self.last_at = now


@dataclass
class Command:
    """A command that runs, and what it has said."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def read(self) -> None:
        """Keep what it says, until it ends."""
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line)

    def wait_for(self, text: str) -> str:
        """Wait for a line with *text*; return it. Raises Failed."""

        def look() -> list[str]:
            found = [line for line in list(self.lines) if text in line]
            if not found and self.process.poll() is not None:
                raise Failed(
                    f"it ended with {self.process.returncode}, before it said {text!r}:\n{''.join(self.lines)}"
                )
            return found

        return wait_until(look, PATIENCE_SECONDS, f"{text!r} to be said")[0]


def main() -> int:
    """Go the path; return the exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script in the background may have ignored it
    try:
        with tempfile.TemporaryDirectory(prefix="batchq-newcomer-") as directory:
            Path(directory).chmod(0o755)  # the server, which is not run as root, must get in
            seconds = go(Path(directory))
    except (Failed, TimeoutError) as error:
        print(f"a newcomer is stuck: {error}", file=sys.stderr)
        return 1
    verdict = "in time" if seconds <= MOST_SECONDS else "TOO LATE"
    print(f"{seconds:7.1f} s  from the clone to a bar that has moved; at most {MOST_SECONDS:g}: {verdict}")
    return 0 if seconds <= MOST_SECONDS else 1


def go(directory: Path) -> float:
    """Go the path in *directory*; return how many seconds it took to see a bar move twice. Raises Failed."""
    watch = Watch()
    clone = directory / "batchq"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    watch.done("git clone")
    command = f"{first_command(clone)} --directory {directory / 'demo'}"  # or it might find an earlier demo's server
    print(f"           {command}")
    with running(command, clone) as run:
        for text, what in MILESTONES.items():
            said = run.wait_for(text)
            watch.done(what)
        found = ADDRESS.search(said)
        if not found:
            raise Failed(f"no address of a batch is told: {said!r}")
        with chromium() as browser:
            see_it_move(browser.new_page(), found[0], watch)
            seconds = watch.total
            run.wait_for("every file exactly once")
            watch.done("to the end: every file exactly once")
        run.wait_for("Ctrl-C")
        os.killpg(run.process.pid, signal.SIGINT)
        if code := run.process.wait(60):
            raise Failed(f"Ctrl-C ended it with {code}:\n{''.join(run.lines)}")
    return seconds


def first_command(checkout: Path) -> str:
    """Return the first command of the README."""
    found = re.search(r"```bash\n(.*?)(?: +#.*)?\n", (checkout / "README.md").read_text(encoding="utf-8"))
    if not found:
        raise Failed("the README begins with no command")
    return found[1]


@contextmanager
def running(command: str, directory: Path) -> Iterator[Command]:
    """Run a command as a newcomer does, who has no environment of Python's and no setting of batchq's yet."""
    known = {
        name: text for name, text in os.environ.items() if not name.startswith("BATCHQ_") and name != "VIRTUAL_ENV"
    }
    places = [place for place in known["PATH"].split(os.pathsep) if place != str(Path(sys.executable).parent)]
    env = known | {"PATH": os.pathsep.join(places), "PIP_NO_CACHE_DIR": "1"}
    process = subprocess.Popen(
        ["bash", "-c", command], cwd=directory, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    run = Command(process)
    reader = threading.Thread(target=run.read, daemon=True)
    reader.start()
    try:
        yield run
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(60)
        reader.join(10)


def see_it_move(page: Page, address: str, watch: Watch) -> None:
    """Open an address, and wait until the bar there has grown twice."""
    page.goto(address)
    bar = page.locator(BAR)
    seen = float(bar.get_attribute("width") or 0)
    watch.done("opening the page in a browser")
    for what in ("the bar has grown", "the bar has grown again"):
        page.wait_for_function(
            "([bar, seen]) => document.querySelector(bar).getAttribute('width') > seen",
            arg=[BAR, seen], timeout=PATIENCE_SECONDS * 1000,
        )  # fmt: skip
        seen = float(bar.get_attribute("width") or 0)
        watch.done(f"{what}, to {seen:g}")


if __name__ == "__main__":
    sys.exit(main())
