"""What changes batches, queues and workers: for some by their ids, for many by a filter."""

import argparse
import getpass
import signal
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import psycopg
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from batchq.cli import show_tables
from batchq.cli.connections import connected, database, linked, refusal, settings_of
from batchq.common.terminal import column, errors, put, put_json, show, styled
from batchq.common.text import period_seconds
from batchq.errors import InvalidInput
from batchq.operate.bulk import DONE, PAUSE_FACTOR, Bulk
from batchq.postgres.database import transaction
from batchq.postgres.statements import session, verbs

EXIT_LEFT_OUT, EXIT_INTERRUPTED = 1, 130
SAY_EACH_SECONDS = 5.0
FILTERS = ("queue", "kind", "status", "error_like")

Conn = psycopg.Connection[Any]
Verb = Callable[[Conn, int], str | None]

# ------------------------------------------------------------------------------------------------------ the verbs


def cancel(options: Namespace) -> int:
    """Cancel batches."""
    return on_batches(options, "cancel", {}, lambda conn, id_: verbs.cancel(conn, id_, options.reason, options.actor))


def retry(options: Namespace) -> int:
    """Make finished batches pending again."""
    if options.items and options.whole:
        raise InvalidInput("--items works failed items alone, --whole works everything: choose one")
    if options.items:
        return on_batches(
            options, "retry_items", {}, lambda conn, id_: verbs.retry_items(conn, id_, options.reason, options.actor)
        )
    return on_batches(
        options,
        "retry",
        {"whole": options.whole},
        lambda conn, id_: verbs.retry(conn, id_, options.whole, options.reason, options.actor),
    )


def snooze(options: Namespace) -> int:
    """Move the run_at of pending batches."""
    delay, until = options.for_, options.until
    change = {"until": until} if until is not None else {"delay_seconds": delay}
    return on_batches(
        options,
        "snooze",
        change,
        lambda conn, id_: verbs.snooze(conn, id_, delay, until, options.reason, options.actor),
    )


def set_priority(options: Namespace) -> int:
    """Change the priority of pending batches."""
    return on_batches(
        options,
        "set_priority",
        {"priority": options.to},
        lambda conn, id_: verbs.set_priority(conn, id_, options.to, options.reason, options.actor),
    )


def move(options: Namespace) -> int:
    """Move pending batches to another queue."""
    return on_batches(
        options,
        "move",
        {"to_queue": options.to},
        lambda conn, id_: verbs.move(conn, id_, options.to, options.reason, options.actor),
    )


def pause(options: Namespace) -> int:
    """Pause a queue, a kind, or a kind in a queue; without either, list what is paused."""
    if options.queue is None and options.kind is None:
        return list_pauses(options)
    with database(options) as conn:
        is_new = verbs.pause(
            conn, options.queue, options.kind, options.for_, options.until, options.reason, options.actor
        )
    return say(options, {"changed": is_new}, "paused" if is_new else "paused already")


def list_pauses(options: Namespace) -> int:
    """List what is paused."""
    with database(options) as conn:
        rows = verbs.pause_rows(conn)
    if options.json:
        put_json(rows)
    elif not rows:
        put("nothing is paused")
    else:
        show(show_tables.pause_table(rows))
    return 0


def resume(options: Namespace) -> int:
    """End a pause."""
    if options.queue is None and options.kind is None:
        raise InvalidInput(
            "resume needs --queue, --kind, or both, as the pause had them; batchq pause lists what is paused"
        )
    with database(options) as conn:
        was_paused = verbs.resume(conn, options.queue, options.kind, options.reason, options.actor)
    return say(options, {"changed": was_paused}, "resumed" if was_paused else "there was no such pause")


def drain(options: Namespace) -> int:
    """Ask workers to finish what they run, and to end; 1 if there is no such worker."""
    with database(options) as conn:
        found = {id_: verbs.drain_worker(conn, id_, options.reason, options.actor) for id_ in options.workers}
    for id_, status in found.items():
        if not options.json:
            put(f"{id_}: {status or 'there is no such worker'}")
    if options.json:
        put_json(found)
    return 0 if all(found.values()) else 1


def audit(options: Namespace) -> int:
    """Show who did what, and why."""
    with database(options) as conn:
        rows = verbs.audit_rows(conn, options.limit, options.id)
    if options.json:
        put_json(rows)
    else:
        show(show_tables.audit_table(rows))
    return 0


def say(options: Namespace, as_json: dict[str, Any], text: str) -> int:
    """Print what was done."""
    put_json(as_json) if options.json else put(text)
    return 0


# ------------------------------------------------------------------------------------------- by ids, or by a filter


def on_batches(options: Namespace, verb: str, change: dict[str, Any], on_one: Verb) -> int:
    """Do a verb to the batches that are named, or to all that a filter matches."""
    filter_ = filter_of(options)
    if options.ids and (filter_ or options.all):
        raise InvalidInput("give ids or a filter, not both")
    if options.ids and options.dry_run:
        raise InvalidInput("--dry-run goes with a filter")
    if options.ids:
        return each_batch(options, on_one)
    if not filter_ and not options.all:
        raise InvalidInput("which batches? Give ids, a filter (--kind, --queue, --status, ...), or --all")
    return in_bulk(options, verb, filter_, change)


def filter_of(options: Namespace) -> dict[str, Any]:
    """Return the filter, as batchq.bulk takes it."""
    given = {name: getattr(options, name) for name in FILTERS if getattr(options, name) is not None}
    return given | ({} if options.older_than is None else {"older_than_seconds": options.older_than})


def each_batch(options: Namespace, verb: Verb) -> int:
    """Apply *verb* to each batch in a transaction of its own, and say how each stands; 1 if one was refused."""
    results: dict[int, str] = {}
    refused = False
    seconds = settings_of(options).database_timeout_seconds
    with connected(options) as conn:
        for batch_id in options.ids:
            try:
                with transaction(conn, seconds, settings=session.PLAIN):
                    results[batch_id] = verb(conn, batch_id) or "there is no such batch"
            except (psycopg.errors.RaiseException, psycopg.errors.UniqueViolation) as error:
                results[batch_id] = refusal(error)
                refused = True
    if options.json:
        put_json(results)
    else:
        for batch_id, text in results.items():
            put(f"batch {batch_id}: {text}")
    return 1 if refused or "there is no such batch" in results.values() else 0


def in_bulk(options: Namespace, verb: str, filter_: dict[str, Any], change: dict[str, Any]) -> int:
    """Do a verb to all that match, showing how far it is; Ctrl-C ends it after the chunk that is being done."""
    factor = 0 if options.fast else PAUSE_FACTOR
    with linked(options) as link:
        bulk = Bulk(link, verb, filter_, change, options.reason, options.actor, factor)
        with ends_at_ctrl_c(bulk):
            total = counted(bulk)
            if not options.dry_run and not bulk.stopping.is_set():
                do(bulk, total)
    return report(options, bulk, total)


@contextmanager
def ends_at_ctrl_c(bulk: Bulk) -> Iterator[None]:
    """Let Ctrl-C or SIGTERM end *bulk* between two chunks, and a second one at once."""

    def stop(*_: Any) -> None:
        if bulk.stopping.is_set():
            raise KeyboardInterrupt
        bulk.stopping.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def counted(bulk: Bulk) -> int:
    """Return how many match, with a sign of life on a terminal."""
    with errors.status("counting what matches") as status:
        return bulk.count(lambda count: status.update(styled(f"counting what matches: {count:,}")))


def do(bulk: Bulk, total: int) -> None:
    """Do it, with a progress bar on a terminal, or else a line on standard error every few seconds."""
    columns = (
        column(bulk.verb), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    said_at = time.monotonic()
    with Progress(*columns, console=errors, disable=not errors.is_terminal) as progress:
        task = progress.add_task("", total=total)
        for _ in bulk.chunks():
            progress.update(task, completed=bulk.changed)
            if not errors.is_terminal and time.monotonic() - said_at >= SAY_EACH_SECONDS:
                said_at = time.monotonic()
                errors.print(styled(f"{bulk.changed:,} of {total:,} {DONE[bulk.verb]}"), soft_wrap=True)


def report(options: Namespace, bulk: Bulk, total: int) -> int:
    """Say what was done, and return the exit code: 130 if it was broken off, 1 if something was left out."""
    left = max(0, total - bulk.changed)
    said = {
        "matched": total, "changed": bulk.changed, "left": left, "left_out": asdict(bulk.left_out()),
        "interrupted": bulk.stopping.is_set(),
        "longest_chunk_ms": round(1000 * bulk.longest_seconds, 1), "audit_id": bulk.audit_id,
    }  # fmt: skip
    if options.json:
        put_json(said)
    elif options.dry_run:
        put(f"{total:,} batches would be {DONE[bulk.verb]}")
    else:
        put(f"{bulk.changed:,} batches {DONE[bulk.verb]}{left_text(bulk, left)}")
    if bulk.stopping.is_set():
        return EXIT_INTERRUPTED
    return EXIT_LEFT_OUT if left and not options.dry_run else 0


def left_text(bulk: Bulk, left: int) -> str:
    """Return what is said of those that were not changed."""
    if bulk.stopping.is_set():
        return f"; interrupted, {left:,} are left"
    return f"; {left:,} left as they are: {bulk.left_out()}" if left else ""


# ---------------------------------------------------------------------------------------------------- the arguments


def period(text: str) -> float:
    """Read a length of time, such as 90s, 15m, 2h or 3d; return it in seconds."""
    try:
        return period_seconds(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_who_and_why(parser: argparse.ArgumentParser, default_reason: str | None = None) -> None:
    """Add what is noted of each verb."""
    parser.add_argument("--reason", default=default_reason, help="why; noted in batchq.audit")
    parser.add_argument("--actor", default=own_name(), help="who; noted in batchq.audit (default: your user name)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def own_name() -> str | None:
    """Return the name of whoever runs the command, if that can be told."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return None


def add_batches(parser: argparse.ArgumentParser, statuses: tuple[str, ...], ids: Callable[[str], int]) -> None:
    """Add which batches: ids, or a filter."""
    parser.add_argument("ids", type=ids, nargs="*", metavar="ID")
    group = parser.add_argument_group("in bulk", "instead of ids: all batches that match, in chunks; Ctrl-C ends it")
    group.add_argument("--queue", help="of this queue")
    group.add_argument("--kind", help="of this kind")
    group.add_argument("--status", choices=statuses, help=f"(default: {statuses[0]})")
    group.add_argument("--error-like", metavar="TEXT", help="with this in their last error; %% stands for anything")
    group.add_argument(
        "--older-than", type=period, metavar="TIME", help="that finished, or while live were inserted, so long ago: 2h"
    )
    group.add_argument("--all", action="store_true", help="without any filter")
    group.add_argument("--dry-run", action="store_true", help="only say how many")
    group.add_argument("--fast", action="store_true", help="without pauses: workers may slow down meanwhile")


def add_time(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add a length of time, or a time."""
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument("--for", dest="for_", type=period, metavar="TIME", help="for so long: 90s, 15m, 2h, 3d")
    group.add_argument("--until", metavar="TIMESTAMP", help="until then: '2030-01-01 06:00+00'")


def add_what(parser: argparse.ArgumentParser) -> None:
    """Add what is paused."""
    parser.add_argument("--queue", help="this queue")
    parser.add_argument("--kind", help="this kind; with --queue, in that queue alone")
