"""Fill a queue with batches of about 100 bytes, numbered from 0."""

from typing import Any

import psycopg

from batchq import enqueue_many
from tests.instruments.bench.server import Database

PAD = "x" * 50
COPY_MOST = 200_000
CHUNK = 1_000_000

BY_SQL = """
INSERT INTO batchq.batches (kind, payload)
SELECT 'noop', jsonb_build_object('seq', n, 'to', 'user@example.com', 'pad', repeat('x', 50))
FROM generate_series(%s::bigint, %s::bigint) AS n
"""


def payload(number: int) -> dict[str, Any]:
    """Return the payload of a batch: 100 bytes of JSON."""
    return {"seq": number, "to": "user@example.com", "pad": PAD}


def fill(database: Database, count: int) -> None:
    """Enqueue *count* no-op batches, many of them by SQL, and let the database come to rest."""
    if count <= COPY_MOST:
        enqueue_many(database.conn, "noop", (payload(number) for number in range(count)))
    else:
        fill_by_sql(database.conn, count)
    database.settle()


def fill_by_sql(conn: psycopg.Connection, count: int) -> None:
    """Enqueue by INSERT .. SELECT, a million a transaction."""
    for first in range(0, count, CHUNK):
        conn.execute(BY_SQL, [first, min(first + CHUNK, count) - 1])
