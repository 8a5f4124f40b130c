"""What can be done to the row of a table: each verb with its target, in words, ready to be confirmed and done."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from batchq.cli.columns import Row
from batchq.cli.listings import pauses_of
from batchq.operate import schedules
from batchq.operate.schedules import ACTIONS
from batchq.operate.verbs import VERBS, Argument, Verb
from batchq.postgres.statements.running import Conn
from batchq.postgres.statements.verbs import is_audited

Rows = Mapping[str, list[Row]]
_LETTERS = {
    "cancel": "c", "cancel_with_dependents": "d", "run_anyway": "w", "retry": "r", "retry_items": "i",
    "retry_whole": "f", "snooze": "z", "set_priority": "y", "move": "m",
}  # fmt: skip
_FROM_NOW = ("scheduled", "retrying")
_ACTIVE_SCHEDULE = ("active", "overdue")


class Deed(NamedTuple):
    """A verb and its target. title: as on a button. explanation: its effect. what: its target, with some facts.

    argument: what is still to be given. do: does it with a change, a reason and an actor; returns the result in words.
    """

    letter: str
    title: str
    explanation: str
    what: str
    do: Callable[[Conn, dict[str, Any], str | None, str | None], str]
    argument: Argument | None = None
    default_reason: str | None = None
    is_grave: bool = False


def deeds_of(name: str, row: Row, rows: Rows) -> list[Deed]:
    """Return what can be done to a row of a table. *rows*: those of all tables."""
    if name == "queues":
        return list(_of_queue(row, rows["pauses"]))
    if name == "workers":
        return [_of_worker(row)] if row["state"] in ("working", "late") else []
    if name == "schedules":
        return list(_of_schedule(row))
    return list(_of_batch(row)) if "id" in row else []


# ------------------------------------------------------------------------------------------------------------ batches


def _of_batch(row: Row) -> Iterator[Deed]:
    if row["status"] in _FROM_NOW:
        yield _run_now(row)
    for verb in VERBS.values():
        if verb.target == "batch" and verb.is_offered(row["status"], row["items_failed"]):
            yield _batch_deed(verb, row)


def _batch_text(row: Row) -> str:
    return f"batch {row['id']}: kind {row['kind']} in queue {row['queue']}, {row['status']}"


def _batch_deed(verb: Verb, row: Row) -> Deed:
    def do(conn: Conn, change: dict[str, Any], reason: str | None, actor: str | None) -> str:
        status = verb.do(conn, {"batch_id": row["id"]}, change, reason, actor)
        return _outcome(conn, row["id"], status, verb.done)

    title = f"{verb.title}: batch {row['id']}"
    return Deed(
        _LETTERS[verb.name], title, verb.explanation, _batch_text(row), do, verb.argument, verb.default_reason,
        verb.is_grave,
    )  # fmt: skip


def _run_now(row: Row) -> Deed:
    def do(conn: Conn, _: dict[str, Any], reason: str | None, actor: str | None) -> str:
        status = VERBS["snooze"].do(conn, {"batch_id": row["id"]}, {"delay_seconds": 0}, reason, actor)
        return _outcome(conn, row["id"], status, "made ready")

    explanation = "The batch becomes ready immediately, before its time."
    return Deed("n", f"Run now: batch {row['id']}", explanation, _batch_text(row), do)


def _outcome(conn: Conn, batch_id: int, status: str | None, done: str) -> str:
    """Return what a verb did. It writes an audit row in its transaction exactly if it changed something."""
    if status is None:
        return f"there is no batch {batch_id} any more"
    if is_audited(conn, batch_id):
        return f"batch {batch_id}: {done}; it is {status}"
    return f"batch {batch_id}: nothing was changed, because it is {status}"


# ---------------------------------------------------------------------------------------- queues, workers, schedules


def _of_queue(row: Row, pauses: list[Row]) -> Iterator[Deed]:
    queue, kinds = row["queue"], row.get("kinds") or [row["kind"]]
    if "kinds" not in row:
        yield _queue_deed("pause", "p", queue, row["kind"])
    yield _queue_deed("pause", "o", queue, None)
    if "kinds" not in row:
        yield _queue_deed("pause", "k", None, row["kind"])
    matching = {(each["queue"], each["kind"]): None for kind in kinds for each in pauses_of(queue, kind, pauses)}
    for letter, (paused_queue, paused_kind) in zip("123456789", matching, strict=False):
        yield _queue_deed("resume", letter, paused_queue, paused_kind)


def queue_text(queue: str | None, kind: str | None) -> str:
    """Return what a pause is of: "queue mail", "kind send in all queues", or "kind send in queue mail"."""
    if kind is None:
        return f"queue {queue}"
    return f"kind {kind} in {f'queue {queue}' if queue is not None else 'all queues'}"


def _queue_deed(name: str, letter: str, queue: str | None, kind: str | None) -> Deed:
    verb, text = VERBS[name], queue_text(queue, kind)

    def do(conn: Conn, change: dict[str, Any], reason: str | None, actor: str | None) -> str:
        is_changed = verb.do(conn, {"queue": queue, "kind": kind}, change, reason, actor)
        return f"{text}: {verb.done if is_changed else verb.unchanged}"

    what = text + (", all kinds" if kind is None else "")
    return Deed(letter, f"{verb.title}: {text}", verb.explanation, what, do, verb.argument)


def _of_worker(row: Row) -> Deed:
    verb = VERBS["drain_worker"]

    def do(conn: Conn, change: dict[str, Any], reason: str | None, actor: str | None) -> str:
        status = verb.do(conn, {"worker_id": row["id"]}, change, reason, actor)
        return f"worker {row['id']}: {status}" if status else f"there is no worker {row['id']} any more"

    what = f"worker {row['id']}, {row['in_hand']:,} batches claimed"
    return Deed("d", f"Drain: worker {row['id']}", verb.explanation, what, do, is_grave=verb.is_grave)


def _of_schedule(row: Row) -> Iterator[Deed]:
    wanted = {"n": "run", "p": "pause"} if row["state"] in _ACTIVE_SCHEDULE else {"n": "run", "u": "resume"}
    for letter, name in wanted.items():
        yield _schedule_deed(letter, name, row)


def _schedule_deed(letter: str, name: str, row: Row) -> Deed:
    action, schedule = ACTIONS[name], row["name"]

    def do(conn: Conn, _: dict[str, Any], reason: str | None, actor: str | None) -> str:
        answer = schedules.do(conn, action, schedule, reason, actor)
        if answer is None:
            return f"there is no schedule {schedule} any more"
        if name == "run":
            return f"schedule {schedule}: batch {answer} made"
        return f"schedule {schedule}: {action.done if answer else action.unchanged}"

    what = f"schedule {schedule}: kind {row['kind']} in queue {row['queue']}, {row['state']}"
    title = action.title.removesuffix(" schedule")
    return Deed(letter, f"{title}: schedule {schedule}", action.explanation, what, do, is_grave=action.is_grave)
