"""The handlers of the worker processes that are to end in time: each leaves something behind, and returns."""

import asyncio
import atexit
import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import batchq

app = batchq.App()
kept: list[object] = []
VERY_LONG_SECONDS = 600


@atexit.register
def leave_a_mark() -> None:
    """Show that what is registered with atexit was called."""
    if mark := os.environ.get("BATCHQ_TEST_MARK"):
        Path(mark).write_text("called")


@app.handler("nothing")
def nothing(batch: batchq.Batch) -> None:
    """Leave nothing behind."""


@app.handler("pool")
def leave_pool(batch: batchq.Batch) -> None:
    """Leave a task of a pool behind."""
    kept.append(ThreadPoolExecutor(1).submit(time.sleep, VERY_LONG_SECONDS))


@app.handler("thread")
def leave_thread(batch: batchq.Batch) -> None:
    """Leave a thread behind that is no daemon."""
    threading.Thread(target=time.sleep, args=(VERY_LONG_SECONDS,), daemon=False).start()


@app.handler("child")
def leave_child(batch: batchq.Batch) -> None:
    """Leave a child process behind that is no daemon."""
    multiprocessing.get_context("spawn").Process(target=time.sleep, args=(30,)).start()


@app.handler("to_thread")
async def leave_to_thread(batch: batchq.Batch) -> None:
    """Leave a thread of the event loop's pool behind."""
    kept.append(asyncio.ensure_future(asyncio.to_thread(time.sleep, VERY_LONG_SECONDS)))
    await asyncio.sleep(0.05)


@app.handler("printing")
def printing(batch: batchq.Batch) -> None:
    """Print more than a pipe takes."""
    for _ in range(1000):
        print("x" * 1000)


@app.handler("failing", backoff=batchq.Backoff(0.01, 0.02))
def failing(batch: batchq.Batch) -> None:
    """Fail, so that the worker logs a line of a few KB."""
    raise ValueError("x" * 2000)
