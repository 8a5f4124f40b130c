"""The door: NOTIFY, which any role may send. A worker that listens looks a bounded number of times."""

import time

import psycopg

from batchq.worker.bell import REST_SECONDS, Bell
from tests.component.rows import insert, value
from tests.support.alone import run_alone
from tests.support.roles import role_for
from tests.support.steps import step
from tests.support.threads import running
from tests.support.waiting import wait_until


def test_a_flood_of_notifications_wakes_a_worker_a_hundred_times_a_second_at_most(admin_dsn: str) -> None:
    nudges: list[float] = []
    bell = Bell(admin_dsn, lambda: nudges.append(time.monotonic()))
    with role_for(admin_dsn) as dsn, psycopg.connect(dsn, autocommit=True) as flooder, running(bell.run, bell.close):
        wait_until(lambda: nudges, 10, "the bell to listen")
        began_at, sent = time.monotonic(), 0
        while time.monotonic() - began_at < 2:
            flooder.execute("NOTIFY batchq; NOTIFY batchq, 'a'; NOTIFY batchq, 'b'")
            sent += 3
        seconds = time.monotonic() - began_at
        wait_until(lambda: time.monotonic() - nudges[-1] > 0.5, 10, "silence")
        step("%s notifications in %.1f s: %s nudges", sent, seconds, len(nudges))
        assert sent > 5 * len(nudges)
        assert len(nudges) <= seconds / REST_SECONDS + 2

        step("and the next ring is heard at once")
        count = len(nudges)
        flooder.execute("NOTIFY batchq")
        wait_until(lambda: len(nudges) > count, 1, "a nudge")


def test_a_full_queue_of_notifications_fails_no_insert(conn: psycopg.Connection, admin_dsn: str) -> None:
    """As a stranger who floods with large notifications, and another who listens and reads none."""
    conn.execute("SELECT batchq.bell(true)")
    nudges: list[float] = []
    bell = Bell(admin_dsn, lambda: nudges.append(time.monotonic()))
    with role_for(admin_dsn) as dsn, psycopg.connect(dsn, autocommit=True) as flooder, running(bell.run, bell.close):
        wait_until(lambda: nudges, 10, "the bell to listen")
        until = time.monotonic() + 3
        sent = 0
        while time.monotonic() < until:
            flooder.execute("SELECT pg_notify('batchq', i || repeat('x', 7900)) FROM generate_series(1, 100) i")
            sent += 100
            insert(conn)
        usage = "SELECT pg_notification_queue_usage()"
        step("%s large notifications; the queue is %.4f full", sent, value(conn, usage))
        wait_until(lambda: value(conn, usage) < 0.0001, 10, "the worker to have read them all")
    source = value(conn, "SELECT prosrc FROM pg_proc WHERE oid = 'batchq.ring()'::regprocedure")
    assert "IF pg_notification_queue_usage() < 0.5" in source, "a queue of 8 GB is not filled here"


if __name__ == "__main__":
    run_alone(__file__)
