"""The commands of the verbs, made from batchq.operate.verbs: for some batches by id, for many by a filter."""

import argparse
import getpass
import signal
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import psycopg
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from batchq.cli import show_tables
from batchq.cli.arguments import add_command, batch_id, natural
from batchq.cli.connections import connected, database, linked, refusal, settings_of
from batchq.common.terminal import column, errors, put, put_json, show, styled
from batchq.common.text import period_seconds
from batchq.errors import InvalidInput
from batchq.operate.bulk import PAUSE_FACTOR, Bulk, Runner
from batchq.operate.verbs import VERBS, Argument, Verb
from batchq.postgres.statements import session
from batchq.postgres.statements.verbs import audit_rows, pause_rows
from batchq.postgres.transactions import transaction

_EXIT_LEFT_OUT, _EXIT_INTERRUPTED = 1, 130
_REPORT_SECONDS = 5.0
_FILTERS = ("queue", "kind", "key", "status", "error_like", "older_than_seconds")
_NEEDED = {
    "resume": "--queue, --kind, or both, as the pause had them; batchq pause lists the pauses",
    "end_throttle": "--queue, and --kind and --key as the throttle has them; batchq limit lists the throttles",
}
_NO_BATCH = "there is no such batch"


def commands() -> dict[str, list[Verb]]:
    """Return the verbs of each command: first its own, then the variants that an option chooses."""
    found: dict[str, list[Verb]] = {}
    for verb in VERBS.values():
        found.setdefault(verb.command, []).append(verb)
    return found


# ------------------------------------------------------------------------------------------------------ what they do


def run(options: Namespace) -> int:
    """Do the verb that the command and its options mean."""
    if len(set(options.variants)) > 1:
        raise InvalidInput(
            f"{' and '.join(VERBS[name].option for name in options.variants)} exclude each other; choose one"
        )
    verb = VERBS[options.variants[0]] if options.variants else options.verb
    keys = verb.argument.keys if verb.argument else ()
    change = {key: getattr(options, key) for key in keys if getattr(options, key) is not None}
    return {"batch": _on_batches, "queue": _on_queue, "worker": _on_workers}[verb.target](options, verb, change)


def audit(options: Namespace) -> int:
    """List the recorded actions."""
    with database(options) as conn:
        rows = audit_rows(conn, options.limit, options.id)
    if options.json:
        put_json(rows)
    else:
        show(show_tables.audit_table(rows))
    return 0


def _on_queue(options: Namespace, verb: Verb, change: dict[str, Any]) -> int:
    if options.queue is None and options.kind is None:
        if verb.name == "pause":
            return _list_pauses(options)
        raise InvalidInput(f"{verb.command} needs {_NEEDED[verb.name]}")
    target = {"queue": options.queue, "kind": options.kind}
    with database(options) as conn:
        is_changed = verb.do(conn, target, change, options.reason, options.actor)
    put_json({"changed": is_changed}) if options.json else put(verb.done if is_changed else verb.unchanged)
    return 0


def _list_pauses(options: Namespace) -> int:
    with database(options) as conn:
        rows = pause_rows(conn)
    if options.json:
        put_json(rows)
    elif not rows:
        put("nothing is paused")
    else:
        show(show_tables.pause_table(rows))
    return 0


def _on_workers(options: Namespace, verb: Verb, change: dict[str, Any]) -> int:
    with database(options) as conn:
        found = {
            id_: verb.do(conn, {"worker_id": id_}, change, options.reason, options.actor) for id_ in options.workers
        }
    if options.json:
        put_json(found)
    else:
        for id_, status in found.items():
            put(f"{id_}: {status or 'there is no such worker'}")
    return 0 if all(found.values()) else 1


def _on_batches(options: Namespace, verb: Verb, change: dict[str, Any]) -> int:
    given = {name: getattr(options, name) for name in _FILTERS if getattr(options, name, None) is not None}
    if not verb.statuses:
        if given or not options.ids:
            raise InvalidInput(f"{verb.option} takes ids of batches, and no filter")
        return _on_each_batch(options, verb, change)
    if options.ids and (given or options.all):
        raise InvalidInput("give ids or a filter, not both")
    if options.ids and options.dry_run:
        raise InvalidInput("--dry-run goes with a filter")
    if options.ids:
        return _on_each_batch(options, verb, change)
    if not given and not options.all:
        raise InvalidInput("no batches selected; pass ids, a filter (--kind, --queue, --status, ...) or --all")
    return _in_bulk(options, Bulk(verb.name, given, change, options.reason, options.actor))


def _on_each_batch(options: Namespace, verb: Verb, change: dict[str, Any]) -> int:
    # Each in a transaction of its own, so that one that is refused does not stop the others.
    results: dict[int, str] = {}
    refused = False
    seconds = settings_of(options).database_timeout_seconds
    with connected(options) as conn:
        for id_ in options.ids:
            try:
                with transaction(conn, seconds, settings=session.FIXED_FORMATS):
                    status = verb.do(conn, {"batch_id": id_}, change, options.reason, options.actor)
                results[id_] = status or _NO_BATCH
            except (psycopg.errors.RaiseException, psycopg.errors.UniqueViolation) as error:
                results[id_] = refusal(error)
                refused = True
    if options.json:
        put_json(results)
    else:
        for id_, text in results.items():
            put(f"batch {id_}: {text}")
    return 1 if refused or _NO_BATCH in results.values() else 0


# ----------------------------------------------------------------------------------------------------------- in bulk


def _in_bulk(options: Namespace, bulk: Bulk) -> int:
    with linked(options) as link:
        runner = Runner(link, bulk, 0 if options.fast else PAUSE_FACTOR)
        with _stopped_by_signals(runner):
            with errors.status("counting what matches") as status:
                total = runner.count(lambda count: status.update(styled(f"counting what matches: {count:,}")))
            if not options.dry_run and not runner.stopping.is_set():
                _change(runner, total)
    return _report(options, runner, total)


@contextmanager
def _stopped_by_signals(runner: Runner) -> Iterator[None]:
    """Let Ctrl-C or SIGTERM stop the runner after its current step, and a second one immediately."""

    def stop(*_: Any) -> None:
        if runner.stopping.is_set():
            raise KeyboardInterrupt
        runner.stopping.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _change(runner: Runner, total: int) -> None:
    # Progress is a bar on a terminal, or else a line on standard error every few seconds.
    bulk = runner.bulk
    columns = (column(bulk.name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    last_printed_at = time.monotonic()
    with Progress(*columns, console=errors, disable=not errors.is_terminal) as progress:
        task = progress.add_task("", total=total)
        for _ in runner.changes():
            progress.update(task, completed=bulk.changed)
            if not errors.is_terminal and time.monotonic() - last_printed_at >= _REPORT_SECONDS:
                last_printed_at = time.monotonic()
                errors.print(styled(f"{bulk.changed:,} of {total:,} {bulk.verb.done}"), soft_wrap=True)


def _report(options: Namespace, runner: Runner, total: int) -> int:
    """Print what was done; return the exit code: 130 if it was interrupted, 1 if batches were left out."""
    bulk, interrupted = runner.bulk, runner.stopping.is_set()
    fields = {
        "matched": total, "changed": bulk.changed, "left": bulk.left, "left_out": asdict(bulk.left_out()),
        "interrupted": interrupted,
        "longest_chunk_ms": round(1000 * runner.longest_seconds, 1), "audit_id": bulk.audit_id,
    }  # fmt: skip
    if options.json:
        put_json(fields)
    elif options.dry_run:
        put(f"{total:,} batches would be {bulk.verb.done}")
    elif interrupted:
        put(f"{bulk.changed:,} batches {bulk.verb.done}; interrupted, {bulk.left:,} are left")
    else:
        left = f"; {bulk.left:,} left unchanged: {bulk.left_out()}" if bulk.left else ""
        put(f"{bulk.changed:,} batches {bulk.verb.done}{left}")
    if interrupted:
        return _EXIT_INTERRUPTED
    return _EXIT_LEFT_OUT if bulk.left and not options.dry_run else 0


# ---------------------------------------------------------------------------------------------------- their arguments


def add_parsers(subparsers: Any) -> None:
    """Add the commands of the verbs, and `batchq audit`, which lists them."""
    for command, (verb, *variants) in commands().items():
        add_arguments(add_command(subparsers, command, run, verb.help), verb, variants)
    parser = add_command(subparsers, "audit", audit, "list who did what, and why")
    parser.add_argument("--id", type=batch_id, help="show only actions on this batch")
    parser.add_argument("--limit", type=natural, default=20, help="most actions to show (default: 20)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_arguments(parser: ArgumentParser, verb: Verb, variants: list[Verb]) -> None:
    """Add the arguments of a verb's command."""
    parser.set_defaults(verb=verb, variants=[])
    if verb.target == "batch":
        _add_batches(parser, verb)
    elif verb.target == "queue":
        parser.add_argument("--queue", help="queue to act on")
        parser.add_argument("--kind", help="kind to act on; with --queue, only in that queue")
    else:
        parser.add_argument("workers", nargs="+", metavar="WORKER", help="worker id, as batchq status shows it")
    if verb.argument:
        _add_argument(parser, verb.argument)
    for variant in variants:
        parser.add_argument(
            variant.option, dest="variants", action="append_const", const=variant.name, help=variant.help
        )
    parser.add_argument("--reason", default=verb.default_reason, help="reason to record in batchq.audit")
    parser.add_argument("--actor", default=user_name(), help="name to record in batchq.audit (default: your user name)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_batches(parser: ArgumentParser, verb: Verb) -> None:
    number = "*" if verb.statuses else "+"
    parser.add_argument("ids", type=batch_id, nargs=number, metavar="ID", help="batch to act on")
    if verb.statuses:
        _add_filters(parser, verb)


def _add_filters(parser: ArgumentParser, verb: Verb) -> None:
    group = parser.add_argument_group("in bulk", "instead of ids: all batches that match, in steps; Ctrl-C stops it")
    group.add_argument("--queue", help="only batches of this queue")
    group.add_argument("--kind", help="only batches of this kind")
    group.add_argument("--key", help="only batches with this key")
    group.add_argument(
        "--status", choices=verb.statuses, help=f"only batches with this status (default: {verb.statuses[0]})"
    )
    group.add_argument(
        "--error-like", metavar="TEXT", help="only batches with this in their last error; %% matches anything"
    )
    group.add_argument(
        "--older-than",
        dest="older_than_seconds",
        type=reader(period_seconds),
        metavar="TIME",
        help="only batches that finished or, while live, were inserted this long ago: 90s, 15m, 2h, 3d",
    )
    group.add_argument("--all", action="store_true", help="all batches of that status, without a filter")
    group.add_argument("--dry-run", action="store_true", help="only report how many batches match")
    group.add_argument(
        "--fast", action="store_true", help="do not pause between steps; workers may slow down meanwhile"
    )


def _add_argument(parser: ArgumentParser, argument: Argument) -> None:
    if argument.type != "time":
        read = reader(argument.read)
        parser.add_argument(
            argument.option, dest=argument.name, type=read, required=argument.is_required,
            metavar=argument.option.lstrip("-").upper(), help=argument.help,
        )  # fmt: skip
        return
    group = parser.add_mutually_exclusive_group(required=argument.is_required)
    group.add_argument("--for", dest="delay_seconds", type=reader(period_seconds), metavar="TIME", help=argument.help)
    group.add_argument("--until", metavar="TIMESTAMP", help="end, as a timestamp: '2030-01-01 06:00+00'")


def reader(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return *read* as argparse wants it: argparse prints the text of its ArgumentTypeError only."""

    def checked(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


def user_name() -> str | None:
    """Return who runs the command; None where the system does not know."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return None
