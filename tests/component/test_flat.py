"""Cost follows live work, whatever the statistics of the live table say.

Each statement of a worker and each view is run while a held snapshot keeps dead entries in the indexes. Buffers are
counted, since those do not depend on the machine.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from uuid import uuid4

import psycopg
import pytest
from psycopg.rows import tuple_row

from batchq.postgres.statements import checkpoints, claims, endings, health, leases, probes, session, shards, views
from batchq.postgres.statements.checkpoints import Progress
from batchq.postgres.statements.claims import END, Position
from batchq.postgres.statements.endings import Finish, Requeue
from batchq.postgres.statements.running import Statement
from batchq.web import list_reads
from batchq.web.list_reads import batch_list, sort_of
from batchq.web.search import Terms
from tests.component.rows import KIND, Conn, value
from tests.support.alone import run_alone
from tests.support.databases import Databases, holding_snapshot
from tests.support.servers import Server
from tests.support.steps import step

DEAD = 60_000
LIVE = 50_000
CLAIMED_AT_ONCE = 2_000
BASE_BUFFERS, BUFFERS_A_ROW = 50, 20
EVERY_PARTITION = 3 * 12  # a lookup by id descends the index of each day's partition

MAKE = """
INSERT INTO batchq.batches (kind, run_at)
SELECT 'work', now() - %s * interval '1 minute'
FROM generate_series(1, %s)
"""
CLAIM_ALL = """
UPDATE batchq.batches_live
SET status = 'processing', attempt = 1, claimed_by = 'w', claim_token = gen_random_uuid(), claimed_at = now(),
  lease_expires_at = now() - interval '1 second'
"""
CLAIM_TWO = """
UPDATE batchq.batches_live
SET status = 'processing', attempt = 1, claimed_by = 'w', claim_token = gen_random_uuid(), claimed_at = now(),
  lease_expires_at = now() + interval '1 hour'
WHERE id IN (SELECT id FROM batchq.batches_live WHERE id > %s ORDER BY id LIMIT 2)
"""


class Table(NamedTuple):
    """A live table full of dead entries. *position*: behind them, as a worker that claimed them knows it."""

    conn: Conn
    position: Position
    live: int


def analyzed_when_empty(conn: Conn) -> None:
    """Record that a table of many pages has no rows, which is what misleads the planner most."""
    conn.execute("VACUUM ANALYZE batchq.batches_live")


def vacuumed_when_empty(conn: Conn) -> None:
    """Have only a vacuum record it: the columns keep the statistics of before."""
    conn.execute("VACUUM batchq.batches_live")


def never_analyzed(conn: Conn) -> None:
    """Leave the statistics of a new table."""


STATES: dict[str, tuple[Callable[[Conn], None], Callable[[Conn], None], int]] = {
    # what the statistics are taken of: before the end, and at the end; then how many are inserted
    "vacuumed and analyzed when empty": (never_analyzed, analyzed_when_empty, 0),
    "vacuumed when empty": (vacuumed_when_empty, vacuumed_when_empty, 0),
    "analyzed just before the end": (analyzed_when_empty, never_analyzed, 0),
    "never analyzed": (never_analyzed, never_analyzed, 0),
    "many live beside the dead": (never_analyzed, analyzed_when_empty, LIVE),
    "a few live beside the dead": (never_analyzed, analyzed_when_empty, 5),
}


@pytest.fixture(scope="module", params=STATES)
def table(request: pytest.FixtureRequest, databases: Databases, server: Server) -> Iterator[Table]:
    """Make the table: filled, drained and filled again while somebody holds a snapshot, which keeps every dead row."""
    before_the_end, at_the_end, live = STATES[request.param]
    with (
        databases.migrated() as name,
        psycopg.connect(server.dsn(name), autocommit=True, prepare_threshold=None) as conn,
        holding_snapshot(server.dsn(name)),
    ):
        conn.execute("ALTER TABLE batchq.batches_live SET (autovacuum_enabled = off)")
        conn.execute(MAKE, [1, DEAD])
        [(run_at, last_id)] = conn.execute("SELECT date_part('epoch', max(run_at)), max(id) FROM batchq.batches_live")
        conn.execute(CLAIM_ALL.encode())
        conn.execute("DELETE FROM batchq.batches_live WHERE id <= %s", [last_id - 100])
        before_the_end(conn)
        conn.execute("DELETE FROM batchq.batches_live")
        at_the_end(conn)
        conn.execute("SELECT batchq.move_positions('{default}', '{0}', 0, 0)")
        conn.execute(MAKE, [0, live])
        conn.execute(CLAIM_TWO, [last_id])
        step("%s: positions %s", request.param, values_of(conn))
        yield Table(conn, Position(run_at, last_id), max(0, live - 2))


def values_of(conn: Conn) -> list[Any]:
    """Return the positions."""
    return conn.execute("SELECT index, at::text, id FROM batchq.positions ORDER BY index").fetchall()


def buffers(conn: Conn, statement: Statement, settings: dict[str, str]) -> tuple[int, int, Any]:
    """Run a statement as a worker does, and undo it; return how many buffers it read, how many rows it returned, and
    its plan. It runs twice, since the first time reads the catalog, too."""
    text, parameters = statement
    with conn.transaction(force_rollback=True):
        conn.execute(session.transaction_settings(60, settings=settings))
        with conn.transaction(force_rollback=True):
            rows = len(conn.cursor(row_factory=tuple_row).execute(text, parameters).fetchall())
        cursor = psycopg.ClientCursor(conn)
        cursor.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {text}".encode(), parameters)
        [(explained,)] = cursor.fetchall()
    plan = explained[0]["Plan"]
    return plan["Shared Hit Blocks"] + plan["Shared Read Blocks"], rows, plan


TOKEN = uuid4()
IDS = list(range(1, 101))
OF_A_WORKER: dict[str, Callable[[Position], Statement]] = {
    "probe of one priority": lambda at: (
        "SELECT batchq.has_ready('default', 0::smallint, '{work}', %(run_at)s, %(id)s)",
        {"run_at": at.run_at, "id": at.id},
    ),
    "probe of two priorities": lambda at: probes.ready_priorities("default", [KIND], {0: at, 5: at}),
    "probe of two shards": lambda at: shards.ready_levels({("default", 0): at, ("default#1", 0): claims.START}, [KIND]),
    "discovery in two shards": lambda _: shards.discovery({"default": [0], "default#1": []}, ["default"], 0),
    "probe of a part": lambda at: probes.ready_between("default", 0, [KIND], at, END),
    "unknown priority": lambda _: probes.unknown_priority("default", [0]),
    "recorded positions": lambda _: probes.known_positions("default"),
    "claim": lambda at: claims.claim("default", 0, [KIND], CLAIMED_AT_ONCE, "w", TOKEN, 60, at, END),
    "ready beside refused": lambda at: probes.ready_positions("default", 0, [KIND], CLAIMED_AT_ONCE, at, END, [1]),
    "expired leases": lambda _: leases.lease_probe("default", float("-inf")),
    "expired beside refused": lambda at: leases.expired("default", 1000, at.run_at + 3600, [1]),
    "extend": lambda _: leases.extend("default", IDS, [TOKEN] * len(IDS), 60),
    "complete": lambda _: endings.complete("default", IDS, [str(TOKEN)] * len(IDS)),
    "complete and forget": lambda _: endings.complete("default", IDS, [str(TOKEN)] * len(IDS), keep=False),
    "finish": lambda _: endings.finish("default", [Finish(number, TOKEN, "failed") for number in IDS]),
    "requeue": lambda _: endings.requeue("default", [Requeue(number, TOKEN, None, True) for number in IDS]),
    "checkpoint": lambda _: checkpoints.checkpoint("default", 7, TOKEN, 60, Progress(done=1)),
}
PROBES = {
    name for name in OF_A_WORKER if "probe" in name or "priority" in name or name.startswith(("ready", "expired"))
}
BY_IDS = {"extend", "complete", "complete and forget", "finish", "requeue"}


def test_no_index_but_those_of_claims_and_leases_can_serve_a_statement_that_names_a_queue(conn: Conn) -> None:
    query = """
    SELECT array_agg(DISTINCT i.indexrelid::regclass::text ORDER BY i.indexrelid::regclass::text)
    FROM pg_catalog.pg_index i
    JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indexrelid AND a.attnum <= i.indnkeyatts
    WHERE i.indrelid = 'batchq.batches_live'::regclass
      AND a.attname = 'queue'
    """
    index = "batchq.batches_live_{}".format
    names = ("key_begun", "keyed", "lease", "ready", "unique_key", "waiting")
    reason = "three of them hold only batches with a key, and one those that no worker claims"
    assert value(conn, query) == [index(name) for name in names], reason


@pytest.mark.parametrize("name", OF_A_WORKER)
def test_a_statement_of_a_worker_reads_only_what_it_returns(table: Table, name: str) -> None:
    settings = session.FORCE_INDEX if name in PROBES else session.FORCE_INDEX_AND_HASH_JOIN
    read, rows, plan = buffers(table.conn, OF_A_WORKER[name](table.position), settings)
    rows = max(rows, len(IDS) if name in BY_IDS else 0)
    step("%s buffers, %s rows", read, rows)
    assert read <= BASE_BUFFERS + BUFFERS_A_ROW * rows, plan


@pytest.mark.parametrize("name", ["probe of two priorities", "probe of two shards", "probe of a part"])
def test_a_probe_ends_at_the_first_batch_of_a_kind_that_was_rare_when_statistics_were_taken(
    conn: Conn, name: str
) -> None:
    conn.execute("ALTER TABLE batchq.batches_live SET (autovacuum_enabled = off)")
    fill = "INSERT INTO batchq.batches (kind, run_at) SELECT %s, now() - random() * interval '1 day' FROM "
    conn.execute(fill + "generate_series(1, 20000)", ["other"])
    conn.execute("ANALYZE batchq.batches_live")
    conn.execute(fill + "generate_series(1, 20000)", [KIND])
    read, rows, plan = buffers(conn, OF_A_WORKER[name](claims.START), session.FORCE_INDEX)
    step("%s buffers, %s rows", read, rows)
    assert rows == 1
    assert read <= BASE_BUFFERS, plan


def test_priorities_are_learned_without_reading_the_dead(table: Table) -> None:
    read, _, plan = buffers(table.conn, probes.unknown_priority("default", [0]), session.FORCE_INDEX)
    assert read <= BASE_BUFFERS, plan
    recorded = probes.as_positions(table.conn.execute(*probes.known_positions("default")).fetchall())
    assert recorded[0] >= table.position, "a new worker begins after the dead"


LOOKED_AT: dict[str, Callable[[Conn], Any]] = {
    "status": lambda conn: views.status_rows(conn, None, None, None, 20),
    "status, ready": lambda conn: views.status_rows(conn, None, None, "ready", 20),
    "status, processing": lambda conn: views.status_rows(conn, None, None, "processing", 20),
    "one batch": lambda conn: views.status_row(conn, 7),
    "running": lambda conn: views.running_rows(conn, None, None, 20),
    "failed": lambda conn: views.failed_rows(conn, None, None, 20),
    "monitor": lambda conn: views.changed_rows(conn, "2100-01-01", 2**62, [], None, None, 20),
    "newest id": health.newest_id,
    "page": lambda conn: batch_list(Terms(), sort_of(None, None))(conn),
    "page, earliest run_at": lambda conn: batch_list(Terms(status="ready"), sort_of("ready", "run_at"))(conn),
    "page, latest run_at": lambda conn: batch_list(Terms(status="ready"), sort_of("ready", "run_at_last"))(conn),
    "page, longest running": lambda conn: batch_list(Terms(status="stalled"), sort_of("stalled", "longest"))(conn),
    "page, unique key": lambda conn: batch_list(
        Terms(unique_key="x", status="processing"), sort_of("processing", None), pairs=[("default", "work")] * 100
    )(conn),
    "page, counts": list_reads.counts(None, None, []),
    "page, processing": lambda conn: batch_list(Terms(status="processing"), sort_of("processing", None))(conn),
    "doctor, stalled": lambda conn: health.findings(conn, "stalled", {}),
}


@pytest.mark.parametrize("name", LOOKED_AT)
def test_what_people_look_at_does_not_read_the_dead(table: Table, name: str) -> None:
    rows = LOOKED_AT[name](table.conn)
    returned = len(rows) if isinstance(rows, list) else len(rows.rows) + 1 if isinstance(rows, list_reads.Found) else 1
    read = read_by(table.conn, LOOKED_AT[name])
    step("%s buffers for %s", read, returned)
    assert read <= 10 * BASE_BUFFERS + (BUFFERS_A_ROW + EVERY_PARTITION) * returned


ENDED = [(sort, status) for status in ("completed", "failed", "cancelled") for sort in list_reads.sorts_for(status)]


def test_a_list_of_what_has_ended_reads_a_page_by_an_index(conn: Conn) -> None:
    fill = """
    INSERT INTO batchq.batches (kind, status, finished_at)
    SELECT 'work', CASE n % 10 WHEN 0 THEN 'failed' WHEN 1 THEN 'cancelled' ELSE 'completed' END,
      now() - n % 5 * interval '1 day' - n * interval '1 second'
    FROM generate_series(1, 100000) n
    """
    conn.execute(fill.encode())
    for analyzed in (False, True):
        if analyzed:
            conn.execute("ANALYZE batchq.batches")
        for sort, status in ENDED:
            terms = Terms(status=status)
            first = batch_list(terms, sort)(conn)
            assert len(first.rows) == 50
            for before in (None, first.next_key):
                read = read_by(conn, batch_list(terms, sort, before))
                step("%s %s: %s buffers", status, sort.name, read)
                assert read <= 10 * BASE_BUFFERS + BUFFERS_A_ROW * 50, (status, sort.name)
        read = read_by(conn, list_reads.counts(None, None, []))
        step("counts: %s buffers", read)
        assert read <= 10 * BASE_BUFFERS + 3 * 2 * 1001


def test_counts_read_the_live_and_not_the_dead(table: Table) -> None:
    conn = table.conn
    read = read_by(conn, views.queue_rows)
    counted = min(table.live, 10_000)
    step("%s buffers for %s", read, counted)
    assert read <= 1_000 + 2 * counted
    rows = views.queue_rows(conn)
    if table.live:
        assert "ready" in rows[0]["estimated"], "what was committed late may be left out"
        assert rows[0]["ready"] == table.live or table.live > 10_000


def read_by(conn: Conn, look: Callable[[Conn], Any]) -> int:
    """Return how many buffers *look* read of batchq's tables and indexes, the second time."""
    look(conn)
    with conn.transaction(force_rollback=True):
        before = read_so_far(conn)
        look(conn)
        return read_so_far(conn) - before


def read_so_far(conn: Conn) -> int:
    """Return how many buffers of batchq's tables and indexes this transaction has read: what is counted since its
    begin."""
    query = """
    SELECT coalesce(sum(pg_stat_get_xact_blocks_fetched(c.oid)), 0)
    FROM pg_catalog.pg_class c
    WHERE c.relnamespace = 'batchq'::regnamespace
    """
    return int(value(conn, query))


if __name__ == "__main__":
    run_alone(__file__)
