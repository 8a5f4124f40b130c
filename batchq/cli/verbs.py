"""The commands of the verbs, made from batchq.operate.verbs: for some batches by id, for many by a filter."""

import argparse
import getpass
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psycopg

from batchq.cli import show_tables
from batchq.cli.arguments import add_command, batch_id, key_name, kind_name, natural, queue_name, some_text
from batchq.cli.asking import add_yes
from batchq.cli.bulk_runs import in_bulk
from batchq.cli.connections import connected, database, settings_of
from batchq.cli.known import warn_of_unknown, warn_of_unserved_queue
from batchq.cli.verb_reports import Outcome, could, report
from batchq.common.terminal import complain, put, put_json, show
from batchq.common.text import period_seconds
from batchq.errors import InvalidInput
from batchq.operate.bulk import Bulk
from batchq.operate.refusals import refusal
from batchq.operate.verbs import VERBS, Argument, Verb
from batchq.postgres.statements import limits, session, views
from batchq.postgres.statements.running import Conn
from batchq.postgres.statements.verbs import audit_rows, changed_now, pause_rows
from batchq.postgres.transactions import transaction

_FILTERS = ("queue", "kind", "key", "status", "error_like", "older_than_seconds")
_NEEDED = {
    "pause": "--queue, --kind, or both",
    "resume": "--queue, --kind, or both, as the pause had them; batchq pause lists the pauses",
    "end_throttle": "--queue, and --kind and --key as the throttle has them; batchq limit lists the throttles",
}
_NO_BATCH = "there is no such batch"
_HOW_TO_PAUSE = "to pause something: batchq pause --queue QUEUE, --kind KIND, or both"


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
        if verb.name == "pause" and not change:
            return _list_pauses(options)
        raise InvalidInput(f"nothing was changed: {verb.command} needs {_NEEDED[verb.name]}")
    if verb.name == "end_throttle" and options.queue is None:
        raise InvalidInput(f"nothing was changed: {verb.command} needs {_NEEDED[verb.name]}")
    target = {"queue": options.queue, "kind": options.kind}
    with database(options) as conn:
        is_changed = verb.do(conn, target, change, options.reason, options.actor)
        if verb.name == "pause" or not is_changed:
            warn_of_unknown(conn, options.queue, options.kind)
        others = "" if is_changed else _in_force(conn, verb)
    name = show_tables.name_of(options.queue, options.kind)
    text = f"{verb.done}: {name}" if is_changed else f"{verb.unchanged}: {name}{others}"
    put_json({"changed": is_changed}) if options.json else put(text)
    return 0


def _in_force(conn: Conn, verb: Verb) -> str:
    """Return which pauses or throttles there are, after one that does not exist was to end."""
    if verb.name == "resume":
        names = [show_tables.pause_line(row) for row in pause_rows(conn)]
        return f"; paused now: {', '.join(names) or 'nothing'}"
    if verb.name == "end_throttle":
        names = [show_tables.throttle_line(row) for row in limits.throttle_rows(conn)]
        return f"; throttled now: {', '.join(names) or 'nothing'}"
    return ""


def _list_pauses(options: Namespace) -> int:
    with database(options) as conn:
        rows = pause_rows(conn)
    if options.json:
        put_json(rows)
    elif not rows:
        put(f"nothing was paused, and nothing is paused now; {_HOW_TO_PAUSE}")
    else:
        put("nothing was paused; these are paused now:")
        show(show_tables.pause_table(rows))
        put(_HOW_TO_PAUSE)
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
            put(f"{id_}: {status}") if status else complain(f"there is no worker {id_}; batchq status lists them")
    return 0 if all(found.values()) else 1


def _on_batches(options: Namespace, verb: Verb, change: dict[str, Any]) -> int:
    given = {name: getattr(options, name) for name in _FILTERS if getattr(options, name, None) is not None}
    if not verb.statuses:
        if given or not options.ids:
            raise InvalidInput(f"{verb.option or verb.command} takes ids of batches, and no filter")
        return _on_each_batch(options, verb, change)
    if options.ids and (given or options.all):
        raise InvalidInput("give ids or a filter, not both")
    if options.ids and options.dry_run:
        raise InvalidInput("--dry-run goes with a filter")
    if options.ids:
        return _on_each_batch(options, verb, change)
    if not given and not options.all:
        raise InvalidInput(
            "nothing was changed: no batches selected; pass ids, a filter (--kind, --queue, --status, ...) or --all"
        )
    return in_bulk(options, Bulk(verb.name, given, change, options.reason, options.actor))


def _on_each_batch(options: Namespace, verb: Verb, change: dict[str, Any]) -> int:
    # Each in a transaction of its own, so that one that is refused does not stop the others.
    results: dict[int, str] = {}
    outcomes = []
    seconds = settings_of(options).database_timeout_seconds
    with connected(options) as conn:
        for id_ in dict.fromkeys(options.ids):
            try:
                with transaction(conn, seconds, settings=session.FIXED_FORMATS):
                    status = verb.do(conn, {"batch_id": id_}, change, options.reason, options.actor)
                    outcomes.append(_outcome(conn, id_, status))
                results[id_] = status or _NO_BATCH
            except (psycopg.errors.RaiseException, psycopg.errors.UniqueViolation) as error:
                results[id_] = refusal(error)
                outcomes.append(Outcome(id_, None, refusal=refusal(error, as_command=True)))
        if verb.name == "move":
            with transaction(conn, seconds, settings=session.FIXED_FORMATS):
                warn_of_unserved_queue(conn, change["to_queue"])
    if options.json:
        put_json(results)
    else:
        for text in report(verb, outcomes):
            put(text)
    return 0 if all(could(verb, outcome) for outcome in outcomes) else 1


def _outcome(conn: Conn, batch_id: int, status: str | None) -> Outcome:
    """Return what became of a batch. A role that may not read batchq.audit learns only its status."""
    if status is None:
        return Outcome(batch_id, None)
    with suppress(psycopg.errors.InsufficientPrivilege), conn.transaction():
        changed = changed_now(conn, batch_id)
        row = None if changed else views.status_row(conn, batch_id)
        return Outcome(batch_id, row["status"] if row else status, changed)
    return Outcome(batch_id, status, int(status in ("pending", "cancelled")))


# ---------------------------------------------------------------------------------------------------- their arguments


def add_parsers(subparsers: Any) -> None:
    """Add the commands of the verbs, and `batchq audit`, which lists them."""
    for command, (verb, *variants) in commands().items():
        add_arguments(add_command(subparsers, command, run, verb.help), verb, variants)
    parser = add_command(subparsers, "audit", audit, "list who did what, and why")
    parser.add_argument("--id", type=batch_id, metavar="ID", help="show only actions on this batch")
    parser.add_argument("--limit", type=natural, default=20, metavar="N", help="most actions to show (default: 20)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_arguments(parser: ArgumentParser, verb: Verb, variants: list[Verb]) -> None:
    """Add the arguments of a verb's command."""
    parser.set_defaults(verb=verb, variants=[])
    if verb.target == "batch":
        _add_batches(parser, verb)
    elif verb.target == "queue":
        parser.add_argument("--queue", type=queue_name, help="queue to act on")
        parser.add_argument("--kind", type=kind_name, help="kind to act on; with --queue, only in that queue")
    else:
        parser.add_argument(
            "workers", nargs="+", type=some_text, metavar="WORKER", help="worker id, as batchq status shows it"
        )
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
    group.add_argument("--queue", type=queue_name, help="only batches of this queue")
    group.add_argument("--kind", type=kind_name, help="only batches of this kind")
    group.add_argument("--key", type=key_name, help="only batches with this key")
    group.add_argument(
        "--status", choices=verb.statuses, help=f"only batches with this status (default: {verb.statuses[0]})"
    )
    group.add_argument(
        "--error-like",
        metavar="TEXT",
        type=some_text,
        help="only batches whose last error has this; %% matches anything",
    )
    group.add_argument(
        "--older-than",
        dest="older_than_seconds",
        type=reader(period_seconds),
        metavar="TIME",
        help="only batches that finished or, while live, were inserted this long ago: 90s, 15m, 2h, 3d",
    )
    group.add_argument("--all", action="store_true", help="all batches of that status, without a filter")
    add_yes(group)
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
    group.add_argument(
        "--until", metavar="TIMESTAMP", type=some_text, help="end, as a timestamp: '2030-01-01 06:00+00'"
    )


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
