"""Apply migrations/: forward only, one transaction a file, through any pooler, any number of migrators at once."""

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
from batchq.postgres.database import bounded, connect
from batchq.postgres.statements import ledger, session

FILE_NAME = re.compile(r"(\d{4})_(\w+)\.sql")
BREAKING_MARK = "-- breaking"
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
        """Tell whether the file's first line says so."""
        return self.text.startswith(BREAKING_MARK)


def directory() -> Path:
    """Return migrations/: inside the installed package, or beside it in a checkout."""
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
    """Bring the schema up to date; return the names of the files applied, none if it was. See `apply_all`."""
    with connect(dsn) as conn:
        return apply_all(conn)


def apply_all(conn: psycopg.Connection[Any]) -> list[str]:
    """Apply what is missing; return its names.

    Each file commits by itself: one that fails leaves nothing of itself. Raises ConfigError.
    """
    try:
        if ledger.has_ledger(conn):
            check_names(ledger.applied_migrations(conn))
        return [name for migration in all_migrations() if (name := apply_patiently(conn, migration))]
    except psycopg.Error as error:
        raise ConfigError(f"migration failed: {hide_password(' '.join(str(error).split()))}") from error


def apply_patiently(conn: psycopg.Connection[Any], migration: Migration) -> str | None:
    """Apply one migration beside working clients: give way where a lock is not free, and try again, for a minute.

    Waiting for a lock, it would hold up all who come after it. And it gives way before Postgres looks for deadlocks
    (after 1 s), whose victim might be a client.
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
    """Apply one migration, unless somebody has; return its name if it was applied here. Raises LockNotAvailable."""
    if ledger.has_ledger(conn) and migration.version in ledger.applied_migrations(conn):
        return None  # whoever may read that need not be the owner
    with bounded(conn, SECONDS_A_FILE + 1), conn.transaction():
        # Its own limits: those of the role or the database are made for short statements.
        conn.execute(session.limits(SECONDS_A_FILE, SECONDS_A_FILE, settings=session.PLAIN))
        ledger.lift_transaction_timeout(conn)
        ledger.take_migration_lock(conn)
        session.wait_briefly_for_locks(conn, 500)
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


def check_schema(conn: psycopg.Connection[Any]) -> None:
    """Raise ConfigError unless this code can work with the database's schema.

    Too old: migrate. Newer: fine, unless one of the versions that this code does not know is marked as breaking.
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
