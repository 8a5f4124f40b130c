"""What is tried, and its verdict: each tick of a schedule made one batch, or is counted by the schedule's own rule."""

import random
import time
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import psycopg
from psycopg.types.json import Jsonb

from batchq.common.cron import ticks
from tests.support.processes import Process, Processes
from tests.support.trials import Place, Seen
from tests.support.waiting import wait_until

APP = "tests.instruments.schedules.apps:app"
ZONES = (
    "UTC", "Europe/Berlin", "America/St_Johns", "Australia/Lord_Howe", "Africa/Casablanca", "Asia/Beirut",
)  # fmt: skip
START_SECONDS = 5.0  # of a worker, until it knows what is due
RULES = ("coalesce", "skip", "catch_up")
INSERT = """
INSERT INTO batchq.schedules (name, cron, time_zone, kind, payload, missed, catch_up_most)
SELECT r.name, r.cron, r.time_zone, 'tick', jsonb_build_object('schedule', r.name, 'tick', null), r.missed, 5
FROM jsonb_to_recordset(%s) AS r(name text, cron text, time_zone text, missed text)
"""
SCHEDULES = """
SELECT name, cron, time_zone, changed_at, next_at, batches_made, ticks_missed, ticks_overlapped, error
FROM batchq.schedules ORDER BY name
"""
BATCHES = """
SELECT payload ->> 'schedule', date_part('epoch', (payload ->> 'tick')::timestamptz)
FROM batchq.all_batches WHERE payload ? 'schedule'
"""
LAGS = """
SELECT (result #>> '{}')::float8 - date_part('epoch', (payload ->> 'tick')::timestamptz)
FROM batchq.all_batches WHERE payload ? 'schedule' AND status = 'completed' AND (payload ->> 'tick')::timestamptz > %s
ORDER BY 1
"""


def some_schedules(count: int, rng: random.Random) -> list[dict[str, Any]]:
    """Return definitions: most are due once a minute, at some second, the others every few seconds."""

    def cron(number: int) -> str:
        if number % 50 == 0:
            return f"@every {rng.choice((5, 7, 11))} s"
        return "* * * * *" if number % 5 == 0 else f"{rng.randrange(60)} * * * * *"

    return [
        {"name": f"s{number:04}", "cron": cron(number), "time_zone": rng.choice(ZONES), "missed": rng.choice(RULES)}
        for number in range(count)
    ]


def killed(
    place: Place, *, seconds: float, schedules: int = 1000, kill_every_seconds: float = 15, seed: int = 1
) -> Seen:
    """Two workers, of which one is killed every so often, and now and then both for a while."""
    rng = random.Random(seed)
    with place.connect() as conn, place.processes() as processes:
        conn.execute(INSERT.encode(), [Jsonb(some_schedules(schedules, rng))])
        workers = [processes.worker(lease_seconds=2) for _ in range(2)]
        until, kills = time.monotonic() + seconds, 0
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, kill_every_seconds * rng.uniform(0.5, 1.5)))
            if until - time.monotonic() > 2 * kill_every_seconds:
                kills += kill_some(processes, workers, rng, both=kills % 4 == 3)
        stop_ticking(conn)
        wait_until(lambda: is_idle(conn), 120, "the last batches to end")
        for worker in workers:
            worker.stop()
        seen = verdict(conn)
        seen.figures |= {"kills": kills, **lags(conn)}
    return seen


def kill_some(processes: Processes, workers: list[Process], rng: random.Random, *, both: bool) -> int:
    """Kill one worker, or both and leave them dead for some seconds; start others. Return how many were killed."""
    numbers = range(len(workers)) if both else [rng.randrange(len(workers))]
    for number in numbers:
        workers[number].kill()
    if both:
        time.sleep(rng.uniform(3, 12))
    for number in numbers:
        workers[number] = processes.worker(lease_seconds=2)
    return len(numbers)


def punctual(place: Place, *, seconds: float) -> Seen:
    """One idle worker and a schedule for each second of ten: how late handlers begin."""
    with place.connect() as conn, place.processes() as processes:
        for number in range(10):
            payload = f'{{"schedule": "p{number}", "tick": null}}'
            conn.execute(
                "INSERT INTO batchq.schedules (name, cron, kind, payload) VALUES (%s, %s, 'tick', %s)",
                [f"p{number}", f"{number}/10 * * * * *", payload],
            )
        worker = processes.worker()
        time.sleep(START_SECONDS)
        started_at = conn.execute("SELECT now()").fetchall()[0][0]
        time.sleep(seconds)
        stop_ticking(conn)
        wait_until(lambda: is_idle(conn), 60, "the last batches to end")
        worker.stop()
        seen = verdict(conn)
        seen.figures |= lags(conn, started_at)
    return seen


def stop_ticking(conn: psycopg.Connection[Any]) -> None:
    """Pause all schedules. What is declared stays as it is: its worker has it in code."""
    conn.execute("UPDATE batchq.schedules SET paused = true")


def is_idle(conn: psycopg.Connection[Any]) -> bool:
    """Return whether nothing waits or runs."""
    return not conn.execute("SELECT 1 FROM batchq.batches_live LIMIT 1").fetchall()


def verdict(conn: psycopg.Connection[Any]) -> Seen:
    """Compare the batches with the ticks that were due, schedule by schedule."""
    seen = Seen()
    made: dict[str, list[float]] = {}
    for name, tick in conn.execute(BATCHES).fetchall():
        made.setdefault(name, []).append(tick)
    totals: Counter[str] = Counter()
    for name, cron, zone, changed_at, next_at, batches, missed, overlapped, error in conn.execute(SCHEDULES).fetchall():
        due = due_ticks(cron, zone, changed_at, next_at)
        found = made.get(name, [])
        totals += Counter(ticks=len(due), batches=len(found), missed=missed)
        doubled = len(found) - len(set(found))
        problems = {
            "error": error,
            "doubled": doubled,
            "not due": len(set(found) - due),
            "not accounted for": len(due) - batches - missed - overlapped,
            "not counted": len(found) - batches,
        }
        seen.faults += [f"{name} ({cron}): {what}: {number}" for what, number in problems.items() if number]
    seen.figures = {"ticks": 0, "batches": 0, "missed": 0} | dict(totals)
    if not totals["batches"]:
        seen.faults.append("no batch was made")
    return seen


def due_ticks(cron: str, zone: str, after: datetime, next_at: datetime) -> set[float]:
    """Return the ticks from the first one to the last one before the next, in seconds since 1970."""
    found = set()
    for tick in ticks(cron, zone, after.astimezone(UTC)):
        if tick >= next_at:
            return found
        found.add(tick.timestamp())
    return found


def lags(conn: psycopg.Connection[Any], since: str | datetime = "-infinity") -> dict[str, float]:
    """Return how late handlers began, in milliseconds, of ticks after *since*."""
    found = [1000 * lag for (lag,) in conn.execute(LAGS.encode(), [since]).fetchall()]
    return {f"p{number}_ms": round(percentile(found, number / 100), 1) for number in (50, 90, 99, 100)}


def percentile(numbers: Iterable[float], part: float) -> float:
    """Return a percentile of sorted numbers."""
    found = list(numbers)
    return found[min(int(part * len(found)), len(found) - 1)] if found else 0.0
