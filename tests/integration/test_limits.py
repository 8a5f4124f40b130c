"""Limits with real processes and faults, in short, as handlers saw it. The long form: tests/instruments/limits."""

import pytest

from tests.instruments.limits import works
from tests.support.alone import run_alone
from tests.support.steps import step
from tests.support.trials import Place, Seen


@pytest.fixture
def place(dsn: str) -> Place:
    """The test's database; its server stays up."""
    return Place(dsn, works.APP)


def judge(seen: Seen) -> None:
    """Log what was seen; fail if anything must not be."""
    step("%s", seen.figures)
    assert seen.faults == []


def test_never_more_run_at_once_than_the_limit_beside_kills_and_freezes(place: Place) -> None:
    seen = works.running(place, seconds=24, fault_every_seconds=10, lease_seconds=2)
    seen.faults = [fault for fault in seen.faults if "fully used" not in fault]  # of that, a busy machine decides
    judge(seen)


def test_keys_with_a_limit_of_one_keep_their_order_beside_kills(place: Place) -> None:
    judge(works.ordered(place, batches=3000, workers=3, kill_every_seconds=4))


def test_every_key_has_its_first_turn_before_any_has_many(place: Place) -> None:
    seen = works.keys(place, small_keys=1000, hot_batches=10_000)
    seen.faults = [fault for fault in seen.faults if "of the rate" not in fault]
    judge(seen)


def test_what_one_process_is_told_all_heed(place: Place) -> None:
    judge(works.throttled(place))


if __name__ == "__main__":
    run_alone(__file__)
