"""Claims of batches with a key: key by key, in turn, as many of each as its limit leaves."""

from collections.abc import Sequence

from psycopg.rows import tuple_row

from batchq.batch.claimed import Claim
from batchq.postgres.link import Link
from batchq.postgres.statements import claims, session
from batchq.postgres.statements.claims import ClaimedRow
from batchq.postgres.statements.running import Conn
from batchq.worker.context import Context
from batchq.worker.key_ring import MOST_KEYS, Visited, per_turn
from batchq.worker.positions import Source
from batchq.worker.refused import Halving, Skipped

_SETTINGS = session.FORCE_INDEX_AND_HASH_JOIN | session.ASYNCHRONOUS_COMMIT
# A key with a limit is locked while it is visited, so others wait less if a claim visits fewer.
_MOST_LIMITED_KEYS = 200


def _in_place(visit: Visited) -> Visited:
    """Return a visit that moves no position: what it found and did not claim (its row is locked) keeps its turn."""
    return visit._replace(last_priority=None, last_run_at=None, last_id=None)


class KeyedClaims:
    """Claims for one source at a time. *skipped*: the ids that the database has refused to change."""

    def __init__(self, context: Context, link: Link, skipped: Skipped) -> None:
        self._permits = context.permits
        self._worker_id = context.worker_id
        self._link = link
        self._skipped = skipped

    def claim(self, source: Source, claim: Claim, room: int) -> list[ClaimedRow] | None:
        """Claim up to *room* batches of the keys that come next, in one transaction; None if no key is due.

        Raises OutcomeUnknown if the connection was lost during its COMMIT.
        """
        if (keys := source.ring.next_range()) is None:
            return None
        rows: list[ClaimedRow] = []
        halving: Halving[int] = Halving(lambda ids: rows.extend(self._claim_ids(conn, claim, ids)))
        with self._link.transaction(_SETTINGS) as conn:
            visits = self._visit(conn, source, keys, room)
            found = [batch_id for visit in visits for batch_id in visit.ids or ()]
            skipped = set(self._skipped.ids())
            if ids := [batch_id for batch_id in found if batch_id not in skipped]:
                halving.attempt(ids)
        claimed = {row.id for row in rows}
        is_strict = self._is_strict(source)
        source.ring.visited([
            _in_place(visit) if is_strict or not claimed.issuperset(visit.ids or ()) else visit for visit in visits
        ])  # fmt: skip
        self._skipped.add(halving.refused)
        halving.report("claim", halving.refused)
        order = {batch_id: number for number, batch_id in enumerate(found)}
        return sorted(rows, key=lambda row: order[row.id])

    def _visit(self, conn: Conn, source: Source, keys: tuple[str, str | None], room: int) -> list[Visited]:
        """Find what is ready of the next keys; lock those that have a limit."""
        per_kind = [self._permits.per_key(source.whole.queue, kind) for kind in source.kinds]
        per_queue = self._permits.per_key(source.whole.queue, None)
        is_limited = per_queue is not None or any(limit is not None for limit in per_kind)
        statement = claims.ready_of_keys(
            source.queue, source.kinds, per_kind, per_queue, keys[0], keys[1],
            _MOST_LIMITED_KEYS if is_limited else MOST_KEYS, room,
            per_turn(room, source.whole.known_keys, source.ring.known_keys),
            {} if self._is_strict(source) else source.ring.positions(),
        )  # fmt: skip
        rows = conn.cursor(row_factory=tuple_row).execute(*statement).fetchall()
        return [Visited._make(row) for row in rows]

    def _is_strict(self, source: Source) -> bool:
        """Return whether keys of the source run in strict order. Then each is read from its start, however slow that
        is: an urgent batch may have come before a position."""
        return any(self._permits.per_key(source.whole.queue, kind) == 1 for kind in (None, *source.kinds))

    def _claim_ids(self, conn: Conn, claim: Claim, ids: Sequence[int]) -> list[ClaimedRow]:
        """Claim these batches. In a savepoint, so that one that is refused leaves the locks of the keys."""
        lease_seconds = claim.runtime.lease_seconds
        statement = claims.claim_keyed(claim.queue, ids, self._worker_id, claim.token, lease_seconds)
        cursor = conn.cursor(row_factory=tuple_row)
        try:
            with conn.transaction():
                rows = cursor.execute(*statement).fetchall()
        except claims.UNREADABLE:
            with conn.transaction():
                rows = cursor.execute(*claims.without_inputs(statement)).fetchall()
        return [ClaimedRow._make(row) for row in rows]
