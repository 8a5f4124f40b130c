"""Schedules: a worker finds what is due, plans it, and makes the batches at their time. No worker leads.

Workers look in turn, so that a change is seen within 1.5 s whatever their number. The first two of a queue also know
the next due time and wake up for it; the others take over what those two have left behind.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from itertools import islice
from typing import Any

from batchq.common.cron import ScheduleError, ticks
from batchq.common.log import get_logger
from batchq.common.text import cut
from batchq.postgres.link import Link
from batchq.postgres.statements import schedules as statements
from batchq.postgres.statements.schedules import DueSchedule, Fired, Plan
from batchq.worker.context import Context
from batchq.worker.turns import LOOK_SECONDS

PUNCTUAL_WORKERS = 2
MISSED_SECONDS = 60.0  # a tick that is later than this is missed
_MOST_TICKS = 10_000  # of one plan: more are planned step by step
_MOST_PLANS = 50  # of one statement: each is a subtransaction, and Postgres caches 64
_AHEAD_SECONDS = 2.0
_RETRY_SECONDS = 0.05  # after a failure, or where others hold what is due; doubled up to LOOK_SECONDS

_log = get_logger()


def plan(schedule: DueSchedule, now: float) -> Plan:
    """Return what is to happen with a schedule at the time *now*: at its next tick, or with all that have passed.

    Of several ticks that are due, the latest one makes a batch (catch_up: the latest catch_up_most), the others are
    missed. With skip, that one is missed, too, if it is more than a minute ago.
    """
    due_at = None if schedule.next_at is None else datetime.fromtimestamp(schedule.next_at, UTC)
    name, revision = schedule.name, schedule.revision
    try:
        if due_at is None:
            after = datetime.fromtimestamp(schedule.changed_at, UTC)
            return Plan(name, revision, None, (), 0, _next_tick(schedule.cron, schedule.time_zone, after), None)
        until = max(due_at, datetime.fromtimestamp(now, UTC))
        due = _ticks(schedule.cron, schedule.time_zone, due_at, until)
    except ScheduleError as error:
        return Plan(name, revision, due_at, (), 0, None, cut(str(error), 1000))
    passed, next_at = [due_at, *due[:-1]], due[-1]
    kept = schedule.catch_up_most if schedule.missed == "catch_up" else 1
    if next_at <= until:  # not all: the latest of these may yet be among the latest of all
        rest = [*passed, next_at][-kept:]
        return Plan(name, revision, due_at, (), len(passed) + 1 - len(rest), rest[0], None)
    fired = passed[-kept:]
    if schedule.missed == "skip" and now - fired[-1].timestamp() > MISSED_SECONDS:
        fired = []
    return Plan(name, revision, due_at, fired, len(passed) - len(fired), next_at, None)


@lru_cache(maxsize=4096)
def _next_tick(cron: str, time_zone: str, after: datetime) -> datetime:
    return next(ticks(cron, time_zone, after))


def _ticks(cron: str, time_zone: str, after: datetime, until: datetime) -> list[datetime]:
    """Return the ticks after *after* up to *until*, and the one that follows: at most 10,000. Raises ScheduleError."""
    if until == after:
        return [_next_tick(cron, time_zone, after)]
    found: list[datetime] = []
    for tick in islice(ticks(cron, time_zone, after), _MOST_TICKS):
        found.append(tick)
        if tick > until:
            break
    return found


class Schedules:
    """What one worker does for schedules, in the housekeeper's thread. *wake*: lets its claimer poll now."""

    def __init__(
        self, context: Context, link: Link, declared: Sequence[Mapping[str, Any]], wake: Callable[[], None]
    ) -> None:
        self._context = context
        self._link = link
        self._wake = wake
        self._undeclared = list(declared)  # what is still to be written
        self._plans: list[Plan] = []
        self._due_at = float("inf")  # monotonic: when the first plan is due
        self._looks_at = float("-inf")
        self._retry_seconds = _RETRY_SECONDS

    def wait_seconds(self) -> float:
        """Return how long it is until there is something to do."""
        return max(0.0, min(self._due_at, self._looks_at) - time.monotonic())

    def run_if_due(self) -> None:
        """Write what code declares, once; make the batches of what is due; query what is due next."""
        lifecycle = self._context.lifecycle
        if lifecycle.stopping.is_set() or lifecycle.draining.is_set():
            self._due_at = self._looks_at = float("inf")
            return
        if (now := time.monotonic()) < min(self._due_at, self._looks_at):
            return
        plans = self._plans if now >= self._due_at else []
        # As it is left if something fails.
        self._plans, self._due_at, self._looks_at = [], float("inf"), now + _RETRY_SECONDS
        if self._undeclared:
            with self._link.transaction() as conn:
                statements.declare_schedules(conn, self._undeclared)
            self._undeclared = []
        if plans:
            self._fire(plans)
        else:
            self._look()

    def _look(self) -> None:
        """Query what is due; carry out what is due already, and plan the rest if this worker is a punctual one."""
        looks = self._context.looks
        wait_seconds = looks.wait_seconds()
        ahead_seconds = wait_seconds + _AHEAD_SECONDS if looks.number < PUNCTUAL_WORKERS else 0.0
        with self._link.reading() as conn:
            found = statements.due_schedules(conn, ahead_seconds)
        answered_at = time.monotonic()
        self._looks_at = answered_at + wait_seconds
        if not found:
            return
        now = found[0].now
        if overdue := [schedule for schedule in found if schedule.next_at is None or schedule.next_at <= now]:
            self._fire([plan(schedule, now) for schedule in overdue])
            return
        # Those of one moment together: what is due later is found again after they have been carried out.
        first = found[0].next_at or now
        self._plans = [plan(schedule, now) for schedule in found if schedule.next_at == first]
        self._due_at = answered_at + first - now

    def _fire(self, plans: Sequence[Plan]) -> None:
        """Carry out plans, a few in each transaction. Where another worker was faster, nothing happens. Look again."""
        fired: list[Fired] = []
        for start in range(0, len(plans), _MOST_PLANS):
            rows = self._link.run(statements.fire_schedules(plans[start : start + _MOST_PLANS]))
            fired += map(Fired._make, rows)
            if any(row[1] for row in rows):
                self._wake()
        for one in fired:
            if one.refused:
                _log.warning("schedule failed", schedule=one.name, error=one.refused)
        self._retry_seconds = _RETRY_SECONDS if fired else min(2 * self._retry_seconds, LOOK_SECONDS)
        self._looks_at = time.monotonic() + (0.0 if fired else self._retry_seconds)
