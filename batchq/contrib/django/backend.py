"""The backend of Django's tasks: a task is a kind, an enqueued task is a batch."""

import json
from typing import Any

from django.core.checks import CheckMessage, Error
from django.db import DEFAULT_DB_ALIAS, connections
from django.utils import timezone

from batchq.common import traces
from batchq.contrib.django.interface import (
    BaseTaskBackend,
    InvalidTask,
    InvalidTaskBackend,
    TaskResult,
    TaskResultDoesNotExist,
    TaskResultStatus,
    signals,
)
from batchq.contrib.django.results import change, result_of, task_named
from batchq.enqueue import DEFAULTS, payload_text
from batchq.postgres import drivers
from batchq.postgres.statements import inserts, task_rows
from batchq.postgres.statements.views import HIGHEST_ID

_OPTIONS = ("database", "max_attempts", "timeout_seconds")
_MOST_NAME_BYTES = {"name": 200, "queue": 128}
defined: set[str] = set()  # the dotted paths of all tasks that were made for this backend


class BatchqBackend(BaseTaskBackend):
    """``"BACKEND": "batchq.contrib.django.backend.BatchqBackend"`` in TASKS.

    OPTIONS: *database*, the alias in DATABASES (default "default"); *max_attempts* and *timeout_seconds*, as in
    batchq.enqueue. Raises InvalidTaskBackend for another option.
    """

    supports_defer = True
    supports_async_task = True
    supports_get_result = True
    supports_priority = True

    def __init__(self, alias: str, params: dict[str, Any]) -> None:
        super().__init__(alias, params)
        if unknown := self.options.keys() - set(_OPTIONS):
            raise InvalidTaskBackend(f"TASKS[{alias!r}]: unknown OPTIONS {sorted(unknown)}; there are {_OPTIONS}")
        self.database: str = self.options.get("database", DEFAULT_DB_ALIAS)

    def validate_task(self, task: Any) -> None:
        """Raise InvalidTask unless a worker can run the task."""
        super().validate_task(task)
        for name, text in (("name", task.module_path), ("queue", task.queue_name)):
            if not 1 <= len(text.encode()) <= _MOST_NAME_BYTES[name]:
                raise InvalidTask(f"the {name} of a task has 1 to {_MOST_NAME_BYTES[name]} bytes, not {text!r}")
        defined.add(task.module_path)

    def enqueue(self, task: Any, args: Any, kwargs: Any) -> Any:
        """Insert the batch of a task, in the transaction that is open on the database; return its TaskResult.

        Raises TypeError or ValueError for arguments that are not JSON.
        """
        self.validate_task(task)
        result = TaskResult(
            task=task,
            id="",
            status=TaskResultStatus.READY,
            enqueued_at=None,
            started_at=None,
            last_attempted_at=None,
            finished_at=None,
            args=args,
            kwargs=kwargs,
            backend=self.alias,
            errors=[],
            worker_ids=[],
        )
        payload = payload_text({"args": result.args, "kwargs": result.kwargs}, task.module_path, "an argument")
        batch_id = self._insert(task, payload)
        change(result, id=str(batch_id), enqueued_at=timezone.now())
        signals.task_enqueued.send(type(self), task_result=result)
        return result

    def _insert(self, task: Any, payload: str) -> int:
        run_at = task.run_after
        if run_at is not None and timezone.is_naive(run_at):  # which Django allows without USE_TZ
            run_at = timezone.make_aware(run_at)
        given = {name: value for name, value in self.options.items() if name != "database"}
        given |= {"kind": task.module_path, "payload": payload, "queue": task.queue_name}
        given |= {"priority": -int(task.priority), "run_at": run_at}
        with traces.sending(task.module_path, task.queue_name) as trace_context:
            statement = inserts.insert_batch(DEFAULTS | given, trace_context)
            [(batch_id,)] = drivers.run(connections[self.database], statement)
        return int(batch_id)

    def get_result(self, result_id: str) -> Any:
        """Return the TaskResult of an enqueued task. Raises TaskResultDoesNotExist, also for a batch of no task."""
        text = str(result_id)
        batch_id = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0
        rows = drivers.run(connections[self.database], task_rows.task_row(batch_id)) if batch_id <= HIGHEST_ID else []
        if not rows:
            raise TaskResultDoesNotExist(result_id)
        row = json.loads(rows[0][0])
        task = task_named(row["kind"])
        if task is None:
            raise TaskResultDoesNotExist(f"batch {batch_id} is of kind {row['kind']!r}, which is not a task here")
        return result_of(row, task, self.alias)

    def check(self, **_: Any) -> list[CheckMessage]:
        """Return the system checks: the database is there, and is PostgreSQL."""
        where = f"TASKS[{self.alias!r}]"
        if self.database not in connections:
            hint = "Name an alias of DATABASES in OPTIONS['database']."
            return [Error(f"{where}: there is no database {self.database!r}.", hint=hint, id="batchq.E001")]
        if connections[self.database].vendor != "postgresql":
            hint = "Name the alias of a PostgreSQL database in OPTIONS['database']."
            return [Error(f"{where}: database {self.database!r} is not PostgreSQL.", hint=hint, id="batchq.E002")]
        return []
