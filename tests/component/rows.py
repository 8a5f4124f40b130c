"""Rows of batchq.batches for the tests: insert, claim, end, age and read them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import psycopg
from psycopg import sql
from psycopg.rows import dict_row, tuple_row
from psycopg.types.json import Jsonb

from batchq.postgres.statements import checkpoints, claims, endings, leases, probes
from batchq.postgres.statements.claims import END, START, ClaimedRow, Position
from batchq.postgres.statements.endings import Finish, Requeue
from batchq.postgres.statements.leases import Leases
from batchq.postgres.statements.running import Statement

Conn = psycopg.Connection[Any]
KIND = "work"


class Taken(NamedTuple):
    """A batch that is processing, and the token of its claim."""

    id: int
    token: UUID


def value(conn: Conn, query: str, parameters: Sequence[Any] = ()) -> Any:
    """Return the one value of *query*."""
    row = conn.cursor(row_factory=tuple_row).execute(query.encode(), parameters or None).fetchone()
    assert row, f"no row: {query}"
    return row[0]


def values(conn: Conn, query: str, parameters: Sequence[Any] = ()) -> list[Any]:
    """Return the first column of all rows of *query*."""
    cursor = conn.cursor(row_factory=tuple_row).execute(query.encode(), parameters or None)
    return [row[0] for row in cursor.fetchall()]


def insert(conn: Conn, **columns: Any) -> int:
    """Insert a batch as a person does; return its id. Dicts and lists become jsonb."""
    given = {"kind": KIND} | columns
    statement = sql.SQL("INSERT INTO batchq.batches ({}) VALUES ({}) RETURNING id").format(
        sql.SQL(", ").join(map(sql.Identifier, given)),
        sql.SQL(", ").join(map(sql.Placeholder, given)),
    )
    row = conn.execute(statement, {name: adapted(given[name]) for name in given}).fetchone()
    assert row
    return int(row[0])


def change(conn: Conn, batch_id: int, **columns: Any) -> None:
    """Overwrite columns of a batch that is pending or processing, as no person should."""
    statement = sql.SQL("UPDATE batchq.batches SET {} WHERE id = {}").format(
        sql.SQL(", ").join(sql.SQL("{} = {}").format(sql.Identifier(name), sql.Placeholder(name)) for name in columns),
        sql.Literal(batch_id),
    )
    assert conn.execute(statement, {name: adapted(columns[name]) for name in columns}).rowcount == 1


def adapted(given: Any) -> Any:
    """Return what psycopg sends for *given*."""
    return Jsonb(given) if isinstance(given, dict | list) else given


def batch(conn: Conn, batch_id: int) -> dict[str, Any]:
    """Return all columns of a batch."""
    query = "SELECT * FROM batchq.all_batches WHERE id = %s"
    row = conn.cursor(row_factory=dict_row).execute(query, [batch_id]).fetchone()
    assert row, f"batch {batch_id} is gone"
    return row


def run(conn: Conn, statement: Statement) -> list[Any]:
    """Run a statement of batchq's on a connection, whatever transaction that is in; return its rows."""
    return conn.cursor(row_factory=tuple_row).execute(*statement).fetchall()


def has_unknown_priority(conn: Conn, queue: str, known: Iterable[int]) -> bool:
    """Return whether a pending batch has a priority that is not known."""
    return bool(run(conn, probes.unknown_priority(queue, known)))


def priorities(conn: Conn, queue: str) -> list[int]:
    """Return the priorities that have a pending batch."""
    return [priority for (priority,) in run(conn, probes.priorities(queue))]


def ready_priorities(conn: Conn, queue: str, kinds: Sequence[str], after: Mapping[int, Position]) -> list[int]:
    """Return the priorities that have a ready batch after their position."""
    return [priority for (priority,) in run(conn, probes.ready_priorities(queue, kinds, after))]


def is_ready_between(
    conn: Conn, queue: str, priority: int, kinds: Sequence[str], after: Position, until: Position
) -> bool:
    """Return whether a batch is ready after one position and up to another."""
    return bool(run(conn, probes.ready_between(queue, priority, kinds, after, until)))


def has_expired(conn: Conn, queue: str, after: float = float("-inf")) -> tuple[float, bool]:
    """Return the time, and whether any lease has expired since *after*."""
    [(now, _, is_any)] = run(conn, leases.lease_probe(queue, after))
    return now, is_any


def claim(
    conn: Conn,
    limit: int = 100,
    *,
    queue: str = "default",
    priority: int = 0,
    kinds: Sequence[str] = (KIND,),
    worker: str = "worker-1",
    token: UUID | None = None,
    lease_seconds: float = 60,
    after: Position = START,
    until: Position = END,
) -> list[ClaimedRow]:
    """Claim as a worker does."""
    statement = claims.claim(
        queue, priority, kinds, limit, worker, token or uuid4(), lease_seconds, after=after, until=until
    )
    return [ClaimedRow(*row) for row in run(conn, statement)]


def processing(conn: Conn, *, lease_seconds: float = 60, worker: str = "worker-1", **columns: Any) -> Taken:
    """Insert a batch and claim it."""
    taken = Taken(insert(conn, **columns), uuid4())
    rows = claim(
        conn,
        queue=columns.get("queue", "default"),
        priority=columns.get("priority", 0),
        kinds=[columns.get("kind", KIND)],
        worker=worker,
        token=taken.token,
        lease_seconds=lease_seconds,
    )
    assert [row.id for row in rows] == [taken.id]
    return taken


def finish(conn: Conn, *finishes: Finish, queue: str = "default") -> set[int]:
    """Finish batches as a worker does; return the ids of those that were still its own."""
    return {batch_id for (batch_id,) in run(conn, endings.finish(queue, finishes))}


def complete(conn: Conn, *taken: Taken, queue: str = "default", keep: bool = True) -> set[int]:
    """Complete batches without a result as a worker does; return the ids of those that were still its own."""
    statement = endings.complete(queue, [one.id for one in taken], [str(one.token) for one in taken], keep)
    return {batch_id for (batch_id,) in run(conn, statement)}


def requeue(conn: Conn, *requeues: Requeue, queue: str = "default") -> set[int]:
    """Make batches pending again as a worker does; return the ids of those that were still its own."""
    return {batch_id for (batch_id,) in run(conn, endings.requeue(queue, requeues))}


def extend(conn: Conn, *taken: Taken, queue: str = "default", lease_seconds: float = 60) -> Leases:
    """Extend leases as a keeper does; return what became of them."""
    ids, tokens = [one.id for one in taken], [one.token for one in taken]
    return leases.leases(run(conn, leases.extend(queue, ids, tokens, lease_seconds)))


def finished(conn: Conn, status: str = "completed", *, error: str | None = None, **columns: Any) -> int:
    """Insert, claim and finish a batch; return its id."""
    taken = processing(conn, **columns)
    end = Finish(taken.id, taken.token, status, error=error)
    assert finish(conn, end, queue=columns.get("queue", "default")) == {taken.id}
    return taken.id


def checkpoint(
    conn: Conn, taken: Taken, progress: checkpoints.Progress, *, queue: str = "default", lease_seconds: float = 60
) -> int:
    """Save progress as a worker does; return how many batches were still its own: 0 or 1."""
    with conn.transaction():
        return conn.execute(*checkpoints.checkpoint(queue, taken.id, taken.token, lease_seconds, progress)).rowcount


def expire_lease(conn: Conn, batch_id: int, seconds_ago: float = 1) -> None:
    """Let a worker have given no sign of life for its whole lease, since *seconds_ago*."""
    query = "UPDATE batchq.batches_live SET lease_expires_at = now() - %s * interval '1 second' WHERE id = %s"
    assert conn.execute(query, [seconds_ago, batch_id]).rowcount == 1


def failure(index: int, error: str = "ValueError: no", retryable: bool = True) -> checkpoints.ItemFailure:
    """Return a failed item as a checkpoint takes it."""
    return checkpoints.ItemFailure(index, error, retryable)
