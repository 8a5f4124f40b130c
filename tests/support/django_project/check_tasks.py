"""Every documented behaviour of Django's interface of tasks, by its backend of batchq."""

import asyncio
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.core.management import call_command
from django.db import connection, transaction
from django.test import override_settings
from django.utils import timezone

import batchq
from batchq.common import sealed
from batchq.contrib.django.backend import BatchqBackend
from batchq.contrib.django.interface import (
    InvalidTask,
    InvalidTaskBackend,
    TaskResultDoesNotExist,
    TaskResultStatus,
    signals,
    task_backends,
)
from batchq.testing import encryption_keys
from tests.support.django_project import tasks
from tests.support.django_project.tasks import task

READY, RUNNING, FAILED, SUCCESSFUL = TaskResultStatus
Sql = Callable[..., list[Any]]
Run = Callable[..., None]


@pytest.fixture
def heard() -> Any:
    """Return the signals of the test, as they come: name, status, id."""
    found: list[tuple[str, str, str]] = []
    names = ("task_enqueued", "task_started", "task_finished")

    def listener(name: str) -> Callable[..., None]:
        def hear(sender: Any, task_result: Any, **_: Any) -> None:
            assert sender is BatchqBackend
            found.append((name, str(task_result.status), task_result.id))

        return hear

    listeners = {name: listener(name) for name in names}
    for name, function in listeners.items():
        getattr(signals, name).connect(function)
    yield found
    for name, function in listeners.items():
        getattr(signals, name).disconnect(function)


# ------------------------------------------------------------------------------------------------------------- enqueue


def test_enqueue_inserts_a_batch_of_the_tasks_path_and_returns_a_ready_result(sql: Sql) -> None:
    result = tasks.add.enqueue(1, b=2)
    assert (result.status, result.args, result.kwargs, result.backend) == (READY, [1], {"b": 2}, "default")
    assert (result.attempts, result.worker_ids, result.errors, result.is_finished) == (0, [], [], False)
    assert result.task == tasks.add
    assert abs(timezone.now() - result.enqueued_at) < timedelta(seconds=10)
    rows = sql("SELECT id::text, kind, payload, queue, priority, max_attempts FROM batchq.all_batches")
    path = "tests.support.django_project.tasks.add"
    assert rows == [(result.id, path, {"args": [1], "kwargs": {"b": 2}}, "default", 0, 5)]


def test_aenqueue_does_the_same(sql: Sql) -> None:
    result = asyncio.run(close_after(tasks.add.aenqueue(1, b=2)))
    assert sql("SELECT id::text, payload FROM batchq.all_batches") == [(result.id, {"args": [1], "kwargs": {"b": 2}})]


async def close_after(awaitable: Any) -> Any:
    """Return what a coroutine returns; close the connection that it has opened in the thread of the loop's own."""
    from asgiref.sync import sync_to_async

    try:
        return await awaitable
    finally:
        await sync_to_async(lambda: connection.close())()


def test_a_sealed_task_runs_and_its_result_is_opened(sql: Sql, run: Run) -> None:
    with encryption_keys(sealed.new_key("2026-11")):
        done, failed = tasks.add.enqueue(4711, b=2), tasks.fail.enqueue("canary-4711")
        run()
        done.refresh()
        failed.refresh()
        assert (done.args, done.return_value) == ([4711], 4713)
        assert failed.errors[0].exception_class_path == "builtins.ValueError"
        assert "canary-4711" in failed.errors[0].traceback
    stored = sql("SELECT payload::text, result::text, errors::text FROM batchq.batches ORDER BY id")
    assert all("batchq:sealed" in payload for payload, _, _ in stored)
    assert "canary" not in str(stored)


def test_enqueue_is_part_of_the_current_transaction(sql: Sql) -> None:
    with transaction.atomic():
        tasks.add.enqueue(1)
        transaction.set_rollback(True)
    assert sql("SELECT count(*) FROM batchq.all_batches") == [(0,)]
    with transaction.atomic():
        tasks.add.enqueue(2)
        assert sql("SELECT count(*) FROM batchq.all_batches") == [(0,)]
    assert sql("SELECT count(*) FROM batchq.all_batches") == [(1,)]


def test_enqueue_on_commit_is_skipped_by_a_rollback(sql: Sql) -> None:
    with transaction.atomic():
        transaction.on_commit(lambda: tasks.add.enqueue(1))
        transaction.set_rollback(True)
    with transaction.atomic():
        transaction.on_commit(lambda: tasks.add.enqueue(2))
    assert sql("SELECT payload -> 'args' FROM batchq.all_batches") == [([2],)]


def test_arguments_that_are_not_json_raise_a_type_error(sql: Sql) -> None:
    with pytest.raises(TypeError, match="Unsupported type"):
        tasks.add.enqueue(object())
    with pytest.raises(TypeError, match="Unsupported type"):
        tasks.add.enqueue(1, b={2})
    assert sql("SELECT count(*) FROM batchq.all_batches") == [(0,)]


@pytest.mark.parametrize("value", [float("nan"), "\0", "\ud800"])
def test_arguments_that_postgres_cannot_store_raise_a_value_error(value: Any) -> None:
    with pytest.raises(ValueError, match="an argument cannot be stored as JSON"):
        tasks.add.enqueue(value)


def test_arguments_that_are_bytes_or_tuples_become_text_and_lists() -> None:
    result = tasks.add.enqueue(b"text", (1, 2))
    assert result.args == tasks.add.get_result(result.id).args == ["text", [1, 2]]


def test_supports_priority_whose_higher_values_run_first(sql: Sql, run: Run, heard: Any) -> None:
    ids = [tasks.add.using(priority=priority).enqueue(priority).id for priority in (-100, 0, 100)]
    rows = sql("SELECT priority, payload #> '{args,0}' FROM batchq.all_batches ORDER BY priority")
    assert rows == [(-100, 100), (0, 0), (100, -100)]
    run(concurrency=1)
    assert [batch_id for name, _, batch_id in heard if name == "task_started"] == ids[::-1]


def test_supports_defer_so_that_run_after_is_the_earliest_start(sql: Sql, run: Run) -> None:
    later = timezone.now() + timedelta(hours=1)
    result = tasks.add.using(run_after=later).enqueue(1)
    run()
    assert sql("SELECT status, run_at FROM batchq.all_batches") == [("pending", later)]
    assert tasks.add.get_result(result.id).task.run_after == later


@override_settings(USE_TZ=False)
def test_run_after_may_be_naive_without_time_zones(sql: Sql) -> None:
    later = timezone.now().replace(microsecond=0) + timedelta(hours=1)
    assert timezone.is_naive(later)
    result = tasks.add.using(run_after=later).enqueue(1)
    assert sql("SELECT run_at FROM batchq.all_batches") == [(timezone.make_aware(later),)]
    found = tasks.add.get_result(result.id)
    assert found.task.run_after == later
    assert timezone.is_naive(found.enqueued_at)


def test_queue_name_is_the_queue(sql: Sql, run: Run) -> None:
    result = tasks.add.using(queue_name="mail").enqueue(1)
    run(queues="default")
    assert tasks.add.get_result(result.id).status == READY
    run(queues="mail")
    assert tasks.add.get_result(result.id).return_value == 1
    assert tasks.add.get_result(result.id).task.queue_name == "mail"


# ------------------------------------------------------------------------------------------------------- validate_task


def test_validate_task_refuses_functions_that_are_not_at_module_level() -> None:
    with pytest.raises(InvalidTask, match="module level"):
        task(lambda: None)


def test_validate_task_refuses_a_context_that_is_not_taken() -> None:
    with pytest.raises(InvalidTask, match="first argument of 'context'"):
        task(takes_context=True)(tasks.add.func)


@pytest.mark.parametrize("priority", [-101, 101, 1.5])
def test_validate_task_refuses_priorities_beyond_100(priority: float) -> None:
    with pytest.raises(InvalidTask, match="priority must be a whole number"):
        tasks.add.using(priority=priority)


def test_validate_task_refuses_a_queue_that_the_backend_does_not_name() -> None:
    with pytest.raises(InvalidTask, match="Queue 'unknown' is not valid for backend"):
        tasks.add.using(queue_name="unknown")
    assert tasks.add.using(queue_name="unknown", backend="once").queue_name == "unknown", "QUEUES = [] allows all"


def test_validate_task_refuses_a_naive_run_after() -> None:
    with pytest.raises(InvalidTask, match="aware"):
        tasks.add.using(run_after=timezone.make_naive(timezone.now()))


@pytest.mark.parametrize("queue", ["", "q" * 129])
def test_validate_task_refuses_names_that_the_table_refuses(queue: str) -> None:
    with pytest.raises(InvalidTask, match="the queue of a task has 1 to 128 bytes"):
        tasks.add.using(queue_name=queue, backend="once")


# ---------------------------------------------------------------------------------------------------------- get_result


def test_get_result_of_a_successful_task(run: Run) -> None:
    enqueued = tasks.add.enqueue(1, b=2)
    run()
    result = tasks.add.get_result(enqueued.id)
    assert (result.status, result.return_value, result.is_finished) == (SUCCESSFUL, 3, True)
    assert (result.attempts, len(result.worker_ids), result.errors) == (1, 1, [])
    assert result.enqueued_at <= result.started_at == result.last_attempted_at <= result.finished_at
    assert (result.args, result.kwargs, result.task, result.backend) == ([1], {"b": 2}, tasks.add, "default")


def test_aget_result_does_the_same(run: Run) -> None:
    enqueued = tasks.add_async.enqueue(1, b=2)
    run()
    assert asyncio.run(close_after(tasks.add_async.aget_result(enqueued.id))).return_value == 3


def test_refresh_and_arefresh_read_the_result_again(run: Run) -> None:
    first, second = tasks.add.enqueue(1), tasks.add.enqueue(2)
    with pytest.raises(ValueError, match="not finished"):
        assert first.return_value
    run()
    first.refresh()
    asyncio.run(close_after(second.arefresh()))
    assert (first.return_value, second.return_value) == (1, 2)


def test_get_result_of_a_failed_task_has_an_error_for_each_attempt(run: Run, sql: Sql) -> None:
    enqueued = tasks.fail.enqueue("own")
    for attempt in (1, 2):
        run()
        result = tasks.fail.get_result(enqueued.id)
        assert (result.status, result.attempts, len(result.errors)) == (READY, attempt, attempt)
        sql("UPDATE batchq.batches SET run_at = now(), max_attempts = 3")
    run()
    result.refresh()
    assert (result.status, result.attempts, len(result.errors)) == (FAILED, 3, 3)
    assert {error.exception_class for error in result.errors} == {tasks.OwnError}
    assert "own\nof two lines" in result.errors[0].traceback
    with pytest.raises(ValueError, match="Task failed"):
        assert result.return_value


@pytest.mark.parametrize(("what", "cls"), [("own", tasks.OwnError), ("plain", ValueError), ("", ValueError)])
def test_errors_name_the_class_of_the_exception(what: str, cls: type, run: Run) -> None:
    enqueued = tasks.fail.using(backend="once").enqueue(what)
    run()
    assert [error.exception_class for error in tasks.fail.using(backend="once").get_result(enqueued.id).errors] == [cls]


def test_get_result_of_a_running_task(sql: Sql) -> None:
    enqueued = tasks.add.enqueue(1)
    sql(
        "UPDATE batchq.batches SET status = 'processing', attempt = 2, claimed_by = 'w', claimed_at = now(), "
        "lease_expires_at = now() + interval '1 hour', claim_token = gen_random_uuid()"
    )
    result = tasks.add.get_result(enqueued.id)
    assert (result.status, result.attempts, result.worker_ids) == (RUNNING, 2, ["unknown", "w"])


def test_get_result_of_a_cancelled_task_is_failed(sql: Sql) -> None:
    enqueued = tasks.add.enqueue(1)
    sql("SELECT batchq.cancel(%s, 'not wanted')", int(enqueued.id))
    result = tasks.add.get_result(enqueued.id)
    assert (result.status, result.attempts, result.errors[0].exception_class) == (FAILED, 0, batchq.Cancel)
    assert "not wanted" in result.errors[0].traceback


@pytest.mark.parametrize("unknown", ["1", "0", "-1", "x", "", "²", "9" * 19, "9" * 40])
def test_get_result_of_an_unknown_id_raises_task_result_does_not_exist(unknown: str) -> None:
    with pytest.raises(TaskResultDoesNotExist):
        tasks.add.get_result(unknown)


def test_get_result_of_a_batch_that_is_no_task_raises_task_result_does_not_exist(sql: Sql) -> None:
    for kind in ("plain", "os.path.join", "nowhere.at_all", ".x", "..x", "a b.c", "os."):
        [(batch_id,)] = sql("INSERT INTO batchq.batches (kind) VALUES (%s) RETURNING id", kind)
        with pytest.raises(TaskResultDoesNotExist):
            tasks.add.get_result(str(batch_id))


def test_get_result_of_another_task_raises_task_result_mismatch() -> None:
    enqueued = tasks.add.enqueue(1)
    with pytest.raises(Exception, match="Task does not match") as caught:
        tasks.fail.get_result(enqueued.id)
    assert type(caught.value).__name__ == "TaskResultMismatch"


def test_get_result_names_the_queue_and_priority_that_operators_have_set(sql: Sql) -> None:
    enqueued = tasks.add.enqueue(1)
    sql("SELECT batchq.set_priority(%s, 3000), batchq.move(%s, 'elsewhere')", int(enqueued.id), int(enqueued.id))
    found = tasks.add.get_result(enqueued.id).task
    assert (found.priority, found.queue_name) == (-3000, "elsewhere")


def test_a_batch_from_sql_with_a_payload_of_a_task_runs(sql: Sql, run: Run) -> None:
    path = "tests.support.django_project.tasks.add"
    insert = "INSERT INTO batchq.batches (kind, payload) VALUES (%s, %s) RETURNING id::text"
    [(good,)], [(bad,)] = sql(insert, path, '{"args": [4]}'), sql(insert, path, '{"a": 4}')
    run()
    assert tasks.add.get_result(good).return_value == 4
    with pytest.raises(batchq.InvalidInput, match=f"the payload of batch {bad} is not that of a task"):
        tasks.add.get_result(bad)
    assert sql("SELECT status FROM batchq.all_batches WHERE id = %s", int(bad)) == [("failed",)]


# ----------------------------------------------------------------------------------------------------------------- run


def test_supports_async_task(run: Run) -> None:
    enqueued = [tasks.add_async.enqueue(number, b=1) for number in range(20)]
    run()
    assert [tasks.add_async.get_result(one.id).return_value for one in enqueued] == list(range(1, 21))


def test_takes_context_passes_the_context_with_the_attempt(run: Run) -> None:
    enqueued = tasks.tell_context.enqueue("hello")
    run()
    told = tasks.tell_context.get_result(enqueued.id).return_value
    expected = {"word": "hello", "attempt": 1, "status": "RUNNING", "id": enqueued.id, "workers": 1}
    assert told == expected | {"enqueued": True, "started": True}


def test_takes_context_counts_attempts(run: Run, sql: Sql) -> None:
    enqueued = tasks.fail_first_async.enqueue()
    run()
    sql("UPDATE batchq.batches SET run_at = now()")
    run()
    assert tasks.fail_first_async.get_result(enqueued.id).return_value == 2


def test_a_return_value_becomes_json(run: Run) -> None:
    enqueued = [tasks.give.enqueue(what) for what in ("tuple", "bytes", "object")]
    run()
    pairs, text, refused = [tasks.give.get_result(one.id) for one in enqueued]
    assert (pairs.return_value, text.return_value) == ([1, 2], "text")
    assert (refused.status, refused.attempts) == (FAILED, 1), "not retried: its effects are done"
    assert "Unsupported type" in refused.errors[0].traceback
    assert refused.errors[0].exception_class is batchq.InvalidInput


def test_the_control_exceptions_of_batchq_work_in_a_task(run: Run, heard: Any) -> None:
    snoozed, cancelled = tasks.control.enqueue("snooze"), tasks.control.enqueue("cancel")
    run()
    assert tasks.control.get_result(snoozed.id).status == READY
    assert tasks.control.get_result(cancelled.id).status == FAILED
    assert [one for one in heard if one[0] == "task_finished"] == [("task_finished", "FAILED", cancelled.id)]


def test_a_task_of_another_backend_is_run_too_if_its_batch_is_enqueued(run: Run) -> None:
    here = tasks.of_another_backend.using(backend="default")
    enqueued = here.enqueue()
    run()
    assert here.get_result(enqueued.id).return_value == "run"


# ------------------------------------------------------------------------------------------------------------- signals


def test_signals_of_a_successful_task(run: Run, heard: Any) -> None:
    for one in (tasks.add, tasks.add_async):
        heard.clear()
        enqueued = one.enqueue(1)
        run()
        assert heard == [
            ("task_enqueued", "READY", enqueued.id),
            ("task_started", "RUNNING", enqueued.id),
            ("task_finished", "SUCCESSFUL", enqueued.id),
        ]


def test_signals_of_a_failed_task(run: Run, heard: Any, caplog: pytest.LogCaptureFixture) -> None:
    for one in (tasks.fail_once, tasks.fail_once_async):
        heard.clear()
        caplog.clear()
        enqueued = one.enqueue()
        run()
        assert [(name, status) for name, status, _ in heard] == [
            ("task_enqueued", "READY"),
            ("task_started", "RUNNING"),
            ("task_finished", "FAILED"),
        ]
        logged = [line for line in caplog.records if f"id={enqueued.id} " in line.getMessage() and line.exc_info]
        assert [line.exc_info[0] for line in logged if line.exc_info] == [tasks.OwnError]


def test_task_finished_is_not_sent_before_the_last_attempt(run: Run, heard: Any) -> None:
    tasks.fail.enqueue("own")
    run()
    assert [name for name, _, _ in heard] == ["task_enqueued", "task_started"]


def test_task_finished_is_not_sent_for_a_deadlock_after_which_the_batch_runs_again(run: Run, heard: Any) -> None:
    enqueued = tasks.conflict.enqueue()
    run()
    assert {name for name, _, _ in heard} == {"task_enqueued", "task_started"}
    assert tasks.conflict.get_result(enqueued.id).status == READY


def test_a_listener_that_fails_does_not_fail_the_task(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    def broken(**_: Any) -> None:
        raise tasks.OwnError("of a listener")

    signals.task_finished.connect(broken)
    try:
        enqueued = tasks.add.enqueue(1)
        run()
    finally:
        signals.task_finished.disconnect(broken)
    assert tasks.add.get_result(enqueued.id).status == SUCCESSFUL
    assert "of a listener" in caplog.text


# ----------------------------------------------------------------------------------------------- settings and checks


def test_options_are_those_of_a_batch(sql: Sql) -> None:
    tasks.fail_once.enqueue()
    assert sql("SELECT max_attempts FROM batchq.all_batches") == [(1,)]


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(InvalidTaskBackend, match=r"TASKS\['x'\]: unknown OPTIONS \['retries'\]"):
        BatchqBackend("x", {"OPTIONS": {"retries": 3}})


def test_check_finds_a_database_that_is_not_there_or_not_postgres() -> None:
    found = [BatchqBackend("x", {"OPTIONS": {"database": name}}).check() for name in ("nowhere", "other", "default")]
    assert [[error.id for error in errors] for errors in found] == [["batchq.E001"], ["batchq.E002"], []]
    call_command("check")


def test_another_database_is_refused_clearly() -> None:
    backend = BatchqBackend("x", {"OPTIONS": {"database": "other"}})
    with pytest.raises(batchq.InvalidInput, match="sqlite"):
        backend.enqueue(tasks.add, (1,), {})


def test_the_backend_supports_everything() -> None:
    backend = task_backends["default"]
    names = ("supports_defer", "supports_async_task", "supports_get_result", "supports_priority")
    assert [getattr(backend, name) for name in names] == [True] * 4


def test_the_models_are_no_concern_of_migrations(capsys: pytest.CaptureFixture[str]) -> None:
    call_command("makemigrations", "--check", "--dry-run")
    assert "No changes detected" in capsys.readouterr().out


def test_payloads_are_plain_json(sql: Sql) -> None:
    tasks.add.enqueue("ä", b=None)
    [(text,)] = sql("SELECT payload::text FROM batchq.all_batches")
    assert json.loads(text) == {"args": ["ä"], "kwargs": {"b": None}}
