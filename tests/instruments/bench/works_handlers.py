"""Batches that take time: whether the slots stay busy, whether processes share fairly; and items."""

import time
from collections.abc import Iterator

from batchq import enqueue_many
from tests.instruments.bench import records
from tests.instruments.bench.draining import Drained, drain_all
from tests.instruments.bench.records import Marks, one_row
from tests.instruments.bench.server import Database, Meter
from tests.instruments.bench.work import Bench, Figures, Run, work
from tests.instruments.bench.worker_process import Workers

SLOTS = 8  # batchq's default
LONG_SECONDS, SHORT_SECONDS, SHORT_A_LONG = 2.0, 0.01, 200


@work
def handlers(bench: Bench) -> Iterator[Run]:
    """`def` handlers that sleep for 10 and 100 ms, in 8 slots, with one and two processes; and a mix with long ones.

    *share of ideal*: the time that all slots would need if they were always busy, divided by the time from the first
    start to the last end. *mix*: two processes, with one batch of 2 s for each 200 of 10 ms. Its *longest wait* is
    how long one process held a claimed batch that had not begun, while the other process had a free slot.
    """
    for _ in bench.times("handlers"):
        for milliseconds in (10, 100):
            for processes in (1, 2):
                yield steady(bench, milliseconds / 1000, processes)
        yield mixed(bench)


def steady(bench: Bench, duration: float, processes: int) -> Run:
    """Work batches that all take the same time."""
    count = int(bench.sizes.seconds("handlers.seconds") * SLOTS * processes / duration)
    payloads = [{"seq": number, "seconds": duration} for number in range(count)]
    drained, _ = work_sleeps(bench, payloads, processes)
    figures = shares(drained, count * duration, processes)
    name = f"{duration * 1000:.0f} ms, {processes} process{'es' if processes > 1 else ''}"
    return Run("handlers", name, figures, drained.problems)


def mixed(bench: Bench) -> Run:
    """Work a mix of long and short batches by two processes."""
    rounds = max(1, int(bench.sizes.seconds("handlers.seconds") * SLOTS * 2 / (LONG_SECONDS + SHORT_A_LONG * 0.01)))
    count = rounds * (SHORT_A_LONG + 1)
    payloads = [
        {"seq": number, "seconds": SHORT_SECONDS if number % (SHORT_A_LONG + 1) else LONG_SECONDS}
        for number in range(count)
    ]
    drained, claimed = work_sleeps(bench, payloads, 2)
    figures = shares(drained, sum(each["seconds"] for each in payloads), 2)
    figures |= waits_in_hand(drained, claimed)
    return Run("handlers", "mix of 2 s and 10 ms, 2 processes", figures, drained.problems)


def work_sleeps(bench: Bench, payloads: list[dict[str, float]], processes: int) -> tuple[Drained, dict[int, float]]:
    """Drain sleeping batches; return what came of it, and when each was claimed."""
    with bench.database() as database:
        enqueue_many(database.conn, "sleep", payloads)
        database.settle()
        drained = drain_all(database, len(payloads), processes)
        return drained, claim_times(database)


def claim_times(database: Database) -> dict[int, float]:
    """Return when each batch was claimed (for the last time), by this process's clock."""
    clock = "SELECT extract(epoch FROM clock_timestamp())::float8"
    offset = min(one_row(database.conn, clock)[0] - time.monotonic() for _ in range(20))
    rows = database.conn.execute(
        "SELECT (payload ->> 'seq')::bigint, extract(epoch FROM claimed_at)::float8 FROM batchq.all_batches"
    )
    return {number: at - offset for number, at in rows}


def shares(drained: Drained, busy_seconds: float, processes: int) -> Figures:
    """Return the throughput as a share of the ideal, and how the processes shared the work."""
    last_end = max(at for marks in drained.ends.values() for _, at in marks)
    seconds = last_end - drained.marks[0][1]
    split = [len(marks) for marks in drained.by_process.values()]
    figures: Figures = {
        "per_s": round(drained.count / seconds, 1),
        "share_of_ideal": round(busy_seconds / (SLOTS * processes) / seconds, 3),
    }
    return figures | ({"smaller_share": round(min(split) / drained.count, 3)} if processes > 1 else {})


# ---------------------------------------------------------------------------------------------------- the mix


def waits_in_hand(drained: Drained, claimed: dict[int, float]) -> Figures:
    """Return how long batches waited in hand: at all, and while the other process had a free slot."""
    free = {pid: free_spans(starts, drained.ends[pid]) for pid, starts in drained.by_process.items()}
    waits, beside_idle = [], []
    for pid, starts in drained.by_process.items():
        others = [span for other, spans in free.items() if other != pid for span in spans]
        for number, started in starts:
            waits.append(started - claimed[number])
            beside_idle.append(longest_overlap(claimed[number], started, others))
    waits.sort()
    return {
        "wait_in_hand_p99_ms": round(1000 * waits[int(0.99 * (len(waits) - 1))], 1),
        "wait_in_hand_max_ms": round(1000 * waits[-1], 1),
        "longest_wait_beside_free_slot_ms": round(1000 * max(beside_idle), 1),
    }


def free_spans(starts: Marks, ends: Marks) -> list[tuple[float, float]]:
    """Return the spans in which a process ran fewer handlers than it has slots, from its first start to for ever."""
    if not starts:
        return [(float("-inf"), float("inf"))]
    changes = sorted([(at, 1) for _, at in starts] + [(at, -1) for _, at in ends])
    spans, running, since = [], 0, changes[0][0]
    for at, change in changes:
        running += change
        if change > 0 and running == SLOTS:
            spans.append((since, at))
        elif change < 0 and running == SLOTS - 1:
            since = at
    return [*spans, (since, float("inf"))]


def longest_overlap(first: float, last: float, spans: list[tuple[float, float]]) -> float:
    """Return the longest part of a span that lies in one of *spans*."""
    return max((min(last, end) - max(first, begin) for begin, end in spans), default=0.0)


# ------------------------------------------------------------------------------------------------------ items


@work
def items(bench: Bench) -> Iterator[Run]:
    """One process runs a million items with a no-op item handler: in batches of 1,000, of 100, and with errors.

    With errors, one item in a hundred fails and is recorded; the batch has one attempt. The rate covers the time from
    the first claim to the last finish, by the database's clock. Verified: each item was called once, and the counters
    and the failed items are correct.
    """
    count = bench.sizes.number("items.items")
    for _ in bench.times("items"):
        for variant, kind, size in (
            ("1,000 a batch", "items", 1000),
            ("100 a batch", "items", 100),
            ("1,000 a batch, 1 % fail", "items_one_percent_fails", 1000),
        ):
            yield one_items(bench, variant, kind, count, size)


def one_items(bench: Bench, variant: str, kind: str, count: int, size: int) -> Run:
    """Work *count* items in batches of *size*."""
    with bench.database() as database, records.directory() as directory:
        options = {"items_per_batch": size, "max_attempts": 1, "max_failed_items": size}
        batches = enqueue_many(database.conn, kind, items=range(count), **options)
        database.settle()
        with Workers(database.dsn, 1, directory) as workers:
            meter, cpu_before = Meter(database).start(), workers.cpu_seconds()
            workers.go()
            wait_until_completed(workers, database, batches)
            meter.stop()
            cpu, rss = workers.cpu_seconds() - cpu_before, workers.peak_rss_mb()
            problems = workers.stop()
        seconds, *counters = one_row(database.conn, ITEMS_RESULT)
        failing = count // 100 if kind != "items" else 0
        problems += problems_of_items([*counters, workers.records.calls()], batches, count, failing)
    figures: Figures = {"items_per_s": round(count / seconds), "worker_cpu_s_per_million": round(cpu / count * 1e6, 2)}
    server_cpu = None if meter.cpu_seconds is None else round(meter.cpu_seconds / count * 1e6, 2)
    figures |= {"server_cpu_s_per_million": server_cpu, "wal_bytes_per_item": round(meter.wal_bytes / count, 2)}
    return Run("items", variant, figures | {"peak_rss_mb": round(rss, 1)}, problems)


def wait_until_completed(workers: Workers, database: Database, batches: int) -> None:
    """Wait until nothing is pending or processing, as long as that becomes less."""
    seen, seen_at = batches, time.monotonic()
    while seen:
        workers.check_alive()
        [left] = one_row(database.conn, "SELECT count(*) FROM batchq.batches_live")
        now = time.monotonic()
        if left != seen:
            seen, seen_at = left, now
        elif now - seen_at > 60:
            raise TimeoutError(f"{left} of {batches} batches stay: {workers.said()[-1500:]}")
        time.sleep(0.05)


ITEMS_RESULT = """
SELECT extract(epoch FROM max(finished_at) - min(claimed_at))::float8,
       count(*) FILTER (WHERE status = 'completed' AND attempt = 1),
       sum(items_done), sum(items_failed), (SELECT count(*) FROM batchq.failed_items)
FROM batchq.all_batches
"""


def problems_of_items(found: list[int], batches: int, count: int, failing: int) -> list[str]:
    """Return whether what was found differs from what must be."""
    names = ("completed batches", "items done", "items failed", "rows of failed items", "calls")
    wanted = (batches, count - failing, failing, failing, count)
    return [
        f"{is_there} {name} instead of {must_be}"
        for name, must_be, is_there in zip(names, wanted, found, strict=True)
        if must_be != is_there
    ]
