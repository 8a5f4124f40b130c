"""The demo: the main job on real input that every machine has, with a worker killed halfway.

Plain SQL enqueues the source files of the standard library, one item per file, and two worker processes run them. At
the end the demo itself checks that every file was recorded exactly once.
"""

import os
import signal
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from batchq.common.terminal import column, console, put, put_marked
from batchq.demo import web_ui
from batchq.errors import BatchqError, ConfigError
from batchq.postgres import embedded
from batchq.postgres.connections import connect
from batchq.postgres.link import Link
from batchq.postgres.migrate import migrate
from batchq.postgres.transactions import transaction
from batchq.settings import Settings
from batchq.worker.supervisor import command

_Worker = subprocess.Popen[bytes]
_LEASE_SECONDS = 2
_FILES_PER_BATCH = 40
_TIMEOUT_SECONDS = 300
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_QUEUE = "batchq_demo"

_ENQUEUE = """
INSERT INTO batchq.batches (queue, kind, items)
SELECT %(queue)s, 'index_file', jsonb_agg(path ORDER BY number)
FROM unnest(%(paths)s::text[]) WITH ORDINALITY AS file(path, number)
GROUP BY (number - 1) / %(files_per_batch)s
RETURNING id
"""
_COUNT_RESCUED = """
SELECT count(*)
FROM batchq.batches_finished
WHERE id = ANY (%s)
  AND errors -> -1 ->> 'error' LIKE 'worker died%%'
"""


class DemoFailed(BatchqError):
    """The workers did not finish."""


def run(settings: Settings, directory: str | None, max_files: int, with_web: bool = False) -> int:
    """Run the demo on the database of *settings*, or on a private server; return 0 if every file is there once.

    with_web: also serve the web UI; start when somebody opens it, and end at Ctrl-C. A SIGTERM, or a terminal that
    closes, ends the demo and its server as Ctrl-C does.
    """
    _end_at_signals()
    paths = _source_files(max_files)
    with _server_dsn(settings, directory) as dsn:
        _prepare(dsn)
        put(f"enqueueing {len(paths)} source files of Python's standard library, by plain SQL")
        ids = _enqueue(dsn, paths, -(-len(paths) // 2) if with_web else _FILES_PER_BATCH)  # the web UI: two long bars
        if not with_web:
            return _run_and_judge(dsn, paths, ids)
        with web_ui.serving(dsn) as ui:
            ui.wait_for_viewer(f"/batches/{ids[0]}")
            code = _run_and_judge(dsn, paths, ids)
            ui.wait_for_ctrl_c()
            return code


def _end_at_signals() -> None:
    """Raise KeyboardInterrupt at the first SIGTERM or SIGHUP. A closing terminal sends SIGHUP twice."""
    numbers = [signal.SIGTERM] + [signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN)

    def end(*_: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)  # the second one would interrupt the end of the server
        raise KeyboardInterrupt

    for each in numbers:
        signal.signal(each, end)


def _run_and_judge(dsn: str, paths: Sequence[str], ids: list[int]) -> int:
    started_at = time.monotonic()
    with tempfile.TemporaryDirectory() as logs, _worker_processes(dsn, Path(logs)) as workers:
        _watch(dsn, workers, len(paths))
    put(f"finished in {time.monotonic() - started_at:.1f} s")
    return _judge(dsn, paths, ids)


# ------------------------------------------------------------------------------------------------------- preparation


def _source_files(maximum: int) -> list[str]:
    """Return the paths of the standard library's source files, at most *maximum* (0: all)."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [path for path in library.rglob("*.py") if not _LEFT_OUT & set(path.relative_to(library).parts)]
    paths = sorted(str(path) for path in files)
    if not paths:
        raise ConfigError(f"no source files in {library}; install the standard library's sources")
    return paths[:maximum] if maximum > 0 else paths


@contextmanager
def _server_dsn(settings: Settings, directory: str | None) -> Iterator[str]:
    """Yield the configured DSN or, without one, that of a private server, which is stopped at the end."""
    if settings.dsn.get_secret_value():
        put("using the database of BATCHQ_DSN; its schema batchq_demo is replaced, and stays afterwards")
        yield settings.require_dsn()
        return
    folder = Path(directory) if directory else _default_directory()
    put(f"starting a private Postgres in {folder}")
    with embedded.start(folder) as server:
        yield server.dsn()


def _default_directory() -> Path:
    """Return one in the user's cache directory; for root, one that the server's own user can enter."""
    if os.geteuid() == 0:
        return Path("/var/tmp/batchq-demo")  # noqa: S108 (it must be the same at each run)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "batchq-demo"


def _prepare(dsn: str) -> None:
    """Create both schemas; cancel what an interrupted run left in the demo's queue."""
    migrate(dsn)
    with connect(dsn) as conn, transaction(conn, 60):
        conn.execute(Path(__file__).with_name("schema.sql").read_bytes())
        conn.execute("SELECT batchq.cancel(id) FROM batchq.batches_live WHERE queue = %s", (_QUEUE,))


def _enqueue(dsn: str, paths: Sequence[str], files_per_batch: int) -> list[int]:
    """Enqueue the files, as any SQL client could; return the ids of the batches."""
    with connect(dsn) as conn, transaction(conn, 60):
        cursor = conn.execute(_ENQUEUE, {"queue": _QUEUE, "paths": list(paths), "files_per_batch": files_per_batch})
        return [row[0] for row in cursor]


# ----------------------------------------------------------------------------------------------------------- workers


@contextmanager
def _worker_processes(dsn: str, logs: Path) -> Iterator[list[_Worker]]:
    """Run two worker processes while the block runs."""
    with ExitStack() as stack:
        files = [stack.enter_context((logs / f"worker-{number}.log").open("w")) for number in (1, 2)]
        environment = os.environ | {
            "BATCHQ_DSN": dsn,
            "BATCHQ_QUEUES": _QUEUE,
            "BATCHQ_LEASE_SECONDS": str(_LEASE_SECONDS),
            "BATCHQ_CONCURRENCY": "1",
        }
        words = command(["batchq.demo.tasks:app"])
        workers = [
            subprocess.Popen(words, env=environment, stdout=file, stderr=file, start_new_session=True) for file in files
        ]
        try:
            yield workers
        finally:
            for worker in workers:
                worker.send_signal(signal.SIGTERM)
            for worker in workers:
                worker.wait(30)


def _watch(dsn: str, workers: list[_Worker], total: int) -> None:
    """Show progress until all batches are finished; kill the first worker halfway. Raises DemoFailed after 5 min."""
    columns = (column("{task.description:>16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    give_up_at = time.monotonic() + _TIMEOUT_SECONDS
    is_killed = False
    with closing(Link(dsn, 15)) as link, Progress(*columns, console=console()) as progress:
        bars = [progress.add_task("all files", total=total)]
        bars += [progress.add_task(f"worker {worker.pid}", total=total) for worker in workers]
        while True:
            files_by_pid, unfinished = _read_progress(link)
            done = sum(files_by_pid.values())
            for bar, files in zip(bars, [done, *(files_by_pid.get(worker.pid, 0) for worker in workers)], strict=True):
                progress.update(bar, completed=files)
            if not is_killed and done >= total // 2:
                is_killed = True
                _kill(workers[0])
            if not unfinished:
                return
            if time.monotonic() > give_up_at or all(worker.poll() is not None for worker in workers):
                raise DemoFailed(f"the workers did not finish: {done} of {total} files recorded")
            time.sleep(0.1)


def _read_progress(link: Link) -> tuple[dict[int, int], int]:
    """Return how many files each process has recorded, and how many batches are not finished."""
    with link.transaction() as conn:
        by_pid = dict(conn.execute("SELECT worker_pid, count(*) FROM batchq_demo.files GROUP BY 1").fetchall())
        row = conn.execute("SELECT count(*) FROM batchq.batches_live WHERE queue = %s", (_QUEUE,)).fetchone()
    return by_pid, row[0] if row else 0


def _kill(worker: _Worker) -> None:
    worker.kill()
    worker.wait()
    put(f"killed worker {worker.pid} with -9, halfway; its batch is rescued once its {_LEASE_SECONDS} s lease expires")


# ---------------------------------------------------------------------------------------------------------- judgment


def _judge(dsn: str, paths: Sequence[str], ids: list[int]) -> int:
    """Compare the records with the files themselves; print the result, and return the exit code."""
    with connect(dsn) as conn, transaction(conn, 60):
        rows = conn.execute("SELECT path, bytes FROM batchq_demo.files").fetchall()
        rescued = _count_rescued(conn, ids)
    recorded = sorted(path for path, _ in rows)
    wrong_sizes = [path for path, size in rows if Path(path).stat().st_size != size]
    if recorded != sorted(paths) or wrong_sizes:
        missing, repeated = len(set(paths) - set(recorded)), len(recorded) - len(set(recorded))
        put_marked("wrong:", "red", f"{missing} files missing, {repeated} repeated, {len(wrong_sizes)} of wrong size")
        return 1
    put(f"batches rescued from the killed worker and resumed at their checkpoint: {rescued}")
    put_marked("every file exactly once:", "bold green", f"{len(rows)} files, {len(rows)} rows")
    return 0


def _count_rescued(conn: psycopg.Connection[Any], ids: list[int]) -> int:
    """Return how many of the batches needed a second attempt because their worker died."""
    row = conn.execute(_COUNT_RESCUED, (ids,)).fetchone()
    return row[0] if row else 0
