"""Django's commands for the shop; PGDATABASE, PGHOST, PGUSER and PGPASSWORD name its database."""

import os

from django.core.management import execute_from_command_line

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "shop.settings")
execute_from_command_line()
