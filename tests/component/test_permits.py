"""Shares of limits: together they never exceed the limit, whoever comes, goes, dies or is told less."""

import random
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from uuid import uuid4

import psycopg
import pytest

import batchq
from batchq.batch.claimed import Claim, ClaimedBatch, Runtime
from batchq.postgres.link import Link
from batchq.postgres.statements.claims import ClaimedRow
from batchq.worker import permits as permits_module
from batchq.worker.gates import Gates
from batchq.worker.permits import Permit, Permits, begin, has_ended, reserve, unreserve
from batchq.worker.token_bucket import TokenBucket, take_from_all
from tests.support.alone import run_alone
from tests.support.batches import drain, values
from tests.support.clock import Clock
from tests.support.steps import step

Conn = psycopg.Connection[Any]
LEASE_SECONDS = 30.0


class OneWorker:
    """The permits of one worker, with a connection of its own; it wants as many batches as it is told."""

    def __init__(self, dsn: str, name: str) -> None:
        self.link = Link(dsn, 10)
        self.permits = Permits(name, ["default"], LEASE_SECONDS, Gates(), set)
        self.name = name
        self.held = 0

    @property
    def permit(self) -> Permit:
        """The permit of the kind."""
        return self.permits.permits["default", "k"]

    def ask(self, wanted: int) -> int:
        """Read the limits, want so many batches more, refresh; reserve and return what it got now."""
        self.permits.read(self.link)
        if (permit := self.permits.for_claims("default", "k")) is None:
            return wanted
        unreserve([permit], reserve([permit], wanted))
        self.permits.refresh(self.link, 0)
        granted = reserve([permit], wanted)
        self.held += granted
        return granted

    def give_back(self, count: int) -> None:
        """End so many batches."""
        unreserve([self.permit], count)
        self.held -= count

    def close(self) -> None:
        """Close its connection."""
        self.link.close()


@pytest.fixture
def workers(dsn: str) -> Iterator[list[OneWorker]]:
    """Four workers."""
    made = [OneWorker(dsn, f"w{number}") for number in range(4)]
    yield made
    for one in made:
        one.close()


def limit(conn: Conn, **columns: Any) -> None:
    """Set the limit of the kind."""
    conn.execute("DELETE FROM batchq.limits")
    names = ", ".join(columns)
    marks = ", ".join(["%s"] * len(columns))
    conn.execute(f"INSERT INTO batchq.limits (kind, {names}) VALUES ('k', {marks})".encode(), list(columns.values()))


def expire(conn: Conn, worker: str, seconds: float) -> None:
    """Let a worker's last refresh be so long ago."""
    conn.execute(
        "UPDATE batchq.limit_shares SET refreshed_at = refreshed_at - %s * interval '1 s' WHERE worker = %s",
        [seconds, worker],
    )


# ------------------------------------------------------------------------------------------------------- max_running


def test_a_lone_worker_gets_everything_at_once(conn: Conn, workers: list[OneWorker]) -> None:
    limit(conn, max_running=10)
    assert workers[0].ask(50) == 10
    assert workers[0].ask(1) == 0


def test_those_that_come_later_get_their_part_as_batches_end(conn: Conn, workers: list[OneWorker]) -> None:
    limit(conn, max_running=8)
    first, second, *_ = workers
    assert first.ask(8) == 8
    assert second.ask(8) == 0
    step("the first is told of less, and what runs counts until it ends")
    assert first.ask(0) == 0
    first.give_back(3)
    assert first.ask(8) == 0, "its part is 4, and 5 run"
    assert second.ask(8) == 3
    first.give_back(2)
    assert first.ask(8) == 1
    assert second.ask(8) == 1
    assert (first.held, second.held) == (4, 4)


def test_an_idle_worker_leaves_its_part_to_the_others(
    conn: Conn, workers: list[OneWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(conn, max_running=8)
    first, second, *_ = workers
    assert first.ask(4) == 4
    assert second.ask(8) == 4
    first.give_back(4)
    with monkeypatch.context() as patch:
        patch.setattr(permits_module, "WANTED_SECONDS", 0.0)  # it has wanted nothing lately
        first.permits.refresh(first.link, 0)
    assert second.ask(8) == 4
    assert second.held == 8


def test_a_limit_of_one_and_fifty_workers(dsn: str, conn: Conn) -> None:
    limit(conn, max_running=1)
    many = [OneWorker(dsn, f"w{number}") for number in range(50)]
    try:
        assert sum(one.ask(5) for one in many) == 1
        [holder] = [one for one in many if one.held]
        assert sum(one.ask(5) for one in many) == 0
        step("it keeps its share while it wants it")
        holder.give_back(1)
        assert holder.ask(1) == 1
    finally:
        for one in many:
            one.close()


@pytest.mark.parametrize(("seconds", "is_back"), [(LEASE_SECONDS + 1.5, False), (LEASE_SECONDS + 2.5, True)])
def test_the_share_of_a_dead_worker_is_back_after_its_lease_and_two_seconds(
    conn: Conn, workers: list[OneWorker], seconds: float, is_back: bool
) -> None:
    limit(conn, max_running=5)
    assert workers[0].ask(5) == 5
    expire(conn, "w0", seconds)
    assert workers[1].ask(5) == (5 if is_back else 0)


def test_a_worker_that_was_away_for_too_long_claims_nothing_and_its_batches_count(
    conn: Conn, workers: list[OneWorker]
) -> None:
    limit(conn, max_running=5)
    first, second, third, _ = workers
    assert first.ask(3) == 3
    expire(conn, "w0", LEASE_SECONDS + 3)
    assert second.ask(5) == 5
    first.permit.refreshed_at -= LEASE_SECONDS + 3
    assert reserve([first.permit], 1) == 0, "before it asks"
    assert first.ask(5) == 0
    second.give_back(5)
    assert second.ask(0) == 0
    assert third.ask(5) <= 2, "three still run in the first"


def test_a_claim_needs_a_refresh_that_is_recent(conn: Conn, workers: list[OneWorker]) -> None:
    limit(conn, max_running=5)
    assert workers[0].ask(2) == 2
    workers[0].give_back(1)
    workers[0].permit.refreshed_at -= permits_module.FRESH_SECONDS
    assert reserve([workers[0].permit], 1) == 0


def test_a_lowered_limit_lets_nothing_begin_until_few_enough_run_and_a_raised_one_more(
    conn: Conn, workers: list[OneWorker]
) -> None:
    limit(conn, max_running=6)
    one = workers[0]
    assert one.ask(6) == 6
    limit(conn, max_running=2)
    assert one.ask(6) == 0
    one.give_back(4)
    assert one.ask(6) == 0
    one.give_back(1)
    assert one.ask(6) == 1
    limit(conn, max_running=9)
    assert one.ask(20) == 7
    limit(conn, max_running=0)
    assert one.permit.is_closed is False
    assert one.ask(1) == 0
    assert one.permit.is_closed
    conn.execute("DELETE FROM batchq.limits")
    assert one.ask(3) == 3


def test_whatever_happens_the_shares_and_what_runs_never_exceed_the_limit(conn: Conn, dsn: str) -> None:
    rng, most = random.Random(7), 9
    limit(conn, max_running=most)
    fleet = [OneWorker(dsn, f"w{number}") for number in range(5)]
    names = len(fleet)
    try:
        for _ in range(400):
            one = rng.choice(fleet)
            what = rng.random()
            if what < 0.55:
                one.ask(rng.randint(0, 6))
            elif what < 0.85 and one.held:
                one.give_back(rng.randint(1, one.held))
            elif what < 0.9:
                step("it dies, and is forgotten after its lease and 2 s")
                one.close()
                expire(conn, one.name, LEASE_SECONDS + 3)
                fleet[fleet.index(one)] = OneWorker(dsn, f"w{names}")
                names += 1
            elif what < 0.93:
                one.link.close()  # the next statement opens another connection
            assert sum(one.held for one in fleet) <= most
            shares = "SELECT sum(running) FROM batchq.limit_shares WHERE refreshed_at > now() - interval '32 seconds'"
            assert (values(conn, shares)[0] or 0) <= most
    finally:
        for one in fleet:
            one.close()
    assert names > 8


def test_batches_that_were_claimed_before_the_limit_was_known_count(conn: Conn, dsn: str) -> None:
    claim = Claim("default", uuid4(), Runtime(None, 60, None), 0.0)  # type: ignore[arg-type]
    flying = {ClaimedBatch(ClaimedRow(n, "k", 1, 5, "{}", None, None, 0, 0, 0, None, 0.0), claim) for n in range(3)}
    other = ClaimedBatch(ClaimedRow(9, "other", 1, 5, "{}", None, None, 0, 0, 0, None, 0.0), claim)
    with closing(OneWorker(dsn, "w")) as one:
        one.permits = Permits("w", ["default"], LEASE_SECONDS, Gates(), lambda: flying | {other})
        one.permits.read(one.link)
        limit(conn, max_running=5)
        assert one.ask(9) == 2
        flying.pop()
        assert one.ask(9) == 1


def test_a_drain_does_not_end_before_what_a_limit_holds_back_has_run(conn: Conn, dsn: str) -> None:
    conn.execute("INSERT INTO batchq.limits (queue, max_running) VALUES ('default', 2)")
    app = batchq.App()
    ran: list[int] = []

    @app.handler("limited")
    def limited(batch: batchq.Batch) -> None:
        ran.append(batch.id)

    batchq.enqueue_many(conn, "limited", [{}] * 20)
    drain(app, dsn)
    assert len(ran) == 20


def test_of_two_limits_both_must_have_room(conn: Conn, workers: list[OneWorker]) -> None:
    conn.execute("INSERT INTO batchq.limits (kind, max_running) VALUES ('k', 5), (NULL, 3)")
    one = workers[0]
    one.permits.read(one.link)
    both = [one.permits.permits["default", kind] for kind in ("k", None)]
    assert [permit.limit.max_running for permit in both] == [5, 3]
    unreserve(both, reserve(both, 9))
    for permit in both:
        permit.reserve(0)
    one.permits.refresh(one.link, 0)
    [kind, queue] = both
    kind.reserve(9)
    queue.reserve(9)
    assert (kind.held, queue.held) == (5, 0) or queue.held <= 3


# -------------------------------------------------------------------------------------------------------------- rates


def test_rates_add_up_to_the_limit_and_a_dead_workers_rate_is_back_after_five_seconds(
    conn: Conn, workers: list[OneWorker]
) -> None:
    limit(conn, per_second=30)
    for _ in range(3):
        for one in workers[:3]:
            one.ask(100)
    rates = [one.permit.starts.rate for one in workers[:3]]
    assert sum(rates) == pytest.approx(30)
    assert rates == pytest.approx([10, 10, 10])
    expire(conn, "w0", 5.5)
    for _ in range(3):
        for one in workers[1:3]:
            one.ask(100)
    assert [one.permit.starts.rate for one in workers[1:3]] == pytest.approx([15, 15])
    assert workers[0].permit.starts.valid_until - time.monotonic() < permits_module.RATES_VALID_SECONDS


def test_of_a_slow_rate_one_worker_has_all_and_the_others_nothing(conn: Conn, workers: list[OneWorker]) -> None:
    for rate, rates in ((0.5, [0, 0, 0, 0.5]), (1.5, [0, 0, 0, 1.5]), (2.5, [0, 0, 1.25, 1.25])):
        limit(conn, per_second=rate)
        conn.execute("DELETE FROM batchq.limit_shares")
        for _ in range(3):
            for one in workers:
                one.ask(10)
        assert sorted(one.permit.starts.rate for one in workers) == pytest.approx(rates)


def test_a_batch_takes_its_token_when_it_begins_and_none_if_it_does_not(conn: Conn, workers: list[OneWorker]) -> None:
    limit(conn, per_second=100)
    one = workers[0]
    one.ask(10)
    time.sleep(0.06)
    claim = Claim("default", uuid4(), Runtime(None, 60, None), 0.0, (one.permit,))  # type: ignore[arg-type]
    row = ClaimedRow(1, "k", 1, 5, "{}", None, None, 0, 0, 0, None, 0.0)
    before = one.permit.starts.available()
    assert reserve(claim.permits, 2) == 2
    assert one.permit.starts.available() >= before
    begun, not_begun = ClaimedBatch(row, claim), ClaimedBatch(row, claim)
    assert begin(claim.permits)
    begun.begun_at = 1.0
    for batch in (begun, not_begun):
        has_ended(claim.permits, batch)
    assert one.permit.held == 0
    assert one.permit.starts.available() < before + 5


# ------------------------------------------------------------------------------------------------------ token buckets


def test_over_any_time_no_more_is_taken_than_the_burst_and_the_rate_also_while_the_rate_changes() -> None:
    rng, clock = random.Random(3), Clock()
    bucket = TokenBucket(5, 5, clock.monotonic)
    taken: list[float] = []
    for _ in range(4000):
        clock.now += rng.random() * 0.05
        if rng.random() < 0.01:
            bucket.set_rate(rate := rng.choice([1.0, 5.0]), max(rate, 1.0))
        while rng.random() < 0.7 and bucket.take():
            taken.append(clock.now)
    assert len(taken) > 200
    for start, first in enumerate(taken):
        for end in range(start, min(start + 60, len(taken))):
            assert end - start + 1 <= 5 + 5 * (taken[end] - first) + 1e-6


def test_a_bucket_begins_empty_and_ends_when_its_share_does() -> None:
    clock = Clock()
    bucket = TokenBucket(10, 10, clock.monotonic)
    assert not bucket.take()
    clock.now += 0.1 + 1e-9
    assert bucket.take()
    clock.now += 5
    assert bucket.available() == 10
    bucket.valid_until = clock.now
    assert not bucket.take()
    assert bucket.available() == 0
    assert bucket.usage() == (1, True)
    assert bucket.usage() == (0, False)


def test_a_smaller_rate_has_a_smaller_burst_at_once() -> None:
    clock = Clock()
    bucket = TokenBucket(10, 10, clock.monotonic)
    clock.now += 5
    bucket.set_rate(1, 1)
    assert bucket.available() == 1


def test_of_several_buckets_a_token_is_taken_from_all_or_none() -> None:
    clock = Clock()
    full, empty = TokenBucket(1, 1, clock.monotonic), TokenBucket(0, 0, clock.monotonic)
    clock.now += 2
    assert not take_from_all([full, empty])
    assert full.available() == 1
    assert take_from_all([full])


if __name__ == "__main__":
    run_alone(__file__)
