"""The server of a chaos run: a private one on a small file system of its own, or one that somebody else has started."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import psycopg
from psycopg.conninfo import make_conninfo

from batchq.postgres import embedded
from batchq.postgres.embedded import EmbeddedServer
from tests.support.servers import Server, running_server
from tests.support.waiting import wait_until

SETTINGS = {
    "fsync": "off",  # no fault here is one of the machine
    "max_connections": "150",
    "shared_buffers": "128MB",
    "max_wal_size": "512MB",
    "autovacuum_naptime": "5s",
}
DISK_BYTES = 3 * 2**30
UP_SECONDS = 30.0
ROLE = "chaos"


class GivenServer:
    """A server that this run may crash at most."""

    disk: Path | None = None

    def __init__(self, server: Server) -> None:
        self.server = server
        self.checks_passwords = False

    def dsn(self, dbname: str = "postgres") -> str:
        """Return the superuser's conninfo for a database."""
        return self.server.dsn(dbname)

    @property
    def can_crash(self) -> bool:
        """Whether a process of it may be killed."""
        return not self.server.origin.startswith("dsn")

    @property
    def can_restart(self) -> bool:
        """Whether it may be stopped and started."""
        return False

    def crash(self) -> None:
        """Kill one of its processes; return when it has recovered."""
        self.server.crash()

    def restart(self) -> None:
        """Stop it at once, and start it."""
        raise NotImplementedError("not a server of this run's own")

    def kill(self) -> None:
        """Kill its first process."""
        raise NotImplementedError("not a server of this run's own")

    def ensure_up(self) -> None:
        """Return when it answers."""
        self.server.wait_until_answering()

    def describe(self) -> str:
        """Return its version and where it comes from."""
        return self.server.describe()


class PrivateServer(GivenServer):
    """A server of this run's own. *disk*: its file system, which may be filled; None if none could be mounted."""

    def __init__(self, directory: Path, programs: Path | None, disk: Path | None) -> None:
        self.directory = directory
        self.disk = disk
        self.embedded = self.start(programs)
        super().__init__(Server(self.embedded.dsn(), f"embedded:{directory}"))
        self.check_passwords()

    def start(self, programs: Path | None) -> EmbeddedServer:
        """Make the server, with the programs of the wheel or others."""
        if programs is None:
            return embedded.start(self.directory, SETTINGS)
        server = EmbeddedServer(self.directory / "data", programs)
        server.open(SETTINGS)
        return server

    def check_passwords(self) -> None:
        """Have the server ask the role of the workers for its password."""
        rules = self.embedded.data_directory / "pg_hba.conf"
        rules.write_text(f"local all {ROLE} scram-sha-256\nlocal all all trust\n")
        with psycopg.connect(self.dsn(), autocommit=True) as conn:
            conn.execute("SELECT pg_reload_conf()")
        self.checks_passwords = True

    @property
    def can_restart(self) -> bool:
        """Whether it may be stopped and started."""
        return True

    def crash(self) -> None:
        """Kill one of its backends; the server ends all sessions, and recovers."""
        with psycopg.connect(self.dsn(), autocommit=True) as conn:
            row = conn.execute("SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'").fetchone()
        if row:
            os.kill(row[0], signal.SIGKILL)
            wait_until(lambda: not psutil.pid_exists(row[0]), UP_SECONDS, "the killed process to go")
        self.ensure_up()

    def restart(self) -> None:
        """Stop it at once, without a checkpoint, and start it."""
        self.embedded.restart(immediate=True)
        self.ensure_up()

    def kill(self) -> None:
        """Kill its first process, and start it when the others have seen that and gone."""
        processes = [psutil.Process(self.embedded.pid)]
        processes += processes[0].children(recursive=True)
        processes[0].kill()
        psutil.wait_procs(processes, UP_SECONDS)
        self.ensure_up()

    def ensure_up(self) -> None:
        """Start it if it has ended; return when it answers."""
        until = time.monotonic() + UP_SECONDS
        while not self.answers():
            if not self.has_process():
                with suppress(Exception):
                    self.embedded.open({})
            if time.monotonic() > until:
                raise TimeoutError("the server does not come up")
            time.sleep(0.05)

    def answers(self) -> bool:
        """Tell whether it takes connections."""
        try:
            psycopg.connect(self.server.admin_dsn, connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def has_process(self) -> bool:
        """Tell whether its first process lives."""
        try:
            return "postgres" in psutil.Process(self.embedded.pid).name()
        except Exception:
            return False


@contextmanager
def private_server(programs: Path | None) -> Iterator[PrivateServer]:
    """Yield a private server, on a small file system in memory where mounting is allowed; it is gone at the end."""
    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="batchq-chaos-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        directory.chmod(0o755)
        disk = directory if mount(directory) else None
        if disk:
            stack.callback(subprocess.run, ["umount", "--lazy", str(directory)], check=False)
        server = PrivateServer(directory, programs, disk)
        stack.callback(stop, server)
        yield server


def mount(directory: Path) -> bool:
    """Mount a small file system in memory; tell whether that was allowed."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=755", "tmpfs", str(directory)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def stop(server: PrivateServer) -> None:
    """Stop a server, whatever state it is in."""
    with suppress(Exception):
        server.embedded.stop()


@contextmanager
def running(choice: str, programs: Path | None) -> Iterator[GivenServer]:
    """Yield the server that is asked for: embedded (a private one), container, dsn."""
    if choice == "embedded":
        with private_server(programs) as server:
            yield server
        return
    os.environ["BATCHQ_TEST_SERVER"] = choice
    with running_server() as given:
        yield GivenServer(given)


def as_role(dsn: str, password: str, role: str = ROLE) -> str:
    """Return the conninfo for the role that the workers log in as."""
    return make_conninfo(dsn, user=role, password=password)
