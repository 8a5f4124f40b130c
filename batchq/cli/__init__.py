"""The command line, ``batchq COMMAND``: a module of `cli.commands` for each command, and `verbs` for the actions."""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import psycopg

from batchq.cli.arguments import Parser
from batchq.cli.leaving import WRITE_SECONDS, flush, leave, within
from batchq.common import terminal
from batchq.common.version import __version__
from batchq.errors import BatchqError, DatabaseAway, LifespanFailed, OutcomeUnknown

# Modules of `cli.commands`, in the order of the help; `verbs` stands between the two.
_COMMANDS = (
    "migrate", "check", "doctor", "roles", "distribute", "demo", "worker", "enqueue", "status", "monitor", "show",
    "watch", "flow", "logs", "top", "web", "limit", "keys", "schedule", "split",
)  # fmt: skip
_LAST_COMMANDS = ("prune", "new-key")
_EXIT_ERROR, _EXIT_MISTAKE, _EXIT_INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0 done, 1 something went wrong, 2 usage or configuration error."""
    _replace_unprintable_letters()
    given = sys.argv[1:] if arguments is None else arguments
    parser = make_parser(given[0] if given else "")
    if not all(_is_text(argument) for argument in given):
        parser.error("an argument is not valid UTF-8")
    options = parser.parse_args(given)
    code = _run(options)
    if options.runs_workers:
        leave(code)
    return code


def make_parser(first: str = "") -> argparse.ArgumentParser:
    """Return the parser of all commands, or only that of the command that the *first* argument names.

    A worker needs no tables and progress bars: it starts sooner without them, and needs 2 MB less.
    """
    parser = Parser(
        prog="batchq",
        description="A job queue that lives in Postgres. Settings come from flags, or from BATCHQ_* in the environment "
        "or .env. The database is BATCHQ_DSN; several are BATCHQ_DATABASES.",
        epilog="Exit codes: 0 done; 1 could not be done, not found, or a problem was found; 2 wrong usage or "
        "configuration; 130 interrupted. batchq watch: 3 if the batch was cancelled.",
    )
    parser.add_argument("--version", action="version", version=f"batchq {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    module = "worker" if first == "workers" else first
    if module in (*_COMMANDS, *_LAST_COMMANDS):
        _add(subparsers, module)
        return parser
    _add(subparsers, *_COMMANDS)
    import_module("batchq.cli.verbs").add_parsers(subparsers)
    _add(subparsers, *_LAST_COMMANDS)
    import_module("batchq.cli.commands.completion").add_parser(subparsers, make_parser)
    return parser


def _add(subparsers: Any, *commands: str) -> None:
    for command in commands:
        import_module(f"batchq.cli.commands.{command.replace('-', '_')}").add_parser(subparsers)


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
    except (OutcomeUnknown, DatabaseAway, LifespanFailed) as error:
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
    from batchq.operate.refusals import refusal  # only here: a worker has no use for it

    text = (refusal(error) if isinstance(error, psycopg.Error) else "") or str(error)
    if not within(WRITE_SECONDS, lambda: terminal.complain(terminal.one_line(text))):
        os._exit(code)
    return code
