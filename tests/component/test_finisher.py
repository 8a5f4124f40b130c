"""How completions are put together: ids that follow each other go as one run, and a group travels as one message."""

import random
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from batchq.postgres.statements import endings
from batchq.postgres.transactions import LONGEST_TEXT
from batchq.worker import finisher
from tests.component.rows import Conn, Taken, claim, complete, insert, values
from tests.support.alone import run_alone
from tests.support.steps import step

LARGE_ID = 20_000_000_000  # as after twenty thousand million batches
WHOLE_GROUP = finisher.MOST_A_GROUP


def claim_some(conn: Conn, count: int) -> tuple[list[int], UUID]:
    """Enqueue and claim batches; return their ids and their token."""
    for _ in range(count):
        insert(conn)
    token = uuid4()
    rows = claim(conn, token=token, limit=count)
    assert len(rows) == count
    return sorted(row.id for row in rows), token


def ended(ids: list[int], token: UUID) -> list[Any]:
    """Return completions, with as much of them as their grouping looks at."""
    claim = SimpleNamespace(token_text=str(token))
    return [SimpleNamespace(batch=SimpleNamespace(id=batch_id, claim=claim)) for batch_id in ids]


def ids_of(piece: list[Any]) -> list[int]:
    """Return the ids of completions."""
    return [entry.batch.id for entry in piece]


def text_length(conn: Conn, piece: list[Any], *, keep: bool) -> int:
    """Return the length of the statement that completes a piece."""
    tokens = [entry.batch.claim.token_text for entry in piece]
    statement, parameters = endings.complete("default", ids_of(piece), tokens, keep)
    return len(psycopg.ClientCursor(conn).mogrify(statement, parameters))


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "not kept"])
@pytest.mark.parametrize("seed", range(3))
def test_each_id_completes_by_its_own_token_in_whatever_order(conn: Conn, keep: bool, seed: int) -> None:
    order = random.Random(seed)
    claims = [claim_some(conn, count) for count in (30, 1, 20)]
    right = [Taken(batch_id, token) for ids, token in claims for batch_id in ids]
    wrong = {one.id for one in order.sample(right, 15)}
    others = [token for _, token in claims]
    given = [Taken(one.id, others[others.index(one.token) - 1]) if one.id in wrong else one for one in right]
    order.shuffle(given)
    step(f"{len(given)} ids, {len(wrong)} of them with the token of another claim of the same group")
    assert complete(conn, *given, keep=keep) == {one.id for one in right} - wrong
    assert values(conn, "SELECT id FROM batchq.all_batches WHERE status = 'processing' ORDER BY id") == sorted(wrong)


def test_an_id_between_two_runs_is_not_touched(conn: Conn) -> None:
    ids, token = claim_some(conn, 5)
    assert complete(conn, *(Taken(batch_id, token) for batch_id in ids if batch_id != ids[2])) == {*ids} - {ids[2]}
    assert values(conn, "SELECT id FROM batchq.all_batches WHERE status = 'processing'") == [ids[2]]


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "not kept"])
def test_a_whole_group_in_a_row_is_one_message(conn: Conn, keep: bool) -> None:
    ids = list(range(LARGE_ID, LARGE_ID + WHOLE_GROUP))
    random.Random(0).shuffle(ids)
    (piece,) = finisher.pieces(ended(ids, uuid4()))
    assert ids_of(piece) == sorted(ids)
    assert text_length(conn, piece, keep=keep) < 2_500


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "not kept"])
def test_scattered_ids_are_cut_so_that_each_piece_is_one_message(conn: Conn, keep: bool) -> None:
    ids = list(range(LARGE_ID, LARGE_ID + 2 * WHOLE_GROUP, 2))
    found = list(finisher.pieces(ended(ids, uuid4())))
    assert [batch_id for piece in found for batch_id in ids_of(piece)] == ids
    assert len(found) == -(-WHOLE_GROUP // finisher.MOST_RUNS)
    assert max(text_length(conn, piece, keep=keep) for piece in found) <= LONGEST_TEXT


def test_a_run_ends_where_the_token_does() -> None:
    first, second = uuid4(), uuid4()
    (piece,) = finisher.pieces(ended([3, 1], first) + ended([4, 2], second))
    assert ids_of(piece) == [1, 2, 3, 4]
    tokens = [entry.batch.claim.token_text for entry in piece]
    assert list(endings.starts_of_runs(ids_of(piece), tokens)) == [True] * 4
    assert list(endings.starts_of_runs([7, 8, 10, 9, 10], ["a"] * 5)) == [True, False, True, True, False]


if __name__ == "__main__":
    run_alone(__file__)
