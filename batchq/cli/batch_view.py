"""How one batch looks on a terminal: what it is, how far it is, when it did what, its input, its errors."""

import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from batchq.cli.bars import progress
from batchq.cli.show_tables import as_error, colored, items, part_table, processed, table
from batchq.common.numbers import counted, duration
from batchq.common.terminal import block, line, styled
from batchq.operate.parts import Summary, range_text

_Row = dict[str, Any]
_Facts = list[tuple[str, Any]]
_MOST_LINES = 40
_MOST_INLINE = 60
_BAR_WIDTH = 30
_TOLD = (
    "id", "part_of", "status", "items_done", "items_failed", "attempt", "max_attempts", "first_item", "last_item",
)  # fmt: skip


def one_batch(
    batch: _Row,
    failed_items: list[_Row],
    needs: Sequence[_Row] = (),
    spread: Summary | None = None,
    now: str | None = None,
) -> RenderableType:
    """Return everything about one batch. *needs*: what it waits or waited for; *spread*: its parts.

    *now*: the database's time, to say how long ago something was.
    """
    heading = Text.assemble((f"Batch {batch['id']}: ", "bold"), colored(batch["status"]))
    groups = (_identity(batch), _progress(batch), _times(batch, now))
    parts: list[RenderableType] = [heading]
    for facts in groups:
        parts += [Text(), _fact_table(facts)]
    for name in ("payload", "cursor", "result"):
        if batch[name] is not None:
            parts += [Text(), *_value(name.capitalize(), batch[name])]
    for error in map(as_error, batch["errors"]):
        parts += [Text(), styled(attempt_line(error, now), "red"), *_traceback(error)]
    if failed_items:
        cells = [[row["item_index"], _fact(row["item"]), row["attempt"], row["error"]] for row in failed_items]
        parts += [Text(), table("Failed items", ("Index", "Item", "Attempt", "Error"), cells)]
    if needs:
        cells = [[str(row["id"]), row["queue"], row["kind"], row["status"], row["on_failure"]] for row in needs]
        parts += [Text(), table("After", ("ID", "Queue", "Kind", "Status", "If it fails"), cells)]
    if spread:
        parts += [Text(), part_table(spread)]
    return Group(*parts)


def one_part(part: _Row, now: str | None = None) -> RenderableType:
    """Return what is known of a part, and which batch it is a part of."""
    whole = part["part_of"]
    title = f"Batch {part['id']} is a part of batch {whole}: {range_text(part)}. For all of it: batchq show {whole}"
    facts: _Facts = [("Status", colored(part["status"]))]
    if part["items_done"] is not None:
        facts.append(("Progress", items({**part, "items_total": part["last_item"] - part["first_item"] + 1})))
    if part.get("attempt") is not None:
        facts.append(("Attempt", f"{part['attempt']} of {part['max_attempts']}"))
    facts += [
        (name.replace("_", " ").capitalize(), moment(value, now) if name.endswith("_at") else _fact(value))
        for name, value in part.items()
        if name not in _TOLD and value is not None
    ]
    return Group(Text(title, style="bold"), Text(), _fact_table(facts))


# ------------------------------------------------------------------------------------------------------------- words


def moment(time: Any, now: str | None) -> str:
    """Return a time of the database to the second, with its zone, and how long ago it was or will be."""
    at, present = _read(time), _read(now)
    if at is None:
        return _fact(time)
    zone = at.strftime("%z")
    text = f"{at:%Y-%m-%d %H:%M:%S} {'UTC' if zone == '+0000' else f'{zone[:3]}:{zone[3:5]}' if zone else ''}".rstrip()
    if present is None or not zone:
        return text
    seconds = (present - at).total_seconds()
    if abs(seconds) < 1:
        return f"{text} (just now)"
    return f"{text} ({duration(seconds)} ago)" if seconds > 0 else f"{text} (in {duration(-seconds)})"


def _read(time: Any) -> datetime | None:
    """Return a time as JSON has it; None for one that Python cannot read, perhaps beyond its dates."""
    try:
        return datetime.fromisoformat(str(time))
    except ValueError:
        return None


def attempt_line(error: _Row, now: str | None) -> str:
    """Return which attempt failed, when and why; or, for an error that is not an attempt's, only when and what."""
    text = _fact(error.get("error")) or "no error was recorded"
    name = "cancelled" if text.startswith("cancelled") else f"attempt {_fact(error.get('attempt'))} failed"
    at = f", {moment(error['at'], now)}" if error.get("at") else ""
    if name == "cancelled":
        return f"{text}{at}"
    return f"{name}{at}: {text}"


def next_run(batch: _Row, now: str | None) -> str:
    """Return when a batch that is not running will run."""
    if batch["status"] == "waiting":
        count = batch["needs_left"] or 0
        return f"when {counted(count, 'batch')} {'has' if count == 1 else 'have'} ended: see batchq flow {batch['id']}"
    if batch["status"] == "ready":
        return f"as soon as a worker is free; ready since {moment(batch['next_run_at'], now)}"
    return f"from {moment(batch['next_run_at'], now)}"


# ------------------------------------------------------------------------------------------------------------ groups


def _identity(batch: _Row) -> _Facts:
    facts = [("Kind", batch["kind"]), ("Queue", batch["queue"]), ("Priority", batch["priority"])]
    if batch["shard"] != batch["queue"]:
        facts.insert(2, ("Shard", batch["shard"]))
    facts += [("Key", batch["key"]), ("Unique key", batch["unique_key"])]
    return [(name, value) for name, value in facts if value is not None]


def _progress(batch: _Row) -> _Facts:
    facts: _Facts = []
    if batch["items_total"] is not None:
        facts.append(("Items", items(batch)))
        if 0 < processed(batch) < batch["items_total"]:
            facts.append(("", progress(batch, _BAR_WIDTH)))
    if batch["max_failed_items"]:
        facts.append(("Tolerates", f"{counted(batch['max_failed_items'], 'failed item')}"))
    if (batch["spread"] or 0) > 1:
        facts.append(("Spread", f"over {batch['spread']:,} parts"))
    facts.append(("Attempt", f"{batch['attempt']:,} of {batch['max_attempts']:,}"))
    if batch["claimed_by"]:
        facts.append(("Worker", batch["claimed_by"]))
    if batch["timeout_seconds"]:
        facts.append(("Timeout", duration(batch["timeout_seconds"])))
    return facts


def _times(batch: _Row, now: str | None) -> _Facts:
    facts: _Facts = [("Enqueued", moment(batch["created_at"], now))]
    if batch["claimed_at"]:
        facts.append(("Started", moment(batch["claimed_at"], now)))
    if batch["finished_at"]:
        facts.append(("Finished", moment(batch["finished_at"], now)))
    started, ended = _read(batch["claimed_at"]), _read(batch["finished_at"] or now)
    if started and ended and ended >= started:
        facts.append(
            ("Ran for" if batch["finished_at"] else "Running for", duration((ended - started).total_seconds()))
        )
    if batch["lease_expires_at"]:
        facts.append(("Lease ends", moment(batch["lease_expires_at"], now)))
    if not batch["finished_at"] and batch["status"] not in ("processing", "stalled"):
        facts.append(("Next run", next_run(batch, now)))
    return facts


def _fact_table(facts: _Facts) -> Table:
    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column(style="dim", no_wrap=True, min_width=11)
    made.add_column(overflow="fold")
    for name, value in facts:
        made.add_row(name, value if not isinstance(value, str | int) else styled(value))
    return made


def _value(name: str, value: Any) -> Iterator[RenderableType]:
    """Yield a JSON value: on the line of its name if it is short, else on lines of its own, and no more than fit."""
    short = _fact(value)
    if len(short) <= _MOST_INLINE and "\n" not in short:
        yield _fact_table([(name, short)])
        return
    yield Text(name, style="dim")
    lines = json.dumps(value, indent=2, ensure_ascii=False).split("\n")
    more = len(lines) - _MOST_LINES
    yield Text(block("\n".join(lines[:_MOST_LINES])))
    if more > 0:
        yield Text(f"    ... ({counted(more, 'more line')}; --json shows all)", style="dim")


def _traceback(error: _Row) -> Iterator[RenderableType]:
    if error.get("traceback"):
        yield Text(block(error["traceback"]), style="dim")


def _fact(value: Any) -> str:
    """Return a value as text or number, or else as JSON; cut if it is very long."""
    return line(value if isinstance(value, str | int | float | None) else json.dumps(value, ensure_ascii=False))
