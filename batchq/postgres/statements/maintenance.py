"""Maintenance that one worker does for all: partitions, retention, merged minutes."""

from batchq.postgres.statements.running import Conn, one
from batchq.postgres.statements.session import set_lock_timeout


def prune_records(conn: Conn) -> int:
    """Drop old rows of batchq.audit and pauses that have ended; return how many rows of batchq.audit."""
    pruned: int = one(conn, "SELECT batchq.prune_records()", {})[0]
    return pruned


def merge_throughput(conn: Conn) -> int:
    """Make one row of the rows of all workers, for each minute that is over; return how many were made."""
    set_lock_timeout(conn)  # leases are kept by the same thread
    merged: int = one(conn, "SELECT batchq.merge_throughput()", {})[0]
    return merged


def take_maintenance(conn: Conn) -> bool:
    """Take the lock of maintenance, until the end of the transaction, if it is free: else another worker is at it."""
    taken: bool = one(conn, "SELECT batchq.try_lock('partitions')", {})[0]
    return taken


def create_finished_partitions(conn: Conn, days: int) -> int:
    """Create the missing partitions of today and the next days (UTC); return how many.

    Raises LockNotAvailable rather than wait for a lock for more than 100 ms: whoever comes after would wait behind us.
    """
    set_lock_timeout(conn)
    created: int = one(
        conn,
        "SELECT batchq.create_finished_partitions((now() AT TIME ZONE 'UTC')::date, %(days)s)",
        {"days": days},
    )[0]
    return created


def prune(conn: Conn, older_than_days: float) -> int:
    """Drop the finished partitions older than that; return how many. Raises LockNotAvailable after 100 ms."""
    set_lock_timeout(conn)
    dropped: int = one(conn, "SELECT batchq.prune(%(days)s::float8 * interval '1 day')", {"days": older_than_days})[0]
    return dropped
