"""What came of a run: lines as it goes, a table for each kind of fault, the verdict."""

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.instruments.chaos.ledger import Violation
from tests.instruments.chaos.run import Run, Window

NAMED = ("lost", "doubled", "stuck")


@dataclass
class Row:
    """The figures of one kind of fault. *alone*: how often it came without another beside it."""

    fault: str
    count: int
    alone: int
    median_seconds: float | None
    worst_seconds: float | None
    share_after: float | None


def line(window: Window) -> str:
    """Return a window in one line."""
    recovered = "NO RECOVERY" if window.recovery_seconds is None else f"recovered in {window.recovery_seconds:.2f} s"
    rates = f"{window.rate_before:.0f} -> {window.rate_after:.0f}/s"
    notes = "".join(f"; {name} did not come about: {why}" for name, why in window.not_injected.items())
    found = "".join(f"\n    VIOLATION {each.what}: {each.detail} (batch {each.batch_id})" for each in window.violations)
    names = " + ".join(window.injected) or "nothing"
    return f"{window.at_seconds:6.1f} s  {names}: {window.lasted_seconds:.1f} s, {recovered}, {rates}{notes}{found}"


def json_line(window: Window) -> str:
    """Return a window as JSON."""
    return json.dumps(asdict(window) | {"violations": [each._asdict() for each in window.violations]})


def read_windows(path: Path) -> list[Window]:
    """Return the windows of an earlier run, from the lines that it left; what was violated is not read."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Window(**json.loads(each) | {"violations": []}) for each in lines]


def rows(windows: Sequence[Window]) -> list[Row]:
    """Return a row for each kind of fault that came."""
    return [row(name, windows) for name in sorted({name for window in windows for name in window.injected})]


def row(name: str, windows: Sequence[Window]) -> Row:
    """Return the row of one kind. The share compares all batches of equal times before and after."""
    its = [window for window in windows if name in window.injected]
    recoveries = [window.recovery_seconds for window in its if window.recovery_seconds is not None]
    before, after = sum(window.rate_before for window in its), sum(window.rate_after for window in its)
    return Row(
        name,
        len(its),
        sum(window.injected == [name] for window in its),
        statistics.median(recoveries) if recoveries else None,
        max(recoveries) if recoveries else None,
        after / before if before else None,
    )


def table(windows: Sequence[Window]) -> str:
    """Return the table of all kinds, in Markdown."""
    head = "| fault | times | alone | recovery, median | worst | rate after, of before |\n|---|---|---|---|---|---|"
    lines = [
        f"| {each.fault} | {each.count} | {each.alone} | {seconds(each.median_seconds)} "
        f"| {seconds(each.worst_seconds)} | {'' if each.share_after is None else f'{each.share_after:.0%}'} |"
        for each in rows(windows)
    ]
    return "\n".join([head, *lines])


def seconds(value: float | None) -> str:
    """Return a time as it stands in the table."""
    return "none" if value is None else f"{value:.2f} s"


def verdict(run: Run) -> str:
    """Return the last line: what was lost, doubled and stuck."""
    counts = Counter(each.what for each in run.violations)
    named = ", ".join(f"{counts[what]} {what}" for what in NAMED)
    others = "".join(f", {count} {what}" for what, count in sorted(counts.items()) if what not in NAMED)
    injected = sum(len(window.injected) for window in run.windows)
    word = "VIOLATED" if run.violations else "HELD"
    return f"{word}: {named}{others}; {run.finished} batches, {injected} faults in {len(run.windows)} windows"


def violations(found: Sequence[Violation]) -> str:
    """Return the violations, a line each; of many, the first."""
    lines = [f"VIOLATION {each.what}: {each.detail} (batch {each.batch_id})" for each in found[:50]]
    return "\n".join([*lines, *([f"... and {len(found) - 50} more"] if len(found) > 50 else [])])
