"""What a session and a transaction begin with: timeouts and settings; what the server reports about itself."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import LiteralString

from batchq.postgres.statements.running import Conn, fetch_one, fetch_value

OWN_LOCK_SECONDS = 5.0  # how long one of batchq's own statements waits for a lock
# Names resolve in pg_catalog first, whatever others created in a schema of the role's search path: otherwise
# public.unnest(integer[]) would be preferred to pg_catalog.unnest(anyarray).
SEARCH_PATH = "pg_catalog, pg_temp"
SET_SEARCH_PATH: LiteralString = f"SET LOCAL search_path TO {SEARCH_PATH}"
# How values are written and read, whatever the role or the database sets: a float keeps all of its digits (a position
# cut to 15 would skip batches), a time or an interval looks as people expect, a backslash in a statement is one.
FIXED_FORMATS = {
    "search_path": SEARCH_PATH,
    "DateStyle": "ISO",
    "IntervalStyle": "postgres",
    "extra_float_digits": "1",
    "standard_conforming_strings": "on",
}
# For statements over many ids, which all look them up by `id = ANY (array)`: by the index whatever the statistics say,
# and joins of that list with itself by hash. By default, the planner reads the whole table from a few hundred ids on
# (claim of 1,000 of 50,000: 19 ms, by the index 9 ms). With nested loops only, statistics of an empty table make a
# join of long lists quadratic (1,000 ids: 5 s).
FORCE_INDEX_AND_HASH_JOIN = FIXED_FORMATS | {
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_nestloop": "off",
    "enable_mergejoin": "off",
    # Before PostgreSQL 18, a disabled but unavoidable node counts as expensive; compiling such a plan takes 1 s.
    "jit": "off",
}
# For probes of an index, one entry each: never by a plan that reads every entry before it returns the first.
FORCE_INDEX = FIXED_FORMATS | {"enable_seqscan": "off", "enable_bitmapscan": "off", "jit": "off"}
ASYNCHRONOUS_COMMIT = {"synchronous_commit": "off"}
READ_ONLY = FIXED_FORMATS | {"transaction_read_only": "on", "jit": "off"}


def transaction_settings(
    seconds: float, lock_seconds: float = OWN_LOCK_SECONDS, settings: Mapping[str, str] = MappingProxyType({})
) -> LiteralString:
    """Return the statements that set timeouts on the server for the transaction and for each wait for a lock, and other
    *settings*; all of them until the transaction ends.

    SET LOCAL: on a distributed Postgres, only that reaches the nodes. It is also an eighth faster than set_config.
    """
    milliseconds = int(seconds * 1000)
    timeouts = {
        "statement_timeout": str(milliseconds),
        "lock_timeout": str(int(min(seconds, lock_seconds) * 1000)),
        "idle_in_transaction_session_timeout": str(milliseconds),
        "client_connection_check_interval": "2000",
        "array_nulls": "on",  # NULL in a list means null; a handler's transaction ends with statements that take lists
    }
    values = {name: f"'{value}'" for name, value in (timeouts | dict(settings)).items()}
    values |= {"search_path": settings["search_path"]} if "search_path" in settings else {}  # a list of names
    return "; ".join(f"SET LOCAL {name} = {value}" for name, value in values.items())  # pyright: ignore[reportReturnType]


BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED"  # the role's default may be another level, which can raise 40001
# Within a caller's session, whose isolation level is the caller's.
PLAIN_BEGIN: LiteralString = "BEGIN"
COMMIT: LiteralString = "COMMIT"
ROLLBACK: LiteralString = "ROLLBACK"
SAVEPOINT: LiteralString = "SAVEPOINT batchq_many"
RELEASE: LiteralString = "RELEASE SAVEPOINT batchq_many"
ROLLBACK_TO: LiteralString = "ROLLBACK TO SAVEPOINT batchq_many"
BACKEND_PID: LiteralString = "SELECT pg_backend_pid()"
# DISCARD ALL without DISCARD PLANS, after which each foreign key's check and each function would be planned again.
CLEAN_SESSION = """
CLOSE ALL; RESET SESSION AUTHORIZATION; RESET ROLE; RESET ALL; DEALLOCATE ALL; UNLISTEN *;
SELECT pg_advisory_unlock_all(); DISCARD TEMP; DISCARD SEQUENCES
"""


def set_lock_timeout(conn: Conn, milliseconds: int = 100) -> None:
    """Limit each wait for a lock until the transaction ends."""
    conn.execute(f"SET LOCAL lock_timeout = {milliseconds:d}".encode())


def server_version(conn: Conn) -> tuple[int, str]:
    """Return the server's version as a number (150004) and as text. A pooler may report another one than the server."""
    row: tuple[int, str] = fetch_one(conn, "SELECT current_setting('server_version_num')::integer, version()")
    return row


def role_and_encoding(conn: Conn) -> tuple[str, str]:
    """Return the role, and the encoding in which the server sends and receives texts."""
    row = fetch_one(conn, "SELECT current_user, current_setting('client_encoding')")
    role, encoding = (text.decode(errors="replace") if isinstance(text, bytes) else text for text in row)
    return role, encoding  # where psycopg takes it for SQL_ASCII, every text is bytes


def read_only_state(conn: Conn) -> tuple[str, str, bool, bool, str]:
    """Return role, database, whether the server is a standby, whether transactions may write by default, and what has
    set that default (pg_settings.source)."""
    row: tuple[str, str, bool, bool, str] = fetch_one(
        conn,
        """
        SELECT current_user, current_database(), pg_is_in_recovery(), setting = 'off', source
        FROM pg_catalog.pg_settings
        WHERE name = 'default_transaction_read_only'
        """,
    )
    return row


def is_read_only(conn: Conn) -> bool:
    """Return whether the connection cannot write now: to a standby, or by default_transaction_read_only."""
    statement: LiteralString = "SELECT pg_is_in_recovery() OR current_setting('transaction_read_only') = 'on'"
    return fetch_value(conn, bool, statement)


def check_encodable(conn: Conn, names: Sequence[str]) -> None:
    """Raise psycopg.DataError if the database's encoding cannot hold one of *names*."""
    conn.execute("SELECT %(names)s::text[]", {"names": list(names)})


def listen(conn: Conn) -> None:
    """Listen to the bell for as long as the connection lives; it must not go through a transaction-mode pooler."""
    conn.execute("LISTEN batchq")


def now(conn: Conn) -> float:
    """Return when the transaction began, in seconds since 1970."""
    return fetch_value(conn, float, "SELECT date_part('epoch', now())")


def clock(conn: Conn) -> float:
    """Return the database's current time, in seconds since 1970."""
    return fetch_value(conn, float, "SELECT date_part('epoch', clock_timestamp())")


def has_worker_duty(conn: Conn) -> bool:
    """Return whether the role has what a worker needs most: to claim and to finish."""
    return fetch_value(
        conn,
        bool,
        """
        SELECT has_any_column_privilege('batchq.batches_live', 'UPDATE')
          AND has_table_privilege('batchq.batches_live', 'DELETE')
          AND has_table_privilege('batchq.batches_finished', 'INSERT')
          AND has_table_privilege('batchq.workers', 'INSERT')
        """,
    )


def backend_pid(conn: Conn) -> int:
    """Return the process id of the backend; a pooler may choose another one for each transaction."""
    return fetch_value(conn, int, BACKEND_PID)
