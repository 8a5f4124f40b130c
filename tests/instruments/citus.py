"""Tries batchq on a cluster of Citus: ``python -m tests.instruments.citus DSN``.

DSN: of the coordinator, as superuser. The instrument makes scratch databases on all nodes, and drops them. It runs the
suites of the second layout, then the chaos run, and compares rates: a plain database of the coordinator, and one that
is distributed. With --without-citus it does the same with the second layout on any Postgres, which shows that the
instrument itself works.
"""

import argparse
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from psycopg import sql

import batchq
from batchq.postgres.migrate import migrate
from tests.support import citus
from tests.support.layouts import lay_out
from tests.support.processes import ROOT, Processes
from tests.support.servers import Server
from tests.support.waiting import wait_until

PARTS = ("suites", "chaos", "rate")
QUEUES = 8
LEFT = "SELECT count(*) FROM batchq.batches_live"
APP = "tests.instruments.citus:app"
app = batchq.App()


@app.handler("work")
def work(batch: batchq.Batch) -> None:
    """Do nothing."""


def main() -> int:
    """Run the parts that are asked for; return 1 if one of them failed."""
    options = parse()
    layout = "distributed" if options.without_citus else "citus"
    os.environ |= {"BATCHQ_TEST_LAYOUT": layout, "BATCHQ_TEST_SERVER": "dsn", "BATCHQ_TEST_DSN": options.dsn}
    server = Server(options.dsn, "dsn")
    if layout == "citus":
        with psycopg.connect(options.dsn) as conn:
            if not conn.execute("SELECT 1 FROM pg_extension WHERE extname = 'citus'").fetchone():
                sys.exit("the database of this DSN has no Citus: name one of the coordinator, or use --without-citus")
        print(f"{len(citus.nodes(server))} nodes: {citus.nodes(server)}", flush=True)
    failed = []
    if "suites" in options.only and run("bin/test", "distributed", "--layout", layout, "--server", "dsn"):
        failed.append("suites")
    if "chaos" in options.only and run("bin/chaos", "--server", "dsn", "--direct", "--minutes", str(options.minutes)):
        failed.append("chaos")
    if "rate" in options.only:
        compare(server, options.batches, options.workers)
    print(f"failed: {', '.join(failed) or 'nothing'}", flush=True)
    return 1 if failed else 0


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.instruments.citus", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("dsn", help="of the coordinator, as superuser")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=3.0, help="of chaos (default: 3)")
    parser.add_argument("--batches", type=int, default=100_000, help="for each measurement of the rate")
    parser.add_argument("--workers", type=int, default=2, help="worker processes (default: 2)")
    parser.add_argument("--without-citus", action="store_true", help="the second layout on any Postgres")
    options = parser.parse_args()
    if unknown := set(options.only) - set(PARTS):
        parser.error(f"there is no part {sorted(unknown)[0]!r}; there are {', '.join(PARTS)}")
    return options


def run(*command: str) -> int:
    """Run a command of the repository; return its exit code."""
    print(f"--- {' '.join(command)}", flush=True)
    return subprocess.run([*command], cwd=ROOT, check=False).returncode


def compare(server: Server, batches: int, workers: int) -> None:
    """Print the rates of both layouts, three times in turn, and the median of their ratios."""
    print(f"--- {batches:,} batches in {QUEUES} queues, {workers} worker processes", flush=True)
    ratios = []
    for _ in range(3):
        rates = []
        for layout in ("plain", os.environ["BATCHQ_TEST_LAYOUT"]):
            with database(server, layout) as dsn:
                rates.append(rate(dsn, batches, workers))
        ratios.append(rates[1] / rates[0])
        print(f"plain {rates[0]:,.0f} per second, distributed {rates[1]:,.0f}: {ratios[-1]:.2f}", flush=True)
    print(f"distributed in relation to plain: {sorted(ratios)[1]:.2f}", flush=True)


@contextmanager
def database(server: Server, layout: str) -> Iterator[str]:
    """Yield the DSN of a new database with a layout."""
    name = f"batchq_rate_{uuid.uuid4().hex[:8]}"
    if layout == "citus":
        with citus.database(server, name) as dsn:
            migrate(dsn)
            lay_out(dsn)
            yield dsn
        return
    with psycopg.connect(server.admin_dsn, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        try:
            migrate(server.dsn(name))
            if layout == "distributed":
                lay_out(server.dsn(name))
            yield server.dsn(name)
        finally:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def rate(dsn: str, batches: int, workers: int) -> float:
    """Return how many batches per second the workers finish."""
    names = [f"q{number}" for number in range(QUEUES)]
    with psycopg.connect(dsn, autocommit=True) as conn, Processes(dsn, APP) as processes:
        for _ in range(workers):
            processes.worker(queues=",".join(names))
        for name in names:
            batchq.enqueue_many(conn, "work", range(batches // QUEUES), queue=name, delay_seconds=2)
        began_at = time.monotonic() + 2
        wait_until(lambda: conn.execute(LEFT).fetchone() == (0,), 600, "the batches to be done")
        return batches / max(time.monotonic() - began_at, 0.01)


if __name__ == "__main__":
    sys.exit(main())
