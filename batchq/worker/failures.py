"""Failure hooks: one thread for the process calls the app's hooks for batches that have failed."""

import asyncio
import inspect
import json
import threading
from collections import deque
from contextlib import suppress
from typing import Any, NamedTuple

from batchq.batch.claimed import from_json
from batchq.common import hidden, sealed
from batchq.common.log import get_logger
from batchq.common.text import one_line
from batchq.errors import InvalidInput, KeyMissing
from batchq.hooks import Failure, FailureHook, name_of
from batchq.postgres.link import Link
from batchq.postgres.statements import inputs
from batchq.worker.event_loop import EventLoop
from batchq.worker.outage import Outage
from batchq.worker.refused import MOST_LOGGED

MOST_WAITING = 100_000
_MOST_REFUSALS = 5

_log = get_logger()


class Failed(NamedTuple):
    """A batch that has failed. is_sure: this worker has written the failure; else the row says whether it failed."""

    queue: str
    id: int
    attempt: int
    is_sure: bool = True


class FailureHooks:
    """Calls the hooks for failures, one after the other, in a thread of its own: neither the finisher nor the keeper
    waits for them. The thread reads payload and error when their turn comes."""

    def __init__(self, hooks: list[FailureHook], link: Link, event_loop: EventLoop | None) -> None:
        self._hooks = hooks
        self._link = link
        self._event_loop = event_loop
        self._waiting: deque[Failed] = deque()
        self._filled = threading.Event()
        self._closing = threading.Event()
        self._give_up = threading.Event()
        self._outage = Outage("failure hooks", link)

    def put(self, failed: Failed) -> None:
        """Have the hooks called for a failure that was committed."""
        if len(self._waiting) >= MOST_WAITING:
            _log.error("failure hook not called", reason="too many failures wait", batch_id=failed.id)
            return
        self._waiting.append(failed)
        self._filled.set()

    def run(self) -> None:
        """Call hooks until closed and nothing waits, or until `give_up`."""
        while not self._give_up.is_set():
            self._filled.wait()
            self._filled.clear()
            while self._waiting and not self._give_up.is_set():
                self._call_next()
            if self._closing.is_set() and not self._waiting:
                return

    def close(self) -> None:
        """Let `run` return once the hooks were called for everything that waits."""
        self._closing.set()
        self._filled.set()

    def give_up(self) -> None:
        """Call no more hooks; log how many failures are left."""
        self._give_up.set()
        self._filled.set()
        if left := [failed.id for failed in self._waiting.copy()]:
            _log.error(
                "failure hooks not called", reason="the worker stops", count=len(left), batch_ids=left[:MOST_LOGGED]
            )

    def _call_next(self) -> None:
        """Call the hooks for the failure that has waited longest; leave it if the database is unavailable."""
        failed = self._waiting[0]
        try:
            rows = self._link.run(inputs.failure(failed.queue, failed.id, failed.attempt))
        except Exception as error:
            if self._link.conn is None or self._outage.failures < _MOST_REFUSALS:
                self._filled.set()
                self._give_up.wait(self._outage.failed(error))
                return
            _log.error("failure hook not called", batch_id=failed.id, error=one_line(error))
            rows = []
        self._outage.over()
        for queue, kind, status, payload, error_line, traceback, envelope in rows:
            if failed.is_sure or status == "failed":
                if envelope is not None:
                    found = sealed.open_error({"error": error_line, "traceback": None, "sealed": envelope}, kind)
                    error_line, traceback = found["error"], found.get("traceback")
                fields = (kind, _value(payload, kind), failed.attempt, error_line, traceback)
                is_sealed = envelope is not None or sealed.MARK in (payload or "")[: sealed.MARK_WITHIN]
                self._call(Failure(failed.id, queue, *fields), sealed.current() if is_sealed else None)
        self._waiting.popleft()

    def _call(self, failure: Failure, keys: sealed.Keys | None) -> None:
        """Call the hooks. *keys*: of a sealed batch: then an error of a hook is logged without its message."""
        if hidden.fields() is not None:
            with suppress(RecursionError):  # nested too deeply to be searched
                hidden.hide_values_of(json.dumps(failure.payload))
        for hook in self._hooks:
            try:
                result = hook(failure)
                if inspect.iscoroutine(result) and self._event_loop is not None:
                    asyncio.run_coroutine_threadsafe(result, self._event_loop.loop).result()
            except BaseException as error:
                line = one_line(error) if keys is None else keys.plain_line(one_line(error))
                fields = {"hook": name_of(hook), "batch_id": failure.id, "error": line}
                _log.error("failure hook failed", **fields, exc_info=error if keys is None else None)
        hidden.hide_no_values()


def _value(payload: str | None, kind: str) -> Any:
    """Return the payload, opened if it is sealed; None if it cannot be read."""
    try:
        return sealed.open_value(from_json(payload, "payload"), kind, "payload")
    except (InvalidInput, KeyMissing):
        return None
