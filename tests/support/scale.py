"""A database with many batches, and what looking at it costs: milliseconds, and rows read."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import psycopg

from batchq.postgres.statements import probes, session
from tests.support.steps import step

CHUNK = 1_000_000

# Three queues with five kinds each, two priorities, a tenth of what waits scheduled.
LIVE = """
INSERT INTO batchq.batches_live (id, queue, kind, priority, run_at, payload, errors)
OVERRIDING SYSTEM VALUE
SELECT nextval(pg_get_serial_sequence('batchq.batches', 'id')),
  (ARRAY['default', 'default', 'default', 'mail', 'mail', 'slow'])[n %% 6 + 1], 'kind ' || n / 6 %% 5, n %% 2 * 5,
  now() + (CASE WHEN n %% 10 = 0 THEN 1 ELSE -1 END) * (%(all)s - n + 1) * interval '1 millisecond',
  jsonb_build_object('seq', n), '[]'
FROM generate_series(%(first)s::bigint, %(last)s::bigint) n
"""

PROCESSING = """
UPDATE batchq.batches_live
SET status = 'processing', attempt = 1, claimed_by = 'worker 1', claim_token = gen_random_uuid(), claimed_at = now(),
  lease_expires_at = now() + (CASE WHEN id %% 100 = 0 THEN -1 ELSE 1 END) * interval '1 hour'
WHERE id IN (SELECT id FROM batchq.batches_live WHERE run_at < now() ORDER BY id LIMIT %(count)s)
"""

DEAD = """
INSERT INTO batchq.batches_live (id, queue, kind, priority, run_at, payload, errors)
OVERRIDING SYSTEM VALUE
SELECT nextval(pg_get_serial_sequence('batchq.batches', 'id')),
  (ARRAY['default', 'default', 'default', 'mail', 'mail', 'slow'])[n %% 6 + 1], 'kind ' || n / 6 %% 5, n %% 2 * 5,
  now() - interval '1 day' - (%(all)s - n) * interval '1 millisecond', jsonb_build_object('seq', n), '[]'
FROM generate_series(%(first)s::bigint, %(last)s::bigint) n
"""
CLAIMED = """
UPDATE batchq.batches_live
SET status = 'processing', attempt = 1, claimed_by = 'worker 1', claim_token = gen_random_uuid(), claimed_at = now(),
  lease_expires_at = run_at + interval '5 minutes'
"""

# One in two hundred failed, with a traceback; one in a thousand was cancelled.
FINISHED = """
INSERT INTO batchq.batches_finished (id, queue, kind, status, payload, attempt, claimed_at, created_at, finished_at,
  errors)
OVERRIDING SYSTEM VALUE
SELECT nextval(pg_get_serial_sequence('batchq.batches', 'id')),
  (ARRAY['default', 'default', 'default', 'mail', 'mail', 'slow'])[n %% 6 + 1], 'kind ' || n / 6 %% 5,
  CASE WHEN n %% 200 = 0 THEN 'failed' WHEN n %% 1000 = 1 THEN 'cancelled' ELSE 'completed' END,
  jsonb_build_object('seq', n), 1, at - interval '1 second', at - interval '1 minute', at,
  CASE WHEN n %% 200 = 0 THEN jsonb_build_array(jsonb_build_object('attempt', 1, 'at', at,
    'error', 'ValueError: number ' || n / 200 %% 7, 'traceback', repeat('  File "tasks.py", line 7, in work ', 40)))
  ELSE '[]' END
FROM generate_series(%(first)s::bigint, %(last)s::bigint) n
CROSS JOIN LATERAL (SELECT now() - (%(all)s - n + 1)::float8 / %(all)s * %(days)s * interval '1 day' AS at) times
"""

MINUTES = """
INSERT INTO batchq.throughput_minutes (minute, queue, kind, worker, completed, failed, cancelled, retried, items,
  run_seconds, run_times)
SELECT minute, queue, 'kind ' || kind, worker, 1000, 5, 1, 5, 0, 12.5, array_fill(40, ARRAY[25])
FROM (SELECT minute, '' AS worker
      FROM generate_series(date_trunc('minute', now()) - interval '7 days',
                           date_trunc('minute', now()) - interval '2 minutes', interval '1 minute') minute
      UNION ALL
      SELECT date_trunc('minute', now()) - age * interval '1 minute', 'worker ' || worker
      FROM generate_series(0, 1) age, generate_series(1, 20) worker) minutes
CROSS JOIN unnest(ARRAY['default', 'mail', 'slow']) queue
CROSS JOIN generate_series(0, 4) kind
"""

WORKERS = """
INSERT INTO batchq.workers (id, hostname, pid, version, queues, kinds, concurrency)
SELECT 'worker ' || n, 'host', n, '1', '{default,mail}', '{kind 0,kind 1,kind 2}', 8 FROM generate_series(1, 20) n
"""

LOOKS = {
    "queues": "SELECT * FROM batchq.queues ORDER BY queue, kind",
    "queues of one kind": "SELECT * FROM batchq.queues WHERE queue = 'mail' AND kind = 'kind 1'",
    "failures": "SELECT * FROM batchq.failures ORDER BY latest_at DESC",
    "throughput of an hour": "SELECT * FROM batchq.throughput WHERE minute > now() - interval '1 hour' ORDER BY minute",
    "workers": "SELECT * FROM batchq.workers WHERE heartbeat_at > now() - interval '1 minute'",
    "status, newest": "SELECT * FROM batchq.status ORDER BY id DESC LIMIT 20",
    "status, one batch": "SELECT * FROM batchq.status WHERE id = (SELECT max(id) / 2 FROM batchq.batches_live)",
    "stalled": "SELECT * FROM batchq.status WHERE stored_status = 'processing' AND status = 'stalled' LIMIT 20",
    "failed": "SELECT * FROM batchq.status WHERE stored_status = 'failed' ORDER BY finished_at DESC LIMIT 20",
    "cancelled": "SELECT * FROM batchq.status WHERE stored_status = 'cancelled' ORDER BY finished_at DESC LIMIT 20",
    "pauses": "SELECT * FROM batchq.pauses",
    "audit": "SELECT * FROM batchq.audit ORDER BY id DESC LIMIT 20",
    "bulk, a dry run's look": "SELECT * FROM batchq.bulk('retry', '{\"kind\": \"kind 2\"}', dry_run => true)",
}

# What docs/steering.md has one ask beside many dead rows, since the view by itself reads those as well.
LOOKS_BESIDE_DEAD = LOOKS | {
    "status, newest": "SELECT * FROM batchq.status WHERE id IN (SELECT batchq.newest_live(most => 20))",
    "stalled": "SELECT * FROM batchq.status WHERE id IN (SELECT batchq.newest_live(in_status => 'stalled'))",
}


@dataclass(frozen=True)
class Cost:
    """What a look costs. cpu_ms: of the server, None where it is not of this machine. rows_read: of each table;
    scanned: those of them that were read without an index."""

    name: str
    median_ms: float
    cpu_ms: float | None
    scanned: dict[str, int]
    rows_read: dict[str, int]
    plan: str


def fill(conn: psycopg.Connection, live: int, finished: int, days: int) -> None:
    """Insert so many batches, finished ones over the last *days*; and workers, and a week of throughput."""
    conn.execute("SELECT batchq.create_finished_partitions((now() AT TIME ZONE 'UTC')::date - %s, %s)", [days, days])
    in_chunks(lambda part: conn.execute(FINISHED, part | {"days": days}), finished, "finished")
    in_chunks(lambda part: conn.execute(LIVE, part), live, "live")
    conn.execute(PROCESSING, {"count": min(2000, live // 10)})
    conn.execute(MINUTES)
    conn.execute(WORKERS)
    conn.execute("INSERT INTO batchq.audit (verb, batches) SELECT 'cancel', 1 FROM generate_series(1, 10000)")
    for table in ("batches_live", "batches_finished", "throughput_minutes", "audit"):
        conn.execute(f"VACUUM (ANALYZE) batchq.{table}".encode())


def die(conn: psycopg.Connection, dead: int) -> None:
    """Insert so many batches, and have each claimed and removed; while somebody holds a snapshot, all of it stays."""

    def work(part: dict[str, int]) -> None:
        conn.execute(DEAD, part)
        conn.execute(CLAIMED)
        conn.execute("DELETE FROM batchq.batches_live")

    in_chunks(work, dead, "dead")
    conn.execute("VACUUM (ANALYZE) batchq.batches_live")


def survey(conn: psycopg.Connection) -> None:
    """Record where the live table's indexes begin, as workers do while there are many dead rows."""
    with conn.transaction():
        conn.execute(session.transaction_settings(600, settings=session.FORCE_INDEX))
        probes.move_positions(conn, ["default", "mail", "slow"], [0, 5], 300)


def in_chunks(insert: Callable[[dict[str, int]], object], count: int, name: str) -> None:
    """Call *insert* for a million rows at a time."""
    for first in range(1, count + 1, CHUNK):
        insert({"first": first, "last": min(first + CHUNK - 1, count), "all": count})
        step("%s: %s of %s", name, f"{min(first + CHUNK - 1, count):,}", f"{count:,}")


def cost(conn: psycopg.Connection, name: str, query: str, times: int = 9) -> Cost:
    """Look several times, each time in a transaction of its own; return what it costs."""
    took = []
    cpu_before = cpu_seconds(conn)
    for _ in range(times):
        began_at = time.perf_counter()
        conn.execute(query.encode()).fetchall()
        took.append(1000 * (time.perf_counter() - began_at))
    cpu_after = cpu_seconds(conn)
    cpu_ms = None if cpu_before is None or cpu_after is None else 1000 * (cpu_after - cpu_before) / times
    with conn.transaction():
        plan = "\n".join(line for (line,) in conn.execute(f"EXPLAIN (ANALYZE, BUFFERS) {query}".encode()).fetchall())
    conn.execute("SELECT pg_stat_force_next_flush()")
    with conn.transaction():
        conn.execute(query.encode()).fetchall()
        rows = conn.execute(
            "SELECT relname, coalesce(seq_tup_read, 0), coalesce(idx_tup_fetch, 0) "
            "FROM pg_stat_xact_user_tables WHERE schemaname = 'batchq'"
        ).fetchall()
    scanned = {table: seq_read for table, seq_read, _ in rows if seq_read}
    read = {table: seq_read + fetched for table, seq_read, fetched in rows if seq_read + fetched}
    return Cost(name, statistics.median(took), cpu_ms, scanned, read, plan)


def cpu_seconds(conn: psycopg.Connection) -> float | None:
    """Return the CPU time of a connection's server process so far, None if that is not of this machine."""
    try:
        times = psutil.Process(conn.info.backend_pid).cpu_times()
    except psutil.Error:
        return None
    return times.user + times.system
