"""``batchq limit``: list the limits in force and what is in use of them; set or remove one."""

from argparse import ArgumentParser, Namespace
from functools import partial
from typing import Any

from rich.text import Text

from batchq.cli import show_tables
from batchq.cli.arguments import add_command, kind_name, queue_name
from batchq.cli.connections import database
from batchq.cli.known import warn_of_unknown
from batchq.cli.verbs import reader, user_name
from batchq.common.terminal import complain, put, put_json, show
from batchq.errors import InvalidInput
from batchq.operate.limits import NUMBERS, Change, change, change_text, name_text, origin_text, replace, row_text
from batchq.postgres.statements import limits

_Row = dict[str, Any]
_UNSET = object()


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(subparsers, "limit", _run, "list limits and what is in use of them; set or remove one")
    parser.epilog = (
        "Numbers that are not given stay as they are in batchq.limits. 0 pauses. none removes one number, so that the "
        "one declared in code holds; infinity lifts that one, too."
    )
    parser.add_argument("--queue", type=queue_name, help="queue to limit, or to list")
    parser.add_argument(
        "--kind", type=kind_name, help="kind to limit within the queue (default: all kinds together), or to list"
    )
    _add_numbers(parser)
    parser.add_argument("--remove", action="store_true", help="remove all numbers; what code declares holds again")
    parser.add_argument("--reason", help="reason to record in batchq.audit")
    parser.add_argument("--actor", default=user_name(), help="name to record in batchq.audit (default: your user name)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_numbers(parser: ArgumentParser) -> None:
    for number in NUMBERS:
        parser.add_argument(
            f"--{number.name.replace('_', '-')}", dest=number.name, type=reader(number.read), default=_UNSET,
            metavar="N", help=number.help,
        )  # fmt: skip


def _run(options: Namespace) -> int:
    given = {number.name: getattr(options, number.name) for number in NUMBERS}
    given = {name: value for name, value in given.items() if value is not _UNSET}
    if not given and not options.remove:
        return _list(options)
    if given and options.remove:
        raise InvalidInput(f"--remove removes all numbers; leave out {_flags(given)}, or leave out --remove")
    if options.queue is None:
        raise InvalidInput("a limit needs --queue; with --kind, it holds for that kind in the queue")
    return _change(options, given)


def _flags(given: _Row) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in given)


def _list(options: Namespace) -> int:
    with database(options) as conn:
        rows = limits.limit_rows(conn, options.queue, options.kind)
        throttles = limits.throttle_rows(conn, options.queue, options.kind)
        if not rows:
            warn_of_unknown(conn, options.queue, options.kind)
    if options.json:
        put_json({"limits": rows, "throttles": throttles})
        return 0
    show(show_tables.limit_table(rows)) if rows else put("nothing is limited")
    if throttles:
        show(Text(), show_tables.throttle_table(throttles))
    return 0


def _change(options: Namespace, given: _Row) -> int:
    write = partial(replace, numbers={}) if options.remove else partial(change, given=given)
    with database(options) as conn:
        changed = write(conn, options.queue, options.kind, reason=options.reason, actor=options.actor)
        is_known = limits.is_known(conn, options.queue, options.kind)
        of_queue = limits.limit_rows(conn, options.queue)
    in_force = next((row for row in of_queue if row["kind"] == options.kind), None)
    name = name_text(options.queue, options.kind)
    if options.json:
        fields = {"before": _plain(changed.before), "after": _plain(changed.after), "in_force": in_force}
        put_json({"changed": changed.is_changed, **fields})
    else:
        put(f"limit of {name} {_report(changed)}{_rest(in_force)}")
    if changed.after and not is_known:
        complain(f"no batch and no live worker of {name} is known; if that is a mistake, repeat with --remove")
    return 0


def _report(changed: Change) -> str:
    if changed.after is None:
        return f"removed: {row_text(changed.before or {})}" if changed.is_changed else "unchanged: none is set"
    if changed.is_changed:
        return f"changed: {change_text(changed.before, changed.after)}"
    return f"unchanged: {row_text(changed.after)}"


def _rest(in_force: _Row | None) -> str:
    """Return what else holds, if code declares something."""
    if in_force is None or not in_force["is_declared"]:
        return ""
    return f"; in force ({origin_text(in_force)}): {row_text(in_force)}"


def _plain(row: _Row | None) -> _Row | None:
    """Return a row as JSON can write it: without infinite numbers."""
    return row and {name: "Infinity" if value == float("inf") else value for name, value in row.items()}
