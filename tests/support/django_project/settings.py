"""Its settings; the fixture of each test sets the database."""

from importlib.util import find_spec

OWN_TASKS = find_spec("django.tasks") is not None  # Django 6
SECRET_KEY = "tests"
USE_TZ = True
TIME_ZONE = "Europe/Berlin"
ROOT_URLCONF = "tests.support.django_project.urls"
DATABASES = {
    "default": {"ENGINE": "django.db.backends.postgresql", "NAME": "set by a fixture"},
    "other": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"},
}
INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "batchq.contrib.django",
    "tests.support.django_project",
    *([] if OWN_TASKS else ["django_tasks"]),
]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
TASKS = {
    "default": {"BACKEND": "batchq.contrib.django.backend.BatchqBackend", "QUEUES": ["default", "mail"]},
    "once": {"BACKEND": "batchq.contrib.django.backend.BatchqBackend", "QUEUES": [], "OPTIONS": {"max_attempts": 1}},
    "impatient": {
        "BACKEND": "batchq.contrib.django.backend.BatchqBackend",
        "OPTIONS": {"max_attempts": 1, "timeout_seconds": 1},
    },
    "dummy": {"BACKEND": f"{'django.tasks' if OWN_TASKS else 'django_tasks'}.backends.dummy.DummyBackend"},
}
