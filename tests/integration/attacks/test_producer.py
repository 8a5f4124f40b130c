"""The door: INSERT. A producer may enqueue, and change nothing that others or workers count on."""

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

import batchq
from tests.component.rows import insert, value, values
from tests.support.alone import run_alone
from tests.support.commands import CommandLine
from tests.support.roles import role_for

Conn = psycopg.Connection
NOT_ALLOWED = psycopg.errors.InsufficientPrivilege


@pytest.fixture
def producer(admin_dsn: str) -> Iterator[Conn]:
    """Return the connection of a producer."""
    with role_for(admin_dsn, "producer") as dsn, psycopg.connect(dsn, autocommit=True) as conn:
        yield conn


def test_a_producer_enqueues_in_every_way(conn: Conn, producer: Conn) -> None:
    batch_id = batchq.enqueue(producer, "mail", {"n": 1}, queue="other", priority=3, delay_seconds=60, unique_key="k")
    assert batch_id == value(conn, "SELECT id FROM batchq.batches")
    assert batchq.enqueue(producer, "mail", queue="other", unique_key="k") is None
    with producer.transaction():
        assert batchq.enqueue_many(producer, "mail", [{"n": n} for n in range(10)]) == 10
    batchq.enqueue(producer, "mail", items=[1, 2, 3], max_failed_items=1, timeout_seconds=9, max_attempts=2)
    assert values(conn, "SELECT items_total FROM batchq.batches WHERE items IS NOT NULL") == [3]
    assert value(conn, "SELECT count(*) FROM batchq.batches WHERE status = 'pending'") == 12


FORGED = {
    "an id in advance": "(id, kind) OVERRIDING SYSTEM VALUE VALUES (1000, 'x')",
    "an id as if it were given": "(id, kind) OVERRIDING USER VALUE VALUES (1000, 'x')",
    "a completed batch": "(kind, status, result, finished_at) VALUES ('x', 'completed', '\"invented\"', now())",
    "a failed batch": "(kind, status, errors, finished_at) VALUES ('x', 'failed', '[]', now())",
    "a finish ahead": "(kind, status, finished_at) VALUES ('x', 'completed', '2999-01-01')",
    "a lease for ever": "(kind, status, claimed_by, claim_token, claimed_at, lease_expires_at) VALUES"
    " ('x', 'processing', 'w', gen_random_uuid(), now(), 'infinity')",
    "a lease from before time": "(kind, status, claimed_by, claim_token, claimed_at, lease_expires_at) VALUES"
    " ('x', 'processing', 'w', gen_random_uuid(), now(), '-infinity')",
    "a cursor": "(kind, cursor) VALUES ('x', to_jsonb(repeat('a', 1000000)))",
    "a result": "(kind, result) VALUES ('x', '1')",
    "attempts": "(kind, attempt) VALUES ('x', 2)",
    "errors": "(kind, errors) VALUES ('x', '[{\"error\": \"forged\"}]')",
    "a count of items": "(kind, items, items_total) VALUES ('x', '[1]', 5)",
    "progress": "(kind, items, items_done) VALUES ('x', '[1]', 1)",
    "a birthday": "(kind, created_at) VALUES ('x', '1970-01-01')",
}


@pytest.mark.parametrize("forged", FORGED)
def test_a_producer_forges_nothing(conn: Conn, producer: Conn, forged: str) -> None:
    with pytest.raises(NOT_ALLOWED):
        producer.execute(f"INSERT INTO batchq.batches {FORGED[forged]}".encode())
    assert values(conn, "SELECT id FROM batchq.batches") == []


OTHERS = (
    "SELECT payload FROM batchq.batches",
    "SELECT * FROM batchq.batches",
    "SELECT FROM batchq.batches_live",
    "SELECT FROM batchq.status",
    "SELECT FROM batchq.failed_items",
    "SELECT FROM batchq.workers",
    "UPDATE batchq.batches SET kind = 'x'",
    "DELETE FROM batchq.batches WHERE id = 1",
    "TRUNCATE batchq.batches",
    "LOCK TABLE batchq.batches IN ACCESS EXCLUSIVE MODE",
    "SELECT id FROM batchq.batches FOR UPDATE",
    "INSERT INTO batchq.batches_live (kind) VALUES ('x')",
    "INSERT INTO batchq.batches_finished (kind) VALUES ('x')",
    "INSERT INTO batchq.batches (kind, unique_key) VALUES ('x', 'k') ON CONFLICT (queue, kind, unique_key)"
    " WHERE unique_key IS NOT NULL DO UPDATE SET payload = '{}'",
    "INSERT INTO batchq.batches (kind) VALUES ('x') RETURNING payload",
    "COPY batchq.batches TO STDOUT",
    "COPY batchq.batches (id, kind) FROM STDIN",
    "CREATE TABLE batchq.mine (a integer)",
    "CREATE FUNCTION batchq.mine() RETURNS integer LANGUAGE sql AS 'SELECT 1'",
    "CREATE TRIGGER mine AFTER INSERT ON batchq.batches EXECUTE FUNCTION batchq.ring()",
    "CREATE RULE mine AS ON INSERT TO batchq.batches DO INSTEAD NOTHING",
    "ALTER TABLE batchq.batches DISABLE TRIGGER ALL",
    "CREATE POLICY mine ON batchq.batches USING (false)",
    "CREATE TEMPORARY TABLE mine PARTITION OF batchq.batches_finished FOR VALUES FROM ('2999-01-01') TO ('2999-01-02')",
    "CREATE TEMPORARY TABLE mine () INHERITS (batchq.failed_items)",
    "CREATE TEMPORARY TABLE mine (id bigint REFERENCES batchq.migrations (version))",
    "SELECT setval('batchq.batches_id_seq', 1)",
    "SELECT nextval('batchq.batches_id_seq')",
    "SECURITY LABEL ON TABLE batchq.batches IS 'mine'",
    "COMMENT ON TABLE batchq.batches IS 'mine'",
    "ANALYZE batchq.batches_live",
    "VACUUM batchq.batches_live",
)


REFUSED = (
    NOT_ALLOWED,
    psycopg.errors.WrongObjectType,
    psycopg.errors.InvalidColumnReference,  # no such index: the conflict with another's batch cannot be named
    psycopg.errors.InvalidTableDefinition,
    psycopg.errors.InvalidParameterValue,
)


def attempt(conn: Conn, statement: str) -> None:
    """Run a statement, in a transaction as LOCK TABLE needs it; begin a COPY."""
    with conn.transaction(), conn.cursor() as cursor:
        if statement.startswith("COPY"):
            with cursor.copy(statement.encode()):
                pass
        else:
            cursor.execute(statement.encode())


@pytest.mark.parametrize("statement", OTHERS)
def test_a_producer_has_nothing_to_do_with_the_rows_and_the_schema_of_others(
    conn: Conn, admin_dsn: str, producer: Conn, statement: str
) -> None:
    insert(conn, unique_key="k", kind="x")
    warned: list[str] = []
    producer.add_notice_handler(lambda notice: warned.append(str(notice.message_primary)))
    if statement.startswith(("ANALYZE", "VACUUM")):  # these warn and do nothing
        producer.execute(statement.encode())
        assert "skipping" in warned[0]
    else:
        with pytest.raises(REFUSED):
            attempt(producer, statement)
    assert values(conn, "SELECT kind FROM batchq.batches") == ["x"]


PACKED = {
    "payload": "jsonb_build_object('a', repeat('x', 100000000))",
    "items": "jsonb_build_array(repeat('x', 100000000))",
    "cursor": "to_jsonb(repeat('x', 100000000))",
}


@pytest.mark.parametrize("column", PACKED)
def test_what_is_small_only_because_it_is_compressed_is_refused(conn: Conn, column: str) -> None:
    conn.execute(f"CREATE TABLE packed AS SELECT {PACKED[column]} AS {column}".encode())
    assert value(conn, f"SELECT pg_column_size({column}) FROM packed") < 2_000_000
    with pytest.raises(psycopg.errors.CheckViolation, match="when unpacked"):
        conn.execute(f"INSERT INTO batchq.batches (kind, {column}) SELECT 'x', {column} FROM packed".encode())


BOMBS = {
    "a few numbers": ("payload", "('[' || repeat('1e131071,', 30) || '1]')::jsonb"),
    "many numbers": ("payload", "('[' || repeat('1e131071,', 1200) || '1]')::jsonb"),
    "numbers that compress": (
        "payload",
        "('[' || repeat('1e131071,', 1200) || '\"' || repeat('x', 99999) || '\"]')::jsonb",
    ),
    "more than a gigabyte": ("payload", "('[' || repeat('1e131071,', 40000) || '1]')::jsonb"),
    "items": ("items", "('[' || repeat('1e131071,', 1200) || '1]')::jsonb"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_what_is_small_only_until_it_is_read_is_refused(conn: Conn, producer: Conn, bomb: str) -> None:
    column, made = BOMBS[bomb]
    with pytest.raises((psycopg.errors.CheckViolation, psycopg.errors.ProgramLimitExceeded)):
        producer.execute(f"INSERT INTO batchq.batches (kind, {column}) VALUES ('x', {made})".encode())
    assert values(conn, "SELECT id FROM batchq.batches") == []


@pytest.mark.parametrize(
    "text", ['"\\u0001' * 0 + '"' + "\\u0001" * 5000 + '"', "[" + "0.1," * 5000 + "1]", "[" + "1e100," * 100 + "1]"]
)
def test_ordinary_values_that_read_longer_than_they_are_stored_are_taken(producer: Conn, conn: Conn, text: str) -> None:
    producer.execute("INSERT INTO batchq.batches (kind, payload, items) VALUES ('x', %s::jsonb, '[1]')", [text])
    assert value(conn, "SELECT count(*) FROM batchq.batches") == 1


def test_a_producer_uses_the_command_line(producer: Conn, admin_dsn: str, tmp_path: Path) -> None:
    with role_for(admin_dsn, "producer") as dsn:
        shell = CommandLine(dsn, tmp_path)
        assert shell("enqueue", "mail").code == 0
        (tmp_path / "lines").write_text("a\nb\n")
        assert shell("enqueue", "mail", "--lines", "lines").code == 0
        checked = shell("check")
        assert (checked.code, "queues not checked" in checked.out) == (0, True), checked.out


def test_a_payload_that_fits_is_taken_compressed_or_not(conn: Conn) -> None:
    conn.execute("CREATE TABLE packed AS SELECT jsonb_build_object('a', repeat('x', 4000000)) AS payload")
    conn.execute("INSERT INTO batchq.batches (kind, payload) SELECT 'x', payload FROM packed")
    conn.execute(
        "INSERT INTO batchq.batches (kind, payload) VALUES ('x', jsonb_build_object('a', repeat('x', 4000000)))"
    )
    assert value(conn, "SELECT count(*) FROM batchq.batches") == 2


# ----------------------------------------------------------------------------------- what holds for the owner, too

INFINITE = {
    "a lease for ever": ("lease_expires_at", "infinity"),
    "a lease from before time": ("lease_expires_at", "-infinity"),
    "a birthday at the end of time": ("created_at", "infinity"),
}


@pytest.mark.parametrize("what", INFINITE)
def test_times_are_finite_whoever_writes_them(conn: Conn, what: str) -> None:
    column, time = INFINITE[what]
    others = "status, claimed_by, claim_token, claimed_at"
    with pytest.raises(psycopg.errors.CheckViolation, match="batches_times_are_finite"):
        conn.execute(
            f"INSERT INTO batchq.batches (kind, {others}, lease_expires_at) VALUES ('x', 'processing', 'w',"
            f" gen_random_uuid(), now(), '{time}')".encode()
            if column == "lease_expires_at"
            else f"INSERT INTO batchq.batches (kind, created_at) VALUES ('x', '{time}')".encode()
        )


@pytest.mark.parametrize("finished_at", ["2999-01-01", "infinity"])
def test_no_finish_is_dated_ahead_so_that_the_partitions_of_later_days_can_be_made(
    conn: Conn, finished_at: str
) -> None:
    with pytest.raises(psycopg.errors.CheckViolation, match="cannot have finished at"):
        conn.execute(
            "INSERT INTO batchq.batches (kind, status, finished_at) VALUES ('x', 'completed', %s)", [finished_at]
        )
    assert value(conn, "SELECT batchq.create_finished_partitions('2999-01-01', 2)") == 2


if __name__ == "__main__":
    run_alone(__file__)
