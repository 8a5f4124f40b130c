"""``batchq roles``: the rights that each duty needs, and the roles that have more."""

from argparse import Namespace
from typing import Any

from batchq.cli.arguments import add_command
from batchq.cli.connections import database
from batchq.cli.show_tables import table
from batchq.common.terminal import put, put_json, show
from batchq.errors import InvalidInput
from batchq.postgres.statements import health, verbs

_DUTIES = ("producer", "worker", "viewer", "operator")


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(subparsers, "roles", _run, "list roles with excessive rights; print or apply a duty's grants")
    parser.epilog = "Without a duty, lists roles with more rights than any duty needs; exits 1 if there are any."
    parser.add_argument("duty", nargs="?", choices=_DUTIES, help="duty of the role")
    parser.add_argument("role", nargs="?", metavar="ROLE", help="name of the role")
    parser.add_argument("--apply", action="store_true", help="apply the grants, as the owner of the schema")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(options: Namespace) -> int:
    if options.duty is None:
        return _list_excessive(options)
    if options.role is None:
        raise InvalidInput(f"no role given; name the {options.duty}'s: batchq roles {options.duty} ROLE")
    with database(options) as conn:
        statements = verbs.duty_statements(conn, options.duty, options.role)
        if options.apply:
            verbs.grant_duty(conn, options.duty, options.role)
    if options.json:
        put_json({"statements": statements, "applied": options.apply})
    else:
        for statement in statements:
            put(f"{statement};")
    return 0


def _list_excessive(options: Namespace) -> int:
    """Print the roles with more rights than any duty needs; return 1 if there are any."""
    with database(options) as conn:
        found = health.findings(conn, "grants_beyond_duties", {})
    if options.json:
        put_json([{"evidence": evidence, "remedy": remedy} for _, evidence, remedy in found])
    elif found:
        show(table("", ("Finding", "What to do"), [(evidence, remedy) for _, evidence, remedy in found]))
    else:
        put("no role has more rights than a duty needs")
    return 1 if found else 0
