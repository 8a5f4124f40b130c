"""What errors have in common: batchq.error_group, and batchq.failures and batchq.bulk, which group by it."""

import json
import time
from typing import Any

import pytest

from tests.component.rows import Conn, finished, value, values
from tests.support.alone import run_alone

UUID, SHA = "4f1c2e9a-1b2c-4d5e-8f90-0123456789ab", "da39a3ee5e6b4b0d3255bfef95601890afd80709"
# ruff: noqa: E501 (an example and its group are read side by side)
EXAMPLES = [
    # Python
    ("ValueError: row 17: no such customer 'C-1017'", "ValueError: row <n>: no such customer <value>"),
    ("KeyError: 'name'", "KeyError: <value>"),
    ('KeyError: "it\'s"', "KeyError: <value>"),
    ("TypeError: can't multiply sequence by non-int of type 'str'", "TypeError: can't multiply sequence by non-int of type <value>"),
    ("the workers' queue 7 isn't 'open'", "the workers' queue <n> isn't <value>"),
    ("b'abc' is not u\"x\" or `y`", "<value> is not <value> or <value>"),
    ("AttributeError: <Foo object at 0x7f8a9c> has no bar", "AttributeError: <Foo object at <id>> has no bar"),
    ("[1, 2, 3] and ['a', 'b'] and [4]", "[<n>, ...] and [<value>, ...] and [<n>]"),
    ("ConnectionRefusedError: [Errno 111] Connection refused", "ConnectionRefusedError: [Errno 111] Connection refused"),
    ("OSError: [Errno 28] No space left on device: '/data/17'", "OSError: [Errno 28] No space left on device: <value>"),
    ("TimeoutError: nothing after 0.53 s, 1,204 rows", "TimeoutError: nothing after <n> s, <n> rows"),
    ("timed out after 5m30s", "timed out after <n>s"),
    ("no file /data/2024/import_17.csv", "no file /data/<n>/import_<n>.csv"),
    ("memory limit of 512MiB exceeded: -1.5GB", "memory limit of <n>MiB exceeded: -<n>GB"),
    ("S3, utf8 and v1.2.3 are names", "S3, utf8 and v1.2.3 are names"),
    ("user123 and user_7 and C-1017", "user<n> and user_<n> and C-<n>"),
    ("exit status 137, signal 9", "exit status 137, signal 9"),
    ("code 123456 is wrong", "code <n> is wrong"),
    # PostgreSQL
    ('UniqueViolation: duplicate key value violates unique constraint "users_email_key"', "UniqueViolation: duplicate key value violates unique constraint <value>"),
    ("Key (email, id)=(ada@example.com, 17) already exists.", "Key (email, id)=(<value>) already exists."),
    ("deadlock detected", "deadlock detected"),
    ("Process 12345 waits for ShareLock on transaction 99; blocked by process 777.", "Process <n> waits for ShareLock on transaction <n>; blocked by process <n>."),
    ('connection to server at "10.0.0.1", port 5432 failed', "connection to server at <value>, port <n> failed"),
    # HTTP
    ("HTTPError: 404 Client Error: Not Found for url: https://a.example/v1/17?x=1", "HTTPError: 404 Client Error: Not Found for url: <url>"),
    ("HTTPError: 503 Server Error: for url: http://a.example/18.", "HTTPError: 503 Server Error: for url: <url>."),
    ("HTTP Error 404: Not Found", "HTTP Error 404: Not Found"),
    ("HTTP/1.1 502 Bad Gateway", "HTTP/<n> 502 Bad Gateway"),
    ("status code 500 after 12.5s", "status code 500 after <n>s"),
    ("Error code: 429 - {'message': 'slow down'}", "Error code: 429 - {<value>: <value>}"),
    ("<Response [503]>", "<Response [503]>"),
    # Identifiers, addresses, times
    (f"order {UUID} not found", "order <id> not found"),
    (f"commit {SHA} is missing", "commit <id> is missing"),
    ("customer cus_9s6XKzkNRiz8i3x7 unknown", "customer cus_<id> unknown"),
    ("mail to anna.b+c@example.co.uk bounced", "mail to <email> bounced"),
    ("no answer from 10.0.0.17:5432", "no answer from <address>"),
    ("no answer from [2001:db8::17]:5432, ::1, fe80::1ff:fe23:4567:890a", "no answer from [<address>]:<n>, <address>, <address>"),
    ("std::runtime_error: bad", "std::runtime_error: bad"),
    ("at 2026-11-29T12:30:45.123Z, not 2026-11-29 or 12:30", "at <time>, not <time> or <time>"),
    # batchq
    ("worker died: web-7f9c-4312-1a2b3c4d did not renew its lease", "worker died: <worker> did not renew its lease"),
    ("1 validation error for Order\nprice\n  must be positive", "<n> validation error for Order"),
    # What remains
    ("", ""), ("   \n  x  y ", "x y"), ("unclosed 'quote and more 17", "unclosed <value>"), ("a <n> b", "a <n> b"),
    ("Überweisung für Köln 17 schlug fehl", "Überweisung für Köln <n> schlug fehl"),
    ("漢字 17 🙂 \u202e 'x'", "漢字 <n> 🙂 \u202e <value>"),
    ("100 % of 5/10; DROP TABLE x; --", "<n> % of <n>/<n>; DROP TABLE x; --"),
    ("x" * 400, "x" * 300),
]  # fmt: skip
HOSTILE = [
    "a" * 10_000, "'" * 10_000, "a'" * 5000, "é1'" * 3000, "a@" * 5000, "0a" * 5000, "1." * 5000, "1:" * 5000, "::" * 5000,
    "a://" * 2500, "x'1 :// @ \")=(" * 800, "http/1.1 404 " * 800, "status " * 1500, " " * 10_000, "1, " * 3000, "'a', " * 2000,
    "1" * 10_000, "\\" * 10_000, "(" * 10_000, "<n>" * 3000, "-" * 10_000, "a1" * 5000, "1-" * 5000, "\t1" * 5000,
]  # fmt: skip


def group(conn: Conn, error: str) -> str:
    """Return the group of an error."""
    found: str = value(conn, "SELECT batchq.error_group(%s)", [error])
    return found


def failed(conn: Conn, error: str, **columns: Any) -> int:
    """Return the id of a batch that failed."""
    return finished(conn, "failed", error=json.dumps({"error": error}), **columns)


@pytest.mark.parametrize(("error", "expected"), EXAMPLES)
def test_an_error_is_grouped_by_what_it_has_in_common_with_others(conn: Conn, error: str, expected: str) -> None:
    assert group(conn, error) == expected


@pytest.mark.parametrize(("error", "expected"), EXAMPLES)
def test_space_around_it_and_further_lines_do_not_count(conn: Conn, error: str, expected: str) -> None:
    assert group(conn, f" \n {error} ") == group(conn, f"{error} \n \nTraceback 17") == expected or not expected


def test_no_error_makes_it_slow(conn: Conn) -> None:
    for error in HOSTILE:
        began_at = time.process_time(), time.perf_counter()
        assert len(value(conn, "SELECT max(batchq.error_group(%s || n)) FROM generate_series(1, 20) n", [error])) <= 300
        took_seconds = time.perf_counter() - began_at[1]
        assert took_seconds < 1.0, f"{took_seconds:.2f} s for 20 errors like {error[:20]!r}"


def test_null_stays_null_and_it_is_immutable(conn: Conn) -> None:
    assert value(conn, "SELECT batchq.error_group(NULL)") is None
    assert value(conn, "SELECT provolatile FROM pg_proc WHERE proname = 'error_group'") == "i"


# ---------------------------------------------------------------------------------------------------- batchq.failures


def test_failures_have_their_group_queues_and_an_example(conn: Conn) -> None:
    for number in range(20):
        last = failed(conn, f"row {number}: no 'C-{number}'\nmore", kind="import", queue=f"q{number % 2}")
    query = "SELECT kind, error, failures, example_id, example, queues FROM batchq.failures"
    assert conn.execute(query).fetchall() == [
        ("import", "row <n>: no <value>", 20, last, "row 19: no 'C-19'\nmore", ["q0", "q1"])
    ]


# -------------------------------------------------------------------------------------------------------- batchq.bulk


def test_a_bulk_action_takes_the_batches_of_a_group_only(conn: Conn) -> None:
    wanted = [failed(conn, f"row {number}: no 'x'") for number in range(5)]
    failed(conn, "row 7: no")
    failed(conn, "Row 7: no 'x'")
    silent = finished(conn, "failed")
    query = "SELECT matched, changed FROM batchq.bulk('retry', jsonb_build_object('error_group', %s::text))"
    assert conn.execute(query, ["row <n>: no <value>"]).fetchall() == [(5, 5)]
    assert values(conn, "SELECT id FROM batchq.all_batches WHERE status = 'pending' ORDER BY id") == wanted
    assert conn.execute(query, [""]).fetchall() == [(1, 1)]
    assert value(conn, "SELECT status FROM batchq.all_batches WHERE id = %s", [silent]) == "pending"
    assert conn.execute(query, ["%"]).fetchall() == [(0, 0)], "no pattern"


if __name__ == "__main__":
    run_alone(__file__)
