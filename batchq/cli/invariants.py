"""``batchq check --invariants``: what is always true, looked at on a live system."""

from argparse import Namespace
from typing import Any

from batchq.cli.commands import settings_of
from batchq.common.terminal import put_json, put_marked
from batchq.operate import invariants
from batchq.postgres import migrate
from batchq.postgres.connections import connect
from batchq.postgres.server_checks import check_server
from batchq.postgres.transactions import transaction


def check(options: Namespace) -> int:
    """Check each invariant; print the first rows for which it does not hold. 1 if there are any."""
    settings = settings_of(options)
    with connect(settings.require_dsn()) as conn:
        with transaction(conn, settings.database_timeout_seconds):
            check_server(conn)
            migrate.check_schema(conn)
        verdicts = []
        for verdict in invariants.verdicts(
            conn, seconds=min(settings.database_timeout_seconds, invariants.SECONDS_EACH)
        ):
            verdicts.append(verdict)
            if not options.json:
                show(verdict)
    if options.json:
        put_json([as_object(verdict) for verdict in verdicts])
    return 1 if any(verdict.violations for verdict in verdicts) else 0


def show(verdict: invariants.Verdict) -> None:
    """Print a line for an invariant that holds or is unknown, and one for each row for which it does not hold."""
    if verdict.unknown:
        put_marked("unknown  ", "yellow", f"{verdict.invariant}: {verdict.unknown}")
    elif not verdict.violations:
        put_marked("ok       ", "green", verdict.invariant)
    for violation in verdict.violations:
        put_marked("violated ", "red", f"{violation.invariant}: {violation.id}: {violation.what}")
    if verdict.has_more:
        put_marked("         ", "", f"{verdict.invariant}: and more")


def as_object(verdict: invariants.Verdict) -> dict[str, Any]:
    """Return what became of an invariant as a JSON object; *holds* is null where it is unknown."""
    return {
        "invariant": verdict.invariant,
        "holds": None if verdict.unknown else not verdict.violations,
        "violations": [{"id": violation.id, "what": violation.what} for violation in verdict.violations],
        "has_more": verdict.has_more,
        "unknown": verdict.unknown,
    }
