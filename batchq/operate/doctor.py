"""What is wrong with a database, and what to do: read only, each look in a transaction of its own, bounded.

A check is a query of doctor.sql, or one of the functions here for what a query alone cannot tell.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import psycopg

from batchq.errors import ConfigError
from batchq.postgres.connections import connect
from batchq.postgres.migrate import all_migrations
from batchq.postgres.server_checks import read_only_problem
from batchq.postgres.statements import health, ledger, session
from batchq.postgres.transactions import transaction

SECONDS_EACH = 5.0
PATIENCE_SECONDS = 300.0
OLD_AFTER_TRANSACTIONS = 200_000_000
CLOCK_SECONDS = 2.0
SEVERITIES = ("ok", "note", "warning", "critical")
Conn = psycopg.Connection[Any]


class Finding(NamedTuple):
    """What a check found. *severity*: one of SEVERITIES; *remedy*: what to do, empty for ok."""

    check: str
    severity: str
    evidence: str
    remedy: str = ""


def findings(
    dsn: str, patience: float = PATIENCE_SECONDS, ages: int = OLD_AFTER_TRANSACTIONS, seconds: float = SECONDS_EACH
) -> Iterator[Finding]:
    """Yield what each check finds, one ok at least.

    A snapshot may be held for *patience* seconds, or *ages* transactions. What the role may
    not see, or takes longer than *seconds*, is a note; that there is no connection is critical.
    """
    try:
        connected = connect(dsn)
    except (ConfigError, psycopg.OperationalError) as error:
        yield Finding("connection", "critical", str(error), "start the server or the pooler, or correct BATCHQ_DSN")
        return
    with connected as conn:
        yield writing(conn)
        yield from schema(conn, seconds)
        yield from clock(conn, seconds)
        yield from pooler(conn, dsn, seconds)
        for name in health.doctor_checks():
            yield from looked(conn, name, {"patience": patience, "ages": ages}, seconds)


def looked(conn: Conn, name: str, parameters: dict[str, float], seconds: float) -> list[Finding]:
    """Return what one query of doctor.sql finds."""
    try:
        with transaction(conn, seconds, settings=session.READ_ONLY):
            found = [Finding(name, *row) for row in health.findings(conn, name, parameters)]
        return found or [Finding(name, "ok", "nothing found")]
    except (psycopg.errors.QueryCanceled, psycopg.errors.LockNotAvailable):
        return [
            Finding(name, "note", f"not checked: no answer within {seconds:g} s", "ask again when there is less to do")
        ]
    except (
        psycopg.errors.InsufficientPrivilege,
        psycopg.errors.UndefinedTable,
        psycopg.errors.UndefinedFunction,
        psycopg.errors.InvalidSchemaName,
    ) as error:
        return [Finding(name, "note", f"not checked: {error.diag.message_primary}", "ask with a role that may see it")]


def writing(conn: Conn) -> Finding:
    """Find out whether anything can be written, or who has forbidden it."""
    if problem := read_only_problem(conn):
        return Finding("writing", "critical", *problem)
    return Finding("writing", "ok", "the database takes writes")


def schema(conn: Conn, seconds: float) -> list[Finding]:
    """Compare the schema's version with the code's."""
    try:
        with transaction(conn, seconds, settings=session.READ_ONLY):
            applied = ledger.applied_migrations(conn) if ledger.has_ledger(conn) else {}
    except psycopg.errors.InsufficientPrivilege as error:
        return [
            Finding("schema", "note", f"not checked: {error.diag.message_primary}", "ask with a role that may see it")
        ]
    known = {migration.version for migration in all_migrations()}
    newest = f"the schema is at version {max(applied, default=0)}, this code knows {max(known)}"
    if known - applied.keys():
        return [Finding("schema", "critical", newest, "run: batchq migrate")]
    if any(breaks for version, (_, breaks) in applied.items() if version not in known):
        return [Finding("schema", "critical", f"{newest}, and a newer one breaks it", "upgrade batchq")]
    if applied.keys() - known:
        return [Finding("schema", "note", newest, "upgrade batchq when convenient: it goes on as it is")]
    return [Finding("schema", "ok", newest)]


def clock(conn: Conn, seconds: float, local: Callable[[], float] = time.time) -> list[Finding]:
    """Compare this machine's clock with the database's. Nothing of batchq depends on it; logs are read by it."""
    with transaction(conn, seconds, settings=session.READ_ONLY):
        before = local()
        theirs = session.clock(conn)
        after = local()
    ahead = (before + after) / 2 - theirs
    evidence = f"this machine's clock is {ahead:+.2f} s from the database's, to within {(after - before) / 2:.2f} s"
    if abs(ahead) <= CLOCK_SECONDS + (after - before) / 2:
        return [Finding("clock", "ok", evidence)]
    return [Finding("clock", "warning", evidence, "synchronize both (NTP); times in logs and in tables do not match")]


def pooler(conn: Conn, dsn: str, seconds: float) -> list[Finding]:
    """Tell what is between here and the server, by how it behaves: no answer of a pooler's is relied upon."""
    own, others = set[int](), set[int]()
    try:
        with connect(dsn) as other:  # the one look that takes two connections
            # A pooler that gives backends in turn changes ours between two transactions in a row; one that
            # gives the latest again gives ours to the other.
            for one, seen in [(conn, own), (conn, own), (other, others), (conn, own), (other, others), (other, others)]:
                seen.add(backend(one, seconds))
            has_a_true_pid = conn.info.backend_pid in own
    except psycopg.OperationalError as error:
        return [
            Finding(
                "pooler", "warning", f"a second connection is refused: {error}", "raise the pooler's limit of clients"
            )
        ]
    if own & others or len(own) > 1:
        return [Finding("pooler", "ok", f"transaction mode: two connections met {len(own | others)} backends in turn")]
    if has_a_true_pid:
        return [Finding("pooler", "ok", "direct: each connection keeps a backend, whose id is the one it was told")]
    evidence = "session mode, it seems: each connection keeps its backend, but under another id than it was told"
    return [
        Finding("pooler", "warning", evidence, "use the pooler's transaction mode: each worker holds four backends")
    ]


def backend(conn: Conn, seconds: float) -> int:
    """Return the id of the backend that a transaction meets."""
    with transaction(conn, seconds, settings=session.READ_ONLY):
        return session.backend_pid(conn)


def exit_code(found: list[Finding]) -> int:
    """Return 2 if anything is critical, 1 for a warning, else 0."""
    return max((SEVERITIES.index(finding.severity) - 1 for finding in found if finding.severity != "ok"), default=0)
