"""What is wrong with a database, and what to do about it.

Only reads: each check is a transaction of its own with a timeout. It is a query of doctor.sql, or a function here where
one query cannot tell.
"""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import psycopg

from batchq.errors import ConfigError
from batchq.postgres.connections import connect
from batchq.postgres.migrate import all_migrations
from batchq.postgres.server_checks import read_only_problem
from batchq.postgres.statements import health, ledger, session
from batchq.postgres.statements.running import Conn
from batchq.postgres.transactions import transaction

SECONDS_EACH = 5.0
SEVERITIES = ("ok", "note", "warning", "critical")
_PATIENCE_SECONDS = 300.0
_OLD_AFTER_TRANSACTIONS = 200_000_000
_CLOCK_SECONDS = 2.0
_ASK_ANOTHER_ROLE = "run it as a role that may see this"


class Finding(NamedTuple):
    """The result of a check. *severity*: one of SEVERITIES. *remedy*: what to do; empty for ok."""

    check: str
    severity: str
    evidence: str
    remedy: str = ""


def findings(
    dsn: str, patience: float = _PATIENCE_SECONDS, ages: int = _OLD_AFTER_TRANSACTIONS, seconds: float = SECONDS_EACH
) -> Iterator[Finding]:
    """Yield at least one finding of each check.

    A snapshot may be held for *patience* seconds, or for *ages* transactions. A check that the role may not make, or
    that takes longer than *seconds*, is a note; a connection that fails is critical.
    """
    try:
        connected = connect(dsn)
    except (ConfigError, psycopg.OperationalError) as error:
        yield Finding("connection", "critical", str(error), "start the server or the pooler, or correct BATCHQ_DSN")
        return
    with connected as conn:
        yield _writing(conn)
        yield _schema(conn, seconds)
        yield clock(conn, seconds)
        yield _pooler(conn, dsn, seconds)
        for name in health.doctor_checks():
            yield from _query(conn, name, {"patience": patience, "ages": ages}, seconds)


def exit_code(found: list[Finding]) -> int:
    """Return 2 if any finding is critical, 1 if any is a warning, else 0."""
    return max((SEVERITIES.index(finding.severity) - 1 for finding in found if finding.severity != "ok"), default=0)


def clock(conn: Conn, seconds: float, local: Callable[[], float] = time.time) -> Finding:
    """Compare this machine's clock with the database's: only logs depend on it."""
    with transaction(conn, seconds, settings=session.READ_ONLY):
        before = local()
        theirs = session.clock(conn)
        after = local()
    ahead = (before + after) / 2 - theirs
    evidence = f"this machine's clock is {ahead:+.2f} s from the database's, to within {(after - before) / 2:.2f} s"
    if abs(ahead) <= _CLOCK_SECONDS + (after - before) / 2:
        return Finding("clock", "ok", evidence)
    return Finding("clock", "warning", evidence, "synchronize both (NTP); times in logs and in tables do not match")


def _query(conn: Conn, name: str, parameters: dict[str, float], seconds: float) -> list[Finding]:
    try:
        with transaction(conn, seconds, settings=session.READ_ONLY):
            found = [Finding(name, *row) for row in health.findings(conn, name, parameters)]
        return found or [Finding(name, "ok", "nothing found")]
    except (psycopg.errors.QueryCanceled, psycopg.errors.LockNotAvailable):
        return [
            Finding(name, "note", f"not checked: no answer within {seconds:g} s", "run it again when load is lower")
        ]
    except (
        psycopg.errors.InsufficientPrivilege,
        psycopg.errors.UndefinedTable,
        psycopg.errors.UndefinedFunction,
        psycopg.errors.InvalidSchemaName,
    ) as error:
        return [Finding(name, "note", f"not checked: {error.diag.message_primary}", _ASK_ANOTHER_ROLE)]


def _writing(conn: Conn) -> Finding:
    if problem := read_only_problem(conn):
        return Finding("writing", "critical", *problem)
    return Finding("writing", "ok", "the database accepts writes")


def _schema(conn: Conn, seconds: float) -> Finding:
    try:
        with transaction(conn, seconds, settings=session.READ_ONLY):
            applied = ledger.applied_migrations(conn) if ledger.has_ledger(conn) else {}
    except psycopg.errors.InsufficientPrivilege as error:
        return Finding("schema", "note", f"not checked: {error.diag.message_primary}", _ASK_ANOTHER_ROLE)
    known = {migration.version for migration in all_migrations()}
    newest = f"the schema is at version {max(applied, default=0)}, this code knows {max(known)}"
    if known - applied.keys():
        return Finding("schema", "critical", newest, "run: batchq migrate")
    if any(breaks for version, (_, breaks) in applied.items() if version not in known):
        return Finding("schema", "critical", f"{newest}, and a newer one breaks it", "upgrade batchq")
    if applied.keys() - known:
        return Finding("schema", "note", newest, "upgrade batchq when convenient; this version keeps working")
    return Finding("schema", "ok", newest)


def _pooler(conn: Conn, dsn: str, seconds: float) -> Finding:
    """Determine what is between here and the server by its behavior, since a pooler's own answers prove nothing."""
    own, others = set[int](), set[int]()
    try:
        with connect(dsn) as other:  # the only check that needs two connections
            # A pooler that rotates backends gives this connection another one in its next transaction. A pooler that
            # reuses the latest backend gives this connection's backend to the other connection.
            for one, seen in [(conn, own), (conn, own), (other, others), (conn, own), (other, others), (other, others)]:
                with transaction(one, seconds, settings=session.READ_ONLY):
                    seen.add(session.backend_pid(one))
    except psycopg.OperationalError as error:
        evidence = f"a second connection was refused: {error}"
        return Finding("pooler", "warning", evidence, "raise the pooler's limit of clients")
    if own & others or len(own) > 1:
        evidence = f"transaction mode: two connections got {len(own | others)} backends in turn"
        return Finding("pooler", "ok", evidence)
    if conn.info.backend_pid in own:
        return Finding("pooler", "ok", "direct: each connection keeps the backend whose id it was given")
    evidence = "apparently session mode: each connection keeps its backend, but under another id than it was given"
    remedy = "use the pooler's transaction mode: in session mode, each worker holds four backends"
    return Finding("pooler", "warning", evidence, remedy)
