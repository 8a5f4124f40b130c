"""The command line of the soak."""

import argparse
import json
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from tests.instruments.bench import records, report, server
from tests.instruments.bench.cli import interrupted
from tests.instruments.bench.draining import is_empty
from tests.instruments.bench.server import Database
from tests.instruments.bench.worker_process import ROOT, Workers
from tests.instruments.soak import load, verdict
from tests.instruments.soak.load import Load
from tests.instruments.soak.plots import draw
from tests.instruments.soak.sampling import Sample, Sampler
from tests.instruments.soak.verdict import Finding
from tests.support.waiting import wait_until

LEDGER = "CREATE TABLE ledger (batch_id bigint NOT NULL, number integer NOT NULL)"
LEASE_SECONDS = 12
EMPTY_SECONDS = 120
TOLD_SECONDS = 60


def main(arguments: Sequence[str] | None = None) -> int:
    """Soak; return 0 if the verdict is good."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(given)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupted)
    out = options.out or ROOT / "build" / "soak" / datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    out.mkdir(parents=True, exist_ok=True)
    try:
        return soak(options, out, shlex.join(["bin/soak", *given]))
    except KeyboardInterrupt:
        print("interrupted; everything is cleaned up", file=sys.stderr)
        return 130


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="bin/soak",
        description="Works a mix of everything, below capacity, and judges whether anything grows, drifts, gets lost or"
        " is done twice. The first third of the time, 40 minutes at most, is warm-up.",
    )
    parser.add_argument("minutes", type=float, metavar="MINUTES", help="how long")
    parser.add_argument("--seed", type=int, default=20261125, help="of which items fail (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=30, metavar="R", help="batches a second (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes (default: %(default)s)")
    parser.add_argument("--every", type=float, default=5, metavar="SECONDS", help="a sample (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where it goes (default: a new folder in build/soak)")
    parser.add_argument(
        "--most-rss-slope", type=float, default=verdict.MOST_RSS_SLOPE, metavar="MB",
        help="how much a worker may grow, in MiB an hour (default: %(default)s); more for a run that is short",
    )  # fmt: skip
    parser.add_argument("--leak-bytes", type=int, default=0, metavar="N", help="plant a leak, which must be found")
    return parser.parse_args(arguments)


def soak(options: argparse.Namespace, out: Path, command: str) -> int:
    """Run it on a private server, and write what came of it; return the exit code."""
    # A worker's memory settles for 40 minutes. 100 minutes on 2026-11-28, the median of each ten in MiB: 62.4, 64.0,
    # 64.5, 64.9, 64.9, 65.0, 65.2, 65.3, 66.2, 65.3.
    warm_up_seconds = min(options.minutes / 3, 40) * 60
    with (
        server.running(None) as its,
        server.fresh_database(its) as database,
        (out / "samples.jsonl").open("w", encoding="utf-8") as file,
    ):
        say(file, report.facts_about(its, command))
        samples, problems = run(options, database, out, file)
        findings = verdict.judge(samples, warm_up_seconds, options.most_rss_slope)
        say(file, {"findings": [each.as_json() for each in findings], "problems": problems})
    draw(samples, warm_up_seconds, out / "soak.svg")
    return conclude(samples, findings, problems, out)


def say(file: IO[str], line: dict[str, object]) -> None:
    """Write a line of JSON."""
    print(json.dumps(line), file=file, flush=True)


def run(options: argparse.Namespace, database: Database, out: Path, file: IO[str]) -> tuple[list[Sample], list[str]]:
    """Work the load; return the samples, and what is wrong at the end."""
    database.conn.execute(LEDGER)
    database.conn.execute("SET application_name = 'soak'")
    settings = {"lease_seconds": LEASE_SECONDS, "soak_leak_bytes": options.leak_bytes}
    its_load = Load(database.dsn, options.rate, options.seed)
    with (
        records.directory() as directory,
        Workers(database.dsn, options.workers, directory, settings, "tests.instruments.soak.apps:app") as workers,
    ):
        workers.go()
        with its_load:
            samples = []
            for sample in sampled(options, Sampler(database, workers, its_load)):
                samples.append(sample)
                say(file, asdict(sample))
            its_load.stop()
        wait_until(lambda: is_empty(database), EMPTY_SECONDS, "the last batches to end")
        problems = workers.stop() + load.problems(database.conn, its_load.by_kind)
        (out / "workers.log").write_text(workers.said(), encoding="utf-8")
    return samples, problems


def sampled(options: argparse.Namespace, sampler: Sampler) -> Iterator[Sample]:
    """Yield a sample every few seconds, for so many minutes; say now and then how it goes."""
    until = sampler.began_at + options.minutes * 60
    told_at = 0.0
    while (now := time.monotonic()) < until:
        sampler.workers.check_alive()
        sampler.load.check()
        sample = sampler.take()
        yield sample
        if now - told_at >= min(TOLD_SECONDS, options.minutes * 60 / 10):
            told_at = now
            print(told(sample), flush=True)
        time.sleep(max(0.0, min(now + options.every, until) - time.monotonic()))


def told(sample: Sample) -> str:
    """Return a sample as a line for whoever watches."""
    rss = " ".join(f"{worker['rss_mb']:.1f}" for worker in sample.workers)
    return (
        f"{sample.at / 60:6.1f} min  {sample.finished:,} finished, {sample.live} live, {sample.dead_tuples:,} dead;"
        f" RSS {rss} MiB; {sample.connections} connections; wait {sample.pickup_p50_ms} ms; live table"
        f" {sum(sample.sizes_mb.values()):.1f} MiB"
    )


def conclude(samples: list[Sample], findings: list[Finding], problems: list[str], out: Path) -> int:
    """Print the verdict; return the exit code."""
    for finding in findings:
        print(finding)
    for problem in problems:
        print(f"WRONG    {problem}")
    print(f"cost: {costs(samples)}")
    is_good = not problems and all(finding.is_good for finding in findings)
    print(f"\n{samples[-1].finished:,} batches: {'flat' if is_good else 'NOT FLAT'}; in {out}")
    return 0 if is_good else 1


def costs(samples: list[Sample]) -> str:
    """Return what it cost, of a core."""
    first, last = samples[0], samples[-1]
    seconds = last.at - first.at
    workers = 100 * (last.worker_cpu_seconds - first.worker_cpu_seconds) / seconds
    if first.server_cpu_seconds is None or last.server_cpu_seconds is None:
        return f"workers {workers:.1f} % of a core"
    of_server = 100 * (last.server_cpu_seconds - first.server_cpu_seconds) / seconds
    return f"workers {workers:.1f} %, server {of_server:.1f} % of a core"
