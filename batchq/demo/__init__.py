"""The demo: the main job on real input that every machine has, with a worker killed half-way.

The source files of the standard library are enqueued by plain SQL, an item a file, and worked by two processes. At the
end the demo itself checks that every file was recorded exactly once.
"""

import contextlib
import os
import signal
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import psycopg
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from batchq.common.terminal import column, console, put, put_marked
from batchq.demo.page import page
from batchq.errors import BatchqError, ConfigError
from batchq.postgres import embedded
from batchq.postgres.connections import connect
from batchq.postgres.link import Link
from batchq.postgres.migrate import migrate
from batchq.postgres.transactions import transaction
from batchq.settings import Settings
from batchq.worker.supervisor import command

LEASE_SECONDS = 2
FILES_A_BATCH = 40
MOST_SECONDS = 300
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
QUEUE = "batchq_demo"

ENQUEUE = """
INSERT INTO batchq.batches (queue, kind, items)
SELECT %(queue)s, 'index_file', jsonb_agg(path ORDER BY number)
FROM unnest(%(paths)s::text[]) WITH ORDINALITY AS file(path, number)
GROUP BY (number - 1) / %(files_a_batch)s
RETURNING id
"""


class DemoFailed(BatchqError):
    """The demo did not come to its end, or its check failed."""


def run(settings: Settings, directory: str | None, most_files: int, on_page: bool = False) -> int:
    """Run the demo on the database of *settings*, or on a private server; return 0 if every file is there once.

    on_page: also in a browser; it begins when somebody looks, and ends at Ctrl-C.
    """
    paths = source_files(most_files)
    with server_dsn(settings, directory) as dsn:
        prepare(dsn)
        put(f"enqueueing {len(paths)} source files of Python's standard library, by plain SQL")
        ids = enqueue(dsn, paths, -(-len(paths) // 2) if on_page else FILES_A_BATCH)  # a page shows large batches best
        if not on_page:
            return work(dsn, paths, ids)
        with page(dsn) as shown:
            shown.wait_for_viewer(f"/batches/{ids[0]}")
            code = work(dsn, paths, ids)
            shown.wait_for_ctrl_c()
            return code


def work(dsn: str, paths: Sequence[str], ids: list[int]) -> int:
    """Have it worked, and judge it; return the exit code."""
    started_at = time.monotonic()
    with tempfile.TemporaryDirectory() as logs, worker_processes(dsn, Path(logs)) as workers:
        watch(dsn, workers, len(paths))
    put(f"worked in {time.monotonic() - started_at:.1f} s")
    return judge(dsn, paths, ids)


# --------------------------------------------------------------------------------------------------------- beginning


def source_files(most: int) -> list[str]:
    """Return the paths of the standard library's source files, at most *most* (0: all)."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [path for path in library.rglob("*.py") if not LEFT_OUT & set(path.relative_to(library).parts)]
    paths = sorted(str(path) for path in files)
    if not paths:
        raise ConfigError(f"no source files in {library}; the demo needs the standard library's")
    return paths[:most] if most > 0 else paths


@contextmanager
def server_dsn(settings: Settings, directory: str | None) -> Iterator[str]:
    """Give the DSN that was set or, without one, that of a private server, which stops at the end."""
    if settings.dsn.get_secret_value():
        put("using the database of BATCHQ_DSN (schema batchq_demo is made anew, and left there)")
        yield settings.require_dsn()
        return
    place = Path(directory) if directory else default_directory()
    put(f"starting a private Postgres in {place}")
    with embedded.start(place) as server:
        yield server.dsn()


def default_directory() -> Path:
    """Return a directory of the user's: in the cache directory; for root, one that the server's own user can enter."""
    if os.geteuid() == 0:
        return Path("/var/tmp/batchq-demo")  # noqa: S108 (it must be the same at each run)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "batchq-demo"


def prepare(dsn: str) -> None:
    """Create both schemas, and cancel what an interrupted run left in the demo's queue."""
    migrate(dsn)
    with connect(dsn) as conn, transaction(conn, 60):
        conn.execute(Path(__file__).with_name("schema.sql").read_bytes())
        conn.execute("SELECT batchq.cancel(id) FROM batchq.batches_live WHERE queue = %s", (QUEUE,))


def enqueue(dsn: str, paths: Sequence[str], files_a_batch: int) -> list[int]:
    """Enqueue the files, as anybody could from any SQL client; return the ids of the batches."""
    with connect(dsn) as conn, transaction(conn, 60):
        cursor = conn.execute(ENQUEUE, {"queue": QUEUE, "paths": list(paths), "files_a_batch": files_a_batch})
        return [row[0] for row in cursor]


@contextmanager
def worker_processes(dsn: str, logs: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run two worker processes while the block runs."""
    with contextlib.ExitStack() as files:
        workers = [
            start_worker(dsn, files.enter_context((logs / f"worker-{number}.log").open("w"))) for number in (1, 2)
        ]
        try:
            yield workers
        finally:
            for worker in workers:
                worker.send_signal(signal.SIGTERM)
            for worker in workers:
                worker.wait(30)


def start_worker(dsn: str, log: TextIO) -> subprocess.Popen[bytes]:
    """Start one worker process."""
    settings = {
        "BATCHQ_DSN": dsn,
        "BATCHQ_QUEUES": QUEUE,
        "BATCHQ_LEASE_SECONDS": str(LEASE_SECONDS),
        "BATCHQ_CONCURRENCY": "1",
    }
    words = command(["batchq.demo.tasks:app"])
    return subprocess.Popen(words, env=os.environ | settings, stdout=log, stderr=log, start_new_session=True)


# ---------------------------------------------------------------------------------------------------------- watching


def watch(dsn: str, workers: list[subprocess.Popen[bytes]], total: int) -> None:
    """Show the progress until all is worked; kill the first worker half-way. Raises DemoFailed after 5 min."""
    link = Link(dsn, 15)
    until = time.monotonic() + MOST_SECONDS
    with make_progress() as progress:
        bars = [progress.add_task("all files", total=total)]
        bars += [progress.add_task(f"worker {worker.pid}", total=total) for worker in workers]
        killed = False
        while True:
            done, waiting = look(link, bars, progress, workers)
            if not killed and done >= total // 2:
                killed = True
                kill(workers[0])
            if not waiting:
                break
            if time.monotonic() > until or all(worker.poll() is not None for worker in workers):
                raise DemoFailed(f"the workers did not come to the end: {done} of {total} files recorded")
            time.sleep(0.1)
    link.close()


def make_progress() -> Progress:
    """Return the progress bars."""
    columns = (column("{task.description:>16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def look(link: Link, bars: list[Any], progress: Progress, workers: list[subprocess.Popen[bytes]]) -> tuple[int, int]:
    """Update the bars; return how many files are recorded, and how many batches are not finished."""
    with link.transaction() as conn:
        by_pid = dict(conn.execute("SELECT worker_pid, count(*) FROM batchq_demo.files GROUP BY 1").fetchall())
        row = conn.execute("SELECT count(*) FROM batchq.batches_live WHERE queue = %s", (QUEUE,)).fetchone()
    done = sum(by_pid.values())
    progress.update(bars[0], completed=done)
    for bar, worker in zip(bars[1:], workers, strict=True):
        progress.update(bar, completed=by_pid.get(worker.pid, 0))
    return done, row[0] if row else 0


def kill(worker: subprocess.Popen[bytes]) -> None:
    """Kill a worker in the middle of its work."""
    worker.kill()
    worker.wait()
    put(
        f"killed worker {worker.pid} with -9, half-way; "
        f"its batch comes back when its lease of {LEASE_SECONDS} s runs out"
    )


# ------------------------------------------------------------------------------------------------------------ judging


def judge(dsn: str, paths: Sequence[str], ids: list[int]) -> int:
    """Compare what was recorded with the files themselves; say so, and return the exit code."""
    with connect(dsn) as conn, transaction(conn, 60):
        rows = conn.execute("SELECT path, bytes FROM batchq_demo.files").fetchall()
        rescued = taken_back(conn, ids)
    recorded = sorted(path for path, _ in rows)
    sizes_differ = [path for path, size in rows if Path(path).stat().st_size != size]
    if recorded != sorted(paths) or sizes_differ:
        missing, doubled = len(set(paths) - set(recorded)), len(recorded) - len(set(recorded))
        put_marked("wrong:", "red", f"{missing} files missing, {doubled} doubled, {len(sizes_differ)} sizes differ")
        return 1
    put(f"batches taken back from the killed worker, gone on with at their checkpoint: {rescued}")
    put_marked("every file exactly once:", "bold green", f"{len(rows)} files, {len(rows)} rows")
    return 0


def taken_back(conn: psycopg.Connection[Any], ids: list[int]) -> int:
    """Return how many of the batches needed a second attempt because their worker died."""
    row = conn.execute(
        """
        SELECT count(*)
        FROM batchq.batches_finished
        WHERE id = ANY (%s)
          AND errors -> -1 ->> 'error' LIKE 'worker died%%'
        """,
        (ids,),
    ).fetchone()
    return row[0] if row else 0
