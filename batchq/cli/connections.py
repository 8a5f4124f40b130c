"""How commands get their settings, and connections to a database with batchq's schema."""

import functools
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import psycopg

from batchq.common.env_file import file_in_use
from batchq.common.terminal import complain, one_line
from batchq.errors import ConfigError, OutcomeUnknown
from batchq.postgres import migrate
from batchq.postgres.connections import connect
from batchq.postgres.databases import Database
from batchq.postgres.link import Link
from batchq.postgres.statements import session
from batchq.postgres.transactions import transaction
from batchq.settings import Settings


def settings_of(options: Namespace) -> Settings:
    """Return the settings, including those given as flags. Raises ConfigError.

    Those of one database if ``--database`` names one, or if `BATCHQ_DATABASES` does and `BATCHQ_DSN` is not set.
    ``--dsn`` precedes `BATCHQ_DATABASES`.
    """
    flags = {name.removeprefix("set_"): value for name, value in vars(options).items() if name.startswith("set_")}
    named = flags.get("databases")
    if flags.get("dsn") is not None:
        if named is not None:
            raise ConfigError("--dsn and --databases name different databases; give one of the two")
        flags["databases"] = ()
    elif named is not None and not named.strip():
        raise ConfigError("--databases needs at least one name, such as eu,us")
    settings = Settings.load(**flags)
    if len(settings.databases) == 1 and (named is not None or not settings.dsn.get_secret_value()):
        settings = settings.of_database(settings.named_databases()[0])
    if not options.runs_workers:  # those log it
        _print_env_file()
    return settings


def one_or_several(options: Namespace) -> tuple[Settings, list[Database]]:
    """Return the settings, and the databases if there are several of them; of one, return its settings and none.

    Raises ConfigError.
    """
    settings = settings_of(options)
    databases = settings.named_databases()
    if len(databases) == 1:
        return settings.of_database(databases[0]), []
    return settings, databases


def check_each(databases: list[Database], check: Callable[[str], object], report: Callable[[str, str], object]) -> None:
    """Check the DSNs of all databases concurrently; *report* the name and the error of those that are away.

    Raises ConfigError, with the name, for one that cannot work.
    """
    from concurrent.futures import ThreadPoolExecutor  # only here: a worker has no use for it

    with ThreadPoolExecutor(len(databases)) as pool:
        for database, checked in [(each, pool.submit(check, each.dsn)) for each in databases]:
            try:
                checked.result()
            except ConfigError as error:
                raise ConfigError(f"database {database.name}: {database.advice(str(error))}") from None
            except (psycopg.Error, OutcomeUnknown) as error:
                report(database.name, one_line(str(error)))


@functools.cache
def _print_env_file() -> None:
    """Print once which `.env` was read: in an unfamiliar directory its settings may be a surprise."""
    if file := file_in_use():
        complain(f"settings read from {str(file)!r}")


@contextmanager
def database(options: Namespace, seconds: float | None = None) -> Iterator[psycopg.Connection[Any]]:
    """Yield a connection in a transaction of at most *seconds*. Raises ConfigError."""
    timeout_seconds = settings_of(options).database_timeout_seconds
    with connected(options) as conn, transaction(conn, seconds or timeout_seconds, settings=session.FIXED_FORMATS):
        yield conn


@contextmanager
def connected(options: Namespace) -> Iterator[psycopg.Connection[Any]]:
    """Yield a connection. Raises ConfigError."""
    settings = settings_of(options)
    with connect(settings.require_dsn()) as conn:
        with transaction(conn, settings.database_timeout_seconds):
            migrate.check_schema(conn)
        yield conn


def check_schema_of(dsn: str, seconds: float) -> None:
    """Raise ConfigError if the database does not have the schema, OperationalError if it is away."""
    with connect(dsn) as conn, transaction(conn, seconds):
        migrate.check_schema(conn)


@contextmanager
def linked(options: Namespace, given: Settings | None = None) -> Iterator[Link]:
    """Yield a link, for commands that query repeatedly: it logs in again only after a lost connection.

    *given*: the settings, if the caller has them. Raises ConfigError.
    """
    settings = given or settings_of(options)
    dsn = settings.require_dsn()
    with closing(Link(dsn, settings.database_timeout_seconds, connect(dsn))) as link:
        with link.transaction() as conn:
            migrate.check_schema(conn)
        yield link


def patiently(read: Callable[[], Any]) -> Any:
    """Return the result of *read*; retry while the database is unavailable, and report that once."""
    is_reported = False
    while True:
        try:
            return read()
        except (psycopg.OperationalError, OutcomeUnknown) as error:  # reading again is safe, whatever COMMIT did
            if not is_reported:
                complain(f"the database is unavailable, retrying: {one_line(str(error))}")
            is_reported = True
            time.sleep(1)
