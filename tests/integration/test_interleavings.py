"""Every order of two transactions that touch batches: no deadlock, no error for anybody, and a serial outcome.

BATCHQ_TEST_INTERLEAVINGS: how many of the orders are tried, chosen at random by a fixed seed; `all` of them takes long.
"""

import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator

import psycopg
import pytest

from batchq.postgres.statements import health
from tests.instruments.model.flow_orders import flow_cases, parts_cases
from tests.instruments.model.limit_orders import key_cases, share_cases, two_kinds_cases
from tests.instruments.model.orders import Case, Laboratory, cases, operations
from tests.instruments.model.reality import drop_partitions_ahead
from tests.support.alone import run_alone
from tests.support.steps import step

COUNT = os.environ.get("BATCHQ_TEST_INTERLEAVINGS") or "300"
SEED = int(os.environ.get("BATCHQ_TEST_INTERLEAVINGS_SEED") or 4)
ONCE_WRONG = (
    "A: complete and forget | B: checkpoint 1 | expired: B1 A1 A2 B2",
    "A: complete and forget | B: checkpoint 1 | expired: B1 A1 B2 A2, batch 2 held at first",
    "A: cancel 2 | B: move 2 | pending: B1 A1 A2 B2",
    "A: retry 2 | B: retry whole 2 | old: A1 B1 B2 A2",
    "A: retry whole 2 | B: retry items 2 | failed: B1 A1 B2 A2, batch 1 held at first",
    "A: claim of a key by 2, at most 1 | B: snooze 1 | its key waits: A1 B1 B2 A2 A3",
)


@pytest.fixture
def laboratory(admin_dsn: str) -> Iterator[Laboratory]:
    """Return the sessions."""
    with psycopg.connect(admin_dsn, autocommit=True) as conn:
        drop_partitions_ahead(conn)
    laboratory = Laboratory.at(admin_dsn)
    yield laboratory
    laboratory.close()


def chosen(every: Iterable[Case]) -> list[Case]:
    """Return the cases to try."""
    every = list(every)
    if COUNT == "all":
        return every
    return random.Random(SEED).sample(every, min(int(COUNT), len(every)))


def attempt(laboratory: Laboratory, case: Case, tried: Counter[str]) -> str:
    """Run a case; return what is wrong with it, or nothing."""
    serial = laboratory.serial_outcomes(case)
    rows, errors = found = laboratory.outcome(case)
    tried["orders"] += 1
    tried["behind a gate"] += case.gate is not None
    tried["with an error, as in a serial order"] += any(errors)
    if found in serial:
        return ""
    step("WRONG: %s", case)
    return f"{case}\nerrors: {errors}\n{rows}\n" + "\n".join(f"or, in turn: {e}\n{r}" for r, e in serial)


def test_any_order_of_two_transactions_has_a_serial_outcome(laboratory: Laboratory) -> None:
    tried = Counter[str]()
    wrong = [told for case in chosen(cases()) if (told := attempt(laboratory, case, tried))]
    step("of %s orders of %s operations:", len(list(cases())), len(list(operations())))
    step("%s pairs in a stage; %s", len(laboratory.serial), dict(tried))
    assert not wrong, f"{len(wrong)} of {tried['orders']} orders:\n" + "\n\n".join(wrong[:5])


def test_any_order_of_a_claim_of_a_key_and_something_else_has_a_serial_outcome(laboratory: Laboratory) -> None:
    tried = Counter[str]()
    some = [*chosen(key_cases()), *two_kinds_cases()]
    wrong = [told for case in some if (told := attempt(laboratory, case, tried))]
    step("of %s orders: %s; %s", len(list(key_cases())), dict(tried), Counter(case.other.name for case in some))
    assert not wrong, f"{len(wrong)} of {tried['orders']} orders:\n" + "\n\n".join(wrong[:5])
    claimed = [outcome for pair in laboratory.serial.values() for outcome in pair if "'processing'" in outcome[0]]
    assert len(claimed) > len(laboratory.serial), "claims find something, mostly"


def test_any_order_of_two_changes_of_the_shares_of_a_limit_has_a_serial_outcome(laboratory: Laboratory) -> None:
    tried = Counter[str]()
    wrong = [told for case in chosen(share_cases()) if (told := attempt(laboratory, case, tried))]
    step("of %s orders: %s", len(list(share_cases())), dict(tried))
    assert not wrong, f"{len(wrong)} of {tried['orders']} orders:\n" + "\n\n".join(wrong[:5])
    assert any(one != other for one, other in laboratory.serial.values()), "who comes first makes a difference"


def test_any_order_of_two_transactions_around_a_flow_has_a_serial_outcome(laboratory: Laboratory) -> None:
    releases = check_flows(laboratory, flow_cases())
    assert releases, "some were released"


def test_any_order_of_two_transactions_around_parts_has_a_serial_outcome(laboratory: Laboratory) -> None:
    releases = check_flows(laboratory, parts_cases())
    assert releases, "some were released"


def check_flows(laboratory: Laboratory, cases_of_flows: Iterable[Case]) -> int:
    """Try orders around flows: in each, nothing may be left to do, and nothing may be violated. Return in how many
    serial outcomes a batch was released."""
    every = list(cases_of_flows)
    tried = Counter[str]()
    wrong = [told for case in chosen(every) if (told := attempt(laboratory, case, tried))]
    step("of %s orders: %s", len(every), dict(tried))
    assert not wrong, f"{len(wrong)} of {tried['orders']} orders:\n" + "\n\n".join(wrong[:5])
    outcomes = {rows: key for key, pair in laboratory.serial.items() for rows, _ in pair}
    signs = ["'left to do'", *(f"('{name}'" for name in health.invariants())]
    broken = [f"{key}:\n{rows}" for rows, key in outcomes.items() if any(sign in rows for sign in signs)]
    assert not broken, "\n\n".join(broken[:5])
    return sum("'released'" in rows for rows in outcomes)


def test_the_orders_that_were_wrong_once(laboratory: Laboratory) -> None:
    step("failed items of a checkpoint that a DELETE of the batch had waited for were left behind")
    step("a verb that waited for a batch that moved meanwhile, or was retried, did nothing")
    step("a claim of a key took a batch that was snoozed after the claim had found it")
    found = [case for case in (*cases(), *key_cases()) if str(case) in ONCE_WRONG]
    assert len(found) == len(ONCE_WRONG)
    wrong = [told for case in found if (told := attempt(laboratory, case, Counter()))]
    assert not wrong, "\n\n".join(wrong)


if __name__ == "__main__":
    run_alone(__file__)
