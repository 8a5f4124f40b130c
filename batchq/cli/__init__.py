"""The command line: ``batchq COMMAND``. Arguments are read here; each command is a function of `commands`."""

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, NoReturn

import psycopg

from batchq.cli import commands, doctor, invariants, one_batch, roles, verbs, web
from batchq.cli.leaving import WRITE_SECONDS, flush, leave, within
from batchq.common import terminal
from batchq.common.secrets import hide_password
from batchq.errors import BatchqError, DatabaseAway, OutcomeUnknown
from batchq.settings import Settings

EXIT_TROUBLE, EXIT_MISTAKE, EXIT_INTERRUPTED = 1, 2, 130
SHOWN_STATUSES = ("ready", "scheduled", "retrying", "processing", "stalled", "completed", "failed", "cancelled")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0 done, 1 something went wrong, 2 the caller's mistake."""
    print_any_letter()
    parser = make_parser()
    given = sys.argv[1:] if arguments is None else arguments
    if not all(is_text(argument) for argument in given):
        parser.error("an argument is not valid UTF-8")
    options = parser.parse_args(given)
    code = run(options)
    if options.run in (commands.worker, commands.workers):
        leave(code)
    return code


def print_any_letter() -> None:
    """Have standard output replace the letters that its encoding does not have (ASCII, in a cron job), not fail."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def run(options: argparse.Namespace) -> int:
    """Run the command of *options*; return its exit code."""
    try:
        return int(options.run(options))
    except (OutcomeUnknown, DatabaseAway) as error:
        return complain(error, EXIT_TROUBLE)
    except (BatchqError, psycopg.DataError, psycopg.IntegrityError, UnicodeError) as error:
        return complain(error, EXIT_MISTAKE)
    except psycopg.Error as error:
        return complain(error, EXIT_TROUBLE)
    except BrokenPipeError:
        sys.stderr.close()
        return EXIT_TROUBLE
    except KeyboardInterrupt:
        if not flush():  # nobody reads what it was printing
            os._exit(EXIT_INTERRUPTED)
        return EXIT_INTERRUPTED


def complain(error: Exception, code: int) -> int:
    """Print the error in one line, if somebody reads it; return *code*."""
    refusal = commands.refusal(error) if isinstance(error, psycopg.Error) else ""
    if not within(WRITE_SECONDS, lambda: terminal.complain(terminal.one_line(refusal or str(error)))):
        os._exit(code)
    return code


def is_text(argument: str) -> bool:
    """Tell whether an argument was given in valid UTF-8; what is not comes as lone surrogates."""
    return not any("\ud800" <= char <= "\udfff" for char in argument)


def natural(text: str) -> int:
    """Read a whole number from 0 up."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, not {number}")
    return number


def some_seconds(text: str) -> float:
    """Read a number of seconds, from 0.01 to a day."""
    seconds = float(text)
    if not 0.01 <= seconds <= 86_400:
        raise argparse.ArgumentTypeError(f"must be from 0.01 to 86400, not {text}")
    return seconds


class Parser(argparse.ArgumentParser):
    """A parser whose errors, which quote arguments, show no password and no hidden characters: a shell may have put the
    names of files there."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and what is wrong, and exit with 2."""
        super().error(terminal.line(hide_password(message)))


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = Parser(
        prog="batchq",
        description="A job queue that lives in Postgres. Settings come from BATCHQ_* in the environment or .env, or "
        "from flags; the database is BATCHQ_DSN.",
    )
    parser.add_argument("--version", action="version", version=f"batchq {version('batchq')}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (add_setup, add_demo, add_workers, add_enqueue, add_looking, add_watching, add_web, add_verbs):
        add(subparsers)
    return parser


def add_command(
    subparsers: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str, *, settings: Sequence[str]
) -> argparse.ArgumentParser:
    """Add a command with the flags of some *settings*; return its parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + "."
    )
    parser.set_defaults(run=run)
    group = parser.add_argument_group("settings", "each is BATCHQ_NAME in the environment, too")
    for setting in settings:
        field = Settings.model_fields[setting]
        flag = "--" + setting.replace("_", "-")
        group.add_argument(
            flag, dest=f"set_{setting}", metavar="VALUE", help=(field.description or "").replace("%", "%%")
        )
    return parser


def batch_id(text: str) -> int:
    """Return a batch's id. Raises ValueError for a number that is none: the database would say so less clearly."""
    number = int(text)
    if not 0 < number < 2**63:
        raise ValueError
    return number


READING = ("dsn", "database_timeout_seconds")
WORKER = tuple(name for name in Settings.model_fields if name != "migration_dsn")


def add_setup(subparsers: Any) -> None:
    """Add what prepares and checks a database."""
    add_command(
        subparsers, "migrate", commands.migrate, "create or update the schema", settings=("dsn", "migration_dsn")
    )
    check = add_command(
        subparsers, "check", commands.check, "check DSN, server, schema and, if given, an app", settings=READING
    )
    check.add_argument("app", nargs="?", metavar="MODULE:APP", help="an app whose handlers must cover what waits")
    check.add_argument("--json", action="store_true", help="print JSON")
    check.add_argument(
        "--invariants",
        dest="run",
        action="store_const",
        const=invariants.check,
        help="look for rows for which what is always true is not, instead; exit 1 if there are any",
    )
    doctor_parser = add_command(
        subparsers,
        "doctor",
        doctor.run,
        "name what is wrong and what to do; exit 1: warnings, 2: critical",
        settings=READING,
    )
    doctor_parser.add_argument("--json", action="store_true", help="print JSON")
    roles_parser = add_command(
        subparsers,
        "roles",
        roles.roles,
        "say who may do more than a duty needs; print or apply grants",
        settings=READING,
    )
    roles_parser.add_argument("duty", nargs="?", choices=roles.DUTIES, help="what a role is for")
    roles_parser.add_argument("role", nargs="?", metavar="ROLE", help="the name of the role")
    roles_parser.add_argument("--apply", action="store_true", help="grant it, as the owner of the schema")
    roles_parser.add_argument("--json", action="store_true", help="print JSON")


def add_demo(subparsers: Any) -> None:
    """Add what shows all of it."""
    demo = add_command(
        subparsers,
        "demo",
        commands.demo,
        "work real input with two workers, kill one, check the result",
        settings=("dsn",),
    )
    demo.add_argument("--directory", help="where the private server keeps its data (default: in your cache directory)")
    demo.add_argument(
        "--files", type=int, default=0, help="at most so many files (default: all of the standard library)"
    )
    demo.add_argument("--web", action="store_true", help="show it on a page; begins when somebody looks at it")


def add_workers(subparsers: Any) -> None:
    """Add what runs workers."""
    worker = add_command(subparsers, "worker", commands.worker, "work batches until stopped", settings=WORKER)
    workers = add_command(
        subparsers,
        "workers",
        commands.workers,
        "run several worker processes, replacing those that die",
        settings=WORKER,
    )
    workers.add_argument("processes", type=int, metavar="N", help="how many processes")
    for parser in (worker, workers):
        parser.add_argument("app", metavar="MODULE:APP", help="the batchq.App, such as tasks:app")
        parser.add_argument("--drain", action="store_true", help="exit when nothing is ready any more")


def add_enqueue(subparsers: Any) -> None:
    """Add enqueue."""
    parser = add_command(
        subparsers, "enqueue", commands.enqueue, "enqueue a batch, or a file of items", settings=READING
    )
    parser.add_argument("kind", help="the name of the handler")
    parser.add_argument("--payload", metavar="JSON", help="the payload (default: {})")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--items", metavar="FILE", help="one item a line, as JSON; - is standard input")
    source.add_argument("--lines", metavar="FILE", help="one item a line, as plain text; - is standard input")
    parser.add_argument("--items-per-batch", type=int, default=1000, metavar="N", help="(default: 1000)")
    parser.add_argument("--queue", default="default")
    parser.add_argument("--priority", type=int, default=0, help="lower first")
    parser.add_argument("--delay-seconds", type=float, default=0)
    parser.add_argument("--unique-key", help="insert nothing while a live batch of the kind has this key")
    parser.add_argument("--max-attempts", type=int, default=5)
    parser.add_argument("--max-failed-items", type=int, default=0)
    parser.add_argument("--timeout-seconds", type=int)
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_looking(subparsers: Any) -> None:
    """Add what shows."""
    status = add_command(
        subparsers, "status", commands.status, "show queues, workers and the latest batches", settings=READING
    )
    monitor = add_command(
        subparsers, "monitor", commands.monitor, "print batches as their state changes", settings=READING
    )
    for parser in (status, monitor):
        parser.add_argument("--queue", help="of this queue only")
        parser.add_argument("--kind", help="of this kind only")
    status.add_argument("--status", choices=SHOWN_STATUSES, help="batches in this state only")
    status.add_argument("--limit", type=natural, default=20, help="how many batches (default: 20)")
    status.add_argument("--watch", action="store_true", help="redraw every second, until Ctrl-C")
    status.add_argument("--json", action="store_true", help="print JSON")
    monitor.add_argument("--every-seconds", type=some_seconds, default=1.0, help="(default: 1)")
    monitor.add_argument("--exit-on", default="", metavar="STATUS,...", help="exit 1 when a batch is failed or stalled")
    monitor.add_argument("--until-done", action="store_true", help="exit 0 when nothing waits or runs any more")
    monitor.add_argument("--json", action="store_true", help="print a JSON object a line")
    show = add_command(subparsers, "show", commands.show, "show one batch and its failed items", settings=READING)
    show.add_argument("id", type=batch_id)
    show.add_argument("--limit", type=natural, default=20, help="how many failed items (default: 20)")
    show.add_argument("--json", action="store_true", help="print JSON")


def add_watching(subparsers: Any) -> None:
    """Add what shows as it happens: one batch, its past, or everything on a full screen."""
    watch = add_command(
        subparsers, "watch", one_batch.watch, "follow one batch to its end; exit 1 when it fails", settings=READING
    )
    logs = add_command(subparsers, "logs", one_batch.logs, "tell one batch's attempts and errors", settings=READING)
    for parser in (watch, logs):
        parser.add_argument("id", type=batch_id)
        parser.add_argument("--json", action="store_true", help="print a JSON object a line")
    top = add_command(
        subparsers, "top", commands.top, "show everything on a full screen, live; needs batchq[top]", settings=READING
    )
    top.add_argument("--queue", help="of this queue only")
    top.add_argument("--kind", help="of this kind only")
    top.add_argument("--json", action="store_true", help="print JSON once")
    watch.add_argument("--every-seconds", type=some_seconds, default=0.5, help="(default: 0.5)")
    top.add_argument(
        "--every-seconds", type=some_seconds, help="(default: 1 to 10, a hundred times as long as a look takes)"
    )


def add_verbs(subparsers: Any) -> None:
    """Add the verbs, and what goes with them."""
    for command, (verb, *variants) in verbs.commands().items():
        parser = add_command(subparsers, command, verbs.run, verb.help, settings=READING)
        verbs.add_arguments(parser, verb, variants, batch_id)
    audit = add_command(subparsers, "audit", verbs.audit, "list who did what, and why", settings=READING)
    audit.add_argument("--id", type=batch_id, help="show only actions on this batch")
    audit.add_argument("--limit", type=natural, default=20, help="how many (default: 20)")
    audit.add_argument("--json", action="store_true", help="print JSON")
    add_prune(subparsers)


def add_prune(subparsers: Any) -> None:
    """Add prune."""
    prune = add_command(
        subparsers, "prune", commands.prune, "drop what finished long ago, whole days at a time", settings=READING
    )
    prune.add_argument("--older-than-days", type=float, metavar="N", help="(default: the setting keep_finished_days)")
    prune.add_argument("--json", action="store_true", help="print JSON")


def add_web(subparsers: Any) -> None:
    """Add the page."""
    parser = add_command(subparsers, "web", web.web, "serve the page for a browser", settings=READING)
    parser.add_argument("--host", help="the address to listen on (default: 127.0.0.1; others need a password)")
    parser.add_argument("--port", type=int, help="(default: 8080)")
    parser.add_argument("--read-only", action="store_true", help="show only: refuse every verb")
    parser.epilog = "Its password or token comes from BATCHQ_WEB_PASSWORD or BATCHQ_WEB_TOKEN."
