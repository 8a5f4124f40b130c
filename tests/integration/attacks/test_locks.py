"""The door: locks. Whoever may log in can hold advisory locks, and whoever may read can hold a table: nobody stops."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from batchq.postgres.migrate import directory, migrate
from batchq.postgres.statements import ledger, maintenance
from tests.component.rows import insert, value, values
from tests.support.alone import run_alone
from tests.support.roles import role_for
from tests.support.steps import step

Conn = psycopg.Connection
NAMES = ("migrations", "limits", "partitions", "positions", "throughput")


@pytest.fixture
def holder(admin_dsn: str) -> Iterator[Conn]:
    """Return a stranger's connection that holds each advisory lock that batchq has ever taken."""
    with role_for(admin_dsn) as dsn, psycopg.connect(dsn, autocommit=True) as conn:
        for name in NAMES:
            conn.execute("SELECT pg_advisory_lock(hashtextextended('batchq.' || %s, 0))", [name])
        yield conn


@pytest.mark.usefixtures("holder")
def test_a_stranger_who_holds_every_advisory_lock_stops_no_maintenance(
    admin_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with role_for(admin_dsn, "worker") as dsn, psycopg.connect(dsn, autocommit=True) as worker:
        worker.execute("SET lock_timeout = '2 s'")
        with worker.transaction():
            assert maintenance.take_maintenance(worker)
            assert maintenance.create_finished_partitions(worker, 9) > 0
            assert maintenance.prune(worker, 30) == 0
            assert maintenance.merge_throughput(worker) == 0
            assert value(worker, "SELECT batchq.move_positions('{default}', '{0}', 60)") is not None
    step("and the owner migrates a schema that is there")
    shutil.copytree(directory(), tmp_path, dirs_exist_ok=True)
    (tmp_path / "9000_more.sql").write_text("SELECT 1;")
    monkeypatch.setattr("batchq.postgres.migrate.directory", lambda: tmp_path)
    began = time.monotonic()
    assert migrate(admin_dsn) == ["9000_more"]
    assert time.monotonic() - began < 5


def test_two_do_not_do_the_same_at_once(conn: Conn, admin_dsn: str) -> None:
    with psycopg.connect(admin_dsn, autocommit=True) as other, conn.transaction():
        assert maintenance.take_maintenance(conn)
        assert not maintenance.take_maintenance(other)
        with conn.transaction():
            ledger.take_migration_lock(conn)
            other.execute("SET lock_timeout = '0.2 s'")
            with pytest.raises(psycopg.errors.LockNotAvailable), other.transaction():
                ledger.take_migration_lock(other)


@pytest.mark.parametrize("duty", ["stranger", "producer", "viewer", "operator"])
def test_nobody_but_a_worker_takes_the_locks_of_maintenance(conn: Conn, admin_dsn: str, duty: str) -> None:
    with (
        role_for(admin_dsn, *([] if duty == "stranger" else [duty])) as dsn,
        psycopg.connect(dsn, autocommit=True) as intruder,
    ):
        for statement in (
            "SELECT batchq.try_lock('partitions')",
            "SELECT batchq.take_lock('partitions')",
            "SELECT FROM batchq.locks FOR UPDATE",
            "SELECT FROM batchq.locks FOR KEY SHARE",
            "LOCK TABLE batchq.locks IN ACCESS SHARE MODE",
            "LOCK TABLE batchq.migrations IN ROW EXCLUSIVE MODE",
            "DELETE FROM batchq.locks",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege), intruder.transaction():
                intruder.execute(statement.encode())
    assert values(conn, "SELECT name FROM batchq.locks ORDER BY name") == list(NAMES[1:])


def test_a_lock_that_is_not_there_is_an_error(conn: Conn) -> None:
    conn.execute("DELETE FROM batchq.locks")
    for call in ("try_lock", "take_lock"):
        with pytest.raises(psycopg.errors.RaiseException, match=r"batchq\.locks has no row 'partitions'"):
            conn.execute(f"SELECT batchq.{call}('partitions')".encode())


def test_a_viewer_locks_no_row_and_no_table_against_a_worker(conn: Conn, admin_dsn: str) -> None:
    insert(conn)
    with role_for(admin_dsn, "viewer") as dsn, psycopg.connect(dsn, autocommit=True) as viewer:
        for strength in ("UPDATE", "NO KEY UPDATE", "SHARE", "KEY SHARE"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                viewer.execute(f"SELECT FROM batchq.batches_live FOR {strength}".encode())
        for mode in ("ROW EXCLUSIVE", "SHARE UPDATE EXCLUSIVE", "SHARE", "EXCLUSIVE", "ACCESS EXCLUSIVE"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege), viewer.transaction():
                viewer.execute(f"LOCK TABLE batchq.batches_live IN {mode} MODE".encode())


if __name__ == "__main__":
    run_alone(__file__)
