"""What is tried, and its verdict: each function fills a database, runs workers, breaks them, and tells what it saw."""

import random
import threading
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import psycopg

from tests.instruments.limits.apps import NAP_SECONDS
from tests.support.processes import Process, Processes
from tests.support.trials import Place, Seen, value
from tests.support.waiting import wait_until

APP = "tests.instruments.limits.apps:app"
TABLES = """
DROP TABLE IF EXISTS spans, calls;
CREATE TABLE spans (batch_id bigint, attempt integer, key text, pid integer,
  began_at timestamptz DEFAULT clock_timestamp(), ended_at timestamptz, PRIMARY KEY (batch_id, attempt));
CREATE TABLE calls (item bigint, pid integer, at timestamptz DEFAULT clock_timestamp());
TRUNCATE batchq.batches, batchq.batches_finished;
TRUNCATE batchq.failed_items;
DELETE FROM batchq.limits;
"""
MOST_AT_ONCE = """
SELECT coalesce(max(n), 0) FROM (
  SELECT sum(d) OVER (ORDER BY at, d) AS n
  FROM (SELECT began_at AS at, 1 AS d FROM spans WHERE ended_at IS NOT NULL
        UNION ALL SELECT ended_at, -1 FROM spans WHERE ended_at IS NOT NULL) e) s
"""
# Seconds of work in each second since the first, of batches that ended.
BUSY = """
SELECT second, coalesce(sum(extract(epoch FROM
  least(s.ended_at, t.at + interval '1 s') - greatest(s.began_at, t.at))), 0)::float8
FROM (SELECT second, (SELECT min(began_at) FROM spans) + second * interval '1 s' AS at
      FROM generate_series(0, %(seconds)s) AS second) t
LEFT JOIN spans s ON s.ended_at > t.at AND s.began_at < t.at + interval '1 s'
GROUP BY second ORDER BY second
"""
# Of each key: a batch began while another had not ended, or one ended out of its order.
PAIRS = """
WITH events AS (
  SELECT key, batch_id, attempt, pid, began_at AS at, 'b' AS what FROM spans
  UNION ALL SELECT key, batch_id, attempt, pid, ended_at, 'e' FROM spans WHERE ended_at IS NOT NULL
), pairs AS (
  SELECT *, lag(batch_id) OVER w AS last_id, lag(what) OVER w AS last FROM events
  WINDOW w AS (PARTITION BY key ORDER BY at, what DESC)
), wrong AS (
  SELECT * FROM pairs
  WHERE CASE WHEN what = 'e' THEN last_id <> batch_id OR last <> 'b'
             WHEN last = 'b' THEN last_id <> batch_id
             ELSE batch_id <= last_id END
)
"""
OUT_OF_ORDER = f"{PAIRS} SELECT count(*) FROM wrong"
NEAR_FAULTS = f"""{PAIRS}
SELECT p.key, p.batch_id, p.attempt, p.pid, p.what, p.at::time::text, p.key = w.key AND p.at = w.at AS is_wrong
FROM (SELECT * FROM wrong ORDER BY at LIMIT 3) w
JOIN pairs p ON p.key = w.key AND p.at BETWEEN w.at - interval '6 s' AND w.at + interval '1 s'
  AND p.batch_id BETWEEN w.batch_id - 150 AND w.batch_id + 150
ORDER BY p.key, p.at
"""
ENDED_TWICE = "SELECT count(*) - count(DISTINCT batch_id) FROM spans WHERE ended_at IS NOT NULL"
LAST_FIRST_CLAIM = """
SELECT max(first)
FROM (SELECT min(claimed_at) AS first FROM batchq.batches_finished WHERE key <> 'hot' GROUP BY key) f
"""
MANY_ITEMS = """
INSERT INTO batchq.batches (kind, items)
SELECT 'items', (SELECT jsonb_agg(n) FROM generate_series(1, 1000) n) FROM generate_series(1, %s)
"""
HOT = "INSERT INTO batchq.batches (kind, key) SELECT 'plain', 'hot' FROM generate_series(1, %s)"
SMALL = "INSERT INTO batchq.batches (kind, key) SELECT 'plain', 'c' || mod(n, %s) FROM generate_series(1, %s) n"
FEW_ITEMS = "INSERT INTO batchq.batches (kind, items, priority) SELECT 'throttled', to_jsonb(ARRAY[99, 100, 101]), -1"
LIVE = "SELECT EXISTS (SELECT 1 FROM batchq.batches_live)"
GRACE_SECONDS = 1.5  # until a share that came back is in use again


def running(
    place: Place, *, seconds: float, fault_every_seconds: float, lease_seconds: float = 4, seed: int = 1
) -> Seen:
    """max_running = 10 over 4 processes of 8 slots, with kills, SIGSTOP and restarts of the server."""
    seen, rng, limit = Seen(), random.Random(seed), 10
    with place.connect() as conn:
        conn.execute(TABLES.encode())
        conn.execute("INSERT INTO batchq.limits (kind, max_running) VALUES ('running', %s)", [limit])
        count = int(seconds * limit / NAP_SECONDS) + 100
        conn.execute(
            "INSERT INTO batchq.batches (kind, max_attempts) SELECT 'running', 1000 FROM generate_series(1, %s)",
            [count],
        )
    with place.processes() as processes:
        fleet = [processes.worker(lease_seconds=lease_seconds) for _ in range(4)]
        began_at, faults = time.monotonic(), list[tuple[str, float]]()
        hurt_until = 0.0
        while time.monotonic() - began_at < seconds:
            time.sleep(0.2)
            if time.monotonic() - began_at > (faults[-1][1] if faults else 2) + fault_every_seconds:
                name = rng.choice(["kill", "freeze", "restart"] if place.restart else ["kill", "freeze"])
                faults.append((name, time.monotonic() - began_at))
                _hurt(place, processes, fleet, name, rng, lease_seconds)
                hurt_until = time.monotonic() - began_at + lease_seconds + 2
        for process in fleet:
            process.stop()
    with place.connect() as conn:
        seen.figures["most at once"] = most = value(conn, MOST_AT_ONCE)
        busy = [row[1] for row in conn.execute(BUSY.encode(), {"seconds": int(seconds) - 4}).fetchall()]
        doubled = value(conn, ENDED_TWICE)
    calm = [work for second, work in enumerate(busy) if second > 3 and not _is_hurt(second, faults, lease_seconds)]
    seen.figures |= {
        "busy in the mean, outside the seconds after a fault": round(sum(calm) / max(len(calm), 1), 2),
        "calm seconds": len(calm),
        "faults": [f"{name} at {at:.0f} s" for name, at in faults],
        "by second": [round(work, 1) for work in busy],
        "last share back by": round(hurt_until, 1),
    }
    seen.must(most <= limit, f"{most} at once, over the limit of {limit}")
    seen.must(doubled == 0, f"{doubled} batches ended twice")
    seen.must(bool(calm) and sum(calm) / len(calm) >= 0.95 * limit, "not fully used outside the seconds after a fault")
    return seen


def _is_hurt(second: int, faults: list[tuple[str, float]], lease_seconds: float) -> bool:
    return any(at - 1 <= second <= at + 2 * lease_seconds + 4 + GRACE_SECONDS for _, at in faults)


def _hurt(
    place: Place, processes: Processes, fleet: list[Process], name: str, rng: random.Random, lease_seconds: float
) -> None:
    number = rng.randrange(len(fleet))
    if name == "restart" and place.restart:
        place.restart()
    elif name == "kill":
        fleet[number].kill()
        fleet[number] = processes.worker(lease_seconds=lease_seconds)
    else:
        fleet[number].freeze()
        time.sleep(lease_seconds + 3)
        fleet[number].thaw()


def items(place: Place, *, seconds: float, workers: int = 3) -> Seen:
    """items_per_second = 50 over several processes, batches of 1,000 items."""
    seen, rate = Seen(), 50
    with place.connect() as conn:
        conn.execute(TABLES.encode())
        conn.execute("INSERT INTO batchq.limits (kind, items_per_second) VALUES ('items', %s)", [rate])
        conn.execute(MANY_ITEMS.encode(), [120 * workers])
    with place.processes() as processes:
        fleet = [processes.worker() for _ in range(workers)]
        time.sleep(seconds)
        for process in fleet:
            process.stop()
    with place.connect() as conn:
        times = [row[0] for row in conn.execute(
            "SELECT extract(epoch FROM at - min(at) OVER ())::float8 FROM calls ORDER BY at").fetchall()]  # fmt: skip
        pids = value(conn, "SELECT count(DISTINCT pid) FROM calls")
    steady = [at for at in times if 3 <= at <= times[-1] - 1.5]
    tens = [sum(start <= at < start + 10 for at in steady) / 10 for start in range(3, int(steady[-1]) - 10)]
    ones = [sum(start / 10 <= at < start / 10 + 1 for at in times) for start in range(int(10 * times[-1]))]
    seen.figures = {
        "least and most per second, over any 10 s": (min(tens), max(tens)),
        "most in any second": max(ones),
        "in the second after 2 s": sum(2 <= at < 3 for at in times),
        "processes": pids,
    }
    seen.must(min(tens) >= 49, f"{min(tens)} a second over 10 s is too few")
    seen.must(max(tens) <= 50.2, f"{max(tens)} a second over 10 s is too many")
    seen.must(max(ones) <= 2 * rate, f"{max(ones)} in one second is over the rate and the burst")
    seen.must(sum(2 <= at < 3 for at in times) >= 45, "not at the rate after 2 s")
    seen.must(pids == workers or workers > 1, f"{pids} processes took part")
    return seen


def ordered(place: Place, *, batches: int, workers: int, kill_every_seconds: float, seed: int = 1) -> Seen:
    """50 keys with a limit of one; a tenth of the batches fails once; kills."""
    seen, rng = Seen(), random.Random(seed)
    with place.connect() as conn:
        conn.execute(TABLES.encode())
        conn.execute("INSERT INTO batchq.limits (kind, max_running_per_key) VALUES ('ordered', 1)")
        conn.execute(
            "INSERT INTO batchq.batches (kind, key, max_attempts) SELECT 'ordered', 'k' || mod(n, 50), 1000 "
            "FROM generate_series(1, %s) n", [batches],
        )  # fmt: skip
        with place.processes() as processes:
            fleet = [processes.worker(lease_seconds=3) for _ in range(workers)]
            began_at = killed_at = time.monotonic()
            kills = 0
            while value(conn, LIVE):
                time.sleep(0.2)
                if time.monotonic() - killed_at > kill_every_seconds:
                    killed_at, number = time.monotonic(), rng.randrange(workers)
                    fleet[number].kill()
                    fleet[number] = processes.worker(lease_seconds=3)
                    kills += 1
            took = time.monotonic() - began_at
            for process in fleet:
                process.stop()
        faults = value(conn, OUT_OF_ORDER)
        near = conn.execute(NEAR_FAULTS.encode()).fetchall() if faults else []
        done = value(conn, "SELECT count(DISTINCT batch_id) FROM spans WHERE ended_at IS NOT NULL")
        ends = value(conn, "SELECT count(*) FROM spans WHERE ended_at IS NOT NULL")
        first = value(conn, "SELECT min(id) FROM batchq.all_batches")
    seen.figures = {"batches": done, "kills": kills, "per second": round(batches / took), "first id": first}
    seen.figures |= {"near the faults": near} if near else {}
    seen.must(faults == 0, f"{faults} faults of order")
    seen.must(done == ends == batches, f"{done} done, {ends} ends, of {batches}")
    return seen


def shards(
    place: Place, *, batches: int, workers: int, kill_every_seconds: float, splits: Sequence[int], seed: int = 1
) -> Seen:
    """A queue in shards: 50 keys with a limit of one and as many batches without a key, put in bit by bit; kills; and
    again and again shards are added while workers and the producer go on."""
    seen, rng = Seen(), random.Random(seed)
    with place.connect() as conn, place.processes() as processes:
        conn.execute(TABLES.encode())
        conn.execute("INSERT INTO batchq.limits (kind, max_running_per_key) VALUES ('ordered', 1)")
        fleet = [processes.worker(lease_seconds=3) for _ in range(workers)]
        producer = threading.Thread(target=_produce, args=[place, batches])
        producer.start()
        left, waits = list(splits), []
        began_at = killed_at = time.monotonic()
        kills = 0
        while producer.is_alive() or value(conn, LIVE):
            time.sleep(0.2)
            put_in = value(conn, "SELECT last_value FROM batchq.batches_id_seq")
            if left and put_in > 2 * batches * (len(splits) - len(left) + 1) / (len(splits) + 1):
                waits.append(_split(conn, left.pop(0)))
            if time.monotonic() - killed_at > kill_every_seconds:
                killed_at, number = time.monotonic(), rng.randrange(workers)
                fleet[number].kill()
                fleet[number] = processes.worker(lease_seconds=3)
                kills += 1
        took = time.monotonic() - began_at
        producer.join()
        for process in fleet:
            process.stop()
        _judge_shards(conn, seen, batches)
    seen.must(not left, f"not split into {left}")
    seen.figures |= {"kills": kills, "per second": round(2 * batches / took), "splits took": waits}
    return seen


def _produce(place: Place, batches: int) -> None:
    """Put in batches with a key and without, 20 of each at a time, and not far ahead of the workers, so that the splits
    meet work."""
    with place.connect() as conn:
        for first in range(0, batches, 20):
            while value(conn, "SELECT count(*) FROM batchq.batches_live") > 400:
                time.sleep(0.01)
            conn.execute(
                "INSERT INTO batchq.batches (kind, key, max_attempts) "
                "SELECT 'ordered', 'k' || mod(n, 50), 1000 FROM generate_series(%s::integer, %s::integer) n UNION ALL "
                "SELECT 'plain', NULL, 1000 FROM generate_series(%s::integer, %s::integer) n",
                [first, min(first + 20, batches) - 1] * 2,
            )


def _split(conn: psycopg.Connection[Any], into: int) -> float:
    """Split the queue, and return how many seconds that took, waiting for its turn included."""
    began_at = time.monotonic()
    while True:
        try:
            conn.execute("SELECT batchq.split_queue('default', %s)", [into])
            return round(time.monotonic() - began_at, 2)
        except psycopg.errors.LockNotAvailable:
            time.sleep(0.1)


def _judge_shards(conn: psycopg.Connection[Any], seen: Seen, batches: int) -> None:
    faults = value(conn, OUT_OF_ORDER)
    seen.must(
        faults == 0, f"{faults} faults of order: {conn.execute(NEAR_FAULTS.encode()).fetchall() if faults else ''}"
    )
    done = value(conn, "SELECT count(DISTINCT batch_id) FROM spans WHERE ended_at IS NOT NULL")
    ends = value(conn, "SELECT count(*) FROM spans WHERE ended_at IS NOT NULL")
    seen.must(done == ends == batches, f"{done} done, {ends} ends, of {batches}")
    completed = "SELECT count(*) FROM batchq.batches_finished WHERE status = 'completed' AND kind = 'plain'"
    plain = value(conn, completed)
    seen.must(plain == batches, f"{plain} without a key completed, of {batches}")
    used = value(conn, "SELECT count(DISTINCT queue) FROM batchq.batches_finished")
    seen.figures |= {"batches": 2 * batches, "shards used": used}


def keys(place: Place, *, small_keys: int, hot_batches: int, rounds: int = 1) -> Seen:
    """Many keys with 10 batches each and one with many; beside it the same number without keys, in alternation."""
    seen = Seen()
    total = 10 * small_keys + hot_batches
    rates: dict[str, list[float]] = {"keyed": [], "plain": []}
    for _ in range(rounds):
        for name in ("plain", "keyed"):
            with place.connect() as conn:
                conn.execute(TABLES.encode())
                if name == "plain":
                    conn.execute(
                        "INSERT INTO batchq.batches (kind) SELECT 'plain' FROM generate_series(1, %s)", [total]
                    )
                else:
                    conn.execute(HOT.encode(), [hot_batches])
                    conn.execute(SMALL.encode(), [small_keys, 10 * small_keys])
                conn.execute("VACUUM ANALYZE batchq.batches_live")
                rates[name].append(total / _drain(place, conn))
                if name == "keyed":
                    _judge_turns(conn, seen, small_keys)
    ratio = sum(rates["keyed"]) / sum(rates["plain"])
    seen.figures |= {name: [round(rate) for rate in found] for name, found in rates.items()} | {
        "ratio": round(ratio, 2)
    }
    seen.must(ratio >= 0.6, f"with keys {ratio:.2f} of the rate without")
    return seen


def shard_rates(place: Place, *, batches: int, rounds: int, workers: int = 1) -> Seen:
    """A queue in 8 shards beside one that is not split, in alternation: batches without and with a key, drained."""
    seen = Seen()
    rates: dict[str, list[float]] = {f"{queue} {what}": [] for what in ("plain", "keyed") for queue in ("one", "eight")}
    with place.connect() as conn:
        conn.execute(TABLES.encode())
        conn.execute("SELECT batchq.split_queue('eight', 8)")
        for _ in range(rounds):
            for name, found in rates.items():
                queue, what = name.split()
                conn.execute("TRUNCATE batchq.batches")
                conn.execute(
                    "INSERT INTO batchq.batches (queue, kind, key) "
                    "SELECT %s, 'plain', CASE %s WHEN 'keyed' THEN 'k' || n %% 1000 END FROM generate_series(1, %s) n",
                    [queue, what, batches],
                )
                conn.execute("VACUUM ANALYZE batchq.batches_live")
                found.append(batches / _drain(place, conn, workers, queues=queue))
    seen.figures |= {name: [round(rate) for rate in found] for name, found in rates.items()}
    for what in ("plain", "keyed"):
        ratio = median(rates[f"eight {what}"]) / median(rates[f"one {what}"])
        seen.figures[f"ratio {what}"] = round(ratio, 2)
        seen.must(ratio >= 0.9, f"in 8 shards {ratio:.2f} of the rate of one, {what}")
    return seen


def _drain(place: Place, conn: psycopg.Connection[Any], workers: int = 1, **settings: object) -> float:
    with place.processes() as processes:
        fleet = [processes.worker(**settings) for _ in range(workers)]
        while value(conn, LIVE):
            time.sleep(0.2)
        for worker in fleet:
            worker.stop()
    span = "SELECT extract(epoch FROM max(finished_at) - min(claimed_at))::float8 FROM batchq.batches_finished"
    return float(value(conn, span))


def _judge_turns(conn: psycopg.Connection[Any], seen: Seen, small_keys: int) -> None:
    """The first batch of every small key must begin in the first round, but for the claims in flight."""
    last_first = value(conn, LAST_FIRST_CLAIM)
    before = value(conn, "SELECT count(*) FROM batchq.batches_finished WHERE claimed_at <= %s", [last_first])
    seen.figures["batches claimed until every small key had its first"] = before
    seen.must(
        before <= 1.2 * small_keys + 3000, f"{before} batches were claimed before every key of {small_keys} had one"
    )


def throttled(place: Place) -> Seen:
    """One of 3 processes is throttled for 3 s: who begins within them, and when do they go on?"""
    seen = Seen()
    with place.connect() as conn:
        conn.execute(TABLES.encode())
        conn.execute("INSERT INTO batchq.limits (kind, items_per_second) VALUES ('throttled', 10000)")
        conn.execute(
            "INSERT INTO batchq.batches (kind, items) "
            "SELECT 'throttled', (SELECT jsonb_agg(i) FROM generate_series(n * 1000, n * 1000 + 299) i) "
            "FROM generate_series(1, 24) n"
        )
        with place.processes() as processes:
            fleet = [processes.worker(concurrency=2) for _ in range(3)]
            time.sleep(2)
            conn.execute(FEW_ITEMS.encode())
            wait_until(lambda: value(conn, "SELECT count(*) FROM calls WHERE item = 100") == 2, 60, "it to go on")
            wait_until(lambda: not value(conn, LIVE), 60, "the end")
            for process in fleet:
                process.stop()
        at = "(SELECT min(at) FROM calls WHERE item = 100)"
        late = value(conn, f"SELECT coalesce(max(extract(epoch FROM at - {at})), 0)::float8 FROM calls "
                           f"WHERE at > {at} AND at < {at} + interval '2.5 s'")  # fmt: skip
        again = value(
            conn, f"SELECT extract(epoch FROM min(at) - {at})::float8 FROM calls WHERE at > {at} + interval '2.5 s'"
        )
        done = value(conn, "SELECT count(DISTINCT item) FROM calls")
    seen.figures = {"last call of another process, seconds after": round(late, 2), "goes on after": round(again, 2)}
    seen.must(late < 2.0, f"a call began {late:.2f} s after")  # a busy machine reads late
    seen.must(2.9 <= again < 7, f"it went on after {again:.2f} s")
    seen.must(done == 24 * 300 + 3, f"{done} items were called")
    return seen
