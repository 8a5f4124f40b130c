"""What watching costs the server: viewers of the web UI's pages and one `batchq top`, beside a busy worker.

    python -m tests.instruments.watching                                # 100,000 live, a million finished; some minutes
    python -m tests.instruments.watching --live 1_000_000 --rounds 1
    python -m tests.instruments.watching --viewers 10                   # of ten pages at the same time

A worker works some 50 batches a second beside what waits in other queues. For a minute nobody watches, then both do,
and so on; printed is the server's processor time in each, and that of the watchers' own connections. Exit code 1 if
those take more than 2 % of one core.
"""

import argparse
import os
import pty
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import psycopg
from psycopg.conninfo import make_conninfo

from tests.instruments.bench import records
from tests.instruments.bench.server import Database, fresh_database, running
from tests.instruments.bench.worker_process import Workers
from tests.support.scale import fill
from tests.support.waiting import wait_until

MOST_PERCENT = 2.0
RATE = 50
QUEUE = "watched"
PAGES = ("overview", "batches/", "failures", "charts/", "workers", "limits", "keys/", "flows", "spread", "schedules")
WATCHERS = ("watching_page", "watching_top")  # each is a role, to know its connections by
SETTLE_SECONDS = 5.0


def main() -> int:
    """Fill, measure, print; return the exit code."""
    options = parse()
    with running(None) as server, fresh_database(server) as database:
        for watcher in WATCHERS:
            database.conn.execute(f"CREATE ROLE {watcher} LOGIN SUPERUSER".encode())
        fill(database.conn, options.live, options.finished, 30)
        with records.directory() as directory, busy(database, directory):
            found = [measure(database, options.seconds, options.viewers) for _ in range(options.rounds)]
    difference = statistics.median(watched - alone for alone, watched, _ in found)
    share = statistics.median(sum(own.values()) for _, _, own in found)
    print(
        f"difference {difference:.2f} % of a core; the watchers' own connections {share:.2f} %, "
        f"at most {MOST_PERCENT:g}"
    )
    return 0 if share <= MOST_PERCENT else 1


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.instruments.watching", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--live", type=int, default=100_000)
    parser.add_argument("--finished", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each measurement (default: 60)")
    parser.add_argument("--viewers", type=int, default=1, help="of as many pages of the web UI (default: 1)")
    parser.add_argument("--rounds", type=int, default=2, help="without and with watchers (default: 2)")
    return parser.parse_args()


@contextmanager
def busy(database: Database, directory: Path) -> Iterator[None]:
    """Have a worker work some 50 batches a second while the block runs."""
    stopping = threading.Event()

    def produce() -> None:
        with psycopg.connect(database.dsn, autocommit=True) as conn:
            while not stopping.wait(0.1):
                conn.execute(
                    "INSERT INTO batchq.batches (queue, kind, payload) "
                    "SELECT %s, 'noop', jsonb_build_object('seq', n) FROM generate_series(1, %s) n",
                    [QUEUE, RATE // 10],
                )

    producer = threading.Thread(target=produce, daemon=True)
    with Workers(database.dsn, 1, directory, {"queues": QUEUE}) as workers:
        workers.go()
        producer.start()
        wait_until(workers.records.count, 30, "the first batch to be worked")
        yield
        stopping.set()
        producer.join()
        if problems := workers.stop():
            raise RuntimeError(f"the worker had problems: {problems}")


# --------------------------------------------------------------------------------------------------------- measuring


def measure(database: Database, seconds: float, viewers: int) -> tuple[float, float, dict[str, float]]:
    """Return the server's share of a core while nobody watches, while both do, and that of each watcher's connections,
    in percent."""
    alone, _ = spent(database, seconds)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        stack.enter_context(page_viewers(database.dsn, Path(name), viewers))
        stack.enter_context(top(database.dsn))
        wait_until(lambda: all(pids_of(database, watcher) for watcher in WATCHERS), 60, "both to watch")
        time.sleep(SETTLE_SECONDS)
        watched, own = spent(database, seconds)
    print(
        f"alone {alone:.2f} %, watched {watched:.2f} %; " + ", ".join(f"{who} {own[who]:.2f} %" for who in WATCHERS),
        flush=True,
    )
    return alone, watched, own


def spent(database: Database, seconds: float) -> tuple[float, dict[str, float]]:
    """Return what the server and the watchers' connections spend in so many seconds, in percent of a core."""
    pids = {who: pids_of(database, who) for who in WATCHERS}
    server_before, own_before = cpu_seconds(database), {who: of_processes(found) for who, found in pids.items()}
    began_at = time.monotonic()
    time.sleep(seconds)
    took = time.monotonic() - began_at
    if {who: pids_of(database, who) for who in WATCHERS} != pids:
        raise RuntimeError("a watcher has connected anew meanwhile: what it spent is not known")
    own = {who: 100 * (of_processes(found) - own_before[who]) / took for who, found in pids.items()}
    return 100 * (cpu_seconds(database) - server_before) / took, own


def cpu_seconds(database: Database) -> float:
    """Return the server's processor time so far."""
    found = database.server.cpu_seconds()
    if found is None:
        raise RuntimeError("the server is not on this machine")
    return found


def of_processes(pids: list[int]) -> float:
    """Return the processor time of processes so far."""
    all_times = [psutil.Process(pid).cpu_times() for pid in pids]
    return float(sum(times.user + times.system for times in all_times))


def pids_of(database: Database, watcher: str) -> list[int]:
    """Return the server's processes for a watcher's connections."""
    found = database.conn.execute(
        "SELECT pid FROM pg_stat_activity WHERE usename = %s AND backend_type = 'client backend' ORDER BY pid",
        [watcher],
    )
    return [pid for (pid,) in found]


# ---------------------------------------------------------------------------------------------------------- watching


@contextmanager
def page_viewers(dsn: str, directory: Path, viewers: int) -> Iterator[None]:
    """Serve the web UI, and watch pages of it, each by one viewer, while the block runs."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (
        (directory / "web.log").open("wb") as log,
        command(dsn, WATCHERS[0], ["web", "--port", str(port)], log.fileno()),
    ):
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: is_served(url), 60, "the page to be served")
        with ExitStack() as stack:
            readers = [watch(stack, f"{url}/live/{PAGES[number % len(PAGES)]}") for number in range(viewers)]
            yield
            if not all(reader.is_alive() for reader in readers):
                raise RuntimeError("a page's stream has ended: nobody watched it")


def watch(stack: ExitStack, url: str) -> threading.Thread:
    """Watch a page until the stack ends; return the thread that does."""
    live = stack.enter_context(httpx.stream("GET", url, trust_env=False, timeout=60))
    if live.status_code != httpx.codes.OK:
        raise RuntimeError(f"{url} answers {live.status_code}")
    reader = threading.Thread(target=read, args=[live], daemon=True)
    reader.start()
    return reader


def read(live: httpx.Response) -> None:
    """Take what comes, until it ends."""
    with suppress(httpx.HTTPError, httpx.StreamError):
        for _ in live.iter_raw():
            pass


def is_served(url: str) -> bool:
    """Tell whether the page answers."""
    with suppress(httpx.HTTPError):
        return httpx.get(f"{url}/healthz", trust_env=False, timeout=10).status_code == 200
    return False


@contextmanager
def top(dsn: str) -> Iterator[None]:
    """Run `batchq top` on a terminal while the block runs."""
    ours, its = pty.openpty()
    with command(dsn, WATCHERS[1], ["top"], its) as process:
        os.close(its)
        threading.Thread(target=drain, args=[ours], daemon=True).start()
        yield
        if process.poll() is not None:
            raise RuntimeError(f"batchq top has ended with {process.returncode}")
    os.close(ours)


def drain(terminal: int) -> None:
    """Take what is written to a terminal, until nobody writes any more."""
    with suppress(OSError):
        while os.read(terminal, 65_536):
            pass


@contextmanager
def command(dsn: str, name: str, arguments: list[str], output: int) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a command of batchq's whose connections bear a name, while the block runs."""
    env = os.environ | {"BATCHQ_DSN": make_conninfo(dsn, user=name), "TERM": "xterm-256color"}
    process = subprocess.Popen(
        [sys.executable, "-m", "batchq", *arguments], env=env, stdin=output, stdout=output, stderr=output,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


if __name__ == "__main__":
    sys.exit(main())
