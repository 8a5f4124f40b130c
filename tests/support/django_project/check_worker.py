"""How a worker finds the project's database, queues and tasks, and the ORM's connections around each batch."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from django.core.management import CommandError, call_command
from django.db import connection, connections, transaction
from django.test import override_settings
from psycopg.conninfo import conninfo_to_dict

import batchq
from batchq.contrib.django import fresh_connections
from batchq.contrib.django.project import default_alias, dsn_of, load_project_app, settings_for
from batchq.errors import ConfigError
from batchq.testing import drain, running_worker
from tests.support.django_project import tasks
from tests.support.django_project.fixtures import use_database
from tests.support.markdown import ROOT
from tests.support.servers import Server
from tests.support.waiting import allowed, wait_until

Sql = Callable[..., list[Any]]
Capture = pytest.CaptureFixture[str]
HERE = "tests.support.django_project"
BACKEND = "batchq.contrib.django.backend.BatchqBackend"


def ended(sql: Sql, count: int) -> list[Any]:
    """Wait until that many batches have ended well; return their results in order."""
    completed = "SELECT result FROM batchq.all_batches WHERE status = 'completed' ORDER BY id"
    wait_until(lambda: len(sql(completed)) == count, 20, "the results")
    return [value for (value,) in sql(completed)]


# --------------------------------------------------------------------------------------------------------- connections


@pytest.mark.parametrize("kind", ["a task", "plain"])
@override_settings(BATCHQ_APP=f"{HERE}.other_app:app")
def test_after_a_dropped_connection_the_next_batch_works(kind: str, db: str, sql: Sql) -> None:
    use_database(db, CONN_MAX_AGE=None, CONN_HEALTH_CHECKS=False)
    enqueue = tasks.backend_process.using(backend="once").enqueue
    if kind == "plain":
        enqueue = lambda: sql("INSERT INTO batchq.batches (kind, max_attempts) VALUES ('plain', 1)")  # noqa: E731
    with running_worker(load_project_app(), db, concurrency=1, queues="default"):
        enqueue()
        [first] = ended(sql, 1)
        enqueue()
        assert ended(sql, 2) == [first, first], "the connection is kept"
        assert sql("SELECT pg_terminate_backend(%s, 5000)", first) == [(True,)]
        use_database(db, CONN_MAX_AGE=0)  # for the next one: no test leaves a connection
        enqueue()
        *_, third = ended(sql, 3)
    assert third != first


@override_settings(BATCHQ_APP=f"{HERE}.other_app:app")
def test_each_async_batch_has_a_connection_of_its_own_and_leaves_none(db: str, sql: Sql) -> None:
    use_database(db, CONN_MAX_AGE=None)
    sql("INSERT INTO batchq.batches (kind, max_attempts) VALUES ('plain_async', 1)")
    for _ in range(3):
        tasks.backend_process_async.enqueue()
    connection.close()
    drain(load_project_app(), db, raises=False, queues="default")
    pairs = ended(sql, 4)
    assert all(first == second for first, second in pairs)
    assert len({first for first, _ in pairs}) == 4
    pids = "SELECT pid FROM pg_stat_activity WHERE pid = ANY(%s)"
    wait_until(lambda: sql(pids, [first for first, _ in pairs]) == [], 10, "the connections to be closed")


def test_with_conn_max_age_0_no_connection_is_left(db: str, sql: Sql) -> None:
    tasks.backend_process.enqueue()
    connection.close()
    with running_worker(load_project_app(), db, queues="default"):
        [pid] = ended(sql, 1)
        wait_until(lambda: sql("SELECT 1 FROM pg_stat_activity WHERE pid = %s", pid) == [], 10, "it to be closed")


def test_a_transaction_of_the_caller_keeps_its_connection(db: str) -> None:
    @fresh_connections
    def handler(number: int) -> int:
        return number + int(tasks.backend_process.func() > 0)

    with transaction.atomic():
        before = tasks.backend_process.func()
        assert handler(1) == 2
        assert tasks.backend_process.func() == before


def test_a_batch_completes_in_atomic_or_not_at_all(db: str, sql: Sql) -> None:
    app = batchq.App()
    sql("CREATE TABLE written (batch_id bigint, attempt integer)")

    @app.handler("write", backoff=batchq.Backoff(0, 0))
    @fresh_connections
    def write(batch: batchq.Batch) -> None:
        with transaction.atomic():
            with connection.cursor() as cursor:
                cursor.execute("INSERT INTO written VALUES (%s, %s)", [batch.id, batch.attempt])
            batch.complete_in(connection, {"in": "atomic"})
            if batch.attempt == 1:
                raise ValueError("undone")

    [(batch_id,)] = sql("INSERT INTO batchq.batches (kind) VALUES ('write') RETURNING id")
    drain(app, db, raises=False)
    assert sql("SELECT * FROM written") == [(batch_id, 2)]
    assert ended(sql, 1) == [{"in": "atomic"}]


# ------------------------------------------------------------------------------------------------ database and settings


def test_the_dsn_is_that_of_databases(db: str) -> None:
    expected = {name: value for name, value in conninfo_to_dict(db).items() if name in ("dbname", "user", "password")}
    assert conninfo_to_dict(dsn_of("default")).items() >= expected.items()
    use_database(db, OPTIONS={"connect_timeout": 7, "options": "-c jit=off", "isolation_level": 2, "pool": False})
    found = conninfo_to_dict(dsn_of("default"))
    use_database(db, OPTIONS={})
    assert found["connect_timeout"] == 7 or found["connect_timeout"] == "7"
    assert found.keys().isdisjoint({"options", "client_encoding", "isolation_level", "pool"})


def test_a_password_with_any_character_survives() -> None:
    settings = connections.databases["default"]
    before = settings["PASSWORD"]
    settings["PASSWORD"] = password = "a b'c\\d@e/f:g%20"
    try:
        assert conninfo_to_dict(dsn_of("default"))["password"] == password
    finally:
        settings["PASSWORD"] = before


def test_batchq_dsn_overrides_databases(monkeypatch: pytest.MonkeyPatch) -> None:
    with override_settings(BATCHQ_DSN="host=of-the-project"):
        assert settings_for(None, {}).require_dsn() == "host=of-the-project"
        monkeypatch.setenv("BATCHQ_DSN", "host=of-the-environment")
        assert settings_for(None, {}).require_dsn() == "host=of-the-environment"
        assert settings_for("default", {}).require_dsn() == dsn_of("default")


@pytest.mark.parametrize(("alias", "words"), [("nowhere", "DATABASES has no 'nowhere'"), ("other", "is sqlite")])
def test_a_database_that_will_not_do_is_refused(alias: str, words: str) -> None:
    with pytest.raises(CommandError, match=words):
        call_command("batchq_worker", database=alias)


def test_the_queues_are_those_of_tasks_unless_others_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings_for(None, {}).queues == ("default", "mail")
    monkeypatch.setenv("BATCHQ_QUEUES", "one,two")
    assert settings_for(None, {}).queues == ("one", "two")
    found = settings_for(None, {"queues": ["mail:3", "other"], "concurrency": "2"})
    assert (found.queues, found.queue_slots, found.concurrency) == (("mail", "other"), {"mail": 3}, 2)


def test_backends_in_several_databases_need_a_choice() -> None:
    two = {name: {"BACKEND": BACKEND, "OPTIONS": {"database": name}} for name in ("default", "other")}
    with override_settings(TASKS=two), pytest.raises(ConfigError, match="choose one with --database"):
        default_alias()
    with override_settings(TASKS={"default": two["other"]}):
        assert default_alias() == "other"


# ------------------------------------------------------------------------------------------------------------ the tasks


@override_settings(BATCHQ_TASK_MODULES=[f"{HERE}.more_tasks"], BATCHQ_APP=f"{HERE}.other_app:app")
def test_the_app_has_every_task_and_the_handlers_of_batchq_app() -> None:
    kinds = load_project_app().handlers.keys()
    assert kinds >= {
        "plain",
        f"{HERE}.tasks.add",
        f"{HERE}.tasks.of_another_backend",
        f"{HERE}.more_tasks.of_another_module",
    }
    assert load_project_app().handlers.keys() == kinds, "the project's own app is left as it is"


def test_only_tasks_that_can_be_imported_are_served() -> None:
    name = "a_function_that_is_no_task_by_its_path"
    function = type(tasks.add.func)(tasks.add.func.__code__, tasks.add.func.__globals__, name)
    function.__module__, function.__qualname__ = tasks.__name__, name
    tasks.task(function)
    assert f"{HERE}.tasks.{name}" not in load_project_app().handlers


def test_a_project_without_tasks_is_told_what_to_do() -> None:
    with override_settings(TASKS={}), pytest.raises(ConfigError, match="the project has no tasks: TASKS needs"):
        load_project_app()


WITHOUT_THE_INTERFACE = """
import sys
sys.modules["django.tasks"] = sys.modules["django_tasks"] = None  # as if neither were installed
import django
from django.conf import settings
database = {"ENGINE": "django.db.backends.postgresql", "NAME": "any"}
settings.configure(INSTALLED_APPS=["batchq.contrib.django"], DATABASES={"default": database}, TASKS=eval(sys.argv[1]),
                   BATCHQ_APP="batchq.demo.tasks:app")
django.setup()
from batchq.contrib.django.project import load_project_app
try:
    print(list(load_project_app().handlers))
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


@pytest.mark.parametrize(
    ("configured", "said"),
    [
        ({}, "['index_file']"),
        ({"default": {"BACKEND": BACKEND}}, "ConfigError: batchq's task backend needs Django 6"),
    ],
)
def test_without_the_interface_only_tasks_do_not_work(configured: dict[str, Any], said: str) -> None:
    command = [sys.executable, "-c", WITHOUT_THE_INTERFACE, repr(configured)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=allowed(60), check=False)
    assert done.stdout.startswith(said), done.stdout + done.stderr
    assert not configured or "pip install django-tasks" in done.stdout


# --------------------------------------------------------------------------------------------------------- the commands


def manage(dsn: str, *arguments: str) -> tuple[int, str]:
    """Run a command of the project as a program, on a database; return its exit code and its output."""
    command = [sys.executable, "-m", "django", *arguments]
    environment = os.environ | {"BATCHQ_DSN": dsn, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=allowed(60), cwd=ROOT, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_batchq_worker_runs_tasks_with_the_options_of_a_worker(db: str) -> None:
    here, there = tasks.add.enqueue(1), tasks.add.using(queue_name="mail").enqueue(2)
    options = ("--queue", "mail", "--concurrency", "2", "--lease-seconds", "30", "--log-format", "json")
    code, said = manage(db, "batchq_worker", "--drain", *options)
    assert code == 0, said
    assert '"event": "worker stopped"' in said
    here.refresh()
    there.refresh()
    assert (here.status, there.return_value) == ("READY", 2)
    with pytest.raises(CommandError, match="BATCHQ_CONCURRENCY"):
        call_command("batchq_worker", "--concurrency", "0")


def test_batchq_worker_says_what_is_wrong_in_one_line(empty_database: str, server: Server) -> None:
    code, said = manage(server.dsn(empty_database), "batchq_worker", "--drain")
    assert code == 1
    assert "CommandError: the database has no batchq schema; run: batchq migrate" in said
    assert "Traceback" not in said


def test_a_worker_without_slots_replaces_itself_and_stops_by_a_signal(db: str, sql: Sql) -> None:
    stuck = tasks.stick.enqueue()
    options = ("--concurrency", "1", "--shutdown-seconds", "1", "--queue", "default")
    command = [sys.executable, "-m", "django", "batchq_worker", *options]
    environment = os.environ | {"BATCHQ_DSN": db, "PYTHONPATH": str(ROOT)}
    worker = subprocess.Popen(command, env=environment, cwd=ROOT)
    try:
        wait_until(lambda: sql("SELECT 1 FROM batchq.all_batches WHERE status = 'processing'"), 20, "it to begin")
        tasks.add.enqueue(1)
        assert ended(sql, 1) == [1], "its one slot is lost to the first task"
    finally:
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(allowed(20)) == 0
    failed = tasks.stick.get_result(stuck.id)
    assert [error.exception_class for error in failed.errors] == [batchq.TimedOut]


def test_batchq_migrate_says_what_it_did(empty_database: str, server: Server, capsys: Capture) -> None:
    use_database(server.dsn(empty_database))
    call_command("batchq_migrate")
    assert "0001_batches" in capsys.readouterr().out
    call_command("batchq_migrate", "--database", "default")
    assert capsys.readouterr().out == "the schema is up to date\n"


def test_the_app_of_the_command_line_is_that_of_the_project() -> None:
    sys.modules.pop("batchq.contrib.django.app", None)
    from batchq.app import load_app

    app = load_app("batchq.contrib.django.app:app")
    assert isinstance(app, batchq.App)
    assert f"{HERE}.tasks.add" in app.handlers


def test_an_unreachable_database_is_said_in_one_line() -> None:
    with override_settings(BATCHQ_DSN="host=127.0.0.1 port=1 password=secret-word"):
        with pytest.raises(CommandError) as caught:
            call_command("batchq_migrate")
        assert "secret-word" not in str(caught.value)
        assert isinstance(caught.value.__cause__, psycopg.Error)
