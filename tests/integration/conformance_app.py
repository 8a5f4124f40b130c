"""The kinds that the conformance suite asks for, as handlers of batchq; docs/protocol.md specifies them."""

import time
from typing import Any

import batchq

ROW = "INSERT INTO conformance (batch_id, item, attempt) VALUES (%s, %s, %s)"
AT_ONCE = batchq.Backoff(0, 0)
MOMENT_SECONDS = 0.05

app = batchq.App()


@app.handler("echo")
async def echo(batch: batchq.Batch) -> Any:
    """Complete with the payload as the result."""
    return batch.payload


@app.handler("fails", backoff=AT_ONCE)
def fails(batch: batchq.Batch) -> None:
    """Fail the first attempts."""
    if batch.attempt <= batch.payload["times"]:
        raise ValueError(batch.payload["error"])


@app.handler("refuses")
def refuses(batch: batchq.Batch) -> None:
    """Fail for good."""
    raise batchq.InvalidInput(batch.payload["error"])


@app.handler("items", backoff=AT_ONCE)
def items(batch: batchq.Batch) -> None:
    """Write a row for each item that does not fail, with the checkpoint of its chunk."""
    for chunk in batch.chunks(2):
        with chunk.transaction() as conn:
            for position, item in enumerate(chunk.items):
                if item.get("fails") == "final":
                    chunk.fail(position, batchq.InvalidInput("for good"))
                elif item.get("fails") == "always" or (item.get("fails") == "once" and batch.attempt == 1):
                    chunk.fail(position, ValueError("bad"))
                else:
                    conn.execute(ROW, [batch.id, chunk.indexes[position], batch.attempt])
            batch.checkpoint(chunk.indexes[0])
        time.sleep(batch.payload.get("pause_seconds", 0))


@app.handler("slow")
def slow(batch: batchq.Batch) -> None:
    """Take a while, then write a row with the completion."""
    until = time.monotonic() + batch.payload["seconds"]
    while time.monotonic() < until:
        batch.raise_if_interrupted()
        time.sleep(MOMENT_SECONDS)
    with batch.transaction(result={"slow": True}) as conn:
        conn.execute(ROW, [batch.id, 0, batch.attempt])
