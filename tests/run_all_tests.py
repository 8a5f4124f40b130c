"""Run the tests layer by layer, each file in a pytest process of its own, on one server.

The layers are foundation, component, integration and e2e; when foundation fails the others do not run.
A skipped test, and a file without tests, is a failure.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.servers import NoServerError, running_server  # noqa: E402
from tests.support.through import POOLED, SAME_ON_ANY_SERVER, WAYS  # noqa: E402

LAYERS = ("foundation", "component", "integration", "e2e")
NAMES = (
    f"layers ({', '.join(LAYERS)}), pooled, servers (what a pooler, or a server's version, may make a difference to)"
)
FILE_TIMEOUT_SECONDS = 900
INTERRUPT_SECONDS = 20


@dataclass
class Outcome:
    """What became of one test file; *problem* is empty when all is well."""

    file: Path
    passed: int = 0
    failed: int = 0
    seconds: float = 0.0
    problem: str = ""
    ran: bool = True

    @property
    def is_good(self) -> bool:
        return self.ran and not self.failed and not self.problem

    def __str__(self) -> str:
        name = self.file.relative_to(ROOT / "tests")
        if not self.ran:
            return f"⏭ {name}: {self.problem}"
        mark = "✅" if self.is_good else "❌"
        problem = f" ({self.problem})" if self.problem else ""
        return f"{mark} {name}: {self.passed} passed, {self.failed} failed in {self.seconds:.1f} s{problem}"


def main() -> int:
    """Run what the arguments name, and return the exit code: 0 when every test passed."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    arguments = parse_arguments()
    os.environ["BATCHQ_TEST_THROUGH"] = arguments.through
    if "pooled" in arguments.what:
        os.environ["BATCHQ_TEST_POOLED"] = "yes"
    if arguments.server:
        os.environ["BATCHQ_TEST_SERVER"] = arguments.server
    started = time.monotonic()
    try:
        outcomes = run_on_one_server(find_files(arguments.what, arguments.without))
    except NoServerError as error:
        sys.exit(f"no server to test on: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
    return report(outcomes, time.monotonic() - started)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Run batchq's tests, layer by layer.")
    parser.add_argument("what", nargs="*", help=f"{NAMES}, or test files; default: all")
    parser.add_argument("--without", action="append", default=[], metavar="WHAT", help="leave these out")
    parser.add_argument("--server", choices=["container", "embedded", "dsn"], help="which Postgres to test on")
    parser.add_argument("--through", choices=list(WAYS), default="direct", help="which pooler to test through")
    return parser.parse_args()


def find_files(what: list[str], without: list[str]) -> list[Path]:
    """Return the test files of the layers and paths in *what*, but not in *without*, in the order of the layers."""
    files = {file for name in what or LAYERS for file in files_of(name)}
    left_out = {file for name in without for file in files_of(name)}
    return sorted(files - left_out, key=lambda file: (layer_number(file), file))


def files_of(name: str) -> list[Path]:
    """Return the test files of one layer, those of a group, or the one file *name*."""
    if name == "pooled":
        return [ROOT / "tests" / file for file in POOLED]
    if name == "servers":
        left_out = {ROOT / "tests" / file for file in SAME_ON_ANY_SERVER}
        return [file for layer in LAYERS for file in files_of(layer) if file not in left_out]
    if name in LAYERS:
        return list((ROOT / "tests" / name).glob("test_*.py"))
    file = Path(name).resolve()
    if not file.is_file() or layer_of(file) not in LAYERS:
        sys.exit(f"{name} is none of these: {NAMES}, test files in a layer")
    return [file]


def layer_of(file: Path) -> str:
    """Return the name of the folder that *file* is in."""
    return file.parent.name


def layer_number(file: Path) -> int:
    """Return the place of the layer of *file* in the order of the layers."""
    return LAYERS.index(layer_of(file))


def run_on_one_server(files: list[Path]) -> list[Outcome]:
    """Start the server that all files share, and run them."""
    with running_server() as server:
        say(f"{server.describe()}, {os.environ['BATCHQ_TEST_THROUGH']}; {len(files)} test files")
        return list(run_files(files, os.environ | server.environment()))


def run_files(files: list[Path], environment: dict[str, str]) -> Iterator[Outcome]:
    """Run the files in turn; after a failure in foundation only the rest of that layer."""
    foundation_failed = False
    for file in files:
        if foundation_failed and layer_of(file) != LAYERS[0]:
            yield Outcome(file, problem="not run, because foundation failed", ran=False)
            continue
        outcome = run_file(file, environment)
        say(str(outcome))
        yield outcome
        foundation_failed |= layer_of(file) == LAYERS[0] and not outcome.is_good


def run_file(file: Path, environment: dict[str, str]) -> Outcome:
    """Run one file in a pytest process whose output is shown as it comes."""
    say(f"▶ {file.relative_to(ROOT)}")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="batchq-report-") as folder:
        results = Path(folder) / "results.xml"
        exit_code = run_pytest(file, results, environment)
        outcome = read_results(file, results, exit_code)
    outcome.seconds = time.monotonic() - started
    return outcome


def run_pytest(file: Path, results: Path, environment: dict[str, str]) -> int | None:
    """Return the exit code of pytest, or None when it was ended after FILE_TIMEOUT_SECONDS."""
    options = ["-o", "log_cli=true", "-o", "faulthandler_timeout=120", f"--junit-xml={results}"]
    if "hypothesis" not in file.read_text():
        options += ["-p", "no:hypothesispytest"]  # it imports hypothesis to say that nothing has used it
    command = [sys.executable, "-m", "pytest", str(file), *options]
    own_session = True  # Ctrl-C reaches this process only, which passes it on once
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=own_session) as process:
        try:
            return process.wait(FILE_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            interrupt(process)
            return None
        except KeyboardInterrupt:
            interrupt(process)
            raise


def interrupt(process: "subprocess.Popen[bytes]") -> None:
    """Let pytest stop and clean up; kill it when that takes too long."""
    process.terminate()  # not SIGINT, which a process started in the background ignores
    try:
        process.wait(INTERRUPT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


def read_results(file: Path, results: Path, exit_code: int | None) -> Outcome:
    """Return the outcome that pytest's report and exit code tell."""
    cases = list(ElementTree.parse(results).iter("testcase")) if results.exists() else []
    bad = {name_of(case) for case in cases if has(case, "failure", "error")}
    skipped = {name_of(case) for case in cases if has(case, "skipped")} - bad
    outcome = Outcome(file, passed=len({name_of(case) for case in cases} - bad - skipped))
    outcome.failed = len(bad) + len(skipped)
    outcome.problem = problem_of(exit_code, len(cases), len(skipped))
    if outcome.problem and not outcome.failed:
        outcome.failed = 1
    return outcome


def name_of(case: ElementTree.Element) -> str:
    """Return the full name of a test in pytest's report."""
    return f"{case.get('classname')}.{case.get('name')}"


def has(case: ElementTree.Element, *tags: str) -> bool:
    """Return whether *case* has a child with one of *tags*."""
    return any(case.find(tag) is not None for tag in tags)


def problem_of(exit_code: int | None, cases: int, skipped: int) -> str:
    """Return what is wrong with a run apart from failed tests, or nothing."""
    if exit_code is None:
        return f"ended after {FILE_TIMEOUT_SECONDS} s"
    if exit_code not in (0, 1, 5):
        return f"pytest ended with exit code {exit_code}"
    if not cases:
        return "no tests"
    return f"{skipped} skipped or expected to fail, which is not allowed" if skipped else ""


def report(outcomes: list[Outcome], seconds: float) -> int:
    """Print the summary and return the exit code."""
    passed, failed = (sum(getattr(outcome, what) for outcome in outcomes) for what in ("passed", "failed"))
    say("=" * 70)
    for outcome in outcomes:
        say(str(outcome))
    say(f"Completed: {sum(outcome.ran for outcome in outcomes)} of {len(outcomes)}")
    say(f"Passed: {passed}, failed: {failed}, duration: {seconds:.1f} s")
    good = bool(outcomes) and all(outcome.is_good for outcome in outcomes)
    say("✅ all tests passed" if good else "❌ not all tests passed")
    say(f"{passed} passed, {failed} failed")
    return 0 if good else 1


def say(text: str) -> None:
    """Print a line at once, between the lines of the pytest processes."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
