"""``batchq schedule``: list schedules; add, pause, resume, run or remove one."""

from argparse import Namespace
from typing import Any

from batchq.cli import show_tables
from batchq.cli.arguments import add_command
from batchq.cli.connections import database
from batchq.cli.known import warn_of_unknown
from batchq.cli.verbs import user_name
from batchq.common.hidden import text_without_hidden
from batchq.common.numbers import did_you_mean, listed
from batchq.common.terminal import complain, put, put_json, show
from batchq.errors import InvalidInput
from batchq.operate.schedules import ACTIONS, FIELDS, Action, change, definition, do, shown_rows, upcoming, words_of
from batchq.postgres.statements import schedules
from batchq.postgres.statements.running import Conn

_Row = dict[str, Any]


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(
        subparsers, "schedule", _run, "list schedules, which make batches at certain times; add or change one"
    )
    parser.epilog = (
        "list [NAME] lists schedules. add NAME CRON --kind KIND adds one, or replaces the one with this name. pause, "
        "resume, run (make a batch now) and remove take a NAME. CRON is a cron expression such as '0 2 * * *', with "
        "seconds as a sixth field in front if needed; or @hourly, @daily, @weekly, @monthly, @yearly; or '@every 30 s'."
    )
    actions = ("list", "add", *ACTIONS)
    parser.add_argument("action", nargs="?", default="list", choices=actions, help="what to do (default: list)")
    parser.add_argument("name", nargs="?", help="name of the schedule")
    parser.add_argument("cron", nargs="?", help="when it is due; only for add")
    for field in FIELDS:
        text = field.help + (f" (default: {field.default})" if field.default else "")
        parser.add_argument(field.option, dest=field.name, choices=field.choices or None, help=text)
    parser.add_argument("--reason", help="reason to record in batchq.audit")
    parser.add_argument("--actor", default=user_name(), help="name to record in batchq.audit (default: your user name)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(options: Namespace) -> int:
    if options.action != "add":
        given = [field.option for field in FIELDS if getattr(options, field.name) is not None]
        given = [option for option in given if options.action != "list" or option not in ("--kind", "--queue")]
        if options.cron is not None or given:
            what = "CRON" if options.cron is not None else ", ".join(given)
            raise InvalidInput(f"batchq schedule {options.action} takes no {what}")
    if options.action == "list":
        return _list(options)
    if options.name is None or (options.action == "add" and options.cron is None):
        needed = "NAME and CRON, and --kind" if options.action == "add" else "NAME"
        raise InvalidInput(f"batchq schedule {options.action} needs {needed}")
    return _add(options) if options.action == "add" else _act(options, ACTIONS[options.action])


def _list(options: Namespace) -> int:
    with database(options) as conn:
        rows = shown_rows(conn, options.name, options.queue, options.kind)
        missing = "" if rows or options.name is None else _missing(conn, options.name)
        if not rows and not missing:
            warn_of_unknown(conn, options.queue, options.kind)
    if missing:
        complain(missing)
    if options.json:
        put_json([_described(row) for row in rows])
    elif not missing:
        show(show_tables.schedule_table(rows)) if rows else put("there are no schedules")
    return 1 if missing else 0


def _described(row: _Row) -> _Row:
    return row | {"words": words_of(row), "upcoming": [at.isoformat() for at in upcoming(row)]}


def _add(options: Namespace) -> int:
    wanted = definition(options.name, options.cron, {field.name: getattr(options, field.name) for field in FIELDS})
    with database(options) as conn:
        changed = change(conn, wanted, options.reason, options.actor)
        [row] = schedules.schedule_rows(conn, options.name)
    if options.json:
        put_json({"changed": changed.is_changed, "before": _shown(changed.before), "after": _shown(changed.after)})
    else:
        done = "added" if changed.before is None else "changed" if changed.is_changed else "unchanged"
        put(f"schedule {options.name} {done}: {words_of(wanted)}")
    if row["handling_workers"] == 0:
        complain(f"no live worker of queue {row['queue']} has a handler for kind {row['kind']}")
    return 0


def _shown(found: _Row | None) -> _Row | None:
    return found and found | {"payload": text_without_hidden(found["payload"])}


def _act(options: Namespace, action: Action) -> int:
    with database(options) as conn:
        answer = do(conn, action, options.name, options.reason, options.actor)
        missing = _missing(conn, options.name) if answer is None else ""
    if missing:
        complain(missing)
    if options.json:
        put_json({"batch_id": answer} if action.name == "run" else {"changed": bool(answer)})
    elif missing:
        pass
    elif action.name == "run":
        put(f"schedule {options.name} run: batch {answer}")
    else:
        put(f"schedule {options.name} {action.done if answer else action.unchanged}")
    return 1 if missing else 0


def _missing(conn: Conn, name: str) -> str:
    """Return that there is no such schedule, and which name was probably meant."""
    names = [row["name"] for row in schedules.schedule_rows(conn, None)]
    known = f" (known: {listed(names)})" if names else ""
    return f"there is no schedule {name}{known}{did_you_mean(name, names)}"
