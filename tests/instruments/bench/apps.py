"""The app that the benchmark's workers run: handlers that do as good as nothing, and record that they did.

BATCHQ_BENCH_DIRECTORY names a directory, see `records`. Importing this module waits there for the gate, so that all
worker processes of a run begin at the same time, with their imports behind them.
"""

import atexit
import itertools
import os
import time
from pathlib import Path

import batchq
from tests.instruments.bench.records import RECORD

GATE_POLL_SECONDS = 0.01

directory = Path(os.environ["BATCHQ_BENCH_DIRECTORY"])
app = batchq.App()
calls = itertools.count()


def opened(name: str) -> int:
    """Open this process's file of that name."""
    return os.open(directory / f"{name}-{os.getpid()}", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)


def wait_for_gate() -> None:
    """Say that this process is ready, and wait until the benchmark lets it go; leave if the benchmark has died."""
    parent = os.getppid()
    (directory / f"ready-{os.getpid()}").touch()
    while not (directory / "go").exists():
        if os.getppid() != parent:
            os._exit(1)
        time.sleep(GATE_POLL_SECONDS)


def note_calls() -> None:
    """Leave behind how many items this process has worked: what the counter gives next."""
    (directory / f"calls-{os.getpid()}").write_text(str(next(calls)))


starts, ends = opened("starts"), opened("ends")
atexit.register(note_calls)
wait_for_gate()


@app.handler("noop")
def noop(batch: batchq.Batch) -> None:
    """Record the start, and that is all."""
    os.write(starts, RECORD.pack(batch.payload["seq"], time.monotonic_ns()))


@app.handler("sleep")
def sleep(batch: batchq.Batch) -> None:
    """Record start and end, with a sleep in between."""
    payload = batch.payload
    os.write(starts, RECORD.pack(payload["seq"], time.monotonic_ns()))
    time.sleep(payload["seconds"])
    os.write(ends, RECORD.pack(payload["seq"], time.monotonic_ns()))


@app.item_handler("items")
def one_item(item: int) -> None:
    """Count the call."""
    next(calls)


@app.item_handler("items_one_percent_fails")
def one_item_or_error(item: int) -> None:
    """Count the call; each hundredth item is an error."""
    next(calls)
    if item % 100 == 0:
        raise ValueError("each hundredth item fails")
