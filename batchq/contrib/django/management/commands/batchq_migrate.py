"""``manage.py batchq_migrate``: create or update batchq's schema."""

from typing import Any

import psycopg
from django.core.management.base import BaseCommand, CommandError

from batchq.contrib.django.project import settings_for
from batchq.errors import BatchqError
from batchq.postgres import migrate
from batchq.postgres.connections import connect
from batchq.postgres.server_checks import check_server, check_writable


class Command(BaseCommand):
    """The command; Django makes it."""

    help = "Create or update batchq's schema. Django's own migrate does not touch it."

    def add_arguments(self, parser: Any) -> None:
        """Add --database."""
        parser.add_argument("--database", help="alias in DATABASES (default: BATCHQ_DSN, else that of TASKS)")

    def handle(self, *_: Any, **options: Any) -> None:
        """Apply the missing migrations, each in its own transaction. Raises CommandError."""
        try:
            dsn = settings_for(options["database"], {}).require_dsn(for_migration=options["database"] is None)
            with connect(dsn) as conn:
                check_server(conn)
                check_writable(conn)
                applied = migrate.apply_all(conn)
        except (BatchqError, psycopg.Error) as error:
            raise CommandError(str(error)) from error
        if options["verbosity"] > 0:
            self.stdout.write(f"applied {', '.join(applied)}" if applied else "the schema is up to date")
