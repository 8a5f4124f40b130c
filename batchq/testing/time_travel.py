"""Move the time of a test's database: what would be due later is due now."""

from typing import Any

from batchq.errors import InvalidInput
from batchq.postgres import drivers
from batchq.postgres.statements import testing

MOST_SECONDS = 100 * 366 * 86_400


def travel(conn: Any, seconds: float) -> None:
    """Move every stored time of all batches back by *seconds*, as if that time had passed and no worker had run.

    The clock itself stays. What moves: run_at, leases and other times of batches, also of finished ones, whose rows
    move to the partition of their new day; failed and snoozed items; the next and last times of schedules; throttles,
    pauses, shares of limits, flows and the audit. Heartbeats of workers and throughput do not move.

    Writes by one statement on *conn*, a connection of any kind, in its transaction; the caller commits. It waits for
    rows that a running worker has locked. The role needs the rights of the owner of batchq's tables. Raises
    InvalidInput for seconds that are not over 0, and the errors of the driver.
    """
    checked = _checked(seconds)
    queues = [queue for (queue,) in drivers.run(conn, testing.queues())]
    drivers.run(conn, testing.travel(checked, queues))


async def travel_async(conn: Any, seconds: float) -> None:
    """Async version of `travel`."""
    checked = _checked(seconds)
    queues = [queue for (queue,) in await drivers.run_async(conn, testing.queues())]
    await drivers.run_async(conn, testing.travel(checked, queues))


def _checked(seconds: float) -> float:
    if not isinstance(seconds, int | float) or not 0 < seconds <= MOST_SECONDS:
        raise InvalidInput(f"travel takes a number of seconds over 0 and up to {MOST_SECONDS:,}, not {seconds!r}")
    return seconds
