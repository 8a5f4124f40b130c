"""What is tried, and its verdict: each function fills a database, runs workers, kills some, and tells what it saw."""

import random
import time
from typing import Any

import batchq
from tests.support.processes import Processes
from tests.support.trials import Place, Seen, value
from tests.support.waiting import wait_until

APP = "tests.instruments.flows.apps:app"
TABLES = """
DROP TABLE IF EXISTS begins;
CREATE TABLE begins (batch_id bigint, attempt integer, pid integer, at timestamptz DEFAULT clock_timestamp());
TRUNCATE batchq.batches, batchq.batches_finished;
TRUNCATE batchq.failed_items;
TRUNCATE batchq.needs, batchq.flow_events;
"""
LEFT = """
SELECT (SELECT count(*) FROM batchq.batches_live WHERE status IN ('pending', 'processing'))
  + (SELECT count(*) FROM batchq.flow_events)
"""
LIVE = "SELECT count(*) FROM batchq.batches_live"
# A batch began although one that it waits for had not ended by then, or had ended otherwise than on_failure allows.
TOO_EARLY = """
SELECT count(*)
FROM begins g
JOIN batchq.all_batches b ON b.id = g.batch_id
CROSS JOIN LATERAL unnest(b.after) a(id)
LEFT JOIN batchq.batches_finished n ON n.id = a.id
WHERE n.id IS NULL OR n.finished_at > g.at OR (n.status <> 'completed' AND b.on_failure IS DISTINCT FROM 'run')
"""
TWICE = "SELECT count(*) FROM (SELECT 1 FROM begins GROUP BY batch_id, attempt HAVING count(*) > 1) twice"


def _restarted(processes: Processes, fleet: list[Any], rng: random.Random) -> None:
    number = rng.randrange(len(fleet))
    fleet[number].kill()
    fleet[number] = processes.worker(lease_seconds=3)


def fan_in(place: Place, *, batches: int, workers: int = 4, kill_every_seconds: float = 3, seed: int = 1) -> Seen:
    """Many batches, then one after all of them, beside kills."""
    seen, rng = Seen(), random.Random(seed)
    with place.connect() as conn:
        conn.execute(TABLES.encode())
        with conn.transaction():
            ids = batchq.enqueue_each(conn, "plain", [{}] * batches)
            last = batchq.enqueue(conn, "step", after=ids)
        with place.processes() as processes:
            fleet = [processes.worker(lease_seconds=3) for _ in range(workers)]
            killed_at = time.monotonic()
            while value(conn, "SELECT EXISTS (SELECT 1 FROM batchq.batches_live WHERE id = %s)", [last]):
                time.sleep(0.1)
                if time.monotonic() - killed_at > kill_every_seconds:
                    killed_at = time.monotonic()
                    _restarted(processes, fleet, rng)
            for process in fleet:
                process.stop()
        began = value(conn, "SELECT count(*) FROM begins")
        after = value(conn, "SELECT extract(epoch FROM (SELECT min(at) FROM begins) - max(finished_at))::float8 "
                            "FROM batchq.batches_finished WHERE kind = 'plain'")  # fmt: skip
        early = value(conn, TOO_EARLY)
    seen.figures = {"batches": batches, "begun": began, "seconds after the last end": round(after, 3)}
    seen.must(began == 1, f"it began {began} times")
    seen.must(early == 0, f"{early} batches that it needs had not ended")
    seen.must(0 <= after < 1.5, f"it began {after:.2f} s after the last end")
    return seen


def rounds(place: Place, *, fan_ins: int, times: int, workers: int = 3) -> Seen:
    """Fan-ins of two whose batches end at the same time in different workers."""
    seen = Seen()
    with place.connect() as conn, place.processes() as processes:
        conn.execute(TABLES.encode())
        fleet = [processes.worker(concurrency=4) for _ in range(workers)]
        for _ in range(times):
            with conn.transaction():
                pairs = batchq.enqueue_each(conn, "plain", [{}] * (2 * fan_ins), delay_seconds=0.3)
                for number in range(fan_ins):
                    batchq.enqueue(conn, "step", after=pairs[2 * number : 2 * number + 2])
            wait_until(lambda: value(conn, LIVE) == 0, 60, "all to end")
        for process in fleet:
            process.stop()
        begun, different = value(conn, "SELECT count(*) FROM begins"), value(
            conn, "SELECT count(DISTINCT batch_id) FROM begins")  # fmt: skip
        early = value(conn, TOO_EARLY)
    seen.figures = {"fan-ins": fan_ins * times, "begun": begun}
    seen.must(begun == different == fan_ins * times, f"{begun} began, {different} different, of {fan_ins * times}")
    seen.must(early == 0, f"{early} began early")
    return seen


def chains(place: Place, *, count: int, length: int) -> Seen:
    """Chains, worked by one process."""
    seen = Seen()
    with place.connect() as conn:
        conn.execute(TABLES.encode())
        with conn.transaction():
            conn.execute("SET LOCAL enable_seqscan = off")
            made = "INSERT INTO batchq.batches (kind, after) SELECT 'plain', {} RETURNING id"
            ids = [row[0] for row in conn.execute(made.format("NULL FROM generate_series(1, %s)"), [count]).fetchall()]
            for _ in range(length - 1):
                rows = conn.execute(made.format("ARRAY[u] FROM unnest(%s::bigint[]) u"), [ids]).fetchall()
                ids = [row[0] for row in rows]
        conn.execute("VACUUM ANALYZE batchq.batches_live")
        with place.processes() as processes:
            worker = processes.worker()
            wait_until(lambda: not value(conn, "SELECT EXISTS (SELECT 1 FROM batchq.batches_live)"), 600, "the end")
            worker.stop()
        span = "SELECT extract(epoch FROM max(finished_at) - min(claimed_at))::float8 FROM batchq.batches_finished"
        took = value(conn, span)
        out_of_order = value(
            conn,
            "SELECT count(*) FROM batchq.batches_finished b JOIN batchq.batches_finished n ON n.id = b.after[1] "
            "WHERE n.finished_at > b.claimed_at",
        )
    seen.figures = {"batches": count * length, "per second": round(count * length / took)}
    seen.must(out_of_order == 0, f"{out_of_order} began early")
    return seen


def graph(place: Place, *, batches: int, workers: int = 3, kill_every_seconds: float = 4, seed: int = 1) -> Seen:
    """A random graph in which some fail for good and some at first, with each on_failure, beside kills."""
    seen, rng = Seen(), random.Random(seed)
    expected: dict[int, str] = {}
    with place.connect() as conn:
        conn.execute(TABLES.encode())
        with conn.transaction():
            for _ in range(batches):
                known = list(expected)
                after = rng.sample(known[-200:], min(len(known), rng.choice([0, 1, 1, 2, 5])))
                payload = {"fails": rng.random() < 0.05, "fails_once": rng.random() < 0.05}
                on_failure = rng.choice([None, "wait", "run", "cancel"])
                one = batchq.enqueue(conn, "step", payload, after=after, on_failure=on_failure, max_attempts=100)
                assert one is not None
                expected[one] = _end(payload["fails"], on_failure, [expected[other] for other in after])
        with place.processes() as processes:
            fleet = [processes.worker(lease_seconds=2) for _ in range(workers)]
            killed_at = time.monotonic()
            while value(conn, LEFT):
                time.sleep(0.1)
                if time.monotonic() - killed_at > kill_every_seconds:
                    killed_at = time.monotonic()
                    _restarted(processes, fleet, rng)
            for process in fleet:
                process.stop()
        found = dict(conn.execute("SELECT id, status FROM batchq.all_batches").fetchall())
        early, twice = value(conn, TOO_EARLY), value(conn, TWICE)
    wrong = {one: (status, found.get(one)) for one, status in expected.items() if found.get(one) != status}
    ends = {status: list(found.values()).count(status) for status in sorted(set(found.values()))}
    seen.figures = {"batches": batches, "ends": ends}
    seen.must(not wrong, f"{len(wrong)} ended otherwise (expected, found): {dict(list(wrong.items())[:5])}")
    seen.must(early == 0, f"{early} began early")
    seen.must(twice == 0, f"{twice} attempts began twice")
    return seen


def _end(fails: bool, on_failure: str | None, needed: list[str]) -> str:
    """Return how a batch must end, by how those that it needs do: the model."""
    is_held = any(status != "completed" for status in needed)
    if is_held and on_failure == "cancel" and any(status in ("failed", "cancelled") for status in needed):
        return "cancelled"
    if "waiting" in needed or (is_held and on_failure != "run"):
        return "waiting"
    return "failed" if fails else "completed"
