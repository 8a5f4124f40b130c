"""Warnings of queues and kinds that nobody knows: probably misspelled, perhaps only early."""

from collections.abc import Iterable
from contextlib import suppress

import psycopg

from batchq.common.numbers import did_you_mean, listed
from batchq.common.terminal import complain
from batchq.postgres.statements import views
from batchq.postgres.statements.running import Conn


def warn_of_unknown(conn: Conn, queue: str | None, kind: str | None) -> None:
    """Complain about a *queue* or *kind* of which neither batches nor a live worker are known.

    Silent if nothing is known yet. For people only: roles that may not read the views get no warning.
    """
    if queue is None and kind is None:
        return
    with suppress(psycopg.errors.InsufficientPrivilege), conn.transaction():
        rows, workers = views.queue_rows(conn), views.worker_objects(conn)
        queues = {row["queue"] for row in rows}.union(*(worker["queues"] for worker in workers))
        kinds = {row["kind"] for row in rows}.union(*(worker["kinds"] for worker in workers))
        _warn("queue", queue, queues, "no batch and no live worker of")
        _warn("kind", kind, kinds, "no batch and no live worker of")


def warn_of_unserved(conn: Conn, queue: str, kind: str) -> None:
    """Complain if there are live workers, but none that runs batches of this *kind* in this *queue*."""
    with suppress(psycopg.errors.InsufficientPrivilege), conn.transaction():
        workers = views.worker_objects(conn)
        kinds = {name for worker in workers for name in worker["kinds"]}
        queues = {name for worker in workers for name in worker["queues"]}
        if _warn("kind", kind, kinds, "no worker handles") or _warn("queue", queue, queues, "no worker serves"):
            return
        if workers and not any(queue in worker["queues"] and kind in worker["kinds"] for worker in workers):
            complain(f"no worker of queue {queue!r} handles kind {kind!r}")


def warn_of_unserved_queue(conn: Conn, queue: str) -> None:
    """Complain if there are live workers, but none that serves this *queue*."""
    with suppress(psycopg.errors.InsufficientPrivilege), conn.transaction():
        queues = {name for worker in views.worker_objects(conn) for name in worker["queues"]}
        _warn("queue", queue, queues, "no worker serves")


def _warn(what: str, name: str | None, known: Iterable[str], nobody: str) -> bool:
    names = sorted(known)
    if name is None or not names or name in names:
        return False
    ending = " is known" if nobody.endswith(" of") else ""
    complain(f"{nobody} {what} {name!r}{ending} (known: {listed(names)}){did_you_mean(name, names)}")
    return True
