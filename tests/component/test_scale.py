"""What people look at reads a bounded part of a large queue, by index. At full size: tests/instruments/scale.py."""

from collections.abc import Iterator

import psycopg
import pytest

from tests.support.alone import run_alone
from tests.support.databases import Databases
from tests.support.scale import LOOKS, Cost, cost, fill
from tests.support.servers import Server
from tests.support.steps import step

LIVE, FINISHED, DAYS = 200_000, 100_000, 8
MOST_READ = {"queues": 45_000, "queues of one kind": 45_000, "bulk, a dry run's look": 25_000}
MOST_READ |= {"throughput of an hour": 2_000, "stalled": 2_500}
MOST_READ_ELSE = 1_100
MOST_MS = 2_000  # of a machine that is busy with other tests; the goal, 50 ms, is for one at rest


@pytest.fixture(scope="module")
def costs(databases: Databases, server: Server) -> Iterator[dict[str, Cost]]:
    """Return what each look costs, straight at the server."""
    with (
        databases.migrated() as name,
        psycopg.connect(server.dsn(name), autocommit=True, prepare_threshold=None) as conn,
    ):
        fill(conn, LIVE, FINISHED, DAYS)
        yield {look: cost(conn, look, query, times=3) for look, query in LOOKS.items()}


@pytest.mark.parametrize("look", LOOKS)
def test_a_look_reads_a_bounded_part(costs: dict[str, Cost], look: str) -> None:
    found = costs[look]
    step("%.1f ms; read %s; scanned %s", found.median_ms, found.rows_read, found.scanned)
    assert sum(found.rows_read.values()) <= MOST_READ.get(look, MOST_READ_ELSE), found.plan
    assert found.median_ms < MOST_MS


@pytest.mark.parametrize("look", LOOKS)
def test_a_look_scans_no_large_table(costs: dict[str, Cost], look: str) -> None:
    scanned = {table: rows for table, rows in costs[look].scanned.items() if rows > 300}
    if look.startswith("queues"):
        assert scanned.pop("batches_live", 0) < LIVE / 8, "more than the sample of 200 pages"
    assert scanned == {}, costs[look].plan


if __name__ == "__main__":
    run_alone(__file__)
