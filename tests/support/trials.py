"""What instruments with worker processes share: a private server, a place to work at, and what was seen there."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

from batchq.postgres import embedded
from batchq.postgres.migrate import migrate
from tests.support.processes import Processes

_MOST_SHOWN = 20


@dataclass
class Seen:
    """What was seen: figures for people, and what must not be."""

    figures: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def must(self, is_so: bool, otherwise: str) -> None:
        """Note a fault unless it is so."""
        if not is_so:
            self.faults.append(otherwise)

    def tell(self, name: str) -> int:
        """Print the figures and the faults; return how many faults there are."""
        verdict = "FAULT" if self.faults else "ok"
        print(f"{verdict}: {name}: {self.figures} {'; '.join(self.faults[:_MOST_SHOWN])}", flush=True)
        return len(self.faults)


@dataclass
class Place:
    """A migrated database, a way to make processes of an app for it, and one to restart its server (None: it stays up).

    workers_dsn: of the workers, if they take another way to it.
    """

    dsn: str
    app: str
    workers_dsn: str | None = None
    restart: Callable[[], None] | None = None

    def connect(self) -> psycopg.Connection[Any]:
        """Return a connection of the run's own."""
        return psycopg.connect(self.dsn, autocommit=True, prepare_threshold=None)

    def processes(self) -> Processes:
        """Return the worker processes of one run."""
        return Processes(self.workers_dsn or self.dsn, self.app, self.dsn)


@contextmanager
def private_place(app: str) -> Iterator[Place]:
    """Yield a place on a new private server."""
    with tempfile.TemporaryDirectory(prefix="batchq-trial-") as directory:
        Path(directory).chmod(0o755)
        with embedded.start(Path(directory) / "data", {"max_connections": "300"}) as server:
            migrate(server.dsn())
            yield Place(server.dsn(), app, restart=lambda: server.restart(immediate=True))


def value(conn: psycopg.Connection[Any], query: str, parameters: Any = None) -> Any:
    """Return the one value of *query*."""
    row = conn.execute(query.encode(), parameters).fetchone()
    assert row is not None
    return row[0]
