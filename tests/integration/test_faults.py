"""Under load, whatever breaks between worker and database: nothing is lost or doubled, and it recovers by itself.

A fault's end is when the database can be reached again; "recovered" is when a batch enqueued after that is done.
"""

import asyncio
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

import batchq
from batchq.postgres.link import Link
from batchq.postgres.statements import claims, endings, leases
from batchq.testing import running_worker
from batchq.worker import claimer
from tests.e2e import apps
from tests.support import supasim
from tests.support.alone import run_alone
from tests.support.poolers import PgBouncer
from tests.support.processes import Process, Processes
from tests.support.servers import Server
from tests.support.steps import step
from tests.support.supasim import SupaSim
from tests.support.waiting import allowed, wait_until

APP = "tests.e2e.apps:app"
DEADLINE_SECONDS = 2
SPARE_SECONDS = 2
SETTINGS = {
    "lease_seconds": 2,
    "database_timeout_seconds": DEADLINE_SECONDS,
    "transaction_timeout_seconds": DEADLINE_SECONDS,
    "concurrency": 4,
    "pool_size": 4,
    "shutdown_seconds": 5,
}
PASSWORD_SECONDS = 15
SEED = 20261124


class Load:
    """Enqueues a few batches of each style each 50 ms, past every pooler; knows afterwards what is missing."""

    KINDS = ("note", "note_async", "quick")

    def __init__(self, admin_dsn: str) -> None:
        self.admin_dsn = admin_dsn
        self.next_seq = 0
        self.committed: set[int] = set()
        self.is_paused = False
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ending.set()
        self.thread.join()

    def run(self) -> None:
        """Enqueue until told to end; connect again when the server was away."""
        while not self.ending.is_set():
            with suppress(psycopg.OperationalError), psycopg.connect(self.admin_dsn, autocommit=True) as conn:
                while not self.ending.wait(0.05):
                    if not self.is_paused:
                        self.enqueue(conn)

    def enqueue(self, conn: psycopg.Connection[Any]) -> None:
        """Enqueue 5 batches of each kind, and one with 20 items, in one transaction."""
        kinds = {kind: self.take(5) for kind in self.KINDS}
        items = self.take(20)
        with conn.transaction():
            for kind, seqs in kinds.items():
                batchq.enqueue_many(conn, kind, [{"seq": seq} for seq in seqs], max_attempts=1000)
            batchq.enqueue(conn, "items", items=items, max_attempts=1000)
        self.committed.update(items, *kinds.values())

    def take(self, count: int) -> list[int]:
        """Return *count* new numbers."""
        self.next_seq += count
        return list(range(self.next_seq - count, self.next_seq))

    def wait_until_worked(self, timeout_seconds: float) -> float:
        """Wait until a batch enqueued from now on is done; return after how many seconds."""
        started, newest = time.monotonic(), self.next_seq

        def is_done() -> bool:
            with psycopg.connect(self.admin_dsn, autocommit=True) as conn:
                found = conn.execute("SELECT FROM ledger WHERE seq > %s LIMIT 1", [newest + 100]).rowcount
            return found > 0

        wait_until(is_done, timeout_seconds, "a batch enqueued after the fault to be done")
        return time.monotonic() - started

    def wait_until_working(self, timeout_seconds: float) -> float:
        """Wait until 50 more rows are in the ledger than now, more than were in hand; return after how many seconds.

        What has piled up meanwhile is older, and worked first.
        """
        with psycopg.connect(self.admin_dsn, autocommit=True) as conn:
            count = "SELECT count(*) FROM ledger"
            started, before = time.monotonic(), (conn.execute(count).fetchone() or (0,))[0]
            more = lambda: (conn.execute(count).fetchone() or (0,))[0] >= before + 50  # noqa: E731
            wait_until(more, timeout_seconds, "more rows in the ledger")
        return time.monotonic() - started

    def wait_until_idle(self) -> None:
        """Wait until nothing is pending or processing. Pause the load before."""
        with psycopg.connect(self.admin_dsn, autocommit=True) as conn:
            wait_until(lambda: statuses(conn) == {"completed"}, 30, "everything to be completed")

    def check(self) -> None:
        """Wait until everything is worked; fail if something is lost or doubled."""
        self.ending.set()
        self.thread.join()
        with psycopg.connect(self.admin_dsn, autocommit=True) as conn:
            wait_until(lambda: statuses(conn) == {"completed"} or None, 30, f"completion, not {statuses(conn)}")
            plain = {
                row[0]
                for row in conn.execute(
                    "SELECT (payload ->> 'seq')::integer FROM batchq.all_batches WHERE kind = 'quick'"
                )
            }
            executed = {row[0] for row in conn.execute("SELECT seq FROM executions")}
            enqueued = {row[0] for row in conn.execute(ENQUEUED)}
            ledger = Counter(row[0] for row in conn.execute("SELECT seq FROM ledger"))
        assert self.committed <= enqueued | plain, "a batch has vanished"
        assert executed >= plain, "a plain handler has not run"
        doubled = [seq for seq, count in ledger.items() if count > 1]
        assert ledger == Counter(enqueued), f"lost: {sorted(enqueued - ledger.keys())}, doubled: {doubled}"
        step("%s batches and items: each row once, nothing lost", len(enqueued | plain))


ENQUEUED = """
SELECT (payload ->> 'seq')::integer FROM batchq.all_batches WHERE kind IN ('note', 'note_async')
UNION ALL
SELECT jsonb_array_elements(items)::integer FROM batchq.all_batches WHERE kind = 'items'
"""


def statuses(conn: psycopg.Connection[Any]) -> set[str]:
    """Return the statuses that there are."""
    return {row[0] for row in conn.execute("SELECT DISTINCT status FROM batchq.all_batches")}


@pytest.fixture
def admin(admin_dsn: str) -> Iterator[psycopg.Connection[Any]]:
    """Return a connection past every pooler, to a database that has the tables of the handlers."""
    with psycopg.connect(admin_dsn, autocommit=True) as conn:
        conn.execute(apps.TABLES)
        yield conn


@pytest.fixture
def load(admin_dsn: str, admin: psycopg.Connection[Any]) -> Iterator[Load]:
    """Return the load, which begins at once."""
    with Load(admin_dsn) as load:
        yield load


@contextmanager
def worker_under_load(dsn: str, load: Load) -> Iterator[Process]:
    """Give a worker that works the load on *dsn*; at the end it must stop gracefully, with everything worked."""
    with Processes(dsn, APP, handlers_dsn=load.admin_dsn) as processes:
        worker = processes.worker(**SETTINGS)
        load.wait_until_worked(10)
        yield worker
        load.check()
        assert worker.stop() == 0, worker.text()[-2000:]


def check_recovery(load: Load, what: str) -> None:
    """Fail unless the worker is back soon after the fault has ended, which is now."""
    seconds = load.wait_until_working(20)
    step("recovered %.2f s after %s", seconds, what)
    assert seconds < allowed(DEADLINE_SECONDS + SPARE_SECONDS)


# The server


def test_a_crash_of_the_server_loses_and_doubles_nothing(
    load: Load, dsn: str, crash_server: Callable[[], None]
) -> None:
    step("given a worker under load")
    with worker_under_load(dsn, load):
        for _ in range(2):
            step("when the server crashes and restarts, then the worker is back soon")
            crash_server()
            check_recovery(load, "the restart of the server")


@pytest.fixture
def slow_wal_writer(admin_dsn: str) -> Iterator[None]:
    """Have what is committed without waiting for the disk stay in memory for 10 s."""
    with psycopg.connect(admin_dsn, autocommit=True) as conn:
        conn.execute("ALTER SYSTEM SET wal_writer_delay = '10s'")
        conn.execute("SELECT pg_reload_conf()")
    yield
    with psycopg.connect(admin_dsn, autocommit=True) as conn:
        conn.execute("ALTER SYSTEM RESET wal_writer_delay")
        conn.execute("SELECT pg_reload_conf()")


def claim_one(link: Link, token: uuid.UUID) -> int:
    """Claim a batch of kind "lost" as a claimer does; return its id."""
    [row] = link.run(claims.claim("default", 0, ["lost"], 1, "worker-1", token, 600), claimer.SETTINGS)
    return int(row[0])


@pytest.mark.usefixtures("slow_wal_writer")
def test_a_claim_that_a_crash_forgets_is_made_again_and_its_token_writes_nothing(
    admin: psycopg.Connection[Any], admin_dsn: str, crash_server: Callable[[], None]
) -> None:
    link = Link(admin_dsn, 10)
    batchq.enqueue(admin, "lost", max_attempts=1)
    forgotten = 0
    for _ in range(5):
        step("given a claim, when the server crashes at once")
        token = uuid.uuid4()
        batch_id = claim_one(link, token)
        crash_server()
        link.close()
        with psycopg.connect(admin_dsn, autocommit=True) as conn:
            held = conn.execute("SELECT status, attempt, claim_token FROM batchq.all_batches").fetchone()
            assert held
            if held[0] == "pending":
                forgotten += 1
                assert held[1] == 0
                step("then it is as if it had never been claimed, and what its worker writes comes to nothing")
                assert link.run(endings.complete("default", [batch_id], [str(token)])) == []
                assert link.run(endings.requeue("default", [endings.Requeue(batch_id, token, None, True)])) == []
                assert leases.leases(link.run(leases.extend("default", [batch_id], [token], 60))).lost
            else:
                claims.release_claim(conn, "default", held[2])
    link.close()
    assert forgotten > 0, "no crash has forgotten a claim, so this test proves nothing"


@pytest.mark.usefixtures("slow_wal_writer")
@pytest.mark.parametrize("keep", [True, False])
def test_what_is_finished_is_finished_after_a_crash(
    admin: psycopg.Connection[Any], admin_dsn: str, crash_server: Callable[[], None], keep: bool
) -> None:
    link = Link(admin_dsn, 10)
    for _ in range(3):
        batchq.enqueue(admin, "lost")
    tokens = [uuid.uuid4() for _ in range(3)]
    ids = [claim_one(link, token) for token in tokens]
    assert len(link.run(endings.complete("default", ids[:1], [str(tokens[0])], keep))) == 1
    assert len(link.run(endings.finish("default", [endings.Finish(ids[1], tokens[1], "failed")]))) == 1
    assert len(link.run(endings.requeue("default", [endings.Requeue(ids[2], tokens[2], 3600, False)]))) == 1
    crash_server()
    link.close()
    with psycopg.connect(admin_dsn, autocommit=True) as conn:
        found = conn.execute("SELECT status, attempt FROM batchq.all_batches ORDER BY id").fetchall()
    assert found == [("completed", 1)] * keep + [("failed", 1), ("pending", 1)]


@pytest.mark.usefixtures("slow_wal_writer")
@pytest.mark.parametrize("style", ["def", "async def"])
def test_a_handler_whose_claim_a_crash_forgets_writes_its_rows_once(
    admin: psycopg.Connection[Any], admin_dsn: str, crash_server: Callable[[], None], style: str
) -> None:
    app, began, gate = batchq.App(), threading.Event(), threading.Event()
    note = "INSERT INTO ledger (seq, batch_id, pid, attempt) VALUES (1, %s, 0, %s)"

    @app.handler("def", backoff=batchq.Backoff(0, 0))
    def write(batch: batchq.Batch) -> None:
        began.set()
        gate.wait(20)
        with batch.transaction() as conn:
            conn.execute(note, [batch.id, batch.attempt])

    @app.handler("async def", backoff=batchq.Backoff(0, 0))
    async def write_async(batch: batchq.Batch) -> None:
        began.set()
        await asyncio.to_thread(gate.wait, 20)
        async with batch.transaction() as conn:
            await conn.execute(note, [batch.id, batch.attempt])

    with running_worker(app, admin_dsn, lease_seconds=60):
        batchq.enqueue_many(admin, style, [{"seq": seq} for seq in range(8)])
        assert began.wait(10)
        crash_server()
        gate.set()
        with psycopg.connect(admin_dsn, autocommit=True) as conn:
            wait_until(lambda: statuses(conn) == {"completed"}, 20, "completion")
            rows = conn.execute("SELECT batch_id, count(*) FROM ledger GROUP BY 1 ORDER BY 1").fetchall()
    assert [count for _, count in rows] == [1] * 8


def test_terminated_backends_lose_and_double_nothing(load: Load, admin_dsn: str) -> None:
    terminate = """
    SELECT count(pg_terminate_backend(pid))
    FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = 'batchq'
    """
    step("given a worker under load, straight on the server")
    with worker_under_load(admin_dsn, load), psycopg.connect(admin_dsn, autocommit=True) as conn:
        step("when all its backends are terminated, 15 times")
        cut = 0
        for _ in range(15):
            cut += one(conn, terminate)
            load.wait_until_worked(10)
        step("%s backends were cut", cut)
        assert cut >= 15


def one(conn: psycopg.Connection[Any], query: str) -> int:
    """Return the one number of *query*."""
    row = conn.execute(query.encode()).fetchone()
    assert row
    return int(row[0])


# The pooler


def test_a_killed_pooler_loses_and_doubles_nothing(load: Load, pgbouncer: PgBouncer, database: str) -> None:
    step("given a worker under load, through PgBouncer")
    with worker_under_load(pgbouncer.dsn(database), load) as worker:
        step("when PgBouncer is killed, is away for a second, and comes back")
        pgbouncer.kill()
        worker.wait_for("database error", service="claimer")
        time.sleep(1)
        pgbouncer.start()
        check_recovery(load, "the restart of the pooler")
    pgbouncer.check_settled(database)


def test_a_frozen_pooler_is_given_up_at_the_deadline(load: Load, pgbouncer: PgBouncer, database: str) -> None:
    step("given a worker under load, through PgBouncer")
    with worker_under_load(pgbouncer.dsn(database), load) as worker:
        step("when PgBouncer stands still while a slot is free, then every thread of it gives up at its deadline")
        load.is_paused = True  # a claimer without a free slot sends nothing, so nothing of it would be late
        load.wait_until_idle()
        pgbouncer.freeze()
        load.is_paused = False
        frozen = time.monotonic()
        try:
            for service in ("claimer", "keeper"):
                wait_for_trouble(worker, service)
                step("%s gave up after %.2f s", service, time.monotonic() - frozen)
            gave_up_after = time.monotonic() - frozen
            wait_until(lambda: time.monotonic() - frozen > 2 * DEADLINE_SECONDS, 10, "a longer freeze")
        finally:
            pgbouncer.thaw()
        check_recovery(load, "the pooler went on")
        assert gave_up_after < allowed(DEADLINE_SECONDS + 1.5)
    pgbouncer.check_settled(database)


def wait_for_trouble(worker: Process, service: str) -> None:
    """Wait until a service of the worker, or one of its duties, says that the database does not answer."""

    def has_said_so() -> bool:
        return any(line["service"].startswith(service) for line in worker.lines("database error"))

    wait_until(has_said_so, DEADLINE_SECONDS + 4, f"the {service} to give up")


def test_a_stop_while_the_pooler_stands_still_ends_in_time(
    pgbouncer: PgBouncer, database: str, admin: psycopg.Connection[Any], admin_dsn: str
) -> None:
    step("given a worker with batches in hand, whose pooler has stood still for longer than its deadline")
    batchq.enqueue_many(admin, "busy", [{"seq": seq, "seconds": 1} for seq in range(20)])
    with Processes(pgbouncer.dsn(database), APP, handlers_dsn=admin_dsn) as processes:
        worker = processes.worker(**SETTINGS | {"shutdown_seconds": 1})
        wait_until(lambda: admin.execute("SELECT FROM executions").rowcount, 10, "a batch to begin")
        pgbouncer.freeze()
        frozen = time.monotonic()
        try:
            wait_until(lambda: time.monotonic() - frozen > DEADLINE_SECONDS + 2, 10, "it to try to connect again")
            assert worker.lines("database error")
            step("when it is stopped, then it gives up, says so, and exits 1")
            began = time.monotonic()
            code = worker.stop(30)
            step("exit code %s after %.1f s", code, time.monotonic() - began)
            assert code == 1
            assert time.monotonic() - began < allowed(1 + 2 * (DEADLINE_SECONDS + 1))
            by_itself, by_its_time_limit = "outcomes not written", "worker exited before all outcomes were written"
            assert worker.lines(by_itself) or worker.lines(by_its_time_limit)
        finally:
            pgbouncer.thaw()

        step("and when the pooler is back, another worker finds every batch")
        other = processes.worker(**SETTINGS)
        wait_until(lambda: statuses(admin) == {"completed"}, 20, "completion")
        assert other.stop() == 0


def test_backends_that_die_without_a_word_lose_and_double_nothing(load: Load, sim: SupaSim) -> None:
    step("given a worker under load, through the simulator of Supavisor")
    dice = random.Random(SEED)
    with worker_under_load(sim.dsn(), load):
        step("when every busy backend dies, 60 times (seed %s)", SEED)
        for _ in range(60):
            time.sleep(dice.uniform(0, 0.05))
            sim.kill_backends(idle=False)
        check_recovery(load, "the last kill")


@pytest.mark.parametrize("carried_out", [False, True], ids=["before-commit", "after-commit"])
def test_a_commit_whose_answer_is_lost_loses_and_doubles_nothing(
    load: Load, sim: SupaSim, monkeypatch: pytest.MonkeyPatch, carried_out: bool
) -> None:
    step("given a worker under load, whose every 9th COMMIT is cut, carried out: %s", carried_out)
    cutter = CommitCutter(monkeypatch, carried_out)
    with worker_under_load(sim.dsn(), load) as worker:
        cutter.every = 9
        wait_until(lambda: cutter.cut >= 40, 20, "40 cuts")
        cutter.every = 0
        step("%s of %s COMMITs were cut", cutter.cut, cutter.seen)
        check_recovery(load, "the last cut")
        assert "lost during COMMIT" in worker.text()
        assert "lost during a transaction" in worker.text()


class CommitCutter:
    """Makes the simulator cut every n-th COMMIT: before the server has it, or after it was carried out.

    Also one that comes in one message with its whole transaction.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, carried_out: bool) -> None:
        self.carried_out = carried_out
        self.every = 0
        self.seen = self.cut = 0
        relay, cutter = supasim.Client._relay, self

        async def cutting(client: supasim.Client, kind: bytes, body: bytes) -> None:
            if kind == b"Q" and body.endswith(b"COMMIT\0") and cutter.is_next():
                await cutter.cut_now(client, kind, body)
            await relay(client, kind, body)

        monkeypatch.setattr(supasim.Client, "_relay", cutting)

    def is_next(self) -> bool:
        """Count a COMMIT; tell whether to cut it."""
        self.seen += 1
        return self.every > 0 and self.seen % self.every == 0

    async def cut_now(self, client: supasim.Client, kind: bytes, body: bytes) -> None:
        """Cut the client off, without a word."""
        self.cut += 1
        backend = client.backend or await client._take_backend()  # a message may be its whole transaction
        if client.answering:
            client.answering.cancel()
            await asyncio.wait([client.answering])
        if self.carried_out:
            backend.writer.write(supasim.message(kind, body))
            await backend.writer.drain()
            while (await supasim.read_message(backend.reader))[0] != b"Z":
                pass
        raise supasim.DisconnectError


# What people do to the database


def test_leases_are_kept_while_the_other_duties_fail(dsn: str, admin_dsn: str, admin: psycopg.Connection[Any]) -> None:
    step("given a lease of 1 s, and a batch that runs")
    batchq.enqueue(admin, "stubborn", {"seq": 1})
    with Processes(dsn, APP, handlers_dsn=admin_dsn) as processes:
        worker = processes.worker(lease_seconds=1)
        wait_until(lambda: admin.execute("SELECT FROM executions").rowcount, 10, "the batch to begin")

        step("when somebody locks batchq.workers for 3 s, which the heartbeat needs")
        with psycopg.connect(admin_dsn) as other:
            other.execute("LOCK TABLE batchq.workers IN ACCESS EXCLUSIVE MODE")
            worker.wait_for("database error", duty="heartbeat")
            began = time.monotonic()
            expired = "SELECT FROM batchq.batches_live WHERE lease_expires_at < now()"
            while time.monotonic() - began < 3:
                assert admin.execute(expired).rowcount == 0, "the lease ran out"
                time.sleep(0.05)

        step("then the batch stays its worker's, and ends well")
        admin.execute("INSERT INTO gates (name) VALUES ('stubborn 1')")
        wait_until(lambda: statuses(admin) == {"completed"}, 10, "completion")
        assert worker.stop() == 0
        assert admin.execute("SELECT attempt, errors FROM batchq.all_batches").fetchall() == [(1, [])]


@pytest.mark.parametrize("commits", [False, True], ids=["held until the end", "committed"])
def test_a_row_that_somebody_has_locked_is_all_that_a_stop_leaves_to_its_lease(
    dsn: str, admin_dsn: str, admin: psycopg.Connection[Any], commits: bool
) -> None:
    step("given a batch that runs, which a person cancels in a transaction that stays open; and then ends")
    held = batchq.enqueue(admin, "stubborn", {"seq": 0})
    with Processes(dsn, APP, handlers_dsn=admin_dsn) as processes, psycopg.connect(admin_dsn) as person:
        worker = processes.worker(concurrency=2, shutdown_seconds=0)
        wait_until(lambda: admin.execute("SELECT FROM executions").rowcount, 10, "the batch to begin")
        person.execute("SELECT batchq.cancel(%s)", [held])
        admin.execute("INSERT INTO gates (name) VALUES ('stubborn 1')")

        step("then the worker says so in seconds, and all others are worked and written")
        batchq.enqueue_many(admin, "quick", [{"seq": seq} for seq in range(1, 500)])
        assert worker.wait_for("outcomes postponed", 5)["batch_ids"] == [held]
        completed = "SELECT count(*) FROM batchq.all_batches WHERE status = 'completed'"
        wait_until(lambda: admin.execute(completed).fetchone() == (499,), 30, "the others to be completed")

        step("and when it is stopped, it is told of that one row only, unless the lock is gone")
        if commits:
            person.commit()
            worker.wait_for("lease lost", batch_id=held)
        assert worker.stop() == (0 if commits else 1)
        left = [line["batch_ids"] for line in worker.lines("outcomes not written")]
        assert left == ([] if commits else [[held]])
        person.rollback()
    assert admin.execute("SELECT count(*), count(DISTINCT seq) FROM executions").fetchone() == (500, 500)
    assert statuses(admin) == {"completed", "cancelled" if commits else "processing"}


def test_a_worker_that_may_not_make_partitions_works_all_the_same(
    database: str, server: Server, admin_dsn: str, admin: psycopg.Connection[Any]
) -> None:
    step("given a worker whose role may not make partitions, and one that is missing")
    newest = admin.execute("SELECT max(relname) FROM pg_class WHERE relname ~ '^finished_[0-9]{8}$'").fetchone()
    assert newest
    admin.execute(sql.SQL("DROP TABLE batchq.{}").format(sql.Identifier(newest[0])))
    role = sql.Identifier(f"worker_of_{database}")
    admin.execute(sql.SQL(ROLE).format(role=role, name=sql.Literal(f"worker_of_{database}")))
    batchq.enqueue(admin, "busy", {"seq": 1, "seconds": 3})
    dsn = make_conninfo(server.dsn(database), user=f"worker_of_{database}", password="x")
    try:
        with Processes(dsn, APP, handlers_dsn=admin_dsn) as processes:
            worker = processes.worker(lease_seconds=1)
            wait_until(lambda: statuses(admin) == {"completed"}, 10, "completion")

            step("then it says so once, and keeps its leases")
            assert worker.stop() == 0
            assert len(worker.lines("maintenance postponed")) == 1
            assert worker.lines("database error") == []
            assert admin.execute("SELECT attempt, errors FROM batchq.all_batches").fetchall() == [(1, [])]
    finally:
        admin.execute(sql.SQL("DROP OWNED BY {role}; DROP ROLE {role}").format(role=role))


ROLE = """
CREATE ROLE {role} LOGIN PASSWORD 'x';
SELECT batchq.grant_duty('worker', {name});
REVOKE EXECUTE ON FUNCTION batchq.create_finished_partitions, batchq.prune FROM {role}
"""


# The end of a worker


def test_an_outcome_on_its_way_to_the_finisher_is_written_before_a_worker_ends(
    dsn: str, admin: psycopg.Connection[Any]
) -> None:
    app = batchq.App()
    ended = threading.Event()

    @app.handler("brief")
    def brief(batch: batchq.Batch) -> None:
        """Do nothing."""

    step("given a worker whose thread takes half a second from the end of a batch to the finisher")
    with running_worker(app, dsn) as worker:
        (lane,) = worker.lanes
        put = lane.ended

        def put_late(*of: Any) -> None:
            ended.set()
            time.sleep(0.5)
            put(*of)

        lane.ended = put_late
        batchq.enqueue(admin, "brief")
        assert ended.wait(10)
        step("when it is stopped in between, then the outcome is written all the same")
    assert admin.execute("SELECT status, attempt FROM batchq.all_batches").fetchall() == [("completed", 1)]


# Log-ins


def test_a_refused_log_in_is_not_hammered(load: Load, admin_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = count_log_ins(monkeypatch)
    with SupaSim(admin_dsn, password="first") as sim, worker_under_load(sim.dsn(), load) as worker:
        step("given a worker under load: %s log-ins", len(asked))
        asked.clear()
        step("when the password is changed and all connections are cut, while nothing more is enqueued")
        load.is_paused = True
        sim.password = "second"
        sim.drop_clients()
        refused = time.monotonic()
        worker.wait_for("database error")
        wait_until(lambda: time.monotonic() - refused > 2, 10, "time to hammer")
        step("then it tried %s times in 2 s", len(asked))
        count = len(asked)
        sim.password = "first"
        worker.wait_for("database recovered", PASSWORD_SECONDS + 10, service="claimer")
        load.is_paused = False
        load.wait_until_worked(10)
        step("and is back by itself %.1f s after the first refusal", time.monotonic() - refused)
        assert 1 <= count <= 3
        assert time.monotonic() - refused < allowed(PASSWORD_SECONDS + SPARE_SECONDS + 2)


def count_log_ins(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the list that gets the time of each log-in at a simulator from now on."""
    asked: list[float] = []
    ask = supasim.Client._ask_password

    async def counting(client: supasim.Client) -> str:
        asked.append(time.monotonic())
        return await ask(client)

    monkeypatch.setattr(supasim.Client, "_ask_password", counting)
    return asked


if __name__ == "__main__":
    run_alone(__file__)
