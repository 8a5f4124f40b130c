"""The command line, ``batchq COMMAND``: a module of `cli.commands` for each command, and `verbs` for the actions."""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

import psycopg

from batchq.cli import verbs
from batchq.cli.arguments import Parser
from batchq.cli.commands import (
    check,
    demo,
    doctor,
    enqueue,
    flow,
    keys,
    limit,
    logs,
    migrate,
    monitor,
    prune,
    roles,
    schedule,
    show,
    status,
    top,
    watch,
    web,
    worker,
)
from batchq.cli.connections import refusal
from batchq.cli.leaving import WRITE_SECONDS, flush, leave, within
from batchq.common import terminal
from batchq.errors import BatchqError, DatabaseAway, OutcomeUnknown

_COMMANDS = (
    migrate, check, doctor, roles, demo, worker, enqueue, status, monitor, show, watch, flow, logs, top, web, limit,
    keys, schedule,
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
    verbs.add_parsers(subparsers)
    prune.add_parser(subparsers)
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
