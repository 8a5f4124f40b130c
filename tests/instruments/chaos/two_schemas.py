"""Two versions of the schema: a database at an older one, an old worker at work, migrations, a new worker beside it."""

import os
import secrets
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import psycopg
from psycopg import sql

from batchq.postgres import migrate as migrations
from tests.instruments.chaos import ledger
from tests.instruments.chaos.fleet import ChaosWorker
from tests.instruments.chaos.ledger import Violation
from tests.instruments.chaos.marks import read_marks
from tests.instruments.chaos.producer import Producer
from tests.instruments.chaos.server import as_role
from tests.support.later_migrations import LATEST, known
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.instruments.chaos.world import World

LOT = 60
SECONDS = 30.0


def migrate_under_load(world: "World", older_code: Path) -> None:
    """Migrate a database of its own while an old worker works there; a new one joins; then count."""
    with ExitStack() as stack:
        dbname = stack.enter_context(database(world))
        dsn = as_role(world.server.dsn(dbname), world.password, world.role)
        directory = world.directory / dbname
        directory.mkdir()
        run_old(older_code, dsn)
        admin = stack.enter_context(world.admin(dbname))
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute(ledger.TABLES)
        producer = Producer(lambda: world.admin(dbname), 0)
        workers = [stack.enter_context(worker(dsn, older_code, directory, 1))]
        producer.order("tx", LOT)
        finished(admin, 20)
        latest = known(directory / "migrations", LATEST)
        with patch.object(migrations, "directory", lambda: latest):
            migrations.migrate(dsn)
        producer.order("tx", LOT)
        workers.append(stack.enter_context(worker(dsn, None, directory, 2)))
        wait_until(lambda: one(admin, "SELECT count(*) = 0 FROM batchq.batches_live"), SECONDS, "completion")
        world.fleet.violations += stopped(workers)
        world.fleet.violations += ledger.check_at_end(admin, producer.known_lots, read_marks(directory))


@contextmanager
def database(world: "World") -> "Iterator[str]":
    """Yield a new database of the workers' role; it is gone at the end."""
    name = f"chaos_{secrets.token_hex(4)}"
    names = {"dbname": sql.Identifier(name), "role": sql.Identifier(world.role)}
    with world.admin() as conn:
        conn.execute(sql.SQL("CREATE DATABASE {dbname} OWNER {role}").format(**names))
    try:
        yield name
    finally:
        with world.admin() as conn:
            conn.execute(sql.SQL("DROP DATABASE {dbname} WITH (FORCE)").format(**names))


def run_old(code: Path, dsn: str) -> None:
    """Run the older `batchq migrate`."""
    environment = os.environ | {"BATCHQ_DSN": dsn, "PYTHONPATH": str(code)}
    subprocess.run([sys.executable, "-m", "batchq", "migrate"], cwd=code, env=environment, check=True,
                   capture_output=True)  # fmt: skip


@contextmanager
def worker(dsn: str, code: Path | None, directory: Path, number: int) -> "Iterator[ChaosWorker]":
    """Yield a worker that works, of one version of the code."""
    process = ChaosWorker("sync", dsn, code, directory, number, {})
    try:
        wait_until(lambda: process.has_started or not process.is_running, SECONDS, "the worker to work")
        yield process
    finally:
        process.end()


def stopped(workers: list[ChaosWorker]) -> list[Violation]:
    """Stop the workers; tell which did not stop well."""
    codes = {each.log.name: each.stop() for each in workers}
    return [Violation("worker", None, f"two schemas: {name} ended with {code}") for name, code in codes.items() if code]


def finished(conn: psycopg.Connection[Any], count: int) -> None:
    """Wait until so many batches have finished."""
    wait_until(lambda: one(conn, f"SELECT count(*) >= {count} FROM batchq.batches_finished"), SECONDS, "the old worker")


def one(conn: psycopg.Connection[Any], query: str) -> Any:
    """Return the one value of *query*."""
    row = conn.execute(query.encode()).fetchone()
    return row[0] if row else None
