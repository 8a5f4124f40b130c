"""A module that only BATCHQ_TASK_MODULES names."""

from tests.support.django_project.tasks import task


@task(backend="dummy")
def of_another_module() -> str:
    return "found"
