"""Databases for tests: one server for the session, a migrated template, and a copy of it for each test."""

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from psycopg.conninfo import make_conninfo

from batchq.postgres import embedded
from batchq.postgres.connections import connect
from batchq.postgres.migrate import migrate
from batchq.postgres.statements import testing
from batchq.postgres.statements.running import Conn

VARIABLE = "BATCHQ_TEST_DSN"
_MEMORY_BYTES = 2**30
_SETTINGS = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


class Databases:
    """Makes and drops databases. *dsn*: of a role that may create databases.

    Names are random, so that several test sessions, and the processes of pytest-xdist, share a server.
    """

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._template: str | None = None
        self._finished: list[str] = []

    @contextmanager
    def migrated(self) -> Iterator[str]:
        """Yield the DSN of a new database that has batchq's schema; it is dropped later."""
        if self._template is None:
            self._template = self._make_template()
        name = _new_name()
        with connect(self._dsn) as conn:
            self._drop_finished(conn)
            testing.create_database(conn, name, self._template)
        try:
            yield self._dsn_of(name)
        finally:
            self._finished.append(name)

    def close(self) -> None:
        """Drop all that was made."""
        self._finished += [] if self._template is None else [self._template]
        if self._finished:
            with connect(self._dsn) as conn:
                self._drop_finished(conn)

    def _make_template(self) -> str:
        name = _new_name()
        with connect(self._dsn) as conn:
            testing.create_database(conn, name, "template1")
        self._finished.append(name)  # should the migration fail
        migrate(self._dsn_of(name))
        self._finished.remove(name)
        return name

    def _drop_finished(self, conn: Conn) -> None:
        """Drop the databases of earlier tests: late, since their sessions have ended by then, and a DROP is faster."""
        while self._finished:
            testing.drop_database(conn, self._finished.pop())

    def _dsn_of(self, name: str) -> str:
        return make_conninfo(self._dsn, dbname=name)


def _memory() -> Path | None:
    """Return a directory in memory, if there is one with room: a database is made there in 20 ms, on disk in 300."""
    memory = Path("/dev/shm")  # noqa: S108 (the server has a directory of its own there)
    is_usable = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > _MEMORY_BYTES
    return memory if is_usable else None


def _new_name() -> str:
    return f"batchq_test_{uuid.uuid4().hex[:16]}"


@contextmanager
def running_databases() -> Iterator[Databases]:
    """Yield the maker of databases on the server of BATCHQ_TEST_DSN or, without that, on one of batchq's own, which
    ends with the block. Raises ConfigError if there is neither."""
    if dsn := os.environ.get(VARIABLE):
        databases = Databases(dsn)
        try:
            yield databases
        finally:
            databases.close()
        return
    directory = Path(tempfile.mkdtemp(prefix="batchq-pytest-", dir=_memory()))
    try:
        directory.chmod(0o755)  # for the user that runs the server if this is root
        with embedded.start(directory, _SETTINGS) as server:
            yield Databases(server.dsn())
    finally:
        shutil.rmtree(directory, ignore_errors=True)
