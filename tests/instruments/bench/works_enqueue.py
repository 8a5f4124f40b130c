"""How fast batches come into the queue."""

import json
import time
from collections.abc import Callable, Iterator

import psycopg

from batchq import enqueue as enqueue_one
from batchq import enqueue_many
from tests.instruments.bench import filling
from tests.instruments.bench.records import one_row
from tests.instruments.bench.server import Meter
from tests.instruments.bench.work import Bench, Run, work

GROUP = 1000
Way = Callable[[psycopg.Connection, int], None]


@work
def enqueue(bench: Bench) -> Iterator[Run]:
    """W1: how many batches of about 100 bytes one client enqueues per second, with durable commits.

    In bulk by enqueue_many, 1,000 per call; by enqueue, one transaction each; and by SQL: an INSERT of 1,000 rows,
    and one INSERT .. SELECT of all rows. Verified: each number is there once.
    """
    many, few = bench.sizes.number("enqueue.batches"), bench.sizes.number("enqueue.single")
    for _ in bench.times("enqueue"):
        for variant, way, count in (
            ("enqueue_many, 1,000 a call", in_bulk, many),
            ("enqueue, one a transaction", one_by_one, few),
            ("SQL: INSERT of 1,000 rows", by_values, many),
            ("SQL: one INSERT .. SELECT", filling.fill_by_sql, many),
        ):
            yield one_enqueue(bench, variant, way, count)


def one_enqueue(bench: Bench, variant: str, way: Way, count: int) -> Run:
    """Enqueue *count* batches into a fresh database, and look whether they are there."""
    with bench.database() as database:
        database.settle()
        meter, began_at = Meter(database).start(), time.monotonic()
        way(database.conn, count)
        seconds = time.monotonic() - began_at
        figures = {"per_s": round(count / seconds), **meter.stop().per_batch(count)}
        found = one_row(
            database.conn,
            "SELECT count(*), count(DISTINCT payload -> 'seq'), coalesce(max((payload ->> 'seq')::bigint), 0)"
            " FROM batchq.all_batches WHERE status = 'pending'",
        )
    problems = [] if found == (count, count, count - 1) else [f"{count} were enqueued, and {found} are there"]
    return Run("enqueue", variant, figures, problems)


def in_bulk(conn: psycopg.Connection, count: int) -> None:
    """Enqueue by enqueue_many."""
    for first in range(0, count, GROUP):
        enqueue_many(conn, "noop", map(filling.payload, range(first, min(first + GROUP, count))))


def one_by_one(conn: psycopg.Connection, count: int) -> None:
    """Enqueue by enqueue, which commits each."""
    for number in range(count):
        enqueue_one(conn, "noop", filling.payload(number))


def by_values(conn: psycopg.Connection, count: int) -> None:
    """Enqueue by INSERT .. VALUES of many rows."""
    for first in range(0, count, GROUP):
        payloads = [json.dumps(filling.payload(number)) for number in range(first, min(first + GROUP, count))]
        rows = ", ".join(["('noop', %s)"] * len(payloads))
        conn.execute(f"INSERT INTO batchq.batches (kind, payload) VALUES {rows}".encode(), payloads)
