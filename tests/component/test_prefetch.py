"""The prefetch: how many batches a lane claims, by the rate at which they ran. Without threads, on its own clock."""

import pytest

from batchq.worker import prefetch
from batchq.worker.prefetch import MOST_PREFETCHED, Prefetch
from tests.support.alone import run_alone
from tests.support.clock import Clock
from tests.support.steps import step

SLOTS = 8


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return the clock that the prefetch reads."""
    clock = Clock()
    monkeypatch.setattr(prefetch, "time", clock)
    return clock


def test_the_prefetch_is_what_ends_in_a_fifth_of_a_second(clock: Clock) -> None:
    ahead, run_count = Prefetch(SLOTS), 0
    for batches, wanted in ((0, SLOTS), (10, SLOTS), (1000, 100), (1000, 150), (1_000_000, MOST_PREFETCHED)):
        run_count += batches
        clock.now += 1.0
        assert ahead.wanted(run_count) == wanted


def test_the_rate_is_measured_at_most_every_50_ms(clock: Clock) -> None:
    ahead = Prefetch(SLOTS)
    clock.now += 0.03125
    assert ahead.wanted(1000) == SLOTS
    clock.now += 0.03125
    assert ahead.wanted(1000) == 1600, "half of 16,000 per second, for 0.2 s"


@pytest.mark.parametrize(
    ("round_trip_seconds", "most", "of_slow_ones"),
    [(0.0, 4000, 100), (0.005, 6000, 107), (0.02, 12000, 130), (0.1, 12000, 250), (0.5, 12000, 400)],
)
def test_the_farther_the_database_the_more_is_prefetched_up_to_three_times_as_much(
    clock: Clock, round_trip_seconds: float, most: int, of_slow_ones: int
) -> None:
    ahead = Prefetch(SLOTS)
    ahead.adapt_to(round_trip_seconds)
    clock.now += 1.0
    assert ahead.wanted(1_000_000) == most
    step("of slow batches what ends in a fifth of a second and three round trips, in 0.8 s at most")
    slow = Prefetch(SLOTS)
    slow.adapt_to(round_trip_seconds)
    clock.now += 1.0
    assert slow.wanted(1000) == of_slow_ones, "half of 1,000 per second"


def test_a_burst_shows_what_the_lane_can_do_though_claims_come_rarely(clock: Clock) -> None:
    step("8 batches of 1 ms, then nothing for a second: the rate is that of the batches, not that of the claims")
    ahead, run_count = Prefetch(SLOTS), 0
    for _ in range(3):
        ahead.begin_burst(SLOTS, continues=False)
        clock.now += 0.008
        run_count += SLOTS
        ahead.end_burst()
        clock.now += 1.0
        assert ahead.wanted(run_count) in (199, 200), "the clock has no exact thousandths"
    step("and what it could do once is forgotten")
    for _ in range(8):
        clock.now += 1.0
        wanted = ahead.wanted(run_count)
    assert wanted == SLOTS


def test_a_burst_continues_while_a_batch_is_in_flight(clock: Clock) -> None:
    ahead = Prefetch(SLOTS)
    ahead.begin_burst(100, continues=False)
    clock.now += 0.5
    ahead.begin_burst(300, continues=True)
    clock.now += 0.5
    ahead.end_burst()
    assert ahead.wanted(0) == 80, "400 per second, for 0.2 s"
    step("and counts once")
    clock.now += 1.0
    assert ahead.wanted(0) == 40


def test_batches_that_were_released_unrun_are_not_claimed_again_as_many(clock: Clock) -> None:
    ahead = Prefetch(SLOTS)
    clock.now += 1.0
    assert ahead.wanted(1000) == 100
    ahead.forget_rate()
    assert ahead.wanted(1000) == SLOTS


@pytest.mark.parametrize(
    ("wanted", "occupied", "room"),
    [
        *((2000, occupied, room) for occupied, room in ((0, 2000), (900, 1100), (1000, 1000), (1001, 0), (2500, 0))),
        *((4000, occupied, room) for occupied, room in ((2999, 1001), (3001, 0))),
        *((SLOTS, occupied, room) for occupied, room in ((0, SLOTS), (SLOTS - 1, 1), (SLOTS, 0))),
    ],
)
def test_claims_are_large_where_the_prefetch_is(wanted: int, occupied: int, room: int) -> None:
    assert Prefetch(SLOTS).room(wanted, occupied) == room


if __name__ == "__main__":
    run_alone(__file__)
