"""Random histories of a limit's shares: workers take, use, lose and return them, while a person changes the limit.

The workers' own permits are used, with a clock that the histories move.
"""

import time
from typing import ClassVar

import psycopg
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from batchq.postgres.link import Link
from batchq.worker.gates import Gates
from batchq.worker.permits import Permits

QUEUE, KIND = "default", "mail"
LEASE_SECONDS = 30.0
LOST_SECONDS = LEASE_SECONDS + 2  # after it, a share has expired that was not refreshed
FRESH_SECONDS = 2.0  # a claim after it would give a lease beyond the share
ROUNDS = 3
SLOW_SECONDS = 1.0  # a share is used for so long without a refresh
MANY = 100
which = st.integers(0, 1)
waits = st.sampled_from([0.4, 0.4, 1.5, 3.0, 6.0, LEASE_SECONDS, LOST_SECONDS])


class Clock:
    """The monotonic clock of the workers; when it is moved, the shares in the database become as much older."""

    def __init__(self, dsn: str) -> None:
        self.conn = psycopg.connect(dsn, autocommit=True)
        self.ahead = 0.0

    def monotonic(self) -> float:
        """Return the time in seconds."""
        return time.monotonic() + self.ahead

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.ahead += seconds
        older = "UPDATE batchq.limit_shares SET refreshed_at = refreshed_at - %s * interval '1 second'"
        self.conn.execute(older, [seconds])


class Process:
    """A worker process. Its leases expire with its share: the keeper renews them right after it."""

    def __init__(self, name: str, link: Link, clock: Clock) -> None:
        self.name, self.link, self.clock = name, link, clock
        self.permits = Permits(name, [QUEUE], LEASE_SECONDS, Gates(), set)
        self.permits.read(link)
        self.permit = self.permits.permits[QUEUE, KIND]

    @property
    def age(self) -> float:
        """How long ago it asked for its share."""
        return self.clock.monotonic() - self.permit.refreshed_at

    @property
    def may_have(self) -> int:
        """How many batches it has running, with a lease, or may begin."""
        return 0 if self.age >= LOST_SECONDS else max(self.permit.may_run, self.permit.held)

    def refresh(self) -> None:
        """Ask for its share. Then a process that was paused too long finds that it has lost its leases."""
        has_lost = self.age >= LOST_SECONDS
        self.permits.read(self.link)
        self.permits.refresh(self.link, older_than_seconds=-1.0)
        if has_lost:
            self.end(self.permit.held)

    def begin(self, wanted: int) -> int:
        """Claim batches; return how many it was allowed."""
        age = self.age
        granted = self.permit.reserve(wanted)
        assert granted == 0 or age < FRESH_SECONDS, "leases beyond the share"
        return granted

    def end(self, count: int) -> None:
        """Have so many batches end."""
        self.permit.unreserve(count)


class Shares(RuleBasedStateMachine):
    """What may happen to the shares of one limit; `clock` and `links` are set by the test, the same for all.

    dead: processes that have not returned their shares. may_have: what all processes may have after the last step.
    """

    clock: ClassVar[Clock]
    links: ClassVar[list[Link]]
    seen: ClassVar[dict[str, int]] = {}
    steps: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.started = self.limit = self.may_have = 0
        self.live: list[Process] = []
        self.dead: list[Process] = []

    @initialize()
    def begin_all(self) -> None:
        """Two processes share a limit of four."""
        self.clock.conn.execute("DELETE FROM batchq.limits; DELETE FROM batchq.limit_shares")
        self.set_limit(4)
        self.live = [self.new_process(number) for number in range(len(self.links))]
        for number in (0, 1):
            self.work(number, 2)

    def new_process(self, number: int) -> Process:
        """Start a process."""
        self.started += 1
        return Process(f"process {self.started}", self.links[number], self.clock)

    def happened(self, what: str) -> None:
        """Count what happened, so that the test can see that everything did."""
        self.seen[what] = self.seen.get(what, 0) + 1
        note(f"    # {what}")

    @invariant()
    def keeps_limit(self) -> None:
        """No step lets the processes have more than the limit; if they had more, because it was lowered, not more."""
        type(self).steps += 1
        every = self.live + self.dead
        now = sum(process.may_have for process in every)
        assert now <= max(self.limit, self.may_have), f"{now} of {self.limit}, before: {self.may_have}"
        self.may_have = now
        stored: dict[str, int] = dict(
            self.clock.conn.execute("SELECT worker, running FROM batchq.limit_shares").fetchall()
        )
        assert all(process.may_have <= stored.get(process.name, 0) for process in every), "more than its share"

    # ---------------------------------------------------------------------------------------------------- the processes

    @rule(which=which)
    def refresh(self, which: int) -> None:
        process = self.live[which]
        before, has_lost = process.permit.may_run, process.permit.held > 0 and process.age >= LOST_SECONDS
        process.refresh()
        change = process.permit.may_run - before
        self.happened("a share grew" if change > 0 else "a share shrank" if change < 0 else "a share stayed")
        if has_lost:
            self.happened("a process was paused beyond its leases")

    @rule(which=which, wanted=st.integers(1, 6))
    def work(self, which: int, wanted: int) -> None:
        """A process claims what it may, and asks for more if that is not enough, as a worker does."""
        process = self.live[which]
        if process.age >= LOST_SECONDS:
            self.refresh(which)
        begun = process.begin(wanted)
        if begun < wanted:
            self.refresh(which)
            begun += process.begin(wanted - begun)
        self.happened("all began" if begun == wanted else "nothing began" if begun == 0 else "some began")

    @rule(which=which, ends=st.integers(0, 4), wanted=st.integers(0, 6))
    def change(self, which: int, ends: int, wanted: int) -> None:
        """Batches of a process end, and it claims others without asking: it has not heard of anything since."""
        process = self.live[which]
        process.end(min(ends, process.permit.held))
        if wanted and process.age < LOST_SECONDS:
            self.happened("began without asking" if process.begin(wanted) else "began nothing without asking")

    @rule(which=which, is_graceful=st.booleans())
    def stop(self, which: int, is_graceful: bool) -> None:
        """A process ends, or dies with its batches running; another takes its place."""
        self.work(which, 2)
        process = self.live[which]
        if is_graceful:
            process.end(process.permit.held)
            process.permits.give_up(process.link)
        else:
            self.dead.append(process)
            self.happened("died with a share" if process.may_have else "died without a share")
        self.live[which] = self.new_process(which)

    # -------------------------------------------------------------------------------------------- the person, and time

    @rule(limit=st.integers(0, 6))
    def set_limit(self, limit: int) -> None:
        """A person changes the limit."""
        set_limit = "SELECT batchq.set_limit(%s, %s, max_running => %s)"
        assert self.clock.conn.execute(set_limit, [QUEUE, KIND, limit]).fetchone() == (limit != self.limit,)
        self.limit = limit
        self.happened("set the limit below the shares" if limit < self.may_have else "set the limit")

    @rule(seconds=waits)
    def wait(self, seconds: float) -> None:
        """Nobody refreshes a share for a while."""
        before = sum(process.may_have > 0 for process in self.live + self.dead)
        self.clock.wait(seconds)
        if sum(process.may_have > 0 for process in self.live + self.dead) < before:
            self.happened("a share expired")

    @rule(which=which)
    def pause(self, which: int) -> None:
        """A process is paused until its share and its leases have expired. Another takes all, and then it goes on."""
        self.work(which, 2)
        self.wait(LOST_SECONDS)
        self.work(1 - which, 6)
        self.refresh(which)

    @rule(hungry=st.sampled_from([(0,), (1,), (0, 1)]))
    def settle(self, hungry: tuple[int, ...]) -> None:
        """All batches end, and what the dead have expires. Then those who want get everything, in equal parts."""
        for process in self.live:
            process.end(process.permit.held)
        self.clock.wait(LOST_SECONDS)
        began_at = time.monotonic()
        for _ in range(ROUNDS):
            for number in hungry:
                process = self.live[number]
                process.begin(MANY)
                process.end(process.permit.held)
                process.refresh()
        begun = [self.live[number].begin(MANY) for number in hungry]
        if time.monotonic() - began_at > SLOW_SECONDS:
            self.happened("too slow to judge")
            return
        assert sum(begun) == self.limit, f"{begun} of {self.limit}"
        assert max(begun) - min(begun) <= 1, f"unfair: {begun}"
        self.happened(f"{len(hungry)} got everything")
