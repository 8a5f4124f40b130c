"""``batchq check``: is everything there that workers need; with ``--invariants``: does a row violate an invariant."""

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import psycopg

from batchq.app import load_app
from batchq.cli.arguments import add_command
from batchq.cli.connections import settings_of
from batchq.common.terminal import put_json, put_marked
from batchq.operate import invariants
from batchq.postgres import migrate
from batchq.postgres.connections import connect
from batchq.postgres.server_checks import check_server, check_writable
from batchq.postgres.statements import ledger, session, views
from batchq.postgres.transactions import transaction


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(subparsers, "check", _run, "check the DSN, the server, the schema and the waiting batches")
    parser.epilog = "Exits 1 if anything is wrong."
    parser.add_argument(
        "app", nargs="?", metavar="MODULE:APP", help="app that must have a handler for every waiting kind"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--invariants",
        dest="run",
        action="store_const",
        const=_run_invariants,
        help="instead, look for rows that violate an invariant; exit 1 if there are any",
    )


def _run(options: Namespace) -> int:
    settings = settings_of(options)
    dsn = settings.require_dsn()
    kinds = set(load_app(options.app).handlers) if options.app else None
    with connect(dsn) as conn, transaction(conn, settings.database_timeout_seconds, settings=session.FIXED_FORMATS):
        findings = list(_findings(conn, kinds))
    if options.json:
        put_json([{"ok": ok, "finding": text} for ok, text in findings])
    else:
        for ok, text in findings:
            put_marked("ok      " if ok else "problem ", "green" if ok else "red", text)
    return 0 if all(ok for ok, _ in findings) else 1


def _findings(conn: psycopg.Connection[Any], kinds: set[str] | None) -> Iterator[tuple[bool, str]]:
    """Yield whether something is as it must be, and a line about it. Raises ConfigError."""
    check_server(conn)
    check_writable(conn)
    yield True, f"the server answers: {session.server_version(conn)[1].split(',')[0]}"
    migrate.check_schema(conn)
    yield True, f"the schema is at version {max(ledger.applied_migrations(conn))}"
    try:
        with conn.transaction():
            rows = views.queue_rows(conn)
    except psycopg.errors.InsufficientPrivilege as error:
        yield True, f"queues not checked: {error.diag.message_primary}"
    else:
        yield from (_judge_queue(row, kinds) for row in rows)


def _judge_queue(row: dict[str, Any], kinds: set[str] | None) -> tuple[bool, str]:
    name = f"kind {row['kind']!r} in queue {row['queue']!r}"
    if kinds is not None and row["kind"] not in kinds:
        return False, f"{name}: the app has no handler for it"
    if row["stalled"]:
        return False, f"{name}: {row['stalled']} stalled; their worker died, and no live worker serves the queue"
    if row["ready"] and not row["workers"]:
        return False, f"{name}: {row['ready']} ready, but no live worker has a handler for the kind"
    return True, f"{name}: {row['ready']} ready, {row['processing']} processing, {row['failed']} failed"


# -------------------------------------------------------------------------------------------------------- invariants


def _run_invariants(options: Namespace) -> int:
    settings = settings_of(options)
    verdicts = []
    with connect(settings.require_dsn()) as conn:
        with transaction(conn, settings.database_timeout_seconds):
            check_server(conn)
            migrate.check_schema(conn)
        seconds = min(settings.database_timeout_seconds, invariants.SECONDS_EACH)
        for verdict in invariants.verdicts(conn, seconds=seconds):
            verdicts.append(verdict)
            if not options.json:
                _show(verdict)
    if options.json:
        put_json([_as_object(verdict) for verdict in verdicts])
    return 1 if any(verdict.violations for verdict in verdicts) else 0


def _show(verdict: invariants.Verdict) -> None:
    if verdict.unknown:
        put_marked("unknown  ", "yellow", f"{verdict.invariant}: {verdict.unknown}")
    elif not verdict.violations:
        put_marked("ok       ", "green", verdict.invariant)
    for violation in verdict.violations:
        put_marked("violated ", "red", f"{violation.invariant}: {violation.id}: {violation.what}")
    if verdict.has_more:
        put_marked("         ", "", f"{verdict.invariant}: and more")


def _as_object(verdict: invariants.Verdict) -> dict[str, Any]:
    return {
        "invariant": verdict.invariant,
        "holds": None if verdict.unknown else not verdict.violations,
        "violations": [{"id": violation.id, "what": violation.what} for violation in verdict.violations],
        "has_more": verdict.has_more,
        "unknown": verdict.unknown,
    }
