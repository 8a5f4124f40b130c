"""A dump of a busy database goes on where it is restored: what was claimed is rescued when its leases run out."""

import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

import batchq
from batchq.postgres import embedded
from tests.e2e import apps
from tests.support.alone import run_alone
from tests.support.processes import Processes
from tests.support.servers import Server
from tests.support.steps import step
from tests.support.waiting import wait_until

APP = "tests.e2e.apps:app"
QUICK, GATED = 300, 6


@pytest.fixture
def admin(admin_dsn: str) -> Iterator[psycopg.Connection[Any]]:
    """Return a connection past every pooler, to a database that has the tables of the handlers."""
    with psycopg.connect(admin_dsn, autocommit=True) as conn:
        conn.execute(apps.TABLES)
        yield conn


def program(name: str, server_version: int) -> str:
    """Return the path of a program that is no older than the server: the system's, or the wheel's."""
    debian = Path("/usr/lib/postgresql").glob(f"*/bin/{name}")
    found = [*map(str, sorted(debian)), shutil.which(name), str(embedded.wheel_programs() / name)]
    for path in filter(None, found):
        said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
        if said and int(said.split()[2].partition(".")[0]) >= server_version // 10_000:
            return path
    raise FileNotFoundError(f"no {name} for a server of version {server_version}: apt-get install postgresql-client")


def run(*words: str) -> None:
    """Run a program to its end. It must exit 0."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def statuses(conn: psycopg.Connection[Any]) -> dict[str, int]:
    """Return how many batches there are of each status."""
    return dict(conn.execute("SELECT status, count(*) FROM batchq.batches GROUP BY status").fetchall())


def test_a_dump_of_a_busy_database_goes_on_where_it_is_restored(
    admin: psycopg.Connection[Any], admin_dsn: str, empty_database: str, server: Server, tmp_path: Path
) -> None:
    step("given a worker with some batches in hand, some finished, some waiting, one import half-way")
    for seq in range(GATED):
        batchq.enqueue(admin, "gated", {"seq": seq}, max_attempts=2)
    half_way = batchq.enqueue(admin, "gated_items", items=[0, 1, 2, 3], max_attempts=2)
    batchq.enqueue_many(admin, "note", [{"seq": 1000 + seq} for seq in range(QUICK)])
    batchq.enqueue_many(admin, "note", [{"seq": 2000}], delay_seconds=3600)
    admin.execute("INSERT INTO gates VALUES ('item 0'), ('item 1')")
    with Processes(admin_dsn, APP) as processes:
        worker = processes.worker(lease_seconds=5, concurrency=GATED + 2, shutdown_seconds=0)
        wait_until(lambda: statuses(admin).get("completed") == QUICK, 60, "the brief ones to end")
        done = "SELECT items_done FROM batchq.batches WHERE id = %s"
        wait_until(lambda: (admin.execute(done, [half_way]).fetchone() or ())[0] == 2, 30, "half of the import")
        assert statuses(admin) == {"completed": QUICK, "processing": GATED + 1, "pending": 1}

        step("when the database is dumped meanwhile, and restored into another one")
        dump = str(tmp_path / "dump")
        run(program("pg_dump", admin.info.server_version), "--format=custom", f"--file={dump}", admin_dsn)
        restored_dsn = server.dsn(empty_database)
        run(program("pg_restore", admin.info.server_version), "--exit-on-error", f"--dbname={restored_dsn}", dump)
        worker.stop(60)

    step("then it has the same batches, and those that were in hand belong to a worker that is not there")
    with psycopg.connect(restored_dsn, autocommit=True) as restored:
        assert statuses(restored) == {"completed": QUICK, "processing": GATED + 1, "pending": 1}
        held = restored.execute("SELECT DISTINCT claimed_by FROM batchq.batches WHERE status = 'processing'").fetchall()
        assert [f"-{worker.pid}-" in name for (name,) in held] == [True]

        step("and a worker there takes them back when their leases run out, and goes on from the checkpoint")
        restored.execute("INSERT INTO gates SELECT 'gated ' || attempt FROM generate_series(1, 3) AS attempt")
        restored.execute("INSERT INTO gates VALUES ('item 2'), ('item 3')")
        with Processes(restored_dsn, APP) as processes:
            other = processes.worker(lease_seconds=5)
            expected = {"completed": QUICK + GATED + 1, "pending": 1}
            wait_until(lambda: statuses(restored) == expected, 60, "everything to end but what is scheduled")
            rescued = {line["batch_id"] for line in other.lines("batch rescued")}
            assert other.stop(60) == 0
        assert len(rescued) == GATED + 1
        row = restored.execute(
            "SELECT attempt, items_done, errors -> 0 ->> 'error' ~ 'worker died' FROM batchq.batches WHERE id = %s",
            [half_way],
        ).fetchone()
        assert row == (2, 4, True)
        ledger = Counter(row[0] for row in restored.execute("SELECT seq FROM ledger"))
        assert ledger == Counter([*range(GATED), *range(1000, 1000 + QUICK)])

        step("and new batches get new ids, and partitions for the next days are there")
        newest = restored.execute("SELECT max(id) FROM batchq.batches").fetchone()
        assert newest
        assert (batchq.enqueue(restored, "note", {"seq": 1}) or 0) > newest[0]
        ahead = "SELECT count(*) FROM pg_partition_tree('batchq.batches_finished') WHERE isleaf"
        assert (restored.execute(ahead).fetchone() or (0,))[0] > 5


def test_a_lease_cannot_be_longer_after_a_restore_than_it_was(
    admin: psycopg.Connection[Any], admin_dsn: str, server: Server
) -> None:
    step("given a batch whose lease ends long after the restore, as after a restore to an earlier time")
    batchq.enqueue(admin, "note", {"seq": 1}, max_attempts=2)
    admin.execute("""
        UPDATE batchq.batches_live SET status = 'processing', attempt = 1, claimed_by = 'gone', claimed_at = now(),
          claim_token = gen_random_uuid(), lease_expires_at = now() + interval '1 day'
    """)
    step("when what the operations page says is done, then it goes on at once")
    admin.execute("UPDATE batchq.batches_live SET lease_expires_at = now() WHERE status = 'processing'")
    with Processes(admin_dsn, APP) as processes:
        worker = processes.worker(lease_seconds=2)
        wait_until(lambda: statuses(admin) == {"completed": 1}, 30, "completion")
        assert worker.stop() == 0


if __name__ == "__main__":
    run_alone(__file__)
