"""What is looked at every few seconds: each worker's process, the tables, the rate and the waits."""

import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.instruments.bench.records import RECORD, Marks, one_row
from tests.instruments.bench.server import Database
from tests.instruments.bench.worker_process import Workers
from tests.instruments.soak.load import Load

MIB = 2**20

SIZES = """
SELECT c.relname, pg_relation_size(c.oid)::float8 / 1048576
FROM pg_class c
WHERE c.oid = 'batchq.batches_live'::regclass
   OR c.oid = (SELECT reltoastrelid FROM pg_class WHERE oid = 'batchq.batches_live'::regclass)
   OR c.oid IN (SELECT indexrelid FROM pg_index WHERE indrelid = 'batchq.batches_live'::regclass)
"""

COUNTS = """
SELECT (SELECT count(*) FROM batchq.batches_live),
       (SELECT pg_stat_get_dead_tuples(oid) FROM pg_class WHERE oid = 'batchq.batches_live'::regclass),
       (SELECT pg_stat_get_dead_tuples(reltoastrelid) FROM pg_class WHERE oid = 'batchq.batches_live'::regclass),
       (SELECT sum(pg_total_relation_size(relid))::float8 / 1048576 FROM pg_partition_tree('batchq.batches_finished')),
       (SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'batchq')
"""


@dataclass(frozen=True)
class Sample:
    """One look. *at*: seconds since the first batch; sizes in MiB; waits in ms, None where nothing was timed."""

    at: float
    workers: list[dict[str, float]]
    connections: int
    live: int
    dead_tuples: int
    dead_toast_tuples: int
    sizes_mb: dict[str, float]
    finished_mb: float
    produced: int
    finished: int
    pickup_p50_ms: float | None
    pickup_p99_ms: float | None
    worker_cpu_seconds: float
    server_cpu_seconds: float | None


class Sampler:
    """Takes samples of one run."""

    def __init__(self, database: Database, workers: Workers, load: Load) -> None:
        self.database, self.workers, self.load = database, workers, load
        self.processes = [psutil.Process(process.pid) for process in workers.processes]
        self.tail = Tail(workers.directory)
        self.began_at = time.monotonic()

    def take(self) -> Sample:
        """Look at everything."""
        produced = self.load.produced  # before the rows are counted: one committed meanwhile is no batch too many
        live, dead, dead_toast, finished_mb, connections = one_row(self.database.conn, COUNTS)
        waits = self.load.take_waits(self.tail.new())
        return Sample(
            at=round(time.monotonic() - self.began_at, 2),
            workers=[seen(process) for process in self.processes],
            connections=connections,
            live=live,
            dead_tuples=dead,
            dead_toast_tuples=dead_toast,
            sizes_mb={name: round(size, 3) for name, size in self.sizes()},
            finished_mb=round(finished_mb, 2),
            produced=produced,
            finished=max(0, produced - live),
            pickup_p50_ms=quantile_ms(waits, 0.5),
            pickup_p99_ms=quantile_ms(waits, 0.99),
            worker_cpu_seconds=round(self.workers.cpu_seconds(), 2),
            server_cpu_seconds=self.database.server.cpu_seconds(),
        )

    def sizes(self) -> list[tuple[Any, ...]]:
        """Return the live table, its TOAST table and each index, with their sizes."""
        rows = self.database.conn.execute(SIZES).fetchall()
        return [("toast" if name.startswith("pg_toast") else name, size) for name, size in rows]


def seen(process: psutil.Process) -> dict[str, float]:
    """Return what one worker has."""
    with process.oneshot():
        memory = process.memory_info()
        rss_mb, private_mb = memory.rss / MIB, (memory.rss - memory.shared) / MIB
        return {
            "rss_mb": round(rss_mb, 3),
            "private_mb": round(private_mb, 3),
            "threads": process.num_threads(),
            "files": process.num_fds(),
        }


def quantile_ms(waits: list[float], share: float) -> float | None:
    """Return the wait that a share of all does not exceed, in ms."""
    return round(1000 * waits[int(share * (len(waits) - 1))], 1) if waits else None


class Tail:
    """Reads the records of starts that are new since the last time."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.read_bytes: dict[Path, int] = defaultdict(int)

    def new(self) -> Marks:
        """Return them."""
        return [mark for path in self.directory.glob("starts-*") for mark in self.new_in(path)]

    def new_in(self, path: Path) -> Marks:
        """Return the new whole records of one file."""
        with path.open("rb") as file:
            file.seek(self.read_bytes[path])
            data = file.read()
        whole = data[: len(data) // RECORD.size * RECORD.size]
        self.read_bytes[path] += len(whole)
        return [(number, at / 1e9) for number, at in RECORD.iter_unpack(whole)]
