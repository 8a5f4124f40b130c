"""Run the tests layer by layer, each file in a pytest process of its own, several at a time.

The layers are foundation, component, integration and e2e; when foundation fails the others do not run. Files that run
at the same time have a server each. A skipped test, and a file without tests, is a failure; a test that needs a program
which is not installed, and cannot be installed, is left out.
"""

import argparse
import os
import signal
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.support import programs  # noqa: E402
from tests.support.layouts import DISTRIBUTED, LAYOUTS  # noqa: E402
from tests.support.plan import LAYERS, Plan, name_of, read_durations, write_durations  # noqa: E402
from tests.support.pytest_runs import Outcome, Runner, in_words  # noqa: E402
from tests.support.servers import NoServerError, Server, running_server  # noqa: E402
from tests.support.through import POOLED, SAME_ON_ANY_SERVER, WAYS  # noqa: E402

NAMES = (
    f"layers ({', '.join(LAYERS)}), pooled, servers, distributed "
    "(what a pooler, a server's version, or the second layout may make a difference to)"
)
JOBS_PER_CORE = 2  # tests wait more than they work


def main() -> int:
    """Run what the arguments name, and return the exit code: 0 when every test passed."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    arguments = parse_arguments()
    set_environment(arguments)
    started = time.monotonic()
    try:
        os.environ[programs.WHY_MISSING] = programs.install()
        outcomes = run(find_files(arguments.what, arguments.without), arguments.jobs, arguments.again)
    except NoServerError as error:
        sys.exit(f"no server to test on: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
    if arguments.write_durations:
        write_durations(read_durations() | {name_of(one.file): one.seconds for one in outcomes if one.is_good})
    return report(outcomes, time.monotonic() - started, arguments.strict)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Run batchq's tests, layer by layer.")
    parser.add_argument("what", nargs="*", help=f"{NAMES}, or test files; default: all")
    parser.add_argument("--without", action="append", default=[], metavar="WHAT", help="leave these out")
    parser.add_argument("--server", choices=["container", "embedded", "dsn"], help="which Postgres to test on")
    parser.add_argument("--through", choices=list(WAYS), default="direct", help="which pooler to test through")
    parser.add_argument("--layout", choices=LAYOUTS, default="plain", help="which layout of the tables to test on")
    parser.add_argument("--jobs", type=int, metavar="N", help="files to run at a time (default: 2 per core, at most 8)")
    parser.add_argument("--strict", action="store_true", help="fail if a test is left out for want of a program")
    parser.add_argument("--again", action="store_true", help="run a failed file once more, alone; that result counts")
    parser.add_argument("--write-durations", action="store_true", help="update tests/durations.json")
    return parser.parse_args()


def set_environment(arguments: argparse.Namespace) -> None:
    """Hand on to the pytest processes what the arguments say."""
    os.environ["BATCHQ_TEST_THROUGH"] = arguments.through
    os.environ["BATCHQ_TEST_LAYOUT"] = arguments.layout
    if "pooled" in arguments.what:
        os.environ["BATCHQ_TEST_POOLED"] = "yes"
    if arguments.server:
        os.environ["BATCHQ_TEST_SERVER"] = arguments.server


def find_files(what: list[str], without: list[str]) -> list[Path]:
    """Return the test files of the layers and paths in *what*, but not in *without*."""
    files = {file for name in what or LAYERS for file in files_of(name)}
    left_out = {file for name in without for file in files_of(name)}
    return sorted(files - left_out)


def files_of(name: str) -> list[Path]:
    """Return the test files of one layer, those of a group, or the one file *name*."""
    if name == "pooled":
        return [ROOT / "tests" / file for file in POOLED]
    if name == "distributed":
        return [ROOT / "tests" / file for file in DISTRIBUTED]
    if name == "servers":
        left_out = {ROOT / "tests" / file for file in SAME_ON_ANY_SERVER}
        return [file for layer in LAYERS for file in files_of(layer) if file not in left_out]
    if name in LAYERS:
        return list((ROOT / "tests" / name).rglob("test_*.py"))
    file = Path(name).resolve()
    if not file.is_file() or not set(file.parts[-3:-1]) & set(LAYERS):
        sys.exit(f"{name} is none of these: {NAMES}, test files in a layer")
    return [file]


def run(files: list[Path], jobs: int | None, again: bool = False) -> list[Outcome]:
    """Start the servers, one for each of the files that run at a time, and run all."""
    with ExitStack() as stack:
        servers = [stack.enter_context(running_server())] if files else []
        for _ in range(1, min(len(files), jobs or default_jobs(servers))):
            servers.append(stack.enter_context(running_server()))
        plan = Plan(files, len(servers), read_durations())
        runner = Runner(plan, [os.environ | server.environment() for server in servers], say, again)
        way, left = os.environ["BATCHQ_TEST_THROUGH"], in_words(plan.seconds_left({}))
        described = servers[0].describe() if servers else "no server"
        say(f"{described}, {way}; {len(files)} test files, {len(servers)} at a time; about {left}")
        return sorted(runner.run(), key=lambda outcome: files.index(outcome.file))


def default_jobs(servers: list[Server]) -> int:
    """Return how many files to run at a time. On a server that is not ours tests would crash it under each other."""
    if any(server.origin == "dsn" for server in servers):
        return 1
    return min(8, JOBS_PER_CORE * (os.cpu_count() or 1))


def report(outcomes: list[Outcome], seconds: float, strict: bool = False) -> int:
    """Print the summary and return the exit code."""
    passed, failed = (sum(getattr(outcome, what) for outcome in outcomes) for what in ("passed", "failed"))
    left_out = sum((outcome.left_out for outcome in outcomes), Counter[str]())
    say("=" * 70)
    for outcome in outcomes:
        say(str(outcome))
    say(f"Completed: {sum(outcome.ran for outcome in outcomes)} of {len(outcomes)}")
    for reason, tests in left_out.items():
        say(f"Left out: {tests} tests, {reason}")
    say(f"Passed: {passed}, failed: {failed}, duration: {seconds:.1f} s")
    good = passed > 0 and all(outcome.is_good for outcome in outcomes) and not (strict and left_out)
    say(("✅ all tests passed" + ", but for those left out" * bool(left_out)) if good else "❌ not all tests passed")
    say(f"{passed} passed, {failed} failed")
    return 0 if good else 1


def say(text: str) -> None:
    """Print a line at once, between the lines of the pytest processes."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
