"""What the handlers leave behind: a record of 16 bytes a start, in files that lie in memory.

Each process appends to files of its own, `starts-PID` and `ends-PID`, with one write a record: the batch's number and
the time by CLOCK_MONOTONIC, which all processes of a machine share.
"""

import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

RECORD = struct.Struct("=qq")  # number, nanoseconds
NEEDED_BYTES = 2**28

Marks = list[tuple[int, float]]
"""Number of a batch, and when, in seconds of time.monotonic()."""


class Records:
    """The directory of one run."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def count(self) -> int:
        """Return how many batches have started, without reading the files."""
        return sum(path.stat().st_size for path in self.directory.glob("starts-*")) // RECORD.size

    def by_process(self, name: str = "starts") -> dict[int, Marks]:
        """Return the records of each process, by its id."""
        return {int(path.name.rpartition("-")[2]): read(path) for path in self.directory.glob(f"{name}-*")}

    def all(self, name: str = "starts") -> Marks:
        """Return all records in the order of time."""
        return sorted((mark for marks in self.by_process(name).values() for mark in marks), key=lambda mark: mark[1])

    def calls(self) -> int:
        """Return how many items were worked, by the processes that have ended."""
        return sum(int(path.read_text()) for path in self.directory.glob("calls-*"))


def read(path: Path) -> Marks:
    """Return the whole records of a file."""
    data = path.read_bytes()
    whole = memoryview(data)[: len(data) // RECORD.size * RECORD.size]
    return [(number, at / 1e9) for number, at in RECORD.iter_unpack(whole)]


@contextmanager
def directory() -> Iterator[Path]:
    """Yield a directory in memory, or a temporary one where there is no room; it goes at the end."""
    memory = Path("/dev/shm")
    fits = memory.is_dir() and shutil.disk_usage(memory).free > NEEDED_BYTES
    with tempfile.TemporaryDirectory(prefix="batchq-bench-", dir=memory if fits else None) as name:
        yield Path(name)


# --------------------------------------------------------------------------------------------- exactly once


def problems_of_starts(marks: Marks, expected: range) -> list[str]:
    """Return how the records differ from each number of *expected* once."""
    counts = Counter(number for number, _ in marks)
    twice = sum(count > 1 for count in counts.values())
    missing = sum(number not in counts for number in expected)
    unknown = sum(number not in expected for number in counts)
    found = {"ran more than once": twice, "never ran": missing, "ran and are unknown": unknown}
    return [f"{count} batches {what}" for what, count in found.items() if count]


def newest_finished(conn: psycopg.Connection) -> int:
    """Return the highest id of a finished batch, 0 without any: those of a run come after it."""
    return int(one_row(conn, "SELECT coalesce(max(id), 0) FROM batchq.batches_finished")[0])


def problems_of_rows(conn: psycopg.Connection, expected: int, after_id: int = 0) -> list[str]:
    """Return how the database differs from: so many batches after that id, all completed in one attempt."""
    completed, total = one_row(
        conn,
        "SELECT count(*) FILTER (WHERE status = 'completed' AND attempt = 1), count(*) FROM batchq.all_batches"
        f" WHERE id > {after_id}",
    )
    if completed == total == expected:
        return []
    return [f"of {expected} batches the database has {total}, {completed} completed in one attempt"]


def problems_of_live(conn: psycopg.Connection) -> list[str]:
    """Return whether batches are left that are pending or processing."""
    [left] = one_row(conn, "SELECT count(*) FROM batchq.batches_live")
    return [f"{left} batches are still pending or processing"] if left else []


def problems_of_part(conn: psycopg.Connection, marks: Marks, total: int) -> list[str]:
    """Return what is wrong after a drain that was stopped: what ran is completed, the rest is as it was."""
    rows = conn.execute("SELECT (payload ->> 'seq')::bigint FROM batchq.batches_finished WHERE status = 'completed'")
    completed = sorted(number for (number,) in rows)
    attempted, left = one_row(conn, "SELECT count(*) FILTER (WHERE attempt > 0), count(*) FROM batchq.batches_live")
    problems = []
    if completed != sorted(number for number, _ in marks):
        problems.append(f"{len(marks)} batches ran, {len(completed)} are completed, and they are not the same ones")
    if attempted or left + len(completed) != total:
        problems.append(f"{left} batches are left of {total}, {attempted} of them with an attempt counted")
    return problems


def one_row(conn: psycopg.Connection, statement: str) -> tuple:
    """Return the one row of a statement."""
    row = conn.execute(statement.encode()).fetchone()
    assert row is not None
    return row
