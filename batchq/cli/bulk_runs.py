"""A verb for all batches that a filter matches, on the command line: counted, confirmed, changed in steps, reported."""

import signal
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from batchq.cli.asking import is_confirmed
from batchq.cli.connections import linked
from batchq.cli.known import warn_of_unknown
from batchq.common.numbers import counted
from batchq.common.terminal import column, errors, put, put_json, styled
from batchq.operate.bulk import PAUSE_FACTOR, Bulk, Runner

_EXIT_LEFT_OUT, _EXIT_INTERRUPTED = 1, 130
_REPORT_SECONDS = 5.0
_QUESTIONS = {
    "retry_items": "Retry the failed items of {}?",
    "retry_whole": "Retry {} from the start?",
    "set_priority": "Change the priority of {}?",
}


def in_bulk(options: Namespace, bulk: Bulk) -> int:
    """Count what matches; unless it is a dry run, change it. More than one batch is confirmed on a terminal."""
    with linked(options) as link:
        runner = Runner(link, bulk, 0 if options.fast else PAUSE_FACTOR)
        with _stopped_by_signals(runner), errors().status("counting what matches") as status:
            total = runner.count(lambda count: status.update(styled(f"counting what matches: {count:,}")))
        if total == 0:
            with link.transaction() as conn:
                warn_of_unknown(conn, options.queue, options.kind)
        if not options.dry_run and not runner.stopping.is_set():
            if total > 1 and not is_confirmed(_question(bulk, total), options.yes):
                return _EXIT_LEFT_OUT
            with _stopped_by_signals(runner):
                _change(runner, total)
    return _report(options, runner, total)


def _question(bulk: Bulk, total: int) -> str:
    return _QUESTIONS.get(bulk.name, bulk.verb.title + " {}?").format(counted(total, "batch"))


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
    with Progress(*columns, console=errors(), disable=not errors().is_terminal) as progress:
        task = progress.add_task("", total=total)
        for _ in runner.changes():
            progress.update(task, completed=bulk.changed)
            if not errors().is_terminal and time.monotonic() - last_printed_at >= _REPORT_SECONDS:
                last_printed_at = time.monotonic()
                errors().print(styled(f"{bulk.changed:,} of {total:,} {bulk.verb.done}"), soft_wrap=True)


def _report(options: Namespace, runner: Runner, total: int) -> int:
    """Print what was done; return the exit code: 130 if it was interrupted, 1 if batches were left out."""
    bulk, interrupted = runner.bulk, runner.stopping.is_set()
    fields = {
        "matched": total, "changed": bulk.changed, "left": bulk.left, "left_out": asdict(bulk.left_out()),
        "interrupted": interrupted,
        "longest_chunk_ms": round(1000 * runner.longest_seconds, 1), "audit_id": bulk.audit_id,
    }  # fmt: skip
    done = f"{counted(bulk.changed, 'batch')} {bulk.verb.done}"
    if options.json:
        put_json(fields)
    elif options.dry_run:
        put(f"{counted(total, 'batch')} would be {bulk.verb.done}")
    elif interrupted:
        put(f"{done}; interrupted, {bulk.left:,} {'is' if bulk.left == 1 else 'are'} left")
    else:
        put(f"{done}; {bulk.left:,} left unchanged: {bulk.left_out()}" if bulk.left else done)
    if interrupted:
        return _EXIT_INTERRUPTED
    return _EXIT_LEFT_OUT if bulk.left and not options.dry_run else 0
