"""``batchq prune``: drop old finished batches."""

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import psycopg

from batchq.cli.arguments import add_command
from batchq.cli.asking import add_yes, is_confirmed
from batchq.cli.connections import connected, settings_of
from batchq.common.numbers import counted
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
    add_yes(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(options: Namespace) -> int:
    days = options.older_than_days
    if days is None:
        days = settings_of(options).keep_finished_days
    if not 0 <= days < 1_000_000:
        raise InvalidInput(f"--older-than-days must be 0 or more, and less than 1,000,000, not {days:g}")
    if options.older_than_days is not None and days < settings_of(options).keep_finished_days:
        question = f"Drop all finished batches older than {days:g} {'day' if days == 1 else 'days'}, for good?"
        if not is_confirmed(question, options.yes):
            return 1
    dropped = 0
    try:
        for count in _prune(options, days):
            dropped += count
    except psycopg.errors.LockNotAvailable:
        complain(f"a table is in use; {_days(dropped)} dropped so far; try again")
        return 1
    put_json({"dropped_partitions": dropped}) if options.json else put(f"dropped {_days(dropped)}")
    return 0


def _days(dropped: int) -> str:
    return counted(dropped, "daily partition")


def _prune(options: Namespace, days: float) -> Iterator[int]:
    """Drop a few partitions in each transaction; yield how many, after its commit."""
    seconds = settings_of(options).database_timeout_seconds
    with connected(options) as conn:
        count = 1
        while count > 0:
            with transaction(conn, seconds, settings=session.FIXED_FORMATS):
                count = maintenance.prune(conn, days)
            yield count
