"""The handlers of the worker processes that lose their slots; a module of its own, that starts quickly."""

import ctypes
import os
import time

import batchq

app = batchq.App()


@app.handler("gil", backoff=batchq.Backoff(0.05, 0.1))
def hold_the_interpreter(batch: batchq.Batch) -> None:
    """Hold the interpreter's lock in a C call, in the first attempt, so that no other thread of the process runs."""
    if batch.attempt == 1:
        ctypes.PyDLL(None).sleep(600)


@app.handler("stuck", timeout_seconds=0.2)
def stuck(batch: batchq.Batch) -> None:
    """Wait for longer than any test."""
    time.sleep(600)


@app.handler("good")
def good(batch: batchq.Batch) -> int:
    """Be done at once; say in which process."""
    return os.getpid()
