"""Run the suite against mutants, and write down which test kills each."""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from threading import Lock

from tests.instruments.mutants.table import MUTANTS, ROOT, Mutant
from tests.support.servers import Server, running_server

PAGE = ROOT / "tests" / "instruments" / "mutants" / "README.md"
COPIED = (
    "batchq", "migrations", "tests", "bin", "docs", "pyproject.toml", "hatch_build.py", "README.md", "CHANGELOG.md",
    ".ci", "LICENSE",
)  # fmt: skip
MOST_SECONDS = 400
MOST_FLUKES = 5
LAYERS = ("component", "integration")
NEEDLESS = ("test_bad_input.py", "test_cli.py", "test_wheel.py", "test_architecture.py", "test_embedded.py")
NEEDLESS_PLUGINS = ("cacheprovider", "hypothesispytest")  # the second costs more than most tests
SURVIVED, UNTRIED = "none", "not tried yet"
RESULT = re.compile(r"^(tests/\S+\.py::.*?) (PASSED|FAILED|ERROR)\b")
STARTED = re.compile(r"^(tests/\S+\.py::.*?) *$")
HEAD = """# Mutants

A mutant is batchq with one fence, lock, lease condition or bound taken out. For each there is a test that fails: that
condition is needed, and a change that drops it is noticed. `bin/mutants` tries them all and writes this page;
`bin/mutants RESCUE` those with the word in their name, `bin/mutants --missing` those that have no killer here.
`bin/mutants --sample 10` tries ten by chance, each with its killer alone. `tests/foundation/test_mutants.py` checks at
each run of the suite that every text still stands, and that every mutant has a killer, which is still there.

A killer is the first test that fails, fails once more alone, and passes without the mutant.

"""


def main() -> int:
    """Try the mutants that the arguments name; return 1 if one survived, or was not tried."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also of one in the background, which ignores it
    arguments = parse_arguments()
    chosen = [mutant for mutant in MUTANTS if all(word in mutant.name for word in arguments.words)]
    known = read_killers()
    if arguments.missing:
        unkilled = [mutant for mutant in chosen if known.get(mutant.name, UNTRIED) in (UNTRIED, SURVIVED)]
        chosen = sorted(unkilled, key=lambda mutant: known.get(mutant.name) == SURVIVED)[: arguments.most]
    attempt = partial(try_mutant, wide=arguments.wide)
    if arguments.sample:
        print(f"a sample by the seed {arguments.seed}", flush=True)
        chosen = random.Random(arguments.seed).sample(chosen, min(arguments.sample, len(chosen)))
        attempt = partial(try_again, killers=known)
    killers = Trial(chosen, attempt, is_written=not arguments.sample).run(arguments.at_once)
    survivors = [name for name, killer in killers.items() if killer == SURVIVED]
    print(f"{len(killers) - len(survivors)} of {len(killers)} mutants killed", *survivors, sep="\n  survived: ")
    return 1 if survivors or not killers or len(killers) < len(chosen) else 0


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="bin/mutants", description="Take out one condition at a time; a test must fail."
    )
    parser.add_argument("words", nargs="*", help="only mutants that have all these words in their name")
    parser.add_argument("--missing", action="store_true", help="only those without a killer so far")
    parser.add_argument("--most", type=int, help="and so many at most, those first that were never tried")
    parser.add_argument(
        "--sample", type=int, help="so many of them, by chance, each with its killer alone; the page stays as it is"
    )
    parser.add_argument("--seed", default=str(datetime.now(UTC).date()), help="which ones (default: the day)")
    parser.add_argument("--at-once", type=int, default=2, help="how many at a time (default: 2)")
    parser.add_argument(
        "--wide",
        action="store_true",
        help=f"where a mutant's own files pass, go on with the others of {' and '.join(LAYERS)}",
    )
    return parser.parse_args()


class Trial:
    """Mutants that are tried, several at a time. With *is_written* each killer goes to the page when it is known."""

    def __init__(self, mutants: list[Mutant], attempt: Callable[[Mutant, Server], str], is_written: bool) -> None:
        self.waiting = deque(mutants)
        self.attempt = attempt
        self.is_written = is_written
        self.killers: dict[str, str] = {}
        self.lock = Lock()

    def run(self, at_once: int) -> dict[str, str]:
        """Try all; return the killer of each by its name, or SURVIVED."""
        with ThreadPoolExecutor(at_once) as pool:
            workers = [pool.submit(self.work) for _ in range(at_once)]
            try:
                wait(workers)
            except KeyboardInterrupt:
                print("those that are being tried are the last ones", flush=True)
                self.waiting.clear()
        for worker in workers:
            worker.result()  # raises what ended it
        return self.killers

    def work(self) -> None:
        """Try one after another, on a server for them all."""
        with running_server() as server:
            while mutant := self.next():
                began_at = time.monotonic()
                try:
                    killer = self.attempt(mutant, server)
                except RuntimeError as error:
                    print(error, flush=True)
                    killer = SURVIVED
                with self.lock:
                    self.killers[mutant.name] = killer
                    if self.is_written:
                        write_page(read_killers() | self.killers)
                    print(f"{mutant.name}\n    {killer} ({time.monotonic() - began_at:.0f} s)", flush=True)

    def next(self) -> Mutant | None:
        """Take the next one."""
        with self.lock:
            return self.waiting.popleft() if self.waiting else None


def try_mutant(mutant: Mutant, server: Server, wide: bool) -> str:
    """Return the test that kills the mutant, or SURVIVED."""
    with copy_of_tree() as root:
        mutant.apply(root)
        files = [f"tests/{file}" for file in mutant.tests]
        if killer := Suite(root, server).first_failure(files):
            return killer
        others = [file for file in sorted(others_of(root)) if file not in files]
        return (Suite(root, server).first_failure(others) if wide else None) or SURVIVED


def try_again(mutant: Mutant, server: Server, killers: dict[str, str]) -> str:
    """Return the mutant's killer of *killers* if that kills it still, else SURVIVED."""
    with copy_of_tree() as root:
        mutant.apply(root)
        return Suite(root, server).first_failure([f"tests/{killers.get(mutant.name, UNTRIED)}"]) or SURVIVED


def others_of(root: Path) -> Iterator[str]:
    """Return every file that tests parts of batchq, or parts together."""
    for layer in LAYERS:
        for file in (root / "tests" / layer).glob("test_*.py"):
            if file.name not in NEEDLESS:
                yield str(file.relative_to(root))


@contextmanager
def copy_of_tree() -> Iterator[Path]:
    """Give a copy of what is tested and of its tests."""
    with tempfile.TemporaryDirectory(prefix="batchq-mutant-") as directory:
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, Path(directory) / name)
        yield Path(directory)


@dataclass
class Suite:
    """The tests of the tree *root*, run on *server*."""

    root: Path
    server: Server

    def first_failure(self, files: list[str]) -> str | None:
        """Return the first test that fails, fails alone too, and passes in the tree that is not mutated."""
        flukes: list[str] = []
        while len(flukes) < MOST_FLUKES:
            failed = self.run(files, flukes)
            if failed is None:
                return None
            if self.run([failed], []) and not Suite(ROOT, self.server).run([failed], []):
                return failed
            flukes.append(failed)
        return None

    def run(self, tests: list[str], without: list[str]) -> str | None:
        """Run tests until one fails, or hangs; return its name."""
        options = ["-x", "-v", "--tb=no", "-o", "log_cli=false", *(f"-pno:{plugin}" for plugin in NEEDLESS_PLUGINS)]
        command = [sys.executable, "-m", "pytest", *tests, *options, *(f"--deselect={name}" for name in without)]
        try:
            ended = subprocess.run(
                command,
                cwd=self.root,
                env=os.environ | self.server.environment() | {"PYTHONPATH": str(self.root)},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=MOST_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as hung:
            return started(hung.stdout.decode() if hung.stdout else "")
        if ended.returncode == 0:
            return None
        failed = [match[1] for match in map(RESULT.match, ended.stdout.splitlines()) if match and match[2] != "PASSED"]
        if not failed:
            raise RuntimeError(
                f"no test failed, and pytest ended with {ended.returncode}:\n{(ended.stdout + ended.stderr)[-2000:]}"
            )
        return failed[0]


def started(output: str) -> str | None:
    """Return the test that was running when the output ended."""
    lines = output.splitlines()
    match = STARTED.match(lines[-1]) if lines else None
    return match[1] if match else None


# ------------------------------------------------------------------------------------------------------ the page


def read_killers() -> dict[str, str]:
    """Return the killers that the page names."""
    if not PAGE.exists():
        return {}
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return {row[0].removeprefix("| `").removesuffix("`").replace("\\|", "|"): row[2].strip("`| ") for row in rows}


def write_page(killers: dict[str, str]) -> None:
    """Write the page."""
    PAGE.write_text(page(killers))


def page(killers: dict[str, str]) -> str:
    """Return the text of the page: the mutants of the table, each with its killer."""
    lines = ["| taken out | what that breaks | killed by |", "| --- | --- | --- |"]
    for mutant in MUTANTS:
        killer = killers.get(mutant.name, UNTRIED).removeprefix("tests/")
        lines.append(f"| `{mutant.name.replace('|', chr(92) + '|')}` | {mutant.promise} | `{killer}` |")
    return HEAD + "\n".join(lines) + "\n"
