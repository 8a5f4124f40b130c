"""What batchq takes from a Django project: the database, the queues, and the tasks."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from django.apps import apps
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS, connections
from django.utils.module_loading import autodiscover_modules
from psycopg import pq
from psycopg.conninfo import make_conninfo

from batchq.app import App, load_app
from batchq.errors import ConfigError
from batchq.settings import Settings

if TYPE_CHECKING:
    from batchq.contrib.django.backend import BatchqBackend

# Session state of the ORM's, which is not batchq's own.
_LEFT_OUT = {"options", "client_encoding"}


def backends() -> "list[BatchqBackend]":
    """Return batchq's backends in TASKS; none without TASKS. Raises ConfigError if Django's interface is missing."""
    try:
        from batchq.contrib.django.backend import BatchqBackend
        from batchq.contrib.django.interface import task_backends
    except ImproperlyConfigured as error:
        if getattr(settings, "TASKS", None):
            raise ConfigError(str(error)) from None
        return []
    return [backend for backend in task_backends.all() if isinstance(backend, BatchqBackend)]


def default_alias() -> str:
    """Return the database of the backends, "default" without one. Raises ConfigError if they have several."""
    aliases = {backend.database for backend in backends()} or {DEFAULT_DB_ALIAS}
    if len(aliases) > 1:
        raise ConfigError(f"TASKS has backends in the databases {sorted(aliases)}; choose one with --database")
    return aliases.pop()


def dsn_of(alias: str) -> str:
    """Return the DSN of a database in DATABASES. Raises ConfigError if it is not there or not PostgreSQL."""
    if alias not in connections:
        raise ConfigError(f"DATABASES has no {alias!r}; it has {', '.join(connections)}")
    connection = connections[alias]
    if connection.vendor != "postgresql":
        raise ConfigError(f"DATABASES[{alias!r}] is {connection.vendor}; batchq needs PostgreSQL")
    known = {option.keyword.decode() for option in pq.Conninfo.get_defaults()} - _LEFT_OUT
    given = connection.get_connection_params()
    return make_conninfo("", **{name: value for name, value in given.items() if name in known and value is not None})


def settings_for(alias: str | None, flags: Mapping[str, Any]) -> Settings:
    """Return batchq's settings: the flags, then BATCHQ_* in the environment, then those of the project.

    The project's: BATCHQ_DSN or else the database *alias*, and QUEUES of the backends in TASKS. Raises ConfigError.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    found = Settings.load(**given)
    if alias is not None:
        given["dsn"] = dsn_of(alias)
    elif "dsn" not in found.model_fields_set:
        given["dsn"] = getattr(settings, "BATCHQ_DSN", None) or dsn_of(default_alias())
    if "queues" not in found.model_fields_set and (queues := {name for one in backends() for name in one.queues}):
        given["queues"] = tuple(sorted(queues))
    return Settings.load(**given)


# ------------------------------------------------------------------------------------------------------------ the tasks


def load_project_app() -> App:
    """Return the app of a project: a handler for each of its tasks, and those of the app that BATCHQ_APP names.

    Imports the ``tasks`` modules of INSTALLED_APPS, and those in BATCHQ_TASK_MODULES. Raises ConfigError.
    """
    autodiscover_modules("tasks")
    for name in getattr(settings, "BATCHQ_TASK_MODULES", ()):
        import_module(name)
    name = getattr(settings, "BATCHQ_APP", None)
    app = _copied(load_app(name)) if name else App()
    if found := backends():
        _add_tasks(app, found[0].alias)
    if not app.handlers:
        raise ConfigError(
            "the project has no tasks: TASKS needs a BatchqBackend, and functions with @task belong into the "
            "tasks.py of an app; or set BATCHQ_APP to a batchq.App with handlers"
        )
    return app


def _copied(app: App) -> App:
    return replace(app, handlers=dict(app.handlers), schedules=list(app.schedules))


def _add_tasks(app: App, alias: str) -> None:
    from batchq.contrib.django.results import task_named
    from batchq.contrib.django.running import add_task

    for path in sorted(_paths_of_tasks()):
        if task := task_named(path):  # not one that a function has made, or a test
            add_task(app, task, task.backend if _is_ours(task.backend) else alias)


def _is_ours(alias: str) -> bool:
    return any(backend.alias == alias for backend in backends())


def _paths_of_tasks() -> set[str]:
    """Return the paths of the tasks in the modules just imported, whatever their backend, and of all of ours."""
    from batchq.contrib.django.backend import defined
    from batchq.contrib.django.interface import Task

    return defined | {
        value.module_path for module in _task_modules() for value in vars(module).values() if isinstance(value, Task)
    }


def _task_modules() -> Iterator[Any]:
    names = [f"{config.name}.tasks" for config in apps.get_app_configs()]
    for name in (*names, *getattr(settings, "BATCHQ_TASK_MODULES", ())):
        if name in sys.modules:
            yield sys.modules[name]
