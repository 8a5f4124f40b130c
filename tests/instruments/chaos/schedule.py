"""The schedule: which faults come when, by a seed."""

import random
from collections.abc import Iterator, Sequence

from tests.instruments.chaos.faults import FAULTS

MOST_AT_ONCE = 4
SINGLE_SHARE = 0.25


def schedule(
    seed: int, names: Sequence[str], alone: bool = False, most_at_once: int = MOST_AT_ONCE
) -> Iterator[list[str]]:
    """Yield for ever what comes at once, so many at most; each fault once in each round, some or all *alone*."""
    dice = random.Random(seed)
    while True:
        left = dice.sample(sorted(names), len(names))
        while left:
            chosen = [left.pop()]
            if not alone and dice.random() > SINGLE_SHARE:
                fill(chosen, left, dice.randint(2, most_at_once))
            yield chosen


def fill(chosen: list[str], left: list[str], count: int) -> None:
    """Move faults from *left* to *chosen* that do not get in each other's way, up to *count*."""
    for name in reversed(left[:]):
        touched = frozenset().union(*(FAULTS[each].touches for each in chosen))
        if len(chosen) < count and not touched & FAULTS[name].touches:
            left.remove(name)
            chosen.append(name)
