"""Which of the invariants of invariants.sql are broken: read only, without a lock that anybody would wait for."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import psycopg

from batchq.postgres.statements import health, session
from batchq.postgres.transactions import transaction

MOST_OFFENDERS = 10
SECONDS_EACH = 5.0


class Violation(NamedTuple):
    """A row for which an invariant does not hold: the id of the batch, worker or record, and what is wrong with it."""

    invariant: str
    id: str
    what: str


class Verdict(NamedTuple):
    """What became of one invariant. *violations*: the first of them; *has_more*: there are more.

    *unknown*: why it could not be checked (too slow, no right); empty where it was.
    """

    invariant: str
    violations: list[Violation]
    has_more: bool = False
    unknown: str = ""


def violations(conn: psycopg.Connection[Any], most: int = MOST_OFFENDERS) -> list[Violation]:
    """Return up to *most* violations of each invariant, within the caller's transaction, if any; none: all is well."""
    return [
        Violation(name, *row)
        for name, statement in health.invariants().items()
        for row in health.violations(conn, statement, most)
    ]


def verdicts(
    conn: psycopg.Connection[Any], most: int = MOST_OFFENDERS, seconds: float = SECONDS_EACH
) -> Iterator[Verdict]:
    """Yield what became of each invariant, each checked in a transaction of its own of at most *seconds*.

    A short one: so no snapshot is held for longer, and no DROP of a partition waits for longer.
    """
    for name, statement in health.invariants().items():
        try:
            with transaction(conn, seconds, settings=session.READ_ONLY):
                found = [Violation(name, *row) for row in health.violations(conn, statement, most + 1)]
            yield Verdict(name, found[:most], len(found) > most)
        except psycopg.errors.QueryCanceled:
            yield Verdict(name, [], unknown=f"not checked: it takes longer than {seconds:g} s")
        except psycopg.errors.LockNotAvailable:
            yield Verdict(name, [], unknown="not checked: a table is locked")
        except psycopg.errors.InsufficientPrivilege as error:
            yield Verdict(name, [], unknown=f"not checked: {error.diag.message_primary}")
