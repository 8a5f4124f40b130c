"""The statements of the web UI's pages of keys, flows, spread batches, kinds and workers: each reads rows by an index,
and few of them, however many batches there are. What batchq.count_live and its like read is checked in test_views."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from batchq.web.reads import SQL
from tests.component.rows import Conn
from tests.support.alone import run_alone
from tests.support.scene import set_spread
from tests.support.steps import step

BATCHES = 40_000
LARGE = ("batches_live", "batches_finished", "needs", "parts")
PARAMETERS: dict[str, dict[str, Any]] = {
    "one_key": {"key": "k7", "queue": None, "most_of_a_key": 100},
    "begun_of_keys": {"queues": ["keyed"] * 100, "keys": [f"k{number}" for number in range(100)], "limit": 4},
    "flow_waiting": {"most": 1000},
    "flow_needs": {"most_of_each": 10},
    "spread": {"limit": 51},
    "worker_batches": {"worker": "w-3", "queues": ["busy", "default"], "limit": 100},
}
# Of a statement, at most so many rows of large tables; the bounds in the statements, not those of the test's data.
MOST_ROWS = {"one_key": 400, "begun_of_keys": 800, "flow_waiting": 4100, "flow_needs": 20_000, "spread": 300,
             "worker_batches": 10_000}  # fmt: skip


@pytest.fixture
def many(conn: Conn) -> Conn:
    """Return a connection to a queue with many batches of each sort."""
    number = "generate_series(1, %s) n"
    conn.execute(f"INSERT INTO batchq.batches (queue, kind) SELECT 'plain', 'a' FROM {number}".encode(), [BATCHES])
    conn.execute(
        f"INSERT INTO batchq.batches (queue, kind, key) SELECT 'keyed', 'a', 'k' || n %% 500 FROM {number}".encode(),
        [BATCHES],
    )
    conn.execute(f"INSERT INTO batchq.batches (queue, kind) SELECT 'busy', 'a' FROM {number}".encode(), [BATCHES])
    conn.execute(
        "UPDATE batchq.batches_live SET status = 'processing', claimed_by = 'w-' || id % 50, claimed_at = now(), "
        "attempt = 1, claim_token = gen_random_uuid(), lease_expires_at = now() + id * interval '1 ms' "
        "WHERE queue = 'busy'"
    )
    [(first,)] = conn.execute("INSERT INTO batchq.batches (queue, kind) VALUES ('flow', 'a') RETURNING id").fetchall()
    conn.execute(
        "INSERT INTO batchq.batches (queue, kind, after) SELECT 'flow' || n %% 3, 'a', ARRAY[%s::bigint, %s - n] "
        "FROM generate_series(1, 6000) n",
        [first, first],
    )
    conn.execute("UPDATE batchq.needs SET ended_as = 'failed' WHERE needed_id < %s", [first])
    conn.execute("UPDATE batchq.batches_live SET claimed_at = now(), attempt = 1 WHERE queue = 'keyed' AND id % 10 < 3")
    set_spread(conn)
    conn.execute(
        "INSERT INTO batchq.parts (batch_id, first_item, items, queue, part_id, is_gathered) "
        "SELECT n / 4, n % 4 * 10, 10, 'busy', 10000000 + n, true FROM generate_series(1, 20000) n"
    )
    conn.execute("ANALYZE batchq.batches_live, batchq.batches_finished, batchq.needs, batchq.parts")
    return conn


def scans(plan: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Yield how each large table is read: its name, the sort of scan, and how many rows it touched."""
    if plan.get("Relation Name", "") in LARGE:
        rows = (plan["Actual Rows"] + plan.get("Rows Removed by Filter", 0)) * plan["Actual Loops"]
        yield plan["Relation Name"], plan["Node Type"], rows
    for child in plan.get("Plans", []):
        yield from scans(child)


def test_each_statement_reads_few_rows_and_by_an_index(many: Conn) -> None:
    waiting = [row[1] for row in many.execute(SQL["flow_waiting"], {"most": 1000}).fetchall()]
    assert len(waiting) == 750, "a quarter of 1,000 for each queue, also for that of the spread batch"
    for name, given in PARAMETERS.items():
        parameters = given | ({"ids": waiting} if name == "flow_needs" else {})
        with many.transaction():
            many.execute(SQL["only_read"])
            many.execute(SQL["by_index"])  # as Reader.read_by_index does
            [(found,)] = many.execute(b"EXPLAIN (ANALYZE, FORMAT JSON) " + SQL[name], parameters).fetchall()
        plan = (json.loads(found) if isinstance(found, str) else found)[0]
        read = list(scans(plan["Plan"]))
        step("%s: %s, %.1f ms", name, read, plan["Execution Time"])
        assert sum(rows for _, _, rows in read) > 0, name
        assert [scan for scan in read if scan[1] not in ("Index Scan", "Index Only Scan")] == [], name
        assert sum(rows for _, _, rows in read) <= MOST_ROWS[name], name


if __name__ == "__main__":
    run_alone(__file__)
