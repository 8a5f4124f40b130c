"""``batchq logs``: the attempts of one batch, and their errors."""

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from batchq.cli.arguments import add_command, add_id
from batchq.cli.connections import database
from batchq.cli.show_tables import as_error
from batchq.common.terminal import complain, put, put_json
from batchq.postgres.statements import views


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(subparsers, "logs", _run, "print one batch's attempts and errors, oldest first")
    add_id(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")


def _run(options: Namespace) -> int:
    with database(options) as conn:
        batch = views.batch_object(conn, options.id, inputs_as_text=True)
    if batch is None:
        complain(f"there is no batch {options.id}")
        return 1
    for event in _history(batch):
        put_json(event, indent=None) if options.json else put(_event_line(event), event.get("traceback") or "")
    return 0


def _history(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what is recorded of a batch, oldest first: *at*, *event*; of a failed attempt, error and traceback."""
    yield {"at": batch["created_at"], "event": "enqueued"}
    for error in map(as_error, batch["errors"]):
        yield {"at": error.get("at"), "event": f"attempt {error.get('attempt')} failed"} | {
            name: error.get(name) for name in ("error", "traceback")
        }
    if batch["status"] in ("processing", "stalled"):
        event = f"attempt {batch['attempt']} runs, claimed by {batch['claimed_by']}"
        yield {"at": batch["claimed_at"], "event": event}
    elif batch["finished_at"]:
        yield {"at": batch["finished_at"], "event": f"{batch['status']} in attempt {batch['attempt']}"}
    else:
        yield {"at": batch["next_run_at"], "event": f"{batch['status']}, to run from then on"}


def _event_line(event: dict[str, Any]) -> str:
    error = f": {event['error']}" if event.get("error") else ""
    return f"{event['at']}  {event['event']}{error}"
