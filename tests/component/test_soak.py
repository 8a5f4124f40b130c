"""The soak's verdict finds what grows, and passes what is flat; and its load is worked as it must be."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from tests.instruments.soak.cli import main
from tests.instruments.soak.load import KINDS, Mix
from tests.instruments.soak.sampling import Sample
from tests.instruments.soak.verdict import Finding, judge
from tests.support.alone import run_alone
from tests.support.steps import step

MINUTES, WARM_UP_SECONDS, EVERY_SECONDS, RATE = 60, 900.0, 5, 30
Change = Callable[[Sample], Sample]


def flat(at: float, dice: random.Random) -> Sample:
    """Return a sample of a healthy run: memory that warms up, a sawtooth of dead tuples, and noise."""
    rss_mb = 60 - 3 * 2 ** (-at / 120) + dice.choice([0, 0.25])
    worker = {"rss_mb": rss_mb, "threads": 15 + (dice.random() < 0.1), "files": 30 + dice.randrange(2)}
    produced = int(at * RATE)
    return Sample(
        at=at,
        workers=[worker, dict(worker)],
        connections=20 + dice.randrange(3),
        live=dice.randrange(30),
        dead_tuples=int(at * 60) % 4000,
        dead_toast_tuples=int(at) % 1000,
        sizes_mb={"batches_live": 3.0 + dice.random() / 10, "batches_live_id": 0.1},
        finished_mb=at / 10,
        produced=produced,
        finished=max(0, produced - dice.randrange(30)),
        pickup_p50_ms=10 + dice.random() * 5,
        pickup_p99_ms=100.0,
        worker_cpu_seconds=at / 10,
        server_cpu_seconds=at / 10,
    )


def wrong(change: Change = lambda sample: sample) -> set[str]:
    """Return the names of what is found wrong in an hour, each of whose samples is changed."""
    dice = random.Random(1)
    samples = [change(flat(float(at), dice)) for at in range(0, MINUTES * 60, EVERY_SECONDS)]
    return {finding.name for finding in judge(samples, WARM_UP_SECONDS) if not finding.is_good}


def first_worker(sample: Sample, **more: float) -> Sample:
    """Return the sample with more of something in the first worker."""
    worker = {name: value + more.get(name, 0) for name, value in sample.workers[0].items()}
    return replace(sample, workers=[worker, sample.workers[1]])


def test_what_is_flat_passes() -> None:
    assert wrong() == set()


def grow(name: str, per_hour: float) -> Change:
    """Return what makes the first worker grow."""
    return lambda sample: first_worker(sample, **{name: int(per_hour * sample.at / 3600 * 1000) / 1000})


LEAKS: dict[str, tuple[Change, str]] = {
    "1.5 MiB an hour": (grow("rss_mb", 1.5), "worker 1: slope of its resident memory"),
    "three files an hour": (grow("files", 6), "worker 1: more open files in the last third than in the first"),
    "a thread": (
        lambda sample: first_worker(sample, threads=sample.at > 2400),
        "worker 1: more threads in the last third than in the first",
    ),
    "connections": (
        lambda sample: replace(sample, connections=sample.connections + 3 * (sample.at > 2400)),
        "more connections in the last third",
    ),
    "dead tuples": (
        lambda sample: replace(sample, dead_tuples=sample.dead_tuples + int(sample.at)),
        "most dead tuples of the live table in the last third",
    ),
    "an index": (
        lambda sample: replace(sample, sizes_mb=sample.sizes_mb | {"batches_live_id": sample.at / 1000}),
        "most size of batches_live_id in the last third",
    ),
    "a rate that falls by 3 %": (
        lambda sample: replace(sample, finished=int(sample.finished - 0.03 * RATE * max(0.0, sample.at - 2100))),
        "drift of the rate from the first third to the last",
    ),
    "waits": (
        lambda sample: replace(sample, pickup_p50_ms=10 + sample.at / 60),
        "median wait of a ready batch in the last third",
    ),
    "a backlog": (
        lambda sample: replace(sample, live=int(sample.at * 0.4)),
        "most batches pending or processing in the last third",
    ),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_what_grows_is_found_and_nothing_else(leak: str) -> None:
    change, name = LEAKS[leak]
    assert wrong(change) == {name}


def test_a_run_that_is_too_short_is_no_verdict() -> None:
    dice = random.Random(1)
    with pytest.raises(ValueError, match="soak for longer"):
        judge([flat(float(at), dice) for at in range(0, 910, EVERY_SECONDS)], WARM_UP_SECONDS)


def test_a_planted_leak_is_found_and_what_was_worked_is_right(tmp_path: Path) -> None:
    step("given 15 s of load, and a handler that keeps 200 KB of each batch")
    code = main(["0.25", "--rate", "20", "--every", "0.5", "--leak-bytes", "200000", "--most-rss-slope", "2000",
                 "--workers", "1", "--out", str(tmp_path)])  # fmt: skip

    step("then the verdict finds it")
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    findings = {each["name"]: each["ok"] for each in lines[-1]["findings"]}
    assert code == 1
    assert findings["worker 1: slope of its resident memory"] is False

    step("and every batch has ended as its kind must, its rows there once; a line for each sample, and a plot")
    assert lines[-1]["problems"] == []
    assert lines[-2]["finished"] > 0
    assert all(sample["workers"][0]["threads"] > 1 for sample in lines[1:-1])
    assert (tmp_path / "soak.svg").read_text().startswith("<?xml")


def test_each_kind_comes_as_often_as_it_weighs_and_evenly() -> None:
    mix = Mix({name: kind.weight for name, kind in KINDS.items()})
    total = sum(kind.weight for kind in KINDS.values())
    drawn = [mix.next() for _ in range(int(10 * total))]
    for name, kind in KINDS.items():
        at = [number for number, drawn_name in enumerate(drawn) if drawn_name == name]
        assert abs(len(at) - 10 * kind.weight) <= 1, name
        most_apart = max((after - before for before, after in pairwise(at)), default=0)
        assert most_apart <= 2 * total / kind.weight, name


def test_a_finding_says_what_it_is() -> None:
    assert str(Finding("threads", 2, 0, "threads")).startswith("TOO MUCH threads: 2.00")


if __name__ == "__main__":
    run_alone(__file__)
