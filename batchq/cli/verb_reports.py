"""What a verb has done to the batches that somebody named, in words."""

from collections.abc import Sequence
from typing import NamedTuple

from batchq.common.numbers import counted, listed
from batchq.operate.verbs import Verb

# What a batch is that was left as it was, by its shown status: of one, and of several.
_LEFT = {
    "completed": ("had completed already", "had completed already"),
    "failed": ("had failed already", "had failed already"),
    "cancelled": ("was cancelled already", "were cancelled already"),
    "processing": ("is running", "are running"),
    "stalled": ("is stalled, and will be rescued", "are stalled, and will be rescued"),
    "waiting": ("waits for other batches", "wait for other batches"),
}
_LIVE = ("is pending", "are pending")
_LEFT_BY_VERB = {
    "set_priority": ("had that priority already", "had that priority already"),
    "move": ("was in that queue already", "were in that queue already"),
    "snooze": ("had that time already", "had that time already"),
    "retry": ("was pending already", "were pending already"),
    "run_anyway": ("waited for no other batch", "waited for no other batch"),
}
_NO_FAILED_ITEMS = ("has no failed items", "have no failed items")
_FINAL = ("completed", "failed", "cancelled")
_PENDING = ("ready", "scheduled", "retrying", "pending")


class Outcome(NamedTuple):
    """What became of one batch that was named.

    status: as shown, None if there is no such batch. changed: how many batches were changed, those that wait for it
    included. refusal: why the database refused, empty if it did not.
    """

    id: int
    status: str | None
    changed: int = 0
    refusal: str = ""

    @property
    def is_changed(self) -> bool:
        """Whether the batch itself was changed: with its dependents only these are, if it had ended already."""
        return self.changed > 0 and self.status not in ("completed", "failed")


def could(verb: Verb, outcome: Outcome) -> bool:
    """Return whether a batch is now as the verb wants it, if only because it was so before."""
    if outcome.is_changed:
        return True
    if verb.function in ("cancel", "cancel_with_dependents"):
        return outcome.status == "cancelled"
    return not outcome.refusal and outcome.status in _PENDING


def report(verb: Verb, outcomes: Sequence[Outcome]) -> list[str]:
    """Return the lines for all outcomes: how many were changed, which were not and why; one for each refusal."""
    refused = [one.refusal for one in outcomes if one.refusal]
    rest = [one for one in outcomes if not one.refusal]
    lines = [_one(verb, rest[0]) if len(outcomes) == 1 else _several(verb, rest)] if rest else []
    return [line for line in [*lines, *refused] if line]


def _one(verb: Verb, outcome: Outcome) -> str:
    if outcome.status is None:
        return f"there is no batch {outcome.id}"
    if outcome.is_changed:
        return f"batch {outcome.id} {verb.done}{_dependents(outcome)}"
    if outcome.changed:
        return f"batch {outcome.id} {_reason(verb, outcome.status)[0]}{_dependents(outcome)} {verb.done}"
    return f"nothing was changed: batch {outcome.id} {_reason(verb, outcome.status)[0]}"


def _dependents(outcome: Outcome) -> str:
    """Return how many batches that wait for it were changed, too."""
    if not (count := outcome.changed - outcome.is_changed):
        return ""
    return f", and {counted(count, 'batch')} that {'waits' if count == 1 else 'wait'} for it"


def _several(verb: Verb, outcomes: Sequence[Outcome]) -> str:
    parts = [f"{counted(sum(one.changed for one in outcomes), 'batch')} {verb.done}"]
    left: dict[tuple[str, str], list[int]] = {}
    for one in outcomes:
        if not one.is_changed and one.status is not None:
            left.setdefault(_reason(verb, one.status), []).append(one.id)
    parts += [f"{len(ids):,} {words[len(ids) > 1]}: {listed(ids, 20)}" for words, ids in left.items()]
    missing = [one.id for one in outcomes if one.status is None]
    if missing:
        parts.append(f"there {'are no batches' if len(missing) > 1 else 'is no batch'} {listed(missing, 20)}")
    return "; ".join(parts)


def _reason(verb: Verb, status: str) -> tuple[str, str]:
    if verb.needs_failed_items and status in _FINAL:
        return _NO_FAILED_ITEMS
    if status in _PENDING:
        return _LEFT_BY_VERB.get(verb.function, _LIVE)
    return _LEFT.get(status, _LIVE)
