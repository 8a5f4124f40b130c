"""The producer: keeps enough in the queue that no worker is ever idle, past every pooler and proxy."""

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Self

import psycopg

import batchq
from tests.instruments.chaos import flows
from tests.instruments.chaos.orders import ORDERS, Order, items, key, payload
from tests.instruments.chaos.spans import QUEUE

TOGETHER: dict[str, list[Order]] = {}  # by style; kinds with limits by themselves, since any may hold up another
for _order in ORDERS.values():
    if _order.share:
        TOGETHER.setdefault(_order.kind if _order.queue == QUEUE else _order.style, []).append(_order)
READY = """
SELECT kind, count(*)
FROM batchq.batches_live
WHERE status = 'pending' AND run_at <= now() OR status = 'waiting'
GROUP BY kind
"""
PAUSE_SECONDS = 0.1
AHEAD = -1  # a priority


class Producer:
    """Keeps *backlog* batches of each style, and of each kind with limits, ready. With each lot, in its transaction,
    comes a row of ``produced``."""

    def __init__(self, connect: Callable[[], psycopg.Connection[Any]], backlog: int) -> None:
        self.connect = connect
        self.backlog = backlog
        self.next_seq = 0
        self.lock = threading.Lock()
        self.known_lots: list[tuple[int, int]] = []
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self.run, name="producer")

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Enqueue no more."""
        self.ending.set()
        self.thread.join()

    def run(self) -> None:
        """Enqueue until told to end; connect again when the server was away."""
        while not self.ending.is_set():
            with suppress(psycopg.Error), self.connect() as conn:
                while not self.ending.wait(PAUSE_SECONDS):
                    self.fill(conn)
            self.ending.wait(PAUSE_SECONDS)

    def fill(self, conn: psycopg.Connection[Any]) -> None:
        """Enqueue until there is enough of each style, and of each kind with limits."""
        ready: dict[str, int] = dict(conn.execute(READY.encode()).fetchall())
        for orders in TOGETHER.values():
            missing = self.backlog - sum(ready.get(order.kind, 0) for order in orders)
            if missing > 0:
                self.enqueue_lots(conn, orders, -(-missing // sum(order.share for order in orders)))

    def enqueue_lots(self, conn: psycopg.Connection[Any], orders: Sequence[Order], times: int) -> None:
        """Enqueue some of each kind, by its share."""
        with conn.transaction():
            lots = [lot for order in orders for lot in self.enqueue(conn, order, times * order.share)]
        self.known_lots += lots

    def order(self, kind: str, count: int, **more: Any) -> None:
        """Enqueue *count* of one kind, ahead of all others; *more* goes into the payload."""
        with self.connect() as conn:
            with conn.transaction():
                lots = self.enqueue(conn, ORDERS[kind], count, AHEAD, **more)
            self.known_lots += lots

    def enqueue(
        self, conn: psycopg.Connection[Any], order: Order, count: int, priority: int = 0, **more: Any
    ) -> list[tuple[int, int]]:
        """Enqueue some of a kind in the caller's transaction; return the first number and the count of each lot."""
        lot, payloads = self.numbered(conn, order, count, more)
        options: dict[str, Any] = {"queue": order.queue, "max_attempts": order.max_attempts, "priority": priority}
        if order.kind == "fan_in":
            needed_lot, needed = self.numbered(conn, ORDERS["needed"], flows.NEEDED * count, {})
            for number, each in enumerate(payloads):
                flows.enqueue_fan_in(conn, needed[number :: len(payloads)], each, options)
            return [lot, needed_lot]
        if order.has_keys:
            enqueue_with_keys(conn, order.kind, payloads, options)
        elif not order.has_items:
            batchq.enqueue_many(conn, order.kind, payloads, **options)
        else:
            options |= {"spread": flows.PARTS} if order.kind == "spread" else {}
            for each in payloads:
                batchq.enqueue(conn, order.kind, each, items=items(each["seq"]), max_failed_items=1, **options)
        return [lot]

    def numbered(
        self, conn: psycopg.Connection[Any], order: Order, count: int, more: dict[str, Any]
    ) -> tuple[tuple[int, int], list[dict[str, Any]]]:
        """Write a row of ``produced``; return the lot's first number and its count, and its payloads."""
        with self.lock:
            first = self.next_seq
            self.next_seq += count
        conn.execute("INSERT INTO produced (kind, first, count) VALUES (%s, %s, %s)", [order.kind, first, count])
        return (first, count), [payload(order, seq) | more for seq in range(first, first + count)]


def enqueue_with_keys(
    conn: psycopg.Connection[Any], kind: str, payloads: Sequence[dict[str, Any]], options: dict[str, Any]
) -> None:
    """Enqueue batches with keys; each fifth is ahead of the others of its key, and comes after them."""
    ahead = [each for each in payloads if each["seq"] % 5 == 0]
    batchq.enqueue_many(conn, kind, [each for each in payloads if each not in ahead], key=key, **options)
    batchq.enqueue_many(conn, kind, ahead, key=key, **options | {"priority": AHEAD})
