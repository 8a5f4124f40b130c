"""The command line of the benchmark."""

import argparse
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from tests.instruments.bench import (  # noqa: F401 (the works register themselves)
    report,
    server,
    works_bulk,
    works_burst,
    works_ceiling,
    works_drain,
    works_enqueue,
    works_handlers,
    works_network,
    works_pickup,
    works_sealed,
    works_snapshot,
    works_steady,
    works_storage,
)
from tests.instruments.bench.plots import draw
from tests.instruments.bench.sizes import RUNS, SIZES, Sizes, given_size
from tests.instruments.bench.work import WORKS, Bench, Run
from tests.instruments.bench.worker_process import ROOT

PAGE = ROOT / "docs" / "benchmarks.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return 0 if every run was verified."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(given)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupted)
    if options.list:
        print(listing())
        return 0
    if options.page:
        results = report.read(options.page)
        report.write_page(results, PAGE)
        print(report.all_tables(results.runs))
        return 0
    try:
        return measure(options, given)
    except KeyboardInterrupt:
        print("interrupted; everything is cleaned up", file=sys.stderr)
        return 130


def interrupted(*_: object) -> NoReturn:
    """Break off, so that everything is cleaned up; further signals do not disturb that."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="bin/bench", description="Measures batchq, and checks each run.")
    parser.add_argument("works", nargs="*", metavar="WORK", help=f"what to measure: {', '.join(report.all_works())}")
    parser.add_argument("--short", action="store_true", help="tiny sizes: proves the checks, measures nothing (2 min)")
    parser.add_argument("--runs", type=int, help="runs of each variant (default: 3, or 1 for the long ones)")
    parser.add_argument("--size", action="append", default=[], type=given_size, metavar="NAME=VALUE", help="a size")
    parser.add_argument("--out", type=Path, help="where the results go (default: a new folder in build/bench)")
    parser.add_argument("--dsn", help="a superuser's DSN of a server to use (default: a private one)")
    parser.add_argument("--write-docs", action="store_true", help="write docs/benchmarks.md, too")
    parser.add_argument("--page", type=Path, nargs="+", metavar="FILE", help="only make that page, from JSON lines")
    parser.add_argument("--list", action="store_true", help="show works and sizes")
    options = parser.parse_args(arguments)
    if unknown := set(options.works) - set(WORKS):
        parser.error(f"no such work: {', '.join(sorted(unknown))}; there are {', '.join(report.all_works())}")
    return options


def listing() -> str:
    """Return the works, with what they measure and their sizes."""
    lines = []
    for name in report.all_works():
        lines += [
            f"{name} ({RUNS.get(name, 1)} runs)",
            *(f"    {line}" for line in report.explained(name).splitlines()),
        ]
        sizes = {size: pair for size, pair in SIZES.items() if size.startswith(f"{name}.")}
        lines += [
            f"    --size {size}={plain(full)}    (--short: {plain(short)})" for size, (full, short) in sizes.items()
        ]
    return "\n".join(lines)


def plain(value: object) -> str:
    """Return a size as it is given."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def measure(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Run the works on one server; write what came of them."""
    out = options.out or ROOT / "build" / "bench" / datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    out.mkdir(parents=True, exist_ok=True)
    runs: list[Run] = []
    with server.running(options.dsn) as its:
        facts = report.facts_about(its, command(given))
        bench = Bench(its, Sizes(options.short, dict(options.size)), options.runs, options.short)
        with (out / "results.jsonl").open("a", encoding="utf-8") as file:
            for name in options.works or report.all_works():
                for run in runs_of(name, bench):
                    runs.append(run)
                    print(report.line_of(run, facts), file=file, flush=True)
    return conclude(report.Results(runs, [facts]), out, options)


def runs_of(name: str, bench: Bench) -> Iterator[Run]:
    """Run a work, and say what comes. A work that breaks off is a run that failed; the next ones follow."""
    began_at = time.monotonic()
    try:
        for run in WORKS[name](bench):
            yield run
            print(f"{time.monotonic() - began_at:6.1f} s  {report.figures_line(run)}", flush=True)
    except Exception as error:
        traceback.print_exc()
        yield Run(name, "broken off", {}, [f"{type(error).__name__}: {error}"[:2000]])


def conclude(results: report.Results, out: Path, options: argparse.Namespace) -> int:
    """Write tables and plots, print the tables; return the exit code."""
    tables = report.all_tables(results.runs, with_goals=not options.short)
    (out / "results.md").write_text(tables, encoding="utf-8")
    for name in dict.fromkeys(run.work for run in results.runs):
        draw(name, results.runs, out)
    if options.write_docs:
        report.write_page(results, PAGE)
    failed = [run for run in results.runs if not run.is_verified]
    print(f"\n{tables}\n{len(results.runs)} runs, {len(failed)} not verified; in {out}")
    for run in failed:
        print(f"NOT VERIFIED: {run.work}, {run.variant}: {'; '.join(run.problems)}", file=sys.stderr)
    return 1 if failed else 0


def command(given: Sequence[str]) -> str:
    """Return the command for the record, without where the results went and what a DSN has of secrets."""
    kept, skips = [], False
    for word in given:
        if skips or word.startswith(("--out=", "--dsn=")):
            skips = False
        elif word in ("--out", "--dsn"):
            skips = True
        else:
            kept.append(word)
    return shlex.join(["bin/bench", *kept])


if __name__ == "__main__":
    sys.exit(main())
