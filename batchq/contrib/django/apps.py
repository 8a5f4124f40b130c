"""The Django app: ``"batchq.contrib.django"`` in INSTALLED_APPS."""

from typing import Any

from django.apps import AppConfig
from django.conf import settings
from django.core.management import call_command
from django.db.models.signals import post_migrate


class BatchqConfig(AppConfig):
    """The app ``batchq``: commands, and models that Django's migrations leave alone."""

    name = "batchq.contrib.django"
    label = "batchq"
    verbose_name = "batchq"

    def ready(self) -> None:
        """With BATCHQ_MIGRATE, let ``manage.py migrate`` migrate batchq's schema, too."""
        if getattr(settings, "BATCHQ_MIGRATE", False):
            post_migrate.connect(_migrate, sender=self)


def _migrate(using: str, verbosity: int = 1, **_: Any) -> None:
    from batchq.contrib.django.project import default_alias

    if using == default_alias():
        call_command("batchq_migrate", database=using, verbosity=verbosity)
