"""What a session and a transaction begin with: limits, settings, and what the server says of itself."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import LiteralString

from batchq.postgres.statements.running import Conn, one

OWN_LOCK_SECONDS = 5.0  # how long a statement of our own waits for a lock
# How values are written and read, whatever the role or the database sets: a float keeps all of its digits (a position
# cut to 15 would pass over batches), a time or an interval looks as people expect, a backslash in a statement is one.
# And no name means what others have made in a schema of the search path: public.unnest(integer[]) would come before
# pg_catalog.unnest(anyarray).
SEARCH_PATH = "pg_catalog, pg_temp"
OUR_NAMES: LiteralString = f"SET LOCAL search_path TO {SEARCH_PATH}"
PLAIN = {
    "search_path": SEARCH_PATH,
    "DateStyle": "ISO",
    "IntervalStyle": "postgres",
    "extra_float_digits": "1",
    "standard_conforming_strings": "on",
}
# For statements over many ids, which all look them up by `id = ANY (array)`: by the index whatever the statistics say,
# and what is left to join, that list with itself, by hash. Left alone, the planner reads the whole table from some
# hundred ids on (claim of 1,000 of 50,000: 19 ms, by the index 9 ms); with nested loops only, a list that meets
# statistics of an empty table becomes quadratic (1,000 ids: 5 s).
BY_INDEX = PLAIN | {
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_nestloop": "off",
    "enable_mergejoin": "off",
    "jit": "off",  # what is off but unavoidable counts as dear before PostgreSQL 18, and dear plans are compiled: 1 s
}
# For probes of an index, one entry each: never by a plan that reads every entry before it returns the first.
PROBING = PLAIN | {"enable_seqscan": "off", "enable_bitmapscan": "off", "jit": "off"}
WITHOUT_WAITING_FOR_THE_DISK = {"synchronous_commit": "off"}
READ_ONLY = PLAIN | {"transaction_read_only": "on", "jit": "off"}


def limits(
    seconds: float, lock_seconds: float = OWN_LOCK_SECONDS, settings: Mapping[str, str] = MappingProxyType({})
) -> LiteralString:
    """Return the statement that bounds a transaction, and each wait for a lock, on the server, until its end; and that
    makes other *settings* for as long."""
    milliseconds = int(seconds * 1000)
    bounds = {
        "statement_timeout": str(milliseconds),
        "lock_timeout": str(int(min(seconds, lock_seconds) * 1000)),
        "idle_in_transaction_session_timeout": str(milliseconds),
        "client_connection_check_interval": "2000",
        "array_nulls": "on",  # NULL in a list means null; the end of a handler's transaction writes such lists
    }
    calls = (f"pg_catalog.set_config('{name}', '{value}', true)" for name, value in (bounds | dict(settings)).items())
    return f"SELECT {', '.join(calls)}"  # pyright: ignore[reportReturnType]


BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED"  # a role may have another default, and 40001 with it
BACKEND_PID: LiteralString = "SELECT pg_backend_pid()"
# DISCARD ALL without DISCARD PLANS, after which each foreign key's check and each function would be planned again.
CLEAN_SESSION = """
CLOSE ALL; RESET SESSION AUTHORIZATION; RESET ROLE; RESET ALL; DEALLOCATE ALL; UNLISTEN *;
SELECT pg_advisory_unlock_all(); DISCARD TEMP; DISCARD SEQUENCES
"""


def server_version(conn: Conn) -> tuple[int, str]:
    """Return the server's version as a number (150004) and as text. A pooler may report another than the server."""
    row: tuple[int, str] = one(conn, "SELECT current_setting('server_version_num')::integer, version()", {})
    return row


def role_and_encoding(conn: Conn) -> tuple[str, str]:
    """Return the role, and the encoding in which the server sends and takes texts."""
    row = one(conn, "SELECT current_user, current_setting('client_encoding')", {})
    role, encoding = (text.decode(errors="replace") if isinstance(text, bytes) else text for text in row)
    return role, encoding  # where psycopg takes it for SQL_ASCII, every text comes as bytes


def read_only_state(conn: Conn) -> tuple[str, str, bool, bool, str]:
    """Return role, database, whether the server is a standby, whether transactions may write by default, and what has
    set that default (pg_settings.source)."""
    row: tuple[str, str, bool, bool, str] = one(
        conn,
        """
        SELECT current_user, current_database(), pg_is_in_recovery(), setting = 'off', source
        FROM pg_catalog.pg_settings
        WHERE name = 'default_transaction_read_only'
        """,
        {},
    )
    return row


def only_reads(conn: Conn) -> bool:
    """Return whether the connection cannot write now: that of a standby, or by default_transaction_read_only."""
    statement: LiteralString = "SELECT pg_is_in_recovery() OR current_setting('transaction_read_only') = 'on'"
    return bool(one(conn, statement, {})[0])


def take_in(conn: Conn, names: Sequence[str]) -> None:
    """Send *names* to the server. Raises psycopg.DataError for one that the database's encoding cannot hold."""
    conn.execute("SELECT %(names)s::text[]", {"names": list(names)})


def listen(conn: Conn) -> None:
    """Listen to the bell, for as long as the connection lives: only on one that goes straight to the server."""
    conn.execute("LISTEN batchq")


def now(conn: Conn) -> float:
    """Return when the transaction began, in seconds since 1970."""
    return float(one(conn, "SELECT extract(epoch FROM now())", {})[0])


def wait_briefly_for_locks(conn: Conn, milliseconds: int = 100) -> None:
    """Bound each wait for a lock, until the end of the transaction."""
    one(conn, "SELECT set_config('lock_timeout', %(wait)s, true)", {"wait": f"{milliseconds}ms"})


def may_work(conn: Conn) -> bool:
    """Tell whether the role has what the duty of a worker needs most: to claim and to finish."""
    found: bool = one(
        conn,
        """
        SELECT has_any_column_privilege('batchq.batches_live', 'UPDATE')
          AND has_table_privilege('batchq.batches_live', 'DELETE')
          AND has_table_privilege('batchq.batches_finished', 'INSERT')
          AND has_table_privilege('batchq.workers', 'INSERT')
        """,
        {},
    )[0]
    return found


def clock(conn: Conn) -> float:
    """Return the database's time now, in seconds since 1970."""
    return float(one(conn, "SELECT extract(epoch FROM clock_timestamp())", {})[0])


def backend_pid(conn: Conn) -> int:
    """Return the process id of the backend, which a pooler may choose anew for each transaction."""
    pid: int = one(conn, BACKEND_PID, {})[0]
    return pid
