"""In which order test files run, which of them alone, and how long they take."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path

LAYERS = ("foundation", "component", "integration", "e2e")
DURATIONS = Path(__file__).parents[1] / "durations.json"
UNKNOWN_SECONDS = 10.0

ALONE: dict[str, str] = {
    "e2e/test_batch_e2e.py": "it bounds how late a scheduled batch begins",
    "integration/attacks/test_page_connections.py": "it bounds how soon the page answers beside 2,500 connections",
}
"""Files that bear no company, and why: they measure time, or how much work something is."""


def name_of(file: Path) -> str:
    """Return the name of a test file as the tests print it: LAYER/test_x.py, or LAYER/FOLDER/test_x.py."""
    return "/".join(file.parts[-3:] if file.parent.name not in LAYERS else file.parts[-2:])


def layer_of(file: Path) -> str:
    """Return the layer of *file*: the folder that it is in, or the one around that."""
    return next(part for part in file.parts[-2:-4:-1] if part in LAYERS)


def layer_number(file: Path) -> int:
    """Return the place of the layer of *file* in the order of the layers."""
    return LAYERS.index(layer_of(file))


def read_durations() -> dict[str, float]:
    """Return the seconds that each file took when they were written down, by its name."""
    return dict(json.loads(DURATIONS.read_text())) if DURATIONS.exists() else {}


def write_durations(seconds: Mapping[str, float]) -> None:
    """Write down how many seconds each file took."""
    rounded = {name: round(seconds[name], 1) for name in sorted(seconds)}
    DURATIONS.write_text(json.dumps(rounded, indent=2) + "\n")


class Plan:
    """The files that wait for their turn, of which *jobs* run at a time.

    Layers come in their order, and nothing else starts before all of foundation has finished. In a layer the files
    that run alone come first, and the longest of the others before the shorter ones, so that all end together.
    """

    def __init__(
        self,
        files: Collection[Path],
        jobs: int,
        durations: Mapping[str, float],
        alone: Collection[str] = tuple(ALONE),
    ) -> None:
        self.jobs = jobs
        self.durations = durations
        self.alone = alone
        self.waiting = sorted(files, key=self._order)
        self._expected = self._took = 0.0

    def next(self, running: Collection[Path]) -> Path | None:
        """Take and return the file to start beside those *running*, or None if none can start now."""
        if not self.waiting or len(running) >= self.jobs:
            return None
        if running and not self._bears(self.waiting[0], running):
            return None
        return self.waiting.pop(0)

    def again(self, file: Path) -> None:
        """Queue *file* for a second run, by itself."""
        self.alone = {*self.alone, name_of(file)}
        self.waiting = sorted([file, *self.waiting], key=self._order)

    def finished(self, file: Path, seconds: float) -> None:
        """Learn how fast this machine is, which scales all durations."""
        self._expected += self.expected(file)
        self._took += seconds

    def expected(self, file: Path) -> float:
        """Return how many seconds *file* took when that was written down."""
        return self.durations.get(name_of(file), UNKNOWN_SECONDS)

    def seconds_left(self, running: Mapping[Path, float]) -> float:
        """Return how long all will take from now on, given how many seconds each of the *running* has run."""
        pace = self._took / self._expected if self._expected else 1.0
        free_at = [max(0.0, pace * self.expected(file) - seconds) for file, seconds in running.items()]
        free_at += [0.0] * (self.jobs - len(free_at))
        for file in self.waiting:
            if self.is_alone(file):
                free_at = [max(free_at) + pace * self.expected(file)] * self.jobs
            else:
                free_at.sort()
                free_at[0] += pace * self.expected(file)
        return max(free_at)

    def is_alone(self, file: Path) -> bool:
        """Return whether nothing may run beside *file*."""
        return name_of(file) in self.alone

    def _bears(self, file: Path, running: Collection[Path]) -> bool:
        """Return whether *file* may start beside those *running*."""
        if any(map(self.is_alone, (file, *running))):
            return False
        return layer_number(file) == 0 or all(layer_number(other) != 0 for other in running)

    def _order(self, file: Path) -> tuple[int, bool, float, Path]:
        return layer_number(file), not self.is_alone(file), -self.expected(file), file
