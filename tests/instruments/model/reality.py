"""The database of the model's tests: three workers with connections of their own; the rows as the model has them."""

import threading
from collections import Counter
from typing import Any

import psycopg
from psycopg import sql

import batchq
from batchq.app import Handler
from batchq.batch.claimed import Runtime
from batchq.postgres.handler_connections import HandlerConnections
from batchq.postgres.link import Link
from batchq.postgres.statements import health
from batchq.retry import Backoff
from batchq.worker.finisher import Finisher
from tests.instruments.model.state import Failure, Row

LEASE_SECONDS = 3600.0  # runs out only where a step says so
LATER_SECONDS = 3600.0  # a retry, a snooze or a run_at that does not come within the tests
KINDS = ("mail", "index")
AT_ONCE = ("index", "transactional")  # a failed attempt is followed by the next at once
QUEUES = ("default", "other")
KEYS = ("ann", "bob")

LOOK = """
SELECT b.id, b.queue, b.kind, b.priority, b.unique_key, b.max_attempts, b.max_failed_items, b.items_total, b.key,
  b.status, b.run_at <= now(),
  b.key IS NOT NULL AND b.claimed_at IS NOT NULL AND b.finished_at IS NULL, b.attempt, b.claimed_by, b.claim_token,
  CASE WHEN b.lease_expires_at < now() THEN 'ran out'
       WHEN b.lease_expires_at <= now() + interval '1 hour' THEN 'running'
       WHEN b.lease_expires_at IS NOT NULL THEN 'too long' END,
  b.items_done, b.items_failed, b.cursor, b.result,
  (SELECT coalesce(jsonb_agg(jsonb_build_array(e.value -> 'attempt', e.value -> 'error') ORDER BY e.ordinality), '[]')
   FROM jsonb_array_elements(b.errors) WITH ORDINALITY e),
  (SELECT coalesce(jsonb_agg(jsonb_build_array(f.item_index, f.attempt, f.retryable, f.error, f.item)), '[]')
   FROM batchq.failed_items f
   WHERE f.batch_id = b.id AND f.queue = b.queue),
  coalesce(b.finished_at < now() - interval '20 days', false)
FROM batchq.all_batches b
ORDER BY b.id
"""
INVARIANTS = " UNION ALL ".join(
    f"SELECT '{name}', x::text FROM ({query.decode()}) AS x" for name, query in health.invariants().items()
)
CLEAN = """
DELETE FROM batchq.batches; DELETE FROM batchq.batches_finished; DELETE FROM batchq.failed_items;
DELETE FROM effects; DELETE FROM batchq.limits
"""
COLLECT = "SELECT batchq.collect_flows(10000)"  # as a worker does; where there are triggers, nothing is left to do


class Worker:
    """One worker's parts: its own connection, and how it writes what has ended."""

    def __init__(self, dsn: str, number: int, connections: HandlerConnections) -> None:
        self.name = f"worker-{number}"
        self.link = Link(dsn, 10)
        self.runtimes = {keep: Runtime(connections, LEASE_SECONDS, threading.Event(), keep) for keep in (True, False)}
        self.finishers = {keep: Finisher(self.link, lambda: None, keep) for keep in (True, False)}


class Reality:
    """The workers, a person's connection, and the handlers. *failing*: the items that fail when they are worked."""

    def __init__(self, dsn: str) -> None:
        self.conn = psycopg.connect(dsn, autocommit=True, prepare_threshold=None)
        self.conn.execute("CREATE TABLE effects (batch_id bigint NOT NULL, item_index integer NOT NULL)")
        drop_partitions_ahead(self.conn)
        self.looker = psycopg.connect(dsn, autocommit=True, prepare_threshold=0)  # a plan takes longer than the look
        self.connections = HandlerConnections(dsn, 8, 10, 60)
        self.connections.open()
        self.workers = [Worker(dsn, number, self.connections) for number in range(3)]
        self.failing: frozenset[int] = frozenset()
        self.batch_id = 0
        self.handlers = self.registered()

    def registered(self) -> dict[str, Handler]:
        """Return the handlers: one a kind that is never called, and two that work items."""
        app, later = batchq.App(), Backoff(2 * LATER_SECONDS, 2 * LATER_SECONDS)
        at_once = Backoff(0, 0)
        for kind in KINDS:
            app.handler(kind, backoff=at_once if kind in AT_ONCE else later)(never_called)

        def work(item: str) -> None:
            self.fail_if_failing(item)

        def work_in_transaction(item: str, conn: psycopg.Connection[Any]) -> None:
            add_effect(conn, self.batch_id, number_of(item))
            self.fail_if_failing(item)

        app.item_handler("plain", backoff=later, chunk_size=2)(work)
        app.item_handler("transactional", backoff=at_once, chunk_size=2, transactional=True)(work_in_transaction)
        return dict(app.handlers)

    def fail_if_failing(self, item: str) -> None:
        """Raise for the items that are to fail."""
        if number_of(item) in self.failing:
            raise ValueError(f"{item} fails")

    def close(self) -> None:
        """Close all connections."""
        for worker in self.workers:
            worker.link.close()
        self.connections.close()
        self.looker.close()
        self.conn.close()

    def clean(self) -> None:
        """Leave no batch: the database is the same for all lives."""
        self.conn.execute(CLEAN)

    def rows(self) -> dict[int, Row]:
        """Return every batch as the model has it."""
        found = [as_row(row) for row in self.looker.execute(LOOK).fetchall()]
        rows = {row.id: row for row in found}
        assert len(rows) == len(found), "a batch is there more than once"
        return rows

    def effects(self) -> Counter[tuple[int, int]]:
        """Return how often each of the handlers' own rows is there."""
        return Counter(self.looker.execute("SELECT batch_id, item_index FROM effects").fetchall())

    def broken_invariants(self) -> list[Any]:
        """Return what breaks an invariant of batchq/operate/invariants.sql."""
        return broken_invariants(self.looker)

    def values(self, query: str, parameters: Any = None) -> list[Any]:
        """Return the first column of a query."""
        return [row[0] for row in self.conn.execute(query.encode(), parameters).fetchall()]


def broken_invariants(conn: psycopg.Connection[Any]) -> list[Any]:
    """Return what breaks an invariant of batchq/operate/invariants.sql, in order: name, batch and what is wrong."""
    return sorted(conn.execute(INVARIANTS.encode()).fetchall())


def drop_partitions_ahead(conn: psycopg.Connection[Any]) -> None:
    """Drop all finished partitions but today's and tomorrow's: each makes every look slower."""
    query = "SELECT relname FROM pg_class WHERE relname ~ '^finished_[0-9]{8}$' ORDER BY relname OFFSET 2"
    for (name,) in conn.execute(query).fetchall():
        conn.execute(sql.SQL("DROP TABLE batchq.{}").format(sql.Identifier(name)))


def never_called(batch: batchq.Batch) -> None:
    """Stand for a handler: the tests say how it ends."""


def as_row(found: tuple[Any, ...]) -> Row:
    """Return a row of LOOK as the model has it."""
    *plain, errors, failures, is_old = found
    return Row(
        *plain,
        errors=[(attempt, error) for attempt, error in errors],
        failures={index: Failure(*failure) for index, *failure in failures},
        is_old=is_old,
    )


def item(number: int) -> str:
    """Return the item of a number."""
    return f"item {number}"


def number_of(name: str) -> int:
    """Return the number of an item."""
    return int(name.split()[1])


def add_effect(conn: psycopg.Connection[Any], batch_id: int, item_index: int) -> None:
    """Write a handler's own row."""
    conn.execute("INSERT INTO effects VALUES (%s, %s)", [batch_id, item_index])
