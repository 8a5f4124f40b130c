"""`batchq split`: split a queue into shards, add shards, or list them."""

import random
import time
from argparse import Namespace
from typing import Any

import psycopg

from batchq.cli.arguments import add_command, queue_name, whole_number
from batchq.cli.asking import add_yes, is_confirmed
from batchq.cli.connections import connected, settings_of
from batchq.cli.known import warn_of_unknown
from batchq.cli.verbs import user_name
from batchq.common.terminal import put, put_json
from batchq.postgres.statements import session, shards
from batchq.postgres.transactions import transaction

_MOST_TRIES = 20
_MOST_PAUSE_SECONDS = 2.0  # between two tries, so that producers that were kept waiting go on


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(subparsers, "split", _run, "split a queue into shards, add shards, or list them")
    parser.description = (
        "Split a queue into shards, which are stored as queues of their own; or add shards to a queue that is split. "
        "Producers, workers and people go on using the queue's name. The number of shards cannot shrink. Only for the "
        "owner of the schema."
    )
    parser.add_argument("queue", nargs="?", type=queue_name, metavar="QUEUE", help="queue to split, or to list")
    parser.add_argument("shards", nargs="?", type=_number, metavar="SHARDS", help="number of shards, 2 to 64")
    parser.add_argument("--reason", help="reason to record in batchq.audit")
    parser.add_argument("--actor", default=user_name(), help="name to record in batchq.audit (default: your user name)")
    add_yes(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def _number(text: str) -> int:
    return whole_number(text, 2, 64, "a number of shards, from 2 to 64")


def _run(options: Namespace) -> int:
    seconds = settings_of(options).database_timeout_seconds
    with connected(options) as conn:
        if options.shards is not None:
            with transaction(conn, seconds, settings=session.FIXED_FORMATS):
                warn_of_unknown(conn, options.queue, None)
            question = f"Split queue {options.queue} into {options.shards} shards? The number can grow, never shrink."
            if not is_confirmed(question, options.yes):
                return 1
            _split(conn, options, seconds)
        with transaction(conn, seconds, settings=session.FIXED_FORMATS):
            rows = shards.shard_rows(conn, options.queue)
    if options.json:
        put_json(rows)
    else:
        for queue in dict.fromkeys(row["queue"] for row in rows):
            names = [row["shard"] for row in rows if row["queue"] == queue]
            put(f"queue {queue} has {len(names)} shards: {names[0]} to {names[-1]}")
        if not rows:
            put(f"queue {options.queue} is not split" if options.queue else "no queue is split")
    return 0


def _split(conn: psycopg.Connection[Any], options: Namespace, seconds: float) -> None:
    """Split the queue, each try in a transaction of its own. While transactions of producers are open, try again."""
    for number in range(1, _MOST_TRIES + 1):
        try:
            with transaction(conn, seconds, settings=session.FIXED_FORMATS):
                shards.split_queue(conn, options.queue, options.shards, options.reason, options.actor)
            return
        except psycopg.errors.LockNotAvailable:
            if number == _MOST_TRIES:
                raise
            time.sleep(random.uniform(0.2, 1.0) * _MOST_PAUSE_SECONDS)  # noqa: S311 (not a secret)
