"""What every part of a worker needs, made once and passed to each of them."""

import os
import socket
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from batchq.batch.claimed import ClaimedBatch, Runtime
from batchq.errors import Throttled
from batchq.postgres.handler_connections import HandlerConnections
from batchq.postgres.link import Link
from batchq.postgres.statements.workers import Turn
from batchq.settings import Settings
from batchq.worker.flows import Flows
from batchq.worker.gates import Gates
from batchq.worker.lanes import Lane
from batchq.worker.lifecycle import Lifecycle
from batchq.worker.permits import Permits
from batchq.worker.turns import LOOK_SECONDS, Turns


class Context:
    """Who a worker is, what it serves, and what its parts let each other know.

    *turns*, *looks*, *dead_rows* and *shards* are as of the last heartbeat: the keeper writes them; the claimer, the
    schedules and the survey read them. Raises ConfigError for a DSN that is missing or will not do.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.dsn = settings.require_dsn()
        self.worker_id = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.lifecycle = Lifecycle()
        self.connections = HandlerConnections(
            self.dsn, settings.pool_size, settings.database_timeout_seconds, settings.transaction_timeout_seconds
        )
        stopping = self.lifecycle.stopping
        gates = Gates()
        self.permits = Permits(self.worker_id, settings.queues, settings.lease_seconds, gates, self._in_flight)
        self.runtime = Runtime(
            self.connections,
            settings.lease_seconds,
            stopping,
            settings.keep_completed,
            gate=gates.of,
            throttle=self._throttle,
            app_state=lambda: self.app_state,
        )
        self.layout = self.runtime.layout
        self.app_state: Any = None  # what the app's lifespan has yielded
        self.flows = Flows()
        self.lanes: Sequence[Lane] = ()
        self.links: list[Link] = []
        self.set_turn(Turn(1, 0, 0.0), 0.0)
        self.schedules: Sequence[Mapping[str, Any]] | None = None  # those that the app declares; None: takes no part
        self.dead_rows = 0
        self.shards: Mapping[str, Sequence[str]] = {}  # of the queues that are split; the keeper replaces it

    def _throttle(self, queue: str, kind: str, key: str | None, error: Throttled) -> None:
        self.permits.throttle(queue, kind, key, error)
        self.heed_throttles()
        self.lifecycle.wake.set()  # the claimer writes it

    def heed_throttles(self) -> None:
        """Let no batch begin of what is throttled, also of those that are claimed."""
        throttled = frozenset(self.permits.throttles.in_force)
        for lane in self.lanes:
            lane.throttled = throttled

    def _in_flight(self) -> set[ClaimedBatch]:
        return {batch for lane in self.lanes for batch in lane.list_in_flight()}

    def set_turn(self, turn: Turn, known_at: float) -> None:
        """Note this worker's turn; *known_at*: the monotonic time when the database's clock was *turn.now*."""
        self.turns = Turns(turn, known_at)
        self.looks = Turns(turn, known_at, 1 / LOOK_SECONDS)

    def set_shards(self, shards: Mapping[str, Sequence[str]]) -> None:
        """Note the stored names of the shards of each queue that is split."""
        if shards != self.shards:
            self.shards = shards

    @property
    def stored_queues(self) -> list[str]:
        """The queues that it serves, as they are stored: with all shards."""
        return [name for queue in self.settings.queues for name in self.shards.get(queue, (queue,))]

    def new_link(self, timeout_seconds: float | None = None) -> Link:
        """Return a connection for one service thread, closed with the worker."""
        link = Link(self.dsn, timeout_seconds or self.settings.database_timeout_seconds)
        self.links.append(link)
        return link
