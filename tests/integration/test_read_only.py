"""A database that only reads for a while, or a server that has become a standby behind the same name."""

from collections.abc import Iterator
from typing import Any

import httpx
import psycopg
import pytest

import batchq
from batchq.cli import main
from batchq.testing import running_worker
from batchq.worker import metrics
from tests.support.batches import await_status, drain, put
from tests.support.servers import free_port
from tests.support.steps import step
from tests.support.waiting import wait_until

Conn = psycopg.Connection[Any]
SECONDS = 20


@pytest.fixture
def admin(admin_dsn: str) -> Iterator[Conn]:
    """Return a superuser's connection that writes whatever the settings say."""
    with psycopg.connect(admin_dsn, autocommit=True, options="-c default_transaction_read_only=off") as conn:
        yield conn


@pytest.fixture
def app() -> batchq.App:
    """Return an app with a handler that does nothing."""
    app = batchq.App()
    app.handler("work")(lambda _: None)
    return app


def readiness(port: int) -> tuple[int, str]:
    """Return what /readyz answers, 0 while nobody listens."""
    try:
        answer = httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False, timeout=30)
    except httpx.ConnectError:
        return 0, ""
    return answer.status_code, answer.text


@pytest.fixture
def only_old_connections_are_read_only(admin: Conn, database: str) -> Iterator[Any]:
    """Return what makes the open connections read-only, as after a failover; those opened from then on write."""

    def fail_over() -> None:
        admin.execute(f"ALTER DATABASE {database} SET default_transaction_read_only = off".encode())
        admin.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        admin.execute("SELECT pg_reload_conf()")

    yield fail_over
    admin.execute("ALTER SYSTEM RESET default_transaction_read_only")
    admin.execute("SELECT pg_reload_conf()")


def test_a_worker_leaves_a_server_that_has_become_read_only_behind_the_same_name(
    admin_dsn: str, admin: Conn, app: batchq.App, only_old_connections_are_read_only: Any
) -> None:
    step("given a worker with open connections to the old server")
    with running_worker(app, admin_dsn) as worker:
        await_status(admin, put(admin, "work"), "completed")
        wait_until(lambda: worker.keeper.link.conn, SECONDS, "the keeper's connection")
        links = [worker.finisher.link, worker.claimer.link, worker.keeper.link]
        old = [link.conn for link in links]
        step("when that becomes read-only, and nothing is there to claim")
        only_old_connections_are_read_only()
        step("then the claimer and the keeper see it, and go to the new server")
        for link, conn in zip(links[1:], old[1:], strict=True):
            wait_until(lambda link=link, conn=conn: link.conn not in (conn, None), SECONDS, "another connection")
        step("and batches are worked")
        await_status(admin, put(admin, "work"), "completed", SECONDS)
        assert links[0].conn not in (old[0], None)


def test_a_database_that_is_read_only_for_a_while_is_named_and_work_goes_on_after_it(
    admin_dsn: str, database: str, admin: Conn, app: batchq.App, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    with running_worker(app, admin_dsn, metrics_port=port):
        await_status(admin, put(admin, "work"), "completed")
        step("given a role or database whose transactions only read, and connections made since")
        admin.execute(f"ALTER DATABASE {database} SET default_transaction_read_only = on".encode())
        admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        batch_id = put(admin, "work")
        step("then /readyz, check, doctor, enqueue and another worker's start say so")
        wait_until(lambda: readiness(port)[0] == 503, SECONDS, "/readyz to say so")
        assert "default_transaction_read_only is on for role postgres (source: database)" in readiness(port)[1]
        remedy = f"run: ALTER DATABASE {database} RESET default_transaction_read_only"
        assert main(["check", "--dsn", admin_dsn]) == 2
        assert remedy in capsys.readouterr().err
        assert main(["doctor", "--dsn", admin_dsn, "--json"]) == 2
        assert remedy in capsys.readouterr().out
        assert main(["enqueue", "work", "--dsn", admin_dsn]) == 1
        assert "read-only" in capsys.readouterr().err
        with pytest.raises(batchq.ConfigError, match="default_transaction_read_only is on"):
            drain(app, admin_dsn)
        step("and when that is taken back, the worker goes on")
        admin.execute(f"ALTER DATABASE {database} RESET default_transaction_read_only".encode())
        await_status(admin, batch_id, "completed", SECONDS)
        wait_until(lambda: readiness(port)[0] == 200, SECONDS, "/readyz to be content")


def test_a_worker_is_not_ready_while_no_write_succeeds(
    admin_dsn: str, admin: Conn, app: batchq.App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "UNWRITTEN_SECONDS", 1.0)
    monkeypatch.setattr("batchq.worker.keeper.HEARTBEAT_SECONDS", 0.2)
    port = free_port()
    with running_worker(app, admin_dsn, metrics_port=port):
        wait_until(lambda: readiness(port)[0] == 200, SECONDS, "a worker that is ready")
        with admin.transaction():
            admin.execute("LOCK TABLE batchq.workers IN SHARE MODE")
            wait_until(lambda: readiness(port)[0] == 503, SECONDS, "/readyz to say so")
            assert readiness(port)[1].startswith("no heartbeat was written for ")
        wait_until(lambda: readiness(port)[0] == 200, SECONDS, "/readyz to be content")
