"""``batchq roles``: what each role may do, by its duty."""

from argparse import Namespace

from batchq.cli.commands import database
from batchq.cli.show_tables import table
from batchq.common.terminal import put, put_json, show
from batchq.errors import InvalidInput
from batchq.postgres.statements import health, verbs

DUTIES = ("producer", "worker", "viewer", "operator")


def roles(options: Namespace) -> int:
    """Print or apply the grants of a duty; without one, say who has more than any duty needs: 1 if anybody has."""
    if options.duty is None:
        return check(options)
    if options.role is None:
        raise InvalidInput(f"name the role that is to be {options.duty}: batchq roles {options.duty} ROLE")
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


def check(options: Namespace) -> int:
    """Print the roles that have more than any duty needs; return 1 if there are any."""
    with database(options) as conn:
        found = health.findings(conn, "grants_beyond_duties", {})
    if options.json:
        put_json([{"evidence": evidence, "remedy": remedy} for _, evidence, remedy in found])
    elif found:
        show(table("", ("who", "what to do"), [(evidence, remedy) for _, evidence, remedy in found]))
    else:
        put("no role has more than a duty needs")
    return 1 if found else 0
