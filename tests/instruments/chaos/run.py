"""A run: window after window of faults, recovery, arithmetic; then all that is left is worked, and all is checked."""

import random
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import psycopg

from tests.instruments.chaos import flows, ledger
from tests.instruments.chaos.faults import FAULTS, NotInjected, WorkStands
from tests.instruments.chaos.ledger import Violation
from tests.instruments.chaos.marks import read_marks
from tests.instruments.chaos.world import Stopped, World

FLOWS = 50  # batches that finish after a fault: then work goes on again
RECOVERY_SECONDS = 40.0
LEASE_PATIENCE_SECONDS = 10.0
READY_PATIENCE_SECONDS = 60.0
DRAIN_SECONDS = 90.0
MARGIN_SECONDS = 10.0  # a batch's finished_at is from before its COMMIT

FINISHED_LATER = """
SELECT date_part('epoch', finished_at)
FROM batchq.batches_finished
WHERE finished_at > to_timestamp(%s)
ORDER BY finished_at
OFFSET %s LIMIT 1
"""
FINISHED_BETWEEN = """
SELECT count(*) FROM batchq.batches_finished WHERE finished_at > to_timestamp(%s) AND finished_at <= to_timestamp(%s)
"""
NO_MORE_WAITING = "UPDATE batchq.batches SET run_at = now() WHERE status = 'pending' AND run_at > now()"


@dataclass
class Window:
    """What came of the faults that came at once. Rates are batches finished a second, beforehand and afterwards."""

    number: int
    faults: list[str]
    at_seconds: float
    lasted_seconds: float = 0.0
    recovery_seconds: float | None = None
    rate_before: float = 0.0
    rate_after: float = 0.0
    not_injected: dict[str, str] = field(default_factory=dict)
    violations: list[Violation] = field(default_factory=list)

    @property
    def injected(self) -> list[str]:
        """The faults that came about."""
        return [name for name in self.faults if name not in self.not_injected]


class Run:
    """Runs windows on a world. *tell* is given each window when it is over."""

    def __init__(self, world: World, seed: int, compare_seconds: float, tell: Callable[[Window], object]) -> None:
        self.world = world
        self.seed = seed
        self.compare_seconds = compare_seconds
        self.tell = tell
        self.windows: list[Window] = []
        self.violations: list[Violation] = []
        self.began_at = time.monotonic()
        self.checked_since = ledger.EVER
        self.first_rate = self.last_rate = 0.0
        self.finished = 0

    def work(self, schedule: Iterable[list[str]], seconds: float) -> None:
        """Run windows for so long, or until the schedule ends; then check everything."""
        self.wait_until_flowing([], time.time())
        self.first_rate = rate = self.measure()
        for faults in schedule:
            rate = self.window(faults, rate)
            if time.monotonic() - self.began_at > seconds:
                break
        self.last_rate = self.measure()
        self.conclude()

    def window(self, faults: list[str], rate_before: float) -> float:
        """Run one window; return the rate after it."""
        window = Window(len(self.windows), faults, time.monotonic() - self.began_at, rate_before=rate_before)
        self.windows.append(window)
        began_at = time.time()
        self.inject(window)
        ended_at = time.time()
        window.lasted_seconds = ended_at - began_at
        window.recovery_seconds = self.wait_until_flowing(window.violations, ended_at)
        self.wait_for_workers(window)
        window.rate_after = self.measure()
        window.violations += self.check()
        self.violations += window.violations
        self.tell(window)
        return window.rate_after

    def inject(self, window: Window) -> None:
        """Have the faults of a window come, all at once, and end."""
        threads = [
            threading.Thread(target=self.inject_one, args=(window, name), name=f"fault {name}", daemon=True)
            for name in window.faults
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def inject_one(self, window: Window, name: str) -> None:
        """Have one fault come and end. Its dice are its own, so that they fall as the seed says."""
        dice = random.Random(f"{self.seed} {window.number} {name}")
        try:
            FAULTS[name].run(self.world, dice)
        except (NotInjected, Stopped) as error:
            window.not_injected[name] = str(error)
        except WorkStands as error:
            window.violations.append(Violation("stuck", None, f"{name}: {error}"))
        except Exception as error:
            window.violations.append(Violation("worker", None, f"{name} broke off: {type(error).__name__}: {error}"))

    def wait_until_flowing(self, violations: list[Violation], since: float) -> float | None:
        """Wait until enough batches have finished since *since*; return after how long, or None, with a violation."""
        until = time.monotonic() + RECOVERY_SECONDS
        while time.monotonic() < until:
            try:
                with self.world.admin() as conn:
                    while time.monotonic() < until:
                        if row := conn.execute(FINISHED_LATER.encode(), [since, FLOWS - 1]).fetchone():
                            return float(row[0] - since)
                        self.world.hold(0.02)
            except psycopg.OperationalError:
                continue
        violations.append(Violation("stuck", None, f"{FLOWS} batches have not finished in {RECOVERY_SECONDS:g} s"))
        return None

    def wait_for_workers(self, window: Window) -> None:
        """Wait until every worker that has ended is replaced by one that works; a violation if that does not come."""
        try:
            self.world.fleet.wait_until_complete(RECOVERY_SECONDS)
        except TimeoutError as error:
            window.violations.append(Violation("stuck", None, str(error)))

    def measure(self) -> float:
        """Return how many batches finish in a second, from now on."""
        began_at = time.time()
        self.world.hold(self.compare_seconds)
        with self.world.admin() as conn:
            row = conn.execute(FINISHED_BETWEEN.encode(), [began_at, began_at + self.compare_seconds]).fetchone()
        return (row[0] if row else 0) / self.compare_seconds

    def check(self) -> list[Violation]:
        """Check what has finished lately, and all that is live; and the workers."""
        began_at = time.time()
        with self.world.admin() as conn:
            found = ledger.check_so_far(conn, self.checked_since, LEASE_PATIENCE_SECONDS, READY_PATIENCE_SECONDS)
        self.checked_since = began_at - MARGIN_SECONDS
        self.world.fleet.check_all_work()
        return found + self.taken_violations()

    def taken_violations(self) -> list[Violation]:
        """Return what the fleet has noted since it was last asked."""
        found, self.world.fleet.violations = self.world.fleet.violations, []
        return found

    def conclude(self) -> None:
        """Work all that is left, stop the workers, and check everything."""
        world = self.world
        world.operator.stop()
        world.producer.stop()
        self.drain()
        world.fleet.stop_all()
        self.violations += self.taken_violations()
        with world.admin() as conn:
            self.violations += ledger.check_at_end(conn, world.producer.known_lots, read_marks(world.directory))
            row = conn.execute("SELECT count(*) FROM batchq.batches_finished").fetchone()
            self.finished = row[0] if row else 0

    def drain(self) -> None:
        """Wait until nothing is left to work; what waits for its time has it now."""
        until = time.monotonic() + DRAIN_SECONDS
        with self.world.admin() as conn:
            conn.execute(flows.PAUSE)
            while time.monotonic() < until:
                conn.execute(NO_MORE_WAITING)
                row = conn.execute("SELECT count(*) FROM batchq.batches_live").fetchone()
                if row == (0,):
                    return
                time.sleep(0.2)
