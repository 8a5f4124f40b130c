"""The example for Django runs: migrate, an order in a transaction, a worker process, the result, the admin."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.support.alone import run_alone
from tests.support.markdown import ROOT
from tests.support.servers import Server
from tests.support.waiting import allowed, wait_until

EXAMPLE = ROOT / "docs" / "examples" / "django"
VARIABLES = {"dbname": "PGDATABASE", "host": "PGHOST", "port": "PGPORT", "user": "PGUSER", "password": "PGPASSWORD"}
CLIENT = """
import django
django.setup()
from django.contrib.auth.models import User
from django.test import Client
from shop.models import Order

client = Client(headers={"host": "localhost"})
"""
ORDER = "print(client.post('/order', {'email': 'ann@example.com'}).json()['result'])"
ORDER_THAT_FAILS = """
from unittest.mock import patch
from django.http import Http404
with patch("shop.urls.JsonResponse", side_effect=Http404):
    assert client.post('/order', {'email': 'bob@example.com'}).status_code == 404
print(Order.objects.count())
"""
LOOK = """
client.force_login(User.objects.create_superuser("admin"))
print(client.get('/result/1').json()['status'])
print([order.is_receipt_sent for order in Order.objects.all()])
for page in ("/admin/", "/admin/batchq/batch/", "/admin/batchq/batch/1/change/"):
    answer = client.get(page)
    assert answer.status_code == 200, answer
print("receipt sent to ann@example.com" in answer.text)
"""
LOOK_AT_QUEUE = """
import asyncio
import httpx
from shop.asgi import application
client.force_login(User.objects.get(username="admin"))
cookies = {"sessionid": client.cookies["sessionid"].value}

async def look():
    transport = httpx.ASGITransport(application)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", cookies=cookies) as browser:
        page = (await browser.get("/queue/batches")).text
        print("shop.tasks.send_receipt" in page, "django:admin" in page, (await browser.get("/admin/")).status_code)

asyncio.run(look())
"""


@pytest.fixture
def environment(empty_database: str, server: Server) -> dict[str, str]:
    """Return the variables that the example reads; straight to the server, since Django sets its session's state."""
    given = conninfo_to_dict(server.dsn(empty_database))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "BATCHQ_"))}
    path = os.pathsep.join((str(EXAMPLE), str(ROOT)))
    own = {"PYTHONPATH": path, "DJANGO_SETTINGS_MODULE": "shop.settings"}
    return kept | own | {VARIABLES[name]: str(value) for name, value in given.items() if name in VARIABLES}


@pytest.fixture
def python(environment: dict[str, str]) -> Callable[..., str]:
    """Return what runs Python in the example's directory, to its end, and returns what it printed."""

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=EXAMPLE,
            env=environment,
            capture_output=True,
            text=True,
            timeout=allowed(60),
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_the_example_runs(
    python: Callable[..., str], environment: dict[str, str], empty_database: str, server: Server, tmp_path: Path
) -> None:
    python("manage.py", "migrate", "--run-syncdb")
    assert "0001_batches" in python("manage.py", "batchq_migrate")
    assert python("manage.py", "batchq_migrate") == "the schema is up to date\n"
    python("manage.py", "check", "--fail-level", "WARNING")
    assert python("-c", CLIENT + ORDER) == "1\n"
    assert python("-c", CLIENT + ORDER_THAT_FAILS) == "1\n", "the order and its task are rolled back"
    with (tmp_path / "log").open("w") as log:
        worker = subprocess.Popen(
            [sys.executable, "manage.py", "batchq_worker"], cwd=EXAMPLE, env=environment, stderr=log
        )
    try:
        with psycopg.connect(server.dsn(empty_database), autocommit=True) as conn:
            rows = "SELECT kind, status FROM batchq.all_batches"
            done = [("shop.tasks.send_receipt", "completed")]
            wait_until(lambda: conn.execute(rows).fetchall() == done, 30, "the worker to run the task")
    finally:
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(allowed(30)) == 0, (tmp_path / "log").read_text()
    assert python("-c", CLIENT + LOOK) == "SUCCESSFUL\n[True]\nTrue\n"
    assert python("-c", CLIENT + LOOK_AT_QUEUE) == "True True 200\n"


def test_the_example_is_short() -> None:
    lines = [len(file.read_text(encoding="utf-8").splitlines()) for file in EXAMPLE.rglob("*.py")]
    assert sum(lines) < 120


if __name__ == "__main__":
    run_alone(__file__)
