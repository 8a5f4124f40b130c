"""What a service thread does while the database is away, and about rows that the database refuses to change."""

import random
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, Protocol, TypeVar

import psycopg

from batchq.common.log import get_logger
from batchq.common.text import one_line

FIRST_SECONDS = 0.05
MOST_SECONDS = 1.0
LOG_AGAIN_SECONDS = 60.0
MOST_REFUSED_IN_A_ROW = 20
MOST_SKIPPED = 1000
SKIP_SECONDS = 30.0
MOST_LOGGED = 20

log = get_logger()


class Answering(Protocol):
    """A connection that counts the answers of the database."""

    answers: int


class Outage:
    """The troubles of one service thread, or of one of its duties, from the first failure to the next success.

    *link*: its connection. What succeeds without asking the database ends no outage; None: everything asks.
    """

    def __init__(self, service: str, link: Answering | None = None, **labels: str) -> None:
        self.labels = {"service": service, **labels}
        self.link = link
        self.answers = 0  # when it failed last
        self.failures = 0
        self.since = 0.0
        self.logged_at = 0.0

    def failed(self, error: BaseException) -> float:
        """Log the first failure, and one each minute; return how long to wait: 0.05 s, doubled to 1 s, with jitter."""
        now = time.monotonic()
        if self.failures == 0:
            self.since = now
        if self.failures == 0 or now - self.logged_at > LOG_AGAIN_SECONDS:
            self.logged_at = now
            log.warning("database trouble", **self.labels, error=one_line(error), failures=self.failures + 1)
        self.answers = self.link.answers if self.link else 0
        most = min(FIRST_SECONDS * 2.0 ** min(self.failures, 10), MOST_SECONDS)
        self.failures += 1
        return most * random.uniform(0.5, 1.0)  # noqa: S311 (spreads load; not a secret)

    def over(self) -> None:
        """Note a success: the outage is over if the database has answered since the last failure."""
        if self.failures and (self.link is None or self.link.answers > self.answers):
            log.info("database is back", **self.labels, after_seconds=round(time.monotonic() - self.since, 1))
            self.failures = 0


# ------------------------------------------------------------------------------------------------------ refused rows

T = TypeVar("T")


def is_about_rows(error: psycopg.Error) -> bool:
    """Return whether the database may take the same statement over other rows: a trigger raised, a row is corrupt.

    Not if the connection, the server, a lock or a pooler is to blame (08, 25006, 40, 53, 55, 57, 58, XX000).
    """
    others = (psycopg.OperationalError, psycopg.errors.ReadOnlySqlTransaction, psycopg.errors.InternalError_)
    return not isinstance(error, (psycopg.InterfaceError, *others))


class Halving(Generic[T]):
    """Does something with many things in one statement; halves those that are refused until each bad one is alone.

    When 20 in a row were refused alone, the cause is probably another: what is left is tried as a whole, and not
    halved any more. *refused*: those that were refused alone.
    """

    def __init__(self, do: Callable[[Sequence[T]], None]) -> None:
        self.do = do
        self.refused: list[T] = []
        self.in_a_row = 0
        self.is_in_vain = True
        self.error: psycopg.Error | None = None  # the last one

    def attempt(self, things: Sequence[T]) -> None:
        """Do it with all things at once, else with the halves. Raises what is not about rows."""
        try:
            self.do(things)
        except psycopg.Error as error:
            if not is_about_rows(error):
                raise
            self.error = error
            if len(things) == 1:
                self.refused.append(things[0])
                self.in_a_row += 1
            elif self.in_a_row < MOST_REFUSED_IN_A_ROW:
                self.halve(things)
        else:
            self.in_a_row = 0
            self.is_in_vain = False

    def halve(self, things: Sequence[T]) -> None:
        """Do it with each half of the things, which were refused together."""
        middle = len(things) // 2
        for half in (things[:middle], things[middle:]):
            if half:
                self.attempt(half)

    def report(self, statement: str, ids: Sequence[int]) -> None:
        """Log the ids of the batches that were refused. Raises the error if nothing but refusals came, and many."""
        if self.error is not None and ids:
            error = one_line(self.error)
            log.warning(
                "batches refused", statement=statement, count=len(ids), batch_ids=ids[:MOST_LOGGED], error=error
            )
        if self.error is not None and self.is_in_vain and self.in_a_row >= MOST_REFUSED_IN_A_ROW:
            raise self.error


class Skipped:
    """The ids of batches that were refused: left out for 30 s. 1,000 at most, the oldest of more are forgotten."""

    def __init__(self) -> None:
        self.until: dict[int, float] = {}  # monotonic, the earliest first

    def add(self, ids: Iterable[int]) -> None:
        """Leave these out from now on."""
        for batch_id in ids:
            self.until.pop(batch_id, None)
            self.until[batch_id] = time.monotonic() + SKIP_SECONDS
        for batch_id in list(self.until)[:-MOST_SKIPPED]:
            del self.until[batch_id]

    def ids(self) -> list[int]:
        """Return what is left out now."""
        if self.until:
            now = time.monotonic()
            self.until = {batch_id: until for batch_id, until in self.until.items() if until > now}
        return list(self.until)
