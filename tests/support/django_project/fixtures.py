"""Django in this process, on a database of each test's own.

A plugin (`pytest -p`) and not a conftest.py, which every run of pytest on tests/ would import.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ["DJANGO_SETTINGS_MODULE"] = "tests.support.django_project.settings"

import django

django.setup()

import psycopg  # noqa: E402
import pytest  # noqa: E402
from django.db import connections  # noqa: E402
from psycopg.conninfo import conninfo_to_dict  # noqa: E402

from batchq.contrib.django.project import load_project_app  # noqa: E402
from batchq.testing import drain  # noqa: E402

NAMES = {"dbname": "NAME", "user": "USER", "password": "PASSWORD", "host": "HOST", "port": "PORT"}


def use_database(dsn: str, **more: Any) -> None:
    """Let Django use a database from now on."""
    given = conninfo_to_dict(dsn)
    connections.databases["default"].update({NAMES[name]: value for name, value in given.items() if name in NAMES})
    connections.databases["default"].update(more)


@pytest.fixture(autouse=True)
def db(admin_dsn: str) -> Iterator[str]:
    """Let Django use the test's database; return its DSN. Straight, since Django sets its session's state."""
    use_database(admin_dsn, CONN_MAX_AGE=0)
    yield admin_dsn
    connections.close_all()


@pytest.fixture
def run(db: str) -> Callable[..., None]:
    """Return what runs all ready batches of the project."""
    return lambda **settings: drain(
        load_project_app(), db, raises=False, **{"queues": "default,mail,any queue"} | settings
    )


@pytest.fixture
def sql(db: str) -> Iterator[Callable[..., list[Any]]]:
    """Return what runs a statement on a connection of its own, and returns the rows."""
    with psycopg.connect(db, autocommit=True) as conn:
        yield lambda text, *values: ((found := conn.execute(text, values)).description and found.fetchall()) or []
