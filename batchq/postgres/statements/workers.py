"""What a worker writes about itself: its heartbeat and its throughput."""

from collections.abc import Sequence
from typing import Any, LiteralString, NamedTuple

from batchq.postgres.statements.running import Conn, Statement, array_text
from batchq.postgres.statements.session import ASYNCHRONOUS_COMMIT, FIXED_FORMATS, set_lock_timeout


class WorkerRow(NamedTuple):
    """A worker's row in batchq.workers."""

    id: str
    hostname: str
    pid: int
    version: str
    queues: list[str]
    kinds: list[str]
    concurrency: int
    schedules: list[str] = []  # noqa: RUF012 (nobody changes it)


HEARTBEAT: LiteralString = """
WITH beat AS (
  INSERT INTO batchq.workers (id, hostname, pid, version, queues, kinds, concurrency, schedules, in_hand, stopping,
    lost_slots)
  VALUES (%(id)s, %(hostname)s, %(pid)s, %(version)s, %(queues)s, %(kinds)s, %(concurrency)s,
    %(schedules)s, %(in_hand)s, %(stopping)s, %(lost_slots)s)
  ON CONFLICT (id) DO UPDATE
  SET in_hand = excluded.in_hand,
      stopping = excluded.stopping,
      lost_slots = excluded.lost_slots,
      heartbeat_at = now()
  RETURNING drain_asked_at IS NOT NULL AS is_asked_to_drain
)
SELECT (SELECT is_asked_to_drain FROM beat),
  count(*) + (NOT %(stopping)s)::integer,
  count(*) FILTER (WHERE id < %(id)s),
  date_part('epoch', clock_timestamp()),
  pg_stat_get_dead_tuples('batchq.batches_live'::regclass),
  batchq.shards_of_queues(%(queues)s::text[])
FROM batchq.workers
WHERE id <> %(id)s
  AND heartbeat_at > now() - %(silent_seconds)s * interval '1 second'
  AND queues && %(queues)s::text[]
  AND NOT stopping
"""
# Waits up to 100 ms for a lock, because the same thread extends leases.
HEARTBEAT_SETTINGS = THROUGHPUT_SETTINGS = FIXED_FORMATS | ASYNCHRONOUS_COMMIT | {"lock_timeout": "100"}


class Turn(NamedTuple):
    """A worker's turn to poll: its *number*, from 0, among *workers*; *now* in seconds since 1970."""

    workers: int
    number: int
    now: float


class Beat(NamedTuple):
    """The answer to a heartbeat. *dead_rows*: those of the live table, according to the server's statistics. *shards*:
    the stored names of the shards, by queue, of the queues that are split."""

    is_asked_to_drain: bool
    turn: Turn
    dead_rows: int
    shards: dict[str, list[str]]


def heartbeat(
    worker: WorkerRow, in_hand: int, stopping: bool, lost_slots: int = 0, silent_seconds: float = 15
) -> Statement:
    """Return the statement that writes a heartbeat. Its row, for `beat`, has whether the worker is asked to drain, and
    its turn among the workers that serve one of its queues and had a heartbeat within *silent_seconds*."""
    its = {"in_hand": in_hand, "stopping": stopping, "lost_slots": lost_slots, "silent_seconds": silent_seconds}
    return HEARTBEAT, worker._asdict() | its


def beat(row: Sequence[Any]) -> Beat:
    """Return the answer from the row of a `heartbeat`."""
    return Beat(bool(row[0]), Turn(*row[1:4]), row[4], row[5] or {})


def forget_silent_workers(conn: Conn) -> None:
    """Remove workers without a heartbeat for an hour, except those that another worker is removing."""
    set_lock_timeout(conn)  # the same thread extends leases
    conn.execute(
        """
        DELETE FROM batchq.workers
        WHERE id IN (SELECT id
                     FROM batchq.workers
                     WHERE heartbeat_at < now() - interval '1 hour'
                     FOR UPDATE SKIP LOCKED)
        """
    )


def forget_worker(conn: Conn, worker_id: str) -> None:
    """Remove a stopped worker."""
    conn.execute("DELETE FROM batchq.workers WHERE id = %(id)s", {"id": worker_id})


class Tally(NamedTuple):
    """A worker's counts for one queue and kind: outcomes, *items* processed, the sum of run times in seconds, and the
    histograms of run times and waits (see batchq.throughput_minutes)."""

    queue: str
    kind: str
    completed: int
    failed: int
    cancelled: int
    retried: int
    items: int
    run_seconds: float
    run_times: Sequence[int]
    wait_times: Sequence[int] = ()


COUNT_THROUGHPUT: LiteralString = """
INSERT INTO batchq.throughput_minutes AS t (minute, queue, kind, worker, completed, failed, cancelled, retried, items,
  run_seconds, run_times, wait_times)
SELECT date_trunc('minute', now()), queue, kind, %(worker)s, completed, failed, cancelled, retried, items, run_seconds,
  run_times::integer[], wait_times::integer[]
FROM unnest(%(queue)s::text[], %(kind)s::text[], %(completed)s::bigint[], %(failed)s::bigint[],
            %(cancelled)s::bigint[], %(retried)s::bigint[], %(items)s::bigint[], %(run_seconds)s::float8[],
            %(run_times)s::text[], %(wait_times)s::text[])
  AS u(queue, kind, completed, failed, cancelled, retried, items, run_seconds, run_times, wait_times)
ON CONFLICT (minute, queue, kind, worker) DO UPDATE
SET completed = t.completed + excluded.completed,
    failed = t.failed + excluded.failed,
    cancelled = t.cancelled + excluded.cancelled,
    retried = t.retried + excluded.retried,
    items = t.items + excluded.items,
    run_seconds = t.run_seconds + excluded.run_seconds,
    run_times = batchq.add_counts(t.run_times, excluded.run_times),
    wait_times = batchq.add_counts(t.wait_times, excluded.wait_times)
RETURNING t.queue
"""


def count_throughput(worker_id: str, tallies: Sequence[Tally]) -> Statement:
    """Return the statement that adds a worker's counts to its rows of this minute."""
    columns = {name: list(values) for name, values in zip(Tally._fields, zip(*tallies, strict=True), strict=True)}
    columns |= {name: [array_text(times) for times in columns[name]] for name in ("run_times", "wait_times")}
    return COUNT_THROUGHPUT, columns | {"worker": worker_id}
