"""The server of the benchmark: a private one with durable commits, on disk; or one that is given."""

import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil
import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from batchq.postgres import embedded
from batchq.postgres.migrate import migrate
from tests.instruments.bench.records import one_row

SETTINGS = {"shared_buffers": "1GB", "max_wal_size": "8GB", "max_connections": "600"}
SHOWN_SETTINGS = ("server_version", "shared_buffers", "max_wal_size", "fsync", "synchronous_commit", "full_page_writes")
BY_ALTER_SYSTEM = (
    "SELECT setting FROM pg_file_settings WHERE name = %s AND sourcefile LIKE '%%/postgresql.auto.conf' ORDER BY seqno"
)


@dataclass(frozen=True)
class Server:
    """A running server. *pid* is its postmaster's, None if that is not on this machine."""

    admin_dsn: str
    pid: int | None
    programs: Path | None
    is_private: bool

    def dsn(self, dbname: str) -> str:
        """Return the conninfo for a database."""
        return make_conninfo(self.admin_dsn, dbname=dbname)

    def cpu_seconds(self) -> float | None:
        """Return the CPU time of all processes of the server so far, those that have ended included."""
        if self.pid is None:
            return None
        postmaster = psutil.Process(self.pid)
        while True:
            ended = of_ended_children(postmaster)
            try:
                times = [each.cpu_times() for each in (postmaster, *postmaster.children(recursive=True))]
            except psutil.NoSuchProcess:
                continue
            if of_ended_children(postmaster) == ended:  # nobody has gone from one sum to the other meanwhile
                return ended + sum(each.user + each.system for each in times)

    def describe(self) -> dict[str, str]:
        """Return its version and the settings that matter."""
        with psycopg.connect(self.admin_dsn) as conn:
            return {name: str(one_row(conn, f"SHOW {name}")[0]) for name in SHOWN_SETTINGS}

    def data_directory(self) -> Path | None:
        """Return where its data are, None if that is not known to be on this machine."""
        if self.pid is None:
            return None
        with psycopg.connect(self.admin_dsn) as conn:
            return Path(one_row(conn, "SHOW data_directory")[0])

    @contextmanager
    def setting(self, name: str, value: str) -> Iterator[None]:
        """Give a setting another value meanwhile; then it is as ALTER SYSTEM had left it before."""
        with psycopg.connect(self.admin_dsn, autocommit=True) as conn:
            before = conn.execute(BY_ALTER_SYSTEM, [name]).fetchone()
            alter(conn, name, value)
            try:
                yield
            finally:
                alter(conn, name, before[0] if before else None)

    def pgbench(self) -> str:
        """Return the path of pgbench: beside the server's programs, else the system's."""
        beside = self.programs / "pgbench" if self.programs else None
        found = str(beside) if beside and beside.exists() else shutil.which("pgbench")
        if found is None:
            found = next((str(path) for path in Path("/usr/lib/postgresql").glob("*/bin/pgbench")), None)
        if found is None:
            raise FileNotFoundError("pgbench is not installed: apt-get install postgresql-contrib")
        return found


def of_ended_children(process: psutil.Process) -> float:
    """Return the CPU time of a process's children that have ended."""
    times = process.cpu_times()
    return float(times.children_user + times.children_system)


def alter(conn: psycopg.Connection, name: str, value: str | None) -> None:
    """Set what is set for the whole server, None for what the files before say, and have it read."""
    said = sql.SQL("RESET {}").format(sql.Identifier(name))
    if value is not None:
        said = sql.SQL("SET {} = {}").format(sql.Identifier(name), sql.Literal(value))
    conn.execute(sql.SQL("ALTER SYSTEM {}").format(said))
    conn.execute("SELECT pg_reload_conf()")


@contextmanager
def running(dsn: str | None) -> Iterator[Server]:
    """Yield the server of *dsn*, or start a private one, which is gone at the end."""
    if dsn:
        yield Server(dsn, postmaster_of(dsn), None, False)
        return
    with tempfile.TemporaryDirectory(prefix="batchq-bench-", dir="/var/tmp", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        directory.chmod(0o755)
        with embedded.start(directory, SETTINGS) as server:
            yield Server(server.dsn(), server.pid, server.bin_directory, True)


def postmaster_of(dsn: str) -> int | None:
    """Return the process id of the server if it is on this machine and shows it."""
    try:
        with psycopg.connect(dsn, autocommit=True) as conn:
            text = one_row(conn, "SELECT pg_read_file('postmaster.pid')")[0]
        pid = int(text.split("\n")[0])
        return pid if "postgres" in psutil.Process(pid).name() else None
    except (psycopg.errors.InsufficientPrivilege, psycopg.errors.UndefinedFile, psutil.Error, ValueError):
        return None


@dataclass(frozen=True)
class Database:
    """A database of a run, with batchq's schema. *conn* is the benchmark's own connection, in autocommit mode."""

    server: Server
    name: str
    dsn: str
    conn: psycopg.Connection

    def wal_position(self) -> int:
        """Return how many bytes of WAL the server has written in its life."""
        return int(one_row(self.conn, "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint")[0])

    def settle(self) -> None:
        """Bring the database to rest before a measurement."""
        self.conn.execute("VACUUM ANALYZE batchq.batches_live")
        self.conn.execute("CHECKPOINT")

    def empty(self) -> None:
        """Remove every batch."""
        self.conn.execute("TRUNCATE batchq.batches, batchq.batches_finished")


@contextmanager
def fresh_database(server: Server) -> Iterator[Database]:
    """Yield a new, migrated database; it goes at the end, with whoever is still connected."""
    name = f"batchq_bench_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(server.admin_dsn, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}".encode())
        try:
            dsn = server.dsn(name)
            migrate(dsn)
            with psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as conn:
                yield Database(server, name, dsn, conn)
        finally:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


class Meter:
    """What the server spent between two moments: CPU seconds (None if not to be had), and bytes of WAL.

    *machine_cpu_seconds* is what everything on this machine spent, so that a run beside other work shows up.
    """

    def __init__(self, database: Database) -> None:
        self.database = database

    def start(self) -> Self:
        """Begin."""
        self.wal_before, self.cpu_before = self.database.wal_position(), self.database.server.cpu_seconds()
        self.machine_before = machine_cpu_seconds()
        return self

    def stop(self) -> Self:
        """End."""
        self.machine_cpu_seconds = machine_cpu_seconds() - self.machine_before
        cpu_after, wal_after = self.database.server.cpu_seconds(), self.database.wal_position()
        self.wal_bytes = wal_after - self.wal_before
        has_cpu = cpu_after is not None and self.cpu_before is not None
        self.cpu_seconds = cpu_after - self.cpu_before if has_cpu else None
        return self

    def per_batch(self, count: int) -> dict[str, float | None]:
        """Return the figures of a run of *count* batches."""
        cpu = None if self.cpu_seconds is None else round(self.cpu_seconds / count * 10_000, 3)
        return {"server_cpu_s_per_10k": cpu, "wal_bytes_per_batch": round(self.wal_bytes / count)}


def machine_cpu_seconds() -> float:
    """Return how long all processors have been busy, by whatever, so far; time stolen by other machines counts."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0))


def file_system(path: Path) -> str:
    """Return the type of the file system that a path is on."""
    found = subprocess.run(["df", "--output=fstype", path], capture_output=True, text=True, check=False)
    return found.stdout.split()[-1] if found.returncode == 0 else "unknown"
