"""The plot of a soak: what must stay flat, over time."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from itertools import pairwise

from matplotlib import pyplot
from matplotlib.axes import Axes

from tests.instruments.bench.plots import STYLE
from tests.instruments.soak.sampling import Sample


def draw(samples: Sequence[Sample], warm_up_seconds: float, file: Path) -> None:
    """Draw all panels into *file*."""
    panels: list[Callable[[Axes, Sequence[Sample]], None]] = [memory, counts, sizes, dead_tuples, rates, waits]
    with matplotlib.rc_context(STYLE):
        figure, axes = pyplot.subplots(3, 2, figsize=(10, 8), layout="constrained", sharex=True)
        for panel, its in zip(panels, axes.flat, strict=True):
            panel(its, samples)
            its.axvline(warm_up_seconds / 60, color="grey", linestyle=":")
            its.set_ylim(bottom=0)
            its.legend(fontsize=7)
        for its in axes[-1]:
            its.set_xlabel("min (dotted: end of the warm-up)")
        figure.savefig(file, metadata={"Date": None})
        pyplot.close(figure)


def line(axes: Axes, samples: Sequence[Sample], look: Callable[[Sample], float | None], label: str) -> None:
    """Draw a line."""
    points = [(sample.at / 60, value) for sample in samples if (value := look(sample)) is not None]
    axes.plot([at for at, _ in points], [value for _, value in points], label=label, linewidth=1)


def memory(axes: Axes, samples: Sequence[Sample]) -> None:
    """Draw each worker's resident memory."""
    for number in range(len(samples[0].workers)):
        line(axes, samples, lambda sample, n=number: sample.workers[n]["rss_mb"], f"worker {number + 1}")
    axes.set_ylabel("resident MiB")


def counts(axes: Axes, samples: Sequence[Sample]) -> None:
    """Draw threads, files and connections."""
    for number in range(len(samples[0].workers)):
        for name in ("threads", "files"):
            line(axes, samples, lambda sample, n=number, name=name: sample.workers[n][name], f"{name}, {number + 1}")
    line(axes, samples, lambda sample: sample.connections, "connections")
    axes.set_ylabel("how many")


def sizes(axes: Axes, samples: Sequence[Sample]) -> None:
    """Draw the size of the live table and of each index."""
    for name in samples[0].sizes_mb:
        line(axes, samples, lambda sample, name=name: sample.sizes_mb[name], name.removeprefix("batches_"))
    axes.set_ylabel("MiB")


def dead_tuples(axes: Axes, samples: Sequence[Sample]) -> None:
    """Draw the dead tuples of the live table, and what is live."""
    line(axes, samples, lambda sample: sample.dead_tuples, "dead tuples")
    line(axes, samples, lambda sample: sample.dead_toast_tuples, "dead tuples of TOAST")
    line(axes, samples, lambda sample: sample.live, "batches pending or processing")
    axes.set_ylabel("how many")


def rates(axes: Axes, samples: Sequence[Sample]) -> None:
    """Draw the rate between samples."""
    points = [(b.at / 60, (b.finished - a.finished) / (b.at - a.at)) for a, b in pairwise(samples)]
    axes.plot([at for at, _ in points], [rate for _, rate in points], label="finished", linewidth=1)
    axes.set_ylabel("batches a second")


def waits(axes: Axes, samples: Sequence[Sample]) -> None:
    """Draw how long ready batches wait."""
    line(axes, samples, lambda sample: sample.pickup_p50_ms, "median wait")
    line(axes, samples, lambda sample: sample.pickup_p99_ms, "99 %")
    axes.set_ylabel("ms from commit to start")
