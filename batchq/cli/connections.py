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
from batchq.errors import OutcomeUnknown
from batchq.postgres import migrate
from batchq.postgres.connections import connect
from batchq.postgres.link import Link
from batchq.postgres.statements import session
from batchq.postgres.transactions import transaction
from batchq.settings import Settings


def settings_of(options: Namespace) -> Settings:
    """Return the settings, including those given as flags. Raises ConfigError."""
    flags = {name.removeprefix("set_"): value for name, value in vars(options).items() if name.startswith("set_")}
    settings = Settings.load(**flags)
    if not options.runs_workers:  # those log it
        _print_env_file()
    return settings


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


@contextmanager
def linked(options: Namespace) -> Iterator[Link]:
    """Yield a link, for commands that query repeatedly: it logs in again only after a lost connection.

    Raises ConfigError.
    """
    settings = settings_of(options)
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


def refusal(error: psycopg.Error) -> str:
    """Return why the database refused, and its hint."""
    return "; ".join(text for text in (error.diag.message_primary, error.diag.message_hint) if text)
