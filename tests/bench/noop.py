"""The app that the drain works: a handler that does nothing."""

import batchq

app = batchq.App()


@app.handler("noop")
def noop(batch: batchq.Batch) -> None:
    """Do nothing."""
