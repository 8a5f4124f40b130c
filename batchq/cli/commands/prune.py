"""``batchq prune``: drop old finished batches."""

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import psycopg

from batchq.cli.arguments import add_command
from batchq.cli.connections import connected, settings_of
from batchq.common.terminal import complain, put, put_json
from batchq.errors import InvalidInput
from batchq.postgres.statements import maintenance, session
from batchq.postgres.transactions import transaction


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(subparsers, "prune", _run, "drop old finished batches, whole days at a time")
    parser.add_argument(
        "--older-than-days", type=float, metavar="N", help="minimum age in days (default: BATCHQ_KEEP_FINISHED_DAYS)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(options: Namespace) -> int:
    days = options.older_than_days
    if days is None:
        days = settings_of(options).keep_finished_days
    if not 0 <= days < 1_000_000:
        raise InvalidInput(f"--older-than-days must be 0 or more, and less than 1000000, not {days:g}")
    dropped = 0
    try:
        for count in _prune(options, days):
            dropped += count
    except psycopg.errors.LockNotAvailable:
        complain(f"a table is in use, {dropped} daily partitions were dropped; try again")
        return 1
    put_json({"dropped_partitions": dropped}) if options.json else put(f"dropped {dropped} daily partitions")
    return 0


def _prune(options: Namespace, days: float) -> Iterator[int]:
    """Drop a few partitions in each transaction; yield how many, after its commit."""
    seconds = settings_of(options).database_timeout_seconds
    with connected(options) as conn:
        count = 1
        while count > 0:
            with transaction(conn, seconds, settings=session.FIXED_FORMATS):
                count = maintenance.prune(conn, days)
            yield count
