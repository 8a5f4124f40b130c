"""Test files in pytest processes of their own, several at a time, each on a server that no other one uses meanwhile."""

import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.plan import LAYERS, Plan, layer_of, name_of
from tests.support.programs import LEFT_OUT

ROOT = Path(__file__).parents[2]
FILE_TIMEOUT_SECONDS = 900
INTERRUPT_SECONDS = 20
POLL_SECONDS = 0.05


@dataclass
class Outcome:
    """What became of one test file; *problem* is empty when all is well.

    *left_out* counts the tests that need a program which is not installed, by what they say of it. *remark* is what
    else a person should know.
    """

    file: Path
    passed: int = 0
    failed: int = 0
    seconds: float = 0.0
    problem: str = ""
    ran: bool = True
    left_out: Counter[str] = field(default_factory=Counter)
    remark: str = ""

    @property
    def is_good(self) -> bool:
        return self.ran and not self.failed and not self.problem

    def __str__(self) -> str:
        name, left_out = name_of(self.file), self.left_out.total()
        if not self.ran:
            return f"⏭ {name}: {self.problem}"
        mark = "❌" if not self.is_good else "✅" if self.passed else "⏭"
        counts = f"{self.passed} passed, {self.failed} failed" + (f", {left_out} left out" if left_out else "")
        remarks = "; ".join(filter(None, (self.problem, self.remark, *self.left_out)))
        return f"{mark} {name}: {counts} in {self.seconds:.1f} s" + (f" ({remarks})" if remarks else "")


class Run:
    """One pytest process. With *is_shown* its output is shown as it comes, else kept in a file."""

    def __init__(self, file: Path, environment: Mapping[str, str], is_shown: bool) -> None:
        self.file = file
        self.environment = environment
        self.began_at = time.monotonic()
        self._cleanup = ExitStack()
        self._folder = Path(self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="batchq-report-")))
        self._results = self._folder / "results.xml"
        self._log = None if is_shown else self._cleanup.enter_context((self._folder / "log").open("wb"))
        self.process = subprocess.Popen(
            self._command(),
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log and subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches the runner only, which passes it on once
        )

    @property
    def seconds(self) -> float:
        """How long it has been running."""
        return time.monotonic() - self.began_at

    def outcome(self) -> Outcome | None:
        """Return what became of the file, once its process has ended; end one that takes too long."""
        exit_code = self.process.poll()
        if exit_code is None:
            if self.seconds < FILE_TIMEOUT_SECONDS:
                return None
            self.interrupt()
            self.wait()
        outcome = read_results(self.file, self._results, exit_code)
        outcome.seconds = self.seconds
        return outcome

    def output(self) -> bytes:
        """Return its whole output, if that was kept."""
        return (self._folder / "log").read_bytes() if self._log else b""

    def interrupt(self) -> None:
        """Ask pytest to stop and clean up."""
        self.process.terminate()  # not SIGINT, which a process started in the background ignores

    def wait(self) -> None:
        """Wait until pytest has stopped, and kill it when that takes too long."""
        try:
            self.process.wait(INTERRUPT_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def close(self) -> None:
        """Remove its files."""
        self._cleanup.close()

    def _command(self) -> list[str]:
        options = ["-o", "log_cli=true", "-o", "faulthandler_timeout=120", f"--junit-xml={self._results}"]
        if "hypothesis" not in self.file.read_text():
            options += ["-p", "no:hypothesispytest"]  # it imports hypothesis to say that nothing has used it
        return [sys.executable, "-m", "pytest", str(self.file), *options]


class Runner:
    """Runs the files of *plan* in the *environments*, one at a time in each; *tell* gets what a person reads.

    With *again* a file that fails gets a second run, alone, and the outcome of that one counts.
    """

    def __init__(
        self, plan: Plan, environments: list[dict[str, str]], tell: Callable[[str], None], again: bool = False
    ) -> None:
        self.plan = plan
        self.tell = tell
        self.again = again
        self.total = len(plan.waiting)
        self.done = 0
        self._free = environments
        self._running: list[Run] = []
        self._failed_once: set[Path] = set()

    def run(self) -> Iterator[Outcome]:
        """Run all files, and yield their outcomes; after a failure in foundation only the rest of that layer.

        When it is interrupted, the processes are stopped, and have cleaned up when it returns.
        """
        self._is_shown = len(self._free) == 1
        try:
            while self._running or self.plan.waiting:
                self._start_what_can()
                for outcome in self._collect():
                    if self._has_second_run(outcome):
                        continue
                    yield outcome
                    if is_foundation(outcome.file) and not outcome.is_good:
                        yield from self._give_up()
        finally:
            self._stop()

    def _start_what_can(self) -> None:
        while self._free and (file := self.plan.next([run.file for run in self._running])):
            if self._is_shown:
                self.tell(f"▶ {name_of(file)}")
            self._running.append(Run(file, self._free.pop(), self._is_shown))

    def _collect(self) -> list[Outcome]:
        """Wait for some of the running files, and return their outcomes."""
        while not (ended := [(run, outcome) for run in self._running if (outcome := run.outcome())]):
            time.sleep(POLL_SECONDS)
        for run, outcome in ended:
            self._finish(run, outcome)
        return [outcome for _, outcome in ended]

    def _finish(self, run: Run, outcome: Outcome) -> None:
        """Show what a file printed, its outcome, and how long the rest will take."""
        self.done += 1
        self.plan.finished(run.file, outcome.seconds)
        self._running.remove(run)
        if run.file in self._failed_once:
            outcome.remark = "the second run, alone, after one that failed"
        if output := run.output():
            self.tell(f"▶ {name_of(run.file)}\n{output.decode(errors='replace').rstrip()}")
        self.tell(str(outcome))
        self.tell(self.progress())
        run.close()
        self._free.append(dict(run.environment))

    def _has_second_run(self, outcome: Outcome) -> bool:
        """Return whether *outcome* does not count, because its file runs again."""
        if outcome.is_good or not self.again or outcome.file in self._failed_once:
            return False
        self._failed_once.add(outcome.file)
        self.plan.again(outcome.file)
        self.total += 1
        return True

    def progress(self) -> str:
        """Return a line about how far the tests are."""
        left = self.plan.seconds_left({run.file: run.seconds for run in self._running})
        line = f"⏳ {self.done} of {self.total} files; about {in_words(left)} left"
        return "; running: ".join(filter(None, (line, ", ".join(name_of(run.file) for run in self._running))))

    def _give_up(self) -> Iterator[Outcome]:
        """Yield the outcomes of the files that do not run because foundation failed."""
        left = [file for file in self.plan.waiting if not is_foundation(file)]
        self.plan.waiting = [file for file in self.plan.waiting if is_foundation(file)]
        yield from (Outcome(file, problem="not run, because foundation failed", ran=False) for file in left)

    def _stop(self) -> None:
        for run in self._running:
            run.interrupt()
        for run in self._running:
            run.wait()
            run.close()


def is_foundation(file: Path) -> bool:
    """Return whether *file* is in the first layer, on which the others stand."""
    return layer_of(file) == LAYERS[0]


def in_words(seconds: float) -> str:
    """Return a duration as a person says it."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def read_results(file: Path, results: Path, exit_code: int | None) -> Outcome:
    """Return the outcome that pytest's report and exit code tell."""
    cases = list(ElementTree.parse(results).iter("testcase")) if results.exists() else []
    left_out = {name_of_test(case): text for case in cases if (text := why_left_out(case))}
    bad = {name_of_test(case) for case in cases if has(case, "failure", "error")}
    skipped = {name_of_test(case) for case in cases if has(case, "skipped")} - bad - left_out.keys()
    good = {name_of_test(case) for case in cases} - bad - skipped - left_out.keys()
    outcome = Outcome(file, passed=len(good), failed=len(bad) + len(skipped))
    outcome.left_out = Counter(text for name, text in left_out.items() if name not in bad)
    outcome.problem = problem_of(exit_code, len(cases), len(skipped))
    if outcome.problem and not outcome.failed:
        outcome.failed = 1
    return outcome


def name_of_test(case: ElementTree.Element) -> str:
    """Return the full name of a test in pytest's report."""
    return f"{case.get('classname')}.{case.get('name')}"


def why_left_out(case: ElementTree.Element) -> str:
    """Return which program a test needs that is missing, or nothing for a test that ran."""
    messages = [found.get("message") or "" for found in case.iter("skipped")]
    return next((text.removeprefix(LEFT_OUT) for text in messages if text.startswith(LEFT_OUT)), "")


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
