"""``manage.py batchq_worker``: run the project's tasks until stopped."""

import logging
import os
import sys
from typing import Any

import psycopg
from django.core.management.base import BaseCommand, CommandError

from batchq.cli.leaving import flush, leave
from batchq.cli.signals import StopSignals
from batchq.common import log
from batchq.contrib.django.project import load_project_app, settings_for
from batchq.errors import BatchqError
from batchq.settings import Settings
from batchq.worker import memory
from batchq.worker.worker import Worker

_FLAGS = tuple(name for name in Settings.model_fields if name not in ("dsn", "migration_dsn", "queues"))


class Command(BaseCommand):
    """The command; Django makes it."""

    help = "Run the tasks of the project until SIGTERM, SIGINT or SIGHUP."

    def add_arguments(self, parser: Any) -> None:
        """Add an option for each setting of a worker."""
        parser.add_argument("--database", help="alias in DATABASES (default: BATCHQ_DSN, else that of TASKS)")
        parser.add_argument(
            "--queue",
            action="append",
            metavar="NAME",
            help="queue to serve, NAME or NAME:SLOTS; repeat it for several (default: BATCHQ_QUEUES, else TASKS)",
        )
        parser.add_argument("--drain", action="store_true", help="exit when no batch is ready any more")
        for name in _FLAGS:
            text = (Settings.model_fields[name].description or "").replace("%", "%%")
            parser.add_argument("--" + name.replace("_", "-"), metavar="VALUE", help=text)

    def handle(self, *_: Any, **options: Any) -> None:
        """Run batches until stopped. Raises CommandError if it cannot start, or if an outcome was not written."""
        flags = {name: options[name] for name in _FLAGS} | {"queues": options["queue"]}
        try:
            settings = settings_for(options["database"], flags)
            signals = StopSignals()
            memory.return_large_buffers()
            _configure_logging(settings)
            worker = Worker(load_project_app(), settings, drain=options["drain"])
            signals.follow(worker.stop, worker.stop_now, settings.shutdown_seconds)
            written = worker.run()
        except (BatchqError, psycopg.Error) as error:
            raise CommandError(str(error)) from error
        if worker.wants_replacement:
            flush()
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 (the command is this one)
        if not written:
            raise CommandError("outcomes of batches were not written; after their leases other workers run these again")

    def run_from_argv(self, argv: list[str]) -> None:
        """Run as a program, and exit in time whatever handlers left behind."""
        super().run_from_argv(argv)
        leave(0)


def _configure_logging(settings: Settings) -> None:
    """Send all lines to standard error as batchq does, unless LOGGING has a root handler of the project's own."""
    root = logging.getLogger()
    level, own, root.handlers[:] = root.level, root.handlers[:], []
    log.configure(settings.log_format, settings.log_level)
    if own:
        root.handlers[:] = own
        root.setLevel(level)
