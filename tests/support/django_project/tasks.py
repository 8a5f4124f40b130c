"""Its tasks."""

import asyncio
import time
from importlib import import_module
from typing import Any

from django.db import connection

import batchq
from batchq.contrib.django.models import QueueKind
from tests.support.django_project.settings import OWN_TASKS

task: Any = import_module("django.tasks" if OWN_TASKS else "django_tasks").task


class OwnError(Exception):
    """An error of the project."""


@task
def add(a: int, b: int = 0) -> int:
    return a + b


@task
async def add_async(a: int, b: int = 0) -> int:
    await asyncio.sleep(0)
    return a + b


@task(takes_context=True)
def tell_context(context: Any, word: str) -> dict[str, Any]:
    result = context.task_result
    return {
        "word": word,
        "attempt": context.attempt,
        "status": result.status,
        "id": result.id,
        "workers": len(result.worker_ids),
        "enqueued": result.enqueued_at is not None,
        "started": result.started_at is not None,
    }


@task(takes_context=True)
async def fail_first_async(context: Any) -> int:
    if context.attempt == 1:
        raise OwnError("first")
    return int(context.attempt)


@task
def fail(kind: str) -> None:
    if kind == "own":
        raise OwnError("own\nof two lines")
    raise ValueError(kind)


@task(backend="once")
def fail_once() -> None:
    raise OwnError("once")


@task(backend="once")
def conflict() -> None:
    with connection.cursor() as cursor:
        cursor.execute("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = 'deadlock_detected'; END $$")


@task(backend="once", queue_name="any queue")
async def fail_once_async() -> None:
    raise OwnError("once")


@task
def give(what: str) -> Any:
    return {"tuple": (1, 2), "bytes": b"text", "object": object()}[what]


@task
def control(what: str) -> None:
    raise {"snooze": batchq.Snooze(3600), "cancel": batchq.Cancel("not wanted")}[what]


@task
def backend_process() -> int:
    """Return the process of the ORM's connection."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return int(cursor.fetchone()[0])


@task
async def backend_process_async() -> list[int]:
    """Return the processes of the ORM's connection, of two reads by its async functions."""
    found = []
    for _ in range(2):
        assert await QueueKind.objects.acount() >= 0
        found.append(await _process_async())
    return found


async def _process_async() -> int:
    from asgiref.sync import sync_to_async

    return int(await sync_to_async(backend_process.func)())


@task(backend="dummy")
def of_another_backend() -> str:
    return "run"


@task(backend="impatient")
def stick() -> None:
    """Go on for longer than any test, whoever asks to stop."""
    time.sleep(600)
