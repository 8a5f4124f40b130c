"""The command line, ``batchq COMMAND``: a module of `cli.commands` for each command, and `verbs` for the actions."""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import psycopg

from batchq.cli import verbs
from batchq.cli.arguments import READING, Parser, add_command, batch_id, natural
from batchq.cli.commands import (
    check,
    demo,
    doctor,
    enqueue,
    logs,
    migrate,
    monitor,
    roles,
    show,
    status,
    top,
    watch,
    web,
    worker,
)
from batchq.cli.commands.prune import add_parser as add_prune
from batchq.cli.connections import refusal
from batchq.cli.leaving import WRITE_SECONDS, flush, leave, within
from batchq.common import terminal
from batchq.errors import BatchqError, DatabaseAway, OutcomeUnknown

_COMMANDS = (
    migrate, check, doctor, roles, demo, worker, enqueue, status, monitor, show, watch, logs, top, web,
)  # fmt: skip
_EXIT_ERROR, _EXIT_MISTAKE, _EXIT_INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0 done, 1 something went wrong, 2 usage or configuration error."""
    _replace_unprintable_letters()
    parser = make_parser()
    given = sys.argv[1:] if arguments is None else arguments
    if not all(_is_text(argument) for argument in given):
        parser.error("an argument is not valid UTF-8")
    options = parser.parse_args(given)
    code = _run(options)
    if options.runs_workers:
        leave(code)
    return code


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = Parser(
        prog="batchq",
        description="A job queue that lives in Postgres. Settings come from flags, or from BATCHQ_* in the environment "
        "or .env. The database is BATCHQ_DSN.",
    )
    parser.add_argument("--version", action="version", version=f"batchq {version('batchq')}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(subparsers)
    add_verbs(subparsers)
    return parser


def _replace_unprintable_letters() -> None:
    """Print a replacement for letters that the encoding (ASCII, in a cron job) does not have, instead of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _is_text(argument: str) -> bool:
    """Return whether an argument was valid UTF-8; other bytes arrive as lone surrogates."""
    return not any("\ud800" <= char <= "\udfff" for char in argument)


def _run(options: argparse.Namespace) -> int:
    try:
        return int(options.run(options))
    except (OutcomeUnknown, DatabaseAway) as error:
        return _complain(error, _EXIT_ERROR)
    except (BatchqError, psycopg.DataError, psycopg.IntegrityError, UnicodeError) as error:
        return _complain(error, _EXIT_MISTAKE)
    except psycopg.Error as error:
        return _complain(error, _EXIT_ERROR)
    except BrokenPipeError:
        sys.stderr.close()
        return _EXIT_ERROR
    except KeyboardInterrupt:
        if not flush():  # nobody reads what it was printing
            os._exit(_EXIT_INTERRUPTED)
        return _EXIT_INTERRUPTED


def _complain(error: Exception, code: int) -> int:
    """Print the error in one line, unless nobody reads it; return *code*."""
    text = (refusal(error) if isinstance(error, psycopg.Error) else "") or str(error)
    if not within(WRITE_SECONDS, lambda: terminal.complain(terminal.one_line(text))):
        os._exit(code)
    return code


def add_verbs(subparsers: Any) -> None:
    """Add what changes batches."""
    final, live = ("failed", "cancelled", "completed"), ("live", "pending", "processing")
    for name, run, summary, statuses in (
        ("cancel", verbs.cancel, "cancel batches, running ones too", live),
        ("retry", verbs.retry, "work finished batches again, from their checkpoint", final),
        ("snooze", verbs.snooze, "let pending batches wait, or run at once (--for 0s)", ("pending",)),
        ("priority", verbs.set_priority, "change the priority of pending batches", ("pending",)),
        ("move", verbs.move, "move pending batches to another queue", ("pending",)),
    ):
        parser = add_command(subparsers, name, run, summary, settings=READING)
        verbs.add_batches(parser, statuses, batch_id)
        verbs.add_who_and_why(parser, "by an operator" if name == "cancel" else None)
        if name == "retry":
            parser.add_argument("--whole", action="store_true", help="from the start, instead of from its checkpoint")
            parser.add_argument("--items", action="store_true", help="those with failed items alone")
        elif name == "snooze":
            verbs.add_time(parser, required=True)
        elif name != "cancel":
            parser.add_argument("--to", required=True, type=int if name == "priority" else str, help="the new one")
    add_steering(subparsers)
    add_prune(subparsers)


def add_steering(subparsers: Any) -> None:
    """Add what changes how queues, kinds and workers go on."""
    pause = add_command(
        subparsers, "pause", verbs.pause, "have a queue or a kind not claimed; list what is paused", settings=READING
    )
    verbs.add_time(pause, required=False)
    resume = add_command(subparsers, "resume", verbs.resume, "end a pause", settings=READING)
    for parser in (pause, resume):
        verbs.add_what(parser)
        verbs.add_who_and_why(parser)
    drain = add_command(
        subparsers, "drain", verbs.drain, "have workers finish what they run, and end", settings=READING
    )
    drain.add_argument("workers", nargs="+", metavar="WORKER", help="its id, as batchq status shows it")
    verbs.add_who_and_why(drain)
    audit = add_command(subparsers, "audit", verbs.audit, "show who did what, and why", settings=READING)
    audit.add_argument("--id", type=batch_id, help="to this batch")
    audit.add_argument("--limit", type=natural, default=20, help="how many (default: 20)")
    audit.add_argument("--json", action="store_true", help="print JSON")
