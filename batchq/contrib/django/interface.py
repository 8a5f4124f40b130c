"""Django's interface of tasks: `django.tasks` of Django 6, or the package django-tasks with Django 5.2."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from django.core.exceptions import ImproperlyConfigured


def name_of_interface() -> str:
    """Return the name of the module that has the interface. Raises ImproperlyConfigured."""
    for name in ("django.tasks", "django_tasks"):
        if find_spec(name) is not None:
            return name
    raise ImproperlyConfigured(
        "batchq's task backend needs Django 6, or Django 5.2 with the package django-tasks: pip install django-tasks"
    )


_name = name_of_interface()
_base: Any = import_module(f"{_name}.base")
_exceptions: Any = import_module(f"{_name}.exceptions")

BaseTaskBackend: Any = import_module(f"{_name}.backends.base").BaseTaskBackend
signals: Any = import_module(f"{_name}.signals")
task_backends: Any = import_module(_name).task_backends
Task: Any = _base.Task
TaskContext: Any = _base.TaskContext
TaskError: Any = _base.TaskError
TaskResult: Any = _base.TaskResult
TaskResultStatus: Any = _base.TaskResultStatus
TaskResultDoesNotExist: type[Exception] = _exceptions.TaskResultDoesNotExist
# The backport gives both names that end in Error.
InvalidTask: type[Exception] = getattr(_exceptions, "InvalidTask", None) or _exceptions.InvalidTaskError
InvalidTaskBackend: type[Exception] = (
    getattr(_exceptions, "InvalidTaskBackend", None) or _exceptions.InvalidTaskBackendError
)
_json_module = "django.utils.json" if _name == "django.tasks" else "django_tasks.utils"
normalize_json: Any = import_module(_json_module).normalize_json
