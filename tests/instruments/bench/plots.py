"""Plots of the results, as SVG."""

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

from tests.instruments.bench.work import Run, medians

Draw = Callable[[Axes, list[Run]], None]
STYLE = {"svg.hashsalt": "batchq", "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}

BARS = {
    "enqueue": ("per_s", "batches a second"),
    "drain": ("executed_per_s", "batches a second"),
    "ceiling": ("per_s", "batches a second"),
    "backlog": ("executed_per_s", "batches a second"),
    "history": ("executed_per_s", "batches a second"),
    "network": ("executed_per_s", "batches a second"),
    "pooler": ("executed_per_s", "batches a second"),
    "items": ("items_per_s", "items a second"),
    "handlers": ("share_of_ideal", "share of the ideal"),
}

MOMENTS = {"held_at": "the snapshot is taken", "burst_until": "the burst ends"}


def draw(work: str, runs: list[Run], folder: Path) -> list[Path]:
    """Draw the plot of a work into *folder*; return its file, or nothing if the work has no plot."""
    its = [run for run in runs if run.work == work]
    drawing = LINES.get(work) or (bars if work in BARS else None)
    if drawing is None or not its:
        return []
    with matplotlib.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
        drawing(axes, its)
        file = folder / f"{work}.svg"
        figure.savefig(file, metadata={"Date": None})
        pyplot.close(figure)
    return [file]


def bars(axes: Axes, runs: list[Run]) -> None:
    """Draw a bar for each variant."""
    figure, label = BARS[runs[0].work]
    found = {variant: figures.get(figure) or 0.0 for (_, variant), figures in medians(runs).items()}
    drawn = axes.barh(list(found), list(found.values()), color="#3b6ea5")
    axes.bar_label(drawn, [f"{value:,.0f}" if value >= 10 else f"{value:.2f}" for value in found.values()], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(label)


def distribution(axes: Axes, runs: list[Run]) -> None:
    """Draw which share of the batches was picked up within a time."""
    for run in runs:
        waits = run.series.get("ms", [])
        axes.step(waits, [(number + 1) / len(waits) for number in range(len(waits))], label=run.variant, where="post")
    axes.set_xlabel("ms from commit to start")
    axes.set_ylabel("share of batches")
    axes.set_xlim(left=0)
    axes.legend()


def rates(axes: Axes, runs: list[Run]) -> None:
    """Draw the rate of each five seconds."""
    for run in runs:
        points = run.series.get("per_s", [])
        axes.plot([at for at, _ in points], [rate for _, rate in points], marker=".", label=run.variant)
    for name in MOMENTS.keys() & runs[-1].series:
        axes.axvline(runs[-1].series[name][0], color="grey", linestyle=":")
        axes.set_xlabel(f"s (dotted: {MOMENTS[name]})")
    axes.set_ylabel("batches a second")
    axes.set_ylim(bottom=0)
    axes.legend()


def memory(axes: Axes, runs: list[Run]) -> None:
    """Draw the resident memory."""
    for run in runs:
        points = run.series.get("rss_mb", [])
        axes.plot([at for at, _ in points], [rss for _, rss in points], label=run.variant)
    axes.set_xlabel("s")
    axes.set_ylabel("MiB")
    axes.set_ylim(bottom=0)
    axes.legend()


LINES: dict[str, Draw] = {"pickup": distribution, "snapshot": rates, "burst": rates, "memory": memory}
