"""The settings of the shop."""

import os
from importlib.util import find_spec

SECRET_KEY = "only for development"  # noqa: S105
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": os.environ.get("PGDATABASE", "shop"),
        "CONN_MAX_AGE": 60,  # a worker keeps its connections
    }
}
TASKS = {"default": {"BACKEND": "batchq.contrib.django.backend.BatchqBackend"}}
INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "batchq.contrib.django",
    "shop",
]
if find_spec("django.tasks") is None:  # Django 5.2
    INSTALLED_APPS.append("django_tasks")
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
PROCESSORS = ("template.context_processors.request", "contrib.auth.context_processors.auth")
PROCESSORS += ("contrib.messages.context_processors.messages",)
OPTIONS = {"context_processors": [f"django.{name}" for name in PROCESSORS]}
TEMPLATES = [{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True, "OPTIONS": OPTIONS}]
ROOT_URLCONF = "shop.urls"
ALLOWED_HOSTS = ["localhost", "127.0.0.1"]
LOGIN_URL = "/admin/login/"
