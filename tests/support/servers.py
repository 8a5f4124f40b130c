"""The one Postgres server of a test session: a DSN's, a throw-away container, or the embedded one."""

import gc
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import docker
import docker.errors
import psycopg
from psycopg.conninfo import make_conninfo
from testcontainers.core.container import DockerContainer

from batchq.errors import ConfigError
from batchq.postgres import embedded
from tests.support.waiting import wait_until

DEFAULT_IMAGE = "postgres:17"
PASSWORD = "batchq"
SETTINGS = {"fsync": "off", "max_connections": "200"}
START_TIMEOUT_SECONDS = 60.0
MEMORY_BYTES = 4 * 2**30


class NoServerError(Exception):
    """The server that the environment asks for cannot be had; the message says why."""


@dataclass(frozen=True)
class Server:
    """A running server: *admin_dsn* is its superuser's, straight to the database `postgres`.

    *origin* is `container:ID`, `embedded:DIRECTORY`, or `dsn` for one that the tests did not start.
    """

    admin_dsn: str
    origin: str

    def dsn(self, dbname: str) -> str:
        """Return the superuser's conninfo for *dbname*, past every pooler."""
        return make_conninfo(self.admin_dsn, dbname=dbname)

    def describe(self) -> str:
        """Return the version and where the server comes from."""
        with psycopg.connect(self.admin_dsn) as conn:
            row = conn.execute("SELECT current_setting('server_version')").fetchone()
        return f"PostgreSQL {row[0] if row else '?'} ({self.origin})"

    def environment(self) -> dict[str, str]:
        """Return the variables that make a further pytest process use this server."""
        return {
            "BATCHQ_TEST_SERVER": "dsn",
            "BATCHQ_TEST_DSN": self.admin_dsn,
            "BATCHQ_TEST_ORIGIN": self.origin,
        }

    def crash(self) -> None:
        """Kill a process of the server and wait until it has recovered: all sessions are cut, as by a crash."""
        kind, _, where = self.origin.partition(":")
        if kind == "dsn":
            raise NoServerError(
                "this test crashes the server, and the tests crash only one that they started: unset BATCHQ_TEST_DSN"
            )
        with psycopg.connect(self.admin_dsn, autocommit=True) as conn:
            row = conn.execute("SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'").fetchone()
            assert row
            _KILL[kind](where, row[0])
            wait_until(lambda: _is_cut(conn), START_TIMEOUT_SECONDS, "the crash to cut the sessions")
        self.wait_until_answering()

    def wait_until_answering(self) -> None:
        """Wait until the server takes connections."""
        wait_until(self._answers, START_TIMEOUT_SECONDS, f"an answer from the server ({self.origin})")

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.admin_dsn, connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True


def running_server() -> AbstractContextManager[Server]:
    """Return the session's server, as BATCHQ_TEST_SERVER and BATCHQ_TEST_DSN ask; it stops at the end.

    Raise NoServerError when what they ask for is not there; without them take the first there is.
    """
    choice = os.environ.get("BATCHQ_TEST_SERVER") or ("dsn" if os.environ.get("BATCHQ_TEST_DSN") else None)
    if choice is None:
        return _first_available()
    if choice not in _START:
        raise NoServerError(f"BATCHQ_TEST_SERVER is {choice!r}; it can be {', '.join(_START)}")
    return _START[choice]()


@contextmanager
def _first_available() -> Iterator[Server]:
    """Start a container if a Docker engine answers and has the image, else the embedded server; say so."""
    with ExitStack() as stack:
        try:
            server = stack.enter_context(_container_server())
        except NoServerError as error:
            print(f"no container, so the embedded server is used: {str(error).splitlines()[0]}", file=sys.stderr)
            server = stack.enter_context(_embedded_server())
        yield server


@contextmanager
def _given_server() -> Iterator[Server]:
    dsn = os.environ.get("BATCHQ_TEST_DSN")
    if not dsn:
        raise NoServerError("BATCHQ_TEST_SERVER is 'dsn', but BATCHQ_TEST_DSN is not set")
    try:
        conn = psycopg.connect(dsn, connect_timeout=10)
    except psycopg.Error as error:
        raise NoServerError(f"the server of BATCHQ_TEST_DSN does not answer: {error}") from error
    with conn:
        info = conn.info
        full = make_conninfo(dsn, host=info.host, port=info.port, user=info.user, password=info.password or None)
    yield Server(full, os.environ.get("BATCHQ_TEST_ORIGIN", "dsn"))


@contextmanager
def open_directory() -> Iterator[Path]:
    """Yield a temporary directory that every user can enter, also the one that servers run as."""
    directory = Path(tempfile.mkdtemp(prefix="batchq-test-", dir=_memory()))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def _memory() -> str | None:
    """Return a file system in memory that is large enough, if there is one.

    There a test's database is made in 20 ms. On ext4 it takes 300 ms when others were dropped in the last
    30 s, since files deleted lately slow down the making of new ones.
    """
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > MEMORY_BYTES else None


@contextmanager
def _embedded_server() -> Iterator[Server]:
    with open_directory() as directory:
        try:
            server = embedded.start(directory, SETTINGS)
        except ConfigError as error:
            raise NoServerError(str(error)) from error
        with server:
            yield Server(server.dsn(), f"embedded:{directory}")


@contextmanager
def _container_server() -> Iterator[Server]:
    problem = _docker_problem()
    if problem is not None:
        raise NoServerError(f"BATCHQ_TEST_SERVER is 'container', but no Docker engine answers: {problem}")
    container = _container()
    try:
        _start_container(container)
        host, port = container.get_container_host_ip(), container.get_exposed_port(5432)
        dsn = make_conninfo(host=host, port=port, user="postgres", password=PASSWORD, dbname="postgres")
        server = Server(dsn, f"container:{container.get_container_id()[:12]}")
        server.wait_until_answering()
        yield server
    finally:
        container.stop()


def _container() -> DockerContainer:
    """Return the container to be started: it listens on this host only, and keeps its data in memory."""
    container = DockerContainer(os.environ.get("BATCHQ_TEST_IMAGE") or DEFAULT_IMAGE)
    container.with_env("POSTGRES_PASSWORD", PASSWORD)
    container.with_env("PGDATA", "/memory/data").with_tmpfs_mount("/memory")  # see _memory()
    container.with_command(["postgres", *(f"--{name}={value}" for name, value in SETTINGS.items())])
    container.ports["5432/tcp"] = ("127.0.0.1",)
    return container


def _start_container(container: DockerContainer) -> None:
    try:
        container.start()
    except docker.errors.DockerException as error:
        raise NoServerError(
            f"the image {container.image} does not start: {error}\n"
            "BATCHQ_TEST_IMAGE names another one; BATCHQ_TEST_SERVER=embedded does without Docker"
        ) from error


def _kill_in_container(container_id: str, pid: int) -> None:
    client = docker.from_env()
    try:
        client.containers.get(container_id).exec_run(["sh", "-c", f"kill -9 {pid}"])
    finally:
        client.close()


def _kill_here(_: str, pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def _is_cut(conn: psycopg.Connection) -> bool:
    try:
        conn.execute("SELECT 1")
    except psycopg.OperationalError:
        return True
    return False


def _docker_problem() -> str | None:
    """Return why no Docker engine can be used, or None when one answers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the library leaves its socket open when it fails
        problem = _ping_docker()
        gc.collect()
    return problem


def _ping_docker() -> str | None:
    try:
        client = docker.from_env(timeout=5)
        client.ping()
        client.close()
    except docker.errors.DockerException as error:
        return str(error)
    return None


def free_port(following: int = 0) -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on, as on so many *following* it.

    From below those that the kernel gives to outgoing connections, of which other tests make many: one of them would
    take it before it is listened on.
    """
    while True:
        first = random.randrange(20_000, 32_000)
        with ExitStack() as probes, suppress(OSError):
            for port in range(first, first + following + 1):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


_START: dict[str, Callable[[], AbstractContextManager[Server]]] = {
    "dsn": _given_server,
    "container": _container_server,
    "embedded": _embedded_server,
}
_KILL: dict[str, Callable[[str, int], None]] = {"container": _kill_in_container, "embedded": _kill_here}
