"""What looking at a large queue costs: fills a database, and prints each view's median time, rows read and plan, and
how long each page of `batchq web` takes.

    python -m tests.instruments.scale --live 10_000_000 --finished 100_000_000 --directory /some/disk
    python -m tests.instruments.scale --live 5000 --finished 100_000 --dead 3_000_000  # a snapshot is held
    python -m tests.instruments.scale --dsn postgresql://... --keep  # its own database there, kept

A private server is used unless --dsn names one (as a superuser). With --keep the database batchq_scale stays, and is
used as it is the next time. Without auto_explain on the server, plans within functions are told by what they read.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import httpx
import psycopg
from psycopg.conninfo import make_conninfo

from batchq.postgres import embedded
from batchq.postgres.migrate import migrate
from tests.support.databases import holding_snapshot
from tests.support.scale import LOOKS, LOOKS_BESIDE_DEAD, cost, die, fill, survey
from tests.support.waiting import wait_until

NAME = "batchq_scale"
ROOT = Path(__file__).resolve().parents[2]
PORT = 8096
MOST_MS = 50
MOST_MS_BESIDE_DEAD = 150
CHUNK = "bulk, a dry run's look"  # is a chunk of a verb, of as many rows as it may take, and is told alone
TIMES = 9
FILTERS = ("queue=mail", "kind=kind+1", "queue=mail&kind=kind+2&status=ready", "status=failed&kind=kind+0",
           "status=failed&error_like=number+3")  # fmt: skip
STATUSES = ("ready", "scheduled", "retrying", "processing", "stalled", "completed", "failed", "cancelled")
SETTINGS = {"shared_buffers": "1GB", "max_wal_size": "8GB", "fsync": "off", "autovacuum_naptime": "5s"}


def main() -> int:
    """Fill, look, and print; return 1 if the median of a view or a page is over 50 ms (150 beside dead rows)."""
    options = parse()
    with server(options) as admin_dsn, database(admin_dsn, options) as conn:
        looks = LOOKS_BESIDE_DEAD if options.dead else LOOKS
        costs = [cost(conn, name, query) for name, query in looks.items()]
        pages = dict(timed_pages(conn))
    for each in costs:
        print(f"\n=== {each.name}: {each.median_ms:.1f} ms; read {each.rows_read}; scanned {each.scanned}\n{each.plan}")
    print()
    for each in costs:
        cpu = "?" if each.cpu_ms is None else f"{each.cpu_ms:.1f}"
        print(
            f"{each.median_ms:9.1f} ms, {cpu:>6} of processor  {sum(each.rows_read.values()):9,} rows read  {each.name}"
        )
    for path, page_ms in pages.items():
        print(f"{page_ms:9.1f} ms  {path}")
    views = [each.median_ms for each in costs if each.name != CHUNK]
    return 0 if max(*views, *pages.values()) <= (MOST_MS_BESIDE_DEAD if options.dead else MOST_MS) else 1


def timed_pages(conn: psycopg.Connection) -> Iterator[tuple[str, float]]:
    """Yield each page, and the median of how many ms it takes, as one who asks for it sees it."""
    ids = [
        conn.execute("SELECT id FROM batchq.batches_live WHERE status = 'processing' LIMIT 1").fetchone(),
        conn.execute("SELECT id FROM batchq.batches_finished WHERE status = 'failed' LIMIT 1").fetchone(),
    ]
    paths = ["/limits", "/keys", "/keys?key=a", "/flows", "/spread", "/schedules", "/kinds?queue=default&kind=work"]
    paths += [f"/workers?id={row[0]}" for row in conn.execute("SELECT id FROM batchq.workers LIMIT 1")]
    paths += ["/", "/workers", "/audit", "/metrics", "/batches", *(f"/batches?status={status}" for status in STATUSES)]
    paths += ["/failures", "/charts", "/charts?range=24h", "/charts?range=7d"]
    paths += [f"/batches?{each}" for each in FILTERS] + [f"/batches/{row[0]}" for row in ids if row]
    with web(conn.info.dsn) as url, httpx.Client(base_url=url, timeout=60) as client:
        for path in paths:
            took = []
            for _ in range(TIMES):
                began_at = time.perf_counter()
                client.get(path).raise_for_status()
                took.append(1000 * (time.perf_counter() - began_at))
            yield path, statistics.median(took)


@contextmanager
def web(dsn: str) -> Iterator[str]:
    """Serve the page by a process of its own; give its address."""
    command = [sys.executable, "-m", "batchq", "web", "--dsn", dsn, "--port", str(PORT)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        try:
            url = f"http://127.0.0.1:{PORT}"
            wait_until(lambda: process.poll() is None and answers(url), 30, f"a page on port {PORT}")
            yield url
        finally:
            process.terminate()


def answers(url: str) -> bool:
    """Tell whether the page is up."""
    with suppress(httpx.TransportError):
        return httpx.get(f"{url}/healthz").is_success
    return False


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.instruments.scale", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--live", type=int, default=1_000_000)
    parser.add_argument("--finished", type=int, default=1_000_000)
    parser.add_argument("--days", type=int, default=30, help="over which the finished ones are spread (default: 30)")
    parser.add_argument(
        "--dead", type=int, default=0, help="dead rows of the live table, under a snapshot that is held"
    )
    parser.add_argument("--dsn", help="a superuser's DSN of a server to use (default: a private one)")
    parser.add_argument("--directory", type=Path, help="where the private server keeps its data (default: temporary)")
    parser.add_argument("--keep", action="store_true", help="keep the database, and use it as it is if it is there")
    options = parser.parse_args()
    if options.dead and options.keep:
        parser.error("--keep cannot keep dead rows: a vacuum removes them once the snapshot has gone")
    return options


@contextmanager
def server(options: argparse.Namespace) -> Iterator[str]:
    """Give a superuser's DSN."""
    if options.dsn:
        yield options.dsn
        return
    with tempfile.TemporaryDirectory(prefix="batchq-scale-") as temporary:
        Path(temporary).chmod(0o755)  # as root, the server runs as another user
        with embedded.start(options.directory or Path(temporary), SETTINGS) as private:
            yield private.dsn()


@contextmanager
def database(admin_dsn: str, options: argparse.Namespace) -> Iterator[psycopg.Connection]:
    """Give a connection to the filled database."""
    with psycopg.connect(admin_dsn, autocommit=True) as admin:
        is_there = admin.execute("SELECT FROM pg_database WHERE datname = %s", [NAME]).fetchone() is not None
        if not is_there:
            admin.execute(f"CREATE DATABASE {NAME}".encode())
        dsn = make_conninfo(admin_dsn, dbname=NAME)
        migrate(dsn)
        with (
            holding_snapshot(dsn) if options.dead else nullcontext(),
            psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as conn,
        ):
            if not is_there:
                began_at = time.monotonic()
                if options.dead:
                    die(conn, options.dead)
                fill(conn, options.live, options.finished, options.days)
                if options.dead:
                    survey(conn)
                print(f"filled in {time.monotonic() - began_at:.0f} s", flush=True)
            conn.execute("UPDATE batchq.workers SET heartbeat_at = now()")
            tell_nested_plans(conn)
            yield conn
        if not options.keep:
            admin.execute(f"DROP DATABASE {NAME} WITH (FORCE)".encode())


def tell_nested_plans(conn: psycopg.Connection) -> None:
    """Have the server tell the plans within functions, where it has auto_explain; to standard error."""
    try:
        conn.execute("LOAD 'auto_explain'")
    except psycopg.Error:
        return
    conn.add_notice_handler(lambda notice: print(notice.message_primary, file=sys.stderr))
    conn.execute("SELECT set_config('auto_explain.log_nested_statements', 'on', false)")
    conn.execute("SELECT set_config('auto_explain.log_min_duration', '20ms', false)")
    conn.execute("SELECT set_config('client_min_messages', 'log', false)")


if __name__ == "__main__":
    sys.exit(main())
