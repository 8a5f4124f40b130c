"""An app of the project's own handlers, for BATCHQ_APP."""

import batchq
from batchq.contrib.django import fresh_connections
from tests.support.django_project import tasks

app = batchq.App()


@app.handler("plain")
@fresh_connections
def plain(batch: batchq.Batch) -> int:
    """Return the process of the ORM's connection."""
    return int(tasks.backend_process.func())


@app.handler("plain_async")
@fresh_connections
async def plain_async(batch: batchq.Batch) -> list[int]:
    """Return the processes of the ORM's connections."""
    found: list[int] = await tasks.backend_process_async.func()
    return found
