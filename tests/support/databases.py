"""A database of its own for every test, copied from one that was migrated once."""

import hashlib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from psycopg import sql

from tests.support import citus
from tests.support.layouts import lay_out, layout
from tests.support.servers import Server

MIGRATIONS = Path(__file__).parents[2] / "migrations"
DISTRIBUTE = MIGRATIONS.parent / "batchq" / "operate" / "distribute.sql"
TEMPLATE_LOCK = 0x62617463_68715F74  # one process at a time makes the template


class Databases:
    """Makes and drops the databases of one test session on *server*."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._template: str | None = None
        self._finished: list[str] = []

    @contextmanager
    def migrated(self) -> Iterator[str]:
        """Yield the name of a new database that has batchq's schema."""
        if layout() == "citus":
            with self._on_cluster() as name:
                yield name
            return
        self._template = self._template or self._ensure_template()
        with self._database(self._template) as name:
            yield name

    @contextmanager
    def _on_cluster(self) -> Iterator[str]:
        """Yield the name of a new database on all nodes: Citus cannot copy one."""
        from batchq.postgres.migrate import migrate

        name = f"batchq_test_{uuid.uuid4().hex[:12]}"
        with citus.database(self.server, name) as dsn:
            migrate(dsn)
            lay_out(dsn)
            yield name

    @contextmanager
    def empty(self) -> Iterator[str]:
        """Yield the name of a new database without anything in it."""
        with self._database("template1") as name:
            yield name

    @contextmanager
    def in_encoding(self, encoding: str) -> Iterator[str]:
        """Yield the name of a new database of another encoding, without anything in it."""
        with self._database("template0", encoding) as name:
            yield name

    def close(self) -> None:
        """Drop what the tests left; the migrated template stays for the next session."""
        with self._admin() as conn:
            self._drop_finished(conn)

    @contextmanager
    def _database(self, template: str, encoding: str = "UTF8") -> Iterator[str]:
        name = f"batchq_test_{uuid.uuid4().hex[:12]}"
        with self._admin() as conn:
            self._drop_finished(conn)
            _create(conn, name, template, encoding)
        try:
            yield name
        finally:
            self._finished.append(name)

    def _drop_finished(self, conn: psycopg.Connection) -> None:
        """Drop the databases of earlier tests.

        Late, since DROP waits 100 ms for a backend that is just leaving, and 8 ms when all have left.
        """
        while self._finished:
            _drop(conn, self._finished.pop())

    def _ensure_template(self) -> str:
        name = f"batchq_template_{_migrations_digest()}_{layout()}"
        with self._admin() as conn:
            conn.execute("SELECT pg_advisory_lock(%s)", [TEMPLATE_LOCK])
            if name not in _templates(conn):
                self._make_template(conn, name)
        return name

    def _make_template(self, conn: psycopg.Connection, name: str) -> None:
        """Migrate a new template under another name, so that *name* is complete or not there."""
        from batchq.postgres.migrate import migrate

        for old in _templates(conn):
            if not old.startswith(f"batchq_template_{_migrations_digest()}"):
                _drop(conn, old)
        building = f"{name}_building"
        _create(conn, building, "template1")
        migrate(self.server.dsn(building))
        lay_out(self.server.dsn(building))
        rename = sql.SQL("ALTER DATABASE {} RENAME TO {}")
        conn.execute(rename.format(sql.Identifier(building), sql.Identifier(name)))

    def _admin(self) -> psycopg.Connection:
        return psycopg.connect(self.server.admin_dsn, autocommit=True)


@contextmanager
def holding_snapshot(dsn: str) -> Iterator[None]:
    """Keep a transaction open for the block: no vacuum removes what dies meanwhile."""
    with psycopg.connect(dsn) as conn:
        conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        conn.execute("SELECT count(*) FROM batchq.workers")
        yield
        conn.rollback()


def _migrations_digest() -> str:
    """Return what changes when any migration does, or the second layout."""
    digest = hashlib.sha256()
    for file in [*sorted(MIGRATIONS.glob("*.sql")), DISTRIBUTE]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def _templates(conn: psycopg.Connection) -> list[str]:
    rows = conn.execute("SELECT datname FROM pg_database WHERE starts_with(datname, 'batchq_template_')")
    return [name for (name,) in rows]


def _create(conn: psycopg.Connection, name: str, template: str, encoding: str = "UTF8") -> None:
    """Create a database by copying files: in memory that takes 20 ms, by the log 60, and a DROP 15 instead of 40."""
    statement = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy")
    options = sql.SQL("" if encoding == "UTF8" else " ENCODING {} LOCALE 'C'").format(encoding)
    conn.execute(statement.format(sql.Identifier(name), sql.Identifier(template)) + options)


def _drop(conn: psycopg.Connection, name: str) -> None:
    conn.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))
