"""batchq.testing: what is enqueued, as assertions see and show it, on each kind of connection."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import psycopg
import pytest
import sqlalchemy
import sqlalchemy.orm
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import dict_row
from pydantic import BaseModel

import batchq
from batchq.errors import InvalidInput
from batchq.testing import (
    assert_enqueued,
    assert_enqueued_async,
    drain,
    enqueued,
    enqueued_async,
    refute_enqueued,
    refute_enqueued_async,
)
from batchq.testing.pending import is_subset
from tests.support.alone import run_alone
from tests.support.batches import put


def test_what_is_enqueued_is_returned_as_typed_rows(conn: psycopg.Connection) -> None:
    conn.row_factory = dict_row  # type: ignore[assignment]
    first = put(conn, "mail", {"to": "a@example.com"}, queue="mail", key="k", unique_key="u", priority=3)
    second = put(conn, "report", items=[1, 2], after=[first], delay_seconds=60, max_attempts=2)
    mail, report = enqueued(conn)
    assert (mail.id, mail.kind, mail.queue, mail.status) == (first, "mail", "mail", "pending")
    assert (mail.payload, mail.items, mail.key, mail.unique_key) == ({"to": "a@example.com"}, None, "k", "u")
    assert (mail.priority, mail.attempt, mail.max_attempts, mail.after, mail.delay_seconds) == (3, 0, 5, None, 0)
    assert (report.id, report.status, report.items, report.after) == (second, "waiting", [1, 2], [first])
    assert report.delay_seconds == pytest.approx(60)
    assert abs((report.run_at - datetime.now(UTC)).total_seconds() - 60) < 10
    assert enqueued(conn, "mail") == enqueued(conn, queue="mail") == [mail]
    assert enqueued(conn, "mail", "default") == []


def test_what_has_begun_or_ended_is_not_enqueued(conn: psycopg.Connection) -> None:
    app = batchq.App()

    @app.handler("look")
    def look_around(batch: batchq.Batch) -> None:
        refute_enqueued(conn, "look")
        raise batchq.Snooze(60)

    put(conn, "look")
    app.handler("done")(lambda _: None)
    put(conn, "done")
    drain(app, conn)
    assert [(row.kind, row.attempt) for row in enqueued(conn)] == [("look", 0)], "a snoozed one is, again"


@pytest.mark.parametrize(
    ("some", "value", "fits"),
    [
        ({}, {"a": 1}, True),
        ({"a": 1}, {"a": 1, "b": 2}, True),
        ({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}, True),
        ({"a": [{"b": 1}]}, {"a": [{"b": 1, "c": 2}]}, True),
        ({"a": 1}, {"b": 1}, False),
        ({"a": None}, {}, False),
        ({"a": None}, {"a": None}, True),
        ({"a": [1]}, {"a": [1, 2]}, False),
        ({"a": 1}, [1], False),
        ([1], {"a": 1}, False),
        (1, 1.0, True),
        (True, 1, False),
        ("1", 1, False),
    ],
)
def test_a_payload_fits_as_a_subset(some: Any, value: Any, fits: bool) -> None:
    assert is_subset(some, value) is fits


class Order(BaseModel):
    """A payload."""

    number: int


def test_assertions_return_what_fits(conn: psycopg.Connection) -> None:
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    put(conn, "mail", {"order": Order(number=7), "to": "a"}, queue="mail", key="k")
    put(conn, "mail", {"order": Order(number=8), "to": "b"}, run_at=tomorrow)
    put(conn, "report", items=[1, 2], delay_seconds=3600, priority=2, unique_key="daily")
    assert len(assert_enqueued(conn, "mail")) == len(assert_enqueued(conn, "mail", count=2)) == 2
    assert [row.payload["to"] for row in assert_enqueued(conn, "mail", payload={"order": Order(number=7)})] == ["a"]
    assert_enqueued(conn, "mail", queue="mail", key="k", status="pending", count=1)
    assert_enqueued(conn, "mail", key=None, count=1)
    assert_enqueued(conn, "mail", run_at=tomorrow, count=1)
    assert_enqueued(conn, "mail", run_at=tomorrow + timedelta(seconds=50), within_seconds=60, count=1)
    assert_enqueued(conn, "report", items=[1, 2], delay_seconds=3600, priority=2, unique_key="daily", count=1)
    refute_enqueued(conn, "report", items=[1])
    refute_enqueued(conn, "report", delay_seconds=3590)
    refute_enqueued(conn, "mail", payload={"order": {"number": 9}})
    refute_enqueued(conn, queue="other")
    assert_enqueued(conn, "nobody", count=0)


def test_a_failure_says_what_is_enqueued_instead(conn: psycopg.Connection) -> None:
    with pytest.raises(
        AssertionError, match=r"^no batch is enqueued with kind 'mail'; nothing is enqueued \(is it com"
    ):
        assert_enqueued(conn, "mail")
    put(conn, "report", {"n": 1}, delay_seconds=60, queue="slow")
    put(conn, "mail", {"to": "a"})
    with pytest.raises(AssertionError) as caught:
        assert_enqueued(conn, "mail", payload={"to": "b"}, queue="mail")
    first, *lines = str(caught.value).splitlines()
    assert first == "no batch is enqueued with kind 'mail', queue 'mail', payload {'to': 'b'}; enqueued are:"
    assert lines[0] == "  2 mail: payload {'to': 'a'}", "those of the kind first"
    assert lines[1].startswith("  1 report: payload {'n': 1}, queue 'slow', delay_seconds 60, run_at 2")
    with pytest.raises(AssertionError, match=r"^1 batch is enqueued with kind 'mail', not 2; enqueued are:\n  2 mail"):
        assert_enqueued(conn, "mail", count=2)
    with pytest.raises(AssertionError, match=r"^no batch should be enqueued with kind 'mail'; enqueued are:\n  2 mail"):
        refute_enqueued(conn, "mail")
    with pytest.raises(AssertionError, match=r"^no batch should be enqueued at all; enqueued are:\n"):
        refute_enqueued(conn)
    batchq.enqueue_many(conn, "many", ({"text": "x" * 500} for _ in range(50)))
    with pytest.raises(AssertionError, match=r"and 32 more$") as caught:
        assert_enqueued(conn, "mail", count=0)
    assert len(str(caught.value)) < 7000


def test_options_that_do_not_fit_are_refused(conn: psycopg.Connection) -> None:
    with pytest.raises(InvalidInput, match="run_at must be a datetime with a time zone"):
        assert_enqueued(conn, "mail", run_at=datetime(2026, 1, 1))
    with pytest.raises(InvalidInput, match="payload cannot be stored as JSON"):
        assert_enqueued(conn, "mail", payload=object())
    with pytest.raises(TypeError, match="unknown option payloads; there are delay_seconds, "):
        refute_enqueued(conn, "mail", payloads={})


def test_other_drivers_see_their_own_transaction(dsn: str, conn: psycopg.Connection) -> None:
    insert = "INSERT INTO batchq.batches (kind, payload) VALUES ('mail', '{\"a\": 1}')"
    engine = sqlalchemy.create_engine("postgresql+psycopg2://", creator=lambda: __import__("psycopg2").connect(dsn))
    with sqlalchemy.orm.Session(engine) as session:
        session.execute(sqlalchemy.text(insert.replace(":", r"\:")))
        assert_enqueued(session, "mail", payload={"a": 1}, count=1)
        session.rollback()
    engine.dispose()

    async def test() -> None:
        given = conninfo_to_dict(dsn)
        own = await asyncpg.connect(
            host=given["host"], port=given["port"], user=given["user"], database=given["dbname"],
            password=given.get("password"),
        )  # fmt: skip
        async with own.transaction():
            await own.execute(insert)
            assert [row.payload for row in await enqueued_async(own)] == [{"a": 1}]
            await assert_enqueued_async(own, "mail", payload={"a": 1}, within_seconds=1, count=1)
            with pytest.raises(AssertionError):
                await refute_enqueued_async(own, "mail", payload={})
            await refute_enqueued_async(own, "other")
        await own.close()

    refute_enqueued(conn)
    asyncio.run(test())


if __name__ == "__main__":
    run_alone(__file__)
