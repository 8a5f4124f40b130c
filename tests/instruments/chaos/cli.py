"""The command line of the chaos run."""

import argparse
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tests.instruments.chaos import report
from tests.instruments.chaos.faults import FAULTS
from tests.instruments.chaos.run import Run, Window
from tests.instruments.chaos.schedule import MOST_AT_ONCE, schedule
from tests.instruments.chaos.server import running
from tests.instruments.chaos.world import World, world

LONGEST_SECONDS = (6.0, 30.0)  # of a fault of any length: in a short run, in one of ten minutes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return 0 if nothing was violated, 1 if something was, 2 for a mistake, 130 when interrupted."""
    options = parse(arguments)
    if options.list:
        print("\n".join(f"{fault.name:20} {fault.summary}" for fault in FAULTS.values()))
        return 0
    if options.table:
        windows = [each for out in options.table for each in report.read_windows(out / "windows.jsonl")]
        print(report.table(windows))
        return 0
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupted)
    try:
        return chaos(options)
    except KeyboardInterrupt:
        print("interrupted; everything is cleaned up", file=sys.stderr)
        return 130


def interrupted(*_: object) -> NoReturn:
    """Break off, so that everything is cleaned up; further signals do not disturb that."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="bin/chaos", description="Breaks whatever batchq stands on while it works, and counts what came of it."
    )
    parser.add_argument("--seed", type=int, default=1, help="which faults come when (default: 1)")
    parser.add_argument("--minutes", type=float, default=3.0, help="how long (default: 3)")
    parser.add_argument("--faults", type=names, default=list(FAULTS), metavar="A,B", help="these alone (default: all)")
    parser.add_argument("--list", action="store_true", help="show the faults")
    parser.add_argument("--table", type=Path, nargs="+", metavar="OUT", help="only print one table of these runs")
    parser.add_argument("--out", type=Path, help="where events, table and, where something was violated, logs go")
    parser.add_argument("--server", choices=("embedded", "container", "dsn"), default="embedded",
                        help="whose Postgres: a private one, for all faults (default); or as BATCHQ_TEST_IMAGE"
                        " or BATCHQ_TEST_DSN say")  # fmt: skip
    parser.add_argument(
        "--programs", type=Path, metavar="DIR", help="the private server's programs (default: a wheel's)"
    )
    parser.add_argument("--alone", action="store_true", help="no two faults at once")
    parser.add_argument("--most-at-once", type=at_least_two, default=MOST_AT_ONCE, metavar="N",
                        help="how many faults at once at most (default: %(default)s)")  # fmt: skip
    parser.add_argument("--direct", action="store_true", help="without PgBouncer in between")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of each style (default: 2)")
    parser.add_argument("--backlog", type=int, default=60, help="batches of each style that are ready (default: 60)")
    parser.add_argument("--compare-seconds", type=float, default=1.0,
                        help="how long the rate is measured before and after each window (default: 1)")  # fmt: skip
    return parser.parse_args(arguments)


def at_least_two(text: str) -> int:
    """Read a number from 2 up. Raises ArgumentTypeError for another."""
    if int(text) < 2:
        raise argparse.ArgumentTypeError(f"must be 2 or more, not {text}; for one at a time there is --alone")
    return int(text)


def names(text: str) -> list[str]:
    """Read names of faults. Raises ArgumentTypeError for one that does not exist."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := set(found) - set(FAULTS):
        raise argparse.ArgumentTypeError(f"no such fault: {', '.join(sorted(unknown))}; see --list")
    return found


def chaos(options: argparse.Namespace) -> int:
    """Run on a server; say what comes, and what came of it."""
    out: Path | None = options.out
    if out:
        out.mkdir(parents=True, exist_ok=True)
    with (
        running(options.server, options.programs) as server,
        world(server, workers=options.workers, through_pooler=not options.direct, backlog=options.backlog) as its,
    ):
        its.longest_seconds = min(max(options.minutes * 3, LONGEST_SECONDS[0]), LONGEST_SECONDS[1])
        print(f"{server.describe()}; seed {options.seed}, {len(its.fleet.places)} workers", flush=True)
        run = Run(its, options.seed, options.compare_seconds, lambda window: tell(window, out))
        faults = schedule(options.seed, possible(its, options.faults), options.alone, options.most_at_once)
        run.work(faults, options.minutes * 60)
        return conclude(run, out)


def possible(its: World, wanted: Sequence[str]) -> list[str]:
    """Return the faults that can be tried here; say which cannot."""
    missing = {name: problem for name in wanted if (problem := FAULTS[name].missing(its))}
    for name, problem in missing.items():
        print(f"NOT TRIED: {name}: {problem}", flush=True)
    return [name for name in wanted if name not in missing]


def tell(window: Window, out: Path | None) -> None:
    """Say what came of a window."""
    print(report.line(window), flush=True)
    if out:
        with (out / "windows.jsonl").open("a", encoding="utf-8") as file:
            print(report.json_line(window), file=file)


def conclude(run: Run, out: Path | None) -> int:
    """Print and keep table and verdict; return the exit code."""
    began_at = time.strftime("%Y-%m-%d %H:%M")
    rates = f"rate at first {run.first_rate:.0f}/s, at last {run.last_rate:.0f}/s"
    notes = "".join(f"note: {note}\n" for note in run.world.fleet.notes)
    found = f"{notes}{report.violations(run.violations)}"
    text = f"{report.table(run.windows)}\n\n{rates}\n{found}\n{report.verdict(run)}"
    print(f"\n{text}", flush=True)
    if out:
        (out / "result.md").write_text(f"{began_at}, seed {run.seed}\n\n{text}\n", encoding="utf-8")
        if run.violations:
            for log in run.world.directory.glob("*.log"):
                shutil.copy(log, out)
    return 1 if run.violations else 0
