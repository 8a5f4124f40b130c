"""Migrations beside work: from every version on, under load by workers of the first one; killed; kept waiting.

A worker's code is in its statements: those here are of the first schema that people have, and name no column that came
later, so that every migration meets a worker that knows nothing of it. Migrations that change what workers use stand in
for those to come.
"""

import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest

from batchq.errors import ConfigError
from batchq.postgres import migrate as migrations
from batchq.postgres.migrate import all_migrations, check_schema, migrate
from tests.support.alone import run_alone
from tests.support.later_migrations import BASE, TO_COME, known
from tests.support.servers import Server
from tests.support.steps import step
from tests.support.waiting import wait_until

Conn = psycopg.Connection[Any]
MOST_WAIT_SECONDS = 0.5  # of a migration, for a lock: so long may it hold up others
SPARE_SECONDS = 1.5  # for a busy machine
FIRST = [migration.version for migration in all_migrations() if migration.version <= BASE]
LATER = [migration.version for migration in all_migrations() if migration.version > BASE]
VERSIONS = [*FIRST, *LATER, *(int(name[:4]) for name in TO_COME)]

LIMITS: LiteralString = """
SELECT set_config('statement_timeout', '15000', true), set_config('lock_timeout', '5000', true)
"""
INSERT: LiteralString = "INSERT INTO batchq.batches (kind, items) VALUES ('k', %(items)s::jsonb) RETURNING id"
CLAIM: LiteralString = """
WITH ready AS (
  SELECT id
  FROM batchq.batches_live
  WHERE queue = 'default' AND status = 'pending' AND priority = 0 AND run_at <= now() AND kind = ANY ('{k}')
  ORDER BY run_at, id
  LIMIT 10
  FOR UPDATE SKIP LOCKED
)
UPDATE batchq.batches_live b
SET status = 'processing', attempt = b.attempt + 1, claimed_by = 'old', claim_token = %(token)s, claimed_at = now(),
    lease_expires_at = now() + interval '60 s'
WHERE b.queue = 'default' AND b.id = ANY (ARRAY(SELECT id FROM ready))
RETURNING b.id, b.items_total, b.items_done
"""
CHECKPOINT: LiteralString = """
UPDATE batchq.batches_live
SET items_done = items_done + 1, lease_expires_at = clock_timestamp() + interval '60 s'
WHERE queue = 'default' AND id = %(id)s AND claim_token = %(token)s
RETURNING id
"""
EXTEND: LiteralString = """
UPDATE batchq.batches_live
SET lease_expires_at = now() + interval '60 s'
WHERE queue = 'default' AND id = ANY (%(ids)s) AND claim_token = %(token)s
RETURNING id
"""
FINISH: LiteralString = """
WITH gone AS (
  DELETE FROM batchq.batches_live b
  WHERE b.queue = 'default' AND b.id = ANY (%(ids)s) AND b.claim_token = %(token)s
  RETURNING b.*
)
INSERT INTO batchq.batches_finished (id, queue, kind, status, payload, items, priority, run_at, unique_key,
  max_attempts, max_failed_items, timeout_seconds, attempt, claimed_by, claimed_at, items_done, items_failed, cursor,
  result, errors, created_at, finished_at)
OVERRIDING SYSTEM VALUE
SELECT id, queue, kind, 'completed', payload, items, priority, run_at, unique_key, max_attempts, max_failed_items,
  timeout_seconds, attempt, claimed_by, claimed_at, items_done, items_failed, cursor, result, errors, created_at, now()
FROM gone
RETURNING id
"""
HEARTBEAT: LiteralString = """
INSERT INTO batchq.workers (id, hostname, pid, version, queues, kinds, concurrency, in_hand, stopping)
VALUES ('old', 'host', 1, '0.1', '{default}', '{k}', 8, 0, false)
ON CONFLICT (id) DO UPDATE SET in_hand = excluded.in_hand, stopping = excluded.stopping, heartbeat_at = now()
"""
CANCEL: LiteralString = "SELECT batchq.cancel(%(id)s, 'not wanted')"
CATALOG: LiteralString = """
SELECT 'relation', c.oid::regclass::text || ' ' || c.relkind::text || coalesce(array_to_string(c.reloptions, ','), '')
FROM pg_class c WHERE c.relnamespace = to_regnamespace('batchq')
UNION ALL
SELECT 'column', format(
  '%s.%s %s %s %s', a.attrelid::regclass, a.attname, a.atttypid::regtype, a.attnotnull, a.attgenerated)
FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
WHERE c.relnamespace = to_regnamespace('batchq') AND NOT a.attisdropped
UNION ALL
SELECT 'constraint', format('%s %s %s %s', conrelid::regclass, conname, convalidated, pg_get_constraintdef(oid))
FROM pg_constraint WHERE connamespace = to_regnamespace('batchq')
UNION ALL
SELECT 'trigger', tgrelid::regclass || ' ' || tgname FROM pg_trigger
WHERE tgrelid IN (SELECT oid FROM pg_class WHERE relnamespace = to_regnamespace('batchq')) AND NOT tgisinternal
UNION ALL
SELECT 'function', oid::regprocedure || ' ' || md5(prosrc) FROM pg_proc WHERE pronamespace = to_regnamespace('batchq')
UNION ALL
SELECT 'migration', version::text FROM batchq.migrations
"""


@pytest.fixture
def dsn(empty_database: str, server: Server) -> str:
    """Return the DSN of a database without the schema, past every pooler: it has more than two sessions at work."""
    return server.dsn(empty_database)


@pytest.fixture
def up_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    """Return what has batchq know the migrations up to a version, and no more; it gives their directory."""

    def know(version: int) -> Path:
        directory = known(tmp_path / f"{version}-{uuid.uuid4().hex}", version)
        monkeypatch.setattr(migrations, "directory", lambda: directory)
        return directory

    return know


def connect(dsn: str) -> Conn:
    """Connect as batchq does."""
    return psycopg.connect(dsn, autocommit=True, prepare_threshold=None)


class OldWork:
    """Clients and a worker of the first version, at work in threads; remembers what they inserted and finished."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.ending = threading.Event()
        self.inserted: list[int] = []
        self.finished: list[int] = []
        self.cancelled: list[int] = []
        self.waits = [0.0]
        self.errors: list[Exception] = []

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Work while the block runs; at its end finish all that was inserted: nothing may be lost, or there twice."""
        threads = [threading.Thread(target=self.repeat, args=[step]) for step in (self.insert, self.work)]
        for thread in threads:
            thread.start()
        try:
            wait_until(lambda: len(self.finished) >= 20 or self.errors, 20, "the old worker to work")
            yield
            more = len(self.finished) + 20
            wait_until(lambda: len(self.finished) >= more or self.errors, 20, "the old worker to go on")
        finally:
            self.ending.set()
            for thread in threads:
                thread.join()
        self.check()

    def repeat(self, do: Callable[[Conn], None]) -> None:
        """Do one thing again and again, and measure how long each takes."""
        try:
            with connect(self.dsn) as conn:
                while not self.ending.wait(0.005):
                    began_at = time.monotonic()
                    do(conn)
                    self.waits.append(time.monotonic() - began_at)
        except Exception as error:
            self.errors.append(error)

    def insert(self, conn: Conn) -> None:
        """Enqueue: one plain batch, one with items; cancel a third."""
        for items in (None, "[1, 2, 3]"):
            self.inserted.append(self.run(conn, INSERT, items=items)[0][0])
        batch_id = self.run(conn, INSERT, items="[1]")[0][0]
        if self.run(conn, CANCEL, id=batch_id) == [("cancelled",)]:
            self.cancelled.append(batch_id)
        else:
            self.inserted.append(batch_id)

    def work(self, conn: Conn) -> None:
        """Claim, save a checkpoint, keep the leases, finish, show life: as a worker does."""
        token = uuid.uuid4()
        rows = self.run(conn, CLAIM, token=token)
        for batch_id, items_total, _ in rows:
            if items_total:
                self.run(conn, CHECKPOINT, id=batch_id, token=token)
        ids = [row[0] for row in rows]
        self.run(conn, EXTEND, ids=ids, token=token)
        self.finished += [row[0] for row in self.run(conn, FINISH, ids=ids, token=token)]
        self.run(conn, HEARTBEAT)

    def run(self, conn: Conn, statement: LiteralString, **parameters: Any) -> list[tuple[Any, ...]]:
        """Run one statement in a transaction with the limits of a worker; return its rows."""
        with conn.transaction():
            conn.execute(LIMITS)
            cursor = conn.execute(statement, parameters)
            return cursor.fetchall() if cursor.description else []

    def check(self) -> None:
        """Fail unless everything went well, without long waits, and every batch has ended once."""
        step("%s batches; the longest anybody waited was %.2f s", len(self.inserted), max(self.waits))
        assert self.errors == []
        with connect(self.dsn) as conn:
            while len(self.finished) < len(self.inserted):
                before = len(self.finished)
                self.work(conn)
                assert len(self.finished) > before, "a batch is lost"
            rows = conn.execute(
                "SELECT id, items_total, jsonb_array_length(items), items_done FROM batchq.batches"
            ).fetchall()
        gone = {row[0] for row in rows}
        assert sorted(self.finished) == sorted(set(self.inserted) - set(self.cancelled))
        assert gone == set(self.inserted) | set(self.cancelled)
        assert [row for row in rows if row[1] != row[2]] == [], "items_total is not the length of items"
        assert max(self.waits) < MOST_WAIT_SECONDS + SPARE_SECONDS


# ------------------------------------------------------------------------------------------------------- under load


@pytest.mark.parametrize("version", VERSIONS[len(FIRST) - 1 : -1])
def test_old_workers_and_clients_go_on_while_the_schema_becomes_the_newest(
    dsn: str, up_to: Callable[[int], Path], version: int
) -> None:
    step("given a database at version %s, and workers and clients of the first", version)
    up_to(version)
    migrate(dsn)
    work = OldWork(dsn)
    with work.going_on():
        step("when it is migrated to the newest")
        up_to(VERSIONS[-1])
        applied = migrate(dsn)
    assert len(applied) == len(VERSIONS) - 1 - VERSIONS.index(version)


def test_nobody_waits_long_behind_a_migration_that_waits_for_a_long_transaction(
    dsn: str, up_to: Callable[[int], Path]
) -> None:
    up_to(BASE)
    migrate(dsn)
    work, waited = OldWork(dsn), []
    with work.going_on(), connect(dsn) as person:
        for version in VERSIONS[len(FIRST) :]:
            up_to(version)
            applied: list[str] = []
            with person.transaction():
                person.execute("SELECT count(*) FROM batchq.batches")
                thread = threading.Thread(target=lambda applied=applied: applied.extend(migrate(dsn)))
                thread.start()
                thread.join(2 * MOST_WAIT_SECONDS)
                if thread.is_alive():
                    waited.append(version)
                    assert applied == []
            thread.join(30)
            assert len(applied) == 1
    step("these had to wait for the long transaction: %s", waited)
    assert waited, "no migration has met the long transaction, so this proves nothing"


# ------------------------------------------------------------------------------------------------------ killed


KILL = "\nSELECT pg_terminate_backend(pg_backend_pid());\n"


def halves(text: str) -> tuple[str, str]:
    """Return the first half of a file's statements, and the others."""
    ends = [match.end() for match in re.finditer(";\n", text) if text[: match.end()].count("$$") % 2 == 0]
    middle = ends[(len(ends) - 1) // 2]
    return text[:middle], text[middle:]


def test_a_migration_that_is_killed_half_way_or_at_its_end_leaves_nothing_and_can_be_run_again(
    dsn: str, up_to: Callable[[int], Path]
) -> None:
    for version in VERSIONS:
        [file] = up_to(version).glob(f"{version:04}_*.sql")
        text = file.read_text()
        before = catalog(dsn)
        step("%s, whose backend is terminated when half, and then when all of its statements have run", file.name)
        for killed in (KILL.join(halves(text)), text + KILL):
            file.write_text(killed)
            with pytest.raises(ConfigError, match="migration failed: terminating connection"):
                migrate(dsn)
            assert catalog(dsn) == before
        if version > VERSIONS[0]:
            with connect(dsn) as conn, pytest.raises(ConfigError, match="the schema is older than this code"):
                check_schema(conn)
        file.write_text(text)
        assert migrate(dsn) == [file.stem]
        assert catalog(dsn) != before
    with connect(dsn) as conn:
        check_schema(conn)


def catalog(dsn: str) -> set[tuple[str, str]]:
    """Return what the schema consists of, and which migrations it has; nothing where there is no schema."""
    with connect(dsn) as conn:
        if conn.execute("SELECT to_regclass('batchq.migrations')").fetchone() == (None,):
            assert conn.execute("SELECT to_regnamespace('batchq')").fetchone() == (None,)
            return set()
        return set(conn.execute(CATALOG).fetchall())


# ------------------------------------------------------------------------------------------- a newer one than ours


def test_code_of_any_version_takes_every_later_schema_unless_one_is_marked_as_breaking(
    dsn: str, up_to: Callable[[int], Path]
) -> None:
    (up_to(VERSIONS[-1]) / "0900_contracts.sql").write_text("-- breaking: drops what older code reads\nSELECT 1;")
    migrate(dsn)
    with connect(dsn) as conn:
        for version in VERSIONS:
            up_to(version)
            with pytest.raises(ConfigError, match=r"in a way that breaks it \(contracts\); upgrade batchq"):
                check_schema(conn)
        conn.execute("UPDATE batchq.migrations SET breaking = false WHERE version = 900")
        for version in VERSIONS:
            up_to(version)
            check_schema(conn)


if __name__ == "__main__":
    run_alone(__file__)
