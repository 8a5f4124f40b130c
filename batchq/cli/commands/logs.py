"""``batchq logs``: the attempts of one batch, and their errors."""

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from batchq.cli.arguments import add_command, add_id
from batchq.cli.batch_view import moment, next_run
from batchq.cli.connections import database
from batchq.cli.show_tables import as_error
from batchq.common.terminal import complain, put, put_json
from batchq.operate.parts import missing_text
from batchq.postgres.statements import views
from batchq.postgres.statements.verbs import clock_json

_TO_RUN = ", to run from then on"


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(subparsers, "logs", _run, "print one batch's attempts and errors, oldest first")
    add_id(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")


def _run(options: Namespace) -> int:
    with database(options) as conn:
        batch = views.batch_object(conn, options.id, inputs_as_text=True)
        now = clock_json(conn)
        missing = "" if batch else missing_text(conn, options.id)
    if batch is None:
        complain(missing)
        return 1
    for event in _history(batch):
        if options.json:
            put_json(event, indent=None)
        elif event["event"].endswith(_TO_RUN):
            put(f"{batch['status']}, next run: {next_run(batch, now)}")
        else:
            put(_event_line(event, now), event.get("traceback") or "")
    return 0


def _history(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what is recorded of a batch, oldest first: *at*, *event*; of a failed attempt, error and traceback."""
    yield {"at": batch["created_at"], "event": "enqueued"}
    for error in map(as_error, batch["errors"]):
        yield {"at": error.get("at"), "event": f"attempt {error.get('attempt')} failed"} | {
            name: error.get(name) for name in ("error", "traceback")
        }
    if batch["status"] in ("processing", "stalled"):
        is_spread = batch["stored_status"] == "waiting"
        by = f"in parts: batchq show {batch['id']}" if is_spread else f"claimed by {batch['claimed_by']}"
        event = f"attempt {batch['attempt']} runs, {by}"
        yield {"at": batch["claimed_at"], "event": event}
    elif batch["finished_at"]:
        yield {"at": batch["finished_at"], "event": f"{batch['status']} in attempt {batch['attempt']}"}
    else:
        yield {"at": batch["next_run_at"], "event": batch["status"] + _TO_RUN}


def _event_line(event: dict[str, Any], now: str) -> str:
    error = f": {event['error']}" if event.get("error") else ""
    return f"{moment(event['at'], now)}  {event['event']}{error}"
