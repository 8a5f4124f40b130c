"""What is tried, and its verdict: each function enqueues one list, runs workers, and tells what it saw."""

import random
import time
from typing import Any

import psycopg

from tests.support.processes import Processes
from tests.support.trials import Place, Seen, value
from tests.support.waiting import wait_until

APP = "tests.instruments.spread.apps:app"
PARTS = 16
TABLES = """
DROP TABLE IF EXISTS worked, spread_switch;
CREATE TABLE worked (item integer);
CREATE TABLE spread_switch AS SELECT true AS failing;
TRUNCATE batchq.batches, batchq.batches_finished;
TRUNCATE batchq.failed_items;
"""
INSERT = """
INSERT INTO batchq.batches (kind, items, spread, payload, max_attempts)
SELECT %(kind)s, jsonb_agg(i), %(spread)s, %(payload)s::jsonb, %(max_attempts)s FROM generate_series(0, %(items)s - 1) i
RETURNING id
"""
SHOWN = "SELECT status, items_done, items_failed, progress_percent FROM batchq.status WHERE id = %s"
_MOST_SECONDS = 3600.0


def _enqueue(conn: psycopg.Connection[Any], kind: str, items: int, payload: str = "{}", max_attempts: int = 5) -> int:
    parameters = {"kind": kind, "items": items, "spread": PARTS, "payload": payload, "max_attempts": max_attempts}
    return int(value(conn, INSERT, parameters))


def _shown(conn: psycopg.Connection[Any], batch_id: int) -> tuple[str, int, int, int]:
    row = conn.execute(SHOWN.encode(), [batch_id]).fetchone()
    assert row is not None
    return row


def _await_first(conn: psycopg.Connection[Any], batch_id: int) -> None:
    wait_until(lambda: _shown(conn, batch_id)[1] > 0, 120, "the first item")


def _await_end(conn: psycopg.Connection[Any], batch_id: int) -> str:
    ended = ("completed", "failed", "cancelled")
    wait_until(lambda: _shown(conn, batch_id)[0] in ended, _MOST_SECONDS, f"batch {batch_id} to end")
    return _shown(conn, batch_id)[0]


def rate(place: Place, *, items: int) -> Seen:
    """Items per second of one process and of two, from the first item to the last."""
    seen, rates = Seen(), {}
    with place.connect() as conn:
        for processes in (1, 2):
            conn.execute(TABLES.encode())
            batch_id = _enqueue(conn, "sleep", items)
            began_at = time.monotonic()
            with place.processes() as fleet:
                for _ in range(processes):
                    fleet.worker(concurrency=8)
                _await_first(conn, batch_id)
                first_at = time.monotonic()
                status = _await_end(conn, batch_id)
                ended_at = time.monotonic()
            seen.must((status, _shown(conn, batch_id)[1]) == ("completed", items), f"ended as {_shown(conn, batch_id)}")
            rates[processes] = items / (ended_at - first_at)
            seen.figures[f"per second, {processes}"] = round(rates[processes])
            seen.figures[f"seconds until the first checkpoint, {processes}"] = round(first_at - began_at, 2)
    seen.figures["ratio"] = round(rates[2] / rates[1], 2)
    seen.must(rates[2] >= 1.7 * rates[1], "two processes are less than 1.7 times as fast as one")
    return seen


def kills(place: Place, *, items: int, workers: int = 3, kill_every_seconds: float = 3, seed: int = 1) -> Seen:
    """Workers are killed; the bar only grows, and each item has its row once."""
    seen, rng, killed, bar = Seen(), random.Random(seed), 0, 0
    with place.connect() as conn, place.processes() as processes:
        conn.execute(TABLES.encode())
        batch_id = _enqueue(conn, "count", items, max_attempts=100)
        fleet = [processes.worker(lease_seconds=3, concurrency=8) for _ in range(workers)]
        killed_at = time.monotonic()
        while (shown := _shown(conn, batch_id))[0] not in ("completed", "failed", "cancelled"):
            seen.must(bar <= shown[1] <= items, f"{shown[1]} items done after {bar}")
            bar = shown[1]
            rows = value(conn, "SELECT count(*) FROM batchq.status")
            seen.must(rows == 1, f"{rows} batches are shown")
            time.sleep(0.2)
            if time.monotonic() - killed_at > kill_every_seconds:
                killed_at, killed = time.monotonic(), killed + 1
                _restart(processes, fleet, rng)
        _must_be_worked_once(conn, seen, items)
    seen.figures |= {"items": items, "kills": killed, "ended as": shown}
    seen.must(shown[:2] == ("completed", items), f"ended as {shown}")
    return seen


def _restart(processes: Processes, fleet: list[Any], rng: random.Random) -> None:
    number = rng.randrange(len(fleet))
    fleet[number].kill()
    fleet[number] = processes.worker(lease_seconds=3, concurrency=8)


def _must_be_worked_once(conn: psycopg.Connection[Any], seen: Seen, items: int) -> None:
    rows = value(conn, "SELECT count(*) FROM worked")
    different = value(conn, "SELECT count(DISTINCT item) FROM worked")
    seen.must((rows, different) == (items, items), f"{rows} rows of {different} items")


def retry(place: Place, *, items: int) -> Seen:
    """A thousand items fail; they are listed by their indexes in the whole list, and a retry works those alone."""
    seen, every = Seen(), max(1, items // 1000)
    with place.connect() as conn, place.processes() as processes:
        conn.execute(TABLES.encode())
        batch_id = _enqueue(conn, "count", items, f'{{"fails_every": {every}}}', max_attempts=1)
        for _ in range(2):
            processes.worker(concurrency=8)
        seen.must(_await_end(conn, batch_id) == "failed", "it did not fail")
        bad = list(range(0, items, every))
        listed = conn.execute(
            "SELECT item_index, item::text FROM batchq.failed_items_of(%s, most => 100000)", [batch_id]
        ).fetchall()
        seen.must(listed == [(index, str(index)) for index in bad], f"{len(listed)} failed items are listed")
        conn.execute("UPDATE spread_switch SET failing = false")
        before = value(conn, "SELECT count(*) FROM worked")
        conn.execute("SELECT batchq.retry_items(%s)", [batch_id])
        seen.must(_await_end(conn, batch_id) == "completed", "the retry did not complete it")
        again = value(conn, "SELECT count(*) FROM worked") - before
        seen.must(again == len(bad), f"the retry worked {again} items")
        _must_be_worked_once(conn, seen, items)
    seen.figures = {"items": items, "failed": len(listed), "worked by the retry": again}
    return seen


def cancel(place: Place, *, items: int) -> Seen:
    """Half-way it is cancelled: all parts stop within a second; a retry works the rest."""
    seen = Seen()
    with place.connect() as conn, place.processes() as processes:
        conn.execute(TABLES.encode())
        batch_id = _enqueue(conn, "count", items)
        for _ in range(2):
            processes.worker(concurrency=8)
        wait_until(lambda: _shown(conn, batch_id)[1] >= items // 2, _MOST_SECONDS, "half of it")
        asked_at = time.monotonic()
        conn.execute("SELECT batchq.cancel(%s)", [batch_id])
        took = time.monotonic() - asked_at
        time.sleep(max(0, 1 - took))
        after_a_second = value(conn, "SELECT count(*) FROM worked")
        done = _shown(conn, batch_id)[1]
        time.sleep(2)
        later = value(conn, "SELECT count(*) FROM worked")
        seen.must(later == after_a_second, f"{later - after_a_second} items were worked more than a second after it")
        seen.must(done == later, f"{done} items are shown as done, {later} are")
        conn.execute("SELECT batchq.retry(%s)", [batch_id])
        seen.must(_await_end(conn, batch_id) == "completed", "the retry did not complete it")
        _must_be_worked_once(conn, seen, items)
    seen.figures = {"items": items, "done when cancelled": done, "cancel took seconds": round(took, 3)}
    return seen
