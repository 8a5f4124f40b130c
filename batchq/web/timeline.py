"""What has happened to a batch, from what the database has stored: nothing is guessed, the unknown is left out."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from batchq.web import formats
from batchq.web.reads import Row

_TIME = re.compile(r"\d{4,6}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:\.\d{1,6})?")
_DIED = "worker died"
_CANCELLED = "cancelled"


@dataclass(frozen=True)
class Event:
    """One event. at: its time in UTC, as text with microseconds; empty if the time is unreadable.

    status: colors it. title: what happened. actor, reason: who did it, and why. worker, batch: what to link to. error,
    traceback: of an attempt. attempt: of an error. more: what follows the title.
    """

    at: str
    status: str
    title: str
    more: str = ""
    actor: str | None = None
    reason: str | None = None
    worker: str | None = None
    batch: str | None = None
    error: str | None = None
    traceback: str | None = None

    @property
    def when(self) -> str:
        """The time to the second."""
        return self.at[:19] if self.at[4:5] == "-" else self.at.partition(".")[0]


def events(
    batch: Row, errors: Iterable[Row], audit: Iterable[Row], waited: Row | None, held: Iterable[Row], parts: int
) -> list[Event]:
    """Return the events, the latest first.

    batch, errors, audit, waited, held: rows of the statements of these names. parts: how many the batch is spread to.
    """
    entries = list(audit)
    found = [Event(batch["created_utc"], "", "enqueued", **_origin(entries))]
    acted_at = {entry["at_utc"] for entry in entries}
    found += (event for event in _waits(batch, waited) if event.at not in acted_at)  # a retry sets run_at, too
    found += _starts(batch, parts)
    found += (_attempt(error) for error in errors if not _is_told_by(entries, error))
    found += (_action(entry) for entry in entries if entry["verb"] not in ("copy", "run_schedule"))
    found += _end(batch, entries)
    found = [event for event in found if event.title]
    dated = sorted((event for event in found if event.at), key=lambda event: event.at)
    return [*_now(batch, held), *reversed(dated), *(event for event in found if not event.at)]


def _origin(entries: list[Row]) -> dict[str, Any]:
    """Return who enqueued the batch, if that is in the audit."""
    for entry in entries:
        if entry["verb"] == "copy":
            return {"more": "as a copy of", "batch": entry["copy_of"], **_who(entry)}
        if entry["verb"] == "run_schedule":
            return {"more": f"by schedule {entry['schedule']}", **_who(entry)}
    return {}


def _who(entry: Row) -> dict[str, Any]:
    return {"actor": entry["actor"], "reason": entry["reason"]}


def _waits(batch: Row, waited: Row | None) -> Iterator[Event]:
    """Yield the end of the wait for others, and of the wait for a time."""
    ended = waited["ended_utc"] if waited and batch["stored_status"] != "waiting" else None
    if waited and ended:
        number = formats.number(waited["batches"])
        title = "the batch that it waited for ended" if waited["batches"] == 1 else "the last of the batches ended"
        yield Event(ended, "", title, "" if waited["batches"] == 1 else f"of {number} that it waited for")
    was_due = batch["was_due_utc"]
    if was_due and not ended and was_due <= (batch["claimed_utc"] or was_due) and batch["stored_status"] != "waiting":
        yield Event(was_due, "", "due", "a worker may claim it from now on")


def _starts(batch: Row, parts: int) -> Iterator[Event]:
    """Yield the start of the latest attempt, as far as the batch still has it."""
    is_running = batch["status"] in ("processing", "stalled")
    if batch["claimed_utc"] and batch["attempt"] and (batch["claimed_by"] or is_running):
        spread = f"in {formats.number(parts)} parts" if parts else ""
        status = batch["status"] if is_running else ""
        yield Event(
            batch["claimed_utc"], status, f"attempt {batch['attempt']} started", spread, worker=batch["claimed_by"]
        )


def _attempt(error: Row) -> Event:
    """Return the end of an attempt, from an element of the batch's errors."""
    text, attempt = error["error"] or "(no error message)", f"attempt {error['attempt']}" if error["attempt"] else ""
    status, title = "failed", f"{attempt} failed".strip()
    if text.startswith(_DIED):
        title = f"{attempt}: lease lost" if attempt else "lease lost"
    elif text.startswith(_CANCELLED):
        status, title = "cancelled", "cancelled"
    return Event(_at(error), status, title, error=text, traceback=error["traceback"])


def _at(error: Row) -> str:
    """Return the time of an error as text that sorts; somebody else may have written it."""
    text = (error["at_text"] or "").strip()
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo:  # that of the session that wrote it
            return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")
    except (ValueError, OverflowError):
        pass
    found = _TIME.match(text)
    return found[0].replace("T", " ") if found else ""


def _is_told_by(entries: list[Row], error: Row) -> bool:
    """Return whether an error only repeats an entry of the audit: batchq.cancel writes both."""
    if not (error["error"] or "").startswith(_CANCELLED):
        return False
    return any(_is_cancel(entry) and entry["at_utc"][:19] == _at(error)[:19] for entry in entries)


def _is_cancel(entry: Row) -> bool:
    return entry["verb"] in ("cancel", "cancel_with_dependents")


def _action(entry: Row) -> Event:
    """Return what somebody did, from an entry of the audit."""
    title, more = {
        "retry": ("retried", "from the start" if entry["is_whole"] else ""),
        "snooze": ("snoozed", f"until {(entry['run_at'] or '').replace('T', ' ')}"),
        "set_priority": ("priority changed", f"to {entry['priority']}"),
        "move": ("moved", f"to queue {entry['to_queue']}"),
        "run_anyway": ("run anyway", "it waits for no other batch any more"),
        "cancel": ("cancelled", ""),
        "cancel_with_dependents": ("cancelled", f"with its dependents, {formats.number(entry['batches'])} batches"),
    }.get(entry["verb"], (entry["verb"].replace("_", " "), ""))
    return Event(entry["at_utc"], "cancelled" if _is_cancel(entry) else "acted", title, more, **_who(entry))


def _end(batch: Row, entries: list[Row]) -> Iterator[Event]:
    """Yield the end of the batch, unless the audit tells it."""
    ended = batch["finished_utc"]
    is_told = any(_is_cancel(entry) and entry["at_utc"] == ended for entry in entries)
    if ended and not is_told:
        lasted = batch["running_seconds"]
        is_run = lasted is not None and batch["status"] != "cancelled"
        yield Event(ended, batch["status"], batch["status"], f"after {formats.duration(lasted)}" if is_run else "")


def _now(batch: Row, held: Iterable[Row]) -> Iterator[Event]:
    """Yield what it waits for now; these stand above all that has happened."""
    if batch["status"] == "stalled":  # without a time: that of the claim would be a guess
        yield Event("", "stalled", "stalled", "its worker has not renewed the lease")
    if batch["status"] in ("scheduled", "retrying") and batch["due_utc"]:
        title = "next attempt" if batch["status"] == "retrying" else "scheduled"
        yield Event(batch["due_utc"], batch["status"], title, "not before this time")
    for row in held:
        target = " ".join(f"{name} {row[name]}" for name in ("kind", "queue", "key") if row[name])
        until = f" until {row['until_utc']}" if row["until_utc"] else ""
        if row["by"] == "limited":
            yield Event("", "scheduled", "held back by a limit", f"of {target}: {row['reason']}")
        elif row["by"] == "throttled":
            yield Event(row["at_utc"], "retrying", "throttled", f"{target}{until}", worker=row["actor"])
        else:
            yield Event(
                row["at_utc"], "retrying", "paused", f"{target}{until}", actor=row["actor"], reason=row["reason"]
            )
