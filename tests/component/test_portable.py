"""Programs that enqueue run on Windows, too: what only POSIX has is not needed to import batchq and to enqueue."""

import subprocess
import sys
from pathlib import Path

import psycopg

from tests.support.alone import run_alone

# What others need of POSIX is imported first: Python's library and the packages that batchq depends on have their own
# ways on Windows.
PROGRAM = """
import asyncio, concurrent.futures, ctypes, http.server, importlib.metadata, logging, multiprocessing, os, select
import selectors, signal, socket, subprocess, sys, tempfile, threading, traceback, uuid, zoneinfo
import cronsim, dotenv, psycopg, psycopg_pool, pydantic_settings, rich.progress, structlog

for name in ("fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"):
    sys.modules[name] = None
for module, names in (
    (os, "O_NONBLOCK chown fork forkpty geteuid getegid getgid getgroups getloadavg getpgid getppid getuid killpg"
     " mkfifo register_at_fork sched_getaffinity set_blocking setsid statvfs sysconf uname wait waitpid"),
    (signal, "SIGALRM SIGCHLD SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP SIGUSR1 SIGUSR2 pthread_sigmask"
     " setitimer sigwait"),
    (select, "epoll poll"), (socket, "AF_UNIX"),
):
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)

import batchq, batchq.enqueue
from batchq import enqueue, enqueue_many

with psycopg.connect(sys.argv[1], prepare_threshold=None) as conn:
    print(enqueue(conn, "send_receipt", {"order_id": 42}))
    print(enqueue_many(conn, "check_site", items=["a", "b"], items_per_batch=1))
"""


def test_a_program_imports_batchq_and_enqueues_without_what_only_posix_has(
    dsn: str, conn: psycopg.Connection, tmp_path: Path
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, dsn], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "1\n2\n"), ended.stderr
    assert conn.execute("SELECT count(*) FROM batchq.all_batches").fetchone() == (3,)


if __name__ == "__main__":
    run_alone(__file__)
