"""Maintenance that one worker does for all workers: partitions, retention, throughput per minute."""

from batchq.postgres.statements.running import Conn, fetch_value
from batchq.postgres.statements.session import set_lock_timeout


def prune_needs(conn: Conn, older_than_days: float) -> int:
    """Forget who waited for whom, 10,000 rows at most of batches that have ended; return how many."""
    return fetch_value(
        conn, int, "SELECT batchq.prune_needs(%(days)s::float8 * interval '1 day')", {"days": older_than_days}
    )


def prune_parts(conn: Conn, older_than_days: float) -> int:
    """Forget the parts of batches that are not stored any more, 10,000 rows at most; return how many."""
    return fetch_value(
        conn, int, "SELECT batchq.prune_parts(%(days)s::float8 * interval '1 day')", {"days": older_than_days}
    )


def prune_records(conn: Conn) -> int:
    """Delete old rows of batchq.audit and expired pauses; return how many rows of batchq.audit."""
    return fetch_value(conn, int, "SELECT batchq.prune_records()")


def merge_throughput(conn: Conn) -> int:
    """Merge the rows of all workers into one for each past minute; return how many rows that made."""
    set_lock_timeout(conn)  # the same thread extends leases
    return fetch_value(conn, int, "SELECT batchq.merge_throughput()")


def take_maintenance(conn: Conn) -> bool:
    """Return whether this worker got the maintenance lock, which it then holds until the transaction ends."""
    return fetch_value(conn, bool, "SELECT batchq.try_lock('partitions')")


def create_finished_partitions(conn: Conn, days: int) -> int:
    """Create the missing partitions of today and the next *days* days (UTC); return how many.

    Raises LockNotAvailable after waiting 100 ms for a lock, because later sessions would queue behind this one.
    """
    set_lock_timeout(conn)
    return fetch_value(
        conn,
        int,
        "SELECT batchq.create_finished_partitions((now() AT TIME ZONE 'UTC')::date, %(days)s)",
        {"days": days},
    )


def prune(conn: Conn, older_than_days: float) -> int:
    """Drop finished partitions older than *older_than_days*; return how many. Raises LockNotAvailable after 100 ms."""
    set_lock_timeout(conn)
    return fetch_value(conn, int, "SELECT batchq.prune(%(days)s::float8 * interval '1 day')", {"days": older_than_days})
