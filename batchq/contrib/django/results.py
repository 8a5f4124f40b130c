"""A batch as Django's TaskResult."""

import builtins
import dataclasses
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from django.conf import settings
from django.utils import timezone
from django.utils.module_loading import import_string

from batchq.common import sealed
from batchq.contrib.django.interface import Task, TaskError, TaskResult, TaskResultStatus
from batchq.errors import InvalidInput

_STATUSES: Mapping[str, Any] = {
    "waiting": TaskResultStatus.READY,
    "pending": TaskResultStatus.READY,
    "processing": TaskResultStatus.RUNNING,
    "completed": TaskResultStatus.SUCCESSFUL,
    "failed": TaskResultStatus.FAILED,
    "cancelled": TaskResultStatus.FAILED,
}
UNKNOWN_WORKER = "unknown"  # batchq keeps the id of the latest worker only


def result_of(row: Mapping[str, Any], task: Any, backend: str) -> Any:
    """Return a row of `read_task_row` as the TaskResult of *task*, opened if it is sealed.

    Raises InvalidInput for another payload, and as `sealed.open_value` does."""
    kind = row["kind"]
    args, kwargs = _arguments({**row, "payload": sealed.open_value(row["payload"], kind, "payload")})
    claimed_at = _time(row["claimed_at"])
    workers = [UNKNOWN_WORKER] * (row["attempt"] - 1) + [row["claimed_by"] or UNKNOWN_WORKER]
    result = TaskResult(
        task=_as_enqueued(task, row, backend),
        id=str(row["id"]),
        status=_STATUSES[row["status"]],
        enqueued_at=_time(row["created_at"]),
        started_at=claimed_at,
        last_attempted_at=claimed_at,
        finished_at=_time(row["finished_at"]),
        args=args,
        kwargs=kwargs,
        backend=backend,
        errors=[_error(sealed.open_error(error, kind)) for error in row["errors"]],
        worker_ids=workers if row["attempt"] else [],
    )
    change(result, _return_value=sealed.open_value(row["result"], kind, "result"))
    return result


def change(frozen: Any, **values: Any) -> None:
    """Set attributes of Django's frozen dataclasses, as its own backends do."""
    for name, value in values.items():
        object.__setattr__(frozen, name, value)


def task_named(kind: str) -> Any | None:
    """Return the task of that dotted path, None if there is none. Raises what the import of its module raises."""
    names = kind.split(".")
    if len(names) < 2 or not all(name.isidentifier() for name in names):
        return None
    try:
        found = import_string(kind)
    except ImportError:
        return None
    return found if isinstance(found, Task) else None


def _arguments(row: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    payload = row["payload"]
    if isinstance(payload, dict) and payload.keys() <= {"args", "kwargs"}:
        args, kwargs = payload.get("args", []), payload.get("kwargs", {})
        if isinstance(args, list) and isinstance(kwargs, dict):
            return args, kwargs
    raise InvalidInput(
        f'the payload of batch {row["id"]} is not that of a task; write {{"args": [...], "kwargs": {{...}}}}'
    )


def _as_enqueued(task: Any, row: Mapping[str, Any], backend: str) -> Any:
    """Return the task with the queue and priority that its batch has now; operators may have changed them."""
    run_after = row["run_at"] if row["run_at"] > row["created_at"] else None
    copied = dataclasses.replace(task)
    change(copied, priority=-row["priority"], queue_name=row["queue"], run_after=_time(run_after), backend=backend)
    return copied


def _time(text: str | None) -> datetime | None:
    if text is None:
        return None
    time = datetime.fromisoformat(text)
    return time if settings.USE_TZ else timezone.make_naive(time)


def _error(error: Mapping[str, Any]) -> Any:
    line, trace = error["error"], error.get("traceback", "")
    return TaskError(exception_class_path=_class_path(line, trace), traceback=trace or line)


def _class_path(line: str, trace: str) -> str:
    """Return the dotted path of an error's class. The line has its name; the traceback ends with its path."""
    name = re.match(r"\w+", line)
    found = re.findall(rf"^[ |]*((?:[\w<>]+\.)*{name[0]})(?::|$)", trace, re.MULTILINE) if name else []
    if found and "." in found[-1]:
        return str(found[-1])
    if found and hasattr(builtins, found[-1]):
        return f"builtins.{found[-1]}"
    return "batchq.errors.Cancel" if line.startswith("cancelled") else "batchq.errors.BatchqError"
