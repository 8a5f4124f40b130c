"""What may be done from the page: each verb has a page that asks, and a form that does it. All are idempotent."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg

from batchq.web.reads import HIGHEST_ID, Reader

MOST_TEXT = 500
MOST_MINUTES = 525_600


@dataclass(frozen=True)
class Verb:
    """A verb: what it acts on (batch, queue, worker), what it says, and what else its form asks for."""

    target: str
    title: str
    explained: str
    field: str | None = None
    is_grave: bool = False


VERBS = {
    "cancel": Verb("batch", "Cancel", "It ends as cancelled. A handler that runs it is stopped at its next checkpoint, "
                   "and writes nothing more.", is_grave=True),
    "retry": Verb("batch", "Retry", "It becomes pending again, with all its attempts, and goes on from its checkpoint: "
                  "items that succeeded are not run again. One that waits runs at once."),
    "retry_whole": Verb("batch", "Retry from the start", "It becomes pending again and starts from nothing: every item "
                        "is run again.", is_grave=True),
    "retry_items": Verb("batch", "Retry failed items", "Its failed items are run again, and nothing else."),
    "snooze": Verb("batch", "Snooze", "It is not claimed before so many minutes have passed.", "minutes"),
    "set_priority": Verb("batch", "Change priority", "Lower numbers are worked first.", "priority"),
    "move": Verb("batch", "Move", "It waits in another queue from now on.", "to_queue"),
    "pause": Verb("queue", "Pause", "Workers claim nothing of it; what they have claimed runs to its end. Leave the "
                  "minutes empty to pause it until it is resumed.", "minutes"),
    "resume": Verb("queue", "Resume", "Workers claim it again."),
    "drain_worker": Verb("worker", "Drain", "It claims no more, finishes what it runs, and ends.", is_grave=True),
}  # fmt: skip


class Refused(Exception):
    """A verb could not be done; the text says why, for people."""


def parameters(verb: str, form: dict[str, str]) -> dict[str, Any]:
    """Return what the statement of a verb takes, from a form. Raises Refused for what it cannot take."""
    given = {name: value.strip() for name, value in form.items()}
    said: dict[str, Any] = {name: given.get(name, "")[:MOST_TEXT] or None for name in ("reason", "actor")}
    said["actor"] = said["actor"] or "web"
    target = VERBS[verb].target
    if target == "batch":
        said["id"] = whole_number(given.get("id", ""), "the batch", 1, HIGHEST_ID)
    elif target == "queue":
        said |= {"queue": given.get("queue") or None, "kind": given.get("kind") or None}
    else:
        said["worker"] = given.get("worker", "")
    return said | extra(verb, given)


def extra(verb: str, given: dict[str, str]) -> dict[str, Any]:
    """Return what a verb takes besides its target."""
    match VERBS[verb].field:
        case "minutes" if verb == "pause" and not given.get("minutes"):
            return {"minutes": None}
        case "minutes":
            return {"minutes": whole_number(given.get("minutes", ""), "minutes", 1, MOST_MINUTES)}
        case "priority":
            return {"priority": whole_number(given.get("priority", ""), "priority", -32_768, 32_767)}
        case "to_queue":
            if not 1 <= len(given.get("to_queue", "").encode()) <= 128:
                raise Refused("a queue's name has 1 to 128 bytes")
            return {"to_queue": given["to_queue"]}
        case _:
            return {}


def whole_number(text: str, name: str, least: int, most: int) -> int:
    """Read a number. Raises Refused."""
    try:
        number = int(text) if len(text) < 25 else most + 1
    except ValueError:
        number = most + 1
    if not least <= number <= most:
        raise Refused(f"{name}: a whole number from {least} to {most}")
    return number


def do(reader: Reader, verb: str, form: dict[str, str]) -> Any:
    """Do what a form asks for; return what the database says of it. Raises Refused."""
    with refusals():
        answer = reader.call(verb, **parameters(verb, form))
    if answer is None:
        raise Refused("it is not there any more")
    return answer


@contextmanager
def refusals() -> Iterator[None]:
    """Raise Refused for what the database refuses in the block."""
    try:
        yield
    except psycopg.errors.InsufficientPrivilege:
        raise Refused("the database role of this page may not do that") from None
    except psycopg.errors.LockNotAvailable:
        raise Refused("it is in use by somebody else at this moment; try again") from None
    except (psycopg.errors.RaiseException, psycopg.DataError, psycopg.IntegrityError) as error:
        raise Refused("; ".join(filter(None, (error.diag.message_primary, error.diag.message_hint)))) from None
