"""The app of a Django project, for the command line: ``batchq workers 4 batchq.contrib.django.app:app``.

DJANGO_SETTINGS_MODULE and BATCHQ_DSN must be set.
"""

import django

django.setup()

from batchq.contrib.django.project import load_project_app  # noqa: E402

app = load_project_app()
