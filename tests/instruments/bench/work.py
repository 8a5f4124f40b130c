"""What a work is: a function that makes runs. Each work registers itself here by its name."""

import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from tests.instruments.bench.server import Database, Server, fresh_database
from tests.instruments.bench.sizes import RUNS, Sizes

Figures = dict[str, float | None]


@dataclass
class Run:
    """One run of a work. *series* are points for a plot; without *problems* it is verified."""

    work: str
    variant: str
    figures: Figures
    problems: list[str] = field(default_factory=list)
    series: dict[str, list[Any]] = field(default_factory=dict)
    at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def is_verified(self) -> bool:
        """Whether every batch ran exactly once."""
        return not self.problems


@dataclass(frozen=True)
class Bench:
    """What a work stands on."""

    server: Server
    sizes: Sizes
    runs: int | None
    is_short: bool

    def times(self, work: str) -> range:
        """Return how often to repeat each variant of a work."""
        return range(self.runs or (1 if self.is_short else RUNS.get(work, 1)))

    def database(self) -> AbstractContextManager[Database]:
        """Return a fresh database."""
        return fresh_database(self.server)


Work = Callable[[Bench], Iterator[Run]]
WORKS: dict[str, Work] = {}


def work(function: Work) -> Work:
    """Register a work under its function's name."""
    WORKS[function.__name__] = function
    return function


Medians = dict[tuple[str, str], Figures]


def medians(runs: Iterable[Run]) -> Medians:
    """Return the median of each figure, by work and variant, in the order of the runs."""
    groups: dict[tuple[str, str], list[Figures]] = {}
    for run in runs:
        groups.setdefault((run.work, run.variant), []).append(run.figures)
    return {key: median_of(figures) for key, figures in groups.items()}


def median_of(figures: list[Figures]) -> Figures:
    """Return the median of each figure."""
    found: Figures = {}
    for name in dict.fromkeys(name for each in figures for name in each):
        values = [value for each in figures if (value := each.get(name)) is not None]
        found[name] = statistics.median(values) if values else None
    return found
