"""A verb for all batches that a filter matches: counted first, then done in chunks, each a request and a transaction.

What is asked for and how far it is travels in the form, sealed, from one answer to the next request. Nothing of it
lives in the server: whoever closes the page stops it, and what is done stays.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import psycopg

from batchq.common.text import period_seconds
from batchq.errors import BatchqError
from batchq.operate.bulk import (
    DONE,
    LEFT_OUT,
    LOCK_SECONDS,
    MOST_A_CHUNK,
    MOST_COUNTED,
    MOST_PASSES,
    PAUSE_FACTOR,
    left_out,
)
from batchq.postgres.statements import session, verbs, views
from batchq.postgres.statements.verbs import Chunk
from batchq.web.reads import Conn, Reader
from batchq.web.verbs import MOST_TEXT, Refused, extra, refusals

COUNT_SECONDS = 1.0
MOST_FILTER_CHARACTERS = 300
FINISHED = ("failed", "cancelled", "completed")
# Which batches a verb takes, by their stored status: those of the first one, unless another is asked for.
TAKES = {
    "cancel": ("live", "pending", "processing"),
    "retry": FINISHED,
    "retry_items": FINISHED,
    "retry_whole": FINISHED,
    "snooze": ("pending",),
    "set_priority": ("pending",),
    "move": ("pending",),
}


class TryAgain(Refused):
    """Something passing was in the way: the same form, sent again, goes on."""


@dataclass(frozen=True)
class Job:
    """A verb, what it is done to, and how far it is.

    given: the filter, as people gave it; filter and change: as batchq.bulk takes them. state: counting, counted, doing,
    done. matched and keyed: of the current pass; changed_before: in the passes before it. rest_seconds: how long the
    workers are left alone now.
    """

    verb: str
    given: dict[str, str]
    filter: dict[str, Any]
    change: dict[str, Any]
    reason: str | None
    actor: str
    state: str = "counting"
    place: str | None = None
    total: int = 0
    passes: int = 0
    matched: int = 0
    keyed: int = 0
    changed: int = 0
    changed_before: int = 0
    audit_id: int | None = None
    rest_seconds: float = field(default=0.0, compare=False)

    @property
    def bulk_verb(self) -> str:
        """The verb's name in batchq.bulk."""
        return "retry" if self.verb == "retry_whole" else self.verb

    @property
    def goes_on(self) -> bool:
        """Whether the next step needs no decision."""
        return self.state in ("counting", "doing")

    @property
    def done_text(self) -> str:
        """What the verb does, as in "3 batches cancelled"."""
        return DONE[self.bulk_verb]

    @property
    def left(self) -> int:
        """How many of those that were counted are not changed."""
        return max(0, self.total - self.changed)

    @property
    def still_allowed(self) -> int:
        """How many more of those that were counted this pass may meet."""
        return self.total - self.changed_before - self.matched

    def as_text(self) -> str:
        """Return it as a text for a form."""
        return json.dumps(asdict(self))

    @classmethod
    def of_text(cls, text: str) -> "Job":
        """Return what as_text made a text of."""
        return cls(**json.loads(text))

    @property
    def left_out_text(self) -> str:
        """Why some are not changed: the reasons that are possible or, once it is done, those that there are."""
        if self.state != "done":
            return LEFT_OUT
        changed = self.changed - self.changed_before
        return str(left_out(self.total, self.changed, self.matched, changed, self.keyed))


def stored(status: str | None) -> str:
    """Return the stored status that a status of the lists is part of; empty for none."""
    return views.STORED_STATUS.get(status or "", status or "")


def verbs_for(status: str | None) -> list[str]:
    """Return the verbs that take batches of a list filtered by *status*, None for any."""
    return [verb for verb, takes in TAKES.items() if status is None or stored(status) in takes]


# ------------------------------------------------------------------------------------------------- what is asked for


def asked(reader: Reader, verb: str, form: dict[str, str]) -> Job:
    """Return what a form asks for. Raises Refused."""
    if verb not in TAKES:
        raise Refused("this verb is not for many")
    names = ("queue", "kind", "error", "older")
    given = {name: text for name in names if (text := form.get(name, "").strip()[:MOST_FILTER_CHARACTERS])}
    if not given and form.get("all") != "yes":
        raise Refused("which ones? Give a queue, a kind, an error or an age, or tick that you mean all")
    given["status"] = form.get("status") or TAKES[verb][0]
    reason, actor = (form.get(name, "").strip()[:MOST_TEXT] or None for name in ("reason", "actor"))
    return Job(
        verb,
        given,
        filter_of(given, reader.ask(verbs.clock_json)),
        change_of(reader, verb, form),
        reason,
        actor or "web",
    )


def filter_of(given: dict[str, str], before: str) -> dict[str, Any]:
    """Return a filter as batchq.bulk takes it, of what had finished or was inserted *before*. Raises Refused."""
    found: dict[str, Any] = {name: given[name] for name in ("queue", "kind", "status") if name in given}
    found["before"] = before
    if "error" in given:
        found["error_like"] = f"%{literal(given['error'])}%"
    if "older" in given:
        try:
            found["older_than_seconds"] = period_seconds(given["older"])
        except ValueError as error:
            raise Refused(f"older than: {error}") from None
    return found


def literal(text: str) -> str:
    """Return a pattern of LIKE that stands for the text alone, as the lists' filter takes it."""
    return text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")


def change_of(reader: Reader, verb: str, form: dict[str, str]) -> dict[str, Any]:
    """Return what a verb takes besides the filter, as batchq.bulk takes it. Raises Refused."""
    given = extra(verb, {name: value.strip() for name, value in form.items()})
    if "minutes" in given:  # the same time for every chunk
        return {"until": reader.read("in_minutes", minutes=given["minutes"])[0]["until"]}
    return {"whole": True} if verb == "retry_whole" else given


# ----------------------------------------------------------------------------------------------------- step for step


def go_on(reader: Reader, job: Job) -> Job:
    """Count on, or do the next chunk; return how far it is then. Raises TryAgain, Refused."""
    with refusals():
        try:
            return STEPS[job.state](reader, job)
        except (psycopg.OperationalError, BatchqError):
            raise TryAgain("the database did not answer in time; what is told here stands; try again") from None


def counted(reader: Reader, job: Job) -> Job:
    """Count what matches, for a second at most; change nothing."""
    until = time.monotonic() + COUNT_SECONDS
    while True:
        chunk: Chunk = reader.ask(partial(bulk, job, MOST_COUNTED, True))
        job = replace(job, total=job.total + chunk.matched, place=chunk.next_place)
        if job.place is None:
            return replace(job, state="counted")
        if time.monotonic() > until:
            return job


def did_chunk(reader: Reader, job: Job) -> Job:
    """Do one chunk, and say for how long to leave the workers alone then: as long as the shell's bulk verbs do."""
    began_at = time.monotonic()
    # As many as were counted and confirmed are done, and no more, whatever has come to match meanwhile.
    most = min(MOST_A_CHUNK, job.still_allowed)
    chunk: Chunk = reader.act(partial(bulk, job, most, False))
    job = replace(
        job, state="doing", place=chunk.next_place, audit_id=chunk.audit_id, matched=job.matched + chunk.matched,
        keyed=job.keyed + chunk.keyed, changed=job.changed + chunk.changed,
        rest_seconds=PAUSE_FACTOR * (time.monotonic() - began_at),
    )  # fmt: skip
    return ended_pass(job) if job.place is None or job.still_allowed <= 0 else job


def ended_pass(job: Job) -> Job:
    """Begin another pass, up to three in all, while some were left out and others were not."""
    changed = job.changed - job.changed_before
    if changed in (0, job.matched) or job.left == 0 or job.passes + 1 >= MOST_PASSES:
        return replace(job, state="done")
    return replace(job, passes=job.passes + 1, place=None, matched=0, keyed=0, changed_before=job.changed)


def bulk(job: Job, most: int, dry_run: bool, conn: Conn) -> Chunk:
    """Do or count one chunk."""
    session.set_lock_timeout(conn, int(LOCK_SECONDS * 1000))
    return verbs.bulk(
        conn, job.bulk_verb, job.filter, job.change, job.place, dry_run, most, job.reason, job.actor, job.audit_id
    )


STEPS: dict[str, Callable[[Reader, Job], Job]] = {
    "counting": counted,
    "counted": did_chunk,
    "doing": did_chunk,
    "done": lambda _, job: job,
}
