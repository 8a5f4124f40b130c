"""Which invariants of invariants.sql are violated. Only reads, and takes no lock that others would wait for."""

from collections.abc import Iterator
from typing import NamedTuple

import psycopg

from batchq.postgres.statements import health, session
from batchq.postgres.statements.running import Conn
from batchq.postgres.transactions import transaction

SECONDS_EACH = 5.0
_MOST_OFFENDERS = 10


class Violation(NamedTuple):
    """A row that violates an invariant. *id*: of the batch, worker or record. *what*: is wrong with it."""

    invariant: str
    id: str
    what: str


class Verdict(NamedTuple):
    """The result of one invariant. *violations*: the first ones. *unknown*: why it was not checked, or empty."""

    invariant: str
    violations: list[Violation]
    has_more: bool = False
    unknown: str = ""


def violations(conn: Conn, most: int = _MOST_OFFENDERS) -> list[Violation]:
    """Return up to *most* violations of each invariant. Joins the caller's transaction, if there is one."""
    every = health.invariants().items()
    return [violation for name, statement in every for violation in _violations_of(conn, name, statement, most)]


def verdicts(conn: Conn, most: int = _MOST_OFFENDERS, seconds: float = SECONDS_EACH) -> Iterator[Verdict]:
    """Yield a verdict on each invariant.

    Each is checked in a transaction of its own of at most *seconds*, so that no snapshot is held for longer, and no
    DROP of a partition waits for longer.
    """
    for name, statement in health.invariants().items():
        try:
            with transaction(conn, seconds, settings=session.READ_ONLY):
                found = _violations_of(conn, name, statement, most + 1)
            yield Verdict(name, found[:most], len(found) > most)
        except psycopg.errors.QueryCanceled:
            yield Verdict(name, [], unknown=f"not checked: it takes longer than {seconds:g} s")
        except psycopg.errors.LockNotAvailable:
            yield Verdict(name, [], unknown="not checked: a table is locked")
        except psycopg.errors.InsufficientPrivilege as error:
            yield Verdict(name, [], unknown=f"not checked: {error.diag.message_primary}")


def _violations_of(conn: Conn, name: str, statement: bytes, most: int) -> list[Violation]:
    return [Violation(name, *row) for row in health.violations(conn, statement, most)]
