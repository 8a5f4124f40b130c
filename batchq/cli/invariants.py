"""``batchq check --invariants``: what is always true, looked at on a live system."""

from argparse import Namespace
from typing import Any

from rich.markup import escape

from batchq import invariants, migrate
from batchq.cli.commands import console, print_json, settings_of
from batchq.database import check_server, connect, transaction


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
        print_json([as_object(verdict) for verdict in verdicts])
    return 1 if any(verdict.violations for verdict in verdicts) else 0


def show(verdict: invariants.Verdict) -> None:
    """Print a line for an invariant that holds or is unknown, and one for each row for which it does not hold."""
    if verdict.unknown:
        console.print(f"[yellow]unknown[/]   {verdict.invariant}: {escape(verdict.unknown)}", soft_wrap=True)
    elif not verdict.violations:
        console.print(f"[green]ok[/]        {verdict.invariant}", soft_wrap=True)
    for violation in verdict.violations:
        line = escape(f"{violation.invariant}: {violation.id}: {violation.what}")
        console.print(f"[red]violated[/]  {line}", soft_wrap=True)
    if verdict.has_more:
        console.print(f"          {verdict.invariant}: and more", soft_wrap=True)


def as_object(verdict: invariants.Verdict) -> dict[str, Any]:
    """Return what became of an invariant as a JSON object; *holds* is null where it is unknown."""
    return {
        "invariant": verdict.invariant,
        "holds": None if verdict.unknown else not verdict.violations,
        "violations": [{"id": violation.id, "what": violation.what} for violation in verdict.violations],
        "has_more": verdict.has_more,
        "unknown": verdict.unknown,
    }
