"""``batchq migrate``: create or update the schema."""

from argparse import Namespace
from typing import Any

from batchq.cli.arguments import add_command
from batchq.cli.connections import settings_of
from batchq.common.terminal import put
from batchq.postgres import migrate
from batchq.postgres.connections import connect
from batchq.postgres.server_checks import check_server, check_writable


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    add_command(
        subparsers, "migrate", _run, "create or update the schema", settings=("dsn", "databases", "migration_dsn")
    )


def _run(options: Namespace) -> int:
    with connect(settings_of(options).require_dsn(for_migration=True)) as conn:
        check_server(conn)
        check_writable(conn)
        applied = migrate.apply_all(conn)
    put(f"applied {', '.join(applied)}" if applied else "the schema is up to date")
    return 0
