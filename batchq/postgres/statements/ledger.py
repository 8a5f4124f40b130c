"""The ledger of the migrations."""

from typing import LiteralString

from batchq.postgres.statements.running import Conn, fetch_all, fetch_value


def lift_transaction_timeout(conn: Conn) -> None:
    """Turn off transaction_timeout (PostgreSQL 17 and later) until this transaction ends."""
    if fetch_value(conn, bool, "SELECT count(*) > 0 FROM pg_settings WHERE name = 'transaction_timeout'"):
        conn.execute("SET LOCAL transaction_timeout = 0")


def take_migration_lock(conn: Conn) -> None:
    """Wait until no other migration runs; hold the lock until the transaction ends.

    Any role can hold an advisory lock for as long as it likes, so it is used only until the ledger exists.
    """
    if not has_ledger(conn):
        conn.execute("SELECT pg_advisory_xact_lock(hashtextextended('batchq.migrations', 0))")
    if has_ledger(conn):
        conn.execute("LOCK TABLE batchq.migrations IN SHARE ROW EXCLUSIVE MODE")


def has_ledger(conn: Conn) -> bool:
    """Return whether any migration was ever applied. to_regclass may miss a table that another session just created."""
    found = "SELECT count(*) > 0 FROM pg_tables WHERE (schemaname, tablename) = ('batchq', 'migrations')"
    return fetch_value(conn, bool, found)


def applied_migrations(conn: Conn) -> dict[int, tuple[str, bool]]:
    """Return name and breaking of each applied migration, by version."""
    rows = fetch_all(conn, "SELECT version, name, breaking FROM batchq.migrations ORDER BY version")
    return {version: (name, breaking) for version, name, breaking in rows}


def is_distributed(conn: Conn) -> bool:
    """Return whether the tables have the layout for a distributed Postgres, which `batchq distribute` makes."""
    alone: LiteralString = """
    SELECT count(*) > 0
    FROM pg_class
    WHERE oid = to_regclass('batchq.batches_finished')
      AND NOT relispartition
    """
    return fetch_value(conn, bool, alone)


def record_migration(conn: Conn, version: int, name: str, breaking: bool) -> None:
    """Record a migration as applied."""
    conn.execute(
        "INSERT INTO batchq.migrations (version, name, breaking) VALUES (%(version)s, %(name)s, %(breaking)s)",
        {"version": version, "name": name, "breaking": breaking},
    )
