"""Schedules with real processes and kills, in short. The long form: tests/instruments/schedules."""

import datetime
import time

import pytest

from batchq.testing import running_worker
from tests.component.rows import Conn, value
from tests.component.test_schedules import COUNTS, add, app_of
from tests.instruments.schedules import works
from tests.support.alone import run_alone
from tests.support.steps import step
from tests.support.trials import Place
from tests.support.waiting import wait_until


def test_each_tick_makes_one_batch_beside_kills(dsn: str) -> None:
    seen = works.killed(Place(dsn, works.APP), seconds=30, schedules=60, kill_every_seconds=5)
    step("%s", seen.figures)
    assert seen.faults == []
    assert seen.figures["kills"] > 0


@pytest.mark.parametrize("seconds", [86_400, -86_400])
def test_a_worker_whose_clock_is_wrong_makes_no_tick_early_or_late(
    conn: Conn, dsn: str, seconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = time.time

    class Wrong(datetime.datetime):
        """A datetime whose now() is by the clock that has jumped."""

        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:  # type: ignore[override]
            return datetime.datetime.fromtimestamp(right() + seconds, tz)

    monkeypatch.setattr(time, "time", lambda: right() + seconds)
    monkeypatch.setattr("batchq.worker.schedules.datetime", Wrong)
    monkeypatch.setattr("batchq.common.cron.datetime", Wrong)
    add(conn, "* * * * * *")
    begun: list[float] = []
    with running_worker(app_of(begun), dsn):
        wait_until(lambda: len(begun) >= 4, 20, "four ticks")
    made, missed, _ = conn.execute(COUNTS).fetchall()[0]
    assert missed == 0
    assert made >= 4
    span = value(conn, "SELECT date_part('epoch', max(created_at) - min(created_at)) FROM batchq.all_batches")
    assert abs(span - (made - 1)) < 1.5, "a batch for each second"


if __name__ == "__main__":
    run_alone(__file__)
