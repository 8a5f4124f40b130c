"""For tests of programs that use batchq: run ready batches in this process, on a real Postgres."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from batchq.app import App
from batchq.settings import Settings
from batchq.worker.worker import Worker


def drain(app: App, dsn: str, **settings: Any) -> None:
    """Run all ready batches of the app's kinds, and return when none is ready; retries that are not due yet are left.

    Failures of handlers are not raised: check the rows. *settings*: as in `Settings`. Raises ConfigError.
    """
    Worker(app, Settings.load(dsn=dsn, **settings), drain=True).run()


@contextmanager
def running_worker(app: App, dsn: str, **settings: Any) -> Iterator[Worker]:
    """Run a worker in a thread while the block runs, then stop it gracefully. *settings*: as in `Settings`.

    Raises what the worker raised, for example ConfigError.
    """
    worker = Worker(app, Settings.load(dsn=dsn, **settings))
    raised: list[BaseException] = []

    def work() -> None:
        try:
            worker.run()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work, name="batchq-worker")
    thread.start()
    try:
        yield worker
    finally:
        worker.stop()
        thread.join()
    if raised:
        raise raised[0]
