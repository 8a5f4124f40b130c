"""BATCHQ_KEEP_COMPLETED=no: what completes is gone, what fails or is cancelled stays, and the fence holds."""

from typing import Any
from uuid import uuid4

import psycopg
import pytest

import batchq
from batchq.postgres.statements.checkpoints import Progress
from tests.component.rows import (
    Conn,
    checkpoint,
    complete,
    expire_lease,
    failure,
    insert,
    processing,
    value,
    values,
)
from tests.support.alone import run_alone
from tests.support.batches import STYLES, drain, put, register, register_items
from tests.support.steps import step

FORGETTING: dict[str, Any] = {"keep_completed": False}
KINDS = "SELECT kind FROM batchq.all_batches ORDER BY id"
AT_ONCE = batchq.Backoff(0, 0)
both_styles = pytest.mark.parametrize("style", STYLES)


@pytest.fixture
def done(conn: Conn) -> None:
    """Make the table that handlers write to."""
    conn.execute("CREATE TABLE done (id bigint)")


@both_styles
def test_what_completes_is_gone_and_what_fails_or_is_cancelled_is_kept(conn: Conn, dsn: str, style: str) -> None:
    app = batchq.App()

    def body(batch: batchq.Batch) -> Any:
        if batch.kind == "fails":
            raise ValueError("no")
        if batch.kind == "is cancelled":
            raise batchq.Cancel("no need")
        return {"a": 1} if batch.kind == "returns" else None

    for kind in ("returns", "returns nothing", "fails", "is cancelled"):
        register(app, style, kind, body, backoff=AT_ONCE)
        put(conn, kind, max_attempts=2)
    drain(app, dsn, **FORGETTING)
    assert values(conn, KINDS) == ["fails", "is cancelled"]
    assert values(conn, "SELECT status FROM batchq.all_batches ORDER BY id") == ["failed", "cancelled"]
    assert values(conn, "SELECT jsonb_array_length(errors) FROM batchq.all_batches ORDER BY id") == [2, 1]
    step("without the setting everything is kept")
    put(conn, "returns")
    drain(app, dsn)
    assert value(conn, "SELECT result FROM batchq.all_batches WHERE status = 'completed'") == {"a": 1}


@both_styles
def test_failed_items_go_with_a_batch_that_tolerates_them_and_stay_with_one_that_fails(
    conn: Conn, dsn: str, style: str
) -> None:
    app = batchq.App()

    def body(item: int, batch: batchq.Batch) -> None:
        if item < 0:
            raise ValueError(item)

    register_items(app, style, "items", body, backoff=AT_ONCE)
    put(conn, "items", items=[1, -2, 3, -4], max_failed_items=2, max_attempts=1)
    put(conn, "items", items=[1, 2, 3])
    failed = put(conn, "items", items=[1, -2, -3], max_failed_items=1, max_attempts=2)
    drain(app, dsn, **FORGETTING)
    assert values(conn, "SELECT id FROM batchq.all_batches") == [failed]
    assert values(conn, "SELECT batch_id FROM batchq.failed_items") == [failed, failed]


@both_styles
def test_a_batch_that_completes_in_its_own_transaction_is_gone_with_it(
    conn: Conn, dsn: str, done: None, style: str
) -> None:
    app = batchq.App()

    @app.handler("def", backoff=AT_ONCE)
    def work(batch: batchq.Batch) -> None:
        for chunk in batch.chunks(2):
            chunk.fail(0, "no")
        with batch.transaction(result="kept by nobody") as own:
            own.execute("INSERT INTO done VALUES (%s)", [batch.id])
            if batch.attempt == 1:
                raise ValueError("no")

    @app.handler("async def", backoff=AT_ONCE)
    async def work_async(batch: batchq.Batch) -> None:
        async for chunk in batch.chunks(2):
            chunk.fail(0, "no")
        async with batch.transaction(result="kept by nobody") as own:
            await own.execute("INSERT INTO done VALUES (%s)", [batch.id])
            if batch.attempt == 1:
                raise ValueError("no")

    batch_id = put(conn, style, items=[1, 2], max_failed_items=2)
    drain(app, dsn, **FORGETTING)
    assert values(conn, "SELECT id FROM done") == [batch_id]
    assert value(conn, "SELECT count(*) FROM batchq.all_batches") == 0
    assert value(conn, "SELECT count(*) FROM batchq.failed_items") == 0


@both_styles
def test_a_transaction_with_a_cursor_keeps_its_batch(conn: Conn, dsn: str, style: str) -> None:
    app = batchq.App()

    @app.handler("def")
    def work(batch: batchq.Batch) -> None:
        with batch.transaction(cursor={"at": 1}):
            pass
        raise batchq.Cancel("enough")

    @app.handler("async def")
    async def work_async(batch: batchq.Batch) -> None:
        async with batch.transaction(cursor={"at": 1}):
            pass
        raise batchq.Cancel("enough")

    batch_id = put(conn, style)
    drain(app, dsn, **FORGETTING)
    assert conn.execute("SELECT id, status, cursor FROM batchq.all_batches").fetchall() == [
        (batch_id, "cancelled", {"at": 1})
    ]


@both_styles
def test_a_transaction_whose_claim_is_lost_deletes_nothing(conn: Conn, dsn: str, done: None, style: str) -> None:
    app = batchq.App()
    steal = "UPDATE batchq.batches_live SET claim_token = gen_random_uuid(), lease_expires_at = now() + interval '1 h'"

    def rob() -> None:
        with psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as thief:
            thief.execute(steal)

    @app.handler("def")
    def work(batch: batchq.Batch) -> None:
        rob()
        with batch.transaction() as own:
            own.execute("INSERT INTO done VALUES (1)")

    @app.handler("async def")
    async def work_async(batch: batchq.Batch) -> None:
        rob()
        async with batch.transaction() as own:
            await own.execute("INSERT INTO done VALUES (1)")

    put(conn, style)
    drain(app, dsn, **FORGETTING)
    assert values(conn, "SELECT status FROM batchq.all_batches") == ["processing"]
    assert value(conn, "SELECT count(*) FROM done") == 0


def test_a_stale_token_deletes_nothing_and_its_failed_items_stay(conn: Conn) -> None:
    mine, theirs, given_back = (processing(conn, items=[1, 2]) for _ in range(3))
    for taken in (mine, theirs):
        assert checkpoint(conn, taken, one_failed()) == 1
    expire_lease(conn, given_back.id)
    conn.execute("SELECT batchq.cancel(%s)", [given_back.id])
    stale = theirs._replace(token=uuid4())
    swapped = theirs._replace(token=mine.token)
    assert complete(conn, mine, stale, swapped, given_back, keep=False) == {mine.id}
    assert values(conn, "SELECT id FROM batchq.all_batches ORDER BY id") == [theirs.id, given_back.id]
    assert values(conn, "SELECT batch_id FROM batchq.failed_items") == [theirs.id]


def one_failed() -> Progress:
    """Return the progress of a batch whose first item has failed."""
    return Progress(1, 1, [failure(0)], first_index=0)


def test_a_unique_key_is_free_again(conn: Conn, dsn: str) -> None:
    app = batchq.App()
    register(app, "def", "once", print)
    for _ in range(2):
        assert batchq.enqueue(conn, "once", unique_key="k") is not None
        assert batchq.enqueue(conn, "once", unique_key="k") is None
        drain(app, dsn, **FORGETTING)
    assert value(conn, "SELECT count(*) FROM batchq.all_batches") == 0


def test_ids_and_tokens_of_many_claims_are_told_apart(conn: Conn) -> None:
    step("each batch with the token of another: nothing is deleted, nothing completed")
    taken = [processing(conn) for _ in range(4)]
    others = [one._replace(token=taken[number - 1].token) for number, one in enumerate(taken)]
    for keep in (False, True):
        assert complete(conn, *others, keep=keep) == set()
    assert complete(conn, taken[2], others[1], taken[0], keep=False) == {taken[2].id, taken[0].id}
    assert complete(conn, taken[3], others[1], keep=True) == {taken[3].id}
    insert(conn)
    assert values(conn, "SELECT status FROM batchq.all_batches ORDER BY id") == ["processing", "completed", "pending"]


if __name__ == "__main__":
    run_alone(__file__)
