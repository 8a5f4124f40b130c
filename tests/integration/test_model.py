"""Random lives of batches, from several connections: after every step the rows are those of a simple model. And random
histories of the shares of a limit, and of batches that wait for others, and of batches that are spread.

BATCHQ_TEST_MODEL_STEPS: about how many steps are taken, 4,000 by default; BATCHQ_TEST_MODEL_SEED: other lives.
A life that fails is made shorter, and its steps are printed.
"""

import logging
import os
from collections.abc import Iterator

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from batchq.postgres.link import Link
from batchq.worker import permits
from tests.instruments.model.flow_lives import FlowLives
from tests.instruments.model.keyed_lives import KeyedLives
from tests.instruments.model.parts_lives import PartsLives
from tests.instruments.model.reality import Reality
from tests.instruments.model.shares import Clock, Shares
from tests.support.alone import run_alone
from tests.support.steps import step

STEPS_A_LIFE = 50
USUAL_STEPS = 4_000
SURE_STEPS = 5 * USUAL_STEPS  # enough for everything to happen, whatever the seed
STEPS = int(os.environ.get("BATCHQ_TEST_MODEL_STEPS") or USUAL_STEPS)
SEED = os.environ.get("BATCHQ_TEST_MODEL_SEED")
MUST_HAPPEN = {
    "began a chunk of items that had failed",
    "claimed again what had begun, before a more urgent one of its key in a kind",
    "claimed again what had begun, before a more urgent one of its key in a queue",
    "claimed by key",
    "claimed nothing by key",
    "claimed the next of a key, in strict order in a kind",
    "claimed the next of a key, in strict order in a queue",
    "claimed the second that may run of a key in a kind",
    "claimed the second that may run of a key in a queue",
    "committed a chunk",
    "committed a chunk with failures",
    "committed a chunk, too late",
    "committed a transaction, too late",
    "extended nothing",
    "gave a claim back",
    "not enqueued: its key is taken",
    "pruned",
    "rescued: failed",
    "rescued: pending",
    "set a limit per key below what runs",
    "wrote a checkpoint again, in vain",
    "wrote outcomes",
    "wrote outcomes, some too late",
}


SHARES_STEPS = 2_500
MUST_HAPPEN_TO_SHARES = {
    "1 got everything",
    "2 got everything",
    "a process was paused beyond its leases",
    "a share expired",
    "a share grew",
    "a share shrank",
    "all began",
    "began nothing without asking",
    "began without asking",
    "died with a share",
    "nothing began",
    "set the limit below the shares",
    "some began",
}


FLOW_STEPS = 5_000
MUST_HAPPEN_TO_FLOWS = {
    "cancel_with_dependents some",
    "cancelled, needed",
    "completed, needed",
    "failed, needed",
    "followed flows, released some",
    "forgotten, needed",
    "put back, needed",
    "retried, waits again",
    "run anyway",
}
PARTS_STEPS = 8_000
MUST_HAPPEN_TO_PARTS = {
    "a part was cancelled",
    "a part was failed",
    "cancelled, waiting",
    "completed, after it was spread",
    "not spread: a part has failed",
    "retried as a whole, cancelled, spread",
    "retried, cancelled, spread",
    "retried, failed, spread",
    "spread again, no items left",
    "spread again, some items left",
    "worked some of a part",
}


@pytest.fixture
def real(admin_dsn: str) -> Iterator[Reality]:
    """Return the workers and the database, the same for all lives."""
    real = Reality(admin_dsn)
    yield real
    real.close()


@pytest.fixture
def clock(admin_dsn: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """Return the workers' clock, the same for all histories of shares."""
    clock = Clock(admin_dsn)
    monkeypatch.setattr(permits, "time", clock)
    Shares.links = [Link(admin_dsn, 10) for _ in range(2)]
    yield clock
    for link in Shares.links:
        link.close()
    clock.conn.close()


def run(machine: type[RuleBasedStateMachine], steps: int) -> None:
    """Run random histories, about so many steps in all."""
    limits = settings(
        max_examples=steps // STEPS_A_LIFE,
        stateful_step_count=STEPS_A_LIFE,
        deadline=None,
        derandomize=SEED is None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine if SEED is None else seed(int(SEED))(machine), settings=limits)


def test_rows_are_those_of_the_model_after_every_step(real: Reality) -> None:
    logging.getLogger("batchq").setLevel(logging.CRITICAL)
    KeyedLives.real, KeyedLives.steps, KeyedLives.seen = real, 0, {}
    run(KeyedLives, STEPS)
    step("%s steps without a violation; what happened: %s", KeyedLives.steps, dict(sorted(KeyedLives.seen.items())))
    assert KeyedLives.steps >= STEPS * 0.5
    needed = USUAL_STEPS if SEED is None else SURE_STEPS
    if needed <= STEPS:
        assert MUST_HAPPEN - KeyedLives.seen.keys() == set()


def test_shares_never_exceed_their_limit_and_all_of_it_is_given_out(clock: Clock) -> None:
    Shares.clock, Shares.steps, Shares.seen = clock, 0, {}
    run(Shares, SHARES_STEPS)
    step("%s steps without a violation; what happened: %s", Shares.steps, dict(sorted(Shares.seen.items())))
    assert Shares.steps >= SHARES_STEPS * 0.5
    assert MUST_HAPPEN_TO_SHARES - Shares.seen.keys() == set()


def test_batches_that_wait_for_others_are_those_of_the_model_after_every_step(admin_dsn: str) -> None:
    with psycopg.connect(admin_dsn, autocommit=True, prepare_threshold=0) as conn:
        FlowLives.prepare(conn)
        run(FlowLives, FLOW_STEPS)
    step("%s steps without a violation; what happened: %s", FlowLives.steps, dict(sorted(FlowLives.seen.items())))
    assert FlowLives.steps >= FLOW_STEPS * 0.5
    assert MUST_HAPPEN_TO_FLOWS - FlowLives.seen.keys() == set()


def test_parts_are_those_of_the_model_after_every_step(admin_dsn: str) -> None:
    with psycopg.connect(admin_dsn, autocommit=True, prepare_threshold=0) as conn:
        PartsLives.prepare(conn)
        run(PartsLives, PARTS_STEPS)
    step("%s steps without a violation; what happened: %s", PartsLives.steps, dict(sorted(PartsLives.seen.items())))
    assert PartsLives.steps >= PARTS_STEPS * 0.5
    assert MUST_HAPPEN_TO_PARTS - PartsLives.seen.keys() == set()


if __name__ == "__main__":
    run_alone(__file__)
