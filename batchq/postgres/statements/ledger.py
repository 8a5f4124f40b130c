"""The ledger of the migrations."""

from batchq.postgres.statements.running import Conn, every, one


def lift_transaction_timeout(conn: Conn) -> None:
    """Turn off the limit that PostgreSQL 17 and later may have for whole transactions, until this one's end."""
    conn.execute("SELECT set_config(name, '0', true) FROM pg_settings WHERE name = 'transaction_timeout'")


def take_migration_lock(conn: Conn) -> None:
    """Wait until no other migration runs; held until the transaction's end.

    Any role can hold an advisory lock for as long as it likes, so that one serves only until there is a table.
    """
    if not has_ledger(conn):
        conn.execute("SELECT pg_advisory_xact_lock(hashtextextended('batchq.migrations', 0))")
    if has_ledger(conn):
        conn.execute("LOCK TABLE batchq.migrations IN SHARE ROW EXCLUSIVE MODE")


def has_ledger(conn: Conn) -> bool:
    """Tell whether any migration was ever applied. to_regclass may not know what others have just made."""
    return bool(
        one(conn, "SELECT count(*) FROM pg_tables WHERE (schemaname, tablename) = ('batchq', 'migrations')", {})[0]
    )


def applied_migrations(conn: Conn) -> dict[int, tuple[str, bool]]:
    """Return name and breaking of each applied migration, by version."""
    rows = every(conn, "SELECT version, name, breaking FROM batchq.migrations ORDER BY version", {})
    return {version: (name, breaking) for version, name, breaking in rows}


def record_migration(conn: Conn, version: int, name: str, breaking: bool) -> None:
    """Record a migration as applied."""
    conn.execute(
        "INSERT INTO batchq.migrations (version, name, breaking) VALUES (%(version)s, %(name)s, %(breaking)s)",
        {"version": version, "name": name, "breaking": breaking},
    )
