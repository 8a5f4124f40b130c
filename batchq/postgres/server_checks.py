"""Checks of the server at startup: version, encoding, whether the database can be written."""

from typing import Any

import psycopg

from batchq.errors import ConfigError
from batchq.postgres.dsn import parameter_problems
from batchq.postgres.statements import session

OLDEST_SERVER = 150_000
RESET_READ_ONLY = {  # by pg_settings.source
    "user": "run: ALTER ROLE {role} RESET default_transaction_read_only",
    "database": "run: ALTER DATABASE {database} RESET default_transaction_read_only",
    "database user": "run: ALTER ROLE {role} IN DATABASE {database} RESET default_transaction_read_only",
    "configuration file": "run: ALTER SYSTEM RESET default_transaction_read_only, or edit postgresql.conf, then reload",
}
Problem = tuple[str, str]
"""What is wrong, and what to do."""


def check_server(conn: psycopg.Connection[Any]) -> None:
    """Raise ConfigError for a server older than PostgreSQL 15, texts that are not UTF-8, or parameters that no pooler
    accepts (`dsn_problems` misses those that a libpq service sets: the DSN has only the service's name).
    """
    if problems := parameter_problems(conn.info.get_parameters()):
        raise ConfigError("; ".join(problems))
    if problem := encoding_problem(conn):  # first: nothing else could be read
        raise ConfigError("; ".join(problem))
    number, text = session.server_version(conn)
    if number < OLDEST_SERVER:
        raise ConfigError(f"batchq needs PostgreSQL 15 or later; the server is {text.split(',')[0]}")


def check_writable(conn: psycopg.Connection[Any]) -> None:
    """Raise ConfigError if the database is read-only; the message names the setting that made it so."""
    if problem := read_only_problem(conn):
        raise ConfigError("; ".join(problem))


def encoding_problem(conn: psycopg.Connection[Any]) -> Problem | None:
    """Return the problem if texts do not travel as UTF-8, although each connection asks for it: a pooler dropped that.

    The encoding that the pooler reports at login counts as well, since psycopg reads texts by it.
    """
    role, encoding = session.role_and_encoding(conn)
    if encoding == "UTF8" and conn.info.encoding == "utf-8":
        return None
    found = encoding if encoding != "UTF8" else conn.info.encoding
    remedy = f"run: alter role {role} set client_encoding to 'UTF8', and have the pooler reconnect"
    return f"client_encoding is {found}, not UTF8: the pooler drops it from the start of a connection", remedy


def read_only_problem(conn: psycopg.Connection[Any]) -> Problem | None:
    """Return the problem if nothing can be written: a standby, or a setting (the problem names its source)."""
    role, database, is_standby, is_off, source = session.read_only_state(conn)
    if is_standby:
        return "the server is a standby, which is read-only", "point BATCHQ_DSN at the primary, or promote this server"
    if is_off:
        return None
    evidence = f"the database is read-only: default_transaction_read_only is on for role {role} (source: {source})"
    if source in RESET_READ_ONLY:
        return evidence, RESET_READ_ONLY[source].format(role=role, database=database)
    return evidence, "set default_transaction_read_only to off where it was set"
