"""Rows that the database refuses to change: they do not keep the others of a statement from being changed."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

import psycopg

from batchq.common.log import get_logger
from batchq.common.text import one_line

MOST_REFUSED_IN_A_ROW = 20
MOST_LOGGED = 20
_MOST_SKIPPED = 1000
_SKIP_SECONDS = 30.0

_log = get_logger()
T = TypeVar("T")


def is_about_rows(error: psycopg.Error) -> bool:
    """Return whether the same statement might succeed with other rows: a trigger raised, or a row is corrupt.

    False if the connection, the server, a lock or a pooler is to blame (08, 25006, 40, 53, 55, 57, 58, XX000).
    """
    others = (psycopg.OperationalError, psycopg.errors.ReadOnlySqlTransaction, psycopg.errors.InternalError_)
    return not isinstance(error, (psycopg.InterfaceError, *others))


class Halving(Generic[T]):
    """Changes many rows in one statement; halves those that are refused together until each bad one is alone.

    After 20 in a row that were refused alone, the rows are probably not the cause: the rest is tried as a whole, and
    not halved any more. *refused*: the rows that were refused alone.
    """

    def __init__(self, do: Callable[[Sequence[T]], None]) -> None:
        self.refused: list[T] = []
        self._do = do
        self._in_a_row = 0
        self._has_succeeded = False
        self._error: psycopg.Error | None = None  # the last one

    def attempt(self, rows: Sequence[T]) -> None:
        """Change all rows together, or else their halves. Raises errors that are not about rows."""
        try:
            self._do(rows)
        except psycopg.Error as error:
            if not is_about_rows(error):
                raise
            self._error = error
            if len(rows) == 1:
                self.refused.append(rows[0])
                self._in_a_row += 1
            elif self._in_a_row < MOST_REFUSED_IN_A_ROW:
                self.halve(rows)
        else:
            self._in_a_row = 0
            self._has_succeeded = True

    def halve(self, rows: Sequence[T]) -> None:
        """Change each half of rows that were refused together."""
        middle = len(rows) // 2
        for half in (rows[:middle], rows[middle:]):
            if half:
                self.attempt(half)

    def report(self, statement: str, ids: Sequence[int]) -> None:
        """Log the batches that were refused. Raises the last error if there were 20 in a row and no success."""
        if self._error is None:
            return
        if ids:
            error, shown = one_line(self._error), ids[:MOST_LOGGED]
            _log.warning("batches refused", statement=statement, count=len(ids), batch_ids=shown, error=error)
        if not self._has_succeeded and self._in_a_row >= MOST_REFUSED_IN_A_ROW:
            raise self._error


class Skipped:
    """The ids of batches that were refused: skipped for 30 s. Of more than 1,000, the oldest are forgotten."""

    def __init__(self) -> None:
        self.until: dict[int, float] = {}  # monotonic, the earliest first

    def add(self, ids: Iterable[int]) -> None:
        """Skip these from now on."""
        for batch_id in ids:
            self.until.pop(batch_id, None)
            self.until[batch_id] = time.monotonic() + _SKIP_SECONDS
        for batch_id in list(self.until)[:-_MOST_SKIPPED]:
            del self.until[batch_id]

    def ids(self) -> list[int]:
        """Return what is skipped now."""
        if self.until:
            now = time.monotonic()
            self.until = {batch_id: until for batch_id, until in self.until.items() if until > now}
        return list(self.until)
