"""Random lives of batches, from several connections: after every step the rows are those of a simple model.

BATCHQ_TEST_MODEL_STEPS: about how many steps are taken, 4,000 by default; BATCHQ_TEST_MODEL_SEED: other lives.
A life that fails is made shorter, and its steps are printed.
"""

import logging
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.instruments.model.keyed_lives import KeyedLives
from tests.instruments.model.reality import Reality
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


@pytest.fixture
def real(admin_dsn: str) -> Iterator[Reality]:
    """Return the workers and the database, the same for all lives."""
    real = Reality(admin_dsn)
    yield real
    real.close()


def test_rows_are_those_of_the_model_after_every_step(real: Reality) -> None:
    logging.getLogger("batchq").setLevel(logging.CRITICAL)
    KeyedLives.real, KeyedLives.steps, KeyedLives.seen = real, 0, {}
    limits = settings(
        max_examples=STEPS // STEPS_A_LIFE,
        stateful_step_count=STEPS_A_LIFE,
        deadline=None,
        derandomize=SEED is None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    lives = KeyedLives if SEED is None else seed(int(SEED))(KeyedLives)
    run_state_machine_as_test(lives, settings=limits)
    step("%s steps without a violation; what happened: %s", KeyedLives.steps, dict(sorted(KeyedLives.seen.items())))
    assert KeyedLives.steps >= STEPS * 0.5
    needed = USUAL_STEPS if SEED is None else SURE_STEPS
    if needed <= STEPS:
        assert MUST_HAPPEN - KeyedLives.seen.keys() == set()


if __name__ == "__main__":
    run_alone(__file__)
