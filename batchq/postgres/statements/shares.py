"""What steers a worker: pauses, throttles and limits; and its shares of the limits."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, LiteralString, NamedTuple

from batchq.postgres.statements.running import Conn, Statement, fetch_all

STEERING: LiteralString = """
SELECT 'pause', queue, kind, date_part('epoch', until - now()), NULL::integer, NULL::float8, NULL::float8,
  NULL::float8, NULL::integer
FROM batchq.pauses
WHERE until IS NULL
   OR until > now()
UNION ALL
SELECT 'throttle', queue, nullif(kind, ''), date_part('epoch', until - now()), NULL, NULL, NULL, NULL, NULL
FROM batchq.throttles
WHERE queue = ANY (%(queues)s)
  AND key = ''
  AND until > now()
UNION ALL
SELECT 'limit', queue, kind, NULL, max_running, per_second, items_per_second, burst_seconds, max_running_per_key
FROM batchq.limits_in_force
WHERE queue = ANY (%(queues)s)
"""


class Limit(NamedTuple):
    """The limits in force of a queue or, with a *kind*, of that kind in the queue; None: no limit."""

    queue: str
    kind: str | None
    max_running: int | None
    per_second: float | None
    items_per_second: float | None
    burst_seconds: float
    max_running_per_key: int | None


class Steering(NamedTuple):
    """What steers workers. A pause is of a queue, of a kind (queue None), or of a kind in a queue; a throttle is of a
    queue or of a kind in it, for so many seconds more."""

    pauses: frozenset[tuple[str | None, str | None]]
    throttles: dict[tuple[str, str | None], float]
    limits: tuple[Limit, ...]


def steering(conn: Conn, queues: Sequence[str]) -> Steering:
    """Return what steers a worker of these queues."""
    rows = fetch_all(conn, STEERING, {"queues": list(queues)})
    return Steering(
        frozenset((queue, kind) for what, queue, kind, *_ in rows if what == "pause"),
        {(queue, kind): seconds for what, queue, kind, seconds, *_ in rows if what == "throttle"},
        tuple(Limit(queue, kind, *numbers) for what, queue, kind, _, *numbers in rows if what == "limit"),
    )


def has_limits(conn: Conn, queues: Sequence[str], kinds: Sequence[str]) -> bool:
    """Return whether workers have declared a limit for any of these queues and kinds."""
    return bool(
        fetch_all(
            conn,
            """
            SELECT 1
            FROM batchq.limits_in_force
            WHERE queue = ANY (%(queues)s)
              AND kind = ANY (%(kinds)s)
              AND is_declared
            LIMIT 1
            """,
            {"queues": list(queues), "kinds": list(kinds)},
        )
    )


def declare_limits(conn: Conn, queues: Sequence[str], limits: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace what code declares for these queues and kinds. *limits*: columns of batchq.limits, by kind."""
    declared = json.dumps([{"kind": kind, **columns} for kind, columns in limits.items() if columns])
    fetch_all(
        conn,
        "SELECT batchq.declare_limits(%(queues)s, %(kinds)s, %(declared)s::jsonb)",
        {"queues": list(queues), "kinds": list(limits), "declared": declared},
    )


class Report(NamedTuple):
    """What a worker holds itself to of one limit, and what it could use. *kind*: empty for the whole queue."""

    queue: str
    kind: str
    running: int
    wanted_running: int
    starts: float
    wanted_starts: float
    items: float
    wanted_items: float
    in_use: int
    held_back_by: str | None


class Share(NamedTuple):
    """What a worker may use of one limit: batches that run, batches and items that begin per second."""

    queue: str
    kind: str
    running: int
    starts: float
    items: float


TAKE_SHARES: LiteralString = """
SELECT queue, kind, running, starts, items
FROM batchq.take_shares(%(worker)s, %(lease_seconds)s, %(reports)s::jsonb)
"""


def take_shares(worker: str, lease_seconds: float, reports: Iterable[Report]) -> Statement:
    """Return the statement that refreshes a worker's shares, and returns the fields of `Share` for each."""
    texts: list[dict[str, Any]] = [report._asdict() for report in reports]
    return TAKE_SHARES, {"worker": worker, "lease_seconds": lease_seconds, "reports": json.dumps(texts)}


def throttle(conn: Conn, queue: str, kind: str | None, key: str | None, seconds: float, worker: str) -> None:
    """Let a kind (None: a whole queue), or one key of it, wait everywhere for so many seconds."""
    fetch_all(
        conn,
        "SELECT batchq.throttle(%(queue)s, %(kind)s, %(key)s, %(seconds)s, %(worker)s)",
        {"queue": queue, "kind": kind, "key": key, "seconds": float(seconds), "worker": worker},
    )


def return_shares(conn: Conn, worker: str) -> None:
    """Return all shares of a worker that has stopped."""
    fetch_all(conn, "SELECT batchq.return_shares(%(worker)s)", {"worker": worker})
