"""The contract with transaction-mode poolers, kept by real workers that use every style of handler."""

import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg import sql

import batchq
from batchq.postgres.connections import CONNECT_OPTIONS
from batchq.postgres.link import Link
from batchq.postgres.migrate import all_migrations, migrate
from batchq.postgres.statements import claims, maintenance, views
from batchq.postgres.statements.verbs import call_verb
from batchq.testing import running_worker
from tests.e2e import apps
from tests.support import supasim
from tests.support.alone import run_alone
from tests.support.poolers import PgBouncer
from tests.support.processes import Processes
from tests.support.servers import Server
from tests.support.steps import step
from tests.support.supasim import SupaSim
from tests.support.through import WAYS
from tests.support.waiting import wait_until

APP = "tests.e2e.apps:app"
POOLERS = ["pgbouncer-a", "pgbouncer-b", "sim"]


@pytest.fixture
def admin(admin_dsn: str) -> Iterator[psycopg.Connection[Any]]:
    """Return a connection past every pooler, to a database that has the tables of the handlers."""
    with psycopg.connect(admin_dsn, autocommit=True) as conn:
        conn.execute(apps.TABLES)
        yield conn


@contextmanager
def pooled(pooler: str, server: Server, dbname: str) -> Iterator[str]:
    """Give a DSN through a pooler of its own; check at the end that no rule was broken and nothing is held."""
    with WAYS[pooler](server) as way, way(dbname) as dsn:
        yield dsn


def enqueue_every_style(dsn: str) -> None:
    """Enqueue, through the pooler, batches of every kind of handler; also by COPY, and with a unique key."""
    with psycopg.connect(dsn, **CONNECT_OPTIONS) as conn:
        for kind in ("quick", "note", "note_async"):
            batchq.enqueue_many(conn, kind, [{"seq": seq} for seq in range(50)])
        for kind in ("chunks", "items", "async_transactional_items", "async_chunks"):
            batchq.enqueue_many(conn, kind, items=range(100, 400), items_per_batch=100)
        for kind in ("plain_items", "async_items"):
            batchq.enqueue(conn, kind, items=[-1, *range(50)], max_attempts=2)
            batchq.enqueue(conn, kind, items=[-1, *range(50)], max_attempts=1, max_failed_items=1)
        batchq.enqueue(conn, "flaky", {"failures": 1}, unique_key="one")
        assert batchq.enqueue(conn, "flaky", {"failures": 1}, unique_key="one") is None


def statuses(conn: psycopg.Connection[Any]) -> dict[str, int]:
    """Return how many batches there are of each status."""
    return dict(conn.execute("SELECT status, count(*) FROM batchq.all_batches GROUP BY status").fetchall())


EXPECTED = {"completed": 3 * 50 + 4 * 3 + 2 + 1, "failed": 2}


def check_every_style(admin: psycopg.Connection[Any]) -> None:
    """Wait until everything is worked; fail unless each row is there once."""
    wait_until(lambda: statuses(admin) == EXPECTED or None, 30, f"{EXPECTED}, not {statuses(admin)}")
    ledger = Counter(row[0] for row in admin.execute("SELECT seq FROM ledger"))
    assert ledger == Counter([*range(50), *range(50), *[seq for seq in range(100, 400) for _ in range(4)]])


# Every style, through every pooler


@pytest.mark.parametrize("pooler", POOLERS)
def test_every_style_of_handler_keeps_the_contract(
    pooler: str, server: Server, database: str, admin: psycopg.Connection[Any], admin_dsn: str
) -> None:
    step("given batches of every style of handler, enqueued through %s", pooler)
    with pooled(pooler, server, database) as dsn, Processes(dsn, APP, handlers_dsn=admin_dsn) as processes:
        enqueue_every_style(dsn)
        step("when a worker works them and is stopped, and a person looks, retries and cancels")
        worker = processes.worker(lease_seconds=1)
        check_every_style(admin)
        failed = str(admin.execute("SELECT id FROM batchq.status WHERE status = 'failed'").fetchall()[0][0])
        commands = [["status"], ["show", failed], ["cancel", failed], ["check"], ["prune"], ["monitor", "--until-done"]]
        for command in commands:
            code = 1 if command[0] == "cancel" else 0  # what has failed cannot be cancelled any more
            assert processes.command(*command).popen.returncode == code, command
        assert worker.stop() == 0
        assert worker.lines("database error") == []
    step("then no rule was broken, no backend is held, and none has a prepared statement")


def test_nothing_is_held_while_a_worker_is_idle(
    pgbouncer: PgBouncer, database: str, admin: psycopg.Connection[Any], admin_dsn: str
) -> None:
    step("given an idle worker that has worked every style of handler")
    dsn = pgbouncer.dsn(database)
    enqueue_every_style(dsn)
    with Processes(dsn, APP, handlers_dsn=admin_dsn) as processes:
        worker = processes.worker()
        check_every_style(admin)
        step("when PgBouncer is asked 50 times, then its backends are free but for the moments of a poll")
        held = [pgbouncer.sv_active(database) for _ in range(50)]
        assert held.count(0) >= 35, held
        pgbouncer.check_settled(database)
        assert worker.stop() == 0


def test_a_worker_never_pins_the_only_backend(
    server: Server, database: str, admin: psycopg.Connection[Any], admin_dsn: str
) -> None:
    step("given a pooler with a single backend, a worker with every style of handler, and another client")
    with PgBouncer(server, default_pool_size=1, min_pool_size=1) as bouncer:
        dsn = bouncer.dsn(database)
        enqueue_every_style(dsn)
        with Processes(dsn, APP, handlers_dsn=admin_dsn) as processes, psycopg.connect(dsn, **CONNECT_OPTIONS) as other:
            worker = processes.worker()
            step("when both use it, then the other client never waits for long")
            waits = []
            while statuses(admin) != EXPECTED:
                started = time.monotonic()
                other.execute("SELECT 1")
                waits.append(time.monotonic() - started)
                assert sum(waits) < 30, statuses(admin)
            step("%s answers, the slowest after %.2f s", len(waits), max(waits))
            assert sorted(waits)[-2] < 1, "but once, when this machine itself stood still"
            assert max(waits) < 3
            assert worker.stop() == 0
            assert worker.lines("database error") == []
        wait_until(lambda: bouncer.sv_active(database) == 0, 1, "a free backend")


# Many workers, few backends, few clients


def test_jobs_of_a_second_hold_no_backend(admin: psycopg.Connection[Any], admin_dsn: str) -> None:
    step("given 2 backends, and 3 workers with 12 threads, whose jobs take a second")
    batchq.enqueue_many(admin, "nap", [{}] * 24)
    with SupaSim(admin_dsn, pool_size=2, checkout_timeout_seconds=0.5) as sim, Processes(sim.dsn(), APP) as processes:
        workers = [processes.worker("--drain", concurrency=4, is_started=False) for _ in range(3)]

        step("then they work at the same time, and nobody waits for a backend in vain")
        assert [worker.wait(20) for worker in workers] == [0, 0, 0]
        assert statuses(admin) == {"completed": 24}
        assert [worker.lines("database error") for worker in workers] == [[], [], []]
        assert sim.settled() == []


def test_a_worker_that_finds_no_room_at_the_pooler_waits_and_recovers(
    admin: psycopg.Connection[Any], sim: SupaSim, admin_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step("given a worker whose pooler takes no more clients (EMAXCONN), and has dropped its connections")
    tries = count_refusals(sim, monkeypatch)
    with Processes(sim.dsn(), APP, handlers_dsn=admin_dsn) as processes:
        worker = processes.worker(lease_seconds=2)
        sim.max_clients = 0
        sim.drop_clients()
        line = worker.wait_for("database error")
        assert "connection" in line["error"]

        step("then it backs off instead of hammering, and does not end")
        began, before = time.monotonic(), len(tries)
        wait_until(lambda: time.monotonic() - began > 2, 5, "time to hammer")
        step("it tried %s times in 2 s", len(tries) - before)
        assert 0 < len(tries) - before < 40
        assert worker.is_running

        step("when there is room again, then it goes on")
        sim.max_clients = 100
        batchq.enqueue_many(admin, "note", [{"seq": seq} for seq in range(20)])
        batchq.enqueue_many(admin, "note_async", [{"seq": seq} for seq in range(20)])
        began = time.monotonic()
        wait_until(lambda: statuses(admin) == {"completed": 40}, 10, "the batches to be worked")
        step("after %.2f s", time.monotonic() - began)
        assert worker.stop() == 0


def count_refusals(sim: SupaSim, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the list that gets the time of each connection that the simulator refuses from now on."""
    refused: list[float] = []
    refuse = supasim.Client._refuse

    async def counting(client: supasim.Client, code: str, text: str) -> None:
        refused.append(time.monotonic())
        await refuse(client, code, text)

    monkeypatch.setattr(supasim.Client, "_refuse", counting)
    return refused


# Claims


@pytest.mark.parametrize("pooler", POOLERS)
def test_two_claimers_through_a_pooler_claim_disjoint_batches(
    pooler: str, server: Server, database: str, admin: psycopg.Connection[Any]
) -> None:
    batchq.enqueue_many(admin, "quick", [{"seq": seq} for seq in range(1000)])
    with pooled(pooler, server, database) as dsn:
        links = [Link(dsn, 5) for _ in range(2)]
        step("given a claim that has not committed yet, then another one passes it over, and does not wait")
        with links[0].transaction() as first:
            held = claim(first)
            with links[1].transaction() as second:
                others = claim(second)
        assert len(held) == len(others) == 10
        assert held & others == set()

        step("when two claimers claim the rest at the same time, then each batch is claimed once")
        with ThreadPoolExecutor(2) as executor:
            claimed = [batch_id for found in executor.map(claim_all, links) for batch_id in found]
        assert len(claimed) == len(set(claimed)) == 980
        for link in links:
            link.close()
    assert admin.execute("SELECT DISTINCT status, attempt FROM batchq.all_batches").fetchall() == [("processing", 1)]


def claim(conn: psycopg.Connection[Any]) -> set[int]:
    """Claim 10 batches; return their ids."""
    statement = claims.claim("default", 0, ["quick"], 10, "worker", uuid.uuid4(), 60)
    return {row[0] for row in conn.execute(*statement)}


def claim_all(link: Link) -> list[int]:
    """Claim until nothing is left; return the ids."""
    claimed: list[int] = []
    while True:
        found = link.run(claims.claim("default", 0, ["quick"], 10, "worker", uuid.uuid4(), 60))
        if not found:
            return claimed
        claimed += [row[0] for row in found]


# Migrations, names


@pytest.mark.parametrize("pooler", POOLERS)
def test_two_migrators_at_once_through_a_pooler_migrate_once(pooler: str, server: Server, empty_database: str) -> None:
    step("given a database without our schema, and two migrators that begin at the same time, through %s", pooler)
    with pooled(pooler, server, empty_database) as dsn:
        barrier = threading.Barrier(2)
        applied: list[str] = []

        def run() -> None:
            barrier.wait()
            applied.extend(migrate(dsn))

        pair = [threading.Thread(target=run, daemon=True) for _ in range(2)]
        for thread in pair:
            thread.start()
        for thread in pair:
            thread.join(10)
        assert not any(thread.is_alive() for thread in pair), "a migrator waits for ever"

    step("then each migration was applied by one of them")
    assert sorted(applied) == [f"{migration.version:04}_{migration.name}" for migration in all_migrations()]
    with psycopg.connect(server.dsn(empty_database), autocommit=True) as conn:
        count = conn.execute("SELECT count(*) FROM batchq.migrations").fetchone()
    assert count == (len(applied),)


def test_an_empty_search_path_is_enough(admin: psycopg.Connection[Any], server: Server, database: str) -> None:
    step("given a database whose search_path is empty, as a pooler may leave it")
    admin.execute(sql.SQL("ALTER DATABASE {} SET search_path TO ''").format(sql.Identifier(database)))
    app = batchq.App()

    @app.handler("one", backoff=batchq.Backoff(0, 0))
    def one(batch: batchq.Batch) -> None:
        batch.checkpoint(1)
        if batch.attempt == 1:
            raise RuntimeError("again")

    @app.item_handler("many", backoff=batchq.Backoff(0, 0))
    async def many(item: int) -> None:
        if item < 0:
            raise ValueError(item)

    dsn = server.dsn(database)
    with psycopg.connect(dsn, **CONNECT_OPTIONS) as conn:
        assert conn.execute("SHOW search_path").fetchone() == ('""',)
        batchq.enqueue(conn, "one")
        batch_id = batchq.enqueue(conn, "many", items=[1, -1, 2], max_attempts=2)
        assert batch_id
        step("then enqueue, claim, checkpoint, retry, failed items, finish and the verbs all work")
        with running_worker(app, dsn):
            wait_until(lambda: statuses(conn) == {"completed": 1, "failed": 1}, 10, "both to end")
        assert call_verb(conn, "retry", {"batch_id": batch_id, "whole": True}) == "pending"
        assert call_verb(conn, "cancel", {"batch_id": batch_id, "reason": "enough"}) == "cancelled"
        assert maintenance.prune(conn, 30) == 0
        assert len(views.status_rows(conn, None, None, None, 10)) == 2


if __name__ == "__main__":
    run_alone(__file__)
