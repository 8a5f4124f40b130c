"""``batchq distribute``: lay out the tables for Citus, and distribute them by queue."""

from argparse import Namespace
from typing import Any

from batchq.cli.arguments import add_command
from batchq.cli.asking import add_yes, is_confirmed
from batchq.cli.connections import settings_of
from batchq.common.terminal import put
from batchq.operate import distribute
from batchq.postgres.connections import connect
from batchq.postgres.server_checks import check_server, check_writable

_QUESTION = "Change the layout of batchq's tables for Citus? This cannot be undone: to go back, restore a dump."


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(
        subparsers, "distribute", _run, "distribute the tables by queue, with Citus (experimental)",
        settings=("databases", "dsn", "migration_dsn"),
    )  # fmt: skip
    parser.epilog = "Stop producers and workers first. Run it again after an upgrade: it makes what is missing."
    parser.add_argument("--dry-run", action="store_true", help="print the SQL, and change nothing")
    parser.add_argument(
        "--without-citus", action="store_true", help="change the layout only, for trying it on a plain Postgres"
    )
    add_yes(parser)


def _run(options: Namespace) -> int:
    with connect(settings_of(options).require_dsn(for_migration=True)) as conn:
        check_server(conn)
        check_writable(conn)
        if options.dry_run:
            for step in distribute.steps(conn, not options.without_citus):
                for line in (f"-- {step.name}", *f"{step.text.rstrip()};".splitlines(), ""):
                    put(line)
            return 0
        if not is_confirmed(_QUESTION, options.yes):
            return 1
        made = set()
        for step in distribute.distribute(conn, not options.without_citus):
            made.add(step.name)
            put(f"{step.name.replace('_', ' ')}: done")
        if "separate_finished" not in made:
            put("the tables had this layout before; only what an upgrade may have changed was made again")
    return 0
