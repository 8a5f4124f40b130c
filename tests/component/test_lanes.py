"""The lane of threads: brief batches stay with one slot, and no batch waits behind a slow one while a slot is idle."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from uuid import uuid4

import pytest

import batchq
from batchq.batch.claimed import Claim, ClaimedBatch, Runtime
from batchq.postgres.statements.claims import ClaimedRow
from batchq.worker.execution import RELEASED, Outcome
from batchq.worker.lanes import Lane
from batchq.worker.thread_lane import SHORT_SECONDS, ThreadLane
from batchq.worker.worker import switching_quickly
from tests.support.alone import run_alone
from tests.support.steps import step
from tests.support.waiting import allowed, wait_until

SLOTS = 8
GATE = '"gate"'
numbers = itertools.count(1)


class Work:
    """A lane of eight slots, without a database, whose handler does what the payload says; who did what, and when."""

    def __init__(self) -> None:
        self.app = batchq.App()
        self.gate = threading.Event()
        self.did: list[tuple[int, str, float]] = []
        self.outcomes: dict[int, Outcome] = {}
        self.app.handler("work")(self.handle)
        self.lane = ThreadLane(self.app.handlers, SLOTS, self.ended)
        self.lane.start()

    def handle(self, batch: batchq.Batch) -> None:
        """Do what the payload says: nothing, sleep so many seconds, or wait for the gate."""
        if batch.payload == "gate":
            self.gate.wait(20)
        elif batch.payload:
            time.sleep(batch.payload)
        self.did.append((batch.id, threading.current_thread().name, time.monotonic()))

    def ended(self, lane: Lane, batch: ClaimedBatch, outcome: Outcome) -> None:
        """Note the outcome; the finisher would write it."""
        self.outcomes[batch.id] = outcome
        lane.written += 1

    def take(self, *payloads: str) -> list[ClaimedBatch]:
        """Have batches of these payloads claimed at once."""
        claim = Claim("default", uuid4(), Runtime(None, 60, threading.Event()), time.monotonic())  # type: ignore[arg-type]
        rows = [ClaimedRow(next(numbers), "work", 1, 5, one, None, None, 0, 0, 0, None, 0.0) for one in payloads]
        batches = [ClaimedBatch(row, claim) for row in rows]
        self.lane.take(batches)
        return batches

    def wait(self, seconds: float = 10) -> None:
        """Wait until nothing is in hand."""
        wait_until(lambda: not self.lane.in_flight, seconds, "all to end")

    def warm_up(self) -> None:
        """Let the lane learn that batches are brief."""
        for _ in range(20):
            self.take(*["0"] * 200)
            self.wait()
            if self.lane.mean_seconds < SHORT_SECONDS / 2:
                break
        assert self.lane.mean_seconds < SHORT_SECONDS
        wait_until(lambda: self.lane.awake == 0, 5, "all slots to be idle")
        self.did.clear()

    def threads(self) -> set[str]:
        """Return the slots that have worked."""
        return {name for _, name, _ in self.did}


def slots_alive() -> set[str]:
    """Return the names of the slots that there are, of any lane."""
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("batchq-slot-")}


@pytest.fixture
def work() -> Iterator[Work]:
    """Return a lane that is started; at the end it must be told to stop, and every slot must end."""
    assert slots_alive() == set()
    work = Work()
    with switching_quickly():
        yield work
    work.gate.set()
    work.lane.stop()
    wait_until(lambda: not slots_alive(), 5, f"every slot to end, not {slots_alive()}")


def test_brief_batches_stay_with_one_slot(work: Work) -> None:
    work.warm_up()
    assert least_busy(work, lambda: work.take(*["0"] * 2000)) <= 2
    step("also where they come in several claims")
    assert least_busy(work, lambda: [work.take(*["0"] * 200) for _ in range(10)]) <= 2


def test_after_a_hiccup_one_slot_does_the_work_again(work: Work) -> None:
    work.warm_up()
    assert least_busy(work, lambda: work.take(*["0"] * 500, "0.05", *["0"] * 10_000)) <= 2


def least_busy(work: Work, take: Callable[[], object]) -> int:
    """Return how many slots did the last 1000 of what *take* claims; the least of five tries, on a busy machine."""
    counts = []
    for _ in range(5):
        work.did.clear()
        take()
        work.wait()
        counts.append(len({name for _, name, _ in work.did[-1000:]}))
    step("the last 1000 batches were done by so many slots: %s", counts)
    return min(counts)


def test_one_slow_batch_amid_brief_ones_holds_nobody_up(work: Work) -> None:
    work.warm_up()
    began_at = time.monotonic()
    slow = work.take(*["0"] * 100, "1", *["0"] * 100)[100]
    wait_until(lambda: len(work.did) == 200, 5, "the brief ones to end")
    took = max(when for _, _, when in work.did) - began_at
    step("the brief ones took %.1f ms", 1000 * took)
    assert took < allowed(0.1)
    assert work.lane.in_flight == {slow}
    step("nor those that come while it runs")
    began_at = time.monotonic()
    work.take(*["0"] * 100)
    wait_until(lambda: len(work.did) == 300, 5, "those that came later to end")
    assert time.monotonic() - began_at < allowed(0.1)
    assert work.lane.in_flight == {slow}
    work.wait()


def test_several_slow_batches_amid_brief_ones_hold_nobody_up_while_a_slot_is_idle(work: Work) -> None:
    work.warm_up()
    began_at = time.monotonic()
    work.take(*(["0"] * 30 + ["1"]) * (SLOTS - 1), *["0"] * 30)
    wait_until(lambda: len(work.did) == 30 * SLOTS, 5, "the brief ones to end")
    assert time.monotonic() - began_at < allowed(0.3)
    assert len(work.lane.in_flight) == SLOTS - 1
    work.wait()


@pytest.mark.parametrize("warm", [False, True], ids=["at the start", "after brief ones"])
def test_slow_batches_use_every_slot(work: Work, warm: bool) -> None:
    if warm:
        work.warm_up()
    began_at = time.monotonic()
    work.take(*["0.1"] * 3 * SLOTS)
    work.wait()
    took = time.monotonic() - began_at
    step("3 rounds of 0.1 s took %.2f s", took)
    assert len(work.threads()) == SLOTS
    assert took < 0.45


def test_a_batch_that_comes_alone_begins_at_once(work: Work) -> None:
    for is_warm in (False, True):
        if is_warm:
            work.warm_up()
        waits = []
        for _ in range(20):
            began_at = time.monotonic()
            work.take("0")
            work.wait()
            waits.append(work.did[-1][2] - began_at)
        assert sorted(waits)[10] < 0.003, waits


def test_no_slot_spins_while_there_is_nothing_to_do(work: Work) -> None:
    work.warm_up()
    began = time.process_time()
    work.gate.wait(0.5)
    assert time.process_time() - began < 0.1
    step("nor while all wait for slow ones")
    work.take(*[GATE] * SLOTS, *["0"] * 10)
    wait_until(lambda: work.lane.awake == SLOTS, 5, "every slot to be at work")
    began = time.process_time()
    threading.Event().wait(0.5)
    assert time.process_time() - began < 0.1
    work.gate.set()
    work.wait()


def test_each_batch_is_begun_in_the_order_of_its_claim(work: Work) -> None:
    work.warm_up()
    ids = [batch.id for _ in range(5) for batch in work.take(*["0"] * 100)]
    work.wait()
    one_slots = [batch_id for batch_id, _, _ in work.did]
    assert sorted(one_slots) == ids
    if len(work.threads()) == 1:
        assert one_slots == ids


def test_a_slot_lost_to_a_handler_is_replaced_and_all_slots_are_counted(work: Work) -> None:
    stuck = work.take(*[GATE] * SLOTS)
    wait_until(lambda: all(batch.begun_at is not None for batch in stuck), 5, "all to begin")
    for batch in stuck:
        assert work.lane.end_from_outside(batch, RELEASED)
    work.take(*["0.05"] * SLOTS)
    work.wait()
    assert len(work.threads()) == SLOTS
    assert work.lane.lost_slots(0) == SLOTS
    wait_until(lambda: work.lane.awake == 0, 5, f"no slot to be counted as awake, not {work.lane.awake}")
    work.gate.set()
    wait_until(lambda: len(slots_alive()) == SLOTS, 5, "the lost slots to end")
    step("and those that return late are not counted either")
    assert work.lane.lost_slots(0) == 0
    assert work.lane.awake == 0
    work.warm_up()


def test_what_waits_is_given_back_and_what_came_meanwhile_is_kept(work: Work) -> None:
    old = work.take(*[GATE] * SLOTS, *["0"] * 5)
    wait_until(lambda: len(work.lane.waiting) == 5, 5, "the slots to be taken")
    assert work.lane.release_waiting(60) == 0
    assert len(work.lane.waiting) == 5
    for batch in old:
        batch.claim.arrived_at -= 60
    new = work.take("0", "0")
    assert work.lane.release_waiting(30) == 5
    assert [work.outcomes[batch.id] for batch in old[SLOTS:]] == [RELEASED] * 5
    work.gate.set()
    work.wait()
    assert {batch.id for batch in new} <= {batch_id for batch_id, _, _ in work.did}
    assert not {batch.id for batch in old[SLOTS:]} & {batch_id for batch_id, _, _ in work.did}


def test_what_waited_until_its_lease_expired_does_not_begin(work: Work) -> None:
    claim = Claim("default", uuid4(), Runtime(None, 60, threading.Event()), time.monotonic() - 61)  # type: ignore[arg-type]
    row = ClaimedRow(next(numbers), "work", 1, 5, "0", None, None, 0, 0, 0, None, 0.0)
    work.lane.take([ClaimedBatch(row, claim)])
    work.wait()
    assert work.did == []
    assert list(work.outcomes.values()) == [RELEASED]


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "at work"])
def test_a_stop_ends_every_slot(work: Work, busy: bool) -> None:
    if busy:
        work.take(*["0.2"] * SLOTS)
    wait_until(lambda: len(slots_alive()) == SLOTS, 5, "every slot to be there")
    work.lane.stop()
    wait_until(lambda: not slots_alive(), 2, "every slot to end")


def test_a_batch_that_ends_while_the_lane_is_looked_at_does_not_stay_stuck(work: Work) -> None:
    lane = ThreadLane(work.app.handlers, SLOTS, work.ended)
    ends: list[threading.Thread] = []

    class Ending(ClaimedBatch):
        """Ends in its own thread at the moment when somebody looks whether it takes long."""

        __slots__ = ()

        @property
        def begun_at(self) -> float:  # type: ignore[override]
            """When it began."""
            if not ends:
                ends.append(threading.Thread(target=self.end))
                ends[0].start()
                ends[0].join(0.2)  # for as long as it waits for the lane's lock
            return 0.0

        @begun_at.setter
        def begun_at(self, value: float | None) -> None:
            """Leave it as it is."""

        def end(self) -> None:
            """Do as a slot does at its end."""
            lane.end(self, RELEASED)
            lane.slow.discard(self)

    claim = Claim("default", uuid4(), Runtime(None, 60, threading.Event()), time.monotonic())  # type: ignore[arg-type]
    batch = Ending(ClaimedRow(1, "work", 1, 5, "0", None, None, 0, 0, 0, None, 0.0), claim)
    lane.in_flight.add(batch)
    lane.waiting.append(batch)
    lane.awake = 1
    lane.mean_seconds = 0.0
    lane.is_needed()
    ends[0].join(5)
    assert (lane.in_flight, lane.slow) == (set(), set())


if __name__ == "__main__":
    run_alone(__file__)
