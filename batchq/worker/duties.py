"""What a service thread does every so often, on a connection of its own."""

import random
import threading
import time
from collections.abc import Callable, Iterable

from batchq.postgres.link import Link
from batchq.worker.outage import Outage

Do = Callable[[], bool | None]  # returns True if there is more to do at the next tick


class Duty:
    """Something to do about every *every_seconds*, with jitter: sooner after a failure, or if there is more to do."""

    def __init__(self, name: str, every_seconds: float, do: Do, outage: Outage) -> None:
        self.name = name
        self.outage = outage
        self._do = do
        self._every_seconds = every_seconds
        self._due_at = time.monotonic()

    def run_if_due(self) -> float:
        """Return 0, or how long to wait after a failure. Raises nothing."""
        if time.monotonic() < self._due_at:
            return 0
        pause_seconds = 0.0
        try:
            is_more = self._do()
            self.outage.over()
            jitter = random.uniform(0.75, 1.0)  # noqa: S311 (spreads load; not a secret)
            wait_seconds = 0.0 if is_more else self._every_seconds * jitter
        except Exception as error:
            wait_seconds = pause_seconds = self.outage.failed(error)
        self._due_at = time.monotonic() + wait_seconds
        return pause_seconds

    def wait_seconds(self) -> float:
        """Return how long it is until it is due."""
        return max(0.0, self._due_at - time.monotonic())


class DutyLoop:
    """Runs duties (name, every so many seconds, function) in this order whenever they are due, until closed.

    A duty that fails keeps no other from running; but where no connection can be made, the later ones wait.
    """

    def __init__(self, service: str, link: Link, tick_seconds: float, duties: Iterable[tuple[str, float, Do]]) -> None:
        self.link = link
        self.tick_seconds = tick_seconds
        self.closing = threading.Event()
        self.duties = {
            name: Duty(name, every_seconds, do, Outage(service, link, duty=name)) for name, every_seconds, do in duties
        }

    def run(self) -> None:
        """Run the duties until closed."""
        while not self.closing.wait(self.wait_seconds()):
            for duty in self.duties.values():
                pause_seconds = duty.run_if_due()
                if pause_seconds and self.link.conn is None:
                    self.closing.wait(pause_seconds)
                    break

    def wait_seconds(self) -> float:
        """Return how long to wait before the duties are checked again."""
        return self.tick_seconds

    def close(self) -> None:
        """Let `run` return."""
        self.closing.set()


def tick_of(lease_seconds: float) -> float:
    """Return how often to check which duties are due."""
    return min(lease_seconds / 10, 0.5)
