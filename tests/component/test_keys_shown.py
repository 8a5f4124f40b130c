"""Keys as people see and use them: the view, the command, and actions on all batches of a key."""

import json
from pathlib import Path

import pytest

from tests.component.rows import Conn, insert, values
from tests.support.alone import run_alone
from tests.support.commands import CommandLine
from tests.support.steps import step

CLAIM_ONE = """
UPDATE batchq.batches SET status = 'processing', attempt = 1, claimed_by = 'w', claim_token = gen_random_uuid(),
  claimed_at = now(), lease_expires_at = now() + interval '1 hour' WHERE id = %s
"""
KEYS = "SELECT queue, key, waiting, scheduled, running, oldest_wait IS NOT NULL, is_estimate FROM batchq.keys"


@pytest.fixture
def batchq(dsn: str, tmp_path: Path) -> CommandLine:
    """Return what runs commands on the test's database."""
    return CommandLine(dsn, tmp_path)


def test_the_view_counts_what_waits_and_runs_of_each_key(conn: Conn) -> None:
    insert(conn)
    for key in ("b", "a", "a", "é"):
        insert(conn, key=key)
    conn.execute("UPDATE batchq.batches SET run_at = now() + interval '1 hour' WHERE key = 'é'")
    conn.execute(CLAIM_ONE, values(conn, "SELECT min(id) FROM batchq.all_batches WHERE key = 'a'"))
    conn.execute(CLAIM_ONE, [insert(conn, queue="mail", key="only runs")])
    assert conn.execute(KEYS).fetchall() == [
        ("default", "a", 1, 0, 1, True, False),
        ("default", "b", 1, 0, 0, True, False),
        ("default", "é", 0, 1, 0, False, False),
        ("mail", "only runs", 0, 0, 1, False, False),
    ]


def test_counts_of_a_key_have_a_limit_and_say_so(conn: Conn) -> None:
    conn.execute("INSERT INTO batchq.batches (kind, key) SELECT 'k', 'hot' FROM generate_series(1, 5000)")
    assert conn.execute(KEYS).fetchall() == [("default", "hot", 101, 0, 0, True, True)]


def test_one_queue_is_listed_whatever_others_hold(batchq: CommandLine, conn: Conn) -> None:
    conn.execute("INSERT INTO batchq.batches (queue, kind, key) SELECT 'a', 'k', g FROM generate_series(1, 1001) g")
    conn.execute("INSERT INTO batchq.batches (queue, kind, key) SELECT 'b', 'k', g % 2 FROM generate_series(1, 300) g")
    conn.execute("INSERT INTO batchq.batches (queue, kind, key) VALUES ('c', 'k', 'last')")
    assert [row["queue"] for row in json.loads(batchq("keys", "--json", "--limit", "2000").out)] == ["a"] * 1000
    assert [row["key"] for row in json.loads(batchq("keys", "--json", "--queue", "b").out)] == ["0", "1"]
    assert [row["key"] for row in json.loads(batchq("keys", "--json", "--queue", "c").out)] == ["last"]
    assert batchq("keys", "--queue", "b").out.count("101+") == 2
    assert "must be" in batchq("keys", "--limit", "-1").err


def test_the_view_reads_little_beside_many_keys_and_a_hot_one(conn: Conn) -> None:
    conn.execute(
        "INSERT INTO batchq.batches (kind, key) SELECT 'k', 'hot' FROM generate_series(1, 20000)"
        " UNION ALL SELECT 'k', 'small ' || g FROM generate_series(1, 5000) g"
    )
    conn.execute("VACUUM ANALYZE batchq.batches_live")
    query = "SELECT * FROM batchq.count_keys(in_queue => 'default')"
    plan = values(conn, f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {query}")[0][0]["Plan"]
    pages = plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
    step("1,000 keys: %s pages", pages)
    assert pages < 1000 * 20


def test_the_command_lists_the_longest_waiting_first(batchq: CommandLine, conn: Conn) -> None:
    assert batchq("keys").out == "no key has live batches\n"
    for key, minutes in (("a", 1), ("b", 5), ("c", 3)):
        insert(conn, key=key)
        conn.execute(
            "UPDATE batchq.batches SET run_at = now() - %s * interval '1 minute' WHERE key = %s", [minutes, key]
        )
    insert(conn, queue="mail", key="m")
    listed = json.loads(batchq("keys", "--json", "--queue", "default").out)
    assert [row["key"] for row in listed] == ["b", "c", "a"]
    shown = batchq("keys", "--limit", "1").out
    assert "Oldest wait" in shown
    assert "0:05:00" in shown.replace("00:05:00", "0:05:00")


def test_an_action_on_a_key_leaves_the_others(batchq: CommandLine, conn: Conn) -> None:
    for key in ("a", "a", "b", None):
        insert(conn, key=key)
    assert batchq("cancel", "--key", "a").code == 0
    assert values(conn, "SELECT coalesce(key, '-') FROM batchq.batches_live ORDER BY id") == ["b", "-"]
    assert batchq("retry", "--key", "a", "--status", "cancelled").code == 0
    assert values(conn, "SELECT count(*) FROM batchq.batches_live WHERE key = 'a'") == [2]


def test_the_command_enqueues_with_a_key(batchq: CommandLine, conn: Conn) -> None:
    assert batchq("enqueue", "k", "--key", "customer 7").code == 0
    assert values(conn, "SELECT key FROM batchq.all_batches") == ["customer 7"]
    assert "must be a key, which has 1 to 500 bytes" in batchq("enqueue", "k", "--key", "").err


def test_a_moved_batch_keeps_its_key(conn: Conn) -> None:
    batch_id = insert(conn, key="a")
    conn.execute("SELECT batchq.move(%s, 'mail')", [batch_id])
    assert conn.execute("SELECT queue, key FROM batchq.all_batches").fetchall() == [("mail", "a")]


if __name__ == "__main__":
    run_alone(__file__)
