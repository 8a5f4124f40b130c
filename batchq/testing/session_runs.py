"""What a worker does around a handler, on one session with plain statements: claim, finish, rescue, follow flows."""

import os
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psycopg

from batchq.app import App
from batchq.batch.claimed import Claim, ClaimedBatch, Runtime
from batchq.common.text import message_object, one_line
from batchq.errors import ConfigError, Throttled
from batchq.postgres.statements import claims, endings, flows, leases, shards, shares, testing
from batchq.postgres.statements.claims import ClaimedRow
from batchq.postgres.statements.endings import Finish, Requeue
from batchq.postgres.statements.running import Statement, fetch_all, fetch_one
from batchq.postgres.statements.shares import Steering
from batchq.settings import Settings
from batchq.testing.gate import ClosingGate
from batchq.testing.same_session import SameSession
from batchq.worker.execution import Outcome

_ALL_KEYS = 1_000_000
_EVENTS = 500
_MOST_RESCUED = 100


class SessionRuns:
    """Claims batches one by one, and writes their outcomes. *app*: whose handlers run. Raises ConfigError without any.

    Each step is a savepoint or, if the session has no transaction open, a transaction of its own.
    """

    def __init__(self, app: App, session: SameSession, settings: Settings) -> None:
        if not app.handlers:
            raise ConfigError("the app has no handlers; decorate functions with @app.handler(kind)")
        self.handlers = app.handlers
        self._session = session
        self._settings = settings
        self._worker = f"batchq.testing-{os.getpid()}"
        self._gate = ClosingGate()
        self._throttles: list[tuple[str, str, str | None, Throttled]] = []
        self._runtime = Runtime(
            session,
            settings.lease_seconds,
            threading.Event(),
            settings.keep_completed,
            gate=lambda queue, kind: self._gate,  # noqa: ARG005
            throttle=self._throttle,
        )

    def claim(self) -> ClaimedBatch | None:
        """Claim the batch that comes next; None if none is ready."""
        with self._step() as conn:
            self._follow_flows(conn)
            split = shards.shards_of(conn, self._settings.queues)
            stored = {queue: split.get(queue, [queue]) for queue in self._settings.queues}
            names = [name for shards_of_one in stored.values() for name in shards_of_one]
            testing.catch_up(conn, names)
            for name in names:
                leases.rescue(conn, name, _MOST_RESCUED)
            steering = shares.steering(conn, self._settings.queues)
            for queue, names in stored.items():
                kinds = [kind for kind in self.handlers if not _is_held(steering, queue, kind)]
                if kinds and (found := self._next(conn, steering, queue, names, kinds)) is not None:
                    return self._claim(conn, queue, *found)
        return None

    def _next(
        self, conn: psycopg.Connection, steering: Steering, queue: str, names: Sequence[str], kinds: Sequence[str]
    ) -> tuple[str, int] | None:
        """Return the stored queue and the id of the next batch of a queue that is stored as *names*: first those
        without a key, then key by key."""
        if (found := testing.next_ready(conn, names, list(kinds))) is not None:
            return found
        limits = {(one.queue, one.kind): one.max_running_per_key for one in steering.limits}
        per_kind = [limits.get((queue, kind), self.handlers[kind].limits.max_running_per_key) for kind in kinds]
        for name in names:
            statement = claims.ready_of_keys(
                name, kinds, per_kind, limits.get((queue, None)), "", None, _ALL_KEYS, 1, 1, {}
            )  # fmt: skip
            if ids := [row[1] for row in fetch_all(conn, *statement) if row[1]]:
                return name, int(ids[0][0])
        return None

    def _claim(self, conn: psycopg.Connection, queue: str, name: str, batch_id: int) -> ClaimedBatch:
        token, began_at = uuid.uuid4(), time.monotonic()
        row = fetch_one(conn, *claims.claim_keyed(name, [batch_id], self._worker, token, self._settings.lease_seconds))
        self._gate = ClosingGate()
        claimed = ClaimedBatch(ClaimedRow._make(row), Claim(name, token, self._runtime, began_at, whole_queue=queue))
        claimed.begun_at = began_at
        return claimed

    def finish(self, batch: ClaimedBatch, outcome: Outcome) -> Outcome:
        """Write the outcome of a batch, and return it: a failure, if the database refuses to store it."""
        if not outcome.written:
            try:
                self._write(self._statement(batch, outcome))
            except (psycopg.DataError, psycopg.IntegrityError, psycopg.errors.ProgramLimitExceeded) as error:
                outcome = Outcome("failed", error=message_object(f"the outcome could not be stored: {one_line(error)}"))
                self._write(self._statement(batch, outcome))
        for queue, kind, key, throttled in self._throttles:
            of_kind, of_key = None if throttled.scope == "queue" else kind, key if throttled.scope == "key" else None
            with self._step() as conn:
                shares.throttle(conn, queue, of_kind, of_key, throttled.seconds, self._worker)
        self._throttles = []
        return outcome

    def _statement(self, batch: ClaimedBatch, outcome: Outcome) -> Statement:
        token = batch.claim.token
        if outcome.status == "pending":
            requeue = Requeue(batch.id, token, outcome.delay_seconds, outcome.is_release, outcome.error)
            return endings.requeue(batch.queue, [requeue])
        if outcome.status == "completed" and not self._settings.keep_completed and batch.part_of is None:
            return endings.complete(batch.queue, [batch.id], [batch.claim.token_text], keep=False)
        finish = Finish(batch.id, token, outcome.status, outcome.result, outcome.error, outcome.all_done)
        return endings.finish(batch.queue, [finish])

    def _write(self, statement: Statement) -> None:
        """Write an outcome. If nothing matches, the handler has ended the batch otherwise, for example cancelled it."""
        with self._step() as conn:
            fetch_all(conn, *statement)

    def _follow_flows(self, conn: psycopg.Connection) -> None:
        """Make pending what waited for batches that have ended."""
        seen, left_over = _EVENTS, 0
        while seen == _EVENTS and left_over < seen:
            seen, _, _, left_over = fetch_one(conn, *flows.follow(0, _EVENTS))

    def _throttle(self, queue: str, kind: str, key: str | None, error: Throttled) -> None:
        """Note what a handler was told; it is written with the outcome, when the session is free."""
        if error.scope == "key" and key is None:
            return
        self._throttles.append((queue, kind, key, error))
        if error.scope != "key":
            self._gate.close(error.seconds)

    @contextmanager
    def _step(self) -> Iterator[psycopg.Connection]:
        with self._session.conn.transaction():
            yield self._session.conn


def _is_held(steering: Steering, queue: str, kind: str) -> bool:
    """Return whether a kind is paused or throttled in a queue."""
    paused = {(queue, kind), (queue, None), (None, kind)} & steering.pauses
    return bool(paused) or (queue, kind) in steering.throttles or (queue, None) in steering.throttles
