"""The service threads of a worker."""

import threading
from collections.abc import Callable

from batchq.common.log import get_logger
from batchq.common.text import one_line
from batchq.worker.lifecycle import Lifecycle, StopReason

_log = get_logger()


class Services:
    """Threads by name. One that fails, which none must, stops the worker: half a worker does harm."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle
        self._threads: dict[str, threading.Thread] = {}

    def start(self, name: str, run: Callable[[], None]) -> None:
        """Start a service."""

        def guarded() -> None:
            try:
                run()
            except BaseException as error:
                _log.error("service failed", service=name, error=one_line(error))
                self._lifecycle.stop(StopReason.SERVICE_FAILED)

        self._threads[name] = thread = threading.Thread(target=guarded, name=f"batchq-{name}", daemon=True)
        thread.start()

    def have_started(self) -> bool:
        """Return whether any service was started."""
        return bool(self._threads)

    def has_ended(self, name: str, seconds: float) -> bool:
        """Wait for a service to end; return whether it has, or was never started."""
        thread = self._threads.get(name)
        if thread is not None and thread.is_alive():
            thread.join(max(0.0, seconds))
        return thread is None or not thread.is_alive()
