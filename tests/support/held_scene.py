"""Work that waits for something: limits in use, throttles, pauses, keys, spread batches and schedules."""

from tests.component.rows import Conn, insert
from tests.support.scene import set_spread

SHARE = (
    "INSERT INTO batchq.limit_shares (queue, kind, worker, running, starts_per_second, items_per_second, "
    "wanted_running, wanted_starts, wanted_items, in_use, held_back_by, lease_seconds) "
    "VALUES (%s, %s, %s, %s, %s, 0, %s, 0, 0, %s, %s, 60)"
)
SCHEDULES = {
    "nightly report": ("30 2 * * *", "Europe/Berlin", "report"),
    "every-quarter-of-an-hour": ("*/15 * * * *", "UTC", "sync_inventory"),
    "office hours": ("*/5 8-17 * * *", "UTC", "send_receipt"),
    "heartbeat": ("@every 10 s", "UTC", "ping"),
}


def begin(conn: Conn, batch_id: int, worker: str = "jobs-2-4412-5eed2") -> None:
    """Claim one batch, also one that has a key."""
    conn.execute(
        "UPDATE batchq.batches_live SET status = 'processing', attempt = 1, claimed_by = %s, claimed_at = now(), "
        "claim_token = gen_random_uuid(), lease_expires_at = now() + interval '1 minute' WHERE id = %s",
        [worker, batch_id],
    )


def set_held(conn: Conn) -> int:
    """Fill a queue, in which set_scene may have been already; return the spread batch."""
    conn.execute("SELECT batchq.set_limit('mail', 'send', max_running => 10, per_second => 50)")
    conn.execute("SELECT batchq.set_limit('mail', NULL, max_running_per_key => 1)")
    conn.execute("SELECT batchq.set_limit('bulk', 'geocode', max_running => 2147483647, items_per_second => 4.5)")
    conn.execute(SHARE, ["mail", "send", "jobs-1-4411-5eed1", 10, 12.5, 10, 10, "max_running"])
    conn.execute("SELECT batchq.throttle('mail', 'send', 'customer 2', 90, 'jobs-1-4411-5eed1')")
    conn.execute("SELECT batchq.throttle('bulk', 'geocode', NULL, 45, 'jobs-1-4411-5eed1')")
    conn.execute("SELECT batchq.pause('bulk', 'import_contacts', reason => 'their API is down', actor => 'ann')")
    ids = [insert(conn, queue="mail", kind="send", key=f"customer {number % 12}") for number in range(30)]
    conn.execute("UPDATE batchq.batches SET run_at = now() - interval '7 minutes' WHERE queue = 'mail'")
    begin(conn, ids[0])
    begin(conn, ids[5])
    for name, (cron, zone, kind) in SCHEDULES.items():
        conn.execute("SELECT batchq.set_schedule(%s, %s, %s, %s)", [name, cron, kind, zone])
        conn.execute(
            "UPDATE batchq.schedules SET next_at = date_trunc('minute', now()) + interval '5 minutes' WHERE name = %s",
            [name],
        )
    made = insert(conn, kind="report")
    conn.execute(
        "UPDATE batchq.schedules SET last_batch_id = %s, last_queue = 'default', last_at = now() - interval '9 hours', "
        "last_late_seconds = 0.4, batches_made = 212, ticks_missed = 3 WHERE name = 'nightly report'",
        [made],
    )
    conn.execute("SELECT batchq.pause_schedule('office hours')")
    whole, _ = set_spread(conn, kind="import_catalog", queue="media")
    conn.execute(
        "UPDATE batchq.batches_live SET items_done = 40, items_failed = 3 WHERE part_of = %s AND status = 'processing'",
        [whole],
    )
    return whole
