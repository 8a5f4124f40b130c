"""What every part of a worker needs, made once and passed to each of them."""

import os
import socket
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from batchq.batch import Runtime
from batchq.postgres.database import HandlerConnections, Link
from batchq.postgres.statements.workers import Turn
from batchq.settings import Settings
from batchq.worker.lanes import Lane
from batchq.worker.lifecycle import Lifecycle
from batchq.worker.turns import Turns


@dataclass
class Context:
    """Who a worker is, what it serves, and what its parts let each other know.

    *turns* and *dead_rows* are as of the last heartbeat: the keeper writes them; the claimer and the survey read them.
    """

    settings: Settings
    dsn: str
    worker_id: str
    connections: HandlerConnections
    lifecycle: Lifecycle
    runtime: Runtime
    lanes: Sequence[Lane] = ()
    links: list[Link] = field(default_factory=list)
    turns: Turns = field(default_factory=lambda: Turns(Turn(1, 0, 0.0), 0.0))
    dead_rows: int = 0

    def new_link(self, timeout_seconds: float | None = None) -> Link:
        """Return a connection for one service thread, closed with the worker."""
        link = Link(self.dsn, timeout_seconds or self.settings.database_timeout_seconds)
        self.links.append(link)
        return link


def new_context(settings: Settings) -> Context:
    """Return the context of a new worker. Raises ConfigError for a DSN that is missing or will not do."""
    dsn, lifecycle = settings.require_dsn(), Lifecycle()
    connections = HandlerConnections(
        dsn, settings.pool_size, settings.database_timeout_seconds, settings.transaction_timeout_seconds
    )
    runtime = Runtime(connections, settings.lease_seconds, lifecycle.stopping, settings.keep_completed)
    worker_id = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    return Context(settings, dsn, worker_id, connections, lifecycle, runtime)
