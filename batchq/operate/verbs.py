"""The verbs: what people can do to batches, queues and workers.

The command line, the web UI, bulk and the reference are made from VERBS. A new verb needs an entry here and a SQL
function that is granted to operators; for bulk, batchq.bulk must know the function, too.

Limits are set with several numbers, and each may be left as it is or removed, which a verb with one argument cannot
express. So batchq.set_limit has a command and a page of its own: batchq.cli.commands.limit, batchq.web.limits.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from batchq.common.numbers import read_whole
from batchq.postgres.statements.running import Conn
from batchq.postgres.statements.verbs import call_verb
from batchq.postgres.statements.views import STORED_STATUS

_MOST_MINUTES = 525_600
_MOST_QUEUE_BYTES = 128
_MOST_KEY_BYTES = 500
_FINISHED = ("failed", "cancelled", "completed")


def whole_number(name: str, text: str, least: int, most: int) -> int:
    """Read a number. Raises ValueError."""
    try:
        number = read_whole(text) if len(text) < 25 else most + 1
    except ValueError:
        number = most + 1
    if not least <= number <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}, not {text!r}")
    return number


def _priority(text: str) -> int:
    return whole_number("priority", text, -32_768, 32_767)


def _queue_name(text: str) -> str:
    if not 1 <= len(text.encode()) <= _MOST_QUEUE_BYTES:
        raise ValueError(f"the name of a queue must have 1 to {_MOST_QUEUE_BYTES} bytes")
    return text


def _key(text: str) -> str:
    if not 1 <= len(text.encode()) <= _MOST_KEY_BYTES:
        raise ValueError(f"a key must have 1 to {_MOST_KEY_BYTES} bytes")
    return text


@dataclass(frozen=True)
class Argument:
    """What a verb needs besides its target.

    A time is a field of minutes in a form, and `--for` or `--until` on the command line. Any other argument has one
    *name*: in forms, in batchq.bulk's *change* and in the verb's SQL function; on the command line it is *option*.

    read: parses the text of a form or of *option*; raises ValueError. suggested: what a form shows at first.
    """

    type: Literal["number", "text", "time"]
    name: str
    label: str
    help: str
    read: Callable[[str], Any]
    suggested: str = ""
    is_required: bool = True
    option: str = "--to"

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of *change*; one of them is given."""
        return ("delay_seconds", "until") if self.type == "time" else (self.name,)

    def change(self, text: str) -> dict[str, Any]:
        """Return the text of a form as *change*. Raises ValueError."""
        if not text and not self.is_required:
            return {}
        value = self.read(text)
        return {"delay_seconds": 60 * value} if self.type == "time" else {self.name: value}


def _minutes(help: str, suggested: str = "", is_required: bool = True) -> Argument:  # noqa: A002 (as in argparse)
    def read(text: str) -> int:
        return whole_number("minutes", text, 1, _MOST_MINUTES)

    return Argument("time", "minutes", "Minutes", help, read, suggested, is_required)


# Many attributes: everything that differs between verbs is one of them.
@dataclass(frozen=True)
class Verb:
    """One verb.

    name: as in the addresses of the web UI. target: what it acts on; "queue" is a queue, a kind, or a kind in a queue.
    done: as in "3 batches cancelled". unchanged: the same for a queue, if nothing had to change.

    help, command, option: of its command; with an option, it is a variant of the verb whose command it shares.
    default_reason: what the command gives. function: the name in SQL, in batchq.bulk and in batchq.audit. fixed:
    arguments that the function always gets.

    statuses: the stored ones that it accepts in bulk, the default first; with none, it cannot be done in bulk. offered:
    the shown statuses of a batch for which its page offers the verb, if not those that *statuses* mean.
    """

    name: str
    target: Literal["batch", "queue", "worker"]
    title: str
    explanation: str
    done: str
    help: str
    command: str
    function: str
    unchanged: str = ""
    option: str = ""
    default_reason: str | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    argument: Argument | None = None
    statuses: tuple[str, ...] = ()
    offered: tuple[str, ...] | None = None
    needs_failed_items: bool = False
    is_grave: bool = False

    def do(
        self, conn: Conn, target: Mapping[str, Any], change: Mapping[str, Any], reason: str | None, actor: str | None
    ) -> Any:
        """Call the SQL function; return its answer.

        target: batch_id, worker_id, or queue and kind. change: as batchq.bulk takes it.
        """
        return call_verb(conn, self.function, {**target, **self.fixed, **change, "reason": reason, "actor": actor})

    def accepts(self, status: str | None) -> bool:
        """Return whether it can be done in bulk to batches of a shown or stored status; None: of any."""
        return bool(self.statuses) and (status is None or stored(status) in self.statuses)

    def is_offered(self, status: str, items_failed: int | None) -> bool:
        """Return whether the page of a batch with this shown status offers it."""
        if self.needs_failed_items and not items_failed:
            return False
        return self.accepts(status) if self.offered is None else status in self.offered


def stored(status: str) -> str:
    """Return the stored status that a shown one is part of."""
    return STORED_STATUS.get(status, status)


def _verb(target: str, name: str, title: str, **given: Any) -> Verb:
    values: dict[str, Any] = {"name": name, "target": target, "title": title, "command": name, "function": name}
    return Verb(**(values | given))


_on_batch = partial(_verb, "batch")
_ALL = (
    _on_batch(
        "cancel",
        "Cancel",
        explanation="Ends the batch as cancelled. A running handler stops at its next checkpoint and writes nothing "
        "more.",
        done="cancelled",
        help="cancel batches, including running ones",
        default_reason="by an operator",
        statuses=("live", "pending", "processing", "waiting"),
        is_grave=True,
    ),
    _on_batch(
        "cancel_with_dependents",
        "Cancel with dependents",
        explanation="Ends the batch as cancelled, and all that wait for it, and all that wait for these.",
        done="cancelled",
        command="cancel",
        option="--with-dependents",
        help="with the batches that wait for it, and those that wait for these; for ids, not for filters",
        default_reason="by an operator",
        offered=("waiting",),
        is_grave=True,
    ),
    _on_batch(
        "run_anyway",
        "Run anyway",
        explanation="The batch waits for no others any more, and becomes ready.",
        done="made pending",
        command="run-anyway",
        help="run waiting batches, whatever they wait for",
        offered=("waiting",),
    ),
    _on_batch(
        "retry",
        "Retry",
        explanation="Makes the batch pending again, with all its attempts. It continues from its checkpoint: items "
        "that succeeded are not processed again. A scheduled batch becomes ready immediately.",
        done="made pending again",
        help="run finished batches again, from their checkpoint",
        fixed={"whole": False},
        statuses=_FINISHED,
        offered=("failed", "cancelled", "scheduled", "retrying"),
    ),
    _on_batch(
        "retry_items",
        "Retry failed items",
        explanation="Makes the batch pending again. Its failed items are processed again, and nothing else.",
        done="made pending again",
        command="retry",
        option="--items",
        help="only batches with failed items",
        statuses=_FINISHED,
        needs_failed_items=True,
    ),
    _on_batch(
        "retry_whole",
        "Retry from the start",
        explanation="Makes the batch pending again. It starts from nothing: every item is processed again.",
        done="made pending again",
        command="retry",
        option="--whole",
        help="from the start, instead of from the checkpoint",
        function="retry",
        fixed={"whole": True},
        statuses=_FINISHED,
        is_grave=True,
    ),
    _on_batch(
        "snooze",
        "Snooze",
        explanation="The batch is not claimed before this many minutes have passed.",
        done="snoozed",
        help="postpone pending batches, or make them ready immediately (--for 0s)",
        argument=_minutes("time to wait: 90s, 15m, 2h, 3d", suggested="60"),
        statuses=("pending",),
    ),
    _on_batch(
        "set_priority",
        "Change priority",
        explanation="Batches with a lower number run first.",
        done="given the new priority",
        command="priority",
        help="change the priority of pending batches",
        argument=Argument("number", "priority", "Priority", "new priority; lower runs first", _priority, suggested="0"),
        statuses=("pending",),
    ),
    _on_batch(
        "move",
        "Move",
        explanation="The batch waits in another queue.",
        done="moved",
        help="move pending batches to another queue",
        argument=Argument("text", "to_queue", "To the queue", "queue to move to", _queue_name),
        statuses=("pending",),
    ),
    _verb(
        "queue",
        "pause",
        "Pause",
        explanation="Workers stop claiming these batches. Batches already claimed still finish. Leave the minutes "
        "empty to pause until somebody resumes.",
        done="paused",
        unchanged="already paused",
        help="stop claiming a queue or kind; without either, list pauses",
        argument=_minutes("time to pause: 90s, 15m, 2h, 3d (default: until batchq resume)", is_required=False),
    ),
    _verb(
        "queue",
        "resume",
        "Resume",
        explanation="Workers claim these batches again.",
        done="resumed",
        unchanged="no matching pause",
        help="end a pause",
    ),
    _verb(
        "queue",
        "end_throttle",
        "End throttle",
        explanation="Workers begin these batches again, before the time that the handler asked for. Queue, kind and "
        "key are those of the throttle.",
        done="throttle ended",
        unchanged="no matching throttle",
        command="unthrottle",
        help="end a throttle before its time; batchq limit lists the throttles",
        argument=Argument(
            "text",
            "key",
            "Key",
            "key that is throttled (default: the throttle of the kind or queue)",
            _key,
            is_required=False,
            option="--key",
        ),
    ),
    _verb(
        "worker",
        "drain_worker",
        "Drain",
        explanation="The worker stops claiming, finishes the batches that it runs, and exits.",
        done="draining",
        command="drain",
        help="ask workers to finish the batches that they run, and exit",
        is_grave=True,
    ),
)
VERBS = {verb.name: verb for verb in _ALL}
