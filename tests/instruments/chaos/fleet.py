"""The workers: so many of each style, replaced when they end, each lent to one fault at a time."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tests.instruments.chaos.ledger import Violation
from tests.instruments.chaos.marks import DIRECTORY
from tests.instruments.chaos.orders import QUEUES, STYLES
from tests.instruments.chaos.spans import DIRECT
from tests.instruments.chaos.worker import CODE
from tests.support.processes import ROOT, Process
from tests.support.waiting import wait_until

SETTINGS = {
    "lease_seconds": 2,
    "database_timeout_seconds": 2,
    "transaction_timeout_seconds": 3,
    "shutdown_seconds": 2,
    "concurrency": 4,
    "async_concurrency": 16,
    "pool_size": 4,
    "log_format": "json",
}
ALWAYS_NEW = ("limits", "flows")  # styles that old code is kept from: it knows no limits, keys and parts
STOP_SECONDS = 20.0  # shutdown, then twice the time that the database has to answer, and a busy machine
TEND_SECONDS = 0.05
AGAIN_SECONDS = 0.5
IDLE_SECONDS = 25.0  # a log-in that was refused is not tried again for 15 s
AVAILABLE_SECONDS = 40.0


class ChaosWorker(Process):
    """One worker of a style, with the batchq of the directory *code*, None for this checkout's."""

    def __init__(
        self, style: str, dsn: str, code: Path | None, directory: Path, number: int, settings: dict[str, Any],
        direct_dsn: str = "",
    ) -> None:  # fmt: skip
        self.style = style
        self.code = code
        self.log = directory / f"worker-{number}-{style}.log"
        given = {"dsn": dsn, "queues": QUEUES.get(style, "default")} | SETTINGS | settings
        environment = os.environ | {f"BATCHQ_{name.upper()}": str(value) for name, value in given.items()}
        environment |= {DIRECTORY: str(directory), DIRECT: direct_dsn}
        if code:
            environment[CODE] = str(code)
        with self.log.open("wb") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "tests.instruments.chaos.worker", style],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.born_at = time.monotonic()
        self.seen_started = False
        self.may_end_itself = False  # its memory was short: it may give up

    @property
    def has_started(self) -> bool:
        """Whether it works."""
        if not self.seen_started:
            self.seen_started = self.has_said("worker started")
        return self.seen_started

    def has_said(self, event: str) -> bool:
        """Tell whether an event is in its log."""
        return f'"{event}"'.encode() in self.log.read_bytes()

    def tell(self, *words: object) -> None:
        """Have it do something, see `worker`."""
        assert self.popen.stdin is not None
        with suppress(BrokenPipeError, ValueError):  # it has ended meanwhile
            self.popen.stdin.write((" ".join(map(str, words)) + "\n").encode())
            self.popen.stdin.flush()

    def hang_up(self) -> None:
        """Tell it nothing more."""
        assert self.popen.stdin is not None
        with suppress(BrokenPipeError):
            self.popen.stdin.close()

    def end(self) -> None:
        """End it, whatever state it is in."""
        super().end()
        self.hang_up()


@dataclass
class Place:
    """A place for one worker. *lent*: a fault has it, which may end it in any way. *settings*: of its next worker."""

    style: str
    worker: ChaosWorker
    lent: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    again_at: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_ready(self) -> bool:
        """Whether its worker works, and no fault has it."""
        return not self.lent and self.worker.is_running and self.worker.has_started


class Fleet:
    """*count* workers of each style. *direct_dsn*: past everything that can be broken, for what handlers note."""

    def __init__(
        self, dsn: str, direct_dsn: str, directory: Path, count: int, styles: tuple[str, ...] = STYLES
    ) -> None:
        self.dsn = dsn
        self.direct_dsn = direct_dsn
        self.directory = directory
        self.started = 0
        self.code: Path | None = None
        self.violations: list[Violation] = []
        self.notes: list[str] = []
        self.lock = threading.Lock()
        self.places = [Place(style, self.launch(style)) for style in styles for _ in range(count)]
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self.run, name="fleet")

    def __enter__(self) -> Self:
        self.thread.start()
        try:
            self.wait_until_complete(60)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.ending.set()
        self.thread.join()
        for place in self.places:
            with place.lock:
                place.worker.end()

    def launch(self, style: str, settings: dict[str, Any] | None = None) -> ChaosWorker:
        """Start a worker with the code that is due, and settings other than usual."""
        with self.lock:
            self.started += 1
            return ChaosWorker(
                style, self.dsn, self.code_of(style), self.directory, self.started, settings or {}, self.direct_dsn
            )

    def code_of(self, style: str) -> Path | None:
        """Return the version of the code that is due for a style."""
        return None if style in ALWAYS_NEW else self.code

    def run(self) -> None:
        """Replace whoever has ended."""
        while not self.ending.wait(TEND_SECONDS):
            for place in self.places:
                with place.lock:
                    if not place.worker.is_running:
                        self.replace(place)

    def replace(self, place: Place) -> None:
        """Start a worker in a place whose worker has ended; later, where it could not even start."""
        old = place.worker
        if old.has_started:
            if not place.lent:
                self.ended_by_itself(old)
        elif place.again_at == 0.0:
            self.notes.append(f"could not start: {last_line(old)}")
            place.again_at = time.monotonic() + AGAIN_SECONDS
        if time.monotonic() >= place.again_at and not self.ending.is_set():
            place.worker, place.again_at = self.launch(place.style, place.settings), 0.0
            old.hang_up()

    def ended_by_itself(self, worker: ChaosWorker) -> None:
        """Take note of a worker that has ended though no fault had it."""
        text = f"{worker.log.name} ended by itself with {worker.popen.returncode}: {last_line(worker)}"
        if worker.may_end_itself:
            self.notes.append(text)
        else:
            self.violations.append(Violation("worker", None, text))

    def is_complete(self) -> bool:
        """Tell whether every place has a worker that works."""
        return all(place.is_ready for place in self.places)

    def wait_until_complete(self, timeout_seconds: float) -> None:
        """Wait until every place has a worker that works."""
        try:
            wait_until(self.is_complete, timeout_seconds, "all workers to work")
        except TimeoutError as error:
            raise TimeoutError(f"{error}; {self.notes[-3:]}") from None

    def check_all_work(self) -> None:
        """Take note of workers that live, and have begun nothing for long though there is always enough."""
        for place in self.places:
            worker = place.worker
            if place.is_ready and time.monotonic() - worker.born_at > IDLE_SECONDS:
                idle_seconds = time.time() - (self.directory / f"marks-{worker.pid}").stat().st_mtime
                if idle_seconds > IDLE_SECONDS:
                    text = f"{worker.log.name} has begun nothing for {idle_seconds:.0f} s: {last_line(worker)}"
                    self.violations.append(Violation("stuck", None, text))

    # ------------------------------------------------------------------------------------------------ for the faults

    @contextmanager
    def lend(self, dice: random.Random, style: str | None = None) -> Iterator[Place]:
        """Give the place of a worker that works, for the block, which may do anything to it."""
        place = wait_until(lambda: self.take(dice, style), AVAILABLE_SECONDS, "a worker that works")
        assert place
        try:
            yield place
        finally:
            self.take_back(place)

    def take_back(self, place: Place) -> None:
        """End the loan of a place; a worker that ended meanwhile is replaced before anybody wonders why."""
        with place.lock:
            if not place.worker.is_running:
                self.replace(place)
            place.lent = False

    def take(self, dice: random.Random, style: str | None) -> Place | None:
        """Take a place, None if all are taken or without a worker that works."""
        with self.lock:
            ready = [place for place in self.places if place.is_ready and style in (None, place.style)]
            if not ready:
                return None
            place = dice.choice(ready)
            place.lent = True
            return place

    def kill(self, place: Place) -> None:
        """Kill the worker of a lent place."""
        with place.lock:
            place.worker.kill()
            self.replace(place)

    def stop_worker(self, place: Place, number: signal.Signals = signal.SIGTERM) -> None:
        """Tell the worker of a lent place to stop, and see that it does in time."""
        worker = place.worker  # once it has ended, another one takes its place at any time
        worker.send(number)
        self.wait_for_stop(worker)

    def wait_for_stop(self, worker: ChaosWorker) -> None:
        """Wait for a worker that was told to stop; exit code 1 says that the database did not answer."""
        try:
            code = worker.wait(STOP_SECONDS)
        except TimeoutError:
            self.violations.append(Violation("stuck", None, f"{worker.log.name} does not stop: {last_line(worker)}"))
            worker.kill()
        else:
            if code not in (0, 1, -signal.SIGKILL):
                text = f"{worker.log.name} stopped with {code}: {last_line(worker)}"
                self.violations.append(Violation("worker", None, text))

    def set(self, place: Place, **settings: Any) -> None:
        """Have the worker of a lent place stop, and another one work with these settings beside the usual ones."""
        old, place.settings = place.worker, settings
        self.stop_worker(place)
        wait_until(lambda: place.worker is not old and place.worker.has_started, AVAILABLE_SECONDS, "the new worker")

    def roll(self, code: Path | None) -> None:
        """Replace the workers, half of them at a time, with others of the version *code*; but see ALWAYS_NEW."""
        self.code = code
        for half in range(2):
            threads = [threading.Thread(target=self.redeploy, args=(place,)) for place in self.places[half::2]]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def redeploy(self, place: Place) -> None:
        """Replace the worker of a place by one of the version that is due."""
        wait_until(lambda: self.lend_this(place), AVAILABLE_SECONDS, "the worker to be free")
        try:
            if place.worker.code != (code := self.code_of(place.style)):
                self.stop_worker(place)
                wait_until(lambda: place.worker.code == code and place.worker.has_started, AVAILABLE_SECONDS,
                           "the new worker to work")  # fmt: skip
        finally:
            self.take_back(place)

    def lend_this(self, place: Place) -> bool:
        """Take one place; tell whether it could be had."""
        with self.lock:
            if not place.is_ready:
                return False
            place.lent = True
            return True

    def stop_all(self) -> None:
        """Stop every worker, at the end of the run."""
        self.ending.set()
        self.thread.join()
        running = [place.worker for place in self.places if place.worker.is_running]
        for worker in running:
            worker.send(signal.SIGTERM)
        for worker in running:
            self.wait_for_stop(worker)


def last_line(worker: ChaosWorker) -> str:
    """Return the last thing that a worker has said."""
    lines = worker.text().strip().splitlines()
    return lines[-1][:500] if lines else "not a word"
