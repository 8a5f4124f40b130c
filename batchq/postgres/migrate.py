"""Apply migrations/: forward only, one transaction per file, through any pooler, with any number of migrators."""

import random
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from batchq.common.secrets import hide_password
from batchq.errors import ConfigError
from batchq.postgres.connections import connect
from batchq.postgres.deadlines import deadline
from batchq.postgres.statements import ledger, session

FILE_NAME = re.compile(r"(\d{4})_(\w+)\.sql")
BREAKING_MARK = "-- breaking"
BOTH_LAYOUTS_MARK = "-- for both layouts"  # of tables; see operate/distribute.py
LEDGER = "0000_ledger.sql"
SECONDS_A_FILE = 600
PATIENCE_SECONDS = 60.0
MOST_BYTES_AT_ONCE = 12_000


@dataclass(frozen=True)
class Migration:
    """A file of migrations/. *breaking*: workers that do not know it must not run beside it."""

    version: int
    name: str
    text: str

    @property
    def breaking(self) -> bool:
        """Return whether the file's first line marks it as breaking."""
        return self.text.startswith(BREAKING_MARK)


def directory() -> Path:
    """Return the path of migrations/: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "migrations"
    return inside if inside.is_dir() else package.parent / "migrations"


def all_migrations() -> list[Migration]:
    """Return the migrations that this code knows, in order."""
    found = []
    for path in sorted(directory().glob("*.sql")):
        match = FILE_NAME.fullmatch(path.name)
        if match and path.name != LEDGER:
            found.append(Migration(int(match[1]), match[2], path.read_text(encoding="utf-8")))
    return found


def migrate(dsn: str) -> list[str]:
    """Bring the schema up to date; return the names of the files applied. See `apply_all`."""
    with connect(dsn) as conn:
        return apply_all(conn)


def apply_all(conn: psycopg.Connection[Any]) -> list[str]:
    """Apply the missing migrations; return their names.

    Each file commits separately, so that one that fails leaves no trace. Raises ConfigError.
    """
    try:
        if ledger.has_ledger(conn):
            check_names(ledger.applied_migrations(conn))
            check_layout(conn)
        return [name for migration in all_migrations() if (name := apply_patiently(conn, migration))]
    except psycopg.Error as error:
        raise ConfigError(f"migration failed: {hide_password(' '.join(str(error).split()))}") from error


def apply_patiently(conn: psycopg.Connection[Any], migration: Migration) -> str | None:
    """Apply one migration while clients work: if a lock is not free within 500 ms, retry, for up to a minute.

    A longer wait would block every session that queues behind the migration, and after 1 s Postgres checks for
    deadlocks, whose victim might be a client.
    """
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return apply(conn, migration)
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
            if time.monotonic() > until:
                raise
            time.sleep(random.uniform(0.2, 1.0))  # noqa: S311 (spreads load; not a secret)


def apply(conn: psycopg.Connection[Any], migration: Migration) -> str | None:
    """Apply one migration unless it is applied already; return its name if not. Raises LockNotAvailable."""
    if ledger.has_ledger(conn) and migration.version in ledger.applied_migrations(conn):
        return None  # a role that may read the ledger need not be the owner
    with deadline(conn, SECONDS_A_FILE + 1), conn.transaction():
        # Timeouts of its own: those of the role or the database suit short statements.
        conn.execute(session.transaction_settings(SECONDS_A_FILE, SECONDS_A_FILE, settings=session.FIXED_FORMATS))
        ledger.lift_transaction_timeout(conn)
        ledger.take_migration_lock(conn)
        session.set_lock_timeout(conn, 500)
        if not ledger.has_ledger(conn):
            run_file(conn, (directory() / LEDGER).read_text(encoding="utf-8"))
        if migration.version in ledger.applied_migrations(conn):
            return None
        ledger.record_migration(conn, migration.version, migration.name, migration.breaking)
        run_file(conn, migration.text)
    return f"{migration.version:04}_{migration.name}"


def run_file(conn: psycopg.Connection[Any], text: str) -> None:
    """Run the statements of one file."""
    for part in parts(text):
        conn.execute(part.encode())


def parts(text: str) -> Iterator[str]:
    """Yield the statements of a file, as many at a time as a message may hold that goes through any pooler.

    A statement ends with a semicolon before an empty line, unless that is within a function's body ($$).
    """
    part = ""
    for piece in text.split("\n\n"):
        is_whole = part.count("$$") % 2 == 0 and part.rstrip().endswith(";")
        if is_whole and len((part + piece).encode()) > MOST_BYTES_AT_ONCE:
            yield part
            part = ""
        part += piece + "\n\n"
    yield part


def check_names(applied: Mapping[int, tuple[str, bool]]) -> None:
    """Raise ConfigError if a database has a migration under a number that is another one's here."""
    known = {migration.version: migration.name for migration in all_migrations()}
    for version, (name, _) in sorted(applied.items()):
        if known.get(version, name) != name:
            raise ConfigError(
                f"the schema was made by a batchq from before its first release ({version:04}_{name}) and cannot "
                "be updated: keep what you need of its tables, run 'drop schema batchq cascade', then: batchq migrate"
            )


def check_layout(conn: psycopg.Connection[Any]) -> None:
    """Raise ConfigError if a missing migration was not written for the layout of a distributed database."""
    if not ledger.is_distributed(conn):
        return
    applied = ledger.applied_migrations(conn)
    for migration in all_migrations():
        if migration.version not in applied and BOTH_LAYOUTS_MARK not in migration.text:
            raise ConfigError(
                f"{migration.version:04}_{migration.name} was not written for the layout that batchq distribute makes"
            )


def check_schema(conn: psycopg.Connection[Any]) -> None:
    """Raise ConfigError unless this code can work with the database's schema.

    An older schema must be migrated. A newer one works, unless a version that this code does not know is breaking.
    """
    if not ledger.has_ledger(conn):
        raise ConfigError("the database has no batchq schema; run: batchq migrate")
    applied = ledger.applied_migrations(conn)
    check_names(applied)
    known = {migration.version: migration.name for migration in all_migrations()}
    if missing := sorted(known.keys() - applied.keys()):
        raise ConfigError(f"the schema is older than this code: {known[missing[0]]!r} is missing; run: batchq migrate")
    breaking = [name for version, (name, breaks) in applied.items() if version not in known and breaks]
    if breaking:
        raise ConfigError(
            f"the schema is newer than this code, in a way that breaks it ({', '.join(breaking)}); upgrade batchq"
        )
