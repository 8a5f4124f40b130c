"""The handler of the batches that schedules make: it returns when it began."""

import time

import batchq

app = batchq.App()


@app.handler("tick")
def tick(batch: batchq.Batch) -> float:
    """Return the time, in seconds since 1970."""
    return time.time()


@app.schedule("*/2 * * * * *", name="declared", payload={"schedule": "declared", "tick": None})
@app.handler("declared")
def declared(batch: batchq.Batch) -> float:
    """Return the time, in seconds since 1970."""
    return time.time()
