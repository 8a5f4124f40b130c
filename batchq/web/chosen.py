"""Actions on the batches that were selected in the list: a page asks, its form does it to each batch by itself.

Each batch is changed in a transaction of its own, and has its own row in the audit, as if it had been changed alone.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from urllib.parse import parse_qsl

import psycopg
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from batchq.errors import BatchqError
from batchq.operate.verbs import VERBS, Verb
from batchq.postgres.statements.views import HIGHEST_ID, STATUSES
from batchq.web import formats, list_reads
from batchq.web.forms import read_form
from batchq.web.reads import Conn, Reader, Row, rows
from batchq.web.verbs import Refused, change_of, refusals, why
from batchq.web.view import refuse_if_read_only

MOST_CHOSEN = 200
_MOST_SECONDS = 20.0
_ENDED = ("completed", "failed", "cancelled")
_RUNNING = ("processing", "stalled")
_RUN_NOW = replace(
    VERBS["snooze"],
    name="run_now",
    title="Run now",
    explanation="A scheduled or retrying batch becomes ready immediately.",
    done="made ready",
    argument=None,
    fixed={"delay_seconds": 0},
    statuses=(),
    offered=("scheduled", "retrying"),
)
_NAMES = ("retry", "run_now", "run_anyway", "snooze", "set_priority", "move", "retry_items", "retry_whole", "cancel",
          "cancel_with_dependents")  # fmt: skip
_VERBS = {name: VERBS.get(name, _RUN_NOW) for name in _NAMES}

# Why a batch is left as it is: of one, and of many.
_GONE = ("is not stored any more", "are not stored any more")
_HAS_ENDED = ("has ended already", "have ended already")
_RUNS = ("is running", "are running")
_WAITS = ("waits for other batches", "wait for other batches")
_PENDING = ("has not ended", "have not ended")
_IS_READY = ("is ready already", "are ready already")
_WAITS_FOR_NONE = ("waits for no other batch", "wait for no other batch")
_NO_FAILED_ITEMS = ("has no failed items", "have no failed items")
_NOTHING_LEFT = ("is completed: nothing is left to retry", "are completed: nothing is left to retry")
_SAME = ("is as it should be already, or was just changed by somebody else",
         "are as they should be already, or were just changed by somebody else")  # fmt: skip
_NO_TIME = ("was not tried: the time was up. Do it again", "were not tried: the time was up. Do it again")
_TOO_SLOW = ("was not changed in time; try again", "were not changed in time; try again")


def verbs_for(status: str | None) -> list[Verb]:
    """Return the actions that a list offers for selected batches of a shown status, None for any."""
    return [verb for verb in _VERBS.values() if status is None or _takes(verb, status)]


def _takes(verb: Verb, status: str) -> bool:
    return verb.accepts(status) or status in (verb.offered or ())


def why_not(verb: Verb, row: Row) -> tuple[str, str] | None:
    """Return why an action would leave a batch as it is, of one and of many; None if it would change it."""
    status = row["status"]
    if verb.needs_failed_items and status in _ENDED and not row["items_failed"]:
        return _NO_FAILED_ITEMS
    if verb.name == "retry" and status == "completed" and not row["items_failed"]:
        return _NOTHING_LEFT
    if _takes(verb, status):
        return None
    if status in _ENDED:
        return _HAS_ENDED
    if verb.offered == ("waiting",):
        return _WAITS_FOR_NONE
    if status in _RUNNING:
        return _RUNS
    if status == "waiting":
        return _WAITS
    return _IS_READY if status == "ready" and verb.name in ("run_now", "retry") else _PENDING


@dataclass
class Outcome:
    """What an action changed, and why it left other batches as they are: their ids, by the reason."""

    changed: list[int] = field(default_factory=list)
    left: dict[tuple[str, str], list[int]] = field(default_factory=dict)

    def leave(self, batch_id: int, reason: tuple[str, str]) -> None:
        """Add a batch that is left as it is."""
        self.left.setdefault(reason, []).append(batch_id)

    def reasons(self) -> list[tuple[str, list[int]]]:
        """Return a text such as "3 have ended already", and the batches, for each reason."""
        return [(f"{len(ids)} {reason[len(ids) > 1]}", ids) for reason, ids in self.left.items()]


def ids_of(texts: Iterable[str]) -> list[int]:
    """Return the ids in a form, without repetitions. Raises Refused."""
    given = dict.fromkeys(part for text in texts for part in text.split(",") if part)
    for text in given:
        if not (text.isascii() and text.isdecimal() and len(text) < 20 and 0 < int(text) <= HIGHEST_ID):
            raise Refused(f"not the id of a batch: {text[:40]}; select batches in the list")
    if not given:
        raise Refused("no batches selected; tick the boxes of some in the list, then choose the action")
    if len(given) > MOST_CHOSEN:
        raise Refused(f"{len(given)} batches are selected; select at most {MOST_CHOSEN}")
    return [int(text) for text in given]


class Chosen:
    """Answers requests for actions on selected batches."""

    def __init__(self, reader: Reader, show: Callable[..., Response]) -> None:
        """show: `Pages.page`."""
        self._reader = reader
        self._show = show

    def ask(self, request: Request) -> Response:
        """Ask whether to do an action to the selected batches; tell what it would change."""
        verb = _verb(request)
        form = dict(request.query_params)
        try:
            ids = ids_of(request.query_params.getlist("id"))
        except Refused as error:
            return self._page(request, verb, form, [], problem=str(error))
        return self._page(request, verb, form, ids)

    async def do(self, request: Request) -> Response:
        """Do an action to the selected batches; show what it changed, and why it left others as they are."""
        verb = _verb(request)
        form = await read_form(request)
        return await run_in_threadpool(self._do, request, verb, form)

    def _do(self, request: Request, verb: Verb, form: dict[str, str]) -> Response:
        ids: list[int] = []
        try:
            ids = ids_of([form.get("ids", "")])
            with refusals():
                change = change_of(verb, form)
        except Refused as error:
            return self._page(request, verb, form, ids, problem=str(error))
        outcome = self._change(verb, ids, change, *why(form))
        return self._show(request, "chosen_done.html", verb=verb, outcome=outcome, back=_back(form))

    def _change(
        self, verb: Verb, ids: list[int], change: dict[str, Any], reason: str | None, actor: str | None
    ) -> Outcome:
        outcome, until = Outcome(), time.monotonic() + _MOST_SECONDS
        for batch_id in sorted(ids):
            if time.monotonic() > until:
                outcome.leave(batch_id, _NO_TIME)
                continue
            try:
                with refusals():
                    left = self._reader.act(partial(_do_to, verb, batch_id, change, reason, actor))
            except Refused as error:
                left = (f"was refused: {error}", f"were refused: {error}")
            except (psycopg.OperationalError, BatchqError):
                left = _TOO_SLOW
            if left:
                outcome.leave(batch_id, left)
            else:
                outcome.changed.append(batch_id)
        return outcome

    def _page(self, request: Request, verb: Verb, form: dict[str, str], ids: list[int], problem: str = "") -> Response:
        """Return the page that asks: how many batches of each status are selected, and what would be left as it is."""
        found = self._reader.ask(lambda conn: rows(conn, list_reads.SQL["chosen"], {"ids": ids})) if ids else []
        would, statuses = Outcome(), dict.fromkeys(STATUSES, 0)
        for row in found:
            statuses[row["status"]] += 1
            if left := why_not(verb, row):
                would.leave(row["id"], left)
            else:
                would.changed.append(row["id"])
        for batch_id in set(ids) - {row["id"] for row in found}:
            would.leave(batch_id, _GONE)
        return self._show(
            request, "chosen.html", 409 if problem else 200, verb=verb, given=form, ids=ids, would=would,
            statuses_of={name: count for name, count in statuses.items() if count}, problem=problem, back=_back(form),
        )  # fmt: skip


def _do_to(
    verb: Verb, batch_id: int, change: dict[str, Any], reason: str | None, actor: str | None, conn: Conn
) -> tuple[str, str] | None:
    """Do an action to one batch. Return why it was left as it is; None if it was changed."""
    found = rows(conn, list_reads.SQL["chosen"], {"ids": [batch_id]})
    if not found:
        return _GONE
    if left := why_not(verb, found[0]):
        return left
    verb.do(conn, {"batch_id": batch_id}, change, reason, actor)
    [audited] = rows(conn, list_reads.SQL["was_changed"], {"id": batch_id})
    return None if audited["was_changed"] else _SAME


def _verb(request: Request) -> Verb:
    """Return the action in an address. Raises HTTPException if there is none, or if the web UI is read-only."""
    refuse_if_read_only(request)
    verb = _VERBS.get(request.path_params["verb"])
    if verb is None:
        raise HTTPException(404, "no such action for selected batches")
    return verb


def _back(form: dict[str, str]) -> str:
    """Return the query of the list that the form came from."""
    return formats.query(**dict(parse_qsl(form.get("back", ""))))
