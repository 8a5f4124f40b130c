"""For tests of programs that use batchq: work what is ready, in this process, on a real Postgres."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from batchq.app import App
from batchq.settings import Settings
from batchq.worker.worker import Worker


def drain(app: App, dsn: str, **settings: Any) -> None:
    """Work every batch of the app's kinds that is ready, and return when none is; retries that wait are left.

    Failures of handlers are not raised: look at the rows. *settings*: as in `Settings`. Raises ConfigError.
    """
    Worker(app, Settings.load(dsn=dsn, **settings), drain=True).run()


@contextmanager
def running_worker(app: App, dsn: str, **settings: Any) -> Iterator[Worker]:
    """Run a worker in a thread while the block runs, then stop it gracefully. *settings*: as in `Settings`.

    Raises what the worker raised, ConfigError for one.
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
