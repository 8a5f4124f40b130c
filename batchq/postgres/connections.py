"""How batchq connects: options that survive transaction-mode poolers, restarts and frozen servers.

Each unit of work is one ``with conn.transaction()`` on an autocommit connection without prepared statements.
"""

import os
from collections.abc import Mapping
from typing import Any, Self

import psycopg
from psycopg.conninfo import conninfo_to_dict

from batchq.common.secrets import hide_password, know_password
from batchq.errors import ConfigError
from batchq.postgres.logins import CIRCUIT_BREAKER, backoffs, is_login_failure
from batchq.postgres.server_checks import encoding_problem

CONNECT_OPTIONS: dict[str, Any] = {
    "autocommit": True,  # a transaction exists only inside `with conn.transaction()`
    "prepare_threshold": None,  # a named statement lives on one backend; the next transaction may meet another
    "connect_timeout": 10,
    "keepalives": 1,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
    "gssencmode": "disable",  # Supavisor answers a GSS request with a FATAL
    "application_name": "batchq",
    # Texts travel as UTF-8 whatever the role, the database or PGCLIENTENCODING sets. Otherwise one text with a letter
    # that LATIN1 lacks would stop a claim or a finish. Supavisor drops this option; `check_server` checks the result.
    "client_encoding": "UTF8",
}
# Options that a DSN may override, and the variable in which libpq looks for each, too.
VARIABLES = {"connect_timeout": "PGCONNECT_TIMEOUT", "gssencmode": "PGGSSENCMODE", "application_name": "PGAPPNAME"}

AnyConnection = psycopg.Connection[Any] | psycopg.AsyncConnection[Any]


class Connection(psycopg.Connection[Any]):
    """A psycopg connection that respects the login backoff and whose BEGIN says READ COMMITTED.

    The role's default may be another level. With any other, extending a lease while a handler's transaction is open
    would fail.
    """

    is_direct: bool | None = None  # no pooler in between; None: not known yet
    is_used = False  # a handler's transaction has run on it

    @classmethod
    def connect(cls, conninfo: str = "", **kwargs: Any) -> Self:
        backoff = backoffs.of(conninfo)
        with backoff.log_in(backoff.take_turn()):
            conn = super().connect(conninfo, **without_overridden(kwargs, conninfo))
        know_password(conn.info.password, conn.info.user, conn.info.dbname)  # from any source, such as a password file
        conn.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
        return conn


class AsyncConnection(psycopg.AsyncConnection[Any]):
    """Async version of `Connection`."""

    is_direct: bool | None = None
    is_used = False

    @classmethod
    async def connect(cls, conninfo: str = "", **kwargs: Any) -> Self:
        backoff = backoffs.of(conninfo)
        with backoff.log_in(await backoff.take_turn_async()):
            conn = await super().connect(conninfo, **without_overridden(kwargs, conninfo))
        await conn.set_isolation_level(psycopg.IsolationLevel.READ_COMMITTED)
        return conn


def without_overridden(options: Mapping[str, Any], conninfo: str) -> dict[str, Any]:
    """Return *options* without those that *conninfo* or the environment sets, except for the encoding."""
    given = conninfo_to_dict(conninfo).keys() | {name for name in VARIABLES if os.environ.get(VARIABLES[name])}
    return {name: value for name, value in options.items() if name not in given - {"client_encoding"}}


def connect_options(seconds: float) -> dict[str, Any]:
    """Return the options for a caller that waits up to *seconds* (2 or more) for a connection."""
    return CONNECT_OPTIONS | {"connect_timeout": round(min(max(seconds, 2), CONNECT_OPTIONS["connect_timeout"]))}


def connect(dsn: str) -> psycopg.Connection[Any]:
    """Open one connection, with the options that every pooler accepts.

    Raises ConfigError where trying again would not help (login rejected, no such database, texts that are not UTF-8),
    else OperationalError. Both messages are one line, without the password.
    """
    try:
        conn = Connection.connect(dsn, **CONNECT_OPTIONS)
    except psycopg.Error as error:
        message = f"cannot connect: {hide_password(' '.join(str(error).split()))}"
        if is_login_failure(error) and CIRCUIT_BREAKER not in message:
            raise ConfigError(message) from None
        raise psycopg.OperationalError(message) from None
    if conn.info.encoding != "utf-8":
        with conn:
            raise ConfigError("; ".join(encoding_problem(conn) or ()))
    return conn


def is_lost(conn: AnyConnection) -> bool:
    """Return whether the connection is lost. The class of an error does not show that."""
    return conn.closed or conn.broken
